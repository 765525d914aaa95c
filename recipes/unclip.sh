#!/usr/bin/env bash
# Train DALL·E 2 on Toybox: autoencoder, embeddings, prior and decoder, in about 12 core-hours.
#
#     recipes/unclip.sh runs/unclip
#
# Every step resumes after an interruption, and is skipped once it is done. SCENES, DVAE and CLIP name
# other data and other models to start from; FLAGS is added to every training.
set -euo pipefail

OUT=${1:?usage: recipes/unclip.sh OUT}
SCENES=${SCENES:-toybox:40000}
DVAE=${DVAE:-$(python -c 'from dalle1.pipeline import BUNDLED; print(BUNDLED)')}
FLAGS=${FLAGS:-}
mkdir -p "$OUT"

# The autoencoder starts from the residual groups of the dVAE, so a few updates suffice.
python -m dalle1 train autoencoder small --init "$DVAE" --data "$SCENES" \
    --out "$OUT/autoencoder" $FLAGS
