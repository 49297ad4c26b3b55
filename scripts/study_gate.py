#!/usr/bin/env python3
"""Would one gated default do for a base's own reward and for others? On validation scenes of the embedded world.

    python scripts/study_gate.py             seeds 0 and 1, writes results/study_gate.{json,md}

The recommended mean (interpolate, λ 0.5) with and without a gate, and the setting for foreign rewards, each with the
base's own reward, with that of the other seed and with one that hardly learned. Rewards are trained as in
scripts/study_world.py and kept in runs/study_gate/.
"""
import argparse
from pathlib import Path
import study_world as world
import torch
from tita.core import cli, progress, run_info, write_json, write_text
from tita.decode.guidance import OWN, SAFE
from tita.eval.metrics import METRICS, bootstrap
from tita.studies import rivals
from tita.studies.rivals import Rival
from tita.world.embedded import make_scenes

GATE = "agreement:0.3"
TRIED = {"mean, λ 0.5": OWN, f"the same, gate {GATE}": OWN | dict(gate=GATE),
         "the same, gate agreement:0.5": OWN | dict(gate="agreement:0.5"),
         f"the same, bound 1, gate {GATE}": OWN | dict(bound=1., gate=GATE),
         "as for a foreign reward": SAFE}
KINDS = {"": "its own", "foreign_": "of the other base", "weak_": "hardly learned"}

def measured(seed: int, args) -> dict: # (whose reward, setting) -> metric -> cell
    "Every setting with every reward, against the base."
    models = world.with_foreign(seed, args)
    bench, found = rivals.Bench(models, make_scenes(args.scenes, 2000 + seed, "valid"), args.scenes), {}
    kinds = [kind for kind in KINDS if f"{kind}after" in models]
    tried = {(KINDS[kind], name): world.aligned(how, kind) for kind in kinds for name, how in TRIED.items()}
    for k, s in progress(({"base": Rival("base")} | tried).items(), desc=f"seed {seed}", unit="setting"):
        found[k] = rivals.measure(bench, s)[0]
    told = bootstrap(found, "base")["systems"]
    return {k: told[k] for k in tried}

PAGE = """\
# One gated default?

Made by `python scripts/study_gate.py` on {scenes} validation scenes of each of the seeds {seeds}; pairs come from
{pairs} unlabelled scenes. Points of change from the large model, means over seeds; better and worse: metrics of all
seeds that differ after Holm's correction over a row's whole family.

{table}

Commit {commit:.12}, {cpus} cores of {system}.
"""

def report(found: dict) -> tuple: # rows, table
    "Settings under each other, by reward."
    rows, lines = [], []
    for k in next(iter(found.values())):
        cells = {seed: of[k] for seed, of in found.items()}
        counts = rivals.harms_and_gains(cells)
        means = {m: sum(c[m]["delta"] for c in cells.values()) / len(cells) for m in world.SHOWN}
        rows.append(dict(reward=k[0], setting=k[1], change=means, cells=cells) | counts)
        better, worse = len(counts["better"]), len(counts["worse"])
        lines.append([*k, *(f"{means[m]:+.1f}" for m in world.SHOWN), better, worse])
    return rows, world.table(["reward", "setting", *(METRICS[m].title for m in world.SHOWN), "better", "worse"], lines)

@cli
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, nargs="*", default=[0, 1])
    p.add_argument("--pairs", type=int, default=300, help="unlabelled scenes for preference pairs")
    p.add_argument("--scenes", type=int, default=250, help="validation scenes of a seed")
    p.add_argument("--rivals", nargs="*", default=["weak"], help="rewards to train beside the own one")
    p.add_argument("--runs", type=Path, default=world.ROOT/"runs"/"study_gate")
    p.add_argument("--out", type=Path, default=world.ROOT/"results")
    args = p.parse_args()
    torch.set_num_threads(1)
    for seed in args.seed:
        world.models_of(seed, args)
    found, run = {seed: measured(seed, args) for seed in args.seed}, run_info()
    rows, table = report(found)
    write_json(args.out/"study_gate.json", dict(scenes=args.scenes, pairs=args.pairs, rows=rows, run=run))
    told = dict(scenes=args.scenes, pairs=args.pairs, seeds=", ".join(map(str, args.seed)), table=table)
    print(write_text(args.out/"study_gate.md", PAGE.format(**told, **run | dict(commit=run["commit"] or "unknown"))))

if __name__ == "__main__":
    main()
