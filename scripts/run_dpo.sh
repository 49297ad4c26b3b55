#!/usr/bin/env bash
# Train TITA's reward model with the paths of its README:   bash scripts/run_dpo.sh [--flag value ...]
#   PAIRS, IMAGES   files of pairs, and an image folder for each (or one for all)
#   PARAMS          a YAML of scripts/params/train
#   METHOD          dpo, sft or distill
#   GPUS            devices, as 0,1,2,3 (with DS_ACCELERATOR=cpu: as many processes)
#   LAUNCHER        deepspeed, torchrun or accelerate
#   MASTER_PORT     where the processes meet, for a second training on one machine with deepspeed (default: 29500)
# Flags after the script's name win over the YAML: --resume, --overwrite, --output_dir, --learning_rate ...
set -euo pipefail
cd "$(dirname "$0")/.."
[ -d .venv ] && PATH="$PWD/.venv/bin:$PATH"
DATA=data/step2
PAIRS=${PAIRS:-$DATA/ocrvqa/ocrvqa_answer_file_8k_dpo.jsonl $DATA/textvqa/textvqa_answer_file_8k_dpo.jsonl}
IMAGES=${IMAGES:-$DATA/ocrvqa/images $DATA/textvqa/train_images}
PARAMS=${PARAMS:-scripts/params/train/tita.yaml}
METHOD=${METHOD:-dpo}
GPUS=${GPUS:-0,1,2,3}
LAUNCHER=${LAUNCHER:-deepspeed}

command -v tita-train >/dev/null || { echo "tita-train is not installed; run: bash scripts/setup.sh" >&2; exit 2; }
for path in $PAIRS $IMAGES "$PARAMS"; do
  [ -e "$path" ] && continue
  echo "$path is missing; set PAIRS, IMAGES and PARAMS (data/README.md says where the files come from)" >&2
  exit 2
done
n=$(awk -F, '{print NF}' <<<"$GPUS")
where=(--include "localhost:$GPUS")
[ "${DS_ACCELERATOR:-}" = cpu ] && where=(--num_accelerators "$n")
train=(tita-train "$METHOD" --config "$PARAMS" --pairs $PAIRS --images $IMAGES "$@")
case "$LAUNCHER" in
  deepspeed) exec deepspeed "${where[@]}" ${MASTER_PORT:+--master_port "$MASTER_PORT"} --no_python "${train[@]}" ;;
  torchrun) CUDA_VISIBLE_DEVICES=$GPUS exec torchrun --standalone --nproc_per_node "$n" --no-python "${train[@]}" ;;
  accelerate) CUDA_VISIBLE_DEVICES=$GPUS exec accelerate launch --multi_gpu --num_processes "$n" --no_python "${train[@]}" ;;
  *) echo "LAUNCHER=$LAUNCHER is none of deepspeed, torchrun, accelerate" >&2; exit 2 ;;
esac
