# Sourced by the recipes, after PYTHON is set. `stage NAME COMMAND...` runs one command, and ends
# the recipe where it failed or was stopped. A training that was stopped exits with 0, so its output
# is read.
# shellcheck shell=bash

dalle1=("$PYTHON" -m dalle1)
output=$(mktemp)
trap 'rm -f "$output"' EXIT

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
