"""Pairs per second and peak memory of PrefixSharedDPOTrainer against TRL's DPOTrainer, in one run.

A LLaVA with 6 layers and 576 image tokens, in seconds on a CPU; and a real one on a GPU:

    python scripts/bench_train.py --out results/bench_train.json
    python scripts/bench_train.py --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --lora 128 --batch 8

Model, rows and batches are the same. One optimizer step of each trainer in turn, several times over (so that what else
the machine does meets both), each with its own reference log-probabilities: TRL computes them in every step, we once
before. Both times are reported, ours with that pass spread over its epochs.
"""
import argparse, json, math, os, statistics, subprocess, sys, tempfile, time

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TITA_PROGRESS", "0")
import psutil, torch
from pathlib import Path
from PIL import Image
from tita.core import write_text


def synthetic(args):
    "A LLaVA of the real classes with random weights, and its processor."
    from transformers import (CLIPImageProcessorPil, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                              LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast)
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
    words += [f"w{i}" for i in range(args.vocab - 7)]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.add_special_tokens(words[:7])
    named = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tok = PreTrainedTokenizerFast(tokenizer_object=tok, **named)
    template = ("{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
                "{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}"
                "{{ ' </s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
                "{% if add_generation_prompt %}ASSISTANT:{% endif %}")
    side = args.grid * 14
    pixels = CLIPImageProcessorPil(size=dict(height=side, width=side), do_center_crop=False)
    processor = LlavaProcessor(pixels, tok, patch_size=14, vision_feature_select_strategy="default",
                               chat_template=template, image_token="<image>", num_additional_image_tokens=1)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=args.vision_hidden, intermediate_size=4 * args.vision_hidden, num_hidden_layers=args.vision_layers,
        num_attention_heads=args.vision_hidden // 32, image_size=side, patch_size=14)
    heads = args.hidden // 64
    text = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=8 * args.hidden // 3,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=4, vision_feature_layer=-2,
                         image_seq_length=args.grid ** 2)
    return LlavaForConditionalGeneration(config), processor


