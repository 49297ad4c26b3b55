#!/usr/bin/env python3
"""Tokens per second of aligned decoding, every way side by side: base alone, logits processors, and tita's engine plain, lazy, drafting and auto.

    python scripts/bench_decode.py                                      the embedded pair on this machine, one row at a time
    python scripts/bench_decode.py --batch 1,8,32 --prompt 0,64,640 --new 32,256 --rounds 5 --out results/bench_decode
    python scripts/bench_decode.py --shape 7b/1.4b --device cuda --acceptance 0.8     random weights of that shape

The ways take turns in every round; a way's figure is the median over rounds of its ratio (tokens a second) to the base's own greedy `generate` in that round.
With --prompt 0 scenes are described and answers end where they end. With --prompt N the question is repeated up to N tokens and the answer has
exactly --new tokens: beyond what the embedded models learned, so acceptance there says little. Random weights agree on nothing: with --acceptance drafts are
accepted at that rate by lot, and the table says so. With --shape the time of a token is also counted in times of the floor: how long the bytes of weights and
caches that it needs take at the rate of a large copy on that device.
"""
import argparse, contextlib, copy, os, platform, statistics, time

import torch
from tita.core import TitaError, cli, run_info, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.decode.engine import Row
from tita.decode.hf import AlignedLogitsProcessor
from tita.models import chat_prompt
from tita.decode.pace import Pace, expected_tokens
from tita.decode.speculation import SpeculativeEngine

# hidden, layers, heads, key-value heads, feed-forward; vocabularies as in LLaVA-1.5
SHAPES = {
    "tiny": (64, 4, 4, 4, 160), "small": (256, 8, 4, 4, 640), "1.4b": (2048, 22, 32, 4, 5632),
    "3b": (2560, 32, 32, 32, 6912), "7b": (4096, 32, 32, 32, 11008), "13b": (5120, 40, 40, 40, 13824)}


