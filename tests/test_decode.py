"""Aligned decoding is exact: against transformers, against recomputation and against enumeration, whatever a row's
neighbours, its slot and the draft are."""
import copy, itertools, json, os, shutil, subprocess, sys, threading
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TITA_PROGRESS", "0")
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from transformers import GenerationConfig
from tita.data.answers import answer_key, generate_answers, plan_answers
from tita.core import TitaError
from tita.decode import engine, sampling
from tita.decode.experts import Expert
from tita.views import diffusion_noise
from tita.decode.decoder import AlignedDecoder
from tita.decode.guidance import OWN, SAFE, Guidance, token_rewards
from tita.models import chat_prompt, looks_of, remember_base
from tita.world.embedded import load_models, make_scenes, tiny_model, tiny_processor

torch.set_num_threads(1)
PROCESSOR = tiny_processor()
TOKENIZER = PROCESSOR.tokenizer
IMAGE = TOKENIZER.convert_tokens_to_ids("<image>")


def enliven(model, seed, std=.13, image_token=IMAGE):
    "Larger random weights, so that answers vary; never an image token."
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=std, generator=g)
    model.lm_head.weight.data[image_token] = 0
    return model.eval()


def near(model, share, seed=9):
    "A model that often agrees."
    out, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    for p in out.get_decoder().parameters():
        if p.ndim > 1:
            p.data += share * p.std() * torch.randn(p.shape, generator=g)
    return out


@torch.no_grad()
def recompute(models, guidance, inputs, n, noise=None):
    "Aligned decoding from its definition: every model over the whole text for each token."
    ids = inputs["input_ids"]
    length, rewards = ids.shape[1], []
    rest = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}
    while len(rewards) < n and (not rewards or ids[0, -1] != 2):
        logits = []
        for i, m in enumerate(models):
            x = dict(rest)
            if "image_grid_thw" in rest:
                x["mm_token_type_ids"] = (ids == IMAGE).int()
            if noise == i:
                x["pixel_values"] = diffusion_noise(x["pixel_values"], 500, seeds=[0])
            forget_positions(m)
            logits.append(m(input_ids=ids, **x).logits[:, -1])
        r = 0 if guidance.form == "contrast" else 1
        scores, d = guidance(logits[0], logits[1:1 + r], logits[1 + r:])
        new = scores.argmax(-1)
        rewards.append(token_rewards(d, new).item())
        ids = torch.cat([ids, new[:, None]], 1)
    return ids[0, length:].tolist(), rewards


# Families whose processors need torchvision: the smallest processor that does what theirs do.

def tiles(image):
    "InternVL: one or two pictures of 32 x 32, by the image's width."
    x = torch.from_numpy(np.array(image)).float() / 127.5 - 1
    parts = [x[:32, :32], x[-32:, -32:]][:1 + (image.size[0] > 40)]
    return torch.stack([part.permute(2, 0, 1) for part in parts])  # (tiles, 3, 32, 32)


def patches(image):
    "Qwen: patches of 8 x 8 pixels, two frames each, an even number of them in each direction."
    x = torch.from_numpy(np.array(image)).float() / 127.5 - 1
    h, w = x.shape[0] // 16 * 2, x.shape[1] // 16 * 2
    x = x[:h * 8, :w * 8].reshape(h, 8, w, 8, 3).permute(0, 2, 4, 1, 3)  # (h, w, 3, 8, 8)
    x = x.reshape(h * w, 3, 1, 64).expand(-1, -1, 2, -1)  # (h w, 3, 2 frames, 64)
    return x.reshape(h * w, -1), [1, h, w]


class HandProcessor:
    chat_template = "see apply_chat_template"

    def __init__(self, family):
        self.family, self.tokenizer = family, TOKENIZER

    def apply_chat_template(self, *args, **kwargs):
        return PROCESSOR.apply_chat_template(*args, **kwargs)

    def look(self, images):
        "How many places each image takes in the text, and what the model gets of them."
        if self.family == "internvl":
            px = [tiles(im) for im in images]
            return [4 * len(p) for p in px], dict(pixel_values=torch.cat(px))
        px, grid = zip(*map(patches, images))
        places = [h * w // 4 for _, h, w in grid]
        return places, dict(pixel_values=torch.cat(px), image_grid_thw=torch.tensor(grid))

    def run(self, places):
        "What stands for an image in the text: a token before it, as Qwen has between two; InternVL's ends, too."
        tokens = "USER:" + "<image>" * places
        return f"{tokens}ASSISTANT:" if self.family == "internvl" else tokens

    def __call__(self, text, images, return_tensors="pt", padding=False, add_special_tokens=True):
        images = [images] if isinstance(images, Image.Image) else list(images)
        texts = [text] if isinstance(text, str) else text
        places, pixels = self.look(images)
        runs = [self.run(n) for n in places]
        whole = []
        for text in texts:
            first, *others = text.split("<image>")
            whole.append(first + "".join(runs.pop(0) + part for part in others))
        out = dict(self.tokenizer(whole, return_tensors="pt", padding=padding))
        return out | dict(mm_token_type_ids=(out["input_ids"] == IMAGE).int()) | pixels


def family(name, layers, seed):
    "A tiny model of a family."
    import transformers as t
    torch.manual_seed(seed)
    text = dict(
        vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=layers, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ids = dict(image_token_id=IMAGE, video_token_id=3, vision_start_token_id=5, vision_end_token_id=6)
    tower = dict(hidden_size=32, intermediate_size=64)
    merging = dict(num_heads=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=32)
    if name == "qwen2.5-vl":
        text |= dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]})
        tower |= dict(merging, depth=2, window_size=32, fullatt_block_indexes=[1])
        config = t.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids)
        model = t.Qwen2_5_VLForConditionalGeneration(config)
    elif name == "qwen3-vl":
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        text |= dict(head_dim=8, rope_scaling=rope)
        tower |= dict(merging, depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
        model = t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config=text, vision_config=tower, **ids))
    else:
        text |= dict(model_type="qwen2")
        tower |= dict(num_hidden_layers=2, num_attention_heads=2, image_size=[32, 32], patch_size=[8, 8])
        shape = dict(image_token_id=IMAGE, image_seq_length=4, downsample_ratio=.5)
        model = t.InternVLForConditionalGeneration(t.InternVLConfig(text_config=text, vision_config=tower, **shape))
    return enliven(model, seed, .15)


