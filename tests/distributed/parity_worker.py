"""Trains five steps in every cell of test_parity.py's table on the ranks it is launched with; torchrun, or alone.

parity_worker.py FOLDER TEACHER CELLS      writes FOLDER/<cell>-<ranks>.safetensors; CELLS: names of CELLS with commas
"""

import itertools
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tiny
import torch
from accelerate.optimizer import AcceleratedOptimizer
from open_clip.transformer import ResidualAttentionBlock
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

from kd_accel import assembly, distributed, processes
from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.launch import end_accelerator, start_accelerator
from kd_accel.objective import Objective
from kd_accel.optim import build_optimizer
from kd_accel.schedules import Progress
from kd_accel.schema import validate
from kd_accel.types import Batch

STEPS, GLOBAL_BATCH = 5, 16
# A large eps makes Adam's step smooth in the gradient: with a small one, the rounding of a gradient that is nearly zero
# decides the sign of a whole step, and any two orders of summation part ways.
LR, EPS = 0.02, 1e-2
ENGINES = ["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
ACCUMULATE = [1, 4]  # two at a time: the cells called "some", of the fast tests
RANKS = [1, 2, 4]
PRECISIONS = ["fp32", "bf16"]
TERMS = {
    "clip_kd": {
        "clip": {"kind": "clip"},
        "feature": {"kind": "feature_mse", "weight": 20, "confidence": True, "teacher": "first"},
        "kl": {"kind": "logit_kl", "confidence": True, "teacher": "second"},
        "icl": {"kind": "interactive_contrastive", "scale": "own", "teacher": "first"},
    },
    "gcl_kd": {
        "gcl": {"kind": "global_contrastive", "variant": "v3", "gamma": 0.6, "rho": 11.0},
        "tempnet": {
            "kind": "global_contrastive",
            "gamma": 0.6,
            "temperature": "network",
            "network": {"prototypes": 5, "lr": 1e-3},  # its Adam has an eps of 1e-8, see LR
        },
        "kl": {"kind": "logit_kl", "confidence": True, "teacher": "second"},
        "fusion": {"kind": "augmented_feature", "teacher": "first"},
    },
    "image_kd": {  # the text tower and its projector are frozen
        "mse": {"kind": "embedding_mse", "match": {"image": "image"}, "teacher": "first"},
        "cosine": {"kind": "cosine", "match": {"image": "text"}, "teacher": "second"},
    },
}


@dataclass(frozen=True)
class Cell:
    """One combination of the table, but for the number of ranks."""

    engine: str
    accumulate: int
    objective: str
    precision: str

    @property
    def name(self) -> str:
        return f"{self.objective}-{self.engine}-x{self.accumulate}-{self.precision}"

    @property
    def stage(self) -> int:
        return int(self.engine[4]) if self.engine.startswith("zero") else 0


ALL = [Cell(*parts) for parts in itertools.product(ENGINES, ACCUMULATE, TERMS, PRECISIONS)]
CELLS = {
    "reference": [Cell("ddp", 1, objective, "fp32") for objective in TERMS],  # for one process, which has no DDP
    "some": [Cell(*parts, "fp32") for parts in itertools.product([*ENGINES[:4], "fsdp2"], [2], TERMS)],
    **{
        f"{precision}-x{accumulate}": [c for c in ALL if (c.precision, c.accumulate) == (precision, accumulate)]
        for precision, accumulate in itertools.product(PRECISIONS, ACCUMULATE)
    },
}


def config(cell: Cell, teacher: str) -> TrainConfig:
    first = {"path": teacher, "placement": "replicated" if cell.engine in ("zero1", "fsdp2") else "engine"}
    second = {"path": teacher, "placement": "replicated" if cell.engine == "fsdp2" else "engine", "temperature": 0.2}
    return validate(
        TrainConfig,
        {
            "name": "parity",
            "precision": cell.precision,
            "data": {"shards": "none", "global_batch_size": GLOBAL_BATCH},
            "student": {"arch": tiny.arch(22, 7, layers=2), "projector": "linear"},
            "teachers": {"first": first, "second": second},
            "objective": {"terms": TERMS[cell.objective], "chunk_rows": 3},
            "train": {"accumulate": cell.accumulate},
            "optim": {
                "lr": LR,
                "eps": EPS,
                "steps": STEPS,
                "weight_decay": 0.1,
                "layer_decay": 0.5,
                "temperature_lr": 1e-2,
            },
        },
    )


def batches_of_rank(step: int, accumulate: int) -> list[Batch]:
    """This rank's micro-batches of a global batch that is the same in every cell."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (GLOBAL_BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, 49408, (GLOBAL_BATCH, 12), generator=generator)
    b = GLOBAL_BATCH // distributed.world_size() // accumulate
    starts = [(distributed.rank() * accumulate + k) * b for k in range(accumulate)]
    parts = [slice(start, start + b) for start in starts]
    names = ("student", "first", "second")
    return [Batch(torch.arange(GLOBAL_BATCH)[p], image[p], dict.fromkeys(names, text[p])) for p in parts]


class Fsdp2OnCpu:
    """What Accelerate prepares for FSDP2 on GPUs; on a CPU it would prepare DDP."""

    is_fsdp2, deepspeed_plugin = True, None

    def __init__(self, accelerator):
        self.device = accelerator.device

    def prepare(self, pair: nn.Module, optimizer: torch.optim.Optimizer):
        names = {p: name for name, p in pair.named_parameters()}
        members = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
        for block in [module for module in pair.modules() if isinstance(module, ResidualAttentionBlock)]:
            fully_shard(block)
        fully_shard(pair)
        sharded = dict(pair.named_parameters())
        for group, held in zip(optimizer.param_groups, members, strict=True):
            group["params"] = [sharded[name] for name in held]
        return pair, AcceleratedOptimizer(optimizer)


def gradients(engine: Engine) -> dict:
    """Every gradient whole, as the optimizer is about to see it (before clipping)."""
    from deepspeed.utils import safe_get_full_grad

    full = safe_get_full_grad if engine.zero_stage else lambda parameter: distributed.whole(parameter.grad)
    trained = [(name, p) for name, p in engine.student.named_parameters() if p.requires_grad]
    return {name: full(p).detach().float().cpu().clone() for name, p in trained}


def start(cell: Cell, teacher: str) -> tuple[TrainConfig, Engine, Objective]:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if cell.stage else "false"
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(cell.stage)
    offload = cell.engine.endswith("offload")
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE"] = "cpu" if offload else "none"
    os.environ["ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"] = "cpu" if offload and cell.stage == 3 else "none"
    wanted = config(cell, teacher)
    b = GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1")) // cell.accumulate
    accelerator = start_accelerator(
        precision=cell.precision,
        batch_size=b,
        grad_clip_norm=wanted.optim.grad_clip_norm,
        accumulate=cell.accumulate,
    )
    if cell.engine == "fsdp2":
        accelerator = Fsdp2OnCpu(accelerator)
    torch.manual_seed(1)
    teachers = assembly.build_teachers(wanted)
    student = assembly.build_student(wanted, teachers)
    wanted = assembly.fit_models(wanted, student, teachers)
    specs = {name: teacher.spec for name, teacher in teachers.items()}
    objective = Objective(wanted.objective, teachers=specs, widths=student.widths, num_ids=GLOBAL_BATCH)
    engine = Engine(accelerator, student, teachers, optimizer=build_optimizer(student, wanted.optim), config=wanted)
    engine.module.train()
    return wanted, engine, objective


def train(cell: Cell, teacher: str) -> dict:
    """Five steps; losses, the first step's gradients, the last parameters and memory."""
    wanted, engine, objective = start(cell, teacher)
    result = {}
    for step in range(STEPS):
        batches = batches_of_rank(step, cell.accumulate)
        features, targets = engine.forward(batches)
        progress, ids = Progress(step, epoch=float(step)), torch.cat([batch.ids for batch in batches])
        outcome = objective(features, targets, progress, ids=ids)
        engine.backward(outcome.gradients)
        if step == 0:
            result |= {f"gradient.{key}": value for key, value in gradients(engine).items()}
            own = {key: p.grad for key, p in objective.named_parameters() if p.grad is not None}
            result |= {f"gradient.objective.{key}": gradient.clone() for key, gradient in own.items()}
        applied, grad_norm = engine.step(wanted.optim.lr)
        assert applied
        objective.step(progress, lr=wanted.optim.lr, temperature_lr=wanted.optim.temperature_lr)
        result |= {f"loss.{step}": outcome.loss.clone(), f"grad_norm.{step}": torch.tensor(grad_norm)}
    result |= {f"parameter.{key}": value for key, value in engine.masters.weights().items()}
    result |= {
        f"parameter.objective.{key}": value for key, value in (objective.state_dict() | objective.by_id()).items()
    }
    end_accelerator()
    return {key: value.detach().float().contiguous() for key, value in result.items()}


def main() -> None:
    folder, teacher, cells = sys.argv[1:]
    for cell in itertools.chain.from_iterable(CELLS[name] for name in cells.split(",")):
        result = train(cell, teacher)
        if distributed.is_main():
            save_file(result, Path(folder) / f"{cell.name}-{distributed.world_size()}.safetensors")
    processes.end_process(0)


if __name__ == "__main__":
    main()
