"Commands that a reader may copy from the documents exist, with their options and the files that they name."
import importlib, re, shlex
from functools import cache

import pytest
import typer

import test_repo

ROOT = test_repo.ROOT
BLOCK = re.compile(r"```(?:bash|sh|shell|console)\n(.*?)```", re.S)
OURS = re.compile(r"(?:\w+=\S* +)*(tita-[a-z]+|(?:bash|python|sbatch|papermill) \S*(?:scripts|nbs)/\S+)")
ENTRIES = dict(line.split("=", 1) for line in test_repo.CFG["console_scripts"].split("\n"))
COMMENTED = [*(ROOT/"scripts").rglob("*.yaml"), *(ROOT/"scripts").glob("*.sh")]

def shown_in(text):
    "Fenced blocks, and those that are indented."
    return [*BLOCK.findall(text), "\n".join(re.findall(r"^    (\S.*|    .*)", text, re.M))]

def blocks():
    "Text that shows commands: (where, text)."
    for path in [*ROOT.glob("*.md"), *(ROOT/"data").glob("*.md")]:
        for text in BLOCK.findall(path.read_text(encoding="utf-8")):
            yield path.relative_to(ROOT), text
    for nb in test_repo.NOTEBOOKS:
        for cell in nb.cells:
            for text in shown_in(cell.source) if cell.kind == "markdown" else []:
                yield nb.name, text
    for path in COMMENTED:
        comments = re.findall(r"^#[ \t]+(.*)", path.read_text(encoding="utf-8"), re.M)
        yield path.relative_to(ROOT), "\n".join(comments)

def commands_in(text):
    "Commands of ours, without comments, joined where a backslash continues them."
    for line in text.replace("\\\n", " ").split("\n"):
        line = re.sub(r"^\s*(\$ |nice |nohup |srun )", "", line.split("  #")[0]).strip()
        line = re.split(r"   +|\s[|>&]+\s", line)[0]
        if OURS.match(line):
            yield line

COMMANDS = sorted({(str(where), command) for where, text in blocks() for command in commands_in(text)})

@cache
def interface(entry):
    "The click command behind an entry point, or None for tita-train, which reads TRL's fields."
    module, function = ENTRIES[entry].split(":")
    found = importlib.import_module(module)
    app = getattr(found, function.replace("main", "app"), None)
    return typer.main.get_command(app) if isinstance(app, typer.Typer) else None

@cache
def train_fields(method):
    from tita.train.recipes import flag_parser
    parser = flag_parser(method)[0]
    return parser._option_string_actions.keys() | {"--config", "--help", "--help-all"}

def words_of(command):
    words = shlex.split(command, comments=True)
    while "=" in words[0]:
        words = words[1:]
    return words

def options_of(words):
    return [w.split("=")[0] for w in words if re.match(r"--?[a-zA-Z]", w)]

def check_tita(command):
    entry, *words = words_of(command)
    assert entry in ENTRIES, f"there is no command {entry}"
    if entry == "tita-train":
        if words and words[0].isalpha() and words[0].islower():
            unknown = set(options_of(words)) - train_fields(words[0])
            assert not unknown, f"{entry} {words[0]} has no {unknown}"
        return
    found = interface(entry)
    if hasattr(found, "commands") and words and not words[0].startswith("-"):
        assert words[0] in found.commands, f"{entry} has no {words[0]}"
        found = found.commands[words[0]]
    check_click(entry, found, words[1:] if hasattr(interface(entry), "commands") else words)

def check_click(entry, command, words):
    "Its options exist, and what it needs is given."
    options = {o: p for p in command.params for o in (*p.opts, *p.secondary_opts) if o.startswith("-")}
    unknown = set(options_of(words)) - options.keys() - {"--help"}
    assert not unknown, f"{entry} has no {unknown}"
    given = [w.split("=")[0] for w in words]
    if "--help" in given or "..." in given or not words:
        return
    for p in command.params:
        assert not p.required or not p.opts[0].startswith("-") or set(p.opts) & set(given), f"{entry} needs {p.opts[0]}"
    valued = {i + 1 for i, w in enumerate(words) if w in options and not options[w].is_flag}
    free = [w for i, w in enumerate(words) if w not in options and i not in valued and "=" not in w]
    needed = [p.name for p in command.params if p.required and not p.opts[0].startswith("-")]
    assert len(free) >= len(needed), f"{entry} needs {needed}"

def check_files(command):
    for word in words_of(command):
        if re.match(r"(scripts|nbs|tests)/[\w./-]+$", word):
            assert (ROOT/word).exists(), f"{word} does not exist"

def test_documents_show_commands():
    shown = {words_of(command)[0] for _, command in COMMANDS}
    assert ENTRIES.keys() <= shown, f"no document shows {ENTRIES.keys() - shown}"
    assert any("scripts/demo.sh" in command for _, command in COMMANDS)

@pytest.mark.parametrize("command", [pytest.param(c, id=f"{where}: {c[:60]}") for where, c in COMMANDS])
def test_documented_command(command):
    check_files(command)
    if words_of(command)[0].startswith("tita-"):
        check_tita(command)

WRONG = ["tita-ask a.jpg b --fly", "tita-bench fly", "tita-data pairs --nothing 1", "tita-train dpo --no_such_field 3"]
INCOMPLETE = ["tita-data pairs a.jsonl --out b", "tita-data pairs --images c --out b", "tita-bench run --out a"]

@pytest.mark.parametrize("command", WRONG)
def test_wrong_commands_are_seen(command):
    with pytest.raises(AssertionError, match="has no"):
        check_tita(command)

@pytest.mark.parametrize("command", INCOMPLETE)
def test_incomplete_commands_are_seen(command):
    with pytest.raises(AssertionError, match="needs"):
        check_tita(command)
