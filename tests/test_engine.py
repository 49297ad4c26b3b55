"The engine at its limits: rows at the end of their contexts, and forwards that fail."
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from tita.decode.decoder import AlignedDecoder
from tita.decode.experts import Expert
from tita.world.embedded import tiny_processor

torch.set_num_threads(1)
PROCESSOR = tiny_processor()
CONTEXT = 48  # positions that a model has learned; there is no further one


def learned_positions(seed, near=None):
    "A language model whose positions are a table; with `near` one that often agrees with another."
    torch.manual_seed(seed)
    sizes = dict(n_embd=32, n_layer=2, n_head=2, n_positions=CONTEXT, vocab_size=len(PROCESSOR.tokenizer))
    model = GPT2LMHeadModel(GPT2Config(initializer_range=.5, bos_token_id=1, eos_token_id=2, **sizes)).eval()
    if near is not None:
        model.load_state_dict({k: w + .05 * w.std() * torch.randn_like(w) for k, w in near.state_dict().items()})
    return model


BASE = learned_positions(0)
REWARD, REF = learned_positions(1, BASE), learned_positions(2, BASE)


def decoder(**how):
    return AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=.5, bound=2., **how)


def question(tokens):
    "One whose prompt has so many tokens."
    return " ".join(["cat"] * (tokens - 3))


def blocks(monkeypatch):
    "Notes of each forward its model, and of each row its slot, its length and how many tokens it gets."
    seen, forward = [], Expert.forward

    def noted(self, cache, rows, tokens, lens, *args, **kwargs):
        slots = range(rows.start, rows.stop) if isinstance(rows, slice) else rows.tolist()
        seen.append((self.core, {s: (n, tokens.shape[1]) for s, n in zip(slots, lens.tolist())}))
        return forward(self, cache, rows, tokens, lens, *args, **kwargs)

    monkeypatch.setattr(Expert, "forward", noted)
    return seen


@pytest.mark.parametrize("draft", [5, "lazy", "auto"])
@pytest.mark.parametrize("temperature", [0., 1.])
def test_rows_at_the_end_of_their_contexts(draft, temperature):
    "Each row says what it would say alone, up to the last position that its models have learned."
    questions = [question(n) for n in (16, 44, 30, 45, 20, 47, 38)]
    how = dict(max_new_tokens=100, eos=[], temperature=temperature, seed=3)
    alone = [decoder().generate(None, q, draft=0, **how)[0] for q in questions]
    together = decoder(slots=4).generate(None, questions, draft=draft, **how)
    assert [o.error for o in together] == [None] * len(questions)
    assert [o.tokens for o in together] == [o.tokens for o in alone]
    assert {o.stats["prompt_tokens"] + o.stats["new_tokens"] for o in together} == {CONTEXT}


def test_a_row_with_little_room_does_not_shorten_the_drafts_of_others(monkeypatch):
    d, draft = decoder(), 6
    how = dict(max_new_tokens=12, eos=[], draft=draft)
    seen = blocks(monkeypatch)
    d.generate(None, question(16), **how)
    alone = [block[0] for core, block in seen if core is BASE]
    seen.clear()
    full = d.generate(None, [question(16), question(46)], **how)[1]
    beside = [block[0] for core, block in seen if core is BASE and 0 in block]
    assert full.stats["new_tokens"] == CONTEXT - full.stats["prompt_tokens"] < draft
    assert beside[1:] == alone[1:] and (alone[1][1], len(alone)) == (draft + 1, len(beside))  # 0: the prompt
    assert all(n + q <= CONTEXT for core, block in seen for n, q in block.values())


@pytest.mark.parametrize("draft", [0, 3])
def test_a_forward_that_fails(draft, monkeypatch):
    "Nobody knows for which row it did: all running rows have the error, those that wait go on."
    questions = [question(n) for n in (16, 20, 18, 24, 22)]
    how = dict(max_new_tokens=8, eos=[], draft=draft)
    want = decoder().generate(None, questions, **how)
    forward, steps = Expert.forward, []

    def fails_once(self, cache, rows, tokens, lens, *args, **kwargs):
        steps.append(self.core is BASE and tokens.shape[1] == draft + 1)
        logits = forward(self, cache, rows, tokens, lens, *args, **kwargs)
        if sum(steps) == 2 and steps[-1]:
            self.cache.layers[0].keys[:] = float("nan")  # what it leaves must not reach the rows to come
            raise RuntimeError("CUDA error: an illegal memory access")
        return logits

    monkeypatch.setattr(Expert, "forward", fails_once)
    got = decoder(slots=2).generate(None, questions, **how)
    assert [bool(o.error) for o in got] == [True, True, False, False, False]
    assert all("illegal memory access" in o.error and o.tokens == [] for o in got[:2])
    assert [o.tokens for o in got[2:]] == [o.tokens for o in want[2:]]