def random_model(shape: str, like, device: str, dtype, vocab: int):
    "A LLaVA of a shape, with random weights and the world's small tower."
    from transformers import AutoModelForImageTextToText, LlavaConfig
    if shape not in SHAPES:
        raise TitaError(f"shape {shape!r} is not known; use two of {', '.join(SHAPES)}, as in 7b/1.4b")
    hidden, layers, heads, kv, ff = SHAPES[shape]
    config = LlavaConfig(**like.config.to_dict())
    t = config.text_config
    t.update(dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        intermediate_size=ff, head_dim=hidden // heads, vocab_size=vocab, max_position_embeddings=4096))
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


def load(args):
    "Base, reward, reference and processor, in the order and type that was asked for."
    from tita.world.embedded import load_models, tiny_pair
    dtype = getattr(torch, args.dtype)
    if args.shape:
        base, _, processor = tiny_pair()
        torch.manual_seed(0)
        names = args.shape.split("/")
        if len(names) != 2:
            raise TitaError(f"--shape {args.shape}: give base and reward, as in 7b/1.4b")
        models = [random_model(n, base, args.device, dtype, args.vocab) for n in (*names, names[1])]
    else:
        base, before, processor = load_models(args.seed)
        from transformers import AutoModelForImageTextToText
        after = AutoModelForImageTextToText.from_pretrained(args.reward, dtype=torch.float32).eval() if args.reward else before
        models = [m.to(args.device, dtype) for m in (base, after, before)]
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
    "Drafts are accepted by lot, at a given rate: for weights that agree on nothing."
    rate_by_lot = .8
    def _pick(self, scores, drafted, a, b, proposals=None, ahead=0):
        tokens = super()._pick(scores, drafted, a, b, proposals, ahead)
        lot = torch.rand(tokens.shape) < self.rate_by_lot
        self.hits = lot
        return tokens if proposals is None else torch.where(lot, proposals.cpu(), (proposals.cpu() + 1) % self.vocab)


def questions(processor, scenes, tokens: int) -> list:
    "Pairs of image and question, whose prompts have about so many tokens (0: as they are)."
    out, q = [], "Describe the image."
    if not tokens:
        return [(s.image, q) for s in scenes]
    for s in scenes:
        size = lambda q: len(processor(text=chat_prompt(processor, q), images=s.image)["input_ids"][0])
        one, first = size(q + " " + q) - size(q), size(q)
        out.append((s.image, " ".join([q] * (1 + max(0, round((tokens - first) / one))))))
    return out


def clock(device: str, cpu: bool):
    "Seconds so far: of this process's processor time, or of the wall."
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.process_time() if cpu else time.perf_counter()


def engine_run(dec, pairs, new: int, draft, by_lot: float | None, eos=None):
    "Run the engine; what it counted."
    if by_lot is not None and draft != 0:
        ByLot.rate_by_lot = by_lot
        parts = dec.experts, dec.encoders, dec.guidance, len(pairs), dec.n_rewards, 0, (), .25, dec.leader
        e = ByLot(*parts, draft=draft, pace=dec.pace)
    else:
        e = dec.engine(len(pairs), draft=draft)
    e.submit([Row(i, q, [im], dec._sampling(eos=eos, max_new_tokens=new), 0) for i, (im, q) in enumerate(pairs)])
    now = time.thread_time if dec.base.device.type == "cpu" else time.perf_counter  # as the engine that drafts
    while e.busy:
        n, start = e.n, now()
        e.step()
        if draft == 0 and dec.n_rewards and n and n == e.n:
            dec.pace.note(n, 0, now() - start)
    return e


def ways(dec, auto, alone, processor, pairs, new: int, forced: bool, args) -> dict:
    "Name -> a function that decodes one batch and returns (tokens, engine or None)."
    def inputs():
        x = processor(text=[chat_prompt(processor, q) for _, q in pairs], images=[im for im, _ in pairs], return_tensors="pt", padding=True).to(args.device)
        x["pixel_values"] = x["pixel_values"].to(dec.base.dtype)
        return x
    def generate(Processor=None):
        x = inputs()
        more = {} if Processor is None else dict(logits_processor=[Processor(dec, x)])
        out = dec.base.generate(**x, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None if forced else 2, **more)[:, x["input_ids"].shape[1]:]
        return int((out != 0).sum()) if not forced else out.numel(), None
    def ours(d, draft, by_lot=None):
        e = engine_run(d, pairs, new, draft, by_lot, () if forced else (2,))
        return e.produced, e
    out = {"base only": generate, "cached processor": lambda: generate(AlignedLogitsProcessor), "ours, base only": lambda: ours(alone, 0)}
    if inputs()["input_ids"].numel() * new <= args.full_prefix:
        out["full-prefix processor"] = lambda: generate(FullPrefix)
    for draft in (0, *(["lazy"] if dec.guidance.lazy else ()), *args.drafts):
        out[f"ours, draft {draft}" if draft != "lazy" else "ours, lazy"] = lambda draft=draft: ours(dec, draft, args.acceptance)
    out["ours, auto"] = lambda: ours(auto, "auto", args.acceptance)
    return out


def weights(e) -> int:
    "Bytes of an expert's decoder and head."
    return sum(p.numel() * p.element_size() for p in e.core.get_decoder().parameters()) + e.head.weight.numel() * e.head.weight.element_size()
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
    x = torch.ones(1 << (30 if args.device.startswith("cuda") else 28), dtype=torch.uint8, device=args.device)
    y = torch.empty_like(x)
    return 2 * x.numel() / Timer("y.copy_(x)", globals=dict(x=x, y=y), num_threads=args.threads).blocked_autorange(min_run_time=1.).median


def predict(rows: dict, pace: Pace, batch: int, rate: float):
    "Beside each measured ratio the one that measured costs promise: drafts by their acceptance, lazy guidance by the share of unsure tokens."
    plain, alone = rows["ours, draft 0"]["ratio"], rows["ours, base only"]["ratio"]
    steps = min(1., (pace.plain(batch) or 0) * rows["ours, draft 0"]["tokens_per_s"] / batch)  # their share of the time; the rest is reading prompts
    for n, r in rows.items():
        k = int(n.split()[-1]) if n.startswith("ours, draft") else 0
        if k:
            r["predicted"] = plain / (1 - steps + steps * pace.costs(batch)[k] / expected_tokens(rate, k)[k])
    if "ours, lazy" in rows:
        rows["ours, lazy"]["predicted"] = 1 / (1 / alone + (1 - (1 - rows["ours, lazy"]["unsure"])**batch) * (1 / plain - 1 / alone))
    rows["ours, auto"]["predicted"] = max([plain, *(r["predicted"] for r in rows.values() if "predicted" in r)])


def case(dec, auto, alone, processor, scenes, batch: int, prompt: int, new: int, args) -> dict:
    "All ways in turn; medians of the ratios to the base's own generate."
    pairs = questions(processor, scenes, prompt)[:batch if prompt else max(batch, args.scenes // batch * batch)]
    parts = [ways(dec, auto, alone, processor, pairs[i:i + batch], new, bool(prompt), args) for i in range(0, len(pairs), batch)]
    speeds, last = {n: [] for n in parts[0]}, {}
    for f in parts[0].values():
        f()
    start, rounds = time.perf_counter(), 0
    while rounds < args.rounds or time.perf_counter() - start < args.seconds:  # short cases are measured more often
        rounds += 1
        for n in speeds:
            t = clock(args.device, args.cpu_time)
            runs = [p[n]() for p in parts]
            speeds[n].append(sum(r[0] for r in runs) / (clock(args.device, args.cpu_time) - t))
            last[n] = runs
    over = lambda s, b: statistics.median(x / y for x, y in zip(s, b))
    rows = {n: dict(tokens_per_s=statistics.median(s), ratio=over(s, speeds["base only"]), **(counted([e for _, e in last[n]]) if n.startswith("ours") else {})) for n, s in speeds.items()}
    rows["ours, auto"]["to_draft_0"] = over(speeds["ours, auto"], speeds["ours, draft 0"])
    for r in rows.values():
        if args.bandwidth and "bytes_per_token" in r:
            r["floors"] = args.bandwidth / (r["bytes_per_token"] * r["tokens_per_s"])
    predict(rows, dec.pace, batch, args.acceptance if args.acceptance is not None else dec.pace.rate)
    return dict(batch=batch, prompt=prompt, new=new, rounds=rounds, ways=rows)


def wide_pair(device, dtype):
    "A tiny base whose images are 576 tokens, as LLaVA-1.5's are, and its processor."
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from tita.world.embedded import tiny_pair
    base, _, processor = tiny_pair()
    config = LlavaConfig(**base.config.to_dict())
    v, t = config.vision_config, config.text_config
    v.image_size, v.patch_size, config.image_seq_length, t.max_position_embeddings = 96, 4, 576, 4096
    torch.manual_seed(0)
    images = CLIPImageProcessorPil(size={"height": 96, "width": 96}, do_center_crop=False)
    return LlavaForConditionalGeneration(config).eval().to(device, dtype), LlavaProcessor(images, processor.tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=processor.chat_template, image_token="<image>", num_additional_image_tokens=1)


def six_questions(scenes, args) -> dict:
    "Rows per second of six questions about one image of 576 tokens, together and one by one."
    model, processor = wide_pair(args.device, getattr(torch, args.dtype))
    dec = AlignedDecoder(model, processor=processor)
    seconds = {"together": [], "one by one": []}
    rows = [(scenes[0].image, f"{q} is there in the image? " * 5) for q in ("What", "Is a ball", "How many cup icons", "What color", "Describe what", "Is a house")]
    tokens = len(processor(text=chat_prompt(processor, rows[0][1]), images=rows[0][0])["input_ids"][0])
    for _ in range(args.rounds + 1):
        for name, parts in (("together", [rows]), ("one by one", [[r] for r in rows])):
            t = clock(args.device, args.cpu_time)
            for part in parts:
                engine_run(dec, part, 2, 0, None)
            seconds[name].append(clock(args.device, args.cpu_time) - t)
    return dict(prompt=tokens, **{f"rows_per_s_{n.replace(' ', '_')}": 6 / statistics.median(s[1:]) for n, s in seconds.items()}, ratio=statistics.median(b / a for a, b in zip(seconds["together"][1:], seconds["one by one"][1:])))


def title(c: dict) -> str:
    return f"batch {c['batch']}, " + (f"prompt of {c['prompt']}, {c['new']} new tokens" if c["prompt"] else f"descriptions of at most {c['new']} tokens")

def best(c: dict) -> str:
    "The fastest fixed draft."
    return max((n for n in c["ways"] if n.startswith("ours, draft") and n != "ours, draft 0"), key=lambda n: c["ways"][n]["ratio"])

COSTS = (("acceptance", "drafts accepted", 100, "{:.0f}%"), ("unsure", "base unsure", 100, "{:.0f}%"), ("base_forwards_per_token", "base forwards a token", 1, "{:.2f}"), ("other_forwards_per_token", "other forwards a token", 1, "{:.2f}"),
    ("bytes_per_token", "MB a token", 1e-6, "{:.2f}"), ("floors", "times the floor", 1, "{:.2f}"), ("predicted", "predicted", 1, "{:.2f}"), ("ratio", "measured", 1, "{:.2f}"))

def table(head: list, rows: list) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows])

def speed_table(cases: list) -> str:
    "A row a case, a column a way; ratios to the base's own generate."
    at = lambda c, n, k="ratio": f"{c['ways'][n][k]:.2f}" if n in c["ways"] else "-"
    rows = [[title(c), f"{c['ways']['base only']['tokens_per_s']:.0f}", *(at(c, n) for n in ("full-prefix processor", "cached processor", "ours, base only", "ours, draft 0", "ours, lazy")), f"{at(c, best(c))} (k={best(c).split()[-1]})", at(c, "ours, auto"), at(c, "ours, auto", "to_draft_0")] for c in cases]
    return table(["case", "base only, tokens/s", "full-prefix processor", "cached processor", "ours, base only", "ours, draft 0", "ours, lazy", "ours, speculative", "ours, auto", "auto to draft 0"], rows)

def cost_table(cases: list) -> str:
    "What each of our ways reads and runs for a token, and what that promises."
    return table(["case", "way", *(c[1] for c in COSTS)], [[title(c), n, *(form.format(r[k] * scale) if k in r else "" for k, _, scale, form in COSTS)] for c in cases for n, r in c["ways"].items() if n.startswith("ours")])


def targets(result: dict) -> list:
    "What was to be reached, and what was."
    cases = result["cases"]
    one = [c for c in cases if c["batch"] == 1]
    said = [c for c in one if not c["prompt"]] or one
    low = lambda cases, f: min(map(f, cases), default=None)
    shape, alone = result["args"]["shape"], [c for c in one if "floors" in c["ways"]["ours, base only"]]
    rows = [(f"speculative at batch 1{', descriptions' * (not shape)}: times the base alone", low(said, lambda c: c["ways"][best(c)]["ratio"]), 1.5 if shape else 1.3), ("draft 0: times the base alone, lowest of all cases", low(cases, lambda c: c["ways"]["ours, draft 0"]["ratio"]), .85),
        ("auto: times draft 0, lowest of all cases", low(cases, lambda c: c["ways"]["ours, auto"]["to_draft_0"]), .95), (f"six questions on one image, prompt of {result['six_questions']['prompt']}: times one by one", result["six_questions"]["ratio"], 3.)]
    if alone and result["args"]["device"].startswith("cuda"):
        rows.append(("base only at batch 1: share of what memory allows (its floor over its time), lowest", 1 / max(c["ways"]["ours, base only"]["floors"] for c in alone), .8))
    return [dict(target=t, value=v, at_least=x, reached=v >= x) for t, v, x in rows if v is not None]

def markdown(result: dict) -> str:
    "All of it, for reading."
    a, m = result["args"], result["machine"]
    what = f"random weights of shape {a['shape']}" if a["shape"] else "the embedded models" + (" with a trained reward" if a["reward"] else "")
    made = (f"Made by `python scripts/bench_decode.py` on {what}: {result['form']}, λ = {a['lam']:g}, bound {a['bound']:g} nats, {a['dtype']}. {m['name']}, {a['threads']} thread{'s' * (a['threads'] > 1)} of {result['cpus']} cores, "
        f"load {m['load_before']:.1f} before and {m['load_after']:.1f} after ({'processor time' if a['cpu_time'] else 'wall time'}), torch {result['versions']['torch']}, transformers {result['versions']['transformers']}, commit {(result['commit'] or 'unknown')[:12]}. The ways take turns; a ratio is the median of {min(c['rounds'] for c in result['cases'])} to {max(c['rounds'] for c in result['cases'])} paired rounds, "
        "tokens a second over those of the base's own greedy `generate`." + (f" Drafts are accepted by lot, at {a['acceptance']}." if a["acceptance"] is not None else "") + (f" A large copy moves {a['bandwidth'] / 1e9:.0f} GB/s." if a["bandwidth"] else ""))
    reached = table(["to reach", "measured", "at least", ""], [[t["target"], f"{t['value']:.2f}", f"{t['at_least']:g}", "reached" if t["reached"] else "missed"] for t in targets(result)])
    return "\n\n".join(["# Decoding speed", made, speed_table(result["cases"]), reached, "## What a token costs", cost_table(result["cases"])]) + "\n"


def machine(args) -> str:
    "The processor or GPU by name."
    if args.device.startswith("cuda"):
        return torch.cuda.get_device_name(args.device)
    with contextlib.suppress(OSError):
        return next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine())
    return platform.processor() or platform.machine()


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda s: [int(x) for x in s.split(",") if x]
    p.add_argument("--batch", type=numbers, default=[1], help="rows at once, as in 1,8,32")
    p.add_argument("--prompt", type=numbers, default=[0], help="prompt tokens, as in 64,640; 0 is the question as it is")
    p.add_argument("--new", type=numbers, default=[64], help="new tokens, as in 32,256")
    p.add_argument("--drafts", type=numbers, default=[2, 4], help="draft lengths, beside 0 and auto")
    p.add_argument("--seed", type=int, default=0, help="which embedded pair")
    p.add_argument("--reward", help="folder of a trained reward; its reference is then the embedded one (form ratio)")
    p.add_argument("--form", help="interpolate, ratio, arm [ratio with --reward or --shape, else interpolate]")
    p.add_argument("--lam", type=float, default=.6)
    p.add_argument("--bound", type=float, default=1., help="nats, 0 for none")
    p.add_argument("--shape", help="random weights instead, base/reward, of " + ", ".join(SHAPES))
    p.add_argument("--vocab", type=int, default=32064, help="of those")
    p.add_argument("--acceptance", type=float, help="accept drafts by lot at this rate")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--rounds", type=int, default=5, help="at least")
    p.add_argument("--seconds", type=float, default=40., help="of measurements a case, at least")
    p.add_argument("--scenes", type=int, default=8, help="how many are described")
    p.add_argument("--full-prefix", type=int, default=20000, help="the textbook processor only where rows x prompt x new tokens are at most this")
    p.add_argument("--cpu-time", action="store_true", help="processor time instead of the wall's: for a machine that is busy with other things")
    p.add_argument("--out", help="where the figures go: OUT.json and OUT.md, as in results/bench_decode")
    return p.parse_args()


