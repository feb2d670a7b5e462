"""What a student takes from a larger teacher: whole layers evenly, leading channels, whole heads; mistakes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_accel.models.inherit import inherit
from kd_accel.models.towers import construct
from kd_accel.models.two_towers import TwoTowers
from kd_accel.schema import ConfigError

SMALL = {"width": 16, "head_width": 8}  # two heads; the arch fixture's: width 32, heads of 16


@pytest.fixture
def clip(arch):
    """clip(kind, vision={...}, text={...}, **top): another one each time, no parameter at zero or one."""
    torch.manual_seed(4)

    def make(kind: str = "vit", **changes) -> nn.Module:
        model = construct(arch(kind, **changes), where="student.arch")
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        return model

    return make


def towers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("logit_")}


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_equal_shapes_give_an_equal_model(kind, clip):
    """Bit by bit, running statistics of a ResNet included."""
    student, teacher = clip(kind), clip(kind)
    for name, buffer in teacher.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 2)
    said = inherit(student, teacher, where="student.init=teacher")
    torch.testing.assert_close(towers(student), towers(teacher), rtol=0, atol=0)
    assert said[1] == "the text tower starts from that of teacher: blocks 0, 1, 100% of its weights"


@pytest.mark.parametrize("custom_text", [False, True])
def test_half_the_depth_takes_the_first_the_last_and_those_between(custom_text, clip):
    """Where the teacher's other blocks add nothing, features stay; text towers of a CLIP and of a CustomTextCLIP."""
    teacher = clip(vision={"layers": 4}, text={"layers": 4}, custom_text=custom_text)
    student = clip(vision={"layers": 2}, text={"layers": 2})
    said = inherit(student, teacher, where="student.init=teacher")
    assert [line.partition("blocks ")[2][:5] for line in said] == ["0, 3,", "0, 3,"]
    for name, parameter in teacher.named_parameters():
        if name.endswith(("out_proj.weight", "out_proj.bias", "c_proj.weight", "c_proj.bias")) and ".0." not in name:
            parameter.data *= ".3." in name
    pixels, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 49000, (2, 16))
    torch.testing.assert_close(student.encode_image(pixels), teacher.encode_image(pixels))
    torch.testing.assert_close(student.encode_text(tokens), teacher.encode_text(tokens))


def test_six_of_twelve(clip):
    """By the rule: 11 i / 5 rounded."""
    student, teacher = clip(vision={"layers": 6}), clip(vision={"layers": 12})
    inherit(student, teacher, where="student.init=teacher")
    for ours, theirs in enumerate([0, 2, 4, 7, 9, 11]):
        taken = teacher.visual.transformer.resblocks[theirs].state_dict()
        found = student.visual.transformer.resblocks[ours].state_dict()
        torch.testing.assert_close(found, taken, rtol=0, atol=0)


def test_half_the_width_takes_leading_channels(clip):
    """Rows and columns of every kind of weight, and a smaller embedding."""
    student = clip(vision=SMALL | {"layers": 1}, text={"width": 16, "heads": 1}, embed_dim=8)
    teacher = clip(vision={"head_width": 8, "layers": 1})
    inherit(student, teacher, where="student.init=teacher")
    ours, theirs = towers(student), towers(teacher)
    block = "visual.transformer.resblocks.0."
    for name, part in {
        "visual.conv1.weight": (slice(16),),
        "visual.positional_embedding": (slice(None), slice(16)),
        "visual.proj": (slice(16), slice(8)),
        f"{block}ln_1.weight": (slice(16),),
        f"{block}mlp.c_fc.weight": (slice(64), slice(16)),
        f"{block}mlp.c_proj.weight": (slice(16), slice(64)),
        "token_embedding.weight": (slice(None), slice(16)),
        "text_projection": (slice(16), slice(8)),
    }.items():
        torch.testing.assert_close(ours[name], theirs[name][part], rtol=0, atol=0)


def test_heads_stay_whole(clip):
    """On the student's channels, its attention is the teacher's with all but the leading heads cut off."""
    student, teacher = clip(vision=SMALL), clip(vision={"head_width": 8})
    inherit(student, teacher, where="student.init=teacher")
    ours = student.visual.transformer.resblocks[0].attn
    theirs = teacher.visual.transformer.resblocks[0].attn
    theirs.out_proj.weight.data[:, 16:] = 0  # of heads 2 and 3
    rows = torch.randn(2, 5, 16)
    wide = nn.functional.pad(rows, (0, 16))
    expected, _ = theirs(wide, wide, wide)
    torch.testing.assert_close(ours(rows, rows, rows)[0], expected[..., :16])


def test_one_tower_that_does_not_fit_starts_fresh(clip):
    student, teacher = clip(text={"context_length": 12}), clip()
    before = towers(student)["positional_embedding"].clone()
    said = inherit(student, teacher, where="student.init=teacher")
    assert said[0].startswith("the image tower starts from that of teacher: blocks 0, 1")
    assert said[1] == (
        "the text tower has positional_embedding of shape (12, 32), which is no part of the teacher's, (16, 32):"
        " it starts fresh"
    )
    torch.testing.assert_close(towers(student)["positional_embedding"], before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("vit", {"vision": {"layers": 3}}, "has more blocks, 3, than the teacher's, 2"),
        ("vit", {"vision": {"width": 48}}, r"has class_embedding of shape \(48,\), which is no part of .* \(32,\)"),
        ("vit", {"vision": {"patch_size": 4}}, r"has positional_embedding of shape \(65, 32\), which is no part"),
        ("vit", {"vision": {"head_width": 8}}, r"has heads of width \[8\] and \['GELU'\], the teacher \[16\]"),
        ("vit", {"quick_gelu": True}, r"\['QuickGELU'\], the teacher \[16\] and \['GELU'\]"),
        ("resnet", {}, "is built in another way: the teacher has no "),
    ],
)
def test_nothing_fits(kind, changes, reason, clip):
    """Every way for an image tower, of a student whose text tower does not fit either."""
    text = {"text": {"vocab_size": 49409}}
    with pytest.raises(ConfigError, match=r"^student\.init=teacher: nothing of that model fits: .*" + reason):
        inherit(clip(kind, **changes | text), clip(), where="student.init=teacher")


def test_a_missing_tower(clip, arch):
    """One that the student lacks is not spoken of; one that the teacher lacks starts fresh."""
    alone = TwoTowers(clip().visual, None)
    (said,) = inherit(alone, clip(), where="student.init=teacher")
    assert said.startswith("the image tower starts from that of teacher: blocks 0, 1")
    said = inherit(clip(), alone, where="student.init=teacher")
    assert said[1] == "the text tower has no counterpart there: it starts fresh"
