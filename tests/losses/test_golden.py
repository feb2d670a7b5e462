"""Numbers of other people's implementations: value, every gradient, float64 and float32, chunked and whole.

The folder is KD_ACCEL_GOLDEN, or ../shared/golden beside the repository. What a file holds: golden_files.py.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel.config import ObjectiveConfig
from kd_accel.losses import contrastive, distillation
from kd_accel.objective import Objective
from kd_accel.schedules import Progress
from kd_accel.schema import validate

sys.path.insert(0, str(Path(__file__).parent))  # pytest does not, in its import mode
from golden_files import PARTS, Golden, Part, both_ways

FOLDER = Path(os.environ.get("KD_ACCEL_GOLDEN", Path(__file__).resolve().parents[3] / "shared" / "golden"))
ARRIVES_LATER = (
    "fastclip_v0 fastclip_v1 fastclip_v2 fastclip_v3 sogclr isogclr tempnet disttempnet_v1 e2e schedules lamb itra "
    "protoclip embed_label l1_ce_kl lclip_components tinyclip_affinity mobileclip_dr"
).split()
# Keys that no term of ours computes: CLIP-KD's cross KD, gradient and fusion distillation, the older confidence.
NOT_OURS = re.compile(r"(out|grad)\.(cross_kd|gd|gd_corrected|afd)(\..*)?|confidence_sigmoid_gcl")


def through_objective(golden: Golden, part: Part, chunk_rows: int, rows: slice = slice(None)) -> tuple:
    """(loss, gradients by name) of the real Objective, followed by the trainer's backward through the projectors."""
    leaves = golden.leaves(rows)
    objective = _objective(golden, part, chunk_rows)
    student = {name: leaves[name] for name in ("image", "text")}
    student |= {f"projected_{name}": p for name, p in _projected(leaves).items()}
    outcome = objective(student, {name: t[rows] for name, t in golden.teacher.items()}, Progress())
    torch.autograd.backward([student[n] for n in outcome.gradients], list(outcome.gradients.values()))
    leaves["log_scale"].grad = objective.log_scale.grad
    if objective.logit_bias is not None:
        leaves["bias"].grad = objective.logit_bias.grad
    for own in objective.own_log_scale.values():  # theirs is the scale itself: d/d scale = d/d log(scale) / scale
        leaves["param.cross_logit_scale"].grad = own.grad / own.exp().detach()
    return outcome.loss, _gradients(leaves)


def _objective(golden: Golden, part: Part, chunk_rows: int) -> Objective:
    """In the file's dtype, with the file's scales; the temperature's lower end is far away, so that it never clamps."""
    temperature = math.exp(-golden["in.log_scale"].item())
    values = {
        "terms": part.terms,
        "chunk_rows": chunk_rows,
        "temperature": {"init": temperature, "min": temperature / 10},
        "logit_bias": golden["in.bias"].item() if "in.bias" in golden else None,
    }
    objective = Objective(validate(ObjectiveConfig, values), teacher_scale=golden.teacher_scale).to(golden.dtype)
    with torch.no_grad():
        objective.log_scale.copy_(golden["in.log_scale"])
        for own in objective.own_log_scale.values():
            own.copy_(golden["in.param.cross_logit_scale"].log())
    return objective


def through_formulas(golden: Golden, part: Part) -> tuple:
    """(loss, gradients by name) of the formulas alone, in one graph, by the features that the reference was given."""
    leaves = golden.leaves()
    raw = {"image": leaves["image"], "text": leaves["text"]}
    unit = {n: F.normalize(f, dim=1) for n, f in raw.items()} if golden.normalises_inside else raw
    projected = {n: F.normalize(p, dim=1) for n, p in _projected(leaves).items()} or unit
    columns = unit if golden.columns_live else {name: f.detach() for name, f in unit.items()}
    logits = both_ways(*unit.values(), *columns.values(), leaves["log_scale"].exp())
    targets, alpha = golden.teacher_logits, golden.alpha
    loss = 0.0
    for term in part.terms.values():
        match term["kind"]:
            case "clip":
                rows = sum(contrastive.info_nce(z, 0) for z in logits) / 2
            case "siglip":
                rows = contrastive.pairwise_sigmoid(logits[0] + leaves["bias"], 0)
            case "feature_mse":
                rows = sum(distillation.squared_distance(projected[n], golden.teacher[n]) for n in projected)
                rows = rows / 2 if term.get("reduction") == "sum" else rows / golden.teacher["image"].shape[1]
            case "logit_kl":
                rows = sum(map(distillation.kl_divergence, targets, logits)) / 2
            case "interactive_contrastive":
                scale = leaves["param.cross_logit_scale"] if term.get("scale") == "own" else leaves["log_scale"].exp()
                cross = both_ways(*projected.values(), *golden.teacher.values(), scale)
                rows = sum(contrastive.info_nce(z, 0) for z in cross) / 2
        rows = rows * {"var": alpha, "var_shifted": 1 + alpha, False: 1.0}[term.get("confidence", False)]
        loss = loss + term.get("weight", 1.0) * rows.mean()
    loss.backward()
    return loss.detach(), _gradients(leaves)


