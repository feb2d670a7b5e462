"""Captions without their padding give the features and the gradients of the whole context."""

from __future__ import annotations

import open_clip
import pytest
import torch
from open_clip.factory import get_model_config

from kd_accel.models.text import encode_text, text_pad
from kd_accel.models.towers import construct
from kd_accel.trim import trimmed

CUT = {
    "CLIP": {},
    "CLIP, eos": {"text": {"pool_type": "eos", "eos_id": 49407}},
    "CLIP, no projection": {"text": {"proj_type": "none", "width": 16}},
    "CLIP, projection with bias": {"text": {"proj_bias": True}},
    "CustomTextCLIP": {"custom_text": True},
    "CustomTextCLIP, eos": {"custom_text": True, "text": {"pool_type": "eos", "eos_id": 49407}},
    "CustomTextCLIP, no projection": {"custom_text": True, "text": {"proj_type": "none", "width": 16}},
    "CustomTextCLIP, projection with bias": {"custom_text": True, "text": {"proj_bias": True}},
}
NEVER_CUT = {
    "looks both ways": {"text": {"no_causal_mask": True}},
    "looks both ways, custom": {"custom_text": True, "text": {"no_causal_mask": True}},
    "last token": {"custom_text": True, "text": {"pool_type": "last"}},
    "class token": {"custom_text": True, "text": {"embed_cls": True}},
}


def features_and_gradients(model, tokens):
    """Of every parameter of the text tower; a fixed direction in place of a loss."""
    model.zero_grad()
    features = encode_text(model, tokens)
    (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return features.detach(), named


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("length", ["short", "one long", "full"])
def test_equal_to_the_whole_context(kind, length, arch):
    torch.manual_seed(0)
    model_cfg = arch(**CUT[kind])
    model = construct(model_cfg, where="student.arch")
    captions = ["a cat", "!", "", "a red square"]
    captions += {"short": [], "one long": ["one two three four five six seven"], "full": ["word " * 40]}[length]
    tokens = open_clip.SimpleTokenizer(context_length=16)(captions)
    cut = trimmed(tokens, text_pad(model_cfg["text_cfg"]))
    assert cut.shape[1] == {"short": 8, "one long": 16, "full": 16}[length]
    cut = trimmed(tokens, text_pad(model_cfg["text_cfg"]), multiple=1)
    assert cut.shape[1] == {"short": 5, "one long": 9, "full": 16}[length]

    (got, got_grads), (all_, all_grads) = (features_and_gradients(model, t) for t in (cut, tokens))
    with torch.no_grad():
        torch.testing.assert_close(all_, model.encode_text(tokens), rtol=0, atol=0)  # open_clip's own
    torch.testing.assert_close(got, all_, rtol=1e-5, atol=1e-6)
    assert len(all_grads) > 20
    assert got_grads.keys() == all_grads.keys()
    for name, gradient in all_grads.items():
        rounding = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(got_grads[name], gradient, rtol=0, atol=rounding, msg=name)


@pytest.mark.parametrize("kind", CUT)
def test_modules_run_in_one_order_whatever_the_length(kind, arch):
    """Ranks have captions of their own; under ZeRO-3 they gather the weights module by module, all together."""
    model = construct(arch(**CUT[kind]), where="student.arch")
    seen = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    tokens = open_clip.SimpleTokenizer(context_length=16)(["a cat"])
    orders = []
    for given in (tokens, tokens[:, :8]):
        seen.clear()
        encode_text(model, given)
        orders.append(list(seen))
    assert orders[0] == orders[1] != []


@pytest.mark.parametrize("kind", NEVER_CUT)
def test_never_cut_where_padding_is_read(kind, arch):
    model_cfg = arch(**NEVER_CUT[kind])
    assert text_pad(model_cfg["text_cfg"]) is None
    model = construct(model_cfg, where="student.arch").eval()
    tokens = open_clip.SimpleTokenizer(context_length=16)(["a cat", "a red square"])
    with torch.no_grad():
        assert torch.equal(encode_text(model, tokens), model.encode_text(tokens))


@pytest.mark.parametrize(
    ("name", "pad"),
    [
        ("ViT-B-32", 0),
        ("RN50", 0),
        ("MobileCLIP-B", 0),
        ("PE-Core-B-16", 0),
        ("MobileCLIP-S1", None),
        ("ViT-B-16-SigLIP", None),
        ("ViT-B-16-SigLIP2", None),
        ("ViT-L-14-CLIPA", None),
        ("roberta-ViT-B-32", None),
        ("ViT-H-14-worldwide", None),
    ],
)
def test_pad_of_published_models(name, pad):
    assert text_pad(get_model_config(name)["text_cfg"]) == pad
