#!/usr/bin/env bash
# Collects, as wheels, what bench_gpu.py needs beside PyTorch's and HuggingFace's packages, in the versions of
# constraints.txt: for a machine with a GPU and those packages, but without a network.
#   bash tests/benchmarks/gpu_wheels.sh wheels        for Python 3.12
#   bash tests/benchmarks/gpu_wheels.sh wheels 3.11
# There, with the repository and that folder:
#   python3 -m pip install --no-index --no-deps --target site wheels/*.whl
#   PYTHONPATH=$PWD/site:$PWD python3 tests/benchmarks/bench_gpu.py --output gpu.json
set -euo pipefail
folder="${1:?usage: gpu_wheels.sh FOLDER [PYTHON_VERSION]}"
python_version="${2:-3.12}"
constraints="$(dirname "$0")/../../constraints.txt"
names=(annotated-types braceexpand datasets deepspeed dill ftfy hjson multiprocess open_clip_torch pydantic pydantic_core
    typing-inspection wcwidth webdataset)

pinned() { # pinned NAME: its line of the constraints
    grep -i -m 1 "^$1==" "$constraints" || { echo "error: $1 is not in constraints.txt" >&2 && return 1; }
}

versions=()
for name in "${names[@]}"; do versions+=("$(pinned "$name")"); done
mkdir -p "$folder"
for version in "${versions[@]}"; do
    case "$version" in
        deepspeed==*) # a source archive; without a CUDA compiler it is pure Python
            DS_BUILD_OPS=0 python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$version" ;;
        *)
            python3 -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
                --python-version "$python_version" --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
                --dest "$folder" "$version" ;;
    esac
done
du -sh "$folder"
