"""kd-accel filter: score the images of a source by the prompt they fit best, and keep the best ones.

    kd-accel filter classes.txt data.shards=datasets/raw teacher.path=runs/teacher out=filtered top_k=50

    OUT/parts/NAME.npz    what was found in one shard; a rerun goes on with the shards that have none
    OUT/scores.parquet    key, shard, index, best_prompt, score: a row for every image, score nan for unreadable ones
    OUT/selected.txt      keys of what is kept, in the order of the data
    OUT/errors.jsonl      unreadable images, with the reason
    OUT/shards/           tars of what is kept, with write_shards=true

n images of a shard, d embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from kd_accel.config import TeacherConfig
from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.data.open import open_one
from kd_accel.data.source import BadSample, Source
from kd_accel.data.store_files import shard_names
from kd_accel.data.transforms import decode, eval_view
from kd_accel.filter.prompts import is_stored, prompt_texts, sha256
from kd_accel.filter.scoring import TopK, score_shard
from kd_accel.filter.selection import Scored, select, write_tars
from kd_accel.filter_config import FilterConfig
from kd_accel.models.class_embeddings import class_embeddings, prompt_embeddings
from kd_accel.models.teacher import Teacher
from kd_accel.models.towers import encode_image
from kd_accel.schema import ConfigError
from kd_accel.stored_teacher import NAMED_BY, check_store, teacher_in_words
from kd_accel.text_files import replace_text
from kd_accel.types import ImageInput
from kd_accel.whole_files import replacing

SETTINGS = "settings.json"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
Shard = tuple[Tensor, dict[int, str]]  # features [n, d], and for each row without a usable image the reason


def run(config: FilterConfig) -> None:
    """Score, select, write, and say what it came to. Raises ConfigError for what cannot be had."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if config.service is not None:
        from kd_accel.filter.knn import search  # the one part that needs a network library

        search(config.service, prompt_texts(config.prompts), out)
        return
    parts = _score(config, out)
    scored = Scored.read(parts, config.top_k)
    kept, steps = select(scored, config)
    _write(out, scored, kept)
    print(f"{len(scored.score):,} images, {int(np.isnan(scored.score).sum()):,} of them unreadable")
    print("\n".join(f"{step}: {left:,} left" for step, left in steps))
    if config.write_shards:
        write_tars(scored, kept, config.data.shards, out / "shards")
    print(f"{len(kept):,} selected: {out / 'selected.txt'}")


@dataclass(frozen=True)
class _Images(Dataset):
    """Batches of decoded images: (views [b, 3, H, W] uint8, {row of the batch: why it could not be read})."""

    source: Source
    batches: list[range]  # ids
    wanted: ImageInput

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> tuple[Tensor, dict[int, str]]:
        bad: dict[int, str] = {}
        views = torch.zeros(len(self.batches[number]), 3, *self.wanted.size, dtype=torch.uint8)
        for row, sample_id in enumerate(self.batches[number]):
            try:
                views[row] = eval_view(decode(self.source.read(sample_id).image), self.wanted)
            except BadSample as error:
                bad[row] = error.reason
        return views, bad


def _score(config: FilterConfig, out: Path) -> list[Path]:
    """The part of every shard, made now or before."""
    source = open_one(config.data, images=True, captions=False)
    store = None if config.store is None else EmbeddingStore(config.store, key="store", towers={"image"})
    if store is not None:
        store.attach(source, None)
    section = _teacher_section(config, store)
    parts = [out / "parts" / f"{Path(name).stem}.npz" for name in shard_names(source)]
    _same_settings(config, section, out)
    if pending := [shard for shard, part in enumerate(parts) if not part.is_file()]:
        teacher = None if section is None else _load(section, config)
        prompts = _embed(config, teacher)
        top = None if config.top_k is None else TopK(len(prompts), config.top_k)
        if top is not None:
            for part in filter(Path.is_file, parts):
                top.add(**_candidates(part))
        ids = _ids(source)
        shards = _stored(store, ids, pending) if store else _live(source, ids, pending, teacher, config)
        bar = tqdm(zip(pending, shards, strict=True), desc="filter", unit="shard", total=len(pending), disable=None)
        for shard, (features, bad) in bar:
            columns = _score_one(source, ids[shard], features, bad, prompts, shard, top)
            if config.dedup_threshold is not None:
                columns["features"] = features.half().numpy()
            _save(parts[shard], columns)
    return parts


