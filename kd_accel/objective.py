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
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kd_accel import distributed
from kd_accel.config import ObjectiveConfig
from kd_accel.losses import contrastive, distillation
from kd_accel.schedules import Progress, value_at
from kd_accel.terms import Clip, DistillationTerm, FeatureMSE, InteractiveContrastive, LogitKL, SigLip
from kd_accel.types import Features

Pair = tuple[Tensor, Tensor]  # of image rows, of caption rows


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

    def __init__(self, config: ObjectiveConfig, *, teacher_scale: float = 1.0, betas: Pair = (0.9, 0.98)):
        """`teacher_scale` is the teacher's own 1 / temperature."""
        super().__init__()
        self.config = config
        self.teacher_scale = teacher_scale
        self.max_log_scale = -math.log(config.temperature.min)
        # What is learned here, fp32, replicated.
        start = torch.tensor(-math.log(config.temperature.init))
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
            step = _Step(unit, teacher_unit)
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
        """One AdamW step of what is learned here; the trainer calls it when, and only when, the engine took its step."""
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

    def _chunk(self, step: _Step, rows: slice, progress: Progress) -> None:
        """Forward and backward of one chunk of rows; its graph is gone when this returns."""
        chunk = _Chunk(step, rows, _scale(self.log_scale, self.max_log_scale), self.logit_bias, self.teacher_scale)
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

    def _rows(self, name: str, term, chunk: _Chunk) -> Tensor:
        """One number per row, [c]: where a term meets its formula."""
        match term:
            case Clip():
                return _mean(*(contrastive.info_nce(z, chunk.offset) for z in chunk.student_logits))
            case SigLip():
                return contrastive.pairwise_sigmoid(chunk.student_logits[0] + chunk.bias, chunk.offset)
            case FeatureMSE():
                targets = chunk.teacher.image, chunk.teacher.text
                image, text = map(distillation.squared_distance, chunk.projected, targets)
                return (image + text) / targets[0].shape[1] if term.reduction == "mean" else _mean(image, text)
            case LogitKL():
                scale = 1 / term.teacher_temperature if term.teacher_temperature else self.teacher_scale
                targets = [scale * cosines for cosines in chunk.teacher_cosines]
                return _mean(*map(distillation.kl_divergence, targets, chunk.student_logits))
            case InteractiveContrastive():
                own = self.own_log_scale[name] if term.scale == "own" else None
                logits = chunk.cross_logits(chunk.scale if own is None else _scale(own, self.max_log_scale))
                return _mean(*(contrastive.info_nce(z, chunk.offset) for z in logits))
        raise AssertionError(f"no formula for {term!r}")

    def _sum_over_ranks(self, step: _Step) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(metrics, gradients of this rank's unit features), after one sum over ranks of what each has a part of.

        Every rank divided its losses by B, so the sums are gradients of the global mean, our own parameters' too.
        """
        learned = [p for p in self.parameters() if p.requires_grad]
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
        sums = distributed.sum_over_ranks([*step.column_gradients(), *own, *step.sums.values()])
        image, text, *rest = sums
        for parameter, gradient in zip(learned, rest, strict=False):
            parameter.grad = gradient
        metrics = {name: total / step.num_columns for name, total in zip(step.sums, rest[len(learned) :], strict=True)}
        return metrics, step.own_gradients(image, text)

    def _blame(self, step: _Step, metrics: dict[str, Tensor]) -> str:
        """Which terms, and which ranks' features, are not finite; a collective, so every rank must come here."""
        terms = [name for name, value in metrics.items() if name.startswith("loss/") and not torch.isfinite(value)]
        ranks = distributed.gather_objects(step.non_finite_inputs())
        inputs = [f"{name} on rank {rank}" for rank, names in enumerate(ranks) for name in names]
        cause = f"; not finite on arrival: {', '.join(inputs)}" if inputs else "; the features are finite"
        return f"{', '.join(terms) or 'the total loss'} is not finite{cause}"


class _Step:
    """The features of one step: this rank's rows, everybody's columns, and where their gradients add up."""

    def __init__(self, student: dict[str, Tensor], teacher: dict[str, Tensor]):
        self.student = {name: rows.detach() for name, rows in student.items()}  # [b, d]
        self.teacher = {name: rows.detach() for name, rows in teacher.items()}
        columns = distributed.gather_rows(
            {f"student.{name}": self.student[name] for name in ("image", "text")}
            | {f"teacher.{name}": rows for name, rows in self.teacher.items()}
        )
        self.student_columns = {name: columns[f"student.{name}"].requires_grad_() for name in ("image", "text")}  # [B, d]
        self.teacher_columns = {name: columns[f"teacher.{name}"] for name in self.teacher}
        self.num_rows, self.num_columns = len(self.student["image"]), len(columns["student.image"])
        self.offset = distributed.rank() * self.num_rows  # the column of this rank's row 0
        # What adds up chunk by chunk.
        self.row_gradients = {name: torch.zeros_like(rows) for name, rows in self.student.items()}
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add a chunk's values, [c] or [], to the metric `name`."""
        self.sums[name] = self.sums.get(name, 0.0) + values.detach().sum()

    def collect(self, chunk: _Chunk) -> None:
        """Add what a chunk's backward left on its rows; on the columns autograd adds by itself."""
        for name, leaf in chunk.leaves.items():
            if leaf.grad is not None:
                self.row_gradients[name][chunk.rows] += leaf.grad

    def column_gradients(self) -> list[Tensor]:
        """d loss / d columns as this rank's rows see it, [B, d] for image and text."""
        columns = self.student_columns.values()
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in columns]

    def own_gradients(self, image: Tensor, text: Tensor) -> dict[str, Tensor]:
        """d loss / d unit features of this rank, [b, d]: as rows here, and as columns of every rank (the summed [B, d])."""
        own = slice(self.offset, self.offset + self.num_rows)
        self.row_gradients["image"] += image[own]
        self.row_gradients["text"] += text[own]
        return self.row_gradients

    def non_finite_inputs(self) -> list[str]:
        """Names of this rank's features that hold an inf or a nan."""
        named = {"student": self.student, "teacher": self.teacher}
        return [f"{who} {name}" for who, f in named.items() for name in f if not torch.isfinite(f[name]).all()]


