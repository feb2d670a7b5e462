"""Every term through the Objective: its gradient is the derivative of its loss, chunks change nothing, memory waits.

What the terms are: every_term.py. B rows, N sample ids.
"""

from __future__ import annotations

import math

import every_term
import pytest
import torch
from every_term import TERMS, B, N
from torch import Tensor

from kd_accel import terms
from kd_accel.bindings import features_read
from kd_accel.objective import Objective
from kd_accel.schedules import Progress
from kd_accel.schema import ConfigError, alternatives, kind_of

# Their gradient is by design not the derivative of the loss: published surrogates, and temperatures that a network
# predicts from features without sending them a gradient. Golden files and the tests below see to them.
SURROGATES = [name for name in TERMS if name.startswith("gcl_published")] + ["gcl_tempnet", "gcl_disttempnet"]
REMEMBER = [name for name in TERMS if name.startswith(("gcl", "compress", "seed", "dino", "proto_cpc"))]
LATER = Progress(step=40, epoch=2.5)


def _flat(outcome) -> dict[str, Tensor]:
    return {"loss": outcome.loss, **outcome.metrics, **outcome.gradients}


def test_every_kind_is_here():
    """A kind that is added to the union has to be added to every_term.py."""
    kinds = {kind_of(schema) for schema in alternatives(terms.AnyTerm)}
    assert {term["kind"] for term in TERMS.values()} == kinds


class _AsFunction(torch.autograd.Function):
    """The Objective as a function of the student's features whose backward is what the Outcome says."""

    @staticmethod
    def forward(ctx, objective: Objective, given: dict, *rows: Tensor) -> Tensor:
        given = {**given, "student": dict(zip(given["student"], rows, strict=True))}
        outcome = every_term.call(objective, given, Progress())
        ctx.gradients = list(outcome.gradients.values())
        return outcome.loss

    @staticmethod
    def backward(ctx, gradient: Tensor):
        return None, None, *(gradient * rows for rows in ctx.gradients)


@pytest.mark.parametrize("name", [name for name in TERMS if name not in SURROGATES])
def test_feature_gradients_are_the_derivative_of_the_loss(name):
    """Finite differences of the reported loss, in float64, chunked."""
    objective, given = every_term.objective([name], chunk_rows=5), every_term.features()
    rows = [rows.clone().requires_grad_() for rows in given["student"].values()]
    assert torch.autograd.gradcheck(
        lambda *moved: _AsFunction.apply(objective, given, *moved), rows, fast_mode=True, atol=1e-6
    )


@pytest.mark.parametrize("name", TERMS)
def test_chunks_change_nothing(name):
    """Loss, metrics, gradients, and after a step everything learned and remembered."""
    results = []
    for chunk_rows in (B, 5):
        objective = every_term.objective([name], chunk_rows=chunk_rows)
        outcome = every_term.call(objective, every_term.features(), LATER)
        gradients = every_term.own_gradients(objective)
        objective.step(LATER, lr=0.01, temperature_lr=0.02)
        results.append({**_flat(outcome), **gradients, **every_term.state(objective)})
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in TERMS if name not in [*SURROGATES, "gcl_v1"]])  # v1's is constant
def test_scales_have_the_derivative_of_the_loss(name):
    """Temperature, bias and own scales: finite differences; unlike the published codes' (SURROGATES, golden files)."""
    objective, given = every_term.objective([name]), every_term.features()
    every_term.call(objective, given, Progress())
    for parameter in (p for p in objective._scales() if p.grad is not None):
        actual, step, values = parameter.grad.item(), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step)
            values.append(every_term.call(objective, given, Progress()).loss.item())
            with torch.no_grad():
                parameter.sub_(sign * step)
        assert actual == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("name", REMEMBER)
def test_memory_waits_for_the_step(name):
    """Forward alone remembers nothing, however often; step() does. So a step that the engine skips leaves no trace."""
    objective, given = every_term.objective([name]), every_term.features()
    fresh = every_term.state(objective)
    first, again = (_flat(every_term.call(objective, given, LATER)) for _ in range(2))
    prototypes = [key for key in fresh if "networks" in key]  # a TempNet takes its prototypes from the first batch
    before = {key: value for key, value in every_term.state(objective).items() if key not in prototypes}
    torch.testing.assert_close(before, {k: v for k, v in fresh.items() if k not in prototypes}, rtol=0, atol=0)
    torch.testing.assert_close(first, again)
    objective.step(LATER, lr=0.01, temperature_lr=0.02)
    after = every_term.state(objective)
    changed = [key for key in fresh if not torch.equal(after[key], fresh[key])]
    assert any(key.startswith("recall.") for key in changed)


