#!/usr/bin/env python3
"""Tokens per second of aligned decoding, every way side by side.

The ways: base alone, logits processors, and tita's engine plain, lazy, drafting and auto.

    python scripts/bench_decode.py                     the embedded pair on this machine, one row at a time
    python scripts/bench_decode.py --reward runs/demo/reward --batch 1,8,32 --prompt 0,64,640 --new 32,256 --rounds 5
    python scripts/bench_decode.py --shape 7b/1.4b --device cuda --acceptance 0.8     random weights of that shape
    python scripts/bench_decode.py --shape 12x768/4x256 --acceptance 0.8 --prompt 300 --opponents    arithmetic decides

The ways take turns in every round; a way's figure is the median over rounds of its ratio (tokens a second) to the
base's own greedy `generate` in that round. With --prompt 0 scenes are described and answers end where they end. With
--prompt N the question is repeated up to N tokens and the answer has exactly --new tokens: beyond what the embedded
models learned, so acceptance there says little. Random weights agree on nothing: with --acceptance drafts are accepted
at that rate by lot (all forwards of all models run all the same), and the table says so. With --shape *decoding
alone* is counted, too: the time of an answer less that of one of a single token; and the time of a token in times of
the floor: how long the bytes of weights and caches that it needs take at the rate of a large copy on that device.
"""
import argparse
import copy
import math
import os
import statistics
import time
from typing import NamedTuple

import torch
from tita.core import TitaError, cli, run_info, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.decode.engine import Row
from tita.decode.guidance import SAFE
from tita.decode.hf import AlignedLogitsProcessor
from tita.models import chat_prompt
from tita.records import processor_name
from tita.decode.pace import Pace
from tita.decode.speculation import SpeculativeEngine

QUESTION = "Describe the image."


class Shape(NamedTuple):
    "Sizes of a decoder; vocabularies are as in LLaVA-1.5."
    hidden: int
    layers: int
    heads: int
    shared_heads: int # of keys and values
    feed_forward: int


SHAPES = {
    "tiny": Shape(64, 4, 4, 4, 160),
    "4x256": Shape(256, 4, 4, 4, 688),
    "12x768": Shape(768, 12, 12, 12, 2048),
    "small": Shape(256, 8, 4, 4, 640),
    "1.4b": Shape(2048, 22, 32, 4, 5632),
    "3b": Shape(2560, 32, 32, 32, 6912),
    "7b": Shape(4096, 32, 32, 32, 11008),
    "13b": Shape(5120, 40, 40, 40, 13824)}


def random_model(shape: str, like, device: str, dtype, vocab: int):
    "A LLaVA of a shape, with random weights and the world's small tower."
    from transformers import AutoModelForImageTextToText, LlavaConfig
    if shape not in SHAPES:
        raise TitaError(f"shape {shape!r} is not known; use two of {', '.join(SHAPES)}, as in 7b/1.4b")
    size = SHAPES[shape]
    config = LlavaConfig(**like.config.to_dict())
    config.text_config.update(dict(
        hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.shared_heads, intermediate_size=size.feed_forward, head_dim=size.hidden // size.heads,
        vocab_size=vocab, max_position_embeddings=4096))
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def random_models(args):
    "Base, reward and reference of two shapes, and the world's processor."
    from tita.world.embedded import tiny_pair
    like, _, processor = tiny_pair()
    names = args.shape.split("/")
    if len(names) != 2:
        raise TitaError(f"--shape {args.shape}: give base and reward, as in 7b/1.4b")
    torch.manual_seed(0)
    base, reward = names
    dtype = getattr(torch, args.dtype)
    return [random_model(n, like, args.device, dtype, args.vocab) for n in (base, reward, reward)], processor


def embedded_models(args):
    "Base, reward and reference of the world, and its processor."
    from tita.world.embedded import load_models
    from transformers import AutoModelForImageTextToText
    base, before, processor = load_models(args.seed)
    after = before
    if args.reward:
        after = AutoModelForImageTextToText.from_pretrained(args.reward, dtype=torch.float32).eval()
    return [m.to(args.device, getattr(torch, args.dtype)) for m in (base, after, before)], processor


