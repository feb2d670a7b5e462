#!/usr/bin/env bash
# Runs kd-accel demo: the whole way on two CPU cores, after installing into .venv (or into the active virtual environment).
#   bash launch/demo.sh [OUTPUT_DIR] [key=value ...]
set -euo pipefail
# shellcheck source=launch/venv.sh
source "$(dirname "$0")/venv.sh"

exec kd-accel demo "$@"