@cli
def main():
    args = parse()
    torch.set_num_threads(args.threads)
    from tita.world.embedded import make_scenes
    (base, reward, ref), processor = load(args)
    scenes = make_scenes(max(args.batch + [args.scenes]), seed=99)
    form = args.form or ("ratio" if args.reward or args.shape else "interpolate")
    load_now = lambda: os.getloadavg()[0]
    dec = AlignedDecoder(base, reward, processor, ref if form == "ratio" else None, form=form, lam=args.lam, bound=args.bound or None)
    args.bandwidth = bandwidth(args) if args.shape else None
    auto = copy.copy(dec)
    auto.pace = Pace()  # it knows what it has measured itself, as a user's does
    result = dict(cases=[], **run_info(), form=form, args=vars(args), machine=dict(name=machine(args), load_before=load_now()))
    result["six_questions"] = six_questions(scenes, args)
    for batch, prompt, new in [(b, p, n) for b in args.batch for p in args.prompt for n in (args.new if p else [64])]:
        result["cases"].append(case(dec, auto, dec.alone(), processor, scenes, batch, prompt, new, args))
        print("\n" + cost_table(result["cases"][-1:]) + "\n\n" + speed_table(result["cases"][-1:]), flush=True)
        result["machine"]["load_after"] = load_now()
        result["targets"] = targets(result)
        if args.out:
            write_json(f"{args.out}.json", result)
            write_text(f"{args.out}.md", markdown(result))  # what is done is kept
    for t in result["targets"]:
        print(f"{'reached' if t['reached'] else 'MISSED':8} {t['value']:.2f} (at least {t['at_least']:g}) {t['target']}")
    if args.out:
        print(f"{args.out}.json and .md")


if __name__ == "__main__":
    main()
