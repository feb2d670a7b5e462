"""Peak memory and time of the objective: chunked, unchunked, and open_clip's losses on the same features.

    python tests/benchmarks/bench_objective.py             # B = 8192, d = 512, fp32: minutes on two cores
    python tests/benchmarks/bench_objective.py --rows 2048 --device cuda

Every case runs in a process of its own: forward and backward once to warm up on few rows, then `--repeats` times. The
peak is what the process (or the GPU) holds at most above what it held with the inputs made. Ratios are of one run on
one machine; the best time of the repeats counts, because the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

TERMS = {
    "clip": {"kind": "clip"},
    "kl": {"kind": "logit_kl"},
    "icl": {"kind": "interactive_contrastive"},
    "gcl": {"kind": "global_contrastive"},
}
TEACHER_SCALE = 100.0
# case -> (terms, chunked); "open_clip" cases are the module of that name
CASES = {
    "all four, chunked": (list(TERMS), True),
    "all four, unchunked": (list(TERMS), False),
    "clip, chunked": (["clip"], True),
    "clip, unchunked": (["clip"], False),
    "open_clip ClipLoss": "ClipLoss",
    "clip + kl, chunked": (["clip", "kl"], True),
    "clip + kl, unchunked": (["clip", "kl"], False),
    "open_clip DistillClipLoss": "DistillClipLoss",
}


def build(case: str, options: argparse.Namespace) -> Callable[[dict, dict], None]:
    """A function of (student, teacher) that runs one forward and backward."""
    if isinstance(CASES[case], str):
        return _open_clip(CASES[case], options.device)
    from kd_accel.config import ObjectiveConfig
    from kd_accel.objective import Objective
    from kd_accel.schedules import Progress
    from kd_accel.schema import validate
    from kd_accel.types import TeacherSpec

    names, chunked = CASES[case]
    values = {"terms": {name: TERMS[name] for name in names}, "chunk_rows": options.chunk if chunked else options.rows}
    teachers = {"teacher": TeacherSpec(embed_dim=options.width, logit_scale=TEACHER_SCALE)}
    uses_teacher = set(names) & {"kl", "icl"}
    objective = Objective(
        validate(ObjectiveConfig, values),
        teachers=teachers if uses_teacher else {},
        widths={"image": options.width, "text": options.width},
        num_ids=options.rows,
    ).to(options.device)

    def run(student: dict, teacher: dict) -> None:
        ids = torch.arange(len(student["image"]), device=options.device)
        given = {"teacher": teacher} if uses_teacher else {}
        objective(student, given, Progress(), ids=ids)

    return run


def _open_clip(module: str, device: str) -> Callable[[dict, dict], None]:
    import open_clip

    loss = getattr(open_clip.loss, module)()
    log_scale = torch.tensor(1 / 0.07, device=device).log().requires_grad_()

    def run(student: dict, teacher: dict) -> None:
        raw = [features.detach().requires_grad_() for features in student.values()]
        unit = [F.normalize(features, dim=1) for features in raw]
        arguments = [*unit, log_scale.exp()]
        if module == "DistillClipLoss":
            arguments += [F.normalize(features, dim=1) for features in teacher.values()]
            arguments.append(torch.tensor(TEACHER_SCALE, device=device))
        losses = loss(*arguments)
        (sum(losses) if isinstance(losses, tuple) else losses).backward()

    return run


def measure(case: str, options: argparse.Namespace) -> dict:
    """{case, peak_bytes, seconds} in this process."""
    torch.manual_seed(0)
    run = build(case, options)
    sides = [
        {name: torch.randn(options.rows, options.width, device=options.device) for name in ("image", "text")}
        for _ in range(2)
    ]
    run(*({name: features[:64] for name, features in side.items()} for side in sides))
    memory, seconds = _Peak(options.device), []
    for _ in range(options.repeats):
        start = time.perf_counter()
        run(*sides)
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"case": case, "peak_bytes": memory.above_start(), "seconds": min(seconds)}


class _Peak:
    """Bytes held at most since this was made, above what was held then."""

    def __init__(self, device: str):
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is the present use again
            self.start = _status("VmRSS")

    def above_start(self) -> int:
        peak = torch.cuda.max_memory_allocated() if self.device == "cuda" else _status("VmHWM")
        return peak - self.start


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", choices=CASES, help="only this one, in this process; prints json")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options)))
        return
    print(f"B = {options.rows}, d = {options.width}, fp32, chunks of {options.chunk} rows, {options.device}")
    print(f"{'case':28} {'peak MiB':>10} {'seconds':>9}")
    rows = {}
    for case in CASES:
        out = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--case", case], check=True, capture_output=True)
        rows[case] = row = json.loads(out.stdout.splitlines()[-1])
        print(f"{case:28} {row['peak_bytes'] / 2**20:>10.0f} {row['seconds']:>9.2f}", flush=True)
    chunked, whole = rows["all four, chunked"], rows["all four, unchunked"]
    print(f"all four, chunked / unchunked: {chunked['peak_bytes'] / whole['peak_bytes']:.3f} of the memory,", end=" ")
    print(f"{chunked['seconds'] / whole['seconds']:.2f} of the time")
    print(json.dumps(list(rows.values())))


if __name__ == "__main__":
    main()
