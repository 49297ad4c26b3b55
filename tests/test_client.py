"The client against servers that send any bytes at all: whatever comes has a name, and no run ends by it."
import asyncio
import json
import re
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from hypothesis import given, settings, strategies as st

from tita.api.client import Client, EndpointAnswerer, Settings, make_body, run_async
from tita.api.replies import KINDS
from tita.api.endpoints import Price, any_endpoint
from tita.bench.scores import summarise
from tita.bench.traffic import run_load
from tita.core import read_jsonl

ONCE = Settings(retries=0, timeout=20)
HURRIED = Settings(retries=0, timeout=.3)


def http(body, status="200 OK", kind="application/json", **headers) -> bytes:
    "A whole response."
    text = body if isinstance(body, (bytes, str)) else json.dumps(body)
    raw = text.encode() if isinstance(text, str) else text
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(raw)}", "connection: close"]
    return "\r\n".join([*lines, *(f"{k}: {v}" for k, v in headers.items())]).encode() + b"\r\n\r\n" + raw


def answer(content="a boat", end="stop", **message) -> dict:
    choice = {"message": {"content": content, **message}, "finish_reason": end}
    return {"choices": [choice], "usage": {"prompt_tokens": 3}}


def stream(*pieces, done=True, head=None) -> bytes:
    "A streamed response; a text is a piece as it is."
    lines = [p if isinstance(p, str) else json.dumps(p) for p in pieces] + ["[DONE]"] * done
    head = head or "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
    return head.encode() + "".join(f"data: {line}\n\n" for line in lines).encode()


def delta(content=None, end=None, **more) -> dict:
    return {"choices": [{"delta": {"content": content, **more}, "finish_reason": end}]}


OK = "HTTP/1.1 200 OK\r\n"
CHUNKED = f"{OK}content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".encode()
COUNTED = {"prompt_tokens": 3, "completion_tokens": 2}
FASTAPI = {"detail": [{"type": "missing", "loc": ["body", "messages"], "msg": "Field required"}]}
NESTED = "[" * 100_000

