#!/usr/bin/env python3
"""tita-serve under load: 64 clients on the embedded pair, mixed lengths and λ, one in ten gone in mid-answer.

    python scripts/bench_serve.py [--seconds 60] [--clients 64] [--slots 32] [--out results/bench_serve]

The server runs in a process of its own, the clients in this one. Every greedy answer that came whole is compared with
the same question asked alone, and the beginning of one that was left with that answer's. What the HTTP layer costs is
measured with answers of one token, in two ways: the CPU time of the server's main thread, which does nothing else; and
that of its whole process, less what the same rows cost in an engine without HTTP.
"""
import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tita.core import data_url, run_info, write_json, write_text
from tita.world.embedded import make_scenes

SCENES = make_scenes(24, seed=3)
URLS = [data_url(s.image) for s in SCENES]
LAMS, LENGTHS = (0., .3, .5, .8), (2, 8, 24, 64)


def questions(n: int) -> list[dict]:
    "Requests that differ in image, question, λ and length."
    rng, out = random.Random(0), []
    for _ in range(n):
        i = rng.randrange(len(SCENES))
        text = rng.choice(SCENES[i].questions).text
        content = [dict(type="image_url", image_url=dict(url=URLS[i])), dict(type="text", text=text)]
        out.append(dict(model="tita", messages=[dict(role="user", content=content)], temperature=0, ignore_eos=True,
            max_tokens=rng.choice(LENGTHS), tita=dict(lam=rng.choice(LAMS)), stream=True,
            stream_options=dict(include_usage=True)))
    return out


async def ask(client, body: dict, leave_after: int | None = None) -> dict:
    "One streamed answer, or the beginning of one."
    start, first, usage = time.perf_counter(), None, None
    text, parts = "", 0
    async with client.stream("POST", "chat/completions", json=body) as reply:
        assert reply.status_code == 200, (reply.status_code, await reply.aread())
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            usage = event.get("usage") or usage
            new = "".join(c["delta"].get("content") or "" for c in event["choices"])
            text, parts = text + new, parts + bool(new)
            first = first or (time.perf_counter() - start if new else None)
            if leave_after is not None and parts >= leave_after:
                return dict(text=text, first=first, tokens=0, is_whole=False)
    return dict(text=text, first=first, tokens=usage["completion_tokens"], is_whole=True)


async def one_client(url: str, number: int, asked: list[dict], until: float, done: list):
    rng = random.Random(number)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        while time.perf_counter() < until:
            i = rng.randrange(len(asked))
            leaves = rng.random() < .1
            done.append((i, await ask(client, asked[i], 1 if leaves else None)))


async def load(url: str, clients: int, seconds: float, asked: list[dict], memory) -> tuple[list, float, list]:
    "What all clients heard, in how many seconds, and the server's memory as it went."
    done, sizes, start = [], [], time.perf_counter()
    async def watch():
        while True:
            sizes.append(memory())
            await asyncio.sleep(max(.5, seconds / 40))
    watcher = asyncio.create_task(watch())
    await asyncio.gather(*[one_client(url, c, asked, start + seconds, done) for c in range(clients)])
    watcher.cancel()
    return done, time.perf_counter() - start, sizes


async def alone(url: str, asked: list[dict]) -> tuple[dict, float]:
    "Each question asked alone, and the tokens a second of that."
    found, start = {}, time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        for i, body in enumerate(asked):
            found[i] = await ask(client, body)
    return found, sum(r["tokens"] for r in found.values()) / (time.perf_counter() - start)


def cpu(pid: int, task: str = "") -> float: # seconds
    "Of a process, or of its main thread, which goes by the same number."
    fields = Path(f"/proc/{pid}/{task}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float: # MB
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


async def http_cost(url: str, pid: int, n: int = 400) -> tuple[float, float]: # seconds of CPU
    "Of a request about a warm image for one token: the thread of HTTP; and the process, less the same in an engine."
    times, body = lambda: (cpu(pid, f"task/{pid}"), cpu(pid)), dict(questions(1)[0], max_tokens=1, tita=dict(lam=.5))
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        for _ in range(20):
            await ask(client, body)
        before = times()
        for _ in range(n):
            await ask(client, body)
    thread, process = ((now - then) / n for now, then in zip(times(), before))
    return thread, process - in_the_loop(body, n)


def in_the_loop(body: dict, n: int) -> float:
    "CPU seconds of the same row in a loop of this process, without HTTP."
    import torch
    from tita.decode.ask import load_decoder
    from tita.serve.loop import Awaited, Loop
    torch.set_num_threads(1)
    loop = Loop(load_decoder(lam=.5), slots=32)
    content = body["messages"][0]["content"]
    image = SCENES[URLS.index(content[0]["image_url"]["url"])].image
    def run():
        how = loop.sampling(max_new_tokens=1, eos=(), temperature=0.)
        nobody = lambda events: None
        loop.submit([Awaited(content[1]["text"], [image], how, loop.decoder.guidance, nobody, name="warm")])
        while loop.waiting or loop.running:
            loop.turn_over()
    for _ in range(20):
        run()
    start = time.process_time()
    for _ in range(n):
        run()
    return (time.process_time() - start) / n


def serve(slots: int):
    "The server as a process, and its address."
    start = "from tita.serve.serve_cli import main; main()"
    command = [sys.executable, "-c", start, "--port", "0", "--slots", str(slots), "--lam", "0.5"]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TITA_PROGRESS="0")
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
    return p, re.search(r"http://\S+", p.stdout.readline())[0]


