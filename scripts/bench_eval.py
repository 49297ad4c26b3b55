#!/usr/bin/env python3
"""How long POPE takes: one `generate` call a question, and `tita-eval`'s way of asking, in one run.

    python scripts/bench_eval.py --out results/bench_eval.json          1,000 questions about 170 pictures

Both ask the embedded base the same questions, greedily. The first calls transformers' `generate` once for each, picture
and all; the second streams them through the engine, which reads each picture once and runs its questions side by side.
They take turns, round by round; the figure is the median over rounds of their ratio. Answers that differ are counted.
"""
import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from tita.core import cli, run_info, write_json
from tita.decode.decoder import AlignedDecoder
from tita.eval.asking import Pictures, ask_system
from tita.eval.systems import decoder_system
from tita.eval.tasks import TASKS
from tita.models import chat_prompt
from tita.world.embedded import ASK, OBJECTS, load_models, make_scenes


def pope_questions(n: int, images: int) -> list[dict]:
    "As many questions as POPE would ask: present and absent objects, about six a picture."
    rng, scenes, rows = random.Random(0), make_scenes(images, seed=1), []
    for i in range(n):
        scene, name = scenes[i % images], rng.choice(OBJECTS)
        truth = "yes" if name in scene.objects else "no"
        rows.append(dict(question_id=i, image=scene.image, text=ASK["pope"].format(name), truth=truth))
    return sorted(rows, key=lambda r: r["question_id"] % images)


@torch.no_grad()
def one_call_each(model, processor, rows) -> dict[int, str]:
    "The usual script: a call of `generate` for each question."
    said = {}
    for r in rows:
        text = chat_prompt(processor, r["text"])
        inputs = processor(text=text, images=r["image"], return_tensors="pt", add_special_tokens=False)
        out = model.generate(**inputs, do_sample=False, max_new_tokens=TASKS["world_pope_random"].max_new_tokens)
        answer = out[0, inputs["input_ids"].shape[1]:]
        said[r["question_id"]] = processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
    return said


def as_tita_eval(model, processor, rows) -> dict[int, str]:
    "Through the engine, answers written to a file as they come."
    system = decoder_system("base", AlignedDecoder(model, processor=processor))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/"answers.jsonl"
        said, failed = ask_system(system, TASKS["world_pope_random"], rows, Pictures(None, Path(folder)), file)
    assert not failed, failed
    return {k: r["answer"] for k, r in said.items()}


def timed(ask, *given) -> tuple[float, dict]:
    start = time.perf_counter()
    said = ask(*given)
    return time.perf_counter() - start, said


@cli
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--images", type=int, default=170)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default="runs/bench_eval.json")
    args = parser.parse_args()
    base, _, processor = load_models()
    rows, rounds = pope_questions(args.questions, args.images), []
    one_call_each(base, processor, rows[:5])
    as_tita_eval(base, processor, rows[:5])
    for _ in range(args.rounds):
        slow, first = timed(one_call_each, base, processor, rows)
        fast, second = timed(as_tita_eval, base, processor, rows)
        differ = sum(first[k] != second[k] for k in first)
        rounds.append(dict(generate=round(slow, 2), tita=round(fast, 2), ratio=round(slow / fast, 2), differ=differ))
        print(rounds[-1])
    ratio = statistics.median(r["ratio"] for r in rounds)
    print(f"{args.questions} questions about {args.images} pictures: {ratio:.1f} times as fast")
    write_json(args.out, dict(info=run_info(), questions=args.questions, images=args.images,
        threads=torch.get_num_threads(), rounds=rounds, ratio=ratio))


if __name__ == "__main__":
    main()
