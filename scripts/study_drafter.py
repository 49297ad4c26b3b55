#!/usr/bin/env python3
"""Would a drafter of its own beat the reward as a drafter?

A smaller model, distilled on aligned answers, drafts; base and reward verify.

    python scripts/study_drafter.py                               the embedded pair, results/study_drafter.{json,md}
    python scripts/study_drafter.py --steps 20 --scenes 60 --rounds 1    a quick look

The reward must read every token anyway, so its drafts cost nothing beyond that. A drafter of its own costs a forward of
the reward more per block, and saves where it is cheaper a token, or right more often. The drafters start from layers of
the reward and learn the aligned distribution on aligned answers to training scenes; what is measured are descriptions
of other scenes, one row at a time.
"""
import argparse
import copy
import random
import statistics
import time
from pathlib import Path

import torch
from tita.core import cli, progress, run_info, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.decode.engine import Row
from tita.decode.experts import Expert
from tita.models import chat_prompt
from tita.decode.speculation import SpeculativeEngine
from tita.train.trees import tree_logits
from tita.world.embedded import ASK, load_models, make_scenes
from tita.studies.world_models import IGNORE, Schedule, Tokens, pixels
from tita.train.distill import kl

ROOT = Path(__file__).resolve().parent.parent
LONG = "caption", "text", "house", "plate" # kinds of questions that want long answers


def shrink(model, keep: tuple):
    "A smaller model that starts from the larger one's own layers `keep`."
    small = copy.deepcopy(model)
    layers = small.get_decoder().layers
    small.get_decoder().layers = torch.nn.ModuleList(layers[k] for k in keep)
    for k, layer in enumerate(small.get_decoder().layers):
        layer.self_attn.layer_idx = k # where its cache is
    config = small.config.get_text_config()
    config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[k] for k in keep]
    return small


class Drafted(SpeculativeEngine):
    "The last expert drafts and has no say; for drafts of a fixed length, greedy."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drafter = self.experts[-1]
    def _score(self, logits, rows=None):
        return super()._score(logits[:-1], rows)


def run(dec, experts, image, draft: int, new: int) -> SpeculativeEngine:
    "Describe one image with the last of the experts (or, if they are the decoder's own, the reward) as drafter."
    own = experts is dec.experts
    cls = SpeculativeEngine if own else Drafted
    e = cls(experts, dec.encoders, dec.guidance, 1, dec.n_rewards, 0, (), .25, draft=draft)
    e.submit([Row(0, ASK["caption"], [image], dec._sampling(max_new_tokens=new), 0)])
    e.said = []
    while e.busy:
        e.said += [o.tokens for _, o in e.step()]
    return e


def say(dec, scenes) -> list[dict[str, str]]: # of each scene, kind of question -> aligned answer
    "Answers to the questions that want long ones."
    asked = [(i, kind) for i in range(len(scenes)) for kind in LONG]
    outs = dec.generate([scenes[i].image for i, _ in asked], [ASK[kind] for _, kind in asked], max_new_tokens=48)
    said = [{} for _ in scenes]
    for (i, kind), out in zip(asked, outs):
        said[i][kind] = out.text
    return said


class Lessons:
    "Aligned answers to scenes, and how far a drafter is from the distribution that they come from."
    def __init__(self, dec, scenes):
        self.dec, self.said, self.pixels = dec, say(dec, scenes), pixels([s.image for s in scenes])
        self.tokens = Tokens()

    def trees(self, chosen: list[int]):
        questions = [[(ASK[k], self.said[i][k]) for k in LONG if self.said[i].get(k)] for i in chosen]
        return self.tokens.trees(questions)

    @torch.no_grad()
    def aligned(self, trees, images): # (tokens of answers, V), and where they stand in the batch
        base, labels = tree_logits(self.dec.base, *trees, pixel_values=images)
        reward, _ = tree_logits(self.dec.rewards[0], *trees, pixel_values=images)
        answered = labels != IGNORE
        return self.dec.guidance(base[answered], [reward[answered]], [])[0], answered

    def compare(self, drafter, chosen: list[int]):
        "Divergence of the drafter from the aligned distribution, and how often both have the same first choice."
        trees, images = self.trees(chosen), self.pixels[chosen]
        aligned, answered = self.aligned(trees, images)
        mine = tree_logits(drafter, *trees, pixel_values=images)[0][answered]
        return kl(aligned, mine).mean(), (aligned.argmax(-1) == mine.argmax(-1)).float().mean()


