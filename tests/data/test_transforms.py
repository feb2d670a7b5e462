"""Pixels: decoding lets no broken image through, crops can be replayed, evaluation views are open_clip's exactly."""

from __future__ import annotations

import io
import math
import random
import struct
import tarfile
import zlib

import numpy as np
import pytest
import torch
from open_clip import image_transform
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, PILToTensor, RandomResizedCrop, Resize

from kd_accel.augment_config import AugmentConfig
from kd_accel.data.source import BadSample
from kd_accel.data.transforms import crop_box, decode, eval_view, random_box, train_view

WHOLE = AugmentConfig(scale=(1, 1), ratio=(1, 1))  # of a square image


def picture(width, height, mode="RGB"):
    content = np.random.default_rng(width * height).bytes(width * height * len(mode))  # one letter per channel
    return Image.frombytes(mode, (width, height), content)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_every_mode_becomes_rgb(mode):
    """As Image.convert does it: alpha is dropped, grey is repeated."""
    image = picture(9, 7, mode)
    assert decode(encoded(image)).tobytes() == image.convert("RGB").tobytes()


def test_a_palette_with_alpha_is_looked_up():
    """Transparent colours keep their colour, and PIL's warning about such palettes is not shown."""
    image = picture(9, 7).quantize(16)
    data = encoded(image, transparency=bytes(range(16)))
    assert Image.open(io.BytesIO(data)).mode == "P"
    assert decode(data).tobytes() == image.convert("RGB").tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_cut_image_is_bad(kind):
    """At any length: the upper half of a picture is not the picture."""
    data = encoded(picture(64, 48), kind)
    for share in (0.0, 0.01, 0.3, 0.9):
        with pytest.raises(BadSample, match="image cannot be decoded"):
            decode(data[: int(len(data) * share)])


def test_noise_never_gets_past_as_another_exception():
    """Images with random bytes flipped either decode or are bad samples."""
    data, rng = encoded(picture(16, 16)), np.random.default_rng(0)
    outcomes = set()
    for _ in range(200):
        noisy = bytearray(data)
        noisy[int(rng.integers(len(data)))] ^= int(rng.integers(1, 256))
        try:
            outcomes.add(decode(bytes(noisy)).mode)
        except BadSample:
            outcomes.add("bad")
    assert "bad" in outcomes
    assert outcomes <= {"bad", "RGB"}


@pytest.mark.parametrize("factor", [1.5, 3])
def test_decompression_bombs_are_bad(factor):
    """Too many pixels in the header are refused before they are allocated, where PIL warns and where it raises."""
    side = int((factor * Image.MAX_IMAGE_PIXELS) ** 0.5)
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b"\0" * 64)]
    framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(framed)
    with pytest.raises(BadSample, match="DecompressionBomb"):
        decode(data)


def test_a_side_has_a_bound():
    """100,001 x 1 pixels are few enough for PIL."""
    data = encoded(Image.new("RGB", (100_001, 1)))
    for read in (decode, lambda data: train_view(data, (8, 8), AugmentConfig(), np.random.default_rng(0))):
        with pytest.raises(BadSample, match="^image has 100,001 x 1 pixels, a side may have 100,000$"):
            read(data)
    assert decode(encoded(Image.new("RGB", (100_000, 1)))).size == (100_000, 1)


def test_formats_that_start_other_programs_are_bad():
    """EPS under the name .jpg would reach Ghostscript. The reason names no address: it is alike in every process."""
    with pytest.raises(BadSample, match="^image cannot be decoded: none of JPEG, PNG, WEBP, GIF, BMP$"):
        decode(encoded(picture(8, 8), "EPS"))


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("target", [(16, 16), (24, 15)])
def test_the_evaluation_view_is_open_clips(contract, resize_mode, interpolation, target):
    """Exactly its transform before normalisation, for odd, tiny and elongated images."""
    wanted = contract(target, resize_mode=resize_mode, interpolation=interpolation).image
    theirs = image_transform(
        target, is_train=False, mean=wanted.mean, std=wanted.std, resize_mode=resize_mode, interpolation=interpolation
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (wanted.mean, wanted.std))
    for size in [(33, 21), (17, 50), (1, 1), (5, 3), (97, 16), (16, 16)]:
        view = eval_view(picture(*size), wanted)
        assert view.dtype == torch.uint8
        assert view.shape == (3, *target)
        torch.testing.assert_close((view / 255 - mean) / std, theirs(picture(*size)), rtol=0, atol=0)


