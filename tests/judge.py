"""A stand-in judge as a process of its own: scores answers, and behaves badly while doing so. Loopback only.

    python tests/judge.py BAD

BAD is the share of requests that go wrong: malformed JSON, refusals, 429, 500, dropped connections, in turn. Prints its
address. A question with the word "forbidden" is always refused. Asked for no scores, it answers with a word that depends
on the image.
Ends when its standard input closes (so never after the process that started it).
"""
import base64, contextlib, hashlib, json, random, re, subprocess, sys, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ATTRIBUTES = "helpfulness", "correctness", "coherence", "complexity", "verbosity"
BAD = "malformed", "schema", "refusal", "429", "500", "drop"


class Judge(BaseHTTPRequestHandler):
    protocol_version, bad, rng = "HTTP/1.1", 0., random.Random(0)

    def log_message(self, *args):
        pass

    def send(self, status, body, **headers):
        data = json.dumps(body).encode()
        self.send_response(status)
        for k, v in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        self.wfile.write(data)

    def say(self, content, refusal=None):
        message = {"role": "assistant", "content": content, "refusal": refusal}
        self.send(200, {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]})

    def asked(self):
        "The text of the first message, and the bytes of its pictures."
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        if isinstance(content, str):
            return content, []
        *pictures, text = content
        return text["text"], [base64.b64decode(p["image_url"]["url"].split(",")[1]) for p in pictures]

    def do_POST(self):
        text, pictures = self.asked()
        mood = self.rng.choice(BAD) if self.rng.random() < self.bad else "good"
        if "forbidden" in text:
            return self.say(None, "I would rather not.")
        if mood == "drop":
            self.close_connection = True
            return self.connection.close()
        if mood == "429":
            return self.send(429, {"error": {"message": "slow down"}}, Retry_After="0.01")
        if mood == "500":
            return self.send(500, {"error": {"message": "overloaded"}})
        if mood == "refusal":
            return self.say(None, "I would rather not.")
        seen = hashlib.sha256(b"".join(pictures) + text.encode()).digest()[0]
        if "Score each" not in text:
            return self.say("I cannot see the image" if mood != "good" else ("yes", "no")[seen % 2])
        assert pictures, "a judge has to see the image"
        scores = json.dumps({"scores": list(self.scores(text, 7 if mood == "schema" else None))})
        self.say(scores[:-3] if mood == "malformed" else scores)

    def scores(self, text, wrong=None):
        "A score for each answer that is shown, by its length."
        for i, said in enumerate(re.findall(r"^Answer \d+:\n(.*)$", text, re.M), 1):
            yield {"answer": i} | dict.fromkeys(ATTRIBUTES, len(said) % 5 if wrong is None else wrong)


@contextlib.contextmanager
def judge(bad=0.):
    "Start it, give its address, end it."
    p = subprocess.Popen([sys.executable, __file__, str(bad)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield p.stdout.readline().strip()
    finally:
        p.stdin.close()
        p.stdout.close()
        p.wait()


if __name__ == "__main__":
    Judge.bad = float(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads = True
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    threading.Thread(target=lambda: (sys.stdin.read(), server.shutdown()), daemon=True).start()
    server.serve_forever()
