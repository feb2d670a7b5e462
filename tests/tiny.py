"""The smallest real things a run needs: shards of drawn images, and a teacher's release directory."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

TRAIN_YAML = """
name: run
data: {shards: data, batch_size: 8}
student: {arch: ViT-B-16}
objective: {terms: {clip: {kind: clip}}}
optim: {lr: 5e-4, epochs: 2}
"""

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 60, 220), "yellow": (230, 220, 40)}


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def picture(color: tuple[int, int, int], rng: np.random.Generator, size: int = 40) -> bytes:
    """A square of the colour on noise, as JPEG."""
    pixels = rng.integers(0, 90, (size, size, 3), dtype=np.uint8)
    top, left = rng.integers(2, size // 2, 2)
    pixels[top : top + size // 3, left : left + size // 3] = color
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_shards(folder: Path, *, shards: int = 2, per_shard: int = 20) -> Path:
    """Tars of coloured squares captioned with their colour, indexed; returns the folder."""
    from kd_accel.data.index import build_index, expand_shards

    folder.mkdir(parents=True)
    rng = np.random.default_rng(5)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(per_shard):
                name, color = list(COLORS.items())[i % len(COLORS)]
                add(tar, f"{shard:02d}{i:04d}.jpg", picture(color, rng))
                add(tar, f"{shard:02d}{i:04d}.txt", f"a {name} square, number {shard * per_shard + i}".encode())
                add(tar, f"{shard:02d}{i:04d}.cls", str(i % len(COLORS)).encode())
    build_index(expand_shards(str(folder)))
    return folder


def arch(width: int = 16, embed_dim: int = 8, **vision) -> dict:
    """An inline CLIP of one layer per tower, 32 pixels, 12 tokens."""
    image = {"image_size": 32, "patch_size": 8, "width": width, "layers": 1, "head_width": width // 2} | vision
    text = {"context_length": 12, "vocab_size": 49408, "width": width, "heads": 2, "layers": 1}
    return {"embed_dim": embed_dim, "vision_cfg": image, "text_cfg": text}


def write_teacher(folder: Path, model: dict | None = None) -> Path:
    """The release directory of an untrained CLIP, wider than `arch()`."""
    import torch

    from kd_accel.models.release import write_release
    from kd_accel.models.towers import build_open_clip

    torch.manual_seed(3)
    built = build_open_clip(model or arch(24, 12), pretrained=None, preprocess=None, name="teacher")
    module, contract, model_cfg, scale = built
    scales = {"log_scale": scale.log_scale, "logit_bias": scale.bias}
    write_release(folder, state=module.state_dict(), model_cfg=model_cfg, contract=contract, **scales)
    return folder
