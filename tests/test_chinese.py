"The Chinese pages say what the English ones say: headings, commands, code, links and figures are compared."
import ast, json, posixpath, re, sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"scripts"))
import check_docs, make_readme, sync_chinese

COUNTERPART = {posixpath.relpath(e, "nbs"): posixpath.relpath(c, "nbs") for e, c in sync_chinese.PAGES.items()}
NUMBER = re.compile(r"(?<![A-Za-z0-9_.])[-+]?\d[\d,]*(?:\.\d+)?")
FENCE = re.compile(r"^```\w*\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
CHINESE = re.compile(r"[\u4e00-\u9fff]")

def headings(text):
    return [len(marks) for marks in re.findall(r"^(#+) ", FENCE.sub("", text), re.M)]

def commands(text):
    "Lines of code blocks, without comments."
    lines = [line.partition(" #")[0].rstrip() for block in FENCE.findall(text) for line in block.splitlines()]
    return [line for line in lines if line]

def spans(text):
    return Counter(SPAN.findall(FENCE.sub("", text)))

def links(text, here, translated=False):
    "Where links lead, as the Chinese page should have them."
    found = Counter()
    for target in check_docs.LINK.findall(check_docs.CODE.sub("", text)):
        if ":" not in target:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
            target = target if translated else COUNTERPART.get(target, target)
        found[target] += 1
    return found

def figures(text):
    "Numbers of the prose, without those of links and code."
    prose = SPAN.sub("", FENCE.sub("", re.sub(r"\]\([^)]*\)", "]", text)))
    return Counter(n.rstrip(",") for n in NUMBER.findall(prose))

@pytest.mark.parametrize("of, text, other", [
    (headings, "## A\n\n### B", "## A\n\n## B"),
    (commands, "```bash\nrun a # first\n```", "```bash\nrun b # first\n```"),
    (spans, "take `a`", "take `b`"),
    (figures, "1,500 scenes, +2.5 points", "1,500 scenes, +2.4 points"),
    (figures, "在 3 组中", "在 2 组中")])
def test_differences_are_seen(of, text, other):
    assert of(text) and of(text) != of(other)

def test_translated_links_are_counterparts():
    "What an English page links to, the Chinese one links to in Chinese, where that is there."
    english, chinese = "[a](../index.ipynb), [b](x.ipynb)", "[甲](../zh/index.ipynb)、[乙](x.ipynb)"
    here = "tutorials/first_hour.ipynb"
    assert links(english, here) == links(chinese, here, True)
    assert links(english, here) != links("[甲](../index.ipynb)、[乙](x.ipynb)", here, True)

def text_of(cell):
    return "".join(cell["source"])

def said(cell):
    "What a cell printed or showed, as text."
    for o in cell.get("outputs", []):
        yield check_docs.join(o.get("data", {}).get("text/markdown", o.get("text", "")))

class Page:
    "An English page and its translation."
    def __init__(self, english, chinese):
        self.english, self.chinese = english, chinese
        self.theirs, self.ours = (sync_chinese.read(ROOT/name)["cells"] for name in (english, chinese))
        self.pairs = [*zip(self.theirs, self.ours)]
    def prose(self):
        return [(a, b) for a, b in self.pairs if a["cell_type"] == "markdown"]
    def code(self):
        return [(a, b) for a, b in self.pairs if a["cell_type"] == "code"]
    def places(self):
        return [posixpath.relpath(name, "nbs") for name in (self.english, self.chinese)]

PAGES = [Page(*names) for names in sync_chinese.PAGES.items()]
each = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.chinese)

@each
def test_cells_correspond(page):
    assert [f"{c['id']}-zh" for c in page.theirs] == [c["id"] for c in page.ours]
    assert [c["cell_type"] for c in page.theirs] == [c["cell_type"] for c in page.ours]

@each
def test_headings_commands_and_spans_agree(page):
    for a, b in page.prose():
        for of in headings, commands, spans:
            assert of(text_of(a)) == of(text_of(b)), f"{b['id']}: {of.__name__}"

@each
def test_links_agree(page):
    "Each page may link to the other, and that is all in which they may differ."
    english, chinese = page.places()
    for a, b in page.prose():
        theirs, ours = links(text_of(a), english), links(text_of(b), chinese, True)
        to_each_other = {english, chinese}
        differ = {*(theirs - ours), *(ours - theirs)}
        assert differ <= to_each_other, f"{b['id']}: {differ}"

@each
def test_figures_agree(page):
    for a, b in page.prose():
        assert figures(text_of(a)) == figures(text_of(b)), b["id"]

@each
def test_code_is_the_same(page):
    "`python scripts/sync_chinese.py` copies it; cells of words have the same names and places to fill."
    for a, b in page.code():
        if a["id"] not in sync_chinese.WORDS:
            assert text_of(a) == text_of(b), f"{b['id']}: run python scripts/sync_chinese.py"
            continue
        assert CHINESE.search(text_of(b)), b["id"]
        for found in (names_in, places_in, keys_in):
            assert found(text_of(a)) == found(text_of(b)), b["id"]

def names_in(code):
    return [t.id for s in ast.parse(code).body for t in s.targets]

def keys_in(code):
    return [k.arg for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Call) for k in n.keywords]

def places_in(code):
    "What is filled into texts, and where they link to."
    return sorted(re.findall(r"\{\w+\}|https://[^)\s]+", code))

@each
def test_outputs_agree(page):
    "Those that are copied are the same; those with words have the same figures and links."
    for a, b in page.code():
        if not sync_chinese.is_executed(dict(cells=page.ours)):
            assert a["outputs"] == b["outputs"], f"{b['id']}: run python scripts/sync_chinese.py"
        theirs, ours = "\n".join(said(a)), "\n".join(said(b))
        assert figures(theirs) == figures(ours) and links(theirs, "") == links(ours, ""), b["id"]

@each
def test_it_is_chinese(page):
    "No paragraph was left in English."
    for _, b in page.prose():
        prose = FENCE.sub("", text_of(b))
        assert all(CHINESE.search(p) for p in re.split(r"\n{2,}", prose) if re.search(r"[a-z]{4}", p)
            and not p.startswith("- skip_exec")), b["id"]

@pytest.mark.parametrize("notebook, name", make_readme.PAGES.items())
def test_readmes_are_made_from_their_notebooks(notebook, name):
    made = make_readme.readme(ROOT/notebook, posixpath.dirname(notebook))
    assert (ROOT/name).read_text(encoding="utf-8") == made, "run python scripts/make_readme.py"

def test_readmes_are_short():
    "What is long stands on the site."
    for name in make_readme.PAGES.values():
        assert len((ROOT/name).read_text(encoding="utf-8").splitlines()) <= 92, name
