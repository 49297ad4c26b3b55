"""Training as users start it: every recipe in scripts/params/train, what tita-data writes, and what a mistake costs."""
import json
from pathlib import Path

import pytest
from test_train import ROOT, finish, flags, folder, losses, start, weights  # noqa: F401 (folder is a fixture)
from tita.data.data_cli import convert
from tita.train.recipes import main, training_rows

RECIPES = {p.stem: p for p in sorted((ROOT / "scripts/params/train").glob("*.yaml"))}
METHOD = {name: "dpo" if name.startswith(("tita", "seva", "mllm_dpo")) else "sft" for name in RECIPES}
PAIRS, ANSWERS = ("jsonl", "parquet", "seva", "mllm", "trl"), ("llava", "sft", "rejection", "steerlm")


@pytest.fixture(scope="module")
def written(folder):
    "What `tita-data convert` writes, by its name: from pairs, from answers and from scored answers."
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    asked = [dict(question_id=p["question_id"], image=p["image"], text=p["prompt"]) for p in pairs]
    answers = [q | dict(view="clean", seed=0, model="m", answer=p["chosen"]) for q, p in zip(asked, pairs)]
    good, poor = ({a: n for a in "helpfulness correctness coherence complexity verbosity".split()} for n in (4, 1))
    both = [[dict(answer=p[k], scores=s, view="clean", seed=n, sample=n, model="m")
        for n, (k, s) in enumerate((("chosen", good), ("rejected", poor)))] for p in pairs]
    scored = [q | dict(model="judge", answers=two) for q, two in zip(asked, both)]
    sources = dict.fromkeys(PAIRS, "pairs.jsonl") | dict.fromkeys(ANSWERS, "scored.jsonl") | dict(llava="answers.jsonl")
    for name, rows in (("answers", answers), ("scored", scored)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    suffix = dict(jsonl=".jsonl", parquet=".parquet", trl="")
    made = {to: folder / f"as_{to}{suffix.get(to, '.json')}" for to in sources}
    for to, path in made.items():
        convert(folder / sources[to], path, to, folder / "images")
    return made


def arguments(folder, written, name):
    "A recipe with a tiny model in place of the hub's, and without what only a GPU has."
    kind = {"tita": "seva", "seva_7b": "seva", "mllm_dpo": "mllm"}
    kind |= {f"mllm_{to}": to for to in ANSWERS}
    pairs = written[next(to for start, to in kind.items() if name.startswith(start))]
    more = f"--model_name_or_path {folder}/model --pairs {pairs} --images {folder}/images --bf16 false --tf32 false"
    return [*more.split(), "--max_steps", "2", "--report_to", "none", "--save_strategy", "no"]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains(name, folder, written, monkeypatch, tmp_path):
    "As it stands, from another folder, but for DeepSpeed, which has its own tests."
    monkeypatch.chdir(tmp_path)
    out = tmp_path / name
    tiny = arguments(folder, written, name)
    main([METHOD[name], "--config", str(RECIPES[name]), *tiny, "--deepspeed", "", "--output_dir", str(out)])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 2 and all(0 < loss < 20 for loss in losses(out))
    assert (out / "adapter_model.safetensors").exists() or weights(out)


@pytest.mark.parametrize("name", RECIPES)
def test_paths_of_a_recipe_count_from_the_repository(name, monkeypatch, tmp_path):
    from tita.train.recipes import read_settings
    monkeypatch.chdir(tmp_path)
    settings = read_settings(RECIPES[name])
    assert Path(settings["deepspeed"]).is_file() and settings["output_dir"].startswith(f"{ROOT}/checkpoints/")


def test_paths_of_a_run_count_from_the_repository(tmp_path, monkeypatch):
    "In the YAML of a run notebook; what is no path stays as it is."
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from run_notebook import mapping
    (tmp_path / "repository/.git").mkdir(parents=True)
    (tmp_path / "repository/data").mkdir()
    (tmp_path / "repository/data/a.jsonl").touch()
    file = tmp_path / "repository/p.yaml"
    file.write_text("out: runs/a\npairs: data/a.jsonl data/b.jsonl\nmodel: hub/name\nmethod: dpo\nepochs: 2\n")
    root = file.resolve().parent
    wanted = dict(out=f"{root}/runs/a", pairs=f"{root}/data/a.jsonl data/b.jsonl", model="hub/name", method="dpo")
    wanted["epochs"] = 2
    monkeypatch.chdir(tmp_path)
    assert mapping("repository/p.yaml") == wanted


def texts(rows, *names):
    return sorted(tuple(row[n] if n != "image" else Path(row["image"]).name for n in names) for row in rows)


@pytest.mark.parametrize("to", PAIRS)
def test_pairs_that_tita_data_writes_train(to, folder, written, tmp_path):
    "Each writer's file is what was converted, and dpo and sft take a step on it."
    rows = training_rows(written[to], folder / "images")
    names = ("prompt", "chosen", "rejected") if to in ("trl", "parquet") else ("image", "prompt", "chosen", "rejected")
    said = [[m if isinstance(m, str) else m[0]["content"] for m in (r[n] for n in names[-3:])] for r in rows]
    assert len(rows) == 24 and all(isinstance(t, str) and t for texts in said for t in texts)
    if "image" in names:
        wanted = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
        assert texts(rows, *names) == texts(wanted, *names)
    for method in "dpo", "sft":
        argv = flags(folder, "unused", "--max_steps", 1, "--output_dir", tmp_path / method, "--pairs", written[to])
        main([method, *argv[1:]])
        assert json.loads((tmp_path / method / "metrics.json").read_text())["data"]["rows"] == 24


@pytest.mark.parametrize("to", ANSWERS)
def test_answers_that_tita_data_writes_train(to, folder, written, tmp_path):
    rows = training_rows(written[to], folder / "images", ("completion",))
    assert len(rows) == (48 if to == "steerlm" else 24)
    argv = flags(folder, "unused", "--max_steps", 1, "--output_dir", tmp_path / "run", "--pairs", written[to])
    main(["sft", *argv[1:]])
    assert json.loads((tmp_path / "run/metrics.json").read_text())["steps"] == 1


def test_held_out_pairs_are_a_curve(folder, tmp_path):
    "Ten points without a word about when, as many as were asked for with one."
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    for name, part in (("train", lines[:18]), ("held", lines[18:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    usual = ["--pairs", tmp_path / "train.jsonl", "--eval_pairs", tmp_path / "held.jsonl", "--num_train_epochs", 4]
    for more, points in (((), 10), (("--eval_strategy", "epoch"), 4)):
        out = tmp_path / f"run{points}"
        main(flags(folder, "unused", *usual, "--output_dir", out, "--per_device_train_batch_size", 6, *more))
        metrics = json.loads((out / "metrics.json").read_text())
        curve = metrics["held_out"]
        assert 0 <= points - len(curve) <= 4 and curve[-1]["step"] == metrics["steps"] == 12
        assert all({"loss", "rewards/margins", "rewards/accuracies"} <= set(row) for row in curve)
        assert "held-out rows" in (out / "README.md").read_text()


def refused(capsys, argv) -> str:
    "What is said about a command that is a mistake."
    with pytest.raises(SystemExit) as exit:
        main([str(a) for a in argv])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and "error: " in said, said
    return said


def test_mistakes_are_told_before_a_model_is_loaded(folder, tmp_path, capsys, monkeypatch):
    "By file and line, in the words of the command line."
    import tita.train.recipes
    monkeypatch.setattr(tita.train.recipes, "load_parts", lambda *args: pytest.fail("a model was loaded"))
    pair = dict(image="0.png", prompt="?", chosen="a", rejected="b")
    (folder / "images/torn.png").write_text("no image")
    files = dict(equal=pair | dict(rejected="a"))
    files |= dict(torn=pair | dict(image="torn.png"), lost=pair | dict(image="lost.png"))
    for name, row in files.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/note.txt").write_text("mine")
    cases = {("--pairs", tmp_path / "equal.jsonl"): ["equal.jsonl:1: ", "chosen and rejected are equal"],
        ("--pairs", tmp_path / "torn.jsonl"): ["torn.jsonl:1: ", "not an image"],
        ("--pairs", tmp_path / "lost.jsonl"): ["lost.jsonl:1: ", "'lost.png' is not in"],
        ("--pairs", tmp_path / "none.jsonl"): ["none.jsonl: no such file"],
        ("--eval_pairs", tmp_path / "equal.jsonl"): ["equal.jsonl:1: "],
        ("--output_dir", tmp_path / "used"): ["not empty", "--resume"],
        ("--eval_strategy", "steps"): ["--eval_strategy", "--eval_pairs"],
        ("--deepspeed", tmp_path / "none.json"): ["none.json"]}
    for more, wanted in cases.items():
        said = refused(capsys, flags(folder, "unused", *more))
        assert all(w in said for w in wanted) and "Traceback" not in said, (more, said)


def test_rows_that_are_too_long_are_told_by_file_and_line(folder, tmp_path, capsys):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows[4]["chosen"] = " ".join(["yes"] * 60)
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    limits = ["--pairs", tmp_path / "long.jsonl", "--max_length", 60, "--output_dir", tmp_path / "run"]
    said = refused(capsys, flags(folder, "unused", *limits))
    assert "1 of 24 rows are longer than 60 tokens" in said and "long.jsonl:5: " in said and "--too_long drop" in said


def test_one_bad_row_costs_itself(folder, tmp_path, capsys):
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows[2]["rejected"] = ""
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    main(flags(folder, "unused", "--pairs", tmp_path / "bad.jsonl", "--output_dir", tmp_path / "run", "--max_steps", 1))
    assert json.loads((tmp_path / "run/metrics.json").read_text())["data"]["rows"] == 23
    assert "bad.jsonl:3: " in capsys.readouterr().err


def test_progress_is_quiet_where_it_is_asked_to_be(folder, tmp_path):
    "No library's bar is left, with a held-out pass and all."
    held_out = ["--eval_pairs", folder / "pairs.jsonl"]
    argv = flags(folder, "unused", "--output_dir", tmp_path / "run", "--max_steps", 2, *held_out)
    code, text = finish(start(argv, TITA_PROGRESS="0", TQDM_DISABLE=""))
    assert code == 0 and "%|" not in text and "it/s" not in text and "?it" not in text, text


@pytest.mark.parametrize("method", ["dpo", "sft", "distill"])
def test_help_shows_ours_first(method, capsys):
    main([method, "--help"])
    short = capsys.readouterr().out
    main([method, "--help-all"])
    full = capsys.readouterr().out
    assert short.index("--pairs") < short.index("--share") < short.index("--learning_rate")
    assert len(short.splitlines()) < 140
    assert "--adam_beta1" not in short and "--adam_beta1" in full and len(full.splitlines()) > 400
    assert "--help-all" in short


def test_a_finished_run_stays(folder, tmp_path):
    "The same command again changes nothing."
    argv = flags(folder, "unused", "--output_dir", tmp_path / "run", "--max_steps", 1)
    main(argv)
    before = (tmp_path / "run/metrics.json").read_text()
    main([*argv, "--resume"])
    assert (tmp_path / "run/metrics.json").read_text() == before
