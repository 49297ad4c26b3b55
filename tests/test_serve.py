"The server: clients of OpenAI's interface, many at once, clients that go, faults, secrets that must not show, its end."
import importlib.util
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the serve extra is not installed: pip install 'tita[serve]'")
import httpx
import openai
import torch
from PIL import Image
from typer.testing import CliRunner
from tita.core import data_url
from tita.decode.decoder import AlignedDecoder
from tita.decode.guidance import Guidance
from tita.serve.app import create_app
from tita.serve.chat import Limits
from tita.serve.loop import Awaited, Loop
from tita.serve import serve_cli
from tita.serve.serve_cli import serving
from tita.world.embedded import load_models, make_scenes

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parent.parent
CANARY = "sk-canary-77aa90c2d7e6"
SECRET_WORD = "xylophonecanary"
BASE, REWARD, PROCESSOR = load_models()
DECODER = AlignedDecoder(BASE, REWARD, PROCESSOR, form="interpolate", lam=.5)
SCENES = make_scenes(6, seed=11)


def wait_until(test):
    "However long it takes on this machine; whoever starts the tests sets their limit."
    while not test():
        time.sleep(.01)


@contextmanager
def server(limits=Limits(), keys=(), patience=30., **loop):
    "A server in this process: its client and its loop."
    app = create_app(Loop(DECODER, **dict(slots=8) | loop), limits=limits, keys=keys)
    with serving(app, patience=patience) as url:
        with openai.OpenAI(base_url=url, api_key=keys[0] if keys else "none", max_retries=0) as client:
            yield client, app.state.service.loop


@pytest.fixture(scope="module")
def plain():
    with server() as both:
        yield both


def messages(scene, text="Describe the image."):
    image = dict(type="image_url", image_url=dict(url=data_url(scene.image)))
    return [dict(role="user", content=[image, dict(type="text", text=text)])]


def ask(client, scene=SCENES[0], text="Describe the image.", model="tita", **kwargs):
    kwargs = dict(max_tokens=24, temperature=0) | kwargs
    return client.chat.completions.create(model=model, messages=messages(scene, text), **kwargs)


def own(scene, text="Describe the image.", n=24, decoder=DECODER, **kwargs):
    return decoder.generate(scene.image, text, n, **dict(temperature=0.) | kwargs)[0]


def steer(**kwargs):
    return dict(extra_body=dict(tita=kwargs))


# The client of OpenAI.

def test_whole_and_streamed(plain):
    client, _ = plain
    want = own(SCENES[0], n=90)
    whole = ask(client, max_tokens=90, logprobs=True, top_logprobs=3, **steer(rewards=True))
    choice = whole.choices[0]
    assert choice.message.content == want.text and choice.finish_reason == "stop"
    assert whole.usage.completion_tokens == len(want.tokens)
    assert whole.usage.prompt_tokens == want.stats["prompt_tokens"]
    assert [t["reward"] for t in choice.tita["tokens"]] == pytest.approx(want.rewards[:-1], abs=1e-3)
    said = choice.logprobs.content
    assert "".join(t.token for t in said).strip() == want.text
    assert all(len(t.top_logprobs) == 3 and t.logprob == t.top_logprobs[0].logprob <= 0 for t in said)
    assert [t.top_logprobs[0].token for t in said] == [t.token for t in said], "spelled alike, with the space before"
    streamed = dict(stream=True, stream_options=dict(include_usage=True))
    parts = list(ask(client, max_tokens=90, **streamed, **steer(rewards=True)))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(p.choices[0].delta.content or "" for p in parts[:-1]) == want.text
    assert [p.choices[0].finish_reason for p in parts[:-1]][-1] == "stop"
    assert parts[-1].choices == [] and parts[-1].usage == whole.usage
    assert sum(len((p.choices[0].model_extra or {}).get("tita", {}).get("tokens", [])) for p in parts[:-1]) == len(said)


