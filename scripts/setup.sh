#!/usr/bin/env bash
# Make .venv with everything that tita needs, or repair it; where it is complete, do nothing.
#
#   bash scripts/setup.sh
#
# Needs Python 3.11 to 3.13, a C++ compiler (DeepSpeed compiles its operators with it) and a package registry.
# A stamp inside .venv is written last: without it, or with another one, nothing in .venv is trusted and pip goes over all of it.
#
#   PYTHON             the Python to use (else .venv's own, python3, python3.13 ... python3.11)
#   TITA_TORCH         what to install as PyTorch: a wheel, an address or a requirement such as torch==2.13.0
#   TITA_TORCH_INDEX   the package index to take PyTorch from, such as https://download.pytorch.org/whl/cu130
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cd "$root"
venv=$root/.venv stamp=$root/.venv/tita.stamp log=""
cpu_index=https://download.pytorch.org/whl/cpu
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

say() { printf '%s\n' "$*"; }
die() { # what is wrong, then a line for each cure
    printf 'error: %s\n' "$1" >&2; shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
    exit 1
}
setting() { sed -n "s/^$1 *= *//p" settings.ini; }
low=$(setting min_python) high=$(setting max_python)

## Is it done already?

has_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

# What the environment depends on, as one hash: the packages, tita's own metadata, the Python, where the folder lies.
fingerprint() { # PYTHON
    "$1" - "$root" scripts/requirements.lock scripts/torch.lock settings.ini setup.py pyproject.toml <<'PY' 2>/dev/null
import hashlib, pathlib, sys
h = hashlib.sha256(repr((sys.argv[1], sys.version_info[:2])).encode())
for f in sys.argv[2:]: h.update(pathlib.Path(f).read_bytes())
print(h.hexdigest())
PY
}

# The stamp holds the fingerprint and whether a GPU was there. A GPU that came later wants another PyTorch.
is_complete() {
    [ -f "$stamp" ] && [ -x "$venv/bin/python" ] || return 1
    local hash gpu
    read -r hash gpu < "$stamp" || return 1
    { [ "$gpu" = gpu ] || ! has_gpu; } && [ "$hash" = "$(fingerprint "$venv/bin/python")" ] && is_wanted_python
}

python_version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
# With PYTHON set, .venv has to be of that version.
is_wanted_python() { [ -z "${PYTHON:-}" ] || [ "$(python_version "$PYTHON")" = "$(python_version "$venv/bin/python")" ]; }

## What the machine must have

