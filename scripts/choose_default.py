#!/usr/bin/env python3
"""Which guidance is safe without being chosen for a base? Looked for on validation scenes only, with all bases of the embedded world.

    python scripts/choose_default.py              trains each seed's reward as the demo does, in runs/choose_default/ (--runs runs/study_world takes the study's); writes results/choose_default.{json,md}
    python scripts/choose_default.py --seed 0 --scenes 300

Every setting guides the base and the stronger base of each seed. Of those settings that harm least (a paired 95% interval on the wrong side of
zero counts as harm), the one that helps most is chosen. Killed and started again, it goes on.
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
GRID = [dict(lam=1.)] + [dict(lam=lam, bound=bound, gate=gate) for gate in (None, "entropy:0.7", "agreement:0.2", "agreement:0.3", "agreement:0.5") for bound in (.5, 1.) for lam in (.5, 1., 2.)]

def trained(seed: int, out: Path):
    "A seed's base, reward before and after DPO (made as in the demo), processor."
    base, before, processor = load_models(seed)
    set_seed(seed)
    images = out/"images"
    if (out/"reward"/"metrics.json").exists():
        return base, before, load_vlm(out/"reward", device="cpu"), processor
    probe = pipeline.probe_rows(make_scenes(1500, seed, "train"), images, seed=seed)
    pairs, _ = pipeline.preference_pairs(before, processor, probe, images, out, seed=seed, further=pipeline.further_rows)
    after, _ = train_dpo(copy.deepcopy(before), processor, pairs, images, out/"reward", resume=True, **pipeline.dpo_settings(len(pairs), seed=seed))
    return base, before, after.eval(), processor

@torch.no_grad()
def short_logits(models, scenes, batch: int = 100) -> tuple:
    "Logits of all models on the true answers, labels, and (kind, scene) of each row: greedy decoding is right where every token is."
    x, tokens, parts, names = pixels([s.image for s in scenes]), Tokens(), [], []
    for i in range(0, len(scenes), batch):
        asked = [[q for q in s.questions if q.kind != "caption"] for s in scenes[i:i + batch]]
        trees = tokens.trees([[(q.text, q.answer) for q in qs] for qs in asked])
        parts.append([tree_logits(m, *trees, pixel_values=x[i:i + batch]) for m in models])
        names += [(q.kind, i + j) for j, qs in enumerate(asked) for q in qs]
    wide = max(p[0][1].shape[1] for p in parts)
    pad = lambda t, v: torch.nn.functional.pad(t, (0, 0) * (t.ndim - 2) + (0, wide - t.shape[1]), value=v)
    return [torch.cat([pad(p[k][0], 0.) for p in parts]) for k in range(len(models))], torch.cat([pad(p[0][1], -100) for p in parts]), names

def scores_of(logits, labels, names, n: int) -> dict:
    "Accuracies as `metrics.score` counts them."
    ok = ((logits.argmax(-1) == labels) | (labels < 0)).all(-1).tolist()
    found = {}
    for right, (kind, scene) in zip(ok, names):
        found.setdefault("text_accuracy" if kind in ("text", "number") else f"{kind}_accuracy", []).append((right, scene))
    return {k: per_scene([r for r, _ in v], [1.] * len(v), [s for _, s in v], n) for k, v in found.items()}

def measure(bases: dict, before, after, processor, scenes, captions: int, desc: str) -> dict:
    "base name -> setting -> metric -> (numerators, denominators)."
    found, n, finder = {}, len(scenes), object_finder(OBJECTS)
    pictures = [s.image for s in scenes[:captions]]
    truths = [s.objects for s in scenes[:captions]]
    for name, base in bases.items():
        (b, r, f), labels, names = short_logits([base, after, before], scenes)
        found[name] = {}
        for how in progress([None, *GRID], desc=f"{desc}, {name}", unit="setting"):
            logits = b if how is None else Guidance(form="ratio", **how)(b, [r], [f])[0]
            dec = AlignedDecoder(base, processor=processor) if how is None else AlignedDecoder(base, after, processor, ref=before, form="ratio", **how)
            said = [o.text for o in dec.generate(pictures, [ASK["caption"]] * captions, max_new_tokens=64)]
            found[name][json.dumps(how)] = scores_of(logits, labels, names, n) | chair(said, truths, finder, list(range(captions)), n)
    return found

def one_seed(seed: int, runs: Path, scenes: int, captions: int, only_train: bool) -> dict:
    "A seed's cells, in a process of its own with one thread."
    torch.set_num_threads(1)
    base, before, after, processor = trained(seed, runs/f"seed{seed}")
    if only_train:
        return {}
    cells = measure(dict(base=base, strong=load_strong(seed)), before, after, processor, make_scenes(scenes, 2000 + seed, "valid"), captions, f"seed {seed}")
    return {f"seed {seed} {name}": v for name, v in cells.items()}

def judge(found: dict) -> dict:
    "setting -> harms, and mean change of every metric for each base; from cell -> setting -> counts."
    rows = {json.dumps(h): dict(setting=h, harms=[], change={}) for h in GRID}
    for cell, settings in found.items():
        systems = bootstrap(settings, "null", n=1000)["systems"]
        for k, row in rows.items():
            row["change"][cell] = {m: c["delta"] for m, c in systems[k].items()}
            row["harms"] += [f"{cell} {m} {c['delta']:+.1f}" for m, c in systems[k].items() if verdict_of(m, c) == "worse"]
            gains = {m: c["delta"] * METRICS[m].better for m, c in systems[k].items()}
            pope, rest = ([v for m, v in gains.items() if m in ms] for ms in ([m for m in gains if m.startswith("pope")], ["text_accuracy", "color_accuracy", "count_accuracy"]))
            row.setdefault("gains", {})[cell] = (sum(pope) / len(pope) + sum(rest) / len(rest) + gains["chair_i"]) / 3
    for row in rows.values():
        row["gain"] = sum(v for c, v in row["gains"].items() if c.endswith(" base")) / sum(c.endswith(" base") for c in row["gains"])
    return rows

def label(how: dict) -> str:
    return f"λ {how['lam']:g}, " + (f"bound {how['bound']:g}" if how.get("bound") else "no bound") + (f", gate {how['gate']}" if how.get("gate") else "")

def table(rows: dict, chosen: dict, scenes: int, captions: int, seeds: list) -> str:
    "Markdown for people."
    mean = lambda row, m, kind: sum(v[m] for c, v in row["change"].items() if c.endswith(kind)) / len(seeds)
    lines = [f"| {'**' + label(r['setting']) + '**' if r is chosen else label(r['setting'])} | {r['gain']:+.2f} | " + " | ".join(f"{mean(r, m, k):+.1f}" for k in (" base", " strong") for m in ("chair_i", "pope_adversarial_accuracy", "text_accuracy", "count_accuracy")) + f" | {len(r['harms'])} |"
             for r in sorted(rows.values(), key=lambda r: (len(r["harms"]), -r["gain"]))]
    head = ["setting", "gain"] + [f"{k}: {m}" for k in ("base", "stronger") for m in ("CHAIR_i", "POPE adv.", "text", "count")] + ["harms"]
    return "\n".join(["# Which guidance is safe", "", f"Made by `python scripts/choose_default.py` on validation scenes: {scenes} of each of the seeds {', '.join(map(str, seeds))} ({captions} of them with captions), form `ratio`, base and stronger base.",
        "Means over seeds of the change in points. Gain: mean over the bases of POPE, precision of captions (CHAIR_i) and the other accuracies. Harms: how many of all metrics of all bases are worse with a paired 95% interval clear of zero.", "",
        "| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines, "", f"Chosen: **{label(chosen['setting'])}**." + (f" It harms: {'; '.join(chosen['harms'])}." if chosen["harms"] else " It harms nothing."), ""])

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
    write_json(args.out/"choose_default.json", dict(chosen=chosen["setting"], scenes=args.scenes, captions=args.captions, seeds=args.seed, settings=list(rows.values()), run=run_info()))
    print(write_text(args.out/"choose_default.md", table(rows, chosen, args.scenes, args.captions, args.seed)))
    if chosen["setting"] != {k: v for k, v in SAFE.items() if k != "form"}:
        print(f"note: `tita.decode.guidance.SAFE` is {SAFE}, chosen was {chosen['setting']}")

if __name__ == "__main__":
    main()
