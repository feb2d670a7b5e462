"""What build_open_clip gives back, what it refuses and in which words."""

from __future__ import annotations

import pickle
from copy import deepcopy

import open_clip
import pytest
import torch
from open_clip.factory import get_model_config
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms.functional import to_pil_image

from kd_accel.models.image import to_model_input
from kd_accel.models.model_cfg import check_model_cfg
from kd_accel.models.scale import Scale
from kd_accel.models.towers import build_open_clip
from kd_accel.schema import ConfigError
from kd_accel.sections import PreprocessConfig


def build(arch, *, pretrained=None, preprocess=None, name="student"):
    torch.manual_seed(0)
    return build_open_clip(arch, pretrained=pretrained, preprocess=preprocess, name=name)


@pytest.fixture
def named(arch, monkeypatch):
    """A small architecture that open_clip knows by name, with one tag whose weights are a file of the test's."""

    def register(**tag) -> str:
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", arch())
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "ViT-tiny", {"digits": tag})
        return "ViT-tiny"

    return register


@pytest.fixture
def weights_file(arch, tmp_path):
    """weights_file(**arch): open_clip's own weights of a model, saved."""

    def save(**changes):
        torch.manual_seed(7)
        state = open_clip.CLIP(**arch(**changes)).state_dict()
        save_file(state, tmp_path / "weights.safetensors")
        return str(tmp_path / "weights.safetensors"), state

    return save


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_inline_equals_open_clip(kind, arch):
    """An inline model_cfg gives the module, the weights and the scale that open_clip makes of the same seed."""
    model, _, model_cfg, scale = build(arch(kind))
    torch.manual_seed(0)
    reference = open_clip.CLIP(**arch(kind))
    expected = reference.state_dict()
    assert scale == Scale(expected.pop("logit_scale").item(), None)
    torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    assert {**model_cfg["vision_cfg"], "timm_model_pretrained": False} == {
        **arch(kind)["vision_cfg"],
        "timm_model_pretrained": False,
    }


@pytest.mark.parametrize("bias", [None, -10.0])
def test_no_parameter_that_deepspeed_cannot_prepare(bias, arch):
    """The scale parameters are read, then gone; every other one has dimensions."""
    model, _, _, scale = build(arch(init_logit_scale=1.5, init_logit_bias=bias))
    assert scale == Scale(1.5, bias)
    assert not [name for name, p in model.named_parameters() if p.ndim == 0 or "logit" in name]


def test_contract_is_read_from_the_model(arch):
    """Size and context length come from the model, pixels from open_clip's defaults, tokens from its own BPE."""
    _, contract, _, _ = build(arch(vision={"image_size": [32, 16]}))
    defaults = open_clip.transform.PreprocessCfg()
    assert (contract.image.size, contract.text.context_length) == ((32, 16), 16)
    assert (contract.image.mean, contract.image.std) == (defaults.mean, defaults.std)
    assert (contract.image.interpolation, contract.image.resize_mode) == ("bicubic", "shortest")
    expected = open_clip.tokenizer.SimpleTokenizer(context_length=16)(["a cat"])
    torch.testing.assert_close(contract.text.tokenize(["a cat"]), expected)


def test_contract_travels_to_spawned_workers(arch):
    """Loader workers that do not fork get the contract pickled."""
    contract = build(arch())[1]
    copy = pickle.loads(pickle.dumps(contract))
    torch.testing.assert_close(copy.text.tokenize(["a cat"]), contract.text.tokenize(["a cat"]))


def test_models_that_want_the_same_share_a_tokenizer(arch):
    """Options with a list in them, as JSON has it, too."""
    special = {"tokenizer_kwargs": {"additional_special_tokens": ["<a>"]}, "vocab_size": 49409}
    plain, same, other, again = (
        build(given)[1].text.tokenize for given in (arch(), arch("resnet"), arch(text=special), arch(text=special))
    )
    assert plain is same
    assert other is again
    assert (plain.vocab_size, other.vocab_size) == (49408, 49409)


def test_tokenizer_name_tells_tokens_apart(arch):
    """Equal names mean equal tokens, so options of the tokenizer are part of its name."""
    plain = build(arch())[1].text.tokenizer
    cleaned = build(arch(text={"tokenizer_kwargs": {"clean": "canonicalize"}}))[1].text.tokenizer
    assert plain == build(arch("resnet"))[1].text.tokenizer
    assert plain != cleaned


def test_preprocess_replaces_the_models_own(arch):
    own = PreprocessConfig(mean=(0.1, 0.2, 0.3), std=(1, 1, 1), interpolation="bilinear", resize_mode="squash")
    _, contract, _, _ = build(arch(), preprocess=own)
    assert (contract.image.mean, contract.image.std) == (own.mean, own.std)
    assert (contract.image.interpolation, contract.image.resize_mode) == ("bilinear", "squash")