@pytest.mark.parametrize("name", TERMS)
def test_a_saved_objective_goes_on(name):
    """The state of one, loaded into a fresh one, gives the same next step and the same state after it."""
    objective = every_term.objective([name])
    every_term.call(objective, every_term.features(0), LATER)
    objective.step(LATER, lr=0.01, temperature_lr=0.02)
    other = every_term.objective([name])
    every_term.load_state(other, every_term.state(objective))
    results = []
    for either in (objective, other):
        outcome = every_term.call(either, every_term.features(1), LATER)
        either.step(LATER, lr=0.01, temperature_lr=0.02)
        results.append({**_flat(outcome), **every_term.state(either)})
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [n for n in TERMS if n.startswith("gcl")])
def test_order_of_the_samples_carries_no_meaning(name):
    """Samples permuted together with their ids: same loss, same memory. (Dropout is drawn by row: switched off.)"""
    given, order = every_term.features(), torch.randperm(B)
    given["ids"][-1] = N - 1 - given["ids"][0]  # of a repeated id the last row counts
    results = []
    for rows in (torch.arange(B), order):
        objective = every_term.objective([name])
        term = objective.config.terms[name]
        object.__setattr__(term.network, "dropout", 0.0)
        for network in objective.recall[name].networks.values():
            network.initialised.fill_(True)  # prototypes are the first rows of the first batch
        outcome = every_term.call(objective, every_term.rows_of(given, rows), LATER)
        objective.step(LATER, lr=0.0, temperature_lr=0.0)
        results.append({"loss": outcome.loss, **every_term.state(objective)})
    torch.testing.assert_close(*results)


def test_confidences_are_remembered_by_sample_id():
    """The mean of alpha over the batch is the metric; samples never seen are nan."""
    objective, given = every_term.objective(["feature"]), every_term.features()
    given["ids"] = torch.arange(B)
    outcome = every_term.call(objective, given, LATER)
    objective.step(LATER, lr=0.0, temperature_lr=0.0)
    alpha = objective.by_id()[f"confidences.{every_term.TEACHER_OF_SEVERAL}.alpha"]
    torch.testing.assert_close(alpha[:B].mean(), outcome.metrics[f"confidence/{every_term.TEACHER_OF_SEVERAL}"])
    assert alpha[B:].isnan().all()


def test_a_term_learns_from_the_teacher_it_names():
    """Another teacher's features change nothing; its own do, in proportion to its weight."""
    objective, given = every_term.objective(["kl"]), every_term.features()
    before = every_term.call(objective, given, LATER)
    given["teachers"]["first"] = {tower: -rows for tower, rows in given["teachers"]["first"].items()}
    after = every_term.call(objective, given, LATER)
    torch.testing.assert_close(after.loss, before.loss, rtol=0, atol=0)
    weight = TERMS["kl"]["weight"] * objective.teachers[every_term.TEACHER_OF_SEVERAL].weight
    torch.testing.assert_close(before.loss, weight * before.metrics["loss/kl"])


def test_ensemble_averages_distributions_by_weight():
    """MobileCLIP's target is the mean of the teachers' softmaxes, 0.5 : 2 here, not the softmax of a mean."""
    objective, given = every_term.objective(["mobileclip"]), every_term.features()
    unit = {
        n: torch.nn.functional.normalize(rows, dim=1) for n, rows in given["student"].items() if n in ("image", "text")
    }
    logits = objective.log_scale.exp() * unit["image"] @ unit["text"].T
    total = 0.0
    for way in (0, 1):
        target = 0.0
        for name, spec in objective.teachers.items():
            rows = [torch.nn.functional.normalize(r, dim=1) for r in given["teachers"][name].values()]
            z = spec.logit_scale * rows[0] @ rows[1].T
            target = target + spec.weight / 2.5 * (z.T if way else z).softmax(1)
        total = total - (target * (logits.T if way else logits).log_softmax(1)).sum(1).mean() / 2
    torch.testing.assert_close(every_term.call(objective, given, LATER).loss, total.detach())


def test_tempnet_sends_the_towers_no_gradient():
    """With the networks' temperatures the feature gradient is that of the same temperatures as constants."""
    objective, given = every_term.objective(["gcl_tempnet"]), every_term.features()
    outcome = every_term.call(objective, given, Progress())
    recall = objective.recall["gcl_tempnet"]
    rows = {n: given["student"][n].clone().requires_grad_() for n in ("image", "text")}
    unit = {n: torch.nn.functional.normalize(r, dim=1) for n, r in rows.items()}
    tau = {
        n: r.detach()
        for n, r in recall.derive({**unit, **{f"raw.{n}": r for n, r in rows.items()}}, {}, Progress()).items()
    }
    loss, others = 0.0, ~torch.eye(B, dtype=torch.bool)
    for one, two in (("image", "text"), ("text", "image")):
        t = tau[f"tau.gcl_tempnet.{one}"]
        z = unit[one] @ unit[two].T / t[:, None]
        g = ((z - z.diagonal()[:, None]).exp() * others).sum(1) / (B - 1)
        loss = loss + (t * ((recall.term.eps + g).log() + recall.term.rho)).mean() / 2
    loss.backward()
    torch.testing.assert_close(outcome.loss, loss.detach())
    for name, leaf in rows.items():
        torch.testing.assert_close(outcome.gradients[name], leaf.grad)


