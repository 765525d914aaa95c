#!/usr/bin/env bash
# Install the packages that package-lock.json pins, and render their emoji to WebDataset shards.
#
#     recipes/emoji/emoji.sh --out runs/emoji
#
# Flags are those of emoji.py. Packages that are already there are not downloaded again.
set -euo pipefail

PACKAGES=${PACKAGES:-runs/emoji-packages}   # folder of the npm packages, 190 MB
PYTHON=${PYTHON:-python}                    # the Python that requirements.txt is installed for
here=$(cd "$(dirname "$0")" && pwd)

if ! cmp -s "$here/package-lock.json" "$PACKAGES/installed.json"; then
    if ! command -v npm > /dev/null; then
        echo "error: npm is missing, expected npm 7 or newer; install Node.js" >&2
        exit 2
    fi
    mkdir -p "$PACKAGES"
    cp "$here/package.json" "$here/package-lock.json" "$PACKAGES"
    npm ci --prefix "$PACKAGES" --ignore-scripts --no-audit --no-fund
    cp "$here/package-lock.json" "$PACKAGES/installed.json"
fi
"$PYTHON" -c "import PIL, resvg_py" 2> /dev/null ||
    "$PYTHON" -m pip install -r "$here/requirements.txt"
exec "$PYTHON" "$here/emoji.py" --packages "$PACKAGES/node_modules" "$@"
