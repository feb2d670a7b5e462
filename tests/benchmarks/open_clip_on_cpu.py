"""open_clip's trainer, open_clip_train.main, on CPU processes: it hands device_ids to DDP, which takes none there.

Run by bench_open_clip.py; nothing else of it is changed.
"""

from __future__ import annotations

import sys

import torch
from open_clip_train import main as trainer

_ddp = torch.nn.parallel.DistributedDataParallel


def _without_device_ids(module, device_ids=None, **options):
    return _ddp(module, **options)


if __name__ == "__main__":
    torch.nn.parallel.DistributedDataParallel = _without_device_ids
    trainer.main(sys.argv[1:])
