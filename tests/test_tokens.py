"One row of tokens for training, scoring and generation, with the kinds of tokenizers that real models bring."
import json
from functools import cache

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                          LlavaForConditionalGeneration, LlavaProcessor, LogitsProcessor, PreTrainedTokenizerFast)
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference
from tita.core import TitaError
from tita.decode.decoder import AlignedDecoder
from tita.models import answer_ids, chat_prompt, opened, prompt_ids
from tita.train.dpo import TreeCollator
from tita.train.images import ImageStore
from tita.train.trees import encode_rows, expand, grow_trees, label_logps, tree_logits
from tita.world.embedded import make_scenes, tiny_processor

QUESTIONS = "Is there a ball in the image?", "What color is the boat?\nOne word.", "Describe the image."
ANSWERS = "yes", "No, there is none.", "a red ball, a boat.\nAnd a star!", "12 球 é", ": yes"
TEXT = " ".join((*QUESTIONS, *ANSWERS, "USER: ASSISTANT: user assistant system You are helpful. model")).split()
PARTS = ("{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
         "{% endfor %}")
# Images before text, roles in capitals, a space after each turn; neither BOS nor EOS: llava-hf's kind.
LLAVA = ("{% for m in messages %}{{ m['role'].upper() }}: " + PARTS.replace("IMAGE", "<image>\n") + " {% endfor %}"
         "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
# A system turn where none is given, an end token and a line break after each turn: ChatML.
CHATML = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
          "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + PARTS.replace("IMAGE", "<|image_pad|>") +
          "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
# BOS from the template, an end token that is not the tokenizer's EOS: Gemma's kind.
TURNS = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n" + PARTS.replace("IMAGE", "<image>") +
         "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}")


def spaced(special, legacy=False):
    "BPE over `▁` with bytes for what it does not know, and BOS by its post-processor: Llama's, also the older kind."
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.train_from_iterator([" ".join(TEXT)] * 2, trainers.BpeTrainer(special_tokens=special, show_progress=False))
    learned = json.loads(core.to_str())["model"]
    vocab = {w: i for w, i in learned["vocab"].items() if w not in "球é"}
    words = [*sorted(vocab, key=vocab.get), *(f"<0x{i:02X}>" for i in range(256))]
    merges = [tuple(m) for m in learned["merges"] if {*m, "".join(m)} <= set(words)]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, unk_token="<unk>", byte_fallback=True))
    if legacy:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    core.add_special_tokens([AddedToken(w, normalized=False, special=True) for w in special])
    bos = [("<s>", core.token_to_id("<s>"))]
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", special_tokens=bos)
    return core


def bytewise(special):
    "Byte-level BPE without BOS: Qwen's."
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([" ".join(TEXT)] * 2, learn)
    return core


def vlm_processor(core, template, image="<image>", **special):
    tok = PreTrainedTokenizerFast(tokenizer_object=core, extra_special_tokens={"image_token": image}, **special)
    pixels = CLIPImageProcessorPil(size={"height": 32, "width": 32}, do_center_crop=False)
    return LlavaProcessor(pixels, tok, patch_size=16, vision_feature_select_strategy="default", chat_template=template,
                          image_token=image, num_additional_image_tokens=1)


LLAMA = "<unk>", "<s>", "</s>", "<pad>", "<image>"
NAMES = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
KINDS = {
    "llama": lambda: vlm_processor(spaced(list(LLAMA)), LLAVA, **NAMES),
    "llama legacy": lambda: vlm_processor(spaced(list(LLAMA), legacy=True), LLAVA, **NAMES),
    "turns": lambda: vlm_processor(spaced([*LLAMA, "<start_of_turn>", "<end_of_turn>"]), TURNS, **NAMES),
    "qwen": lambda: vlm_processor(bytewise(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]), CHATML,
                                  "<|image_pad|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    "world": tiny_processor}
GAP = {"llama": " ", "llama legacy": " ", "turns": "", "qwen": "", "world": " "}  # between prompt and answer
END = {"llama": "</s>", "llama legacy": "</s>", "turns": "<end_of_turn>", "qwen": "<|im_end|>", "world": "</s>"}
BOS = {"llama": 1, "llama legacy": 1, "turns": 1, "qwen": 0, "world": 1}
kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def parts(kind):
    "Its processor, and base, reward and reference that listen to every token."
    processor = KINDS[kind]()
    tok, image = processor.tokenizer, make_scenes(1)[0].image
    end, size = tok.convert_tokens_to_ids(END[kind]), processor.image_processor.size["height"]
    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                              image_size=size, patch_size=16, projection_dim=32)
    text = LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, eos_token_id=end,
                       num_attention_heads=4, max_position_embeddings=512, pad_token_id=tok.pad_token_id)
    place = tok.convert_tokens_to_ids(processor.image_token)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=place, vision_feature_layer=-1,
                         vision_feature_select_strategy="default")
    made = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        for p in model.parameters():
            p.data += .15 * torch.randn(p.shape)
        model.generation_config.eos_token_id = end
        made.append(model)
    return processor, image, made


