#!/usr/bin/env python3
"""Write README.md from nbs/index.ipynb.

    python scripts/make_readme.py [--check]

nbdev_readme does this with Quarto; this needs nothing but the standard library, and the same notebook always gives the
same file. Links and images are rewritten from nbs/ to the root, links to the repository's own address as well. --check
writes nothing and fails if README.md is another one.
"""
import json, posixpath, re, sys
from configparser import ConfigParser
from pathlib import Path

root = Path(__file__).resolve().parent.parent
settings = ConfigParser(delimiters=["="])
settings.read(root/"settings.ini", encoding="utf-8")
REPOSITORY = f"{settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}/"
NOTE = "<!-- Made from nbs/index.ipynb by scripts/make_readme.py: edit the notebook. -->"
DIRECTIVE = re.compile(r"^#\|[ \t]*([\w-]+):?[ \t]*(.*)\n?", re.M)
FENCE = re.compile(r"(^ {0,3}(`{3,}|~{3,}).*?^ {0,3}\2[`~]*[ \t]*$)", re.M | re.S)
LINK = re.compile(r"(\]\(|(?:src|href)=\")([^)\s\"]+)")

def join(
    x, # a string, or a notebook's list of lines
) -> str: # one string
    return x if isinstance(x, str) else "".join(x)

def from_root(
    target: str, # as written in nbs/index.ipynb
) -> str: # the same place, seen from the root of the repository
    "`03_views.ipynb` is `nbs/03_views.ipynb`, `../results/a.png` is `results/a.png`; other addresses and anchors stay."
    if target.startswith(REPOSITORY):
        return target.removeprefix(REPOSITORY)
    if re.match(r"([a-z][a-z0-9+.-]*:|#|/)", target):
        return target
    return posixpath.normpath(posixpath.join("/nbs", target)).lstrip("/")

def markdown(
    text: str, # a markdown cell
) -> str: # with its links seen from the root, code blocks untouched
    pieces = FENCE.split(text)[::3], FENCE.findall(text)
    moved = [LINK.sub(lambda m: m[1] + from_root(m[2]), p) for p in pieces[0]]
    return "".join(a + b for a, b in zip(moved, [f[0] for f in pieces[1]] + [""])).strip()

def fenced(
    text: str, # code or output
    language: str="", # for the highlighter
) -> str: # a block that no backtick inside can end
    ticks = "`" * max(3, 1 + max((len(t) for t in re.findall("`+", text)), default=0))
    return f"{ticks} {language}".rstrip() + f"\n{text.rstrip()}\n{ticks}"

def outputs(
    cell: dict, # a code cell
):  # yields blocks of markdown
    "Printed text and results. Images belong into results/, linked from a markdown cell: they cannot be text."
    for o in cell.get("outputs", []):
        data = o.get("data", {})
        if o["output_type"] == "error":
            raise ValueError(f"nbs/index.ipynb, cell {cell.get('id')}: it ended in an error ({o['ename']})")
        if "text/markdown" in data:
            yield markdown(join(data["text/markdown"]))
        elif text := join(o.get("text", data.get("text/plain", ""))).strip("\n"):
            if not text.startswith("<Figure"):
                yield fenced(text)

def blocks(
    cell: dict, # of the notebook
):  # yields blocks of markdown
    "nbdev's directives `hide`, `echo: false`, `include: false`, `output: false` mean here what they mean in the docs."
    text = join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield markdown(text)
    if cell["cell_type"] != "code":
        return
    said = dict(DIRECTIVE.findall(text))
    off = {k for k, v in said.items() if v.strip().lower() == "false"}
    if "hide" in said or "include" in off or "default_exp" in said:
        return
    if not off & {"echo"} and "hide_input" not in said and (code := DIRECTIVE.sub("", text).strip()):
        yield fenced(code, "python")
    if not off & {"output"} and "hide_output" not in said:
        yield from outputs(cell)

def readme(
    notebook: Path, # nbs/index.ipynb
) -> str: # the text of README.md
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join([NOTE, *(b for c in cells for b in blocks(c) if b)]) + "\n"

def main():
    text, path = readme(root/"nbs/index.ipynb"), root/"README.md"
    if "--check" in sys.argv[1:]:
        if path.read_text(encoding="utf-8") != text:
            sys.exit("README.md is not what nbs/index.ipynb gives; run: python scripts/make_readme.py")
    else:
        path.write_text(text, encoding="utf-8")

if __name__ == "__main__":
    main()