def questions_about_images():
    "Images of several sizes, several questions on one, several images in one."
    a, b, c = (s.image for s in make_scenes(3))
    wide = b.resize((48, 64))
    return [
        (a, "Is there a ball in the image?"), (a, "Describe the image."), (wide, "What color is the star?"),
        (c.resize((32, 32)), "Is there a ball in the image?"), (wide, "How many cup icons are there?"),
        ([a, c.resize((48, 32))], "Which has a cup?")]


def forget_positions(model):
    "Qwen keeps the offset of its last call."
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "internvl"])
def test_families(name):
    "Alone, batched, refilled, drafted."
    base, processor = family(name, 3, 0), HandProcessor(name)
    reward, ref = near(base, .05), near(base, .1)
    images, questions = map(list, zip(*questions_about_images()))
    inputs = []
    for image, question in zip(images, questions):
        text = chat_prompt(processor, question, len(image) if isinstance(image, list) else 1)
        inputs.append(processor(text, image))
    alone = AlignedDecoder(base, processor=processor).generate(images, questions, max_new_tokens=8)
    for o, x in zip(alone, inputs):
        if name == "internvl":
            x.pop("mm_token_type_ids")
        forget_positions(base)
        own = base.generate(**x, max_new_tokens=8, do_sample=False)
        assert o.tokens == own[0, x["input_ids"].shape[1]:].tolist()
    for slots, draft in ((None, 0), (2, 0), (2, 3)):
        d = AlignedDecoder(base, reward, processor, ref, lam=2., slots=slots)
        assert d.experts[0].stack is not None
        for o, x in zip(d.generate(images, questions, max_new_tokens=6, draft=draft), inputs):
            tokens, rewards = recompute([base, reward, ref], d.guidance, x, 6)
            assert o.tokens == tokens and np.allclose(o.rewards, rewards, atol=1e-3)


# Greedy: three ways, the same tokens.

BASE = enliven(tiny_model(32, 3), 0)
REWARD, REF = near(BASE, .05, 1), near(BASE, .08, 2)
FORMS = dict(interpolate=[BASE, REWARD], ratio=[BASE, REWARD, REF], arm=[BASE, REWARD], contrast=[BASE, BASE])


def decoder(form, lam=.8, **kwargs):
    reward, ref = None if form == "contrast" else REWARD, REF if form == "ratio" else None
    return AlignedDecoder(BASE, reward, PROCESSOR, ref, form=form, lam=lam, **kwargs)


def prompts(n, seed=0):
    "Prompts of ragged lengths; several about one image."
    asked = [(s.image, q.text) for s in make_scenes(n // 5 + 1, seed=seed) for q in s.questions[::3]][:n]
    return [i for i, _ in asked], [" ".join([q] * (1 + j % 3)) for j, (_, q) in enumerate(asked)]


def inputs_of(question, image, processor=PROCESSOR):
    "What transformers would be given."
    return processor(text=chat_prompt(processor, question), images=image, return_tensors="pt")


def check_grid(n, forms, batches, new):
    images, questions = prompts(n)
    for form in forms:
        d = decoder(form, bound=1.5)
        noise = 1 if form == "contrast" else None
        want = [recompute(FORMS[form], d.guidance, inputs_of(q, i), new, noise)[0] for i, q in zip(images, questions)]
        for batch, draft in itertools.product(batches, (0, 3, "lazy", "auto")):
            d.slots = batch
            got = [o.tokens for o in d.generate(images, questions, max_new_tokens=new, draft=draft)]
            assert got == want, (form, batch, draft)


def test_greedy_small():
    check_grid(6, ["ratio", "contrast"], (1, 4), 6)


@pytest.mark.slow
def test_greedy_grid():
    check_grid(200, list(FORMS), (1, 8), 12)


def test_bound_settles_nothing_wrongly():
    "Lazy guidance gives the tokens and the rewards of guidance that is always there."
    images, questions = prompts(12, seed=3)
    for form in "ratio", "interpolate":
        d = decoder(form, lam=1., bound=.05)
        lazy, always = (d.generate(images, questions, max_new_tokens=20, draft=draft) for draft in ("lazy", 0))
        for a, b in zip(lazy, always):
            assert a.tokens == b.tokens and a.base_tokens == b.base_tokens
            assert np.allclose(a.rewards, b.rewards, atol=1e-3)


# Sampled: the joint law of three tokens against enumeration.

TEN_WORDS = ["<pad>", "<s>", "</s>", "<image>", "a", "b", "c", "d", "e", "f"]
TERSE = ("<s> {% for m in messages %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}")


def ten_words_processor():
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(TEN_WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(w, lstrip=True, rstrip=True) for w in TEN_WORDS[:4]])
    special = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, extra_special_tokens={"image_token": "<image>"}, **special)
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False), tokenizer, patch_size=8,
        vision_feature_select_strategy="default", chat_template=TERSE, image_token="<image>",
        num_additional_image_tokens=1)