in_range() { # 3.11
    local minor=${1#3.}
    [ "$minor" != "$1" ] && [ "$minor" -ge "${low#3.}" ] && [ "$minor" -le "${high#3.}" ]
}

find_python() { # sets py
    local c v seen=""
    if [ -n "${PYTHON:-}" ]; then
        v=$(python_version "$PYTHON") || die "PYTHON=$PYTHON does not run" "Set PYTHON to a Python $low to $high, such as PYTHON=python3.11."
        in_range "$v" || die "PYTHON=$PYTHON is Python $v; tita needs $low to $high" "Set PYTHON to one of these, such as PYTHON=python3.11."
        py=$PYTHON; return
    fi
    for c in "$venv/bin/python" python3 python3.13 python3.12 python3.11 python; do
        v=$(python_version "$c") || continue
        if in_range "$v"; then py=$c; return; fi
        seen="${seen:+$seen,} $c ($v)"
    done
    die "no Python $low to $high was found${seen:+; there is$seen}" \
        "Install one (Debian, Ubuntu: apt install python3 python3-venv python3-dev; macOS: brew install python@3.11)," \
        "or name it: PYTHON=/path/to/python3.11 bash scripts/setup.sh"
}

check_machine() {
    "$py" -c 'import venv, ensurepip' 2>/dev/null ||
        die "$py has no venv module" "Debian, Ubuntu: apt install python$(python_version "$py")-venv. Or name another Python: PYTHON=..."
    local c found=""
    for c in ${CXX:-} g++ clang++ c++; do
        if command -v "$c" >/dev/null 2>&1; then found=$c; break; fi
    done
    [ -n "$found" ] || die "no C++ compiler was found (g++, clang++ or c++); DeepSpeed compiles its operators with it" \
        "Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install; or set CXX."
    local need=4 free
    if has_gpu; then need=10; fi
    if [ -e "$venv/lib" ]; then need=1; fi
    free=$(df -Pk "$root" | awk 'NR == 2 {print int($4 / 1048576)}')
    [ "$free" -ge "$need" ] || die "$free GB are free in $root; the install needs about $need GB" \
        "Make room, or move the repository to a larger disk. pip's own cache can go: python3 -m pip cache purge"
}

## Install

pid=""
interrupted() {
    [ -z "$pid" ] || kill "$pid" 2>/dev/null || true
    printf '\ninterrupted; run the same command again, it goes on from what is there\n' >&2
    exit 130
}

# pip with a line of progress: how many packages are collected, then how many are there.
pip_install() { # LABEL pip's arguments ...
    local label=$1 start=$SECONDS total=0 done=0 next=0 line; shift
    "$venv/bin/python" -m pip install --no-warn-script-location "$@" > "$log" 2>&1 &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do
        sleep 0.5
        if grep -q '^Installing collected packages' "$log"; then
            total=$(sed -n 's/^Installing collected packages: //p' "$log" | tr ',' '\n' | wc -l)
            done=$(find "$venv"/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' -newer "$log.start" 2>/dev/null | wc -l)
            line="$label: $((done > total ? total : done)) of $((total)) installed, $((SECONDS - start)) s"
        else
            done=$(grep -c '^Collecting ' "$log" || true)
            line="$label: $done collected, $((SECONDS - start)) s"
        fi
        if [ -t 1 ]; then printf '\r\033[K%s' "$line"
        elif [ $((SECONDS - start)) -ge "$next" ] && [ "$next" -gt 0 ]; then say "$line"; fi
        next=$(( (SECONDS - start) / 15 * 15 + 15 ))
    done
    local rc=0; wait "$pid" || rc=$?
    pid=""
    if [ -t 1 ]; then printf '\r\033[K'; fi
    if [ "$rc" -eq 0 ]; then say "$label: done, $((SECONDS - start)) s"; fi
    return "$rc"
}

pip_failed() { # what could not be installed
    printf '%s\n' "---- the end of what pip said" >&2
    tail -n 15 "$log" >&2
    printf '%s\n' "----" >&2
    die "$1 could not be installed; pip says above why" \
        "No network, or a registry of your own? Set it up for pip: python3 -m pip config set global.index-url ADDRESS" \
        "Then run the same command again. Nothing half-made is trusted: it starts from what pip finds in .venv."
}

# pip writes RECORD last. Where it is missing the package was not finished, but pip would take it for installed.
drop_half_installed() {
    local d
    for d in "$venv"/lib/python*/site-packages/*.dist-info; do
        if [ ! -s "$d/RECORD" ]; then rm -rf "$d"; fi
    done
    rm -rf "$venv"/lib/python*/site-packages/~*
}

make_venv() {
    if [ -e "$venv" ]; then
        [ -f "$venv/pyvenv.cfg" ] || [ -z "$(ls -A "$venv")" ] ||
            die "$venv is there, but is no virtual environment" "Move it away and run the same command again."
        rm -f "$stamp"
        # Kept if its Python runs and fits and its scripts call that very Python (an environment does not survive a move).
        if in_range "$(python_version "$venv/bin/python")" && is_wanted_python && grep -qF "$venv/bin/" "$venv/bin/pip" 2>/dev/null &&
           "$venv/bin/python" -m pip --version >/dev/null 2>&1; then drop_half_installed; return; fi
        if [ "$py" = "$venv/bin/python" ]; then py=$("$py" -c 'import sys; print(sys._base_executable)'); fi
        say "rebuilding .venv: it was made elsewhere, for another Python, or not to its end"
        rm -rf "$venv"
    fi
    "$py" -m venv "$venv" > "$log" 2>&1 || { cat "$log" >&2; die "$py could not make $venv; see above"; }
}

# Would the registry's own PyTorch bring CUDA packages? Read from its metadata, without downloading it.
brings_cuda() { # REQUIREMENT
    pip_install "PyTorch, which build" --dry-run --no-deps --use-feature=fast-deps --report "$log.json" "$1" || pip_failed "$1"
    "$venv/bin/python" - "$log.json" <<'PY'
import json, sys
from pip._vendor.packaging.requirements import Requirement
wanted = [Requirement(r) for r in json.load(open(sys.argv[1]))["install"][0]["metadata"].get("requires_dist", [])]
sys.exit(not any(r.name.startswith(("nvidia-", "cuda-")) and (r.marker is None or r.marker.evaluate({"extra": ""})) for r in wanted))
PY
}

# The build of PyTorch that fits: with CUDA where there is a GPU, without elsewhere. Prints nothing if it is there already.
install_torch() {
    local want have
    want=$(cat scripts/torch.lock)
    have=$("$venv/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' 2>/dev/null || true)
    if [ -n "${TITA_TORCH:-}" ]; then
        pip_install PyTorch "$TITA_TORCH" || pip_failed "TITA_TORCH=$TITA_TORCH"
    elif [ -n "${TITA_TORCH_INDEX:-}" ]; then
        pip_install PyTorch --index-url "$TITA_TORCH_INDEX" --force-reinstall "$want" || pip_failed "$want from TITA_TORCH_INDEX"
    elif [ "${have%%+*}" = "$want" ] && ! { has_gpu && [ "$have" = "$want+cpu" ]; }; then
        return
    elif has_gpu; then
        pip_install "PyTorch with CUDA" --upgrade "$want" || pip_failed "$want"
    elif brings_cuda "$want"; then
        pip_install "PyTorch without CUDA" --index-url "$cpu_index" --timeout 15 --retries 1 --no-deps "$want" ||
            die "$want would bring gigabytes of CUDA packages, there is no GPU here, and $cpu_index is not reachable" \
                "Name another index that has a build without CUDA: TITA_TORCH_INDEX=ADDRESS bash scripts/setup.sh" \
                "or a wheel: TITA_TORCH=/path/to/torch-${want#torch==}+cpu-....whl bash scripts/setup.sh" \
                "or take the CUDA packages: TITA_TORCH=$want bash scripts/setup.sh"
    else
        pip_install PyTorch --no-deps "$want" || pip_failed "$want"
    fi
}

install_all() {
    log=$(mktemp -d "${TMPDIR:-/tmp}/tita-setup.XXXXXX")/log
    trap 'rm -rf "${log%/log}"' EXIT
    touch "$log.start"
    make_venv
    pip_install pip --upgrade -c scripts/requirements.lock pip setuptools wheel || pip_failed pip
    install_torch
    pip_install "packages" --no-deps --no-build-isolation -r scripts/requirements.lock || pip_failed scripts/requirements.lock
    pip_install tita --no-deps --no-build-isolation -e . || pip_failed tita
    "$venv/bin/python" -m pip check > "$log" 2>&1 || { say "note: pip check is not content with .venv:"; head -n 5 "$log"; }
    "$venv/bin/python" -c 'import torch, transformers' || die "PyTorch was installed but cannot be imported; see above" \
        "Remove .venv and run the same command again. Name another build with TITA_TORCH or TITA_TORCH_INDEX."
    printf '%s %s\n' "$(fingerprint "$venv/bin/python")" "$(has_gpu && echo gpu || echo cpu)" > "$stamp.new"
    mv "$stamp.new" "$stamp"
}

main() {
    if is_complete; then return; fi
    trap interrupted INT TERM
    find_python
    check_machine
    if command -v flock >/dev/null 2>&1; then # two at a time would undo each other's work
        exec 9> "$root/.venv.lock"
        flock -n 9 || { say "waiting for another set-up of $root"; flock 9; }
        if is_complete; then return; fi
    fi
    local start=$SECONDS
    say "setting up .venv with $("$py" -V 2>&1) (once; about two minutes and 2 GB)"
    install_all
    say "set up in $((SECONDS - start)) s"
}
main
