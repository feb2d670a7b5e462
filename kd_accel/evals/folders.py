"""Evaluation sets on disk: which folders hold one, what is in it, and its images as batches.

Three layouts, all read-only to us:

    FOLDER/{dataset_type,classnames,zeroshot_classification_templates}.txt  FOLDER/test/{nshards.txt,0.tar,...}
                  CLIP_benchmark's and DataComp's: KEY.jpg with KEY.cls, or with KEY.txt that has a caption per line
    FOLDER/*.tar  image-caption tars: KEY.jpg with KEY.txt, one caption per image
    FOLDER/*/     any number of the above
"""

from __future__ import annotations

import tarfile
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd_accel import distributed
from kd_accel.data.shards import BadSample
from kd_accel.data.transforms import decode, eval_view
from kd_accel.schema import ConfigError
from kd_accel.types import ImageInput

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MARKERS = ("dataset_type.txt", "classnames.txt", "test/nshards.txt")  # any of them makes a CLIP_benchmark folder
TASKS = {"classification": "zero_shot", "retrieval": "retrieval"}  # dataset_type.txt -> our name of the task


@dataclass(frozen=True)
class EvalSet:
    """One evaluation set: what is asked of it and where its samples are."""

    name: str  # the folder's name
    path: Path
    task: str  # zero_shot | retrieval
    shards: tuple[Path, ...]  # tars; a row's number counts through them in this order
    class_names: tuple[str, ...] = ()  # zero_shot: [C], in the order of the class indices
    templates: tuple[str, ...] = ()  # zero_shot: prompts with the placeholder {c}
    caption_per_line: bool = True  # retrieval: false takes the whole .txt as the one caption


@dataclass(frozen=True)
class Sample:
    """One row of a set: where its image lies, and what is true of it."""

    key: str
    shard: Path
    offset: int  # bytes from the start of the tar
    size: int  # bytes
    label: int | None = None  # zero_shot
    captions: tuple[str, ...] = ()  # retrieval, at least one


def find_sets(folders: str | Path | list[str | Path]) -> list[EvalSet]:
    """The sets that `folders` name, in order; a folder of sets gives all of them, sorted by name.

    Raises ConfigError, saying what was looked for, where a folder is none of the three layouts.
    """
    folders = folders if isinstance(folders, list) else [folders]
    found = [eval_set for folder in folders for eval_set in _find(Path(folder))]
    names = Counter(eval_set.name for eval_set in found)
    # a/val and b/val must not become one row of a report
    return [s if names[s.name] == 1 else replace(s, name=f"{s.path.parent.name}/{s.name}") for s in found]


def _find(folder: Path) -> list[EvalSet]:
    if not folder.is_dir():
        raise ConfigError(f"data: {folder}: no such folder")
    if here := _open(folder):
        return [here]
    below = [_open(path) for path in sorted(folder.iterdir()) if path.is_dir()]
    if not any(below):
        raise ConfigError(
            f"data: {folder} holds no evaluation set: looked for {', '.join(MARKERS)} (CLIP_benchmark's layout), "
            "for *.tar (images with captions), and for either in its subfolders"
        )
    return [eval_set for eval_set in below if eval_set]


def _open(folder: Path) -> EvalSet | None:
    """The set in `folder`, or None where it bears no sign of one."""
    if any((folder / marker).is_file() for marker in MARKERS):
        return _open_benchmark(folder)
    name = folder.resolve().name
    # macOS leaves ._NAME.tar beside every tar that it unpacks
    if tars := tuple(sorted(tar for tar in folder.glob("*.tar") if tar.name[0] != ".")):
        return EvalSet(name, folder, "retrieval", tars, caption_per_line=False)
    return None


def _open_benchmark(folder: Path) -> EvalSet:
    """CLIP_benchmark's layout; like there, a set without dataset_type.txt is one for classification."""
    typed = (folder / "dataset_type.txt").is_file()
    kind = _read(folder / "dataset_type.txt").lower() if typed else "classification"
    if kind not in TASKS:
        raise ConfigError(f"{folder}/dataset_type.txt: expected {' or '.join(TASKS)}, got '{kind}'")
    count = _read(folder / "test/nshards.txt")
    if not count.isdecimal():
        raise ConfigError(f"{folder}/test/nshards.txt: expected the number of tars, got '{count}'")
    shards = tuple(folder / f"test/{i}.tar" for i in range(int(count)))
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise ConfigError(f"{missing[0]}: no such file, but {folder}/test/nshards.txt promises {count} tars")
    name = folder.resolve().name
    if TASKS[kind] == "retrieval":
        return EvalSet(name, folder, "retrieval", shards)
    return EvalSet(name, folder, "zero_shot", shards, _class_names(folder), _templates(folder))


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(line.strip() for line in _read(folder / "classnames.txt").splitlines())
    if not all(names) or not names:
        raise ConfigError(f"{folder}/classnames.txt: expected one class name per line, found an empty one")
    return names


