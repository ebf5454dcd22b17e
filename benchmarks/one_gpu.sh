#!/usr/bin/env bash
# What glassloop does on one card with bases and rows that outgrow it, and one JSON to send back:
#
#   benchmarks/one_gpu.sh --work DIR                  # every part; a part that is in the JSON already is not run again
#   benchmarks/one_gpu.sh --parts limited,killed      # some parts; --dry-run prints their commands
#   benchmarks/one_gpu.sh --device cpu --model random:tiny
#
# Nothing is downloaded: the weights are drawn. Rows are drawn too, unless --rows names a CSV of calls.
set -euo pipefail
cd "$(dirname "$0")/.."
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1  # two_gpus.sh says why
unset PYTHONDONTWRITEBYTECODE  # a start with uncompiled modules takes three times as long
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=disabled
exec "${PYTHON:-$(command -v python || command -v python3)}" benchmarks/one_gpu.py "$@"