def ten_words_model():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return LlavaForConditionalGeneration(LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=16, patch_size=8),
        text_config=LlamaConfig(**size, vocab_size=10, max_position_embeddings=64, **special),
        image_token_id=3, vision_feature_layer=-1, image_seq_length=4))


def ten_words():
    "A base, a reward and a reference whose vocabulary has ten words, with their processor."
    torch.manual_seed(0)
    processor = ten_words_processor()
    return [enliven(ten_words_model(), i, .35, 3) for i in range(3)], processor


@torch.no_grad()
def joint(models, processor, guidance, image, question, seed):
    "Probabilities of all 10 x 10 x 10 answers; `seed` is of `contrast`'s noise, which `generate` takes from its own."
    x = inputs_of(question, image, processor)
    n = x["input_ids"].shape[1]
    answers = torch.tensor(list(itertools.product(range(10), repeat=3)))
    ids = torch.cat([x["input_ids"].expand(1000, -1), answers], 1)
    logits = []
    for i, m in enumerate(models):
        px, is_noised = x["pixel_values"], guidance.form == "contrast" and i == 1
        px = diffusion_noise(px, 500, seeds=[seed]) if is_noised else px
        feats = torch.cat(m.get_image_features(px).pooler_output)
        e = m.get_input_embeddings()(ids)
        at = (ids == 3) & (torch.arange(ids.shape[1]) < n)
        e[at] = feats.repeat(1000, 1)
        logits.append(m.lm_head(m.model.language_model(inputs_embeds=e).last_hidden_state)[:, n - 1:-1])
    r = 0 if guidance.form == "contrast" else 1
    scores, _ = guidance(logits[0], logits[1:1 + r], logits[1 + r:])
    return scores.log_softmax(-1).gather(-1, answers[..., None])[..., 0].sum(1).double().exp()


def p_value(outputs, p):
    "Chi-square of the drawn answers; cells with less than five expected are pooled."
    from scipy.stats import chi2
    numbers = torch.tensor([o.tokens for o in outputs]) @ torch.tensor([100, 10, 1])
    seen = numbers.bincount(minlength=1000).double()
    want = p * len(outputs)
    rare = want < 5
    seen, want = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (seen, want))
    keep = want > 0
    return float(chi2.sf(((seen - want)[keep]**2 / want[keep]).sum(), int(keep.sum()) - 1))


def law(form, draft, n, slots=None, seed=1):
    "p-values of two questions of different length, drawn side by side."
    models, processor = ten_words()
    base, reward, ref = models
    image = make_scenes(1)[0].image.resize((16, 16))
    questions = ["a b", "c d e f a"]
    form_models = dict(interpolate=[base, reward], ratio=models, arm=[base, reward], contrast=[base, base])[form]
    reward, ref = None if form == "contrast" else reward, ref if form == "ratio" else None
    d = AlignedDecoder(base, reward, processor, ref, form=form, lam=.6, slots=slots)
    out = d.generate(image, questions, n=n, max_new_tokens=3, temperature=1., eos=[], draft=draft, seed=seed)
    laws = [joint(form_models, processor, d.guidance, image, q, seed) for q in questions]
    return [p_value(out[i * n:(i + 1) * n], p) for i, p in enumerate(laws)]


