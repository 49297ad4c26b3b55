"The reproduction as a user runs it: from a file of parameters, dry, killed and continued, with other models, on Slurm."
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import run_notebook
from test_demo import mine  # noqa: F401 (a fixture: a tiny base and reward in folders, photographs, questions)
from tita.core import TitaError
from tita.steps import notebook_defaults
from tita.studies.outline import prepare
from tita.studies.reproduction import Reproduction, problems

NOTEBOOK = "nbs/runs/reproduce.ipynb"
PARAMS = ROOT / "scripts/params"
WHOLE_JOBS = sorted(PARAMS.glob("*.yaml"))
FILES = WHOLE_JOBS + sorted((PARAMS / "smoke").glob("*.yaml"))
SMOKE = ROOT / "scripts/params/smoke/reproduce.yaml"
ENV = os.environ | {"TITA_PROGRESS": "0", "PYTHONPATH": str(ROOT)}


## Files of parameters

def notebook_of(file):
    "The notebook that a file's first line names."
    first = file.read_text().splitlines()[0]
    return next(word.rstrip(":,") for word in first.split() if word.startswith("nbs/runs/"))


@pytest.mark.parametrize("file", FILES, ids=lambda p: str(p.relative_to(PARAMS).with_suffix("")))
def test_every_file_fits_its_notebook(file):
    "Names, and values of the right kind; `out` is a folder of its own."
    given = run_notebook.parameters(str(ROOT / notebook_of(file)), [str(file)], [])
    assert given
    said = yaml.safe_load(file.read_text())
    assert said.get("out", f"runs/{file.stem}") == f"runs/{file.stem}"


def test_a_file_in_plain_sight_is_a_whole_job():
    "What `papermill nbs/runs/reproduce.ipynb runs/x.ipynb -f scripts/params/PAIR.yaml` takes lies on top."
    assert {f.stem for f in WHOLE_JOBS} >= {"llava15_7b", "llava15_13b", "qwen25_vl_7b", "qwen3_vl_8b", "internvl35_8b"}
    assert {notebook_of(f) for f in WHOLE_JOBS} == {NOTEBOOK}


@pytest.mark.parametrize("file", [*WHOLE_JOBS, SMOKE], ids=lambda p: p.stem)
def test_only_data_and_models_are_missing(file, monkeypatch):
    "Recipes are there, their fields exist, tasks and views are known: what is left is what a user downloads."
    monkeypatch.chdir(ROOT)
    settings = Reproduction(**yaml.safe_load(file.read_text()))
    downloads = [name for name in (settings.base, settings.reward, "data/") if name]
    other = [told for told in problems(settings) if not any(name in told for name in downloads)]
    assert not other, other


def test_the_notebook_says_what_the_module_says():
    told = {f.name: getattr(Reproduction(), f.name) for f in dataclasses.fields(Reproduction)}
    assert notebook_defaults(ROOT / NOTEBOOK) == told


def test_published_pairs_are_there():
    "Those that the sources name, each with its recipe."
    of = {f.stem: yaml.safe_load(f.read_text()) for f in FILES}
    named = {name: said for name, said in of.items() if "base" in said}
    bases = {name: tuple(said[k].split("/")[1] for k in ("base", "reward")) for name, said in named.items()}
    assert bases["llava15_7b"] == ("llava-1.5-7b-hf", "tiny-llava-v1-hf")
    assert bases["llava15_13b"] == ("llava-1.5-13b-hf", "tiny-llava-v1-hf")
    assert bases["qwen25_vl_7b"] == ("Qwen2.5-VL-7B-Instruct", "Qwen2.5-VL-3B-Instruct")
    assert bases["qwen3_vl_8b"] == ("Qwen3-VL-8B-Instruct", "Qwen3-VL-2B-Instruct")
    assert bases["internvl35_8b"] == ("InternVL3_5-8B-HF", "InternVL3_5-1B-HF")
    views = {name: of[f"llava15_7b_{name}"]["view"] for name in ("seva500", "seva800", "moco")}
    assert views == dict(seva500="diffusion-500", seva800="diffusion-800", moco="moco")


