#!/usr/bin/env python3
"""Which way of answering is worth its cost? All systems of `tita-eval` on the embedded world, accuracy against cost.

    python scripts/study_systems.py                     seeds 0, 1 and 2, 300 scenes each
    python scripts/study_systems.py --seed 0 --scenes 40 --pairs 100 --out /tmp/x --runs /tmp/y           a quick look

The base, its reward alone, DPO of the base itself, the base aligned at four strengths and by the default setting, every
training-free baseline, best of n and sentence search answer the same questions; forwards and tokens are counted in all
models, for captions as for the rest. The searches draw, which costs accuracy by itself: so the base is also sampled
once, at the temperatures that they draw at. Writes results/study_systems.{md,json,png}. Rewards are trained as in
scripts/study_world.py, in the same folder (runs/study_world/); what is trained or answered is kept, so a study that was
killed goes on.
"""
import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch
from tita.core import cli, run_info, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.eval.comparisons import by_image, compare_systems, comparison_table
from tita.eval.eval_runs import Run, read_run, read_samples, run_tasks, score_run
from tita.eval.metrics import bootstrap
from tita.eval.systems import BASELINES, ContrastDecoder, best_of, decoder_system, sentence_search
from tita.eval.tasks import TASKS, world_rows
from tita.show.plots import BLUE, GREEN, GREY, INK, ORANGE, label_at, panels, styled
from tita.world.embedded import tiny_processor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"scripts"))
from study_world import FIXED, line, models_of  # how the rewards are trained

KINDS = "caption", "pope_adversarial", "color", "text"
LAMS = .25, .5, 1., 2.
HEATS = 1., .5 # temperatures of what is drawn
BASE, FIRST, MEAN = "base", "λ=1", "mean, λ=0.5"
OF_BASE = FIXED["base_dpo"].writes # DPO of the base, at the learning rate of its reward
TITLES = dict(caption="captions: CHAIR_i, lower is better", pope_adversarial="POPE adversarial: accuracy",
    color="colours: accuracy", text="words on signs: accuracy", text_only="answers of the right form, no picture")


def tasks_of(scenes: int) -> dict: # kind -> task
    "The world's own tasks on so many scenes, and its questions without a picture."
    sized = {k: replace(TASKS[f"world_{k}"], read=partial(world_rows, kind=k, scenes=scenes)) for k in KINDS}
    return sized | dict(text_only=TASKS["world_text_only"])


# Who answers

def aligned(models: dict, lam: float) -> AlignedDecoder:
    "The base guided by its reward's log-ratio, DPO's implicit reward."
    return AlignedDecoder(models["base"], models["after"], tiny_processor(), models["before"], form="ratio", lam=lam)


def averaged(models: dict) -> AlignedDecoder:
    "The base guided by the mean with its reward, as it is by default for a reward without a reference."
    return AlignedDecoder(models["base"], models["after"], tiny_processor(), form="interpolate", lam=.5)


def drawn_at(models: dict, heat: float) -> dict: # name -> what makes its decoder, and how it searches
    "What draws at a temperature: the base once, and the two searches."
    how, at = dict(temperature=heat, seed=0), f" at T={heat:g}"
    searching, sentence = partial(aligned, models, 1.), dict(search=sentence_search, n=4, end=",")
    return {f"base, sampled{at}": (partial(AlignedDecoder, models["base"], processor=tiny_processor()), how),
        f"best of 4{at}": (searching, how | dict(search=best_of, n=4)),
        f"sentence search of 4{at}": (searching, how | sentence)}


def decoders(models: dict) -> dict: # name -> what makes its decoder, and how it searches
    "Every system by its name."
    alone = {BASE: "base", "reward alone, before DPO": "before", "reward alone": "after", "DPO of the base": OF_BASE}
    made = {name: (partial(AlignedDecoder, models[m], processor=tiny_processor()), {}) for name, m in alone.items()}
    made |= {f"λ={lam:g}": (partial(aligned, models, lam), {}) for lam in LAMS}
    made[MEAN] = partial(averaged, models), {}
    made |= {name: (partial(ContrastDecoder, models["base"], tiny_processor(), name), {}) for name in BASELINES}
    for heat in HEATS:
        made |= drawn_at(models, heat)
    return made


def system_names() -> list:
    "Every system's name, in the order of the tables."
    return list(decoders(dict.fromkeys(("base", "before", "after", OF_BASE))))


def asked(seed: int, args) -> Path: # the folder with a run of each system
    "Ask every system of a seed everything. A system that was not finished begins anew, so that its cost is whole."
    out, made = args.runs/f"seed{seed}"/f"systems_{args.scenes}", None
    for name in system_names():
        folder = out/name.replace(" ", "_")
        if (folder/"results.json").is_file() and read_run(folder)["scores"]:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        made = made or decoders(models_of(seed, args, {OF_BASE}))
        build, how = made[name]
        system, tasks = decoder_system(name, build(), **how), list(tasks_of(args.scenes).values())
        start = time.process_time()
        run_tasks(Run(folder), tasks, [system], predict_only=True)
        write_json(folder/"time.json", dict(seconds=time.process_time() - start))
        score_run(folder)
        shutil.rmtree(folder/"images") # the scenes can be drawn again
    return out


