"""Numbers of other people's implementations: value, every gradient, float64 and float32, chunked and whole.

The folder is KD_ACCEL_GOLDEN, or ../shared/golden beside the repository. What a file holds: golden_files.py.
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel import distributed, terms
from kd_accel.chunks import Chunk, Step
from kd_accel.config import ObjectiveConfig
from kd_accel.losses import contrastive, distillation
from kd_accel.objective import Objective
from kd_accel.schedules import Progress
from kd_accel.schema import validate
from kd_accel.types import TeacherSpec

sys.path.insert(0, str(Path(__file__).parent))  # pytest does not, in its import mode
import golden_recall
import golden_steps
import test_golden_optim
from golden_files import ABSENT, FOLDER, PARTS, Golden, Part, both_ways, dtypes_of

CHECKED = {*PARTS, *golden_steps.PREFIXES, *golden_recall.PREFIXES, *test_golden_optim.PREFIXES}
# Single graphs of the formulas alone: for files whose gradient lacks the negatives, which no Objective would give.
BY_FORMULA = ("clip", "siglip", "distill_clip", "tinyclip_affinity", "unc_kd")
# Values that are no loss of their own; each is compared by the test named.
BY_NAME = re.compile(
    r"confidence|confidence_sigmoid_gcl"  # test_confidences
    r"|out\.(img2text|text2img)"  # test_both_directions
    r"|out\.probs"  # test_class_probabilities
    r"|(out|grad)\.(compress|seed|dino|protocpc).*"  # golden_recall.py
)
PARAMETERS = {
    "cross_logit_scale": (terms.InteractiveContrastive, terms.CrossKL),
    "fusion_logit_scale": (terms.AugmentedFeature,),
}
FUSION = {"image": "visual_fusion_proj", "text": "text_fusion_proj"}


def through_objective(golden: Golden, part: Part, chunk_rows: int, rows: slice = slice(None)) -> tuple:
    """(loss, gradients by name) of the real Objective, followed by the trainer's backward through the projectors."""
    leaves, loss = golden.leaves(rows), 0.0
    for names, teacher_names in part.calls:
        objective = _objective(golden, part, chunk_rows, names)
        student = {ours: leaves[name] if name in leaves else golden[f"in.{name}"][rows] for ours, name in names.items()}
        student |= {f"projected_{tower}": p for tower, p in _projected(leaves).items()}
        labels = golden["in.labels"][rows] if "in.labels" in golden else None
        outcome = objective(student, golden.teachers(teacher_names, rows), Progress(), labels=labels)
        live = [name for name in outcome.gradients if student[name].requires_grad]
        torch.autograd.backward([student[n] for n in live], [outcome.gradients[n] for n in live])
        loss = loss + outcome.loss
        for name, gradient in _own_gradients(golden, objective, part).items():
            leaf = leaves[name]
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    return loss, _gradients(leaves)


def _objective(golden: Golden, part: Part, chunk_rows: int, names: dict[str, str]) -> Objective:
    """In the file's dtype, with the file's scales; the temperature's lower end is far away, so that it never clamps."""
    log_scale = golden["in.log_scale"] if "in.log_scale" in golden else torch.zeros(())
    temperature = math.exp(-log_scale.item())
    values = {
        "terms": part.terms,
        "chunk_rows": chunk_rows,
        "temperature": {"init": temperature, "min": temperature / 10},
        "logit_bias": golden["in.bias"].item() if "in.bias" in golden else None,
    }
    objective = Objective(
        validate(ObjectiveConfig, values),
        teachers={name: TeacherSpec(*spec) for name, spec in golden.teacher_specs().items()},
        widths={ours: golden[f"in.{name}"].shape[1] for ours, name in names.items()},
        class_embeddings=_classes(golden, part),
    ).to(golden.dtype)
    with torch.no_grad():
        objective.log_scale.copy_(log_scale)
        for name, own in objective.own_log_scale.items():
            own.copy_(golden[f"in.param.{_scale_of(part, objective, name)}"].log())
        for module in objective.recall.values():
            for tower, layer in module.layers.items():
                layer.weight.copy_(golden[f"in.param.{FUSION[tower]}.weight"])
                layer.bias.copy_(golden[f"in.param.{FUSION[tower]}.bias"])
    return objective


def _classes(golden: Golden, part: Part) -> dict[str, Tensor]:
    """Unit class embeddings of the terms that want some."""
    wanted = [name for name, term in part.terms.items() if "classes" in term]
    return {name: F.normalize(golden["in.text_embeddings"], dim=1) for name in wanted}