def rows(args, questions):
    "args.batch pairs about args.batch / questions images."
    g = torch.Generator().manual_seed(0)
    word = lambda n: " ".join(f"w{i}" for i in torch.randint(args.vocab - 7, (n,), generator=g).tolist())
    side, n = args.grid * 14, math.ceil(args.batch / questions)
    images = [Image.effect_noise((side, side), 60).convert("RGB") for _ in range(n)]
    say = lambda role, n: [dict(role=role, content=word(n))]
    return [dict(images=[images[i // questions]], prompt=say("user", args.question),
                 chosen=say("assistant", args.answer), rejected=say("assistant", args.answer))
            for i in range(args.batch)]


def as_dataset(pairs):
    from datasets import Dataset, Features, Image as ImageFeature, List, Value
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features(images=List(ImageFeature()), prompt=message, chosen=message, rejected=message)
    return Dataset.from_dict({k: [r[k] for r in pairs] for k in pairs[0]}, features=features)


def build(kind, args, model, processor, data, folder):
    import copy
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer
    from tita.train.dpo import PrefixSharedDPOConfig, PrefixSharedDPOTrainer
    cuda = torch.cuda.is_available()
    usual = dict(output_dir=f"{folder}/{kind}", per_device_train_batch_size=args.batch, learning_rate=1e-6, report_to=[],
                 use_cpu=not cuda, bf16=args.dtype == "bfloat16" and cuda,
                 gradient_checkpointing=args.gradient_checkpointing, dataloader_pin_memory=False)
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    peft = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules=targets) if args.lora else None
    model = copy.deepcopy(model)
    more = dict(train_dataset=data, processing_class=processor, peft_config=peft)
    if kind == "trl":
        for p in model.model.vision_tower.parameters():
            p.requires_grad_(False)
        reference = None if args.lora else copy.deepcopy(model)
        return DPOTrainer(model, reference, DPOConfig(max_length=None, **usual), **more)
    share = "image" if kind == "tree" else "pair"
    return PrefixSharedDPOTrainer(model, None, PrefixSharedDPOConfig(share=share, **usual), **more)


def step(trainer):
    "Collate, loss, backward, optimizer: seconds of wall time and of CPU."
    examples = [dict(trainer.train_dataset[i]) for i in range(len(trainer.train_dataset))]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    t, c = time.perf_counter(), time.process_time()
    inputs = trainer._prepare_inputs(trainer.data_collator(examples))
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - t, time.process_time() - c, loss.item()


def flops(trainer):
    "Floating-point operations of one step, counted by torch; those of our reference pass are counted apart."
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        step(trainer)
    return counter.get_total_flops()


def reference_flops(trainer):
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        reference_pass(trainer)
    return counter.get_total_flops()


def peak(kind, args, questions, model, processor):
    "Peak memory in MiB of building the trainer and one step, above the model; on a CPU in a process of its own."
    if not torch.cuda.is_available():
        argv = [a for a in sys.argv[1:]] + ["--memory", kind, "--questions", str(questions)]
        run = subprocess.run([sys.executable, __file__, *argv], check=True, capture_output=True, text=True)
        return float(run.stdout.split()[-1])
    with tempfile.TemporaryDirectory() as folder:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer = build(kind, args, model, processor, as_dataset(rows(args, questions)), folder)
        trainer.create_optimizer()
        step(trainer)
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def memory(args, model, processor):
    "In a process of its own: print the peak."
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(args.memory, args, model, processor, as_dataset(rows(args, args.questions[0])), folder)
        trainer.create_optimizer()
        step(trainer)
    high = next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))  # ru_maxrss would be the parent's
    print(high / 1024 - before / 2**20)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(layers=6, hidden=384, vocab=4000, grid=24, vision_layers=6, vision_hidden=128, question=24, answer=24,
                 batch=4, repeats=5, epochs=2, lora=0)
    for name, value in sizes.items():
        ap.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    ap.add_argument("--questions", type=int, nargs="+", default=[1, 2], help="pairs about one image")
    ap.add_argument("--model", help="folder or hub name in place of the synthetic one")
    ap.add_argument("--dtype", default="float32")
    ap.add_argument("--gradient-checkpointing", action="store_true")
    ap.add_argument("--out", help="where the figures go, as JSON")
    ap.add_argument("--memory", choices=["trl", "pair", "tree"], help=argparse.SUPPRESS)
    args = ap.parse_args()
    import datasets
    datasets.disable_progress_bars()
    from tita.core import run_info, write_json
    from tita.models import load_processor, load_vlm
    if args.model:
        model, processor = load_vlm(args.model, args.dtype), load_processor(args.model)
    else:
        model, processor = synthetic(args)
        model = model.to(getattr(torch, args.dtype)).to("cuda" if torch.cuda.is_available() else "cpu")
    if args.memory:
        return memory(args, model, processor)
    results = []
    for questions in args.questions:
        with tempfile.TemporaryDirectory() as folder:
            data, trainers = as_dataset(rows(args, questions)), {}
            for kind in ("trl", "pair", "tree"):
                trainers[kind] = build(kind, args, model, processor, data, folder)
                trainers[kind].create_optimizer()
                step(trainers[kind])
            times = {k: [] for k in trainers}
            for _ in range(args.repeats):
                for k, t in trainers.items():
                    times[k].append(step(t))
            seconds = {k: statistics.median(x[not torch.cuda.is_available()] for x in v) for k, v in times.items()}
            once = {k: reference_pass(t) if k != "trl" else 0.0 for k, t in trainers.items()}
            work = {k: flops(t) + (reference_flops(t) / args.epochs if k != "trl" else 0) for k, t in trainers.items()}
            rate = {k: args.batch / (seconds[k] + once[k] / args.epochs) for k in trainers}
            held = {k: peak(k, args, questions, model, processor) for k in trainers}
        ours = "pair", "tree"
        row = dict(questions=questions, pairs_per_second=rate, step_seconds=seconds, reference_seconds=once, flops=work,
                   peak_mib=held, attention_seconds=trainers["tree"].attention,
                   losses={k: v[0][2] for k, v in times.items()}, speedup={k: rate[k] / rate["trl"] for k in ours},
                   bound={k: work["trl"] / work[k] for k in ours})
        results.append(row)
        print(f"{questions} question(s) an image: " + ", ".join(f"{k} {rate[k]:.2f} pairs/s, {held[k]:.0f} MiB" for k in trainers)
            + f"; trees {row['speedup']['tree']:.2f}x over TRL (the count of operations: {row['bound']['tree']:.2f}x)"
            + (f"; attention to trees {costs(row)}" if row["attention_seconds"] else ""), flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "memory")}
    report = dict(settings=settings, time="wall" if torch.cuda.is_available() else "CPU", results=results,
                  info=run_info(), load=os.getloadavg()[0])
    if args.out:
        write_json(args.out, report)
        print(write_text(Path(args.out).with_suffix(".md"), table(report)))