# What came of it

def gathered(folders: dict) -> tuple: # system -> task -> rows of all seeds; -> task -> cost; -> seconds of each seed
    "Rows of all seeds together, those about one scene by one seed's models under one index; costs of a question."
    rows, cost, seconds = {}, {}, {}
    for seed, out in folders.items():
        for folder in sorted(out.iterdir()):
            results = read_run(folder)
            [(name, about)] = results["systems"].items()
            seconds.setdefault(name, []).append(json.loads((folder/"time.json").read_text())["seconds"])
            for task, counts in about["asked"].items():
                some = [r | dict(question_id=f"{seed}/{r['question_id']}", scene=(seed, r["scene"]), seed=seed)
                    for r in read_samples(folder, task, name)]
                rows.setdefault(name, {}).setdefault(task, []).extend(some)
                of = cost.setdefault(name, {}).setdefault(task, dict(forwards=0, tokens=0, questions=0))
                for unit, n in dict(forwards=counts["forwards"], tokens=counts["tokens"], questions=len(some)).items():
                    of[unit] += n
    order = system_names()
    return {n: rows[n] for n in order}, {n: cost[n] for n in order}, seconds


def per_question(cost: dict, unit: str) -> float:
    return cost[unit] / cost["questions"]


def value_of(rows: list, metric: str, seed: int | None = None) -> float:
    "A metric in percent, of all seeds or of one."
    some = [r for r in rows if seed in (None, r["seed"])]
    return bootstrap({"it": by_image(some, [metric])}, n=2)["systems"]["it"][metric]["value"]


def cost_table(rows: dict, cost: dict, seconds: dict, tasks: dict, compared: dict) -> str:
    "A system a line: its figures, marked where the difference from the base survives, and what a caption costs."
    heads = ["", *(TITLES[k] for k in tasks), "forwards a caption", "tokens a caption", "time"]
    lines = [line(heads), line(["---"] * len(heads))]
    for name in rows:
        cells = []
        for task in tasks.values():
            test = compared["tasks"][task.name][name]["test"]["verdict"] if name != BASE else ""
            mark = {"better": "**", "worse": "_"}.get(test, "")
            cells.append(f"{mark}{value_of(rows[name][task.name], task.main):.1f}{mark}")
        spent = cost[name]["world_caption"]
        paid = [f"{per_question(spent, u):.1f}" for u in ("forwards", "tokens")]
        lines.append(line([name, *cells, *paid, f"{sum(seconds[name]) / sum(seconds[BASE]):.1f}"]))
    return "\n".join(lines)


def against(rows: dict, about: dict, first: str, others: list) -> dict:
    "Tests of some systems against one of them."
    return compare_systems({n: rows[n] for n in (first, *others)}, about)


def searches_against_sampled(rows: dict, about: dict, tasks: dict) -> tuple: # tests by temperature, in words
    "Is a search better than one sample of what it draws from?"
    tests, told = {}, []
    for heat in HEATS:
        first, *others = drawn_at(dict.fromkeys(("base", "before", "after")), heat)
        tests[f"{heat:g}"] = against(rows, about, first, others)
        told.append(f"Temperature {heat:g}:\n\n{who_wins(tests[f'{heat:g}'], tasks, 'one sample')}")
    return tests, "\n\n".join(told)


def who_wins(compared: dict, tasks: dict, reference: str) -> str:
    "For each task, in words, whom the tests put before and behind the reference."
    told = []
    for kind, task in tasks.items():
        of = {way: [n for n, c in compared["tasks"][task.name].items() if c["test"]["verdict"] == way]
            for way in ("better", "worse")}
        told.append(f"- {TITLES[kind]}: better than {reference}: {', '.join(of['better']) or 'nobody'}; "
            f"worse: {', '.join(of['worse']) or 'nobody'}.")
    return "\n".join(told)


LOOKS = {"base, sampled": (INK, "."), BASE: (INK, "s"), "λ": (ORANGE, "o"), "mean": (ORANGE, "d"),
    "reward": (GREY, "v"), "DPO": (GREY, "D"), "best": (GREEN, "P"), "sentence": (GREEN, "X")}
TICKS = [n * 10**k for k in range(5) for n in (1, 2, 5)]


def look_of(name: str) -> tuple: # colour, marker
    return next((look for start, look in LOOKS.items() if name.startswith(start)), (BLUE, "^"))


def numbered(ax, points: list):
    "The number of every point beside it; those that lie on each other share a label."
    high, low = (f(y for _, y in points) for f in (max, min))
    near = {}
    for i, (x, y) in enumerate(points, 1):
        near.setdefault((round(12 * math.log10(x)), round(16 * (y - low) / (high - low or 1))), []).append(i)
    for members in near.values():
        at = points[members[0] - 1]
        label_at(ax, " ".join(map(str, members)), at, (3, 3), size=6, color=GREY)


