"Aligned decoding is exact: against transformers, against recomputation, against enumeration, and whatever its neighbours, slots and drafts are."
import copy, itertools, json, os, subprocess, sys, threading
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
from tita.decode.guidance import token_rewards
from tita.models import chat_prompt
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
            x = dict(rest, **({"mm_token_type_ids": (ids == IMAGE).int()} if "image_grid_thw" in rest else {}))
            if noise == i:
                x["pixel_values"] = diffusion_noise(x["pixel_values"], 500, seeds=[0])
            if hasattr(m.model, "rope_deltas"):
                m.model.rope_deltas = None
            logits.append(m(input_ids=ids, **x).logits[:, -1])
        r = 0 if guidance.form == "contrast" else 1
        scores, d = guidance(logits[0], logits[1:1 + r], logits[1 + r:])
        new = scores.argmax(-1)
        rewards.append(token_rewards(d, new).item())
        ids = torch.cat([ids, new[:, None]], 1)
    return ids[0, length:].tolist(), rewards


# Families whose processors need torchvision: the smallest processor that does what theirs do.

class HandProcessor:
    chat_template = "see apply_chat_template"
    def __init__(self, family):
        self.family, self.tokenizer = family, TOKENIZER
    def apply_chat_template(self, *args, **kwargs):
        return PROCESSOR.apply_chat_template(*args, **kwargs)

    def pixels(self, image):
        x = torch.from_numpy(np.array(image)).float() / 127.5 - 1
        if self.family == "internvl":
            return [t.permute(2, 0, 1) for t in (x[:32, :32], x[-32:, -32:])][:1 + (image.size[0] > 40)], None
        h, w = x.shape[0] // 16 * 2, x.shape[1] // 16 * 2
        x = x[:h * 8, :w * 8].reshape(h, 8, w, 8, 3).permute(0, 2, 4, 1, 3)
        return x.reshape(h * w, 3, 1, 64).expand(-1, -1, 2, -1).reshape(h * w, -1), [1, h, w]

    def __call__(self, text, images, return_tensors="pt", padding=False, add_special_tokens=True):
        images, text = [images] if isinstance(images, Image.Image) else list(images), [text] if isinstance(text, str) else text
        px, grid = zip(*map(self.pixels, images))
        inter = self.family == "internvl"
        run = iter(["USER:" + "<image>" * 4 * len(p) + "ASSISTANT:" for p in px] if inter else ["USER:" + "<image>" * (h * w // 4) for _, h, w in grid])  # a token between two images, as Qwen has
        text = ["".join(part + (next(run) if i else "") for i, part in reversed(list(enumerate(reversed(t.split("<image>")))))) for t in text]
        out = dict(self.tokenizer(text, return_tensors="pt", padding=padding))
        out["mm_token_type_ids"] = (out["input_ids"] == IMAGE).int()
        return dict(out, pixel_values=torch.stack([t for p in px for t in p])) if inter else dict(out, pixel_values=torch.cat(px), image_grid_thw=torch.tensor(grid))


def family(name, layers, seed):
    import transformers as t
    torch.manual_seed(seed)
    text = dict(vocab_size=len(TOKENIZER), hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=layers, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    ids = dict(image_token_id=IMAGE, video_token_id=3, vision_start_token_id=5, vision_end_token_id=6)
    tower = dict(hidden_size=32, intermediate_size=64, num_heads=2, patch_size=8, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=32)
    if name == "qwen2.5-vl":
        model = t.Qwen2_5_VLForConditionalGeneration(t.Qwen2_5_VLConfig(text_config=dict(text, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
            vision_config=dict(tower, depth=2, window_size=32, fullatt_block_indexes=[1]), **ids))
    elif name == "qwen3-vl":
        model = t.Qwen3VLForConditionalGeneration(t.Qwen3VLConfig(text_config=dict(text, head_dim=8, rope_scaling={"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}),
            vision_config=dict(tower, depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=64), **ids))
    else:
        model = t.InternVLForConditionalGeneration(t.InternVLConfig(text_config=dict(text, model_type="qwen2"), image_token_id=IMAGE, image_seq_length=4, downsample_ratio=.5,
            vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=[32, 32], patch_size=[8, 8])))
    return enliven(model, seed, .15)


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "internvl"])
def test_families(name):
    "Images of several sizes, several questions on one, several images in one; alone, batched, refilled, drafted."
    base, processor = family(name, 3, 0), HandProcessor(name)
    reward, ref = near(base, .05), near(base, .1)
    a, b, c = (s.image for s in make_scenes(3))
    images = [a, a, b.resize((48, 64)), c.resize((32, 32)), b.resize((48, 64)), [a, c.resize((48, 32))]]
    images[4] = images[2]
    questions = ["Is there a ball in the image?", "Describe the image.", "What color is the star?", "Is there a ball in the image?", "How many cup icons are there?", "Which has a cup?"]
    inputs = [processor(chat_prompt(processor, q, len(i) if isinstance(i, list) else 1), i) for q, i in zip(questions, images)]
    alone = AlignedDecoder(base, processor=processor).generate(images, questions, max_new_tokens=8)
    for o, x in zip(alone, inputs):
        if name == "internvl":
            x.pop("mm_token_type_ids")
        if hasattr(base.model, "rope_deltas"):
            base.model.rope_deltas = None
        assert o.tokens == base.generate(**x, max_new_tokens=8, do_sample=False)[0, x["input_ids"].shape[1]:].tolist()
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
    return AlignedDecoder(BASE, None if form == "contrast" else REWARD, PROCESSOR, REF if form == "ratio" else None, form=form, lam=lam, **kwargs)


def prompts(n, seed=0):
    "Prompts of ragged lengths; several about one image."
    asked = [(s.image, q.text) for s in make_scenes(n // 5 + 1, seed=seed) for q in s.questions[::3]][:n]
    return [i for i, _ in asked], [" ".join([q] * (1 + j % 3)) for j, (_, q) in enumerate(asked)]


def check_grid(n, forms, batches, new):
    images, questions = prompts(n)
    for form in forms:
        d = decoder(form, bound=1.5)
        want = [recompute(FORMS[form], d.guidance, PROCESSOR(text=chat_prompt(PROCESSOR, q), images=i, return_tensors="pt"), new, noise=1 if form == "contrast" else None)[0] for i, q in zip(images, questions)]
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
        for a, b in zip(d.generate(images, questions, max_new_tokens=20, draft="lazy"), d.generate(images, questions, max_new_tokens=20, draft=0)):
            assert a.tokens == b.tokens and a.base_tokens == b.base_tokens and np.allclose(a.rewards, b.rewards, atol=1e-3)


# Sampled: the joint law of three tokens against enumeration.

def ten_words():
    "A LLaVA whose vocabulary has ten words, with its processor."
    torch.manual_seed(0)
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
    words = ["<pad>", "<s>", "</s>", "<image>", "a", "b", "c", "d", "e", "f"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(w, lstrip=True, rstrip=True) for w in words[:4]])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens={"image_token": "<image>"})
    template = "<s> {% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    processor = LlavaProcessor(CLIPImageProcessorPil(size={"height": 16, "width": 16}, do_center_crop=False), tokenizer, patch_size=8, vision_feature_select_strategy="default", chat_template=template, image_token="<image>", num_additional_image_tokens=1)
    def model():
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8),
            text_config=LlamaConfig(vocab_size=10, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2),
            image_token_id=3, vision_feature_layer=-1, image_seq_length=4))
    return [enliven(model(), i, .35, 3) for i in range(3)], processor


@torch.no_grad()
def joint(models, processor, guidance, image, question, seed):
    "Probabilities of all 10 x 10 x 10 answers; `seed` is of the noise of `contrast`, which `generate` takes from its own."
    x = processor(text=chat_prompt(processor, question), images=image, return_tensors="pt")
    n = x["input_ids"].shape[1]
    answers = torch.tensor(list(itertools.product(range(10), repeat=3)))
    ids = torch.cat([x["input_ids"].expand(1000, -1), answers], 1)
    logits = []
    for i, m in enumerate(models):
        px = diffusion_noise(x["pixel_values"], 500, seeds=[seed]) if guidance.form == "contrast" and i == 1 else x["pixel_values"]
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
    seen = torch.tensor([100 * o.tokens[0] + 10 * o.tokens[1] + o.tokens[2] for o in outputs]).bincount(minlength=1000).double()
    want = p * len(outputs)
    rare = want < 5
    seen, want = torch.cat([seen[~rare], seen[rare].sum()[None]]), torch.cat([want[~rare], want[rare].sum()[None]])
    keep = want > 0
    return float(chi2.sf(((seen - want)[keep]**2 / want[keep]).sum(), int(keep.sum()) - 1))


def law(form, draft, n, slots=None, seed=1):
    "p-values of two questions of different length, drawn side by side."
    (base, reward, ref), processor = ten_words()
    image = make_scenes(1)[0].image.resize((16, 16))
    questions = ["a b", "c d e f a"]
    d = AlignedDecoder(base, None if form == "contrast" else reward, processor, ref if form == "ratio" else None, form=form, lam=.6, slots=slots)
    out = d.generate(image, questions, n=n, max_new_tokens=3, temperature=1., eos=[], draft=draft, seed=seed)
    models = dict(interpolate=[base, reward], ratio=[base, reward, ref], arm=[base, reward], contrast=[base, base])[form]
    return [p_value(out[i * n:(i + 1) * n], joint(models, processor, d.guidance, image, q, seed)) for i, q in enumerate(questions)]


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

QUESTIONS = ["Describe the image.", "Is there a ball in the image?", "What color is the star? " * 3, "How many cup icons are there? " * 2]
SCENES = [s.image for s in make_scenes(3, seed=8)] + [None]
rows = st.tuples(st.integers(0, 3), st.integers(0, 3))
hows = st.fixed_dictionaries(dict(temperature=st.sampled_from([0., .7, 1.3]), top_p=st.sampled_from([1., .8]), max_new_tokens=st.integers(1, 9), repetition_penalty=st.sampled_from([1., 1.3]),
    stop=st.sampled_from([(), ("star",), ("a", "7")]), eos=st.sampled_from([None, (2, 20), tuple(range(7, 40))]), seed=st.integers(0, 3)))
ALONE = {}


def alone(form, bound, row, how, sample=0):
    "The answer of a row by itself; of the same question asked again it is the next sample."
    key = form, bound, row, sample, json.dumps(how, sort_keys=True)
    if key not in ALONE:
        d = decoder(form, bound=bound)
        ALONE[key] = d.generate([SCENES[row[0]]], [QUESTIONS[row[1]]], n=sample + 1, draft=0, **how)[sample]
    return ALONE[key]


@settings(max_examples=int(os.environ.get("TITA_EXAMPLES", 25)), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["ratio", "interpolate", "arm"]), st.sampled_from([None, .3]), st.lists(rows, min_size=1, max_size=8), hows, st.integers(1, 5), st.sampled_from([0, 1, 2, 5, "auto", "lazy"]), st.sampled_from([0., .25, 1.]))
def test_rows_are_independent(form, bound, asked, how, slots, draft, refill):
    d = decoder(form, bound=bound, slots=slots)
    make = d.engine
    d.engine = lambda *a, **k: make(*a, **{**k, "refill": refill})
    got = d.generate([SCENES[i] for i, _ in asked], [QUESTIONS[j] for _, j in asked], draft=draft if bound or draft != "lazy" else 0, errors="row", **how)
    for i, (row, o) in enumerate(zip(asked, got)):
        want = alone(form, bound, row, how, asked[:i].count(row))
        assert (o.tokens, o.text, o.stats) == (want.tokens, want.text, want.stats)
        assert np.allclose(o.rewards, want.rewards, atol=1e-3)