def test_tempnet_has_the_derivative_of_the_loss():
    """The networks' own parameters, against one plain graph through them."""
    objective, given = every_term.objective(["gcl_tempnet"]), every_term.features()
    every_term.call(objective, given, Progress())
    objective.step(Progress(), lr=0.0, temperature_lr=0.0)  # from here on the prototypes are its own
    every_term.call(objective, given, Progress())
    network = objective.recall["gcl_tempnet"].networks["text"]
    for parameter in network.parameters():
        actual, index = parameter.grad.flatten()[0].item(), (0,) * parameter.ndim
        values, step = [], 1e-6
        for sign in (1, -1):
            with torch.no_grad():
                parameter[index] += sign * step
            values.append(every_term.call(objective, given, Progress()).loss.item())
            with torch.no_grad():
                parameter[index] -= sign * step
        assert actual == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("name", ["gcl_v3", "prototype", "feature"])
def test_a_sample_id_outside_the_memory(name):
    """It is named, with what to do, before the step is taken."""
    objective, given = every_term.objective([name]), every_term.features()
    given["ids"][3] = N
    with pytest.raises(ValueError, match=rf"sample id {N} is outside the memory of {N} samples.*kd-accel index"):
        every_term.call(objective, given, LATER)


@pytest.mark.parametrize("gamma", [0.0, 1.5, {"kind": "cosine", "start": 1.0, "end": 0.0, "epochs": 3}])
def test_gamma_outside_its_range(gamma):
    with pytest.raises(ConfigError, match=r"gamma must stay in \(0, 1\]"):
        every_term.build({"gcl": {"kind": "global_contrastive", "gamma": gamma}})


@pytest.mark.parametrize("kind", ["rkd", "gradient", "vicreg", "barlow"])
def test_confidence_on_a_term_of_the_whole_batch(kind):
    with pytest.raises(ConfigError, match="has no loss per sample: drop confidence"):
        every_term.build({"term": {"kind": kind, "confidence": True}})


def test_a_feature_that_is_not_a_number():
    """NonFiniteLoss names terms and feature; nothing is remembered of that step."""
    objective, given = every_term.objective(["gcl_v3", "dino"]), every_term.features()
    before = every_term.state(objective)
    given["student"]["image"][1, 0] = math.nan
    with pytest.raises(FloatingPointError, match=r"loss/gcl_v3.* is not finite; .*student image on rank 0"):
        every_term.call(objective, given, LATER)
    torch.testing.assert_close(every_term.state(objective), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gcl_tempnet", "gcl_disttempnet"])
@pytest.mark.parametrize("value", [math.nan, None], ids=["loss is nan", "engine skips"])
def test_a_tempnet_starts_from_a_batch_whose_step_was_taken(name, value):
    """After a first step that is skipped everything is as before, and the next batch gives the prototypes."""
    objective, (first, second) = every_term.objective([name]), (every_term.features(step) for step in range(2))
    before = objective.state()
    if value is None:
        every_term.call(objective, first, Progress())  # and no objective.step
    else:
        first["student"]["text"][1, 0] = value
        with pytest.raises(FloatingPointError):
            every_term.call(objective, first, Progress())
    torch.testing.assert_close(objective.state(), before, rtol=0, atol=0)
    fresh = every_term.objective([name])
    for built in (objective, fresh):
        every_term.call(built, second, Progress(step=1))
        built.step(Progress(step=1), lr=0.01, temperature_lr=0.01)
    torch.testing.assert_close(objective.state(), fresh.state(), rtol=0, atol=0)
    prototypes = objective.recall[name].networks["image"].prototypes.detach()
    moved = (prototypes - second["student"]["text"][: len(prototypes)]).abs()
    assert (moved > 0).any()
    assert moved.max() <= 1.01 * every_term.NETWORK["lr"]  # AdamW's first step is the learning rate, or less


def test_a_label_beyond_the_classes():
    """It is named before a lookup goes wrong on some device."""
    objective, given = every_term.objective(["label_head"]), every_term.features()
    given["labels"][2] = every_term.C
    with pytest.raises(ConfigError, match=rf"class number {every_term.C}, but label_ce knows {every_term.C} classes"):
        every_term.call(objective, given, LATER)


WITHOUT_HEADS = {name: every_term.D_TEACHER for name in ("image", "text", "masked_image")} | {
    "class_logits": every_term.C
}


@pytest.mark.parametrize("widths", [every_term.WIDTHS, WITHOUT_HEADS], ids=["all heads", "no projector"])
@pytest.mark.parametrize("name", TERMS)
def test_features_read_are_those_with_a_gradient(name, widths):
    """Of a student with projectors and prototype heads, and of one that is as wide as its teacher without them."""
    objective, given = every_term.objective([name], widths=widths), every_term.features()
    given["student"] = {n: torch.randn(B, width, dtype=torch.float64) for n, width in widths.items()}
    gradients = every_term.call(objective, given, LATER).gradients
    read = {n for n, gradient in gradients.items() if gradient.any()}
    assert features_read(objective.config.terms[name], widths) == read


@pytest.mark.parametrize("name", ["train", "keys", "forward"])
def test_a_term_named_like_torchs_own(name):
    with pytest.raises(ConfigError, match=rf"objective.terms.{name}: torch's modules have an attribute of that name"):
        Objective(every_term.build({name: {"kind": "clip"}}))
