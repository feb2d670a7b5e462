"""kd-accel push FOLDER repo=OWNER/NAME: a release on the HuggingFace Hub, with its card.

    kd-accel push releases/student repo=me/student
    kd-accel push runs/fastclip_kd repo=me/student

What is pushed is never changed here: of a run the release is written anew, with its card, beside the checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from kd_accel.export_config import ExportConfig
from kd_accel.models.release_folder import resolve_release, run_and_step
from kd_accel.push.hub import upload
from kd_accel.push_config import PushConfig
from kd_accel.schema import ConfigError


def run(config: PushConfig) -> None:
    """Raises ConfigError for a folder without a release, and for whatever the Hub does not do."""
    logging.basicConfig(format="%(message)s")
    given = Path(config.model)
    release = resolve_release(config.model)
    origin = run_and_step(release.resolve())
    tag = config.tag or (f"step-{origin[1]}" if origin else None)
    if origin is None:
        if not (given / "README.md").is_file():
            raise ConfigError(f"{given}: no README.md, the model card: kd-accel export {given} out=... writes one")
        if config.license is not None:
            raise ConfigError(f"license={config.license}: {given} has its card: give it to kd-accel export")
        print(f"pushed to {upload(given, config, tag=tag, message='Release')}")
        return
    from kd_accel.export.verb import export  # with torch: a release is pushed without

    copy = release.parent / ".push" / config.repo.rpartition("/")[2]
    shutil.rmtree(copy.parent, ignore_errors=True)  # left by a process that was killed
    try:
        export(ExportConfig(model=str(release), out=str(copy), license=config.license))
        print(f"pushed to {upload(copy, config, tag=tag, message=f'Step {origin[1]}')}")
    finally:
        shutil.rmtree(copy.parent, ignore_errors=True)
