#!/usr/bin/env python3
"""Would a drafter of its own beat the reward as a drafter? A smaller model, distilled on aligned answers, drafts; base and reward verify.

    python scripts/study_drafter.py                               the embedded pair, results/study_drafter.{json,md}
    python scripts/study_drafter.py --steps 20 --scenes 60 --rounds 1    a quick look

The reward must read every token anyway, so its drafts cost nothing beyond that. A drafter of its own costs a forward of the reward more per
block, and saves where it is cheaper a token, or right more often. The drafters start from layers of the reward and learn the aligned
distribution on aligned answers to training scenes; what is measured are descriptions of other scenes, one row at a time.
"""
import argparse, random, statistics, time
from pathlib import Path

import torch
from tita.core import cli, progress, run_info, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.decode.engine import Row
from tita.decode.experts import Expert, share_towers
from tita.models import chat_prompt
from tita.decode.speculation import SpeculativeEngine
from tita.train.trees import tree_logits
from tita.world.embedded import ASK, load_models, make_scenes
from tita.studies.world_models import IGNORE, LONG, Schedule, Tokens, kl, pixels, shrink

ROOT = Path(__file__).resolve().parent.parent


class Drafted(SpeculativeEngine):
    "The last expert drafts and has no say; for drafts of a fixed length, greedy."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.drafter = self.experts[-1]
    def _score(self, logits):
        return super()._score(logits[:-1])


def run(dec, experts, image, draft: int, new: int) -> SpeculativeEngine:
    "Describe one image with the last of the experts (or, if they are the decoder's own, the reward) as drafter."
    own = experts is dec.experts
    cls = SpeculativeEngine if own else Drafted
    e = cls(experts, dec.encoders, dec.guidance, 1, dec.n_rewards, 0, (), .25, share_towers(experts), draft=draft)
    e.submit([Row(0, ASK["caption"], [image], dec._sampling(max_new_tokens=new), 0)])
    e.said = []
    while e.busy:
        e.said += [o.tokens for _, o in e.step()]
    return e


def teach(dec, drafter, scenes, steps: int, lr: float, batch: int, seed: int) -> list[float]: # agreement on held-out scenes, before and after
    "Distil the aligned distribution on aligned answers into a drafter."
    said = [{} for _ in scenes]
    asked = [(i, k) for i in range(len(scenes)) for k in LONG]
    for (i, k), o in zip(asked, dec.generate([scenes[i].image for i, _ in asked], [ASK[k] for _, k in asked], max_new_tokens=48)):
        said[i][k] = o.text
    x, tokens, rng, held = pixels([s.image for s in scenes]), Tokens(), random.Random(seed), max(8, len(scenes) // 20)
    drafter.model.vision_tower.requires_grad_(False)
    opt = Schedule(drafter.parameters(), lr, steps, warm=50, weight_decay=.01)
    def compare(ix):
        trees = tokens.trees([[(ASK[k], said[i][k]) for k in LONG if said[i].get(k)] for i in ix])
        with torch.no_grad():
            (base, labels), (reward, _) = (tree_logits(m, *trees, pixel_values=x[ix]) for m in (dec.base, dec.rewards[0]))
            on = labels != IGNORE
            aligned = dec.guidance(base[on], [reward[on]], [])[0]
        mine = tree_logits(drafter, *trees, pixel_values=x[ix])[0][on]
        return kl(aligned, mine).mean(), (aligned.argmax(-1) == mine.argmax(-1)).float().mean()
    def agreement():
        with torch.no_grad():
            return round(float(compare(list(range(held)))[1]), 4)
    before = agreement()
    for _ in progress(range(steps), desc="drafter", unit="step"):
        opt.step(compare(rng.sample(range(held, len(scenes)), batch))[0])
    return [before, agreement()]


def measure(dec, drafters: dict, images, lengths: list[int], new: int, rounds: int, processor) -> list[dict]:
    "All ways take turns; medians of the ratios to the base's own `generate`."
    def base_only(im):
        x = processor(text=chat_prompt(processor, ASK["caption"]), images=im, return_tensors="pt")
        n = x["input_ids"].shape[1]
        return dec.base.generate(**x, max_new_tokens=new, do_sample=False, pad_token_id=0)[0, n:].tolist(), None
    def ours(experts, k):
        def f(im):
            e = run(dec, experts, im, k, new)
            return e.said[0], e
        return f
    ways = {("base only", 0): base_only} | {(n, k): ours(experts, k) for n, experts in drafters.items() for k in lengths}
    seconds, last = {w: [] for w in ways}, {}
    for r in range(rounds + 1):
        for w, f in ways.items():
            start = time.perf_counter()
            last[w] = [f(im) for im in images]
            took = time.perf_counter() - start
            if r:
                seconds[w].append(took / sum(len(t) for t, _ in last[w]))
    answers = [t for t, _ in last[next(w for w in ways if w[1])]]
    for w in ways:
        if w[1]:
            assert [t for t, _ in last[w]] == answers, w  # whoever drafts, the answers are the same
    return [dict(drafter=n, k=k, accepted=sum(e.speculated.accepted for _, e in last[n, k]) / sum(e.speculated.drafted for _, e in last[n, k]),
        over_base=statistics.median(b / s for b, s in zip(seconds["base only", 0], seconds[n, k]))) for n, k in ways if k]


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
    scenes, drafters, learned = make_scenes(args.scenes, args.seed + 5000, "train"), {"the reward": dec.experts}, {}
    for name, keep in {"its first layer, distilled": (0,), "all its layers, distilled": tuple(range(dec.experts[1].layers))}.items():
        small = shrink(reward, keep)
        learned[name] = teach(dec, small.train(), scenes, args.steps, args.lr, args.batch, args.seed)
        drafters[name] = [*dec.experts, Expert(small.eval())]
        print(name, learned[name], flush=True)
    rows = measure(dec, drafters, [s.image for s in make_scenes(args.test, 99)], [int(k) for k in args.lengths.split(",")], args.new, args.rounds, processor)
    result = dict(rows=rows, agreement=learned, layers=dict(base=dec.experts[0].layers, reward=dec.experts[1].layers), args={k: str(v) for k, v in vars(args).items() if k != "out"}, run=run_info())
    write_json(args.out.with_suffix(".json"), result)
    write_text(args.out.with_suffix(".md"), table(result))
    print(table(result))


def table(r: dict) -> str: # Markdown
    "For people."
    lines = [f"| {x['drafter']} | {x['k']} | {x['accepted']:.0%} | {x['over_base']:.2f}x |" for x in r["rows"]]
    info = r["run"]
    learned = "; ".join(f"{n}: {a:.1%} of the aligned tokens before, {b:.1%} after" for n, (a, b) in r["agreement"].items())
    return ("# A drafter distilled on aligned answers\n\n`python scripts/study_drafter.py`: " + f"{r['args']['test']} descriptions, one at a time, aligned by interpolation (λ = 0.6, bound 1 nat); the base has {r['layers']['base']} layers, the reward {r['layers']['reward']}. "
        f"The drafters learned {r['args']['steps']} steps on aligned answers about {r['args']['scenes']} scenes. Agreement on held-out scenes: {learned}.\n\n"
        "| who drafts | drafts a block | accepted | times the base's own generate |\n|---|---|---|---|\n" + "\n".join(lines)
        + f"\n\nMedians of {r['args']['rounds']} paired rounds, wall time, 1 thread. Commit {(info['commit'] or '')[:12]}, {info['cpus']} cores, {info['system']}, torch {info['versions']['torch']}.\n")


if __name__ == "__main__":
    main()