def test_what_a_request_may_say(plain):
    client, _ = plain
    want = own(SCENES[1])
    word = want.text.split()[2]
    assert ask(client, SCENES[1], stop=[word]).choices[0].message.content == want.text.split(word)[0].strip()
    assert ask(client, SCENES[1], max_tokens=None, max_completion_tokens=2).usage.completion_tokens == 2
    long = ask(client, SCENES[1], text="Is there a car in the image?", max_tokens=9, extra_body=dict(ignore_eos=True))
    assert (long.usage.completion_tokens, long.choices[0].finish_reason) == (9, "length")
    drawn = [ask(client, SCENES[1], n=3, seed=4, temperature=1.5) for _ in range(2)]
    texts = [[c.message.content for c in d.choices] for d in drawn]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1
    assert texts[0][0] == own(SCENES[1], temperature=1.5, seed=4).text
    assert ask(client, SCENES[1], response_format=dict(type="text"), extra_body=dict(anything=1)).choices
    assert [m.id for m in client.models.list()] == ["tita", "tita-base", "tita-reward"]
    assert client.models.retrieve("tita-base").id == "tita-base"
    with pytest.raises(openai.NotFoundError, match="there are tita, tita-base, tita-reward"):
        client.models.retrieve("gpt-9")


def test_usage_with_every_piece(plain):
    "`continuous_usage_stats`, as load generators ask for it: counts that grow to those of the end."
    client, _ = plain
    options = dict(include_usage=True, continuous_usage_stats=True)
    parts = list(ask(client, stream=True, stream_options=options))
    counts = [p.usage.completion_tokens for p in parts]
    assert counts == sorted(counts) and len(set(counts)) > 5 and counts[-1] == len(own(SCENES[0]).tokens)
    assert all(p.usage.total_tokens == p.usage.prompt_tokens + p.usage.completion_tokens for p in parts)
    assert len({p.usage.prompt_tokens for p in parts[1:]}) == 1 and parts[-1].choices == []
    quiet = list(ask(client, stream=True, stream_options=dict(include_usage=True)))
    assert [p.usage for p in quiet[:-1]] == [None] * (len(quiet) - 1)


def test_answers_that_wish_for_other_drafts_share_a_batch(plain):
    "Beside one that wants no drafts nothing is drafted; alone, each has its own. The answers are the same."
    client, loop = plain
    want, done = [own(s, n=90).text for s in SCENES[:3]], loop.engine.speculated
    said = lambda i, **how: ask(client, SCENES[i], max_tokens=90, **steer(**how)).choices[0].message.content
    for how, drafts in ((dict(draft=0), False), ({}, False), (dict(draft=4), True), (dict(draft="auto"), True)):
        before = done.drafted
        assert said(0, **how) == want[0] and (done.drafted > before) == drafts, how
    lengths, block = [], loop.engine._block
    loop.engine._block = lambda most: lengths.append((loop.engine.n, most)) or block(most)
    try:
        with ThreadPoolExecutor(3) as pool:
            wishes = [dict(draft=0), dict(draft=4), dict(draft=2)]
            assert [*pool.map(lambda i: said(i, **wishes[i]), range(3))] == want
    finally:
        del loop.engine._block
    assert all(n < 3 and most <= (2 if n == 2 else 4) for n, most in lengths), lengths
    assert loop.restarts == 0


def test_text_alone_turns_and_several_images(plain):
    client, loop = plain
    how = dict(model="tita", max_tokens=8, temperature=0)
    create = lambda messages: client.chat.completions.create(messages=messages, **how)
    assert create([dict(role="user", content="What color is the car?")]).choices[0].message.content
    first = messages(SCENES[2])
    turns = [*first, dict(role="assistant", content="a red car ."), dict(role="user", content="What color is the car?")]
    system = [dict(role="system", content="Be brief.")]
    silent = [first[0], dict(role="assistant", content=None), turns[2]]
    answers = [create(t).choices[0].message.content for t in (turns, system + turns, turns, silent)]
    assert answers[0] == answers[2] and all(answers)
    two = [dict(role="user", content=first[0]["content"][:1] + messages(SCENES[3])[0]["content"])]
    assert create(two).usage.prompt_tokens > create(first).usage.prompt_tokens + 20


