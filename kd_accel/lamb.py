"""LAMB on whole parameters and on the flat pieces of them that ZeRO 1, 2 and 3 leave on a rank."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_accel import distributed


class Lamb(torch.optim.Optimizer):
    """Adam's update, in every decayed parameter rescaled to the parameter's own norm (arXiv 1904.00962, algorithm 2).

        w <- w - lr * r * u,    u = m / (sqrt(v) + eps) + weight_decay * w,    r = |w| / |u|, or 1 where a norm is 0

    with m and v corrected for their start at zero. A group without weight decay has r = 1, as in timm.optim.Lamb
    without clipping, whose numbers these are bit for bit on whole parameters on CPU. FSDP2's DTensors count as whole:
    their norms are those of all ranks.

    Fields:
        pieces    flat tensor -> the slice of each parameter in it; empty while parameters are whole
        device    where ranks add up the norms of pieces; ZeRO may keep the pieces themselves on the host
        state     tensor -> step, exp_avg, exp_avg_sq, named as AdamW's, and counted by tensor as well: DeepSpeed
                  steps the tensors of one group one after another
    """

    def __init__(
        self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float = 0.0
    ):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.pieces: dict[Tensor, list[slice]] = {}
        self.device: torch.device | None = None

    def attach(self, pieces: dict[Tensor, list[slice]], *, device: torch.device) -> None:
        """From now on the tensors stepped are those of `pieces_of`, and norms are summed over ranks."""
        self.pieces, self.device = pieces, device

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every tensor that has a gradient; with pieces, one collective if any group is decayed."""
        assert closure is None, "LAMB evaluates no closure"
        stepped = [(held, group) for group in self.param_groups for held in group["params"] if held.grad is not None]
        updates = [self._adam(held, group) for held, group in stepped]
        self._rescale([(held, u) for (held, group), u in zip(stepped, updates, strict=True) if group["weight_decay"]])
        for (held, group), update in zip(stepped, updates, strict=True):
            held.add_(update, alpha=-group["lr"])

    def _adam(self, held: Tensor, group: dict) -> Tensor:
        """u of the class's formula, before any rescaling; moves the moments."""
        state, (beta1, beta2) = self.state[held], group["betas"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(held), torch.zeros_like(held)
        state["step"] = state["step"].cpu() + 1  # on the host, where reading it waits for no device
        step = state["step"].item()
        state["exp_avg"].lerp_(held.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(held.grad, held.grad, value=1 - beta2)
        root = (state["exp_avg_sq"].sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
        update = (state["exp_avg"] / (1 - beta1**step)).div_(root)
        return update.add_(held, alpha=group["weight_decay"]) if group["weight_decay"] else update

    def _rescale(self, updates: list[tuple[Tensor, Tensor]]) -> None:
        """Multiply each parameter's part of the (tensor, update) pairs by r of the class's formula, in place."""
        if not updates:
            return
        whole = [slice(None)]
        parts = [(w[part], u[part]) for w, u in updates for part in (self.pieces[w] if self.pieces else whole)]
        norms = torch.stack(torch._foreach_norm([w for w, _ in parts] + [u for _, u in parts]))
        if self.pieces:
            (squares,) = distributed.sum_over_ranks([norms.square().to(self.device)])
            norms = squares.sqrt().to(norms.device)
        w_norm, u_norm = norms.chunk(2)
        ratios = torch.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)
        for (_, update), ratio in zip(parts, ratios, strict=True):
            update.mul_(ratio)


def pieces_of(zero, stage: int) -> dict[Tensor, list[slice]]:
    """This rank's flat fp32 tensors of DeepSpeed 0.19's optimizer `zero`, and where in them each parameter lies.

    A tensor's list has a slice for every parameter of its group, in one order on all ranks: empty where none of the
    parameter lies here, and never with padding. Stages 1 and 2 lay the parameters of a group end to end and cut that at
    equal distances; stage 3 cuts every parameter at equal distances and lays this rank's cuts end to end, by sub-group.
    """
    if stage == 3:
        groups, part = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True), _partition
    else:
        groups, part = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True), _fragment
    return {flat: [part(zero, parameter) for parameter in group] for flat, group in groups}


def _fragment(zero, parameter: Tensor) -> slice:
    """Stages 1 and 2; a parameter may lie across the border of two ranks, or all on another one."""
    if parameter._hp_mapping is None:
        return slice(0, 0)
    address = parameter._hp_mapping.hp_fragment_address
    return slice(address.start, address.start + address.numel)


def _partition(zero, parameter: Tensor) -> slice:
    """Stage 3; the last ranks' partitions end in padding, uninitialised, or are nothing else."""
    _, start, size = zero.grad_position[zero.get_param_id(parameter)]
    real = min(max(parameter.ds_numel - size * distributed.rank(), 0), size)
    return slice(start, start + real)