def _templates(folder: Path) -> tuple[str, ...]:
    path = folder / "zeroshot_classification_templates.txt"
    templates = tuple(line.strip() for line in _read(path).splitlines() if line.strip())
    if not templates or any("{c}" not in template for template in templates):
        raise ConfigError(f"{path}: expected one prompt per line, each with the placeholder {{c}} for the class name")
    return templates


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: an evaluation set in CLIP_benchmark's layout needs this file: {error}") from None


def read_samples(eval_set: EvalSet) -> list[Sample]:
    """Every row of the set, without its pixels; alike on every rank, so that a mistake in it stops all ranks at once.

    Raises ConfigError naming tar and key: a class index out of range, a sample without caption or image, an empty set.
    """
    samples = [sample for shard in eval_set.shards for sample in _read_shard(eval_set, shard)]
    if not samples:
        raise ConfigError(f"{eval_set.path}: no samples in its {len(eval_set.shards)} tars")
    return samples


def _read_shard(eval_set: EvalSet, shard: Path) -> list[Sample]:
    truth = "cls" if eval_set.task == "zero_shot" else "txt"
    images, truths = _scan(shard, truth)
    if odd := images.keys() ^ truths.keys():
        lacks = f".{' or .'.join(IMAGE_EXTENSIONS)}" if min(odd) in truths else f".{truth}"
        raise ConfigError(f"{shard}: sample '{min(odd)}' has no member {lacks}, which {eval_set.task} needs")
    told = _label if truth == "cls" else _captions
    return [Sample(key, shard, *place, **told(eval_set, shard, key, truths[key])) for key, place in images.items()]


def _scan(shard: Path, truth: str) -> tuple[dict[str, tuple[int, int]], dict[str, bytes]]:
    """({key: offset and size of its image}, {key: content of its member .`truth`}), both in the tar's order."""
    images, truths = {}, {}
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in filter(tarfile.TarInfo.isreg, tar):
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                if extension.lower() in IMAGE_EXTENSIONS:
                    images[folder + slash + stem] = member.offset_data, member.size
                elif extension.lower() == truth:
                    truths[folder + slash + stem] = tar.extractfile(member).read()
            # tarfile ends quietly at a cut or damaged header; a whole tar ends with a block of zeros
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"it breaks off after {len(images)} images")
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"{shard}: not a whole tar: {error}") from None
    return images, truths


def _label(eval_set: EvalSet, shard: Path, key: str, text: bytes) -> dict:
    last = len(eval_set.class_names) - 1
    if not text.strip().isdigit():
        raise ConfigError(f"{shard}: {key}.cls: expected a class index, got {text[:40]!r}")
    if int(text) > last:
        raise ConfigError(f"{shard}: {key}.cls is class {int(text)}, {eval_set.path}/classnames.txt names 0..{last}")
    return {"label": int(text)}


def _captions(eval_set: EvalSet, shard: Path, key: str, text: bytes) -> dict:
    try:
        whole = text.decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{shard}: {key}.txt is not UTF-8 text") from None
    lines = whole.splitlines() if eval_set.caption_per_line else [whole]
    captions = tuple(line.strip() for line in lines if line.strip())
    if not captions:
        raise ConfigError(f"{shard}: {key}.txt holds no caption")
    return {"captions": captions}


def deal(num_rows: int, batch_size: int) -> list[list[range]]:
    """The batches of each rank: [world_size] lists of ranges over 0..num_rows.

    Whole batches are dealt, not rows: a batch then holds the same rows on any number of ranks, and a matrix product
    rounds a row alike in equal batches only. This is what makes results independent of the world size to the last bit.
    """
    batches = [range(start, min(start + batch_size, num_rows)) for start in range(0, num_rows, batch_size)]
    world_size = distributed.world_size()
    return [batches[rank::world_size] for rank in range(world_size)]


class ImageBatches(Dataset):
    """Batches of decoded images: (rows [b] int64, views [b, 3, H, W] uint8, a line for each unreadable image)."""

    def __init__(self, samples: list[Sample], batches: list[range], wanted: ImageInput):
        self.samples = samples
        self.batches = batches
        self.wanted = wanted

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, list[str]]:
        rows, bad = [], []
        views = [torch.empty(0, 3, *self.wanted.size, dtype=torch.uint8)]
        for row in self.batches[number]:
            try:
                views.append(self._view(self.samples[row])[None])
                rows.append(row)
            except BadSample as error:
                bad.append(f"{self.samples[row].key}: {error}")
        return torch.tensor(rows, dtype=torch.int64), torch.cat(views), bad

    def _view(self, sample: Sample) -> Tensor:
        with sample.shard.open("rb") as tar:
            tar.seek(sample.offset)
            return eval_view(decode(tar.read(sample.size)), self.wanted)
