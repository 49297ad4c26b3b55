"Recorded forwards change nothing: on a tape, which is as strict as a CUDA graph, and on a GPU where there is one."
import copy, gc

import pytest
import torch
from tape import record_tape
from tita.core import TitaError
from tita.decode.decoder import AlignedDecoder
from tita.decode.graphs import Graphs, record_cuda
from tita.decode.hf import aligned
from tita.models import chat_prompt
from tita.world.embedded import make_scenes
from test_decode import BASE, FORMS, PROCESSOR, REF, REWARD, HandProcessor, decoder, family, near, prompts

SETTINGS = [*(dict(draft=d) for d in (0, 3, "lazy", "auto")), dict(draft=2, temperature=1., top_p=.9, seed=3),
            dict(draft=0, repetition_penalty=1.3), dict(draft=3, stop="a")]


def taped(d):
    "The decoder, its forwards recorded on tapes; what is recorded is counted."
    made = []
    def record(f, inputs):
        made.append(f)
        return record_tape(f, inputs)
    for e in d.experts:
        e.record = record
    return d, made


def test_a_tape_repeats_what_was_done():
    "A function that adds to a running sum: its tape does that, too, and keeps the factor that Python held."
    total, factor = torch.zeros(2), 2
    def add(x):
        total.add_(factor * x)
        return total + 1
    replay, (x,), out = record_tape(add, [torch.ones(2)])
    assert total.tolist() == [2, 2]
    factor = 100
    x.copy_(torch.tensor([1., 3.]))
    replay()
    assert (total.tolist(), out.tolist()) == ([4, 8], [5, 9])


def needy(x):
    return x if (x > 0).any() else -x


NEEDY = [needy, lambda x: x * float(x.max()), lambda x: x[x > 0], lambda x: x + torch.tensor([1., 2.])]


@pytest.mark.parametrize("f", NEEDY)
@pytest.mark.parametrize("inference", [False, True])
def test_a_tape_refuses_what_needs_the_host(f, inference):
    with torch.inference_mode(inference), pytest.raises(TitaError, match="needs the host"):
        record_tape(f, [torch.ones(2)])


def test_python_runs_twice():
    "Once by itself, once for the recording; then the recording answers."
    graphs, calls = Graphs(record_tape), []
    def double(x):
        calls.append(1)
        return 2 * x
    for i in range(5):
        assert graphs("a", double, torch.tensor([float(i)])).tolist() == [2. * i]
    assert (len(calls), graphs.replays) == (3, 3)  # the second time it runs by itself, too, to compare


class Said(list):
    "Answers: equal if their tokens are, and their rewards but for rounding."
    def __eq__(self, other):
        pairs = list(zip(self, other))
        near = all(a.tokens == b.tokens and a.rewards == pytest.approx(b.rewards, abs=2e-3) for a, b in pairs)
        return near and len(self) == len(other)
    def __getitem__(self, i):
        return Said(super().__getitem__(i))


def said(d, images, questions, **kwargs):
    return Said(d.generate(images, questions, **kwargs))


def replayed(d):
    "Were forwards replayed, and none given up?"
    graphs = [e.spare[0].graphs for e in d.experts]
    return not any(g.off for g in graphs) and any(g.replays for g in graphs)


@pytest.mark.parametrize("form", FORMS)
def test_a_recording_says_the_same(form):
    "Every form and mode; one row, many ragged ones, and more than there are slots."
    images, questions = prompts(9)
    few_slots = [(4, dict(draft=3)), (3, dict(draft="auto", temperature=.7))]
    for slots, settings in [(None, s) for s in SETTINGS] + few_slots:
        plain, (tape, made) = decoder(form, bound=1.5, slots=slots), taped(decoder(form, bound=1.5, slots=slots))
        for part in (slice(None), slice(1)):
            found, want = (said(d, images[part], questions[part], max_new_tokens=14, **settings) for d in (tape, plain))
            assert found == want, settings
            assert made and replayed(tape)


def test_rows_grow_through_several_recordings():
    "A recording reads up to a column; rows that grow beyond it, in a cache that grows with them, are recorded anew."
    images, questions = prompts(3)
    questions = [" ".join([q] * n) for q, n in zip(questions, (30, 12, 1))]
    d = [decoder("ratio"), taped(decoder("ratio"))[0]]  # the prompts have 148, 220 and 52 tokens
    for part, new in ((slice(0, 3), 40), (slice(0, 3), 150), (slice(2, 3), 120)):
        plain, tape = (said(x, images[part], questions[part], max_new_tokens=new, draft=3, eos=()) for x in d)
        assert tape == plain
        kv = {key[2] for key in d[1].experts[0].spare[0].graphs.known}
        assert len(kv) > 1 and not d[1].experts[0].spare[0].graphs.off, kv


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "internvl"])
def test_families_on_a_tape(name):
    "Queries that share keys, and positions that a constant shifts."
    base, processor = family(name, 3, 0), HandProcessor(name)
    a, b, _ = (s.image for s in make_scenes(3))
    images = [a, b.resize((48, 64)), b.resize((48, 64))]
    questions = ["Describe the image."] * 2 + ["What color is the star?"]
    for draft in (0, 3):
        plain = AlignedDecoder(base, near(base, .05), processor, near(base, .1), lam=2.)
        tape, made = taped(AlignedDecoder(base, plain.rewards[0], processor, plain.references[0], lam=2.))
        found, want = (said(d, images, questions, max_new_tokens=8, draft=draft) for d in (tape, plain))
        assert found == want and made