def test_law_of_samples():
    assert min(law("ratio", 2, 3000)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("form", list(FORMS))
def test_law_of_samples_all(form):
    for draft in (0, 1, 3):
        assert min(law(form, draft, 20000)) > 1e-4, draft


def test_law_without_residual_fails(monkeypatch):
    "The control: drawing from p after a rejection, instead of from the residual, is found out."
    monkeypatch.setattr(sampling, "residual", lambda p, q: p)
    assert min(law("ratio", 2, 3000)) < 1e-6


# No row knows its neighbours, its slot or the draft.

QUESTIONS = [
    "Describe the image.", "Is there a ball in the image?", "What color is the star? " * 3,
    "How many cup icons are there? " * 2]
SCENES = [s.image for s in make_scenes(3, seed=8)] + [None]
rows = st.tuples(st.integers(0, 3), st.integers(0, 3)) # a scene and a question
hows = st.fixed_dictionaries(dict(
    temperature=st.sampled_from([0., .7, 1.3]), top_p=st.sampled_from([1., .8]), max_new_tokens=st.integers(1, 9),
    repetition_penalty=st.sampled_from([1., 1.3]), stop=st.sampled_from([(), ("star",), ("a", "7")]),
    eos=st.sampled_from([None, (2, 20), tuple(range(7, 40))]), seed=st.integers(0, 3)))
batches = st.fixed_dictionaries(dict(
    slots=st.integers(1, 5), draft=st.sampled_from([0, 1, 2, 5, "auto", "lazy"]),
    refill=st.sampled_from([0., .25, 1.])))
EXAMPLES = settings(
    max_examples=int(os.environ.get("TITA_EXAMPLES", 25)), deadline=None, derandomize=True,
    suppress_health_check=list(HealthCheck))
ALONE = {}


def alone(form, bound, row, how, sample=0):
    "The answer of a row by itself; of the same question asked again it is the next sample."
    key = form, bound, row, sample, json.dumps(how, sort_keys=True)
    if key not in ALONE:
        d = decoder(form, bound=bound)
        ALONE[key] = d.generate([SCENES[row[0]]], [QUESTIONS[row[1]]], n=sample + 1, draft=0, **how)[sample]
    return ALONE[key]


@EXAMPLES
@given(
    st.sampled_from(["ratio", "interpolate", "arm"]), st.sampled_from([None, .3]),
    st.lists(rows, min_size=1, max_size=8), hows, batches)
def test_rows_are_independent(form, bound, asked, how, batch):
    d = decoder(form, bound=bound, slots=batch["slots"])
    make = d.engine
    d.engine = lambda *a, **k: make(*a, **{**k, "refill": batch["refill"]})
    draft = batch["draft"] if bound or batch["draft"] != "lazy" else 0
    images, questions = [SCENES[i] for i, _ in asked], [QUESTIONS[j] for _, j in asked]
    got = d.generate(images, questions, draft=draft, errors="row", **how)
    for i, (row, o) in enumerate(zip(asked, got)):
        want = alone(form, bound, row, how, asked[:i].count(row))
        assert (o.tokens, o.text, o.stats) == (want.tokens, want.text, want.stats)
        assert np.allclose(o.rewards, want.rewards, atol=1e-3)


@pytest.mark.slow
def test_bfloat16(capsys):
    "bfloat16 rounds differently in blocks of different size: how often that changes an answer."
    models = [copy.deepcopy(m).bfloat16() for m in (BASE, REWARD, REF)]
    images, questions = prompts(60, seed=5)
    d = AlignedDecoder(models[0], models[1], PROCESSOR, models[2], lam=.8)
    a, b = (d.generate(images, questions, max_new_tokens=12, draft=k) for k in (0, 3))
    same = [x.tokens == y.tokens for x, y in zip(a, b)]
    with capsys.disabled():
        print(f"\nbfloat16: {sum(same)} of {len(same)} answers equal with and without draft")
    assert sum(same) >= .8 * len(same)


# A stream of questions: the answers of preference data.

VIEWS = "clean", "diffusion-800", "moco", "none"


def test_answers_are_those_of_data_generation():
    """Every view of every picture, with the seeds of `tita.data.answers`: the same greedy answers, and each picture and
    view looked at once."""
    scenes = {f"{i}.png": s for i, s in enumerate(make_scenes(4, seed=6))}
    images = {name: s.image for name, s in scenes.items()}
    asked = [dict(question_id=f"{name} {i}", image=name, text=q.text)
        for name, s in scenes.items() for i, q in enumerate(s.questions[:5])]
    made = generate_answers(BASE, PROCESSOR, asked, images, VIEWS, max_new_tokens=12, seed=4)
    want = {answer_key(r): r["answer"] for r in made}
    looks, d = [], AlignedDecoder(BASE, processor=PROCESSOR, slots=7)
    note = lambda module, args, output: looks.append(len(output[0]))
    hook = BASE.model.vision_tower.register_forward_hook(note)
    got = list(d.answers(plan_answers(asked, VIEWS), images, seed=4, max_new_tokens=12))
    hook.remove()
    assert {answer_key(o.question): o.text for o in got} == want and len(got) == len(want) == 80
    assert sum(looks) == len(images) * 3 and len({*want.values()}) > 10


def test_answers_read_a_file_as_they_go():
    "A file of any length: rows are read as they are needed, and one that cannot be read is an answer with an error."
    image, read = make_scenes(1)[0].image, []
    def rows():
        for i in range(300):
            read.append(i)
            yield dict(question_id=i, image=image if i % 100 else "gone.png", text="Is there a ball?")
    ahead, d = [], AlignedDecoder(BASE, processor=PROCESSOR, slots=4)
    for n, o in enumerate(d.answers(rows(), window=16, max_new_tokens=2), 1):
        assert (o.error is not None) == (o.question["question_id"] % 100 == 0)
        ahead.append(len(read) - n)
    assert n == 300 and max(ahead) <= 16 + 4 * 4


# λ = 0 is the base's own `generate`, whatever its settings.

HONOURED = dict(
    max_length=70, max_new_tokens=3, min_new_tokens=6, min_length=80, repetition_penalty=1.6,
    encoder_repetition_penalty=1.5, no_repeat_ngram_size=2, encoder_no_repeat_ngram_size=2,
    bad_words_ids=[[20], [7, 8]], forced_bos_token_id=9, forced_eos_token_id=2, remove_invalid_values=True,
    exponential_decay_length_penalty=(2, 1.8), suppress_tokens=list(range(10, 60)),
    begin_suppress_tokens=[*range(10, 60)], sequence_bias=[[[30], 6.]], renormalize_logits=True,
    eos_token_id=list(range(20, 60)))
DRAWN = dict( # each leaves one token
    temperature=1e-4, top_k=1, top_p=1e-6, min_p=1., typical_p=1e-6, top_h=1e-6, epsilon_cutoff=.99, eta_cutoff=.99)
INERT = set("""use_cache cache_implementation cache_config max_cache_len early_stopping length_penalty diversity_penalty
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate pad_token_id
    bos_token_id decoder_start_token_id num_assistant_tokens num_assistant_tokens_schedule
    assistant_confidence_threshold max_matching_ngram_size assistant_lookbehind target_lookbehind
    assistant_ensemble_weight speculation_type compile_config disable_compile continuous_batching_config low_memory
    prefill_chunk_size _from_model_config transformers_version""".split())
ELSEWHERE = {"do_sample", "max_time", "watermarking_config", "stop_strings"} # with DRAWN; a deadline; below
IMAGE_ASKED, ASKED = make_scenes(1, seed=3)[0].image, "Is there a ball in the image?"


def own_answer(model, **how):
    x = inputs_of(ASKED, IMAGE_ASKED)
    how = {"max_new_tokens": 8} | how if "max_length" not in how else how
    return model.generate(**x, tokenizer=TOKENIZER, **how)[0, x["input_ids"].shape[1]:].tolist()


def test_every_setting_of_generate_has_its_place():
    from tita.decode.sampling import REFUSED
    places = [set(HONOURED), set(DRAWN), INERT, ELSEWHERE, set(REFUSED)]
    assert set(GenerationConfig().to_dict()) == set.union(*places)
    assert sum(map(len, places)) == len(set.union(*places))


@pytest.mark.parametrize("name", [*HONOURED, *DRAWN])
def test_settings_of_generate(name):
    "Given in the call, and brought by the checkpoint."
    value = (HONOURED | DRAWN)[name]
    more = dict(do_sample=True) if name in DRAWN else {}
    if name == "eta_cutoff": # it leaves several
        more["temperature"] = 1e-4
    more |= {} if name in ("max_length", "max_new_tokens") else dict(max_new_tokens=8)
    want = own_answer(BASE, **{name: value}, **more)
    d = AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=0.)
    assert d.generate(IMAGE_ASKED, ASKED, **{name: value}, **more)[0].tokens == want
    brings = copy.deepcopy(BASE)
    brings.generation_config.update(**{name: value}, **more)
    assert AlignedDecoder(brings, processor=PROCESSOR).generate(IMAGE_ASKED, ASKED)[0].tokens == want


