"""What the launcher asked for, as an Accelerator: one process, DDP, ZeRO 1, 2, 3, or FSDP2; on GPUs or CPU (gloo).

    accelerate launch --config_file launch/zero2.yaml -m kd_accel train configs/demo.yaml

What the stack would do silently wrong is an error here.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from datetime import timedelta

import torch

from kd_accel import processes
from kd_accel.schema import ConfigError

BUCKET = 500_000_000  # elements: DeepSpeed's own reduce_bucket_size


def start_accelerator(
    *, precision: str, batch_size: int, grad_clip_norm: float, timeout_s: float = 1800, accumulate: int = 1
):
    """The Accelerator of this run, with everything that engines guess written out.

    `batch_size` samples per process and micro-batch; a process waits `timeout_s` seconds for another one.
    Reads the launcher's environment; raises ConfigError for combinations that would train something else than asked,
    LocalError where the processes do not come together.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    on_cpu = not torch.cuda.is_available()
    _check_environment(on_cpu)
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    timeout = timedelta(seconds=timeout_s)
    processes.wait_at_most(timeout_s)
    processes.start_process_group(timeout_s)
    # Without the backend's name Accelerate believes on a machine without GPU that every rank is alone.
    handlers = [InitProcessGroupKwargs(backend="gloo" if on_cpu else "nccl", timeout=timeout)]
    mixed = "bf16" if precision == "bf16" else "no"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
        # DDP would overwrite every rank's running statistics with rank 0's before each forward pass.
        handlers.append(DistributedDataParallelKwargs(broadcast_buffers=False))
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)  # Accelerate has no other
        accelerator = Accelerator(cpu=on_cpu, mixed_precision=mixed, kwargs_handlers=[] if alone else handlers)
    else:
        plugin = _deepspeed_plugin(
            precision=precision, batch_size=batch_size, grad_clip_norm=grad_clip_norm, accumulate=accumulate
        )
        accelerator = Accelerator(deepspeed_plugin=plugin, mixed_precision=mixed, kwargs_handlers=handlers)
        from transformers.integrations import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # or transformers would partition any model built from here on, with wrong weights
    _check_launch(accelerator)
    return accelerator


def fit_bucket(accelerator, trained: int) -> None:
    """Before the engine is prepared: DeepSpeed allocates its bucket whole, so it need not be larger than the student.

    `trained` weights; a smaller bucket of the launch file stays.
    """
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    given = zero.get("reduce_bucket_size", "auto")
    zero["reduce_bucket_size"] = min(trained, BUCKET if given == "auto" else int(given))


def end_accelerator() -> None:
    """Forget Accelerate's settings, so that another run may start in this process; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _deepspeed_plugin(*, precision: str, batch_size: int, grad_clip_norm: float, accumulate: int):
    """The launcher's DeepSpeed settings (stage, offload), with our batch, clipping and precision written into them."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        raise ConfigError(
            "ACCELERATE_USE_CPU turns DeepSpeed off without a word: unset it; a machine without GPU is detected"
        )
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    from accelerate.utils import DeepSpeedPlugin

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its shared-memory collectives are compiled at start-up, for half a minute, and gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_muon()
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(key, value)
    plugin = DeepSpeedPlugin()
    stage = plugin.deepspeed_config["zero_optimization"]["stage"]
    if stage == 0:
        raise ConfigError(
            "DeepSpeed stage 0 takes a hidden optimizer step at start-up: use stage 1, or launch/ddp.yaml"
        )
    _check_deepspeed_config(plugin.deepspeed_config, grad_clip_norm)
    plugin.deepspeed_config.update(
        train_micro_batch_size_per_gpu=batch_size,
        gradient_accumulation_steps=1,  # engine.py says itself which backward is a step's last
        gradient_clipping=grad_clip_norm,  # DeepSpeed's own default is 1.0
        zero_allow_untested_optimizer=True,
        zero_force_ds_cpu_optimizer=False,  # torch's fused AdamW steps on the host as well, and needs no compiler
        bf16={"enabled": precision == "bf16"},
    )
    if accumulate > 1 and precision == "bf16" and stage > 1:  # stage 1 would get another optimizer, without our state
        plugin.deepspeed_config["data_types"] = {"grad_accum_dtype": "fp32"}
    return plugin


def _import_muon() -> None:
    """DeepSpeed asks whether an optimizer is its Muon, whose kernels would be compiled: seconds of imports."""
    from deepspeed.runtime import compiler

    its_own, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = its_own


def _check_deepspeed_config(config: dict, grad_clip_norm: float) -> None:
    """What a launch file or its DeepSpeed JSON asks for and only our own config can give."""
    given = {key: value for key, value in config.items() if value != "auto"}
    if (steps := given.get("gradient_accumulation_steps", 1)) != 1:
        raise ConfigError(
            f"the launch file has gradient_accumulation_steps={steps}, which averages losses of parts: drop it, and set"
            f" train.accumulate={steps}, which is exact"
        )
    if (norm := given.get("gradient_clipping", grad_clip_norm)) != grad_clip_norm:
        raise ConfigError(
            f"the launch file clips gradients at {norm}, optim.grad_clip_norm={grad_clip_norm}: drop the former"
        )
    if given.get("fp16", {}).get("enabled") not in (None, False, "auto"):
        raise ConfigError("the DeepSpeed file turns fp16 on: drop it; precision is bf16 or fp32")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if key in given:
            raise ConfigError(f"the DeepSpeed file has {key}={given[key]}: drop it; data.batch_size decides")
    for key in ("amp", "torch_autocast"):
        if given.get(key, {}).get("enabled") not in (None, False, "auto"):
            raise ConfigError(f"the DeepSpeed file turns {key} on: drop it; precision is bf16 or fp32")
    for key in ("optimizer", "scheduler"):
        if key in given:
            raise ConfigError(f"the DeepSpeed file has a section {key}: drop it; the sections optim.* decide")


def _check_environment(on_cpu: bool) -> None:
    """What the launcher asked for and Accelerate would silently turn into something else."""
    set_true = {name for name, value in os.environ.items() if value.lower() in ("true", "1")}
    if on_cpu and "ACCELERATE_USE_FSDP" in set_true:
        raise ConfigError("Accelerate runs FSDP on GPUs only, and plain DDP here without a word: use launch/zero3.yaml")
    alone = "WORLD_SIZE" not in os.environ
    if alone and "ACCELERATE_USE_CPU" in set_true and "MASTER_PORT" in os.environ:
        raise ConfigError(
            "accelerate launch --cpu starts one process, whatever --num_processes says: drop --cpu and use"
            " launch/ddp.yaml; a machine without GPU is detected"
        )


def _check_launch(accelerator) -> None:
    """The launcher and Accelerate must agree on what runs."""
    asked, runs = int(os.environ.get("WORLD_SIZE", "1")), accelerator.num_processes
    if runs != asked:
        raise ConfigError(f"launched {asked} processes but Accelerate runs {runs}: see launch/ for files that work")
    deepspeed_asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true"
    if deepspeed_asked != (accelerator.distributed_type.value == "DEEPSPEED"):
        raise ConfigError(
            f"asked for DeepSpeed={deepspeed_asked} but Accelerate chose {accelerator.distributed_type.value}"
        )