@pytest.mark.slow
def test_bfloat16(capsys):
    "bfloat16 rounds differently in blocks of different size: how often that changes an answer, and how close the call was."
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
    "Every view of every picture, with the seeds of `tita.data.answers`: the same greedy answers, and each picture and view looked at once."
    scenes = {f"{i}.png": s for i, s in enumerate(make_scenes(4, seed=6))}
    images = {name: s.image for name, s in scenes.items()}
    asked = [dict(question_id=f"{name} {i}", image=name, text=q.text) for name, s in scenes.items() for i, q in enumerate(s.questions[:5])]
    want = {answer_key(r): r["answer"] for r in generate_answers(BASE, PROCESSOR, asked, images, VIEWS, max_new_tokens=12, seed=4)}
    looks, d = [], AlignedDecoder(BASE, processor=PROCESSOR, slots=7)
    hook = BASE.model.vision_tower.register_forward_hook(lambda module, args, output: looks.append(len(output[0])))
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
    ahead = []
    for n, o in enumerate(AlignedDecoder(BASE, processor=PROCESSOR, slots=4).answers(rows(), window=16, max_new_tokens=2), 1):
        assert (o.error is not None) == (o.question["question_id"] % 100 == 0)
        ahead.append(len(read) - n)
    assert n == 300 and max(ahead) <= 16 + 4 * 4