def test_the_next_call_uses_the_recordings():
    "The cache comes back when an engine is gone, empty whatever was in it; a larger batch gets a larger one."
    images, questions = prompts(6)
    plain, (tape, made) = decoder("ratio"), taped(decoder("ratio"))
    want = said(plain, images, questions, max_new_tokens=12, draft=3)
    assert said(tape, images[:3], questions[:3], max_new_tokens=12, draft=3) == want[:3]
    said(tape, images[:3], questions[:3], max_new_tokens=12, draft=3)
    n, cache = len(made), tape.experts[0].spare[0]
    for e in tape.experts:
        with torch.inference_mode():
            for l in e.spare[0].layers:
                l.keys.fill_(float("nan"))
                l.values.fill_(float("nan"))
    assert said(tape, images[:3], questions[:3], max_new_tokens=12, draft=3) == want[:3]
    assert len(made) == n and tape.experts[0].spare == [cache]
    assert said(tape, images, questions, max_new_tokens=12, draft=3) == want and tape.experts[0].spare[0].rows == 6
    one, two = tape.engine(2), tape.engine(2)
    assert one.experts[0].cache is not two.experts[0].cache
    del one, two
    gc.collect()
    assert len(tape.experts[0].spare) == 1


def test_weights_that_move_are_recorded_anew():
    "New values are seen by a recording; a new place of the weights makes it void."
    base = copy.deepcopy(BASE)
    d = AlignedDecoder(base, REWARD, PROCESSOR, REF, lam=.6)
    tape, made = taped(AlignedDecoder(base, REWARD, PROCESSOR, REF, lam=.6))
    images, questions = prompts(2)
    changes = (lambda: None, lambda: base.lm_head.weight.data.mul_(-1),
               lambda: [setattr(p, "data", p.data.clone()) for p in base.parameters()],
               lambda: base.get_decoder().layers[1].mlp.up_proj.weight.data.mul_(-1))
    for change in changes:
        change()
        for _ in range(2):
            found, want = (said(x, images, questions, max_new_tokens=8, draft=0) for x in (tape, d))
            assert found == want


def test_a_recording_that_fails_is_left_alone():
    "A warning, and the same answers."
    def fail(f, inputs):
        raise RuntimeError("operation not permitted when stream is capturing")
    d = decoder("ratio")
    images, questions = prompts(2)
    want = said(d, images, questions, max_new_tokens=8, draft=0)
    for e in d.experts:
        e.record = fail
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted"):
        assert said(d, images, questions, max_new_tokens=8, draft=0) == want


def test_generate_of_transformers_on_a_tape():
    images, questions = prompts(1)
    x = PROCESSOR(text=chat_prompt(PROCESSOR, questions[0]), images=images[0], return_tensors="pt")
    out = []
    for d in (decoder("ratio"), taped(decoder("ratio"))[0]):
        how = dict(max_new_tokens=12, do_sample=False, custom_generate=aligned, decoder=d, reward_inputs=x)
        out.append(BASE.generate(**x, **how))
    assert torch.equal(*out)


# With a GPU: bash scripts/test.sh --gpu

@pytest.fixture
def on_gpu():
    "The models, on a GPU for a while."
    for m in (BASE, REWARD, REF):
        m.to("cuda")
    yield
    for m in (BASE, REWARD, REF):
        m.to("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("form", FORMS)
def test_cuda_graphs_say_the_same(form, on_gpu):
    images, questions = prompts(9)
    for settings in SETTINGS:
        eager, graphs = decoder(form, bound=1.5, graphs=False), decoder(form, bound=1.5)
        assert all(e.record is record_cuda for e in graphs.experts)
        found, want = (said(d, images, questions, max_new_tokens=14, **settings) for d in (graphs, eager))
        assert found == want, settings
        assert replayed(graphs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_host_does_not_wait_inside_a_block(on_gpu, monkeypatch):
    "From the first draft to the verified logits nothing is asked of the device."
    from tita.decode.experts import Expert
    from tita.decode.speculation import SpeculativeEngine
    def strict(f):
        def g(*args, **kwargs):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return f(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return g
    images, questions = prompts(5)
    d = decoder("ratio")
    want = said(d, images, questions, max_new_tokens=24, draft=3)
    said(d, images, questions, max_new_tokens=24, draft=3)
    monkeypatch.setattr(SpeculativeEngine, "_write_draft", strict(SpeculativeEngine._write_draft))
    monkeypatch.setattr(Expert, "_replay", strict(Expert._replay))
    assert said(d, images, questions, max_new_tokens=24, draft=3) == want
