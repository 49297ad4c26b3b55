"The scripts that start things: what they say when something is missing, and that they leave nothing half-made."
import hashlib, json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"scripts"))
import check_docs
import make_readme
import run_notebook as runner

## setup.sh

@pytest.fixture
def repo(tmp_path):
    "What setup.sh reads, in a folder of its own."
    scripts = [f"scripts/{name}" for name in ("setup.sh", "requirements.lock", "torch.lock")]
    for f in ["settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", *scripts]:
        (to := tmp_path/"repo"/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f, to)
    return tmp_path/"repo"

def setup(repo, path=None, **env):
    "Run it with no registry in reach; `path` replaces PATH."
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0"}
    nowhere |= {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    env = os.environ | nowhere | {"PATH": str(path or os.environ["PATH"])} | env
    return subprocess.run([shutil.which("bash"), "scripts/setup.sh"], cwd=repo, env=env, capture_output=True, text=True)

def command(folder, name, text):
    "A shell script of this name in this folder."
    folder.mkdir(exist_ok=True)
    (folder/name).write_text(f"#!{shutil.which('sh')}\n{text}\n")
    (folder/name).chmod(0o755)
    return folder

def tools(folder, *names):
    "A folder for PATH with these commands only."
    folder.mkdir(exist_ok=True)
    for n in names:
        (folder/n).symlink_to(shutil.which(n))
    return folder

BASICS = "bash sh sed awk df grep cat dirname tail head find rm mv touch ls wc tr sleep".split()

def refused(run, repo, *texts):
    assert run.returncode == 1, run.stdout + run.stderr
    assert all(t in run.stderr for t in texts), run.stderr
    assert "Traceback" not in run.stderr
    assert not (repo/".venv/tita.stamp").exists()

def test_old_python_is_refused(repo, tmp_path):
    old = command(tmp_path/"bin", "python3.9", "echo 3.9")/"python3.9"
    refused(setup(repo, PYTHON=str(old)), repo, "is Python 3.9; tita needs 3.11 to 3.13", "PYTHON=python3.11")

def test_python_that_does_not_run_is_refused(repo):
    refused(setup(repo, PYTHON="no-such-python"), repo, "PYTHON=no-such-python does not run")

def test_no_python_is_told(repo, tmp_path):
    refused(setup(repo, tools(tmp_path/"bin", *BASICS)), repo, "no Python 3.11 to 3.13 was found", "Install one")

def test_too_old_pythons_are_named(repo, tmp_path):
    path = command(tools(tmp_path/"bin", *BASICS), "python3", "echo 3.8")
    refused(setup(repo, path), repo, "there is python3 (3.8)")

def test_no_compiler_is_told(repo, tmp_path):
    run = setup(repo, tools(tmp_path/"bin", *BASICS), PYTHON=sys.executable, CXX="")
    refused(run, repo, "no C++ compiler was found", "apt install g++")

def test_full_disk_is_told(repo, tmp_path):
    path = command(tmp_path/"bin", "df", "echo head; echo disk 100 90 1048576 99% /")
    refused(setup(repo, f"{path}:{os.environ['PATH']}", PYTHON=sys.executable), repo, "1 GB are free", "about 4 GB")

def test_a_folder_that_is_no_environment_is_kept(repo):
    (repo/".venv").mkdir()
    (repo/".venv/mine.txt").write_text("mine")
    refused(setup(repo, PYTHON=sys.executable), repo, "is no virtual environment")
    assert (repo/".venv/mine.txt").read_text() == "mine"

def test_failed_install_leaves_no_stamp(repo):
    refused(setup(repo, PYTHON=sys.executable), repo, "could not be installed", "same command again")
    assert (repo/".venv/pyvenv.cfg").exists()  # the next run goes on from it

    site = next((repo/".venv/lib").glob("python*"))/"site-packages"
    for name in ("whole", "half"):
        (site/f"{name}-1.0.dist-info").mkdir()
        (site/f"{name}-1.0.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (site/"whole-1.0.dist-info/RECORD").write_text("whole.py,,\n")
    refused(setup(repo), repo, "could not be installed")
    left = [name for name in ("whole", "half") if (site/f"{name}-1.0.dist-info").exists()]
    assert left == ["whole"]  # pip would have trusted both

def stamped(repo):
    "An environment without packages and the stamp that a finished set-up would have left."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", repo/".venv"], check=True)
    h = hashlib.sha256(repr((str(repo.resolve()), sys.version_info[:2])).encode())
    for f in ["scripts/requirements.lock", "scripts/torch.lock", "settings.ini", "setup.py", "pyproject.toml"]:
        h.update((repo/f).read_bytes())
    (repo/".venv/tita.stamp").write_text(f"{h.hexdigest()} cpu\n")
    return repo

def test_second_run_does_nothing_quickly(repo, tmp_path):
    "It starts one Python, without an import of ours, to look at the stamp."
    path = tools(tmp_path/"bin", *BASICS)
    python = stamped(repo)/".venv/bin/python"
    python.rename(real := python.with_name("real"))
    command(python.parent, "python", f'echo "$1" >> {tmp_path}/started; exec {real} "$@"')
    run = setup(repo, path)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert (tmp_path/"started").read_text() == "-\n"

def is_trusted(repo, path):
    "Without a compiler on PATH, a run ends well only where there is nothing to do."
    run = setup(repo, path, CXX="")
    assert run.returncode == 0 or "no C++ compiler" in run.stderr, run.stderr
    return run.returncode == 0

@pytest.mark.parametrize("change", ["settings.ini", "setup.py", "scripts/requirements.lock", "scripts/torch.lock"])
def test_stamp_of_something_else_is_not_trusted(repo, tmp_path, change):
    path = tools(tmp_path/"bin", *BASICS)
    assert is_trusted(stamped(repo), path)
    with (repo/change).open("a") as f:
        f.write("# changed\n")
    assert not is_trusted(repo, path)

def test_gpu_that_came_later_is_seen(repo, tmp_path):
    path = tools(tmp_path/"bin", *BASICS)
    assert is_trusted(stamped(repo), path)
    assert not is_trusted(repo, command(path, "nvidia-smi", "exit 0"))

def test_environment_that_moved_is_rebuilt(repo, tmp_path):
    stamped(repo).rename(moved := tmp_path/"moved")
    run = setup(moved, PYTHON=sys.executable)
    refused(run, moved, "could not be installed")
    assert "rebuilding .venv" in run.stdout

## run_notebook.py

def notebook(path, *sources, tags=("parameters",)):
    code = dict(cell_type="code", metadata={}, outputs=[], execution_count=None)
    cells = [code | dict(id=f"c{i}", source=source) for i, source in enumerate(sources)]
    cells[0]["metadata"] = dict(tags=[*tags])
    kernel = dict(name="python3", display_name="python3", language="python")
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))
    return path