@styled
def drawn(rows: dict, cost: dict, tasks: dict):
    "A panel a task: the main metric against forwards a question, on a logarithmic axis."
    fig, axes = panels(len(tasks), 3, (3.1, 2.6))
    for ax, (kind, task) in zip(axes, tasks.items()):
        at = {n: (per_question(cost[n][task.name], "forwards"), value_of(rows[n][task.name], task.main)) for n in rows}
        ax.plot(*zip(*(at[f"λ={lam:g}"] for lam in LAMS)), color=ORANGE, lw=1)
        for i, (name, point) in enumerate(at.items(), 1):
            color, marker = look_of(name)
            ax.plot(*point, marker, color=color, ms=4, label=f"{i} {name}" if ax is axes[0] else None)
        numbered(ax, list(at.values()))
        ax.set(title=TITLES[kind], xscale="log", xmargin=.1, ymargin=.1, xlabel="forwards a question")
        ax.set_xticks([t for t in TICKS if ax.get_xlim()[0] <= t <= ax.get_xlim()[1]], minor=False)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        ax.title.set_size(8)
    fig.legend(loc="outside lower center", ncols=4, fontsize=7)
    fig.alt = "Accuracy against forwards a question for every system, a panel for each task"
    return fig


RESULT = """\
# Which way of answering is worth what it costs

Made by `python scripts/study_systems.py`: {scenes} test scenes of the embedded world, answered by the models of the \
seeds {seeds}, greedily but for what is drawn at a temperature T; rewards are trained on pairs from {pairs} \
unlabelled scenes. A forward is one model reading one row once, a token is a position that goes in; both are counted \
in all models, large or small, and every picture's prompt is read by each of them. Time is processor time for all \
tasks, in multiples of the base's. **Bold** is better than the base and _italic_ worse \
after Holm's correction over the table.

{table}

![accuracy against cost](study_systems.png)

The strengths λ guide by the ratio of the reward after and before DPO; best of 4 and sentence search (a sentence ends \
at a comma, for the world's captions are one sentence) choose by the same ratio. The mean is the default for a reward \
without a reference. What a search is worth is its distance from the base sampled at its own temperature; what it \
costs to draw at all is the distance of that row from the greedy base.

## Who differs from the base

{against_base}

## Who differs from the base aligned at λ = 1

{against_ours}

## Who differs from the base sampled at the same temperature

{against_sampled}

## Seeds

{each}

## All differences from the base

{full}

Commit {commit:.12}, {cpus} cores of {system}.
"""


def seed_table(rows: dict, tasks: dict, seeds: list) -> str:
    "The main metric of every task, seed by seed."
    lines = [line(["", *(TITLES[k] for k in tasks)]), line(["---"] * (len(tasks) + 1))]
    for name in rows:
        values = [" / ".join(f"{value_of(rows[name][t.name], t.main, s):.1f}" for s in seeds) for t in tasks.values()]
        lines.append(line([name, *values]))
    return f"Seeds {', '.join(map(str, seeds))}, in this order.\n\n" + "\n".join(lines)


def study(args):
    "Ask everybody everything, and write what came of it."
    tasks = tasks_of(args.scenes)
    rows, cost, seconds = gathered({seed: asked(seed, args) for seed in args.seed})
    about = {t.name: dict(main=t.main, lower=t.lower, neutral=t.neutral) for t in tasks.values()}
    against_base = compare_systems(rows, about)
    against_ours = against(rows, about, FIRST, [n for n in rows if n not in (FIRST, BASE)])
    by_heat, against_sampled = searches_against_sampled(rows, about, tasks)
    run, made = run_info(), dict(scenes=args.scenes, seeds=args.seed, pairs=args.pairs)
    compared = dict(against_base=against_base, against_ours=against_ours, against_sampled=by_heat)
    costs = dict(cost=cost, seconds=seconds)
    write_json(args.out/"study_systems.json", made | costs | compared | dict(run=run))
    (args.out/"study_systems.png").write_bytes(drawn(rows, cost, tasks).png())
    told = dict(table=cost_table(rows, cost, seconds, tasks, against_base), each=seed_table(rows, tasks, args.seed),
        against_base=who_wins(against_base, tasks, "the base"), against_ours=who_wins(against_ours, tasks, "λ = 1"),
        against_sampled=against_sampled, full=comparison_table(against_base))
    made["seeds"], run["commit"] = ", ".join(map(str, args.seed)), run["commit"] or "unknown"
    print(write_text(args.out/"study_systems.md", RESULT.format(**made, **told, **run)))


@cli
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    p.add_argument("--scenes", type=int, default=300, help="test scenes")
    p.add_argument("--pairs", type=int, default=1000, help="unlabelled scenes for preference pairs")
    p.add_argument("--runs", type=Path, default=ROOT/"runs"/"study_world", help="what is trained and answered")
    p.add_argument("--out", type=Path, default=ROOT/"results")
    args = p.parse_args()
    args.rivals = ["base_dpo"]
    torch.set_num_threads(1)
    study(args)


if __name__ == "__main__":
    main()
