#!/usr/bin/env python3
"""What a few rows times the matrices of a decoder cost on a CPU: as torch multiplies them, the other way round, packed.

    python scripts/study_packed.py --out results/study_packed

A draft of four is verified by one forward over five rows. The figures are milliseconds of processor time for all
matrices of some layers and their head, which together are larger than any cache; the ways take turns, and the least of
each counts.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tita.core import cli, run_info, write_json, write_text
from tita.decode.cache import FEW_ROWS, Packed
from tita.records import processor_name

sys.path.insert(0, str(Path(__file__).resolve().parent))
from study_stacked import least # the quickest of several turns

SHAPES = {"4 x 256": (4, 256, 688), "12 x 768": (12, 768, 3072), "4 x 2048": (4, 2048, 5632)}
VOCAB = 32_064
ROWS = 1, 2, 3, 4, 5, 8, 16, 32, 64, 128, 300


def matrices(layers: int, hidden: int, feed_forward: int) -> list: # of (out, in)
    sizes = [(hidden, hidden)] * 4 + [(feed_forward, hidden)] * 2 + [(hidden, feed_forward)]
    return [torch.randn(size) / size[1]**.5 for size in [*sizes * layers, (VOCAB, hidden)]]


def the_other_way_round(x, weight):
    return (weight @ x.T).T


def multiplied(x, known: Packed):
    return torch.ops.mkldnn._linear_pointwise(x, known.matrix, None, "none", [], "")


def measured(name: str, seconds: float) -> list[dict]:
    "One case for each number of rows."
    weights = matrices(*SHAPES[name])
    packed, cases = [Packed(w, has_room=True) for w in weights], []
    for rows in ROWS:
        inputs = {width: torch.randn(rows, width) for width in {w.shape[1] for w in weights}}
        x = [inputs[w.shape[1]] for w in weights]
        assert torch.allclose(multiplied(x[0], packed[0]), F.linear(x[0], weights[0]), atol=1e-3)
        ways = [lambda: list(map(F.linear, x, weights)), lambda: list(map(the_other_way_round, x, weights)),
            lambda: list(map(multiplied, x, packed))]
        usual, turned, by_packed = least(*ways, seconds=seconds, clock=time.process_time)
        times = dict(usual_ms=1e3 * usual, turned_ms=1e3 * turned, packed_ms=1e3 * by_packed)
        cases.append(dict(shape=name, rows=rows, **times))
    return cases


@cli
@torch.no_grad()
def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=4., help="of measurements a case")
    p.add_argument("--out", help="where the figures go: OUT.json and OUT.md")
    args = p.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases, info = [c for name in SHAPES for c in measured(name, args.seconds)], run_info()
    lines = ["| layers x width | rows | `F.linear`, ms | matrix first, ms | packed, ms | gain |", "|---" * 6 + "|"]
    row = "| {shape} | {rows} | {usual_ms:.1f} | {turned_ms:.1f} | {packed_ms:.1f} | {gain:.2f} |"
    lines += [row.format(**c, gain=c["usual_ms"] / c["packed_ms"]) for c in cases]
    made_by = f"torch {info['versions']['torch']}, commit {(info['commit'] or 'unknown')[:12]}"
    on = f"{processor_name()}, one thread, {made_by}"
    made = (f"`python scripts/study_packed.py`, {on}; the least of {args.seconds:g} seconds of each case. "
        f"A decoder takes the packed matrix for {FEW_ROWS[0]} to {FEW_ROWS[-1]} rows.")
    text = "\n\n".join(["# A few rows times large matrices", made, "\n".join(lines)]) + "\n"
    print(text)
    if args.out:
        write_json(f"{args.out}.json", dict(cases=cases, processor=processor_name(), **info))
        write_text(f"{args.out}.md", text)


if __name__ == "__main__":
    main()
