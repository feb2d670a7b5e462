"""What can be evaluated, by its name: towers, where they come from, and what tells them apart."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import open_clip
import pytest
import tiny
import tiny_hf
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from kd_accel.config import TrainConfig
from kd_accel.config_files import dump
from kd_accel.evals.encoder import load_encoder, load_teacher
from kd_accel.models.build import build_teacher
from kd_accel.models.hf_text import hf_text_cfg
from kd_accel.schema import ConfigError, validate
from kd_accel.sections import TeacherConfig

VIEWS = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
TEXTS = ["a photo of a red cat", "", "Two DOGS"]
WIDTH = 8  # of tiny.arch()


@pytest.fixture
def write_run(tmp_path, tiny_teacher):
    """(name, model_cfg of the student, teachers as in a config) -> a run directory with one checkpoint, of step 10."""

    def write(name: str = "run", model: dict | None = None, **teachers) -> Path:
        run = tmp_path / name
        checkpoint = run / "checkpoints" / "step_00000010"
        tiny.write_teacher(checkpoint / "student", model or tiny.arch())
        (run / "checkpoints" / "latest").write_text("step_00000010\n")
        names = teachers.get("teachers", teachers)  # a single one is called "teacher"
        values = {
            "name": name,
            "data": {"shards": "shards", "batch_size": 2},
            "student": {"arch": model or tiny.arch()},
            "objective": {
                "terms": {"clip": {"kind": "clip"}} | {name: {"kind": "cosine", "teacher": name} for name in names}
            },
            "optim": {"lr": 1e-3, "epochs": 1},
        }
        (run / "config.yaml").write_text(dump(validate(TrainConfig, values | teachers)))
        return run

    return write


def one_tower(tower: str, **sizes) -> dict:
    return {key: value for key, value in tiny.arch(**sizes).items() if key in ("embed_dim", f"{tower}_cfg")}


# Where models come from -----------------------------------------------------------------------------------------------


def test_a_run_gives_its_newest_checkpoint_and_is_its_home(write_run):
    """Features are open_clip's of the released directory, raw."""
    run = write_run()
    encoder = load_encoder(run)
    assert (encoder.name, encoder.step, encoder.home) == ("run", 10, run)
    assert encoder.embed_dim == WIDTH
    reference = open_clip.create_model(f"local-dir:{run}/checkpoints/step_00000010/student").eval()
    pixels = open_clip.transform.Normalize(encoder.image_input.mean, encoder.image_input.std)(VIEWS / 255)
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_images(VIEWS), reference.encode_image(pixels))
        tokens = encoder.text.wants.tokenize(TEXTS)
        torch.testing.assert_close(encoder.encode_texts(TEXTS), reference.encode_text(tokens), atol=1e-5, rtol=1e-4)


def test_the_moving_average_is_the_run_too(write_run):
    """What training averaged is preferred to the weights of the last step, and belongs to the same run and step."""
    run = write_run()
    checkpoint = run / "checkpoints" / "step_00000010"
    tiny.write_teacher(checkpoint / "student_ema", tiny.arch(embed_dim=4))
    encoder = load_encoder(checkpoint)
    assert (encoder.name, encoder.step, encoder.home) == ("run", 10, run)
    assert encoder.embed_dim == 4


def test_a_text_tower_of_huggingface(tmp_path):
    """A student whose text tower is transformers' has both towers like any other."""
    name = str(tiny_hf.write_text_model(tmp_path / "bert"))
    text = hf_text_cfg(name, pooling="mean", proj="linear", context_length=12)
    image = tiny.arch()["vision_cfg"]
    from kd_accel.models.release import write_release
    from kd_accel.models.towers import build_open_clip

    built = build_open_clip(
        {"embed_dim": 8, "vision_cfg": image, "text_cfg": text}, pretrained=None, preprocess=None, name="student"
    )
    model, contract, model_cfg, scale = built
    write_release(
        tmp_path / "student",
        state=model.state_dict(),
        model_cfg=model_cfg,
        contract=contract,
        log_scale=scale.log_scale,
        logit_bias=None,
        hf_text=model.text,
    )
    encoder = load_encoder(tmp_path / "student")
    with torch.no_grad():
        torch.testing.assert_close(encoder.encode_texts(TEXTS), model.eval().text(contract.text.tokenize(TEXTS)))
    assert encoder.encode_images(VIEWS).shape == (3, 8)


def _tiny_open_clip(folder: Path, monkeypatch) -> str:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-tiny", tiny.arch())
    save_file(open_clip.CLIP(**tiny.arch()).state_dict(), folder / "weights.safetensors")
    return f"ViT-tiny,{folder / 'weights.safetensors'}"


def _tiny_moco(folder: Path, monkeypatch) -> str:
    class Plain(ResNet):
        pass

    model = Plain(BasicBlock, [1, 1, 1, 1])
    model.fc = nn.Identity()
    torch.save({"state_dict": model.state_dict()}, folder / "resnet.pth")
    return f"ssl/plain,{folder / 'resnet.pth'}"


