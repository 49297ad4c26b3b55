"""Pairs per second and peak memory of PrefixSharedDPOTrainer against TRL's DPOTrainer, in one run.

A LLaVA with 6 layers and 576 image tokens, in seconds on a CPU; and a real one on a GPU:

    python scripts/bench_train.py --out results/bench_train.json
    python scripts/bench_train.py --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --lora 128 --batch 8

Model, rows and batches are the same. One optimizer step of each trainer in turn, several times over (so that what else
the machine does meets both), each with its own reference log-probabilities: TRL computes them in every step, we once
before. Both times are reported, ours with that pass spread over its epochs.
"""
import argparse
import copy
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TITA_PROGRESS", "0")
import psutil
import torch
from PIL import Image
from tita.core import write_text

NAMES = dict(trl="TRL's DPOTrainer", pair="one tree a pair", tree="one tree an image")
OURS = "pair", "tree"
TARGETS = {1: 2.2, 2: 3.5} # pairs an image -> speed-up of trees over TRL


def synthetic(args):
    "A LLaVA of the real classes with random weights, and its processor."
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    processor = synthetic_processor(args)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision_sizes(args), text_config=text_sizes(args), image_token_id=4,
                         vision_feature_layer=-2, image_seq_length=args.grid ** 2)
    return LlavaForConditionalGeneration(config), processor


def vision_sizes(args):
    from transformers import CLIPVisionConfig
    return CLIPVisionConfig(
        hidden_size=args.vision_hidden, intermediate_size=4 * args.vision_hidden, num_hidden_layers=args.vision_layers,
        num_attention_heads=args.vision_hidden // 32, image_size=side_of(args), patch_size=14)


def text_sizes(args):
    from transformers import LlamaConfig
    heads = args.hidden // 64
    return LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=8 * args.hidden // 3,
        num_hidden_layers=args.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def side_of(args) -> int: # pixels
    return args.grid * 14


TEMPLATE = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for c in m['content'] %}{{ '<image> ' if c['type'] == 'image' else c['text'] }}{% endfor %}"
    "{{ ' </s>' if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}")


def synthetic_processor(args):
    from transformers import CLIPImageProcessorPil, LlavaProcessor
    side = side_of(args)
    pixels = CLIPImageProcessorPil(size=dict(height=side, width=side), do_center_crop=False)
    return LlavaProcessor(
        pixels, word_tokenizer(args.vocab), patch_size=14, vision_feature_select_strategy="default",
        chat_template=TEMPLATE, image_token="<image>", num_additional_image_tokens=1)


def word_tokenizer(vocab: int):
    "A token for each of the words w0, w1, ..."
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]
    words = special + [f"w{i}" for i in range(vocab - len(special))]
    tok = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.add_special_tokens(special)
    named = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tok, **named)


