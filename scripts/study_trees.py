#!/usr/bin/env python3
"""Would trees of drafts beat chains?

The reward's best few at each depth, verified in one forward, against one guess after the other.

    python scripts/study_trees.py                             the embedded pair, results/study_trees.{json,md}
    python scripts/study_trees.py --reward runs/demo/reward   with a reward after DPO: bounded ratio, no interpolation

A chain of k drafts stands as far as the aligned tokens are the reward's first choice; a tree with w choices at a depth,
as far as they are among its first w. So one pass over aligned answers, with the rank of every token in the reward's
distribution, says exactly how many tokens each shape yields a round. What a round takes is measured: forwards of the
reward over the nodes of each depth, one forward of the others over the whole tree, and what an engine's step takes
beside its forwards.
"""
import argparse
import itertools
import math
import statistics
import time
from pathlib import Path

import torch
from tita.decode.cache import RaggedCache
from tita.core import cli, progress, run_info, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.decode.engine import Row
from tita.decode.guidance import SAFE
from tita.models import chat_prompt, load_vlm
from tita.world.embedded import load_models, make_scenes

ROOT = Path(__file__).resolve().parent.parent


QUESTION = "Describe the image."


def ranks(dec, drafter, processor, images: list, new: int) -> list[list[int]]:
    "Per answer and aligned token, how many tokens the drafter finds likelier."
    outs = dec.generate(images, [QUESTION] * len(images), max_new_tokens=new, draft=0)
    both = zip(progress(images, "ranks", unit="answer"), outs)
    return [ranks_of(torch.tensor(out.tokens), drafter, processor, image) for image, out in both]


@torch.no_grad()
def ranks_of(tokens, drafter, processor, image) -> list[int]:
    x = processor(text=chat_prompt(processor, QUESTION), images=image, return_tensors="pt")
    ids = torch.cat([x["input_ids"], tokens[None]], 1)  # (1, prompt + n)
    logits = drafter(input_ids=ids, pixel_values=x["pixel_values"]).logits[0, -len(tokens) - 1:-1].float()  # (n, V)
    return (logits > logits.gather(-1, tokens[:, None])).sum(-1).tolist()


def shapes(depth: int, width: int, nodes: int) -> list[tuple]:
    "Chains and trees: choices at each depth, never more further down."
    choices = range(width, 0, -1)
    found = [w for d in range(1, depth + 1) for w in sorted(itertools.combinations_with_replacement(choices, d))]
    return [w for w in found if sum(levels(w)) <= nodes]


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
    "Seconds of each expert's forward over so many tokens, for n rows."
    return [costs_of(e, n, prefix, widths, repeats) for e in dec.experts]


def costs_of(expert, n: int, prefix: int, widths: list[int], repeats: int) -> dict[int, float]:
    "Widths in turn, medians."
    cache = RaggedCache(expert.layers, n, prefix + 2 * max(widths))
    lens = prefix + torch.arange(n) % 2  # ragged: a mask is needed, as for a tree
    seen = {w: [] for w in widths}
    for warm in [False] * 2 + [True] * repeats:
        for w in widths:
            start = time.perf_counter()
            expert.forward(cache, slice(0, n), torch.full((n, w), 7), lens, delta=0)
            if warm:
                seen[w].append(time.perf_counter() - start)
    return {w: statistics.median(v) for w, v in seen.items()}


def between(known: dict, w: int) -> float:
    "A measured time, or one between its neighbours."
    if w in known:
        return known[w]
    a, b = max(k for k in known if k < w), min(k for k in known if k > w)
    return known[a] + (known[b] - known[a]) * (w - a) / (b - a)


def beside(dec, images, n: int) -> float:
    "Seconds that a plain step takes beside its forwards."
    e = dec.engine(n, draft=0)
    sampling = dec._sampling(eos=(), max_new_tokens=48)
    e.submit([Row(i, QUESTION, [image], sampling, 0) for i, image in enumerate(images[:n])])
    e.step()
    forwards = lambda: sum(x.counts.seconds for x in e.experts)
    before, start, steps = forwards(), time.perf_counter(), 0
    while e.busy and steps < 40:
        e.step()
        steps += 1
    return (time.perf_counter() - start - (forwards() - before)) / steps


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