def figures(want: dict, single: float, done: list, seconds: float, sizes: list) -> dict:
    "What the load has shown."
    whole = [(i, r) for i, r in done if r["is_whole"]]
    wrong = [i for i, r in whole if r["text"] != want[i]["text"]]
    cut = [i for i, r in done if not r["is_whole"] and not want[i]["text"].startswith(r["text"])]
    first = sorted(r["first"] for _, r in done if r["first"])
    half = len(sizes) // 2
    found = dict(whole=len(whole), left=len(done) - len(whole), wrong=len(wrong) + len(cut))
    found |= dict(tokens_per_second=sum(r["tokens"] for _, r in whole) / seconds, alone_tokens_per_second=single)
    found |= dict(first_median=statistics.median(first), first_p99=first[int(len(first) * .99)])
    return found | dict(memory_mb=[max(sizes[:half]), max(sizes[half:])])


def measure(a) -> dict:
    p, url = serve(a.slots)
    try:
        asked = questions(a.questions)
        want, single = asyncio.run(alone(url, asked))
        done, seconds, sizes = asyncio.run(load(url, a.clients, a.seconds, asked, lambda: resident(p.pid)))
        thread, less_engine = asyncio.run(http_cost(url, p.pid))
    finally:
        p.terminate()
        p.wait()
    found = figures(want, single, done, seconds, sizes)
    return found | dict(http_thread_cpu=thread, http_process_cpu=less_engine, exit_code=p.returncode)


def table(f: dict) -> dict:
    return {
        "answers, whole": f["whole"], "answers, left in the middle": f["left"],
        "answers that differ from the one asked alone": f["wrong"],
        "tokens/s of whole answers": f"{f['tokens_per_second']:.0f}",
        "tokens/s, one at a time": f"{f['alone_tokens_per_second']:.0f}",
        "ratio (at least 3 wanted)": f"{f['tokens_per_second'] / f['alone_tokens_per_second']:.1f}",
        "time to first token, median and p99": f"{f['first_median']:.2f} s, {f['first_p99']:.2f} s",
        "p99 / median (below 4 wanted)": f"{f['first_p99'] / f['first_median']:.1f}",
        "server's memory in the two halves, largest": "{:.0f} MB, {:.0f} MB".format(*f["memory_mb"]),
        "CPU of the HTTP layer's thread a request (below 5 ms wanted)": f"{f['http_thread_cpu'] * 1000:.1f} ms",
        "CPU of the process a request, less the engine's": f"{f['http_process_cpu'] * 1000:.1f} ms",
        "exit code after SIGTERM": f["exit_code"]}


def report(a, info: dict, found: dict) -> str:
    rows = "\n".join(f"| {name} | {value} |" for name, value in table(found).items())
    how = f"--seconds {a.seconds:g} --clients {a.clients} --slots {a.slots} --questions {a.questions}"
    made_with = ", ".join(f"{name} {version}" for name, version in info["versions"].items())
    return f"""# tita-serve under load

Made by `python scripts/bench_serve.py {how}` at commit {str(info['commit'])[:7]} on {info['cores']} of
{info['cpus']} CPU cores, shared by server and clients ({info['system']}), load average {info['load']:.1f} at the end;
Python {info['python']}, {made_with}.
The embedded pair, {len(LAMS)} strengths, answers of {', '.join(map(str, LENGTHS))} tokens, one client in ten gone
after its first piece.

| what | |
|---|---|
{rows}
"""


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=60)
    p.add_argument("--clients", type=int, default=64)
    p.add_argument("--slots", type=int, default=32)
    p.add_argument("--questions", type=int, default=200, help="different ones")
    p.add_argument("--out", type=Path, help="write OUT.md and OUT.json")
    a = p.parse_args()
    found, info = measure(a), run_info(["torch", "transformers", "fastapi", "uvicorn"])
    info |= dict(cores=len(os.sched_getaffinity(0)), load=os.getloadavg()[0])
    text = report(a, info, found)
    print(text)
    if a.out:
        write_text(a.out.with_suffix(".md"), text)
        write_json(a.out.with_suffix(".json"), dict(info=info, figures=found))


if __name__ == "__main__":
    main()
