#!/usr/bin/env bash
# Runs on every machine of a job whose scheduler starts again what failed (Kubernetes, SkyPilot), and continues the run.
#   NODES=4 NODE_RANK=0 PROCESSES=8 HEAD=10.0.0.1 bash launch/node.sh configs/fastclip_kd.yaml name=fastclip_kd
# NODES machines, of which this is number NODE_RANK, with PROCESSES each (one per GPU); rank 0 is found at HEAD:PORT (29500).
# LAUNCHER is the engine (launch/zero2.yaml). The run's folder, output_dir/name, is on a file system that all machines see.
# Ends with 0 when the run is done, and with 143 after a SIGTERM that it saved for, on every machine: "start me again".
set -uo pipefail
cd "$(dirname "$0")/.." || exit

resolved="$(python -m kd_accel config "$@")" || exit
run="$(python -c 'import sys, yaml; c = yaml.safe_load(sys.stdin); print(c["output_dir"], c["name"], sep="/")' <<< "$resolved")"

accelerate launch --config_file "${LAUNCHER:-launch/zero2.yaml}" \
    --num_machines "$NODES" --machine_rank "$NODE_RANK" --num_processes "$((NODES * PROCESSES))" \
    --main_process_ip "$HEAD" --main_process_port "${PORT:-29500}" \
    -m kd_accel train "$@" resume=auto &
launcher=$!
trap 'kill -TERM "$launcher"' TERM # a container's first process has to pass signals on

# `wait` also returns when a signal comes.
while kill -0 "$launcher" 2> /dev/null; do
    wait "$launcher"
done
wait "$launcher"
code=$?

[[ ! -e "$run/stopped" ]] || exit 143
exit "$code"
