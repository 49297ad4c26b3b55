"""What the benchmark client itself costs: wall time against the ideal and against asking one by one, CPU time.

    python scripts/bench_client.py [--questions 500] [--latency 0.05] [--concurrency 32] [--tokens 4] [--image]
                                   [--out FILE]

The server is a stand-in on this machine, in a process of its own, that answers after LATENCY seconds. Ideal is the
time in which CONCURRENCY perfect users would have asked everything. Two baselines ask the same questions of the same
server in the same run, one after the other: a loop that goes on at once, and a loop that sleeps a second after each
answer. The loop that sleeps is measured on a few of the questions and extrapolated.
"""
import argparse, json, math, os, statistics, sys, tempfile, time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tests"))
from standin import standin
from tita.api.client import Settings, encode_image, make_body
from tita.core import run_info, write_json
from tita.bench.traffic import Load, read_checked_questions, run_load
from tita.api.endpoints import any_endpoint


def make_questions(folder: Path, n: int, image: bool) -> list:
    "Questions, and one image that all of them are about."
    from PIL import Image
    Image.radial_gradient("L").resize((320, 320)).convert("RGB").save(folder/"image.png")
    shown = "image.png" if image else ""
    rows = [dict(question_id=i, text=f"What is {i} plus 1?", image=shown) for i in range(n)]
    (folder/"q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return read_checked_questions(folder/"q.jsonl", folder)


def measure(url, questions, folder, concurrency, name) -> dict:
    "Wall and CPU seconds of one run."
    wall, cpu = time.perf_counter(), time.process_time()
    out, how = folder/f"{name}.jsonl", Settings(retries=0)
    result = run_load(questions, [any_endpoint(url, "m")], out, folder, how, [Load(concurrency)])
    assert result["failed"] == 0 and result["asked"] == len(questions), result
    return dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def one_by_one(url, bodies: list[dict], pause: float) -> float:
    "Seconds a question when each waits for the answer to the last one, and then for `pause` seconds."
    from openai import OpenAI
    client = OpenAI(base_url=url, api_key="none", max_retries=0)
    start = time.perf_counter()
    for body in bodies:
        client.chat.completions.create(**body)
        time.sleep(pause)
    return (time.perf_counter() - start) / len(bodies)


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--questions", type=int, default=500)
    p.add_argument("--latency", type=float, default=.05)
    p.add_argument("--concurrency", type=int, default=32)
    p.add_argument("--tokens", type=int, default=4, help="tokens in an answer")
    p.add_argument("--image", action="store_true", help="send an image with each question")
    p.add_argument("--paused", type=int, default=20, help="questions of the loop that sleeps")
    p.add_argument("--repeat", type=int, default=10, help="runs, of which the fastest counts")
    p.add_argument("--out", help="write the numbers as JSON")
    return p.parse_args()


def bodies_of(questions: list, folder: Path) -> list[dict]:
    "The requests that the benchmark client makes of these questions, each answered at once."
    how = Settings(stream=False)
    shown = {q["image"]: encode_image(folder/q["image"])[0] for q in questions if q["image"]}
    return [make_body("m", q["text"], shown.get(q["image"]), how) for q in questions]


def measure_all(a) -> tuple[list[dict], float, float]:
    "Each run, and the seconds a question when asked one by one: without a pause, with one of a second."
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        questions = make_questions(folder, a.questions, a.image)
        with standin(models={"m": dict(delay=a.latency, prefix="so " * max(0, a.tokens - 4))}) as url:
            measure(url, questions[:8], folder, 8, "warm")
            runs = [measure(url, questions, folder, a.concurrency, f"run{i}") for i in range(a.repeat)]
            bodies = bodies_of(questions, folder)
            return runs, one_by_one(url, bodies, 0), one_by_one(url, bodies[:a.paused], 1)


def main():
    a = arguments()
    os.environ.setdefault("TITA_PROGRESS", "0")
    load = os.getloadavg()[0]
    runs, plain, paused = measure_all(a)
    wall, usual = min(r["wall"] for r in runs), statistics.median(r["wall"] for r in runs)
    ideal = math.ceil(a.questions / a.concurrency) * a.latency
    loops = dict(one_by_one=paused * a.questions, without_pause=plain * a.questions)
    asked = {k: getattr(a, k) for k in ("questions", "latency", "concurrency", "tokens", "image")}
    result = asked | dict(ideal=ideal, wall=wall, ratio=wall / ideal, median_ratio=usual / ideal,
        cpu_ms=1e3 * min(r["cpu"] for r in runs) / a.questions, **loops, paused=a.paused,
        faster=loops["one_by_one"] / wall, faster_without_pause=loops["without_pause"] / wall,
        runs=runs, load=load, machine=run_info(("openai", "aiohttp")))
    print(f"{a.questions} questions of {1e3 * a.latency:g} ms, {a.concurrency} at once: {wall:.2f} s, "
        f"{result['ratio']:.2f} x the ideal {ideal:.2f} s (median {usual / ideal:.2f} x); "
        f"{result['cpu_ms']:.1f} ms CPU a request; one by one {loops['without_pause']:.0f} s, "
        f"{result['faster_without_pause']:.0f} x as long; with a pause of a second after each "
        f"{loops['one_by_one']:.0f} s, {result['faster']:.0f} x; load {load:.1f} before it")
    if a.out:
        write_json(a.out, result)


if __name__ == "__main__":
    main()
