"A cluster of Ray on this machine, of one node, whose start a loaded machine does not hinder."
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import psutil


def start_ray(port: int, log) -> subprocess.Popen:
    "With ports that are known beforehand: Ray waits 30 s for those that its agents choose, and then gives up."
    names = "", "dashboard-agent-grpc-", "dashboard-agent-listen-", "runtime-env-agent-", "metrics-export-"
    ports = [f"--{name}port={port + i}" for i, name in enumerate(names)]
    patience = dict(RAY_agent_register_timeout_ms="600000", RAY_USAGE_STATS_ENABLED="0")
    how = ["--head", "--num-cpus=2", "--include-dashboard=false", "--block"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *how, *ports]
    return subprocess.Popen(command, env=os.environ | patience, stdout=log, stderr=subprocess.STDOUT)


@contextmanager
def ray_head(port: int):
    "Its process and its address, for RAY_ADDRESS."
    import ray
    with tempfile.NamedTemporaryFile("w+") as log:
        head = start_ray(port, log)
        try:
            while "Ray runtime started" not in (said := Path(log.name).read_text()):
                assert head.poll() is None, said[-3000:]
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
    found = []
    for p in psutil.Process(head.pid).children(recursive=True):
        try:
            title = " ".join(p.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::") and name in title:
            found.append(p)
    return found
