# Sourced by the recipes, after PYTHON is set. `stage NAME COMMAND...` runs one command, and ends
# the recipe where it failed or was stopped. A training that was stopped exits with 0, so its output
# is read.
# shellcheck shell=bash

dalle1=("$PYTHON" -m dalle1)
output=$(mktemp)
trap 'rm -f "$output"' EXIT

# `render_scenes FOLDER COUNT` renders Toybox, with more scenes of two objects and in a style than
# it has by itself: they are harder to learn.
render_scenes() {
    local cores
    cores=$("$PYTHON" -c 'import os; print(os.cpu_count() or 1)')
    stage scenes "${dalle1[@]}" toybox --out "$1" --num-scenes "$2" --captions 8 \
        --shares 40 25 35 --processes "$cores"
}

stage() {
    local name=$1 status=0
    shift
    echo "== $name"
    "$@" | tee -i "$output" || status=$?
    if grep -q "^Stopped" "$output"; then
        echo "Stopped in stage $name; the same command resumes" >&2
        exit 130
    fi
    # encode and embed exit with 1 where they finished without the images of damaged shards.
    if [ "$status" = 1 ] && grep -qE "^(Codes|Embeddings) are in " "$output"; then
        return
    fi
    [ "$status" = 0 ] || exit "$status"
}
