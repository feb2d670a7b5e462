"""A golden file, and which terms of ours make each of its numbers.

A file's prefix names the loss; sizes and hyper-parameters are read from the file, whose keys the README.md beside it
explains. Letters: G rows of all ranks, W ranks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kd_accel.losses import contrastive, distillation

# Of the golden README; the float32 atol is relative to the largest element, as is the rounding of a 2000-fold MSE.
TOLERANCE = {torch.float64: {"rtol": 1e-8, "atol": 1e-10}, torch.float32: {"rtol": 1e-3, "atol": 1e-6}}


@dataclass(frozen=True)
class Part:
    """One loss of a file, and the terms that make it."""

    value: str  # its key
    gradient: str  # what its gradients' keys start with
    terms: dict  # as in YAML
    plus: float | Tensor = 0.0  # a constant that the reference's value has on top of ours


class Golden:
    """One file; the numbers of W ranks are made one, as DDP does."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.prefix, self.dtype = path.name.split("__")[0], dtype
        about = json.loads(path.with_suffix(".json").read_text())
        self.hyper, self.world_size = about["hyper"], about["world_size"]
        read = load_file(path)
        self.tensors = _over_ranks({k: v.to(dtype) if v.is_floating_point() else v for k, v in read.items()})
        self.checked: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.checked.add(key)
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def gradients(self, start: str) -> dict[str, Tensor]:
        """The gradients whose keys begin with `start`, by what they are with respect to."""
        pattern = re.compile(rf"{re.escape(start)}\.(image|text|log_scale|bias|param\..+)")
        return {match[1]: self[key] for key in self.tensors if (match := pattern.fullmatch(key))}

    @property
    def normalises_inside(self) -> bool:
        """Whether the reference takes raw embeddings; its gradients then have no part along them."""
        return self.prefix == "clip_kd"

    @property
    def columns_live(self) -> bool:
        """False for local_loss without gather_with_grad: the gradient of the negatives is missing in the reference."""
        return self.world_size == 1 or self.hyper.get("gather_with_grad", True) or not self.hyper["local_loss"]

    @property
    def feature_share(self) -> float:
        """What DDP's mean leaves of the feature gradient: 1 / W where a rank sees that of its own rows only."""
        if self.world_size == 1 or self.hyper.get("gather_with_grad", True) or self.hyper["local_loss"]:
            return 1.0
        return 1 / self.world_size

    @cached_property
    def teacher(self) -> dict[str, Tensor]:
        return {name: self[f"in.t_{name}"] for name in ("image", "text") if f"in.t_{name}" in self}

    @property
    def teacher_scale(self) -> float:
        return self["in.t_log_scale"].exp().item() if self.teacher else 1.0

    @cached_property
    def teacher_logits(self) -> tuple:
        """(image to text, text to image), [G, G] each; empty without a teacher."""
        return both_ways(*self.teacher.values(), *self.teacher.values(), self.teacher_scale) if self.teacher else ()

    @cached_property
    def alpha(self) -> Tensor | float:
        """The teacher's confidence, [G]."""
        return sum(contrastive.partner_probability(z, 0) for z in self.teacher_logits) / 2

    def leaves(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """What the reference differentiates by, ready for a backward; features of `rows` only."""
        names = [n for k in self.tensors if (n := k.removeprefix("in.")) != k and not n.startswith("t_")]
        values = {name: self[f"in.{name}"] for name in names}
        return {n: (v[rows] if n in ("image", "text") else v).clone().requires_grad_() for n, v in values.items()}

    def assert_close(self, actual: Tensor, expected: Tensor, key: str) -> None:
        tolerance = dict(TOLERANCE[self.dtype])
        if self.dtype == torch.float32:
            tolerance["atol"] *= max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, **tolerance, msg=lambda text: f"{key}: {text}")