@pytest.mark.parametrize("draft", [0, 4, "auto"])
def test_many_at_once_are_as_if_alone(draft):
    "Models, strengths and lengths mixed, over few slots, with drafts and without: no answer is lost or crossed."
    strong = AlignedDecoder(BASE, REWARD, PROCESSOR, form="interpolate", lam=.8, bound=.5, gate="margin:2")
    arm = AlignedDecoder(BASE, REWARD, PROCESSOR, form="arm", lam=.3)
    ways = [("tita", DECODER, {}), ("tita-base", DECODER.alone(), {}),
        ("tita-reward", AlignedDecoder(REWARD, processor=PROCESSOR), {}),
        ("tita", strong, dict(lam=.8, bound=.5, gate="margin:2")), ("tita", arm, dict(form="arm", lam=.3))]
    asked = [(*ways[i % len(ways)], SCENES[i % 4], q.text, 3 + 5 * (i % 4))
        for i, q in enumerate(q for s in SCENES[:3] for q in s.questions[:9])]
    with server(slots=5, draft=draft) as (client, loop), ThreadPoolExecutor(12) as pool:
        answer = lambda a: ask(client, a[3], a[4], a[0], max_tokens=a[5], **steer(**a[2])).choices[0].message.content
        got = list(pool.map(answer, asked))
    assert got == [own(scene, text, n, decoder).text for _, decoder, _, scene, text, n in asked]
    assert len(set(got)) > 8


def test_what_is_told_of_tokens_is_the_same_with_drafts(plain):
    how = dict(max_tokens=40, logprobs=True, top_logprobs=3, seed=4, n=2) | steer(rewards=True)
    with server(draft=5) as (client, loop):
        for model, temperature in (("tita", 0), ("tita-base", 0), ("tita-reward", 0), ("tita", 1.5)):
            want, got = (ask(c, model=model, temperature=temperature, **how).choices for c in (plain[0], client))
            assert [c.message.content for c in got] == [c.message.content for c in want]
            for a, b in zip(want, got):
                assert [t["changed"] for t in b.tita["tokens"]] == [t["changed"] for t in a.tita["tokens"]]
                said = ([(t.token, [x.token for x in t.top_logprobs]) for t in c.logprobs.content] for c in (a, b))
                assert next(said) == next(said)
                likely = ([t.logprob for t in c.logprobs.content] for c in (a, b))
                assert next(likely) == pytest.approx(next(likely), abs=1e-3)
        assert loop.engine.speculated.accepted > 0 and loop.restarts == 0


def test_a_warm_image_is_read_once(plain):
    client, loop = plain
    ask(client, SCENES[5])
    hits, before = loop.warm.hits, loop.engine.experts[0].counts.positions
    ask(client, SCENES[5], text="Is there a car in the image?", max_tokens=1)
    assert loop.warm.hits == hits + 1 and loop.engine.experts[0].counts.positions - before < 25
    page = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text
    assert f"tita:image_cache_hits_total {loop.warm.hits}.0" in page
    assert "tita:time_to_first_token_seconds_bucket" in page


# Clients that go, wait or are too many.

def test_a_client_that_goes_frees_its_place(plain):
    client, loop = plain
    endless = dict(max_tokens=400, stream=True, extra_body=dict(ignore_eos=True))
    stream = ask(client, **endless)
    next(iter(stream))
    jobs = list(loop.running.values())
    stream.close()
    wait_until(lambda: all(j.ended for j in jobs))
    impatient = client.with_options(timeout=.001)
    with pytest.raises(openai.APITimeoutError):
        ask(impatient, max_tokens=400, extra_body=dict(ignore_eos=True))
    wait_until(lambda: not loop.running and not loop.waiting)
    assert ask(client).choices[0].message.content == own(SCENES[0]).text


def test_too_many_are_told_when_to_come_again():
    with server(slots=1, most=1) as (client, loop):
        held = threading.Event()
        loop.carry_on, loop.carry = loop.carry, lambda batch: (held.wait(), loop.carry_on(batch))
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(ask, client)
            wait_until(lambda: loop.running)
            second = pool.submit(ask, client)
            wait_until(lambda: loop.waiting)
            with pytest.raises(openai.RateLimitError) as e:
                ask(client)
            held.set()
            assert first.result().choices and second.result().choices
    assert int(e.value.response.headers["retry-after"]) >= 1 and e.value.code == "overloaded"


