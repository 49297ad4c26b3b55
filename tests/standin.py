"""A stand-in endpoint as a process of its own: loopback only, stops by itself.

    python tests/standin.py '{"answers": "q.jsonl", "models": {"m": {"delay": 0.05}}, "faults": {"429": 0.1}}' [LOG]

Prints its address. Ends when its standard input closes (so never after the process that started it) or after ten
minutes. LOG gets a line for each request, when it arrives.
"""
import asyncio, contextlib, json, subprocess, sys, threading
from pathlib import Path


class Log(list):
    "A list that also writes what is appended to a file."
    def __init__(self, path):
        super().__init__()
        self.file = open(path, "a", buffering=1)
    def append(self, entry):
        super().append(entry)
        self.file.write(json.dumps(entry) + "\n")


def main(config: str, log: str | None = None):
    from tita.core import read_jsonl
    from tita.api.standin import Persona, StandIn, known_answers
    config = json.loads(config)
    if path := config.pop("answers", None):
        config["answers"] = known_answers(read_jsonl(path), Path(path).parent)
    if "models" in config:
        config["models"] = {m: Persona(**p) for m, p in config["models"].items()}
    server = StandIn(**config)
    if log:
        server.log = Log(log)

    async def serve():
        task = asyncio.create_task(server.serve(ready := threading.Event()))
        while not ready.is_set():
            await asyncio.sleep(.01)
        print(server.url, flush=True)
        loop = asyncio.get_running_loop()
        def until_nobody_listens():
            sys.stdin.buffer.read()
            loop.call_soon_threadsafe(task.cancel)
        threading.Thread(target=until_nobody_listens, daemon=True).start()
        with contextlib.suppress(asyncio.CancelledError, asyncio.TimeoutError):
            await asyncio.wait_for(task, 600)
    asyncio.run(serve())


@contextlib.contextmanager
def standin(log=None, **config):
    "Start it, give its address, end it."
    command = [sys.executable, __file__, json.dumps(config, default=str), *([str(log)] if log else [])]
    root = Path(__file__).resolve().parent.parent
    p = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        if not (url := p.stdout.readline().strip()):
            raise RuntimeError("the stand-in server did not start")
        yield url
    finally:
        p.stdin.close()
        p.stdout.close()
        try:
            p.wait(10)
        except subprocess.TimeoutExpired:
            p.kill()
            p.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
