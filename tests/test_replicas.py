"What carries the server elsewhere: the container, Kubernetes, Slurm, and two replicas on Ray Serve."
import importlib.util
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from configparser import ConfigParser
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml

pytest.importorskip("fastapi", reason="the serve extra is not installed: pip install 'tita[serve]'")
from typer.main import get_command
sys.path.insert(0, str(Path(__file__).resolve().parent))
from ray_head import ray_head
from tita.core import data_url
from tita.serve.replicas import application, settings_of
from tita.serve.serve_cli import app as serve_app

PORT = 28321  # beyond those that Ray gives to its workers
ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT/"scripts/serve"
OPTIONS = {name for p in get_command(serve_app).params for name in p.opts}


def instructions():
    "Of the Containerfile: pairs of a word and what follows."
    text = re.sub(r"\\\n", " ", (HERE/"Containerfile").read_text())
    return [line.split(None, 1) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_container_gets_what_there_is(tmp_path):
    "Each file it copies exists, and with these alone setup.py knows name and extras."
    for paths in (rest.split() for word, rest in instructions() if word == "COPY"):
        *sources, to = paths
        for source in sources:
            path, place = ROOT/source, tmp_path/to
            assert path.exists(), f"the Containerfile copies {source}, which is not there"
            if path.is_dir():
                shutil.copytree(path, place)
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)
    asked = [sys.executable, "setup.py", "--name", "--version"]
    run = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True)
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT/"settings.ini")
    assert run.stdout.split()[-2:] == [config["DEFAULT"]["lib_name"], config["DEFAULT"]["version"]], run.stderr
    installed = " ".join(rest for word, rest in instructions() if word == "RUN")
    for extra in re.search(r"'\.\[(.*?)\]'", installed)[1].split(","):
        assert f"{extra}_requirements" in config["DEFAULT"]


def test_commands_have_the_options_that_files_give_them():
    entry = json.loads(next(rest for word, rest in instructions() if word == "ENTRYPOINT"))
    pods, _ = yaml.safe_load_all((HERE/"kubernetes.yaml").read_text())
    args = pods["spec"]["template"]["spec"]["containers"][0]["args"]
    slurm = (HERE/"slurm_serve.sh").read_text().splitlines()[-1].split()
    shown = re.findall(r"--[\w-]+", " ".join((HERE/"Containerfile").read_text().splitlines()[:10]))
    assert entry[0] == "tita-serve" and "--base" in args and "--host" in slurm
    given = {w for w in [*entry, *args, *slurm, *shown] if w.startswith("--")} - {"--rm"}
    assert given <= OPTIONS, given - OPTIONS


def test_ray_yaml_names_what_there_is():
    config = yaml.safe_load((HERE/"ray.yaml").read_text())["applications"][0]
    assert config["import_path"] == f"{application.__module__}:{application.__name__}"
    settings_of(config["args"])
    options = (HERE/"ray.yaml").read_text().partition("args:")[2].partition("deployments")[0]
    settings_of(dict.fromkeys(re.findall(r"# (\w+): /?\w+", options)))
    assert {d["name"] for d in config["deployments"]} == {"Replica", "Entrance"}
    assert len(inspect.signature(application).parameters) == 1, "Ray calls it with `args`, and nothing else"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="Ray is not installed (pip install 'tita[ray]')")
