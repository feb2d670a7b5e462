"""Memory by sample id on real gloo ranks: sharded says what replicated says, and any number of ranks reads its files.

Run by torchrun, this same file is what each rank does: `test_memory.py FOLDER` checks what the ranks hold, writes the
files of W ranks to FOLDER/W, and with FOLDER/other there reads those. N sample ids, b rows of a rank.
"""

from __future__ import annotations

import sys
from pathlib import Path

import every_term
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from kd_accel import distributed, processes
from kd_accel.memory import SampleMemory, own_ids
from kd_accel.memory_files import load_memory, memory_snapshot
from kd_accel.objective import Objective
from kd_accel.schedules import Progress
from kd_accel.schema import ConfigError

pytestmark = pytest.mark.distributed

COLUMNS = {"log_u": -torch.inf, "alpha": torch.nan, "tau": 0.03}
SPLITS = {2: {7: [4, 3], 1: [1, 0]}, 4: {7: [2, 2, 2, 1], 5: [2, 2, 1, 0]}}  # ranks -> N -> ids of each rank
MODES = ("replicated", "sharded")
TERMS = ["gcl_v2", "prototype", "feature"]  # with log u, temperatures and moments; clusters; confidences


def _objective(mode: str) -> Objective:
    return every_term.objective(TERMS, dtype=torch.float32, memory=mode)


def _filled(mode: str) -> Objective:
    """Every column another one, different at each of the N ids, with an infinity and a nan."""
    objective = _objective(mode)
    own = own_ids(every_term.N, sharded=mode == "sharded")
    for name, column in objective.by_id().items():
        column.copy_(_column(name)[own.start : own.stop])
    return objective


def _column(name: str) -> torch.Tensor:
    """[N]."""
    ids = torch.arange(every_term.N)
    if ".labels." in name:
        return (ids + len(name)).int()
    column = ids + len(name) / 64
    column[[0, -1]] = torch.tensor([-torch.inf, torch.nan])
    return column


