"A base that is split over two processes, on a CPU: `torchrun`, `tita-serve --tensor-parallel`, and clients."
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed: pip install 'tita[serve]'")
import httpx
import openai
import torch
from tita.core import data_url
from tita.decode.decoder import AlignedDecoder
from tita.world.embedded import load_models, make_scenes

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
WORLD = ROOT/"data"/"world"/"seed0"
SCENES = make_scenes(3, seed=11)
CODE = "from tita.serve.serve_cli import main; main()"
RUNNING = re.compile(r"^\S*num_requests_running\S* (\S+)$", re.M)


def started(tmp_path, *options):
    "torchrun with two processes, its address, and where its log is."
    script = tmp_path/"serve.py"
    script.write_text(CODE)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, script]
    models = ["--base", WORLD/"base", "--reward", WORLD/"reward"]
    command = [*run, "--tensor-parallel", *models, "--port", 0, "--lam", .5, "--form", "interpolate", *options]
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TITA_PROGRESS="0")
    with open(tmp_path/"log", "wb") as log:
        p = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=log, env=env, text=True)
    line = next((line for line in p.stdout if "http" in line), None)
    assert line, (tmp_path/"log").read_text()
    return p, re.search(r"http://\S+", line)[0]


def children(p) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


ON_LINUX = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")


@pytest.mark.slow
@ON_LINUX
@pytest.mark.parametrize("draft", [0, 4])
def test_two_processes_answer_as_one(tmp_path, draft):
    "Whole, streamed and cancelled answers, drawn ones, a warm image; SIGTERM ends both, after what is under way."
    base, reward, processor = load_models()
    alone = AlignedDecoder(base, reward, processor, form="interpolate", lam=.5)
    how = dict(model="tita", max_tokens=40, temperature=0)
    image = lambda s: dict(type="image_url", image_url=dict(url=data_url(s.image)))
    said = lambda s, text: [dict(role="user", content=[image(s), dict(type="text", text=text)])]
    own = lambda s, text, n=40, **more: alone.generate(s.image, text, n, **dict(temperature=0.) | more)[0].text
    p, url = started(tmp_path, "--draft", draft, "--slots", 4)
    try:
        pids = children(p)
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
        ask = lambda s, text="Describe the image.", **more: client.chat.completions.create(
            messages=said(s, text), **how | more)
        text = lambda reply: reply.choices[0].message.content
        assert len(pids) == 2
        assert [text(ask(s)) for s in SCENES] == [own(s, "Describe the image.") for s in SCENES]
        assert text(ask(SCENES[0], "Is there a dog?")) == own(SCENES[0], "Is there a dog?"), "of a warm image"
        drawn = dict(temperature=1., seed=3)
        assert text(ask(SCENES[1], **drawn)) == own(SCENES[1], "Describe the image.", **drawn)
        steered = ask(SCENES[1], extra_body=dict(tita=dict(lam=.2, draft="auto")))
        assert text(steered) == own(SCENES[1], "Describe the image.", lam=.2)
        endless = dict(max_tokens=500, stream=True, extra_body=dict(ignore_eos=True))
        gone, stays = ask(SCENES[0], **endless), ask(SCENES[2], stream=True)
        next(iter(gone))
        gone.close()
        streamed = lambda s: "".join(c.choices[0].delta.content or "" for c in s if c.choices)
        assert streamed(stays) == own(SCENES[2], "Describe the image.")
        running = lambda: RUNNING.search(httpx.get(url.replace("/v1", "/metrics")).text)[1]
        while running() != "0.0": # long before 500 tokens
            time.sleep(.1)
        last = ask(SCENES[0], stream=True)
        first = next(iter(last)).choices[0].delta.content or ""
        p.send_signal(signal.SIGTERM)
        assert first + streamed(last) == own(SCENES[0], "Describe the image.")
        p.wait(60)
        assert not any(map(is_alive, pids))
    finally:
        p.kill()
        p.wait()
    log = (tmp_path/"log").read_text()
    lines = [json.loads(l) for l in log.splitlines() if l.startswith('{"time')]
    ends = [end for line in lines if line["event"] == "request" for end in line["finish"]]
    assert sorted(map(str, ends)) == ["None", *["eos"] * 8], log[-3000:]


@pytest.mark.slow
@ON_LINUX
@pytest.mark.parametrize("which", [0, 1])
def test_without_one_the_other_ends(tmp_path, which):
    p, url = started(tmp_path)
    try:
        pids = children(p)
        os.kill(pids[which], signal.SIGKILL)
        assert p.wait() and not any(map(is_alive, pids))
    finally:
        p.kill()
        p.wait()
