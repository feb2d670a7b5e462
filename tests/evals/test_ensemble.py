"""Several models as one: their mean cosines, each with its own size of picture, width and prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from kd_accel.data.transforms import eval_view
from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.encoder import load_encoder
from kd_accel.evals.ensemble import Ensemble
from kd_accel.evals.features import image_features, text_features
from kd_accel.evals.find import find_sets
from kd_accel.evals.measure import OnSet, measure
from kd_accel.evals.plan import Job
from kd_accel.evals.zero_shot import classifier
from kd_accel.schema import ConfigError

NAMES, TEMPLATES = ("cat", "red dog", "hen"), ("a photo of a {c}.", "{c}")
LOAD = {"batch_size": 4, "num_workers": 0}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A release with other sizes than `release`: 16 pixels, 8 wide."""
    return tiny.write_teacher(tmp_path_factory.mktemp("model") / "small", tiny.arch(image_size=16))


@pytest.fixture(scope="module")
def both(release, small) -> Ensemble:
    return load_encoder(release, ensemble=[str(small)])


@pytest.fixture
def eval_set(tmp_path, write_benchmark, labelled):
    [found] = find_sets(str(write_benchmark(tmp_path / "things", labelled([0, 1, 2, 0, 1]), num_classes=3)))
    return found


def row_of(encoder, eval_set) -> dict:
    config = MeasureConfig(data=str(eval_set.path), batch_size=2, num_workers=0)
    return measure(OnSet(encoder, Job(eval_set), config), eval_set.kind)


def cosines(encoder, eval_set) -> torch.Tensor:
    """[n, C] of one model, without our loader and classifier."""
    views = torch.stack([eval_view(eval_set.image(sample), encoder.image_input) for sample in eval_set.samples()])
    rows = []
    for name in NAMES:
        prompts = encoder.encode_texts([template.replace("{c}", name) for template in TEMPLATES])
        rows.append(F.normalize(F.normalize(prompts, dim=1).mean(0), dim=0))
    return F.normalize(encoder.encode_images(views), dim=1) @ torch.stack(rows).T


def test_its_cosines_are_the_members_mean(both, eval_set):
    """Images against classes of several prompts, where each member normalises its own mean."""
    images = both.unit(image_features(both, eval_set, eval_set.samples(), **LOAD).images)
    weights = classifier(both, NAMES, TEMPLATES, batch_size=4)
    expected = torch.stack([cosines(member, eval_set) for member in both.members]).mean(0)
    torch.testing.assert_close(images @ weights.T, expected)


def test_rows_are_unit_and_members_weigh_alike(both):
    """However long a member's features are."""
    first, second = both.members
    rows = torch.cat([1000 * torch.randn(4, first.embed_dim), torch.randn(4, second.embed_dim)], dim=1)
    unit = both.unit(rows)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(unit[:, : first.embed_dim].norm(dim=1), torch.full((4,), 0.5**0.5))
    texts = ["a", "a cat", "dogs"]
    mean = sum(
        F.normalize(m.encode_texts(texts), dim=1) @ F.normalize(m.encode_texts(texts), dim=1).T for m in both.members
    )
    rows = both.unit(text_features(both, texts, batch_size=2))
    torch.testing.assert_close(rows @ rows.T, mean / 2)


def test_one_twice_is_that_one(release, eval_set):
    """The same predictions, hence the same metrics."""
    once, twice = (row_of(load_encoder(release, ensemble=more), eval_set) for more in ([], [str(release)]))
    assert twice["model"] == "untrained + untrained"
    assert twice["metrics"] == once["metrics"]
    assert twice["weights"] != once["weights"]


def test_what_it_is_called_and_where_it_lives(both, release, small):
    assert (both.name, both.step, both.title) == ("untrained + small", None, "untrained + small")
    assert both.home == release
    assert both.embed_dim == 12 + 8
    other_order = load_encoder(small, ensemble=[str(release)])
    assert other_order.image_id != both.image_id  # its features stand the other way round


def test_a_member_that_lacks_a_tower_is_named(release, tmp_path):
    image = tiny.write_teacher(tmp_path / "image", {k: v for k, v in tiny.arch().items() if k != "text_cfg"})
    with pytest.raises(ConfigError, match="^image has no text tower"):
        load_encoder(release, ensemble=[str(image)]).require("image", "text")


def test_members_must_agree_on_the_prompts(release, tmp_path):
    """One with stored class names alone would be asked for prompts that it does not know."""
    np.save(tmp_path / "names.npy", np.eye(3, 12, dtype=np.float32))
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    stored = load_encoder(release, text_from=str(tmp_path / "names.npy"))
    ensemble = Ensemble((load_encoder(release), stored))
    assert ensemble.templates(NAMES, ("{c}",)) == ("{c}",)
    with pytest.raises(ConfigError, match="store the prompts too"):
        ensemble.templates(NAMES, TEMPLATES)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_have_the_rows_of_one(release, small, tmp_path, write_benchmark, labelled, captioned, run_ranks):
    """Towers of two models in an ensemble with a third; one set has fewer batches than there are ranks."""
    write_benchmark(tmp_path / "things", labelled([0, 1, 2, 0, 1, 2, 1]), num_classes=3)
    write_benchmark(tmp_path / "captions", captioned([1, 3]))
    sets = [str(tmp_path / name) for name in ("things", "captions")]
    encoder = load_encoder(release, image_from=str(release), ensemble=[str(small)])
    alone = [row_of(encoder, eval_set) for eval_set in find_sets(sets)]

    words = [
        f"image_from={release}",
        f"ensemble=[{small}]",
        f"data=[{','.join(sets)}]",
        "batch_size=2",
        "num_workers=0",
    ]
    run_ranks(["-m", "kd_accel", "eval", release, *words, f"output={tmp_path / 'two.jsonl'}"])
    two = [json.loads(line) for line in (tmp_path / "two.jsonl").read_text().splitlines()]
    for row in (*alone, *two):
        del row["seconds"]
    assert two == alone
    assert [row["n"] for row in two] == [7, 2]
    assert two[0]["model"] == "untrained, image of untrained + small"