def test_eta_is_that_of_generate():
    made = AlignedDecoder(BASE, processor=PROCESSOR)._sampling(temperature=1., eta_cutoff=.3).processors(BASE)
    assert [type(m).__name__ for m in made] == ["EtaLogitsWarper"]


def test_stop_strings_of_the_checkpoint():
    "The row ends with the token that completes the string, as in `generate` (which does not know this tokenizer)."
    want, brings = own_answer(BASE), copy.deepcopy(BASE)
    stop = TOKENIZER.decode(want[2:3]).strip()
    brings.generation_config.stop_strings = [stop]
    first = next(n for n in range(1, 9) if stop in TOKENIZER.decode(want[:n]))
    got = AlignedDecoder(brings, processor=PROCESSOR).generate(IMAGE_ASKED, ASKED, max_new_tokens=8)[0]
    assert got.tokens == want[:first] and got.stats["finish"] == "stop"


def test_watermark_is_that_of_generate():
    from transformers import WatermarkingConfig
    how = dict(max_new_tokens=8, watermarking_config=WatermarkingConfig(bias=8.))
    got = AlignedDecoder(BASE, processor=PROCESSOR).generate(IMAGE_ASKED, ASKED, **how)[0]
    assert got.tokens == own_answer(BASE, **how)


def test_settings_that_are_refused():
    from tita.decode.sampling import REFUSED
    d = AlignedDecoder(BASE, processor=PROCESSOR)
    for name in REFUSED:
        with pytest.raises(TitaError, match=name):
            d.generate(IMAGE_ASKED, ASKED, **{name: 3})


# A long life, and what a server does.

def test_memory_stays_flat():
    "Ten thousand settings leave what one leaves."
    e = AlignedDecoder(BASE, REWARD, PROCESSOR, REF).engine(4)
    for i in range(10_000):
        e.rows = [engine.Row(0, ASKED, [], sampling.Sampling(max_new_tokens=1 + i), 0)]
        e._survey()
    assert len(e.groups) == len(e.warpers) == 1


