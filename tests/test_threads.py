"Several threads decode with the same models at once: each gets what it would get alone, the models stay as they were."
import sys
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tita.decode.decoder import AlignedDecoder
from tita.decode.hf import aligned
from tita.models import chat_prompt
from tita.world.embedded import make_scenes, tiny_model, tiny_processor

ROUNDS = 4
PROCESSOR = tiny_processor()
SCENES = make_scenes(4, seed=3)


def lively(model, seed):
    "Larger random weights: answers that vary."
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=.13, generator=g)
    model.lm_head.weight.data[model.config.image_token_id] = 0
    return model


def models():
    "A base, a reward and a reference that share its tower, and a reward with an adapter in language model and tower."
    base, *others = (lively(tiny_model(32, 2, vision_hidden=32, vision_layers=2), seed) for seed in range(4))
    reward, ref, tuned = others
    for m in others:
        m.model.vision_tower.load_state_dict(base.model.vision_tower.state_dict())
    targets = r".*(language_model|vision_tower).*(q_proj|v_proj|out_proj)"
    lora = get_peft_model(tuned, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    return base, reward, ref, lora


def decoders(base, reward, ref, lora):
    "Ways to decode over them, by name."
    return {
        "ratio": AlignedDecoder(base, reward, PROCESSOR, ref, lam=2.),
        "bounded": AlignedDecoder(base, reward, PROCESSOR, ref, lam=2., bound=.5),
        "own reference": AlignedDecoder(base, lora, PROCESSOR, lam=2.),
        "adapter on": AlignedDecoder(base, lora, PROCESSOR, form="interpolate", lam=.5),
        "contrast": AlignedDecoder(base, processor=PROCESSOR, form="contrast", lam=.5),
        "base": AlignedDecoder(base, processor=PROCESSOR),
        "many": AlignedDecoder(base, [reward, lora], PROCESSOR, lora, form="ratio", lam=1.),
    }


def asked(i):
    "Images and questions of the i-th call."
    scenes = SCENES[i % 3:i % 3 + 2]
    return [s.image for s in scenes for _ in range(2)], [q.text for s in scenes for q in s.questions[i:i + 2]]


def outputs(decoder, i, **kwargs):
    out = decoder.generate(*asked(i), max_new_tokens=6, **kwargs)
    return [(o.tokens, o.rewards) for o in out]


def same(found, want):
    "Equal tokens, and rewards that are equal but for rounding: how many rows and tokens a forward has differs."
    if isinstance(found, str) or not isinstance(want[0], tuple):
        return found == want
    return all(a[0] == b[0] and a[1] == pytest.approx(b[1], abs=2e-3) for a, b in zip(found, want, strict=True))


def in_transformers(decoder, base):
    "The same guidance inside the base's own `generate`."
    images, questions = asked(0)
    texts = [chat_prompt(PROCESSOR, q) for q in questions]
    inputs = PROCESSOR(text=texts, images=images, return_tensors="pt", padding=True)
    how = dict(max_new_tokens=6, do_sample=False, custom_generate=aligned, decoder=decoder, reward_inputs=inputs)
    return decoder.base.generate(**inputs, **how)[:, inputs["input_ids"].shape[1]:].tolist()


def jobs(made):
    "Calls by name, each with a result that can be compared."
    found = {}
    for name, d in made.items():
        for i, draft in enumerate((0, "auto")):
            found[name, draft] = lambda d=d, i=i, draft=draft: outputs(d, i, draft=draft)
    found["sampled"] = lambda: outputs(made["own reference"], 1, temperature=1., seed=3)
    found["transformers"] = lambda: in_transformers(made["ratio"], made["base"])
    return found


def state(model):
    "Weights, and what has been put on modules beside them."
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    changed = {n for n, m in model.named_modules() if "forward" in vars(m)}
    adapters = {n: m.disable_adapters for n, m in model.named_modules() if hasattr(m, "disable_adapters")}
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    hooks = {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()}
    return weights, changed, adapters, trained, hooks


def test_threads_get_what_each_would_get_alone():
    "Many calls at once over the same models, switching threads all the time."
    all_models = models()
    todo = jobs(decoders(*all_models))
    want = {name: job() for name, job in todo.items()}
    before = [state(m) for m in all_models]
    made = decoders(*all_models)
    got, interval = [], sys.getswitchinterval()
    start = threading.Barrier(6)

    def work(seed):
        own = jobs(made if seed % 2 else decoders(*all_models))  # shared decoders in some threads, own ones in others
        names = list(own)
        start.wait()
        for i in range(ROUNDS * len(names)):
            name = names[(i * 5 + seed) % len(names)]
            try:
                got.append((name, own[name]()))
            except Exception as e:  # noqa: what went wrong is compared below
                got.append((name, repr(e)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    sys.setswitchinterval(1e-5)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
    wrong = [(name, found) for name, found in got if not same(found, want[name])]
    assert len(got) == 6 * ROUNDS * len(todo) and not wrong, (len(wrong), wrong[:2])
    for m, (weights, *rest) in zip(all_models, before):
        now, *others = state(m)
        assert others == rest
        assert now.keys() == weights.keys() and all(torch.equal(now[k], weights[k]) for k in weights)
    assert all(same(job(), want[name]) for name, job in todo.items())
