"""`kd-accel eval` on real sets has the numbers of another program: PIL, open_clip, scikit-learn, a full sort."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, recall_score, top_k_accuracy_score

from kd_accel.eval_config import EvalConfig
from kd_accel.evals.suite import run

BATCH = 128
SETS = [
    "caltech101", "clothing10", "coco_cc_retrieval", "emoji_category", "emoji_retrieval", "fashion_mnist", "flowers5",
    "grocery",
]  # fmt: skip


class OpenClip:
    """A release as open_clip loads it, its own preprocessing and tokenizer included."""

    def __init__(self, release: Path):
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(f"local-dir:{release}")
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{release}")
        self.model.eval()

    @torch.no_grad()
    def images(self, encoded: list[bytes]) -> torch.Tensor:
        pixels = torch.stack([self.preprocess(Image.open(io.BytesIO(data)).convert("RGB")) for data in encoded])
        return torch.cat([self.model.encode_image(part, normalize=True) for part in pixels.split(BATCH)])

    @torch.no_grad()
    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.cat([self.model.encode_text(part, normalize=True) for part in self.tokenizer(texts).split(BATCH)])


def members(folder: Path) -> list[dict[str, bytes]]:
    """{extension: content} of every sample, in the tars' order."""
    samples: dict[str, dict[str, bytes]] = {}
    for number in range(int((folder / "test/nshards.txt").read_text())):
        with tarfile.open(folder / f"test/{number}.tar") as tar:
            for member in tar.getmembers():
                key, extension = member.name.split(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return list(samples.values())


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def zero_shot(clip: OpenClip, folder: Path) -> dict[str, float | None]:
    samples = members(folder)
    labels = np.array([int(sample["cls"]) for sample in samples])
    names, templates = lines(folder / "classnames.txt"), lines(folder / "zeroshot_classification_templates.txt")
    weights = [clip.texts([template.format(c=name) for template in templates]).mean(0) for name in names]
    images = clip.images([sample.get("jpg") or sample["png"] for sample in samples])
    logits = (100 * images @ F.normalize(torch.stack(weights), dim=-1).T).numpy()
    predicted, classes = logits.argmax(1), range(len(names))
    return {
        "n": len(samples),
        "acc1": accuracy_score(labels, predicted),
        "acc5": top_k_accuracy_score(labels, logits, k=5, labels=classes) if len(names) > 5 else 1,
        "mean_per_class_recall": recall_score(labels, predicted, labels=np.unique(labels), average="macro"),
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "f1_macro": f1_score(labels, predicted, average="macro", zero_division=0),
    }


def retrieval(clip: OpenClip, folder: Path) -> dict[str, float]:
    samples = members(folder)
    captions = [sample["txt"].decode().splitlines() for sample in samples]
    owner = np.repeat(np.arange(len(samples)), [len(own) for own in captions])
    images = clip.images([sample.get("jpg") or sample["png"] for sample in samples]).double()
    scores = (clip.texts([caption for own in captions for caption in own]).double() @ images.T).numpy().round(9)
    of_images = [list(np.argsort(-row, kind="stable")).index(own) for row, own in zip(scores, owner, strict=True)]
    of_texts = [list(owner[np.argsort(-column, kind="stable")]).index(i) for i, column in enumerate(scores.T)]
    metrics = {"n": len(samples), "image_mean_rank": np.mean(of_images) + 1, "text_mean_rank": np.mean(of_texts) + 1}
    for what, places in (("image", of_images), ("text", of_texts)):
        metrics |= {f"{what}_retrieval_recall@{k}": np.mean(np.array(places) < k) for k in (1, 5, 10)}
    metrics["mean_recall@1"] = (metrics["image_retrieval_recall@1"] + metrics["text_retrieval_recall@1"]) / 2
    return metrics


@pytest.fixture(scope="module")
def zeroshot(request) -> Path:
    return request.getfixturevalue("data_root") / "zeroshot"


@pytest.fixture(scope="module")
def rows(zeroshot, release, tmp_path_factory) -> dict[str, dict]:
    """The rows of all eight sets, of one process."""
    output = tmp_path_factory.mktemp("rows") / "results.jsonl"
    run(EvalConfig(model=str(release), data=str(zeroshot), batch_size=BATCH, output=str(output)))
    return {row["key"]: row for row in map(json.loads, lines(output))}


@pytest.fixture(scope="module")
def clip(release) -> OpenClip:
    return OpenClip(release)


def test_all_sets_are_found(rows):
    """Eight, each readable to the last image."""
    assert list(rows) == SETS
    assert {row["bad"] for row in rows.values()} == {0}


@pytest.mark.parametrize("name", SETS)
def test_metrics_are_those_of_another_program(rows, clip, zeroshot, name):
    """Not one image or caption is counted otherwise; every metric of the row is checked."""
    expected = (retrieval if "retrieval" in name else zero_shot)(clip, zeroshot / name)
    assert rows[name]["n"] == expected.pop("n")
    ours = {key: value for key, value in rows[name]["metrics"].items() if key != "main_metric"}
    assert ours == pytest.approx({key: expected[key] for key in ours}, abs=1e-9)


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_give_the_same_rows(rows, zeroshot, release, tmp_path, run_ranks):
    """To the last bit, of every set."""
    values = [f"data={zeroshot}", f"batch_size={BATCH}", f"output={tmp_path / 'two'}"]
    run_ranks(["-m", "kd_accel", "eval", str(release), *values], nproc=2)
    two = {row["key"]: row for row in map(json.loads, lines(tmp_path / "two"))}
    assert {key: {**row, "seconds": 0} for key, row in two.items()} == {
        key: {**row, "seconds": 0} for key, row in rows.items()
    }