class Timed(Loop):
    "A loop by a clock that is set by hand."
    time = 0.
    now = staticmethod(lambda: Timed.time)


def jobs(loop, *lengths):
    heard = [[] for _ in lengths]
    make = lambda n, hear: Awaited("Describe the image.", [SCENES[0].image],
        loop.sampling(max_new_tokens=n, eos=(), temperature=0.),
        Guidance("interpolate", lam=.5), hear.extend)
    return [make(n, h) for n, h in zip(lengths, heard)], heard


def test_time_is_limited_in_place_and_in_the_queue():
    loop = Timed(DECODER, slots=1, seconds=10.)
    made, heard = jobs(loop, 50, 50)
    loop.submit(made)
    for _ in range(4):
        loop.turn_over()
    Timed.time = 11.
    loop.turn_over()
    assert [h[-1].stats["finish"] for h in heard] == ["deadline"] * 2
    assert heard[0][-1].tokens == own(SCENES[0], n=50, eos=[]).tokens[:len(heard[0]) - 1] and len(heard[1]) == 1


def test_a_cancelled_answer_is_over_with_the_next_step():
    Timed.time = 0.
    loop = Timed(DECODER, slots=2)
    made, heard = jobs(loop, 50, 50)
    loop.submit(made)
    for _ in range(3):
        loop.turn_over()
    steps, written = loop.engine.steps, len(heard[0])
    loop.cancel(made[0])
    loop.turn_over()
    assert loop.engine.steps == steps + 1 and heard[0][-1].stats["finish"] == "cancelled"
    assert len(heard[0]) == written + 1 and list(loop.running.values()) == made[1:]


def test_a_long_answer_waits_for_short_ones_but_not_for_ever():
    Timed.time = 0.
    loop = Timed(DECODER, slots=1, seconds=1e6)
    loop.token_seconds = 1.
    (long, short), _ = jobs(loop, 60, 2)
    loop.submit([long, short])
    loop.turn_over()
    assert short.row and not long.row
    Timed.time = 100.
    later, _ = jobs(loop, 2)
    loop.submit(later)
    while loop.running or loop.waiting:
        loop.turn_over()
    assert long.row and loop.restarts == 0


def test_an_engine_error_is_told_and_the_others_go_on():
    with server() as (client, loop):
        forward = loop.engine.experts[1].forward
        def fails(*args, **kwargs):
            loop.engine.experts[1].forward = forward
            raise RuntimeError(f"broken {SECRET_WORD}")
        ask(client)
        for place in ("in a row", "in a step"):
            if place == "in a row":
                loop.engine.experts[1].forward = fails
            else:
                loop.engine.step = lambda: 1 / 0
            with pytest.raises(openai.InternalServerError) as e:
                ask(client, SCENES[3])
            assert e.value.type == "server_error" and SECRET_WORD not in str(e.value)
            assert ask(client).choices[0].message.content == own(SCENES[0]).text
        assert loop.restarts == 1 and loop.health() is None


def test_health_is_bad_when_the_loop_is_stuck():
    with server() as (client, loop):
        url = str(client.base_url).replace("/v1/", "/health")
        assert httpx.get(url).status_code == 200
        step, go_on = loop.engine.step, threading.Event()
        loop.engine.step = lambda: (go_on.wait(), step())[1]
        loop.stuck_after = 0.
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, client)
            wait_until(lambda: httpx.get(url).status_code == 503)
            go_on.set()
            assert answer.result().choices
        wait_until(lambda: httpx.get(url).status_code == 200)


# What is wrong.

def png(size=(8, 8)):
    Image.new("RGB", size).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def huge():
    "A PNG that says it has 200 megapixels."
    import struct
    import zlib
    head = struct.pack(">IIBBBBB", 20_000, 10_000, 8, 2, 0, 0, 0)
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def about(url):
    content = [dict(type="image_url", image_url=dict(url=url)), dict(type="text", text="What is it?")]
    return dict(model="tita", messages=[dict(role="user", content=content)])


