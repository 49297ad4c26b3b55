#!/usr/bin/env python3
"""How the code reads, counted: what breaks the rules of form, and the measures of results/style.md.

    python scripts/style.py                    each place that breaks a rule
    python scripts/style.py nbs/decode         the same, below a folder
    python scripts/style.py --table [FOLDER]   the measures of the package, of this checkout or of another one
    python scripts/style.py --lines [FOLDER]   its lines as black writes them, room by room (needs black);
                                               --without serve/ eval/tasks.py core.py:seed_for leaves out modules
                                               that begin so, and definitions by name; --without @FILE reads them
"""
import argparse
import ast
import io
import json
import re
import statistics
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = 120
CELL = 25   # lines of an exported cell
RUN = 3     # exported cells in a row without an example
NAMES = 3   # that one assignment fills
EXPORT = re.compile(r"#\|\s*exports?i?\b")


class Code:
    "Code that stands together: a cell of a notebook or a whole file."

    def __init__(self, place: str, source: str, exported: bool = False):
        self.place, self.exported = place, exported
        self.lines = [re.sub(r"^(\s*)[!%].*", r"\1pass", line) for line in source.split("\n")]
        self.tree = ast.parse("\n".join(self.lines))

    @property
    def written(self) -> list[str]:
        "Lines that are neither empty nor a directive."
        return [line for line in self.lines if line.strip() and not line.startswith("#|")]


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def read(path: Path) -> list[Code]:
    "The code of a notebook or of a Python file."
    if path.suffix == ".py":
        return [Code(str(path), path.read_text(encoding="utf-8"))]
    found = []
    for i, cell in enumerate(cells(path)):
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            found.append(Code(f"{path} cell {i}", source, bool(EXPORT.match(source))))
    return found


def long_lines(code: Code):
    return [f"line {i} has {len(line)} columns" for i, line in enumerate(code.lines, 1) if len(line) > COLUMNS]


def crowded_lines(code: Code):
    "Lines on which more than one statement begins."
    begins = Counter(node.lineno for node in ast.walk(code.tree) if isinstance(node, ast.stmt))
    return [f"line {line} holds {n} statements" for line, n in sorted(begins.items()) if n > 1]


def names_of(target: ast.expr) -> int:
    if isinstance(target, ast.Starred):
        return names_of(target.value)
    if isinstance(target, (ast.Tuple, ast.List)):
        return sum(names_of(t) for t in target.elts)
    return 1


def wide_assignments(code: Code):
    found = []
    for node in ast.walk(code.tree):
        if isinstance(node, ast.Assign) and sum(map(names_of, node.targets)) > NAMES:
            found.append(f"line {node.lineno} fills {sum(map(names_of, node.targets))} names at once")
    return found


def long_cells(code: Code):
    n = len(code.written)
    return [f"an exported cell of {n} lines"] if code.exported and n > CELL else []


def bare_runs(path: Path):
    "Exported cells that follow one another without an example."
    found, run = [], 0
    for i, cell in enumerate(cells(path) if path.suffix == ".ipynb" else []):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or "default_exp" in source:
            continue
        code = Code("", source)
        if all(isinstance(s, (ast.Import, ast.ImportFrom)) for s in code.tree.body):
            continue
        run = run + 1 if EXPORT.match(source) else 0
        if run > RUN:
            found.append(f"{path} cell {i}: exported cell {run} in a row without an example")
    return found


RULES = dict(
    long_lines=long_lines, crowded_lines=crowded_lines, wide_assignments=wide_assignments, long_cells=long_cells)


def broken(path: Path) -> dict[str, list[str]]: # rule -> places
    found = {name: [f"{c.place}: {what}" for c in read(path) for what in rule(c)] for name, rule in RULES.items()}
    return {name: places for name, places in (found | {"bare_runs": bare_runs(path)}).items() if places}


def sources(root: Path, below: str = "") -> list[Path]:
    "Every notebook and script that people wrote."
    paths = [*root.glob("nbs/**/*.ipynb"), *root.glob("scripts/**/*.py"), *root.glob("tests/**/*.py"), root/"setup.py"]
    hidden = re.compile(r"(^|/)[._]")
    kept = [p for p in paths if not hidden.search(p.relative_to(root).as_posix())]
    return sorted(p for p in kept if p.relative_to(root).as_posix().startswith(below))