def load(args):
    "Base, reward and reference in the type that was asked for, and a processor."
    models, processor = random_models(args) if args.shape else embedded_models(args)
    for m in models:
        m.config.text_config.max_position_embeddings = 4096
    return models, processor


class FullPrefix(AlignedLogitsProcessor):
    "The textbook processor: every model over the whole text at every step."
    def __call__(self, input_ids, scores):
        x = {k: v for k, v in self.inputs.items() if k in ("pixel_values", "attention_mask")}
        mask = x.get("attention_mask")
        if mask is not None:
            x["attention_mask"] = torch.nn.functional.pad(mask, (0, input_ids.shape[1] - mask.shape[1]), value=1)
        logits = [e.core(input_ids=input_ids, **x, logits_to_keep=1).logits[:, -1] for e in self.decoder.experts[1:]]
        k = self.decoder.n_rewards
        return self.decoder.guidance(scores, logits[:k], logits[k:])[0]


class ByLot(SpeculativeEngine):
    "Drafts are accepted by lot, at a given rate: for weights that agree on nothing. A token's lot is one for all ways."
    rate_by_lot = .8
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        order = [torch.randperm(50, generator=torch.Generator().manual_seed(i)) for i in range(80)]
        self.lots = torch.cat(order) < 50 * self.rate_by_lot  # of 50 tokens always the same share is right

    def _pick(self, scores, drafted, a, b, proposals=None, ahead=0):
        tokens = super()._pick(scores, drafted, a, b, proposals, ahead)
        right = self.lots[self.count[a:b, None] + ahead + torch.arange(tokens.shape[1])]
        other = None if proposals is None else (proposals.cpu() + 1) % self.vocab
        return tokens if proposals is None else torch.where(right, proposals.cpu(), other)


def questions(processor, scenes, tokens: int) -> list:
    "Pairs of image and question, whose prompts have about so many tokens (0: as they are)."
    return [(s.image, repeated(processor, s.image, tokens)) for s in scenes]


def repeated(processor, image, tokens: int) -> str:
    "The question, as often as the prompt about an image needs for so many tokens."
    if not tokens:
        return QUESTION
    once, twice = (prompt_size(processor, image, question) for question in (QUESTION, f"{QUESTION} {QUESTION}"))
    more = max(0, round((tokens - once) / (twice - once)))
    return " ".join([QUESTION] * (1 + more))


def prompt_size(processor, image, question: str) -> int: # tokens
    return len(processor(text=chat_prompt(processor, question), images=image)["input_ids"][0])


def clock(device: str, cpu: bool):
    "Seconds so far: of this process's processor time, or of the wall."
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.process_time() if cpu else time.perf_counter()


def engine_of(dec, slots: int, draft, by_lot: float | None):
    "An engine; where drafts are accepted by lot, one that does so."
    if by_lot is None or draft == 0:
        return dec.engine(slots, draft=draft)
    ByLot.rate_by_lot = by_lot
    parts = dec.experts, dec.encoders, dec.guidance, slots, dec.n_rewards, 0, (), .25
    return ByLot(*parts, draft=draft, pace=dec.pace)


def engine_run(dec, pairs, new: int, draft, by_lot: float | None, eos=None):
    "Run the engine; what it counted."
    e = engine_of(dec, len(pairs), draft, by_lot)
    sampling = dec._sampling(eos=eos, max_new_tokens=new)
    e.submit([Row(i, question, [image], sampling, 0) for i, (image, question) in enumerate(pairs)])
    while e.busy:
        e.step()
    return e


class Batch:
    "Questions that are decoded together, each way. A way gives its tokens and, if it is ours, its engine."
    def __init__(self, processor, pairs, new: int, forced: bool, args):
        self.processor, self.pairs, self.new = processor, pairs, new
        self.forced, self.args = forced, args # forced: no end token ends an answer

    def inputs(self, dtype):
        texts = [chat_prompt(self.processor, question) for _, question in self.pairs]
        images = [image for image, _ in self.pairs]
        x = self.processor(text=texts, images=images, return_tensors="pt", padding=True).to(self.args.device)
        x["pixel_values"] = x["pixel_values"].to(dtype)
        return x

    def generate(self, dec, Processor=None, **settings):
        "By the base's own `generate`, aligned if there is a logits processor."
        x = self.inputs(dec.base.dtype)
        how = dict(max_new_tokens=self.new, do_sample=False, pad_token_id=0, eos_token_id=None if self.forced else 2)
        how |= settings
        if Processor is not None:
            how["logits_processor"] = [Processor(dec, x)]
        new = dec.base.generate(**x, **how)[:, x["input_ids"].shape[1]:]  # (rows, at most self.new)
        return new.numel() if self.forced else int((new != 0).sum()), None

    def ours(self, dec, draft, by_lot=None):
        e = engine_run(dec, self.pairs, self.new, draft, by_lot, () if self.forced else (2,))
        return e.produced, e

    def short_enough(self, dec) -> bool:
        "For the textbook processor, whose time grows with the square."
        return self.inputs(dec.base.dtype)["input_ids"].numel() * self.new <= self.args.full_prefix