SAID = dict(model="tita", messages=[dict(role="user", content="Is it red?")])
WRONG = {
    "no json": (b"{oops", 400), "nothing": (b"", 400), "a list": (b"[]", 400), "deep": (b"[" * 100_000, 400),
    "half a character": (json.dumps(SAID | dict(model="\ud800")).encode(), 404),
    "not utf-8": (b'{"model": "\xff"}', 400),
    "no messages": (dict(model="tita", messages=[]), 400), "messages a text": (dict(model="tita", messages="hi"), 400),
    "warm temperature": (SAID | dict(temperature="hot"), 400),
    "no number": (json.dumps(SAID | dict(temperature=float("nan"))), 400),
    "no tokens": (SAID | dict(max_tokens=0), 400), "odd stop": (SAID | dict(stop=[""]), 400),
    "n": (SAID | dict(n=1000), 400),
    "model": (SAID | dict(model="gpt-9"), 404), "tools": (SAID | dict(tools=[dict(type="function")]), 400),
    "λ": (SAID | dict(tita=dict(lam=-1)), 400), "form": (SAID | dict(tita=dict(form="ratio")), 400),
    "gate": (SAID | dict(tita=dict(gate="iron")), 400), "draft": (SAID | dict(tita=dict(draft="beer")), 400),
    "lazy": (SAID | dict(tita=dict(draft="lazy")), 400), "drafts": (SAID | dict(tita=dict(draft=65)), 400),
    "half a draft": (SAID | dict(tita=dict(draft=2.5)), 400), "true draft": (SAID | dict(tita=dict(draft=True)), 400),
    "draft in a list": (SAID | dict(tita=dict(draft=[4])), 400), "no draft": (SAID | dict(tita=dict(draft=-1)), 400),
    "empty": (dict(model="tita", messages=[dict(role="user", content=" ")]), 400),
    "assistant last": (dict(model="tita", messages=[dict(role="assistant", content="a")]), 400),
    "long": (dict(model="tita", messages=[dict(role="user", content="a " * 40_000)]), 400),
    "context": (dict(model="tita", messages=[dict(role="user", content="a " * 5_000)]), 400),
    "image token": (dict(model="tita", messages=[dict(role="user", content="Is <image> red?")]), None),
    "base64": (about("data:image/png;base64,!!!"), 400), "no image": (about("data:image/png;base64,aGVsbG8="), 400),
    "truncated": (about(data_url(png((64, 64))[:-40])), 400), "huge": (about(data_url(huge())), 400),
    "file": (about("file:///etc/hostname"), 400), "path": (about("/etc/hostname"), 400),
    "http": (about("http://127.0.0.1:1/x.png"), 400), "odd address": (about("http://[x"), 400),
    "media": (about("data:text/plain;base64,aGVsbG8="), 400), "no part": (about(None), 400),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_bodies(plain, name):
    client, loop = plain
    body, status = WRONG[name]
    raw = body if isinstance(body, (bytes, str)) else json.dumps(body)
    how = dict(headers={"content-type": "application/json"}, timeout=60)
    reply = httpx.post(f"{client.base_url}chat/completions", content=raw, **how)
    assert reply.status_code == status or status is None and reply.status_code in (200, 400), reply.text
    if reply.status_code != 200:
        error = reply.json()["error"]
        assert error["message"] and {"type", "param", "code"} <= error.keys() and "Traceback" not in reply.text


def test_errors_name_the_place_and_the_cure(plain):
    client, _ = plain
    part = lambda **part: dict(model="tita", messages=[dict(role="user", content=[part])])
    for body, why in ((part(type="input_audio"), "messages.0.content.0.type: Input should be 'text' or 'image_url'"),
            (part(type="image_url", image_url={}), "messages.0.content.0.image_url.url: Field required"),
            (SAID | dict(stop=[1]), "stop.0: Input should be a valid string"),
            (SAID | dict(top_logprobs=3), "send logprobs: true")):
        reply = httpx.post(f"{client.base_url}chat/completions", json=body)
        assert reply.status_code == 400 and why in reply.json()["error"]["message"]
    reply = httpx.post(f"{client.base_url}chat/completions", content=json.dumps(SAID))
    assert reply.status_code == 415 and "Content-Type: application/json" in reply.json()["error"]["message"]


def test_no_such_place(plain):
    client, _ = plain
    for method, path in (("GET", "nowhere"), ("DELETE", "models"), ("GET", "chat/completions")):
        reply = httpx.request(method, f"{client.base_url}{path}")
        assert reply.status_code in (404, 405) and reply.json()["error"]["message"]


def test_an_image_from_a_host_that_is_allowed():
    from http.server import BaseHTTPRequestHandler, HTTPServer
    raw = {"/scene.png": png((80, 80)), "/large.png": b"\0" * 200_000}
    class Images(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in raw else 302)
            self.send_header("Location", "/scene.png")
            self.end_headers()
            self.wfile.write(raw.get(self.path, b""))
        def log_message(self, *args):
            pass
    images = HTTPServer(("127.0.0.1", 0), Images)
    threading.Thread(target=images.serve_forever, daemon=True).start()
    with server(limits=Limits(hosts=("127.0.0.1",), body=100_000)) as (client, _):
        def status(path):
            body = about(f"http://127.0.0.1:{images.server_port}{path}") | dict(max_tokens=2)
            return httpx.post(f"{client.base_url}chat/completions", json=body).status_code
        assert [status(p) for p in ("/scene.png", "/large.png", "/moved.png")] == [200, 400, 400]
    images.shutdown()


def connect(client):
    s = socket.create_connection((client.base_url.host, client.base_url.port))
    s.settimeout(60)
    return s


def test_an_endless_body_and_connections_that_do_nothing():
    with server(limits=Limits(body=50_000, read_seconds=.2), patience=.05) as (client, _):
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        s, answer = connect(client), b""
        with suppress(OSError):
            s.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
            for _ in range(1000):
                s.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
        with suppress(OSError):
            answer = s.recv(4096)
        assert not answer or b" 413 " in answer
        s = connect(client)
        s.sendall(head + b"content-length: 99999999\r\n\r\n")
        assert b" 413 " in s.recv(4096)
        s = connect(client)
        s.sendall(head + b"content-length: 100\r\n\r\n{")
        assert b" 408 " in s.recv(4096)
        for said in (b"", b"GET /hea", b"\x16\x03\x01 what is this"):
            s = connect(client)
            s.sendall(said)
            with suppress(ConnectionError):
                while s.recv(4096):
                    pass
        assert len(list(client.models.list())) == 3


# Keys and logs, in a process of its own.

def command(*args):
    return [sys.executable, "-c", "from tita.serve.serve_cli import main; main()", *map(str, args)]


@contextmanager
def process(tmp_path, *args, **env):
    "tita-serve in a process: the process, and its address."
    clean = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
    known = dict(clean, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TITA_PROGRESS="0", **env)
    with open(tmp_path/"log", "wb") as log:
        p = subprocess.Popen(command("--port", 0, *args), stdout=subprocess.PIPE, stderr=log, env=known, text=True)
        try:
            line = p.stdout.readline()
            assert line, (tmp_path/"log").read_text()
            yield p, re.search(r"http://\S+", line)[0]
        finally:
            p.kill()
            p.wait()


def test_told_to_end_under_load_it_ends_what_is_under_way(tmp_path):
    "And neither key nor prompt is in its log, whatever went wrong."
    with process(tmp_path, "--lam", .5, TITA_API_KEYS=f"other,{CANARY}") as (p, url):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key=f"{CANARY}x", max_retries=0).models.list()
        assert httpx.get(url.replace("/v1", "/health")).status_code == 200
        client = openai.OpenAI(base_url=url, api_key=CANARY, max_retries=0)
        wrong = dict(model="tita", messages=[dict(role="user", content=f"{SECRET_WORD} <image>")])
        for body in (wrong, dict(wrong, temperature=SECRET_WORD), dict(wrong, model=SECRET_WORD)):
            httpx.post(f"{url}/chat/completions", json=body, headers=dict(authorization=f"Bearer {CANARY}"))
        how = dict(text=f"Describe {SECRET_WORD}.", max_tokens=200, extra_body=dict(ignore_eos=True))
        whole = [ask(client, s, **how) for s in SCENES[:2]]
        streams = [ask(client, s, stream=True, **how)
            for s in SCENES[:2] * 2]
        begun = [next(iter(s)) for s in streams]
        p.send_signal(signal.SIGTERM)
        texts = ["".join(c.choices[0].delta.content or "" for c in s) for s in streams]
        assert p.wait() == 0 and begun
        assert texts == [w.choices[0].message.content for w in whole] * 2
        said = p.stdout.read() + (tmp_path/"log").read_text()
    assert CANARY not in said and SECRET_WORD not in said
    lines = [json.loads(line) for line in (tmp_path/"log").read_text().splitlines() if line.startswith("{")]
    assert sum(line["event"] == "request" and line["status"] == 200 for line in lines) >= 6


