#!/usr/bin/env python3
"""Which guidance is safe without being chosen for a base? Looked for on validation scenes only, with all bases of the
embedded world.

    python scripts/choose_default.py              trains each seed's reward as the demo does, in runs/choose_default/
                                                  (--runs runs/study_world takes the study's); writes
                                                  results/choose_default.{json,md}
    python scripts/choose_default.py --seed 0 --scenes 300

Every setting guides the base and the stronger base of each seed. Of those settings that harm least (a paired 95%
interval on the wrong side of zero counts as harm), the one that helps most is chosen. Killed and started again, it
goes on.
"""
import argparse, copy, json, os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
import torch
from tita.studies import stages as pipeline
from tita.core import cli, progress, run_info, set_seed, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.decode.guidance import Guidance, SAFE
from tita.eval.metrics import METRICS, bootstrap, chair, object_finder, per_scene, verdict_of
from tita.models import load_vlm
from tita.train.recipes import train_dpo
from tita.train.trees import tree_logits
from tita.world.embedded import ASK, OBJECTS, load_models, load_strong, make_scenes
from tita.studies.world_models import Tokens, pixels

ROOT = Path(__file__).resolve().parent.parent
GATES = None, "entropy:0.7", "agreement:0.2", "agreement:0.3", "agreement:0.5"
LIMITS = [dict(bound=bound, gate=gate) for gate in GATES for bound in (.5, 1.)]
GRID = [dict(lam=1.)] + [dict(lam=lam, **limits) for limits in LIMITS for lam in (.5, 1., 2.)]
SHOWN = dict(chair_i="CHAIR_i", pope_adversarial_accuracy="POPE adv.", text_accuracy="text", count_accuracy="count")

def trained(seed: int, out: Path):
    "A seed's base, reward before and after DPO (made as in the demo), processor."
    base, before, processor = load_models(seed)
    set_seed(seed)
    images = out/"images"
    if (out/"reward"/"metrics.json").exists():
        return base, before, load_vlm(out/"reward", device="cpu"), processor
    probe = pipeline.probe_rows(make_scenes(1500, seed, "train"), images, seed=seed)
    further = pipeline.further_rows
    pairs, _ = pipeline.preference_pairs(before, processor, probe, images, out, seed=seed, further=further)
    config = pipeline.dpo_settings(len(pairs), seed=seed)
    after, _ = train_dpo(copy.deepcopy(before), processor, pairs, images, out/"reward", resume=True, **config)
    return base, before, after.eval(), processor

@torch.no_grad()
def short_logits(models, scenes, batch: int = 100) -> tuple:
    "Logits of all models on the true answers, labels, (kind, scene) of each row: it is right where every token is."
    x, tokens = pixels([s.image for s in scenes]), Tokens()
    parts, names = [], []
    for i in range(0, len(scenes), batch):
        asked = [[q for q in s.questions if q.kind != "caption"] for s in scenes[i:i + batch]]
        trees = tokens.trees([[(q.text, q.answer) for q in qs] for qs in asked])
        parts.append([tree_logits(m, *trees, pixel_values=x[i:i + batch]) for m in models])
        names += [(q.kind, i + j) for j, qs in enumerate(asked) for q in qs]
    wide = max(part[0][1].shape[1] for part in parts)
    def joined(tensors, fill): # (rows, T, ...) each -> (all rows, wide, ...)
        pad = torch.nn.functional.pad
        return torch.cat([pad(t, (0, 0) * (t.ndim - 2) + (0, wide - t.shape[1]), value=fill) for t in tensors])
    logits = [joined([part[k][0] for part in parts], 0.) for k in range(len(models))]
    return logits, joined([part[0][1] for part in parts], -100), names

def scores_of(logits, labels, names, n: int) -> dict:
    "Accuracies as `metrics.score` counts them."
    ok = ((logits.argmax(-1) == labels) | (labels < 0)).all(-1).tolist()
    found = {}
    for right, (kind, scene) in zip(ok, names):
        metric = "text_accuracy" if kind in ("text", "number") else f"{kind}_accuracy"
        found.setdefault(metric, []).append((right, scene))
    return {k: per_scene([r for r, _ in v], [1.] * len(v), [s for _, s in v], n) for k, v in found.items()}

def measure(bases: dict, before, after, processor, scenes, captions: int, desc: str) -> dict:
    "base name -> setting -> metric -> (numerators, denominators)."
    found, n, finder = {}, len(scenes), object_finder(OBJECTS)
    pictures = [s.image for s in scenes[:captions]]
    truths = [s.objects for s in scenes[:captions]]
    for name, base in bases.items():
        models, labels, names = short_logits([base, after, before], scenes)
        found[name] = {}
        for how in progress([None, *GRID], desc=f"{desc}, {name}", unit="setting"):
            logits, decoder = models[0], AlignedDecoder(base, processor=processor)
            if how is not None:
                logits = Guidance(form="ratio", **how)(models[0], [models[1]], [models[2]])[0]
                decoder = AlignedDecoder(base, after, processor, ref=before, form="ratio", **how)
            said = [o.text for o in decoder.generate(pictures, [ASK["caption"]] * captions, max_new_tokens=64)]
            short, told = scores_of(logits, labels, names, n), chair(said, truths, finder, list(range(captions)), n)
            found[name][json.dumps(how)] = short | told
    return found