def test_tag_brings_pixels_weights_and_activation(named, weights_file):
    """A tag decides mean and interpolation, and turns QuickGELU on where its weights were trained with it."""
    file, state = weights_file()
    name = named(file=file, mean=(0.5, 0.5, 0.5), interpolation="bilinear", quick_gelu=True)
    model, contract, model_cfg, _ = build(name, pretrained="digits")
    assert (contract.image.mean, contract.image.interpolation) == ((0.5, 0.5, 0.5), "bilinear")
    assert model_cfg["quick_gelu"] is True
    assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)
    torch.testing.assert_close(model.visual.proj.data, state["visual.proj"])


def test_weights_without_a_bias_give_none(arch, weights_file):
    """open_clip puts a bias of 0 where the weights bring none: that is no bias."""
    file, _ = weights_file()
    assert build(arch(), pretrained=file)[3].bias is None


def test_weights_file_with_a_bias_of_its_own(arch, weights_file):
    """Weights of a sigmoid loss load into an architecture that names no bias, and keep theirs."""
    file, state = weights_file(init_logit_bias=-10.0)
    model, _, _, scale = build(arch(), pretrained=file)
    assert scale.bias == -10.0
    torch.testing.assert_close(model.text_projection.data, state["text_projection"])


@pytest.mark.parametrize("size", [(40, 24), (32, 32)])
def test_model_input_equals_open_clips_preprocessing(size, arch):
    """Resizing, scaling and normalising a uint8 view on the device equals open_clip's transform of the PIL image."""
    # Far from 0 and 255, where PIL alone would clip what bicubic overshoots between its two passes.
    pixels = torch.randint(64, 192, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    _, contract, _, _ = build(arch(), preprocess=PreprocessConfig(resize_mode="squash"))
    cfg = {"size": contract.image.size, "resize_mode": "squash"}
    transform = open_clip.transform.image_transform_v2(open_clip.transform.PreprocessCfg(**cfg), is_train=False)
    image: Image.Image = to_pil_image(pixels)
    made = to_model_input(pixels[None], contract.image, torch.float32)[0]
    # PIL rounds to uint8 after each of its two passes: at most two steps of 1/255, divided by std.
    tolerance = 0 if size == (32, 32) else 2.01 / 255 / min(contract.image.std)
    torch.testing.assert_close(made, transform(image), rtol=0, atol=tolerance)


def test_model_input_is_normalised_before_the_cast(arch):
    """bf16 input is the rounding of the fp32 input: pixels are not rounded first."""
    view = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    contract = build(arch(vision={"image_size": 16}))[1]
    exact = to_model_input(view, contract.image, torch.float32)
    torch.testing.assert_close(to_model_input(view, contract.image, torch.bfloat16), exact.bfloat16(), rtol=0, atol=0)


def test_embed_cls_and_custom_text_are_built_as_open_clip_does(arch):
    """custom_text keeps the text tower in a module of its own, which a class token needs."""
    model, _, model_cfg, _ = build(arch(custom_text=True, text={"embed_cls": True, "pool_type": "last"}))
    assert model_cfg["custom_text"] is True
    assert model.encode_text(torch.ones(2, 15, dtype=torch.int64)).shape == (2, 16)


def test_open_clips_own_configs_pass_the_checks():
    """Every two-tower architecture that open_clip ships passes our checks of keys and sizes."""
    configs = {name: get_model_config(name) for name in open_clip.list_models()}
    two_towers = {name: cfg for name, cfg in configs.items() if "multimodal_cfg" not in cfg}
    assert len(two_towers) > 100  # open_clip 3.3 ships about 140; a filter that drops them all would prove nothing
    for name, cfg in two_towers.items():
        check_model_cfg(cfg, name)


def test_building_leaves_the_given_config_alone(arch):
    given = arch("timm", vision={"timm_model_pretrained": False})
    before = deepcopy(given)
    build(given)
    assert given == before


def refused(arch, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        build(arch, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_architecture_offers_near_names():
    message = refused("ViT-B-61", name="teacher")
    assert message.startswith("teacher.arch: unknown architecture 'ViT-B-61'; did you mean ")
    assert "ViT-B-16" in message


def test_coca_is_refused():
    assert "CoCa" in refused("coca_ViT-B-32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"widht": 3}}, "student.arch.vision_cfg.widht: unknown key; did you mean 'width'?"),
        ({"text": {"head": 3}}, "student.arch.text_cfg.head: unknown key; did you mean 'heads'?"),
        ({"quickgelu": True}, "student.arch.quickgelu: unknown key; did you mean 'quick_gelu'?"),
        ({"vision_cfg": 3}, "student.arch.vision_cfg: expected a mapping, got 3"),
        ({"text": {"heads": 3}}, "student.arch.text_cfg.width=32 is not a multiple of heads=3: change one of them"),
        (
            {"vision": {"head_width": 64}},
            "student.arch.vision_cfg.width=32 is not a multiple of head_width=64: change one of them",
        ),
        (
            {"vision": {"image_size": 30}},
            "student.arch.vision_cfg.image_size=30 is not a multiple of patch_size=8: change one of them",
        ),
        (
            {"vision": {"width": "wide"}},
            "student.arch.vision_cfg.width='wide' and head_width=16: positive whole numbers are needed",
        ),
        ({"text": {"vocab_size": 500}}, "student.arch.text_cfg.vocab_size=500: CLIP's tokenizer needs 49408"),
        (
            {"text": {"embed_cls": True}},
            "student.arch.text_cfg.embed_cls: needs custom_text: true beside text_cfg",
        ),
    ],
)
def test_wrong_inline_config_is_one_clear_line(changes, message, arch):
    assert refused(arch(**changes)) == message


def test_one_tower_alone_is_that_of_the_whole_model(arch):
    """State keys are those of open_clip's CustomTextCLIP, the contract has no other half, features are equal."""
    whole = arch()
    both, contract, _, _ = build(whole | {"custom_text": True})
    for kept, gone, tower in (("vision_cfg", "text_cfg", "visual"), ("text_cfg", "vision_cfg", "text")):
        alone, its, _, _ = build({key: value for key, value in whole.items() if key != gone})
        state = {key: value for key, value in both.state_dict().items() if key.startswith(f"{tower}.")}
        alone.load_state_dict(state)
        assert (its.image is None) == (kept == "text_cfg")
        assert (its.text is None) == (kept == "vision_cfg")
        if tower == "visual":
            pixels = torch.rand(2, 3, *contract.image.size)
            torch.testing.assert_close(alone.encode_image(pixels), both.encode_image(pixels), rtol=0, atol=0)
        else:
            tokens = contract.text.tokenize(["a cat", "two dogs"])
            torch.testing.assert_close(alone.encode_text(tokens), both.encode_text(tokens), rtol=0, atol=0)


@pytest.mark.parametrize("gone", [["embed_dim"], ["vision_cfg", "text_cfg"]])
def test_missing_sections_are_named(arch, gone):
    config = {key: value for key, value in arch().items() if key not in gone}
    assert "embed_dim is needed, and vision_cfg, text_cfg or both" in refused(config)


def test_what_only_open_clip_can_check_is_one_line_too(arch):
    """A value that our checks do not know still ends as a ConfigError, with open_clip's reason."""
    message = refused(arch(vision={"pos_embed_type": "spiral"}))
    assert message.startswith("student.arch: open_clip cannot build this model: ")


def test_resnet_size_must_fit_its_stride(arch):
    assert "is not a multiple of the ResNet's stride=32" in refused(arch("resnet", vision={"image_size": 48}))


def test_unknown_tag_lists_the_known_ones():
    message = refused("RN50", pretrained="opneai", name="teacher")
    assert message.startswith("teacher.pretrained: 'opneai' is neither a file nor a tag of RN50; its tags: openai, ")


def test_missing_weights_file_of_an_inline_architecture(arch):
    message = refused(arch(), pretrained="nowhere.safetensors")
    assert message == "student.pretrained: no such file: 'nowhere.safetensors' (an inline architecture has no tags)"


def test_weights_of_another_architecture_are_refused(arch, weights_file):
    file, _ = weights_file(vision={"width": 16})
    message = refused(arch(), pretrained=file)
    assert message.startswith(f"student.pretrained: {file} does not hold weights of this architecture: ")


class Harmful:
    """Pickled as a call that would leave a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def test_weights_that_run_code_are_refused(arch, tmp_path):
    """A pickle is read with weights_only: what it wants to call is not called."""
    torch.save({"state_dict": Harmful(tmp_path / "trace")}, tmp_path / "weights.pt")
    message = refused(arch(), pretrained=str(tmp_path / "weights.pt"))
    assert "does not hold weights" in message
    assert not (tmp_path / "trace").exists()


def test_unreachable_hub_names_the_way_out(named, monkeypatch, tmp_path):
    """Weights that are neither cached nor to be fetched: the message offers a file."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = refused(named(hf_hub="nobody/nothing/"), pretrained="digits", name="teacher")
    assert message.startswith("teacher.pretrained: the weights 'digits' of ViT-tiny are not in the cache")
    assert "set teacher.pretrained to a weights file on this machine" in message


def test_tokenizer_that_cannot_be_had_is_named(arch, monkeypatch, tmp_path):
    message = refused(arch(text={"hf_tokenizer_name": str(tmp_path / "none")}))
    assert message.startswith("student.arch.text_cfg.hf_tokenizer_name: the tokenizer ")
