#!/usr/bin/env python3
"""Run a notebook with papermill, and tell a user's mistake in one line instead of in sixty lines of traceback.

    python scripts/run_notebook.py nbs/runs/demo.ipynb runs/demo/demo.ipynb [-f FILE.yaml] [-p NAME VALUE] ...

The executed copy is saved cell by cell, and what the notebook prints is shown while it runs. Exit codes: 0, 1 (the notebook
failed), 2 (a mistake that the message names), 130 (interrupted), 138 (its process died).
"""
import argparse, logging, os, sys, tempfile
from contextlib import contextmanager
from pathlib import Path

MISTAKES = {"TitaError"}
NO_SPACE = "No space left on device"
CHATTER = ("Executing Cell", "Ending Cell", "Executing notebook with kernel", "Input Notebook", "Output Notebook",
    "Task exception was never retrieved") # of a cell that Ctrl-C left, when its process was gone before the task was cancelled

def value(
    text: str, # as typed
):  # a bool, None, an int, a float, or the text itself
    "The value of a `-p NAME VALUE`, read as papermill's own command line reads it."
    if text in (names := {"True": True, "False": False, "None": None}):
        return names[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text

def parameters(
    files: list, # YAML files, each a mapping
    pairs: list, # (name, text) of each -p
) -> dict: # the parameters; a later one wins, and -p wins over a file
    "What to put into the notebook's parameters cell."
    import yaml
    found = {}
    for f in files:
        rows = yaml.safe_load(Path(f).read_text(encoding="utf-8")) or {}
        if not isinstance(rows, dict):
            raise ValueError(f"{f}: a mapping of parameter names to values is needed")
        found.update(rows)
    return {**found, **{name: value(text) for name, text in pairs}}

def check_names(
    notebook: str, # the notebook to run
    given: dict, # parameters for it
):
    "papermill only warns of a parameter that the notebook does not have; a mistyped name would run with the default."
    import papermill
    if unknown := sorted(set(given) - set(known := papermill.inspect_notebook(notebook))):
        raise ValueError(f"{notebook} has no parameter {', '.join(unknown)}; it has {', '.join(known)}")

def explain(
    name: str, # class of the error in the notebook
    value: str, # its message
) -> tuple: # the text to show (None: show the traceback) and the exit code
    "What to tell about the error that ended the notebook."
    if name in MISTAKES:
        return f"error: {value}", 2
    if NO_SPACE in value:
        return f"error: the disk is full ({value}); make room and run the same command again, it goes on where it stopped", 2
    return None, 1

@contextmanager
def kernel_stderr():
    "What the notebook's process writes past Jupyter (a crash; its last breath after Ctrl-C) goes to the file that this yields."
    with tempfile.TemporaryFile("w+", errors="replace") as raw:
        ours, before = os.fdopen(os.dup(2), "w", buffering=1), sys.stderr
        os.dup2(raw.fileno(), 2)
        sys.stderr = ours
        try:
            yield raw
        finally:
            os.dup2(ours.fileno(), 2)
            sys.stderr = before

def tail(
    file, # an open text file
    n: int=10, # lines
) -> str: # its last lines
    file.seek(0)
    return "".join(file.readlines()[-n:])

def execute(
    notebook: str, # the notebook to run
    target: str, # its executed copy
    given: dict, # parameters
):
    "Run it here, with every line that it prints."
    import papermill
    from traitlets.config import Config
    logging.basicConfig(level="INFO", format="%(message)s")
    for name in ("papermill", "traitlets", "asyncio"):
        logging.getLogger(name).addFilter(lambda r: not r.getMessage().startswith(CHATTER))
    papermill.execute_notebook(notebook, target, given, kernel_name="python3", log_output=True, progress_bar=True,
                               config=Config(KernelManager={"transport_encryption": "auto"}))

def tell(
    text: str, # for the reader
    code: int, # exit code
) -> int: # the same code
    "The message on stderr, on a line of its own below the progress bar."
    print(f"\n{text}", file=sys.stderr)
    return code

def main(
    args: list=None, # command line, without the program's name
) -> int: # exit code
    p = argparse.ArgumentParser(prog="run_notebook", description=__doc__.splitlines()[0])
    p.add_argument("notebook", help="the notebook to run")
    p.add_argument("target", help="where its executed copy goes")
    p.add_argument("-p", "--parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter (repeatable)")
    p.add_argument("-f", "--parameters_file", action="append", default=[], metavar="FILE", help="a YAML file of parameters (repeatable)")
    a = p.parse_args(args)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1") # else the kernel warns about frozen modules
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillException, PapermillExecutionError
    try:
        given = parameters(a.parameters_file, a.parameters)
        check_names(a.notebook, given)
        Path(a.target).parent.mkdir(parents=True, exist_ok=True)
        with kernel_stderr() as raw:
            try:
                execute(a.notebook, a.target, given)
            except DeadKernelError:
                return tell(f"{tail(raw)}error: the notebook's process died, most likely for want of memory\n(what ran up to there: {a.target})", 138)
    except PapermillExecutionError as e:
        text, code = explain(e.ename, e.evalue)
        return tell(f"{text or e}\n(what ran up to there: {a.target})", code)
    except (PapermillException, OSError, ValueError) as e:
        return tell(f"error: {e}", 2)
    except KeyboardInterrupt:
        return tell("interrupted; run the same command again to resume", 130)
    return 0

if __name__ == "__main__":
    sys.exit(main())
