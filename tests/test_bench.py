"tita-bench as processes: the seeds' commands, kills, faults, keys that must not show."
import json, os, re, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
import pytest
sys.path.insert(0, str(Path(__file__).resolve().parent))
from standin import standin

ROOT, CANARY = Path(__file__).resolve().parent.parent, "sk-canary-4f9a81c2d7e6"
BENCH = [sys.executable, "-c", "from tita.bench.bench_cli import main; main()"]


def env(**kw):
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY") and k != "TITA_PROVIDERS"}
    return {**clean, "PYTHONPATH": str(ROOT), "TITA_PROGRESS": "0", "OMP_NUM_THREADS": "1", **kw}


def bench(*args, code=0, **kw):
    "Run a command to its end; what it said."
    r = subprocess.run([*BENCH, *map(str, args)], capture_output=True, text=True, env=env(**kw))
    assert r.returncode == code, f"exit code {r.returncode}\n{r.stdout}\n{r.stderr}"
    return r.stdout + r.stderr


def start(*args, **kw):
    return subprocess.Popen([*BENCH, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env(**kw))


def rows_of(path):
    "Whole lines of a result file."
    if not Path(path).exists():
        return []
    return [json.loads(l) for l in Path(path).read_bytes().split(b"\n")[:-1]]


def ask_sums(folder: Path, n: int) -> Path:
    "A question file without images, since what matters here are the requests."
    (folder/"q.jsonl").write_text("".join(json.dumps(dict(question_id=i, text=f"What is {i} plus 1?", answer=str(i + 1), kind="sum")) + "\n" for i in range(n)))
    return folder/"q.jsonl"


def wait_until(test, seconds=600):
    end = time.time() + seconds
    while not test():
        assert time.time() < end, "waited in vain"
        time.sleep(.02)


def test_the_seeds_commands(tmp_path):
    "sample, run with a key and a known model, eval: as the seeds' README has it."
    folder = tmp_path/"api_benchmark_results"
    questions = folder/"sample_questions.jsonl"
    assert "15 questions" in bench("sample", "--out", questions)
    assert [sum(bool(q["image"]) is b for q in rows_of(questions)) for b in (True, False)] == [10, 5]
    with standin(answers=questions, models={"deepseek-ai/deepseek-vl2": {}, "Qwen/Qwen2.5-VL-72B-Instruct": dict(delay=.01)}, key=CANARY, log=tmp_path/"log") as url:
        mine = tmp_path/"mine.toml"
        mine.write_text(f'[providers.siliconflow]\nbase_url = "{url}"\n')
        said = bench("run", "--api-key", CANARY, "--model", "deepseek-vl2", "--questions", questions, "--images", folder, "--out", folder/"deepseek_vl2_20260101.jsonl", "--providers", mine)
        bench("run", "--model", "qwen2.5-vl", "--questions", questions, "--images", folder, "--out", folder/"new"/"qwen.jsonl", "--max", 12, TITA_PROVIDERS=str(mine), SILICONFLOW_API_KEY=CANARY)
    assert "warning: a key given as --api-key shows in the process list" in said and "CNY" in said
    asked = rows_of(tmp_path/"log")
    assert len(asked) == 27 and all(i.startswith("data:image/png;base64,") for e in asked for i in e["images"])
    (folder/"old.jsonl").write_text(json.dumps(dict(question_id="sample_1", model_name="Old", prompt="?", response="yes", input_tokens=1, output_tokens=1, total_tokens=2, response_time=1.25, success=True, error_message=None)) + "\n")
    bench("eval", "--dir", folder, "--questions", questions)
    summary = json.loads((folder/"summary.json").read_text())
    assert {n: (s["questions"], s["success"]["value"]) for n, s in summary["systems"].items()} == {"deepseek-vl2": (15, 100), "Old": (1, 100), "qwen2.5-vl-72b": (12, 100)}
    assert summary["systems"]["deepseek-vl2"]["accuracy"]["value"] == 100 and summary["systems"]["deepseek-vl2"]["cost"]["currency"] == "CNY"
    assert re.search(r"== Old ==\nsuccess_rate: 100.00%\navg_response_time: 1.25s\navg_input_tokens: 1.0\navg_output_tokens: 1.0\n", (folder/"benchmark_report.txt").read_text())
    page = (folder/"report.html").read_text()
    assert "2025-09-25" in page and not re.search(r"(src|href)=['\"](?!data:|#)", page)
    assert {p.name for p in (folder/"plots").iterdir()} >= {"accuracy.png", "latency.png"} and (folder/"report.md").is_file()


def test_killed_at_any_moment(tmp_path):
    "SIGKILL again and again: no row lost, none twice, nothing asked twice but what was under way."
    n, at_once, kills = 120, 4, 0
    questions, out, log = ask_sums(tmp_path, n), tmp_path/"out.jsonl", tmp_path/"log"
    with standin(answers=questions, models={"m": dict(delay=.03)}, log=log) as url:
        args = ["run", "--base-url", url, "--model", "m", "--questions", questions, "--out", out, "--concurrency", at_once]
        for goal in 7, 41, 77:
            p = start(*args)
            wait_until(lambda: len(rows_of(out)) >= goal or p.poll() is not None)
            p.kill()
            p.communicate()
            kills += 1
            kept = out.read_bytes()
            kept = kept[:kept.rfind(b"\n") + 1]
        with open(out, "ab") as f:
            f.write(b'{"key": "torn')
        bench(*args)
        again = bench(*args)
    rows, asked = rows_of(out), Counter(e["prompt"] for e in rows_of(log))
    assert out.read_bytes().startswith(kept) and f"0 asked in" in again and f"{n} were there already" in again
    assert sorted(r["question_id"] for r in rows) == list(range(n)) and all(r["success"] for r in rows)
    assert len(asked) == n and sum(asked.values()) - n <= kills * at_once


def test_two_processes_on_one_file(tmp_path):
    "The first is held in the middle of its run until the second has been refused, then it is interrupted."
    questions, out = ask_sums(tmp_path, 400), tmp_path/"out.jsonl"
    with standin(answers=questions, models={"m": dict(delay=.2)}) as url:
        args = ["run", "--base-url", url, "--model", "m", "--questions", questions, "--out", out, "--concurrency", 4]
        first = start(*args)
        wait_until(lambda: rows_of(out))
        first.send_signal(signal.SIGSTOP)
        assert "another process is writing to it" in bench(*args, code=2)
        first.send_signal(signal.SIGINT)
        first.send_signal(signal.SIGCONT)
        said = first.communicate(timeout=600)
    assert first.returncode == 130 and "run the same command again to resume" in said[1] and "Traceback" not in said[1], said
    assert 0 < len(rows_of(out)) < 400


def test_faults_are_outlasted(tmp_path):
    "One request in five disturbed, in every way: with retries all succeed; without, each failure has a name."
    questions, out = ask_sums(tmp_path, 150), tmp_path/"out.jsonl"
    names = "429 408 409 500 503 drop cut truncate json error hang".split()
    with standin(answers=questions, models={"m": dict(delay=.01)}, faults=dict.fromkeys(names, .2 / len(names)), retry_after=.05, seed=1) as url:
        args = ["run", "--base-url", url, "--model", "m", "--questions", questions, "--concurrency", 32, "--timeout", .5]
        assert "150 asked" in (said := bench(*args, "--out", out, "--retries", 8)) and " 0 failed" in said
        bench(*args, "--out", tmp_path/"once.jsonl", "--retries", 0)
        bench(*args, "--out", tmp_path/"whole.jsonl", "--retries", 8, "--no-stream", "--max", 60)
    rows, once = rows_of(out), rows_of(tmp_path/"once.jsonl")
    assert len(rows) == len(once) == 150 and all(r["success"] for r in rows + rows_of(tmp_path/"whole.jsonl")) and all(r["response"] == r["answer"] for r in rows)
    assert any(len(r["attempts"]) > 1 and r["total_time"] > r["response_time"] for r in rows)
    failed = [r for r in once if not r["success"]]
    assert .1 < len(failed) / 150 < .35 and {r["error_kind"] for r in failed} <= {"rate_limit", "request_timeout", "conflict", "server_error", "connection", "truncated", "invalid_json", "stream_error", "timeout"}
    assert all(r["error"] and len(r["attempts"]) == 1 for r in failed)


def test_the_key_shows_nowhere(tmp_path):
    "Not in results, notes, reports, logs or tracebacks, whatever goes wrong; the server repeats it in every error."
    questions = ask_sums(tmp_path, 30)
    said = ""
    with standin(answers=questions, models={"m": dict(prefix=f"The key is {CANARY}. ")}, faults={"500": .2, "400": .2, "403": .1, "drop": .1, "json": .1}, key=CANARY, seed=2, log=tmp_path/"server.log") as url:
        args = ["run", "--base-url", url, "--model", "m", "--questions", questions, "--key-env", "MY_KEY", "--timeout", 1, "--retries", 1]
        said += bench(*args, "--out", tmp_path/"a.jsonl", MY_KEY=CANARY, OPENAI_LOG="debug")
        broken = "import tita.bench.traffic\ndef boom(*a, **k): raise RuntimeError('no row for " + CANARY + "')\ntita.load.make_row = boom\nfrom tita.bench.bench_cli import main; main()"
        r = subprocess.run([sys.executable, "-c", broken, *map(str, args), "--out", str(tmp_path/"b.jsonl")], capture_output=True, text=True, timeout=60, env=env(MY_KEY=CANARY))
        assert r.returncode == 1 and "RuntimeError: no row for ***" in r.stderr
        said += r.stdout + r.stderr
        said += bench(*args, "--out", tmp_path/"c.jsonl", "--retries", 0, code=2, MY_KEY=CANARY.replace("4f", "5f")).replace(CANARY.replace("4f", "5f"), CANARY)
        said += bench(*args, "--out", tmp_path/"d.jsonl", code=2, MY_KEY=CANARY + "\n\nX-Other: 1")
        said += bench("eval", "--dir", tmp_path)
    assert "refuses the key" in said and "401" in said and "no HTTP header can carry" in said
    assert {r["error_kind"] for r in rows_of(tmp_path/"a.jsonl") if not r["success"]} >= {"bad_request", "permission"}
    (tmp_path/"server.log").unlink()
    assert CANARY not in said
    for f in tmp_path.rglob("*"):
        assert not f.is_file() or CANARY.encode() not in f.read_bytes(), f


def test_mistakes_are_told_in_a_line(tmp_path):
    questions = ask_sums(tmp_path, 3)
    (tmp_path/"bad.jsonl").write_text('{"question_id": 1, "text": "?"}\n{"question_id": 2}\n')
    (tmp_path/"file").write_text("")
    ask = ["run", "--questions", questions, "--out", tmp_path/"out.jsonl"]
    there = [*ask, "--model", "m", "--base-url", "http://127.0.0.1:9/v1"]
    for args, why in [([*ask, "--model", "deepseek-vl2"], "SILICONFLOW_API_KEY is not set"), ([*ask, "--model", "gpt-9"], "known are deepseek-vl2, qwen2.5-vl"), (there, "nothing answers at"),
            (["run", "--questions", tmp_path/"bad.jsonl", *there[3:]], "bad.jsonl:2: no key 'text'"), (["run", "--questions", tmp_path/"none.jsonl", *there[3:]], "no such file"),
            ([*there[:4], tmp_path/"file"/"out.jsonl", *there[5:]], "cannot be written"), ([*there, "--images", tmp_path/"none"], "no such image folder"), ([*there, "--max-cost", 1], "no price is known"),
            ([*there, "--retries", -1], "must be at least 0"), (["eval", "--dir", tmp_path/"none"], "no such folder"), (["sample", "--out", tmp_path/"s.jsonl", "--source", "moon"], "choose world, digits")]:
        said = bench(*args, code=2)
        assert why in said and "Traceback" not in said and said.count("\n") <= 2, said
    assert not (tmp_path/"out.jsonl").exists() or not rows_of(tmp_path/"out.jsonl")


def test_max_cost_stops_and_a_higher_one_goes_on(tmp_path):
    questions, out = ask_sums(tmp_path, 60), tmp_path/"out.jsonl"
    with standin(answers=questions, models={"m": dict(delay=.005)}, log=tmp_path/"log") as url:
        (tmp_path/"p.toml").write_text(f'[providers.p]\nbase_url = "{url}"\n[models.m]\nprovider = "p"\nid = "m"\nprice = {{input = 100, output = 100, currency = "EUR", date = "2026-01-01"}}\n')
        args = ["run", "--model", "m", "--providers", tmp_path/"p.toml", "--questions", questions, "--out", out, "--concurrency", 4]
        assert "stopped by --max-cost" in bench(*args, "--max-cost", .01)
        n = len(rows_of(out))
        assert 0 < n < 60 and sum(r["cost"] for r in rows_of(out)) <= .01 and "60 were there already" not in bench(*args, "--max-cost", 1)
    assert len(rows_of(out)) == len(rows_of(tmp_path/"log")) == 60


def test_commands_start_fast():
    "Help needs neither torch nor openai nor matplotlib, a run needs no torch."
    code = "import sys, tita.bench.bench_cli; print([m for m in ('torch', 'openai', 'matplotlib', 'scipy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env(), check=True).stdout.strip() == "[]"
    code = "import sys, tita.bench.traffic, tita.api.client, openai; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env(), check=True).stdout.strip() == "False"
    for command in [], ["sample"], ["run"], ["eval"]:
        assert "--help" in bench(*command, "--help")


def test_a_model_in_this_process(tmp_path, monkeypatch):
    "--local with a base and a reward: the same rows, resumed, evaluated."
    from typer.testing import CliRunner
    from tita.bench.bench_cli import app
    from tita.world.embedded import tiny_pair
    monkeypatch.setenv("TITA_PROGRESS", "0")
    base, reward, processor = tiny_pair()
    for name, model in ("base", base), ("reward", reward):
        model.save_pretrained(tmp_path/name)
        processor.save_pretrained(tmp_path/name)
    def run(*args):
        r = CliRunner().invoke(app, [str(a) for a in args])
        assert r.exit_code == 0, r.stdout + r.stderr
        return r.stdout
    run("sample", "--out", tmp_path/"q.jsonl", "--num", 3, "--text", 0)
    args = ["run", "--local", tmp_path/"base", "--questions", tmp_path/"q.jsonl", "--images", tmp_path, "--out", tmp_path/"out.jsonl", "--max-tokens", 4]
    assert "3 asked" in run(*args) and "3 asked" in run(*args, "--reward", tmp_path/"reward", "--form", "interpolate")
    assert "0 asked" in run(*args)
    rows = rows_of(tmp_path/"out.jsonl")
    assert len(rows) == 6 and all(r["success"] and r["ttft"] and 0 < r["output_tokens"] <= 4 for r in rows) and len({r["model"] for r in rows}) == 2
    run("eval", "--dir", tmp_path)
    assert len(json.loads((tmp_path/"summary.json").read_text())["pairs"]) == 1
