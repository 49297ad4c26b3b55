#!/usr/bin/env bash
# One server on one GPU, until the job's time is over; its address is the first line of runs/serve-JOB.txt.
#   sbatch scripts/serve/slurm_serve.sh --base models/base --reward runs/demo/reward --key-file ~/keys.txt
#SBATCH --job-name=tita-serve
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=08:00:00
#SBATCH --signal=TERM@90
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
mkdir -p runs
exec > "runs/serve-${SLURM_JOB_ID:-here}.txt"
exec .venv/bin/tita-serve --host "$(hostname)" --port 0 --device cuda --dtype bfloat16 "$@"
