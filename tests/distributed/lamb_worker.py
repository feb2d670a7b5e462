"""Trains some LAMB steps under an engine and saves weights and moments for test_lamb.py; run under torchrun, or alone.

lamb_worker.py FOLDER OUT,ENGINE,FIRST,LAST[,STATE] ...        files of FOLDER: OUT.safetensors, STATE.safetensors

ENGINE: plain | ddp | fsdp2 | zero1 | zero2 | zero3 | zero3_offload

Takes the steps FIRST <= step < LAST, from the state that another call saved when one is given.
"""

import json
import os
import sys
from pathlib import Path

import tiny
import torch
from distributed.parity_worker import Fsdp2OnCpu
from optimizer_state import optimizer_state
from safetensors.torch import load_file, save_file

from kd_accel import distributed, processes
from kd_accel.config import TrainConfig
from kd_accel.engine import Engine
from kd_accel.lamb import pieces_of
from kd_accel.launch import end_accelerator, start_accelerator
from kd_accel.masters import OptimizerState
from kd_accel.models.student import Student
from kd_accel.optim import build_optimizer
from kd_accel.schema import validate
from kd_accel.types import Batch

ROWS = 8  # of all ranks
SUB_GROUP = 2000  # elements: small enough for ZeRO-3 to step each group in several parts
ARCH = tiny.arch(21, 7, head_width=7)  # odd sizes, which two ranks cannot share without padding
ARCH["text_cfg"]["heads"] = 3
VOCABULARY = (
    499  # with CLIP's 49408, torch's fp32 norm on CPU is itself off by 1e-5, and differently so over two halves
)


def config() -> TrainConfig:
    return validate(
        TrainConfig,
        {
            "name": "lamb",
            "precision": "fp32",
            "data": {"shards": "none", "batch_size": ROWS},
            "student": {"arch": ARCH},
            "objective": {"terms": {"clip": {"kind": "clip"}}},
            # A step changes every matrix by lr of its norm: 1% leaves the rounding of one step small in the next.
            # eps: as in parity_worker.py, a large one keeps the rounding of tiny gradients from deciding signs.
            "optim": {
                "lr": 1e-2,
                "eps": 1e-2,
                "steps": 9,
                "weight_decay": 0.1,
                "layer_decay": 0.5,
                "optimizer": "lamb",
            },
        },
    )


def start(name: str, folder: Path) -> Engine:
    stage = int(name[4]) if name.startswith("zero") else 0
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true" if stage else "false"
    if stage:
        settings = folder / f"{name}.{os.environ['RANK']}.json"
        zero = {"stage": stage, "sub_group_size": SUB_GROUP}
        zero |= {"offload_optimizer": {"device": "cpu"}} if name.endswith("offload") else {}
        settings.write_text(json.dumps({"zero_optimization": zero}))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(settings)
    wanted = config()
    b = ROWS // int(os.environ.get("WORLD_SIZE", "1"))
    accelerator = start_accelerator(precision="fp32", batch_size=b, grad_clip_norm=wanted.optim.grad_clip_norm)
    if name == "fsdp2":
        accelerator = Fsdp2OnCpu(accelerator)
    torch.manual_seed(1)
    student = Student(wanted.student, {})
    student.clip.token_embedding = torch.nn.Embedding(VOCABULARY, ARCH["text_cfg"]["width"])
    sizes = [p.numel() for p in student.parameters()]
    engine = Engine(accelerator, student, {}, optimizer=build_optimizer(student, wanted.optim), config=wanted)
    if stage:
        check_pieces(engine, sizes)
    return engine


def check_pieces(engine: Engine, sizes: list[int]) -> None:
    """Over all ranks the slices hold every element once, and what they leave out is padding."""
    pieces = pieces_of(engine.module.optimizer, engine.zero_stage)
    assert {id(flat) for flat in pieces} == {id(flat) for flat in engine.masters._held_parameters()}
    here = torch.tensor([part.stop - part.start for parts in pieces.values() for part in parts])
    flat = torch.tensor(sum(flat.numel() for flat in pieces))
    everywhere, flats = distributed.sum_over_ranks([here, flat])
    assert sorted(everywhere.tolist()) == sorted(sizes)
    assert (here < everywhere).any(), "no parameter is cut: this student cannot tell whole norms from those of pieces"
    if engine.zero_stage == 3:
        assert flats > sum(sizes), "no partition is padded: this student cannot tell whether padding is in a norm"
        assert len(pieces) > len(engine.optimizer.param_groups), "SUB_GROUP is too large to cut a group"


def batch(step: int) -> Batch:
    """This rank's rows of the global batch of a step."""
    generator = torch.Generator().manual_seed(step)
    image = torch.randint(0, 256, (ROWS, 3, 32, 32), dtype=torch.uint8, generator=generator)
    text = torch.randint(1, VOCABULARY, (ROWS, 12), generator=generator)
    mine = torch.arange(ROWS).chunk(distributed.world_size())[distributed.rank()]
    return Batch(mine, image[mine], {"student": text[mine]})


def train(engine: Engine, first: int, last: int) -> None:
    """Pull every feature towards 0.1: a loss of single rows, whose mean over ROWS has these gradients."""
    engine.module.train()
    for step in range(first, last):
        features, _ = engine.forward([batch(step)])
        engine.backward({name: (f.detach() - 0.1) / ROWS for name, f in features.items()})
        applied, _ = engine.step(config().optim.lr)
        assert applied


def load(engine: Engine, path: Path) -> None:
    saved: dict[str, dict] = {"weight": {}, "exp_avg": {}, "exp_avg_sq": {}}
    tensors = load_file(path)
    step = int(tensors.pop("step"))
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        saved[kind][name] = tensor
    engine.masters.load_weights(saved.pop("weight"))
    engine.masters.load_optimizer_state(OptimizerState(step=step, moments=saved))


def save(engine: Engine, path: Path) -> None:
    memory = optimizer_state(engine)
    named = {f"weight.{name}": value for name, value in engine.masters.weights().items()}
    named |= {f"{kind}.{name}": value for kind, moments in memory.moments.items() for name, value in moments.items()}
    if distributed.is_main():
        save_file({key: value.contiguous() for key, value in named.items()} | {"step": torch.tensor(memory.step)}, path)


def run(folder: Path, out: str, name: str, first: str, last: str, *state: str) -> None:
    engine = start(name, folder)
    for before in state:
        load(engine, folder / f"{before}.safetensors")
    train(engine, int(first), int(last))
    save(engine, folder / f"{out}.safetensors")
    end_accelerator()


def main() -> None:
    folder, *jobs = sys.argv[1:]
    for job in jobs:
        print(job, flush=True)
        run(Path(folder), *job.split(","))
    processes.end_process(0)


if __name__ == "__main__":
    main()