def measures(root: Path) -> dict[str, float]:
    "What STYLE counts, over the exported package and the notebooks that it comes from."
    package = [p for p in root.glob("tita/**/*.py") if p.name not in ("__init__.py", "_modidx.py")]
    codes = [Code(p.name, p.read_text(encoding="utf-8")) for p in package]
    lines = [line for c in codes for line in c.written if not line.lstrip().startswith("#")]
    nodes = [n for c in codes for n in ast.walk(c.tree) if not isinstance(n, ast.expr_context)]
    functions = [n for n in nodes if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    semicolons = sum(has_semicolon(c) for c in codes)
    assigned = [sum(map(names_of, n.targets)) for n in nodes if isinstance(n, ast.Assign)]
    notebooks = [p for p in sources(root, "nbs") if any("default_exp" in "".join(c["source"]) for c in cells(p))]
    exported = [len(c.written) for p in notebooks for c in read(p) if c.exported]
    prose = sum(len("".join(c["source"]).split()) for p in notebooks for c in cells(p) if c["cell_type"] == "markdown")
    kilo = len(lines) / 1000
    return {
        "lines of code": len(lines),
        "exported cell, lines, median": statistics.median(exported),
        "exported cell, lines, 90th percentile": statistics.quantiles(exported, n=10)[-1],
        "exported cell, lines, largest": max(exported),
        "lines over 120 columns, %": 100 * sum(len(line) > 120 for line in lines) / len(lines),
        "lines with `;`, per 1,000": semicolons / kilo,
        "lines with several statements, per 1,000": sum(len(crowded_lines(c)) for c in codes) / kilo,
        "syntax nodes a line": len(nodes) / len(lines),
        "syntax nodes a function, median": statistics.median(sum(1 for _ in ast.walk(f)) for f in functions),
        "`x if y else z`, per 1,000 lines": sum(isinstance(n, ast.IfExp) for n in nodes) / kilo,
        "assignments to 5 or more names": sum(n > 4 for n in assigned),
        "prose words an exported line": prose / sum(exported),
        "longest run of exported cells without an example": longest_run(notebooks),
    }


def named(node: ast.stmt) -> str | None:
    "The name that a statement of a module defines."
    targets = getattr(node, "targets", [None])
    return getattr(node, "name", None) or getattr(targets[0], "id", None)


def written_by_black(path: Path, without: set = frozenset()) -> tuple[int, int]: # lines; of them those of docstrings
    "Lines of code as black breaks them, but for some definitions: what is written more densely counts no less."
    import black
    mode = black.Mode(line_length=COLUMNS, magic_trailing_comma=False)
    code = Code(path.name, black.format_str(path.read_text(encoding="utf-8"), mode=mode))
    if lost := without - set(map(named, code.tree.body)):
        raise SystemExit(f"{path} defines no {', '.join(sorted(lost))}")
    for node in [n for n in code.tree.body if named(n) in without]:
        first = min([node, *getattr(node, "decorator_list", [])], key=lambda n: n.lineno).lineno
        code.lines[first - 1:node.end_lineno] = [""] * (node.end_lineno - first + 1)
        code.tree.body.remove(node)
    told = [n for n in ast.walk(code.tree) if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
    docstrings = sum(n.end_lineno - n.lineno + 1 for n in told if isinstance(n.value.value, str))
    return sum(not line.lstrip().startswith("#") for line in code.written), docstrings


def room_lines(root: Path, without: list[str]) -> dict[str, Counter]:
    "The package's lines by room, but for modules whose paths below `tita` begin so, and for `module.py:Name`."
    lines, docstrings = Counter(), Counter()
    modules = tuple(w for w in without if ":" not in w)
    for path in root.glob("tita/**/*.py"):
        name = path.relative_to(root/"tita").as_posix()
        if path.name not in ("__init__.py", "_modidx.py") and not name.startswith(modules):
            room = name.rpartition("/")[0] or "root"
            found = written_by_black(path, {w.partition(":")[2] for w in without if w.startswith(f"{name}:")})
            lines[room] += found[0]
            docstrings[room] += found[1]
    return dict(lines=lines, docstrings=docstrings)


def has_semicolon(code: Code) -> int: # lines
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(code.lines)).readline)
    return len({t.start[0] for t in tokens if t.type == tokenize.OP and t.string == ";"})


def longest_run(notebooks: list[Path]) -> int:
    found = "\n".join(line for p in notebooks for line in bare_runs(p))
    return max(map(int, re.findall(r"exported cell (\d+) in a row", found)), default=RUN)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = lambda line: line.partition("#")[0].split()
    below = "look only at paths that begin so; with --table and --lines another checkout"
    parser.add_argument("below", nargs="?", default="", help=below)
    parser.add_argument("--table", action="store_true", help="print the measures")
    parser.add_argument("--lines", action="store_true", help="count the package's lines as black writes them")
    parser.add_argument("--without", nargs="+", default=[], help="with --lines: what is left out of tita")
    args = parser.parse_args()
    if args.lines:
        for what, rooms in room_lines(Path(args.below or ROOT), args.without).items():
            each = ", ".join(f"{name} {n:,}" for name, n in sorted(rooms.items()))
            print(f"{rooms.total():,} {what}: {each}")
    elif args.table:
        for name, value in measures(Path(args.below or ROOT)).items():
            print(f"| {name} | {value:.4g} |")
    else:
        places = [place for p in sources(ROOT, args.below) for found in broken(p).values() for place in found]
        print("\n".join(place.replace(f"{ROOT}/", "") for place in places))
        raise SystemExit(bool(places))


if __name__ == "__main__":
    main()