def compiled():
    "Settings with which `generate` compiles the forward of a static cache, on a CPU, too."
    from transformers import CompileConfig
    config = CompileConfig(mode="default", fullgraph=False)
    config._compile_all_devices = True
    return config


def ways(dec, auto, alone, batch: Batch) -> dict:
    "Name -> a function that decodes the batch and returns (tokens, engine or None)."
    by_lot = batch.args.acceptance
    out = {
        "base only": lambda: batch.generate(dec),
        "cached processor": lambda: batch.generate(dec, AlignedLogitsProcessor),
        "ours, base only": lambda: batch.ours(alone, 0)}
    if batch.args.opponents:
        out["base, static cache"] = lambda: batch.generate(dec, cache_implementation="static")
        out["base, compiled"] = lambda: batch.generate(dec, cache_implementation="static", compile_config=compiled())
    if batch.short_enough(dec):
        out["full-prefix processor"] = lambda: batch.generate(dec, FullPrefix)
    out["ours, draft 0"] = lambda: batch.ours(dec, 0)
    if dec.guidance.lazy:
        out["ours, lazy"] = lambda: batch.ours(dec, "lazy", by_lot)
    for draft in batch.args.drafts:
        out[f"ours, draft {draft}"] = lambda draft=draft: batch.ours(dec, draft, by_lot)
    out["ours, auto"] = lambda: batch.ours(auto, "auto", by_lot)
    return {name: way for name, way in out.items() if any(word in name for word in batch.args.ways.split(","))}


def size(weight) -> int: # bytes
    return weight.numel() * weight.element_size()


def weights(e) -> int:
    "Bytes of an expert's decoder and head."
    return sum(map(size, e.core.get_decoder().parameters())) + size(e.head.weight)


def cached(e) -> int:
    "Bytes of one token's keys and values."
    return 2 * e.layers * e.kv_width * e.head.weight.element_size()


def counted(engines: list) -> dict:
    "What engines' runs say beside their time: forwards of a row, bytes of weights and caches that are read, drafts."
    total = lambda k: sum(getattr(getattr(e, "speculated", None), k, 0) for e in engines)
    tokens = max(1, sum(e.produced for e in engines))
    experts = [x for e in engines for x in e.experts]
    of_base = sum(e.experts[0].counts.row_forwards for e in engines)
    of_all = sum(x.counts.row_forwards for x in experts)
    bytes_read = sum(x.counts.forwards * weights(x) + x.counts.read * cached(x) for x in experts)
    out = dict(base_forwards_per_token=of_base / tokens, bytes_per_token=bytes_read / tokens)
    out["other_forwards_per_token"] = (of_all - of_base) / tokens
    if total("drafted"):
        out["acceptance"] = total("accepted") / total("drafted")
    if total("answered"):
        out["unsure"] = total("asked") / total("answered")
    return out


def bandwidth(args) -> float:
    "Bytes a second, read and written, of a large copy."
    from torch.utils.benchmark import Timer
    large = 1 << (30 if args.device.startswith("cuda") else 28)
    x = torch.ones(large, dtype=torch.uint8, device=args.device)
    copying = Timer("y.copy_(x)", globals=dict(x=x, y=torch.empty_like(x)), num_threads=args.threads)
    return 2 * large / copying.blocked_autorange(min_run_time=1.).median


def drafts_of(name: str) -> int:
    "How long a way's drafts are, if their length is fixed."
    return int(name.split()[-1]) if name.startswith("ours, draft") else 0


