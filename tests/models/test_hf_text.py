"""Text towers of transformers: their features, their releases, and that open_clip reads both alike."""

from __future__ import annotations

import json
import pickle
import shutil

import open_clip
import pytest
import tiny_hf
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer

from kd_accel.models.hf_text import POOLERS, build_hf_text, hf_text_cfg, read_hf_tower, write_hf_tower
from kd_accel.schema import ConfigError
from kd_accel.trim import trimmed

CAPTIONS = ["a red cat", "the dog on a green square !", ""]
WITH_POOLER = ("bert", "roberta", "xlm-roberta")
WHERE = "student.arch.text_cfg"
VISION = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 1, "head_width": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(family): with weights, written once."""
    written = {}

    def of(family: str = "bert"):
        if family not in written:
            written[family] = tiny_hf.write_text_model(tmp_path_factory.mktemp(family), family)
        return written[family]

    return of


def build(name, **options):
    defaults = {"embed_dim": 16, "pretrained": True, "pooling": "mean", "context_length": 16, "proj": "linear"}
    tower, text = build_hf_text(str(name), **defaults | {"where": WHERE} | options)
    return tower.eval(), text


@torch.no_grad()
def pooled_by_hand(folder, pooling, pad):
    """transformers' own model and tokenizer, one caption at a time, so without padding and masks."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    rows = []
    for caption in CAPTIONS:
        encoded = model(input_ids=tokenizer(caption, return_tensors="pt").input_ids)
        hidden = encoded.last_hidden_state[0]
        reduced = {"mean": hidden.mean(0), "max": hidden.amax(0), "cls": hidden[0], "last": hidden[-1]}
        rows.append(encoded.pooler_output[0] if pooling == "pooler" else reduced[pooling])
    return torch.stack(rows)


@pytest.mark.parametrize("family", tiny_hf.FAMILIES)
@pytest.mark.parametrize("pooling", POOLERS)
def test_features_are_those_of_transformers(family, pooling, folder):
    if pooling == "pooler" and family not in WITH_POOLER:
        with pytest.raises(ConfigError, match=rf"^{WHERE}: pooling 'pooler': .* \({family}\) has no pooler"):
            build(folder(family), pooling=pooling)
        return
    tower, text = build(folder(family), pooling=pooling, embed_dim=None, proj=None)
    assert tower.embed_dim == 32
    expected = pooled_by_hand(folder(family), pooling, text.pad)
    torch.testing.assert_close(tower(text.tokenize(CAPTIONS)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", tiny_hf.FAMILIES)
@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last"])
def test_cut_padding_changes_nothing(family, pooling, folder):
    """Neither features nor gradients, and every parameter has one: an engine would wait for the others."""
    tower, text = build(folder(family), pooling=pooling)
    tokens = text.tokenize(CAPTIONS)
    short = trimmed(tokens, text.pad, multiple=1)
    assert (tokens.shape, short.shape) == ((3, 16), (3, 9))
    results = []
    for given in (short, tokens):
        tower.zero_grad()
        features = tower(given)
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
        results.append((features.detach(), {name: p.grad.clone() for name, p in tower.named_parameters()}))
    (features, gradients), (all_features, all_gradients) = results
    torch.testing.assert_close(features, all_features, rtol=1e-5, atol=1e-6)
    for name, gradient in all_gradients.items():
        rounding = 1e-5 * gradient.abs().max().item() + 1e-7
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=rounding, msg=name)


def test_an_empty_caption_without_special_tokens(tmp_path):
    """Nothing is left of it but padding, and its features are still numbers."""
    folder = tiny_hf.write_text_model(tmp_path, "gpt2")
    state = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(state | {"post_processor": None}))
    for pooling in ("mean", "max", "cls", "last"):
        tower, text = build(folder, pooling=pooling)
        tokens = text.tokenize(["", "a cat"])
        assert (tokens[0] == text.pad).all()
        assert tower(tokens).isfinite().all()


def test_fresh_weights_and_changed_keys(folder):
    """Without weights of the folder, and of other sizes."""
    torch.manual_seed(1)
    tower, _ = build(folder("distilbert"), pretrained=False, config={"n_layers": 1}, proj="mlp")
    assert len(tower.transformer.transformer.layer) == 1
    assert [tuple(p.shape) for p in tower.proj.parameters()] == [(24, 32), (16, 24)]
    torch.manual_seed(1)
    again, _ = build(folder("distilbert"), pretrained=False, config={"n_layers": 1}, proj="mlp")
    torch.testing.assert_close(again.state_dict(), tower.state_dict(), rtol=0, atol=0)


def test_checkpointing_gives_the_same_gradients(folder):
    tower, text = build(folder())
    tokens, gradients = text.tokenize(CAPTIONS), []
    for enable in (True, False):
        tower.train().set_grad_checkpointing(enable)
        tower.zero_grad()
        torch.manual_seed(0)
        tower(tokens).sum().backward()
        gradients.append([p.grad.clone() for p in tower.parameters()])
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_the_tokenizer_travels_to_loader_workers(folder):
    _, text = build(folder("roberta"))
    assert (text.context_length, text.tokenizer, text.pad) == (16, str(folder("roberta")), 1)
    tokens = pickle.loads(pickle.dumps(text.tokenize))(CAPTIONS)
    assert torch.equal(tokens, text.tokenize(CAPTIONS))
    assert (tokens.shape, tokens.dtype) == ((3, 16), torch.int64)


