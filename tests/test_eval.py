"`tita-eval` as a user starts it: killed and resumed, over an endpoint, with what is given wrongly."
import json, os, signal, subprocess, sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from tita.api.standin import StandIn

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


def test_over_an_endpoint(tmp_path):
    "The same face for a server; its failures are told and counted as wrong."
    with StandIn() as server:
        asked = "--limit", 4, "--out", tmp_path, "--endpoint", server.url, "--model", "stand-in"
        said = tita_eval("run", "world_color", *asked)
    assert "world_color" in said and (tmp_path/"answers.jsonl").read_text().count("\n") == 4


@pytest.mark.parametrize("args, told", [
    (["run", "world_colour"], "did you mean world_color"),
    (["run", "pope", "--data", "."], "needs pope/coco_pope_random.json"),
    (["run", "world_text", "--parser", "letter"], "none of the tasks knows the parser"),
    (["compare", "nowhere"], "no results; make them with"),
    (["score", "nowhere"], "no results; make them with")])
def test_what_is_given_wrongly(args, told, tmp_path):
    said = tita_eval(*args, code=2)
    assert told in said and "Traceback" not in said


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