def measured_case(dec, images, found, tried, n: int, args) -> dict:
    "The best chain and tree for n rows at once, by what forwards take here."
    usual = [w for w in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96) if w <= args.nodes]
    known = costs(dec, n, 60, sorted({*usual, args.nodes + 1}), args.repeats)
    drafter, others = known[1], [k for i, k in enumerate(known) if i != 1]
    rest = beside(dec, images, n)
    rows = compare(found, tried, lambda w: between(drafter, w), lambda w: sum(between(k, w) for k in others), rest)
    forward_ms = [{w: 1e3 * seconds for w, seconds in k.items()} for k in known]
    return dict(case=f"measured here, {n} row{'s' * (n > 1)} at once", rest_ms=1e3 * rest, forward_ms=forward_ms,
        chain=best(rows, False), tree=best(rows, True))


def case_by_arithmetic(dec, found, tried, small: float) -> dict:
    "The best chain and tree where memory is the limit."
    verify = 1. + (len(dec.experts) - 2) * small
    rows = compare(found, tried, lambda w: small, lambda w: verify, 0.)
    what = f"more tokens in a forward are free, the small model takes {small:g} of the large one"
    return dict(case=f"by arithmetic: {what}", chain=best(rows, False), tree=best(rows, True))


def make_decoder(args):
    "The embedded pair, or its base with a reward after DPO; and the drafter, which is that reward."
    base, before, processor = load_models(args.seed)
    if not args.reward:
        return AlignedDecoder(base, before, processor, form="interpolate", lam=.6), before, processor
    drafter = load_vlm(args.reward)
    return AlignedDecoder(base, drafter, processor, ref=before, **SAFE), drafter, processor


def parse(argv: list | None) -> argparse.Namespace:
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
    p.add_argument("--small", type=float, default=.2,
        help="a small model's forward over a large one's where memory is the limit (1.4B under 7B)")
    p.add_argument("--out", type=Path, default=ROOT/"results"/"study_trees")
    return p.parse_args(argv)


@cli
def main(argv: list = None):
    args = parse(argv)
    dec, drafter, processor = make_decoder(args)
    images = [s.image for s in make_scenes(args.scenes, args.seed, "valid")]
    found = ranks(dec, drafter, processor, images, args.new)
    tried = shapes(args.depth, args.width, args.nodes)
    cases = [measured_case(dec, images, found, tried, n, args) for n in map(int, args.batch.split(","))]
    cases.append(case_by_arithmetic(dec, found, tried, args.small))
    flat = [rank for row in found for rank in row]
    first_choices = [sum(rank <= k for rank in flat) / len(flat) for k in range(args.width)]
    reward = args.reward and Path(args.reward).name
    result = dict(answers=len(found), tokens=len(flat), form=dec.guidance.form, reward=reward,
        first_choices=first_choices, cases=cases, seed=args.seed, run=run_info())
    write_json(args.out.with_suffix(".json"), result)
    write_text(args.out.with_suffix(".md"), table(result))
    print(table(result))


HEAD = """\
| | best chain: drafts | tokens a round | over no draft | \
best tree: choices by depth | nodes | tokens a round | over no draft |
|---|---|---|---|---|---|---|---|"""


def table(r: dict) -> str: # Markdown
    "For people."
    info = r["run"]
    where = f"{info['cpus']} cores, {info['system']}, torch {info['versions']['torch']}"
    return "\n\n".join(["# Trees of drafts against chains", how_made(r), "\n".join([HEAD, *map(line, r["cases"])]),
        "Tokens a round are exact for these answers; seconds are measured forwards (medians, wall time), put together. "
        f"Commit {(info['commit'] or '')[:12]}, {where}."]) + "\n"


def how_made(r: dict) -> str:
    first = ", ".join(f"{k}: {100 * share:.1f}%" for k, share in enumerate(r["first_choices"], 1))
    return (f"`python scripts/study_trees.py`: {r['answers']} descriptions of validation scenes, {r['tokens']} tokens, "
        f"aligned by {r['form']}, {'a reward after DPO' if r['reward'] else 'the reward before DPO'}. "
        f"The aligned token is among the reward's first {first}.")


def line(case: dict) -> str:
    "A row of the table."
    chain, tree = case["chain"], case["tree"]
    yields = lambda x: [f"{x['tokens_a_round']:.2f}", f"{x['over_plain']:.2f}x"]
    of_chain = [case["case"], len(chain["shape"]), *yields(chain)]
    of_tree = [" ".join(map(str, tree["shape"])), tree["nodes"], *yields(tree)]
    return f"| {' | '.join(map(str, of_chain + of_tree))} |"


if __name__ == "__main__":
    main()
