"""tests/benchmarks/bench_gpu.py: how it searches, goes on after a stop, and what its table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
ALLOCATES = "import torch; torch.empty(2**60)"
ALLOCATES_ON_GPU = "import torch; raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')"


@pytest.fixture
def bench_gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import bench_gpu

    return bench_gpu


@pytest.mark.parametrize("limit", [*range(9), 100, 1000, 1023, 1024])
@pytest.mark.parametrize("start", [1, 7, 256])
def test_the_largest_batch_is_found_to_an_eighth(bench_gpu, limit, start):
    tried = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= limit

    found = bench_gpu.largest(fits, start=start, most=1024)
    assert found <= limit
    assert limit - found <= max(0, found // 8)
    assert len(tried) == len(set(tried))
    assert found == 0 or found in tried


def test_no_batch_above_the_largest_one_allowed_is_tried(bench_gpu):
    tried = []
    assert bench_gpu.largest(lambda batch: tried.append(batch) or True, start=64, most=100) == 100
    assert max(tried) == 100
    tried.clear()
    assert bench_gpu.largest(lambda batch: tried.append(batch) or True, start=256, most=100) == 100
    assert tried == [100]


def test_a_process_without_memory_is_told_from_a_mistake(bench_gpu):
    with pytest.raises(bench_gpu.NoMemory):
        bench_gpu.child(["-c", ALLOCATES], device="cpu", seconds=250)
    with pytest.raises(bench_gpu.NoMemory):
        bench_gpu.child(["-c", ALLOCATES_ON_GPU], device="cpu", seconds=250)
    with pytest.raises(RuntimeError, match="^ValueError: of another kind$"):
        bench_gpu.child(["-c", "raise ValueError('of another kind')"], device="cpu", seconds=250)


# A machine that holds these many samples, and does one in a second.
HOLDS = {"live teacher": 300, "stored teacher": 400, "int8 teacher": 150, "compiled": 300, "checkpointing": 1100}
FLOPS = {"live teacher": 3e12, "stored teacher": 1e12, "int8 teacher": 3e12, "compiled": 3e12, "checkpointing": 4e12}
PEAK = 6e12


@pytest.fixture
def machine(bench_gpu, monkeypatch, tmp_path):
    """(run the script with these words, what it measured so far)."""
    measured = []

    def measure(self, change: str, batch: int, seconds: float) -> dict:
        if (change, batch) in machine_fails:
            raise RuntimeError("the driver is gone")
        measured.append((self.folder.name, change, batch))
        if batch > HOLDS[change]:
            raise bench_gpu.NoMemory
        mfu = {"step": FLOPS[change] / PEAK}  # at one sample per second
        timing = {"global_batch": batch, "samples_per_second": 1.0, "seconds": {"student": 3.0, "other": 1.0}}
        return timing | {"mfu": mfu, "peak_flops": PEAK, "peak_memory": batch * 10**9}

    def objective(case: str, rows: int, device: str, seconds: float) -> dict:
        measured.append((rows, case))
        if rows > 1000 and "chunked" not in case.split(", "):
            raise bench_gpu.NoMemory
        return {"peak_bytes": rows * 2**20, "seconds": 0.5}

    machine_fails = set()
    monkeypatch.setattr(bench_gpu.Pair, "measure", measure)
    monkeypatch.setattr(bench_gpu, "objective", objective)
    host = {"device": "a card", "python": "3", "torch": "2", "flops_by_size": {"64": 4e12, "32": 2e12}}
    monkeypatch.setattr(bench_gpu, "in_child", lambda *_: host)
    output = str(tmp_path / "gpu.json")

    def run(*words: str) -> int:
        measured.clear()
        return bench_gpu.main(["--output", output, "--device", "cpu", "--rows", "512", "2048", *words])

    run.measured, run.output, run.fails = measured, Path(output), machine_fails
    return run


def cells(out: str, row: str) -> list[str]:
    line = next(line for line in out.splitlines() if line.startswith(row))
    return line.removeprefix(row).split()


def test_the_table_of_a_machine(machine, capsys):
    assert machine() == 0
    out = capsys.readouterr().out
    assert "matmul ceiling 4.00 TFLOP/s, of 64 x 64" in out
    # from 256: 512 does not fit, 384 not, 320 not, 288 does, and 32 is no more than an eighth of it
    assert cells(out, "L14-B16 live teacher")[:5] == ["288", "1.0", "50.0%", "75.0%", "288.0"]
    assert cells(out, "L14-B16 live teacher")[5:] == ["75.0%", "25.0%"]
    # at most the live teacher's batch: 288 does not fit, 144 does, 216, 180 and 162 do not
    assert cells(out, "B16-B32 int8 teacher")[0] == "144"
    assert cells(out, "B16-B32 stored teacher")[:3] == ["288", "1.0", "16.7%"]
    # from 288, doubled: 576 fits, 1152 does not, 864, 1008 and 1080 do; FLOPs are the live row's, 3 and not 4 of 6
    assert cells(out, "B16-B32 checkpointing")[:3] == ["1080", "1.0", "50.0%"]
    assert "L14-B16 live teacher reached: 50.0%" in out
    assert cells(out, "  clip, chunked") == ["512", "0.500"]
    large = out[out.index("objective 2048") :]
    assert cells(large, "  clip + kl, chunked") == ["2,048", "0.500"]
    assert cells(large, "  open_clip DistillClipLoss") == ["-"]


def test_a_row_that_was_not_begun_is_not_said_to_need_more_memory(machine, capsys):
    machine.fails.add(("stored teacher", 288))
    machine()
    assert "L14-B16 stored teacher   " not in capsys.readouterr().out


def test_a_missed_target_is_named(machine, bench_gpu, monkeypatch, capsys):
    monkeypatch.setitem(FLOPS, "live teacher", 0.44 * PEAK)
    machine("--only", "live")
    assert "L14-B16 live teacher MISSED: 44.0%" in capsys.readouterr().out


def test_what_is_measured_is_not_measured_again(machine, capsys):
    machine("--only", "L14-B16 live", "512")
    assert {case[0] for case in machine.measured} == {"L14-B16", 512}
    first = set(machine.measured)
    machine()
    assert machine.measured
    assert not first & set(machine.measured)
    whole = machine.output.read_text()
    capsys.readouterr()
    machine()
    assert machine.measured == []
    assert machine.output.read_text() == whole


def test_a_run_whose_seconds_are_over_goes_on_in_the_next(machine, bench_gpu, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(bench_gpu.time, "monotonic", lambda: now[0])
    timed = bench_gpu.Pair.measure

    def slow(*arguments):
        now[0] += 60
        return timed(*arguments)

    monkeypatch.setattr(bench_gpu.Pair, "measure", slow)
    # 60 s each: after three, 20 of 200 s are left, and a fourth would not end in them
    assert machine("--seconds", "200") == 1
    assert machine.measured == [("L14-B16", "live teacher", batch) for batch in (256, 512, 384)]
    assert "200 seconds are over" in capsys.readouterr().out
    assert json.loads(machine.output.read_text())["rows"]["L14-B16 live teacher"]["512"] is None
    assert machine("--seconds", "200") == 1
    assert machine.measured[:2] == [("L14-B16", "live teacher", 320), ("L14-B16", "live teacher", 288)]


def test_a_row_that_fails_is_said_and_the_others_are_measured(machine, capsys):
    machine.fails.add(("checkpointing", 288))
    assert machine() == 1
    out = capsys.readouterr().out
    assert "L14-B16 checkpointing: the driver is gone" in out
    assert ("B16-B32", "int8 teacher", 144) in machine.measured
    machine.fails.clear()
    assert machine() == 0
    assert {case[1] for case in machine.measured} == {"checkpointing"}


@pytest.mark.slow
def test_it_runs(bench_gpu, monkeypatch, tmp_path, capsys):
    """Really: tiny towers on the CPU."""
    monkeypatch.setattr(bench_gpu, "OBJECTIVE", ["clip, chunked"])
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parents[1]))
    words = ["--device", "cpu", "--tiny", "--start", "2", "--most", "2", "--warmup", "0", "--measured", "1"]
    words += ["--rows", "64", "--only", "L14-B16 stored", "L14-B16 checkpointing", "objective"]
    assert bench_gpu.main([*words, "--output", str(tmp_path / "gpu.json")]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row: list(measured) for row, measured in rows.items()} == {
        "L14-B16 stored teacher": ["2"],
        "L14-B16 checkpointing": ["2"],
        "objective 64": ["clip, chunked"],
    }
    assert rows["L14-B16 stored teacher"]["2"]["mfu"].keys() == {"student", "step"}
    assert rows["L14-B16 checkpointing"]["2"]["mfu"].keys() == {"student", "teacher", "step"}
    assert cells(capsys.readouterr().out, "L14-B16 stored teacher")[0] == "2"
