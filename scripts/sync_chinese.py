#!/usr/bin/env python3
"""Give the Chinese pages the code of the English ones.

    python scripts/sync_chinese.py

A Chinese page has the cells of its English page, in order; the id of each ends in -zh. Its prose is its own, its code
is not: this copies it, but for the cells that hold words (WORDS). A page that is not executed by itself (skip_exec)
gets the outputs, too. What must agree beyond that, headings, links, commands and figures, is compared by
tests/test_chinese.py.
"""
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "nbs/index.ipynb": "nbs/zh/index.ipynb",
    "nbs/tutorials/first_hour.ipynb": "nbs/tutorials/first_hour_zh.ipynb"}
WORDS = {"a1500003", "a1500005"} # cells of nbs/index.ipynb whose strings are translated

def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))

def is_executed(page: dict) -> bool:
    "Does it make its own outputs?"
    return "skip_exec: true" not in "".join(page["cells"][0]["source"])

def take_code(
    page: dict, # Chinese notebook, changed here
    english: dict, # the notebook that it follows
):
    "The code of each cell from its counterpart."
    theirs = {f"{c['id']}-zh": c for c in english["cells"]}
    for cell in page["cells"]:
        other = theirs[cell["id"]]
        if cell["cell_type"] != "code" or other["id"] in WORDS:
            continue
        cell["source"] = other["source"]
        if not is_executed(page):
            cell["outputs"] = other["outputs"]

def main():
    for english, chinese in PAGES.items():
        page = read(ROOT/chinese)
        take_code(page, read(ROOT/english))
        text = json.dumps(page, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
        (ROOT/chinese).write_text(text, encoding="utf-8")

if __name__ == "__main__":
    main()
