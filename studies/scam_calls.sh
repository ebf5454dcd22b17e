#!/usr/bin/env bash
# The studies of docs/findings.md, on scam calls of your own, as they were run there: SmolLM2, 60 updates of 16 rows, three seeds.
#
#   studies/scam_calls.sh TRAIN.csv TEST.csv [OUT [MINUTES [STUDY ...]]]
#
# On one H100 sixty of the cells took 9 minutes, ten beside each other. Called again, it goes on where it was. OUT: runs/studies. MINUTES: end what is
# under way after so many; the next call goes on. STUDY ...: these instead of all, in this order. Exit code: that of the last study that failed, or 0.
set -uo pipefail
[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
for file in "$1" "$2"; do [ -f "$file" ] || { echo "$file: there is no such file" >&2; exit 2; }; done
train=$(realpath "$1") test=$(realpath "$2") out=$(realpath -m "${3:-runs/studies}") minutes=${4:-600}
shift $(($# < 4 ? $# : 4))
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python=${PYTHON:-$(command -v python || command -v python3)}
ends=$(($(date +%s) + $("$python" -c "print(round(60 * $minutes))")))
mkdir -p "$out"

# Rows in packed passes where nothing is asked of single passes: SmolLM2's are short, and bound by the host.
words() {
  case $1 in
    epochs) echo "data.rows=320 execution.layout=packed" ;; # 20 updates an epoch
    rank | lr_clip) echo "data.rows=640 schedule.updates=60 execution.layout=packed" ;;
    *) echo "data.rows=640 schedule.updates=60" ;;
  esac
}

studies=("$@")
[ ${#studies[@]} -gt 0 ] || studies=(engines four_bit rank epochs accumulation_updates accumulation_rows lr_clip)
code=0
for study in "${studies[@]}"; do
  left=$((ends - $(date +%s)))
  [ "$left" -gt 20 ] || { echo "$study: no time was left; call again"; code=1; break; }
  # shellcheck disable=SC2046  # words are words
  "$python" -m glassloop.cli study "studies/$study.yaml" --out "$out/$study" --parallel 10 --minutes "$("$python" -c "print($left / 60)")" \
    data.source="$train" data.heldout="$test" data.heldout_rows=64 schedule.warmup_updates=5 $(words "$study") || code=$?
done
exit "$code"
