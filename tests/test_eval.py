"`tita-eval` as a user starts it: killed and resumed, over an endpoint, with what is given wrongly."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tita.api.standin import Persona, StandIn
from tita.core import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
CODE = "from tita.eval.eval_cli import main; main()"


def start(*args, **kwargs):
    env = os.environ | {"TITA_PROGRESS": "0", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", CODE, *map(str, args)], env=env, **pipes, **kwargs)


def tita_eval(*args, code=0):
    process = start(*args)
    out, err = process.communicate()
    assert process.returncode == code, out + err
    return out + err


SLOW = '''
import time
from tita.eval.tasks import Task, yes_no_scores, register
def score(rows, parser="find"):
    return yes_no_scores(rows, parser)
rows = [dict(question_id=i, image=None, text=f"Is there a {w} in the image?", truth="yes") for i, w in
    enumerate("ball boat fish star sun house car lamp tree flag cup book key clock pen".split())]
TASK = Task("mine", "1", "a task of one's own", lambda folder: rows, lambda r: r["text"], score, parsers=("find",))
'''


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    "A run that was killed while it wrote goes on: what was answered is not asked again, and the result is the same."
    (tmp_path/"mine.py").write_text(SLOW)
    args = ["run", "mine", "--include", tmp_path/"mine.py", "--lam", "0"]
    tita_eval(*args, "--out", tmp_path/"whole")
    lines = (tmp_path/"whole/answers.jsonl").read_text().splitlines(True)
    (tmp_path/"part").mkdir()
    (tmp_path/"part/answers.jsonl").write_text("".join(lines[:7]) + lines[7][:20])
    said = tita_eval(*args, "--out", tmp_path/"part")
    kept = (tmp_path/"part/answers.jsonl").read_text().splitlines(True)
    assert kept[:7] == lines[:7] and sorted(kept) == sorted(lines)
    whole, part = (json.loads((tmp_path/r/"results.json").read_text()) for r in ("whole", "part"))
    assert whole["scores"] == part["scores"] and "NOT ANSWERED" not in said
    counted = [r["systems"]["base"]["asked"]["mine"]["forwards"] for r in (whole, part)]
    assert counted[1] < counted[0]


@pytest.mark.slow
def test_interrupted_by_a_signal(tmp_path):
    "Ctrl-C tells how to go on, and the same command does."
    process = start("run", "world_caption", "--out", tmp_path, "--lam", "0")
    while process.poll() is None and not (tmp_path/"answers.jsonl").exists():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "run the same command again" in err
    assert "world_caption" in tita_eval("run", "world_caption", "--limit", 5, "--out", tmp_path, "--lam", "0")


ABOUT = """
import json
from tita.eval.eval_cli import Options, local_systems
from tita.eval.systems import BASELINES
options = Options(lam="0,0.3,default", baselines=",".join(BASELINES), best_of=2, sentences=2)
print(json.dumps({s.name: s.about for s in local_systems(options)}))
"""


def test_what_answers_depend_on_is_the_same_in_another_process():
    "Or a run that goes on would ask everything again: every baseline and search tells itself without an address."
    env = os.environ | {"TITA_PROGRESS": "0", "PYTHONPATH": str(ROOT)}
    one, other = (subprocess.run([sys.executable, "-c", ABOUT], env=env, capture_output=True, text=True).stdout
        for _ in range(2))
    told = json.loads(one)
    assert one == other and len(told) == 4 + 6 + 2 and " at 0x" not in one
    assert len({json.dumps(about) for about in told.values()}) == len(told)


def test_over_an_endpoint(tmp_path):
    "The same face for a server; its failures are told and counted as wrong."
    with StandIn() as server:
        asked = "--limit", 4, "--out", tmp_path, "--endpoint", server.url, "--model", "stand-in"
        said = tita_eval("run", "world_color", *asked)
    assert "world_color" in said and (tmp_path/"answers.jsonl").read_text().count("\n") == 4


def test_every_answer_is_on_the_disk_before_the_next(tmp_path, monkeypatch):
    "Not only with the operating system: the file is synced after each row."
    from tita.eval.eval_runs import Run, predict
    from tita.eval.evaluation import Said
    from tita.eval.systems import System
    from tita.eval.tasks import TASKS, task_questions
    on_disk, file, sync = [0], tmp_path/"answers.jsonl", os.fsync
    def note(fd):
        sync(fd)
        if file.exists() and os.path.samestat(os.fstat(fd), file.stat()):
            on_disk.append(file.read_bytes().count(b"\n"))
    def answers(rows, **settings):
        for i, row in enumerate(rows):
            assert on_disk[-1] == i
            yield Said("yes", None, row)
    monkeypatch.setattr(os, "fsync", note)
    questions, _ = task_questions(TASKS["world_pope_random"], limit=5)
    counted = predict(Run(tmp_path), TASKS["world_pope_random"], System("it", answers, {}), questions)
    assert on_disk == [0, 1, 2, 3, 4, 5] and counted["missing"] == 0


@pytest.mark.slow
def test_killed_without_a_warning(tmp_path):
    "SIGKILL: at most what was on its way is lost, and only that is asked again."
    with StandIn(models={"slow": Persona(delay=.15)}) as server:
        args = "run", "world_count", "--limit", 40, "--out", tmp_path, "--endpoint", server.url, "--model", "slow"
        process, file = start(*args), tmp_path/"answers.jsonl"
        while process.poll() is None and not (file.exists() and file.read_bytes().count(b"\n") > 8):
            time.sleep(.01)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        kept, asked = file.read_bytes().rpartition(b"\n")[0].split(b"\n"), len(server.log)
        assert 8 < len(kept) < 40 and asked - len(kept) <= 8
        said = tita_eval(*args)
        assert len(server.log) - asked == 40 - len(kept) and "NOT ANSWERED" not in said
    assert file.read_bytes().split(b"\n")[:len(kept)] == kept and file.read_bytes().count(b"\n") == 40


@pytest.mark.slow
def test_language_alone_stands_in_the_same_table(tmp_path):
    "Questions without a picture, with and without guidance, beside those with one."
    said = tita_eval("run", "world_text_only,world_color", "--limit", 12, "--lam", "0,0.5", "--out", tmp_path)
    found = json.loads((tmp_path/"results.json").read_text())
    for task in ("world_text_only", "world_color"):
        assert list(found["scores"][task]) == ["base", "λ=0.5", "reward alone"]
    assert "world_text_only (version 1; 12 questions about 12 images)" in said
    rows = read_jsonl(tmp_path/"samples/base__world_text_only.jsonl")
    assert {r["image"] for r in rows} == {None} and [r["kind"] for r in rows[:2]] == ["caption", "pope"]


SAMPLES = [
    dict(question_id=3, image="a/b.jpg", text="What?", scene=0, truth="", answer="A dog."),
    dict(question_id=12, image="c.png", text="Where?", scene=1, truth="", answer="b\n(B) on the left, isn't it?"),
    dict(question_id=7, image="d.jpg", text="How?", scene=2, truth="", answer="\N{EMPTY SET} not answered")]
FORMS = dict(
    mmvet={"v1_3": "A dog.", "v1_12": "b\n(B) on the left, isn't it?", "v1_7": ""},
    vizwiz=[dict(image="b.jpg", answer="dog"), dict(image="c.png", answer="b b on left isnt it"),
        dict(image="d.jpg", answer="")],
    vqav2=[dict(question_id=3, answer="dog"), dict(question_id=12, answer="b b on left isnt it"),
        dict(question_id=7, answer="")],
    seed=[dict(question_id=i, prediction=p) for i, p in ((3, "A"), (12, "B"), (7, ""))])


@pytest.mark.parametrize("form", FORMS)
def test_what_a_benchmarks_server_gets(form, tmp_path):
    "Every field of every row; a missing answer is an empty one, never our mark for it."
    from tita.eval.eval_runs import write_submission
    path = write_submission(SAMPLES, form, tmp_path/"file")
    text = path.read_text(encoding="utf-8")
    assert (list(map(json.loads, text.splitlines())) if form == "seed" else json.loads(text)) == FORMS[form]
    assert "\N{EMPTY SET}" not in text and "\\u2205" not in text


def test_mmbenchs_table(tmp_path):
    "LLaVA's xlsx: the asked table without pictures and hints, `prediction` behind the options, rows in its order."
    openpyxl = pytest.importorskip("openpyxl")
    from tita.eval.eval_runs import write_submission
    head = "index question hint A B C D answer category image source l2-category comment split".split()
    rows = [["12", "Where?", "-", "up", "down", "", "", "A", "place", "B64" * 90000, "web", "l2", "-", "dev"],
        ["3", 'What "is" it?', "-", "dog", "cat", "cow", "owl", "B", "kind", "B64", "web", "l2", "-", "dev"],
        ["99", "Who?", "-", "he", "she", "", "", "A", "kind", "B64", "web", "l2", "-", "dev"]]
    (tmp_path/"mmb.tsv").write_text("\n".join("\t".join(r) for r in (head, *rows)))
    path = write_submission(SAMPLES, "mmbench", tmp_path/"m.xlsx", tmp_path/"mmb.tsv")
    sheet = [[c.value for c in row] for row in openpyxl.load_workbook(path).active]
    assert sheet[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert sheet[1] == [12, "Where?", "up", "down", None, None, "b\n(B) on the left, isn't it?", "A", "dev"]
    assert sheet[2][:7] == [3, 'What "is" it?', "dog", "cat", "cow", "owl", "A dog."]
    assert sheet[3][6] is None and len(sheet) == 4


@pytest.mark.parametrize("args, told", [
    (["run", "world_colour"], "did you mean world_color"),
    (["run", "pope", "--data", "."], "needs pope/coco_pope_random.json"),
    (["run", "world_text", "--parser", "letter"], "none of the tasks knows the parser"),
    (["compare", "nowhere"], "no results; make them with"),
    (["score", "nowhere"], "no results; make them with")])
def test_what_is_given_wrongly(args, told, tmp_path):
    said = tita_eval(*args, code=2)
    assert told in said and "Traceback" not in said


ASKED = [dict(question_id=i, image=None, text="Is there a ball?", answer="yes") for i in range(3)]
LINES = "".join(json.dumps(r) + "\n" for r in ASKED)
LAST = json.dumps(ASKED[-1])


def changed(**field):
    return LINES.replace(LAST, json.dumps(ASKED[-1] | field)).encode()


@pytest.mark.parametrize("raw", [LINES.encode(), b"\xef\xbb\xbf" + LINES.encode(), LINES.replace("\n", "\r\n").encode(),
    LINES.replace("\n", "\n\n").encode(), changed(answer=["yes", "yes"])])
def test_question_files_as_editors_write_them(raw, tmp_path):
    from tita.eval.tasks import file_task, task_questions
    (tmp_path/"mine.jsonl").write_bytes(raw)
    questions, unknown = task_questions(file_task(tmp_path/"mine.jsonl"))
    assert [q["question_id"] for q in questions] == [0, 1, 2] and not unknown


@pytest.mark.parametrize("raw, told", [
    (LINES.encode() + b'{"question_id": 9, "image": null, "text": "caf\xe9"}', "mine.jsonl:4: not UTF-8"),
    (LINES.encode()[:-9], "mine.jsonl:3: not JSON"), (b"[1]", "mine.jsonl:1: a row is a JSON object"),
    (changed(question_id="0"), "row 3: question_id '0' is there twice"),
    (changed(question_id=float("nan")), "row 3 has the question_id nan"),
    (changed(question_id=[1]), "row 3 has the question_id [1]"), (changed(image=7), "row 3 has the image 7"),
    (changed(text=" "), "row 3 asks ' ', which is no text"), (changed(answer=dict(a=1)), "row 3: an answer is a text"),
    (b"", "none of 0 questions has a known answer")])
def test_question_files_that_are_none(raw, told, tmp_path):
    "Each is told with its row or line, before anybody is asked."
    from tita.core import TitaError
    from tita.eval.tasks import file_task, task_questions
    (tmp_path/"mine.jsonl").write_bytes(raw)
    with pytest.raises(TitaError) as e:
        task_questions(file_task(tmp_path/"mine.jsonl"))
    assert told in str(e.value)


@pytest.mark.parametrize("answer", [None, "", float("nan"), []])
def test_a_row_without_truth_is_left_out_and_counted(answer, tmp_path):
    from tita.eval.tasks import file_task, task_questions
    (tmp_path/"mine.jsonl").write_bytes(changed(answer=answer))
    questions, unknown = task_questions(file_task(tmp_path/"mine.jsonl"))
    assert [q["question_id"] for q in questions] == [0, 1] and unknown == 1


def test_a_task_file_of_another_version(tmp_path):
    "The same name and ids, and another truth: not scored as the file that was asked, and not compared with it."
    file, said = tmp_path/"mine.jsonl", tmp_path/"said.jsonl"
    said.write_text("".join(json.dumps(dict(question_id=i, answer="yes")) + "\n" for i in range(3)))
    for run, raw in (("old", LINES.encode()), ("new", changed(answer="no"))):
        file.write_bytes(raw)
        tita_eval("score", tmp_path/run, "--include", file, "--task", "mine", "--answers", said)
    assert "run it again" in " ".join(tita_eval("score", tmp_path/"old", "--include", file, code=2).split())
    assert "run both anew" in " ".join(tita_eval("compare", tmp_path/"old", tmp_path/"new", code=2).split())


def test_three_runs_side_by_side(tmp_path):
    "One system of two runs is one row; another one of its name is called by where it lies; what only one has is told."
    from tita.eval.eval_cli import gather
    from tita.eval.eval_runs import Run, score_run, take_answers
    from tita.eval.tasks import TASKS, task_questions
    questions = {t: task_questions(TASKS[t], limit=12)[0] for t in ("world_pope_random", "world_color")}
    wrong = dict(yes="no", no="yes")
    def run(folder, task, right):
        said = [dict(question_id=q["question_id"], answer=q["truth"] if i < right else wrong[q["truth"]])
            for i, q in enumerate(questions[task])]
        folder.parent.mkdir(exist_ok=True)
        (folder.parent/"said.jsonl").write_text("\n".join(map(json.dumps, said)))
        take_answers(Run(folder, limit=12), TASKS[task], folder.parent/"said.jsonl", "it")
        score_run(folder)
        return folder
    x, y, z = (run(tmp_path/n/"run", "world_pope_random", right) for n, right in (("x", 6), ("y", 6), ("z", 12)))
    names = f"{x}: it", f"{z}: it"
    assert list(gather([x, y, z])[0]) == list(names)
    other = run(tmp_path/"other", "world_color", 12)
    systems, tasks, _ = gather([x, y, z, other])
    assert [list(of) for of in systems.values()] == [["world_pope_random", "world_color"], ["world_pope_random"]]
    told = tita_eval("compare", x, y, z, other, "--out", tmp_path/"all")
    assert f"{z}: it" in told and "over the 1 comparisons" in told and "Left out: world_color" in told
    assert [r["direction"] for r in read_jsonl(tmp_path/"all/flipped.jsonl")] == ["better"] * 6
    assert {p.name for p in (tmp_path/"all").iterdir()} == {f"comparison.{e}" for e in ("json", "md")} | {
        "flipped.jsonl", "gallery.html"}


SAID = st.sampled_from(["Yes.", "no", "", "a dog"])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(SAID, st.sampled_from(["yes", "no"])), min_size=1, max_size=12), st.randoms())
def test_the_order_of_rows_does_not_matter(answers, chance):
    from tita.eval.metrics import percent
    from tita.eval.tasks import yes_no_scores
    rows = [dict(answer=a, truth=t) for a, t in answers]
    turned = list(rows)
    chance.shuffle(turned)
    one, other = ({k: percent(*v) for k, v in yes_no_scores(r, "find").items()} for r in (rows, turned))
    assert one == other


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 7)))
def test_a_missing_answer_is_wrong_and_told(answered):
    "Whatever the parser: only questions with a right answer count as right, and the others are named."
    from tita.eval.tasks import join_answers, yes_no_scores
    questions = [dict(question_id=i, truth="yes" if i % 2 else "no", text="?") for i in range(8)]
    rows, lost = join_answers(questions, [dict(question_id=i, answer=questions[i]["truth"]) for i in answered])
    assert set(lost) == set(range(8)) - answered
    for parser in ("pope", "exact", "find"):
        assert yes_no_scores(rows, parser)["accuracy"][0].sum() == len(answered)