# λ = 0 is the base's own `generate`, whatever its settings.

HONOURED = dict(max_length=70, max_new_tokens=3, min_new_tokens=6, repetition_penalty=1.6, encoder_repetition_penalty=1.5,
    no_repeat_ngram_size=2, encoder_no_repeat_ngram_size=2, bad_words_ids=[[20], [7, 8]], forced_bos_token_id=9, forced_eos_token_id=2,
    remove_invalid_values=True, exponential_decay_length_penalty=(2, 1.8), suppress_tokens=list(range(10, 60)), begin_suppress_tokens=[*range(10, 60)],
    sequence_bias=[[[30], 6.]], renormalize_logits=True, eos_token_id=list(range(20, 60)), min_length=80)
DRAWN = dict(temperature=1e-4, top_k=1, top_p=1e-6, min_p=1., typical_p=1e-6, top_h=1e-6, epsilon_cutoff=.99, eta_cutoff=.99) # each leaves one token
INERT = set("""use_cache cache_implementation cache_config max_cache_len early_stopping length_penalty diversity_penalty output_attentions
    output_hidden_states output_scores output_logits return_dict_in_generate pad_token_id bos_token_id decoder_start_token_id num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold max_matching_ngram_size assistant_lookbehind target_lookbehind
    assistant_ensemble_weight speculation_type compile_config disable_compile continuous_batching_config low_memory prefill_chunk_size
    _from_model_config transformers_version""".split())
