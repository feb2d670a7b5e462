"""A golden file, and which terms of ours make each of its numbers.

A file's prefix names the loss; sizes and hyper-parameters are read from the file, whose keys the README.md beside it
explains. Letters: G rows of all ranks, W ranks.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kd_accel.losses import contrastive, distillation

# Of the golden README; the float32 atol is relative to the largest element, as is the rounding of a 2000-fold MSE.
TOLERANCE = {torch.float64: {"rtol": 1e-8, "atol": 1e-10}, torch.float32: {"rtol": 1e-3, "atol": 1e-6}}


FOLDER = Path(os.environ.get("KD_ACCEL_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
ABSENT = pytest.mark.skip("no golden files: set KD_ACCEL_GOLDEN to their folder")


def files_of(*prefixes: str) -> list:
    """Parameters of a test: the files that begin with one of the prefixes; skipped when there are none."""
    paths = [path for path in sorted(FOLDER.glob("*.safetensors")) if path.name.split("__")[0] in prefixes]
    return [pytest.param(p, id=p.stem) for p in paths] or [pytest.param(None, id="none", marks=ABSENT)]


def dtypes_of(path: Path) -> list[torch.dtype]:
    """In which the file is compared: its own, and float32."""
    own = getattr(torch, json.loads(path.with_suffix(".json").read_text())["dtype"])
    return sorted({own, torch.float32}, key=str, reverse=True)


Names = dict[str, str]  # our feature -> the file's input, without "in."
BOTH = {"image": "image", "text": "text"}


@dataclass(frozen=True)
class Part:
    """One loss of a file, and the terms that make it."""

    value: str  # its key
    gradient: str  # what its gradients' keys start with
    terms: dict  # as in YAML
    plus: float | Tensor = 0.0  # a constant that the reference's value has on top of ours
    calls: tuple[tuple[Names, Names], ...] = ((BOTH, {"image": "t_image", "text": "t_text"}),)  # (student, teacher)


class Golden:
    """One file; the numbers of W ranks are made one, as DDP does."""

    def __init__(self, path: Path, dtype: torch.dtype):
        self.prefix, self.dtype = path.name.split("__")[0], dtype
        about = json.loads(path.with_suffix(".json").read_text())
        self.hyper, self.world_size = about["hyper"], about["world_size"]
        read = load_file(path)
        self.tensors = over_ranks({k: v.to(dtype) if v.is_floating_point() else v for k, v in read.items()})
        self.checked: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.checked.add(key)
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def gradients(self, start: str) -> dict[str, Tensor]:
        """The gradients whose keys begin with `start`, by what they are with respect to."""
        pattern = re.compile(rf"{re.escape(start)}\.(\w*(image|text|student)\w*|log_scale\w*|bias|param\..+)")
        return {match[1]: self[key] for key in self.tensors if (match := pattern.fullmatch(key))}

    @property
    def rows(self) -> int:
        """G."""
        return len(
            next(v for k, v in self.tensors.items() if re.fullmatch(r"in\.(student(_image)?|image(_projected)?)", k))
        )

    @property
    def takes_raw(self) -> bool:
        """Whether the reference differentiates by raw embeddings, as we do, and not by unit features."""
        return self.prefix in ("clip_kd", "l1_ce_kl", "lclip_components", "embed_label", "itra")

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

    def teacher_specs(self) -> dict[str, tuple[int, float]]:
        """name -> (width, logit scale); an ensemble's members lie side by side in the file."""
        if self.prefix == "mobileclip_dr":
            widths, scales = self.hyper["teacher_dims"], self.hyper["teacher_logit_scales"]
            return {f"t{i}": pair for i, pair in enumerate(zip(widths, scales, strict=True))}
        if self.prefix == "protoclip":
            return {"external": (self["in.episode.external"].shape[1], 1.0)}
        keys = [k for k in ("in.t_image", "in.teacher", "in.teacher_image") if k in self]
        scale = self["in.t_log_scale"].exp().item() if "in.t_log_scale" in self else 1.0
        return {"teacher": (self[keys[0]].shape[1], scale)} if keys else {}

    def teachers(self, names: Names, rows: slice) -> dict[str, dict[str, Tensor]]:
        """Every teacher's rows."""
        given = {tower: self[f"in.{name}"][rows] for tower, name in names.items() if f"in.{name}" in self}
        if self.prefix == "protoclip":
            features = self["in.episode.external"][self["in.idx"]][rows]
            return {"external": {"image": features, "text": features}}
        widths = {name: width for name, (width, _) in self.teacher_specs().items()}
        parts = {tower: features.split(list(widths.values()), dim=1) for tower, features in given.items()}
        return {name: {tower: parts[tower][i] for tower in parts} for i, name in enumerate(widths)}

    @cached_property
    def teacher_logits(self) -> tuple:
        """(image to text, text to image), [G, G] each, of the one teacher; empty without."""
        if "in.t_log_scale" not in self:
            return ()
        towers = self["in.t_image"], self["in.t_text"]
        return both_ways(*towers, *towers, self["in.t_log_scale"].exp())

    @cached_property
    def alpha(self) -> Tensor | float:
        """The teacher's confidence, [G]."""
        return sum(contrastive.partner_probability(z, 0) for z in self.teacher_logits) / 2

    def leaves(self, rows: slice = slice(None)) -> dict[str, Tensor]:
        """What the reference differentiates by, ready for a backward; features of `rows` only."""
        leaves = {}
        for key, tensor in self.tensors.items():
            name = key.removeprefix("in.")
            if name == key or not tensor.is_floating_point() or re.match(r"t_|teacher|episode|centroids|queue", name):
                continue
            of_rows = tensor.ndim == 2 and not name.startswith("param.") and name != "text_embeddings"
            leaves[name] = (self[key][rows] if of_rows else self[key]).clone().requires_grad_()
        return leaves

    def assert_close(self, actual: Tensor, expected: Tensor, key: str) -> None:
        tolerance = dict(TOLERANCE[self.dtype])
        if self.dtype == torch.float32:
            if self.prefix == "itra":
                tolerance["rtol"] = 2e-2 if ".seed." in key else 5e-3
            tolerance["atol"] *= max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, **tolerance, msg=lambda text: f"{key}: {text}")


