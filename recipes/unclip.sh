#!/usr/bin/env bash
# Train DALL·E 2 on Toybox: autoencoder, embeddings, prior, decoder and upsampler.
#
#     recipes/unclip.sh
#     OUT=runs/mine DATA=my-shards recipes/unclip.sh
#     DECODER_FLAGS="--batch-size 512 --steps 4200 --learning-rate 4e-3 --warmup-steps 100" recipes/unclip.sh
#
# The last line is for a GPU. Stop it with Ctrl-C; the same command resumes, since each stage resumes
# by itself and a finished one returns at once. Scenes take 1.2 GB. OUT/model then holds the model:
# dalle1 sample PROMPT --model OUT/model.
set -euo pipefail

OUT=${OUT:-runs/unclip}           # folder of all stages
DATA=${DATA:-}                    # images with captions, as for --data; none: Toybox
CLIP=${CLIP:-bundled}             # CLIP of prior and decoder
PYTHON=${PYTHON:-python}          # the Python that dalle1 is installed for
DVAE=${DVAE:-bundled}

# More flags of single stages, quoted as in a shell.
eval "autoencoder_flags=(${AUTOENCODER_FLAGS:-})"
eval "embed_flags=(${EMBED_FLAGS:-})"
eval "prior_flags=(${PRIOR_FLAGS:-})"
eval "decoder_flags=(${DECODER_FLAGS:-})"
eval "upsampler_flags=(${UPSAMPLER_FLAGS:-})"

# shellcheck source=recipes/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

if [ -z "$DATA" ]; then
    DATA=$OUT/scenes
    render_scenes "$DATA" 40000
fi
# The autoencoder starts from the residual groups of the dVAE, so few updates suffice.
stage autoencoder "${dalle1[@]}" \
    train autoencoder small --init "$DVAE" --data "$DATA" --out "$OUT/autoencoder" \
    ${autoencoder_flags[@]+"${autoencoder_flags[@]}"}
stage embedded "${dalle1[@]}" embed --autoencoder "$OUT/autoencoder" --clip "$CLIP" --data "$DATA" \
    --out "$OUT/embedded" ${embed_flags[@]+"${embed_flags[@]}"}
stage prior "${dalle1[@]}" \
    train prior small --data "$OUT/embedded" --clip "$CLIP" --out "$OUT/prior" \
    ${prior_flags[@]+"${prior_flags[@]}"}
# Toybox's CLIP holds little of what two objects are: captions must say it, so few are dropped.
stage decoder "${dalle1[@]}" train decoder small --data "$OUT/embedded" --clip "$CLIP" \
    --autoencoder "$OUT/autoencoder" --caption-dropout 0.2 --out "$OUT/decoder" \
    ${decoder_flags[@]+"${decoder_flags[@]}"}
# It enlarges what comes from the autoencoder, so it learns from that.
stage upsampler "${dalle1[@]}" train upsampler small --data "$DATA" \
    --autoencoder "$OUT/autoencoder" --out "$OUT/upsampler" \
    ${upsampler_flags[@]+"${upsampler_flags[@]}"}
stage model "${dalle1[@]}" \
    export --model "$OUT/decoder" --prior "$OUT/prior" --upsampler "$OUT/upsampler" \
    --out "$OUT/model"
