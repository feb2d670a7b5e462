"""The term global_contrastive: what it remembers of every sample, and the temperature it uses for each.

Formulas: losses/global_contrastive.py. b rows of this rank, c rows of a chunk, B rows of all ranks, N sample ids.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from kd_accel import distributed
from kd_accel.chunks import CONTRASTED, Chunk, Step, mean
from kd_accel.losses import global_contrastive as formula
from kd_accel.losses.contrastive import similarity_logits
from kd_accel.memory import SampleMemory
from kd_accel.models.tempnet import TempNet, dropout_mask
from kd_accel.recall.base import Recall, Rows
from kd_accel.schedules import Progress, value_at
from kd_accel.terms import GlobalContrastive

MAX_STATISTIC = 5.0  # both published codes clip the derivative by a sample's temperature to this
TEMPNETS_LEAST = 1e-14  # TempNet's code divides by no less than this
MOMENTUM = 0.5  # of iSogCLR's temperatures
OTHER = {"image": "text", "text": "image"}


class GlobalContrast(Recall):
    """One global_contrastive term.

    memory     by sample id and tower: log u; for individual temperatures also tau and its moments
    networks   a TempNet per tower, or empty
    """

    def __init__(
        self,
        name: str,
        term: GlobalContrastive,
        *,
        num_ids: int,
        sharded: bool,
        width: int,
        betas: tuple[float, float],
        eps: float,
    ):
        super().__init__()
        self.name, self.term, self.betas, self.eps = name, term, betas, eps
        # Both published families have their own quirks, which `reference` brings back.
        tempnets_code = term.variant in ("sogclr", "isogclr") or term.temperature == "network"
        self.as_fastclip = term.reference and not tempnets_code
        self.as_tempnet = term.reference and tempnets_code
        columns = {f"{what}_{tower}": v for what, v in self._columns() for tower in CONTRASTED}
        self.memory = SampleMemory(num_ids, columns, sharded=sharded)
        networks = CONTRASTED if term.temperature == "network" else ()
        self.networks = nn.ModuleDict(
            {tower: TempNet(width, term.network, rho=term.rho, reference=term.reference) for tower in networks}
        )

    def _columns(self) -> list[tuple[str, float]]:
        """What is remembered of each sample and tower, and what it starts from."""
        columns = [("log_u", -math.inf)]
        if self.as_tempnet or (self.as_fastclip and self.term.temperature == "individual"):
            columns.append(("bound", 0.0))
        if self.term.temperature != "individual":
            return columns
        columns.append(("tau", self.term.individual.init))
        if self.term.individual.update == "momentum":
            return [*columns, ("velocity", 0.0)]
        columns += [("m", 0.0), ("v", 0.0), ("count", 0.0)]
        return columns

    def derive(self, student: Rows, teachers: dict[str, Rows], progress: Progress) -> Rows:
        """Predicted temperatures of this rank's rows, [b] per tower; the towers get no gradient from them.

        The first step's prototypes are rows of its own batch; they stay only when that step is taken, see commit.
        """
        self._first = {}
        if not all(network.initialised for network in self.networks.values()):
            everyone = distributed.gather_rows({tower: student[f"raw.{tower}"] for tower in CONTRASTED})
            self._first = {tower: everyone[OTHER[tower]] for tower in CONTRASTED}  # [B, d] each
        return {
            f"tau.{self.name}.{tower}": network(
                student[tower].detach(), self._keep(student[tower], tower, progress), self._first.get(tower)
            )
            for tower, network in self.networks.items()
        }

    def _keep(self, rows: Tensor, tower: str, progress: Progress) -> Tensor | None:
        """This rank's part of a dropout mask that depends on the step, not on how many ranks share the batch."""
        if self.term.network.dropout == 0:
            return None
        total = len(rows) * distributed.world_size()
        step = 2 * progress.step + CONTRASTED.index(tower)  # another mask for each tower
        mask = dropout_mask(
            total, rows.shape[1], p=self.term.network.dropout, step=step, device=rows.device, dtype=rows.dtype
        )
        return mask[distributed.rank() * len(rows) :][: len(rows)]

    def prepare(self, step: Step, progress: Progress) -> None:
        """Look up this step's samples. Raises ValueError for a sample id outside the memory."""
        if step.num_columns < 2:
            raise ValueError("global_contrastive compares different samples: raise data.batch_size above 1")
        self._old = self.memory.read(step.ids)
        self._epoch = epoch = int(progress.epoch)
        self._gamma = 1.0 if epoch == 0 else value_at(self.term.gamma, replace(progress, epoch=epoch))
        self._lr = value_at(self.term.individual.lr, progress)
        self._betas = (0.0, 0.0) if self.as_fastclip and epoch == 0 else self.betas

    def rows(self, chunk: Chunk, scale: Tensor) -> Tensor:
        """One number per row, [c]."""
        image, text = (self._one_way(chunk, tower) for tower in CONTRASTED)
        return image + text if self.as_tempnet else mean(image, text)

    def commit(self, ids: Tensor | None, noted: Rows) -> None:
        """Remember u, and individual temperatures with their moments, of all ranks' samples; keep first prototypes."""
        self.memory.write(ids, noted)
        for tower, rows in self._first.items():
            self.networks[tower].set_prototypes(rows)

    def _one_way(self, chunk: Chunk, tower: str) -> Tensor:
        """Image to text (tower: image) or text to image, [c]."""
        old = {what: self._old[f"{what}_{tower}"][chunk.rows] for what, _ in self._columns()}
        tau, logits = self._temper(chunk, tower, old)
        log_g = formula.log_inner(logits, chunk.offset)
        log_u = formula.moved_average(old["log_u"], log_g.detach(), self._gamma, unseen_is_zero=self.as_tempnet)
        self._note(chunk, tower, "log_u", log_u)
        log_v = self._log_normaliser(chunk, tower, old, logits, log_g, log_u)
        if self.term.temperature == "individual" or self.as_tempnet:
            exponent = formula.mean_exponent(logits.detach(), chunk.offset)
            statistic = formula.temperature_statistic(log_g.detach(), log_v.detach(), exponent, self.term.rho)
        if self.term.temperature == "individual":
            self._step_temperature(chunk, tower, old, statistic)
        if self.as_tempnet:
            return self._tempnets_loss(tau, log_g, log_v, exponent, statistic)
        if self.as_fastclip:
            return self._fastclips_loss(tau, log_g, log_u, log_v)
        return tau * (log_v + self.term.rho) if self.term.multiply_tau else log_v

    def _temper(self, chunk: Chunk, tower: str, old: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(temperature [] or [c], logits [c, B])."""
        way = CONTRASTED.index(tower)
        match self.term.temperature:
            case "learnable" if not self.as_fastclip:
                return 1 / chunk.scale, chunk.student_logits[way]
            case "learnable":  # the published code counts the gradient through g twice
                scale = 2 * chunk.scale - chunk.scale.detach()
                return 1 / chunk.scale, self._logits(chunk, tower, scale)
            case "constant":
                scale = chunk.scale.detach()
                return 1 / scale, self._logits(chunk, tower, scale)
            case "individual":
                tau = old["tau"]
            case "network":
                tau = chunk.leaves[f"tau.{self.name}.{tower}"]
        chunk.step.add(f"temperature/{self.name}", tau / 2)
        divisor = tau.detach() if self.as_tempnet else tau
        return tau, self._logits(chunk, tower, (1 / divisor)[:, None])

    @staticmethod
    def _logits(chunk: Chunk, tower: str, scale: Tensor) -> Tensor:
        return similarity_logits(chunk.leaves[tower], chunk.step.columns[OTHER[tower]], scale)

    def _log_normaliser(
        self, chunk: Chunk, tower: str, old: dict[str, Tensor], logits: Tensor, log_g: Tensor, log_u: Tensor
    ) -> Tensor:
        """log(eps + u); the published codes keep u / exp(bound), bound the largest exponent so far, and guard that."""
        log_eps = math.log(self.term.eps) if self.term.eps else -math.inf
        if "bound" not in old:
            return formula.log_normaliser(log_g, log_u, log_eps)
        own = logits.detach().diagonal(chunk.offset)
        bound = torch.maximum(old["bound"], (logits.detach() - own[:, None]).amax(dim=1))
        self._note(chunk, tower, "bound", bound)
        if self.as_fastclip:
            return formula.log_normaliser(log_g, log_u, log_eps + bound)
        least = math.log(TEMPNETS_LEAST) - (0.0 if self.term.variant == "sogclr" else math.log(logits.shape[1] - 1))
        return formula.log_normaliser(log_g, torch.maximum(log_u, least + bound), -math.inf)

    def _step_temperature(self, chunk: Chunk, tower: str, old: dict[str, Tensor], statistic: Tensor) -> None:
        """Note every sample's next temperature; this step has used the old one."""
        chosen = self.term.individual
        statistic = statistic.clamp(-MAX_STATISTIC, MAX_STATISTIC)
        if chosen.update == "momentum":
            tau, moved = formula.momentum_step(old["tau"], old["velocity"], statistic, lr=self._lr, momentum=MOMENTUM)
            notes = {"velocity": moved}
        else:
            count = torch.full_like(old["tau"], self._epoch + 1) if self.as_fastclip else old["count"] + 1
            tau, m, v = formula.adam_step(
                *(old["tau"], (old["m"], old["v"]), count, statistic), lr=self._lr, betas=self._betas, eps=self.eps
            )
            notes = {"m": m, "v": v, "count": count}
        for what, values in {"tau": tau.clamp(chosen.min, chosen.max), **notes}.items():
            self._note(chunk, tower, what, values)

    def _fastclips_loss(self, tau: Tensor, log_g: Tensor, log_u: Tensor, log_v: Tensor) -> Tensor:
        """What FastCLIP's code returns: g / (eps + u) of both directions, and of v3's tau (log u + rho) the mean."""
        ratio = 2 * torch.exp(log_g - log_v).detach()  # twice, because the directions are averaged afterwards
        if self.term.temperature != "learnable" or not self.term.multiply_tau:
            return ratio + (log_v - log_v.detach())
        held = tau.detach()
        return held * (ratio + log_v - log_v.detach()) + tau * (log_u + self.term.rho)

    def _tempnets_loss(self, tau: Tensor, log_g: Tensor, log_v: Tensor, exponent: Tensor, statistic: Tensor) -> Tensor:
        """What TempNet's code returns: sum_j w_ij (s_ij - s_ii) with constant w, and t_i tau_i with constant t."""
        held = tau.detach()
        surrogate = held * torch.exp(log_g - log_v).detach() * exponent
        loss = surrogate + held * (log_v - log_v.detach())
        return loss + tau * statistic if self.networks else loss

    def _note(self, chunk: Chunk, tower: str, what: str, values: Tensor) -> None:
        chunk.step.note(f"{self.name}.{what}_{tower}", chunk.rows, values)