@pytest.mark.parametrize(
    ("make", "towers"),
    [
        (_tiny_open_clip, {"image", "text"}),
        (lambda folder, _: f"hf/{tiny_hf.write_clip(folder / 'clip')}", {"image", "text"}),
        (lambda folder, _: f"hf/{tiny_hf.write_text_model(folder / 'bert', max_position_embeddings=77)}", {"text"}),
        (_tiny_moco, {"image"}),
    ],
)
def test_teachers_by_name_are_those_of_training(make, towers, tmp_path, monkeypatch):
    """Same features as build_teacher's model; the name is what was given, and results go to a folder of that name."""
    name = make(tmp_path, monkeypatch)
    encoder = load_encoder(name)
    assert encoder.name == name
    assert encoder.home.parent == Path("evals")
    assert {tower for tower in ("image", "text") if getattr(encoder, tower)} == towers
    arch, _, pretrained = name.partition(",")
    config = TeacherConfig(arch=arch, pretrained=pretrained or None)
    model, contract, width, _ = build_teacher(config, where="teacher")
    assert encoder.embed_dim == width
    with torch.no_grad():
        if "text" in towers:
            expected = model.encode_text(contract.text.tokenize(TEXTS))
            torch.testing.assert_close(encoder.encode_texts(TEXTS), expected, atol=1e-5, rtol=1e-4)
        if "image" in towers:
            assert asdict(encoder.image_input) == asdict(contract.image)
            assert encoder.encode_images(VIEWS).shape == (3, width)


def test_loading_leaves_the_generator_alone(release):
    """Encoders do not disturb each other, nor a training in the same process."""
    before = torch.get_rng_state()
    load_encoder(release)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "nothing/here",
            r"model=nothing/here: no such file or directory, nor a model's name; give a run, .* ARCH,PRETRAINED",
        ),
        ("ViT-B-32", "model=ViT-B-32: no such file or directory"),
        ("hf/x,y", "drop pretrained"),
        ("ssl/auto", "model=ssl/auto: no such file or directory"),
        ("missing.npy", "model=missing.npy: no such file"),
    ],
)
def test_names_that_stand_for_nothing(name, said):
    with pytest.raises(ConfigError, match=said):
        load_encoder(name)


# Towers of two models -------------------------------------------------------------------------------------------------


def test_towers_that_were_distilled_apart(write_run):
    """The image tower of one run with the text tower of another: features, ids and width are theirs."""
    image = write_run("image", one_tower("vision"))
    text = write_run("text", one_tower("text"))
    joined = load_encoder(image, text_from=str(text))
    assert (joined.name, joined.step, joined.home) == ("image, text of text", 10, image)
    assert torch.equal(joined.encode_images(VIEWS), load_encoder(image).encode_images(VIEWS))
    assert torch.equal(joined.encode_texts(TEXTS), load_encoder(text).encode_texts(TEXTS))
    assert (joined.image_id, joined.text_id) == (load_encoder(image).image_id, load_encoder(text).text_id)
    other_way = load_encoder(text, image_from=str(image))
    assert torch.equal(other_way.encode_images(VIEWS), joined.encode_images(VIEWS))
    joined.require("image", "text")


def test_a_tower_replaces_the_model_s_own(release, write_run):
    other = write_run("other", one_tower("text", embed_dim=12))
    replaced = load_encoder(release, text_from=str(other))
    assert torch.equal(replaced.encode_texts(TEXTS), load_encoder(other).encode_texts(TEXTS))
    assert not torch.equal(replaced.encode_texts(TEXTS), load_encoder(release).encode_texts(TEXTS))


def test_widths_must_agree(write_run, release):
    image = write_run("image", one_tower("vision"))
    with pytest.raises(
        ConfigError, match=r"text_from=.*untrained: its text embeddings are 12 wide.*image, step 10, 8$"
    ):
        load_encoder(image, text_from=str(release))


def test_a_missing_tower_names_the_key(write_run):
    """Asked for by a task, or named for a tower that it does not have."""
    image = write_run("image", one_tower("vision"))
    encoder = load_encoder(image)
    assert encoder.text_id == ""
    encoder.require("image")
    with pytest.raises(ConfigError, match=r"^image, step 10 has no text tower: .* text_from=MODEL$"):
        encoder.require("image", "text")
    with pytest.raises(ConfigError, match=r"image_from=MODEL"):
        _ = load_encoder(write_run("text", one_tower("text"))).image_input
    with pytest.raises(ConfigError, match=r"text_from=.*: image, step 10 has no text tower"):
        load_encoder(image, text_from=str(image))


# Teachers of a run ----------------------------------------------------------------------------------------------------


