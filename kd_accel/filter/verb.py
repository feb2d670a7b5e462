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
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.data.open import open_one
from kd_accel.data.store_files import shard_names, shard_starts
from kd_accel.filter.features import live_features, stored_features
from kd_accel.filter.parts import candidates_of, check_settings, save_part, score_part
from kd_accel.filter.prompts import prompt_texts
from kd_accel.filter.scoring import TopK
from kd_accel.filter.selection import Scored, select, write_tars
from kd_accel.filter.teacher import embed_prompts, load_teacher, teacher_section
from kd_accel.filter_config import FilterConfig
from kd_accel.text_files import replace_text
from kd_accel.whole_files import replacing


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


def _score(config: FilterConfig, out: Path) -> list[Path]:
    """The part of every shard, made now or before."""
    source = open_one(config.data, images=True, captions=False)
    store = None if config.store is None else EmbeddingStore(config.store, key="store", towers={"image"})
    if store is not None:
        store.attach(source, None)
    section = teacher_section(config, store)
    parts = [out / "parts" / f"{Path(name).stem}.npz" for name in shard_names(source)]
    check_settings(config, section, out)
    if pending := [shard for shard, part in enumerate(parts) if not part.is_file()]:
        teacher = None if section is None else load_teacher(section, config)
        prompts = embed_prompts(config, teacher)
        top = None if config.top_k is None else TopK(len(prompts), config.top_k)
        if top is not None:
            for part in filter(Path.is_file, parts):
                top.add(**candidates_of(part))
        ids = [range(*ends) for ends in pairwise(shard_starts(source).tolist())]
        shards = stored_features(store, ids, pending) if store else live_features(source, ids, pending, teacher, config)
        bar = tqdm(zip(pending, shards, strict=True), desc="filter", unit="shard", total=len(pending), disable=None)
        for shard, (features, bad) in bar:
            columns = score_part(source, ids[shard], features, bad, prompts, shard, top)
            if config.dedup_threshold is not None:
                columns["features"] = features.half().numpy()
            save_part(parts[shard], columns)
    return parts


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