# What a server sends -> the kind of the failure.
BROKEN = {
    "nothing": (b"", "connection"),
    "half a head": (b"HTTP/1.1 200 OK\r\ncontent-ty", "connection"),
    "half a body": (f"{OK}content-length: 999\r\n\r\n{{".encode(), "connection"),
    "half a stream": (CHUNKED + b'1c\r\ndata: {"choices": [', "connection"),
    "a bad chunk": (CHUNKED + b"zzz\r\nno number\r\n", "protocol"),
    "no gzip": (http(b"no gzip", **{"content-encoding": "gzip"}), "connection"),
    "tls": (b"\x15\x03\x01\x00\x02\x02\x46", "protocol"),
    "ssh": (b"SSH-2.0-OpenSSH_9.6\r\n", "protocol"),
    "redis": (b"-ERR unknown command 'POST'\r\n", "protocol"),
    "bad length": (f"{OK}content-length: many\r\n\r\n".encode(), "protocol"),
    "an endless header": (f"{OK}x: {'x' * 200_000}\r\n\r\n".encode(), "protocol"),
    "no json": (http("oops"), "invalid_json"),
    "no body": (http(""), "invalid_json"),
    "html": (http("<html><title>Log in</title></html>", kind="text/html"), "invalid_json"),
    "no utf-8": (http(b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'), "invalid_json"),
    "deep": (http(NESTED), "invalid_json"),
    "deep in a stream": (stream(NESTED), "invalid_json"),
    "a number of 5000 digits": (http('{"usage": ' + "9" * 5000 + "}"), "invalid_json"),
    "a list": (http([]), "invalid_json"),
    "a piece that is a number": (stream("3"), "invalid_json"),
    "choices null": (http({"choices": [None]}), "invalid_json"),
    "choices text": (http({"choices": "a boat"}), "invalid_json"),
    "choices number": (stream({"choices": 3}), "invalid_json"),
    "message list": (http({"choices": [{"message": ["a"]}]}), "invalid_json"),
    "delta number": (stream({"choices": [{"delta": 3}]}), "invalid_json"),
    "content number": (http(answer(3)), "invalid_json"),
    "content list of numbers": (http(answer([1, 2])), "invalid_json"),
    "content object": (stream(delta({"a": 1})), "invalid_json"),
    "no choices": (http({"choices": []}), "truncated"),
    "an object": (http({}), "truncated"),
    "no end": (http(answer(end=None)), "truncated"),
    "an unfinished stream": (stream(delta("a bo"), done=False), "truncated"),
    "an empty stream": (stream(), "truncated"),
    "empty": (http(answer("")), "empty"),
    "blank": (stream(delta(" \n"), delta(end="stop")), "empty"),
    "null": (http(answer(None)), "empty"),
    "only thought": (stream(delta("<think>is it", end="length")), "empty"),
    "filtered": (http(answer("a b", "content_filter") | {"usage": COUNTED}), "content_filter"),
    "tools": (http(answer(None, "tool_calls", tool_calls=[{"id": "1"}])), "tool_calls"),
    "tools in a stream": (stream(delta(tool_calls=[{"index": 0}]), delta(end="tool_calls")), "tool_calls"),
    "refused": (http(answer(None, refusal="I would rather not.")), "refusal"),
    "an error in place of an answer": (http({"error": "out of memory"}), "stream_error"),
    "an old error": (http({"object": "error", "message": "no", "code": 40303}), "stream_error"),
    "an error with a status": (http({"error": {"message": "busy", "code": 429}}), "rate_limit"),
    "an error in a stream": (stream(delta("a"), {"error": {"message": "the engine died"}}), "stream_error"),
    "quota": (http({"error": {"message": "pay", "type": "insufficient_quota"}}, "429 Too Many"), "quota"),
    "quota in a stream": (stream({"error": {"message": "pay", "code": "insufficient_quota"}}), "quota"),
    "no money": (http({"error": "balance"}, "402 Payment Required"), "quota"),
    "moved": (http("", "301 Moved", location="https://new.example/v1"), "redirect"),
    "fastapi": (http(FASTAPI, "422 -"), "unprocessable"),
    "detail": (http({"detail": "Method Not Allowed"}, "405 -"), "http_405"),
    "a page": (http("<h1>502 Bad Gateway</h1><hr>nginx", "502 Bad Gateway", "text/html"), "server_error"),
    "a status of no meaning": (b"HTTP/1.1 999 Request denied\r\nconnection: close\r\n\r\n", "server_error"),
    "half an error": (b"HTTP/1.1 503 Busy\r\ncontent-length: 99\r\n\r\n{", "server_error"),
}

# What a server sends -> the answer.
FINE = {
    "plain": (http(answer()), "a boat"),
    "a long header": (http(answer(), **{"x-trace": "x" * 20_000}), "a boat"),
    "half a pair": (http(answer("a \ud83d boat")), "a \ufffd boat"),
    "a pair in two pieces": (stream(delta("\ud83d"), delta("\ude00", "stop")), "😀"),
    "parts": (http(answer([{"type": "text", "text": "a "}, {"type": "text", "text": "boat"}])), "a boat"),
    "cut at the length": (http(answer(end="length")), "a boat"),
    "no reason to end": (stream(delta("a boat"), {"choices": [], "usage": {"prompt_tokens": 3}}), "a boat"),
    "no done": (stream(delta("a boat", "stop"), done=False), "a boat"),
    "a whole answer to a stream": (http(answer(), kind="text/plain"), "a boat"),
    "comments": (stream(delta("a boat", "stop")).replace(b"data:", b": ping\nevent: x\ndata:"), "a boat"),
    "error null": (http(answer() | {"error": None}), "a boat"),
    "strange counts": (http(answer() | {"usage": {"prompt_tokens": 10**400, "total_tokens": None}}), "a boat"),
    "counts that are none": (http(answer() | {"usage": [1]}), "a boat"),
    "an odd end": (http(answer(end={"reason": "\ud800"})), "a boat"),
    "null delta": (stream(delta("a boat"), {"choices": [{"delta": None, "finish_reason": "stop"}]}), "a boat"),
    "tools beside an answer": (http(answer(tool_calls=[])), "a boat"),
}
SAID = {"an error in place of an answer": "out of memory", "an old error": "no", "a page": "502: 502 Bad Gateway nginx",
    "moved": "301: moved to https://new.example/v1; give that as the address", "detail": "405: Method Not Allowed",
    "fastapi": "422: body.messages: Field required", "no money": "402: balance", "html": "not JSON: Log in",
    "refused": "I would rather not.", "an error in a stream": "the engine died"}


class RawServer:
    "Sends what `says` has for the case that a question names, then closes; `then` does something else instead."
    def __init__(self):
        self.says = {name: raw for name, (raw, _) in (BROKEN | FINE).items()}
        self.then, self.asked = {}, []

    async def connection(self, reader, writer):
        head = await reader.read(1)
        if head == b"\x16":  # a client that wants TLS
            writer.write(http("speak HTTP", "400 Bad Request"))
            return writer.close()
        head += await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(http({"data": []}))
            return writer.close()
        body = await reader.readexactly(int(re.search(rb"content-length: (\d+)", head, re.I)[1]))
        case = json.loads(body)["messages"][-1]["content"]
        self.asked.append(body)
        writer.write(self.says.get(case, b""))
        if case in self.then:
            await self.then[case](writer, body)
        writer.close()

    async def serve(self):
        self.loop, self.end = asyncio.get_running_loop(), asyncio.Event()
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0, limit=2**26)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await self.end.wait()
        server.close()

    def __enter__(self):
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self.serve()), daemon=True)
        self.thread.start()
        assert self.ready.wait(30)
        return self

    def __exit__(self, *exc):
        self.loop.call_soon_threadsafe(self.end.set)
        self.thread.join(10)

    def endpoint(self, scheme="http"):
        return any_endpoint(f"{scheme}://127.0.0.1:{self.port}/v1", "m")

    def ask(self, case, how=ONCE, scheme="http"):
        async def one():
            async with Client(self.endpoint(scheme), how) as client:
                return await client.ask(make_body("m", case, settings=how))
        return run_async(one())


