"""AdamW of what the objective learns: scales, temperature networks, fusion layers; fp32, outside the engine."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_accel import terms
from kd_accel.recall import Recall
from kd_accel.schedules import Progress, value_at

MEMORY = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter
TORCHS_ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}  # TempNet's, whatever the towers have


class OwnOptimizer:
    """A group of scales, and one of each module in recall/ that has parameters; no weight decay.

    Scales take the temperature's learning rate, a TempNet that of its term, fusion layers that of the towers.
    """

    def __init__(self, scales: list[nn.Parameter], recall: nn.ModuleDict, *, betas: tuple[float, float], eps: float):
        groups = [{"name": "scales", "params": [p for p in scales if p.requires_grad]}]
        for name, module in recall.items():
            options = TORCHS_ADAM if isinstance(module.term, terms.GlobalContrastive) else {}
            groups.append({"name": name, "params": list(module.parameters()), **options})
        self.recall: dict[str, Recall] = dict(recall.items())
        kept = [group for group in groups if group["params"]]
        self.adamw = torch.optim.AdamW(kept, betas=betas, eps=eps, weight_decay=0.0) if kept else None

    def step(self, progress: Progress, *, lr: float, temperature_lr: float) -> None:
        """One step along what the last forward left in `.grad`."""
        if self.adamw is None:
            return
        for group in self.adamw.param_groups:
            if group["name"] == "scales":
                group["lr"] = temperature_lr
            else:
                term = self.recall[group["name"]].term
                is_network = isinstance(term, terms.GlobalContrastive)
                group["lr"] = value_at(term.network.lr, progress) if is_network else lr
        self.adamw.step()

    def state(self, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        """AdamW's memory of the named parameters, as `adamw.<key>.<name>`."""
        kept = {} if self.adamw is None else self.adamw.state
        return {
            f"adamw.{key}.{name}": value.clone()
            for name, parameter in parameters.items()
            for key, value in kept.get(parameter, {}).items()
        }

    def load_state(self, parameters: dict[str, nn.Parameter], state: dict[str, Tensor]) -> None:
        """Continue from what `state()` returned."""
        for name, parameter in parameters.items():
            keys = [key for key in MEMORY if f"adamw.{key}.{name}" in state]
            if keys:
                kept = {key: state[f"adamw.{key}.{name}"] for key in keys}
                # The step stays on the host, where torch's AdamW counts.
                self.adamw.state[parameter] = {
                    key: value.clone() if key == "step" else value.to(parameter.device, copy=True)
                    for key, value in kept.items()
                }