def _scale_of(part: Part, objective: Objective, name: str) -> str:
    """The file's parameter that is this term's own scale."""
    term = objective.config.terms[name]
    return next(parameter for parameter, kinds in PARAMETERS.items() if isinstance(term, kinds))


def _own_gradients(golden: Golden, objective: Objective, part: Part) -> dict[str, Tensor]:
    """Of what the objective learns, under the file's names; terms may share what is one parameter there."""
    found = {"log_scale": objective.log_scale.grad} if "in.log_scale" in golden else {}
    if objective.logit_bias is not None:
        found["bias"] = objective.logit_bias.grad
    for name, own in objective.own_log_scale.items():
        key = f"param.{_scale_of(part, objective, name)}"
        # theirs is the scale itself: d/d scale = d/d log(scale) / scale
        found[key] = found.get(key, 0.0) + own.grad / own.exp().detach()
    for module in objective.recall.values():
        for tower, layer in module.layers.items():
            found |= {f"param.{FUSION[tower]}.{which}": p.grad for which, p in layer.named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def through_formulas(golden: Golden, part: Part) -> tuple:
    """(loss, gradients by name) of the formulas alone, in one graph, by the unit features of the file."""
    leaves = golden.leaves()
    unit = {"image": leaves["image"], "text": leaves["text"]}
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
            case "affinity":
                rows = sum(map(distillation.soft_cross_entropy, targets, logits)) / 2
            case "feature_mse":
                rows = sum(distillation.squared_distance(unit[n], golden[f"in.t_{n}"]) for n in unit) / 2
            case "logit_kl":
                rows = sum(map(distillation.kl_divergence, targets, logits)) / 2
            case "interactive_contrastive":
                cross = both_ways(*unit.values(), golden["in.t_image"], golden["in.t_text"], leaves["log_scale"].exp())
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
    """The reference's gradients as the Objective should give them, by leaf: exact whatever W, and by raw features.

    Raw and unit features are the same numbers in most files, but a gradient by raw ones has no part along them.
    """
    expected = {}
    for name, gradient in golden.gradients(part.gradient).items():
        if name == "student" and "in.student" not in golden:
            name = next(iter(part.calls[0][0].values()))  # of one tower of two
        if gradient.ndim < 2 or name.startswith("param."):
            expected[name] = gradient
        elif golden.columns_live:  # else the reference is wrong by a term that only a second graph has: test_formulas
            expected[name] = gradient / golden.feature_share
            if not golden.takes_raw:
                unit = golden[f"in.{name}"]
                expected[name] = expected[name] - (expected[name] * unit).sum(1, keepdim=True) * unit
    return expected


def parts(golden: Golden) -> list[Part]:
    return list(PARTS[golden.prefix](golden))


FILES = sorted(FOLDER.glob("*.safetensors")) or [pytest.param(None, id="none", marks=ABSENT)]


def _cases(*prefixes: str) -> list:
    """(file, dtype); every float64 file in float32 as well."""
    paths = sorted(path for prefix in prefixes for path in FOLDER.glob(f"{prefix}__*.safetensors"))
    cases = [pytest.param(path, t, id=f"{path.stem}-{str(t)[6:]}") for path in paths for t in dtypes_of(path)]
    return cases or [pytest.param(None, None, id="none", marks=ABSENT)]


CASES = pytest.mark.parametrize(("path", "dtype"), _cases(*PARTS))


def _check_prefix(path: Path) -> None:
    prefix = path.name.split("__")[0]
    if prefix not in CHECKED:
        pytest.fail(f"no check for golden files that begin with '{prefix}__'")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_known(path):
    """No file is left out because nobody knows what it is."""
    _check_prefix(path)


def test_unknown_prefix_fails():
    """A file of a loss that nobody checks does not pass in silence."""
    with pytest.raises(pytest.fail.Exception, match="surprise"):
        _check_prefix(Path("surprise__w1.safetensors"))


def recall_cases() -> list[tuple]:
    """(file, dtype) of losses that remember something other than samples."""
    return [case.values for case in _cases(*golden_recall.PREFIXES)]


@CASES
@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_objective(path, dtype, chunk_rows):
    """The Objective gives the reference's loss and gradients, chunked or whole, whatever W the reference ran on."""
    golden = Golden(path, dtype)
    for part in parts(golden):
        check_part(golden, part, chunk_rows)


def check_part(golden: Golden, part: Part, chunk_rows: int, rows: slice = slice(None)) -> None:
    """Also on this rank's rows of several."""
    loss, gradients = through_objective(golden, part, chunk_rows, rows)
    golden.assert_close(loss + part.plus, golden[part.value], part.value)
    for name, expected in expected_of_objective(golden, part).items():
        of_rows = expected.ndim == 2 and not name.startswith("param.")
        actual = gradients[name]
        if "proj." in name and "fusion" not in name:  # projectors are the student's: it is the trainer who sums them
            (actual,) = distributed.sum_over_ranks([actual])
        golden.assert_close(actual, expected[rows] if of_rows else expected, f"{part.gradient}.{name}")


@pytest.mark.parametrize(("path", "dtype"), _cases(*BY_FORMULA))
def test_formulas(path, dtype):
    """The formulas give the reference's loss and gradients by unit features, also where it leaves the negatives out."""
    golden = Golden(path, dtype)
    for part in parts(golden):
        loss, gradients = through_formulas(golden, part)
        golden.assert_close(loss + part.plus, golden[part.value], part.value)
        for name, expected in golden.gradients(part.gradient).items():
            share = golden.feature_share if name in ("image", "text") else 1.0
            golden.assert_close(gradients[name] * share, expected, f"{part.gradient}.{name}")


@pytest.mark.parametrize(("path", "dtype"), _cases("unc_kd"))
def test_confidences(path, dtype):
    """alpha of every sample, and its older sigmoid form, as the objective weighs by them."""
    golden = Golden(path, dtype)
    width, scale = golden.teacher_specs()["teacher"]
    teacher = {tower: golden[f"in.t_{tower}"] for tower in ("image", "text")}
    step = Step(
        teacher,
        {"teacher": teacher},
        specs={"teacher": TeacherSpec(width, scale)},
        columns=[],
        teacher_columns=[("teacher", tower) for tower in teacher],
    )
    step.measure_hardness("teacher", chunk_rows=3)
    chunk = Chunk(step, slice(0, step.num_rows), torch.ones(()), None)
    golden.assert_close(chunk.coefficient(None, "var"), golden["confidence"], "confidence")
    if "confidence_sigmoid_gcl" in golden:
        golden.assert_close(chunk.coefficient(None, "sigmoid"), golden["confidence_sigmoid_gcl"], "sigmoid")


@pytest.mark.parametrize(("path", "dtype"), _cases("tinyclip_affinity"))
def test_both_directions(path, dtype):
    """TinyCLIP's file has the two directions apart."""
    golden = Golden(path, dtype)
    logits = both_ways(*(golden[f"in.{n}"] for n in ("image", "text", "image", "text")), golden["in.log_scale"].exp())
    losses = map(distillation.soft_cross_entropy, golden.teacher_logits, logits)
    for loss, key in zip(losses, ("out.img2text", "out.text2img"), strict=True):
        golden.assert_close(loss.mean(), golden[key], key)


@pytest.mark.parametrize(("path", "dtype"), _cases("embed_label"))
def test_class_probabilities(path, dtype):
    """softmax(scale * cosine) of every class."""
    golden = Golden(path, dtype)
    unit = [F.normalize(golden[f"in.{name}"], dim=1) for name in ("student", "text_embeddings")]
    logits = contrastive.similarity_logits(*unit, float(golden.hyper["temp"]))
    golden.assert_close(logits.softmax(dim=1), golden["out.probs"], "out.probs")


@CASES
def test_every_number_is_compared(path, dtype):
    """No output of a file goes unseen."""
    golden = Golden(path, dtype)
    for part in parts(golden):
        golden[part.value], golden.gradients(part.gradient)
    left = {key for key in golden.tensors.keys() - golden.checked if not key.startswith("in.")}
    absent = {f"out.{name}" for name in ("afd",) if not golden.gradients(f"grad.{name}")}  # of two widths: 0 there
    assert {key for key in left if not BY_NAME.fullmatch(key)} <= absent


@pytest.mark.parametrize(("path", "dtype"), _cases(*golden_steps.PREFIXES))
@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_steps(path, dtype, chunk_rows):
    """Every step of FastCLIP, SogCLR, iSogCLR, TempNet and DistTempNet, and every number of it."""
    file = golden_steps.StepFile(path, dtype)
    golden_steps.replay(file, chunk_rows=chunk_rows)
    assert file.unseen() == set()


@pytest.mark.parametrize(("path", "dtype"), _cases(*golden_recall.PREFIXES))
@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_recall(path, dtype, chunk_rows):
    """Consecutive calls with queues, centres and priors; the clusters of ProtoCLIP."""
    golden_recall.check(path, dtype, chunk_rows=chunk_rows)
