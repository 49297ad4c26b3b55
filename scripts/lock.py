#!/usr/bin/env python3
"""Write scripts/requirements.lock: the exact version of all that settings.ini asks for (but the extras in `unlocked`), for every
Python we support.

    python scripts/lock.py [--upgrade]

Needs uv (`pip install uv`) and the package registry; users need neither. Versions that the lock already holds are kept unless
settings.ini rules them out; --upgrade takes the newest. PyTorch and the CUDA packages that it brings on some machines stay
outside: scripts/setup.sh installs the version in scripts/torch.lock first, in the build that fits the machine.
"""
import re, shutil, subprocess, sys
from configparser import ConfigParser
from pathlib import Path

scripts = Path(__file__).resolve().parent
lock, torch = scripts/"requirements.lock", (scripts/"torch.lock").read_text().strip()
outside = re.compile(r"(torch|triton|nvidia-.*|cuda-.*|pytorch-triton.*)==")
foreign = re.compile(r"://|@ |^-", re.M)

HEADER = """\
# Exact versions of everything but PyTorch, for Python {low} to {high}. Made by scripts/lock.py from settings.ini: edit that file
# and run the script. scripts/setup.sh installs PyTorch first (torch.lock), then this with `pip install --no-deps -r`.
"""

def settings(
    path: Path, # settings.ini
):  # its [DEFAULT] section
    "The settings, without nbdev: this script runs before anything is installed."
    config = ConfigParser(delimiters=["="])
    if not config.read(path, encoding="utf-8"):
        sys.exit(f"error: {path} is missing")
    return config["DEFAULT"]

def compile_lock(
    wanted: list, # requirement lines
    python: str, # oldest Python, such as 3.11
    *options: str, # more options of `uv pip compile`
) -> list: # lines `name==version ; marker`, sorted by name
    "One resolution for all Pythons from `python` on; an older Python gets older versions where it must."
    uv = shutil.which("uv") or Path(sys.executable).with_name("uv")
    if not Path(uv).exists():
        sys.exit("error: uv is missing: pip install uv")
    cmd = [str(uv), "pip", "compile", "-", "--universal", "--python-version", python, "--fork-strategy", "requires-python",
           "--no-python-downloads", "--no-annotate", "--no-header", "--no-emit-index-url", "--quiet", "-o", str(lock), *options]
    run = subprocess.run(cmd, input="\n".join(wanted), text=True)
    if run.returncode:
        sys.exit("error: the lock is as it was; uv says above what does not fit")
    return [l for l in lock.read_text().splitlines() if l and not l.startswith("#") and not outside.match(l)]

def main():
    cfg = settings(scripts.parent/"settings.ini")
    before = lock.read_text() if lock.exists() else ""
    loose = {f"{name}_requirements" for name in cfg.get("unlocked", "").split()}
    wanted = [r for k, v in cfg.items() if k.endswith("requirements") and k not in loose for r in v.split()]
    lines = compile_lock([*wanted, torch], cfg["min_python"], *sys.argv[1:])
    text = HEADER.format(low=cfg["min_python"], high=cfg["max_python"]) + "\n".join(lines) + "\n"
    if m := foreign.search("\n".join(lines)):
        lock.write_text(before)
        sys.exit(f"error: the lock would name an address or an option ({m.group(0)!r}); it must hold names and versions only")
    lock.write_text(text)
    print(f"{lock.name}: {len(lines)} lines, {'unchanged' if text == before else 'changed'}")

if __name__ == "__main__":
    main()
