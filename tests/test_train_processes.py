"""DeepSpeed with two processes on a CPU: the same training as one process without it, resumed on another number of processes."""
import importlib.util, json, os, shutil, signal, sys
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")
import pytest, torch
from test_train import finish, flags, folder, losses, start, wait_for, weights  # noqa: F401 (folder is a fixture)

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None or shutil.which("g++") is None, reason="DeepSpeed or a C++ compiler is missing")]
COMMON = "--num_train_epochs 4 --save_steps 2".split()


def launch(folder, out, stage, processes, *more, launcher="torchrun", rows=24):
    "A command of several processes; all of them together see all rows in each step."
    command = {"torchrun": ["torchrun", "--standalone", "--nproc_per_node", str(processes), "--no-python"],
        "deepspeed": ["deepspeed", "--num_accelerators", str(processes), "--master_port", "29511", "--no_python"],
        "accelerate": ["accelerate", "launch", "--use_deepspeed", "--mixed_precision", "no", "--num_processes", str(processes), "--deepspeed_config_file", str(ROOT / f"scripts/deepspeed/{stage}.json"), "--no_python"]}[launcher]
    return start(flags(folder, out, "--deepspeed", ROOT / f"scripts/deepspeed/{stage}.json", "--per_device_train_batch_size", rows // processes, *COMMON, *more), command, DS_ACCELERATOR="cpu")


@pytest.fixture(scope="module")
def alone(folder):
    "The run of one process without DeepSpeed."
    code, text = finish(start(flags(folder, "alone", "--per_device_train_batch_size", 24, *COMMON))); assert code == 0, text
    return folder / "alone"


def same(a, b):
    assert losses(b) == pytest.approx(losses(a), rel=1e-4, abs=1e-5)
    one, other = weights(a), weights(b); assert one.keys() == other.keys()
    for name in one: torch.testing.assert_close(other[name].float(), one[name], rtol=1e-3, atol=2e-4, msg=lambda m: f"{name}: {m}")


@pytest.mark.parametrize("stage,launcher", [("zero2", "torchrun"), ("zero3", "deepspeed"), ("zero3_offload", "torchrun"), ("zero2", "accelerate")])
def test_two_processes_equal_one(folder, alone, stage, launcher):
    out = f"{stage}_{launcher}"
    code, text = finish(launch(folder, out, stage, 2, launcher=launcher)); assert code == 0, text[-4000:]
    same(alone, folder / out)
    assert json.loads((folder / out / "metrics.json").read_text())["processes"] == 2
    from transformers import AutoModelForImageTextToText
    _, info = AutoModelForImageTextToText.from_pretrained(folder / out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("stage,processes", [("zero2", 1), ("zero3", 1), ("zero3", 2)])
def test_resumed_on_other_processes(folder, alone, stage, processes):
    "Killed after the checkpoint of two processes; one (or two) go on."
    out = f"{stage}_killed_{processes}"
    process = launch(folder, out, stage, 2)
    wait_for(folder / out / "checkpoint-2" / "complete.json", process, 900)
    os.killpg(process.pid, signal.SIGKILL); process.communicate()
    shutil.rmtree(folder / out / "checkpoint-4", ignore_errors=True); (folder / out / "metrics.json").unlink(missing_ok=True)
    code, text = finish(launch(folder, out, stage, processes, "--resume")); assert code == 0, text[-4000:]
    same(alone, folder / out)


def test_deepspeed_switched_off_is_an_error(folder):
    code, text = finish(start(flags(folder, "off", "--deepspeed", ROOT / "scripts/deepspeed/zero2.json", *COMMON), ACCELERATE_USE_CPU="true", DS_ACCELERATOR="cpu"))
    assert code == 2 and "DeepSpeed was asked for and is not active" in text, text[-3000:]