def typed(app, *args):
    "What a command says, in this process."
    result = CliRunner().invoke(app, [str(a) for a in args])
    return result.exit_code, result.output


def test_command_line_tells_mistakes_in_a_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (tmp_path/"keys").write_text("\n")
        for args, why in ((["--key-file", tmp_path/"keys"], "no key in it"), (["--gate", "iron"], "gate 'iron'"),
                (["--port", taken.getsockname()[1]], "choose another with --port")):
            code, said = typed(serve_cli.app, *args)
            assert code == 2 and why in said and "Traceback" not in said


def test_chat_in_a_terminal(plain, tmp_path):
    client, _ = plain
    SCENES[0].image.save(tmp_path/"scene.png")
    asked = "--server", client.base_url, "--message", "Describe the image."
    code, said = typed(serve_cli.chat_app, tmp_path/"scene.png", *asked)
    assert code == 0, said
    assert own(SCENES[0], n=128).text in said and own(SCENES[0], n=128, decoder=DECODER.alone()).text in said
    code, said = typed(serve_cli.chat_app, "--server", "http://127.0.0.1:1/v1", "--message", "hi")
    assert code == 2 and "is it the address" in said
    code, said = typed(serve_cli.chat_app, tmp_path/"scene.png", *asked, "--lam", 7)
    assert code == 2 and "it must be from 0 to 1" in said and "is it the address" not in said