## Runs

def started(out, *params, target="executed.ipynb", file=SMOKE):
    "The command of a user, with the smoke's parameters."
    pairs = [*map(str, params), "out", str(out)]
    flags = [word for name, value in zip(pairs[::2], pairs[1::2]) for word in ("-p", name, value)]
    command = [sys.executable, "scripts/run_notebook.py", NOTEBOOK, str(out.parent / target), "-f", str(file), *flags]
    return subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(out, *params, **how):
    process = started(out, *params, **how)
    said = process.communicate(timeout=1800)[0]
    return process.returncode, said


def results(out):
    "What two equal runs share of metrics.json."
    found = json.loads((out / "metrics.json").read_text())
    return {k: v for k, v in found.items() if k not in ("run", "seconds", "settings")}


def ran(said):
    "Steps that ran, and those that were there already."
    found = re.findall(r"(\w+): (runs|goes on where|nothing that it depends)", said)
    return {name for name, what in found if what[0] != "n"}, {name for name, what in found if what[0] == "n"}


ALL = {"material", "teach", "distil", "agreement", "pairs", "dpo", "strength", "test"}


def test_papermill_itself_refuses_at_once(tmp_path):
    "Plain papermill only warns of an unknown name, and gives a list as text: the notebook looks, before any work."
    mistakes = dict(lamz="no parameter lamz; did you mean lams?", lams="it is a list, such as [0.25, 0.5, 1.0]")
    for given, why in mistakes.items():
        command = [sys.executable, "-m", "papermill", NOTEBOOK, str(tmp_path / "a.ipynb"), "-p", given, "[0.5, x]"]
        command += ["-p", "out", str(tmp_path / "run")]
        run = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
        assert run.returncode and why in run.stderr, run.stderr[-1500:]
    assert not (tmp_path / "run").exists()


def test_dry_run_writes_nothing_and_tells_all(tmp_path):
    code, said = run(tmp_path / "run", "dry_run", "true", "lams", "[0.5, 1]")
    assert code == 0, said[-2000:]
    assert not (tmp_path / "run").exists()
    assert all(f"{step}: would run" in said for step in ALL), said[-3000:]
    executed = json.loads((tmp_path / "executed.ipynb").read_text())
    tables = [o["data"]["text/markdown"] for c in executed["cells"] for o in c.get("outputs", []) if "data" in o
        and "text/markdown" in o["data"]]
    assert len(tables) == 1 and "| step | rows | tokens | operations | memory | disk | about |" in "".join(tables[0])
    assert "| teach | 432 |" in "".join(tables[0])


def test_mistakes_are_told_together(tmp_path):
    wrong = Reproduction(str(tmp_path / "run"), "no/base", "no/reward", "no.jsonl", view="difusion")
    with pytest.raises(TitaError) as e:
        prepare(wrong)
    told = "mistakes", "'difusion' is none of", "no.jsonl is not there", "images is missing", "no/base: cannot be"
    assert all(word in str(e.value) for word in told), e.value
    _, plan = prepare(dataclasses.replace(wrong, dry_run=True))
    assert "Before it can run" in plan.told and "no size in the name" in plan.told
    assert not (tmp_path / "run").exists()


def test_a_pair_that_is_not_here_is_counted(tmp_path):
    "A dry run needs neither models nor data: sizes come from names, a mix from what SeVa samples of it."
    said = yaml.safe_load((ROOT / "scripts/params/llava15_7b.yaml").read_text())
    run, plan = prepare(Reproduction(**said | dict(out=str(tmp_path / "run"), dry_run=True)))
    rows = {need.step: need for need in plan.needs}
    assert rows["teach"].rows == 36_000 and rows["dpo"].rows == 24_000
    assert rows["teach"].operations > 2 * 7e9 * rows["teach"].tokens
    assert 13e9 < rows["teach"].memory < 16e9 and "tiny-llava-v1-hf" in plan.told
    assert "cannot be downloaded" in plan.told and not (tmp_path / "run").exists()


