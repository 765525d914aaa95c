#!/usr/bin/env bash
# Train a model like the bundled one from nothing: scenes, dVAE, codes, transformer, CLIP, classifier.
#
#     recipes/toy.sh
#     OUT=runs/quick SCENES=2000 DVAE_FLAGS="--steps 500 --temperature-steps 400" recipes/toy.sh
#
# Stop it with Ctrl-C; the same command resumes, since each stage resumes by itself and a finished
# one returns at once. OUT/model then holds the model: dalle1 sample PROMPT --model OUT/model.
# dVAE and transformer are trained in two stages each: toy-finetune drops the dVAE codes that carry
# nothing, and the transformer is trained on smaller images first, since it learns from them what
# captions mean in a fraction of the time. Captions have at most 20 tokens: 24 positions hold them.
# toy-negatives teaches the CLIP what belongs to what.
set -euo pipefail

OUT=${OUT:-runs/toy}              # folder of all stages
SCENES=${SCENES:-40000}           # rendered scenes, 29 kB each
PROCESSES=${PROCESSES:-1}         # processes that train the transformer together, by torchrun
FIRST_SIZES=${FIRST_SIZES-${FIRST_SIZE-64 128}} # image sides of the transformer's first stages
PYTHON=${PYTHON:-python}          # the Python that dalle1 is installed for

# More flags of single stages, quoted as in a shell.
eval "dvae_flags=(${DVAE_FLAGS:-})"
eval "finetune_flags=(${FINETUNE_FLAGS:-})"
eval "encode_flags=(${ENCODE_FLAGS:-})"
eval "transformer_flags=(${TRANSFORMER_FLAGS:-})"
eval "clip_flags=(${CLIP_FLAGS:-})"
eval "negatives_flags=(${NEGATIVES_FLAGS:-})"
eval "classifier_flags=(${CLASSIFIER_FLAGS:-})"

# shellcheck source=recipes/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"
together=("${dalle1[@]}")
if [ "$PROCESSES" -gt 1 ]; then
    together=("$PYTHON" -m torch.distributed.run --standalone "--nproc-per-node=$PROCESSES" -m dalle1)
fi
render_scenes "$OUT/scenes" "$SCENES"
stage dvae "${dalle1[@]}" train dvae toy --data "$OUT/scenes" --out "$OUT/dvae" \
    ${dvae_flags[@]+"${dvae_flags[@]}"}
stage toy-finetune "${dalle1[@]}" train dvae toy-finetune --data "$OUT/scenes" \
    --init "$OUT/dvae" --out "$OUT/toy-finetune" ${finetune_flags[@]+"${finetune_flags[@]}"}

encode=("${dalle1[@]}" encode --dvae "$OUT/toy-finetune" --data "$OUT/scenes" --shard-size 1000)
encode+=(${encode_flags[@]+"${encode_flags[@]}"})

transformer=("${together[@]}" train transformer)
from=()  # the stage before
for size in $FIRST_SIZES; do
    name="TOY_${size}_FLAGS"
    eval "flags=(${!name:-})"
    stage "codes-$size" "${encode[@]}" --image-size "$size" --out "$OUT/codes-$size"
    stage "toy-$size" "${transformer[@]}" toy-128 --dvae "$OUT/toy-finetune" \
        --data "$OUT/codes-$size" --image-size "$size" --model.text-len 24 --out "$OUT/toy-$size" \
        ${from[@]+"${from[@]}"} ${flags[@]+"${flags[@]}"}
    from=(--init "$OUT/toy-$size")
done
stage codes "${encode[@]}" --out "$OUT/codes"
stage transformer "${transformer[@]}" toy --dvae "$OUT/toy-finetune" --data "$OUT/codes" \
    --model.text-len 24 --out "$OUT/transformer" ${from[@]+"${from[@]}"} \
    ${transformer_flags[@]+"${transformer_flags[@]}"}
stage clip "${dalle1[@]}" train clip toy --data "$OUT/scenes" --out "$OUT/clip" \
    ${clip_flags[@]+"${clip_flags[@]}"}
stage toy-negatives "${dalle1[@]}" train clip toy --data "$OUT/scenes" --init "$OUT/clip" \
    --hard-negatives toybox --steps 400 --learning-rate 1e-3 --final-learning-rate 0 \
    --warmup-steps 30 --out "$OUT/toy-negatives" \
    ${negatives_flags[@]+"${negatives_flags[@]}"}
stage classifier "${dalle1[@]}" train classifier toy --out "$OUT/classifier" \
    ${classifier_flags[@]+"${classifier_flags[@]}"}

stage model "${dalle1[@]}" export --model "$OUT/transformer" --clip "$OUT/toy-negatives" \
    --out "$OUT/model"
printf '{"guidance": 2}\n' >"$OUT/model/generation.json"
cp "$(ls -td "$OUT"/classifier/step-* | head -n 1)/classifier.safetensors" "$OUT/model/"