def over_ranks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`ddp.` taken off; where there is none, rank{r}.* made one: features side by side over W, the rest averaged."""
    merged = {k.removeprefix("ddp."): v for k, v in tensors.items() if not re.match(r"rank\d+\.", k)}
    for name in [k.removeprefix("rank0.") for k in tensors if k.startswith("rank0.")]:
        ranks = [v for k, v in sorted(tensors.items(), key=_rank) if re.fullmatch(rf"rank\d+\.{re.escape(name)}", k)]
        features = name.endswith((".image", ".text", ".g_im", ".g_tt"))
        share = 1 if name.startswith("out.") else len(ranks)
        merged.setdefault(name, torch.cat(ranks) / share if features else torch.stack(ranks).mean(0))
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


def _tinyclip(golden: Golden) -> Iterator[Part]:
    yield Part("out.loss", "grad", {"affinity": {"kind": "affinity"}})


def _mobileclip(golden: Golden) -> Iterator[Part]:
    """Losses with the real and with the synthetic captions are added."""
    task, distill = golden.hyper["weights_contrastive_distill"]
    terms = {"clip": {"kind": "clip", "weight": task}, "dr": {"kind": "mobileclip", "weight": distill}}
    captions = ["", "syn_"] if golden.hyper["with_synthetic_captions"] else [""]
    calls = tuple(
        ({"image": "image", "text": f"{which}text"}, {"image": "t_image", "text": f"t_{which}text"})
        for which in captions
    )
    yield Part("out.contrastive", "(no gradient of its own)", {"clip": terms["clip"]}, calls=calls)
    yield Part("out.distill", "(no gradient of its own)", {"dr": terms["dr"]}, calls=calls)
    yield Part("out.loss", "grad", terms, calls=calls)


def _clip_kd(golden: Golden) -> Iterator[Part]:
    """CLIP-KD uses its own scales without exp; ours are exponentials of parameters, so those start at the logarithm."""
    terms = {
        "task": {"kind": "clip"},
        "ckd": {"kind": "logit_kl"},
        "icl": {"kind": "interactive_contrastive", "scale": "own"},
        "cross_kd": {"kind": "cross_kl", "scale": "own"},
        "fd": {"kind": "feature_mse"},
        "gd": {"kind": "gradient", "reference": True},
        "gd_corrected": {"kind": "gradient"},
        "afd": {"kind": "augmented_feature"},
    }
    for name, term in terms.items():
        # The reference cannot fuse features of two widths, and writes 0.
        if f"out.{name}" in golden and golden.gradients(f"grad.{name}"):
            yield Part(f"out.{name}", f"grad.{name}", {name: term})
    alphas = {"task": 1.0, **golden.hyper["alphas"]}
    used = {name: {**terms[name], "weight": weight} for name, weight in alphas.items() if weight}
    yield Part("out.total", "grad.total", used)


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


ONE = {"match": {"image": "image"}}  # files of one tower: we call it the image tower
ONE_TOWER = (({"image": "student"}, {"image": "teacher"}),)


def _l1_ce_kl(golden: Golden) -> Iterator[Part]:
    """Weights and scales bind to the order in which the losses are listed."""
    kinds = {
        "kl": {"kind": "embedding_kl", "temperature": golden.hyper["t"], **ONE},
        "l1": {"kind": "embedding_l1", **ONE},
        "ce": {"kind": "embedding_ce", "reference": True, **ONE},
    }
    for combo, (names, weights) in golden.hyper["combos"].items():
        weights = weights or [1 / len(names)] * len(names)
        listed = zip(names, weights, golden.hyper["loss_scale"], strict=False)
        terms = {name: {**kinds[name], "weight": weight * scale} for name, weight, scale in listed}
        yield Part(f"out.{combo}", f"grad.{combo}", terms, calls=ONE_TOWER)
    yield Part("out.ce_corrected", "grad.ce_corrected", {"ce": {**kinds["ce"], "reference": False}}, calls=ONE_TOWER)


def _lclip(golden: Golden) -> Iterator[Part]:
    t = golden.hyper["temperature"]
    one = {
        "out_l1": {"kind": "embedding_l1", **ONE},
        "out_ce": {"kind": "embedding_ce", **ONE},
        "out_kl": {"kind": "embedding_kl", "temperature": t, "reference": True, **ONE},
        "out_cos": {"kind": "cosine", **ONE},
    }
    two = {
        "hard_label": {"kind": "hard_label"},
        "soft_label": {"kind": "soft_label", "temperature": t, "reference": True},
        "logits_mse": {"kind": "logit_mse"},
        "cos_diff": {"kind": "cos_diff"},
    }
    towers = {tower: f"teacher_{tower}" for tower in BOTH}
    for names, student in ((one, {"image": "student_image"}), (two, {t: f"student_{t}" for t in BOTH})):
        for name, term in names.items():
            yield Part(f"out.{name}", f"grad.{name}", {name: term}, calls=((student, towers),))


def _embed_label(golden: Golden) -> Iterator[Part]:
    for name in ("mse", "l1", "huber"):
        term = {"kind": f"embedding_{name}", **ONE}
        yield Part(f"out.embedding.{name}", f"grad.embedding.{name}", {name: term}, calls=ONE_TOWER)
    label = {"kind": "label_ce", "classes": "given.safetensors", "scale": golden.hyper["temp"]}
    double, mse = {**label, "reference": True}, {"kind": "embedding_mse", **ONE}
    totals = {
        "label_corrected": {"label": label},
        "label_double_softmax": {"label": double},
        "total_mse_label": {"mse": mse, "label": {**double, "weight": golden.hyper["weight_loss"]}},
        "total_2000mse_label": {"mse": {**mse, "weight": 2000}, "label": double},
    }
    for name, terms in totals.items():
        yield Part(f"out.{name}", f"grad.{name}", terms, calls=ONE_TOWER)


def _itra(golden: Golden) -> Iterator[Part]:
    """The losses without memory; test_golden_recall.py has the others."""
    hyper = golden.hyper
    weights = {"distance_weight": hyper["w_rkd_d"], "angle_weight": hyper["w_rkd_a"]}
    vicreg = dict(zip(("invariance_weight", "variance_weight", "covariance_weight"), hyper["vicreg"], strict=True))
    terms = {
        "simreg_mse": {"kind": "simreg"},
        "simreg_l1": {"kind": "simreg", "distance": "l1"},
        "simreg_smoothl1": {"kind": "simreg", "distance": "smooth_l1"},
        "rkd": {"kind": "rkd", **weights},
        "rkd_distance": {"kind": "rkd", "distance_weight": 1.0, "angle_weight": 0.0},
        "rkd_angle": {"kind": "rkd", "distance_weight": 0.0, "angle_weight": 1.0},
        "vicreg": {"kind": "vicreg", "reference": True, **vicreg},
        "barlow": {"kind": "barlow", "reference": True, "redundancy_weight": hyper["barlow_lambda"]},
    }
    for name, term in terms.items():
        yield Part(f"out.{name}", f"grad.{name}", {name: {**term, **ONE}}, calls=ONE_TOWER)
    # InfoNCE between student and teacher is clip's with the teacher as the other tower.
    other = (({"image": "student", "text": "teacher"}, {}),)
    for key in [key for key in golden.tensors if re.fullmatch(r"out\.infonce_scale\d+", key)]:
        clip = {"kind": "hard_label", "temperature": 1 / int(key.removeprefix("out.infonce_scale"))}
        yield Part(key, key.replace("out.", "grad."), {"clip": clip}, calls=other)


PARTS: dict[str, Callable[[Golden], Iterator[Part]]] = {
    "clip": _clip,
    "siglip": _siglip,
    "distill_clip": _distill_clip,
    "tinyclip_affinity": _tinyclip,
    "mobileclip_dr": _mobileclip,
    "clip_kd": _clip_kd,
    "unc_kd": _unc_kd,
    "l1_ce_kl": _l1_ce_kl,
    "lclip_components": _lclip,
    "embed_label": _embed_label,
    "itra": _itra,
}


def both_ways(image: Tensor, text: Tensor, all_image: Tensor, all_text: Tensor, scale: Tensor | float) -> tuple:
    """(image to text, text to image), [G, G] each."""
    logits_per_image = contrastive.similarity_logits(image, all_text, scale)
    return logits_per_image, contrastive.similarity_logits(text, all_image, scale)
