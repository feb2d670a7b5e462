# Sourced by the other scripts, under set -e: leaves the shell in the repository, with kd-accel and its tests' needs installed.
# An active virtual environment is used as it is found; without one, .venv is made.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || return

python_to_build_with() {
    local python
    for python in python3.13 python3.12 python3.11 python3; do
        if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2> /dev/null; then
            echo "$python"
            return
        fi
    done
    echo "error: Python 3.11, 3.12 or 3.13 is needed and none is on the PATH" >&2
    return 1
}

if [[ -z "${VIRTUAL_ENV:-}" ]]; then
    if [[ ! -x .venv/bin/python ]]; then
        python="$(python_to_build_with)"
        "$python" -m venv .venv
    fi
    # shellcheck source=/dev/null
    source .venv/bin/activate
fi

# Install once, and again when what is to be installed has changed.
wanted="$(cat pyproject.toml constraints.txt | cksum) $PWD"
stamp="$VIRTUAL_ENV/kd-accel-installed"
if [[ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]]; then
    python -m pip install --quiet -c constraints.txt -e ".[dev,export,quant,track,report,s3,text]"
    echo "$wanted" > "$stamp"
fi

# Several processes, each with a thread per core, slow each other down: two processes share the cores.
cores="$(getconf _NPROCESSORS_ONLN)"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}"