def _save(objective: Objective, folder: Path) -> None:
    """What every rank writes of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in memory_snapshot(objective).items():
        save_file(columns, folder / name)
    distributed.barrier()


def _assert_loaded(folder: Path, mode: str) -> None:
    """This rank reads from the files of others what `_filled` makes of its ids."""
    objective = _objective(mode)
    load_memory(folder, objective)
    expected = _filled(mode).by_id()
    assert expected.keys() == objective.by_id().keys()
    for name, column in objective.by_id().items():
        torch.testing.assert_close(column, expected[name], rtol=0, atol=0, equal_nan=True)


# One process ----------------------------------------------------------------------------------------------------------


def test_one_process_holds_all_of_it():
    """Alone there is nobody to share with: sharded and replicated are the same file and the same bytes."""
    replicated, sharded = (_filled(mode) for mode in MODES)
    assert sharded.memory_bytes() == replicated.memory_bytes()
    (one,), (other,) = memory_snapshot(sharded).items(), memory_snapshot(replicated).items()
    assert one[0] == other[0] == "memory_00000_of_00001.safetensors"
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=0, equal_nan=True)


def test_bytes_are_those_of_the_columns():
    """Of gcl_v2 log u, tau, m, v and count of two towers, two clusters, one alpha: 4 bytes each, N times."""
    assert _objective("replicated").memory_bytes() == 4 * (5 * 2 + 2 + 1) * every_term.N


def test_a_snapshot_is_a_copy():
    """It may be written while training goes on."""
    objective = _filled("replicated")
    ((_, columns),) = memory_snapshot(objective).items()
    for column in objective.by_id().values():
        column.zero_()
    assert all(torch.equal(columns[name].nan_to_num(), _column(name).nan_to_num()) for name in objective.by_id())


def test_terms_without_memory_have_no_file(tmp_path):
    objective = every_term.objective(["clip"])
    assert memory_snapshot(objective) == {}
    assert objective.memory_bytes() == 0
    load_memory(tmp_path, objective)


def test_files_that_do_not_fit_are_refused(tmp_path):
    """Missing, of other data, of other terms."""
    _save(_filled("replicated"), tmp_path)
    (path,) = tmp_path.iterdir()
    columns = load_file(path)
    path.rename(tmp_path / "memory_00001_of_00002.safetensors")
    with pytest.raises(FileNotFoundError, match="memory_00000_of_00002.safetensors is missing"):
        load_memory(tmp_path, _objective("replicated"))
    with pytest.raises(FileNotFoundError, match="memory_00000_of_00001.safetensors is missing"):
        load_memory(tmp_path / "empty", _objective("replicated"))
    other = tmp_path / "other" / path.name
    other.parent.mkdir()
    save_file(columns | {"ids": torch.tensor([0, every_term.N + 1, every_term.N + 1])}, other)
    with pytest.raises(ConfigError, match=f"remembers {every_term.N + 1} samples, data.shards has {every_term.N}: "):
        load_memory(other.parent, _objective("replicated"))
    save_file({name: column for name, column in columns.items() if "alpha" not in name}, other)
    with pytest.raises(KeyError, match=r"memory_00000_of_00001.safetensors: confidences\..*\.alpha"):
        load_memory(other.parent, _objective("sharded"))


# Several ranks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """1: what one process writes; 2: what two ranks write that remember a part each."""
    folder = tmp_path_factory.mktemp("files")
    _save(_filled("sharded"), folder / "1")
    return folder


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_ids(world_size, files, run_ranks):
    """What is written, read and refused by the ranks; the checks are those of `_main`."""
    run_ranks([__file__, files], world_size)
    for mode in MODES:
        _assert_loaded(files / f"{world_size} sharded", mode)
        _assert_loaded(files / f"{world_size} replicated", mode)
    names = {path.name for path in (files / f"{world_size} sharded").iterdir()}
    assert names == {f"memory_{rank:05d}_of_{world_size:05d}.safetensors" for rank in range(world_size)}
    assert [path.name for path in (files / f"{world_size} replicated").iterdir()] == list(
        memory_snapshot(_filled("replicated"))
    )


def _check_rows() -> None:
    """Written by all, read by each: sharded as replicated, bit for bit, infinities and nan too, in uneven shards."""
    rank, world_size = distributed.rank(), distributed.world_size()
    for num_ids, expected in SPLITS[world_size].items():
        sharded, whole = (SampleMemory(num_ids, COLUMNS, sharded=choice) for choice in (True, False))
        assert len(sharded.ids) == len(sharded.log_u) == expected[rank]
        assert len(whole.ids) == num_ids
        for step in range(4):
            seeded = torch.Generator().manual_seed(step)
            ids = torch.randint(num_ids, (3 * world_size,), generator=seeded)  # with repetitions
            values = {name: torch.randn(len(ids), generator=seeded) for name in COLUMNS}
            values["log_u"][0], values["alpha"][0] = torch.inf, -torch.inf
            for memory in (sharded, whole):
                memory.write(ids, values)
            asked = torch.randint(num_ids, (3 * world_size,), generator=seeded)[3 * rank :][:3]
            torch.testing.assert_close(sharded.read(asked), whole.read(asked), rtol=0, atol=0, equal_nan=True)


def _check_bad_ids() -> None:
    """The last rank's bad id is refused by every rank, with the same words; afterwards they go on together."""
    for sharded in (True, False):
        memory = SampleMemory(7, COLUMNS, sharded=sharded)
        for outside in (-1, 7):
            is_last = distributed.rank() == distributed.world_size() - 1
            with pytest.raises(ValueError, match=f"sample id {outside} is outside the memory of 7 samples"):
                memory.read(torch.tensor([0, outside if is_last else 1]))
        memory.read(torch.tensor([0, 1]))
    # in a whole objective, where a rank that stopped alone would leave the others waiting in a collective
    for mode in MODES:
        for term in TERMS:
            given = every_term.features()
            given["ids"][-1] = every_term.N
            b = every_term.B // distributed.world_size()
            own = every_term.rows_of(given, slice(distributed.rank() * b, (distributed.rank() + 1) * b))
            with pytest.raises(ValueError, match=f"sample id {every_term.N} is outside the memory"):
                every_term.call(every_term.objective([term], memory=mode), own, Progress())


def _main(folder: Path) -> None:
    dist.init_process_group("gloo")
    _check_rows()
    _check_bad_ids()
    replicated, sharded = (_filled(mode).memory_bytes() for mode in MODES)
    assert sharded * distributed.world_size() == replicated  # N is a multiple of both numbers of ranks
    for mode in MODES:
        _save(_filled(mode), folder / f"{distributed.world_size()} {mode}")
    for written in sorted(folder.iterdir()):  # by one process, by fewer ranks, by as many
        for mode in MODES:
            _assert_loaded(written, mode)
    processes.end_process(0)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
