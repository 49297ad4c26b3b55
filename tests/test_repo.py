"The form of the repository: layers, notebooks, packaging, what must not be in it."
import ast, json, os, re, subprocess, sys
from configparser import ConfigParser
from functools import cached_property
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"scripts"))
import check_docs, style
import yaml
CONFIG = ConfigParser(delimiters=["="], interpolation=None)
CONFIG.read(ROOT/"settings.ini", encoding="utf-8")
CFG = CONFIG["DEFAULT"]
DIRECTIVE = re.compile(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*)", re.M)
READING = {"runs", "tutorials", "explanations"}  # folders of notebooks that export nothing

class Cell:
    def __init__(self, raw):
        self.raw, self.kind, self.source = raw, raw["cell_type"], "".join(raw["source"])
    def __str__(self):
        first = next(iter(self.source.strip().splitlines()), "empty")
        return f"cell {self.raw.get('id')} ({first[:60]!r})"

    @cached_property
    def directives(self):
        return dict(DIRECTIVE.findall(self.source))
    @property
    def exported(self):
        return self.kind == "code" and bool({"export", "exports", "exporti"} & self.directives.keys())
    @property
    def tags(self):
        return self.raw["metadata"].get("tags", [])
    @property
    def lines(self):
        return [l for l in DIRECTIVE.sub("", self.source).splitlines() if l.strip()]

    @cached_property
    def body(self):  # its statements; shell and magic lines stand for none
        if self.kind != "code":
            return []
        return ast.parse("\n".join("pass" if re.match(r"\s*[!%]", l) else l for l in self.source.splitlines())).body

class Notebook:
    def __init__(self, path):
        self.path, self.name = path, path.relative_to(ROOT/"nbs").as_posix()
        self.raw = json.loads(path.read_text(encoding="utf-8"))
        self.cells = [Cell(c) for c in self.raw["cells"]]

    @cached_property
    def module(self):
        return next((c.directives["default_exp"].strip() for c in self.cells if "default_exp" in c.directives), None)
    @property
    def number(self):
        return int(m[1]) if (m := re.match(r"(\d+)_", self.path.name)) else None
    @property
    def is_module(self):
        return not (self.path.parent.name in READING or self.path.stem == "index")

def hidden(parts):
    return any(part.startswith((".", "_")) for part in parts)

NOTEBOOKS = [Notebook(p) for p in sorted((ROOT/"nbs").rglob("*.ipynb")) if not hidden(p.relative_to(ROOT).parts)]
MODULES = {n.module: n for n in NOTEBOOKS if n.module}
each = lambda notebooks: pytest.mark.parametrize("nb", notebooks, ids=lambda n: n.name)

def tracked():
    "Files that git knows, or without git those that are not of some tool."
    run = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if run.returncode == 0:
        return [p for l in run.stdout.splitlines() if (p := ROOT/l).is_file()]
    folders = lambda p: p.relative_to(ROOT).parts[:-1]
    return [p for p in ROOT.rglob("*") if p.is_file() and not hidden(folders(p)) and "runs" not in folders(p)]

def text_of(path):
    try:
        return path.read_text(encoding="utf-8") if path.stat().st_size < 5_000_000 else ""
    except UnicodeDecodeError:
        return ""

## Layers

# What a room may import beside itself and the root. The embedded world is every room's example.
EDGES = {
    "": set(), "world": set(), "decode": {"world"}, "api": set(), "train": {"world"},
    "data": {"decode", "api", "world"}, "eval": {"decode", "api", "show", "world"}, "show": {"eval", "world"},
    "bench": {"api", "eval", "show", "world"}, "serve": {"decode", "api", "show", "world"},
    "studies": {"world", "decode", "api", "data", "train", "eval", "show", "bench"}}

def room_of(module):
    return module.rpartition(".")[0]

def module_named(path):
    "The longest part of a dotted path that is a module of ours, or the path itself."
    parts = path.split(".")
    return next((m for i in range(len(parts), 0, -1) if (m := ".".join(parts[:i])) in MODULES), path)

