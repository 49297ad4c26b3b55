"Matrices that are kept packed on a CPU: answers stay what they were, and follow their weights."
import gc
import threading

import pytest
import torch
from tita.decode import cache
from tita.decode.decoder import AlignedDecoder
from tita.decode.engine import Row
from tita.decode.sampling import Sampling
from tita.world.embedded import make_scenes, tiny_model, tiny_processor

pytestmark = pytest.mark.skipif(not cache.can_pack(), reason="this torch has no oneDNN")
PROCESSOR = tiny_processor()
SCENES = make_scenes(2, seed=3)


def lively(hidden, seed):
    "A model whose answers vary."
    model = tiny_model(hidden, 1)
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=1.5 / p.shape[-1]**.5, generator=g)
    model.lm_head.weight.data[model.config.image_token_id] = 0
    return model


@pytest.fixture
def models():
    "A base with matrices that are worth packing, and a reward without."
    cache.PACKED.clear()
    yield lively(768, 0), lively(32, 1)
    cache.PACKED.clear()


def decoder(base, reward):
    return AlignedDecoder(base, reward, PROCESSOR, form="interpolate", lam=.5)


def answers(aligned, draft=4):
    images, texts = [s.image for s in SCENES], [s.questions[0].text for s in SCENES]
    return [o.tokens for o in aligned.generate(images, texts, max_new_tokens=12, draft=draft)]


def packed_now():
    return sum(p.matrix is not None for p in cache.PACKED.values())


def test_drafts_are_read_with_packed_matrices(models, monkeypatch):
    monkeypatch.setattr(cache, "PACKED_BYTES", 0)
    alone = answers(decoder(*models))
    assert packed_now() == 0 and max(map(len, alone)) > 3
    monkeypatch.undo()
    aligned = decoder(*models)
    assert answers(aligned) == alone == answers(aligned, draft=0)
    assert packed_now() == 7


def test_a_training_step_between_two_answers(models):
    base, reward = models
    aligned = decoder(base, reward)
    was = answers(aligned)
    with torch.no_grad():
        for p in base.model.language_model.layers.parameters():
            p.neg_()
    now = answers(aligned)
    assert now != was and now == answers(decoder(base, reward), draft=0)


def test_writing_past_the_count(models):
    base, reward = models
    aligned = decoder(base, reward)
    was = answers(aligned)
    for p in base.model.language_model.layers.parameters():
        p.data = p.data if p.ndim < 2 else p.data.mul_(-1)
    now = answers(aligned)
    assert now != was and now == answers(decoder(base, reward), draft=0)


def test_copies_go_with_their_model(models):
    aligned = decoder(lively(768, 5), models[1])
    answers(aligned)
    assert packed_now() == 7
    del aligned
    gc.collect()
    assert packed_now() == 0


def test_threads_pack_each_matrix_once(models, monkeypatch):
    made = []
    monkeypatch.setattr(cache, "Packed", lambda *args, kind=cache.Packed: made.append(1) or kind(*args))
    found = []
    workers = [threading.Thread(target=lambda: found.append(answers(decoder(*models)))) for _ in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert len(made) == 7 and len(found) == 4 and all(f == found[0] for f in found)


@pytest.mark.parametrize("change", ["counted", "uncounted"])
def test_small_matrices_are_joined_anew_when_they_change(models, change):
    _, small = models
    aligned = decoder(small, lively(32, 2))
    before = answers(aligned)
    with torch.no_grad():
        for layer in small.model.language_model.layers:
            weight = layer.self_attn.v_proj.weight
            (weight if change == "counted" else weight.data).mul_(-1)
    after = answers(aligned)
    assert after == answers(decoder(small, lively(32, 2))) != before


def test_weights_that_change_while_a_row_runs_are_read():
    said = []
    for joins in (True, False):
        model = lively(32, 1)
        aligned = decoder(model, lively(32, 2))
        engine = aligned.engine(1)
        if not joins:
            for e in engine.experts:
                e.stack.is_large = True  # then each map is applied by itself
        image, question = SCENES[0].image, SCENES[0].questions[0].text
        engine.submit([Row(0, question, [image], Sampling(max_new_tokens=12), 0)])
        for _ in range(4):
            engine.step()
        with torch.no_grad():
            model.model.language_model.layers[0].self_attn.q_proj.weight.mul_(-2)
        while engine.busy:
            for _, output in engine.step():
                said.append(output.tokens)
    assert said[0] == said[1]


def test_maps_are_there_though_another_thread_forgets_them():
    class Forgotten(cache.Stack):
        joined = property(lambda self: ([], []), lambda self, made: None)  # whenever it is looked up

    model = lively(32, 1)
    stack = Forgotten(model.get_decoder(), model.config.get_text_config())
    assert len(stack._called()) == len(stack.layers) > 0
