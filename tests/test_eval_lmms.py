"The real lmms-eval asks a base and its reward, found by their entry point, a task of a folder of one's own."
import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.slow,
    pytest.mark.skipif(not importlib.util.find_spec("lmms_eval"), reason="lmms-eval is not installed: 'tita[lmms]'")]

COMMON = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
metadata: [{{version: 0.0}}]
"""
WRITTEN = """
doc_to_target: !function utils.word
generation_kwargs: {max_new_tokens: 4, temperature: 0}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
doc_to_choice: ["yes", "no"]
doc_to_target: target
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def word(doc):
    return ["yes", "no"][doc["target"]]
"""


@pytest.fixture(scope="module")
def asked():
    "Questions about four scenes, and how many of them the guided pair answers rightly by itself."
    from tita.decode.ask import load_decoder
    from tita.world.embedded import make_scenes
    asked = [(s.image, q.text, q.answer) for s in make_scenes(4) for q in s.questions if q.kind == "pope_adversarial"]
    images, questions, truths = map(list, zip(*asked))
    said = load_decoder(lam=.3).generate(images, questions, 4, temperature=0.)
    return asked, sum(o.text.strip() == t for o, t in zip(said, truths)) / len(asked)


@pytest.mark.parametrize("kind, rest, metric, more", [
    ("generate_until", WRITTEN, "exact_match,none", []),
    ("multiple_choice", CHOSEN, "acc,none", ["--force_simple"])])
def test_a_task_of_a_folder(kind, rest, metric, more, asked, tmp_path):
    from datasets import Dataset, Features, Image, Value
    rows, share = asked
    rows = [dict(image=image, question=text, target=["yes", "no"].index(truth)) for image, text, truth in rows]
    features = Features(dict(image=Image(), question=Value("string"), target=Value("int64")))
    Dataset.from_list(rows, features=features).to_parquet(tmp_path/"data.parquet")
    (tmp_path/"tasks").mkdir()
    (tmp_path/"tasks/utils.py").write_text(UTILS)
    task = COMMON.format(name="world", data=tmp_path/"data.parquet", kind=kind) + rest
    (tmp_path/"tasks/world.yaml").write_text(task)
    command = ["-m", "lmms_eval", "--model", "tita", "--model_args", "lam=0.3", "--tasks", "world", "--batch_size", "1",
        "--include_path", str(tmp_path/"tasks"), "--output_path", str(tmp_path/"out"), *more]
    env = os.environ | {"HF_HOME": str(tmp_path/"hf")}
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    [results] = (tmp_path/"out").rglob("*_results.json")
    assert json.loads(results.read_text())["results"]["world"][metric] == pytest.approx(share)