def test_a_train_view_is_a_function_of_its_generator():
    """The same seed gives the same view, another one another; the global generators are neither used nor moved."""
    data, augment = encoded(picture(40, 30)), AugmentConfig(scale=(0.3, 1), flip=0.5)
    views = [train_view(data, (12, 10), augment, np.random.default_rng([0, 0, i])) for i in range(4)]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    again = [train_view(data, (12, 10), augment, np.random.default_rng([0, 0, i])) for i in range(4)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert not torch.equal(views[0], views[1])
    assert {(view.dtype, view.shape) for view in views} == {(torch.uint8, (3, 12, 10))}


def test_a_whole_crop_is_the_resized_image():
    """Rows stay rows and channels stay channels: scale 1 is PIL's bicubic resize, flip 1 its mirror image.

    PIL and torch round once after each of the two directions: of one grey level more or less.
    """
    image, rng = picture(30, 30), np.random.default_rng(0)
    resized = torch.from_numpy(np.array(image.resize((10, 12), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    torch.testing.assert_close(train_view(encoded(image), (12, 10), WHOLE, rng), resized, rtol=0, atol=1)
    flip = WHOLE.model_copy(update={"flip": 1.0})
    torch.testing.assert_close(train_view(encoded(image), (12, 10), flip, rng), resized.flip(2), rtol=0, atol=1)


def test_the_box_is_drawn_first_and_the_flip_second():
    """The order of draws is part of a run: a resumed one must see what it would have seen, whatever is added later."""
    image, augment = picture(40, 30), AugmentConfig(flip=0.5)
    for seed in range(20):
        view = train_view(encoded(image), (12, 10), augment, np.random.default_rng([seed, 1, 2]))
        rng = np.random.default_rng([seed, 1, 2])
        cut = image.crop(random_box(image.size, augment, rng)).resize((10, 12), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        torch.testing.assert_close(view, torch.from_numpy(np.array(cut)).permute(2, 0, 1), rtol=0, atol=1)  # a rounding


@pytest.mark.parametrize("size", [(31, 20), (20, 31), (24, 16)])
def test_a_centre_crop_is_torchvisions(size):
    """Resize to the shorter side and CenterCrop, but for where those round to whole pixels; nothing is drawn."""
    smooth = picture(5, 5).resize(size, Image.Resampling.BICUBIC)
    view = train_view(encoded(smooth), (12, 12), AugmentConfig(crop="center"), np.random.default_rng(0))
    theirs = Compose([Resize(12, InterpolationMode.BICUBIC), CenterCrop(12), PILToTensor()])(smooth)
    # a long side of up to 19 pixels may be rounded, and the cut with it, by half a pixel each: of a picture whose
    # neighbours differ by `step` on the mean, that moves a value by no more than it
    step = theirs.double().diff(dim=1).abs().mean() + theirs.double().diff(dim=2).abs().mean()
    assert (view.double() - theirs.double()).abs().mean() < step
    left, upper, right, lower = crop_box(size, (12, 12), AugmentConfig(crop="center"), np.random.default_rng(0))
    assert (right - left, lower - upper) == (min(size), min(size))
    assert (left + right, upper + lower) == size


def test_a_centre_crop_has_the_views_shape():
    """Of a view twice as wide as high: the widest such box."""
    assert crop_box((100, 80), (10, 20), AugmentConfig(crop="center"), np.random.default_rng(0)) == (0, 15, 100, 65)
    assert crop_box((300, 80), (10, 20), AugmentConfig(crop="center"), np.random.default_rng(0)) == (70, 0, 230, 80)


def test_boxes_have_the_asked_area_and_ratio():
    """Inside the image, area in `scale`, width / height in `ratio`, up to whole pixels; spread over both."""
    augment, rng = AugmentConfig(scale=(0.2, 0.6), ratio=(0.5, 2)), np.random.default_rng(0)
    boxes = np.array([random_box((400, 300), augment, rng) for _ in range(500)])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = w * h / (400 * 300), w / h
    assert (boxes >= 0).all()
    assert (boxes[:, 2] <= 400).all()
    assert (boxes[:, 3] <= 300).all()
    rounding = 0.02  # half a pixel of a side of at least 100 pixels, on both sides
    assert (area.min() > 0.2 * (1 - rounding)) & (area.max() < 0.6 * (1 + rounding))
    assert (ratio.min() > 0.5 * (1 - rounding)) & (ratio.max() < 2 * (1 + rounding))
    assert (area.max() - area.min() > 0.35) & (ratio.max() - ratio.min() > 1.2)
    assert np.unique(boxes[:, 0]).size > 50


def test_boxes_are_those_of_uniform_draws():
    """Two numbers for the shape, two for the place, bit for bit those of Generator.uniform and Generator.integers."""
    augment = AugmentConfig(scale=(0.1, 0.4))
    for seed in range(200):
        rng = np.random.default_rng([seed, 3, 4])
        area = 300 * 200 * rng.uniform(0.1, 0.4)
        ratio = math.exp(rng.uniform(math.log(0.75), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        left, upper = rng.integers(300 - w + 1), rng.integers(200 - h + 1)
        box = random_box((300, 200), augment, np.random.default_rng([seed, 3, 4]))
        assert box == (left, upper, left + w, upper + h)


def test_the_distribution_of_boxes_is_torchvisions():
    """Mean of each side of the box over many draws agrees within four standard errors."""
    augment, rng = AugmentConfig(scale=(0.1, 1)), np.random.default_rng(0)
    ours = np.array([random_box((300, 200), augment, rng) for _ in range(2000)], dtype=float)
    blank = torch.empty(3, 200, 300)
    theirs = [RandomResizedCrop.get_params(blank, list(augment.scale), list(augment.ratio)) for _ in range(2000)]
    theirs = np.array([(left, top, left + w, top + h) for top, left, h, w in theirs], dtype=float)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / 2000)
    assert (abs(ours.mean(0) - theirs.mean(0)) < 4 * error).all()


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (97, 3)])
def test_elongated_images_fall_back_to_torchvisions_centre(size):
    """Where no try can fit: the largest centred box of an allowed ratio, without a draw."""
    top, left, h, w = RandomResizedCrop.get_params(torch.empty(3, size[1], size[0]), [0.9, 1.0], [0.75, 4 / 3])
    assert random_box(size, AugmentConfig(), np.random.default_rng(0)) == (left, top, left + w, top + h)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_tiny_images_have_a_view(size):
    """At least one pixel is left of any image."""
    augment = AugmentConfig(scale=(0.05, 0.1), ratio=(2, 3))
    assert train_view(encoded(picture(*size)), (8, 8), augment, np.random.default_rng(0)).shape == (3, 8, 8)


def counted_decodes(monkeypatch):
    """The sizes at which JPEGs are decoded from now on."""
    sizes, prepare = [], JpegImageFile.load_prepare  # called where there is something left to decode
    monkeypatch.setattr(JpegImageFile, "load_prepare", lambda self: sizes.append(self.size) or prepare(self))
    return sizes


@pytest.mark.parametrize(
    ("image", "view", "decoded"),
    [
        ((72, 72), (64, 64), (72, 72)),  # half of it would be less than the view
        ((127, 127), (64, 64), (127, 127)),
        ((128, 128), (64, 64), (64, 64)),
        ((500, 375), (64, 48), (125, 94)),  # 500 / 64 and 375 / 48 are more than 4, less than 8
        ((500, 375), (48, 64), (125, 94)),
        ((1001, 1001), (100, 100), (126, 126)),
        ((4000, 4000), (100, 100), (500, 500)),  # the decoder knows no more than 1/8
    ],
)
def test_a_jpeg_is_decoded_no_larger_than_needed(image, view, decoded, monkeypatch):
    """Of a whole crop, at 1/2, 1/4, 1/8; never smaller than the view."""
    data = encoded(picture(*image), "JPEG")
    sizes = counted_decodes(monkeypatch)
    whole = AugmentConfig(scale=(1, 1), ratio=(image[0] / image[1],) * 2)
    assert train_view(data, view, whole, np.random.default_rng(0)).shape == (3, *view)
    assert sizes == [decoded]


def test_a_small_crop_of_a_large_jpeg_is_decoded_whole(monkeypatch):
    """It is the box that has to cover the view, not the image; other formats and the evaluation have no choice."""
    photo = picture(400, 400)
    data, sizes = encoded(photo, "JPEG"), counted_decodes(monkeypatch)
    train_view(data, (64, 64), AugmentConfig(scale=(0.09, 0.1), ratio=(1, 1)), np.random.default_rng(0))
    assert sizes == [(400, 400)]
    assert decode(data).size == (400, 400)
    train_view(encoded(photo), (64, 64), AugmentConfig(), np.random.default_rng(0))
    assert sizes == [(400, 400)] * 2


def photos(root):
    """Every photograph of one real set, encoded."""
    (tar,) = sorted((root / "zeroshot/coco_cc_retrieval/test").glob("*.tar"))
    with tarfile.open(tar) as file:
        return [file.extractfile(member).read() for member in file if member.name.endswith(".jpg")]


def test_reduced_photos_look_the_same(data_root, monkeypatch):
    """What decoding at half size changes in a view of a real photograph is small beside a neighbouring pixel.

    Mean absolute differences in 0..255; the bounds leave half again as much as was measured (1.6, worst photo 3.4).
    """
    data, augment = photos(data_root), AugmentConfig()
    sizes = counted_decodes(monkeypatch)

    def views():
        made = (train_view(photo, (64, 64), augment, np.random.default_rng(i)) for i, photo in enumerate(data))
        return [view.double() for view in made]

    reduced = views()
    monkeypatch.setattr("kd_accel.data.transforms._reduce", lambda image, box, size: box)
    whole = views()
    assert sum(2 * small[0] <= full[0] + 1 for small, full in zip(sizes, sizes[len(data) :], strict=False)) == len(data)
    difference = torch.stack([(a - b).abs().mean() for a, b in zip(reduced, whole, strict=True)])
    neighbours = torch.stack([view.diff(dim=2).abs().mean() for view in whole])
    assert difference.mean() < 2.4
    assert difference.max() < 5.1
    assert (difference < neighbours / 3).all()


def test_real_pairs_of_72_pixels_are_untouched(data_root, monkeypatch):
    """At 64 pixels the real pairs are decoded whole, so runs on them see what they saw before."""
    with tarfile.open(data_root / "pairs/val/000000.tar") as file:
        data = [file.extractfile(member).read() for member in file if member.name.endswith(".jpg")]
    sizes = counted_decodes(monkeypatch)
    for i, jpeg in enumerate(data):
        train_view(jpeg, (64, 64), AugmentConfig(), np.random.default_rng(i))
    assert sizes == [Image.open(io.BytesIO(jpeg)).size for jpeg in data]
