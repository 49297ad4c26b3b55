#!/usr/bin/env python3
"""What "Run all" does in JupyterLab, for many notebooks: every cell in a fresh kernel, in the notebook's own folder.

    python scripts/run_all.py [NOTEBOOK ...]      without one: all of nbs but the runs, which take minutes to hours

Nothing is written. nbdev_test leaves out cells marked `eval: false`; a reader's "Run all" does not, nor does this. What
fails for want of a package that is an extra is told apart. Exit code 1 if a notebook failed otherwise.
"""
import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = "gradio", "ray", "lmms_eval", "openpyxl"


def outcome(path: Path, seconds: int) -> str:
    "Run it: nothing if all is well, else what went wrong."
    client = NotebookClient(nbformat.read(path, 4), timeout=seconds, kernel_name="python3",
        resources=dict(metadata=dict(path=str(path.parent))))
    try:
        client.execute()
    except CellExecutionError as e:
        return f"{e.ename}: {e.evalue.splitlines()[0] if e.evalue else ''}"
    except (CellTimeoutError, DeadKernelError) as e:
        return str(e).splitlines()[0]
    return ""


def needs_an_extra(said: str) -> bool:
    return "No module named" in said and any(f"'{name}" in said for name in EXTRAS)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("notebooks", nargs="*", type=Path, help="which; without one, all but the runs")
    p.add_argument("--seconds", type=int, default=600, help="that a cell may take")
    a = p.parse_args()
    every = (path for path in sorted((ROOT/"nbs").rglob("*.ipynb")) if path.parent.name != "runs")
    os.environ.pop("MPLBACKEND", None)
    failed = 0
    for path in a.notebooks or every:
        begun, said = time.time(), outcome(path.resolve(), a.seconds)
        failed += bool(said) and not needs_an_extra(said)
        print(f"{time.time() - begun:6.1f} s  {path.resolve().relative_to(ROOT)}  {said or 'ran'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