@pytest.fixture(scope="module")
def server():
    with RawServer() as s:
        yield s


@pytest.mark.parametrize("case", BROKEN)
def test_what_breaks_has_a_name(server, case):
    reply, tries = server.ask(case)
    assert reply is None and tries[-1]["error"] == BROKEN[case][1], tries
    assert tries[-1]["message"] and json.dumps(tries).encode("utf-8")


@pytest.mark.parametrize("case", FINE)
def test_what_is_odd_and_an_answer(server, case):
    reply, tries = server.ask(case)
    assert reply is not None and reply.text == FINE[case][1], tries
    assert json.dumps(vars(reply), ensure_ascii=False).encode("utf-8")


@pytest.mark.parametrize("case", SAID)
def test_what_the_server_said_is_kept(server, case):
    assert server.ask(case)[1][-1]["message"] == SAID[case]


def test_connections_that_are_reset_or_refused(server):
    async def reset(writer, body):
        gone = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, gone)
        writer.transport.abort()
    server.then["reset"] = reset
    assert server.ask("reset")[1][0]["error"] == "connection"
    with RawServer() as gone:
        pass
    assert gone.ask("plain")[1][0]["error"] == "connection"
    assert server.ask("plain", scheme="https")[1][0]["error"] == "protocol"


def test_what_never_ends_runs_out_of_time(server):
    async def hang(writer, body):
        await asyncio.sleep(5)
    async def trickle(writer, body):
        while not writer.is_closing():
            writer.write(b": ping\n")
            await asyncio.sleep(.01)
    server.then |= {"hang": hang, "trickle": trickle}
    server.says["trickle"] = stream(delta("a"), done=False)
    assert server.ask("hang", HURRIED)[1][0]["error"] == "timeout"
    [record] = server.ask("trickle", HURRIED)[1]
    assert (record["error"], record["text"]) == ("timeout", "a")


def test_bad_chunks_have_one_name_whenever_they_come(server):
    async def late(writer, body):
        await writer.drain()
        await asyncio.sleep(.1)
        writer.write(b"zzz\r\n")
    server.says["late"], server.then["late"] = CHUNKED + b"9\r\ndata: {}\n\r\n", late
    assert server.ask("late")[1][0]["error"] == "protocol"


def test_a_dropped_connection_is_asked_again(server):
    left = [2]
    async def flaky(writer, body):
        if left[0]:
            left[0] -= 1
        else:
            writer.write(http(answer()))
    server.then["flaky"] = flaky
    reply, tries = server.ask("flaky", Settings(retries=5, backoff=.001))
    assert [t["error"] for t in tries] == ["connection", "connection", None] and reply.text == "a boat"


def test_what_makes_no_sense_is_not_asked_again(server):
    patient = Settings(retries=3, backoff=.001)
    for case in "quota", "no money", "moved", "fastapi", "filtered", "tools", "refused", "empty", "tls":
        assert len(server.ask(case, patient)[1]) == 1, case
    for case in "a page", "half a body", "no json", "truncated", "an error in a stream":
        assert len(server.ask(case, patient)[1]) == 4, case


def test_a_server_that_does_not_count_is_asked_without(server):
    "FastAPI refuses fields that it does not know with 422 and a list of places."
    wrong = {"type": "extra_forbidden", "loc": ["body", "stream_options"], "msg": "Extra inputs are not permitted"}
    async def strict(writer, body):
        refused = http({"detail": [wrong]}, "422 -")
        writer.write(refused if b"stream_options" in body else stream(delta("a boat", "stop")))
    server.then["strict"] = strict
    reply, tries = server.ask("strict")
    assert reply.text == "a boat" and len(tries) == 1


def test_what_failed_and_cost_is_on_record(server):
    assert server.ask("filtered")[1][0]["usage"] == COUNTED
    assert server.ask("an unfinished stream")[1][0]["text"] == "a bo"
    assert not {"usage", "text"} & server.ask("a page")[1][0].keys()