ELSEWHERE = {"do_sample", "max_time", "watermarking_config", "stop_strings"} # with DRAWN; a deadline; below
IMAGE_ASKED, ASKED = make_scenes(1, seed=3)[0].image, "Is there a ball in the image?"


def own_answer(model, **how):
    x = PROCESSOR(text=chat_prompt(PROCESSOR, ASKED), images=IMAGE_ASKED, return_tensors="pt")
    how = {"max_new_tokens": 8} | how if "max_length" not in how else how
    return model.generate(**x, tokenizer=TOKENIZER, **how)[0, x["input_ids"].shape[1]:].tolist()


def test_every_setting_of_generate_has_its_place():
    from tita.decode.sampling import REFUSED
    places = [set(HONOURED), set(DRAWN), INERT, ELSEWHERE, set(REFUSED)]
    assert set(GenerationConfig().to_dict()) == set.union(*places) and sum(map(len, places)) == len(set.union(*places))


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
    "The row ends with the token that completes the string, as in `generate` (whose own check does not know this tokenizer)."
    want, brings = own_answer(BASE), copy.deepcopy(BASE)
    brings.generation_config.stop_strings = [TOKENIZER.decode(want[2:3]).strip()]
    first = next(n for n in range(1, 9) if brings.generation_config.stop_strings[0] in TOKENIZER.decode(want[:n]))
    got = AlignedDecoder(brings, processor=PROCESSOR).generate(IMAGE_ASKED, ASKED, max_new_tokens=8)[0]
    assert got.tokens == want[:first] and got.stats["finish"] == "stop"


def test_watermark_is_that_of_generate():
    from transformers import WatermarkingConfig
    how = dict(max_new_tokens=8, watermarking_config=WatermarkingConfig(bias=8.))
    assert AlignedDecoder(BASE, processor=PROCESSOR).generate(IMAGE_ASKED, ASKED, **how)[0].tokens == own_answer(BASE, **how)


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
        e._place(engine.Sampling(max_new_tokens=1 + i), 0)
    assert len(e.groups) == len(e.warpers) == len(e.ends) == 1


