"""OUT/parts/: what was found in each shard, so that a rerun goes on with those that have no part yet.

    SHARD.npz       the shard's keys, best prompts and scores [n], candidates of top_k, features [n, d] to compare
    settings.json   the question that they answer

n images of a shard, d embedding width.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kd_accel.data.source import Source
from kd_accel.filter.prompts import sha256
from kd_accel.filter.scoring import TopK, score_shard
from kd_accel.filter_config import FilterConfig
from kd_accel.schema import ConfigError
from kd_accel.sections import TeacherConfig
from kd_accel.text_files import replace_text
from kd_accel.whole_files import replacing

SETTINGS = "settings.json"


def check_settings(config: FilterConfig, section: TeacherConfig | None, out: Path) -> None:
    """Parts are of one question: write it down, or raise ConfigError where the folder holds parts of another one."""
    asked: dict[str, Any] = {
        "data": config.data.model_dump(),
        "prompts": sha256(config.prompts, config.templates),
        "teacher": None if section is None else section.model_dump(include={"arch", "pretrained", "path"}),
        "store": config.store,
        "top_k": config.top_k,
        "dedup_threshold": "set" if config.dedup_threshold is not None else "null",
        "precision": config.precision,
    }
    file = out / "parts" / SETTINGS
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if other := [key for key, value in asked.items() if before.get(key) != value]:
            raise ConfigError(
                f"out={out} holds scores of another run, which differs in {', '.join(other)}: name another folder, or"
                " delete this one"
            )
    file.parent.mkdir(exist_ok=True)
    replace_text(file, json.dumps(asked, indent=1))


def score_part(
    source: Source, ids: range, features: Tensor, bad: dict[int, str], prompts: Tensor, shard: int, top: TopK | None
) -> dict[str, Any]:
    """What the part of a shard holds."""
    if features.shape[1] != prompts.shape[1]:
        raise ConfigError(f"prompts have {prompts.shape[1]} numbers, images {features.shape[1]}: not of one teacher")
    keys = np.array([source.key(sample_id) for sample_id in ids])
    best, score = score_shard(features, keys, prompts, shard=shard, top=top)
    odd = sorted(set(np.flatnonzero(best < 0).tolist()) - bad.keys())
    bad = bad | dict.fromkeys(odd, "its features are not finite")
    candidates = {} if top is None else {f"top_{name}": column for name, column in top.of_shard(shard).items()}
    found = {"shard": source.shard(ids[0]), "keys": keys, "best": best, "score": score, "bad": json.dumps(bad)}
    return found | candidates


def candidates_of(part: Path) -> dict[str, np.ndarray]:
    """Its columns of TopK."""
    with np.load(part) as columns:
        return {name: columns[f"top_{name}"] for name in TopK.COLUMNS}


def save_part(part: Path, columns: dict[str, Any]) -> None:
    """Complete or not at all."""
    with replacing(part) as temporary, temporary.open("wb") as file:
        np.savez(file, **columns)