def test_the_teacher_of_a_run(write_run, tiny_teacher):
    """As a model to compare with, and as the giver of the tower that the student lacks; the error says how."""
    run = write_run("student", one_tower("vision", embed_dim=12), teacher={"path": str(tiny_teacher)})
    encoder = load_encoder(run)
    with pytest.raises(ConfigError, match=r"; text_from=run is that of its teacher, release, which is as wide$"):
        encoder.require("text")
    teacher = load_encoder(tiny_teacher)
    joined = load_encoder(run, text_from="run")
    assert torch.equal(joined.encode_texts(TEXTS), teacher.encode_texts(TEXTS))
    assert torch.equal(load_teacher("run", student=encoder).encode_images(VIEWS), teacher.encode_images(VIEWS))
    assert torch.equal(
        load_teacher(str(tiny_teacher), student=encoder).encode_images(VIEWS), teacher.encode_images(VIEWS)
    )


def test_one_of_several_teachers(write_run, tiny_teacher, release):
    """Of two that differ in width the error names the one that fits."""
    wide = write_run("wide", tiny.arch(24, 20))
    teachers = {"large": {"path": str(wide)}, "small": {"path": str(tiny_teacher)}}
    run = write_run("student", one_tower("vision", embed_dim=12), teachers=teachers)
    encoder = load_encoder(run)
    with pytest.raises(ConfigError, match=r"; text_from=run:small is that of its teacher"):
        encoder.require("text")
    assert load_encoder(run, text_from="run:small").text.embed_dim == 12
    for name in ("run", "run:huge"):
        with pytest.raises(ConfigError, match=r"several teachers.* give run:large or run:small"):
            load_teacher(name, student=encoder)


def test_a_run_without_a_teacher(write_run, release):
    with pytest.raises(ConfigError, match="teacher=run: .*trained without a teacher"):
        load_teacher("run", student=load_encoder(write_run()))
    with pytest.raises(ConfigError, match=r"teacher=run: .*is no run"):
        load_teacher("run", student=load_encoder(release))


# Identity -------------------------------------------------------------------------------------------------------------


def ids(path, **options) -> tuple[str, str]:
    encoder = load_encoder(path, **options)
    return encoder.image_id, encoder.text_id


def test_the_same_model_elsewhere_is_the_same(release, tmp_path):
    """Ids go by content: a copy in another folder has them, under any name."""
    copy = shutil.copytree(release, tmp_path / "elsewhere")
    assert ids(copy) == ids(release)
    for kind, write, sizes in (
        ("text", tiny_hf.write_text_model, {"max_position_embeddings": 77}),
        ("clip", tiny_hf.write_clip, {}),
    ):
        first = write(tmp_path / f"first_{kind}", **sizes)
        second = shutil.copytree(first, tmp_path / f"second_{kind}")
        assert ids(f"hf/{first}") == ids(f"hf/{second}")


def test_whatever_changes_a_tower_s_features_changes_its_id_alone(tmp_path):
    """One weight, the preprocessing, an activation without weights, the precision."""
    base = tiny.write_teacher(tmp_path / "base")
    image, text = ids(base)
    assert image != text

    def changed(name: str, file: str, before: str, after: str) -> tuple[str, str]:
        folder = shutil.copytree(base, tmp_path / name)
        content = (folder / file).read_text()
        assert before in content
        (folder / file).write_text(content.replace(before, after))
        return ids(folder)

    config = "open_clip_config.json"
    assert changed("squash", config, '"shortest"', '"squash"')[0] != image
    assert changed("squash2", config, '"shortest"', '"squash"')[1] == text
    both = changed("gelu", config, '"embed_dim"', '"quick_gelu": true, "embed_dim"')
    assert both[0] != image
    assert both[1] != text
    both = changed("heads", config, '"head_width": 12', '"head_width": 24')
    assert both[0] != image
    assert both[1] == text
    both = ids(base, precision="bf16")
    assert both[0] != image
    assert both[1] != text
    encoder = load_encoder(base)
    encoder.text.model.token_embedding.weight.data[0, 0] += 1
    assert encoder.image_id == image
    assert encoder.text_id != text


def test_pooling_and_tokenizer_are_part_of_a_text_tower(tmp_path):
    """Neither is a weight: the same BERT pooled otherwise, or with its words in another order, is another tower."""
    folder = tiny_hf.write_text_model(tmp_path / "bert", max_position_embeddings=77)
    _, text = ids(f"hf/{folder}")
    other = shutil.copytree(folder, tmp_path / "other")
    tiny_hf.tokenizer(order=[*tiny_hf.SPECIAL, *reversed(tiny_hf.WORDS)]).save_pretrained(other)
    assert ids(f"hf/{other}")[1] != text
    config = TeacherConfig(arch=f"hf/{folder}", pooling="cls")
    from kd_accel.evals.encoder import model_encoder

    model, contract, width, _ = build_teacher(config, where="teacher")
    assert model_encoder(model, contract, width, name="cls", home=tmp_path).text_id != text


# Precision ------------------------------------------------------------------------------------------------------------


def test_units(encoder):
    rows = torch.randn(4, encoder.embed_dim)
    torch.testing.assert_close(encoder.unit(rows), F.normalize(rows, dim=1))
