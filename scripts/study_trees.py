#!/usr/bin/env python3
"""Would trees of drafts beat chains? The reward's best few at each depth, verified in one forward, against one guess after the other.

    python scripts/study_trees.py                                 the embedded pair, results/study_trees.{json,md}
    python scripts/study_trees.py --reward runs/demo/reward       with a reward after DPO: bounded ratio instead of interpolation

A chain of k drafts stands as far as the aligned tokens are the reward's first choice; a tree with w choices at a depth, as far as they are
among its first w. So one pass over aligned answers, with the rank of every token in the reward's distribution, says exactly how many
tokens each shape yields a round. What a round takes is measured: forwards of the reward over the nodes of each depth, one forward of
the others over the whole tree, and what an engine's step takes beside its forwards.
"""
import argparse, itertools, math, statistics, time
from pathlib import Path

import torch
from tita.decode.cache import RaggedCache
from tita.core import cli, progress, run_info, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.decode.guidance import SAFE
from tita.models import chat_prompt
from tita.world.embedded import load_models, make_scenes

ROOT = Path(__file__).resolve().parent.parent


@torch.no_grad()
def ranks(dec, drafter, processor, pairs: list, new: int) -> list[list[int]]: # per answer, per token: how many the reward finds likelier
    "Where the aligned tokens stand in the drafter's distribution."
    found = []
    outs = dec.generate([im for im, _ in pairs], [q for _, q in pairs], max_new_tokens=new, draft=0)
    for (im, q), out in zip(progress(pairs, "ranks", unit="answer"), outs):
        x = processor(text=chat_prompt(processor, q), images=im, return_tensors="pt")
        tokens = torch.tensor(out.tokens)
        n = len(tokens)
        x = {k: v for k, v in x.items() if k in ("input_ids", "pixel_values")} | {"input_ids": torch.cat([x["input_ids"], tokens[None]], 1)}
        logits = drafter(**x).logits[0, -n - 1:-1].float()
        found.append((logits > logits.gather(-1, tokens[:, None])).sum(-1).tolist())
    return found


def shapes(depth: int, width: int, nodes: int) -> list[tuple]:
    "Chains and trees: choices at each depth, never more further down."
    out = [w for d in range(1, depth + 1) for w in itertools.product(range(1, width + 1), repeat=d) if list(w) == sorted(w, reverse=True)]
    return [w for w in out if sum(levels(w)) <= nodes]


def levels(shape: tuple) -> list[int]:
    "Nodes at each depth."
    return [math.prod(shape[:i + 1]) for i in range(len(shape))]


def tokens_a_round(shape: tuple, found: list[list[int]]) -> float:
    "Walk through the answers: the accepted choices, and one token more, each round."
    tokens = rounds = 0
    for row in found:
        at = 0
        while at < len(row):
            kept = 0
            while kept < len(shape) and at + kept < len(row) and row[at + kept] < shape[kept]:
                kept += 1
            at += kept + 1
            rounds += 1
        tokens += len(row)
    return tokens / rounds


def costs(dec, n: int, prefix: int, widths: list[int], repeats: int) -> list[dict]:
    "Seconds of each expert's forward over so many tokens, for n rows; widths in turn, medians."
    out = []
    for e in dec.experts:
        cache, seen = RaggedCache(e.layers, n, prefix + 2 * max(widths)), {w: [] for w in widths}
        lens = torch.full((n,), prefix)
        for r in range(repeats + 2):
            for w in widths:
                start = time.perf_counter()
                e.forward(cache, slice(0, n), torch.full((n, w), 7), lens + (torch.arange(n) % 2), delta=0)  # ragged: a mask is needed, as for a tree
                if r > 1:
                    seen[w].append(time.perf_counter() - start)
        out.append({w: statistics.median(v) for w, v in seen.items()})
    return out


def between(known: dict, w: int) -> float:
    "A measured time, or one between its neighbours."
    if w in known:
        return known[w]
    a, b = max(k for k in known if k < w), min(k for k in known if k > w)
    return known[a] + (known[b] - known[a]) * (w - a) / (b - a)


def beside(dec, pairs, n: int) -> float:
    "Seconds that a plain step takes beside its forwards."
    from tita.decode.engine import Row
    e = dec.engine(n, draft=0)
    e.submit([Row(i, q, [im], dec._sampling(eos=(), max_new_tokens=48), 0) for i, (im, q) in enumerate(pairs[:n])])
    e.step()
    before, start, steps = sum(x.counts.seconds for x in e.experts), time.perf_counter(), 0
    while e.busy and steps < 40:
        e.step()
        steps += 1
    return (time.perf_counter() - start - (sum(x.counts.seconds for x in e.experts) - before)) / steps