def _projected(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student in the teacher's space, where the file brings projectors; they see raw embeddings."""
    layers = {"image": "param.visual_proj", "text": "param.text_proj"}
    given = {name: layer for name, layer in layers.items() if f"{layer}.weight" in leaves}
    return {n: F.linear(leaves[n], leaves[f"{layer}.weight"], leaves[f"{layer}.bias"]) for n, layer in given.items()}


def _gradients(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def expected_of_objective(golden: Golden, part: Part) -> dict[str, Tensor]:
    """The reference's gradients as the Objective should give them: exact whatever W, and by raw features.

    Raw and unit features are the same numbers in most files, but a gradient by raw ones has no part along them.
    """
    expected = golden.gradients(part.gradient)
    for name in expected.keys() & {"image", "text"}:
        if not golden.columns_live:
            del expected[name]  # the reference is wrong by a term that only a second graph has: see test_formulas
            continue
        expected[name] = expected[name] / golden.feature_share
        if not golden.normalises_inside:
            unit = golden[f"in.{name}"]
            expected[name] = expected[name] - (expected[name] * unit).sum(1, keepdim=True) * unit
    return expected


def parts(golden: Golden) -> list[Part]:
    return list(PARTS[golden.prefix](golden))


ABSENT = pytest.mark.skip("no golden files: set KD_ACCEL_GOLDEN to their folder")
FILES = sorted(FOLDER.glob("*.safetensors")) or [pytest.param(None, id="none", marks=ABSENT)]


def _cases() -> Iterator:
    """(file, dtype) of the losses that are here; every float64 file in float32 as well."""
    if not FOLDER.is_dir():
        yield pytest.param(None, None, id="none", marks=ABSENT)
    for path in sorted(path for prefix in PARTS for path in FOLDER.glob(f"{prefix}__*.safetensors")):
        dtype = getattr(torch, json.loads(path.with_suffix(".json").read_text())["dtype"])
        for tried in sorted({dtype, torch.float32}, key=str, reverse=True):
            yield pytest.param(path, tried, id=f"{path.stem}-{str(tried)[6:]}")


CASES = pytest.mark.parametrize(("path", "dtype"), list(_cases()))


def _check_prefix(path: Path) -> None:
    prefix = path.name.split("__")[0]
    if prefix in ARRIVES_LATER:
        pytest.skip("arrives with the losses of issue 2")
    if prefix not in PARTS:
        pytest.fail(f"no check for golden files that begin with '{prefix}__'")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_known(path):
    """No file is left out because nobody knows what it is."""
    _check_prefix(path)


def test_unknown_prefix_fails():
    """A file of a loss that nobody checks does not pass in silence."""
    with pytest.raises(pytest.fail.Exception, match="surprise"):
        _check_prefix(Path("surprise__w1.safetensors"))


@CASES
@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_objective(path, dtype, chunk_rows):
    """The Objective gives the reference's loss and gradients, chunked or whole, whatever W the reference ran on."""
    golden = Golden(path, dtype)
    for part in parts(golden):
        loss, gradients = through_objective(golden, part, chunk_rows)
        golden.assert_close(loss + part.plus, golden[part.value], part.value)
        for name, expected in expected_of_objective(golden, part).items():
            golden.assert_close(gradients[name], expected, f"{part.gradient}.{name}")


@CASES
def test_formulas(path, dtype):
    """The formulas give the reference's loss and gradients by unit features, also where it leaves the negatives out."""
    golden = Golden(path, dtype)
    if "confidence" in golden:
        golden.assert_close(golden.alpha, golden["confidence"], "confidence")
    for part in parts(golden):
        loss, gradients = through_formulas(golden, part)
        golden.assert_close(loss + part.plus, golden[part.value], part.value)
        for name, expected in golden.gradients(part.gradient).items():
            share = golden.feature_share if name in ("image", "text") else 1.0
            golden.assert_close(gradients[name] * share, expected, f"{part.gradient}.{name}")


@CASES
def test_every_number_is_compared(path, dtype):
    """No output of a file goes unseen, but for those of losses that are not here."""
    golden = Golden(path, dtype)
    for part in parts(golden):
        golden[part.value], golden.gradients(part.gradient)
    left = {key for key in golden.tensors.keys() - golden.checked if not key.startswith("in.")}
    assert {key for key in left if not NOT_OURS.fullmatch(key)} <= {"confidence"}  # test_formulas sees to that one