# Releases -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_hf.FAMILIES)
def test_a_release_is_read_without_its_source(family, tmp_path):
    source = tiny_hf.write_text_model(tmp_path / "source", family)
    tower, text = build(source, pooling="cls", proj="mlp")
    release = tmp_path / "release"
    release.mkdir()
    write_hf_tower(tower, text, release)
    expected = tower(text.tokenize(CAPTIONS))
    shutil.rmtree(source)

    text_cfg = hf_text_cfg("org/name", pooling="cls", proj="mlp", context_length=16)
    again, again_text = read_hf_tower(release, text_cfg, embed_dim=16, where=WHERE)
    again.load_state_dict(tower.state_dict())
    assert again_text.tokenizer == "org/name"
    assert torch.equal(again.eval()(again_text.tokenize(CAPTIONS)), expected)
    assert not any(str(tmp_path) in file.read_text() for file in release.iterdir())


@pytest.mark.parametrize("family", WITH_POOLER)
@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
@pytest.mark.parametrize("proj", ["linear", "mlp", None])
def test_open_clip_loads_the_release(family, pooling, proj, folder, tmp_path):
    """From the directory alone: equal keys, tokens and features."""
    embed_dim = 16 if proj else 32
    tower, text = build(folder(family), pooling=pooling, proj=proj, embed_dim=embed_dim)
    release = tmp_path / "release"
    release.mkdir()
    write_hf_tower(tower, text, release)
    text_cfg = hf_text_cfg("org/name", pooling=pooling, proj=proj, context_length=16)
    model_cfg = {"embed_dim": embed_dim, "vision_cfg": VISION, "text_cfg": text_cfg}
    (release / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": {}}))
    image = open_clip.CLIP(embed_dim, VISION, {"width": 32, "heads": 2, "layers": 1}).visual.state_dict()
    state = {f"visual.{key}": value for key, value in image.items()} | {"logit_scale": torch.tensor(1.0)}
    state |= {f"text.{key}": value.contiguous() for key, value in tower.state_dict().items()}
    save_file(state, release / "open_clip_model.safetensors")

    here = text_cfg | {"hf_model_name": str(release)}
    model = open_clip.create_model(f"local-dir:{release}", text_cfg=here, require_pretrained=True).eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{release}")(CAPTIONS)
    assert torch.equal(tokens, text.tokenize(CAPTIONS))
    assert torch.equal(model.encode_text(tokens), tower(tokens))


# Mistakes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proj": None}, r": the encoder is 32 wide and embed_dim=16: set proj to linear or mlp"),
        ({"context_length": 41}, r"\.context_length=41: this model takes 40 at most"),
        ({"config": {"layers": 1}}, r"\.hf_config\.layers: no such key in the config\.json of .*"),
        ({"config": {"vocab_size": 14}, "pretrained": False}, r": .*the tokenizer knows 15 tokens, the model 14.*"),
        ({"config": {"num_hidden_layers": "two"}}, r"\.hf_config: does not fit the config\.json of .* \(.*\)"),
        ({"config": {"hidden_size": 33}, "pretrained": False}, r": the model '.*' cannot be had: .*"),
    ],
)
def test_what_does_not_fit(options, message, folder):
    with pytest.raises(ConfigError) as raised:
        build(folder(), **options)
    assert "\n" not in str(raised.value)
    assert raised.match(f"^{WHERE}{message}$")


def test_changed_keys_that_others_hang_on(folder):
    """ModernBERT lists the kind of each layer."""
    with pytest.raises(ConfigError, match=rf"^{WHERE}\.hf_config: does not fit .* \(.*num_hidden_layers.*layer_types"):
        build(folder("modernbert"), pretrained=False, config={"num_hidden_layers": 1})
    both = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    tower, _ = build(folder("modernbert"), pretrained=False, config=both)
    assert len(tower.transformer.layers) == 1


def test_roberta_keeps_two_positions_for_itself(folder):
    """Positions start behind the padding's, token 1."""
    tower, text = build(folder("roberta"), context_length=38)
    assert tower(text.tokenize(["a " * 60])).isfinite().all()
    with pytest.raises(ConfigError, match="takes 38 at most"):
        build(folder("roberta"), context_length=39)


def test_nothing_under_that_name(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=rf"^{WHERE}: the model 'org/none' cannot be had: .* name a folder on this"):
        build("org/none")
    with pytest.raises(ConfigError, match=rf"^{WHERE}: the model '{tmp_path}' cannot be had"):
        build(tmp_path)


def test_weights_are_missing(folder, tmp_path):
    """All of them, or some."""
    bare = shutil.copytree(folder(), tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=f"^{WHERE}: the model '{bare}' cannot be had"):
        build(bare)
    deeper = shutil.copytree(folder(), tmp_path / "deeper")
    config = json.loads((deeper / "config.json").read_text())
    (deeper / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError, match=rf"^{WHERE}: the weights in {deeper} lack encoder\.layer\.2\..*16 tensors"):
        build(deeper)


def test_not_a_text_encoder(tmp_path):
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is a vit model, which is no text encoder"):
        build(tmp_path)


def test_code_of_the_model_is_not_run(folder, tmp_path):
    """A config.json that asks for it is refused, and no question is put to the terminal."""
    copy = shutil.copytree(folder(), tmp_path / "remote")
    config = json.loads((copy / "config.json").read_text())
    foreign = {"model_type": "its_own", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (copy / "config.json").write_text(json.dumps(config | foreign))
    (copy / "code.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ConfigError, match=f"^{WHERE}: the model '{copy}' cannot be had"):
        build(copy)
