#!/usr/bin/env bash
#SBATCH --job-name=tita-run
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@180
#SBATCH --requeue
# A run notebook as one job; arguments as those of scripts/run_notebook.py:
#   sbatch scripts/slurm_run.sh nbs/runs/reproduce.ipynb runs/llava15_7b.ipynb -f scripts/params/llava15_7b.yaml
#   sbatch --gpus-per-node=1 scripts/slurm_run.sh nbs/runs/demo.ipynb runs/demo/demo.ipynb
# At its time limit the run is stopped as by Ctrl-C and the job queued again; the same command then goes on where it stopped.
# A training over several nodes is scripts/slurm_dpo.sh.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ -d .venv ] && PATH="$PWD/.venv/bin:$PATH"
[ $# -ge 2 ] || { echo "usage: sbatch scripts/slurm_run.sh NOTEBOOK OUTPUT [-f FILE.yaml] [-p NAME VALUE] ..." >&2; exit 2; }
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
[ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && echo "start ${SLURM_RESTART_COUNT} after the first: the run goes on where it stopped"

python scripts/run_notebook.py "$@" & run=$!
requeue() { scontrol requeue "$SLURM_JOB_ID"; kill -INT "$run"; }
trap requeue TERM
code=0; wait "$run" || code=$?
kill -0 "$run" 2>/dev/null && { code=0; wait "$run" || code=$?; }   # the first wait ends with the signal, the run a little later
exit "$code"