class Run(NamedTuple):
    "All batches of a case by one way, once."
    speed: float # tokens a second
    engines: list # None where it is not ours
    decoding: float # tokens a second after the first, without the reading of prompts; nan where that is not measured


def take_turns(batches: list[dict], firsts: list[dict], args) -> dict[str, list[Run]]:
    "Every way over all batches and their first tokens, round by round; short cases are measured more often."
    for name in batches[0]:
        batches[0][name]()  # to be warm
        [first[name]() for first in firsts[:1]]
    runs = {name: [] for name in batches[0]}
    start, rounds = time.perf_counter(), 0
    while rounds < args.rounds or time.perf_counter() - start < args.seconds:
        rounds += 1
        for name in runs:
            runs[name].append(timed([b[name] for b in batches], [f[name] for f in firsts], args))
    return runs


def timed(decode: list, firsts: list, args) -> Run:
    seconds, done = spent(decode, args)
    reading, first = spent(firsts, args)
    tokens = sum(n for n, _ in done)
    later = (tokens - sum(n for n, _ in first)) / (seconds - reading) if first and seconds > reading else math.nan
    return Run(tokens / seconds, [engine for _, engine in done], later)


def spent(decode: list, args) -> tuple[float, list]: # seconds, and what the calls returned
    start = clock(args.device, args.cpu_time)
    done = [f() for f in decode]
    return clock(args.device, args.cpu_time) - start, done


def over(runs: list[Run], others: list[Run], what: str = "speed") -> float:
    "Median ratio of speeds, round by round."
    return statistics.median(getattr(a, what) / getattr(b, what) for a, b in zip(runs, others))


def figures(name: str, runs: list[Run], base: list[Run], copied: float | None) -> dict:
    "What is noted about a way. `copied`: bytes a second of a large copy."
    row = dict(tokens_per_s=statistics.median(r.speed for r in runs), ratio=over(runs, base))
    if not any(math.isnan(r.decoding) for r in (*runs, *base)):
        row["decoding_ratio"] = over(runs, base, "decoding")
    if name.startswith("ours"):
        row |= counted(runs[-1].engines)
        if copied:
            row["floors"] = copied / (row["bytes_per_token"] * row["tokens_per_s"])
    return row


class Decoders(NamedTuple):
    "One equation, decoded with what is asked for, with drafts by its own measure, and without a reward."
    plain: AlignedDecoder
    auto: AlignedDecoder
    alone: AlignedDecoder


def case(decoders: Decoders, processor, scenes, batch: int, prompt: int, new: int, args) -> dict:
    "All ways in turn; medians of the ratios to the base's own generate."
    described = batch if prompt else max(batch, args.scenes // batch * batch)
    pairs = questions(processor, scenes, prompt)[:described]
    parts = [Batch(processor, pairs[i:i + batch], new, bool(prompt), args) for i in range(0, len(pairs), batch)]
    firsts = [Batch(processor, part.pairs, 1, True, args) for part in parts] if args.shape else []
    runs = take_turns(*([ways(*decoders, part) for part in x] for x in (parts, firsts)), args)
    rows = {name: figures(name, way, runs["base only"], args.bandwidth) for name, way in runs.items()}
    auto = runs["ours, auto"]
    rows["ours, auto"]["to_draft_0"] = over(auto, runs["ours, draft 0"])
    rows["ours, auto"]["to_best_draft"] = min(over(auto, runs[name]) for name in runs if drafts_of(name))
    return dict(batch=batch, prompt=prompt, new=new, rounds=len(runs["base only"]), ways=rows)


def wide_pair(device, dtype):
    "A tiny base whose images are 576 tokens, as LLaVA-1.5's are, and its processor."
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from tita.world.embedded import tiny_pair
    base, _, processor = tiny_pair()
    config = LlavaConfig(**base.config.to_dict())
    config.vision_config.image_size, config.vision_config.patch_size = 96, 4
    config.image_seq_length, config.text_config.max_position_embeddings = 576, 4096
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval().to(device, dtype)
    images = CLIPImageProcessorPil(size={"height": 96, "width": 96}, do_center_crop=False)
    return model, LlavaProcessor(
        images, processor.tokenizer, patch_size=4, vision_feature_select_strategy="default",
        chat_template=processor.chat_template, image_token="<image>", num_additional_image_tokens=1)


SIX = "What", "Is a ball", "How many cup icons", "What color", "Describe what", "Is a house"


def six_questions(scenes, args) -> dict:
    "Rows per second of six questions about one image of 576 tokens, together and one by one."
    model, processor = wide_pair(args.device, getattr(torch, args.dtype))
    dec = AlignedDecoder(model, processor=processor)
    rows = [(scenes[0].image, f"{q} is there in the image? " * 5) for q in SIX]
    together, one_by_one = [], []
    for _ in range(args.rounds + 1):
        together.append(seconds_of(dec, [rows], args))
        one_by_one.append(seconds_of(dec, [[r] for r in rows], args))
    del together[0], one_by_one[0]  # not yet warm
    return dict(
        prompt=prompt_size(processor, scenes[0].image, rows[0][1]),
        rows_per_s_together=len(rows) / statistics.median(together),
        rows_per_s_one_by_one=len(rows) / statistics.median(one_by_one),
        ratio=statistics.median(b / a for a, b in zip(together, one_by_one)))


def seconds_of(dec, parts: list, args) -> float:
    "Two tokens for each row, part by part."
    start = clock(args.device, args.cpu_time)
    for part in parts:
        engine_run(dec, part, 2, 0, None)
    return clock(args.device, args.cpu_time) - start


def title(c: dict) -> str:
    if c["prompt"]:
        return f"batch {c['batch']}, prompt of {c['prompt']}, {c['new']} new tokens"
    return f"batch {c['batch']}, descriptions of at most {c['new']} tokens"


def best(c: dict) -> str:
    "The fastest fixed draft."
    return max(filter(drafts_of, c["ways"]), key=lambda name: c["ways"][name]["ratio"])


def table(head: list, rows: list) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows])


