#!/usr/bin/env python3
"""Reward and reference in one forward with stacked weights, or in two?

    python scripts/study_stacked.py --out results/study_stacked

Two models of one shape differ in their weights alone, so one forward could run both: every product a batched one
(`bmm`) over weights that are stacked once, every norm and every attention over twice the rows. The blocks of a decoder
are measured here without cache and mask, q tokens each: 1 is a plain step, 4 a draft's verification, 300 a prompt. Both
ways take turns; the figure is the ratio of the least seconds of either, which other programs cannot make smaller.
"""
import argparse
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tita.core import cli, run_info, write_json, write_text


class Shape(NamedTuple):
    "Sizes of a decoder."
    layers: int
    hidden: int
    heads: int
    feed_forward: int


SHAPES = {"2 x 64": Shape(2, 64, 4, 160), "4 x 256": Shape(4, 256, 4, 688), "22 x 2048": Shape(2, 2048, 32, 5632)}
TOKENS = 1, 4, 30, 300


def weights(shape: Shape) -> list[dict]:
    "Of each layer, random."
    hidden, feed_forward = shape.hidden, shape.feed_forward
    sizes = dict(q=(hidden, hidden), k=(hidden, hidden), v=(hidden, hidden), o=(hidden, hidden))
    sizes |= dict(gate=(feed_forward, hidden), up=(feed_forward, hidden), down=(hidden, feed_forward))
    made = [{name: torch.randn(size) / size[1]**.5 for name, size in sizes.items()} for _ in range(shape.layers)]
    return [layer | dict(norm=torch.ones(hidden)) for layer in made]


def layer(x, w, linear, heads: int): # (models, q, hidden)
    split = lambda t: t.unflatten(-1, (heads, -1)).transpose(-3, -2)  # (models, heads, q, width)
    h = F.rms_norm(x, x.shape[-1:], w["norm"], 1e-6)
    seen = F.scaled_dot_product_attention(*(split(linear(h, w[n])) for n in "qkv"), is_causal=x.shape[-2] > 1)
    x = x + linear(seen.transpose(-3, -2).flatten(-2), w["o"])
    h = F.rms_norm(x, x.shape[-1:], w["norm"], 1e-6)
    return x + linear(F.silu(linear(h, w["gate"])) * linear(h, w["up"]), w["down"])


def apart(x, models: list, heads: int):
    "Each model alone."
    out = []
    for states, model in zip(x.split(1), models):
        for w in model:
            states = layer(states, w, F.linear, heads)
        out.append(states)
    return torch.cat(out)


def together(x, stacked: list, heads: int):
    "Both in one."
    for w in stacked:
        x = layer(x, w, lambda t, weight: torch.bmm(t, weight.transpose(1, 2)), heads)
    return x


def stack(models: list) -> list[dict]:
    "Weights (2, out, in) of each layer; the norms of these are all ones."
    names = "q k v o gate up down".split()
    return [{n: torch.stack([w[n] for w in ws]) for n in names} | dict(norm=ws[0]["norm"]) for ws in zip(*models)]


def least(*ways, seconds: float, clock=time.perf_counter) -> list[float]: # seconds of each
    best, end = [float("inf")] * len(ways), time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, way in enumerate(ways):
            started = clock()
            way()
            best[i] = min(best[i], clock() - started)
    return best


def measured(name: str, q: int, seconds: float) -> dict:
    size = SHAPES[name]
    models = [weights(size) for _ in range(2)]
    x, stacked = torch.randn(2, q, size.hidden), stack(models)
    assert torch.allclose(apart(x, models, size.heads), together(x, stacked, size.heads), atol=1e-2)
    ways = (lambda: apart(x, models, size.heads)), (lambda: together(x, stacked, size.heads))
    two, one = least(*ways, seconds=seconds)
    return dict(shape=name, tokens=q, apart_ms=1e3 * two, together_ms=1e3 * one, gain=two / one)


@cli
@torch.inference_mode()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=4., help="of measurements a case")
    p.add_argument("--out", help="where the figures go: OUT.json and OUT.md")
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = [measured(name, q, args.seconds) for name in SHAPES for q in TOKENS]
    info = run_info()
    lines = ["| shape of both | tokens each | two forwards, ms | one, ms | gain |", "| --- | --- | --- | --- | --- |"]
    row = "| {shape} | {tokens} | {apart_ms:.2f} | {together_ms:.2f} | {gain:.2f} |"
    lines += [row.format(**c) for c in cases]
    made = (f"`python scripts/study_stacked.py`, one thread, least of {args.seconds:g} s; of 22 x 2048 two layers. "
        f"torch {info['versions']['torch']}, commit {(info['commit'] or 'unknown')[:12]}.")
    text = "\n\n".join(["# Reward and reference in one forward?", made, "\n".join(lines)]) + "\n"
    print(text)
    if args.out:
        write_json(f"{args.out}.json", dict(cases=cases, **info))
        write_text(f"{args.out}.md", text)


if __name__ == "__main__":
    main()
