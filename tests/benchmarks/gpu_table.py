"""The figures of bench_gpu.py as a table: python tests/benchmarks/gpu_table.py gpu.json

`MFU` is of student and teacher in the whole step, against the data sheet of the device, without FLOPs that are computed
again because of checkpointing. `of ceiling` is the same against the best square product of that machine. The columns at
the right are shares of the step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from kd_accel.timing import OTHER, SPANS

TARGET = 0.45  # MFU of student and live teacher

Timings = dict[str, dict | None]  # by batch, in digits; None: no memory


def best(timings: Timings) -> dict | None:
    """Of the largest batch that fits."""
    return max((timing for timing in timings.values() if timing), key=lambda t: t["global_batch"], default=None)


def flops_per_sample(timing: dict) -> float:
    """As `bench` counts them: with what is computed a second time."""
    return timing["mfu"]["step"] * timing["peak_flops"] / timing["samples_per_second"]


def mfu(timing: dict, live: dict | None) -> float:
    """Of the step. `live`: the same models and no checkpointing, where there is such a row."""
    flops = min(flops_per_sample(row) for row in (timing, live) if row)
    return flops * timing["samples_per_second"] / timing["peak_flops"]


def table(found: dict, live: str) -> str:
    """`live`: what the rows of a live teacher end with."""
    host, rows = found["machine"], found["rows"]
    size, ceiling = max(host["flops_by_size"].items(), key=lambda product: product[1])
    steps = {row: measured for row, measured in rows.items() if not row.startswith("objective")}
    chosen = {row: best(timings) for row, timings in steps.items()}
    spans = [name for name in (*SPANS, OTHER) if any(name in timing["seconds"] for timing in chosen.values() if timing)]
    lines = [
        f"{host['device']}, Python {host['python']}, torch {host['torch']};"
        f" matmul ceiling {ceiling / 1e12:.2f} TFLOP/s, of {size} x {size}",
        f"{'':24} {'batch':>6} {'samples/s':>9} {'MFU':>6} {'of ceiling':>10} {'GB':>6} "
        + " ".join(f"{name:>9}" for name in spans),
    ]
    reached = {}
    for row, timing in chosen.items():
        if timing is None:
            lines.append(f"{row:24} {'-':>6}")
            continue
        reached[row] = mfu(timing, chosen.get(f"{row.split()[0]} {live}"))
        lines.append(f"{row:24} {_cells(timing, reached[row], ceiling)} {_shares(timing, spans)}")
    for row, share in reached.items():
        if row.endswith(live):
            verdict = "reached" if share >= TARGET else "MISSED"
            lines.append(f"target: MFU >= {TARGET:.0%} of student and teacher; {row} {verdict}: {share:.1%}")
    return "\n".join([*lines, *_objective(rows)])


def _cells(timing: dict, share: float, ceiling: float) -> str:
    batch, speed, memory = timing["global_batch"], timing["samples_per_second"], timing["peak_memory"]
    of_ceiling = share * timing["peak_flops"] / ceiling
    return f"{batch:>6} {speed:>9,.1f} {share:>6.1%} {of_ceiling:>10.1%} {memory / 1e9:>6.1f}"


def _shares(timing: dict, spans: list[str]) -> str:
    whole = sum(timing["seconds"].values())
    return " ".join(f"{timing['seconds'].get(name, 0) / whole:>9.1%}" for name in spans)


def _objective(rows: dict[str, dict]) -> list[str]:
    lines = []
    for row, cases in rows.items():
        if row.startswith("objective"):
            lines.append(f"{row:34} {'peak MiB':>10} {'seconds':>9}")
            for case, one in cases.items():
                numbers = f"{one['peak_bytes'] / 2**20:>10,.0f} {one['seconds']:>9.3f}" if one else f"{'-':>10}"
                lines.append(f"  {case:32} {numbers}")
    return lines


if __name__ == "__main__":
    print(table(json.loads(Path(sys.argv[1]).read_text()), "live teacher"))
