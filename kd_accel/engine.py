"""Accelerate and DeepSpeed behind three verbs: forward, backward, step; masters.py has the state that they change.

The rest of kd_accel never asks which engine runs: one process, DDP, ZeRO 1, 2, 3, or FSDP2, as launch.py found it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from kd_accel import distributed
from kd_accel.config import TrainConfig, teachers_of
from kd_accel.lamb import pieces_of
from kd_accel.launch import fit_bucket
from kd_accel.masters import Masters, frozen_weights
from kd_accel.models.compiled import check_compiler, compile_blocks
from kd_accel.models.image import images_at_once
from kd_accel.models.pair import Pair
from kd_accel.models.running_stats import allow_bf16_weights, running_statistics
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.random_state import RandomState
from kd_accel.replay import check_same, unchanged_buffers
from kd_accel.schema import ConfigError
from kd_accel.stored_teacher import StoredTeacher
from kd_accel.timing import span
from kd_accel.types import Batch

K = TypeVar("K")
Rows = dict[str, Tensor]  # features by name, [b, d] each


class Engine:
    """The prepared student, with its teacher and its optimizer."""

    def __init__(
        self,
        accelerator,
        student: Student,
        teachers: dict[str, Teacher | StoredTeacher],
        *,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
    ):
        """Prepare student and optimizer, and with them every teacher whose placement is `engine`.

        Raises ConfigError for a teacher or a student that the engine cannot hold.
        """
        self.accelerator = accelerator
        self.grad_clip_norm = config.optim.grad_clip_norm
        self.zero_stage = accelerator.deepspeed_plugin.zero_stage if accelerator.deepspeed_plugin else 0
        self.is_fsdp = accelerator.is_fsdp2
        self._check_asked(student, config)
        self.student = student
        live = {name: teacher for name, teacher in teachers.items() if isinstance(teacher, Teacher)}
        inside = {name for name, section in teachers_of(config).items() if section.placement == "engine"}
        self._prepare_teachers(live, inside, config)
        models = {"student": student, **live} if config.train.compile else {}
        self.compiled = self._compile(models)  # how many blocks, by model
        self.replicated = {n: t.to(accelerator.device) for n, t in live.items() if n not in inside}
        pair = Pair(student, {name: teacher for name, teacher in live.items() if name in inside})
        _check_coverage(pair, optimizer)
        frozen = frozen_weights(student, dict(student.named_parameters()))
        # DeepSpeed makes its fp32 masters from the weights after their rounding to bf16: keep the exact ones for them.
        rounds = self.zero_stage and config.precision == "bf16"
        exact = {name: p.detach().clone() for name, p in student.named_parameters()} if rounds else {}
        if self.zero_stage:
            fit_bucket(accelerator, sum(p.numel() for p in student.parameters() if p.requires_grad))
        self.module, self.optimizer = accelerator.prepare(pair, optimizer)
        self._check_engine()
        if self.zero_stage and config.optim.optimizer == "lamb":
            zero = self.module.optimizer
            zero.optimizer.attach(pieces_of(zero, self.zero_stage), device=accelerator.device)
        self.masters = Masters(student, self.module, self.optimizer, zero_stage=self.zero_stage, frozen=frozen)
        if rounds:
            allow_bf16_weights(student)
            self.masters.load_weights(exact)
        self._graph: Rows | None = None  # the student's features, where one pass is enough
        self._looked_at: list[tuple[Batch, RandomState]] = []  # what is to be run again
        self._features: Rows = {}  # what the student said of it
        self._statistics: list[tuple[Tensor, Tensor]] = []  # running statistics, and what they were before
        self._replay_is_checked = False

    def forward(self, batches: list[Batch]) -> tuple[Rows, dict[str, Rows]]:
        """(student's, every teacher's by name) raw features of this rank's rows, all micro-batches in turn.

        A single micro-batch keeps its graph for `backward`. Of several only the features stay, and `backward` runs the
        student on each once more: gradients are those of one large batch, memory is that of a micro-batch.
        """
        self._graph, self._looked_at, self._features = None, [], {}
        self._statistics = [(tensor, tensor.clone()) for tensor in running_statistics(self.student).values()]
        if len(batches) == 1:
            self._graph, teachers = self._run(batches[0])
            return self._graph, teachers
        said = []
        with torch.no_grad(), unchanged_buffers(self.student):
            for batch in batches:
                self._looked_at.append((batch, RandomState()))
                said.append(self._run(batch))
        self._features = concatenated([student for student, _ in said])
        return self._features, {name: concatenated([teachers[name] for _, teachers in said]) for name in said[0][1]}

    def backward(self, gradients: Rows) -> None:
        """Send the gradients of the features that `forward` returned into the student."""
        if self._graph is not None:
            self._send(self._graph, gradients)
            self._graph = None
            return
        start = 0
        for batch, random_state in self._looked_at:
            rows = slice(start, start := start + len(batch.ids))
            random_state.restore()
            with self._accumulating(last=batch is self._looked_at[-1][0]):
                features = self._again(batch)
                if not self._replay_is_checked:
                    check_same({name: first[rows] for name, first in self._features.items()}, features)
                    self._replay_is_checked = True
                self._send(features, {name: gradient[rows] for name, gradient in gradients.items()})
        self._looked_at, self._features = [], {}

    def step(self, lr: float) -> tuple[bool, float]:
        """Clip, take the step at `lr`, clear the gradients. Returns (applied, gradient norm before clipping).

        A step with a non-finite gradient is not applied, on any rank.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        applied, norm = self._take_step()
        if not applied:
            self.undo_statistics()
        return applied, norm

    def undo_statistics(self) -> None:
        """Running statistics as before `forward`, whose step is not taken: a nan would stay in them for good."""
        for tensor, before in self._statistics:
            tensor.copy_(before)

    def _take_step(self) -> tuple[bool, float]:
        if self.zero_stage:
            self.module.step()
            return self.module.was_step_applied(), float(self.module.get_global_grad_norm())
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.grad_clip_norm or float("inf"))
        norm = distributed.whole(norm)
        applied = bool(torch.isfinite(norm))
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return applied, float(norm)

    def _run(self, batch: Batch) -> tuple[Rows, dict[str, Rows]]:
        with span("transfer"):
            batch = batch.to(self.accelerator.device)
        said = self.module(batch.image, batch.text)
        student = said.pop("student")
        with span("teacher"):
            said |= {name: teacher(batch.image, batch.text.get(name)) for name, teacher in self.replicated.items()}
        return student, {name: said.get(name, {}) | batch.stored.get(name, {}) for name in said | batch.stored}

    def _again(self, batch: Batch) -> Rows:
        """The student alone: the teachers' features are known from the first pass."""
        with span("transfer"):
            batch = batch.to(self.accelerator.device)
        return self.module(batch.image, batch.text, teachers=False)["student"]

    def _send(self, features: Rows, gradients: Rows) -> None:
        """DDP and DeepSpeed average over ranks, the gradients are those of the global mean: hence world_size."""
        surrogate = sum((features[name].float() * gradients[name]).sum() for name in gradients)
        surrogate = surrogate * distributed.world_size()
        self.module.backward(surrogate) if self.zero_stage else surrogate.backward()

    def _accumulating(self, *, last: bool) -> AbstractContextManager:
        """Gradients add up; ranks exchange them after the last one (ZeRO-2 and 3, which keep parts, each time)."""
        if self.zero_stage:
            self.module.set_gradient_accumulation_boundary(last)
        elif self.is_fsdp:
            self.module.set_requires_gradient_sync(last)
        elif distributed.world_size() > 1 and not last:
            return self.module.no_sync()
        return nullcontext()

    def _compile(self, models: dict[str, nn.Module]) -> dict[str, int]:
        if not models:
            return {}
        with distributed.failing_together():
            check_compiler(self.accelerator.device)
        blocks = {name: compile_blocks(model) for name, model in models.items()}
        if self.zero_stage == 3:
            from deepspeed.utils import set_z3_leaf_module

            for block in sum(blocks.values(), []):
                set_z3_leaf_module(block, True)  # all its weights are gathered before its graph, none inside
        return {name: len(found) for name, found in blocks.items()}

    def _prepare_teachers(self, live: dict[str, Teacher], inside: set[str], config: TrainConfig) -> None:
        """In their precision, and with as many images at a time as the device likes, before anything wraps them."""
        gathered = inside if self.zero_stage == 3 else set()  # by every call, so one a step is enough
        for name, teacher in live.items():
            if config.precision == "bf16":
                teacher.to(torch.bfloat16)  # frozen: no master weights to keep
            if name not in gathered:
                teacher.images_at_once = images_at_once(self.accelerator.device)

    def _check_asked(self, student: Student, config: TrainConfig) -> None:
        """What this engine cannot hold. Raises ConfigError."""
        if self.is_fsdp and any(section.placement == "engine" for section in teachers_of(config).values()):
            raise ConfigError(
                "FSDP2 shards weights of one dtype, and a frozen teacher has another: set teacher.placement=replicated"
            )
        if student.int8 == "torchao" and (self.zero_stage == 3 or self.is_fsdp):
            raise ConfigError(
                "compress.int8=torchao computes with a traced graph, for which ZeRO-3 and FSDP2 do not gather weights:"
                " launch with ZeRO-2 or DDP, or set compress.int8=modelopt"
            )

    def _check_engine(self) -> None:
        """What was prepared is what was asked for."""
        kind = type(self.module).__name__
        if self.zero_stage:
            wanted = "DeepSpeedEngine"
        elif self.is_fsdp:
            wanted = "FSDPPair"
        else:
            wanted = "DistributedDataParallel" if distributed.world_size() > 1 else kind
        assert kind == wanted, f"the launch asked for {wanted}, Accelerate prepared {kind}"


def concatenated(parts: list[dict[K, Tensor]]) -> dict[K, Tensor]:
    """By name, the rows of all parts, which have the same names, one behind the other."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _check_coverage(pair: Pair, optimizer: torch.optim.Optimizer) -> None:
    """Every trainable parameter is in exactly one group: one left out would silently stay as it is."""
    trained = [p for p in pair.parameters() if p.requires_grad]
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}), "a parameter is in two optimizer groups"
    assert {id(p) for p in grouped} == {id(p) for p in trained}, "the optimizer and the trainable parameters differ"
    odd = [name for name, p in pair.named_parameters() if p.ndim == 0 or not p.is_contiguous()]
    assert not odd, f"DeepSpeed cannot prepare 0-dim or non-contiguous parameters: {odd}"
