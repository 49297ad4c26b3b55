#!/usr/bin/env python3
"""Is the large model, aligned, better than its base, than the small model, and than what people use instead?

    python scripts/study_world.py choose     seeds 0, 1 and 2: trains what is compared, tunes every knob on validation
                                             scenes, writes results/choose_default.{json,md}: the settings
    python scripts/study_world.py test       the same seeds and fresh ones (--seed) with these settings on test scenes,
                                             writes results/study_world.{json,md}

Everything that is trained is kept in runs/study_world/ (--runs): killed and started again, it goes on. A seed that
data/world lacks gets models of its own first. `--systems sft base_lora` adds these rows to results that are there: base
and default are measured with them, and must come out as they stand. What is compared is explained in
nbs/studies/86_rivals.ipynb.
"""
import argparse, copy, json, os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
os.environ.setdefault("DS_ACCELERATOR", "cpu")
import torch
from tita.core import TitaError, cli, progress, run_info, set_seed, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.decode.guidance import ALIKE, OWN
from tita.eval.metrics import METRICS, bootstrap, verdict_of
from tita.models import load_vlm
from tita.studies import rivals
from tita.studies.own_reward import own_reward, shared_mass, teacher_answers
from tita.studies.rivals import Rival
from tita.studies.stages import Asker, dpo_settings, further_rows, preference_pairs, probe_rows
from tita.train.recipes import train_dpo
from tita.world.embedded import make_scenes, narrow_reward, tiny_processor, world_folder

ROOT = Path(__file__).resolve().parent.parent

# What is trained for a seed

def world_of(seed: int, runs: Path) -> Path:
    "The folder of a seed's base and reward, made if it is not there."
    for worlds in (world_folder(), runs/"worlds"):
        if (worlds/f"seed{seed}"/"reward"/"config.json").exists():
            return worlds/f"seed{seed}"
    from tita.studies.world_models import build
    build(seed, runs/"worlds")
    return runs/"worlds"/f"seed{seed}"

def trained(model, pairs, out: Path, images: Path, seed: int, **more):
    "DPO as in the demo; what is there is loaded."
    if (out/"metrics.json").exists() and "peft_config" not in more:
        return load_vlm(out, device="cpu")
    config = dpo_settings(len(pairs), seed=seed) | more
    model, _ = train_dpo(copy.deepcopy(model), tiny_processor(), pairs, images, out, resume=True, **config)
    return model.eval() if "peft_config" in more else load_vlm(out, device="cpu") # named by its folder from now on

def pairs_of(model, out: Path, images: Path, seed: int, scenes: int, kind: str = "probe", ahead: int = 0) -> list:
    "Preference pairs from the answers of a model, or of an `AlignedDecoder`, to unlabelled scenes."
    probe = probe_rows(make_scenes(scenes, seed + ahead, "train"), images, kind, seed=seed)
    return preference_pairs(model, tiny_processor(), probe, images, out, seed=seed, further=further_rows)[0]

def second_round(policy, model, out: Path, images: Path, seed: int, scenes: int):
    "DPO once more, on the answers of `policy` to scenes that the first round did not see."
    return trained(model, pairs_of(policy, out, images, seed, scenes, "second", 100), out/"after", images, seed)

def weak_reward(base, out: Path, images: Path, seed: int, scenes: int):
    "A student that hardly learned, before and after DPO on pairs of its own."
    if (out/"after"/"metrics.json").exists():
        return load_vlm(out/"before", device="cpu"), load_vlm(out/"after", device="cpu")
    probe = probe_rows(make_scenes(scenes, seed, "train"), images, seed=seed)
    said = teacher_answers(base, tiny_processor(), probe, images, out, further_rows, seed)
    student = narrow_reward(base, seed, layers=1)
    before, _ = own_reward(base, student, tiny_processor(), said, images, out/"before", steps=300)
    pairs = pairs_of(before, out, images, seed, scenes)
    return before, trained(before, pairs, out/"after", images, seed)

