#!/usr/bin/env bash
# Runs the tests, after installing what they need into .venv (or into the active virtual environment).
#   bash launch/test.sh                    all but those marked slow, root or gpu
#   bash launch/test.sh tests/losses -x    any other arguments go to pytest as they are
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "$0")/venv.sh"

if [[ $# -gt 0 ]]; then
    exec python -m pytest "$@"
fi

quick="not slow and not root and not gpu"
code=0
# Side by side, by file: tests of one process use one core each, those that start processes wait for each other a lot.
OMP_NUM_THREADS=1 python -m pytest -m "$quick and not distributed" -n "$((cores < 4 ? cores : 4))" --dist loadfile || code=$?
OMP_NUM_THREADS=1 python -m pytest -m "$quick and distributed" -n 2 --dist loadfile --durations=20 || code=$?
exit "$code"
