#!/usr/bin/env bash
# Train one small decoder for each kind of condition on Toybox, and compare how they bind fills to
# objects: captions by CLIP (ldm), by a transformer (imagen), by both with sizes (sdxl), and unCLIP,
# which also reads the embedding that the prior samples. All drop the caption in a tenth of samples.
#
#     recipes/conditionings.sh
#     PRESETS="ldm imagen" IMAGEN_FLAGS="--text-encoders t5:google/t5-v1_1-small" recipes/conditionings.sh
#     INIT=unclip DECODER_FLAGS="--steps 800 --batch-size 32" recipes/conditionings.sh
#
# INIT names a decoder, such as the bundled one: all start from its U-Net, with new parts that read
# conditions, and its autoencoder is used. Stop it with Ctrl-C; the same command resumes. Without
# INIT, it shares autoencoder, embeddings and prior of recipes/unclip.sh, and trains them where they
# are missing; scenes take 1.2 GB.
# OUT/ways/ways.json has the table.
set -euo pipefail

OUT=${OUT:-runs/conditionings}      # folder of the decoders and the table
UNCLIP=${UNCLIP:-runs/unclip}       # folder of recipes/unclip.sh: autoencoder and embeddings
DATA=${DATA:-}                      # images with captions, as for --data; none: Toybox
CLIP=${CLIP:-bundled}               # CLIP of the embeddings, which also reranks
PRESETS=${PRESETS:-ldm imagen sdxl small}
INIT=${INIT:-}                      # decoder to start from; none: all start anew
AUTOENCODER=${AUTOENCODER:-$INIT}   # its autoencoder, or another; none: that of UNCLIP
PYTHON=${PYTHON:-python}            # the Python that dalle1 is installed for
DVAE=${DVAE:-bundled}

# More flags of single stages, quoted as in a shell; DECODER_FLAGS are those of all decoders.
eval "autoencoder_flags=(${AUTOENCODER_FLAGS:-})"
eval "embed_flags=(${EMBED_FLAGS:-})"
eval "decoder_flags=(${DECODER_FLAGS:-})"
eval "prior_flags=(${PRIOR_FLAGS:-})"
eval "ways_flags=(${WAYS_FLAGS:-})"
SMALL_FLAGS="--caption-dropout 0.1 ${SMALL_FLAGS:-}"

# shellcheck source=recipes/stages.sh
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

if [ -z "$DATA" ]; then
    DATA=$UNCLIP/scenes
    render_scenes "$DATA" 40000
fi
SHARED=$OUT  # embeddings and prior
if [ -z "$AUTOENCODER" ]; then
    AUTOENCODER=$UNCLIP/autoencoder SHARED=$UNCLIP
    stage autoencoder "${dalle1[@]}" train autoencoder small --init "$DVAE" --data "$DATA" \
        --out "$AUTOENCODER" ${autoencoder_flags[@]+"${autoencoder_flags[@]}"}
fi
stage embedded "${dalle1[@]}" \
    embed --autoencoder "$AUTOENCODER" --clip "$CLIP" --data "$DATA" \
    --out "$SHARED/embedded" ${embed_flags[@]+"${embed_flags[@]}"}
[ -z "$INIT" ] || decoder_flags+=(--init "$INIT" --new-inlets)
models=()
for preset in $PRESETS; do
    name=$(echo "$preset" | tr '[:lower:]' '[:upper:]')_FLAGS
    eval "preset_flags=(${!name:-})"
    stage "$preset" "${dalle1[@]}" \
        train decoder "$preset" --data "$SHARED/embedded" --clip "$CLIP" \
        --autoencoder "$AUTOENCODER" --out "$OUT/$preset" \
        ${decoder_flags[@]+"${decoder_flags[@]}"} ${preset_flags[@]+"${preset_flags[@]}"}
    if [ "$preset" != small ]; then
        models+=("$OUT/$preset")
        continue
    fi
    stage prior "${dalle1[@]}" train prior small --data "$SHARED/embedded" --clip "$CLIP" \
        --out "$SHARED/prior" ${prior_flags[@]+"${prior_flags[@]}"}
    stage unclip "${dalle1[@]}" \
        export --model "$OUT/small" --prior "$SHARED/prior" --out "$OUT/unclip"
    models+=("$OUT/unclip")
done
stage ways "${dalle1[@]}" evaluate ways --models "${models[@]}" --out "$OUT/ways" \
    ${ways_flags[@]+"${ways_flags[@]}"}
