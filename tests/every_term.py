"""One term of every kind and of every option that changes its formula, and the features of a step for all of them.

B rows of all ranks, D the student's width, D_TEACHER the teachers', C classes, N sample ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

B, D, D_TEACHER, C, N = 12, 6, 5, 4, 40  # 12 rows split over 2 and over 4 ranks
BIAS = -4.0
QUEUE = {"queue_size": 7}
GCL = {"kind": "global_contrastive", "rho": 1.5, "eps": 1e-3, "gamma": 0.6}
NETWORK = {"prototypes": 5, "lr": 0.01}
TERMS = {
    "clip": {"kind": "clip", "weight": 0.7},
    "hard_label": {"kind": "hard_label", "temperature": 0.5},
    "siglip": {"kind": "siglip", "weight": 0.3},
    "gcl_v0": {**GCL, "variant": "v0"},
    "gcl_v1": {**GCL, "variant": "v1"},
    "gcl_v2": {**GCL, "variant": "v2"},
    "gcl_v3": {**GCL, "variant": "v3"},
    "gcl_momentum": {**GCL, "variant": "isogclr"},
    "gcl_tempnet": {**GCL, "temperature": "network", "network": NETWORK},
    "gcl_disttempnet": {**GCL, "temperature": "network", "network": {**NETWORK, "head": "disttempnet"}},
    "gcl_published_v0": {**GCL, "variant": "v0", "reference": True},
    "gcl_published_v2": {**GCL, "variant": "v2", "reference": True},
    "gcl_published_v3": {**GCL, "variant": "v3", "reference": True},
    "gcl_published_sogclr": {**GCL, "variant": "sogclr", "reference": True},
    "gcl_published_tempnet": {**GCL, "temperature": "network", "network": NETWORK, "reference": True},
    "label_head": {"kind": "label_ce"},
    "label_prompts": {"kind": "label_ce", "classes": "prompts.safetensors", "scale": 5.0},
    "label_published": {"kind": "label_ce", "reference": True},
    "kl": {"kind": "logit_kl", "weight": 0.9, "confidence": "var_shifted"},
    "kl_first": {"kind": "logit_kl", "teacher": "first", "confidence": "sigmoid"},
    "kl_soft": {"kind": "logit_kl", "weight": 1.1, "teacher_temperature": 0.2},
    "affinity": {"kind": "affinity", "confidence": "sigmoid"},
    "affinity_fixed": {"kind": "affinity", "temperature": 0.3, "teacher_temperature": 0.3},
    "dist": {"kind": "dist", "weight": 2.0, "confidence": True},
    "mobileclip": {"kind": "mobileclip"},
    "soft_label": {"kind": "soft_label", "temperature": 2.0},
    "soft_label_published": {"kind": "soft_label", "temperature": 2.0, "reference": True},
    "logit_mse": {"kind": "logit_mse"},
    "cos_diff": {"kind": "cos_diff"},
    "icl": {"kind": "interactive_contrastive", "weight": 0.6, "confidence": "var"},
    "icl_own": {"kind": "interactive_contrastive", "weight": 1.7, "scale": "own"},
    "cross_kl": {"kind": "cross_kl", "scale": "own"},
    "gradient": {"kind": "gradient"},
    "gradient_published": {"kind": "gradient", "reference": True},
    "feature": {"kind": "feature_mse", "weight": 20.0, "confidence": True},
    "feature_sum": {"kind": "feature_mse", "weight": 1.3, "reduction": "sum", "confidence": "var"},
    "masked": {"kind": "masked_feature_mse"},
    "augmented": {"kind": "augmented_feature"},
    "augmented_student": {"kind": "augmented_feature", "scale": "student"},
    "mse": {"kind": "embedding_mse"},
    "l1": {"kind": "embedding_l1", "match": {"image": "text"}},
    "huber": {"kind": "embedding_huber", "delta": 0.7},
    "ce": {"kind": "embedding_ce"},
    "ce_published": {"kind": "embedding_ce", "reference": True},
    "embedding_kl": {"kind": "embedding_kl", "temperature": 2.0},
    "embedding_kl_published": {"kind": "embedding_kl", "reference": True},
    "cosine": {"kind": "cosine", "match": {"text": "text"}},
    "simreg": {"kind": "simreg"},
    "simreg_l1": {"kind": "simreg", "distance": "l1"},
    "simreg_smooth": {"kind": "simreg", "distance": "smooth_l1"},
    "dino": {"kind": "dino", "teacher_temperature": 0.5},
    "proto_cpc": {"kind": "proto_cpc", "teacher_temperature": 0.5},
    "rkd": {"kind": "rkd", "match": {"image": "text"}},
    "compress_1q": {"kind": "compress", "temperature": 0.3, **QUEUE},
    "compress_2q": {"kind": "compress", "temperature": 0.3, "queues": "2q", **QUEUE},
    "seed": {"kind": "seed", "temperature": 0.3, "teacher_temperature": 0.2, **QUEUE},
    "vicreg": {"kind": "vicreg"},
    "barlow": {"kind": "barlow"},
    "prototype": {"kind": "prototype", "clusters": 3, "target_temperature": 0.5},
    "prototype_hard": {"kind": "prototype", "clusters": 3, "target_temperature": None},
    "prototype_teacher": {"kind": "prototype", "clusters": 3, "teacher": "first", "match": {"image": "text"}},
}
TEACHER_OF_SEVERAL = "second"  # whom a term learns from that has to name one


def build(terms: dict[str, dict], **values):
    """The ObjectiveConfig of these terms."""
    from kd_accel.config import ObjectiveConfig
    from kd_accel.schema import validate

    return validate(ObjectiveConfig, {"terms": terms, **values})


def objective(
    names: list[str],
    *,
    dtype: torch.dtype = torch.float64,
    chunk_rows: int = 1000,
    widths: dict[str, int] | None = None,
    **values,
):
    """The Objective with these terms of TERMS, two teachers and its clusters set; features have WIDTHS or `widths`."""
    from kd_accel.objective import Objective
    from kd_accel.types import TeacherSpec

    terms = {name: _with_teacher(TERMS[name]) for name in names}
    config = build(terms, logit_bias=BIAS, chunk_rows=chunk_rows, **values)
    seeded = torch.Generator().manual_seed(11)
    made = torch.get_rng_state()
    torch.manual_seed(12)  # networks and fusion layers start alike wherever this is called
    built = Objective(
        config,
        teachers={"first": TeacherSpec(D_TEACHER, 30.0, 0.5), "second": TeacherSpec(D_TEACHER, 12.0, 2.0)},
        widths=widths or WIDTHS,
        num_ids=N,
        class_embeddings={
            name: torch.randn(C, D_TEACHER, generator=seeded) for name in names if name == "label_prompts"
        },
    ).to(dtype)
    torch.set_rng_state(made)
    for name in names:
        if TERMS[name]["kind"] == "prototype":
            _set_clusters(built.recall[name], seeded, dtype)
    return built


def _with_teacher(term: dict) -> dict:
    if term["kind"] in ("clip", "hard_label", "siglip", "global_contrastive", "label_ce", "mobileclip", "prototype"):
        return term
    return {"teacher": TEACHER_OF_SEVERAL, **term}


def _set_clusters(recall, seeded: torch.Generator, dtype: torch.dtype) -> None:
    for tower in recall.term.match:
        labels = torch.randint(0, 3, (N - 5,), generator=seeded)  # the last five samples are in no episode
        widths = recall.clusters.widths_of(tower)
        centroids = [torch.randn(3, width, generator=seeded).to(dtype) for width in widths]
        recall.clusters.set(
            tower, ids=torch.arange(N - 5), labels=labels, centroids=centroids[0], target_centroids=centroids[1]
        )


WIDTHS = {
    **{"image": D, "text": D, "projected_image": D_TEACHER, "projected_text": D_TEACHER},
    **{
        "masked_image": D,
        "projected_masked_image": D_TEACHER,
        "class_logits": C,
        "prototype_image": 3,
        "prototype_text": 3,
    },
}


def features(step: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, dict]:
    """student, teachers, and ids and labels of all ranks in one step; alike wherever it is called."""
    seeded = torch.Generator().manual_seed(100 + step)
    student = {name: torch.randn(B, width, generator=seeded).to(dtype) for name, width in WIDTHS.items()}
    teachers = {
        teacher: {tower: torch.randn(B, D_TEACHER, generator=seeded).to(dtype) for tower in ("image", "text")}
        for teacher in ("first", "second")
    }
    ids = torch.randperm(N, generator=seeded)[:B]
    ids[-1] = ids[0]  # a sample that replaced a bad one
    return {"student": student, "teachers": teachers, "ids": ids, "labels": torch.randint(0, C, (B,), generator=seeded)}


def rows_of(given: dict, own: slice) -> dict:
    """Some rows of all of it."""
    return {
        "student": {name: rows[own] for name, rows in given["student"].items()},
        "teachers": {t: {name: rows[own] for name, rows in f.items()} for t, f in given["teachers"].items()},
        "ids": given["ids"][own],
        "labels": given["labels"][own],
    }


def call(built, given: dict, progress):
    """The Outcome of a step."""
    return built(given["student"], given["teachers"], progress, ids=given["ids"], labels=given["labels"])


def state(built) -> dict[str, Tensor]:
    """Everything learned and remembered, by name."""
    return built.state() | {name: column.clone() for name, column in built.by_id().items()}


def load_state(built, given: dict[str, Tensor]) -> None:
    """Continue from what `state` returned."""
    columns = built.by_id()
    for name, column in columns.items():
        column.copy_(given[name])
    built.load_state({name: tensor for name, tensor in given.items() if name not in columns})


def own_gradients(built) -> dict[str, Tensor]:
    """Of scales, bias and networks, by name."""
    return {f"d {name}": p.grad.clone() for name, p in built.named_parameters() if p.grad is not None}