def test_a_penalty_is_paid_for_while_it_runs():
    d = AlignedDecoder(BASE, REWARD, PROCESSOR, REF)
    e = d.engine(2)
    for how in (dict(repetition_penalty=1.5), {}):
        sampling, listener = d._sampling(max_new_tokens=3, **how), print if how else None
        e.submit([engine.Row(0, ASKED, [IMAGE_ASKED], sampling, 0, on_token=listener)])
        e.step()
        assert (e.forcing, e.is_heard) == (bool(how), bool(how))
        while e.busy:
            e.step()


@pytest.mark.parametrize("draft", [0, 3, "lazy", "auto"])
def test_rows_have_their_own_strength(draft):
    images, questions = prompts(6, seed=5)
    lams, bounds = [0., .5, 2., 1., None, 2.], [None, .2, 1., None, None, .5]
    d = AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=1., bound=1., slots=4)
    got = d.generate(images, questions, lam=lams, bound=bounds, draft=draft, max_new_tokens=8)
    for o, i, q, lam, bound in zip(got, images, questions, lams, bounds):
        own = dict(lam=1. if lam is None else lam, bound=1. if bound is None else bound)
        one = AlignedDecoder(BASE, REWARD, PROCESSOR, REF, **own)
        assert o.tokens == one.generate(i, q, draft=0, max_new_tokens=8)[0].tokens


@pytest.mark.parametrize("draft", [0, 3])
def test_an_error_of_a_function_stays_with_its_row(draft):
    images, questions = prompts(5, seed=6)
    def decode(lam, images, questions, draft, n=8):
        decoder = AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=lam)
        return decoder.generate(images, questions, draft=draft, max_new_tokens=n)
    whole, seen = decode(1., images, questions, 0), []
    def listen(step):
        seen.append(step.base[..., 0].clone())
        return torch.ones(*step.base.shape[:-1], 1)
    decode(listen, images[2], questions[2], 0, n=2)
    def fails(step):
        if torch.isclose(step.base[..., 0], seen[1][0], atol=1e-5).any():
            raise RuntimeError("no λ here")
        return torch.ones(*step.base.shape[:-1], 1)
    got = decode(fails, images, questions, draft)
    assert "no λ here" in got[2].error
    assert [o.tokens for i, o in enumerate(got) if i != 2] == [o.tokens for i, o in enumerate(whole) if i != 2]


def rows_for(d, images, questions, n):
    "Rows of an engine that is driven by hand."
    sampling = d._sampling(max_new_tokens=n)
    return [engine.Row(i, q, [im], sampling, 0) for i, (im, q) in enumerate(zip(images, questions))]


@pytest.mark.parametrize("draft", [0, 3, "auto"])
def test_rows_come_go_and_fail_while_others_run(draft):
    images, questions = prompts(8, seed=7)
    d = AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=1., slots=3)
    want = d.generate(images, questions, max_new_tokens=12, draft=0)
    rows = rows_for(d, images, questions, 12)
    e, over = d.engine(3, draft=draft), {}
    e.now = lambda: 0. if e.steps < 2 else 100.
    rows[0].deadline, rows[7].on_token = 50., lambda token, reward: 1 / 0
    e.submit(rows[:3])
    over |= dict(e.step())
    e.submit(rows[3:])
    e.cancel(rows[5])
    while e.busy:
        over |= dict(e.step())
    finish = [over[r].stats["finish"] for r in rows]
    assert finish[0] in ("deadline", want[0].stats["finish"]) and finish[5] == "cancelled"
    assert "ZeroDivisionError" in over[rows[7]].error
    assert over[rows[0]].tokens == want[0].tokens[:len(over[rows[0]].tokens)]
    assert all(over[rows[i]].tokens == want[i].tokens for i in (1, 2, 3, 4, 6))


def test_rows_from_another_thread():
    images, questions = prompts(6, seed=8)
    d = AlignedDecoder(BASE, processor=PROCESSOR, slots=2)
    want, e, over = d.generate(images, questions, max_new_tokens=6), d.engine(2), {}
    rows = rows_for(d, images, questions, 6)
    sender = threading.Thread(target=lambda: [e.submit([r]) for r in rows])
    sender.start()
    while sender.is_alive() or e.busy:
        over |= dict(e.step())
    sender.join()
    over |= {r: o for r, o in e.close()}
    assert [over[r].tokens for r in rows] == [o.tokens for o in want]


# Contexts, streams, and what is given wrongly.

@pytest.mark.parametrize("draft", [0, 5, "auto"])
def test_a_row_near_the_end_of_its_context(draft, monkeypatch):
    "Nobody reads or drafts beyond the context, however much room the others have."
    d = AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=1.)
    questions = [ASKED, ASKED * 3]
    longest = len(PROCESSOR(text=chat_prompt(PROCESSOR, questions[1]), images=IMAGE_ASKED)["input_ids"][0])
    for x in d.experts:
        x.context = longest + 4
    reads, forward = [], Expert.forward
    def counted(self, cache, rows, tokens, lens, *args, **kwargs):
        reads.append(int(lens.max()) + tokens.shape[1])
        return forward(self, cache, rows, tokens, lens, *args, **kwargs)
    monkeypatch.setattr(Expert, "forward", counted)
    out = d.generate(IMAGE_ASKED, questions, draft=draft, max_new_tokens=20, eos=[])
    assert len(out[0].tokens) > len(out[1].tokens) == 4 and max(reads) <= longest + 4


