"""Image towers from torchvision: every name that is promised, the head's swap, what the weights want to see."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from torchvision import models

from kd_accel.models.torchvision_towers import build_torchvision
from kd_accel.schema import ConfigError
from kd_accel.types import ImageInput

PROMISED = """
alexnet vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19_bn vgg19 squeezenet1_0 squeezenet1_1 inception_v3
densenet121 densenet169 densenet201 densenet161 googlenet
resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d wide_resnet50_2 wide_resnet101_2
regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf regnet_y_128gf
regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf
convnext_tiny convnext_small convnext_base convnext_large vit_b_16 vit_b_32 vit_l_16 vit_l_32
""".split()  # ProtoRKD's README
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def build(name: str, embed_dim: int | None = None, *, pretrained: bool = False):
    return build_torchvision(name, embed_dim=embed_dim, pretrained=pretrained, where="student.image")


def test_as_many_names_as_promised():
    assert len(PROMISED) == len(set(PROMISED)) == 49


@pytest.mark.parametrize("embed_dim", [None, 300])
@pytest.mark.parametrize("name", PROMISED)
def test_every_promised_name_builds(name, embed_dim):
    """Pixels of the size that it asks for become rows as wide as it says; shapes alone, without weights."""
    with init_empty_weights():
        tower, wants = build(name, embed_dim)
    tower.to("meta").eval()
    pixels = torch.empty(2, 3, *wants.size, device="meta")
    assert tower(pixels).shape == (2, tower.embed_dim)
    assert tower.embed_dim == embed_dim or embed_dim is None
    assert wants.size == (tower.image_size, tower.image_size)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1", "vit_b_32"])
def test_pooled_features_are_what_the_classifier_reads(name):
    """Without a head: what torchvision's own model hands to its last layer, for the same weights."""
    tower, wants = build(name)
    whole = models.get_model(name, weights=None)
    whole.load_state_dict(tower.state_dict(), strict=False)
    reads = []
    last = (
        whole.classifier[0]
        if name.startswith("squeeze")
        else [m for m in whole.modules() if isinstance(m, torch.nn.Linear)][-1]
    )
    last.register_forward_pre_hook(lambda _, inputs: reads.append(inputs[0]))
    pixels = torch.randn(2, 3, *wants.size)
    features = tower.eval()(pixels)
    whole.eval()(pixels)
    expected = reads[0].mean((2, 3)) if reads[0].ndim == 4 else reads[0]  # squeezenet pools after its classifier
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("name", ["squeezenet1_1", "vit_b_32", "shufflenet_v2_x0_5", "alexnet"])
def test_a_fresh_head_gives_embeddings_of_both_signs(name):
    """torchvision ends SqueezeNet with a ReLU and starts the heads of vision transformers at zero."""
    tower, wants = build(name, 16)
    features = tower.eval()(torch.randn(2, 3, *wants.size))
    assert (features > 0).any()
    assert (features < 0).any()


def test_weights_are_those_of_torchs_generator():
    torch.manual_seed(3)
    first = build("resnet18", 16)[0].state_dict()
    torch.manual_seed(3)
    torch.testing.assert_close(build("resnet18", 16)[0].state_dict(), first, rtol=0, atol=0)
    assert not torch.equal(build("resnet18", 16)[0].conv1.weight, first["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "size", "normalisation"),
    [
        ("resnet18", 224, IMAGENET),
        ("googlenet", 224, {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}),
        ("efficientnet_b1", 240, IMAGENET),
    ],
)
def test_wants_what_torchvisions_weights_say(name, size, normalisation):
    wants = build(name)[1]
    assert wants == ImageInput(size=(size, size), **normalisation, interpolation="bilinear", resize_mode="shortest")


def test_pretrained_googlenet_sees_what_it_was_trained_on(cached_weights):
    """Its normalisation and ours of one picture, and then the same features: the switch inside it is off, not lost."""
    theirs = models.googlenet(weights=None, aux_logits=True, init_weights=False).eval()
    cached_weights("googlenet", theirs.state_dict())
    tower, wants = build("googlenet", pretrained=True)
    theirs.transform_input, theirs.fc = True, torch.nn.Identity()
    picture = torch.rand(2, 3, 224, 224)
    normalised = [
        (picture - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        for mean, std in [(wants.mean, wants.std), IMAGENET.values()]
    ]
    torch.testing.assert_close(tower.eval()(normalised[0]), theirs(normalised[1]), rtol=1e-4, atol=1e-5)
    assert not [key for key in tower.state_dict() if key.lower().startswith("aux")]


def test_pretrained_keeps_the_body_and_draws_the_head(cached_weights):
    weights = models.resnet18(weights=None).state_dict()
    cached_weights("resnet18", weights)
    state = build("resnet18", 16, pretrained=True)[0].state_dict()
    assert state.keys() == weights.keys()
    assert state["fc.weight"].shape == (16, 512)
    body = {key: tensor for key, tensor in weights.items() if not key.startswith("fc.")}
    torch.testing.assert_close({key: state[key] for key in body}, body, rtol=0, atol=0)


def test_pretrained_without_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(ConfigError, match=r"^student\.image: torchvision's weights of resnet18 are not .*refused") as e:
        build("resnet18", pretrained=True)
    assert "\n" not in str(e.value)


def test_unknown_names_are_hinted_at():
    with pytest.raises(ConfigError, match=r"student\.image: torchvision has no classifier .*mean 'resnet50'\?"):
        build("resnet_50")
    with pytest.raises(ConfigError, match="no classifier 'fcn_resnet50'"):  # a segmentation model
        build("fcn_resnet50")


@pytest.fixture
def cached_weights(tmp_path, monkeypatch):
    """Lays a state dict where torch.hub keeps what it has downloaded as the default weights of a name."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def lay(name: str, state: dict) -> None:
        file = models.get_model_weights(name).DEFAULT.url.rsplit("/", 1)[1]
        folder = tmp_path / "hub/checkpoints"
        folder.mkdir(parents=True)
        torch.save(state, folder / file)

    return lay
