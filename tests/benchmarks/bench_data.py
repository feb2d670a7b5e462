"""Input pipelines side by side: our loader and open_clip's, on the same shards, with the same crops and tokenizer.

    python tests/benchmarks/bench_data.py                                   # generated photographs; a minute
    python tests/benchmarks/bench_data.py --pairs /data/pairs/train --output data.json

One epoch with one worker of one thread. `500 x 375` and `667 x 500` are JPEGs with the spectrum of photographs;
`--pairs` is a folder of small image-caption tars. open_clip's side is its trainer's own webdataset pipeline, its
training transform (random resized crop, bicubic) and its tokenizer. Both end at normalised float pixels: open_clip's
worker makes them; ours sends uint8, and what the models do to them on their device is done here, in the main process.

`core`: samples per processor second of main process and worker together, which other programs on the machine hardly
change. `worker`: of the worker alone, which is what feeds a GPU. `wall`: samples per second. Best of `--repeats`.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import tarfile
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch
from open_clip import SimpleTokenizer, image_transform
from open_clip_train import data as open_clip_data
from output import add_output, write
from PIL import Image
from tqdm import tqdm

from kd_accel.data.index import build_index, expand_shards
from kd_accel.data.loader import TrainLoader
from kd_accel.data_config import DataConfig
from kd_accel.models.image import to_model_input
from kd_accel.schema import validate
from kd_accel.types import ImageInput, InputContract, TextInput

BATCH, CONTEXT, SHARDS, PICTURES, SKIPPED = 64, 77, 4, 100, 3
SCALE = (0.9, 1.0)
CLOCKS = ("core", "worker", "wall")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CASES = {"pairs": (64, 224), "500 x 375": (224,), "667 x 500": (224,)}  # data -> sizes of the view
WORDS = "a photograph of two small dogs on the red sofa beside an open window in spring".split()


def photographs(width: int, height: int) -> Iterator[tuple[bytes, str]]:
    """(JPEG, caption) without end, from PICTURES pictures: amplitudes fall as 1 / frequency, colours go together."""
    y, x = np.meshgrid(np.fft.fftfreq(height), np.fft.rfftfreq(width), indexing="ij")
    amplitude = 1 / np.maximum(np.hypot(x, y), 1 / width)
    made = []
    for seed in tqdm(range(PICTURES), desc="pictures", disable=None):
        rng = np.random.default_rng(seed)
        phases = np.exp(2j * np.pi * rng.random((3, *x.shape)))
        planes = np.fft.irfft2(amplitude * phases, s=(height, width))
        planes = 0.8 * planes[:1] + 0.2 * planes
        pixels = np.clip(128 + 50 * planes / planes.std(), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, "JPEG", quality=90)
        made.append((file.getvalue(), " ".join(rng.choice(WORDS, 12))))
    while True:
        yield from made


def real_pairs(folder: Path) -> Iterator[tuple[bytes, str]]:
    """(JPEG, caption) of the tars of a folder."""
    for path in expand_shards(str(folder)):
        with tarfile.open(path) as tar:
            found = {}
            for member in tar:
                key, _, extension = member.name.rpartition(".")
                found.setdefault(key, {})[extension] = tar.extractfile(member).read()
        yield from ((parts["jpg"], parts["txt"].decode()) for parts in found.values())


def pack(pairs: Iterable[tuple[bytes, str]], folder: Path) -> Path:
    """SHARDS tars with an index."""
    pairs = list(pairs)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:04d}.tar", "w") as tar:
            for i, (jpeg, caption) in list(enumerate(pairs))[shard::SHARDS]:
                for extension, content in (("jpg", jpeg), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{i:06d}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    build_index(expand_shards(str(folder)))
    return folder


def our_batches(folder: Path, size: int, samples: int) -> Iterator[None]:
    """Each batch of an epoch, pixels normalised on the device as the models do."""
    wanted = ImageInput((size, size), MEAN, STD, "bicubic", "shortest")
    text = TextInput(CONTEXT, "clip_bpe", SimpleTokenizer(context_length=CONTEXT), pad=0)
    values = {"shards": str(folder), "batch_size": BATCH, "num_workers": 1, "augment": {"scale": SCALE}}
    contracts = {"student": InputContract(wanted, text)}
    loader = TrainLoader(validate(DataConfig, values), contracts=contracts, seed=0, rank=0, world_size=1)
    with closing(iter(loader)) as steps:
        for (batch,) in islice(steps, samples // BATCH):
            assert batch.image.shape == (BATCH, 3, size, size)
            to_model_input(batch.image, wanted, torch.float32)
            yield


def their_batches(folder: Path, size: int, samples: int) -> Iterator[None]:
    """The same of open_clip's trainer."""
    options = {"dataset_resampled": False, "train_data_upsampling_factors": None, "seed": 0, "batch_size": BATCH}
    options |= {"train_data": f"{folder}/{{0000..{SHARDS - 1:04d}}}.tar", "train_num_samples": samples}
    args = argparse.Namespace(**options, workers=1, world_size=1)
    transform = image_transform(size, is_train=True, mean=MEAN, std=STD, aug_cfg={"scale": SCALE})
    tokenizer = SimpleTokenizer(context_length=CONTEXT)
    data = open_clip_data.get_wds_dataset(args, transform, is_train=True, floor=True, tokenizer=tokenizer)
    for image, text in data.dataloader:
        assert image.shape == (BATCH, 3, size, size)
        assert text.shape == (BATCH, CONTEXT)
        yield