def test_score_beyond_the_context_and_of_nothing():
    d = AlignedDecoder(BASE, REWARD, PROCESSOR, REF)
    with pytest.raises(TitaError, match="the context has room for"):
        d.score(None, ["a"], [[5] * 5000])
    nothing = d.score(None, ["a"], [[]])[0]
    assert (nothing.tokens, nothing.rewards, nothing.text) == ([], [], "")


@pytest.mark.parametrize("draft", [0, 3])
def test_stream_with_a_stop_string(draft):
    "Pieces come as they are sure, and joined are the answer."
    d = AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=1.)
    whole = d.generate(IMAGE_ASKED, ASKED, max_new_tokens=12, eos=[])[0]
    words = whole.text.split()
    for stop in ("never said", words[5], f"{words[5]} {words[6]}"):
        pieces = list(d.stream(IMAGE_ASKED, ASKED, max_new_tokens=12, eos=[], stop=stop, draft=draft))
        assert "".join(pieces) == d.generate(IMAGE_ASKED, ASKED, max_new_tokens=12, eos=[], stop=stop)[0].text
        assert len(pieces) > (3 if stop == "never said" else 0)


def test_wrong_or_forgotten():
    d = AlignedDecoder(BASE, REWARD, PROCESSOR, REF)
    wrong = (dict(seed="a"), "seed is 'a'"), (dict(draft="banana"), "draft is 'banana'"), (dict(lam=-1.), "λ is -1")
    for how, why in wrong:
        with pytest.raises(TitaError, match=why):
            d.generate(IMAGE_ASKED, ASKED, **how)
    with pytest.raises(TitaError, match="draft is 'banana'"):
        d.alone().generate(IMAGE_ASKED, ASKED, draft="banana")
    with pytest.raises(TitaError, match="questions are given as int"):
        d.generate(IMAGE_ASKED, 5)
    with pytest.raises(TitaError, match="makes no use of a reference"):
        AlignedDecoder(BASE, REWARD, PROCESSOR, REF, form="interpolate")
    of_array, of_image = (d.generate(i, ASKED, max_new_tokens=5)[0] for i in (np.array(IMAGE_ASKED), IMAGE_ASKED))
    assert of_array.tokens == of_image.tokens
    drawn = dict(max_new_tokens=6, temperature=1.3)
    listed, counted = d.generate(IMAGE_ASKED, [ASKED] * 3, **drawn), d.generate(IMAGE_ASKED, ASKED, n=3, **drawn)
    assert len({tuple(o.tokens) for o in listed}) == 3
    assert [o.tokens for o in listed] == [o.tokens for o in counted]


def test_an_adapter_that_is_put_on_later():
    from peft import LoraConfig, get_peft_model
    base = copy.deepcopy(BASE)
    d = AlignedDecoder(base, processor=PROCESSOR)
    before = d.generate(IMAGE_ASKED, ASKED, max_new_tokens=6)[0].tokens
    lora = get_peft_model(base, LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj)"))
    for n, p in lora.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=1., generator=torch.Generator().manual_seed(0))
    now = d.generate(IMAGE_ASKED, ASKED, max_new_tokens=6)[0].tokens
    assert now == own_answer(base, max_new_tokens=6) != before


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "A base, its own reward, a weak one, and one that says nothing of its base, in folders."
    folder = tmp_path_factory.mktemp("pairs")
    rewards = dict(own=copy.deepcopy(REWARD), weak=copy.deepcopy(REWARD), foreign=copy.deepcopy(REWARD))
    remember_base(rewards["own"], looks_of(BASE), .9, 50)
    remember_base(rewards["weak"], looks_of(BASE), .6, 50)
    remember_base(rewards["foreign"], looks_of(REF), .9, 50)
    for name, model in dict(base=BASE, ref=REF, **rewards).items():
        model.save_pretrained(folder/name)
    PROCESSOR.save_pretrained(folder/"base")
    return folder


def ways(*models):
    "The guidance that a decoder gets where nothing is named: in Python, and from what the commands call."
    from tita.decode.ask import load_decoder # tita-ask, tita-serve, lmms-eval
    from tita.eval.eval_cli import Options, first_decoder # tita-eval
    from tita.eval.evaluation import local_decoder # tita-bench
    base, reward, ref = map(str, models)
    yield AlignedDecoder(base, reward, ref=ref).guidance
    yield load_decoder(base, reward, ref).guidance
    yield first_decoder(Options(base, reward, ref)).guidance
    yield local_decoder(base, reward, ref).guidance


@pytest.mark.parametrize("reward", ["own", "weak", "foreign"])
def test_one_default(saved, reward):
    want = Guidance(**(OWN if reward == "own" else SAFE))
    assert list(ways(saved/"base", saved/reward, saved/"ref")) == [want] * 4


def test_what_is_named_wins(saved):
    from tita.decode.ask import load_decoder
    pair = str(saved/"base"), str(saved/"own"), str(saved/"ref")
    assert load_decoder(*pair, lam=.2).guidance == Guidance("interpolate", .2)
    assert load_decoder(*pair, form="ratio", gate="none").guidance == Guidance("ratio", 1., 1.)
    assert AlignedDecoder(pair[0], pair[1], ref=pair[2], lam=2.).guidance == Guidance("ratio", 2.)


