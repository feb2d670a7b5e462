#!/usr/bin/env bash
# Runs the tests, after installing what they need into .venv (or into the active virtual environment).
#   bash launch/test.sh                    all but those marked slow, root or gpu
#   bash launch/test.sh tests/losses -x    any other arguments go to pytest as they are
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "$0")/venv.sh"

if [[ $# -eq 0 ]]; then
    set -- -m "not slow and not root and not gpu"
fi
exec python -m pytest "$@"
