#!/usr/bin/env python3
"""Rows per second of tita's generation against SeVa's way: the same model, rows, views and noise, in one run.

    python scripts/bench_generate.py                                   the embedded world's base and reward
    python scripts/bench_generate.py --model llava-hf/llava-1.5-7b-hf --questions q.jsonl --images DIR

SeVa's way is one row at a time and one view at a time: open the image, process it, add noise, generate with batch
size 1. The two ways take turns, so that both see the same machine; the ratio of each round is what counts. Exit code 1
if the ratio is below --least.
"""
import argparse, os, statistics, sys, tempfile, time
from pathlib import Path

def sevas_way(model, processor, questions, images, views, max_new_tokens, seed):
    "One row at a time, one view at a time."
    import torch
    from tita.views import parse_view, view_seed
    from tita.core import open_image
    from tita.models import chat_prompt
    from tita.rows import find_image
    out = {}
    for view in map(parse_view, views):
        for q in questions:
            s = view_seed(seed, view.name, q["image"])
            image = view.image(open_image(find_image(images, q["image"])), s)
            prompt = chat_prompt(processor, q["text"])
            opened = prompt.startswith(processor.tokenizer.bos_token or "\0")
            inputs = processor(images=image, text=prompt, return_tensors="pt", add_special_tokens=not opened)
            if view.on == "tensor":
                inputs["pixel_values"] = view.tensor(inputs["pixel_values"], [s])
            for k, v in inputs.items():
                inputs[k] = v.to(model.device, model.dtype if v.is_floating_point() else None)
            with torch.inference_mode():
                pad = processor.tokenizer.pad_token_id
                ids = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad)
            new = ids[0, inputs["input_ids"].shape[1]:]
            out[q["question_id"], view.name] = processor.decode(new, skip_special_tokens=True).strip()
    return out

def our_way(model, processor, questions, images, views, max_new_tokens, seed, batch_size):
    "All views in one pass."
    from tita.data.answers import answer_key, generate_answers
    settings = dict(batch_size=batch_size, max_new_tokens=max_new_tokens, seed=seed)
    with tempfile.TemporaryDirectory() as tmp:
        rows = generate_answers(model, processor, questions, images, views, Path(tmp)/"answers.jsonl", **settings)
    return {answer_key(r)[:2]: r["answer"] for r in rows}

def world_rows(n, folder):
    "Eight presence questions and a caption about each scene, and its image as a file."
    from tita.world.embedded import make_scenes
    rows = []
    for i, scene in enumerate(make_scenes(-(-n // 9), seed=11, split="train")):
        scene.image.save(folder/f"{i}.png")
        presence = [q for q in scene.questions if q.kind.startswith("pope")][:8]
        wanted = presence + [q for q in scene.questions if q.kind == "caption"]
        rows += [dict(question_id=f"{i}-{k}", image=f"{i}.png", text=q.text) for k, q in enumerate(wanted)]
    return rows[:n]

def compare(model, processor, questions, images, args):
    "Rounds in turn: rows a second of both ways, their ratio, and how many answers agree."
    import torch
    views, n = args.views.split(","), len(questions) * len(args.views.split(","))
    few = questions[:args.few]
    times = {"seva": [], "tita": []}
    sync = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    given = model, processor, few, images, views, args.max_new_tokens, args.seed
    sevas_way(*given[:2], few[:4], *given[3:])
    our_way(*given[:2], few[:4], *given[3:], args.batch_size)
    for _ in range(args.rounds):
        t = time.perf_counter()
        one = sevas_way(*given)
        sync()
        times["seva"].append(len(one) / (time.perf_counter() - t))
        t = time.perf_counter()
        many = our_way(*given[:2], questions, *given[3:], args.batch_size)
        sync()
        times["tita"].append(n / (time.perf_counter() - t))
    ratios = [b / a for a, b in zip(*times.values())]
    speed = {f"{way}_rows_per_s": round(statistics.median(rates), 1) for way, rates in times.items()}
    ratio = {"ratio": round(statistics.median(ratios), 2), "ratios": [round(r, 2) for r in ratios]}
    equal = {"equal_answers": sum(many[k] == v for k, v in one.items()), "compared": len(one)}
    return {"rows": n, "rows_seva": len(one)} | speed | ratio | equal

def machine():
    "What the figures were taken on: processor, cores, GPU, and how busy it was with other things."
    import torch
    from tita.records import processor_name
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    busy = {"threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1)}
    return {"cpu": processor_name(), "cores": os.cpu_count(), "gpu": gpu} | busy

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", help="folder or hub name [default: base and reward of the embedded world]")
    p.add_argument("--questions")
    p.add_argument("--images")
    p.add_argument("--rows", type=int, default=720, help="questions for tita's way")
    p.add_argument("--few", type=int, default=90, help="of them for SeVa's way, which is slow")
    p.add_argument("--views", default="clean,diffusion-800")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--batch-size", type=int, default=128)
    p.add_argument("--max-new-tokens", type=int, default=48)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", default="auto")
    p.add_argument("--least", type=float, help="ratio below which to exit with 1 [default: 3, with a GPU 8]")
    p.add_argument("--out", help="also write the figures there, JSON")
    args = p.parse_args()
    import torch
    from tita.core import TitaError, run_info, write_json
    from tita.models import load_processor, load_vlm
    from tita.data.sources import read_questions
    from tita.world.embedded import world_folder
    least = args.least or (8 if torch.cuda.is_available() else 3)
    if args.model and not (args.questions and args.images):
        p.error("--model needs --questions and --images")
    results, where = {}, machine()
    with tempfile.TemporaryDirectory() as tmp:
        if args.questions:
            questions, images = read_questions(args.questions)[:args.rows], Path(args.images)
        else:
            questions, images = world_rows(args.rows, Path(tmp)), Path(tmp)
        world = {f"world {n}": world_folder()/"seed0"/n for n in ("base", "reward")}
        models = {args.model: args.model} if args.model else world
        try:
            for name, folder in models.items():
                model, processor = load_vlm(folder, dtype=args.dtype), load_processor(folder)
                r = results[name] = compare(model, processor, questions, images, args)
                speed = f"SeVa's way {r['seva_rows_per_s']} rows/s, tita {r['tita_rows_per_s']} rows/s"
                equal = f"{r['equal_answers']} of {r['compared']} answers equal"
                print(f"{name}: {speed}, ratio {r['ratio']} {r['ratios']}; {equal}", flush=True)
        except TitaError as e:
            sys.exit(f"error: {e}")
    if args.out:
        made = {"machine": where, "views": args.views, "batch_size": args.batch_size, "run": run_info()}
        write_json(args.out, {"results": results} | made)
    if slow := [n for n, r in results.items() if r["ratio"] < least]:
        sys.exit(f"below {least}: {', '.join(slow)}")

if __name__ == "__main__":
    main()
