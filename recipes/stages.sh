# Sourced by the recipes, after PYTHON is set. `stage NAME COMMAND...` runs one command, and ends
# the recipe where it failed or was stopped. A training that was stopped exits with 0, so its output
# is read.
# shellcheck shell=bash

dalle1=("$PYTHON" -m dalle1)
output=$(mktemp)
trap 'rm -f "$output"' EXIT

stage() {
    local name=$1
    shift
    echo "== $name"
    "$@" | tee -i "$output"
    if grep -q "^Stopped" "$output"; then
        echo "Stopped in stage $name; the same command resumes" >&2
        exit 130
    fi
}
