"A cluster of Ray on this machine, of one node, whose start a loaded machine does not hinder."
import os
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

# Ray reads these when it is imported, so they are there before: for the head and for whoever asks it.
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def start_ray(port: int, log) -> subprocess.Popen:
    """With ports that are known beforehand, see `note_ports`.

    A driver waits for the first workers, and for ever if they take longer than 60 s to start: so none are started
    before they are needed, and they may take longer. Ray gives them the lowest priority else.
    """
    names = "", "dashboard-agent-grpc-", "dashboard-agent-listen-", "runtime-env-agent-", "metrics-export-"
    ports = [f"--{name}port={port + i}" for i, name in enumerate(names)]
    patience = dict(RAY_agent_register_timeout_ms="600000", RAY_worker_register_timeout_seconds="600",
        RAY_prestart_worker_first_driver="0", RAY_worker_niceness="0", RAY_USAGE_STATS_ENABLED="0")
    patience |= {f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": "600" for check in ("READY", "HEALTH")}
    # a replica that is asked how many wait, and says nothing for 0.1 s, is passed over, also if it has the image
    patience |= {f"RAY_SERVE_{most}QUEUE_LENGTH_RESPONSE_DEADLINE_S": "60" for most in ("", "MAX_")}
    how = ["--head", "--num-cpus=2", "--include-dashboard=false", "--block"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *how, *ports]
    return subprocess.Popen(command, env=os.environ | patience, stdout=log, stderr=subprocess.STDOUT)


def command_lines(head: subprocess.Popen) -> list[tuple]:
    "What the head has started: command lines and processes."
    found = []
    for p in psutil.Process(head.pid).children(recursive=True):
        with suppress(psutil.Error):
            found.append((p.cmdline() or [""], p))
    return found


NOTED = "metrics_agent", "dashboard_agent_listen", "runtime_env_agent", "metrics_export"


def note_ports(head: subprocess.Popen, port: int):
    "Ray dies if its agents have not noted their ports after 15 s, known or not; a loaded machine takes longer."
    for line, _ in command_lines(head):
        told = dict(word[2:].split("=", 1) for word in line if word.startswith("--") and "=" in word)
        if not {"session-dir", "node-id"} <= set(told):
            continue
        for i, name in enumerate(NOTED, 1):
            file = Path(told["session-dir"])/f"{name}_port_{told['node-id']}"
            if not file.exists():
                file.with_suffix(".new").write_text(str(port + i))
                file.with_suffix(".new").rename(file)


@contextmanager
def ray_head(port: int):
    "Its process and its address, for RAY_ADDRESS."
    import ray
    with tempfile.NamedTemporaryFile("w+") as log:
        head = start_ray(port, log)
        try:
            while "Ray runtime started" not in (said := Path(log.name).read_text()):
                assert head.poll() is None, said[-3000:]
                note_ports(head, port)
                time.sleep(.5)
            yield head, f"{ray.util.get_node_ip_address()}:{port}"
        finally:
            family = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
            head.terminate()
            head.wait()
            for p in psutil.wait_procs(family, timeout=30)[1]:
                p.kill()


def workers(head: subprocess.Popen, name: str) -> list[psutil.Process]:
    "The head's worker processes whose title holds the name."
    return [p for line, p in command_lines(head) if line[0].startswith("ray::") and name in line[0]]
