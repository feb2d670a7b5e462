"""Features on disk: a model that has seen a set, or read a classifier's prompts, is not asked again.

    FOLDER/images-SHA256.safetensors     rows [n], images [n, d]: SetFeatures
    FOLDER/texts-SHA256.safetensors      features [m, d]
    FOLDER/classes-SHA256.safetensors    features [C, d]: a zero-shot classifier

The SHA-256 in the name is of all that decides the features, to their last bit: the encoder's image_id or text_id; the
samples and the state of their files, or the texts; batch size, kind of device and version. So another model or a set
that was changed finds nothing, and files may be deleted at any time. n images, m texts, C classes, d embedding width.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kd_accel import __version__, distributed
from kd_accel.evals.encoder import Encoder
from kd_accel.evals.ensemble import Ensemble
from kd_accel.evals.features import SetFeatures, image_features, text_features
from kd_accel.evals.sets import EvalSet, Sample
from kd_accel.evals.zero_shot import classifier
from kd_accel.whole_files import replacing

log = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


class FeatureCache:
    """The three ways to features, each as its namesake, but for what `folder` already has; None: it has nothing.

    All ranks ask together and find the same: where one of them, on a machine without that folder, finds nothing, all
    compute. The main rank writes. A damaged file is computed again, with a warning; so is one that cannot be written.
    """

    def __init__(self, folder: str | Path | None):
        self.folder = None if folder is None else Path(folder)

    def image_features(
        self,
        encoder: Encoder | Ensemble,
        eval_set: EvalSet,
        samples: list[Sample],
        *,
        batch_size: int,
        num_workers: int,
    ) -> SetFeatures:
        def compute() -> Tensors:
            found = image_features(encoder, eval_set, samples, batch_size=batch_size, num_workers=num_workers)
            return {"rows": found.rows, "images": found.images}

        found = self._cached(
            "images", [encoder.image_id, self._places(eval_set, samples)], encoder, batch_size, compute
        )
        return SetFeatures(found["rows"], found["images"].to(encoder.device))

    def text_features(self, encoder: Encoder | Ensemble, texts: list[str], *, batch_size: int) -> Tensor:  # [m, d]
        def compute() -> Tensors:
            return {"features": text_features(encoder, texts, batch_size=batch_size)}

        found = self._cached("texts", [encoder.text_id, texts], encoder, batch_size, compute)
        return found["features"].to(encoder.device)

    def classifier(
        self, encoder: Encoder | Ensemble, class_names: tuple[str, ...], templates: tuple[str, ...], *, batch_size: int
    ) -> Tensor:  # [C, d]
        def compute() -> Tensors:
            return {"features": classifier(encoder, class_names, templates, batch_size=batch_size)}

        decides = [encoder.text_id, class_names, templates]
        return self._cached("classes", decides, encoder, batch_size, compute)["features"].to(encoder.device)

    def _places(self, eval_set: EvalSet, samples: list[Sample]) -> str | None:
        """fingerprint() as the main rank sees the files; None where nobody wants to know."""
        if self.folder is None:
            return None
        return distributed.from_main(fingerprint(eval_set, samples) if distributed.is_main() else None)

    def _cached(
        self, what: str, decides: list, encoder: Encoder | Ensemble, batch_size: int, compute: Callable[[], Tensors]
    ) -> Tensors:
        if self.folder is None:
            return compute()
        name = _sha256(json.dumps([decides, batch_size, encoder.device.type, __version__]).encode())
        path = self.folder / f"{what}-{name}.safetensors"
        found, damage = _read(path)
        told = distributed.gather_objects((found is None, damage))
        if damages := [theirs for _, theirs in told if theirs is not None]:
            _warn("%s cannot be used (%s): its features are computed again", path, damages[0])
        if any(missing for missing, _ in told):
            found = compute()
            if distributed.is_main():
                _write(path, found)
            distributed.barrier()  # nobody asks for it before it is there
        return found


def fingerprint(eval_set: EvalSet, samples: list[Sample]) -> str:
    """SHA-256 of where the images of a set lie, in their order, and of the files' sizes and times of change.

    Labels, captions and class names are no part of it: features do not depend on them.
    """
    files = {sample.file: _state(sample.file) for sample in samples if sample.file is not None}
    found = hashlib.sha256(repr(replace(eval_set, name="", class_names=(), templates=())).encode())
    found.update(repr(_state(eval_set.path)).encode())
    for sample in samples:
        place = sample.key, sample.offset, sample.size, files.get(sample.file)
        found.update(f"{place}\n".encode())
    return found.hexdigest()


def _state(path: Path) -> tuple[str, int, int] | None:
    """(path, bytes, time of the last change in ns); None where there is no such file, which image() will say."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return str(path.absolute()), stat.st_size, stat.st_mtime_ns


def _read(path: Path) -> tuple[Tensors | None, str | None]:
    """(tensors, None), (None, None) for no such file, (None, what is wrong with it)."""
    try:
        with safe_open(path, "pt") as file:
            # cloned: a tensor that maps the file would change with it
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            sha256 = (file.metadata() or {}).get("sha256")
    except FileNotFoundError:
        return None, None
    except (OSError, SafetensorError) as error:
        return None, str(error)
    return (tensors, None) if _checksum(tensors) == sha256 else (None, "its content is not what was written")


def _write(path: Path, tensors: Tensors) -> None:
    """Complete or not at all; a warning where it is not."""
    stored = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(stored, temporary, {"sha256": _checksum(stored)})
    except (OSError, SafetensorError) as error:
        _warn("%s cannot be written, so its features are computed again next time: %s", path, error)


def _checksum(tensors: Tensors) -> str:
    """Of the tensors' bytes, in the order of their names."""
    return _sha256(*(tensor.numpy() for _, tensor in sorted(tensors.items())))


def _sha256(*parts) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _warn(text: str, *values) -> None:
    if distributed.is_main():
        log.warning(text, *values)
