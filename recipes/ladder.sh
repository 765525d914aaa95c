#!/usr/bin/env bash
# Train transformers of many sizes and lengths on Toybox codes of 16 x 16, and fit scaling laws.
#
#     recipes/ladder.sh
#     OUT=runs/small-ladder SIZES="64:2:2 96:3:3" STEPS="150 300 600" recipes/ladder.sh
#
# Stop it with Ctrl-C; the same command resumes, and finished runs return at once. Runs go from the
# cheapest to the largest: OUT/prediction-NAME holds what the others predict for the last one, NAME,
# written before it is trained.
set -euo pipefail

OUT=${OUT:-runs/ladder}                      # folder of all runs
DVAE=${DVAE:-bundled}                        # image tokenizer
CODES=${CODES:-$OUT/codes}                   # codes; encoded from DATA where they are missing
DATA=${DATA:-toybox:20000}                   # scenes to encode
PYTHON=${PYTHON:-python}                     # the Python that dalle1 is installed for
# WIDTH:DEPTH:HEADS: 0.1M, 0.3M, 1M, 3M and 10M parameters without embeddings.
SIZES=${SIZES:-64:2:2 96:3:3 144:4:4 224:5:4 320:8:5}
STEPS=${STEPS:-250 500 1000 2000}            # updates of 16 pairs, each a run of its own
LIMIT=${LIMIT:-}                             # most parameters x updates; larger runs are skipped
eval "flags=(${FLAGS:-})"                    # more flags of every training, quoted as in a shell

# shellcheck source=recipes/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

train() { # WIDTH DEPTH HEADS STEPS
    stage "width-$1-steps-$4" "${dalle1[@]}" train transformer toy-128 --dvae "$DVAE" \
        --data "$CODES" --image-size 128 --model.width "$1" --model.depth "$2" \
        --model.heads "$3" --steps "$4" --warmup-steps $(($4 / 10)) --final-learning-rate 2e-5 \
        --validate-every "$4" --ema-decay 0 --prompts "a red star" \
        --out "$OUT/width-$1-steps-$4" ${flags[@]+"${flags[@]}"}
}

if [ ! -f "$CODES/entries.npy" ]; then # the last file of an encoding
    stage codes "${dalle1[@]}" encode --dvae "$DVAE" --data "$DATA" --image-size 128 --out "$CODES"
fi
runs=$(
    for size in $SIZES; do
        IFS=: read -r width depth heads <<< "$size"
        parameters=$((12 * width * width * depth))
        for count in $STEPS; do
            cost=$((parameters * count))
            if [ -z "$LIMIT" ] || [ "$cost" -le "$LIMIT" ]; then
                echo "$cost $width $depth $heads $count"
            fi
        done
    done | sort -n
)
smaller=()
while read -r _ width depth heads count; do
    train "$width" "$depth" "$heads" "$count" < /dev/null
    smaller+=("$OUT/width-$width-steps-$count")
done < <(sed '$d' <<< "$runs")
read -r _ width depth heads last_steps < <(tail -n 1 <<< "$runs")
last=width-$width-steps-$last_steps
if [ ! -d "$OUT/$last" ]; then # a prediction stays as it was before the run began
    stage prediction "${dalle1[@]}" fit-scaling "${smaller[@]}" --hold-out 0 \
        --predict $((12 * width * width * depth)) $((last_steps * 16 * 256)) \
        --out "$OUT/prediction-$last"
fi
train "$width" "$depth" "$heads" "$last_steps"
stage scaling "${dalle1[@]}" fit-scaling "${smaller[@]}" "$OUT/$last" --out "$OUT/scaling"
