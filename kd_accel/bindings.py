"""Where a term of the YAML meets its formula: rows of a chunk, or the whole batch, in; losses out.

Terms that remember or learn something of their own (global_contrastive, queues, centres, prototypes, fusion) are in
recall/; everything here is a pure function of the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd_accel import terms
from kd_accel.chunks import CONTRASTED, Chunk, Step, mean, through_head
from kd_accel.losses import contrastive, distillation, embedding, relational
from kd_accel.schedules import Progress, value_at
from kd_accel.schema import LocalError


def student_columns(term: terms.Term, leaves: dict[str, Tensor]) -> set[str]:
    """Names of the student's features that a term compares with all ranks'."""
    match term:
        case terms.Gradient():
            towers = CONTRASTED
        case terms.WholeBatchTerm():
            towers = term.match
        case _:
            return set(CONTRASTED) if "student" in term.columns else set()
    return {through_head("projected", f"raw.{tower}", leaves) for tower in towers}


def features_read(term: terms.Term, widths: dict[str, int]) -> set[str]:
    """Names of the student's features that a term sends a gradient to; `widths` are those of all it has, by name."""
    match term:
        case terms.LabelCE(classes=None):
            return {"class_logits"}
        case terms.Prototype():
            return {through_head("prototype", tower, widths) for tower in term.match}
        case terms.LabelCE():
            views = ("image",)
        case terms.MaskedFeatureMSE():
            views = ("masked_image", "text")
        case terms.Matched():
            views = tuple(term.match)
        case _ if "student" in term.columns:
            return set(CONTRASTED)
        case _:
            views = CONTRASTED
    return {through_head("projected", view, widths) for view in views}


def teacher_towers_read(term: terms.Term) -> set[str]:
    """Of "image" and "text" the towers of its teacher, or of its ensemble, that a term looks at."""
    if terms.confidence_of(term):
        return set(CONTRASTED)
    match term:
        case terms.Prototype(teacher=None):
            return set()
        case terms.Matched():
            return set(term.match.values())
    return set(CONTRASTED) if isinstance(term, terms.DistillationTerm) else set()


def teacher_columns(term: terms.Term) -> set[str]:
    """Names of its teacher's features that a term compares with all ranks'."""
    match term:
        case terms.Gradient():
            return {f"raw.{tower}" for tower in CONTRASTED}
        case terms.WholeBatchTerm():
            return {f"raw.{tower}" for tower in term.match.values()}
    return set(CONTRASTED) if "teacher" in term.columns else set()


def row_losses(term: terms.Term, chunk: Chunk, progress: Progress, *, scale: Tensor, classes: Tensor | None) -> Tensor:
    """One number per row, [c]. `scale`: the term's own logit scale or the student's; `classes`: class embeddings."""
    match term:
        case terms.Clip():
            return _info_nce(chunk.student_logits, chunk)
        case terms.HardLabel():
            return _info_nce(chunk.logits(1 / term.temperature), chunk)
        case terms.SigLip():
            return contrastive.pairwise_sigmoid(chunk.student_logits[0] + chunk.bias, chunk.offset)
        case terms.LabelCE():
            return _label_ce(term, chunk, classes)
        case terms.InteractiveContrastive():
            return _info_nce(chunk.cross_logits(term.teacher, scale), chunk)
        case terms.FeatureMSE() | terms.MaskedFeatureMSE():
            return _feature_mse(term, chunk)
    if isinstance(term, terms.Matched):
        return _matched(term, chunk, progress)
    return _relation(term, chunk, scale)


def whole_loss(term: terms.WholeBatchTerm, step: Step, scale: Tensor) -> Tensor:
    """The loss of all columns at once, []; alike on every rank."""
    teacher = step.only_teacher(term.teacher)
    targets = step.teacher_columns[teacher]
    if isinstance(term, terms.Gradient):
        rows = (F.normalize(_columns_of(step, tower), dim=1) for tower in CONTRASTED)
        t_rows = (F.normalize(targets[f"raw.{tower}"], dim=1) for tower in CONTRASTED)
        return relational.gradient_distance(*rows, *t_rows, *_gradient_scales(term, step.specs[teacher], scale))
    losses = [
        _whole_pair(term, _columns_of(step, ours), targets[f"raw.{theirs}"]) for ours, theirs in term.match.items()
    ]
    return sum(losses) / len(losses)


def _info_nce(logits: tuple[Tensor, Tensor], chunk: Chunk) -> Tensor:
    return mean(*(contrastive.info_nce(z, chunk.offset) for z in logits))


def _label_ce(term: terms.LabelCE, chunk: Chunk, classes: Tensor | None) -> Tensor:
    if classes is None:
        logits = chunk.leaves["raw.class_logits"]
    else:
        logits = contrastive.similarity_logits(chunk.unit("image"), classes, term.scale)
    labels = chunk.step.labels[chunk.rows]
    if labels.max() >= logits.shape[1]:
        raise LocalError(
            f"data.label: a sample has the class number {labels.max().item()}, but label_ce knows {logits.shape[1]}"
            " classes, from 0 on: fix the labels, or give all classes (classes, student.num_classes)"
        )
    if term.reference:
        logits = logits.softmax(dim=1)
    return F.cross_entropy(logits, labels, reduction="none")


def _feature_mse(term: terms.FeatureMSE | terms.MaskedFeatureMSE, chunk: Chunk) -> Tensor:
    teacher = chunk.step.only_teacher(term.teacher)
    image = chunk.unit("masked_image" if isinstance(term, terms.MaskedFeatureMSE) else "image")
    pairs = [(image, "image"), (chunk.unit("text"), "text")]
    image, text = (distillation.squared_distance(rows, chunk.teacher_rows(teacher, tower)) for rows, tower in pairs)
    return (image + text) / pairs[0][0].shape[1] if term.reduction == "mean" else mean(image, text)