@pytest.mark.slow
def test_the_run_notebook(tmp_path):
    "nbs/runs/evaluate.ipynb asks everybody, and its figures are those of the answers counted by hand."
    from tita.decode.decoder import AlignedDecoder
    from tita.eval.metrics import chair, percent
    from tita.eval.tasks import world_rows
    from tita.world.embedded import OBJECTS, load_models
    args = dict(out=tmp_path/"run", tasks="world_caption,world_text_only", limit=6, lams="[0.0, 0.5]", best_of=2,
        baselines='["vcd"]', sentences=0)
    given = [x for k, v in args.items() for x in ("-p", k, str(v))]
    command = [sys.executable, "scripts/run_notebook.py", "nbs/runs/evaluate.ipynb", tmp_path/"evaluate.ipynb", *given]
    env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {"TITA_PROGRESS": "0", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads((tmp_path/"run/seed0/results.json").read_text())
    for task in ("world_caption", "world_text_only"):
        assert list(found["scores"][task]) == ["base", "λ=0.5", "reward alone", "vcd", "best of 2"]
    base, _, processor = load_models(0)
    rows = world_rows(kind="caption", scenes=6)
    said = AlignedDecoder(base, processor=processor).generate([r["image"] for r in rows], [r["text"] for r in rows], 64,
        temperature=0.)
    slowly = {k: percent(*v) for k, v in chair([o.text for o in said], [r["truth"] for r in rows], OBJECTS).items()}
    figures = found["scores"]["world_caption"]["base"]
    assert {k: figures[k]["value"] for k in slowly} == pytest.approx(slowly)
    cost = {name: system["asked"]["world_caption"]["forwards"] for name, system in found["systems"].items()}
    assert cost["λ=0.5"] > cost["base"] and cost["best of 2"] > cost["base"]
    cells = json.loads((tmp_path/"evaluate.ipynb").read_text())["cells"]
    told = json.dumps([c.get("outputs") for c in cells])
    assert "world_text_only: accuracy" in told and "image/png" in told and "Holm" in told
    assert (tmp_path/"run/seed0/gallery.html").is_file()

def test_the_table_of_methods_names_every_baseline():
    "nbs/decode/13_guidance.ipynb has a row for each, with its paper, λ and plausibility."
    from tita.eval.systems import BASELINES
    text = (ROOT/"nbs/decode/13_guidance.ipynb").read_text()
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.strip().startswith('"| `')}
    for name, method in BASELINES.items():
        assert method.paper.removeprefix("like ") in rows[name], name
        assert f", {method.plausibility:g} |" in rows[name] and f"{method.lam:g}" in rows[name], rows[name]

@pytest.mark.slow
def test_the_study_of_all_systems(tmp_path):
    "Small: every system answers every task, its cost and figure are told; the same command again asks nothing."
    folders = ["--runs", tmp_path/"runs", "--out", tmp_path/"results"]
    small = ["--seed", 0, "--scenes", 6, "--pairs", 6]
    command = [sys.executable, *map(str, [ROOT/"scripts"/"study_systems.py", *small, *folders])]
    first, again = (subprocess.run(command, cwd=ROOT, capture_output=True, text=True) for _ in range(2))
    assert not first.returncode and not again.returncode, (first.stderr + again.stderr)[-3000:]
    found = json.loads((tmp_path/"results"/"study_systems.json").read_text())
    published = json.loads((ROOT/"results"/"study_systems.json").read_text())
    assert found["cost"].keys() == published["cost"].keys() # the systems
    assert all(c["forwards"] for of in found["cost"].values() for c in of.values()) and "question" not in again.stderr
    assert (tmp_path/"results"/"study_systems.png").read_bytes().startswith(b"\x89PNG")
