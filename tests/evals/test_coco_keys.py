"""The keys of the other systems have the values that their own definitions give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kd_accel.evals.coco_keys import PERCENT, coco_keys


@pytest.fixture
def gallery():
    """1,030 images, three batches of 512 the last of which has six, with one to three captions near each."""
    images = F.normalize(torch.randn(1030, 24), dim=-1)
    owner = torch.arange(1030).repeat_interleave(torch.arange(1030) % 3 + 1)
    texts = F.normalize(images[owner] + 0.4 * torch.randn(len(owner), 24), dim=-1)
    return images, texts, owner


METRICS = {
    **{f"image_retrieval_recall@{k}": share for k, share in ((1, 0.25), (5, 0.5), (10, 0.75))},
    **{f"text_retrieval_recall@{k}": share for k, share in ((1, 0.125), (5, 0.625), (10, 0.875))},
}


def test_recall_has_the_names_of_protoclip_and_albef(gallery):
    """Percent; txt_r is what text retrieval finds, text2image is image retrieval."""
    keys = coco_keys(METRICS, *gallery)
    text, image = {1: 12.5, 5: 62.5, 10: 87.5}, {1: 25, 5: 50, 10: 75}
    expected = {f"{name}{k}": text[k] for name in ("image2text-R@", "txt_r") for k in text}
    expected |= {f"{name}{k}": image[k] for name in ("text2image-R@", "img_r") for k in image}
    expected |= {"txt_r_mean": sum(text.values()) / 3, "img_r_mean": 50}
    mean = (expected["txt_r_mean"] + expected["img_r_mean"]) / 2
    assert {name: keys[name] for name in PERCENT} == pytest.approx(expected | {"r_mean": mean, "mean-recall": mean})


def test_inbatch_equals_a_loop_over_batches_of_512(gallery):
    """Each image against the last captions of its batch; ties aside, topk is the definition."""
    images, texts, owner = gallery
    last = {image: caption for caption, image in enumerate(owner.tolist())}
    captions = texts[[last[image] for image in range(len(images))]]
    keys = coco_keys(METRICS, *gallery)
    shares = []
    for k in (1, 2, 3, 4, 5, 10, 20, 30, 50):
        hits = 0
        for start in range(0, len(images), 512):
            scores = images[start : start + 512] @ captions[start : start + 512].T
            found = scores.topk(min(k, len(scores)), dim=1).indices
            hits += (found == torch.arange(len(scores))[:, None]).any(1).sum().item()
        assert keys[f"val/inbatch_top{k}"] == hits / len(images)
        shares.append(hits / len(images))
    assert 0 < shares[0] < shares[-1] < 1


def test_of_equal_scores_the_earlier_caption_comes_first():
    """Five images with one and the same caption: the first finds its own at once, the second in second place."""
    images = torch.ones(5, 1)
    keys = coco_keys(METRICS, images, torch.ones(5, 1), torch.arange(5))
    assert [keys[f"val/inbatch_top{k}"] for k in (1, 2, 3, 4, 5)] == [0.2, 0.4, 0.6, 0.8, 1]


def test_captions_need_not_stand_in_the_order_of_images():
    """The last caption of an image is the last in the file, wherever that is."""
    images = torch.eye(3)
    owner = torch.tensor([2, 0, 1, 0, 2, 1])
    texts = torch.eye(3)[torch.tensor([0, 1, 2, 0, 2, 1])]  # the first three are wrong
    assert coco_keys(METRICS, images, texts, owner)["val/inbatch_top1"] == 1
