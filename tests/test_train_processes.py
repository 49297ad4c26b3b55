"""DeepSpeed with two processes on a CPU: the training of one process without it, resumed on another number of them."""
import importlib.util, json, os, shutil, signal, subprocess, sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
import pytest, torch
from safetensors.torch import load_file
from test_train import finish, flags, folder, losses, start, wait_for, weights  # noqa: F401 (folder is a fixture)
from tita.train.training_runs import free_port

ROOT = Path(__file__).resolve().parent.parent
MISSING = importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING, reason="DeepSpeed or a C++ compiler is missing")]
TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node", "2", "--no-python"]
COMMON = "--num_train_epochs 4 --save_steps 2".split()


def launch(folder, out, stage, processes, *more, launcher="torchrun", rows=24):
    "A command of several processes; all of them together see all rows in each step."
    settings = ROOT / f"scripts/deepspeed/{stage}.json"
    n = str(processes)
    command = {"torchrun": ["torchrun", "--standalone", "--nproc_per_node", n, "--no-python"],
        "deepspeed": ["deepspeed", "--num_accelerators", n, "--master_port", str(free_port()), "--no_python"],
        "accelerate": ["accelerate", "launch", "--use_deepspeed", "--mixed_precision", "no", "--num_processes", n,
            "--deepspeed_config_file", str(settings), "--no_python"]}[launcher]
    batch = ["--deepspeed", settings, "--per_device_train_batch_size", rows // processes]
    return start(flags(folder, out, *batch, *COMMON, *more), command, DS_ACCELERATOR="cpu")


@pytest.fixture(scope="module")
def alone(folder):
    "The run of one process without DeepSpeed."
    code, text = finish(start(flags(folder, "alone", "--per_device_train_batch_size", 24, *COMMON)))
    assert code == 0, text
    return folder / "alone"


def same(a, b):
    assert losses(b) == pytest.approx(losses(a), rel=1e-4, abs=1e-5)
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name].float(), one[name], rtol=1e-3, atol=2e-4, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("stage,launcher",
    [("zero2", "torchrun"), ("zero3", "deepspeed"), ("zero3_offload", "torchrun"), ("zero2", "accelerate")])
def test_two_processes_equal_one(folder, alone, stage, launcher):
    out = f"{stage}_{launcher}"
    code, text = finish(launch(folder, out, stage, 2, "--measure_attention", "true", launcher=launcher))
    assert code == 0, text[-4000:]
    same(alone, folder / out)
    metrics = json.loads((folder / out / "metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["attention_seconds"]["sdpa"] > 0
    from transformers import AutoModelForImageTextToText
    _, info = AutoModelForImageTextToText.from_pretrained(folder / out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("stage,processes", [("zero2", 1), ("zero3", 1), ("zero3", 2)])
def test_resumed_on_other_processes(folder, alone, stage, processes):
    "Killed after the checkpoint of two processes; one (or two) go on."
    out = f"{stage}_killed_{processes}"
    process = launch(folder, out, stage, 2)
    wait_for(folder / out / "checkpoint-2" / "complete.json", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    shutil.rmtree(folder / out / "checkpoint-4", ignore_errors=True)
    (folder / out / "metrics.json").unlink(missing_ok=True)
    code, text = finish(launch(folder, out, stage, processes, "--resume"))
    assert code == 0, text[-4000:]
    same(alone, folder / out)


def test_deepspeed_switched_off_is_an_error(folder):
    argv = flags(folder, "off", "--deepspeed", ROOT / "scripts/deepspeed/zero2.json", *COMMON)
    code, text = finish(start(argv, ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu"))
    assert code == 2 and "DeepSpeed was asked for and is not active" in text, text[-3000:]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_gradients_equal_trl_under_zero(stage, tmp_path):
    "Two families, with and without LoRA: loss and gradient of TRL's trainer, two processes."
    there = Path(sys.executable)
    env = dict(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", TITA_PROGRESS="0", HF_HUB_OFFLINE="1",
        PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", PATH=f"{there.parent}:{os.environ['PATH']}")  # where ninja is
    command = [there.with_name("torchrun"), *TORCHRUN[1:-1], ROOT / "tests/zero_worker.py", stage, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    found = json.loads((tmp_path / f"{stage}.json").read_text())
    assert len(found) == 4
    for name, far in found.items():
        assert far["names"] and far["scale"] > 0, (name, far)
        assert far["loss"] < 1e-5 and far["margin"] < 1e-5 and far["gradient"] < 1e-5, (name, far)


def test_lora_under_zero3(folder):
    "An adapter, trained by two processes and by one without DeepSpeed."
    lora = "--use_peft --lora_r 4 --lora_dropout 0".split()
    code, text = finish(start(flags(folder, "lora", "--per_device_train_batch_size", 24, *COMMON, *lora)))
    assert code == 0, text
    code, text = finish(launch(folder, "lora_zero3", "zero3", 2, *lora))
    assert code == 0, text[-4000:]
    assert losses(folder / "lora_zero3") == pytest.approx(losses(folder / "lora"), rel=1e-4, abs=1e-5)
    one, other = (load_file(folder / out / "adapter_model.safetensors") for out in ("lora", "lora_zero3"))
    assert one.keys() == other.keys() and any("multi_modal_projector" in k for k in one)
    for name in one:
        found, wanted = other[name].float(), one[name].float()
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-4, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_distill_of_two_processes(folder, stage):
    "The teacher is recorded by the first process and read by both; KL and acceptance before and after."
    from tita.world.embedded import tiny_pair
    base, _, processor = tiny_pair()
    base.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    rows = [json.loads(l) for l in (folder / "pairs.jsonl").read_text().splitlines()]
    said = [dict(question_id=r["question_id"], image=r["image"], text=r["prompt"], answer=r["chosen"]) for r in rows]
    lines = [json.dumps(r | dict(view="clean", seed=0)) + "\n" for r in said]
    (folder / "answers.jsonl").write_text("".join(lines))
    settings = ["--deepspeed", ROOT / f"scripts/deepspeed/{stage}.json", "--per_device_train_batch_size", 12]
    argv = flags(folder, f"distill_{stage}", "--base", folder / "base", *settings, "--num_train_epochs", 10,
        "--held_out", 0.3, "--top_k", 16)
    argv[0], argv[argv.index("--pairs") + 1] = "distill", str(folder / "answers.jsonl")
    code, text = finish(start(argv, TORCHRUN, DS_ACCELERATOR="cpu"))
    assert code == 0, text[-4000:]
    metrics = json.loads((folder / f"distill_{stage}" / "metrics.json").read_text())
    assert metrics["after"]["kl"] < metrics["before"]["kl"] and metrics["processes"] == 2


def test_two_processes_without_deepspeed(folder, alone):
    argv = flags(folder, "ddp", "--per_device_train_batch_size", 12, *COMMON, "--use_cpu")
    code, text = finish(start(argv, TORCHRUN))
    assert code == 0, text[-4000:]
    same(alone, folder / "ddp")
