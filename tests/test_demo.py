"The main job as a user runs it: other models on photographs, mistakes, Ctrl-C."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = [sys.executable, str(ROOT/"scripts"/"run_notebook.py"), str(ROOT/"nbs"/"runs"/"demo.ipynb")]
SMALL = "teach_scenes 8 teach_steps 2 probe_scenes 24 test_scenes 6 epochs 1 samples 1 max_new_tokens 8".split()
ENV = os.environ | {"TITA_PROGRESS": "0"}

def demo(out, *params):
    "The command that demo.sh runs."
    pairs = [*SMALL, *map(str, params), "out", str(out)]
    flags = [word for name, value in zip(pairs[::2], pairs[1::2]) for word in ("-p", name, value)]
    return [*RUN, str(out/"demo.ipynb"), *flags]

def started(*params):
    return subprocess.Popen(
        demo(*params), cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    "A tiny random LLaVA and reward in folders, photographs, and a question file about them."
    import skimage.data
    from tita.world.embedded import tiny_pair
    folder = tmp_path_factory.mktemp("mine")
    base, reward, processor = tiny_pair()
    for name, model in (("base", base), ("reward", reward)):
        model.save_pretrained(folder/name)
        processor.save_pretrained(folder/name)
    photos = sorted(p.name for p in Path(skimage.data.__file__).parent.iterdir() if p.suffix in (".png", ".jpg"))
    (folder/"images").mkdir()
    for p in photos:
        shutil.copy(Path(skimage.data.__file__).parent/p, folder/"images"/p)
    asked = dict(text="Describe the image."), dict(text="Is there a boat in the image?", answer="no")
    rows = [dict(question_id=f"{p}/{k}", image=p, **question) for p in photos for k, question in enumerate(asked)]
    (folder/"questions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder

def given(mine, **other):
    models = dict(base=mine/"base", reward=mine/"reward")
    rows = dict(images=mine/"images", questions=mine/"questions.jsonl")
    return [word for pair in (models | rows | other).items() for word in pair]

@pytest.mark.slow
def test_other_models_on_photographs(mine, tmp_path):
    run = subprocess.run(demo(tmp_path/"run", *given(mine)), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    metrics = json.loads((tmp_path/"run"/"metrics.json").read_text())
    assert {"base", "reward", "base_dpo", "ratio", "bounded", "vcd"} <= set(metrics["systems"])
    assert 0 <= metrics["shared"] <= 1 and metrics["guidance"]["form"] in ("ratio", "interpolate")
    assert json.loads((tmp_path/"run"/"before"/"metrics.json").read_text())["method"] == "distill"
    noted = json.loads((tmp_path/"run"/"reward"/"config.json").read_text())["distilled_from"]
    assert noted["shared"] == round(metrics["shared"], 4) and noted["images"] > 0
    assert metrics["systems"]["base"]["pope_random_accuracy"]["value"] is not None
    assert "<img src='data:image/" in (tmp_path/"run"/"report.html").read_text()

def test_mistakes_are_told_in_a_line(mine, tmp_path):
    whole = '{"question_id": 1, "image": "astronaut.png", "text": "?"}'
    (tmp_path/"broken.jsonl").write_text(whole + '\n{"question_id": 2,\n')
    shutil.copytree(mine/"base", tmp_path/"weightless", ignore=shutil.ignore_patterns("*.safetensors"))
    cases = {
        "broken.jsonl:2": given(mine, questions=tmp_path/"broken.jsonl"),
        "no weights": given(mine, reward=tmp_path/"weightless"), "together": ["base", mine/"base"],
        "lam = -1": ["lam", "-1"], "teach_steps = -1": ["teach_steps", "-1"]}
    running = [(why, started(tmp_path/str(i), *params)) for i, (why, params) in enumerate(cases.items())]
    for why, p in running:
        said = p.communicate(timeout=900)[0]
        assert p.returncode == 2 and why in said and "Traceback" not in said, said[-2000:]

@pytest.mark.slow
def test_interrupted_and_run_again(tmp_path):
    out = tmp_path/"run"
    p = started(out, "probe_scenes", 200)
    until = time.time() + 900
    while not (out/"clear.jsonl").exists() or not (out/"clear.jsonl").stat().st_size:
        assert p.poll() is None and time.time() < until, p.communicate()[0][-2000:]
        time.sleep(.1)
    p.send_signal(signal.SIGINT)
    said = p.communicate(timeout=600)[0]
    assert p.returncode == 130 and "Traceback" not in said, said[-2000:]
    before = (out/"clear.jsonl").read_text().splitlines()
    again = subprocess.run(demo(out, "probe_scenes", 200), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-2000:]
    rows = [json.loads(line) for line in (out/"clear.jsonl").read_text().splitlines()]
    assert len({(r["question_id"], r["view"]) for r in rows}) == len(rows) == 200 * 12
    assert (out/"clear.jsonl").read_text().startswith("\n".join(before[:-1]))
