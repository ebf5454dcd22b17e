#!/usr/bin/env bash
# What glassloop does on two cards, and one JSON to send back:
#
#   benchmarks/two_gpus.sh                      # both cards of this machine; CUDA_VISIBLE_DEVICES=2,3 takes others
#   benchmarks/two_gpus.sh --parts A --add      # a group of at most 8.5 minutes; the file keeps what B, C and D found
#   benchmarks/two_gpus.sh --help               # single parts, other interpreters for TRL and Unsloth, a CPU without a card
#
# Nothing is downloaded: the weights are drawn, the rows are made.
set -euo pipefail
cd "$(dirname "$0")/.."
# NVLink multicast (NVLS) off. It takes groups that the NVSwitches of the whole host keep, not the two cards alone: a process that ends badly while
# it has some, and here one is killed on purpose, can leave other people's cards on a shared host out of service. Nothing measured here needs it:
# one sum of 160 MB an update takes about a millisecond over NVLink as it is.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 WANDB_MODE=disabled
exec "${PYTHON:-$(command -v python || command -v python3)}" benchmarks/two_gpus.py "$@"
