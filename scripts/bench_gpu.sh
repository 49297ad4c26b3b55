#!/usr/bin/env bash
# Everything that only a GPU can tell: the tests marked gpu, decoding at the shapes of real pairs (random weights, drafts
# accepted by lot) and training against TRL, SDPA and FlexAttention measured beside each other.
#
#   bash scripts/bench_gpu.sh [FOLDER]      where the figures go [results/gpu]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nvidia-smi -L >/dev/null 2>&1 || { echo "error: there is no GPU here (nvidia-smi lists none); run this on a machine with one" >&2; exit 2; }
out=${1:-results/gpu}
bash scripts/setup.sh
bash scripts/test.sh --gpu
mkdir -p "$out"
for shape in 7b/1.4b 13b/1.4b 7b/3b; do
    .venv/bin/python scripts/bench_decode.py --shape "$shape" --dtype bfloat16 --acceptance 0.8 --batch 1,8,32 --prompt 64,640 --new 32,256 --drafts 2,4,6 --seconds 20 --out "$out/decode_${shape//[\/.]/_}"
done
.venv/bin/python scripts/bench_train.py --layers 22 --hidden 2048 --vocab 32000 --batch 8 --dtype bfloat16 --gradient-checkpointing --out "$out/train.json"
