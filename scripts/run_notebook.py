#!/usr/bin/env python3
"""Run a notebook with papermill, and tell a user's mistake in one line instead of in sixty lines of traceback.

    python scripts/run_notebook.py nbs/runs/demo.ipynb runs/demo/demo.ipynb [-f FILE.yaml] [-p NAME VALUE] ...

The executed copy is saved cell by cell, in the end as a page, too; both are also kept in the run's folder, the
parameter `out`. What the notebook prints is shown while it runs.
Parameters are checked first: their names, and that each is of its default's kind; a list is given as
`-p lams "[0.5, 1]"`. Exit codes: 0, 1 (the notebook failed), 2 (a mistake that the message names), 130 (interrupted),
138 (its process died).
"""
import argparse, logging, os, shutil, signal, sys, tempfile
from contextlib import contextmanager
from pathlib import Path

from tita.records import write_page
from tita.steps import check_names, fitting
from tita.steps import notebook_defaults as defaults

MISTAKES = {"TitaError"}
NO_SPACE = "No space left on device"
CHATTER = (
    "Executing Cell", "Ending Cell", "Executing notebook with kernel", "Input Notebook", "Output Notebook",
    "<Picture size", "<Figure size",  # what a picture is in a terminal
    "Task exception was never retrieved",  # of a cell that Ctrl-C left: its process was gone before it was cancelled
)

def mapping(
    file: str, # YAML
) -> dict: # its content
    import yaml
    try:
        found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        raise ValueError(f"{file}: no YAML ({' '.join(str(e).split())})") from None
    if not isinstance(found or {}, dict):
        raise ValueError(f"{file}: a mapping of parameter names to values is needed")
    folder = Path(file).resolve().parent
    root = next((p for p in (folder, *folder.parents) if (p/".git").exists() or (p/"settings.ini").exists()), folder)
    return {name: placed(root, name, value) for name, value in (found or {}).items()}

def placed(
    root: Path, # the repository of a YAML file, or its folder
    name: str, # a parameter
    value, # as the file has it
): # the same; the relative paths in a text made absolute
    "Paths in a YAML file count from its repository, wherever the notebook runs: `out`, and what is there by that name."
    if isinstance(value, dict):
        return {key: placed(root, key, v) for key, v in value.items()}
    if not isinstance(value, str):
        return value
    paths = [name == "out" or "/" in word and (root/word).exists() for word in value.split(" ")]
    return " ".join(str(root/word) if is_path else word for word, is_path in zip(value.split(" "), paths))

def parameters(
    notebook: str, # the notebook to run
    files: list, # YAML files, each a mapping
    pairs: list, # (name, text) of each -p
) -> dict: # the parameters; a later one wins, and -p wins over a file
    "What to put into the notebook's parameters cell, checked against it: no work is done before this has passed."
    known = defaults(notebook)
    given = {name: value for file in files for name, value in mapping(file).items()} | dict(pairs)
    check_names(list(given), list(known), notebook)
    return {name: fitting(name, value, known[name]) for name, value in given.items()}

def explain(
    name: str, # class of the error in the notebook
    value: str, # its message
) -> tuple: # the text to show (None: show the traceback) and the exit code
    "What to tell about the error that ended the notebook."
    if name in MISTAKES:
        return f"error: {value}", 2
    if NO_SPACE in value:
        cure = "make room and run the same command again, it goes on where it stopped"
        return f"error: the disk is full ({value}); {cure}", 2
    return None, 1

@contextmanager
def kernel_stderr():
    "What the notebook's process writes past Jupyter (a crash, its last breath after Ctrl-C) goes to the yielded file."
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
    transport = Config(KernelManager={"transport_encryption": "auto"})
    papermill.execute_notebook(
        notebook, target, given, kernel_name="python3", log_output=True, progress_bar=True, config=transport)

def keep_in_folder(
    file: str | Path, # an executed notebook, or its page
    out: str, # the run's folder, "" where the notebook has none
):
    "Copy it into the folder that it tells of, so that the folder can be moved or sent as it is."
    file, folder = Path(file), Path(out)
    if out and folder.is_dir() and file.is_file() and file.resolve().parent != folder.resolve():
        shutil.copy(file, folder)

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
    more = dict(action="append", default=[])
    p.add_argument("-p", "--parameters", nargs=2, metavar=("NAME", "VALUE"), help="a parameter (repeatable)", **more)
    p.add_argument("-f", "--parameters_file", metavar="FILE", help="a YAML file of parameters (repeatable)", **more)
    a = p.parse_args(args)
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1") # else the kernel warns about frozen modules
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillException, PapermillExecutionError
    try:
        given = parameters(a.notebook, a.parameters_file, a.parameters)
        settings = defaults(a.notebook) | given
        out = "" if settings.get("dry_run") else settings.get("out", "")
        Path(a.target).parent.mkdir(parents=True, exist_ok=True)
        with kernel_stderr() as raw:
            try:
                execute(a.notebook, a.target, given)
            except DeadKernelError:
                died = f"{tail(raw)}error: the notebook's process died, most likely for want of memory"
                return tell(f"{died}\n(what ran up to there: {a.target})", 138)
            finally:
                keep_in_folder(a.target, out)
    except PapermillExecutionError as e:
        text, code = explain(e.ename, e.evalue)
        return tell(f"{text or e}\n(what ran up to there: {a.target})", code)
    except (PapermillException, OSError, ValueError) as e:
        return tell(f"error: {e}", 2)
    except KeyboardInterrupt:
        return tell("interrupted; run the same command again to resume", 130)
    write_page(a.target)
    keep_in_folder(Path(a.target).with_suffix(".html"), out)
    return 0

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: # a shell that starts a command with & lets it ignore Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
