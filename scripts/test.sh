#!/usr/bin/env bash
# Everything that must hold before a change is kept. Stops at the first step that fails and names it.
#
#   bash scripts/test.sh               all but what is marked slow or gpu
#   bash scripts/test.sh --slow        only what is marked slow
#   bash scripts/test.sh --gpu         only what is marked gpu
#   bash scripts/test.sh -k EXPR ...   only pytest, with these arguments
#
# Notebooks are cleaned, exported, run and turned into pages in a copy: the tree is not written to. No network is used.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD bin=$PWD/.venv/bin start=$SECONDS current="set-up"
tmp=$(mktemp -d "${TMPDIR:-/tmp}/tita-test.XXXXXX")

export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
export MPLBACKEND=Agg TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=1
cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
workers=$((cores < 4 ? cores : 4))

finish() {
    local rc=$?
    rm -rf "$tmp"
    if [ "$rc" -eq 0 ]; then printf '\nall passed in %d min %d s\n' $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60))
    else printf '\nFAILED in the step: %s\n' "$current" >&2; fi
}
trap finish EXIT

step() { # NAME COMMAND ...
    local t=$SECONDS
    current=$1; shift
    printf '\n== %s\n' "$current"
    "$@"
    printf '   ok, %d s\n' $((SECONDS - t))
}

# The notebooks, the package and what they read, in a new folder: what they write stays there.
copy_tree() { # DIR
    mkdir -p "$1"
    cp -R nbs tita settings.ini setup.py pyproject.toml _quarto.yml README.md LICENSE "$1"
    local d
    for d in data scripts tests results; do
        if [ -e "$d" ]; then ln -s "$root/$d" "$1/$d"; fi
    done
}

same() { # OURS THEIRS CURE
    diff -rq -x __pycache__ -x .ipynb_checkpoints -x sidebar.yml "$1" "$2" || { printf 'run %s, look at the difference and commit it\n' "$3" >&2; return 1; }
}
notebooks_clean() {
    copy_tree "$tmp/clean"
    (cd "$tmp/clean" && "$bin/nbdev_clean")
    same nbs "$tmp/clean/nbs" nbdev_clean
}
notebooks_exported() { # into an empty package, so that a module without a notebook shows up
    copy_tree "$tmp/export"
    find "$tmp/export/tita" -name '*.py' ! -name __init__.py -delete
    (cd "$tmp/export" && "$bin/nbdev_export")
    same tita "$tmp/export/tita" nbdev_export
}

run_pytest() { # in as many processes as there are cores, one thread each; no test at all is no failure
    local rc=0
    OMP_NUM_THREADS=1 "$bin/python" -m pytest -q -p no:cacheprovider "$@" || rc=$?
    [ "$rc" -eq 0 ] || [ "$rc" -eq 5 ]
}
run_notebooks() { # nbdev_test's arguments ...
    [ -e "$tmp/run" ] || copy_tree "$tmp/run"
    (cd "$tmp/run" && PYTHONPATH=$PWD OMP_NUM_THREADS=1 "$bin/nbdev_test" --n_workers "$workers" --timing "$@")
}
run_flagged() { # FLAG: the notebooks that have cells with this flag, with these cells
    local nb
    for nb in $(grep -rlE "\"#\| ?$1\b" nbs --include='*.ipynb' || true); do
        run_notebooks --path "$nb" --flags "$1"
    done
}

docs() { # nbdev_proc_nbs asks for quarto, but does not call it
    copy_tree "$tmp/docs"
    mkdir -p "$tmp/bin"
    printf '#!/bin/sh\nexit 0\n' > "$tmp/bin/quarto"
    chmod +x "$tmp/bin/quarto"
    (cd "$tmp/docs" && PATH=$tmp/bin:$PATH PYTHONPATH=$PWD OMP_NUM_THREADS=1 "$bin/nbdev_proc_nbs" --n_workers "$workers")
    "$bin/python" scripts/check_docs.py "$tmp/docs/_proc"
    same nbs/nbdev.yml "$tmp/docs/nbs/nbdev.yml" "nbdev_proc_nbs (settings.ini says something else)"
    "$bin/python" scripts/make_readme.py --check
}
smoke() {
    TITA_PROGRESS=0 "$bin/python" scripts/run_notebook.py nbs/runs/demo.ipynb "$tmp/smoke/demo.ipynb" -f scripts/params/smoke/demo.yaml -p out "$tmp/smoke"
    local f
    for f in report.html metrics.json; do
        [ -s "$tmp/smoke/$f" ] || { printf 'the demo wrote no %s\n' "$f" >&2; return 1; }
    done
}

step "set-up" bash scripts/setup.sh
case "${1:-}" in
    --slow|--gpu)
        mark=${1#--}; shift
        step "notebook cells marked $mark" run_flagged "$mark"
        [ "$mark" = gpu ] || set -- -n "$workers" --dist loadfile "$@" # a GPU is not shared
        step "tests marked $mark" run_pytest -m "$mark" "$@"
        ;;
    "")
        step "notebooks are clean" notebooks_clean
        step "the package is what the notebooks export" notebooks_exported
        step "layers and form" run_pytest tests/test_repo.py
        step "notebooks run" run_notebooks
        step "tests" run_pytest -n "$workers" --dist loadfile -m "not slow and not gpu" --ignore tests/test_repo.py
        step "docs" docs
        step "the demo, small" smoke
        ;;
    *)
        step "tests" run_pytest "$@"
        ;;
esac