def _relation(term: terms.Term, chunk: Chunk, scale: Tensor) -> Tensor:
    """Terms between logits of student and teacher, averaged over both directions."""
    match term:
        case terms.LogitKL():
            pairs = chunk.teacher_logits(term.teacher, term.teacher_temperature), chunk.student_logits
            formula = distillation.kl_divergence
        case terms.Affinity():
            student = chunk.student_logits if term.temperature is None else chunk.logits(1 / term.temperature)
            pairs = chunk.teacher_logits(term.teacher, term.teacher_temperature), student
            formula = distillation.soft_cross_entropy
        case terms.Dist():
            pairs = chunk.teacher_logits(term.teacher, term.teacher_temperature), chunk.student_logits
            formula = distillation.correlation_distance
        case terms.CrossKL():
            pairs = (
                chunk.teacher_logits(term.teacher, term.teacher_temperature),
                chunk.cross_logits(term.teacher, scale),
            )
            formula = distillation.kl_divergence
        case terms.MobileClip():
            pairs, formula = (_ensemble(term, chunk), chunk.student_logits), distillation.cross_entropy_of
        case terms.LogitMSE():
            pairs, formula = (chunk.teacher_cosines(term.teacher), chunk.cosines), distillation.logit_mse
        case terms.CosDiff():
            targets = chunk.teacher_cosines(term.teacher)
            return mean(
                *(distillation.cos_diff(*pair, chunk.offset) for pair in zip(targets, chunk.cosines, strict=True))
            )
        case terms.SoftLabel():
            pairs = chunk.teacher_logits(term.teacher, term.temperature), chunk.logits(1 / term.temperature)
            losses = term.temperature**2 * mean(*map(distillation.kl_divergence, *pairs))
            return losses * chunk.step.num_columns if term.reference else losses
        case _:
            raise AssertionError(f"no formula for {term!r}")
    return mean(*map(formula, *pairs))


def _ensemble(term: terms.MobileClip, chunk: Chunk) -> list[Tensor]:
    """The teachers' distributions, averaged by their weights after each one's softmax; per direction, [c, B]."""
    names = terms.teachers_read(term, list(chunk.step.specs))
    shares = torch.tensor([chunk.step.specs[name].weight for name in names])
    shares = (shares / shares.sum()).tolist()
    directions = zip(*(chunk.teacher_logits(name) for name in names), strict=True)
    return [sum(share * z.softmax(dim=1) for share, z in zip(shares, logits, strict=True)) for logits in directions]


def _matched(term: terms.Matched, chunk: Chunk, progress: Progress) -> Tensor:
    """Terms between embeddings of the same sample, averaged over the towers that are matched."""
    losses = []
    for ours, theirs in term.match.items():
        rows, targets = chunk.raw(ours), chunk.teacher_rows(term.teacher, f"raw.{theirs}")
        match term:
            case terms.EmbeddingMSE():
                losses.append(embedding.mean_squared(rows, targets))
            case terms.EmbeddingL1():
                losses.append(embedding.mean_absolute(rows, targets))
            case terms.EmbeddingHuber():
                losses.append(embedding.mean_huber(rows, targets, term.delta))
            case terms.EmbeddingCE():
                rows = rows.softmax(dim=1) if term.reference else rows
                losses.append(distillation.soft_cross_entropy(targets, rows))
            case terms.EmbeddingKL():
                kl = embedding.softmax_kl(rows, targets, value_at(term.temperature, progress))
                losses.append(kl * chunk.step.num_columns if term.reference else kl)
            case terms.Cosine():
                losses.append(embedding.cosine_distance(rows, targets))
            case terms.SimReg():
                losses.append(_SIMREG[term.distance](F.normalize(rows, dim=1), F.normalize(targets, dim=1)))
            case _:
                raise AssertionError(f"no formula for {term!r}")
    return sum(losses) / len(losses)


_SIMREG = {"mse": embedding.mean_squared, "l1": embedding.mean_absolute, "smooth_l1": embedding.smooth_l1}


def _whole_pair(term: terms.WholeBatchTerm, rows: Tensor, targets: Tensor) -> Tensor:
    match term:
        case terms.RKD():
            rows, targets = F.normalize(rows, dim=1), F.normalize(targets, dim=1)
            loss = torch.zeros_like(rows[0, 0])
            if term.distance_weight:
                loss = loss + term.distance_weight * relational.rkd_distance(rows, targets)
            if term.angle_weight:
                loss = loss + term.angle_weight * relational.rkd_angle(rows, targets)
            return loss
        case terms.VICReg():
            weights = term.invariance_weight, term.variance_weight, term.covariance_weight
            return relational.vicreg(*_as_published(term, rows, targets), *weights)
        case terms.Barlow():
            formula = relational.barlow_published if term.reference else relational.barlow
            return formula(*_as_published(term, rows, targets), term.redundancy_weight)
    raise AssertionError(f"no formula for {term!r}")


def _as_published(term: terms.VICReg | terms.Barlow, *sides: Tensor) -> tuple[Tensor, ...]:
    """ITRA's code normalises the embeddings first."""
    return tuple(F.normalize(side, dim=1) for side in sides) if term.reference else sides


def _columns_of(step: Step, tower: str) -> Tensor:
    """All ranks' embeddings of the student in the teacher's space, [B, d_teacher]."""
    return step.columns[through_head("projected", f"raw.{tower}", step.columns)]


def _gradient_scales(term: terms.Gradient, spec, scale: Tensor) -> tuple[Tensor, Tensor | float]:
    return (1 / scale, 1 / spec.logit_scale) if term.reference else (scale, spec.logit_scale)