def _over_ranks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`ddp.` taken off; where there is none, rank{r}.* made one: features side by side over W, the rest averaged."""
    merged = {k.removeprefix("ddp."): v for k, v in tensors.items() if not re.match(r"rank\d+\.", k)}
    for name in [k.removeprefix("rank0.") for k in tensors if k.startswith("rank0.")]:
        ranks = [v for k, v in sorted(tensors.items(), key=_rank) if re.fullmatch(rf"rank\d+\.{re.escape(name)}", k)]
        features = name.endswith((".image", ".text"))
        merged.setdefault(name, torch.cat(ranks) / len(ranks) if features else torch.stack(ranks).mean(0))
    return merged


def _rank(item: tuple[str, Tensor]) -> int:
    match = re.match(r"rank(\d+)\.", item[0])
    return int(match[1]) if match else -1


def _clip(golden: Golden) -> Iterator[Part]:
    yield Part("out.loss", "grad", {"clip": {"kind": "clip"}})


def _siglip(golden: Golden) -> Iterator[Part]:
    yield Part("out.loss", "grad", {"siglip": {"kind": "siglip"}})


def _distill_clip(golden: Golden) -> Iterator[Part]:
    """open_clip's soft cross entropy is our KL plus the teacher's entropy, which has no gradient."""
    entropy = sum(distillation.soft_cross_entropy(z, z).mean() for z in golden.teacher_logits) / 2
    task, distill = {"clip": {"kind": "clip"}}, {"kl": {"kind": "logit_kl"}}
    if "out.contrastive" in golden:
        yield Part("out.contrastive", "(no gradient of its own)", task)
        yield Part("out.distill", "grad.distill_only", distill, plus=entropy)
    yield Part("out.loss", "grad", task | distill, plus=entropy)


def _clip_kd(golden: Golden) -> Iterator[Part]:
    """CLIP-KD uses its own scale without exp; ours is the exponential of a parameter, so that one starts at its log."""
    terms = {
        "task": {"kind": "clip"},
        "ckd": {"kind": "logit_kl"},
        "icl": {"kind": "interactive_contrastive", "scale": "own"},
        "fd": {"kind": "feature_mse"},
    }
    for name, term in terms.items():
        yield Part(f"out.{name}", f"grad.{name}", {name: term})
    weights = {"task": 1.0, **golden.hyper["alphas"]}
    if all(weights[name] == 0 for name in weights.keys() - terms.keys()):
        total = {name: {**term, "weight": weights[name]} for name, term in terms.items()}
        yield Part("out.total", "grad.total", total)
    else:
        golden.checked |= {"out.total"} | {k for k in golden.tensors if k.startswith("grad.total.")}


def _unc_kd(golden: Golden) -> Iterator[Part]:
    """Uncertainty-aware KD, as documented (per_sample) and as its repository computes it (as_is).

    The repository multiplies alpha [G, 1] by the KL and ICL losses [G], so it weighs all samples by the mean alpha
    instead of each by its own; and with W ranks it gathers twice, which adds ln W to each row's ICL. Both are known
    factors and constants of our unweighted terms, so those numbers are checked too.
    """
    kinds = {
        "MSE": {"kind": "feature_mse", "reduction": "sum"},
        "KL": {"kind": "logit_kl"},
        "ICL": {"kind": "interactive_contrastive"},
    }
    for mode, names, coefficient in re.findall(r"(as_is|per_sample)\.(\w+)\.(\w+)\.loss", "\n".join(golden.tensors)):
        terms, plus = {}, 0.0
        for name in names.removeprefix("KD_").split("_"):
            weight, confidence = float(golden.hyper["scaling"][name]), False if coefficient == "const" else coefficient
            if mode == "as_is" and name != "MSE":
                weight *= 1 + golden["confidence"].mean().item() if confidence else 1
                plus += weight * math.log(golden.world_size) if name == "ICL" else 0.0
                confidence = False
            terms[name] = {**kinds[name], "weight": weight, "confidence": confidence}
        key = f"{mode}.{names}.{coefficient}"
        yield Part(f"{key}.loss", f"{key}.grad", terms, plus)


PARTS: dict[str, Callable[[Golden], Iterator[Part]]] = {
    "clip": _clip,
    "siglip": _siglip,
    "distill_clip": _distill_clip,
    "clip_kd": _clip_kd,
    "unc_kd": _unc_kd,
}


def both_ways(image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor | float) -> tuple:
    """(image to text, text to image), [G, G] each."""
    logits_per_image = contrastive.similarity_logits(image, all_text, scale)
    return logits_per_image, contrastive.similarity_logits(text, all_image, scale)
