"""Host memory stays where it is, epoch after epoch: nothing is kept of what has been read.

KD_ACCEL_SOAK_EPOCHS=100 python -m pytest -m slow tests/data/test_memory_flat.py     # 20 epochs without it
"""

from __future__ import annotations

import os
import shutil
from contextlib import closing
from itertools import islice
from pathlib import Path

import psutil
import pytest
from open_clip import SimpleTokenizer

from kd_accel.data.index import build_index, expand_shards
from kd_accel.data.loader import TrainLoader
from kd_accel.data_config import DataConfig
from kd_accel.schema import validate
from kd_accel.types import ImageInput, InputContract, TextInput

EPOCHS = int(os.environ.get("KD_ACCEL_SOAK_EPOCHS", "20"))
SETTLED, ALLOWED = 2, 0.02


def tars_open(processes, folder):
    """How many tars of `folder` each one has open: not batches on their way, nor what a test before this one left."""
    return [sum(Path(file.path).parent == folder for file in process.open_files()) for process in processes]


def resident(processes):
    """Bytes of each one in memory, with what a worker still shares with the process it was forked from."""
    return [process.memory_info().rss for process in processes]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_all_epochs_take_the_memory_of_two(data_root, tmp_path):
    """Real pairs at 64 pixels, two workers: after epoch 2 no process grows by 2 %, and none opens a tar twice."""
    folder = tmp_path / "train"
    shutil.copytree(data_root / "pairs" / "train", folder)
    folder.chmod(0o755)
    build_index(expand_shards(str(folder)))
    image = ImageInput((64, 64), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
    text = TextInput(32, "clip_bpe", SimpleTokenizer(context_length=32), pad=0)
    # a batch of 256 has 3 MB: those on their way would count for a process that grows
    config = validate(DataConfig, {"shards": str(folder), "batch_size": 32, "num_workers": 2})
    loader = TrainLoader(config, contracts={"student": InputContract(image, text)}, seed=0, rank=0, world_size=1)
    main = psutil.Process()
    before = main.children()
    with closing(iter(loader)) as steps:
        next(steps)
        workers = [child for child in main.children() if child not in before]
        workers = [worker for worker in workers if worker.cmdline() == main.cmdline()]  # not torch's own helpers
        assert len(workers) == config.num_workers
        sizes, files = [], []
        for _ in range(EPOCHS):
            for _ in islice(steps, loader.steps_per_epoch):
                pass
            sizes.append(resident([main, *workers]))
            files.append(tars_open(workers, folder))
    growth = [last / first - 1 for first, last in zip(sizes[SETTLED - 1], sizes[-1], strict=True)]
    print("growth", [f"{share:.2%}" for share in growth], "of MB", [size // 10**6 for size in sizes[SETTLED - 1]])
    assert max(growth) < ALLOWED
    assert files[-1] == files[SETTLED - 1] == [len(list(folder.glob("*.tar")))] * config.num_workers
