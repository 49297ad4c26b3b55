"""run_dpo.sh and slurm_dpo.sh as users start them, to saved weights: every recipe with its DeepSpeed, on a CPU."""
import json
import os
import subprocess

import pytest
import torch
from test_train import ROOT, finish, flags, folder, losses, start, weights  # noqa: F401 (folder is a fixture)
from test_train_processes import pytestmark  # noqa: F401
from test_train_recipes import METHOD, RECIPES, arguments, written  # noqa: F401 (written is a fixture)
from tita.train.training_runs import free_port
from transformers import AutoModelForImageTextToText

LIMIT = 1800  # seconds; the first run compiles DeepSpeed's operators


def shell(script, folder, *more, **env):
    "A script of ours in a shell; exit code and what it said."
    usual = dict(IMAGES=f"{folder}/images", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", TITA_PROGRESS="0",
        MASTER_PORT=str(free_port()))
    command = ["bash", str(ROOT / "scripts" / script), *map(str, more)]
    run = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), **usual, **env}, cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=LIMIT)
    return run.returncode, run.stdout


def settings(folder, written, name):
    "Flags for a tiny model, without the pairs and images that the scripts give."
    argv = arguments(folder, written, name)
    pairs, images = argv.index("--pairs"), argv.index("--images")
    return argv[pairs + 1], argv[:pairs] + argv[images + 2:]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_through_run_dpo(name, folder, written, tmp_path):
    "Two processes, under the recipe's own ZeRO; what is saved loads again, and has moved."
    pairs, more = settings(folder, written, name)
    out = tmp_path / name
    launcher = "deepspeed" if name in ("tita", "mllm_sft_13b") else "torchrun"
    env = dict(PARAMS=str(RECIPES[name]), PAIRS=pairs, METHOD=METHOD[name], GPUS="0,1", LAUNCHER=launcher)
    code, text = shell("run_dpo.sh", folder, *more, "--output_dir", out, "--logging_steps", 1, **env)
    assert code == 0, text[-4000:]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["steps"] == 2 and all(0 < loss < 20 for loss in losses(out))
    if not (out / "adapter_model.safetensors").exists():
        _, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]


def test_zero3_with_offload_trains_as_one_process(folder, written, tmp_path):
    "TITA's recipe, ZeRO-3 with everything on the host: the weights are those of one process without DeepSpeed."
    pairs, more = settings(folder, written, "tita")
    same = ["--learning_rate", "1e-3", "--lr_scheduler_type", "constant", "--gradient_accumulation_steps", 1]
    env = dict(PARAMS=str(RECIPES["tita"]), PAIRS=pairs, GPUS="0,1")
    sizes = [[*more, *same, "--per_device_train_batch_size", n, "--output_dir", tmp_path / f"of{n}"] for n in (24, 12)]
    alone = ["dpo", "--config", RECIPES["tita"], "--pairs", pairs, "--images", folder / "images", "--deepspeed", ""]
    code, text = finish(start([str(a) for a in [*alone, *sizes[0]]]), LIMIT)
    assert code == 0, text[-4000:]
    code, text = shell("run_dpo.sh", folder, *sizes[1], **env)
    assert code == 0, text[-4000:]
    assert losses(tmp_path / "of12") == pytest.approx(losses(tmp_path / "of24"), rel=1e-4, abs=1e-5)
    one, other = weights(tmp_path / "of24"), weights(tmp_path / "of12")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name].float(), one[name].float(), rtol=1e-3, atol=2e-4)


SBATCH = """#!/bin/bash
# what sbatch does, on this machine: a copy of the script runs in the folder where it was submitted
copy=$(mktemp); cp "$1" "$copy"; shift
export SLURM_JOB_ID=7 SLURM_JOB_NODELIST='here[1-2]' SLURM_NNODES=2 SLURM_GPUS_ON_NODE=1 SLURM_CPUS_PER_TASK=1
export SLURM_SUBMIT_DIR=$PWD
exec bash "$copy" "$@"
"""
SRUN = """#!/bin/bash
# a task on each of two nodes, both of them here
[ "$1" = --kill-on-bad-exit=1 ] && shift
"$@" & first=$!
"$@" & second=$!
wait $first && wait $second
"""


def test_slurm_script(folder, written, tmp_path):
    "Two nodes that find each other, one process on each; a requeued job goes on."
    (tmp_path / "bin").mkdir()
    for name, text in dict(sbatch=SBATCH, srun=SRUN, scontrol="#!/bin/sh\necho localhost\n").items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    pairs, more = settings(folder, written, "seva_7b_diffusion500")
    env = dict(PARAMS=str(RECIPES["seva_7b_diffusion500"]), PAIRS=pairs, IMAGES=str(folder / "images"))
    path = f"{tmp_path / 'bin'}:{ROOT / '.venv/bin'}:{os.environ['PATH']}"
    env |= dict(PATH=path, PYTHONPATH=str(ROOT), TITA_PROGRESS="0")
    for restarts in "0", "1":
        env |= dict(DS_ACCELERATOR="cpu", SLURM_RESTART_COUNT=restarts, MASTER_PORT=str(free_port()))
        command = ["sbatch", "scripts/slurm_dpo.sh", *map(str, more), "--output_dir", str(tmp_path / "run")]
        run = subprocess.run(command, env={**os.environ, **env}, cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=LIMIT)
        assert run.returncode == 0, run.stdout[-4000:]
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["steps"] == 2


def test_deepspeed_without_a_launcher_is_one_process(folder, tmp_path):
    settings = ["--deepspeed", ROOT / "scripts/deepspeed/zero2.json", "--max_steps", 2]
    settings += ["--output_dir", tmp_path / "run"]
    code, text = finish(start(flags(folder, "unused", *settings), DS_ACCELERATOR="cpu"), LIMIT)
    assert code == 0 and "DeepSpeed with one process" in text, text[-4000:]
    assert json.loads((tmp_path / "run/metrics.json").read_text())["processes"] == 1