def measure(batches: Iterator[None]) -> dict[str, float]:
    """Samples per second of all processors, of the worker's, and of the wall; without the start and the last batches,
    when one worker has read ahead and the other has come to an end."""
    marks = []
    for _ in batches:
        main = psutil.Process()
        worker = sum(sum(child.cpu_times()[:2]) for child in main.children())
        marks.append((sum(main.cpu_times()[:2]) + worker, worker, time.perf_counter()))
    first, last = marks[SKIPPED], marks[-1 - SKIPPED]
    rows = BATCH * (len(marks) - 1 - 2 * SKIPPED)
    return {key: rows / (b - a) for key, a, b in zip(CLOCKS, first, last, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="folder of tars with KEY.jpg and KEY.txt")
    parser.add_argument("--samples", type=int, default=4096, help="of pairs; a quarter of it is generated")
    parser.add_argument("--repeats", type=int, default=2)
    add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.INFO)
    # webdataset 1.0 ends a tar with an empty sample, which open_clip 3.3 does not expect
    open_clip_data.tar_file_expander = partial(open_clip_data.tar_file_expander, eof_value=None)
    found = {}
    for name, sizes in CASES.items():
        if name == "pairs" and options.pairs is None:
            continue
        samples = options.samples if name == "pairs" else options.samples // 4
        pairs = real_pairs(options.pairs) if name == "pairs" else photographs(*map(int, name.split(" x ")))
        with tempfile.TemporaryDirectory() as folder:
            shards = pack(islice(pairs, samples), Path(folder))
            for size in sizes:
                found[f"{name} {size} px"] = sides = {}
                for side, batches in (("kd_accel", our_batches), ("open_clip", their_batches)):
                    runs = [measure(batches(shards, size, samples)) for _ in range(options.repeats)]
                    sides[side] = {f"{key}_per_second": max(run[key] for run in runs) for key in CLOCKS}
                ours, theirs = sides.values()
                sides["ratio"] = {
                    f"{key}_ratio": ours[f"{key}_per_second"] / theirs[f"{key}_per_second"] for key in CLOCKS
                }
    print(f"{'':32}" + "".join(f"{name:>12}" for name in CLOCKS))
    for case, sides in found.items():
        for side, figures in sides.items():
            digits = 2 if side == "ratio" else 0
            print(f"{f'{case}, {side}':32}" + "".join(f"{figure:>12,.{digits}f}" for figure in figures.values()))
    write(options.output, found)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