def rows_of(kind, question=QUESTIONS[1]):
    "One question and every answer, as training reads it; its images."
    processor, image = parts(kind)[:2]
    store = ImageStore(processor)
    return encode_rows([dict(image=image, prompt=question, answer=a) for a in ANSWERS], store, ("answer",)), store


def trained_rows(kind, question=QUESTIONS[1]):
    "Its prompts, with the image's tokens, and its answers."
    rows, store = rows_of(kind, question)
    return [(expand(r["prompt_ids"], [store.tokens(0)], store.token_id), r["answer_ids"]) for r in rows]


def inputs_of(kind, question=QUESTIONS[1]):
    "What one would hand to `generate`, by transformers alone."
    processor, image = parts(kind)[:2]
    text = chat_prompt(processor, question)
    adds = not text.startswith(processor.tokenizer.bos_token or "nothing")
    return processor(text=text, images=image, return_tensors="pt", add_special_tokens=adds)


@kinds
@pytest.mark.parametrize("question", QUESTIONS)
def test_training_reads_the_prompt_of_generation(kind, question):
    processor = parts(kind)[0]
    wanted = inputs_of(kind, question)["input_ids"][0].tolist()
    assert all(prompt == wanted for prompt, _ in trained_rows(kind, question))
    tok = processor.tokenizer
    assert wanted.count(tok.bos_token_id) == BOS[kind] and wanted[0] == (tok.bos_token_id if BOS[kind] else wanted[0])


def greedy(model, ids, pixels, steps=12):
    "What transformers writes after these tokens."
    ids = torch.tensor([ids])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=steps,
                         do_sample=False)
    return out[0, ids.shape[1]:].tolist()


@kinds
def test_decoding_reads_the_prompt_of_training(kind):
    "The decoder's answers are those of `generate` on training's row, and others without the row's first token."
    processor, image, models = parts(kind)
    prompts = [trained_rows(kind, q)[0][0] for q in QUESTIONS]
    pixels = inputs_of(kind)["pixel_values"]
    decoder = AlignedDecoder(models[0], processor=processor, lam=0.)
    decoded = decoder.generate([image] * len(QUESTIONS), list(QUESTIONS), max_new_tokens=12)
    assert [d.tokens for d in decoded] == [greedy(models[0], p, pixels) for p in prompts]
    assert [d.tokens for d in decoded] != [greedy(models[0], p[1:], pixels) for p in prompts]
    assert [d.stats["prompt_tokens"] for d in decoded] == [len(p) for p in prompts]


class Dictated(LogitsProcessor):
    "Makes a model write given tokens."
    def __init__(self, ids):
        self.ids, self.told = ids, 0
    def __call__(self, input_ids, scores):
        only = torch.full_like(scores, -torch.inf)
        only[:, self.ids[self.told]] = 0
        self.told += 1
        return only


@kinds
@pytest.mark.parametrize("which", range(len(ANSWERS)))
def test_training_reads_the_answer_as_it_is_generated(kind, which):
    "A model that goes on as the whole text does, and ends, says the answer: training reads these very tokens."
    processor, image, models = parts(kind)
    tok, answer = processor.tokenizer, ANSWERS[which]
    prompt = chat_prompt(processor, QUESTIONS[1])
    whole = opened(tok, tok([prompt, prompt + GAP[kind] + answer], add_special_tokens=False)["input_ids"])
    assert whole[1][:len(whole[0])] == whole[0]  # no token reaches over the boundary
    written = [*whole[1][len(whole[0]):], tok.convert_tokens_to_ids(END[kind])]
    decoder = AlignedDecoder(models[0], processor=processor, lam=0.)
    [said] = decoder.generate(image, QUESTIONS[1], 3 + len(written), processors=[Dictated(written)], draft=0)
    assert said.tokens == written == trained_rows(kind)[which][1]
    assert said.stats["finish"] == "eos"
    assert said.text == answer or kind == "world"  # whose tokenizer keeps its words only


@kinds
def test_scoring_reads_the_row_of_training(kind):
    "Tokens and log-ratios of `score` are those of the trees that training stands on."
    processor, image, models = parts(kind)
    rows, store = rows_of(kind)
    trees, starts = grow_trees(rows, store, ("answer",))[:2]
    with torch.no_grad():
        logps = [label_logps(*tree_logits(m, trees, starts, **store.inputs([0]))) for m in models[1:]]
    decoder = AlignedDecoder(models[0], models[1], processor=processor, ref=models[2], lam=1.)
    scored = decoder.score([image] * len(ANSWERS), [QUESTIONS[1]] * len(ANSWERS), list(ANSWERS))
    for row, out, ratio in zip(rows, scored, logps[0] - logps[1]):
        assert out.tokens == row["answer_ids"]
        torch.testing.assert_close(torch.tensor(out.rewards), ratio[:len(out.tokens)], rtol=1e-4, atol=1e-4)