def compare(found, tree_shapes, draft, verify, rest: float) -> list[dict]: # sorted, the fastest first
    "Tokens a second of each shape over those without draft. `draft` and `verify`: seconds over so many tokens."
    plain = 1 / (draft(1) + verify(1) + rest)
    rows = []
    for shape in tree_shapes:
        nodes = levels(shape)
        seconds = sum(draft(w) for w in [1, *nodes[:-1]]) + verify(1 + sum(nodes)) + rest
        gain = tokens_a_round(shape, found)
        rows.append(dict(shape=list(shape), nodes=sum(nodes), tokens_a_round=gain, over_plain=gain / seconds / plain))
    return sorted(rows, key=lambda r: -r["over_plain"])


def best(rows, tree: bool) -> dict:
    return next(r for r in rows if (max(r["shape"]) > 1) == tree)


@cli
def main(argv: list = None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seed", type=int, default=0, help="of the world")
    p.add_argument("--reward", help="folder of a reward after DPO")
    p.add_argument("--scenes", type=int, default=150)
    p.add_argument("--new", type=int, default=64)
    p.add_argument("--batch", default="1,8")
    p.add_argument("--depth", type=int, default=10)
    p.add_argument("--width", type=int, default=4)
    p.add_argument("--nodes", type=int, default=64)
    p.add_argument("--repeats", type=int, default=40)
    p.add_argument("--small", type=float, default=.2, help="a small model's forward over a large one's where memory is the limit (1.4B under 7B)")
    p.add_argument("--out", type=Path, default=ROOT/"results"/"study_trees")
    args = p.parse_args(argv)
    base, before, processor = load_models(args.seed)
    drafter = before
    if args.reward:
        from tita.models import load_vlm
        drafter = load_vlm(args.reward)
    dec = AlignedDecoder(base, drafter, processor, ref=before, **SAFE) if args.reward else AlignedDecoder(base, before, processor, form="interpolate", lam=.6)
    pairs = [(s.image, "Describe the image.") for s in make_scenes(args.scenes, args.seed, "valid")]
    found = ranks(dec, drafter, processor, pairs, args.new)
    flat = [r for row in found for r in row]
    tried = shapes(args.depth, args.width, args.nodes)
    widths, cases = sorted({w for w in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96) if w <= args.nodes} | {args.nodes + 1}), []
    for n in map(int, args.batch.split(",")):
        known = costs(dec, n, 60, widths, args.repeats)
        rest = beside(dec, pairs, n)
        rows = compare(found, tried, lambda w: between(known[1], w), lambda w: sum(between(k, w) for i, k in enumerate(known) if i != 1), rest)
        cases.append(dict(case=f"measured here, {n} row{'s' * (n > 1)} at once", rest_ms=1e3 * rest, forward_ms=[{w: 1e3 * s for w, s in k.items()} for k in known], chain=best(rows, False), tree=best(rows, True)))
    others = len(dec.experts) - 2
    rows = compare(found, tried, lambda w: args.small, lambda w: 1. + others * args.small, 0.)
    cases.append(dict(case=f"by arithmetic: more tokens in a forward are free, the small model takes {args.small:g} of the large one", chain=best(rows, False), tree=best(rows, True)))
    share = [sum(r <= k for r in flat) / len(flat) for k in range(args.width)]
    result = dict(answers=len(found), tokens=len(flat), form=dec.guidance.form, reward=args.reward and Path(args.reward).name, first_choices=share, cases=cases, seed=args.seed, run=run_info())
    write_json(args.out.with_suffix(".json"), result)
    write_text(args.out.with_suffix(".md"), table(result))
    print(table(result))


def table(r: dict) -> str: # Markdown
    "For people."
    shape = lambda c: " ".join(map(str, c["shape"]))
    lines = [f"| {c['case']} | {len(c['chain']['shape'])} | {c['chain']['tokens_a_round']:.2f} | {c['chain']['over_plain']:.2f}x | {shape(c['tree'])} | {c['tree']['nodes']} | {c['tree']['tokens_a_round']:.2f} | {c['tree']['over_plain']:.2f}x |" for c in r["cases"]]
    info = r["run"]
    return ("# Trees of drafts against chains\n\n`python scripts/study_trees.py`: " + f"{r['answers']} descriptions of validation scenes, {r['tokens']} tokens, aligned by {r['form']}, {'a reward after DPO' if r['reward'] else 'the reward before DPO'}. "
        "The aligned token is among the reward's first " + ", ".join(f"{k + 1}: {100 * s:.1f}%" for k, s in enumerate(r["first_choices"])) + ".\n\n"
        "| | best chain: drafts | tokens a round | over no draft | best tree: choices by depth | nodes | tokens a round | over no draft |\n|---|---|---|---|---|---|---|---|\n" + "\n".join(lines)
        + f"\n\nTokens a round are exact for these answers; seconds are measured forwards (medians, wall time), put together. Commit {(info['commit'] or '')[:12]}, {info['cpus']} cores, {info['system']}, torch {info['versions']['torch']}.\n")


if __name__ == "__main__":
    main()
