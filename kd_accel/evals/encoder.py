"""A release as an encoder of whole evaluation sets: features of every image and text, on every rank, in row order.

n images, m texts, d embedding width.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from kd_accel import distributed
from kd_accel.evals.folders import EvalSet, ImageBatches, Sample, deal
from kd_accel.models.release import read_release, resolve_release
from kd_accel.models.text import encode_text
from kd_accel.models.towers import encode_image
from kd_accel.schema import ConfigError
from kd_accel.trim import trimmed
from kd_accel.types import InputContract

log = logging.getLogger(__name__)

_STEP = re.compile(r"step_(\d+)")  # the directory of a checkpoint
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Encoder:
    """Both towers of one release, in eval mode on this rank's device; features are fp32 whatever the towers are."""

    name: str  # the run's name, else the release directory's; goes into every row
    step: int | None  # of the checkpoint that it comes from
    home: Path  # the run, else the release directory: where its results.jsonl belongs
    model: nn.Module
    contract: InputContract
    embed_dim: int  # d

    @property
    def title(self) -> str:
        return self.name if self.step is None else f"{self.name}, step {self.step:,}"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def encode_images(self, views: Tensor) -> Tensor:
        """[b, 3, H, W] uint8 views, on any device -> [b, d] fp32 unit rows on the model's."""
        if not len(views):
            return torch.empty(0, self.embed_dim, device=self.device)
        raw = encode_image(self.model, views.to(self.device, non_blocking=True), self.contract.image)
        return F.normalize(raw.float(), dim=-1)

    @torch.no_grad()
    def encode_texts(self, texts: list[str]) -> Tensor:
        """b texts -> [b, d] fp32 unit rows on the model's device."""
        if not texts:
            return torch.empty(0, self.embed_dim, device=self.device)
        tokens = trimmed(self.contract.text.tokenize(texts), self.contract.text.pad)
        return F.normalize(encode_text(self.model, tokens.to(self.device)).float(), dim=-1)


def load_encoder(model: str | Path, *, precision: str = "fp32") -> Encoder:
    """The encoder in a run (its newest checkpoint), a checkpoint or a release directory; on the GPU where there is one.

    Raises ConfigError where `model` is none of the three.
    """
    release = resolve_release(str(model)).resolve()
    towers, contract, model_cfg, _ = read_release(release)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name, step, home = _origin(release)
    return Encoder(
        name=name,
        step=step,
        home=home,
        model=towers.to(device, _DTYPES[precision]).eval(),
        contract=contract,
        embed_dim=model_cfg["embed_dim"],
    )


def _origin(release: Path) -> tuple[str, int | None, Path]:
    """(name, step, home) of a release: RUN/checkpoints/step_00001000/student belongs to the run."""
    checkpoint = release.parent
    step = _STEP.fullmatch(checkpoint.name)
    if release.name == "student" and step and checkpoint.parent.name == "checkpoints":
        run = checkpoint.parent.parent
        return run.name, int(step[1]), run
    return release.name, None, release


def encode_all_texts(encoder: Encoder, texts: list[str], *, batch_size: int) -> Tensor:  # [m, d]
    """Features of all texts on every rank; each rank encodes its share of the batches.

    Raises ConfigError, on every rank, when a feature is not finite.
    """
    batches = deal(len(texts), batch_size)
    parts = [encoder.encode_texts([texts[row] for row in batch]) for batch in batches[distributed.rank()]]
    everyone = distributed.gather_uneven_rows(torch.cat([encoder.encode_texts([]), *parts]))
    rows = torch.tensor([row for rank in batches for batch in rank for row in batch], device=everyone.device)
    features = everyone[rows.argsort()]
    _require_finite(encoder, int((~features.isfinite()).any(1).sum()), f"{len(texts)} text features")
    return features


def map_images(
    encoder: Encoder,
    eval_set: EvalSet,
    samples: list[Sample],
    reduce: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    num_workers: int,
) -> tuple[Tensor, Tensor]:  # rows [n] int64 in ascending order, [n, ...]
    """`reduce` ([b, d] features -> [b, ...]) of every readable image, on every rank; each rank encodes its share.

    `rows` index `samples`; the numbers of unreadable images are missing in it, and a warning names them.
    Raises ConfigError, on every rank, when no image is readable or a feature is not finite.
    """
    rows, parts, bad, broken = [], [reduce(encoder.encode_images(torch.empty(0)))], [], 0
    for batch_rows, views, batch_bad in _load(encoder, eval_set, samples, batch_size, num_workers):
        features = encoder.encode_images(views)
        broken += int((~features.isfinite()).any(1).sum())
        rows += batch_rows.tolist()
        parts.append(reduce(features))
        bad += batch_bad
    # from here on every rank takes part in every step, also one without a single row
    told = distributed.gather_objects((bad, broken))
    _report_bad(eval_set, [line for theirs, _ in told for line in theirs], len(samples))
    _require_finite(encoder, sum(count for _, count in told), f"{len(samples)} image features of {eval_set.name}")
    all_rows = distributed.gather_uneven_rows(torch.tensor(rows, dtype=torch.int64, device=encoder.device))
    order = all_rows.argsort()
    return all_rows[order], distributed.gather_uneven_rows(torch.cat(parts))[order]


def _load(encoder: Encoder, eval_set: EvalSet, samples: list[Sample], batch_size: int, num_workers: int):
    """This rank's batches of ImageBatches, behind a progress bar where a person watches."""
    batches = deal(len(samples), batch_size)[distributed.rank()]
    loader = DataLoader(
        ImageBatches(samples, batches, encoder.contract.image),
        batch_size=None,
        num_workers=min(num_workers, len(batches)),
        pin_memory=encoder.device.type == "cuda",
        generator=torch.Generator(),  # torch would draw the workers' seed from the global generator
    )
    # disable=None: a bar on a terminal, nothing in a log file
    return tqdm(loader, desc=eval_set.name, unit="batch", leave=False, disable=None if distributed.is_main() else True)


def _report_bad(eval_set: EvalSet, bad: list[str], num_samples: int) -> None:
    if len(bad) == num_samples:
        raise ConfigError(f"{eval_set.path}: none of its {num_samples} images is readable; the first: {bad[0]}")
    if bad and distributed.is_main():
        shown = "\n".join(f"  {line}" for line in bad[:10]) + ("\n  ..." if len(bad) > 10 else "")
        log.warning("%s: left out %d unreadable of %d images:\n%s", eval_set.path, len(bad), num_samples, shown)


def _require_finite(encoder: Encoder, count: int, what: str) -> None:
    if count:
        raise ConfigError(
            f"{encoder.title}: {count} of {what} are not finite: the weights of this checkpoint are broken "
            "(a run that diverged?); evaluate an earlier checkpoint, or try precision=fp32"
        )