def one_seed(seed: int, runs: Path, scenes: int, captions: int, only_train: bool) -> dict:
    "A seed's cells, in a process of its own with one thread."
    torch.set_num_threads(1)
    base, *reward = trained(seed, runs/f"seed{seed}")
    if only_train:
        return {}
    bases, unseen = dict(base=base, strong=load_strong(seed)), make_scenes(scenes, 2000 + seed, "valid")
    cells = measure(bases, *reward, unseen, captions, f"seed {seed}")
    return {f"seed {seed} {name}": v for name, v in cells.items()}

def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)

def gain_of(changes: dict) -> float: # metric -> cell of a bootstrap
    "Mean of POPE, precision of captions and the other accuracies, in points to the good."
    gains = {m: c["delta"] * METRICS[m].better for m, c in changes.items()}
    pope = mean(v for m, v in gains.items() if m.startswith("pope"))
    rest = mean(gains[m] for m in ("text_accuracy", "color_accuracy", "count_accuracy") if m in gains)
    return (pope + rest + gains["chair_i"]) / 3

def judge(found: dict) -> dict:
    "setting -> harms, and mean change of every metric for each base; from cell -> setting -> counts."
    rows = {json.dumps(h): dict(setting=h, harms=[], change={}, gains={}) for h in GRID}
    for cell, settings in found.items():
        systems = bootstrap(settings, "null", n=1000)["systems"]
        for k, row in rows.items():
            row["change"][cell] = {m: c["delta"] for m, c in systems[k].items()}
            worse = [(m, c["delta"]) for m, c in systems[k].items() if verdict_of(m, c) == "worse"]
            row["harms"] += [f"{cell} {m} {delta:+.1f}" for m, delta in worse]
            row["gains"][cell] = gain_of(systems[k])
    for row in rows.values():
        row["gain"] = mean(v for cell, v in row["gains"].items() if cell.endswith(" base"))
    return rows

def label(how: dict) -> str:
    bound = f"bound {how['bound']:g}" if how.get("bound") else "no bound"
    gate = [f"gate {how['gate']}"] if how.get("gate") else []
    return ", ".join([f"λ {how['lam']:g}", bound, *gate])

TEXT = """\
# Which guidance is safe

Made by `python scripts/choose_default.py` on validation scenes: {scenes} of each of the seeds {seeds} ({captions} of \
them with captions), form `ratio`, base and stronger base.
Means over seeds of the change in points. Gain: mean over the bases of POPE, precision of captions (CHAIR_i) and the \
other accuracies. Harms: how many of all metrics of all bases are worse with a paired 95% interval clear of zero.

{table}

Chosen: **{chosen}**. It harms{harms}.
"""

def line(cells) -> str:
    return "| " + " | ".join(cells) + " |"

def table(rows: dict, chosen: dict, scenes: int, captions: int, seeds: list) -> str:
    "Markdown for people."
    head = ["setting", "gain", *(f"{kind}: {m}" for kind in ("base", "stronger") for m in SHOWN.values()), "harms"]
    lines = [line(head), "|" + "---|" * len(head)]
    for row in sorted(rows.values(), key=lambda r: (len(r["harms"]), -r["gain"])):
        name = f"**{label(row['setting'])}**" if row is chosen else label(row["setting"])
        def change(kind, m):
            return mean(v[m] for cell, v in row["change"].items() if cell.endswith(kind))
        cells = [change(kind, m) for kind in (" base", " strong") for m in SHOWN]
        lines.append(line([name, f"{row['gain']:+.2f}", *(f"{c:+.1f}" for c in cells), str(len(row["harms"]))]))
    harms = ": " + "; ".join(chosen["harms"]) if chosen["harms"] else " nothing"
    return TEXT.format(
        scenes=scenes, captions=captions, seeds=", ".join(map(str, seeds)), table="\n".join(lines),
        chosen=label(chosen["setting"]), harms=harms)

@cli
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, nargs="*", default=[0, 1, 2])
    p.add_argument("--scenes", type=int, default=1500)
    p.add_argument("--captions", type=int, default=600)
    p.add_argument("--runs", type=Path, default=ROOT/"runs"/"choose_default")
    p.add_argument("--out", type=Path, default=ROOT/"results")
    p.add_argument("--only-train", action="store_true", help="make the rewards and stop")
    args = p.parse_args()
    args.captions, found = min(args.captions, args.scenes), {}
    work = partial(one_seed, runs=args.runs, scenes=args.scenes, captions=args.captions, only_train=args.only_train)
    with ProcessPoolExecutor(min(len(args.seed), os.cpu_count()), get_context("spawn")) as pool:
        for cells in pool.map(work, args.seed):
            found |= cells
    if args.only_train:
        return
    rows = judge(found)
    chosen = min(rows.values(), key=lambda r: (len(r["harms"]), -r["gain"]))
    made = dict(scenes=args.scenes, captions=args.captions, seeds=args.seed)
    write_json(args.out/"choose_default.json", dict(
        chosen=chosen["setting"], **made, settings=list(rows.values()), run=run_info()))
    print(write_text(args.out/"choose_default.md", table(rows, chosen, args.scenes, args.captions, args.seed)))
    if chosen["setting"] != {k: v for k, v in SAFE.items() if k != "form"}:
        print(f"note: `tita.decode.guidance.SAFE` is {SAFE}, chosen was {chosen['setting']}")

if __name__ == "__main__":
    main()