def test_a_penalty_is_paid_for_while_it_runs():
    d = AlignedDecoder(BASE, REWARD, PROCESSOR, REF)
    e = d.engine(2)
    for how in (dict(repetition_penalty=1.5), {}):
        e.submit([engine.Row(0, ASKED, [IMAGE_ASKED], d._sampling(max_new_tokens=3, **how), 0, on_token=print if how else None)])
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
    for o, i, q, l, b in zip(got, images, questions, lams, bounds):
        one = AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=1. if l is None else l, bound=1. if b is None else b)
        assert o.tokens == one.generate(i, q, draft=0, max_new_tokens=8)[0].tokens


@pytest.mark.parametrize("draft", [0, 3])
def test_an_error_of_a_function_stays_with_its_row(draft):
    images, questions = prompts(5, seed=6)
    whole = AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=1.).generate(images, questions, draft=0, max_new_tokens=8)
    seen = []
    def listen(step):
        seen.append(step.base[..., 0].clone())
        return torch.ones(*step.base.shape[:-1], 1)
    AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=listen).generate(images[2], questions[2], draft=0, max_new_tokens=2)
    def fails(step):
        if torch.isclose(step.base[..., 0], seen[1][0], atol=1e-5).any():
            raise RuntimeError("no λ here")
        return torch.ones(*step.base.shape[:-1], 1)
    got = AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=fails).generate(images, questions, draft=draft, max_new_tokens=8)
    assert "no λ here" in got[2].error
    assert [o.tokens for i, o in enumerate(got) if i != 2] == [o.tokens for i, o in enumerate(whole) if i != 2]


@pytest.mark.parametrize("draft", [0, 3, "auto"])
def test_rows_come_go_and_fail_while_others_run(draft):
    images, questions = prompts(8, seed=7)
    d = AlignedDecoder(BASE, REWARD, PROCESSOR, REF, lam=1., slots=3)
    want = d.generate(images, questions, max_new_tokens=12, draft=0)
    rows = [engine.Row(i, q, [im], d._sampling(max_new_tokens=12), 0) for i, (im, q) in enumerate(zip(images, questions))]
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
    assert finish[0] in ("deadline", want[0].stats["finish"]) and finish[5] == "cancelled" and "ZeroDivisionError" in over[rows[7]].error
    assert over[rows[0]].tokens == want[0].tokens[:len(over[rows[0]].tokens)]
    assert all(over[rows[i]].tokens == want[i].tokens for i in (1, 2, 3, 4, 6))


def test_rows_from_another_thread():
    images, questions = prompts(6, seed=8)
    d = AlignedDecoder(BASE, processor=PROCESSOR, slots=2)
    want, e, over = d.generate(images, questions, max_new_tokens=6), d.engine(2), {}
    rows = [engine.Row(i, q, [im], d._sampling(max_new_tokens=6), 0) for i, (im, q) in enumerate(zip(images, questions))]
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
    for how, why in ((dict(seed="a"), "seed is 'a'"), (dict(draft="banana"), "draft is 'banana'"), (dict(lam=-1.), "λ is -1")):
        with pytest.raises(TitaError, match=why):
            d.generate(IMAGE_ASKED, ASKED, **how)
    with pytest.raises(TitaError, match="draft is 'banana'"):
        d.alone().generate(IMAGE_ASKED, ASKED, draft="banana")
    with pytest.raises(TitaError, match="questions are given as int"):
        d.generate(IMAGE_ASKED, 5)
    with pytest.raises(TitaError, match="makes no use of a reference"):
        AlignedDecoder(BASE, REWARD, PROCESSOR, REF, form="interpolate")
    given = np.array(IMAGE_ASKED)
    assert d.generate(given, ASKED, max_new_tokens=5)[0].tokens == d.generate(IMAGE_ASKED, ASKED, max_new_tokens=5)[0].tokens
    three = d.generate(IMAGE_ASKED, [ASKED] * 3, max_new_tokens=6, temperature=1.3)
    assert len({tuple(o.tokens) for o in three}) == 3
    assert [o.tokens for o in three] == [o.tokens for o in d.generate(IMAGE_ASKED, ASKED, n=3, max_new_tokens=6, temperature=1.3)]


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


def test_one_default():
    from tita.decode.guidance import SAFE
    g = AlignedDecoder(BASE, REWARD, PROCESSOR, REF).guidance
    assert {k: getattr(g, k) for k in SAFE} == SAFE


