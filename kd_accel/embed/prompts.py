"""Texts without samples, as a teacher embeds them: class names and queries.

kd-accel embed TRAIN.yaml prompts=classes.txt 'prompt_templates=["a photo of a {}."]' out=classes.safetensors
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from kd_accel import distributed
from kd_accel.embed_config import EmbedConfig
from kd_accel.models.class_embeddings import prompt_embeddings, read_names
from kd_accel.models.teacher import Teacher
from kd_accel.schema import ConfigError
from kd_accel.whole_files import replacing


def embed_prompts(config: EmbedConfig, teacher: Teacher) -> None:
    """`embeddings` [P, d], unit rows, one per line, and their names; on rank 0. Raises ConfigError."""
    if not distributed.is_main():
        return
    names = read_names(Path(config.prompts), "prompts")
    if odd := [template for template in config.prompt_templates if "{}" not in template]:
        raise ConfigError(f"prompt_templates: '{odd[0]}' has no {{}}, where the line goes")
    rows = prompt_embeddings(names, config.prompt_templates, teacher)
    out = Path(config.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as temporary:
            save_file({"embeddings": rows}, temporary, metadata={"names": json.dumps(names)})
            temporary.chmod(0o644)  # safetensors makes files that only their owner can read
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written ({error})") from None
    print(f"{len(names)} prompts, {rows.shape[1]} wide: {out}")
