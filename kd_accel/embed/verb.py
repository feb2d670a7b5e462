"""kd-accel embed TRAIN.yaml out=STORE: a teacher's features of every sample, once, instead of in every epoch.

    kd-accel embed configs/fastclip_kd.yaml out=stores/b32 views=3
    accelerate launch --config_file launch/ddp.yaml -m kd_accel embed configs/fastclip_kd.yaml out=stores/b32 views=3
    kd-accel train configs/fastclip_kd.yaml teacher.placement=cached teacher.store=stores/b32

Views and texts are those that this config's training shows in its first epochs.
"""

from __future__ import annotations

from kd_accel import processes
from kd_accel.embed import files
from kd_accel.embed.check import check_share
from kd_accel.embed.job import Job, imported_job, live_job, live_teacher
from kd_accel.embed.live import embed_shards
from kd_accel.embed.prompts import embed_prompts
from kd_accel.embed.writer import write_store
from kd_accel.embed_config import EmbedConfig

TIMEOUT_S = 24 * 3600  # a rank may have that much more to do than another


def run(config: EmbedConfig) -> None:
    """Write the store, or what else the config asks for. Raises ConfigError for what cannot be done."""
    processes.start_process_group(TIMEOUT_S)
    if config.prompts is not None:
        embed_prompts(config, live_teacher(config))
    elif config.to_npy is not None:
        files.write_npy(config)
    elif config.from_npy is not None:
        job = imported_job(config, files.width(config.from_npy))
        write_store(job, lambda shards: files.read_npy(job, shards))
    else:
        _embed(live_job(config))


def _embed(job: Job) -> None:
    if not job.config.verify_only:
        write_store(job, lambda shards: embed_shards(job, shards))
    if job.config.verify_only or job.config.verify:
        check_share(job)