def teach(dec, drafter, scenes, args) -> list[float]: # agreement on held-out scenes, before and after
    "Distil the aligned distribution on aligned answers into a drafter."
    lessons, rng = Lessons(dec, scenes), random.Random(args.seed)
    held = max(8, len(scenes) // 20)
    drafter.model.vision_tower.requires_grad_(False)
    opt = Schedule(drafter.parameters(), args.lr, args.steps, warm=50, weight_decay=.01)

    @torch.no_grad()
    def agreement():
        return round(float(lessons.compare(drafter, list(range(held)))[1]), 4)
    before = agreement()
    for _ in progress(range(args.steps), desc="drafter", unit="step"):
        divergence, _ = lessons.compare(drafter, rng.sample(range(held, len(scenes)), args.batch))
        opt.step(divergence)
    return [before, agreement()]


def base_only(dec, processor, new: int):
    "A way: the base's own `generate`."
    def describe(image):
        x = processor(text=chat_prompt(processor, ASK["caption"]), images=image, return_tensors="pt")
        prompt = x["input_ids"].shape[1]
        return dec.base.generate(**x, max_new_tokens=new, do_sample=False, pad_token_id=0)[0, prompt:].tolist(), None
    return describe


def drafted_by(dec, experts, draft: int, new: int):
    "A way: the last of the experts drafts so many tokens a block."
    def describe(image):
        e = run(dec, experts, image, draft, new)
        return e.said[0], e
    return describe


def take_turns(ways: dict, images, rounds: int) -> tuple[dict, dict]:
    "Seconds of a token in each round but the first, and what each way said last."
    seconds, last = {way: [] for way in ways}, {}
    for warm in [False] + [True] * rounds:
        for way, describe in ways.items():
            start = time.perf_counter()
            last[way] = [describe(image) for image in images]
            took = time.perf_counter() - start
            if warm:
                seconds[way].append(took / sum(len(tokens) for tokens, _ in last[way]))
    return seconds, last


BASE = "base only", 0


def measure(dec, drafters: dict, images, processor, args) -> list[dict]:
    "All ways take turns; medians of the ratios to the base's own `generate`."
    lengths = [int(k) for k in args.lengths.split(",")]
    ways = {(name, k): drafted_by(dec, e, k, args.new) for name, e in drafters.items() for k in lengths}
    seconds, last = take_turns({BASE: base_only(dec, processor, args.new)} | ways, images, args.rounds)
    answers = [tokens for tokens, _ in last[next(iter(ways))]]
    for way in ways:
        assert [tokens for tokens, _ in last[way]] == answers, way  # whoever drafts, the answers are the same
    return [dict(drafter=name, k=k, accepted=accepted([e for _, e in last[name, k]]),
        over_base=statistics.median(b / s for b, s in zip(seconds[BASE], seconds[name, k]))) for name, k in ways]


def accepted(engines: list) -> float:
    "Share of the drafts."
    return sum(e.speculated.accepted for e in engines) / sum(e.speculated.drafted for e in engines)


@cli
def main(argv: list = None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0, help="of the world")
    p.add_argument("--scenes", type=int, default=2000, help="to train on")
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--lr", type=float, default=3e-3)
    p.add_argument("--new", type=int, default=64)
    p.add_argument("--test", type=int, default=16, help="scenes to describe")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--lengths", default="4,6,8")
    p.add_argument("--out", type=Path, default=ROOT/"results"/"study_drafter")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    base, reward, processor = load_models(args.seed)
    dec = AlignedDecoder(base, reward, processor, form="interpolate", lam=.6, bound=1.)
    scenes = make_scenes(args.scenes, args.seed + 5000, "train")
    layers = dict(base=dec.experts[0].layers, reward=dec.experts[1].layers)
    kept = {"its first layer, distilled": (0,), "all its layers, distilled": tuple(range(layers["reward"]))}
    drafters, learned = {"the reward": dec.experts}, {}
    for name, keep in kept.items():
        small = shrink(reward, keep)
        learned[name] = teach(dec, small.train(), scenes, args)
        drafters[name] = [*dec.experts, Expert(small.eval())]
        print(name, learned[name], flush=True)
    rows = measure(dec, drafters, [s.image for s in make_scenes(args.test, 99)], processor, args)
    settings = {k: str(v) for k, v in vars(args).items() if k != "out"}
    result = dict(rows=rows, agreement=learned, layers=layers, args=settings, run=run_info())
    write_json(args.out.with_suffix(".json"), result)
    write_text(args.out.with_suffix(".md"), table(result))
    print(table(result))


def table(r: dict) -> str: # Markdown
    "For people."
    lines = [f"| {x['drafter']} | {x['k']} | {x['accepted']:.0%} | {x['over_base']:.2f}x |" for x in r["rows"]]
    head = ["| who drafts | drafts a block | accepted | times the base's own generate |", "|---|---|---|---|"]
    info = r["run"]
    where = f"{info['cpus']} cores, {info['system']}, torch {info['versions']['torch']}"
    return "\n\n".join(["# A drafter distilled on aligned answers", how_made(r), "\n".join(head + lines),
        f"Medians of {r['args']['rounds']} paired rounds, wall time, 1 thread. "
        f"Commit {(info['commit'] or '')[:12]}, {where}."]) + "\n"


def how_made(r: dict) -> str:
    args, layers = r["args"], r["layers"]
    learned = "; ".join(f"{name}: {before:.1%} of the aligned tokens before, {after:.1%} after"
        for name, (before, after) in r["agreement"].items())
    return (f"`python scripts/study_drafter.py`: {args['test']} descriptions, one at a time, aligned by interpolation "
        f"(λ = 0.6, bound 1 nat); the base has {layers['base']} layers, the reward {layers['reward']}. "
        f"The drafters learned {args['steps']} steps on aligned answers about {args['scenes']} scenes. "
        f"Agreement on held-out scenes: {learned}.")


if __name__ == "__main__":
    main()