def rows(args, questions):
    "args.batch pairs about args.batch / questions images."
    g = torch.Generator().manual_seed(0)
    words = lambda n: " ".join(f"w{i}" for i in torch.randint(args.vocab - 7, (n,), generator=g).tolist())
    say = lambda role, n: [dict(role=role, content=words(n))]
    size = side_of(args), side_of(args)
    images = [Image.effect_noise(size, 60).convert("RGB") for _ in range(math.ceil(args.batch / questions))]
    return [dict(images=[images[i // questions]], prompt=say("user", args.question),
                 chosen=say("assistant", args.answer), rejected=say("assistant", args.answer))
            for i in range(args.batch)]


def as_dataset(pairs):
    from datasets import Dataset, Features, Image as ImageFeature, List, Value
    message = List({"role": Value("string"), "content": Value("string")})
    features = Features(images=List(ImageFeature()), prompt=message, chosen=message, rejected=message)
    return Dataset.from_dict({k: [r[k] for r in pairs] for k in pairs[0]}, features=features)


def build(kind, args, model, processor, data, folder):
    "A trainer of its own copy of the model."
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer
    from tita.train.dpo import PrefixSharedDPOConfig, PrefixSharedDPOTrainer
    targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    peft = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules=targets) if args.lora else None
    more = dict(train_dataset=data, processing_class=processor, peft_config=peft)
    usual = usual_settings(args, f"{folder}/{kind}")
    model = copy.deepcopy(model)
    if kind == "trl":
        model.model.vision_tower.requires_grad_(False)
        reference = None if args.lora else copy.deepcopy(model)
        return DPOTrainer(model, reference, DPOConfig(max_length=None, **usual), **more)
    share = "image" if kind == "tree" else "pair"
    return PrefixSharedDPOTrainer(model, None, PrefixSharedDPOConfig(share=share, **usual), **more)


def usual_settings(args, folder: str) -> dict:
    "Of either trainer's config."
    cuda = torch.cuda.is_available()
    return dict(
        output_dir=folder, per_device_train_batch_size=args.batch, learning_rate=1e-6, report_to=[],
        use_cpu=not cuda, bf16=args.dtype == "bfloat16" and cuda,
        gradient_checkpointing=args.gradient_checkpointing, dataloader_pin_memory=False)


def wait():
    "Until the GPU, if there is one, is done."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step(trainer):
    "Collate, loss, backward, optimizer: seconds of wall time and of CPU, and the loss."
    examples = [dict(trainer.train_dataset[i]) for i in range(len(trainer.train_dataset))]
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    inputs = trainer._prepare_inputs(trainer.data_collator(examples))
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    wait()
    return time.perf_counter() - wall, time.process_time() - cpu, loss.item()


def reference_pass(trainer):
    "Seconds of the reference's log-probabilities and, with an empty cache, the tower for the same rows."
    trainer.cache.kept.clear()
    trainer.cache.bytes = 0
    examples = [dict(row) for row in trainer.train_dataset]
    batch = trainer._prepare_inputs(trainer.data_collator(examples))
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    start = clock()
    trainer.compute_ref_log_probs(trainer.model, batch)
    wait()
    return clock() - start


def flops(work, trainer) -> int:
    "Floating-point operations of a step or of a reference pass, counted by torch."
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        work(trainer)
    return counter.get_total_flops()


def warm_trainer(*args):
    "A trainer (see `build`) that has made a step."
    trainer = build(*args)
    trainer.create_optimizer()
    step(trainer)
    return trainer


def one_step(kind, args, questions, model, processor):
    "Of a trainer that is made for it."
    with tempfile.TemporaryDirectory() as folder:
        warm_trainer(kind, args, model, processor, as_dataset(rows(args, questions)), folder)


def peak(kind, args, questions, model, processor):
    "Peak memory in MiB of building the trainer and one step, above the model; on a CPU in a process of its own."
    if not torch.cuda.is_available():
        argv = sys.argv[1:] + ["--memory", kind, "--questions", str(questions)]
        run = subprocess.run([sys.executable, __file__, *argv], check=True, capture_output=True, text=True)
        return float(run.stdout.split()[-1])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    one_step(kind, args, questions, model, processor)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def memory(args, model, processor):
    "In a process of its own: print the peak."
    before = psutil.Process().memory_info().rss
    one_step(args.memory, args, args.questions[0], model, processor)
    print(highest() / 1024 - before / 2**20)


def highest() -> int: # KiB
    "Most memory that this process has held; `ru_maxrss` would be the parent's."
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def parse():
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
    ap.add_argument("--memory", choices=list(NAMES), help=argparse.SUPPRESS)
    return ap.parse_args()


def load(args):
    "The model and its processor."
    from tita.models import load_processor, load_vlm
    if args.model:
        return load_vlm(args.model, args.dtype), load_processor(args.model)
    model, processor = synthetic(args)
    return model.to(getattr(torch, args.dtype)).to("cuda" if torch.cuda.is_available() else "cpu"), processor


def main():
    import datasets
    from tita.core import run_info, write_json
    args = parse()
    datasets.disable_progress_bars()
    model, processor = load(args)
    if args.memory:
        return memory(args, model, processor)
    results = []
    for questions in args.questions:
        results.append(compare(args, questions, model, processor))
        print(in_short(results[-1]), flush=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "memory")}
    report = dict(settings=settings, time="wall" if torch.cuda.is_available() else "CPU", results=results,
                  info=run_info(), load=os.getloadavg()[0])
    if args.out:
        write_json(args.out, report)
        print(write_text(Path(args.out).with_suffix(".md"), table(report)))


def compare(args, questions: int, model, processor) -> dict:
    "All trainers on the same rows, with so many questions about an image."
    with tempfile.TemporaryDirectory() as folder:
        data = as_dataset(rows(args, questions))
        trainers = {kind: warm_trainer(kind, args, model, processor, data, folder) for kind in NAMES}
        steps = take_turns(trainers, args.repeats)
        once = {k: reference_pass(trainers[k]) if k in OURS else 0.0 for k in trainers}
        work = {k: flops(step, trainers[k]) for k in trainers}
        for kind in OURS:
            work[kind] += flops(reference_pass, trainers[kind]) / args.epochs
        held = {k: peak(k, args, questions, model, processor) for k in trainers}
    seconds = {k: statistics.median(map(counted, done)) for k, done in steps.items()}
    rate = {k: args.batch / (seconds[k] + once[k] / args.epochs) for k in trainers}
    first_losses = {k: done[0][2] for k, done in steps.items()}
    return dict(
        questions=questions, pairs_per_second=rate, step_seconds=seconds, reference_seconds=once, flops=work,
        peak_mib=held, attention_seconds=trainers["tree"].attention, losses=first_losses,
        speedup={k: rate[k] / rate["trl"] for k in OURS}, bound={k: work["trl"] / work[k] for k in OURS})


