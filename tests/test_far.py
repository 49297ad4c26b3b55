"Decoding on a device that is not the host, as on a GPU: nothing is mixed up; inside a block the host does not wait."
import pytest
import torch
from tita.decode.decoder import AlignedDecoder
from tita.decode.experts import Expert
from tita.decode.graphs import Graphs
from tita.decode.guidance import SAFE
from tita.decode.hf import aligned
from tita.models import chat_prompt
from tita.decode.speculation import SpeculativeEngine
from tita.train.trees import token_tree, tree_logits
from far import FAR, FarTensor, elsewhere, waits
from test_decode import BASE, FORMS, PROCESSOR, REF, REWARD, HandProcessor, decoder, family, near, prompts
from test_graphs import SETTINGS, Said, said


def rerun(f, inputs):
    "A recording that runs the function again: what is recorded is tested on tapes, here it is where things lie."
    inputs = [x.clone() for x in inputs]
    out = f(*inputs)
    return (lambda: out.copy_(f(*inputs))), inputs, out


def far_decoder(form, record, **kwargs):
    d = decoder(form, **kwargs)
    assert d.experts[0].device == FAR and d.experts[0].stack is not None
    for e in d.experts:
        e.record = rerun if record else None
    return d


def test_the_device_refuses_what_a_gpu_refuses():
    with elsewhere(BASE):
        x = torch.arange(3, device=FAR) + 1
        assert isinstance(x, FarTensor) and x.device == FAR and BASE.device == FAR
        assert x.cpu().tolist() == [1, 2, 3] and x[1:].cpu().tolist() == [2, 3]
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        assert (x + torch.tensor(1)).cpu().tolist() == [2, 3, 4]
        ordinary, index = torch.ones(3), torch.tensor([0])
        waiting = (lambda: int(x.max()), lambda: x.cpu(), lambda: ordinary.to(FAR), lambda: x[x > 1], lambda: x[index])
        free = (lambda: ordinary.to(FAR, non_blocking=True), lambda: x[torch.arange(2, device=FAR)],
                lambda: x.softmax(-1, torch.float))
        for f in (*waiting, *free):
            before = waits.count
            f()
            assert waits.count - before >= 1 if f in waiting else waits.count == before
    assert not isinstance(BASE.lm_head.weight.data, FarTensor)


SLOW = "interpolate", "arm"

@pytest.mark.parametrize("form", [pytest.param(f, marks=pytest.mark.slow) if f in SLOW else f for f in FORMS])
def test_the_same_answers(form):
    "Every form and mode; every other one with recordings."
    images, questions = prompts(7)
    replays = 0
    for i, settings in enumerate([*map(dict, SETTINGS), dict(draft=3, slots=3), dict(draft=3, slots=3)]):
        slots = settings.pop("slots", None)
        want = said(decoder(form, bound=1.5, slots=slots), images, questions, max_new_tokens=12, **settings)
        with elsewhere(BASE, REWARD, REF):
            d = far_decoder(form, i % 2, bound=1.5, slots=slots)
            assert said(d, images, questions, max_new_tokens=12, **settings) == want, settings
            graphs = [c.graphs for e in d.experts for c in e.spare]
            replays += sum(g.replays for g in graphs)
            assert not any(g.off for g in graphs) and bool(graphs) == i % 2
    assert replays


def test_other_ways_there():
    "The safe default, scores of answers, a stream, the base alone, transformers' generate, M-RoPE, a batch of trees."
    images, questions = prompts(4)
    make = lambda lam=.6, **kw: AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=lam, **kw)
    x = dict(PROCESSOR(text=chat_prompt(PROCESSOR, questions[0]), images=images[0], return_tensors="pt"))
    qwen, processor = family("qwen2.5-vl", 3, 0), HandProcessor("qwen2.5-vl")
    reward = near(qwen, .05)
    sized = [images[0], images[1].resize((48, 64))]
    trees = [token_tree([[5, 6, 7, 8, 9], [5, 6, 7, 10]]), token_tree([[5, 6, 7, 8, 9, 11], [5, 6, 9]])]
    starts = [[2, 2], [2, 2]]
    def ways(there):
        inputs = {k: v.to(there) for k, v in x.items()}
        answers = said(make(**SAFE), images, questions, max_new_tokens=10)
        custom = dict(custom_generate=aligned, decoder=make(), reward_inputs=inputs)
        mrope = AlignedDecoder(qwen, reward, processor, form="interpolate", lam=.7)
        logits = tree_logits(BASE, trees, starts)[0].detach().cpu()
        return dict(
            safe=answers, scored=Said(make().score(images, questions, texts)),
            streamed="".join(make().stream(images[0], questions[0], max_new_tokens=10)),
            alone=said(make().alone(), images, questions, max_new_tokens=10),
            generate=BASE.generate(**inputs, max_new_tokens=8, do_sample=False, **custom).tolist(),
            qwen=said(mrope, sized, ["Describe the image."] * 2, max_new_tokens=6, draft=3),
            trees=logits.round(decimals=3).tolist())
    texts = [o.text for o in make().generate(images, questions, max_new_tokens=6)]
    here = ways("cpu")
    with elsewhere(BASE, REWARD, REF, qwen, reward):
        there = ways(FAR)
    for name in here:
        assert there[name] == here[name], name


def test_the_host_does_not_wait_inside_a_block(monkeypatch):
    "From the first draft to the verified logits nothing is asked of the device, greedy or not, recorded or not."
    images, questions = prompts(5)
    inside, forward, strict = [False], Expert.forward, []
    def no_waits(f, when=lambda: True):
        def g(*args, **kwargs):
            waits.strict = when()
            strict.append(f) if waits.strict else None
            try:
                return f(*args, **kwargs)
            finally:
                waits.strict = False
        return g
    def verify(self, *args, f=SpeculativeEngine._verify):
        inside[0] = True
        try:
            return f(self, *args)
        finally:
            inside[0] = False
    def recording(self, *args, f=Graphs._record):
        was, waits.strict = waits.strict, False  # is checked as it is made, once
        try:
            return f(self, *args)
        finally:
            waits.strict = was
    with elsewhere(BASE, REWARD, REF), monkeypatch.context() as m:
        m.setattr(SpeculativeEngine, "_write_draft", no_waits(SpeculativeEngine._write_draft))
        m.setattr(SpeculativeEngine, "_verify", verify)
        m.setattr(Graphs, "_record", recording)
        m.setattr(Expert, "forward", no_waits(forward, lambda: inside[0]))
        for record in (False, True):
            for settings in (dict(draft=3), dict(draft=3, temperature=.8, top_p=.9, top_k=20)):
                d = far_decoder("ratio", record)
                for _ in range(2):
                    said(d, images, questions, max_new_tokens=24, **settings)
    assert len({id(f) for f in strict}) == 2 and strict.count(forward) > 20