def test_rewards_of_the_embedded_world_are_their_bases_own():
    pairs = [load_models(seed) for seed in range(3)]
    for i, (base, _, processor) in enumerate(pairs):
        for j, (_, reward, _) in enumerate(pairs):
            want = Guidance(**OWN) if i == j else Guidance(**SAFE | dict(form="interpolate")) # no reference is given
            assert AlignedDecoder(base, reward, processor).guidance == want, (i, j)


@pytest.mark.slow
def test_what_an_embedded_reward_says_of_itself_is_so(tmp_path):
    from tita.studies.own_reward import note_agreement
    from tita.world.embedded import world_folder
    shutil.copytree(world_folder()/"seed0", tmp_path/"seed0")
    noted = json.loads((tmp_path/"seed0"/"reward"/"config.json").read_text())["distilled_from"]
    assert note_agreement(tmp_path/"seed0", seed=7, scenes=20) == pytest.approx(noted["shared"], abs=.05)


# The command line.

ROOT = Path(__file__).parent.parent


def script(*args):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT)


def ask(*args):
    return script("-c", "from tita.decode.ask import main; main()", *args)


def complains(run, why):
    return run.returncode == 2 and why in run.stderr and "Traceback" not in run.stderr


def test_ask(tmp_path):
    make_scenes(1)[0].image.save(tmp_path/"scene.png")
    for name, m in dict(base=BASE, reward=REWARD).items():
        m.save_pretrained(tmp_path/name)
    PROCESSOR.save_pretrained(tmp_path/"base")
    models = "--base", tmp_path/"base", "--reward", tmp_path/"reward"
    run = ask(tmp_path/"scene.png", "Describe the image.", *models, "--max-new-tokens", 5, "--json")
    assert run.returncode == 0 and json.loads(run.stdout)["aligned"]["tokens"], run.stderr
    run = ask(tmp_path/"gone.png", "Describe the image.", *models)
    assert complains(run, "no such image")
    run = ask(tmp_path/"scene.png", "Describe the image.", *models, "--ref", tmp_path/"reward")
    assert complains(run, "reward and reference are the same model")


# What shows and measures it.

@pytest.mark.slow
def test_run_notebook(tmp_path):
    near(load_models(0)[1], .05).save_pretrained(tmp_path/"reward")
    (tmp_path/"small.yaml").write_text("seeds: [0]\nlams: [1.0]\nsweep_scenes: 4\ntest_scenes: 4\n")
    given = dict(reward=tmp_path/"reward", out=tmp_path/"out", bench=tmp_path/"none.json")
    named = [x for name, value in given.items() for x in ("-p", name, value)]
    notebooks = "nbs/runs/decode.ipynb", tmp_path/"decode.ipynb"
    run = script("scripts/run_notebook.py", *notebooks, "-f", tmp_path/"small.yaml", *named)
    assert run.returncode == 0, run.stderr[-2000:]
    said = json.loads((tmp_path/"out"/"metrics.json").read_text())
    assert {"base", "contrast 1", "ratio, bounded 1"} <= set(said["sweep"])
    assert said["sweep"]["base"]["fluency"]["value"] < 0
    for way in ("default", "safe"):
        counted = sum(said["verdicts"][way][v] for v in ("better", "no difference", "worse"))
        assert counted == 10  # one base, ten metrics


def bench(tmp_path, *args):
    "Figures and the page of a short benchmark."
    short = "--rounds", 1, "--seconds", 0, "--out", tmp_path/"speed"
    run = script("scripts/bench_decode.py", *args, *short)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads((tmp_path/"speed.json").read_text()), (tmp_path/"speed.md").read_text()


WAYS = {"base only", "cached processor", "full-prefix processor", "ours, draft 0", "ours, lazy", "ours, auto"}


@pytest.mark.slow
def test_bench(tmp_path):
    said, page = bench(tmp_path, "--scenes", 2, "--batch", "1,2", "--prompt", "0,64", "--new", 4)
    assert len(said["cases"]) == 4 and len(said["targets"]) == 5
    for c in said["cases"]:
        assert WAYS <= set(c["ways"]) and all(w["tokens_per_s"] > 0 for w in c["ways"].values())
    assert "| batch 2, prompt of 64, 4 new tokens |" in page


@pytest.mark.slow
def test_bench_of_a_shape(tmp_path):
    "Random weights, drafts accepted by lot, times of the floor that memory sets."
    shape = "--shape", "tiny/tiny", "--dtype", "bfloat16", "--acceptance", .8
    said, page = bench(tmp_path, *shape, "--prompt", "64", "--new", 60)
    ways = said["cases"][0]["ways"]
    one = ways["ours, base only"]
    floor = said["args"]["bandwidth"] / (one["bytes_per_token"] * one["tokens_per_s"])
    assert one["floors"] == pytest.approx(floor) and 0 < ways["ours, draft 4"]["acceptance"] < 1
    assert "A large copy moves" in page and "times the floor" in page