def take_turns(trainers: dict, repeats: int) -> dict[str, list]:
    "Steps of each trainer."
    steps = {kind: [] for kind in trainers}
    for _ in range(repeats):
        for kind, trainer in trainers.items():
            steps[kind].append(step(trainer))
    return steps


def counted(done: tuple) -> float:
    "The seconds of a step that count: wall time with a GPU, else CPU."
    wall, cpu, _ = done
    return wall if torch.cuda.is_available() else cpu


def in_short(row: dict) -> str:
    rates = ", ".join(f"{k} {v:.2f} pairs/s, {row['peak_mib'][k]:.0f} MiB" for k, v in row["pairs_per_second"].items())
    count = f"the count of operations: {row['bound']['tree']:.2f}x"
    said = [f"{row['questions']} question(s) an image: {rates}"]
    said.append(f"trees {row['speedup']['tree']:.2f}x over TRL ({count})")
    if row["attention_seconds"]:
        said.append(f"attention to trees {costs(row)}")
    return "; ".join(said)


def costs(row):
    "What attention was measured to cost."
    return ", ".join(f"{k} {v * 1e3:.2f} ms" for k, v in row["attention_seconds"].items())


def table(report):
    "The figures in Markdown."
    results = report["results"]
    paragraphs = ["# Training: pairs per second and memory against TRL", how_made(report), "\n".join([
        "| pairs an image | trainer | pairs/s | over TRL | by the count of operations | target | peak memory, MiB |",
        "|---|---|---|---|---|---|---|",
        *(table_row(row, kind) for row in results for kind in NAMES)])]
    if measured := [f"with {r['questions']} an image {costs(r)}" for r in results if r["attention_seconds"]]:
        paragraphs.append("Attention to trees, all layers forward and backward with the mask (the faster was taken): "
            f"{'; '.join(measured)}.")
    return "\n\n".join([*paragraphs, closing(report)]) + "\n"


def how_made(report) -> str:
    "What was measured, and how."
    s = report["settings"]
    synthetic = (f"LLaVA of {s['layers']} layers, width {s['hidden']}, {s['grid'] ** 2} image tokens, "
        f"a tower of {s['vision_layers']} layers, random weights")
    lora = f", LoRA {s['lora']}" if s["lora"] else ""
    busy = report["time"] == "CPU" and report["load"] > 1.5
    load = f", one thread, on a machine that other work loaded with {report['load']:.1f}" if busy else ""
    return (f"`python scripts/bench_train.py`: {s['model'] or synthetic}; questions of {s['question']} tokens, "
        f"answers of {s['answer']}; {s['batch']} pairs in a batch, {s['dtype']}{lora}; the same rows and model for all "
        f"three, steps in turn, the median of {s['repeats']}. {report['time']} time{load}. Reference and tower are "
        f"computed once for us, and that pass is spread over {s['epochs']} epochs; TRL computes both in every step. "
        "Peak memory is above the model's own.")


def table_row(row: dict, kind: str) -> str:
    times = lambda ratios: f"{ratios[kind]:.2f}x" if kind in ratios else ""
    cells = [row["questions"], NAMES[kind], f"{row['pairs_per_second'][kind]:.2f}"]
    cells += [times(row["speedup"]), times(row["bound"]), goal(row, kind), f"{row['peak_mib'][kind]:.0f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def goal(row: dict, kind: str) -> str:
    "What was to be reached, and whether it was."
    target = TARGETS.get(row["questions"])
    if kind != "tree" or target is None:
        return ""
    return f"{target}x, {'reached' if row['speedup'][kind] >= target else 'not reached'}"


def closing(report) -> str:
    "How far the trainers agree, what an operation is, and on what it ran."
    info = report["info"]
    same = max(abs(r["losses"][k] - r["losses"]["trl"]) for r in report["results"] for k in OURS)
    return (f"The losses of the first step differ by at most {same:.1e}. The count of operations is torch's own "
        "(matrix products and attention, forward and backward), TRL's over ours: what the speed-up would be if every "
        f"operation took its time in all three. Commit {(info['commit'] or 'unknown')[:12]}, {info['system']}, "
        f"torch {info['versions'].get('torch')}, trl {info['versions'].get('trl')}.")


if __name__ == "__main__":
    main()
