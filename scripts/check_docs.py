#!/usr/bin/env python3
"""Check the pages that nbdev_proc_nbs made, without Quarto: what pandoc reads, links, anchors, callouts, the sidebar.

    python scripts/check_docs.py PROC_DIR

Quarto renders the site where there is Quarto (.github/workflows/docs.yaml). This finds, in seconds and anywhere, what
would come out wrong there: fenced divs that are not closed, callouts of an unknown kind, links to pages and headings
that do not exist, unresolved cross-references, pages that the sidebar lacks. It reads the notebooks themselves, too: a
link must lead somewhere in the repository as well as on the site. Exit code 1 and a line for each problem.
"""
import json, posixpath, re, subprocess, sys
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import pypandoc, yaml

FROM = "markdown+autolink_bare_uris+emoji-latex_macros"  # Quarto's own reader is pandoc's markdown
CALLOUTS = {f"callout-{k}" for k in ("note", "tip", "warning", "caution", "important")}
CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)")
CROSSREF = re.compile(r"(sec|fig|tbl|eq|lst|thm)-")

def join(x):
    return x if isinstance(x, str) else "".join(x)

def to_markdown(
    notebook: dict, # a processed notebook
):  # yields blocks
    "What Quarto would hand to pandoc: text as it is, code and printed output as blocks, markdown output as text."
    for cell in notebook["cells"]:
        text = join(cell["source"])
        if cell["cell_type"] != "code":
            yield text
            continue
        said = dict(re.findall(r"^#\|\s*([\w-]+):\s*(\S+)", text, re.M))
        if "false" not in (said.get("echo"), said.get("include")):
            yield "```` python\n" + re.sub(r"^#\|.*\n?", "", text, flags=re.M) + "\n````"
        for data in (o.get("data", {}) for o in cell.get("outputs", [])):
            if "text/markdown" in data:
                yield join(data["text/markdown"])
            elif "text/plain" in data and "text/html" not in data:
                yield "````\n" + join(data["text/plain"]) + "\n````"

@dataclass
class Page:
    "What one page defines and points to."
    path: str                                       # relative to PROC_DIR
    out: str = ""                                   # the name that it gets in the site
    ids: set = field(default_factory=set)           # its anchors
    links: list = field(default_factory=list)       # targets of its links and images
    refs: list = field(default_factory=list)        # its cross-references
    problems: list = field(default_factory=list)

def walk(
    x, # a pandoc syntax tree
):  # yields its nodes
    if isinstance(x, dict):
        yield x
    for v in x.values() if isinstance(x, dict) else x if isinstance(x, list) else ():
        yield from walk(v)

def visit(
    page: Page, # filled here
    node: dict, # of pandoc's syntax tree
):
    "One node: its anchor, its link, its mistake."
    kind, c = node.get("t"), node.get("c")
    if kind == "Header":
        page.ids.add(c[1][0])
    elif kind in ("Div", "Span", "Code", "CodeBlock"):
        page.ids.add(c[0][0])
    elif kind in ("Link", "Image"):
        page.links.append(c[2][0])
    elif kind == "Cite":
        page.refs += [k["citationId"] for k in c[0]]
    elif kind == "Str" and c.startswith(":::"):
        page.problems.append(f"a stray {c!r}: the div around it is not closed or not opened")
    elif kind == "RawBlock" and c[0] == "html":
        page.ids.update(re.findall(r"\bid=[\"']([^\"']+)", c[1]))
    classes = c[0][1] if kind == "Div" else []
    if any(k.startswith("callout-") for k in classes) and not CALLOUTS & set(classes):
        page.problems.append(f"an unknown callout {'.'.join(classes)}")

def read_page(
    file: Path, # a processed .ipynb or .qmd
    root: Path, # PROC_DIR
) -> Page:
    "The page as pandoc reads it."
    page, text = Page(file.relative_to(root).as_posix()), file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        text = "\n\n".join(to_markdown(json.loads(text)))
    pandoc = [pypandoc.get_pandoc_path(), "-f", FROM, "-t", "json"]
    run = subprocess.run(pandoc, input=text, capture_output=True, text=True)
    page.problems += [l for l in run.stderr.splitlines() if l.strip()]
    if run.returncode:
        page.problems.append(f"pandoc ended with {run.returncode}")
        return page
    tree = json.loads(run.stdout)
    for node in walk(tree["blocks"]):
        visit(page, node)
    named = tree["meta"].get("output-file", {}).get("c")
    if "title" not in tree["meta"]:
        page.problems.append("no title: begin the notebook with `# name` and `> one line`")
    path = PurePosixPath(page.path)
    page.out = str(path.parent/(named[0]["c"] if named else path.with_suffix(".html").name))
    return page

def resolve(
    here: str, # page that links
    link: str, # target without its anchor
    site: str, # address of the site
) -> str: # the page or file meant, relative to PROC_DIR
    "A link to the published site, from its root, or relative to the page."
    if link.startswith(site):
        link = "/" + link[len(site):].lstrip("/")
    path = link.lstrip("/") if link.startswith("/") else posixpath.join(posixpath.dirname(here), link)
    return posixpath.normpath(path) if path else ""