class _Chunk:
    """A few rows of this rank against everybody's columns; similarities are made once and shared by the terms."""

    def __init__(self, step: _Step, rows: slice, scale: Tensor, bias: Tensor | None, teacher_scale: float):
        self.rows, self.offset = rows, step.offset + rows.start  # offset: the column of the chunk's row 0
        self.scale, self.bias, self.teacher_scale = scale, bias, teacher_scale
        self.leaves = {name: features[rows].requires_grad_() for name, features in step.student.items()}
        self.student = _features(self.leaves, step.student_columns)
        if step.teacher:
            self.teacher = _features({name: f[rows] for name, f in step.teacher.items()}, step.teacher_columns)

    @property
    def projected(self) -> Pair:
        """The student's rows in the teacher's space: (image, text), [c, d_teacher] each."""
        return tuple(self.leaves.get(f"projected_{name}", self.leaves[name]) for name in ("image", "text"))

    @cached_property
    def student_logits(self) -> Pair:
        """(image to text, text to image), [c, B] each."""
        return _against(self.student, self.scale)

    @cached_property
    def teacher_cosines(self) -> Pair:
        """The teacher's own similarities, before its scale, [c, B] each."""
        return _against(self.teacher, 1.0)

    def cross_logits(self, scale: Tensor) -> Pair:
        """Student images against teacher captions and student captions against teacher images, [c, B] each."""
        image, text = self.projected
        return _against(Features(image, text, self.teacher.all_image, self.teacher.all_text), scale)

    @cached_property
    def confidence(self) -> Tensor:
        """alpha_i: the mean of the teacher's two probabilities of the right partner over the global batch, [c]."""
        return _mean(*(contrastive.partner_probability(self.teacher_scale * z, self.offset) for z in self.teacher_cosines))


def _features(rows: dict[str, Tensor], columns: dict[str, Tensor]) -> Features:
    return Features(rows["image"], rows["text"], columns["image"], columns["text"])


def _against(features: Features, scale: Tensor | float) -> Pair:
    """(image to text, text to image) logits of the rows against everyone's columns, [c, B] each."""
    image = contrastive.similarity_logits(features.image, features.all_text, scale)
    return image, contrastive.similarity_logits(features.text, features.all_image, scale)


def _mean(first: Tensor, second: Tensor) -> Tensor:
    return (first + second) / 2


def _fp32(features: Tensor) -> Tensor:
    """Low precision up to fp32; fp32 and fp64 as they are."""
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features


def _scale(log_scale: Tensor, max_log_scale: float) -> Tensor:
    """exp(log_scale), with log_scale held inside [0, max_log_scale]; see _Clamp."""
    return _Clamp.apply(log_scale, 0.0, max_log_scale).exp()


class _Clamp(torch.autograd.Function):
    """Clamp whose gradient is blocked only where the next step would lead further out.

    A plain clamp kills the gradient outside, so a value that once left never returns; no clamp lets it wind up.
    """

    @staticmethod
    def forward(ctx, value: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(value)
        ctx.bounds = low, high
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        (value,), (low, high) = ctx.saved_tensors, ctx.bounds
        outward = ((value <= low) & (gradient > 0)) | ((value >= high) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None