def run_notebook(*args):
    command = [sys.executable, ROOT/"scripts/run_notebook.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)

def test_parameters_reach_the_notebook(tmp_path):
    nb = notebook(tmp_path/"a.ipynb", "n = 1\ns = 'x'", "print('n is', n + 1, s)")
    (tmp_path/"p.yaml").write_text("n: 5\ns: from the file\n")
    run = run_notebook(nb, tmp_path/"out/a.ipynb", "-f", tmp_path/"p.yaml", "-p", "n", "41")
    assert run.returncode == 0 and "n is 42 from the file" in run.stderr, run.stderr
    assert "n is 42" in (tmp_path/"out/a.ipynb").read_text()

def test_a_runs_folder_keeps_its_executed_notebook_and_page(tmp_path):
    "Also where the copy was asked for elsewhere, and where the notebook fails; a dry run makes no folder."
    last = "import os; os.makedirs(out, exist_ok=True); print('worked'); n and 1/0"
    nb, target, out = notebook(tmp_path/"a.ipynb", "out = ''\nn = 0", last), tmp_path/"b.ipynb", tmp_path/"run"
    assert run_notebook(nb, target, "-p", "out", out, "-p", "n", "1").returncode == 1
    assert "ZeroDivisionError" in (out/"b.ipynb").read_text() and not (out/"b.html").exists()
    assert run_notebook(nb, target, "-p", "out", out).returncode == 0
    assert (out/"b.ipynb").read_text() == target.read_text() and "worked" in (out/"b.html").read_text()
    dry = notebook(tmp_path/"dry.ipynb", "out = ''", "print(out)")
    assert run_notebook(dry, target, "-p", "out", tmp_path/"no").returncode == 0 and not (tmp_path/"no").exists()

def test_mistake_in_a_notebook_is_one_line(tmp_path):
    mistake = "class TitaError(ValueError): pass\nraise TitaError('questions.jsonl:3: no text; add one')"
    nb = notebook(tmp_path/"a.ipynb", "n = 1", mistake)
    run = run_notebook(nb, tmp_path/"b.ipynb")
    assert run.returncode == 2 and "error: questions.jsonl:3: no text; add one" in run.stderr
    assert "Traceback" not in run.stderr

def test_other_error_in_a_notebook_shows_where(tmp_path):
    run = run_notebook(notebook(tmp_path/"a.ipynb", "n = 1", "1/0"), tmp_path/"b.ipynb")
    assert run.returncode == 1 and "----> 1 1/0" in run.stderr and "b.ipynb" in run.stderr

def test_dead_kernel_is_told(tmp_path):
    run = run_notebook(notebook(tmp_path/"a.ipynb", "n = 1", "import os; os._exit(9)"), tmp_path/"b.ipynb")
    assert run.returncode == 138 and "the notebook's process died" in run.stderr and "Traceback" not in run.stderr

def test_unknown_parameter_and_file_are_refused(tmp_path):
    nb = notebook(tmp_path/"a.ipynb", "scenes = 1")
    unknown = ("-p", "scene", "3"), "no parameter scene; it has scenes"
    missing = ("-f", tmp_path/"nope.yaml"), "nope.yaml"
    for given, why in unknown, missing:
        run = run_notebook(nb, tmp_path/"b.ipynb", *given)
        assert why in run.stderr and run.returncode == 2
    assert not (tmp_path/"b.ipynb").exists()

@pytest.mark.parametrize("default, given, found", [
    ([.25, 1.], "[0.5, 1]", [.5, 1]), ([.25], [1, 2], [1, 2]), (["a"], "['b']", ["b"]),
    (1.5, "2", 2), (1.5, "3e-4", 3e-4), (1, "41", 41), ("x", "41", "41"),
    (False, "True", True), (False, "false", False), ([0, 1], "[]", [])])
def test_parameters_are_read_as_their_defaults(default, given, found):
    got = runner.fitting("a", given, default)
    assert got == found and type(got) is type(found)

@pytest.mark.parametrize("default, given", [
    ([.25], "0.5"), ([.25], "0.5,1"), ([.25], "[0.5, x]"), ([.25], ["a"]), ([.25], "[true]"),
    (1, "1.5"), (1, "one"), (1, True), (1.5, "nan"), (1.5, "three"), ("x", 3), ("x", None),
    (False, "1"), (False, 1), ([1], "[" * 5000)])
def test_parameters_of_another_kind_are_refused(default, given):
    with pytest.raises(ValueError, match="parameter a = .*such as"):
        runner.fitting("a", given, default)

@pytest.mark.parametrize("notebook", sorted((ROOT/"nbs/runs").glob("*.ipynb")), ids=lambda p: p.name)
def test_every_run_is_checked_before_it_works(notebook, tmp_path):
    "A wrong kind for each parameter in turn, and the notebook's own defaults, which must pass."
    known = runner.defaults(str(notebook))
    assert "out" in known and runner.parameters(str(notebook), [], []) == {}
    for name, default in known.items():
        assert runner.fitting(name, default, default) == default
        with pytest.raises(ValueError, match=f"parameter {name} = "):
            (tmp_path/"wrong.yaml").write_text(json.dumps({name: 1 if isinstance(default, str) else "x y"}))
            runner.parameters(str(notebook), [tmp_path/"wrong.yaml"], [])

def test_wrong_parameter_costs_no_work(tmp_path):
    nb = notebook(tmp_path/"a.ipynb", "lams = [0.25]", f"open({str(tmp_path/'worked')!r}, 'w')")
    run = run_notebook(nb, tmp_path/"b.ipynb", "-p", "lams", "0.5")
    assert run.returncode == 2 and "lams = '0.5': it is a list, such as [0.25]" in run.stderr
    assert not (tmp_path/"worked").exists() and not (tmp_path/"b.ipynb").exists()
    assert run_notebook(nb, tmp_path/"b.ipynb", "-p", "lams", "[0.5, 1]").returncode == 0
    assert (tmp_path/"worked").exists()

def test_broken_file_of_parameters_is_told(tmp_path):
    (tmp_path/"p.yaml").write_text("a: [1\n")
    run = run_notebook(notebook(tmp_path/"a.ipynb", "a = 1"), tmp_path/"b.ipynb", "-f", tmp_path/"p.yaml")
    assert run.returncode == 2 and "p.yaml: no YAML" in run.stderr

## bench_gpu.sh

def test_figures_of_a_gpu_need_one(tmp_path):
    "Without a GPU it says so before it sets anything up."
    path = f"{command(tmp_path/'bin', 'nvidia-smi', 'exit 9')}:{os.environ['PATH']}"
    bench = ["bash", ROOT/"scripts/bench_gpu.sh", tmp_path/"out"]
    run = subprocess.run(bench, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert run.returncode == 2 and "there is no GPU here" in run.stderr and not (tmp_path/"out").exists()

@pytest.mark.slow
def test_bench_of_the_client(tmp_path):
    "The same questions by the client and by two loops, with and without a pause."
    small = "--questions", "12", "--repeat", "1", "--paused", "2", "--image", "--out", tmp_path/"client.json"
    run = subprocess.run([sys.executable, ROOT/"scripts/bench_client.py", *small], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads((tmp_path/"client.json").read_text())
    assert found["wall"] > 0 and found["without_pause"] >= 12 * found["latency"]
    assert found["one_by_one"] >= 12 and found["faster_without_pause"] == found["without_pause"] / found["wall"]

## make_readme.py

@pytest.mark.parametrize("link, seen", [
    ("../nbs/03_views.ipynb", "nbs/03_views.ipynb"), ("../results/a.png", "results/a.png"), ("../../x", "x"),
    ("#top", "#top"), ("https://example.com/a", "https://example.com/a"),
    ("runs/demo.ipynb#a", "nbs/runs/demo.ipynb#a"),
    (make_readme.REPOSITORY + "results/a.md", "results/a.md")])
def test_readme_links_are_seen_from_the_root(link, seen):
    assert make_readme.from_root(link) == seen

def test_readme_leaves_code_alone():
    code = "\n\n```python\nx = d['k'](y.png)\n```\n\n"
    found = make_readme.markdown(f'see [a](../a.png){code}<source srcset="b.svg"><img src="b.png">')
    assert found == f'see [a](a.png){code}<source srcset="nbs/b.svg"><img src="nbs/b.png">'

def test_readme_cells(tmp_path):
    out = {"output_type": "stream", "name": "stdout", "text": ["a ball\n"]}
    warning = {"output_type": "stream", "name": "stderr", "text": ["IProgress not found\n"]}
    cells = [{"cell_type": "markdown", "source": ["# tita\n", "\n", "> purpose"]},
             {"cell_type": "code", "source": "#| hide\nsecret = 1", "outputs": [out]},
             {"cell_type": "code", "source": "#| eval: false\nask('`x`')", "outputs": []},
             {"cell_type": "code", "source": "#| echo: false\nprint('a ball')", "outputs": [warning, out]}]
    (tmp_path/"i.ipynb").write_text(json.dumps({"cells": cells}))
    blocks = [make_readme.NOTE, "# tita", "> purpose", "``` python\nask('`x`')\n```", "```\na ball\n```\n"]
    assert make_readme.readme(tmp_path/"i.ipynb") == "\n\n".join(blocks)

## check_docs.py

@pytest.fixture
def site(tmp_path):
    "Two processed pages, one of them full of mistakes."
    (root := tmp_path/"_proc").mkdir()
    (root/"_quarto.yml").write_text("metadata-files: [nbdev.yml, sidebar.yml]\n")
    (root/"nbdev.yml").write_text("website: {site-url: 'https://example.com/tita'}\n")
    (root/"sidebar.yml").write_text("website: {sidebar: {contents: [a.qmd, {section: s, contents: [b.qmd]}]}}\n")
    links = "[b](b.qmd#its-heading) [out](https://example.com/tita/b.html#its-heading) @see2020"
    head = "---\ntitle: a\noutput-file: first.html\n---\n\n## One thing\n\n"
    (root/"a.qmd").write_text(f"{head}{links}\n\n::: {{.callout-note}}\nx\n:::\n")
    (root/"b.qmd").write_text("---\ntitle: b\n---\n\n## Its heading\n\n[a](first.html#one-thing)\n")
    return root

def test_docs_without_mistakes_pass(site):
    assert check_docs.check(site) == []

@pytest.mark.parametrize("text, problem", [
    ("[x](nowhere.html)", "broken link nowhere.html"), ("[x](a.qmd#nothing)", "no anchor a.qmd#nothing"),
    ("[x](https://example.com/tita/first.html#gone)", "no anchor https://example.com/tita/first.html#gone"),
    ("[x](../_proc/sidebar.yml)", "../_proc/sidebar.yml leaves the site"), ("@fig-none", "unresolved @fig-none"),
    ("::: {.callout-hint}\nx\n:::", "unknown callout callout-hint"), (":::: {.callout-note}\nx", "b.qmd"),
    ("![x](gone.png)", "broken link gone.png")])
def test_docs_mistakes_are_found(site, text, problem):
    with (site/"b.qmd").open("a") as f:
        f.write(f"\n\n{text}\n")
    found = check_docs.check(site)
    assert len(found) == 1 and problem in found[0], found

def test_docs_sidebar_holds_each_page_once(site):
    (site/"c.qmd").write_text("---\ntitle: c\n---\n")
    (site/"sidebar.yml").write_text("website: {sidebar: {contents: [a.qmd, a.qmd, b.qmd, gone.qmd]}}\n")
    assert check_docs.check(site) == [
        "sidebar.yml: gone.qmd is no page", "sidebar.yml lacks c.qmd; add it to nbs/sidebar.yml",
        "sidebar.yml has a.qmd twice"]

def test_docs_bar_links_to_pages(site):
    bar = "website: {navbar: {left: [{text: a, href: a.qmd}, {text: c, href: c.qmd}], right: [{href: 'https://x.y'}]}}"
    (site/"_quarto.yml").write_text(f"metadata-files: [nbdev.yml]\n{bar}\n")
    assert check_docs.check(site) == ["_quarto.yml: c.qmd in the bar is no page"]

@pytest.mark.parametrize("link, problem", [
    ("b.ipynb#x", None), ("https://example.com/x", None), ("#here", None),
    ("https://git.example/r/blob/main/results/a.md", None), ("b.html", "is a page of the site only"),
    ("gone.ipynb", "is not in the repository"),
    ("https://git.example/r/blob/main/results/gone.md", "is not in the repository")])
def test_links_of_notebooks_lead_somewhere_in_the_repository(tmp_path, link, problem):
    (tmp_path/"results").mkdir()
    (tmp_path/"results/a.md").write_text("a")
    (tmp_path/"nbs").mkdir()
    for name, text in (("a", f"see [b]({link}), and `[c](not.html)`"), ("b", "x")):
        (tmp_path/f"nbs/{name}.ipynb").write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": text}]}))
    found = [*check_docs.source_problems(tmp_path/"nbs", "https://git.example/r/blob/main/")]
    assert found == ([f"a.ipynb: {link} {problem}"] if problem and "only" not in problem else found)
    assert bool(found) == bool(problem) and all(problem in f for f in found)
