"""A release from a stranger: nothing in it is run, nothing outside of it is read, and the refusal is one line."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest

from kd_accel.cli import main
from kd_accel.models.onnx_meta import OnnxMeta
from kd_accel.models.release_folder import CONFIG, WEIGHTS
from kd_accel.schema import ConfigError


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def change(folder: Path, **keys) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["model_cfg"] |= keys
    (folder / CONFIG).write_text(json.dumps(config))


def spoil(folder: Path, what: str, trap: Path) -> None:
    weights = folder / WEIGHTS
    match what:
        case "pickle":
            weights.unlink()
            (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Trap(trap)))
        case "pickle by another name":
            weights.write_bytes(pickle.dumps(Trap(trap)))
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "unknown architecture":
            change(folder, vision_cfg={"timm_classifier": "no_such_net"})
        case "unknown key":
            change(folder, vision_cfg={"shell": "rm"})
        case "code of its own":
            code = f"from pathlib import Path\nPath({str(trap)!r}).touch()\n"
            (folder / "modeling_evil.py").write_text(code)
            (folder / "config.json").write_text(
                json.dumps(
                    {
                        "model_type": "evil",
                        "auto_map": {"AutoConfig": "modeling_evil.C", "AutoModel": "modeling_evil.M"},
                    }
                )
            )
        case "not a mapping":
            (folder / CONFIG).write_text("[]")


@pytest.mark.parametrize(
    ("kind", "what", "said"),
    [
        ("vit", "pickle", "open_clip_pytorch_model.bin is a pickle, which may run code"),
        ("vit", "pickle by another name", "truncated, or not safetensors"),
        ("vit", "truncated", "truncated, or not safetensors"),
        ("vit", "unknown architecture", "no_such_net"),
        ("vit", "unknown key", "vision_cfg.shell: unknown key"),
        ("vit", "not a mapping", "expected"),
        ("hf text", "code of its own", "cannot be had"),
    ],
)
def test_it_is_refused_in_one_line(tmp_path, releases, kind, what, said, capsys):
    """By every verb that loads a model; here export and predict."""
    folder, trap = shutil.copytree(releases(kind), tmp_path / "stranger"), tmp_path / "trap"
    spoil(folder, what, trap)
    capsys.readouterr()  # of making the release
    for words in (["export", str(folder), f"out={tmp_path / 'out'}"], ["predict", str(folder), "a.jpg", "text=[a]"]):
        assert main(words) == 2
        errors = capsys.readouterr().err.splitlines()
        assert len(errors) == 1
        assert said in errors[0]
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../secret.onnx", "/etc/passwd", "a/b.onnx", "..", ""])
def test_onnx_files_lie_beside_their_description(tmp_path, name):
    """A name that leads out of the folder is refused before a file is opened."""
    image = {"size": [8, 8], "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bicubic", "resize_mode": "squash"}
    values = {"name": "x", "embed_dim": 8, "logit_scale": 1, "image": image | {"file": name}}
    (tmp_path / "meta.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="image.file"):
        OnnxMeta.from_json(tmp_path / "meta.json")
