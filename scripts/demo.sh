#!/usr/bin/env bash
# From nothing to a report: set up, then the whole main job on the embedded world, in runs/demo/.
#
#   bash scripts/demo.sh                              the embedded pair of models
#   bash scripts/demo.sh -p base BASE -p reward R     other models; every parameter of nbs/runs/demo.ipynb can be given so
#   bash scripts/demo.sh -f FILE.yaml                 parameters from a file
#   DEMO_OUT=runs/other bash scripts/demo.sh          another folder
#
# Ctrl-C loses nothing: the same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
out=${DEMO_OUT:-runs/demo} start=$SECONDS
.venv/bin/python scripts/run_notebook.py nbs/runs/demo.ipynb "$out/demo.ipynb" -p out "$out" "$@"
printf '\ndone in %d min %d s\n' $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60))
printf 'report:   %s\nnumbers:  %s\nnotebook: %s\n' "$PWD/$out/report.html" "$out/metrics.json" "$out/demo.ipynb"