def _score_one(
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


def _teacher_section(config: FilterConfig, store: EmbeddingStore | None) -> TeacherConfig | None:
    """The model of images and prompts: the configured one, else the store's; None where nobody has to say anything.

    Raises ConfigError for a store that does not say whose features it holds.
    """
    if store is None or config.teacher is not None:
        return config.teacher
    if is_stored(config.prompts):
        return None
    named = {key: store.info.teacher.get(key) for key in NAMED_BY}
    if named["path"] is None and named["arch"] is None:
        raise ConfigError(
            f"teacher: {store.folder} holds features of {teacher_in_words(store.info)}: say of which model"
        )
    return TeacherConfig(**named)


def _load(section: TeacherConfig, config: FilterConfig) -> Teacher:
    """On the device, in its precision. Raises ConfigError where the store's features are not this teacher's."""
    teacher = Teacher(section)
    if config.store is not None:
        check_store(section.model_copy(update={"store": config.store}), teacher, name="teacher")
    return teacher.to("cuda" if torch.cuda.is_available() else "cpu", DTYPES[config.precision])


def _embed(config: FilterConfig, teacher: Teacher | None) -> Tensor:  # [P, d]
    if is_stored(config.prompts):
        return class_embeddings(config.prompts, templates=config.templates, teacher=None, key="prompts")
    if teacher.contract.text is None:
        raise ConfigError("teacher: has no text tower: give prompts as embeddings, a .safetensors")
    return prompt_embeddings(prompt_texts(config.prompts), config.templates, teacher).cpu()


def _ids(source: Source) -> list[range]:
    """Of each shard."""
    ends = np.cumsum(source.shard_sizes).tolist()
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def _stored(store: EmbeddingStore, ids: list[range], pending: list[int]) -> Iterator[Shard]:
    """The first view's features of each pending shard."""
    for shard in pending:
        rows, bad = np.arange(ids[shard].start, ids[shard].stop), {}
        features = store.read(rows, view=0, texts=np.zeros_like(rows))["image"]
        for row in (~features.isfinite().all(1)).nonzero()[:, 0].tolist():
            try:
                store.check(ids[shard][row])
            except BadSample as error:
                bad[row] = error.reason
        yield features, bad


def _live(
    source: Source, ids: list[range], pending: list[int], teacher: Teacher, config: FilterConfig
) -> Iterator[Shard]:
    """Features of the evaluation view of each image of each pending shard."""
    if teacher.contract.image is None:
        raise ConfigError("teacher: has no image tower")
    step, wanted, device = config.batch_size, teacher.contract.image, next(teacher.parameters()).device
    batches = [[ids[shard][start : start + step] for start in range(0, len(ids[shard]), step)] for shard in pending]
    loader = iter(
        DataLoader(
            _Images(source, [batch for shard in batches for batch in shard], wanted),
            batch_size=None,
            num_workers=config.num_workers,
            generator=torch.Generator(),  # torch would draw the workers' seed from the global generator
        )
    )
    for shard in batches:
        features, bad = [], {}
        for number in range(len(shard)):
            views, reasons = next(loader)
            with torch.no_grad():
                features.append(encode_image(teacher.clip, views.to(device), wanted).float().cpu())
            features[-1][list(reasons)] = torch.nan
            bad |= {number * step + row: reason for row, reason in reasons.items()}
        yield torch.cat(features), bad


def _same_settings(config: FilterConfig, section: TeacherConfig | None, out: Path) -> None:
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


def _candidates(part: Path) -> dict[str, np.ndarray]:
    with np.load(part) as columns:
        return {name: columns[f"top_{name}"] for name in TopK.COLUMNS}


def _save(part: Path, columns: dict[str, Any]) -> None:
    with replacing(part) as temporary, temporary.open("wb") as file:
        np.savez(file, **columns)


def _write(out: Path, scored: Scored, kept: np.ndarray) -> None:
    """scores.parquet, errors.jsonl, selected.txt."""
    columns = {
        "key": scored.key,
        "shard": np.array(scored.files)[scored.shard],
        "index": scored.row,
        "best_prompt": scored.best,
        "score": scored.score,
    }
    with replacing(out / "scores.parquet") as temporary:
        pq.write_table(pa.table(columns), temporary)
    errors = [
        {"key": str(scored.key[i]), "shard": scored.files[scored.shard[i]], "index": int(scored.row[i]), "reason": why}
        for i, why in scored.bad.items()
    ]
    replace_text(out / "errors.jsonl", "".join(json.dumps(line) + "\n" for line in errors))
    selected = "".join(f"{key}\n" for key in scored.key[kept])
    replace_text(out / "selected.txt", selected.encode("utf-8", "backslashreplace").decode())
