"""The student's fp32 weights and the optimizer's moments by parameter name, whatever the engine and its partitions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accel import distributed
from kd_accel.held import WEIGHT, Held, HostMemory, Part
from kd_accel.models.running_stats import average_over_ranks
from kd_accel.models.student import Student

MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW remembers of each parameter
EMA = "ema"  # the moving average of each parameter lies beside them, so that it is cut, gathered and saved as they are


@dataclass
class OptimizerState:
    """AdamW's memory by parameter name, free of rank, stage and engine; fp32 on the CPU, filled on rank 0 only."""

    step: int  # optimizer steps applied
    moments: dict[str, dict[str, Tensor]]  # exp_avg | exp_avg_sq | ema -> parameter name -> tensor


def frozen_weights(student: Student, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of `state` that the student does not train: name -> fp32 CPU tensor of its own, on rank 0 only."""
    frozen = [name for name, p in student.named_parameters() if not p.requires_grad] if distributed.is_main() else []
    return {name: state[name].detach().float().cpu().clone() for name in frozen}


class Masters:
    """The fp32 state behind a prepared student. Every method is collective."""

    def __init__(
        self,
        student: Student,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        zero_stage: int,
        frozen: dict[str, Tensor],
    ):
        """`module` and `optimizer` as Accelerate prepared them; stage 0 is one process or DDP.

        `frozen`, on rank 0: the weights that are not trained, fp32 on the CPU; of these an engine keeps no master.
        """
        self._student, self._module, self._optimizer, self._stage = student, module, optimizer, zero_stage
        self._frozen = frozen

    def weights(self) -> dict[str, Tensor]:
        """The student's parameters, from the fp32 masters, and its buffers: name -> fp32 CPU tensor.

        Complete on rank 0; empty on the others, which only take part. Running statistics become their mean over ranks.
        """
        average_over_ranks(self._student)
        return self._frozen | self._gathered() | self._buffers()

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Set parameters (masters and low-precision copies) and buffers from the fp32 `state`, which every rank has."""
        buffers = dict(self._student.named_buffers())
        for name, parameter in self._student.named_parameters():
            self._set_full(parameter, state[name])
        self._frozen = frozen_weights(self._student, state)
        for name in state.keys() & buffers.keys():
            buffers[name].copy_(state[name])

    def held(self, memory: HostMemory) -> Held:
        """What this rank holds of the weights and of AdamW's memory, copied to `memory`.

        Nothing but running statistics is sent, under FSDP2 everything: there rank 0 holds all of it, as under DDP.
        """
        average_over_ranks(self._student)
        state = self._adamw().state
        steps = {int(of["step"]) for of in state.values() if "step" in of}
        assert len(steps) <= 1, f"parameters took different numbers of steps: {steps}"
        self._link_moments()
        moments = [*MOMENTS, EMA] if self._keeps_average() else MOMENTS
        keys = [WEIGHT, *(moments if steps else ())]
        parts: list[Part] = []
        size = sum(held.numel() for held in self._held_parameters()) if self._stage or distributed.is_main() else 0
        values = memory.copy(self._parts(keys, parts), size * len(keys))
        shapes = {name: self._shape(parameter) for name, parameter in self._trained()}
        untrained = self._frozen | self._buffers()
        return Held(max(steps, default=0), shapes, parts, values, untrained)

    def averages(self) -> dict[str, Tensor]:
        """The moving average of each trained parameter, fp32 on the CPU; filled on rank 0, where one is kept."""
        if not self._keeps_average():
            return {}
        self._link_moments()
        return self._gathered(EMA)

    def load_optimizer_state(self, saved: OptimizerState) -> None:
        """Continue from `saved`, which every rank has; the engine may be another one than the one that saved it."""
        if saved.step == 0:
            return
        inner = self._adamw()
        for held in self._held_parameters():
            moments = {key: torch.zeros_like(held, dtype=torch.float32) for key in saved.moments}
            inner.state[held] = {"step": torch.tensor(float(saved.step), device=held.device)} | moments
        self._link_moments()
        for name, parameter in self._trained():
            for key, moments in saved.moments.items():
                self._set_full(parameter, moments[name], key)

    @torch.no_grad()
    def average(self, decay: float) -> None:
        """Move the average of the weights towards them, after a step; it starts at the weights of its first call.

        Polyak's average with exponential weights, as timm's ModelEma: average <- decay average + (1 - decay) weights.
        """
        state = self._adamw().state
        for held in self._held_parameters():
            if EMA in state[held]:
                state[held][EMA].lerp_(held, 1 - decay)
            else:
                state[held][EMA] = held.detach().clone()

    def _parts(self, keys: list[str], parts: list[Part]) -> Iterator[Tensor]:
        """What this rank holds of every trained parameter; `parts` learns what it is."""
        for key in keys:
            for name, parameter in self._trained():
                start, values = self._part(parameter, None if key == WEIGHT else key)
                if values.numel():
                    parts.append(Part(key, name, start, values.numel()))
                    yield values

    def _part(self, parameter: nn.Parameter, key: str | None) -> tuple[int, Tensor]:
        """(where it begins, the numbers) of what this rank holds of the parameter, or of its moment `key`."""
        if not self._stage:
            full = self._full(parameter, key)
            return 0, full if distributed.is_main() else full.new_empty(0)
        if self._stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

            local = (
                safe_get_local_fp32_param(parameter) if key is None else safe_get_local_optimizer_state(parameter, key)
            )
            start = distributed.rank() * local.numel()
            return start, local[: max(parameter.ds_numel - start, 0)]  # the last ranks' are padded
        mapping = parameter._hp_mapping
        return (
            (0, torch.empty(0))
            if mapping is None
            else (mapping.lp_fragment_address.start, mapping.get_hp_fragment(key))
        )

    def _shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole parameter."""
        return parameter.ds_shape if self._stage == 3 else parameter.shape

    def _buffers(self) -> dict[str, Tensor]:
        """Copies of those that are saved; on rank 0 only."""
        if not distributed.is_main():
            return {}
        saved = self._student.state_dict().keys()
        return {name: b.detach().cpu().clone() for name, b in self._student.named_buffers() if name in saved}

    def _keeps_average(self) -> bool:
        return any(EMA in state for state in self._adamw().state.values())

    def _gathered(self, key: str | None = None) -> dict[str, Tensor]:
        """The whole of each trained parameter, or of its moment `key`, by name: fp32 on the CPU, on rank 0 only."""
        gathered = {}
        for name, parameter in self._trained():
            full = self._full(parameter, key)
            if distributed.is_main():
                gathered[name] = full.detach().float().cpu().clone()
        return gathered

    def _link_moments(self) -> None:
        """Let DeepSpeed 0.19 find the moments of every group under ZeRO-1 and 2.

        By itself it links them once, in the middle of the first step, when only the first group has any.
        """
        if self._stage in (1, 2) and self._adamw().state:
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self._student.named_parameters() if p.requires_grad]

    @property
    def _zero(self):
        """DeepSpeed's ZeRO optimizer."""
        return self._module.optimizer

    def _adamw(self) -> torch.optim.Optimizer:
        """The torch optimizer that really steps: over our parameters, or over DeepSpeed's flat partitions of them."""
        return self._zero.optimizer if self._stage else self._optimizer.optimizer

    def _held_parameters(self) -> list[Tensor]:
        """What AdamW keeps its state by: our parameters, or this rank's flat partitions of them."""
        match self._stage:
            case 0:
                return [p for group in self._adamw().param_groups for p in group["params"]]
            case 3:
                return self._zero.fp32_partitioned_groups_flat
        return self._zero.single_partition_of_fp32_groups

    def _full(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """The whole fp32 parameter, or its moment `key`, on every rank."""
        if not self._stage:
            return distributed.whole(parameter if key is None else self._adamw().state[parameter][key])
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        return safe_get_full_fp32_param(parameter) if key is None else safe_get_full_optimizer_state(parameter, key)

    @torch.no_grad()
    def _set_full(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """The inverse of `_full`; `value` is the same on every rank."""
        value = value.to(parameter.device)
        if not parameter.requires_grad:
            with self._writable(parameter):
                parameter.copy_(distributed.cut_like(value, parameter))
            return
        if not self._stage:
            held = parameter if key is None else self._adamw().state[parameter][key]
            held.copy_(distributed.cut_like(value, held))
            return
        if self._stage == 3:
            self._set_partition(parameter, value, key)
        elif key is None:
            parameter.set_full_hp_param(value.float())
        else:
            parameter.set_full_hp_param(value.float(), key)
        if key is None:
            with self._writable(parameter):
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

    def _writable(self, parameter: nn.Parameter):
        """A context in which the parameter's own (low-precision) data is whole and writable."""
        if self._stage != 3:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
