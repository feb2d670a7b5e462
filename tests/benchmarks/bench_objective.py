"""Peak memory and time of the objective by global batch: chunked, unchunked, and open_clip's losses beside them.

    python tests/benchmarks/bench_objective.py             # B = 2048 to 16384, d = 512, fp32: minutes on one core
    python tests/benchmarks/bench_objective.py --rows 16384 65536 --limit-gib 100 --device cuda

Forward and backward, every case in a process of its own. The peak is what it (or the GPU) holds at most above what it
held with the inputs made. The best time counts, of `--repeats` at the smallest B and of fewer at the others; on a CPU
it is the processor time of one thread, which other programs on the machine hardly change. What compares all with all
at once has as many B x B matrices at its peak as CASES says; where they take more than `--limit-gib` it is left out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import open_clip
import torch
import torch.nn.functional as F
from output import Peak, add_device, add_output, write

from kd_accel.config import ObjectiveConfig
from kd_accel.objective import Objective
from kd_accel.schedules import Progress
from kd_accel.schema import validate
from kd_accel.types import TeacherSpec

TERMS = {
    "clip": {"kind": "clip"},
    "kl": {"kind": "logit_kl"},
    "icl": {"kind": "interactive_contrastive"},
    "gcl": {"kind": "global_contrastive"},
}
TEACHER_SCALE = 100.0
CLIP_LOSS, DISTILL_CLIP_LOSS = "open_clip ClipLoss", "open_clip DistillClipLoss"
# case -> (terms, or a module of open_clip; B x B matrices at its peak, measured at B = 4096; None: in chunks)
CASES = {
    "all four, chunked": (list(TERMS), None),
    "all four, unchunked": (list(TERMS), 20),
    "clip, chunked": (["clip"], None),
    "clip, unchunked": (["clip"], 8),
    CLIP_LOSS: ("ClipLoss", 6),
    "clip + kl, chunked": (["clip", "kl"], None),
    "clip + kl, unchunked": (["clip", "kl"], 17),
    DISTILL_CLIP_LOSS: ("DistillClipLoss", 14),
}
PLAIN = {case: DISTILL_CLIP_LOSS if "kl" in case else CLIP_LOSS for case in CASES if case.startswith("clip")}


def build(case: str, options: argparse.Namespace) -> Callable[[dict, dict], None]:
    """A function of (student, teacher) that runs one forward and backward."""
    names, matrices = CASES[case]
    if isinstance(names, str):
        return _open_clip(names, options.device)
    chunk_rows = options.chunk if matrices is None else options.rows
    values = {"terms": {name: TERMS[name] for name in names}, "chunk_rows": chunk_rows}
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


def inputs(options: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Features of student and teacher."""
    torch.manual_seed(0)
    shape = options.rows, options.width
    return [{name: torch.randn(shape, device=options.device) for name in ("image", "text")} for _ in range(2)]


def seconds(run: Callable[[dict, dict], None], sides: list[dict], device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    began = clock()
    run(*sides)
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def measure(case: str, options: argparse.Namespace) -> dict:
    """{peak_bytes, seconds} in this process, after a warm-up on few rows."""
    run, sides = build(case, options), inputs(options)
    run(*({name: features[:64] for name, features in side.items()} for side in sides))
    peak = Peak(options.device)
    best = min(seconds(run, sides, options.device) for _ in range(options.repeats))
    return {"peak_bytes": peak.above(), "seconds": best}


def fitting(rows: int, options: argparse.Namespace) -> list[str]:
    """Cases whose B x B matrices of fp32 do not take more than the limit."""
    return [case for case, (_, matrices) in CASES.items() if (matrices or 0) * 4 * rows**2 <= options.limit_gib * 2**30]


def apart(function: Callable, *arguments, device: str):
    """Its value, on a CPU from a process that starts as this one did: with nothing kept from earlier cases."""
    if device == "cuda":
        return function(*arguments)
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(function, *arguments).result()


def table(options: argparse.Namespace) -> dict[str, dict]:
    """rows -> case -> figures; printed as they come."""
    print(f"{'B':>6} {'case':28} {'peak MiB':>9} {'of B / 2':>9} {'seconds':>9} {'of plain':>9}")
    found: dict[str, dict] = {}
    for rows in options.rows:
        here = argparse.Namespace(**vars(options) | {"rows": rows})
        here.repeats = max(1, options.repeats * min(options.rows) // rows)
        cases = {case: apart(measure, case, here, device=options.device) for case in fitting(rows, options)}
        found[str(rows)] = cases
        for case, figures in cases.items():
            if PLAIN.get(case) in cases:
                figures["speedup"] = cases[PLAIN[case]]["seconds"] / figures["seconds"]
            print(_line(rows, case, figures, found.get(str(rows // 2), {}).get(case)), flush=True)
        if left_out := CASES.keys() - cases.keys():
            print(f"{rows:>6} more than {options.limit_gib} GiB: {', '.join(sorted(left_out))}")
    return found


def _line(rows: int, case: str, figures: dict, half: dict | None) -> str:
    growth = f"{figures['peak_bytes'] / half['peak_bytes']:.2f}" if half else ""
    ratio = f"{1 / figures['speedup']:.2f}" if "speedup" in figures else ""
    mib = figures["peak_bytes"] / 2**20
    return f"{rows:>6} {case:28} {mib:>9.0f} {growth:>9} {figures['seconds']:>9.3f} {ratio:>9}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="global batches")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--limit-gib", type=float, default=6)
    add_device(parser)
    add_output(parser)
    parser.add_argument("--case", choices=CASES, help="only this one, in this process; prints json")
    options = parser.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    if options.case:
        (options.rows,) = options.rows
        print(json.dumps(measure(options.case, options)))
        return
    print(f"d = {options.width}, fp32, chunks of {options.chunk} rows, {options.device}")
    write(options.output, table(options))


if __name__ == "__main__":
    main()
