#!/usr/bin/env python3
"""Every notebook of nbs/runs in its smoke mode, each in a process of its own: what it found, how long, how much memory.

    python scripts/smoke_runs.py --out results/smoke_runs             all of them; writes .json and .md
    python scripts/smoke_runs.py --only bench_api --only decode       some of them; the figures of the others stay

The smoke mode of NAME is scripts/params/smoke/NAME.yaml. A run counts only if its figures are as they must be:
`CHECKS` holds what must be true of them, and the tests ask the same. Memory is the peak of the resident memory of the
process and its children together, looked at ten times a second; pages that they share count in each.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from tita.core import TitaError, cli, run_info, write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
NAMES = sorted(p.stem for p in (ROOT/"nbs/runs").glob("*.ipynb"))


## What must be true

def found(out: Path, name: str = "metrics.json") -> dict:
    return json.loads((out/name).read_text())


def must(true, what: str):
    if not true:
        raise TitaError(f"the run ended, but its figures are wrong: {what}")


def check_demo(out: Path) -> str:
    m = found(out)
    must({"base", "reward", "base_dpo", "ratio", "bounded", "vcd"} <= set(m["systems"]), f"systems {[*m['systems']]}")
    accuracy = m["systems"]["base"]["pope_random_accuracy"]["value"]
    must(70 < accuracy <= 100, f"the base answers {accuracy} % of POPE's questions right")
    must(0 < m["shared"] <= 1 and m["pairs"]["pairs"] > 10, f"{m['pairs']} of pairs, {m['shared']} shared")
    return f"base POPE accuracy {accuracy:.1f} %, {m['pairs']['pairs']} pairs"


def check_reproduce(out: Path) -> str:
    m = found(out)
    base = m["scores"]["world_pope_adversarial"]["base"]
    must(60 < base["accuracy"]["value"] <= 100 and base["unparsed"]["value"] == 0, f"base {base['accuracy']}")
    before, after = (m["distil"][k]["kl"] for k in ("before", "after"))
    must(after < before, f"distillation: KL {before} before, {after} after")
    must(m["dpo"]["rows"] == m["pairs"]["pairs"] > 20, f"{m['pairs']['pairs']} pairs, {m['dpo']['rows']} trained on")
    return f"KL to the base {before:.2f} → {after:.2f} nats, {m['pairs']['pairs']} pairs"


def check_prepare_data(out: Path) -> str:
    sets = found(out)["sets"]
    must(set(sets) == {"seva", "consensus", "hard"}, f"sets {[*sets]}")
    must(all((out/name/"README.md").exists() for name in sets if sets[name]["report"]["pairs"]), "a set has no card")
    pairs = {name: about["report"]["pairs"] for name, about in sets.items()}
    must(pairs["seva"] > 20 and pairs["hard"] > 20, f"pairs {pairs}")
    return ", ".join(f"{n} {name} pairs" for name, n in pairs.items())


def check_train_reward(out: Path) -> str:
    m = found(out)
    ahead, auc = m["measures"]["pairs"]["value"], m["measures"]["mentions"]["auc"]
    must(m["steps"] > 0 and ahead > 50 and .3 < auc <= 1, f"{m['steps']} steps, {ahead} % ahead, area {auc}")
    return f"{m['steps']} steps, chosen ahead on {ahead:.1f} % of held-out pairs"


def check_decode(out: Path) -> str:
    m = found(out)
    must({"base", "contrast 1", "ratio, bounded 1"} <= set(m["sweep"]), f"sweep {[*m['sweep']]}")
    base = {name: figure["value"] for name, figure in m["sweep"]["base"].items()}
    must(base["pope_adversarial_accuracy"] > 70 and base["recall"] > 70 and base["fluency"] < 0, f"base {base}")
    counted = {way: sum(v[k] for k in ("better", "no difference", "worse")) for way, v in m["verdicts"].items()}
    must(counted and set(counted.values()) == {10}, f"verdicts {counted}")
    return f"recall of the base's captions {base['recall']:.1f} %, 10 verdicts for each of {len(counted)} settings"


def check_evaluate(out: Path) -> str:
    scores = found(out, "seed0/results.json")["scores"]
    for task in ("world_caption", "world_text_only"):
        must([*scores[task]] == ["base", "λ=0.5", "reward alone", "vcd", "best of 2"], f"{task}: {[*scores[task]]}")
    recall = scores["world_caption"]["base"]["recall"]["value"]
    must(70 < recall <= 100, f"the base's captions name {recall} % of what is there")
    must((out/"seed0/gallery.html").is_file(), "no gallery")
    return f"recall of the base's captions {recall:.1f} %, 5 systems on 2 tasks"


def check_bench_api(out: Path) -> str:
    m = found(out, "summary.json")
    asked = {name: (s["questions"], s["succeeded"], s["attempts"]) for name, s in m["systems"].items()}
    must(asked["large"] == asked["small"] == (15, 15, 15) and asked["shaky"][:2] == (15, 15), f"asked {asked}")
    must(asked["shaky"][2] > 15, "the shaky server failed nothing, so nothing was retried")
    right = {name: s["accuracy"]["value"] for name, s in m["systems"].items()}
    must(right["large"] > right["small"] > 40, f"accuracy {right}")
    loads = {name: [load["concurrency"] for load in sweep] for name, sweep in m["sweeps"].items()}
    must(all(seen == [1, 4] for seen in loads.values()), f"loads {loads}")
    must((out/"report.html").is_file(), "no report")
    return f"accuracy {right['large']:.0f} % and {right['small']:.0f} %, {asked['shaky'][2] - 15} requests tried again"


CHECKS = {name.removeprefix("check_"): f for name, f in list(globals().items()) if name.startswith("check_")}


## Running

def peak_memory(process: subprocess.Popen) -> int:
    "Of the process and its children until it ends, in bytes."
    most, root = 0, psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        with suppress(psutil.Error):
            for p in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error):
                    total += p.memory_info().rss
        most = max(most, total)
        time.sleep(.1)
    return most


def smoke(name: str, out: Path) -> dict:
    "Run one and check its figures. Raises `TitaError` if it fails or they are wrong."
    file = ROOT/f"scripts/params/smoke/{name}.yaml"
    notebook = ROOT/f"nbs/runs/{name}.ipynb"
    command = [sys.executable, "scripts/run_notebook.py", notebook, out/f"{name}.ipynb", "-f", file, "-p", "out", out]
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {"TITA_PROGRESS": "0", "PYTHONPATH": str(ROOT)}
    out.mkdir(parents=True, exist_ok=True)
    begun, log = time.perf_counter(), out/"log.txt"
    with log.open("w") as f:
        process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT)
        memory = peak_memory(process)
    seconds = time.perf_counter() - begun
    if process.returncode:
        raise TitaError(f"{name} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
    measured = dict(seconds=round(seconds, 1), peak_mib=round(memory/2**20), load=round(os.getloadavg()[0], 1))
    return measured | dict(found=CHECKS[name](out), run=run_info())


def page(runs: dict) -> str:
    "The table, for readers."
    one = next(iter(runs.values()))["run"]
    head = "# Run notebooks in their smoke mode\n\n`python scripts/smoke_runs.py`: each in a process of its own, with"
    head += " `scripts/params/smoke/NAME.yaml`, its figures checked. Memory: peak of the resident memory of its"
    head += f" processes together. {one['cpus']} cores, one thread a process; the load is the machine's, mean of a"
    head += f" minute. torch {one['versions']['torch']}.\n\n"
    rows = "| notebook | seconds | load | peak memory, MiB | found |\n|---|---|---|---|---|\n"
    for name, r in sorted(runs.items()):
        rows += f"| {name} | {r['seconds']:.0f} | {r['load']:.0f} | {r['peak_mib']} | {r['found']} |\n"
    return head + rows


@cli
def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", default="runs/smoke_runs", help="where the figures go, without suffix")
    p.add_argument("--only", action="append", choices=NAMES, help="this notebook (repeatable)")
    a = p.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    file = Path(f"{a.out}.json")
    runs = json.loads(file.read_text()) if a.only and file.exists() else {}
    for name in a.only or NAMES:
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = smoke(name, Path(folder))
        print(f"{name}: {runs[name]['seconds']} s, {runs[name]['peak_mib']} MiB, {runs[name]['found']}", flush=True)
        write_json(file, runs)
        write_text(f"{a.out}.md", page(runs))


if __name__ == "__main__":
    main()
