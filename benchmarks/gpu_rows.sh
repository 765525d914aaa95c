#!/usr/bin/env bash
# Measure on a GPU what docs/performance.md has of two CPU cores, in about 10 minutes.
#
#     benchmarks/gpu_rows.sh                 # everything, into runs/gpu-rows/
#     PEERS=1 benchmarks/gpu_rows.sh         # with DALLE-pytorch, after `make bench-peers`
#
# Each benchmark has its own limit of time and its own file, so that one that fails stops no other.
set -uo pipefail

OUT=${OUT:-runs/gpu-rows}         # folder of the results, a text file each
PYTHON=${PYTHON:-python}          # the Python that dalle1 is installed for
LIMIT=${LIMIT:-150}               # seconds for each benchmark
mkdir -p "$OUT"

"$PYTHON" -c 'import sys, torch
sys.exit(None if torch.cuda.is_available() else "torch finds no GPU, expected a CUDA device; run this on a machine with one")' || exit 2

failed=0
measure() {
    local name=$1
    shift
    echo "== $name"
    timeout "$LIMIT" "$PYTHON" "$@" 2>&1 | tee "$OUT/$name.txt" || { echo "$name failed" >&2; failed=1; }
}

if [ -n "${PEERS:-}" ]; then
    sampled=(dalle1 "Hugging Face" "DALLE-pytorch cached")
    trained=()
else
    sampled=(dalle1 "Hugging Face")
    trained=(--only dalle1)
fi

"$PYTHON" -m dalle1 doctor > "$OUT/machine.txt"
measure attention benchmarks/attention.py --batch-size 8
measure sample benchmarks/sample.py --contenders "${sampled[@]}" --candidates 1 32 128 --precision bf16
measure bundled benchmarks/sample.py --contenders bundled --candidates 1 16 64 --precision bf16
measure train_transformer benchmarks/train_transformer.py --batch-size 32 --precision bf16 \
    ${trained[@]+"${trained[@]}"}
measure train_dvae benchmarks/train_dvae.py --batch-size 64 --precision bf16 ${trained[@]+"${trained[@]}"}
measure memory benchmarks/memory.py training --device cuda --precision bf16
exit $failed