def called(call):
    "The name of what is called, without what it is looked up in."
    return getattr(call.func, "attr", getattr(call.func, "id", ""))

def ours(paths, package):
    return [module_named(p.removeprefix(package + ".")) for p in paths if p.startswith(package + ".")]

def imported(tree, module="", package=CFG["lib_name"]):
    "Modules of our own that this code imports, at any depth, or names in a string."
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom):
            path = (n.module or "").split(".") if n.module else []
            if n.level:
                here = module.split(".")[:-n.level]
                path = [package, *here, *path]
            if path[:1] == [package]:
                yield from {module_named(".".join([*path[1:], a.name])) for a in n.names}
        elif isinstance(n, ast.Import):
            yield from ours([a.name for a in n.names], package)
        elif isinstance(n, ast.Call) and called(n) in ("import_module", "__import__"):
            texts = [a.value for a in n.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            yield from ours(texts, package)

@each([n for n in NOTEBOOKS if n.number is not None])
def test_imports_only_lower_numbers(nb):
    wrong = [f"{c}: imports {m}, which is {MODULES[m].name if m in MODULES else 'of no notebook'}"
             for c in nb.cells for s in c.body for m in imported(s, nb.module)
             if m not in MODULES or m != nb.module and MODULES[m].number >= nb.number]
    assert not wrong, f"{nb.name}: " + "; ".join(wrong)

@each([n for n in NOTEBOOKS if n.number is not None])
def test_imports_along_the_edges(nb):
    "Examples may use the embedded world, exported code only what its room may."
    room = room_of(nb.module)
    wrong = [f"{c}: {room or 'the root'} may not import {m}"
             for c in nb.cells for s in c.body for m in imported(s, nb.module)
             if (other := room_of(m)) not in {room, ""} | EDGES[room] and not (other == "world" and not c.exported)]
    assert not wrong, f"{nb.name}: " + "; ".join(wrong)

def test_one_module_a_number():
    named = [n.path.name for n in NOTEBOOKS if n.number is not None]
    numbers = [n.split("_")[0] for n in named]
    twice = sorted(n for n in named if numbers.count(n.split("_")[0]) > 1)
    assert not twice, f"two notebooks have the same number: {twice}"

def public(module):
    "The names that a module gives away."
    tree = ast.parse((ROOT/CFG["lib_path"]/f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    listed = (n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "__all__")
    return next(map(ast.literal_eval, listed), [])

SHARED = {
    "app",   # a command line's typer app
    "main"}  # what the console scripts start, one for each command

def test_names_are_unique():
    "A public name says what a thing is, and of which module it is."
    found = {}
    for module in MODULES:
        for name in public(module):
            found.setdefault(name, []).append(module)
    assert found, "no module has public names"
    twice = {name: modules for name, modules in found.items() if len(modules) > 1}
    assert not (more := {n: m for n, m in twice.items() if n not in SHARED}), f"names of two modules: {more}"
    assert SHARED <= twice.keys(), f"no longer shared: {SHARED - twice.keys()}; take them off the list"

## Notebooks

@each(NOTEBOOKS)
def test_begins_with_title_and_purpose(nb):
    lines = [l for l in nb.cells[0].source.splitlines() if l.strip()]
    titled = len(lines) > 1 and re.match(r"# \S", lines[0]) and re.match(r"> \S", lines[1])
    assert nb.cells[0].kind == "markdown" and titled, \
        f"{nb.name}: the first cell must be `# name` and `> one line of purpose`"
    more = [l for l in lines[2:] if not re.match(r"- [\w-]+: \S", l)]
    assert not more, \
        f"{nb.name}: nbdev makes the title cell a header and drops {more[0][:60]!r}; put text into the next cell"

@each([n for n in NOTEBOOKS if n.is_module])
def test_exports_to_its_module(nb):
    folders = nb.path.relative_to(ROOT/"nbs").parts[:-1]
    name = ".".join([*folders, re.sub(r"^\d+_", "", nb.path.stem)])
    assert nb.module == name, f"{nb.name}: `#| default_exp` must name the module after the notebook"
    assert any(c.exported for c in nb.cells), f"{nb.name} exports nothing"

@each([n for n in NOTEBOOKS if not n.is_module])
def test_reading_notebook_exports_nothing(nb):
    assert nb.module is None and not any(c.exported for c in nb.cells), f"{nb.name}: only numbered notebooks export"

@each([n for n in NOTEBOOKS if n.is_module])
def test_imports_stand_alone(nb):
    "nbdev runs every cell with an import when it makes the docs, and no other: code beside it would fail there."
    is_mixed = lambda cell: len({isinstance(s, (ast.Import, ast.ImportFrom)) for s in cell.body}) == 2
    mixed = [str(c) for c in nb.cells if not c.exported and is_mixed(c)]
    assert not mixed, f"{nb.name}: put the imports of these cells into cells of their own: {'; '.join(mixed)}"

@each(NOTEBOOKS)
def test_stores_no_error(nb):
    bad = [str(c) for c in nb.cells for o in c.raw.get("outputs", []) if o["output_type"] == "error"]
    assert not bad, f"{nb.name}: {bad}"

@each(NOTEBOOKS)
def test_outputs_are_small(nb):
    "`python scripts/shrink_outputs.py NOTEBOOK` makes them so."
    assert nb.path.stat().st_size <= 150_000

@each(NOTEBOOKS)
def test_stores_no_place_of_this_machine(nb):
    "A path in an output tells where it was run, and differs on every machine."
    places = {str(ROOT), str(Path.home()), "site-packages"}
    bad = [str(c) for c in nb.cells if any(p in json.dumps(c.raw.get("outputs", [])) for p in places)]
    assert not bad, f"{nb.name}: outputs that name a folder of this machine: {bad}"

@each([n for n in NOTEBOOKS if n.is_module])
def test_exported_cells_are_short(nb):
    long = [f"{c}: {len(c.lines)} lines" for c in nb.cells if c.exported and len(c.lines) > 40]
    assert not long, f"{nb.name}: take these cells apart: {long}"

@each([n for n in NOTEBOOKS if n.path.parent.name == "runs"])
def test_run_notebook_is_for_papermill(nb):
    tagged = [c for c in nb.cells if "parameters" in c.tags]
    assert len(tagged) == 1, f"{nb.name}: {len(tagged)} cells are tagged `parameters`; papermill needs one"
    only_assigns = all(isinstance(s, (ast.Assign, ast.AnnAssign, ast.Expr)) for s in tagged[0].body)
    assert only_assigns, f"{nb.name}: the parameters cell may only assign"
    assert "skip_exec: true" in "".join(c.source for c in nb.cells[:2]), \
        f"{nb.name}: say `- skip_exec: true` below the title; nbdev_test would run all of it"

def in_sidebar(entries):
    for e in entries:
        if isinstance(e, str):
            yield e
        else:
            yield from in_sidebar(e.get("contents", []))

def test_every_notebook_can_be_reached():
    "The sidebar has each once; the first page of the site names every room's first page."
    sidebar = yaml.safe_load((ROOT/"nbs/sidebar.yml").read_text())["website"]["sidebar"]["contents"]
    listed = [*in_sidebar(sidebar)]
    assert sorted(listed) == sorted(n.name for n in NOTEBOOKS), "nbs/sidebar.yml does not hold each notebook once"
    rooms = {f"{room_of(m)}/index.ipynb" for m in MODULES if room_of(m)}
    named = {*check_docs.source_links(ROOT/"nbs/index.ipynb")}
    assert rooms <= named, f"nbs/index.ipynb does not link to {sorted(rooms - named)}"

def test_architecture_shows_the_edges():
    "The page's table says what EDGES says, for the rooms that there are."
    page = next(n for n in NOTEBOOKS if n.name == "explanations/architecture.ipynb")
    text = "\n".join(c.source for c in page.cells)
    rows = re.findall(r"^\| \[(\w+)\]\(\.\./\w+/index\.ipynb\) \|[^|]*\| ([^|]*) \|$", text, re.M)
    shown = {room: set(used.split(", ")) - {"-"} for room, used in rows}
    assert shown == {room: EDGES[room] for m in MODULES if (room := room_of(m))}

def test_links_lead_somewhere():
    "In the repository; scripts/check_docs.py looks at the site, too."
    wrong = [*check_docs.source_problems(ROOT/"nbs", f"{CFG['git_url'] % CFG}/blob/{CFG['branch']}/")]
    assert not wrong, wrong

def test_ids_are_unique():
    ids = [(n.name, c.raw["id"]) for n in NOTEBOOKS for c in n.cells]
    assert len(set(ids)) == len(ids)

## Form

@pytest.mark.parametrize("path", style.sources(ROOT), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_form(path):
    "No file breaks a rule of `scripts/style.py`."
    found = [place for places in style.broken(path).values() for place in places]
    assert not found, "\n".join(found)

## Time

CLOCKS = {"time", "perf_counter", "monotonic", "process_time", "thread_time"}
TIMES = re.compile(r"took|elapsed|seconds|duration|latency|waited|queued|ttft", re.I)

def names_in(tree):
    "Names, attributes and keys that an expression reads."
    for n in ast.walk(tree):
        if isinstance(n, ast.Name):
            yield n.id
        elif isinstance(n, ast.Attribute):
            yield n.attr
        elif isinstance(n, ast.Constant) and isinstance(n.value, str):
            yield n.value

def is_time(tree):
    "Does it read a clock, or something that is called like a time?"
    calls = {getattr(n.func, "attr", getattr(n.func, "id", "")) for n in ast.walk(tree) if isinstance(n, ast.Call)}
    return bool(CLOCKS & calls) or any(TIMES.search(name) for name in names_in(tree))

def is_number(tree):
    return isinstance(tree, ast.Constant) and isinstance(tree.value, (int, float)) and not isinstance(tree.value, bool)

def time_limits(tree):
    "Lines that assert a time to be below a number. Above one is no race: a wait is never shorter than it was to be."
    for check in (n for n in ast.walk(tree) if isinstance(n, ast.Assert)):
        for n in (n for n in ast.walk(check.test) if isinstance(n, ast.Compare)):
            for left, op, right in zip([n.left, *n.comparators], n.ops, n.comparators):
                less, more = (left, right) if isinstance(op, (ast.Lt, ast.LtE)) else (right, left)
                if isinstance(op, (ast.Lt, ast.LtE, ast.Gt, ast.GtE)) and is_number(more) and is_time(less):
                    yield check.lineno

@pytest.mark.parametrize("code, found", [
    ("assert took < 2", True), ("assert 3 > min(took)", True), ("assert perf_counter() - start <= 1", True),
    ("assert r['seconds'] < .5", True), ("assert paced['seconds'] > .4", False),
    ("assert reply.ttft < reply.seconds", False), ("assert rows < 5", False)])
def test_time_limits_are_seen(code, found):
    assert bool([*time_limits(ast.parse(code))]) == found

@each(NOTEBOOKS)
def test_notebook_asserts_no_time(nb):
    "On a machine with other work any limit is too short."
    assert not (bad := [str(c) for c in nb.cells for s in c.body for _ in time_limits(s)]), f"{nb.name}: {bad}"

@pytest.mark.parametrize("path", sorted((ROOT/"tests").glob("*.py")), ids=lambda p: p.name)
def test_tests_assert_no_time(path):
    lines = [*time_limits(ast.parse(path.read_text(encoding="utf-8")))]
    assert not lines, f"{path.name}: a time is asserted in lines {lines}; wait for an event"

## Packaging

def imported_packages(path):
    "Top-level names that a file imports, each with whether a plain import of the file needs it."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [f for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {id(n) for f in functions for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((a.name.split(".")[0], id(node) not in inside) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0], id(node) not in inside

def test_import_is_light():
    "The package itself holds a version and nothing else: what is heavy is imported by the module that needs it."
    heavy = "torch transformers datasets matplotlib numpy PIL fastcore".split()
    code = f"import sys, tita; print(tita.__version__, *[m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == [CFG["version"]]

HELP = """
import importlib, sys
name, module, func = sys.argv[1:]
sys.argv = [name, "--help"]
try:
    getattr(importlib.import_module(module), func)()
except SystemExit as e:
    assert not e.code, e.code
print("HEAVY", *[m for m in ("torch", "transformers", "datasets", "matplotlib") if m in sys.modules])
"""

@pytest.mark.parametrize("script", CFG["console_scripts"].split())
def test_help_is_quick_and_light(script):
    "`--help` answers without the libraries that the command itself will load."
    name, _, target = script.partition("=")
    module, _, func = target.partition(":")
    run = subprocess.run([sys.executable, "-c", HELP, name, module, func], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    assert name in run.stdout and run.stdout.splitlines()[-1] == "HEAVY", run.stdout[-300:]

def locked():
    "Name -> versions in the lock, for this Python."
    found = {}
    for l in (ROOT/"scripts/requirements.lock").read_text().splitlines():
        if l and not l.startswith("#") and ((r := Requirement(l)).marker is None or r.marker.evaluate()):
            found[canonicalize_name(r.name)] = r.specifier
    return found

def test_lock_holds_what_settings_ask_for():
    unlocked = {f"{name}_requirements" for name in CFG.get("unlocked", "").split()}
    asked = [v for k, v in CFG.items() if k.endswith("requirements") and k not in unlocked]
    wanted = [Requirement(r) for v in asked for r in v.split()]
    pins = {**locked(), "torch": Requirement((ROOT/"scripts/torch.lock").read_text().strip()).specifier}
    for r in wanted:
        pin = pins.get(canonicalize_name(r.name))
        assert pin is not None, f"{r.name} is in settings.ini, not in the lock; run scripts/lock.py"
        fits = r.specifier.contains(next(iter(pin)).version)
        assert fits, f"{r} in settings.ini, {pin} in the lock; run scripts/lock.py"

def test_lock_holds_names_and_versions_only():
    for l in (ROOT/"scripts/requirements.lock").read_text().splitlines():
        assert l.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[\w.!+]+( ; .+)?", l), l
        of_torch = re.match(r"(torch|triton|nvidia-.*|cuda-.*)==", l)
        assert not of_torch, f"{l}: scripts/setup.sh installs this, in the build that fits"

## What must not be in it

KEYS = (
    r"sk-(?:proj-|ant-)?[A-Za-z0-9_-]{20,}", r"hf_[A-Za-z0-9]{30,}", r"gh[pousr]_[A-Za-z0-9]{30,}",
    r"AKIA[0-9A-Z]{16}", r"AIza[0-9A-Za-z_-]{35}")
SECRETS = re.compile(rf"\b({'|'.join(KEYS)})\b|-----BEGIN [A-Z ]*PRIVATE KEY-----")

def test_no_secrets():
    found = [f"{p.relative_to(ROOT)}: {m[0][:8]}..." for p in tracked() if (m := SECRETS.search(text_of(p)))]
    assert not found, found

def test_no_large_files():
    large = [f"{p.relative_to(ROOT)}: {p.stat().st_size >> 20} MB" for p in tracked() if p.stat().st_size > 2 << 20]
    assert not large, f"keep large files outside git and say in data/README.md where they come from: {large}"

def test_weights_are_safetensors():
    can_run_code = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy"}
    unsafe = [str(p.relative_to(ROOT)) for p in tracked() if p.suffix in can_run_code]
    assert not unsafe, f"formats that can run code when loaded, or that nothing here reads: {unsafe}"

def test_scripts_can_be_started():
    for p in [*(ROOT/"scripts").rglob("*.sh"), ROOT/".ci/run"]:
        assert os.access(p, os.X_OK), f"{p.relative_to(ROOT)} is not executable"
        assert subprocess.run(["bash", "-n", p]).returncode == 0, f"{p.relative_to(ROOT)}: bash cannot read it"