# The command line.

def ask(*args, **env):
    return subprocess.run([sys.executable, "-c", "from tita.decode.ask import main; main()", *map(str, args)], capture_output=True, text=True, env={**os.environ, **env}, cwd=Path(__file__).parent.parent)


def test_ask(tmp_path):
    make_scenes(1)[0].image.save(tmp_path/"scene.png")
    for name, m in dict(base=BASE, reward=REWARD).items():
        m.save_pretrained(tmp_path/name)
    PROCESSOR.save_pretrained(tmp_path/"base")
    models = "--base", tmp_path/"base", "--reward", tmp_path/"reward"
    run = ask(tmp_path/"scene.png", "Describe the image.", *models, "--max-new-tokens", 5, "--json")
    assert run.returncode == 0 and json.loads(run.stdout)["aligned"]["tokens"], run.stderr
    run = ask(tmp_path/"gone.png", "Describe the image.", *models)
    assert run.returncode == 2 and "no such image" in run.stderr and "Traceback" not in run.stderr
    run = ask(tmp_path/"scene.png", "Describe the image.", *models, "--ref", tmp_path/"reward")
    assert run.returncode == 2 and "reward and reference are the same model" in run.stderr and "Traceback" not in run.stderr


# What shows and measures it.

ROOT = Path(__file__).parent.parent

def script(*args):
    return subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_run_notebook(tmp_path):
    near(load_models(0)[1], .05).save_pretrained(tmp_path/"reward")
    (tmp_path/"small.yaml").write_text("seeds: [0]\nlams: [1.0]\nsweep_scenes: 4\ntest_scenes: 4\n")
    run = script("scripts/run_notebook.py", "nbs/runs/decode.ipynb", tmp_path/"decode.ipynb", "-f", tmp_path/"small.yaml", "-p", "reward", tmp_path/"reward", "-p", "out", tmp_path/"out", "-p", "bench", tmp_path/"none.json")
    assert run.returncode == 0, run.stderr[-2000:]
    said = json.loads((tmp_path/"out"/"metrics.json").read_text())
    assert {"base", "contrast 1", "ratio, bounded 1"} <= set(said["sweep"]) and said["sweep"]["base"]["fluency"]["value"] < 0
    assert sum(said["verdicts"]["safe"][v] for v in ("better", "no difference", "worse")) == 2 * 10  # two bases, ten metrics


@pytest.mark.slow
def test_bench(tmp_path):
    run = script("scripts/bench_decode.py", "--rounds", 1, "--seconds", 0, "--scenes", 2, "--batch", "1,2", "--prompt", "0,64", "--new", 4, "--out", tmp_path/"speed")
    assert run.returncode == 0, run.stderr[-2000:]
    said = json.loads((tmp_path/"speed.json").read_text())
    assert len(said["cases"]) == 4 and len(said["targets"]) == 5
    for c in said["cases"]:
        assert {"base only", "cached processor", "full-prefix processor", "ours, draft 0", "ours, lazy", "ours, auto"} <= set(c["ways"]) and all(w["tokens_per_s"] > 0 for w in c["ways"].values())
    assert "| batch 2, prompt of 64, 4 new tokens |" in (tmp_path/"speed.md").read_text()


@pytest.mark.slow
def test_bench_of_a_shape(tmp_path):
    "Random weights, drafts accepted by lot, times of the floor that memory sets."
    run = script("scripts/bench_decode.py", "--shape", "tiny/tiny", "--dtype", "bfloat16", "--acceptance", .8, "--rounds", 1, "--seconds", 0, "--prompt", "64", "--new", 60, "--out", tmp_path/"speed")
    assert run.returncode == 0, run.stderr[-2000:]
    said = json.loads((tmp_path/"speed.json").read_text())
    ways = said["cases"][0]["ways"]
    one = ways["ours, base only"]
    assert one["floors"] == pytest.approx(said["args"]["bandwidth"] / (one["bytes_per_token"] * one["tokens_per_s"])) and 0 < ways["ours, draft 4"]["acceptance"] < 1
    assert "A large copy moves" in (tmp_path/"speed.md").read_text() and "times the floor" in (tmp_path/"speed.md").read_text()
