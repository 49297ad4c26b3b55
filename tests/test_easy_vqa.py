"The tutorial on easy-VQA, run as a user runs it, on a data set of the same form."
import json, os, subprocess, sys
from pathlib import Path
import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
PATHS = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
ENV = os.environ | {"TITA_PROGRESS": "0", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": PATHS}
SMALL = dict(steps=6, teach_steps=40, probe_images=12, batch_size=32)

def like_easy_vqa(data):
    "A few images and questions in the files of the package."
    colors = "red", "blue", "green"
    for split, n in ("train", 48), ("test", 8):
        (data/split/"images").mkdir(parents=True)
        rows = []
        for i in range(n):
            color, side = colors[i % 3], 10 + i % 30
            image = Image.new("RGB", (64, 64), "white")
            ImageDraw.Draw(image).rectangle((5, 5, 5 + side, 5 + side), fill=color)
            image.save(data/split/"images"/f"{i}.png")
            rows += [[f"is there a {c} shape?", "yes" if c == color else "no", i] for c in colors]
            rows += [["what color is the shape?", color, i], ["what shape is in the image?", "rectangle", i],
                     ["is there not a circle?", "yes", i]]
        (data/split/"questions.json").write_text(json.dumps(rows))

def tutorial(folder, **params):
    named = dict(out=folder/"run", package=folder, results=folder/"results") | SMALL | params
    flat = [w for name, value in named.items() for w in ("-p", name, str(value))]
    command = [sys.executable, "scripts/run_notebook.py", "nbs/tutorials/easy_vqa.ipynb", str(folder/"done.ipynb")]
    return subprocess.run([*command, *flat], cwd=ROOT, env=ENV, capture_output=True, text=True)

@pytest.mark.slow
def test_easy_vqa_from_files_to_figures(tmp_path):
    "Every stage runs; nothing is set for the aligned base; the second time nothing is trained."
    like_easy_vqa(tmp_path/"easy_vqa"/"data")
    run = tutorial(tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path/"results"/"easy_vqa.json").read_text())
    assert found["parts"] == dict(taught=[24, 144], unlabelled=[24, 144], test=[8, 48])
    assert len(found["systems"]) == 9 and all(0 <= of["all"]["value"] <= 100 for of in found["systems"].values())
    assert "answer" not in (tmp_path/"run"/"unlabelled.jsonl").read_text()
    weights = tmp_path/"run"/"reward"/"model.safetensors"
    before = weights.stat().st_mtime_ns
    assert tutorial(tmp_path).returncode == 0 and weights.stat().st_mtime_ns == before

def test_easy_vqa_says_where_the_data_comes_from(tmp_path):
    run = tutorial(tmp_path)
    assert run.returncode == 2 and "pip install" in run.stderr and "Traceback" not in run.stderr, run.stderr[-2000:]