def test_two_replicas_answer_like_one_and_keep_their_images(tmp_path):
    "In a process of its own: Ray leaves threads and actors behind."
    out = tmp_path/"out.json"
    run = subprocess.run([sys.executable, __file__, out], capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"))
    assert out.exists(), run.stdout[-3000:] + run.stderr[-3000:]
    told = json.loads(out.read_text())
    assert told["said"] == told["alone"] and told["streamed"] == told["alone"][0]
    assert told["status"] == [400, 200]
    hits = [h for h, q in told["warm"]]
    assert len(told["warm"]) == 2 and all(q > 0 for _, q in told["warm"]), "each replica has images of its own"
    assert sum(q for _, q in told["warm"]) == len(told["said"]), "all were counted"
    assert sum(hits) == len(told["said"]) - told["images"], "no image was read twice: the same goes to the same replica"
    assert told["without"] == told["alone"], "when one replica dies, the other answers in its place"
    assert told["again"] == told["alone"], "and so do both when a new one has taken its place"


def counted(handle) -> dict:
    "What each replica says at /metrics, by its own numbers; any name leads to one of them."
    scope = dict(type="http", method="GET", path="/metrics", headers=[], query_string=b"")
    found = {}
    for name in range(64):
        pieces = list(handle.options(stream=True).answer.remote(str(name), scope, b""))
        lines = [line.split() for line in b"".join(pieces[1:]).decode().splitlines() if line.startswith("tita:")]
        values = {key: float(value) for key, value in lines}
        found[values["tita:request_queue_time_seconds_sum"]] = values
        if len(found) == 2:
            break
    return found


def replica_names() -> set:
    "Of the actors that are alive."
    import ray
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    return {name for name in names if "tita#Replica#" in name}


def are_whole() -> bool:
    from ray import serve
    app = serve.status().applications["tita"]
    return app.status == "RUNNING" and app.deployments["Replica"].replica_states == {"RUNNING": 2}


def is_up(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url, timeout=60).status_code == 200
    return False


def write_yaml(to: Path) -> Path:
    "The file of the repository, with a port of its own, and no more than two replicas."
    config = yaml.safe_load((HERE/"ray.yaml").read_text())
    config["http_options"] = dict(host="127.0.0.1", port=PORT)
    app = config["applications"][0]
    app["args"] = dict(slots=4, lam=.5)
    app["deployments"][0]["autoscaling_config"]["max_replicas"] = 2
    to.write_text(yaml.safe_dump(config))
    return to


@contextmanager
def served(address: str, config: Path):
    "As somebody serves it: `serve run FILE`, and Ctrl-C."
    with open(config.with_suffix(".log"), "w+") as log:
        command = [sys.executable, "-m", "ray.serve.scripts", "run", "--address", address, str(config)]
        p = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            while not is_up(f"http://127.0.0.1:{PORT}/health"):
                assert p.poll() is None, config.with_suffix(".log").read_text()[-3000:]
                time.sleep(1)
            yield
        finally:
            p.send_signal(signal.SIGINT)
            p.wait()


def run_on_ray(out: Path):
    import openai
    import ray
    from ray import serve
    from tita.decode.ask import load_decoder
    from tita.world.embedded import make_scenes
    scenes, decoder = make_scenes(8, seed=11), load_decoder(lam=.5)
    handle = serve.get_deployment_handle("Replica", "tita")
    while not are_whole():
        time.sleep(1)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0)
    asked = [(s, q) for q in ("Describe the image.", "Is there a car in the image?") for s in scenes]
    alone = [decoder.generate(s.image, q, 16, temperature=0.)[0].text for s, q in asked]
    def ask(scene, question, **how):
        image = dict(type="image_url", image_url=dict(url=data_url(scene.image)))
        messages = [dict(role="user", content=[image, dict(type="text", text=question)])]
        how = dict(model="tita", max_tokens=16, temperature=0) | how
        return client.chat.completions.create(messages=messages, **how)
    said = [ask(*a).choices[0].message.content for a in asked]
    hits, queries = "tita:image_cache_hits_total", "tita:image_cache_queries_total"
    warm = [(v[hits], v[queries]) for v in counted(handle).values()]
    streamed = "".join(c.choices[0].delta.content or "" for c in ask(*asked[0], stream=True))
    left = ask(*asked[1], stream=True, max_tokens=400, extra_body=dict(ignore_eos=True))
    next(iter(left))
    left.close()
    while any(v["tita:num_requests_running"] for v in counted(handle).values()):
        time.sleep(.1)
    root = f"http://127.0.0.1:{PORT}"
    as_json = {"content-type": "application/json"}
    damaged = httpx.post(f"{root}/v1/chat/completions", content=b"{oops", headers=as_json)
    health = httpx.get(f"{root}/health")
    status = [damaged.status_code, health.status_code]
    before = replica_names()
    ray.kill(ray.get_actor(min(before), namespace="serve"))
    without = [ask(*a).choices[0].message.content for a in asked]
    while not (replica_names() - before and are_whole()):
        time.sleep(1)
    again = [ask(*a).choices[0].message.content for a in asked]
    told = dict(said=said, alone=alone, streamed=streamed, warm=warm, images=len(scenes), status=status)
    told |= dict(without=without, again=again)
    out.write_text(json.dumps(told))


if __name__ == "__main__":
    import ray
    file = write_yaml(Path(sys.argv[1]).with_suffix(".yaml"))
    with ray_head(PORT + 1) as (_, address), served(address, file), ray.init(address=address):
        run_on_ray(Path(sys.argv[1]))