# Other clients.

@pytest.mark.slow
def test_bench(plain, tmp_path):
    client, _ = plain
    SCENES[0].image.save(tmp_path/"a.png")
    asked = enumerate(SCENES[0].questions[:6])
    rows = [dict(question_id=i, image="a.png", text=q.text, answer=q.answer) for i, q in asked]
    (tmp_path/"q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = ["run", "--questions", tmp_path/"q.jsonl", "--images", tmp_path, "--out", tmp_path/"out.jsonl",
        "--base-url", client.base_url, "--model", "tita"]
    r = subprocess.run([sys.executable, "-c", "from tita.bench.bench_cli import main; main()", *map(str, args)],
        capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert r.returncode == 0, r.stdout + r.stderr
    said = [json.loads(line) for line in (tmp_path/"out.jsonl").read_text().splitlines()]
    assert len(said) == 6 and all(row["success"] for row in said)


def ask_for_much(client):
    "A connection on which several megabytes are coming, more than systems keep for one that does not read."
    body = json.dumps(dict(model="tita", messages=messages(SCENES[0]), max_tokens=400, ignore_eos=True, stream=True,
        n=8, logprobs=True, top_logprobs=20)).encode()
    s = connect(client)
    s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: %d\r\n\r\n" % len(body) + body)
    return s


def read_on(s, pause=0.):
    "What comes, until the connection or the answer ends."
    said = b""
    with suppress(ConnectionError):
        while not said.endswith(b"0\r\n\r\n") and (part := s.recv(32768)):
            said += part
            time.sleep(pause)
    return said


@pytest.mark.slow
def test_who_does_not_read_is_let_go_and_harms_nobody():
    with server(patience=.5) as (client, loop):
        s = ask_for_much(client)
        wait_until(lambda: loop.running)
        assert ask(client).choices[0].message.content == own(SCENES[0]).text
        wait_until(lambda: not loop.running)
        time.sleep(2)
        said = read_on(s)
        assert len(said) > 100_000 and b"[DONE]" not in said


@pytest.mark.slow
def test_who_reads_slowly_gets_all():
    with server(patience=.3) as (client, loop):
        s, start = ask_for_much(client), time.monotonic()
        said = read_on(s, pause=.02)
        assert said.count(b"[DONE]") == 1 and time.monotonic() - start > 10 * .3


@pytest.mark.slow
def test_no_defect_by_schemathesis(plain, tmp_path):
    if importlib.util.find_spec("schemathesis") is None:
        pytest.skip("schemathesis is not installed")
    client, loop = plain
    url = str(client.base_url).replace("/v1/", "/openapi.json")
    r = subprocess.run([sys.executable, "-m", "schemathesis.cli", "run", url, "--checks", "not_a_server_error",
        "--max-examples", "60", "--seed", "1"], capture_output=True, text=True,
        cwd=tmp_path)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-1000:]
    assert loop.health() is None


