#!/usr/bin/env bash
#SBATCH --job-name=tita-dpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
# The same training on several nodes:   sbatch scripts/slurm_dpo.sh [--flag value ...]
# One torchrun per node; the nodes find each other at the first one's address. PAIRS, IMAGES, PARAMS and METHOD as in run_dpo.sh.
# A job that is killed at its time limit starts again from its last whole checkpoint (--resume after the first start).
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
[ -d .venv ] && PATH="$PWD/.venv/bin:$PATH"
DATA=data/step2
PAIRS=${PAIRS:-$DATA/ocrvqa/ocrvqa_answer_file_8k_dpo.jsonl $DATA/textvqa/textvqa_answer_file_8k_dpo.jsonl}
IMAGES=${IMAGES:-$DATA/ocrvqa/images $DATA/textvqa/train_images}
PARAMS=${PARAMS:-scripts/params/train/tita.yaml}
METHOD=${METHOD:-dpo}
again=(); [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && again=(--resume)
trap 'scontrol requeue "$SLURM_JOB_ID"' TERM

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=${MASTER_PORT:-29500}
per_node=${SLURM_GPUS_ON_NODE:-4}
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK > per_node ? SLURM_CPUS_PER_TASK / per_node : 1))
srun --kill-on-bad-exit=1 torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$per_node" --rdzv_id "$SLURM_JOB_ID" \
  --rdzv_backend c10d --rdzv_endpoint "$MASTER_ADDR:$MASTER_PORT" --no-python \
  tita-train "$METHOD" --config "$PARAMS" --pairs $PAIRS --images $IMAGES "${again[@]}" "$@" &
wait $!
