"""What 100 million sample ids cost: bytes per rank, reading and writing a step's rows, saving and loading.

    python tests/benchmarks/bench_memory.py                # log u of both towers, two gloo processes; a minute
    python tests/benchmarks/bench_memory.py --ids 12000000 --ranks 1

Replicated and sharded each run under a torchrun of their own. A read or write is the median of `--repeats`, of the
slowest rank; `copy` is what training waits for when it saves, `save` the files of all ranks with fsync and SHA-256,
`load` what every rank reads of them, from a warm page cache. `peak` is the largest process, imports and mapped files
included. The files, 8 bytes per id, go to a temporary folder; at 100 million ids the processes take 6 GB together.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from output import add_output, peak_bytes, write

MODES = ("replicated", "sharded")
BATCHES = (1024, 8192)  # rows of all ranks


def measure(mode: str, options: argparse.Namespace, folder: Path) -> None:
    """One row of the table, which rank 0 prints as json."""
    from kd_accel import distributed, processes
    from kd_accel.checkpoint import Snapshot, write
    from kd_accel.config import ObjectiveConfig
    from kd_accel.memory_files import load_memory, memory_snapshot
    from kd_accel.objective import Objective
    from kd_accel.schema import validate

    def seconds(call: Callable[[], object]) -> float:
        """Of the slowest rank; all begin together."""
        distributed.barrier()
        began = time.perf_counter()
        call()
        return max(distributed.gather_objects(time.perf_counter() - began))

    processes.start_process_group(timeout_s=600)
    terms = {"gcl": {"kind": "global_contrastive"}}
    objective = Objective(validate(ObjectiveConfig, {"terms": terms, "memory": mode}), num_ids=options.ids)
    memory = objective.recall["gcl"].memory
    row = {"rank_bytes": objective.memory_bytes()}
    for batch in BATCHES:
        seeded = torch.Generator().manual_seed(0)
        reads, writes = [], []
        for _ in range(options.repeats):
            ids = torch.randint(options.ids, (batch,), generator=seeded)
            own = ids.chunk(distributed.world_size())[distributed.rank()]
            values = {name: torch.randn(batch, generator=seeded) for name in memory.columns}
            reads.append(seconds(lambda: memory.read(own)))  # noqa: B023  called at once
            writes.append(seconds(lambda: memory.write(ids, values)))  # noqa: B023
        row |= {f"read_{batch}_seconds": median(reads), f"write_{batch}_seconds": median(writes)}
    taken = []
    row["copy_seconds"] = seconds(lambda: taken.append(memory_snapshot(objective)))
    snapshot = Snapshot(0, taken.pop(), {}, {})
    row["save_seconds"] = seconds(lambda: write(snapshot, folder))
    some = {name: column[ids.remainder(len(column))] for name, column in objective.by_id().items()}
    for column in objective.by_id().values():
        column.zero_()
    row["load_seconds"] = seconds(lambda: load_memory(folder, objective))
    for name, column in objective.by_id().items():
        assert torch.equal(column[ids.remainder(len(column))], some[name]), name
    row["peak_bytes"] = max(distributed.gather_objects(peak_bytes()))
    row["disk_bytes"] = sum(path.stat().st_size for path in folder.rglob("memory_*"))
    if distributed.is_main():
        print(json.dumps(row), flush=True)
    processes.end_process(0)


def _launch(mode: str, options: argparse.Namespace) -> dict:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
    quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        words = [*launcher, __file__, *sys.argv[1:], "--mode", mode, "--folder", folder]
        out = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **quiet})
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ids", type=int, default=100_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--folder", type=Path, help="where the files go; default: the system's temporary folder")
    add_output(parser)
    parser.add_argument("--mode", choices=MODES, help="only this one, as a rank of torchrun; prints json")
    options = parser.parse_args()
    if options.mode:
        measure(options.mode, options, options.folder)
        return
    rows = {mode: _launch(mode, options) for mode in MODES}
    print(f"{options.ids:,} ids, log u of two towers, {options.ranks} processes on CPU")
    columns = {"MB/rank": ("rank_bytes", 1e6), "peak MB": ("peak_bytes", 1e6)}
    columns |= {
        f"{what} {batch} ms": (f"{what}_{batch}_seconds", 1e-3) for batch in BATCHES for what in ("read", "write")
    }
    columns |= {f"{what} s": (f"{what}_seconds", 1) for what in ("copy", "save", "load")}
    columns |= {"disk MB": ("disk_bytes", 1e6)}
    print(f"{'':12}" + "".join(f"{name:>15}" for name in columns))
    for mode, row in rows.items():
        print(f"{mode:12}" + "".join(f"{row[key] / unit:>15.1f}" for key, unit in columns.values()))
    write(options.output, rows)


if __name__ == "__main__":
    main()