RATIOS = ("base, static cache", "base, compiled", "full-prefix processor", "cached processor", "ours, base only",
    "ours, draft 0", "ours, lazy")


def speed_table(cases: list) -> str:
    "A row a case, a column a way; ratios to the base's own generate."
    shown = [name for name in RATIOS if any(name in c["ways"] for c in cases)]
    head = ["case", "base only, tokens/s", *shown, "ours, speculative", "ours, auto", "auto to draft 0", "auto to best"]
    return table(head, [speed_row(c, shown) for c in cases])


def speed_row(c: dict, shown: list[str]) -> list[str]:
    ways, fastest = c["ways"], best(c)
    ratios = [f"{ways[name]['ratio']:.2f}" if name in ways else "-" for name in shown]
    speculative = f"{ways[fastest]['ratio']:.2f} (k={drafts_of(fastest)})"
    auto = [f"{ways['ours, auto'][k]:.2f}" for k in ("ratio", "to_draft_0", "to_best_draft")]
    return [title(c), f"{ways['base only']['tokens_per_s']:.0f}", *ratios, speculative, *auto]


COSTS = {
    "drafts accepted": lambda r: f"{100 * r['acceptance']:.0f}%",
    "base unsure": lambda r: f"{100 * r['unsure']:.0f}%",
    "base forwards a token": lambda r: f"{r['base_forwards_per_token']:.2f}",
    "other forwards a token": lambda r: f"{r['other_forwards_per_token']:.2f}",
    "MB a token": lambda r: f"{r['bytes_per_token'] / 1e6:.2f}",
    "times the floor": lambda r: f"{r['floors']:.2f}",
    "whole answers": lambda r: f"{r['ratio']:.2f}",
    "decoding alone": lambda r: f"{r['decoding_ratio']:.2f}"}


def cost_table(cases: list) -> str:
    "What each way reads and runs for a token, and how fast it is: times the base's own generate."
    ours = [(c, name) for c in cases for name in c["ways"] if name.startswith(("ours", "base, "))]
    return table(["case", "way", *COSTS], [[title(c), name, *cost_row(c["ways"][name])] for c, name in ours])


def cost_row(way: dict) -> list[str]:
    "Empty where a way has no such figure."
    def cell(write) -> str:
        try:
            return write(way)
        except KeyError:
            return ""
    return [cell(write) for write in COSTS.values()]


GOALS = {.8: (1.6, 1.8), .9: (2., 2.4)} # acceptance -> times the base alone: whole answers, decoding alone