def link_problems(
    page: Page, # its links are followed
    pages: dict, # all pages by path and by the name they get in the site
    root: Path, # PROC_DIR
    source: Path, # the notebooks' folder, for images beside it
    site: str, # address of the site
):  # yields problems
    "Links and cross-references that lead nowhere."
    for ref in page.refs:
        if CROSSREF.match(ref) and ref not in page.ids:
            yield f"unresolved @{ref}"
    for link in page.links:
        if link.startswith("data:") or re.match(r"[a-z]+:", link) and not link.startswith(site):
            continue
        path, _, anchor = link.partition("#")
        target = resolve(page.path, path, site) if path else page.path
        if target in ("", "."):
            continue
        if target in pages:
            if anchor and anchor not in pages[target].ids:
                yield f"no anchor {link}"
        elif target.startswith("../"):
            yield f"{link} leaves the site; give the repository's address"
        elif not any((d/target).exists() for d in (root, source)):
            yield f"broken link {link}"

def source_links(
    notebook: Path, # as people wrote it
):  # yields targets without their anchors
    "Links in its text; code is not looked at."
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            text = CODE.sub("", join(cell["source"]))
            yield from (target.partition("#")[0] for target in LINK.findall(text))

def source_problems(
    source: Path, # the notebooks' folder
    repository: str, # address under which the repository shows its files, with the branch
):  # yields problems
    "Links that are right on the site and lead nowhere for those who read the repository, and the other way round."
    for notebook in sorted(source.rglob("*.ipynb")):
        here = notebook.relative_to(source)
        if any(p.startswith((".", "_")) for p in here.parts):
            continue
        for link in source_links(notebook):
            if link.startswith(repository):
                if not (source.parent/link.removeprefix(repository).lstrip("/")).exists():
                    yield f"{here}: {link} is not in the repository"
            elif not link or re.match(r"[a-z]+:", link):
                continue
            elif link.endswith(".html"):
                yield f"{here}: {link} is a page of the site only; name its notebook"
            elif not (notebook.parent/link).exists():
                yield f"{here}: {link} is not in the repository"

def sidebar_pages(
    entries: list, # of the sidebar's `contents`
):  # yields paths
    for e in entries:
        if isinstance(e, str):
            yield e
        else:
            if "href" in e:
                yield e["href"]
            yield from sidebar_pages(e.get("contents", []))

def site_problems(
    pages: list, # all pages
    root: Path, # PROC_DIR
):  # yields problems
    "_quarto.yml's files, a bar whose links are pages, and a sidebar that holds each page once."
    merged, paths = yaml.safe_load((root/"_quarto.yml").read_text(encoding="utf-8")), {p.path for p in pages}
    for name in merged.get("metadata-files", []):
        if not (root/name).exists():
            yield f"_quarto.yml: {name} is missing"
    bar = (merged.get("website") or {}).get("navbar") or {}
    named = {e["href"] for side in ("left", "right") for e in bar.get(side, []) if ":" not in e["href"]}
    yield from (f"_quarto.yml: {href} in the bar is no page" for href in sorted(named - paths))
    if not (root/"sidebar.yml").exists():
        return
    sidebar = yaml.safe_load((root/"sidebar.yml").read_text(encoding="utf-8"))["website"]["sidebar"]
    listed = [*sidebar_pages(sidebar["contents"])]
    yield from (f"sidebar.yml: {p} is no page" for p in sorted(set(listed) - paths))
    yield from (f"sidebar.yml lacks {p}; add it to nbs/sidebar.yml" for p in sorted(paths - set(listed)))
    yield from (f"sidebar.yml has {p} twice" for p in sorted({p for p in listed if listed.count(p) > 1}))

def check(
    root: Path, # PROC_DIR
) -> list: # all problems, a line each
    found = sorted([*root.rglob("*.ipynb"), *root.rglob("*.qmd")])
    files = [f for f in found if not any(p.startswith(("_", ".")) for p in f.relative_to(root).parts)]
    pages = [read_page(f, root) for f in files]
    by_name = {n: p for p in pages for n in (p.path, p.out)}
    website = yaml.safe_load((root/"nbdev.yml").read_text(encoding="utf-8"))["website"]
    source, site = root.parent/"nbs", website["site-url"]
    problems = [f"{p.path}: {x}" for p in pages for x in [*p.problems, *link_problems(p, by_name, root, source, site)]]
    if "repo-url" in website:
        problems += source_problems(source, f"{website['repo-url']}/blob/{website['repo-branch']}/")
    problems += site_problems(pages, root)
    print(f"{len(pages)} pages, {sum(len(p.links) for p in pages)} links")
    return problems or ([] if pages else [f"no pages in {root}; run nbdev_proc_nbs first"])

if __name__ == "__main__":
    found = check(Path(sys.argv[1]).resolve())
    print(*found, sep="\n")
    sys.exit(bool(found))