TARGETS = {1: 2.2, 2: 3.5}


def costs(row):
    "What attention was measured to cost."
    return ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in row["attention_seconds"].items())


def table(report):
    "The figures in Markdown."
    s, info = report["settings"], report["info"]
    names = dict(trl="TRL's DPOTrainer", pair="one tree a pair", tree="one tree an image")
    what = s["model"] or f"LLaVA of {s['layers']} layers, width {s['hidden']}, {s['grid'] ** 2} image tokens, a tower of {s['vision_layers']} layers, random weights"
    lines = ["# Training: pairs per second and memory against TRL", "", f"`python scripts/bench_train.py`: {what}; questions of {s['question']} tokens, answers of {s['answer']}; {s['batch']} pairs in a batch, {s['dtype']}"
        + (f", LoRA {s['lora']}" if s["lora"] else "") + f"; the same rows and model for all three, steps in turn, the median of {s['repeats']}. {report['time']} time" + (f", one thread, on a machine that other work loaded with {report['load']:.1f}" if report["time"] == "CPU" and report["load"] > 1.5 else "")
        + f". Reference and tower are computed once for us, and that pass is spread over {s['epochs']} epochs; TRL computes both in every step. Peak memory is above the model's own.", "",
        "| pairs an image | trainer | pairs/s | over TRL | by the count of operations | target | peak memory, MiB |", "|---|---|---|---|---|---|---|"]
    for r in report["results"]:
        for k in names:
            over, bound = (r["speedup"].get(k), r["bound"].get(k)) if k != "trl" else (None, None)
            target = TARGETS.get(r["questions"]) if k == "tree" else None
            lines.append(f"| {r['questions']} | {names[k]} | {r['pairs_per_second'][k]:.2f} | " + " | ".join("" if v is None else f"{v:.2f}x" for v in (over, bound)) + f" | {'' if target is None else f'{target}x, ' + ('reached' if over >= target else 'not reached')} | {r['peak_mib'][k]:.0f} |")
    if measured := [f"with {r['questions']} an image {costs(r)}" for r in report["results"] if r["attention_seconds"]]:
        lines += ["", f"Attention to trees, all layers forward and backward with the mask (the faster was taken): {'; '.join(measured)}."]
    same = max(abs(r["losses"][k] - r["losses"]["trl"]) for r in report["results"] for k in ("pair", "tree"))
    return "\n".join(lines + ["", f"The losses of the first step differ by at most {same:.1e}. The count of operations is torch's own (matrix products and attention, forward and backward), TRL's over ours: what the speed-up would be if every operation took its time in all three. "
        f"Commit {(info['commit'] or 'unknown')[:12]}, {info['system']}, torch {info['versions'].get('torch')}, trl {info['versions'].get('trl')}."]) + "\n"


def reference_pass(trainer):
    "Seconds of the reference's log-probabilities and, with an empty cache, the tower for the same rows."
    trainer.cache.kept.clear()
    trainer.cache.bytes = 0
    examples = [dict(row) for row in trainer.train_dataset]
    batch = trainer._prepare_inputs(trainer.data_collator(examples))
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    t = clock()
    trainer.compute_ref_log_probs(trainer.model, batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - t


if __name__ == "__main__":
    main()
