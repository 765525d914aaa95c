#!/usr/bin/env bash
# Train CLIPs of several sizes and lengths on Toybox, and fit their zero-shot error against compute.
#
#     recipes/clip-ladder.sh
#     OUT=runs/small-clips WIDTHS="4 8 16" STEPS="50 100 200" recipes/clip-ladder.sh
#
# Stop it with Ctrl-C; the same command resumes, and finished runs return at once. The fit predicts
# the run of most compute from the others.
set -euo pipefail

OUT=${OUT:-runs/clip-ladder}      # folder of all runs
DATA=${DATA:-toybox:20000}        # scenes, as in `dalle1 train clip --data`
PYTHON=${PYTHON:-python}          # the Python that dalle1 is installed for
WIDTHS=${WIDTHS:-4 8 16 24 32}    # of the modified ResNet; the text tower is 8 times as wide
STEPS=${STEPS:-250 500 1000 2000} # updates of 64 pairs, each a run of its own
IMAGES=${IMAGES:-400}             # images of each zero-shot probe
eval "flags=(${FLAGS:-})"         # more flags of every training, quoted as in a shell

dalle1=("$PYTHON" -m dalle1)
output=$(mktemp)
trap 'rm -f "$output"' EXIT
runs=()
for count in $STEPS; do
    for width in $WIDTHS; do
        run="$OUT/width-$width-steps-$count"
        echo "== $run"
        "${dalle1[@]}" train clip small --data "$DATA" --model.image-size 64 \
            --model.width "$width" --model.text-width $((8 * width)) --batch-size 64 \
            --steps "$count" --warmup-steps $((count / 10)) --final-learning-rate 0 \
            --ema-decay 0 --validate-every "$count" --out "$run" ${flags[@]+"${flags[@]}"} |
            tee -i "$output"
        if grep -q "^Stopped" "$output"; then # a training that was stopped exits with 0
            echo "Stopped in $run; the same command resumes" >&2
            exit 130
        fi
        [ -f "$run/clip.json" ] ||
            "${dalle1[@]}" evaluate clip --clip "$run" --images "$IMAGES" --out "$run"
        runs+=("$run")
    done
done
"${dalle1[@]}" fit-scaling "${runs[@]}" --out "$OUT/scaling"
