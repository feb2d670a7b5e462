"""kd-accel eval of a model with a class head: its accuracy on sets of the classes that it was trained on."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import tiny
import torch

from kd_accel.data.transforms import decode, eval_view
from kd_accel.eval_config import EvalConfig
from kd_accel.evals.classification import accuracy
from kd_accel.evals.encoder import load_encoder
from kd_accel.evals.results import read_results
from kd_accel.evals.suite import run
from kd_accel.models.class_head import ClassHead, write_class_head
from kd_accel.schema import ConfigError

TRUTHS = [0, 1, 2, 3, 4, 5, 0, 3]
NAMES = tuple(f"thing {i}" for i in range(6))


@pytest.fixture
def things(tmp_path, write_benchmark, labelled) -> Path:
    """A set of eight pictures, whose six classes are NAMES."""
    return write_benchmark(tmp_path / "sets" / "things", labelled(TRUTHS), num_classes=6)


def head_of(names: tuple[str, ...] | None, num_classes: int = 6) -> ClassHead:
    """A random one of `names`, or of so many classes without names."""
    num_classes, generator = len(names or range(num_classes)), torch.Generator().manual_seed(5)
    weight = torch.randn(num_classes, 8, generator=generator)
    return ClassHead(weight, torch.randn(num_classes, generator=generator) / 10, names)


def write_model(folder: Path, head: ClassHead, *, towers: tuple[str, ...] = ("vision_cfg",)) -> Path:
    arch = tiny.arch()
    tiny.write_teacher(folder, {"embed_dim": 8} | {tower: arch[tower] for tower in towers})
    write_class_head(folder, head)
    return folder


def evaluated(model: Path, things: Path, **keys) -> list[dict]:
    assert run(EvalConfig(model=str(model), data=str(things.parent), batch_size=3, num_workers=0, **keys)) == 0
    return read_results(model / "results.jsonl")


def by_hand(model: Path, things: Path, head: ClassHead, columns: list[int]) -> dict:
    """Accuracy of the linear layer on raw features of the set's pictures, of which `columns` are the classes."""
    encoder = load_encoder(model)
    with tarfile.open(things / "test" / "0.tar") as tar:
        pictures = [tar.extractfile(name).read() for name in sorted(tar.getnames()) if not name.endswith(".cls")]
    views = torch.stack([eval_view(decode(data), encoder.image_input) for data in pictures])
    logits = encoder.encode_images(views) @ head.weight.T + head.bias
    best = logits[:, columns].topk(5).indices
    return accuracy(best, torch.tensor(TRUTHS), num_classes=len(columns))


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (NAMES, [0, 1, 2, 3, 4, 5]),
        (tuple(reversed(NAMES)), [5, 4, 3, 2, 1, 0]),
        (("Thing_3", "other", *NAMES[:3], *NAMES[4:]), [2, 3, 4, 0, 5, 6]),
        (None, [0, 1, 2, 3, 4, 5]),
        (tuple(f"n0000000{i}" for i in range(6)), [0, 1, 2, 3, 4, 5]),
    ],
    ids=["its own", "another order", "among others, as folders", "no names", "synsets"],
)
def test_accuracy_of_the_head(tmp_path, things, names, columns):
    """Classes are found by name, or, where the head has none of the names, by number."""
    head = head_of(names)
    model = write_model(tmp_path / "model", head)
    (row,) = evaluated(model, things)
    expected = by_hand(model, things, head, columns)
    assert (row["task"], row["key"], row["n"]) == ("class_head", "things", 8)
    assert row["metrics"] == expected | {"main_metric": expected["acc1"]}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((*NAMES[:5], "other"), r"things: 6 classes, of which 1 \(thing 5, \.\.\.\) are not those of the class head"),
        (("a", "b"), r"of which 6 \(thing 0, \.\.\.\) are not those of the class head of model, which knows 2"),
        (None, r"things: 6 classes are not those of the class head of model, which knows 7"),
    ],
)
def test_classes_that_it_does_not_know_are_one_line(tmp_path, things, names, said):
    model = write_model(tmp_path / "model", head_of(names, 7))
    with pytest.raises(ConfigError, match=said):
        evaluated(model, things)


def test_beside_a_text_tower(tmp_path, things):
    """A row of its own where it knows the classes; another head has another row; seen classes are its too."""
    both = ("vision_cfg", "text_cfg")
    model = write_model(tmp_path / "model", head_of(NAMES), towers=both)
    (tmp_path / "seen.txt").write_text("thing 0\nthing 1\n")
    zero_shot, first = evaluated(model, things, seen_classes=str(tmp_path / "seen.txt"))
    assert (zero_shot["task"], first["task"]) == ("zero_shot", "class_head")
    assert {"acc_seen", "acc_unseen", "harmonic_mean"} <= first["metrics"].keys()
    (model / "class_head.safetensors").unlink()
    write_class_head(model, head_of(tuple(reversed(NAMES))))
    _, second = evaluated(model, things, seen_classes=str(tmp_path / "seen.txt"))
    assert second["options"] != first["options"]
    table = (model / "evaluation_metrics_all.csv").read_text().splitlines()[0].split(",")
    assert {"things/acc1", "things/class_head/acc1"} <= set(table)
    strange = write_model(tmp_path / "strange", head_of(("a", "b")), towers=both)
    assert [row["task"] for row in evaluated(strange, things)] == ["zero_shot"]


def test_it_goes_with_its_image_tower(tmp_path, things):
    """Towers of two models: the head of the one that gives the images."""
    model = write_model(tmp_path / "model", head_of(NAMES))
    texts = write_model(tmp_path / "texts", head_of(("a", "b")), towers=("vision_cfg", "text_cfg"))
    assert load_encoder(model, text_from=str(texts)).class_head.names == NAMES
    assert load_encoder(texts, image_from=str(model)).class_head.names == NAMES
    assert load_encoder(texts, ensemble=[str(texts)]).class_head is None
