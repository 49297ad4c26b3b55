"The run notebook of reward training and the study of rewards, as a user starts them."
import json, os, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
PATHS = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
ENV = os.environ | {"TITA_PROGRESS": "0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": PATHS}

def notebook(out, *params):
    flat = [w for name, value in zip(params[::2], params[1::2]) for w in ("-p", name, str(value))]
    command = [sys.executable, "scripts/run_notebook.py", "nbs/runs/train_reward.ipynb", str(out/"executed.ipynb")]
    return subprocess.run([*command, "-p", "out", str(out), *flat], cwd=ROOT, env=ENV, capture_output=True, text=True)

def outputs(out):
    return [o for c in json.loads((out/"executed.ipynb").read_text())["cells"] for o in c.get("outputs", [])]

def printed(out):
    return "".join("".join(o.get("text", [])) for o in outputs(out))

@pytest.mark.slow
def test_train_reward_notebook(tmp_path):
    "Pairs, the command with its log, curves and measures; the second time nothing is trained."
    out = tmp_path/"run"
    small = ("scenes", 24, "epochs", 1, "batch_size", 32, "held_out", .3)
    run = notebook(out, *small)
    assert run.returncode == 0, run.stderr[-3000:]
    metrics = json.loads((out/"metrics.json").read_text())
    said = printed(out)
    measures = metrics["measures"]
    assert metrics["steps"] > 0 and 0 <= measures["pairs"]["value"] <= 100 and 0 <= measures["mentions"]["auc"] <= 1
    assert "tita-train dpo --model_name_or_path" in said  # the command
    assert f"{out}/model: loss" in said  # the last line of its log
    assert sum("image/png" in o.get("data", {}) for o in outputs(out)) == 2
    weights = out/"model"/"model.safetensors"
    before = weights.stat().st_mtime_ns
    assert notebook(out, *small).returncode == 0 and weights.stat().st_mtime_ns == before

def test_train_reward_notebook_tells_mistakes(tmp_path):
    (tmp_path/"broken.jsonl").write_text('{"prompt": "?", "chosen": "a"\n')
    broken = "pairs", tmp_path/"broken.jsonl"
    cases = {
        ("method", "ppo"): "is none of dpo, sft, distill", broken: "say what to train",
        (*broken, "model", "none/such"): "broken.jsonl:1"}
    for params, why in cases.items():
        run = notebook(tmp_path/"bad", *params)
        assert run.returncode == 2 and why in run.stderr and "Traceback" not in run.stderr, run.stderr[-2000:]
        for f in (tmp_path/"bad").glob("*.json"):
            f.unlink()

@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "distill"])
def test_train_reward_notebook_methods(method, tmp_path):
    run = notebook(tmp_path/"run", "method", method, "scenes", 24, "epochs", 1, "batch_size", 32)
    assert run.returncode == 0, run.stderr[-3000:]
    metrics = json.loads((tmp_path/"run"/"metrics.json").read_text())
    assert metrics["method"] == method and metrics["steps"] > 0

@pytest.mark.slow
def test_train_reward_notebook_parts_pictures_inside_a_file(tmp_path):
    "Pairs of a Parquet file whose pictures are in it: some are kept for measuring, and both parts are read again."
    from tita.data.sources import write_parquet
    from tita.world.embedded import make_scenes, world_folder
    rows = []
    for i, scene in enumerate(make_scenes(24, seed=3)):
        scene.image.save(tmp_path/f"{i}.png")
        rows += [dict(question_id=f"{i}-{j}", image=f"{i}.png", prompt=q.text, chosen=q.answer, rejected="maybe")
            for j, q in enumerate(scene.questions[1:3])]
    file, out = write_parquet(rows, tmp_path/"pairs.parquet", tmp_path, embed=True), tmp_path/"run"
    named = "pairs", file, "model", world_folder()/"seed0"/"reward", "held_out", .3
    run = notebook(out, *named, "flags", "--max_steps 2 --per_device_train_batch_size 4 --logging_steps 1")
    assert run.returncode == 0, run.stderr[-3000:]
    measured = json.loads((out/"metrics.json").read_text())
    assert 0 <= measured["measures"]["pairs"]["value"] <= 100 and measured["steps"] == 2
    assert {f.suffix for f in (out/"data").glob("*0.*")} == {".parquet"}

