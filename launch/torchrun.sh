#!/usr/bin/env bash
# Trains with torchrun, on one machine or on several: the same line on each. Processes that die are started again, from
# the newest checkpoint, RESTARTS times (3).
#   bash launch/torchrun.sh configs/fastclip_kd.yaml data.batch_size=128                            one machine, all its GPUs
#   NODES=4 PROCESSES=8 HEAD=node0:29500 bash launch/torchrun.sh configs/fastclip_kd.yaml ...       four machines
# ZERO is the stage of DeepSpeed (2); ZERO=0 is DDP. kd-accel is installed on every machine; the run's folder is on a file
# system that all see. An existing run goes on (resume=auto). SIGTERM and SIGUSR1 save and stop it.
set -euo pipefail
cd "$(dirname "$0")/.."

if ((${ZERO:=2})); then
    export ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE="$ZERO"
fi
if ((${NODES:=1} == 1)); then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "$NODES" --rdzv_backend c10d --rdzv_endpoint "$HEAD" --rdzv_id "${JOB:-kd_accel}")
fi
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a second attempt would find the addresses of dead processes in a shared one

exec torchrun "${rendezvous[@]}" --nproc_per_node "${PROCESSES:-gpu}" --max_restarts "${RESTARTS:-3}" \
    --signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 -m kd_accel train "$@" resume=auto
