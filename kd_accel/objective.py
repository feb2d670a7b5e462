"""Features in, loss and feature gradients out: the one place that gathers, weighs and averages.

    L = sum_k  weight_k(t) * mean_i  c_k,i * l_k(i)

The mean is over the global batch; c_k,i is 1, or what the teacher's confidence in sample i makes of it. Features enter
detached: the towers never see a loss, the objective never sees a tower. It walks this rank's rows in chunks against
everybody's columns, forward and backward chunk by chunk, so that each chunk's graph is freed at once; then the
gradients of all columns are summed over the ranks and every rank takes those of its own rows. W ranks with b rows give
what one rank gives with W * b.

Terms that need the whole batch at once are computed alike on every rank, each contributing its 1 / W share.
What a step is to leave in memory is kept aside until step(): when the engine skips, nothing is remembered.

Letters: b rows of this rank, c rows of one chunk, B rows of all ranks, d embedding width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kd_accel import distributed, recall, terms
from kd_accel.bindings import row_losses, student_columns, teacher_columns, whole_loss
from kd_accel.blame import non_finite_rows
from kd_accel.chunks import CONTRASTED, Chunk, Step, named
from kd_accel.config import ObjectiveConfig
from kd_accel.memory import SampleMemory
from kd_accel.own_optimizer import OwnOptimizer
from kd_accel.recall import Recall
from kd_accel.schedules import Progress, value_at
from kd_accel.schema import ConfigError
from kd_accel.temperature import block_outward, logit_scale
from kd_accel.types import TeacherSpec


@dataclass(frozen=True)
class Outcome:
    """What the objective says of one step; alike on every rank but for the gradients."""

    loss: Tensor  # [] the total, over the global batch
    metrics: dict[str, Tensor]  # [] each: loss/<term> before its weight, confidence, temperature/<term>
    gradients: dict[str, Tensor]  # this rank's features -> [b, d], of the total loss


class NonFiniteLoss(FloatingPointError):
    """The loss is not a number; raised on every rank alike, before anything is updated."""


class Objective(nn.Module):
    """The weighted sum of terms, what they learn and what they remember.

    log_scale, logit_bias   the student's temperature and bias
    own_log_scale           by term: a logit scale of its own
    num_ids, sharded        samples in the data, and whether each rank remembers only its part of them
    recall                  by term: memory, queues, networks
    confidences             by teacher: alpha of every sample id, nan where it was never seen
    optimizer               AdamW of all that is learned here

    All of it is fp32, whatever the engine's precision: inside a bf16 engine 30 updates of a logit scale show two
    distinct values.
    """

    def __init__(
        self,
        config: ObjectiveConfig,
        *,
        log_scale: float = -math.log(0.07),
        logit_bias: float | None = None,
        teachers: dict[str, TeacherSpec] | None = None,
        widths: dict[str, int] | None = None,
        num_ids: int | None = None,
        class_embeddings: dict[str, Tensor] | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ):
        """`log_scale` and `logit_bias` are what the student starts with unless `config` says otherwise, `widths` those
        of its features by name, `num_ids` the number of samples in the data, `class_embeddings` [C, d] by the name of
        the label_ce term that uses them."""
        super().__init__()
        if taken := [name for name in config.terms if name in dir(nn.ParameterDict()) + dir(nn.ModuleDict())]:
            raise ConfigError(
                f"objective.terms.{taken[0]}: torch's modules have an attribute of that name: take another"
            )
        self.config, self.teachers = config, teachers or {}
        self.max_log_scale = -math.log(config.temperature.min)
        # What is learned here, fp32, replicated.
        init = config.temperature.init
        start = torch.tensor(log_scale if init is None else -math.log(init))
        self.log_scale = nn.Parameter(start.clone(), requires_grad=config.temperature.learnable)
        bias = logit_bias if config.logit_bias is None else config.logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))
        self.own_log_scale = nn.ParameterDict(
            {name: nn.Parameter(start.clone()) for name, term in config.terms.items() if terms.has_own_scale(term)}
        )
        # What is remembered here: by sample id perhaps sharded, the rest alike on every rank.
        self.num_ids, self.sharded = num_ids, config.memory == "sharded"
        known: dict[str, Any] = {"widths": widths or {}, "teachers": self.teachers, "betas": betas, "eps": eps}
        known |= {"num_ids": num_ids, "sharded": self.sharded}
        made = {name: recall.build(name, term, **known) for name, term in config.terms.items()}
        self.recall = nn.ModuleDict({name: module for name, module in made.items() if module is not None})
        self.confidences = nn.ModuleDict()
        if num_ids is not None:
            for name in self._weighing():
                self.confidences[name] = SampleMemory(num_ids, {"alpha": math.nan}, sharded=self.sharded)
        for name, embeddings in (class_embeddings or {}).items():
            self.register_buffer(f"classes_{name}", _fp32(embeddings), persistent=False)
        self._staged: dict[str, Tensor] | None = None  # what the last forward noted, of all ranks
        self.optimizer = OwnOptimizer(self._scales(), self.recall, betas=betas, eps=eps)

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

    def forward(
        self,
        student: dict[str, Tensor],
        teachers: dict[str, dict[str, Tensor]],
        progress: Progress,
        *,
        ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Outcome:
        """One step's loss and gradients from the raw features of this rank.

        student: image, text [b, d] and what else it has: projected_*, masked_*, prototype_*, class_logits;
        teachers: by name, image and text [b, d_teacher]; ids, labels [b] int64 where a term needs them.
        Fills `.grad` of the objective's own parameters. Raises NonFiniteLoss, on all ranks, when the total is not a
        finite number, and ValueError for a sample id outside the memory.
        """
        self._staged = None
        raw = {name: _fp32(features).detach().requires_grad_() for name, features in student.items()}
        with torch.enable_grad(), torch.autocast(next(iter(raw.values())).device.type, enabled=False):
            self.zero_grad()
            given = {name: named({n: _fp32(f).detach() for n, f in rows.items()}) for name, rows in teachers.items()}
            leaves = self._leaves(raw, given, progress)
            step = self._step(leaves, given, ids, labels)
            self._walk(step, progress)
            metrics, own = self._sum_over_ranks(step)
            self._backward_to_raw(leaves, own)
        loss = metrics.pop("loss")
        if not torch.isfinite(loss):
            raise NonFiniteLoss(self._blame(step, metrics))
        noted = step.gather_noted()
        for memory in self.confidences.values():
            cast(SampleMemory, memory).check(noted["ids"])
        self._staged = noted
        gradients = {n: torch.zeros_like(rows) if rows.grad is None else rows.grad for n, rows in raw.items()}
        return Outcome(loss, metrics, gradients)

    def step(self, progress: Progress, *, lr: float, temperature_lr: float) -> None:
        """Commit to memory what the last forward noted, and AdamW on what is learned here.

        For the trainer to call exactly when the engine took its step. In this order, because a TempNet's first step
        starts from prototypes that are only then its own.
        """
        if self._staged is not None:
            self._commit(self._staged)
            self._staged = None
        self.optimizer.step(progress, lr=lr, temperature_lr=temperature_lr)

    def state(self) -> dict[str, Tensor]:
        """What is learned and remembered here but for `by_id()`, and AdamW's moments, by name; alike on every rank."""
        state = {name: tensor.detach().clone() for name, tensor in self.state_dict().items()}
        return state | self.optimizer.state(dict(self.named_parameters()))

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state()` returned. Raises KeyError when that was of other terms."""
        given = {name: tensor for name, tensor in state.items() if not name.startswith("adamw.")}
        if differing := given.keys() ^ self.state_dict().keys():
            raise KeyError(f"objective state: {sorted(differing)[0]}")
        self.load_state_dict(given)
        self.optimizer.load_state(dict(self.named_parameters()), state)

    def by_id(self) -> dict[str, Tensor]:
        """What this rank remembers by sample id, by name: the columns themselves, one number per id of own_ids()."""
        memories = {name: module for name, module in self.named_modules() if isinstance(module, SampleMemory)}
        return {
            f"{name}.{column}": rows for name, memory in memories.items() for column, rows in memory.named_buffers()
        }

    def memory_bytes(self) -> int:
        """Bytes of this rank that grow with the number of samples."""
        return sum(column.nbytes for column in self.by_id().values())

    # One step ---------------------------------------------------------------------------------------------------------

    def _leaves(self, raw: dict[str, Tensor], teachers: dict, progress: Progress) -> dict[str, Tensor]:
        """What the terms differentiate by: unit rows, raw rows, and what terms derive from them, with their graph."""
        leaves = named(raw)
        for module in self._recalls().values():
            leaves |= module.derive(leaves, teachers, progress)
        return leaves

    def _step(self, leaves: dict, teachers: dict, ids: Tensor | None, labels: Tensor | None) -> Step:
        """The step, with every rank's rows of what this config's terms compare."""
        student: set[str] = {name for module in self._recalls().values() for name in module.columns}
        teacher: set[tuple[str, str]] = set()
        for term in self.config.terms.values():
            student |= student_columns(term, leaves)
            if not isinstance(term, terms.DistillationTerm):
                continue
            names = teacher_columns(term) | (set(CONTRASTED) if term.confidence else set())
            owners = terms.teachers_read(term, list(self.teachers))
            teacher |= {(owner, name) for owner in owners for name in names}
        return Step(
            leaves,
            teachers,
            specs=self.teachers,
            columns=sorted(student),
            teacher_columns=sorted(teacher),
            ids=ids,
            labels=labels,
        )

    def _walk(self, step: Step, progress: Progress) -> None:
        """Forward and backward of every term, chunk by chunk; each graph is gone before the next one."""
        for module in self._recalls().values():
            module.prepare(step, progress)
        for teacher in self._weighing("sigmoid"):
            step.measure_hardness(teacher, self.config.chunk_rows)
        for rows in step.chunks(self.config.chunk_rows):
            self._chunk(step, rows, progress)
        for name, term in self.config.terms.items():
            if isinstance(term, terms.WholeBatchTerm):
                self._whole(name, term, step, progress)

    def _chunk(self, step: Step, rows: slice, progress: Progress) -> None:
        chunk = Chunk(step, rows, logit_scale(self.log_scale, self.max_log_scale), self.logit_bias)
        total: Tensor | None = None
        for name, term in self.config.terms.items():
            if isinstance(term, terms.WholeBatchTerm):
                continue
            losses = self._rows(name, term, chunk, progress)  # [c]
            if isinstance(term, terms.DistillationTerm) and term.confidence:
                losses = losses * chunk.coefficient(term.teacher, term.confidence)
            step.add(f"loss/{name}", losses)
            weighed = self._weight(term, progress) * losses.sum() / step.num_columns
            total = weighed if total is None else total + weighed
        if total is None:
            return  # every term is of the whole batch
        step.add("loss", total * step.num_columns)
        self._note_confidences(chunk)
        if total.requires_grad:
            total.backward()
        step.collect(chunk)

    def _whole(self, name: str, term: terms.WholeBatchTerm, step: Step, progress: Progress) -> None:
        """A term that is computed alike on every rank: each contributes its share."""
        share = step.num_rows / step.num_columns
        loss = share * whole_loss(term, step, logit_scale(self.log_scale, self.max_log_scale))
        total = self._weight(term, progress) * loss
        step.add(f"loss/{name}", loss * step.num_columns)
        step.add("loss", total * step.num_columns)
        total.backward()

    def _rows(self, name: str, term: terms.Term, chunk: Chunk, progress: Progress) -> Tensor:
        own = self.own_log_scale[name] if name in self.own_log_scale else None
        scale = chunk.scale if own is None else logit_scale(own, self.max_log_scale)
        if name in self.recall:
            return self._recalls()[name].rows(chunk, scale)
        return row_losses(term, chunk, progress, scale=scale, classes=getattr(self, f"classes_{name}", None))

    def _weight(self, term: terms.Term, progress: Progress) -> float:
        """The term's weight times its teacher's; an ensemble uses its teachers' weights as shares."""
        weight = value_at(term.weight, progress)
        if not isinstance(term, terms.DistillationTerm) or isinstance(term, terms.MobileClip):
            return weight
        return weight * self.teachers[self._teacher(term)].weight

    def _note_confidences(self, chunk: Chunk) -> None:
        """For the metrics, and by sample id for whoever wants to look at them later."""
        for teacher in self._weighing():
            alpha = chunk.confidence(teacher)
            chunk.step.add("confidence" if len(self.teachers) == 1 else f"confidence/{teacher}", alpha)
            if teacher in self.confidences:
                chunk.step.note(f"confidence/{teacher}.alpha", chunk.rows, alpha)

    def _sum_over_ranks(self, step: Step) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(metrics, gradients of this rank's leaves), after one sum over ranks of what each has a part of.

        Every rank divided its losses by B, so the sums are gradients of the global mean, our own scales' too.
        """
        scales = [p for p in self._scales() if p.requires_grad]
        own = [torch.zeros_like(p) if p.grad is None else p.grad for p in scales]
        columns = step.column_gradients()
        sums = distributed.sum_over_ranks([*columns, *own, *step.sums.values()])
        for parameter, gradient in zip(scales, sums[len(columns) :], strict=False):
            is_scale = parameter is not self.logit_bias
            parameter.grad = block_outward(gradient, parameter, self.max_log_scale) if is_scale else gradient
        totals = sums[len(columns) + len(own) :]
        metrics = {name: total / step.num_columns for name, total in zip(step.sums, totals, strict=True)}
        return metrics, step.own_gradients(sums[: len(columns)])

    def _backward_to_raw(self, leaves: dict[str, Tensor], gradients: dict[str, Tensor]) -> None:
        """From unit rows and derived ones to this rank's raw features, and to the networks that derived them."""
        torch.autograd.backward([leaves[name] for name in gradients], list(gradients.values()))
        networks = list(self.recall.parameters())
        summed = distributed.sum_over_ranks([torch.zeros_like(p) if p.grad is None else p.grad for p in networks])
        for parameter, gradient in zip(networks, summed, strict=True):
            parameter.grad = gradient

    def _commit(self, noted: dict[str, Tensor]) -> None:
        ids = noted.get("ids")
        for name, module in self._recalls().items():
            module.commit(ids, _under(f"{name}.", noted))
        for name, memory in self.confidences.items():
            cast(SampleMemory, memory).write(noted["ids"], _under(f"confidence/{name}.", noted))

    def _blame(self, step: Step, metrics: dict[str, Tensor]) -> str:
        """Which terms, and which ranks' features, are not finite; a collective, so every rank must come here."""
        names = [name for name, value in metrics.items() if name.startswith("loss/") and not torch.isfinite(value)]
        inputs = non_finite_rows(step.inputs(), step.ids)
        cause = f"; not finite on arrival: {', '.join(inputs)}" if inputs else "; the features are finite"
        return f"{', '.join(names) or 'the total loss'} is not finite{cause}"

    # Set-up -----------------------------------------------------------------------------------------------------------

    def _recalls(self) -> dict[str, Recall]:
        """`recall`, its modules as what they are."""
        return cast("dict[str, Recall]", dict(self.recall.items()))

    def _teacher(self, term: terms.DistillationTerm) -> str:
        """The name of the term's teacher."""
        return term.teacher or next(iter(self.teachers))

    def _weighing(self, form: str | None = None) -> list[str]:
        """Teachers whose confidence some term uses, in this form or in any; in one order on every rank."""
        of_teachers = [term for term in self.config.terms.values() if isinstance(term, terms.DistillationTerm)]
        return sorted({self._teacher(t) for t in of_teachers if t.confidence and form in (None, t.confidence)})

    def _scales(self) -> list[nn.Parameter]:
        bias = [] if self.logit_bias is None else [self.logit_bias]
        return [self.log_scale, *bias, *self.own_log_scale.values()]


def _under(start: str, noted: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(start): rows for key, rows in noted.items() if key.startswith(start)}


def _fp32(features: Tensor) -> Tensor:
    """Low precision up to fp32; fp32 and fp64 as they are."""
    return features.float() if features.dtype in (torch.bfloat16, torch.float16) else features
