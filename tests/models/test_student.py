"""The student's features, projector, precision, gradients and release state."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import linear

from kd_accel.models.image import to_model_input
from kd_accel.schema import ConfigError


def gradients(model, out) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(row.float().square().sum() for row in out.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_forward_gives_raw_embeddings(student, view, captions):
    """ "image" and "text" are what open_clip's towers say before normalisation."""
    model = student()
    tokens = model.contract.text.tokenize(captions)
    out = model(view, tokens)
    pixels = to_model_input(view, model.contract.image, torch.float32)
    torch.testing.assert_close(out, {"image": model.clip.visual(pixels), "text": model.clip.encode_text(tokens)})
    assert out["image"].shape == (3, model.embed_dim)
    assert not torch.allclose(out["image"].norm(dim=1), torch.ones(3))


def test_projector_is_linear_in_the_raw_embedding(student, view, captions):
    """projected_x = W x + b per tower, on embeddings that are not normalised, at the teacher's width."""
    model = student(teacher_dim=24, projector="linear")
    out = model(view, model.contract.text.tokenize(captions))
    for tower in ("image", "text"):
        layer = model.projector[tower]
        assert out[f"projected_{tower}"].shape == (3, 24)
        torch.testing.assert_close(out[f"projected_{tower}"], linear(out[tower], layer.weight, layer.bias))


def test_projector_leaves_the_towers_initial_weights_alone(student):
    """A run with and one without a projector start from the same towers."""
    plain, projected = student(), student(teacher_dim=24, projector="linear")
    torch.testing.assert_close(plain.clip.state_dict(), projected.clip.state_dict(), rtol=0, atol=0)


def test_projector_needs_a_teacher(student):
    with pytest.raises(ConfigError, match="student.projector needs a teacher"):
        student(projector="linear")


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_follows_the_dtype_of_its_parameters(kind, student, view, captions):
    """Turned to bf16, as DeepSpeed does, it takes the same view and gives bf16 embeddings near the fp32 ones."""
    model = student(kind, teacher_dim=24, projector="linear").eval()
    tokens = model.contract.text.tokenize(captions)
    exact = model(view, tokens)
    rounded = model.to(torch.bfloat16)(view, tokens)
    for name, row in rounded.items():
        assert row.dtype == torch.bfloat16
        # bf16 keeps 8 bits: each of a few dozen operations errs by 2^-9, relative to the largest entries.
        assert (row.float() - exact[name]).abs().max() < 40 * 2**-9 * exact[name].abs().max()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_grad_checkpointing_changes_no_gradient(precision, student, view, captions):
    """Recomputed activations give the same features and the same gradient of every parameter."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    results = []
    for recompute in (False, True):
        model = student(grad_checkpointing=recompute).to(dtype)
        assert model.clip.visual.transformer.grad_checkpointing is recompute
        assert model.clip.transformer.grad_checkpointing is recompute
        out = model(view, model.contract.text.tokenize(captions))
        results.append((out, gradients(model, out)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_grad_checkpointing_of_a_resnet_is_refused(student):
    """open_clip would leave the image tower as it is, without a word."""
    with pytest.raises(ConfigError, match="student.grad_checkpointing: open_clip's ResNet"):
        student("resnet", grad_checkpointing=True)


def test_every_parameter_gets_a_gradient(student, view, captions):
    """A parameter that no loss reaches would stop DDP."""
    model = student(teacher_dim=24, projector="linear")
    grads = gradients(model, model(view, model.contract.text.tokenize(captions)))
    assert grads.keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_release_state_is_open_clips(kind, student):
    """The released keys are those of the open_clip model, buffers included, without the projector."""
    model = student(kind, teacher_dim=24, projector="linear")
    released = model.release_state(model.state_dict())
    assert released.keys() == model.clip.state_dict().keys()


def test_same_seed_same_student(student):
    torch.testing.assert_close(student().state_dict(), student().state_dict(), rtol=0, atol=0)


# What no term reads ---------------------------------------------------------------------------------------------------

ALL = ["image", "text", "projected_image", "projected_text", "prototype_image", "prototype_text", "class_logits"]
HEADS = {"projector": "mlp", "num_classes": 3, "prototype_head": {"hidden": 8, "width": 4}}


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
@pytest.mark.parametrize("read", [[name] for name in ALL] + [["image", "prototype_text"], ALL], ids=",".join)
def test_what_is_frozen_is_what_has_no_gradient(student, view, captions, kind, read):
    """The parameters that the features read come out of are trained, no other one is; the report names the parts."""
    model = student(kind, teacher_dim=24, **HEADS)
    tokens = model.contract.text.tokenize(captions)
    said = model(view, tokens)
    sum(said[name].square().sum() for name in read).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    model.freeze_all_but(set(read))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == reached
    parts = {"visual.": "image tower", "projector.": "projector", "prototype_head.": "head", "class_head.": "class"}
    still = [p for n, p in model.named_parameters() if n not in reached]
    assert bool(still) == bool(model.frozen)
    for start, part in parts.items():
        named = [name for name, _ in model.named_parameters() if start in name]
        assert any(part in name for name in model.frozen) == any(name not in reached for name in named)


def test_a_frozen_tower_stays_as_it_is(student, view, captions):
    """Running statistics too, also when the engine asks for training mode again."""
    model = student("resnet")
    model.freeze_all_but({"text"})
    model.eval().train()
    before = {name: tensor.clone() for name, tensor in model.clip.visual.state_dict().items()}
    model(view, model.contract.text.tokenize(captions))
    torch.testing.assert_close(model.clip.visual.state_dict(), before, rtol=0, atol=0)
    assert model.clip.transformer.training


def test_a_masked_view_is_the_image_towers(student):
    """And its projection that of the image projector."""
    model = student(teacher_dim=24, projector="linear", mask_ratio=0.5)
    model.freeze_all_but({"projected_masked_image"})
    assert model.frozen == ["text tower", "text projector"]
