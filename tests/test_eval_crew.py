"`tita-eval run --actors`: workers of a Ray cluster ask what one process would, also when one of them is killed."
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
from ray_head import ray_head, workers

from tita.core import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
CODE = "from tita.eval.eval_cli import main; main()"
ASKED = "run", "world_color,world_pope_random,world_pope_popular", "--limit", "20", "--lam", "0,0.3"
TALKS = "run", "mt_bench", "--lam", "0", "--limit", "16", "--data"
with_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed: 'tita[ray]'")


def start(out, *args, asked=ASKED, **more):
    env = os.environ | {"TITA_PROGRESS": "0", "PYTHONPATH": str(ROOT)} | more
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", CODE, *asked, "--out", str(out), *args], env=env, **pipes)


def ended(process, code=0):
    out, err = process.communicate()
    assert process.returncode == code and "Traceback" not in out + err, out + err
    return out + err


def whole_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def samples(out):
    "All that was said and counted, by task and system."
    return {path.name: read_jsonl(path) for path in sorted((out/"samples").iterdir())}


def scores(out):
    results = json.loads((out/"results.json").read_text())
    assert all(asked["missing"] == 0 for s in results["systems"].values() for asked in s["asked"].values())
    return results["scores"]


def wait_for(lines, answers, process):
    "Until so many answers are whole in the file; the process must still be at it."
    while whole_lines(answers) < lines:
        assert process.poll() is None, process.communicate()
        time.sleep(.01)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    "The run of one process."
    out = tmp_path_factory.mktemp("alone")
    ended(start(out))
    return out


@pytest.fixture(scope="module")
def cluster():
    "The process at its head, and the environment of who uses it."
    with ray_head(28441) as (head, address):
        yield head, {"RAY_ADDRESS": address}


@pytest.mark.slow
@with_ray
def test_a_killed_worker_and_a_killed_run(alone, cluster, tmp_path):
    "Two workers, one killed: its job is done again. Then the run is killed, too, and asks only what is missing."
    head, place = cluster
    answers, whole = tmp_path/"answers.jsonl", whole_lines(alone/"answers.jsonl")
    command = "--actors", "2", "--batch", "4"
    first = start(tmp_path, *command, **place)
    wait_for(whole // 4, answers, first)
    workers(head, "MapWorker")[0].kill()
    wait_for(whole // 2, answers, first)
    first.kill()
    first.communicate()
    kept = whole_lines(answers)
    assert kept < whole, "it was killed too late"
    ended(start(tmp_path, *command, **place))
    rows = read_jsonl(answers)
    assert set(Counter(r["key"] for r in rows).values()) == {1} and len(rows) == whole
    assert samples(tmp_path) == samples(alone) and scores(tmp_path) == scores(alone)


@pytest.mark.slow
@with_ray
def test_conversations_whose_run_was_killed_between_two_turns(cluster, tmp_path):
    "Second questions go to the workers after the first answers that are in the file; each answer is there once."
    head, place = cluster
    folder = tmp_path/"data/mt_bench"
    folder.mkdir(parents=True)
    turns = [["Describe the image.", f"Is there {'a very, very' * i} red ball?"] for i in range(8)]
    rows = [dict(question_id=i, category="writing", turns=[f"{i}: {a}", b]) for i, (a, b) in enumerate(turns)]
    (folder/"question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = *TALKS, str(tmp_path/"data")
    ended(start(tmp_path/"alone", asked=asked))
    out = tmp_path/"crew"
    answers, whole, command = out/"answers.jsonl", whole_lines(tmp_path/"alone/answers.jsonl"), ("--actors", "2")
    first = start(out, *command, "--batch", "2", asked=asked, **place)
    wait_for(whole // 2 + 2, answers, first)
    first.kill()
    first.communicate()
    kept = whole_lines(answers)
    assert whole // 2 < kept < whole, "it was killed too late"
    ended(start(out, *command, asked=asked, **place))
    rows = read_jsonl(answers)
    assert set(Counter(r["key"] for r in rows).values()) == {1} and len(rows) == whole == 2 * 16
    assert samples(out) == samples(tmp_path/"alone")


def test_without_ray_the_cure_is_told(tmp_path):
    "Before anything is loaded."
    blocked = CODE.replace("from", "import sys; sys.modules['ray'] = None; from", 1)
    command = [sys.executable, "-c", blocked, *ASKED, "--out", str(tmp_path), "--actors", "2"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 2 and "pip install 'ray[data]'" in run.stderr, run.stdout + run.stderr