def lora():
    from peft import LoraConfig
    return LoraConfig(r=16, lora_alpha=32, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")

RIVALS = "sft", "base_dpo", "base_lora", "weak", "second"
RATES = dict(base_dpo=(1e-4, 3e-4, 1e-3), base_lora=(3e-4, 1e-3, 3e-3)) # learning rates of DPO of the base: its knob

def at_rate(name: str, rate: float) -> str:
    "What a base is called that was trained with DPO at a learning rate."
    return f"{name}:{rate:g}"

def models_of(seed: int, args, writers: set | None = None) -> dict: # name -> model
    "All models of a seed but the foreign reward; of DPO of the base those that write, or all rates."
    world, out = world_of(seed, args.runs), args.runs/f"seed{seed}"
    base, before = (load_vlm(world/name, device="cpu") for name in ("base", "reward"))
    set_seed(seed)
    images = out/"images"
    pairs = pairs_of(before, out, images, seed, args.pairs)
    dpo = partial(trained, pairs=pairs, images=images, seed=seed)
    models = dict(base=base, before=before, after=dpo(before, out=out/"after"))
    if "sft" in args.rivals:
        models["sft"] = dpo(before, out=out/"sft", loss_type=["sft"])
    for kind, rate in [(kind, rate) for kind in RATES if kind in args.rivals for rate in RATES[kind]]:
        name = at_rate(kind, rate)
        if writers is not None and name not in writers:
            continue
        adapter = dict(peft_config=lora()) if kind == "base_lora" else {}
        model = dpo(base, out=out/f"{kind}_{rate:g}", learning_rate=rate, **adapter)
        models[name] = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    if "second" in args.rivals:
        policy = AlignedDecoder(base, models["after"], tiny_processor(), **OWN)
        more = partial(second_round, images=images, seed=seed, scenes=args.pairs)
        models["second"] = more(policy, models["after"], out/"rounds"/"on_policy")
        if once := models.get(FIXED["base_dpo"].writes):
            models["base_dpo_second"] = more(once, once, out/"rounds"/"base_dpo")
    if "weak" in args.rivals:
        weak = weak_reward(base, out/"weak", images, seed, args.pairs // 3)
        models |= dict(zip(("weak_before", "weak_after"), weak))
    return models

def other_seed(seed: int) -> int:
    "Whose reward is foreign to this seed's base."
    return 0 if seed else 1

def with_foreign(seed: int, args, writers: set | None = None) -> dict:
    "A seed's models, the reward that was made for another base, and bases that see nothing."
    models, other = models_of(seed, args, writers), other_seed(seed)
    models["foreign_before"] = load_vlm(world_of(other, args.runs)/"reward", device="cpu")
    models["foreign_after"] = load_vlm(args.runs/f"seed{other}"/"after", device="cpu")
    pictures = [s.image for s in make_scenes(50, seed, "valid")]
    return models | dict(no_image=rivals.blinded(models["base"]), mean_image=rivals.blinded(models["base"], pictures))

# What is compared, and the knobs of each

def ratio(lam: float, **limits) -> dict:
    return dict(form="ratio", lam=lam, **limits)

def mean(lam: float) -> dict:
    return dict(form="interpolate", lam=lam)

OURS = [ratio(lam, **limits) for limits in ({}, dict(bound=1.)) for lam in (.5, 1., 2.)]
OURS += [ratio(1., bound=1., gate=f"agreement:{t}") for t in (.3, .5, .8)] + [mean(lam) for lam in (.2, .3, .5)]
DOUBTED = [ratio(1.), *OURS[-6:-3], mean(.3)] # with a weak or foreign reward
STRENGTHS = .25, .5, 1.

def aligned(settings: dict, kind: str = "") -> Rival:
    "The base, guided by a reward: its own, or `weak_`, `foreign_`."
    reference = f"{kind}before" if settings["form"] == "ratio" else ""
    return Rival("base", f"{kind}after", reference, settings)

def contrasts(view: str) -> list:
    return [Rival("base", "base", view, ratio(lam, plausibility=.1)) for lam in STRENGTHS]

CANDIDATES = dict( # what is compared -> settings to choose from
    aligned=[aligned(settings) for settings in OURS],
    **{f"{name}_tuned": [Rival(at_rate(name, rate)) for rate in rates] for name, rates in RATES.items()},
    sft=[*(Rival("base", "sft", "", mean(lam)) for lam in (.2, .3, .5)),
         *(Rival("base", "sft", "before", ratio(lam, bound=1.)) for lam in (.5, 1., 2.))],
    ensemble=[Rival("base", "before", "", mean(lam)) for lam in (.2, .3, .5)],
    vcd=[s for t in (500, 800) for s in contrasts(f"base@{t}")],
    no_image=contrasts("no_image"), mean_image=contrasts("mean_image"))
FIXED = dict(
    base=Rival("base"), before=Rival("before"), after=Rival("after"),
    base_dpo=Rival(at_rate("base_dpo", 3e-4)), base_lora=Rival(at_rate("base_lora", 1e-3)),
    ratio=Rival("base", "after", "before", dict(form="ratio", lam=1., bound=1.)))
BEST_OF = [dict(n=4, temperature=t) for t in (.5, 1.)]

def gated(settings: dict) -> dict:
    return settings | dict(gate="agreement:0.3")

def frozen_systems(chosen: dict) -> dict:
    "All systems, with the settings that were chosen."
    ours = chosen["aligned"]["settings"]
    tuned = {k: Rival(**chosen[k]) for k in CANDIDATES if k in chosen}
    other = {f"{kind}{name}": aligned(how, f"{kind}_") for kind in ("weak", "foreign")
             for name, how in (("", ours), ("_gated", gated(ours)))}
    twice = dict(second=replace(tuned["aligned"], reward="second"), base_dpo_second=Rival("base_dpo_second"))
    return FIXED | tuned | other | twice

def in_parallel(work, args, seeds=()) -> dict: # seed -> what `work` gives
    "Seeds side by side, each in a process of its own with one thread."
    seeds = seeds or args.seed
    with ProcessPoolExecutor(len(seeds), get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return dict(zip(seeds, pool.map(partial(work, args=args), seeds)))

def make_models(seed: int, args, writers: set | None = None):
    "Train what is not there; nothing to hand to another process."
    models_of(seed, args, writers)

def make_all(args, writers: set | None = None):
    "What is compared on all seeds, before the first is measured: each needs the reward of another, too."
    if not args.systems:
        seeds = sorted({*args.seed, *(other_seed(seed) for seed in args.seed)})
        in_parallel(partial(make_models, writers=writers), args, seeds)

# Validation

def key(s: Rival) -> str:
    return json.dumps(vars(s))

def kept(seed: int, args, what: str) -> Path:
    "Where measurements of a seed are kept."
    name = Path(what)
    return args.runs/f"seed{seed}"/("_".join([name.stem, *args.systems]) + name.suffix)

def alike(seed: int, models: dict, args) -> dict: # whose reward -> shared probability
    "How far each reward, before DPO, agrees with the base on validation images: what the gate is set by."
    out, unseen = args.runs/f"seed{seed}", make_scenes(60, 2000 + seed, "valid")
    ask = Asker(models["base"], tiny_processor(), out/"images", out, seed)
    said = ask(probe_rows(unseen, out/"images", "agreement", seed=seed), "agreement", "clean", max_new_tokens=64)
    kinds = [kind for kind in ("before", "weak_before", "foreign_before") if kind in models]
    return {k: shared_mass(models["base"], models[k], tiny_processor(), said, out/"images") for k in kinds}

def validated(seed: int, args) -> tuple: # setting -> counts, setting -> cost, shared probabilities
    "Everything that can be chosen, on validation scenes of one seed; what is there is not measured again."
    path = kept(seed, args, f"valid_{args.valid}.pt")
    if path.exists():
        return torch.load(path, weights_only=False)
    models = models_of(seed, args) if args.systems else with_foreign(seed, args)
    bench = rivals.Bench(models, make_scenes(args.valid, 2000 + seed, "valid"), args.valid)
    tried = [*FIXED.values(), *(s for of in CANDIDATES.values() for s in of)]
    tried += [aligned(how, kind) for kind in ("weak_", "foreign_") for how in DOUBTED]
    if args.systems:
        tried = [FIXED["base"], *(s for name in args.systems for s in CANDIDATES.get(name, ()))]
    tried, found, cost = [s for s in tried if s.known_to(models)], {}, {}
    for s in progress(tried, desc=f"seed {seed}", unit="setting"):
        found[key(s)], cost[key(s)] = rivals.measure(bench, s)
    for how in BEST_OF if not args.systems else ():
        found[json.dumps(how)], cost[json.dumps(how)] = rivals.best_answer_of(bench, **how)
    measured = found, cost, {} if args.systems else alike(seed, models, args)
    torch.save(measured, path)
    return measured

def judged(found: dict) -> dict: # setting -> gain (mean over seeds), harms and gains after Holm, cells by seed
    "What each setting brings over the base."
    base = key(FIXED["base"])
    by_seed = {seed: bootstrap(counts, base, n=1000)["systems"] for seed, counts in found.items()}
    rows = {}
    for k in {k: 0 for systems in by_seed.values() for k in systems}:
        cells = {seed: systems[k] for seed, systems in by_seed.items() if k in systems}
        gain = sum(map(rivals.gain_of, cells.values())) / len(cells)
        rows[k] = dict(gain=gain, cells=cells) | rivals.harms_and_gains(cells)
    return rows

CLOSE = .15 # points of mean gain within which the cheaper setting is taken

def best(keys: list, rows: dict, cost: dict) -> str:
    "Fewest harms first; of those whose gain is close to the best the cheapest."
    least = min(len(rows[k]["worse"]) for k in keys)
    keys = [k for k in keys if len(rows[k]["worse"]) == least]
    top = max(rows[k]["gain"] for k in keys)
    close = [k for k in keys if rows[k]["gain"] >= top - CLOSE]
    return min(close, key=lambda k: (cost[k]["forwards"], -rows[k]["gain"]))

def label(how: dict) -> str:
    "Settings for a reader."
    names = dict(form="", lam="λ ", bound="bound ", gate="gate ", n="n ", temperature="temperature ")
    return ", ".join(f"{said}{how[name]}" for name, said in names.items() if name in how)

def line(cells) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"

def table(head: list, rows: list) -> str:
    return "\n".join([line(head), "|---" * len(head) + "|", *map(line, rows)])

SHOWN = dict(chair_i="CHAIR_i", pope_adversarial_accuracy="POPE adversarial", pope_random_accuracy="POPE random",
             recall="recall", text_accuracy="text", color_accuracy="colour", count_accuracy="count")

def change(row: dict, metric: str) -> str:
    deltas = [c[metric]["delta"] for c in row["cells"].values()]
    return f"{sum(deltas) / len(deltas):+.1f}"

def chosen_table(rows: list, chosen: list) -> str:
    "Every setting that was tried."
    lines = []
    for row in sorted(rows, key=lambda row: (row["setting"].get("reward", ""), -row["gain"])):
        s = row["setting"]
        who = " + ".join(x for x in (s.get("writes", "best of the base's"), s.get("reward")) if x)
        who += f" − {s['reference']}" if s.get("reference") else ""
        mark = "**" if s in chosen else ""
        changes = [f"{row['gain']:+.2f}", *(change(row, m) for m in SHOWN)]
        counts = len(row["better"]), len(row["worse"]), row["cost"]["forwards"]
        lines.append([f"{mark}{who}{mark}", label(s.get("settings", s)), *changes, *counts])
    return table(["system", "settings", "gain", *SHOWN.values(), "better", "worse", "forwards a token"], lines)

CHOICE = """\
# The settings, chosen on validation scenes

Made by `python scripts/study_world.py choose` on {valid} validation scenes of each of the seeds {seeds}; pairs come \
from {pairs} unlabelled scenes. Points of change from the large model, means over seeds. Gain: the mean of POPE, \
precision of captions (CHAIR_i) and the other accuracies. Better and worse: how many of all metrics of all seeds \
differ from the large model after Holm's correction over the setting's whole family. Chosen (bold) is, of the settings \
with the fewest harms, the cheapest one whose gain is within {close} points of the best.

{table}

How much probability each reward, before DPO, shares with the base on validation images (from {open} on \
`guidance.guidance_for` takes it for the base's own): {masses}.

Commit {commit:.12}, {cpus} cores of {system}.{added}
"""

def same_as_before(now: dict, before: dict, what: str, within: float = 0.):
    "Rows go to results only where what stands there comes out again, within so many points: metric -> cell."
    for m, cell in before.items():
        if abs(now[m]["value"] - cell["value"]) > within:
            raise TitaError(f"{what}: {m} is {now[m]['value']:.3f}, the results have {cell['value']:.3f}; models or "
                            f"scenes are others than theirs, so measure all rows anew, without --systems")

def results_before(args, name: str, **same) -> dict:
    "Results that rows are added to; they must have been made in the same way."
    path = args.out/name
    if not path.exists():
        raise TitaError(f"{path}: no results to add {', '.join(args.systems)} to; leave --systems out")
    before = json.loads(path.read_text())
    for k, value in same.items():
        if before[k] != value:
            raise TitaError(f"{path} was made with --{k.replace('seeds', 'seed')} {before[k]}, not {value}")
    return before

def settings_added(now: dict, before: dict) -> dict: # as choose_default.json
    "The settings that were tried for further systems, beside those of before."
    base = vars(FIXED["base"])
    mine, theirs = (next(row for row in told["settings"] if row["setting"] == base) for told in (now, before))
    for seed, cells in theirs["cells"].items():
        same_as_before(mine["cells"][int(seed)], cells, f"validation, seed {seed}")
    new = [row["setting"] for row in now["settings"]]
    rows = [row for row in before["settings"] if row["setting"] not in new or row is theirs]
    rows += [row for row in now["settings"] if row is not mine]
    return before | dict(chosen=before["chosen"] | now["chosen"], settings=rows,
                         added=before.get("added", {}) | {name: now["run"]["commit"] for name in now["chosen"]})

def told_added(added: dict) -> str:
    "Which rows are of another commit."
    commits = {}
    for name, commit in added.items():
        commits.setdefault(f"{commit or 'unknown':.12}", []).append(TITLES[name])
    return "".join(f" Rows of commit {commit}: {', '.join(titles)}." for commit, titles in commits.items())

def choose(args):
    "Settings for everything, and a table of what was tried."
    if args.systems:
        same = dict(seeds=args.seed, pairs=args.pairs, valid=args.valid)
        before = results_before(args, "choose_default.json", **same)
    make_all(args)
    measured = in_parallel(validated, args)
    rows = judged({seed: found for seed, (found, *_) in measured.items()})
    cost = {k: c for _, costs, _ in measured.values() for k, c in costs.items()}
    tried = {name: [k for s in of if (k := key(s)) in rows] for name, of in CANDIDATES.items()}
    chosen = {name: best(keys, rows, cost) for name, keys in tried.items() if keys}
    if not args.systems:
        chosen["best_of"] = best([json.dumps(how) for how in BEST_OF], rows, cost)
    told = [dict(setting=json.loads(k), cost=cost[k], **v) for k, v in rows.items()]
    made = dict(chosen={name: json.loads(k) for name, k in chosen.items()}, valid=args.valid, seeds=args.seed,
                pairs=args.pairs, shared={seed: shared for seed, (*_, shared) in measured.items()}, settings=told,
                run=run_info())
    if args.systems:
        made = settings_added(made, before)
    write_json(args.out/"choose_default.json", made)
    shares = [f"seed {s} " + ", ".join(f"{k} {v:.2f}" for k, v in of.items()) for s, of in made["shared"].items()]
    print(write_text(args.out/"choose_default.md", CHOICE.format(
        valid=args.valid, seeds=", ".join(map(str, args.seed)), pairs=args.pairs, close=CLOSE,
        open=ALIKE, masses="; ".join(shares), added=told_added(made.get("added", {})),
        table=chosen_table(made["settings"], list(made["chosen"].values())),
        **made["run"] | dict(commit=made["run"]["commit"] or "unknown"))))

# Test

def tested(seed: int, args, chosen: dict) -> dict: # systems -> cells; cost
    "All systems on the test scenes of one seed; what is there is not measured again."
    path = kept(seed, args, f"test_{args.scenes}.json")
    if path.exists():
        return json.loads(path.read_text())
    systems = frozen_systems(chosen)
    if args.systems:
        systems = {name: systems[name] for name in ("base", "aligned", *args.systems)}
    writers = {s.writes for s in systems.values()} | {FIXED["base_dpo"].writes}
    models = models_of(seed, args, writers) if args.systems else with_foreign(seed, args, writers)
    bench = rivals.Bench(models, make_scenes(args.scenes, seed, "test"), args.scenes)
    found, cost, systems = {}, {}, {name: s for name, s in systems.items() if s.known_to(models)}
    for name, s in progress(systems.items(), desc=f"seed {seed}", unit="system"):
        found[name], cost[name] = rivals.measure(bench, s)
    if not args.systems:
        found["best_of"], cost["best_of"] = rivals.best_answer_of(bench, **chosen["best_of"])
    told = dict(systems=bootstrap(found, "base")["systems"], against={
        other: bootstrap({k: found[k] for k in ("aligned", other)}, other)["systems"]["aligned"]
        for other in found if other not in ("base", "aligned")}, cost=cost, commit=run_info()["commit"])
    write_json(path, told)
    return told

TITLES = dict(
    base="the large model alone", before="the small model before DPO", after="the small model after DPO",
    aligned="**large model, aligned (the default)**",
    second="the same, its reward after a second round, on pairs of the aligned model",
    ratio="large model, aligned by the ratio, λ 1, bound 1",
    base_dpo="DPO of the large model, all weights, the reward's learning rate",
    base_dpo_second="the same after a second round, on pairs of its own",
    base_dpo_tuned="DPO of the large model, all weights, its rate chosen",
    base_lora="DPO of the large model, LoRA, rate 1e-3",
    base_lora_tuned="DPO of the large model, LoRA, its rate chosen",
    sft="guided by SFT on the chosen answers",
    ensemble="mean with the small model before DPO", vcd="VCD",
    no_image="contrast without an image (M3ID's, fixed λ)", mean_image="contrast with a mean image (image-CFG)",
    best_of="best of 4 by the reward", weak="guided by a weak reward", weak_gated="the same, gated",
    foreign="guided by a reward of another base", foreign_gated="the same, gated")

def summed_up(found: dict) -> dict:
    "system -> metric -> mean over seeds of value and change, with the interval over seeds; harms and gains after Holm."
    out = {}
    for name in TITLES:
        cells = {seed: told["systems"][name] for seed, told in found.items() if name in told["systems"]}
        if not cells:
            continue
        told = {}
        for m in next(iter(cells.values())):
            value = sum(c[m]["value"] for c in cells.values()) / len(cells)
            told[m] = dict(value=value, change=rivals.over_seeds([c[m]["delta"] for c in cells.values()]))
        out[name] = dict(metrics=told, seeds=len(cells)) | rivals.harms_and_gains(cells)
    return out

def first_table(summed: dict, found: dict) -> str:
    "What a reader takes in at a glance."
    shown = "chair_i", "pope_adversarial_accuracy", "color_accuracy", "text_accuracy"
    rows = []
    for name, row in summed.items():
        costs = [told["cost"] for told in found.values() if name in told["cost"]]
        pace = rivals.pace_beside_base(name, found.values())
        cells = [rivals.mean_cell(row, m, name == "base") for m in shown]
        title = TITLES[name] + f" ({row['seeds']} of {len(found)} seeds)" * (row["seeds"] < len(found))
        counts = len(row["better"]), len(row["worse"]), costs[0][name]["forwards"]
        rows.append([title, *cells, *counts, f"{pace:.2f}"])
    return table(["", "CHAIR_i ↓", "POPE adv. ↑", "colour ↑", "text ↑", "better", "worse", "forwards", "speed"], rows)

def seed_table(seed, told: dict) -> str:
    "Every system and metric of a seed."
    metrics = [m for m in METRICS if m in told["systems"]["base"]]
    def one(m, c):
        mark = {"better": "**", "worse": "_"}.get(verdict_of(m, c), "")
        return f"{c['value']:.1f} {mark}[{c['delta_low']:+.1f}, {c['delta_high']:+.1f}]{mark}"
    rows = [[TITLES[name], *(one(m, cells[m]) for m in metrics)] for name, cells in told["systems"].items()]
    measured = f"Measured at commit {told['commit'] or 'unknown':.12}.{told_added(told.get('added', {}))}"
    return f"## Seed {seed}\n\n{measured}\n\n" + table(["", *(METRICS[m].title for m in metrics)], rows)

def against_table(found: dict) -> str:
    "The default against each rival, on all seeds together."
    metrics = [m for m in SHOWN if m != "pope_random_accuracy"]
    rows = []
    for name in {name: 0 for told in found.values() for name in told["against"]}:
        cells = {seed: told["against"][name] for seed, told in found.items() if name in told["against"]}
        of = rivals.harms_and_gains(cells)
        changes = [f"{sum(c[m]['delta'] for c in cells.values()) / len(cells):+.1f}" for m in metrics]
        rows.append([TITLES[name], *changes, len(of["better"]), len(of["worse"])])
    return table(["the default against", *(SHOWN[m] for m in metrics), "better", "worse"], rows)

RESULT = """\
# The large model, aligned, and what it is compared with

Made by `python scripts/study_world.py test` with the settings of [choose_default](choose_default.md), which were
committed before: {scenes} test scenes of each of the seeds {seeds}{fresh}. Means over seeds, in brackets the change
from the large model: **bold** where it is better on at least one seed and worse on none, _italic_ where it is worse on
one, after Holm's correction over all metrics and seeds of the system ("better" and "worse" count these). Forwards:
models or views that run for a token. Speed: tokens of captions a second of processor time, in batches, against the
large model alone.

{first}

## The default against each rival

Differences in points, means over seeds; "better" and "worse" as above.

{against}

## Over seeds

Mean change of the default from the large model, with Student's 95% interval over {n} seeds: where the mean of many
seeds can be expected.

{over}

{each}

Brackets: paired 95% bootstrap interval of the difference from the large model. Commit {commit:.12}, {cpus} cores of
{system}.
"""

def interval(mean, low, high) -> list:
    return [f"{mean:+.1f}", "-" if low is None else f"[{low:+.1f}, {high:+.1f}]"]

def tested_before(chosen: dict, args) -> dict: # seed -> what `tested` gave
    "Other seeds that stand in the results already, tested with the same settings on as many scenes and pairs."
    path = args.out/"study_world.json"
    if not path.exists():
        return {}
    before = json.loads(path.read_text())
    as_frozen = all(chosen.get(name) == how for name, how in before["chosen"].items())
    if not as_frozen or (before["scenes"], before["pairs"]) != (args.scenes, args.pairs):
        return {}
    commit = before["run"]["commit"]
    return {int(seed): dict(commit=commit) | told for seed, told in before["seeds"].items()
            if int(seed) not in args.seed}

SAME = .1 # points: a reward that is trained again on another day says one caption of 1,500 otherwise

def rows_added(now: dict, before: dict, seed: int) -> dict: # as of `tested`
    "Further systems of a seed; their speed as if the base had been as fast as it was before."
    for name, within in dict(base=0., aligned=SAME).items():
        same_as_before(now["systems"][name], before["systems"][name], f"test, seed {seed}, {name}", within)
    new = [name for name in now["systems"] if name not in ("base", "aligned")]
    pace = before["cost"]["base"]["tokens_per_second"] / now["cost"]["base"]["tokens_per_second"]
    cost = {k: now["cost"][k] | dict(tokens_per_second=round(pace * now["cost"][k]["tokens_per_second"])) for k in new}
    systems = before["systems"] | {k: now["systems"][k] for k in new}
    return before | dict(
        systems={k: systems[k] for k in TITLES if k in systems}, cost=before["cost"] | cost,
        against=before["against"] | {k: now["against"][k] for k in new},
        added=before.get("added", {}) | {k: now["commit"] for k in new})

def frozen_settings(args) -> dict: # as choose_default.json
    "What `choose` chose."
    path = args.out/"choose_default.json"
    if not path.exists():
        raise TitaError(f"{path}: no settings to test; `python scripts/study_world.py choose` makes them")
    return json.loads(path.read_text())

def test(args):
    "The frozen settings on test scenes; a seed that was tested with them before keeps its row."
    frozen = frozen_settings(args)
    if args.systems:
        before = results_before(args, "study_world.json", scenes=args.scenes, pairs=args.pairs)["seeds"]
    make_all(args, {s.writes for s in frozen_systems(frozen["chosen"]).values()})
    found = in_parallel(partial(tested, chosen=frozen["chosen"]), args)
    if args.systems:
        found = {seed: rows_added(told, before[str(seed)], seed) for seed, told in found.items()}
    found = dict(sorted((tested_before(frozen["chosen"], args) | found).items()))
    fresh = [seed for seed in found if seed not in frozen["seeds"]]
    summed, run = summed_up(found), run_info()
    made = dict(chosen=frozen["chosen"], scenes=args.scenes, pairs=args.pairs, fresh=fresh)
    write_json(args.out/"study_world.json", made | dict(summed=summed, seeds=found, run=run))
    changes = {METRICS[m].title: c["change"] for m, c in summed["aligned"]["metrics"].items()}
    over = table(["", "mean", "interval over seeds"], [[name, *interval(*change)] for name, change in changes.items()])
    told = f" (nothing of {', '.join(map(str, fresh))} was measured when settings were chosen)" if fresh else ""
    print(write_text(args.out/"study_world.md", RESULT.format(
        scenes=args.scenes, seeds=", ".join(map(str, found)), fresh=told, n=len(found),
        first=first_table(summed, found), against=against_table(found), over=over,
        each="\n\n".join(seed_table(s, t) for s, t in found.items()),
        **run | dict(commit=run["commit"] or "unknown"))))

@cli
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("what", choices=["train", "choose", "test"])
    p.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    p.add_argument("--pairs", type=int, default=1000, help="unlabelled scenes for preference pairs")
    p.add_argument("--rivals", nargs="*", default=RIVALS, help="what is trained beside the reward")
    p.add_argument("--valid", type=int, default=400, help="validation scenes of a seed")
    p.add_argument("--scenes", type=int, default=1500, help="test scenes of a seed")
    p.add_argument("--runs", type=Path, default=ROOT/"runs"/"study_world")
    p.add_argument("--out", type=Path, default=ROOT/"results")
    p.add_argument("--systems", nargs="*", default=[], choices=TITLES, metavar="NAME",
                   help="only these, beside the results that are there: " + ", ".join(TITLES))
    args = p.parse_args()
    if args.systems:
        args.rivals = [kind for kind in RIVALS if any(kind in name for name in args.systems)]
    torch.set_num_threads(1)
    if args.what == "train":
        for seed in args.seed:
            models_of(seed, args)
    elif args.what == "choose":
        choose(args)
    else:
        test(args)

if __name__ == "__main__":
    main()
