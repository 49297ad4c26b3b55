#!/usr/bin/env python3
"""When is a draft worth it, and how long? Today's rule against fixed lengths, and against one that was there before.

    python scripts/study_pace.py --reward runs/demo/reward --out results/study_pace

*draft 3* and *draft 4*: always. *four*: a draft of four where it pays, once the rule. *unwatched*: today's rule where
the host does not look at a draft while it is written, as on a GPU. *auto*: today's rule. All decode the same cases, in
turn in one process; a figure is the median over rounds of the speed over that of draft 0 in that round. In every case
each rule starts anew, and learns in a round before the first that counts.
"""
import argparse
import math
import statistics
import time
from typing import NamedTuple

import torch
from tita.core import cli, run_info, write_json, write_text
from tita.decode.decoder import AlignedDecoder
from tita.decode.engine import Row
from tita.decode.guidance import OWN
from tita.decode.pace import Pace
from tita.world.embedded import load_models, make_scenes

QUESTION = "Describe the image."
CASES = [ # rows at once, times that the question is repeated, new tokens (None: until the answer ends)
    (1, 1, None), (8, 1, None), (32, 1, None), (1, 4, 32), (8, 4, 32), (1, 40, 32), (8, 40, 32)]


class Four(Pace):
    "A draft of four where it pays."

    def best(self, n: int, is_watched: bool = True) -> int:
        return min(4, super().best(n))


class Rule(NamedTuple):
    "How long drafts are, what decides where that is open, and whether a draft ends where the drafter is unsure."
    draft: int | str
    pace: type = Pace
    is_watched: bool = False


RULES = {"draft 0": Rule(0), "draft 3": Rule(3), "draft 4": Rule(4), "four": Rule("auto", Four),
         "unwatched": Rule("auto"), "auto": Rule("auto", is_watched=True)}


def decode(dec, pairs: list, new: int | None, rule: Rule, known) -> float: # tokens a second of processor time
    "All pairs at once; `known` is what the rule has measured so far."
    dec.pace = known
    engine = dec.engine(len(pairs), draft=rule.draft)
    engine.is_watched = rule.is_watched
    sampling = dec._sampling(eos=(2,) if new is None else (), max_new_tokens=new or 64)
    started = time.process_time()
    engine.submit([Row(i, question, [image], sampling, 0) for i, (image, question) in enumerate(pairs)])
    while engine.busy:
        engine.step()
    return engine.produced / (time.process_time() - started)


def case(dec, scenes, rows: int, repeats: int, new: int | None, rounds: int) -> dict:
    "Speed of each rule over draft 0, round by round."
    pairs = [(s.image, " ".join([QUESTION] * repeats)) for s in scenes]
    parts = [pairs[i:i + rows] for i in range(0, max(rows, min(4, len(pairs))), rows)]
    known = {name: rule.pace() for name, rule in RULES.items()}
    ratios = {name: [] for name in RULES}
    for turn in range(rounds + 1):
        speed = {}
        for name, rule in RULES.items():
            speed[name] = statistics.harmonic_mean([decode(dec, part, new, rule, known[name]) for part in parts])
        for name in RULES if turn else ():
            ratios[name].append(speed[name] / speed["draft 0"])
    medians = {name: statistics.median(r) for name, r in ratios.items()}
    return dict(rows=rows, repeats=repeats, new=new, ratios=medians)


def title(c: dict) -> str:
    asked = "the question" if c["repeats"] == 1 else f"the question {c['repeats']} times"
    return f"{c['rows']} at once, {asked}, " + ("until it ends" if c["new"] is None else f"{c['new']} tokens")


def mean(cases: list, name: str) -> float:
    return math.exp(statistics.fmean(math.log(c["ratios"][name]) for c in cases))


def markdown(result: dict, names: list) -> str:
    "The table, and what it says."
    cases, versions = result["cases"], result["versions"]
    lines = ["| case | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    lines += [f"| {title(c)} | " + " | ".join(f"{c['ratios'][n]:.2f}" for n in names) + " |" for c in cases]
    lines.append("| **geometric mean** | " + " | ".join(f"**{mean(cases, n):.2f}**" for n in names) + " |")
    made = (
        f"`python scripts/study_pace.py` on the embedded pair of seed 0, {result['reward']}, recommended setting; "
        "*four*: a draft of four where it pays; *unwatched*: today's rule as on a GPU. "
        f"Times draft 0; medians of {result['rounds']} rounds in which the "
        "rules take turns in one process, processor time of one thread (other programs ran on this machine meanwhile). "
        f"{result['cpus']} cores, torch {versions['torch']}, commit {(result['commit'] or 'unknown')[:12]}.")
    return "\n\n".join(["# When is a draft worth it?", made, "\n".join(lines)]) + "\n"


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reward", help="folder of a trained reward [the reward before its training]")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    p.add_argument("--out", help="where the figures go: OUT.json and OUT.md")
    return p.parse_args()


@cli
def main():
    from transformers import AutoModelForImageTextToText
    args = parse()
    torch.set_num_threads(1)
    base, before, processor = load_models(0)
    for model in (base, before):
        model.config.text_config.max_position_embeddings = 4096
    reward = before
    if args.reward:
        reward = AutoModelForImageTextToText.from_pretrained(args.reward, dtype=torch.float32).eval()
    reward.config.text_config.max_position_embeddings = 4096
    dec = AlignedDecoder(base, reward, processor, **OWN)
    scenes = make_scenes(32, seed=99)
    said = "a trained reward" if args.reward else "the reward before its training"
    result = dict(cases=[], rounds=args.rounds, reward=said, **run_info())
    for rows, repeats, new in CASES[:args.cases]:
        result["cases"].append(case(dec, scenes, rows, repeats, new, args.rounds))
        text = markdown(result, [*RULES])
        print(text, flush=True)
        if args.out:
            write_json(f"{args.out}.json", result)
            write_text(f"{args.out}.md", text)


if __name__ == "__main__":
    main()