def goals_of(args: dict) -> tuple[float, float, str]:
    "What whole answers and decoding alone are to reach, and what the answers are."
    if args["shape"]:
        return *GOALS.get(args["acceptance"], (1.5, 1.5)), "whole answers"
    return 2., 2., "descriptions"


def targets(result: dict) -> list:
    "What was to be reached, and what was."
    cases = result["cases"]
    one = [c for c in cases if c["batch"] == 1]
    said = [c for c in one if not c["prompt"]] or one
    whole, decoding, what = goals_of(result["args"])
    autos = [c["ways"]["ours, auto"] for c in cases]
    at_one = [c["ways"]["ours, auto"] for c in said]
    plain = [c["ways"]["ours, draft 0"]["ratio"] for c in cases]
    rows = [
        (f"auto at batch 1, {what}: times the base alone", min((a["ratio"] for a in at_one), default=None), whole),
        ("auto at batch 1, decoding alone: times the base alone",
            min((a["decoding_ratio"] for a in at_one if "decoding_ratio" in a), default=None), decoding),
        ("draft 0: times the base alone, lowest of all cases", min(plain), .85),
        ("auto: times draft 0, lowest of all cases", min(a["to_draft_0"] for a in autos), .95),
        ("auto: times the best fixed draft, lowest of all cases", min(a["to_best_draft"] for a in autos), .95)]
    if six := result["six_questions"]:
        rows.append((f"six questions on one image, prompt of {six['prompt']}: times one by one", six["ratio"], 3.))
    floors = [c["ways"]["ours, base only"].get("floors") for c in one]
    if any(floors) and result["args"]["device"].startswith("cuda"):
        rows.append(("base only at batch 1: share of what memory allows (its floor over its time), lowest",
            1 / max(filter(None, floors)), .8))
    return [dict(target=t, value=v, at_least=x, reached=v >= x) for t, v, x in rows if v is not None]


def markdown(result: dict) -> str:
    "All of it, for reading."
    goals = [[t["target"], f"{t['value']:.2f}", f"{t['at_least']:g}", "reached" if t["reached"] else "missed"]
        for t in targets(result)]
    reached = table(["to reach", "measured", "at least", ""], goals)
    speeds, costs = speed_table(result["cases"]), cost_table(result["cases"])
    parts = ["# Decoding speed", how_made(result), speeds, reached, "## What a token costs", costs]
    return "\n\n".join(parts) + "\n"


def how_made(result: dict) -> str:
    "The paragraph that says what was measured where."
    a, rounds = result["args"], [c["rounds"] for c in result["cases"]]
    what = "the embedded models" + (" with a trained reward" if a["reward"] else "")
    if a["shape"]:
        what = f"random weights of shape {a['shape']}" # no reward could be trained on these
    said = [
        f"Made by `python scripts/bench_decode.py` on {what}: {result['form']}, λ = {a['lam']:g}, "
        f"bound {a['bound']:g} nats, gate {a['gate']}, {a['dtype']}.",
        where_made(result),
        f"The ways take turns; a ratio is the median of {min(rounds)} to {max(rounds)} paired rounds, "
        "tokens a second over those of the base's own greedy `generate`. Other programs ran on this machine meanwhile: "
        "compare ratios, not times."]
    if a["acceptance"] is not None:
        said.append(f"Drafts are accepted by lot, at {a['acceptance']}.")
    if a["bandwidth"]:
        said.append(f"A large copy moves {a['bandwidth'] / 1e9:.0f} GB/s.")
    return " ".join(said)


def where_made(result: dict) -> str:
    a, m, versions = result["args"], result["machine"], result["versions"]
    threads = f"{a['threads']} thread{'s' * (a['threads'] > 1)} of {result['cpus']} cores"
    load = f"load {m['load_before']:.1f} before and {m['load_after']:.1f} after"
    return (f"{m['name']}, {threads}, {load} ({'processor time' if a['cpu_time'] else 'wall time'}), "
        f"torch {versions['torch']}, transformers {versions['transformers']}, "
        f"commit {(result['commit'] or 'unknown')[:12]}.")


