#!/usr/bin/env python3
"""Whose pairs, how many rounds, which loss? Rewards of one base that were made in other ways, on validation scenes.

    python scripts/study_rounds.py           writes results/study_rounds.{json,md}

Models come from runs/study_world (--runs, of scripts/study_world.py, which trains what is not there); rewards that are
made here are kept beside them. Killed and started again, it goes on.
"""
import argparse
from functools import partial
from pathlib import Path
import study_world as world
import torch
from tita.core import cli, progress, run_info, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.decode.guidance import OWN
from tita.eval.metrics import METRICS, bootstrap
from tita.studies import rivals
from tita.studies.rivals import Rival
from tita.world.embedded import make_scenes, tiny_processor

LOSSES = dict(
    normed=("length-normalised DPO (sigmoid_norm)", dict(loss_type=["sigmoid_norm"])),
    desensitised=("length control (LD-DPO, α 0.5)", dict(ld_alpha=.5)),
    weighted=("weighted by the policy's own probability (WPO)", dict(use_weighting=True)),
    anchored=("with a token-level anchor, 0.1 · -log p(chosen)", dict(chosen_weight=.1)))
TITLES = dict(
    after="**the default: its own pairs, one round**", of_base="pairs from the base's answers",
    more="a second round on its own pairs, other scenes", on_policy="a second round on pairs of the aligned model",
    base_dpo="DPO of the base itself, all weights") | {name: title for name, (title, _) in LOSSES.items()}

def rewards_of(seed: int, args) -> dict: # name -> model
    "All rewards of a seed, and the base before and after DPO."
    models = world.models_of(seed, args, {world.FIXED["base_dpo"].writes})
    base, before, after = (models[name] for name in ("base", "before", "after"))
    out = args.runs/f"seed{seed}"
    images, rounds = out/"images", out/"rounds"
    dpo = partial(world.trained, images=images, seed=seed)
    own = world.pairs_of(before, out, images, seed, args.pairs)
    told = dict(base=base, after=after, base_dpo=models[world.FIXED["base_dpo"].writes])
    of_base = world.pairs_of(base, rounds/"of_base", images, seed, args.pairs)
    told["of_base"] = dpo(before, of_base, rounds/"of_base"/"after")
    more = partial(world.second_round, images=images, seed=seed, scenes=args.pairs)
    told["more"] = more(before, after, rounds/"more")
    aligned = AlignedDecoder(base, after, tiny_processor(), **OWN)
    told["on_policy"] = more(aligned, after, rounds/"on_policy")
    for name, (_, settings) in LOSSES.items():
        told[name] = dpo(before, own, rounds/name, **settings)
    return told

def measured(seed: int, args) -> dict: # system -> metric -> cell: its change from the base, and from the default
    "Each reward as guidance by the default."
    models = rewards_of(seed, args)
    bench = rivals.Bench(models, make_scenes(args.scenes, 3000 + seed, "valid"), args.scenes)
    guided = {name: Rival("base", name, "", OWN) for name in TITLES if name in models and name != "base_dpo"}
    systems = dict(base=Rival("base"), base_dpo=Rival("base_dpo")) | guided
    found = {name: rivals.measure(bench, s)[0] for name, s in progress(systems.items(), desc=f"seed {seed}")}
    compared = {against: bootstrap(found, against)["systems"] for against in ("base", "after")}
    return {name: {against: told[name] for against, told in compared.items()} for name in systems}

PAGE = """\
# Whose pairs, how many rounds, which loss?

Made by `python scripts/study_rounds.py` on {scenes} validation scenes of each of the seeds {seeds}, on which no setting
was chosen; a round has pairs from {pairs} unlabelled scenes and two epochs. Every reward guides the same base, by the
mean with λ 0.5. Points of change from the base, means over seeds. The last four columns: metrics of all seeds that
differ from the base, and from the default's reward, after Holm's correction over a row's whole family.

{table}

Commit {commit:.12}, {cpus} cores of {system}.
"""

def report(found: dict) -> tuple: # rows, table
    "Rewards under each other."
    rows, lines = [], []
    for name, title in TITLES.items():
        cells = {against: {seed: of[name][against] for seed, of in found.items()} for against in ("base", "after")}
        counts = {against: rivals.harms_and_gains(of) for against, of in cells.items()}
        means = {m: sum(c[m]["delta"] for c in cells["base"].values()) / len(found) for m in world.SHOWN}
        rows.append(dict(name=name, title=title, change=means, cells=cells, counts=counts))
        told = [len(counts[against][way]) for against in ("base", "after") for way in ("better", "worse")]
        lines.append([title, *(f"{means[m]:+.1f}" for m in world.SHOWN), *told])
    titles = [METRICS[m].title for m in world.SHOWN]
    return rows, world.table(["reward", *titles, "better", "worse", "than the default: better", "worse"], lines)

@cli
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    p.add_argument("--pairs", type=int, default=600, help="unlabelled scenes for the pairs of a round")
    p.add_argument("--scenes", type=int, default=600, help="validation scenes of a seed")
    p.add_argument("--runs", type=Path, default=world.ROOT/"runs"/"study_world")
    p.add_argument("--out", type=Path, default=world.ROOT/"results")
    args = p.parse_args()
    args.rivals = ["base_dpo"]
    torch.set_num_threads(1)
    found, run = {seed: measured(seed, args) for seed in args.seed}, run_info()
    rows, table = report(found)
    told = dict(scenes=args.scenes, pairs=args.pairs, seeds=args.seed)
    write_json(args.out/"study_rounds.json", told | dict(rows=rows, run=run))
    told |= dict(seeds=", ".join(map(str, args.seed)), table=table)
    print(write_text(args.out/"study_rounds.md", PAGE.format(**told, **run | dict(commit=run["commit"] or "unknown"))))

if __name__ == "__main__":
    main()