def test_a_run_has_a_row_for_each(server, tmp_path):
    "Of `tita-bench run`, and of everything that takes answers as they come. A wrong key stops it, and nothing else."
    cases = {**BROKEN, **FINE}
    questions = [dict(question_id=i, text=case) for i, case in enumerate(cases)]
    result = run_load(questions, [server.endpoint()], tmp_path/"out.jsonl", settings=ONCE)
    rows = {r["prompt"]: r for r in read_jsonl(tmp_path/"out.jsonl")}
    assert rows.keys() == cases.keys() and result["failed"] == len(BROKEN)
    named = {c: r["error_kind"] for c, r in rows.items() if not r["success"]}
    assert named == {c: kind for c, (_, kind) in BROKEN.items()}
    answered = {a.question["text"]: a for a in EndpointAnswerer(server.endpoint(), settings=ONCE).answers(questions)}
    assert {c: a.kind for c, a in answered.items()} == {c: r["error_kind"] for c, r in rows.items()}
    assert all(bool(a.error) == (c in BROKEN) for c, a in answered.items())


def test_failed_calls_cost_too(server, tmp_path):
    price = Price(input=1., output=10., currency="CNY", date="2026-01-01")
    questions = [dict(question_id=c, text=c) for c in ("plain", "filtered", "an unfinished stream", "a page")]
    run_load(questions, [replace(server.endpoint(), price=price)], tmp_path/"out.jsonl", settings=ONCE)
    rows = {r["prompt"]: r for r in read_jsonl(tmp_path/"out.jsonl")}
    assert rows["filtered"]["cost"] == pytest.approx(price.cost(3, 2))
    assert rows["an unfinished stream"]["cost"] > 0 and rows["a page"]["cost"] is None and rows["plain"]["cost"] > 0
    assert summarise(list(rows.values()))["cost"]["total"] == pytest.approx(sum(r["cost"] or 0 for r in rows.values()))


def test_generate_is_as_patient_as_it_is_told(server, tmp_path):
    "`tita-data generate` over the same client: time limit, retries, names of what went wrong."
    async def hang(writer, body):
        await asyncio.sleep(60)
    server.then["hang"] = hang
    server.asked.clear()
    rows = [dict(question_id=c, image="", text=c) for c in ("plain", "hang", "a page", "half a pair")]
    (tmp_path/"q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = [sys.executable, "-c", "from tita.data.data_cli import main; main()", "generate", tmp_path/"q.jsonl"]
    asked = ["--view", "none", "--images", tmp_path, "--out", tmp_path/"a.jsonl", "--engine", "openai", "--model", "m"]
    patience = ["--base-url", server.endpoint().base_url, "--timeout", 3, "--retries", 1, "--max-rps", 100]
    run = subprocess.run(list(map(str, command + asked + patience)), capture_output=True, text=True)
    assert run.returncode == 1, run.stdout + run.stderr
    failed = {r["question_id"]: (r["error_kind"], r["error"]) for r in read_jsonl(tmp_path/"a.errors.jsonl")}
    nginx = "server_error", "HTTP 502: 502 Bad Gateway nginx"
    assert failed == {"hang": ("timeout", "no answer within 3 s"), "a page": nginx}
    answers = {r["question_id"]: r["answer"] for r in read_jsonl(tmp_path/"a.jsonl")}
    assert answers == {"plain": "a boat", "half a pair": "a \ufffd boat"}
    assert sum(b'"a page"' in body for body in server.asked) == 2


WHOLE = [raw for raw, _ in (FINE | BROKEN).values() if len(raw) < 1000]
KEYS = ["choices", "message", "delta", "content", "error", "usage", "code", "finish_reason"]


@st.composite
def mutated(draw):
    "A response with some of its bytes replaced, left out or repeated."
    raw = bytearray(draw(st.sampled_from(WHOLE)))
    for _ in range(draw(st.integers(1, 4))):
        at, n = draw(st.integers(0, len(raw))), draw(st.integers(0, 6))
        raw[at:at + n] = draw(st.binary(max_size=6))
    return bytes(raw)


def deeper(inner):
    return st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), deeper)
STREAMS = st.lists(JSON, max_size=3).map(lambda pieces: stream(*pieces))
SHORT = st.binary(max_size=80)
ODD = SHORT.map(http) | SHORT.map(CHUNKED.__add__)
BYTES = st.one_of(st.binary(max_size=200), mutated(), JSON.map(http), STREAMS, ODD)


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(BYTES)
def test_any_bytes(server, raw):
    server.says["fuzz"] = raw
    reply, tries = server.ask("fuzz", Settings(retries=0, timeout=2))
    kind = tries[-1]["error"]
    assert kind in KINDS or re.fullmatch(r"http_\d+", str(kind)) or kind is None and reply.text
    assert json.dumps([tries, reply and vars(reply)], ensure_ascii=False).encode("utf-8")
