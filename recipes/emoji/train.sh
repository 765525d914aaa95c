#!/usr/bin/env bash
# Train a model on the emoji from nothing, and measure it: dVAE, codes, transformer, CLIP, classifier.
#
#     recipes/emoji/emoji.sh --out runs/emoji
#     recipes/emoji/train.sh
#
# Stop it with Ctrl-C; the same command resumes. OUT/model then holds the model: dalle1 sample
# "honeybee, fluent 3d style" --model OUT/model. Images have 128 pixels, 16 × 16 codes; the
# transformer learns from 64 pixels first, where a pair takes a third of the time. On a GPU, larger
# batches are faster. This is as many pairs as the training in docs/experiments.md had there:
#
#     SIZES=128 TRANSFORMER_FLAGS="--batch-size 512 --steps 2500" recipes/emoji/train.sh
#
# There are few images, so codes are sampled, from several crops. Captions have up to 28 tokens of
# 2,048, and 997 in 1,000 at most the 23 that the model reads.
set -euo pipefail

DATA=${DATA:-runs/emoji}          # what emoji.sh wrote
OUT=${OUT:-runs/emoji-model}      # folder of all stages
SIZES=${SIZES:-64 128}            # image sides of the transformer's two stages, or of the only one
PYTHON=${PYTHON:-python}          # the Python that dalle1 is installed for

# More flags of single stages, quoted as in a shell.
eval "dvae_flags=(${DVAE_FLAGS:-})"
eval "first_flags=(${FIRST_FLAGS:-})"
eval "transformer_flags=(${TRANSFORMER_FLAGS:-})"
eval "clip_flags=(${CLIP_FLAGS:-})"
eval "classifier_flags=(${CLASSIFIER_FLAGS:-})"
eval "evaluate_flags=(${EVALUATE_FLAGS:-})"

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=recipes/stages.sh
. "$here/../stages.sh"

read -r half whole more <<<"$SIZES"
if [ -z "$half" ] || [ -n "$more" ]; then
    echo "error: SIZES is '$SIZES', expected one or two image sides, such as '64 128'" >&2
    exit 2
fi
stage dvae "${dalle1[@]}" train dvae small --data "$DATA/train" --steps 5000 \
    --temperature-steps 4200 --out "$OUT/dvae" ${dvae_flags[@]+"${dvae_flags[@]}"}
for size in $SIZES; do
    stage "codes-$size" "${dalle1[@]}" encode --dvae "$OUT/dvae" --data "$DATA/train" --crops 18 \
        --sample-codes --image-size "$size" --shard-size 1000 --out "$OUT/codes-$size"
done
transformer=("${dalle1[@]}" train transformer toy-128 --dvae "$OUT/dvae")
transformer+=(--model.text-vocab 2048 --model.text-len 24 --batch-size 32 --prompts)
transformer+=("honeybee, fluent 3d style" "grinning face, noto style" "hammer, openmoji style")
init=()
if [ -n "$whole" ]; then
    stage first "${transformer[@]}" --data "$OUT/codes-$half" --image-size "$half" \
        --steps 2000 --out "$OUT/first" ${first_flags[@]+"${first_flags[@]}"}
    init=(--init "$OUT/first")
fi
size=${whole:-$half}
stage transformer "${transformer[@]}" --data "$OUT/codes-$size" --image-size "$size" \
    ${init[@]+"${init[@]}"} --final-learning-rate 1e-5 --out "$OUT/transformer" \
    ${transformer_flags[@]+"${transformer_flags[@]}"}
stage clip "${dalle1[@]}" train clip small --data "$DATA/train" --vocab-size 2048 --random-blur \
    --model.text-len 32 --steps 2500 --out "$OUT/clip" ${clip_flags[@]+"${clip_flags[@]}"}
stage classifier "$PYTHON" "$here/classifier.py" train --data "$DATA" --out "$OUT/classifier" \
    ${classifier_flags[@]+"${classifier_flags[@]}"}

stage model "${dalle1[@]}" export --model "$OUT/transformer" --clip "$OUT/clip" --out "$OUT/model"
printf '{"guidance": 2, "temperature": 0.85}\n' >"$OUT/model/generation.json"
cp "$DATA/ATTRIBUTIONS.md" "$OUT/model/"
stage evaluation "$PYTHON" "$here/evaluate.py" --model "$OUT/model" --data "$DATA" \
    --classifier "$OUT/classifier" --out "$OUT/evaluation" ${evaluate_flags[@]+"${evaluate_flags[@]}"}
