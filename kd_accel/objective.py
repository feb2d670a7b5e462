"""Features in, loss and feature gradients out: the one place that gathers, weighs and averages.

    L = sum_k  weight_k(t) * mean_i (1 + c_k * alpha_i) * l_k(i)

The mean is over the global batch. Features enter detached: the towers never see a loss, the objective never sees a
tower. It walks this rank's rows in chunks against everybody's columns, forward and backward chunk by chunk, so that
each chunk's graph is freed at once; then the gradients of all columns are summed over the ranks and every rank takes
those of its own rows. W ranks with b rows give what one rank gives with W * b.

Letters: b rows of this rank, c rows of one chunk, B rows of all ranks, d embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accel import distributed
from kd_accel.chunks import Chunk, Step, mean
from kd_accel.config import ObjectiveConfig
from kd_accel.losses import contrastive, distillation
from kd_accel.schedules import Progress, value_at
from kd_accel.temperature import block_outward, logit_scale
from kd_accel.terms import Clip, DistillationTerm, FeatureMSE, InteractiveContrastive, LogitKL, SigLip


@dataclass(frozen=True)
class Outcome:
    """What the objective says of one step; alike on every rank but for the gradients."""

    loss: Tensor  # [] the total, over the global batch
    metrics: dict[str, Tensor]  # [] each: loss/<term> before its weight, confidence
    gradients: dict[str, Tensor]  # this rank's features -> [b, d], of the total loss


class NonFiniteLoss(FloatingPointError):
    """The loss is not a number; raised on every rank alike, before anything is updated."""


class Objective(nn.Module):
    """The weighted sum of terms and what they learn.

    Temperature, bias and the terms' own scales stay here in fp32, whatever the engine's precision, with their own
    AdamW: inside a bf16 engine 30 updates of a logit scale show two distinct values.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        log_scale: float = -math.log(0.07),
        teacher_scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.98),
    ):
        """`log_scale` is what the student starts with, `teacher_scale` the teacher's 1 / temperature."""
        super().__init__()
        self.config = config
        self.teacher_scale = teacher_scale
        self.max_log_scale = -math.log(config.temperature.min)
        # What is learned here, fp32, replicated.
        init = config.temperature.init
        start = torch.tensor(log_scale if init is None else -math.log(init))
        self.log_scale = nn.Parameter(start.clone(), requires_grad=config.temperature.learnable)
        self.logit_bias = None if config.logit_bias is None else nn.Parameter(torch.tensor(config.logit_bias))
        own = [n for n, t in config.terms.items() if isinstance(t, InteractiveContrastive) and t.scale == "own"]
        self.own_log_scale = nn.ParameterDict({name: nn.Parameter(start.clone()) for name in own})
        learned = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(learned, betas=betas, eps=1e-8, weight_decay=0.0) if learned else None

    @property
    def log_logit_scale(self) -> float:
        """ln(1 / temperature) as the losses use it: inside its bounds."""
        return min(max(self.log_scale.item(), 0.0), self.max_log_scale)

    @property
    def temperature(self) -> float:
        """The student's, 1 / logit_scale."""
        return math.exp(-self.log_logit_scale)

    @property
    def bias(self) -> float | None:
        """The student's logit bias, where there is one."""
        return None if self.logit_bias is None else self.logit_bias.item()

    def forward(self, student: dict[str, Tensor], teacher: dict[str, Tensor], progress: Progress) -> Outcome:
        """One step's loss and gradients from the raw features of this rank.

        student: image, text [b, d] and, with a projector, projected_image, projected_text [b, d_teacher];
        teacher: image, text [b, d_teacher], or empty. Fills `.grad` of the objective's own parameters.
        Raises NonFiniteLoss, on all ranks, when the total is not a finite number.
        """
        raw = {name: _fp32(features).detach().requires_grad_() for name, features in student.items()}
        with torch.enable_grad(), torch.autocast(next(iter(raw.values())).device.type, enabled=False):
            unit = {name: F.normalize(features, dim=1) for name, features in raw.items()}
            teacher_unit = {name: F.normalize(_fp32(features), dim=1) for name, features in teacher.items()}
            step = Step(unit, teacher_unit)
            self.zero_grad()
            for start in range(0, step.num_rows, self.config.chunk_rows):
                self._chunk(step, slice(start, min(start + self.config.chunk_rows, step.num_rows)), progress)
            metrics, own = self._sum_over_ranks(step)
            gradients = torch.autograd.grad(list(unit.values()), list(raw.values()), list(own.values()))
        loss = metrics.pop("loss")
        if not torch.isfinite(loss):
            raise NonFiniteLoss(self._blame(step, metrics))
        return Outcome(loss, metrics, dict(zip(raw, gradients, strict=True)))

    def step(self, lr: float) -> None:
        """One AdamW step of what is learned here, for the trainer to call exactly when the engine took its step."""
        if self.optimizer is None:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Everything learned here and its AdamW moments, by name; alike on every rank."""
        state = {name: p.detach().clone() for name, p in self.named_parameters()}
        for name, parameter in self.named_parameters():
            memory = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
            state |= {f"adamw.{key}.{name}": value.clone() for key, value in memory.items()}
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state()` returned."""
        for name, parameter in self.named_parameters():
            parameter.copy_(state[name])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adamw.{key}.{name}" in state]
            if keys:
                self.optimizer.state[parameter] = {key: state[f"adamw.{key}.{name}"].clone() for key in keys}

    def _chunk(self, step: Step, rows: slice, progress: Progress) -> None:
        """Forward and backward of one chunk of rows; its graph is gone when this returns."""
        chunk = Chunk(step, rows, logit_scale(self.log_scale, self.max_log_scale), self.logit_bias, self.teacher_scale)
        total = 0.0
        for name, term in self.config.terms.items():
            losses = self._rows(name, term, chunk)  # [c]
            if self._uses_confidence(term):
                losses = losses * (chunk.confidence if term.confidence == "var" else 1 + chunk.confidence)
            step.add(f"loss/{name}", losses)
            total = total + value_at(term.weight, progress) * losses.sum() / step.num_columns
        step.add("loss", total * step.num_columns)
        if any(map(self._uses_confidence, self.config.terms.values())):
            step.add("confidence", chunk.confidence)
        if total.requires_grad:
            total.backward()
        step.collect(chunk)

    @staticmethod
    def _uses_confidence(term) -> bool:
        return isinstance(term, DistillationTerm) and bool(term.confidence)

    def _rows(self, name: str, term, chunk: Chunk) -> Tensor:
        """One number per row, [c]: where a term meets its formula."""
        match term:
            case Clip():
                return mean(*(contrastive.info_nce(z, chunk.offset) for z in chunk.student_logits))
            case SigLip():
                return contrastive.pairwise_sigmoid(chunk.student_logits[0] + chunk.bias, chunk.offset)
            case FeatureMSE():
                targets = chunk.teacher.image, chunk.teacher.text
                image, text = map(distillation.squared_distance, chunk.projected, targets)
                return (image + text) / targets[0].shape[1] if term.reduction == "mean" else mean(image, text)
            case LogitKL():
                scale = 1 / term.teacher_temperature if term.teacher_temperature else self.teacher_scale
                targets = [scale * cosines for cosines in chunk.teacher_cosines]
                return mean(*map(distillation.kl_divergence, targets, chunk.student_logits))
            case InteractiveContrastive():
                own = self.own_log_scale[name] if term.scale == "own" else None
                logits = chunk.cross_logits(chunk.scale if own is None else logit_scale(own, self.max_log_scale))
                return mean(*(contrastive.info_nce(z, chunk.offset) for z in logits))
        raise AssertionError(f"no formula for {term!r}")

    def _sum_over_ranks(self, step: Step) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(metrics, gradients of this rank's unit features), after one sum over ranks of what each has a part of.

        Every rank divided its losses by B, so the sums are gradients of the global mean, our own parameters' too.
        """
        learned = [p for p in self.parameters() if p.requires_grad]
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
        sums = distributed.sum_over_ranks([*step.column_gradients(), *own, *step.sums.values()])
        image, text, *rest = sums
        for parameter, gradient in zip(learned, rest, strict=False):
            is_scale = parameter is not self.logit_bias
            parameter.grad = block_outward(gradient, parameter, self.max_log_scale) if is_scale else gradient
        metrics = {name: total / step.num_columns for name, total in zip(step.sums, rest[len(learned) :], strict=True)}
        return metrics, step.own_gradients(image, text)

    def _blame(self, step: Step, metrics: dict[str, Tensor]) -> str:
        """Which terms, and which ranks' features, are not finite; a collective, so every rank must come here."""
        terms = [name for name, value in metrics.items() if name.startswith("loss/") and not torch.isfinite(value)]
        ranks = distributed.gather_objects(step.non_finite_inputs())
        inputs = [f"{name} on rank {rank}" for rank, names in enumerate(ranks) for name in names]
        cause = f"; not finite on arrival: {', '.join(inputs)}" if inputs else "; the features are finite"
        return f"{', '.join(terms) or 'the total loss'} is not finite{cause}"


def _fp32(features: Tensor) -> Tensor:
    """Low precision up to fp32; fp32 and fp64 as they are."""
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features
