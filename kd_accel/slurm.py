"""One srun task per process: SLURM's numbers become those that torchrun or accelerate would have given.

    srun kd-accel train CONFIG.yaml

Imports no torch.
"""

from __future__ import annotations

from collections.abc import MutableMapping

from kd_accel.schema import ConfigError


def adopt_tasks(environ: MutableMapping[str, str]) -> None:
    """Set RANK, LOCAL_RANK and WORLD_SIZE in `environ` when srun started several tasks and no launcher runs in them.

    Raises ConfigError when nobody said where rank 0 is: each task would else train a run of its own.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")  # srun's alone; SLURM_NTASKS is there in the batch script as well
    if tasks == "1" or "WORLD_SIZE" in environ:
        return
    visible = environ.get("CUDA_VISIBLE_DEVICES", "")
    sees_one_gpu = visible != "" and "," not in visible
    environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], tasks
    environ["LOCAL_RANK"] = "0" if sees_one_gpu else environ["SLURM_LOCALID"]
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environ]:
        raise ConfigError(
            f"srun started {tasks} tasks, and {' and '.join(missing)} do not say where they meet: export them as"
            " launch/slurm.sbatch does, or start one task"
        )
