"Benchmarks that a judge reads, as a user starts them: killed and resumed, with judges that say nonsense, keys kept."
import base64, contextlib, io, json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from judge import judge as bad_judge
from PIL import Image
from tita.api.standin import Persona, StandIn
from tita.core import read_jsonl

ROOT = Path(__file__).resolve().parent.parent
CODE = "from tita.eval.eval_cli import main; main()"


class Grader(StandIn):
    "Answers questions with their number of letters, and grades answers by that; of cows it knows nothing."
    def __post_init__(self):
        super().__post_init__()
        self.talks = [] # messages of each request

    def note(self, body):
        self.talks.append(body["messages"])
        return super().note(body)

    def answer(self, model, prompt, images=()):
        if "Score the answer" not in prompt and "Answer A:" not in prompt and "cannot be read" not in prompt:
            return "x" * (len(prompt) % 9 + 1)
        if "cow" in prompt or "cannot be read" in prompt:
            return "No idea."
        if "Answer A:" in prompt:
            a, b = (prompt.partition(f"Answer {x}: ")[2].split("\n")[0] for x in "AB")
            return "[[A]]" if len(a) > len(b) else "[[B]]" if len(b) > len(a) else "[[C]]"
        said = prompt.partition("Answer: ")[2].split("\n")[0]
        return f"It has {len(said)} letters.\nScore: {len(said)}"


def start(*args, **env):
    env = os.environ | {"TITA_PROGRESS": "0", "PYTHONPATH": str(ROOT)} | env
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", CODE, *map(str, args)], env=env, **pipes)


def in_a_process(*args, code=0, **env):
    process = start(*args, **env)
    out, err = process.communicate()
    assert process.returncode == code, out + err
    return out + err


def tita_eval(*args, code=0):
    "The command in this process, which has loaded everything already."
    from tita.eval.eval_cli import app
    ended = 0
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        try:
            app(list(map(str, args)), standalone_mode=False)
        except SystemExit as e:
            ended = e.code
    assert ended == code, said.getvalue()
    return said.getvalue()


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TITA_PROGRESS", "0")


