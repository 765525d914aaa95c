#!/usr/bin/env bash
# Train CLIPs of several sizes and lengths on Toybox, and fit their zero-shot error against compute.
#
#     recipes/clip-ladder.sh
#     OUT=runs/small-clips WIDTHS="4 8 16" STEPS="50 100 200" recipes/clip-ladder.sh
#
# Stop it with Ctrl-C; the same command resumes, and finished runs return at once. WIDTHS and STEPS
# rise: OUT/prediction-NAME holds what the others predict for the last run, NAME, written before it is
# trained.
set -euo pipefail

OUT=${OUT:-runs/clip-ladder}      # folder of all runs
DATA=${DATA:-toybox:20000}        # scenes, as in `dalle1 train clip --data`
PYTHON=${PYTHON:-python}          # the Python that dalle1 is installed for
WIDTHS=${WIDTHS:-4 8 16 24 32}    # of the modified ResNet; the text tower is 8 times as wide
STEPS=${STEPS:-250 500 1000 2000} # updates of 64 pairs, each a run of its own; two or more
IMAGES=${IMAGES:-400}             # images of each zero-shot probe
FIELD=${FIELD:-training/zero-shot/noun} # accuracy to fit
eval "flags=(${FLAGS:-})"         # more flags of every training, quoted as in a shell

# shellcheck source=recipes/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
runs=()
for count in $STEPS; do
    for width in $WIDTHS; do
        run="$OUT/width-$width-steps-$count"
        if [ "$width:$count" = "${WIDTHS##* }:${STEPS##* }" ] && [ ! -d "$run" ]; then
            # Parameters and pairs of the last run, from the shortest of its width.
            at=$("$PYTHON" -c "import pathlib, dalle1.scaling.runs
run = dalle1.scaling.runs.read_run(pathlib.Path('$OUT/width-$width-steps-${STEPS%% *}'))
print(run.parameters, run.tokens / ${STEPS%% *} * $count)")
            # shellcheck disable=SC2086 # two words
            "${dalle1[@]}" fit-scaling "${runs[@]}" --field "$FIELD" --hold-out 0 --predict $at \
                --out "$OUT/prediction-${run##*/}"
        fi
        stage "$run" "${dalle1[@]}" train clip small --data "$DATA" --model.image-size 64 \
            --model.width "$width" --model.text-width $((8 * width)) --batch-size 64 \
            --steps "$count" --warmup-steps $((count / 10)) --final-learning-rate 0 \
            --ema-decay 0 --validate-every "$count" --out "$run" ${flags[@]+"${flags[@]}"}
        [ -f "$run/clip.json" ] ||
            "${dalle1[@]}" evaluate clip --clip "$run" --images "$IMAGES" --out "$run"
        runs+=("$run")
    done
done
"${dalle1[@]}" fit-scaling "${runs[@]}" --field "$FIELD" --out "$OUT/scaling"