@pytest.mark.slow
def test_langchain(plain):
    pytest.importorskip("langchain_openai", reason="langchain_openai is not installed")
    from langchain_openai import ChatOpenAI
    client, _ = plain
    model = ChatOpenAI(base_url=str(client.base_url), api_key="none", model="tita", temperature=0, max_tokens=24)
    turns = messages(SCENES[0])
    assert model.invoke(turns).content == own(SCENES[0]).text
    assert "".join(part.content for part in model.stream(turns)) == own(SCENES[0]).text


@pytest.mark.slow
def test_lmms_eval(plain):
    "Its model `openai`, with images and its own threads."
    chat = pytest.importorskip("lmms_eval.models.chat.openai", reason="lmms-eval is not installed")
    from lmms_eval.api.instance import Instance
    client, _ = plain
    model = chat.OpenAICompatible(model="tita", base_url=str(client.base_url), api_key="none", num_concurrent=3)
    model.task_dict = dict(mine=dict(test=SCENES))
    asks = lambda scene: [dict(role="user", content=[dict(type="image", url=scene.image),
        dict(type="text", text="Describe the image.")])]
    about = dict(task="mine", doc_id=0, repeats=1)
    how = dict(max_new_tokens=24, temperature=0)
    requests = [Instance("generate_until", ("", asks, how, i, "mine", "test"), i, about) for i in range(len(SCENES))]
    assert [getattr(a, "text", a) for a in model.generate_until(requests)] == [own(s).text for s in SCENES]


@pytest.mark.slow
def test_guidellm(plain, tmp_path):
    "A load generator: it waits for /health, streams, ignores ends and reads the usage of every piece."
    if importlib.util.find_spec("guidellm") is None:
        pytest.skip("guidellm is not installed: pip install guidellm")
    client, _ = plain
    asked = [(q.text, data_url(s.image)) for s in SCENES for q in s.questions[:3]]
    rows = [dict(prompt=text, image=url, output_tokens_count=12) for text, url in asked]
    (tmp_path/"data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = ["run", "--backend", f"kind=openai_http,target={str(client.base_url).removesuffix('/v1/')},model=tita",
        "--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=16",
        "--data", f"kind=json_file,path={tmp_path/'data.jsonl'}", "--output", f"kind=json,path={tmp_path/'out.json'}"]
    run = subprocess.run([sys.executable, "-m", "guidellm", *args], capture_output=True, text=True, cwd=tmp_path)
    assert (tmp_path/"out.json").exists(), run.stdout[-3000:] + run.stderr[-3000:]
    counts = json.loads((tmp_path/"out.json").read_text())["benchmarks"][0]["metrics"]["request_totals"]
    assert counts["successful"] == 16 and counts["errored"] == 0, counts