def test_smoke_from_nothing_to_the_report(tmp_path):
    "Every step, with figures as they must be."
    out = tmp_path / "run"
    code, said = run(out)
    assert code == 0 and ran(said)[0] == ALL, said[-3000:]
    found = results(out)
    assert set(found["scores"]) == {"world_pope_adversarial", "world_caption"}
    base = found["scores"]["world_pope_adversarial"]["base"]
    assert 60 < base["accuracy"]["value"] <= 100 and base["unparsed"]["value"] == 0
    assert found["scores"]["world_caption"]["base"]["recall"]["value"] > 70
    assert found["distil"]["after"]["kl"] < found["distil"]["before"]["kl"]
    assert found["agreement"]["guidance"]["form"] in ("ratio", "interpolate") and 0 < found["agreement"]["shared"] < 1
    assert found["gains"]["base"] == {"world_pope_adversarial": 0, "world_caption": 0}
    assert found["dpo"]["rows"] == found["pairs"]["pairs"] > 20
    page = (out / "report.html").read_text()
    assert "difference [95%]" in page and "<img" in page and (tmp_path / "executed.html").stat().st_size > 10_000


@pytest.mark.slow
def test_same_seed_same_metrics(tmp_path):
    "Two runs from nothing; the same again runs nothing, and a parameter exactly the steps that depend on it."
    for name in "a", "b":
        code, said = run(tmp_path / name, target=f"{name}.ipynb")
        assert code == 0, said[-3000:]
    assert results(tmp_path / "a") == results(tmp_path / "b")
    code, said = run(tmp_path / "a", target="a.ipynb")
    assert code == 0 and ran(said) == (set(), ALL), said[-3000:]
    assert results(tmp_path / "a") == results(tmp_path / "b")
    last = {"dpo", "strength", "test"}
    code, said = run(tmp_path / "a", "rivals", "['vcd']", target="a.ipynb")
    assert code == 0 and ran(said)[0] == {"test"}, said[-3000:]
    assert "test: runs again, for this differs: rivals" in said
    assert "vcd" in results(tmp_path / "a")["scores"]["world_caption"]
    steps_of = {("dpo", "{'num_train_epochs': 2}"): last, ("view", "diffusion-500"): {"pairs"} | last}
    steps_of |= {("probe_scenes", "30"): {"material", "pairs"} | last}
    steps_of |= {("distil", "{'max_steps': 12, 'learning_rate': 4e-3}"): {"distil", "agreement", "pairs"} | last}
    steps_of |= {("seed", "2"): ALL}
    given = []
    for changed, steps in steps_of.items():  # on top of what was changed before: only the last state is kept
        given += changed
        code, said = run(tmp_path / "a", *given, target="a.ipynb")
        assert code == 0 and ran(said)[0] == steps, said[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill"])
def test_a_run_that_died_goes_on(tmp_path, how):
    out = tmp_path / "run"
    process = started(out, "teach_scenes", 300)
    until = time.time() + 600
    while not (said := [*out.glob("steps/teach-*/base_clear.jsonl")]) or said[0].stat().st_size < 1000:
        assert process.poll() is None and time.time() < until, process.communicate()[0][-2000:]
        time.sleep(.05)
    process.send_signal(how)
    process.communicate(timeout=600)
    until = time.time() + 60
    while how == signal.SIGKILL and not _is_free(out) and time.time() < until:  # its kernel sees that it is alone
        time.sleep(.2)
    before = said[0].read_text().splitlines()
    code, text = run(out, "teach_scenes", 300)
    assert code == 0 and "teach: goes on where it stopped" in text, text[-3000:]
    assert ran(text)[0] == ALL - {"material"}
    assert said[0].read_text().splitlines()[:len(before) - 1] == before[:-1]
    rows = [json.loads(line)["question_id"] for line in said[0].read_text().splitlines()]
    assert len(set(rows)) == len(rows) == 300 * 12


def _is_free(out):
    "Has the killed run's kernel gone?"
    from filelock import FileLock, Timeout
    try:
        with FileLock(out / ".lock", timeout=0):
            return True
    except Timeout:
        return False


@pytest.mark.slow
def test_other_models_their_questions_and_a_recipe(mine, tmp_path):  # noqa: F811
    "A pair in folders, photographs, a task of one's own, adapters by a recipe, the base trained beside it."
    asked = [json.loads(line) for line in (mine / "questions.jsonl").read_text().splitlines()]
    (mine / "images/boats.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked if "answer" in r))
    many = [r | {"question_id": f"{r['question_id']}/{k}", "text": f"{r['text']} {k}"} for r in asked for k in range(3)]
    rows = [{k: r[k] for k in ("question_id", "image", "text")} for r in many]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = dict(use_peft=True, lora_r=4, num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1e-3)
    (tmp_path / "lora.yaml").write_text(yaml.safe_dump(recipe))
    small = dict(max_steps=2, per_device_train_batch_size=8)
    lora = dict(config=str(tmp_path / "lora.yaml"), max_steps=2)
    given = dict(base=str(mine / "base"), reward=str(mine / "reward"), questions=str(tmp_path / "questions.jsonl"),
        images=str(mine / "images"), tasks="", include=str(mine / "images/boats.jsonl"), samples=1, max_new_tokens=6,
        distil=small, dpo=lora, dpo_base=lora, lams=[.5], rivals=["vcd"], valid_share=.4)
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(given))
    code, said = run(tmp_path / "run", file=tmp_path / "own.yaml")
    assert code == 0 and ran(said)[0] == ALL | {"dpo_base"}, said[-3000:]
    found = results(tmp_path / "run")
    assert {"base", "reward before DPO", "reward", "DPO of the base", "vcd"} <= set(found["scores"]["boats"])
    assert [*(tmp_path / "run").glob("steps/dpo-*/model/adapter_model.safetensors")]
    taught, = (tmp_path / "run").glob("steps/material-*/teach.jsonl")
    shown = [json.loads(line)["image"] for line in taught.read_text().splitlines()]
    shutil.copy(mine / "images" / shown[0], mine / "images" / shown[-1])
    code, said = run(tmp_path / "run", file=tmp_path / "own.yaml")
    assert "images" in said.split("teach: runs again, for this differs: ")[1].splitlines()[0]


## Slurm

SBATCH = """#!/bin/bash
# what sbatch does, on this machine: a copy of the script runs in the folder where it was submitted
copy=$(mktemp); cp "$1" "$copy"; shift
export SLURM_JOB_ID=7 SLURM_CPUS_PER_TASK=1 SLURM_SUBMIT_DIR=$PWD
exec bash "$copy" "$@"
"""
LONG = "from tita.steps import Steps\nimport time\nrun = Steps(out, {})\nrun('first', lambda folder: None)"
WAIT = "run('second', lambda folder: time.sleep(0 if (run.out/'again').exists() else 600))"


def cell(i, source, **metadata):
    return dict(cell_type="code", id=f"c{i}", metadata=metadata, source=source, outputs=[], execution_count=None)


def test_slurm_stops_and_queues_again_and_goes_on(tmp_path):
    "At its time limit a job is told to end: it is queued again, and its next start goes on."
    kernel = dict(name="python3", display_name="python3", language="python")
    cells = [cell(0, "out = ''", tags=["parameters"]), cell(1, LONG), cell(2, WAIT)]
    (tmp_path / "long.ipynb").write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4,
        nbformat_minor=5)))
    (tmp_path / "bin").mkdir()
    for name, text in dict(sbatch=SBATCH, scontrol=f"#!/bin/sh\necho \"$@\" >> {tmp_path}/asked\n").items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    out = tmp_path / "run"
    notebooks = str(tmp_path / "long.ipynb"), str(tmp_path / "done.ipynb")
    command = ["sbatch", "scripts/slurm_run.sh", *notebooks, "-p", "out", str(out)]
    env = ENV | {"PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    how = dict(cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    job = subprocess.Popen(command, **how)
    until = time.time() + 120
    while not [*out.glob("steps/second-*/began.json")]:
        assert job.poll() is None and time.time() < until, job.communicate()[0]
        time.sleep(.1)
    job.send_signal(signal.SIGTERM)
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 130 and (tmp_path / "asked").read_text() == "requeue 7\n", said
    (out / "again").touch()
    again = subprocess.run(command, **how | dict(env=env | {"SLURM_RESTART_COUNT": "1"}))
    assert again.returncode == 0 and "goes on where it stopped" in again.stdout, again.stdout
    assert "first: nothing that it depends on has changed" in again.stdout
    assert subprocess.run(command[:3], **how).returncode == 2


## The executed notebook is in the run's folder

def small_notebook(folder):
    "A run notebook with as little as one can have."
    new, last = nbformat.v4, "keep_notebook(out, globals())"
    cells = [new.new_code_cell('out = "run"', metadata=dict(tags=["parameters"])), new.new_code_cell("print(6 * 7)"),
        new.new_code_cell("from tita.records import keep_notebook"), new.new_code_cell(last)]
    nbformat.write(new.new_notebook(cells=cells, metadata=dict(kernelspec=KERNEL)), folder / "small.ipynb")
    (folder / "run").mkdir()


KERNEL = dict(name="python3", language="python", display_name="Python 3")
CALL = "import papermill; papermill.execute_notebook('small.ipynb', 'x.ipynb', dict(out='run'))"


@pytest.mark.parametrize("command, kept", [
    (["-m", "papermill", "small.ipynb", "x.ipynb"], True),
    (["-m", "papermill", "small.ipynb", "x.ipynb", "--cwd", "run", "-p", "out", "."], True),
    (["-m", "papermill", "small.ipynb", "x.ipynb", "--inject-output-path"], True),
    (["-c", CALL], False),
], ids=["papermill", "cwd", "injected", "from-Python"])
def test_papermill_keeps_notebook_and_page(tmp_path, command, kept):
    "Everything up to the last cell; where nobody tells its name, the notebook says so and ends well."
    small_notebook(tmp_path)
    env = ENV | {"PWD": str(tmp_path)}  # as a shell has it
    done = subprocess.run([sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    last = nbformat.read(tmp_path / "x.ipynb", 4).cells[-1].outputs[0].text
    if kept:
        assert "x.ipynb and x.html: the notebook up to this cell" in last
        copy = nbformat.read(tmp_path / "run/x.ipynb", 4)
        assert [c.outputs[0].text for c in copy.cells if c.source == "print(6 * 7)"] == ["42\n"]
        assert "42" in (tmp_path / "run/x.html").read_text()
    else:
        assert "nobody told where this notebook is written" in last and not [*(tmp_path / "run").iterdir()]


@pytest.mark.parametrize("name", "bench_api decode demo evaluate prepare_data reproduce train_reward".split())
def test_a_run_notebook_ends_by_keeping_itself(name):
    assert "keep_notebook(out, globals()" in nbformat.read(ROOT / f"nbs/runs/{name}.ipynb", 4).cells[-1].source


@pytest.mark.slow
def test_whole_job_by_papermill_alone(tmp_path):
    "As the documentation has it: papermill, the notebook, a file of parameters."
    command = ["-m", "papermill", NOTEBOOK, tmp_path / "x.ipynb", "-f", SMOKE, "-p", "out", tmp_path / "run"]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {p.name for p in (tmp_path / "run").iterdir()}
    assert found >= {"x.ipynb", "x.html", "run.json", "metrics.json", "report.html", "log.txt", "curves.png"}
    assert "x.html: the notebook up to this cell" in (tmp_path / "run/log.txt").read_text()
    assert "data:image/png" in (tmp_path / "run/x.html").read_text()
