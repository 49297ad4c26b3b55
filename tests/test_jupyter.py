"JupyterLab as a reader uses it: its server starts, notebooks open, and all their cells run in a fresh kernel."
import json, os, subprocess, sys, time, uuid
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import websocket

ROOT = Path(__file__).resolve().parent.parent
READ = ["nbs/explanations/equation.ipynb", "nbs/decode/07_sampling.ipynb"]

@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "A JupyterLab over the repository, with a token: (address, token)."
    token, home = uuid.uuid4().hex, tmp_path_factory.mktemp("jupyter")
    log = home/"log"
    env = os.environ | dict(JUPYTER_RUNTIME_DIR=str(home/"runtime"), JUPYTER_CONFIG_DIR=str(home/"config"),
        JUPYTER_DATA_DIR=str(home/"data"), PYTHONPATH=str(ROOT), IPYTHONDIR=str(home/"ipython"))
    flags = ["--no-browser", "--port=0", "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={token}",
        f"--ServerApp.root_dir={ROOT}", "--allow-root", "--LabApp.news_url="]
    with log.open("w") as out:
        process = subprocess.Popen([sys.executable, "-m", "jupyter", "lab", *flags], stdout=out, stderr=out, env=env)
    try:
        yield address_of(process, home/"runtime", log), token
    finally:
        process.terminate()
        process.wait(30)

def address_of(process, runtime, log):
    "Where the server listens: it writes that into a file when it does."
    while process.poll() is None:
        for found in runtime.glob("jpserver-*.json"):
            if found.stat().st_size:
                return json.loads(found.read_text())["url"].rstrip("/")
        time.sleep(.2)
    raise AssertionError(log.read_text())

def answer_of(ws, source):
    "Run a cell; the error's name and text, or None."
    asked = uuid.uuid4().hex
    header = dict(msg_id=asked, msg_type="execute_request", username="", session=asked, version="5.3")
    content = dict(code=source, silent=False, store_history=True, user_expressions={}, allow_stdin=False)
    ws.send(json.dumps(dict(header=header, parent_header={}, metadata={}, content=content, channel="shell")))
    error = None
    while True:
        message = json.loads(ws.recv())
        if message["parent_header"].get("msg_id") != asked:
            continue
        if message["msg_type"] == "error":
            error = f"{message['content']['ename']}: {message['content']['evalue']}"
        if message["msg_type"] == "execute_reply":
            return error

def run_all(address, token, path, cells=None):
    "Every code cell of a notebook, or those given, in a new kernel, in the notebook's folder; the errors."
    with httpx.Client(base_url=address, headers={"Authorization": f"token {token}"}, timeout=120) as web:
        notebook = web.get(f"/api/contents/{path}").raise_for_status().json()["content"]
        kernel = dict(kernel=dict(name="python3"), name=Path(path).name, path=path, type="notebook")
        session = web.post("/api/sessions", json=kernel).raise_for_status().json()
        at = f"{address.replace('http', 'ws', 1)}/api/kernels/{session['kernel']['id']}/channels?token={token}"
        with closing(websocket.create_connection(at, timeout=300)) as ws:
            cells = cells or ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
            errors = [(cell, error) for cell in cells if (error := answer_of(ws, cell))]
        web.delete(f"/api/sessions/{session['id']}").raise_for_status()
    return errors

@pytest.mark.slow
def test_lab_opens(server):
    address, token = server
    page = httpx.get(f"{address}/lab", params=dict(token=token), follow_redirects=True, timeout=60)
    assert page.status_code == 200 and "jupyter-config-data" in page.text

@pytest.mark.slow
def test_lab_wants_its_token(server):
    assert httpx.get(f"{server[0]}/api/contents/nbs", timeout=60).status_code == 403

@pytest.mark.slow
@pytest.mark.parametrize("path", READ)
def test_run_all(server, path):
    assert run_all(*server, path) == []

@pytest.mark.slow
def test_a_kernel_knows_its_notebook(server):
    "What a run notebook's last cell relies on."
    address, token = server
    cell = json.loads((ROOT/READ[0]).read_text())["cells"][0]["source"]
    asks = f"""from tita.records import running_notebook
file, is_saved = running_notebook(dict(In=["", {"".join(cell)!r}]))
assert file.samefile({str(ROOT/READ[0])!r}) and not is_saved"""
    assert run_all(address, token, READ[0], [asks]) == []

@pytest.mark.slow
def test_errors_are_seen(server, tmp_path):
    "The test above can fail: a kernel says what went wrong."
    address, token = server
    with httpx.Client(base_url=address, headers={"Authorization": f"token {token}"}, timeout=120) as web:
        kernel = web.post("/api/kernels", json=dict(name="python3")).raise_for_status().json()["id"]
        at = f"{address.replace('http', 'ws', 1)}/api/kernels/{kernel}/channels?token={token}"
        with closing(websocket.create_connection(at, timeout=120)) as ws:
            assert answer_of(ws, "1 / 0") == "ZeroDivisionError: division by zero"
        web.delete(f"/api/kernels/{kernel}")
