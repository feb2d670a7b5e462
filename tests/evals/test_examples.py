"""Retrieval examples: the best answers of a brute-force search, with thumbnails, of the newest step."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.evaluate import evaluate
from kd_accel.evals.examples import ANSWERS, SIDE, write_examples
from kd_accel.evals.features import SetFeatures
from kd_accel.evals.plan import make_plan
from kd_accel.evals.sets import EvalSet, Sample

SIZES = ((400, 100), (20, 30), (160, 160), (100, 320), (64, 64), (64, 48), (32, 32))  # pixels; picture 3 is unreadable


class Colors(EvalSet):
    """Pictures of one colour each, with two captions, and a third for every other one."""

    def samples(self) -> list[Sample]:
        several = (("{}, first", "{}, second"), ("{}, first", "{}, second", "{}, third"))
        return [
            Sample(f"k{i}", captions=tuple(caption.format(f"picture {i}") for caption in several[i % 2]))
            for i in range(len(SIZES))
        ]

    def image(self, sample: Sample) -> Image.Image:
        i = int(sample.key[1:])
        assert i != 3, "an unreadable picture is asked for by nobody"
        return Image.new("RGB", SIZES[i], (40 * i, 0, 0))


@pytest.fixture
def case(tmp_path):
    """Everything that write_examples wants, with random features of different lengths."""
    eval_set = Colors("group/colors", Path("nowhere"), "retrieval")
    samples, rows = eval_set.samples(), [0, 1, 2, 4, 5, 6]
    captions = [caption for row in rows for caption in samples[row].captions]
    owner = torch.tensor([image for image, row in enumerate(rows) for _ in samples[row].captions])
    generator = torch.Generator().manual_seed(1)
    features = SetFeatures(torch.tensor(rows), 5 * torch.randn(len(rows), 8, generator=generator))
    texts = torch.randn(len(captions), 8, generator=generator)
    return tmp_path, eval_set, samples, features, texts, owner, captions


def written(case, **options) -> dict:
    folder = case[0]
    write_examples(*case, **{"count": 3, "step": 5} | options)
    (file,) = (folder / "examples").iterdir()
    assert file.name == "group-colors.json"
    return json.loads(file.read_text())


def test_the_answers_are_the_best_ones(case):
    """Cosines, ranks and right answers of every query are those of a full matrix."""
    _, _, _, features, texts, owner, captions = case
    rows = features.rows.tolist()
    scores = F.normalize(texts, dim=1) @ F.normalize(features.images, dim=1).T  # [m, n]
    examples = written(case, count=len(captions))
    assert [example["query"] for example in examples["image_retrieval"]] == captions
    for text, example in enumerate(examples["image_retrieval"]):
        order = scores[text].argsort(descending=True).tolist()
        wanted = owner[text].item()
        assert example["wanted"] == str(rows[wanted])
        assert example["place"] == order.index(wanted) + 1
        assert [answer["picture"] for answer in example["answers"]] == [str(rows[image]) for image in order[:ANSWERS]]
        assert [answer["right"] for answer in example["answers"]] == [image == wanted for image in order[:ANSWERS]]
        expected = [round(scores[text, image].item(), 4) for image in order[:ANSWERS]]
        assert [answer["score"] for answer in example["answers"]] == pytest.approx(expected, abs=1.1e-4)
    assert [example["query"] for example in examples["text_retrieval"]] == [str(row) for row in rows]
    for image, example in enumerate(examples["text_retrieval"]):
        order = scores[:, image].argsort(descending=True).tolist()
        right = [owner[text].item() == image for text in order]
        assert example["place"] == right.index(True) + 1
        assert [answer["caption"] for answer in example["answers"]] == [captions[text] for text in order[:ANSWERS]]
        assert [answer["right"] for answer in example["answers"]] == right[:ANSWERS]


def test_they_agree_with_the_metrics(tmp_path, encoder, write_benchmark, captioned):
    """Of a set evaluated by the verb's way, the places of all queries come to the recalls and the mean ranks."""
    write_benchmark(tmp_path / "pairs", captioned([1, 2, 1, 3, 1, 1]))
    config = MeasureConfig(data=str(tmp_path / "pairs"), num_workers=0, examples=9)
    ((row, _),) = evaluate(encoder, make_plan(config).jobs, config, output=tmp_path / "results.jsonl")
    examples = json.loads((tmp_path / "examples" / "pairs.json").read_text())
    for way, queries in (("image", 9), ("text", 6)):
        places = [example["place"] for example in examples[f"{way}_retrieval"]]
        assert len(places) == queries
        assert row["metrics"][f"{way}_mean_rank"] == pytest.approx(sum(places) / queries, rel=1e-12)
        for k in (1, 5):
            recall = sum(place <= k for place in places) / queries
            assert row["metrics"][f"{way}_retrieval_recall@{k}"] == pytest.approx(recall, rel=1e-12)


def test_queries_are_spread_over_the_set(case):
    """Three of six pictures and of fourteen captions: the first, one in the middle, the last."""
    examples = written(case)
    captions = case[-1]
    assert len(captions) == 14
    assert [example["query"] for example in examples["image_retrieval"]] == [captions[0], captions[6], captions[13]]
    assert [example["query"] for example in examples["text_retrieval"]] == ["0", "2", "6"]


def test_every_picture_that_is_named_is_there_once_and_small(case):
    """JPEGs of 160 pixels or less, never enlarged, with the first caption of each."""
    examples = written(case)
    named = {answer["picture"] for example in examples["image_retrieval"] for answer in example["answers"]}
    named |= {example["wanted"] for example in examples["image_retrieval"]}
    named |= {example["query"] for example in examples["text_retrieval"]}
    assert set(examples["pictures"]) == named
    for key, picture in examples["pictures"].items():
        with Image.open(io.BytesIO(base64.b64decode(picture["jpeg"]))) as image:
            width, height = SIZES[int(key)]
            shrink = min(1, SIDE / max(width, height))
            assert image.format == "JPEG"
            assert image.size == (width * shrink, height * shrink)
            assert image.getpixel((0, 0))[0] == pytest.approx(40 * int(key), abs=4)
        assert picture["caption"] == f"picture {key}, first"


def test_the_newest_step_counts(case):
    """An older checkpoint that is evaluated later changes nothing; the same step and a release do."""
    assert written(case, step=5)["step"] == 5
    assert written(case, step=4)["step"] == 5
    assert len(written(case, step=5, count=1)["text_retrieval"]) == 1
    assert written(case, step=6)["step"] == 6
    assert written(case, step=None)["step"] is None


def test_no_examples_are_no_file(case):
    write_examples(*case, count=0, step=5)
    assert not (case[0] / "examples").exists()


def test_long_captions_are_cut(case):
    """A file of megabytes is read by nobody."""
    captions = [caption + "x" * 100_000 for caption in case[-1]]
    write_examples(*case[:-1], captions, count=3, step=5)
    assert (case[0] / "examples" / "group-colors.json").stat().st_size < 50_000
