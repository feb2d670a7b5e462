"""Accelerate and DeepSpeed behind four verbs: forward, backward, step, and the student's fp32 state by name.

The rest of kd_accel never asks which engine runs: one process, DDP, or DeepSpeed ZeRO 1, 2, 3, as launch.py found it.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.optim import Lamb
from torch import Tensor, nn

from kd_accel import distributed
from kd_accel.config import TrainConfig, teachers_of
from kd_accel.models.pair import Pair
from kd_accel.models.student import Student
from kd_accel.models.teacher import Teacher
from kd_accel.schema import ConfigError
from kd_accel.types import Batch

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each parameter


@dataclass
class OptimizerState:
    """AdamW's memory by parameter name, free of rank, stage and engine; fp32 on the CPU, filled on rank 0 only."""

    step: int  # optimizer steps applied
    moments: dict[str, dict[str, Tensor]]  # exp_avg | exp_avg_sq -> parameter name -> tensor


class Engine:
    """The prepared student, with its teacher and its optimizer."""

    def __init__(
        self,
        accelerator,
        student: Student,
        teachers: dict[str, Teacher],
        *,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
    ):
        """Prepare student and optimizer, and with them every teacher whose placement is not `replicated`.

        Raises ConfigError for an optimizer that the engine cannot run.
        """
        self.accelerator = accelerator
        self.grad_clip_norm = config.optim.grad_clip_norm
        self.zero_stage = accelerator.deepspeed_plugin.zero_stage if accelerator.deepspeed_plugin else 0
        if self.zero_stage and config.optim.optimizer == "lamb":
            raise ConfigError(
                "optim.optimizer=lamb takes norms of whole parameters, which ZeRO cuts into pieces: use adamw, or"
                " launch with launch/ddp.yaml"
            )
        self.student = student
        if config.precision == "bf16":
            for teacher in teachers.values():
                teacher.to(torch.bfloat16)  # frozen: no master weights to keep
        inside = {name for name, section in teachers_of(config).items() if section.placement == "engine"}
        self.replicated = {n: t.to(accelerator.device) for n, t in teachers.items() if n not in inside}
        pair = Pair(student, {name: teacher for name, teacher in teachers.items() if name in inside})
        _check_coverage(pair, optimizer)
        # DeepSpeed makes its fp32 masters from the weights after their rounding to bf16: keep the exact ones for them.
        rounds = self.zero_stage and config.precision == "bf16"
        exact = {name: p.detach().clone() for name, p in student.named_parameters()} if rounds else {}
        self.module, self.optimizer = accelerator.prepare(pair, optimizer)
        self._check_engine()
        if rounds:
            self.load_weights(exact)

    def forward(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
        """(student's, every teacher's by name) raw features of this rank."""
        out = self.module(batch.image, batch.text)
        student = out.pop("student")
        return student, out | {name: t(batch.image, batch.text[name]) for name, t in self.replicated.items()}

    def backward(self, features: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """Send the gradients of this rank's features into the towers.

        DDP and DeepSpeed average over ranks, the objective's gradients are those of the global mean: hence world_size.
        """
        surrogate = sum((features[name].float() * gradients[name]).sum() for name in gradients)
        surrogate = surrogate * distributed.world_size()
        self.module.backward(surrogate) if self.zero_stage else surrogate.backward()

    def step(self, lr: float) -> tuple[bool, float]:
        """Clip, take the step at `lr`, clear the gradients. Returns (applied, gradient norm before clipping).

        A step with a non-finite gradient is not applied, on any rank.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.zero_stage:
            self.module.step()
            return self.module.was_step_applied(), float(self.module.get_global_grad_norm())
        norm = nn.utils.clip_grad_norm_(self.student.parameters(), self.grad_clip_norm or float("inf"))
        applied = bool(torch.isfinite(norm))
        if applied:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return applied, float(norm)

    # The student's state by name, whatever the engine -----------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """The student's parameters, from the fp32 masters, and its buffers: name -> fp32 CPU tensor. Collective.

        Complete on rank 0; empty on the others, which only take part.
        """
        state = {}
        for name, parameter in self.student.named_parameters():
            full = self._full(parameter)
            if distributed.is_main():
                state[name] = full.detach().float().cpu().clone()
        if distributed.is_main():
            persistent = self.student.state_dict().keys() - state.keys()
            state |= {n: b.detach().cpu().clone() for n, b in self.student.named_buffers() if n in persistent}
        return state

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Set parameters (masters and low-precision copies) and buffers from the fp32 `state`, which every rank has."""
        buffers = dict(self.student.named_buffers())
        for name, parameter in self.student.named_parameters():
            self._set_full(parameter, state[name])
        for name in state.keys() & buffers.keys():
            buffers[name].copy_(state[name])

    def optimizer_state(self) -> OptimizerState:
        """AdamW's memory by parameter name; collective, complete on rank 0."""
        inner = self._adamw()
        # AdamW counts by parameter, LAMB by group
        steps = {int(state["step"]) for state in [*inner.state.values(), *inner.param_groups] if "step" in state}
        assert len(steps) <= 1, f"parameters took different numbers of steps: {steps}"
        moments: dict[str, dict[str, Tensor]] = {key: {} for key in MOMENTS}
        self._link_moments()
        for name, parameter in self.student.named_parameters() if steps else []:
            for key in MOMENTS:
                full = self._full(parameter, key)
                if distributed.is_main():
                    moments[key][name] = full.detach().float().cpu().clone()
        return OptimizerState(step=max(steps, default=0), moments=moments)

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        """Continue from `saved`, which every rank has; the engine may be another one than the one that saved it."""
        if saved.step == 0:
            return
        inner = self._adamw()
        for held in self._held_parameters():
            inner.state[held] = {key: torch.zeros_like(held, dtype=torch.float32) for key in MOMENTS}
        counted = inner.param_groups if isinstance(inner, Lamb) else inner.state.values()
        for state in counted:
            state["step"] = torch.tensor(float(saved.step))
        self._link_moments()
        for name, parameter in self.student.named_parameters():
            for key in MOMENTS:
                self._set_full(parameter, saved.moments[key][name], key)

    def _link_moments(self) -> None:
        """Let DeepSpeed 0.19 find the moments of every group under ZeRO-1 and 2.

        By itself it links them once, in the middle of the first step, when only the first group has any.
        """
        if self.zero_stage in (1, 2) and self._adamw().state:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    @property
    def _zero(self):
        """DeepSpeed's ZeRO optimizer."""
        return self.module.optimizer

    def _adamw(self) -> torch.optim.Optimizer:
        """The torch optimizer that really steps: over our parameters, or over DeepSpeed's flat partitions of them."""
        return self._zero.optimizer if self.zero_stage else self.optimizer.optimizer

    def _held_parameters(self) -> list[Tensor]:
        """What AdamW keeps its state by: our parameters, or this rank's flat partitions of them."""
        match self.zero_stage:
            case 0:
                return [p for group in self._adamw().param_groups for p in group["params"]]
            case 3:
                return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _full(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """The whole fp32 parameter, or its moment `key`, on every rank."""
        if not self.zero_stage:
            return parameter if key is None else self._adamw().state[parameter][key]
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def _set_full(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """The inverse of `_full`; `value` is the same on every rank."""
        value = value.to(parameter.device)
        if not self.zero_stage:
            self._full(parameter, key).copy_(value)
            return
        if self.zero_stage == 3:
            self._set_partition(parameter, value, key)
        elif key is None:
            parameter.set_full_hp_param(value.float())
        else:
            parameter.set_full_hp_param(value.float(), key)
        if key is None:
            with self._gathered(parameter):
                parameter.copy_(value)

    def _set_partition(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        """ZeRO-3: write this rank's slice; DeepSpeed's own full setter cannot, where the last slice is padded."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()
        padded = F.pad(value.float().flatten(), (0, size * distributed.world_size() - value.numel()))
        mine = padded[size * distributed.rank() : size * (distributed.rank() + 1)]
        if key is None:
            safe_set_local_fp32_param(parameter, mine)
        else:
            safe_set_local_optimizer_state(parameter, mine, key)

    def _gathered(self, parameter: nn.Parameter):
        """A context in which the parameter's own (low-precision) data is whole and writable."""
        if self.zero_stage != 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)

    def _check_engine(self) -> None:
        """What was prepared is what was asked for."""
        kind = type(self.module).__name__
        wanted = (
            "DeepSpeedEngine"
            if self.zero_stage
            else "DistributedDataParallel"
            if distributed.world_size() > 1
            else None
        )
        if wanted is not None:
            assert kind == wanted, f"the launch asked for {wanted}, Accelerate prepared {kind}"


def _check_coverage(pair: Pair, optimizer: torch.optim.Optimizer) -> None:
    """Every trainable parameter is in exactly one group: one left out would silently stay as it is."""
    trained = [p for p in pair.parameters() if p.requires_grad]
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped}), "a parameter is in two optimizer groups"
    assert {id(p) for p in grouped} == {id(p) for p in trained}, "the optimizer and the trainable parameters differ"
    odd = [name for name, p in pair.named_parameters() if p.ndim == 0 or not p.is_contiguous()]
    assert not odd, f"DeepSpeed cannot prepare 0-dim or non-contiguous parameters: {odd}"