@kinds
def test_the_end_is_trained_once(kind):
    processor, image = parts(kind)[:2]
    store, end = ImageStore(processor), processor.tokenizer.convert_tokens_to_ids(END[kind])
    pairs = [dict(image=image, prompt=q, chosen=ANSWERS[0], rejected=ANSWERS[2]) for q in QUESTIONS]
    batch = TreeCollator(store)(encode_rows(pairs, store))
    trained = [ids[keep.bool()].tolist() for ids, keep in zip(batch["input_ids"], batch["completion_mask"])]
    assert len(trained) == 6 and all(line[-1] == end and line.count(end) == 1 for line in trained)


@kinds
def test_an_end_that_is_written_in_an_answer_is_no_second_one(kind):
    processor = parts(kind)[0]
    end = processor.tokenizer.convert_tokens_to_ids(END[kind])
    plain, ended, empty = answer_ids(processor, ["yes", "yes" + END[kind] + " and more", ""])
    assert plain == ended and plain.count(end) == 1 and empty == [end]


@kinds
def test_where_trl_agrees(kind):
    """TRL's collator tokenises prompt and answers apart and without special tokens, which its templates must write.

    For the world's tokenizer that is our row. After ChatML's end token TRL trains the line break, too, which no model
    writes that stops at its end token. With a template that writes neither BOS nor EOS it trains without both, and a
    Llama tokenizer can begin an answer that stands alone with a space too many: at inference the model would read what
    it never saw. There ours is right: the tests above compare it with what is generated."""
    processor, image = parts(kind)[:2]
    say = lambda role, text: [dict(role=role, content=text)]
    row = dict(images=[image], prompt=say("user", QUESTIONS[1]), chosen=say("assistant", ANSWERS[0]),
               rejected=say("assistant", ANSWERS[1]))
    batch = DataCollatorForVisionPreference(processor)([row])
    theirs = [ids[keep.bool()].tolist() for ids, keep in zip(batch["input_ids"], batch["attention_mask"])]
    ours, start = [prompt + answer for prompt, answer in trained_rows(kind)[:2]], len(trained_rows(kind)[0][0])
    tok = processor.tokenizer
    if kind == "world":
        assert ours == theirs
    elif kind == "qwen":
        assert [row + tok("\n")["input_ids"] for row in ours] == theirs
    elif kind == "turns":  # an answer on a line of its own begins without a space
        assert [row[:start] for row in theirs] == [row[:start] for row in ours]
        assert tok.convert_ids_to_tokens([ours[0][start], theirs[0][start]]) == ["yes", "▁yes"]
    else:
        assert [row[:start - 1] for row in theirs] == [row[1:start] for row in ours]
        assert not any({tok.bos_token_id, tok.eos_token_id} & set(row) for row in theirs)
        first = [tok.convert_ids_to_tokens(row) for row in (ours[0][start:], theirs[0][start - 1:])]
        assert "".join(first[0]) == "▁yes</s>" and "".join(first[1]) == ("▁▁yes▁" if "legacy" in kind else "▁yes▁")


def test_a_template_that_writes_bos_itself():
    processor = KINDS["llama"]()
    processor.chat_template = "{{ bos_token }}" + LLAVA
    prompt, tok = chat_prompt(processor, QUESTIONS[0]), processor.tokenizer
    [ids] = prompt_ids(processor, [prompt])
    assert ids == tok(prompt, add_special_tokens=False)["input_ids"] and ids.count(tok.bos_token_id) == 1


def test_a_tokenizer_that_also_ends_every_text():
    "A prompt that ends with EOS would be over before it is answered."
    tok = KINDS["llama"]().tokenizer
    special = [(t, tok.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    wanted = prompt_ids(tok, ["USER: yes"])
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=special)
    assert tok("USER: yes")["input_ids"][-1] == tok.eos_token_id
    assert prompt_ids(tok, ["USER: yes"]) == wanted


def test_a_model_of_text_alone():
    "Templates of language models join strings: a turn in parts would be an error there."
    tok = PreTrainedTokenizerFast(tokenizer_object=bytewise(["<|im_start|>", "<|im_end|>"]), eos_token="<|im_end|>")
    turn = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    tok.chat_template = ("{% for m in messages %}" + turn + "{% endfor %}"
                         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
    prompt = chat_prompt(tok, "Is it?", image=False, system="Be helpful.")
    assert prompt.startswith("<|im_start|>system\nBe helpful.<|im_end|>\n")
    row = prompt_ids(tok, [prompt])[0] + answer_ids(tok, ["No."])[0]
    assert tok.decode(row) == prompt + "No.<|im_end|>"


def test_without_an_end_there_is_no_answer():
    tok = PreTrainedTokenizerFast(tokenizer_object=bytewise(["<|im_start|>"]))
    tok.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(TitaError, match="no end token"):
        answer_ids(tok, ["yes"])
