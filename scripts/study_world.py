#!/usr/bin/env python3
"""The demo on three independently trained sets of models, 1,500 test scenes each: what the README reports.

    python scripts/study_world.py                  runs nbs/runs/demo.ipynb for seeds 0, 1, 2 in runs/study_world/,
                                                   writes results/
    python scripts/study_world.py --seed 0 --scenes 600 --name greedy_pairs -p samples 0 -p beta 0.1
                                                   a variant: SeVa's greedy pairs; other parameters likewise

A seed that is there is not run again: killed and started again, it goes on.
"""
import argparse, json, subprocess, sys
from pathlib import Path
from tita.core import TitaError, cli, write_json, write_text
from tita.eval.metrics import METRICS
from tita.show.report import SYSTEMS, results_table

ROOT = Path(__file__).resolve().parent.parent
SHOWN = [m for m in METRICS if m not in ("sign_accuracy", "number_accuracy")]

def run_seed(seed: int, scenes: int, runs: Path, given: list) -> dict:
    "One seed's metrics.json."
    out = runs/f"seed{seed}"
    parameters = [("out", out), ("seed", seed), ("test_scenes", scenes), *given]
    flags = [str(word) for name, value in parameters for word in ("-p", name, value)]
    command = [sys.executable, "scripts/run_notebook.py", "nbs/runs/demo.ipynb", str(out/"demo.ipynb"), *flags]
    if not (out/"report.html").exists() and subprocess.run(command, cwd=ROOT).returncode:
        raise TitaError(f"seed {seed} failed, see {out}; run the same command again to go on")
    return json.loads((out/"metrics.json").read_text())

MADE = """\
Made by `python scripts/study_world.py` on {cpus} CPU cores ({system}), commit {commit:.12}. Percent; in brackets the \
paired 95% bootstrap interval of the difference from the large model (for the stronger ones from the stronger model)."""
SEED = """\
λ = {lam:g} ({strong_lam:g} for bounded guidance of the stronger model), chosen on {valid} validation scenes; {pairs} \
pairs from {probe} unlabelled scenes; {test} test scenes."""

def tables(found: dict) -> str:
    "Markdown: a table a seed, and the verdicts of the default form over seeds."
    titles = {k: v[0] for k, v in SYSTEMS.items()}
    parts = []
    for seed, m in found.items():
        about = SEED.format(lam=m["lam"], strong_lam=m["strong_lam"], pairs=m["pairs"]["pairs"], **m["scenes"])
        parts += [f"## Seed {seed}", about, results_table(m, SHOWN, titles=titles)]
    run = next(iter(found.values()))["run"]
    made = MADE.format(cpus=run["cpus"], system=run["system"], commit=run["commit"] or "unknown")
    return "\n\n".join(["# The main job on independently trained sets of models", made, *parts]) + "\n"

@cli
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    p.add_argument("--out", type=Path, default=ROOT/"results")
    p.add_argument("--scenes", type=int, default=1500)
    p.add_argument("--name", default="study_world", help="of the files in results/ and of the folder in runs/")
    pair = dict(nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    p.add_argument("-p", help="a parameter of the notebook", **pair)
    args = p.parse_args()
    found = {seed: run_seed(seed, args.scenes, ROOT/"runs"/args.name, args.p) for seed in args.seed}
    kept = {f"seed{s}": {k: v for k, v in m.items() if k != "settings"} for s, m in found.items()}
    write_json(args.out/f"{args.name}.json", kept)
    print(write_text(args.out/f"{args.name}.md", tables(found)))

if __name__ == "__main__":
    main()