@pytest.fixture
def data(tmp_path):
    "MT-Bench with twelve questions, one of them about a cow, all followed by the same one."
    folder = tmp_path/"data/mt_bench"
    folder.mkdir(parents=True)
    texts = ["What does a cow eat?", *(f"Write {'very ' * i}briefly." for i in range(11))]
    rows = [dict(question_id=i, category="writing", turns=[t, "Again."]) for i, t in enumerate(texts)]
    (folder/"question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path/"data"


def results(out):
    return json.loads((out/"results.json").read_text())


def asking(data, out, server, task="mt_bench"):
    return ["run", task, "--data", data, "--out", out, "--endpoint", server.url, "--model", "stand-in"]


def judging(server, model="stand-in"):
    return ["--judge", server.url, "--judge-model", model]


def test_asked_first_and_judged_later(data, tmp_path):
    "Scores are those of the judge; what it could not read is counted and told; a second scoring needs no judge."
    out = tmp_path/"run"
    with Grader() as server:
        said = in_a_process(*asking(data, out, server))
        assert "not judged yet" in said and results(out)["scores"]["mt_bench"] == {}
        said = tita_eval("score", out, *judging(server))
        asked = len(server.log)
        assert tita_eval("score", out, *judging(server)) == said and len(server.log) == asked
    assert "2 NOT JUDGED (4 of 48 judgements unreadable, 0 without a reply): no score in the reply" in said
    assert "judged by stand-in in words of ours, 2 passes; 24 questions" in said and "JUDGED BY ITSELF" in said
    [figures] = results(out)["scores"]["mt_bench"].values()
    rows = read_jsonl(next((out/"samples").glob("*.jsonl")))
    lengths = {turn: [len(r["answer"]) for r in rows if r["kinds"] == [turn] and r["scene"]] for turn in TURNS}
    means = {turn: sum(of) / len(of) for turn, of in lengths.items()}
    assert len(lengths["turn_2"]) == 11 and {t: figures[f"score_{t}"]["value"] for t in TURNS} == pytest.approx(means)
    assert figures["score"]["value"] == pytest.approx(sum(means.values()) / 2)
    assert figures["agreement"]["value"] == 100 and figures["unjudged"]["value"] == pytest.approx(100 / 12)
    assert tita_eval("score", out) == said
    kept = read_jsonl(out/"judgements.jsonl")
    assert len(kept) == 48 and all("Question: " in r["prompt"] for r in kept)
    assert [len(r["unread"]) for r in kept if r["scores"] is None] == [3] * 4


TURNS = "turn_1", "turn_2"


def test_the_second_question_comes_after_the_models_own_answer(data, tmp_path):
    "A server gets the turns as messages; nothing is asked twice; the judge is shown both turns of each second answer."
    out = tmp_path/"run"
    with Grader() as server:
        tita_eval(*asking(data, out, server))
        talks = sorted(server.talks, key=len)
        assert [len(t) for t in talks] == [1] * 12 + [3] * 12
        said = {t[0]["content"]: server.answer("", t[0]["content"]) for t in talks}
        assert all((t[1], t[2]["content"]) == (dict(role="assistant", content=said[t[0]["content"]]), "Again.")
            for t in talks[12:])
        tita_eval(*asking(data, out, server))
        assert len(server.log) == 24
        tita_eval("score", out, *judging(server), "--passes", 1)
    rows = {r["question_id"]: r for r in read_jsonl(next((out/"samples").glob("*.jsonl")))}
    assert rows["3-2"]["earlier"] == [dict(text=rows[3]["text"], answer=rows[3]["answer"])]
    shown = {r["question_id"]: r["prompt"] for r in read_jsonl(out/"judgements.jsonl")}
    assert f"User: {rows[3]['text']}\nAssistant: {rows[3]['answer']}\n" in shown["3-2"] and "User:" not in shown[3]


def kill_at(process, file, rows):
    "Kill it when the file has so many rows."
    while process.poll() is None and len(rows_in(file)) < rows:
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_a_run_that_was_killed_between_two_turns_goes_on(data, tmp_path):
    "Second turns are asked after the first answers that are in the file; only what was on its way is asked again."
    out, slow = tmp_path/"run", {"stand-in": Persona(delay=.15)}
    with Grader(models=slow) as server:
        process = start(*asking(data, out, server))
        kill_at(process, out/"answers.jsonl", 16)
        before, asked = rows_in(out/"answers.jsonl"), len(server.talks)
        assert 16 <= len(before) < 24 and asked - len(before) <= 8 + 6
        tita_eval(*asking(data, out, server))
        after, new = rows_in(out/"answers.jsonl"), server.talks[asked:]
    assert after[:len(before)] == before and len(after) == 24
    assert len(new) == 24 - len(before) and {len(t) for t in new} == {3}
    with Grader() as server:
        tita_eval(*asking(data, tmp_path/"whole", server))
    answers = lambda folder: [(r["question_id"], r["answer"]) for r in read_jsonl(next((folder/"samples").glob("*")))]
    assert answers(out) == answers(tmp_path/"whole")


def test_a_run_of_single_turns_is_told_apart(data, tmp_path):
    "Version 1 asked first turns only: it is not scored as version 2, nor compared with it."
    with Grader() as server:
        tita_eval(*asking(data, tmp_path/"old", server), *judging(server), "--passes", 1)
        tita_eval(*asking(data, tmp_path/"new", server), *judging(server), "--passes", 1)
    old = results(tmp_path/"old")
    old["tasks"]["mt_bench"]["version"] = "1"
    (tmp_path/"old/results.json").write_text(json.dumps(old))
    said = tita_eval("score", tmp_path/"old", code=2)
    assert "asked in version 1, and is version 2 now; run it again" in " ".join(said.split())
    said = tita_eval("compare", tmp_path/"old", tmp_path/"new", code=2)
    assert "scored with version 2, elsewhere with 1; run both anew" in " ".join(said.split())


def test_a_template_that_takes_one_question_only(data, tmp_path):
    "First turns are kept, and the error names what the second ones met."
    from tita.core import TitaError
    from tita.decode.decoder import AlignedDecoder
    from tita.eval.eval_runs import Run, run_tasks
    from tita.eval.systems import decoder_system
    from tita.eval.tasks import TASKS
    from tita.world.embedded import load_models
    import tita.eval.benchmarks
    base, _, processor = load_models()
    once = "{% if messages|length > 1 %}{{ raise_exception('one question, please') }}{% endif %}"
    plain = processor.chat_template
    def asked(name):
        system = decoder_system("base", AlignedDecoder(base, processor=processor), max_new_tokens=8)
        return run_tasks(Run(tmp_path/name, data), [TASKS["mt_bench"]], [system], predict_only=True)
    try:
        processor.chat_template = once + plain
        with pytest.raises(TitaError, match="none of 12 conversations goes on .* template .*one question, please"):
            asked("once")
    finally:
        processor.chat_template = plain
    assert len(read_jsonl(tmp_path/"once/answers.jsonl")) == 12
    assert asked("both")["systems"]["base"]["asked"]["mt_bench"]["missing"] == 0


def test_answers_from_elsewhere_bring_both_turns(data, tmp_path):
    "What stands before a second answer is looked up in the file; without it the file is refused."
    said = [dict(question_id=i, answer="x" * 3) for i in range(12)]
    second = [dict(question_id=f"{i}-2", answer="x" * 5) for i in range(12)]
    files = {n: tmp_path/f"{n}.jsonl" for n in ("both", "half")}
    files["both"].write_text("\n".join(map(json.dumps, said + second)))
    files["half"].write_text("\n".join(map(json.dumps, said[1:] + second)))
    given = ["--task", "mt_bench", "--data", data, "--answers"]
    refused = tita_eval("score", tmp_path/"h", *given, files["half"], code=2)
    assert "0, which comes before it" in " ".join(refused.split())
    with Grader() as server:
        tita_eval("score", tmp_path/"b", *given, files["both"], *judging(server))
    [figures] = results(tmp_path/"b")["scores"]["mt_bench"].values()
    assert [figures[k]["value"] for k in ("score", "score_turn_1", "score_turn_2")] == pytest.approx([4, 3, 5])


def test_the_words_are_those_of_the_users_copy(data, tmp_path):
    "FastChat's prompts are used as they are where they lie beside the questions, and the result says so."
    prompt = "Score the answer.\nQuestion: {question}\nAnswer: {answer}\nNow."
    names = [n + more for n in ("single-v1", "single-math-v1") for more in ("", "-multi-turn")]
    named = [dict(name=n, system_prompt="S", prompt_template=prompt) for n in names]
    (data/"mt_bench/judge_prompts.jsonl").write_text("\n".join(map(json.dumps, named)))
    with Grader() as server:
        said = tita_eval(*asking(data, tmp_path/"run", server), *judging(server))
    about = results(tmp_path/"run")["tasks"]["mt_bench"]["judge"]
    assert about["wording"] == "mt_bench/judge_prompts.jsonl" and about["wording"] in said
    kept = read_jsonl(tmp_path/"run/judgements.jsonl")
    assert {r["system"] for r in kept} == {"S"} and all(r["prompt"].endswith("Now.") for r in kept)


def test_the_key_is_sent_and_stays_out_of_all_files(data, tmp_path):
    "It comes from the environment; without it the judge refuses, in words that name the variable."
    out, key = tmp_path/"run", "a-key-that-nobody-may-see"
    with Grader() as asked, Grader(key=key) as judge:
        told = in_a_process(*asking(data, out, asked), *judging(judge), "--judge-key-env", "JUDGE_KEY", code=2)
        assert "JUDGE_KEY" in told and "Traceback" not in told
        told = in_a_process("score", out, *judging(judge), "--judge-key-env", "JUDGE_KEY", JUDGE_KEY=key)
    assert "score" in told and key not in told
    assert not [p for p in out.rglob("*") if p.is_file() and key in p.read_text()]


@pytest.mark.parametrize("args, told", [
    (["--judge", "http://localhost:1/v1"], "name both"),
    (["--judge", "localhost", "--judge-model", "m"], "no address"),
    (["--judge", "http://localhost:1/v1", "--judge-model", "m"], "no connection")])
def test_a_judge_that_is_none(args, told, data, tmp_path):
    with Grader() as server:
        tita_eval(*asking(data, tmp_path, server))
    said = tita_eval("score", tmp_path, *args, code=2)
    assert told in said and "Traceback" not in said


def test_nonsense_is_never_a_zero(data, tmp_path):
    "A judge of broken replies, refusals, 429, 500 and dropped connections: no figure, every row counted and told."
    with Grader() as server:
        tita_eval(*asking(data, tmp_path, server))
    with bad_judge(.4) as url:
        said = tita_eval("score", tmp_path, "--judge", url, "--judge-model", "m", "--passes", 1)
    assert "24 NOT JUDGED" in said
    found = results(tmp_path)
    [figures], [system] = found["scores"]["mt_bench"].values(), found["systems"].values()
    assert figures["score"]["value"] is None and figures["unjudged"]["value"] == 100
    counts = system["judged"]["mt_bench"]
    assert counts["judgements"] == 24 == counts["unread"] + counts["failed"] and counts["why"]


def test_a_reply_that_cannot_be_read_is_asked_for_again(data, tmp_path):
    "The second try says what was wrong with the first; both are kept."
    class Hasty(Grader):
        def answer(self, model, prompt, images=()):
            if "cannot be read: no score" in prompt:
                return "Score: 7"
            return "It is fine." if "Score the" in prompt else "x"
    with Hasty() as server:
        tita_eval(*asking(data, tmp_path, server), *judging(server))
    [figures] = results(tmp_path)["scores"]["mt_bench"].values()
    assert [figures[k]["value"] for k in ("score", "unjudged", "unread")] == pytest.approx([7, 0, 0])
    kept = read_jsonl(tmp_path/"judgements.jsonl")
    assert {(r["raw"], *(u["raw"] for u in r["unread"])) for r in kept} == {("Score: 7", "It is fine.")}


def test_a_killed_judging_goes_on(data, tmp_path):
    "What was judged when it was killed is in the file, but for what was on its way; none of it is asked again."
    out, slow = tmp_path/"run", {"stand-in": Persona(), "slow": Persona(delay=.15)}
    with Grader(models=slow) as server:
        tita_eval(*asking(data, out, server))
        args = "score", out, *judging(server, "slow")
        process = start(*args)
        kill_at(process, out/"judgements.jsonl", 9)
        before, asked = rows_in(out/"judgements.jsonl"), replies(server.log)
        assert 9 <= len(before) < 48 and asked - len(before) <= 8 + 4 * 2 # on their way, second and third tries
        tita_eval(*args)
        after = rows_in(out/"judgements.jsonl")
        assert after[:len(before)] == before and len(after) == 48
        new = after[len(before):]
        assert replies(server.log) - asked == len(new) + 2 * sum('"scores": null' in r for r in new)


def rows_in(path):
    "Whole lines of a file."
    return [l for l in path.read_text().splitlines(True) if l.endswith("\n")] if path.exists() else []


def replies(log):
    return sum(e["model"] == "slow" for e in log)


def test_pairs_in_both_orders(data, tmp_path):
    "Every system beside the first; a judge that likes what stands first makes nobody win, and is found out."
    from tita.eval.eval_runs import Run, run_tasks
    from tita.eval.evaluation import answerer
    from tita.eval.judging import judge_at
    from tita.eval.systems import System
    from tita.eval.tasks import TASKS
    import tita.eval.benchmarks
    def saying(text):
        return System(text, answerer(lambda images, texts, **settings: [text] * len(texts)), dict(says=text))
    class Fond(StandIn):
        def answer(self, model, prompt, images=()):
            return "[[A]]"
    systems, task = [saying("short"), saying("longer, much")], TASKS["mt_bench_pairs"]
    found = {}
    for kind in (Grader, Fond):
        with kind() as server:
            run = Run(tmp_path/kind.__name__, data)
            found[kind] = run_tasks(run, [task], systems, judge=judge_at(server.url, "stand-in"))["scores"][task.name]
            assert all("Answer A: short\n" in e["prompt"] or "Answer B: short\n" in e["prompt"] for e in server.log
                if "Answer A" in e["prompt"])
    value = lambda kind, system, metric: found[kind][system][metric]["value"]
    assert [value(k, "short", "win_rate") for k in found] == [50, 50]
    assert value(Grader, "longer, much", "win_rate") == 100 and value(Grader, "longer, much", "order_agreement") == 100
    assert value(Fond, "longer, much", "win_rate") == 50 and value(Fond, "longer, much", "order_agreement") == 0
    assert value(Fond, "longer, much", "first_wins") == 100 and value(Grader, "longer, much", "first_wins") == 50
    assert value(Fond, "longer, much", "longer_wins") == 50 and value(Grader, "longer, much", "longer_wins") == 100
    assert value(Grader, "longer, much", "win_rate_turn_1") == value(Grader, "longer, much", "win_rate_turn_2") == 100
    told = [r for r in read_jsonl(tmp_path/"Grader/judgements.jsonl") if r["question_id"] == "3-2"]
    assert {r["place"] for r in told} == {"first", "second"}
    assert all("Assistant A: short\nAssistant B: longer, much" in r["prompt"] for r in told if r["place"] == "second")


class Sighted(StandIn):
    "Answers in one word; grades by how red the corner of the picture is, from 0 to 6, and only if it sees it."
    def answer(self, model, prompt, images=()):
        if "[[3]]" not in prompt:
            return "Two."
        if not images:
            return "[[0]]"
        red, _, _ = Image.open(io.BytesIO(base64.b64decode(images[0].partition(",")[2]))).getpixel((0, 0))
        return f"[[{red}]]"


@pytest.fixture
def mmhal(tmp_path):
    "MMHal with three questions about pictures of known redness, and one whose picture lies outside."
    folder = tmp_path/"data/mmhal"
    (folder/"images").mkdir(parents=True)
    for red in (2, 4, 6):
        Image.new("RGB", (8, 8), (red, 0, 0)).save(folder/f"images/{red}.png")
    rows = [dict(image_src=f"https://a/{n}", question=f"How many, {n}?", gt_answer="Two.", image_content=["Dog"],
        question_type="counting") for n in ("2.png", "4.png", "6.png")]
    (folder/"response_template.json").write_text(json.dumps(rows))
    return tmp_path/"data"


def test_a_judge_that_sees_the_picture(mmhal, tmp_path):
    "The picture arrives as a data URL, the prompt and the result say so; a blind judge is another one."
    out = tmp_path/"run"
    with Sighted() as server:
        blind = tita_eval(*asking(mmhal, out, server, "mmhal"), *judging(server))
        assert not [e for e in server.log if "[[3]]" in e["prompt"] and e["images"]]
        said = tita_eval("score", out, *judging(server), "--judge-sees")
        shown = [e for e in server.log if "[[3]]" in e["prompt"] and e["images"]]
        asked = len(server.log)
        assert tita_eval("score", out, *judging(server), "--judge-sees") == said and len(server.log) == asked
    assert "judged by stand-in in words of ours" in blind and "do not see" in server.log[6]["prompt"]
    assert "judged by stand-in, seeing the pictures in words of ours" in said
    assert len(shown) == 6 and all("a picture, which you see" in e["prompt"] for e in shown)
    assert {base64.b64decode(e["images"][0].partition(",")[2]) for e in shown} == {
        p.read_bytes() for p in (mmhal/"mmhal/images").iterdir()}
    [figures] = results(out)["scores"]["mmhal"].values()
    assert figures["score"]["value"] == pytest.approx(4) and results(out)["tasks"]["mmhal"]["judge"]["sees"] is True
    kept = read_jsonl(out/"judgements.jsonl")
    assert [r.get("image") for r in kept if "you see," in r["prompt"]].count("4.png") == 2


@pytest.mark.slow
def test_the_run_notebook_asks_a_server_and_a_judge_that_sees(mmhal, tmp_path):
    "nbs/runs/evaluate.ipynb over an endpoint: the judge's figures are those of the pictures that it was shown."
    with Sighted() as server:
        given = dict(out=tmp_path/"run", data=mmhal, tasks="mmhal", model="stand-in", endpoint=server.url, passes=1,
            baselines="[]", best_of=0, sentences=0, judge=server.url, judge_model="stand-in", judge_sees="true")
        named = [x for k, v in given.items() for x in ("-p", k, str(v))]
        command = [sys.executable, "scripts/run_notebook.py", "nbs/runs/evaluate.ipynb", tmp_path/"n.ipynb", *named]
        env = {k: v for k, v in os.environ.items() if k != "MPLBACKEND"} | {"PYTHONPATH": str(ROOT)}
        run = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    [figures] = results(tmp_path/"run")["scores"]["mmhal"].values()
    assert figures["score"]["value"] == pytest.approx(4) and "seeing the pictures" in run.stderr


def test_a_picture_outside_its_folder_is_never_shown(mmhal, tmp_path):
    "A link that leaves the folder of images is a failed judgement that says so; nothing of it is sent."
    out = tmp_path/"run"
    with Sighted() as server:
        tita_eval(*asking(mmhal, out, server, "mmhal"))
        Image.new("RGB", (8, 8), (5, 5, 5)).save(tmp_path/"secret.png")
        (mmhal/"mmhal/images/2.png").unlink()
        (mmhal/"mmhal/images/2.png").symlink_to(tmp_path/"secret.png")
        said = tita_eval("score", out, *judging(server), "--judge-sees", "--passes", 1)
        seen = {e["images"][0] for e in server.log if "[[3]]" in e["prompt"]}
    assert "1 NOT JUDGED (0 of 3 judgements unreadable, 1 without a reply): image '2.png' is a link that leaves" in said
    assert len(seen) == 2 and base64.b64encode((tmp_path/"secret.png").read_bytes()).decode() not in "".join(seen)


VERDICT = st.sampled_from([[1., 0.], [0., 1.], [.5, .5], None])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(VERDICT, min_size=4, max_size=4), min_size=1, max_size=6), st.randoms())
def test_the_order_of_rows_and_of_answers_does_not_matter(verdicts, chance):
    "Rows in any order give one figure; the other side's win rate is what is left of it."
    from tita.eval.judging import judged_pairs
    from tita.eval.metrics import percent
    places = [(p, n) for p in ("first", "second") for n in (0, 1)]
    def rows(turn):
        def scores(v):
            return dict(own=None, other=None, why="?") if v is None else dict(zip(("own", "other"), v[::turn]))
        judged = [[dict(place=p, n=n) | scores(v) for (p, n), v in zip(places, vs)] for vs in verdicts]
        return [dict(answer="a b", judged=js) for js in judged]
    given, other = rows(1), rows(-1)
    chance.shuffle(shuffled := list(given))
    one, again, turned = ({k: percent(*v) for k, v in judged_pairs(r).items()} for r in (given, shuffled, other))
    assert one == pytest.approx(again, nan_ok=True)
    if one["win_rate"] is not None:
        assert one["win_rate"] + turned["win_rate"] == pytest.approx(100)
    assert one["unjudged"] == pytest.approx(100 * sum(not any(vs) for vs in verdicts) / len(verdicts))


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_no_reply_breaks_a_reader(text):
    "Whatever a judge writes is scores on the scale, or a named error."
    from tita.core import TitaError
    from tita.eval.judging import read_score, read_two, read_winner
    for read, n in ((read_score, 1), (read_two, 2), (read_winner, 2)):
        try:
            scores = read(text, 0, 6)
        except TitaError:
            continue
        assert len(scores) == n and all(0 <= s <= 6 for s in scores)
