"""The demo's data is fixed and well posed."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_accel.data.index import expand_shards
from kd_accel.data.shards import TarSource
from kd_accel.demo import digits
from kd_accel.evals.find import find_sets


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "data"
    digits.write_data(folder)
    return folder


def members(path: Path, extension: str) -> list[bytes]:
    with tarfile.open(path) as tar:
        return [tar.extractfile(member).read() for member in tar if member.name.endswith(extension)]


def test_the_split_is_stratified_and_loses_nothing(rows):
    """Every scan of scikit-learn is on one side exactly; 36 of each digit are held out."""
    from sklearn.datasets import load_digits

    train, test = rows
    original = load_digits()
    expected = Counter((digit, image.tobytes()) for image, digit in zip(original.images, original.target, strict=True))
    assert Counter((row[1], (row[0] * 16).tobytes()) for row in [*train, *test]) == expected
    assert Counter(row[1] for row in test) == dict.fromkeys(range(10), digits.TEST_PER_CLASS)
    assert not {row[0].tobytes() for row in train} & {row[0].tobytes() for row in test}


def test_every_retrieval_caption_names_one_image(data):
    """All combinations of digit, ink and paper, once each: recall can reach 1."""
    captions = members(data / "test" / "digits_retrieval" / "test" / "0.tar", ".txt")
    assert len(set(captions)) == len(captions) == 10 * len(digits.INKS) * len(digits.PAPERS)


def test_no_colour_gives_a_digit_away(rows):
    """Every digit is trained in every ink and paper, equally often up to one."""
    counts = Counter(row[1:] for row in rows[0])
    for digit in range(10):
        of_digit = [n for (d, *_), n in counts.items() if d == digit]
        assert len(of_digit) == len(digits.INKS) * len(digits.PAPERS)
        assert max(of_digit) - min(of_digit) <= 1


def test_a_caption_says_what_the_image_shows(rows):
    """Digit, ink and paper are all in the words of every caption."""
    for number, row in enumerate(rows[0]):
        words = set(digits._caption(number, row).decode().replace(",", "").split())
        _, digit, ink, paper = row
        assert {digits.DIGITS[digit], ink, paper} <= words


def test_ink_is_where_the_scan_is_dark(rows):
    """An empty scan is plain paper, a full one plain ink."""
    for value, color in ((0.0, digits.PAPERS["blue"]), (1.0, digits.INKS["pink"])):
        png = digits._image(np.full((8, 8), value), 0, "pink", "blue")["png"]
        pixels = np.asarray(Image.open(io.BytesIO(png)))
        assert pixels.shape == (digits.IMAGE_SIZE, digits.IMAGE_SIZE, 3)
        assert set(map(bytes, pixels.reshape(-1, 3))) == {bytes.fromhex(color.removeprefix("#"))}


def test_the_data_is_what_training_and_evaluation_read(data, rows):
    """The index counts every training image over several shards; both evaluation sets are found with their kind."""
    train, test = rows
    shards = expand_shards(str(data / "train"))
    assert len(shards) > 1
    assert TarSource(shards, captions=["txt"]).num_samples == len(train)
    assert sorted(found.kind for found in find_sets(str(data / "test"))) == ["retrieval", "zero_shot"]
    assert len(members(data / "test" / "digits" / "test" / "0.tar", ".cls")) == len(test)


def test_the_data_has_the_same_bytes_every_time(data, tmp_path):
    """Two machines run the same digits."""
    digits.write_data(tmp_path)
    for path in sorted(data.rglob("*.tar")):
        assert path.read_bytes() == (tmp_path / path.relative_to(data)).read_bytes()
