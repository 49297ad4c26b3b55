#!/usr/bin/env python3
"""When is a draft worth it? Today's rule against one that always drafts, and against those of earlier commits.

    python scripts/study_pace.py --reward runs/demo/reward --before cfad4d1 60fbe70 --out results/study_pace

*draft 4*: always. *cfad4d1* and *60fbe70*: `pace` and `speculation` as they were in that commit; the first had
lengths from 1 to 8, a line fitted through their costs, trust in promises, pauses between looks and lazy steps, the
second a draft of four where it pays. *auto*: today's rule, a draft as long as its last token is worth it. All decode
the same cases, in turn in one process; a figure is the median over rounds of the speed over that of draft 0 in that
round. In every case each rule starts anew, and learns in a round before the first that counts.
"""
import argparse
import math
import statistics
import subprocess
import sys
import time
import types
from typing import NamedTuple

import torch
from tita.core import cli, run_info, write_json, write_text
from tita.decode import pace, speculation
from tita.decode.decoder import AlignedDecoder
from tita.decode.engine import Row
from tita.decode.guidance import OWN
from tita.world.embedded import load_models, make_scenes

QUESTION = "Describe the image."
CASES = [ # rows at once, times that the question is repeated, new tokens (None: until the answer ends)
    (1, 1, None), (8, 1, None), (32, 1, None), (1, 4, 32), (8, 4, 32), (1, 40, 32), (8, 40, 32)]


def earlier(commit: str):
    "Modules `pace` and `speculation` of another commit, beside today's."
    made = {}
    for name in ("pace", "speculation"):
        show = ["git", "show", f"{commit}:tita/decode/{name}.py"]
        source = subprocess.run(show, capture_output=True, text=True, check=True)
        module = types.ModuleType(f"tita.decode.{name}_before")
        module.__package__, module.__file__ = "tita.decode", f"{name}.py"
        sys.modules[module.__name__] = module
        code = source.stdout.replace("from .pace import", "from .pace_before import")
        exec(compile(code, f"{commit}:{name}", "exec"), vars(module))
        made[name] = module
    return made


class Rule(NamedTuple):
    "How an engine is made, and what it knows."
    draft: int | str
    engine: type
    pace: type


def rules(commits: list[str]) -> dict[str, Rule]:
    engine = speculation.SpeculativeEngine
    found = {"draft 0": Rule(0, engine, pace.Pace), "draft 4": Rule(4, engine, pace.Pace)}
    for commit in commits:
        old = earlier(commit)
        found[commit] = Rule("auto", old["speculation"].SpeculativeEngine, old["pace"].Pace)
    return found | {"auto": Rule("auto", engine, pace.Pace)}


def decode(dec, pairs: list, new: int | None, rule: Rule, known) -> float: # tokens a second of processor time
    "All pairs at once; `known` is what the rule has measured so far."
    parts = dec.experts, dec.encoders, dec.guidance, len(pairs), dec.n_rewards, 0, (), .25
    if rule.draft == 0:
        engine = dec.engine(len(pairs), draft=0)
    else:
        engine = rule.engine(*parts, draft=rule.draft, pace=known)
    sampling = dec._sampling(eos=(2,) if new is None else (), max_new_tokens=new or 64)
    started = time.process_time()
    engine.submit([Row(i, question, [image], sampling, 0) for i, (image, question) in enumerate(pairs)])
    while engine.busy:
        engine.step()
    return engine.produced / (time.process_time() - started)


def case(dec, scenes, kinds: dict, rows: int, repeats: int, new: int | None, rounds: int) -> dict:
    "Speed of each rule over draft 0, round by round."
    pairs = [(s.image, " ".join([QUESTION] * repeats)) for s in scenes]
    parts = [pairs[i:i + rows] for i in range(0, max(rows, min(4, len(pairs))), rows)]
    known = {name: rule.pace() for name, rule in kinds.items()}
    ratios = {name: [] for name in kinds}
    for turn in range(rounds + 1):
        speed = {}
        for name, rule in kinds.items():
            speed[name] = statistics.harmonic_mean([decode(dec, part, new, rule, known[name]) for part in parts])
        for name in kinds if turn else ():
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
    earlier_rules = " and ".join(f"*{commit}*" for commit in result["before"])
    lines = ["| case | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    lines += [f"| {title(c)} | " + " | ".join(f"{c['ratios'][n]:.2f}" for n in names) + " |" for c in cases]
    lines.append("| **geometric mean** | " + " | ".join(f"**{mean(cases, n):.2f}**" for n in names) + " |")
    made = (
        f"`python scripts/study_pace.py` on the embedded pair of seed 0, {result['reward']}, recommended setting; "
        f"{earlier_rules}: the rules of those commits. Times draft 0; medians of {result['rounds']} rounds in which "
        "the rules take turns in one process, processor time of one thread (other programs ran on this machine "
        "meanwhile). "
        f"{result['cpus']} cores, torch {versions['torch']}, commit {(result['commit'] or 'unknown')[:12]}.")
    return "\n\n".join(["# When is a draft worth it?", made, "\n".join(lines)]) + "\n"


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--reward", help="folder of a trained reward [the reward before its training]")
    p.add_argument("--before", nargs="*", default=["cfad4d1", "60fbe70"], help="commits of earlier rules")
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
    scenes, kinds = make_scenes(32, seed=99), rules(args.before)
    said = "a trained reward" if args.reward else "the reward before its training"
    result = dict(cases=[], rounds=args.rounds, before=args.before, reward=said, **run_info())
    for rows, repeats, new in CASES[:args.cases]:
        result["cases"].append(case(dec, scenes, kinds, rows, repeats, new, args.rounds))
        text = markdown(result, [*kinds])
        print(text, flush=True)
        if args.out:
            write_json(f"{args.out}.json", result)
            write_text(f"{args.out}.md", text)


if __name__ == "__main__":
    main()
