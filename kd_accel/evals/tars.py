"""CLIP_benchmark's and DataComp's evaluation sets, and image-caption tars as for training; read where they lie.

FOLDER/{dataset_type,classnames,zeroshot_classification_templates}.txt  FOLDER/test/{nshards.txt,0.tar,...}
              KEY.jpg with KEY.cls, or with KEY.txt that has a caption per line; KEY.npy has DataComp's metadata
FOLDER/*.tar  KEY.jpg with KEY.txt, one caption per image
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd_accel.data.members import IMAGE_EXTENSIONS
from kd_accel.evals.class_texts import CLASS_NAMES, TEMPLATES
from kd_accel.evals.sets import EvalSet, Sample
from kd_accel.schema import ConfigError

MARKERS = ("dataset_type.txt", CLASS_NAMES, "test/nshards.txt")  # any of them makes a CLIP_benchmark folder
KINDS = {"classification": "zero_shot", "retrieval": "retrieval"}  # dataset_type.txt -> EvalSet.kind


@dataclass(frozen=True)
class TarSet(EvalSet):
    """A set in tars."""

    shards: tuple[Path, ...] = ()  # a row's number counts through them in this order
    caption_per_line: bool = True  # retrieval: false takes the whole .txt as the one caption

    def samples(self) -> list[Sample]:
        """Raises ConfigError naming tar and key: a class index out of range, no caption, no image, an empty set."""
        samples = [sample for shard in self.shards for sample in _read_shard(self, shard)]
        if not samples:
            raise ConfigError(f"{self.path}: no samples in its {len(self.shards)} tars")
        return samples


def open_tars(folder: Path, *, name: str | None = None, split: str = "test") -> TarSet | None:
    """The set in `folder`, or None where it bears no sign of one."""
    if any((folder / marker).is_file() for marker in MARKERS):
        return _open_benchmark(folder, name or folder.resolve().name, split)
    # macOS leaves ._NAME.tar beside every tar that it unpacks
    if tars := tuple(sorted(tar for tar in folder.glob("*.tar") if tar.name[0] != ".")):
        return TarSet(name or folder.resolve().name, folder, "retrieval", shards=tars, caption_per_line=False)
    return None


def _open_benchmark(folder: Path, name: str, split: str) -> TarSet:
    """CLIP_benchmark's layout; like there, a set without dataset_type.txt is one for classification."""
    typed = (folder / "dataset_type.txt").is_file()
    kind = _read(folder / "dataset_type.txt").lower() if typed else "classification"
    if kind not in KINDS:
        raise ConfigError(f"{folder}/dataset_type.txt: expected {' or '.join(KINDS)}, got '{kind}'")
    shards = numbered_tars(folder / split)
    if KINDS[kind] == "retrieval":
        return TarSet(name, folder, "retrieval", shards=shards)
    return TarSet(name, folder, "zero_shot", _class_names(folder), _templates(folder), shards)


def numbered_tars(folder: Path) -> tuple[Path, ...]:
    """0.tar, 1.tar, ... in the folder of a split, as many as nshards.txt says; raises ConfigError for a missing one."""
    count = _read(folder / "nshards.txt")
    if not count.isdecimal():
        raise ConfigError(f"{folder}/nshards.txt: expected the number of tars, got '{count}'")
    shards = tuple(folder / f"{i}.tar" for i in range(int(count)))
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise ConfigError(f"{missing[0]}: no such file, but {folder}/nshards.txt promises {count} tars")
    return shards


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(line.strip() for line in _read(folder / CLASS_NAMES).splitlines())
    if not all(names) or not names:
        raise ConfigError(f"{folder}/{CLASS_NAMES}: expected one class name per line, found an empty one")
    return names


def _templates(folder: Path) -> tuple[str, ...]:
    path = folder / TEMPLATES
    templates = tuple(line.strip() for line in _read(path).splitlines() if line.strip())
    if not templates or any("{c}" not in template for template in templates):
        raise ConfigError(f"{path}: expected one prompt per line, each with the placeholder {{c}} for the class name")
    return templates


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: an evaluation set in CLIP_benchmark's layout needs this file: {error}") from None


def _read_shard(eval_set: TarSet, shard: Path) -> list[Sample]:
    if eval_set.kind == "retrieval":
        images, members = _scan(shard, {"txt"})
        _require(shard, images, members["txt"].keys(), ".txt", "retrieval")
        return [
            Sample(k, shard, *at, captions=_captions(eval_set, shard, k, members["txt"][k])) for k, at in images.items()
        ]
    images, members = _scan(shard, {"cls", "npy"})
    # DataComp's FairFace and UTKFace have their truth in .npy alone
    _require(shard, images, members["cls"].keys() | members["npy"].keys(), ".cls", "zero_shot")
    return [
        Sample(
            key,
            shard,
            *place,
            label=_label(eval_set, shard, key, members["cls"].get(key)),
            meta=_meta(shard, key, members["npy"].get(key)),
        )
        for key, place in images.items()
    ]


def _require(shard: Path, images: Collection[str], truths: Collection[str], member: str, kind: str) -> None:
    """Every image has its truth, and the other way round."""
    if odd := set(images) ^ set(truths):
        lacks = f".{' or .'.join(IMAGE_EXTENSIONS)}" if min(odd) in truths else member
        raise ConfigError(f"{shard}: sample '{min(odd)}' has no member {lacks}, which {kind} needs")


def _scan(shard: Path, extensions: set[str]) -> tuple[dict[str, tuple[int, int]], dict[str, dict[str, bytes]]]:
    """({key: offset and size of its image}, {extension: {key: content}}), all in the tar's order."""
    images, members = {}, {extension: {} for extension in extensions}
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in filter(tarfile.TarInfo.isreg, tar):
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if extension.lower() in IMAGE_EXTENSIONS:
                    images[folder + slash + stem] = member.offset_data, member.size
                elif extension.lower() in extensions:
                    members[extension.lower()][folder + slash + stem] = tar.extractfile(member).read()
            # tarfile ends quietly at a cut or damaged header; a whole tar ends with a block of zeros
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it breaks off after {len(images)} images")
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"{shard}: not a whole tar: {error}") from None
    return images, members


def _meta(shard: Path, key: str, content: bytes | None) -> tuple[int, ...]:
    if content is None:
        return ()
    try:
        columns = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        raise ConfigError(f"{shard}: {key}.npy: expected whole numbers in numpy's format: {error}") from None
    return tuple(int(value) for value in columns.reshape(-1))


def _label(eval_set: TarSet, shard: Path, key: str, text: bytes | None) -> int | None:
    if text is None:
        return None
    last = len(eval_set.class_names) - 1
    if not text.strip().isdigit():
        raise ConfigError(f"{shard}: {key}.cls: expected a class index, got {text[:40]!r}")
    if int(text) > last:
        raise ConfigError(f"{shard}: {key}.cls is class {int(text)}, {eval_set.path}/{CLASS_NAMES} names 0..{last}")
    return int(text)


def _captions(eval_set: TarSet, shard: Path, key: str, text: bytes) -> tuple[str, ...]:
    try:
        whole = text.decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{shard}: {key}.txt is not UTF-8 text") from None
    lines = whole.splitlines() if eval_set.caption_per_line else [whole]
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise ConfigError(f"{shard}: {key}.txt holds no caption")
    return captions