def machine(args) -> str:
    "The processor or GPU by name."
    if args.device.startswith("cuda"):
        return torch.cuda.get_device_name(args.device)
    return processor_name()


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda s: [int(x) for x in s.split(",") if x]
    p.add_argument("--batch", type=numbers, default=[1], help="rows at once, as in 1,8,32")
    p.add_argument("--prompt", type=numbers, default=[0], help="tokens, as in 64,640; 0: the question as it is")
    p.add_argument("--new", type=numbers, default=[64], help="new tokens, as in 32,256")
    p.add_argument("--drafts", type=numbers, default=[3, 4, 7], help="draft lengths, beside 0 and auto")
    p.add_argument("--seed", type=int, default=0, help="which embedded pair")
    p.add_argument("--reward", help="folder of a trained reward; its reference is then the embedded one (form ratio)")
    p.add_argument("--form", help="interpolate, ratio, arm [ratio with --reward or --shape, else interpolate]")
    p.add_argument("--lam", type=float, default=SAFE["lam"])
    p.add_argument("--bound", type=float, default=SAFE["bound"], help="nats, 0 for none")
    p.add_argument("--gate", default=SAFE["gate"], help="'' for none")
    p.add_argument("--opponents", action="store_true", help="`generate` with a static cache, and compiled, too")
    p.add_argument("--ways", default="", help="only ways whose names hold one of these, as in base,draft,auto")
    p.add_argument("--shape", help="random weights instead, base/reward, of " + ", ".join(SHAPES))
    p.add_argument("--vocab", type=int, default=32064, help="of those")
    p.add_argument("--acceptance", type=float, help="accept drafts by lot at this rate")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=5, help="at least")
    p.add_argument("--seconds", type=float, default=40., help="of measurements a case, at least")
    p.add_argument("--scenes", type=int, default=8, help="how many are described")
    p.add_argument("--full-prefix", type=int, default=20000,
        help="the textbook processor only where rows x prompt x new tokens are at most this")
    p.add_argument("--cpu-time", action="store_true",
        help="processor time instead of the wall's: for a machine that is busy with other things")
    p.add_argument("--out", help="where the figures go: OUT.json and OUT.md, as in results/bench_decode")
    return p.parse_args()


def make_decoders(models: list, processor, form: str, args) -> Decoders:
    base, reward, before = models
    reference = before if form == "ratio" else None
    dec = AlignedDecoder(base, reward, processor, reference, form=form, lam=args.lam, bound=args.bound or None,
        gate=args.gate or None)
    auto = copy.copy(dec)
    auto.pace = Pace()  # it knows what it has measured itself, as a user's does
    return Decoders(dec, auto, dec.alone())


def cases_of(args):
    "Batch, prompt and new tokens of each case; a description ends by itself."
    return [(b, p, n) for b in args.batch for p in args.prompt for n in (args.new if p else [64])]


def show(result: dict, out: str | None):
    "Print the newest case and keep all that is done."
    newest = result["cases"][-1:]
    print(f"\n{cost_table(newest)}\n\n{speed_table(newest)}", flush=True)
    if out:
        write_json(f"{out}.json", result)
        write_text(f"{out}.md", markdown(result))


@cli
def main():
    from tita.world.embedded import make_scenes
    args = parse()
    torch.set_num_threads(args.threads)
    models, processor = load(args)
    scenes = make_scenes(max(args.batch + [args.scenes]), seed=99)
    form = args.form or ("ratio" if args.reward or args.shape else "interpolate")
    decoders = make_decoders(models, processor, form, args)
    args.bandwidth = bandwidth(args) if args.shape else None
    load_now = lambda: os.getloadavg()[0]
    here = dict(name=machine(args), load_before=load_now())
    result = dict(cases=[], **run_info(), form=form, args=vars(args), machine=here)
    result["six_questions"] = None if args.shape else six_questions(scenes, args)
    for batch, prompt, new in cases_of(args):
        result["cases"].append(case(decoders, processor, scenes, batch, prompt, new, args))
        here["load_after"] = load_now()
        result["targets"] = targets(result)
        show(result, args.out)
    for t in result["targets"]:
        reached = "reached" if t["reached"] else "MISSED"
        print(f"{reached:8} {t['value']:.2f} (at least {t['at_least']:g}) {t['target']}")
    if args.out:
        print(f"{args.out}.json and .md")


if __name__ == "__main__":
    main()
