#!/usr/bin/env python3
"""Write README.md from nbs/index.ipynb, and README.zh.md from nbs/zh/index.ipynb.

    python scripts/make_readme.py [--check]

nbdev_readme does this with Quarto; this needs nothing but the standard library, and the same notebook always gives the
same file. Links and images are rewritten from the notebook's folder to the root, links to the repository's own address
as well. --check writes nothing and fails if a file is another one.
"""
import json, posixpath, re, sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
settings = ConfigParser(delimiters=["="])
settings.read(root/"settings.ini", encoding="utf-8")
REPOSITORY = f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}/"
PAGES = {"nbs/index.ipynb": "README.md", "nbs/zh/index.ipynb": "README.zh.md"}
NOTE = "<!-- Made by scripts/make_readme.py: edit nbs/index.ipynb, for Chinese nbs/zh/index.ipynb. -->"
DIRECTIVE = re.compile(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*)\n?", re.M)
FENCE = re.compile(r"(^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\2[`~]*[ \t]*$)", re.M | re.S)
LINK = re.compile(r"(\]\(|(?:src|srcset|href)=\")([^)\s\"]+)")

def join(
    x, # a string, or a notebook's list of lines
) -> str: # one string
    return x if isinstance(x, str) else "".join(x)

def from_root(
    target: str, # as written in a notebook
    folder: str = "nbs", # where the notebook lies
) -> str: # the same place, seen from the root of the repository
    "`03_views.ipynb` is `nbs/03_views.ipynb`, `../results/a.png` is `results/a.png`; other addresses and anchors stay."
    if target.startswith(REPOSITORY):
        return target.removeprefix(REPOSITORY)
    if re.match(r"([a-z][a-z0-9+.-]*:|#|/)", target):
        return target
    path = posixpath.normpath(posixpath.join("/", folder, target)).lstrip("/")
    return PAGES.get(path, path)

def markdown(
    text: str, # a markdown cell
    folder: str = "nbs", # where its notebook lies
) -> str: # with its links seen from the root, code blocks untouched
    pieces = FENCE.split(text)[::3], FENCE.findall(text)
    moved = [LINK.sub(lambda m: m[1] + from_root(m[2], folder), p) for p in pieces[0]]
    return "".join(a + b for a, b in zip(moved, [f[0] for f in pieces[1]] + [""])).strip()

def fenced(
    text: str, # code or output
    language: str="", # for the highlighter
) -> str: # a block that no backtick inside can end
    ticks = "`" * max(3, 1 + max((len(t) for t in re.findall("`+", text)), default=0))
    return f"{ticks} {language}".rstrip() + f"\n{text.rstrip()}\n{ticks}"

def outputs(
    cell: dict, # a code cell
    folder: str, # where its notebook lies
):  # yields blocks of markdown
    "Printed text and results, no warnings. Images belong into a folder, linked from a markdown cell: they are no text."
    for o in (o for o in cell.get("outputs", []) if o.get("name") != "stderr"):
        data = o.get("data", {})
        if o["output_type"] == "error":
            raise ValueError(f"{folder}/index.ipynb, cell {cell.get('id')}: it ended in an error ({o['ename']})")
        if "text/markdown" in data:
            yield markdown(join(data["text/markdown"]), folder)
        elif text := join(o.get("text", data.get("text/plain", ""))).strip("\n"):
            if not text.startswith("<Figure"):
                yield fenced(text)

def blocks(
    cell: dict, # of the notebook
    folder: str, # where it lies
):  # yields blocks of markdown
    "nbdev's directives `hide`, `echo: false`, `include: false`, `output: false` mean here what they mean in the docs."
    text = join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield markdown(text, folder)
    if cell["cell_type"] != "code":
        return
    said = dict(DIRECTIVE.findall(text))
    off = {k for k, v in said.items() if v.strip().lower() == "false"}
    if "hide" in said or "include" in off or "default_exp" in said:
        return
    if not off & {"echo"} and "hide_input" not in said and (code := DIRECTIVE.sub("", text).strip()):
        yield fenced(code, "python")
    if not off & {"output"} and "hide_output" not in said:
        yield from outputs(cell, folder)

def readme(
    notebook: Path, # nbs/index.ipynb, or the one in another language
    folder: str = "nbs", # where it lies in the repository
) -> str: # the text of its README
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join([NOTE, *(b for c in cells for b in blocks(c, folder) if b)]) + "\n"

def main():
    for notebook, name in PAGES.items():
        text, path = readme(root/notebook, posixpath.dirname(notebook)), root/name
        if "--check" not in sys.argv[1:]:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{name} is not what {notebook} gives; run: python scripts/make_readme.py")

if __name__ == "__main__":
    main()