@pytest.mark.slow
def test_study_of_rewards(tmp_path):
    "Small: all parts run, and what is there is used the second time."
    small = "--scenes 40 --presence 3 --test 6 --valid 12 --epochs 1 --distill-steps 2 --distill-scenes 16".split()
    folders = ["--out", tmp_path/"results", "--runs", tmp_path/"runs"]
    command = [sys.executable, "scripts/study_reward.py", *small, *folders]
    run = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path/"results"/"study_reward.json").read_text())
    text = (tmp_path/"results"/"study_reward.md").read_text()
    methods = {"before", "sft", "rejection_sampling", "steerlm", "dpo"}
    assert len(found["grid"]) == 10 and set(found["baselines"]["alone"]) == methods and "this uses labels" in text
    assert (tmp_path/"results"/"study_reward.png").read_bytes().startswith(b"\x89PNG")
    again = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert again.returncode == 0
    second = json.loads((tmp_path/"results"/"study_reward.json").read_text())
    assert second["grid"] == found["grid"] and second["baselines"] == found["baselines"]

@pytest.mark.slow
def test_study_of_the_world(tmp_path):
    "Small: settings are chosen, written down and tested, rows added; no settings, or others, are refused by name."
    folders = ["--runs", tmp_path/"runs", "--out", tmp_path/"results"]
    small = ["--seed", "0", "1", "--pairs", "6", "--rivals", *folders]
    def study(what, *more):
        command = [sys.executable, "scripts/study_world.py", what, *map(str, [*small, *more])]
        return subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    early = study("test", "--scenes", 6)
    assert early.returncode == 2 and "choose" in early.stderr and "Traceback" not in early.stderr, early.stderr[-2000:]
    for what, more in (("choose", ("--valid", 6)), ("test", ("--scenes", 6))):
        run = study(what, *more)
        assert run.returncode == 0, run.stderr[-3000:]
    other = study("choose", "--valid", 7, "--systems", "sft")
    assert other.returncode == 2 and "--valid 6, not 7" in other.stderr, other.stderr[-2000:]
    first = json.loads((tmp_path/"results"/"study_world.json").read_text())
    for what, more in (("choose", ("--valid", 6)), ("test", ("--scenes", 6))):
        run = study(what, *more, "--systems", "sft")
        assert run.returncode == 0, run.stderr[-3000:]
    chosen = json.loads((tmp_path/"results"/"choose_default.json").read_text())["chosen"]
    found = json.loads((tmp_path/"results"/"study_world.json").read_text())
    assert "sft" not in first["summed"] and found["summed"].keys() == {"sft"} | first["summed"].keys()
    assert found["summed"]["aligned"] == first["summed"]["aligned"]
    assert found["chosen"] == chosen and {"base", "aligned", "foreign", "vcd", "best_of"} <= set(found["summed"])
    assert all(cell["delta"] == 0 for told in found["seeds"].values() for cell in told["systems"]["base"].values())

@pytest.mark.slow
def test_study_of_rounds(tmp_path):
    "Small: every reward is made, guides, and is told beside the default; the same command again trains nothing."
    folders = ["--runs", tmp_path/"runs", "--out", tmp_path/"results"]
    command = [sys.executable, "scripts/study_rounds.py", "--seed", "0", "--pairs", "6", "--scenes", "6", *folders]
    for _ in range(2):
        run = subprocess.run([*map(str, command)], cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path/"results"/"study_rounds.json").read_text())
    rewards = {"after", "of_base", "more", "on_policy", "base_dpo", "normed", "desensitised", "weighted", "anchored"}
    assert {row["name"] for row in found["rows"]} == rewards and "DPO: " not in run.stderr
    same = next(row for row in found["rows"] if row["name"] == "after")
    assert all(cell["delta"] == 0 for cell in same["cells"]["after"]["0"].values())
