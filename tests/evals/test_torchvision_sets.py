"""torchvision's own files as evaluation sets: written here in the layouts that torchvision expects, in small."""

from __future__ import annotations

import io
import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from kd_accel.data.source import BadSample
from kd_accel.data.transforms import decode
from kd_accel.evals.torchvision_sets import SETS, open_torchvision
from kd_accel.schema import ConfigError


@pytest.fixture
def put(tmp_path, picture):
    """(path below the root, content or the number of a picture) -> writes it."""

    def write(path: str, content: str | bytes | int) -> None:
        file = tmp_path / "root" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        content = picture(content) if isinstance(content, int) else content
        file.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def _unchecked(monkeypatch):
    """Without torchvision's checksums of the published archives."""
    for module in (datasets.cifar, datasets.stl10, datasets.svhn, datasets.flowers102):
        monkeypatch.setattr(module, "check_integrity", lambda *_: True)


def write_cifar10(put) -> np.ndarray:
    """Three test pictures of the classes 2, 0, 1, and five batches of one for training."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32), dtype=np.uint8)
    put("cifar-10-batches-py/test_batch", pickle.dumps({"data": pixels.reshape(3, -1), "labels": [2, 0, 1]}))
    for i in range(1, 6):
        put(f"cifar-10-batches-py/data_batch_{i}", pickle.dumps({"data": pixels[:1].reshape(1, -1), "labels": [2]}))
    put("cifar-10-batches-py/batches.meta", pickle.dumps({"label_names": ["air_plane", "auto", "bird"]}))
    return pixels


@pytest.mark.usefixtures("_unchecked")
def test_pictures_in_arrays(put, root):
    """CIFAR-10: torchvision decodes, names lose their `_`, the prompts are OpenAI's; it travels to workers unread."""
    pixels = write_cifar10(put)
    found = open_torchvision(root / "cifar-10-batches-py", name="cifar10")
    samples = found.samples()
    assert (found.name, found.class_names, len(found.templates)) == ("cifar10", ("air plane", "auto", "bird"), 18)
    assert [(s.key, s.file, s.label) for s in samples] == [
        (f"CIFAR10/test/{i}", None, y) for i, y in enumerate([2, 0, 1])
    ]
    travelled = pickle.loads(pickle.dumps(found))
    assert "_dataset" not in travelled.__dict__
    np.testing.assert_array_equal(np.asarray(travelled.image(samples[1])), pixels[1].transpose(1, 2, 0))
    train = open_torchvision(root / "cifar-10-batches-py", split="train").samples()
    assert [s.key for s in train] == [f"CIFAR10/train/{i}" for i in range(5)]


@pytest.mark.usefixtures("_unchecked")
def test_where_a_set_may_lie(put, root):
    """In its own folder, or alone in a folder of another name; a folder of several sets is not one of them."""
    write_cifar10(put)
    assert len(open_torchvision(root, name="cifar10").samples()) == 3
    assert open_torchvision(root.parent) is None
    (root / "other").mkdir()
    assert open_torchvision(root) is None


def idx(values: np.ndarray) -> bytes:
    """MNIST's format: uint8 of so many dimensions."""
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def test_mnist(put, root):
    """Grey pictures come as RGB; OpenAI's names are digits, torchvision's "0 - zero"."""
    pixels = np.arange(2 * 28 * 28).reshape(2, 28, 28) % 251
    for part in ("train", "t10k"):
        put(f"MNIST/raw/{part}-images-idx3-ubyte", idx(pixels))
        put(f"MNIST/raw/{part}-labels-idx1-ubyte", idx(np.array([7, 1])))
    found = open_torchvision(root / "MNIST")
    assert found.class_names == tuple("0123456789")
    assert [s.label for s in found.samples()] == [7, 1]
    grey = np.asarray(found.image(found.samples()[1]))
    np.testing.assert_array_equal(grey, np.repeat(pixels[1].astype(np.uint8)[:, :, None], 3, axis=2))


@pytest.mark.usefixtures("_unchecked")
def test_svhn_and_stl10(put, root):
    """SVHN's files lie in the root itself, its class 10 is the digit 0; STL-10 counts from 1."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    file = io.BytesIO()
    savemat(file, {"X": pixels.transpose(2, 3, 1, 0), "y": np.array([[10], [4]], dtype=np.uint8)})
    put("test_32x32.mat", file.getvalue())
    found = open_torchvision(root, name="vtab/svhn")
    assert [s.label for s in found.samples()] == [0, 4]
    np.testing.assert_array_equal(np.asarray(found.image(found.samples()[0])), pixels[0].transpose(1, 2, 0))

    pixels = np.random.default_rng(1).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8)
    put("stl10_binary/test_X.bin", pixels.tobytes())
    put("stl10_binary/test_y.bin", bytes([3, 1]))
    put("stl10_binary/class_names.txt", "airplane\nbird\ncar\n")
    found = open_torchvision(root / "stl10_binary")
    assert (found.class_names, [s.label for s in found.samples()]) == (("airplane", "bird", "car"), [2, 0])
    np.testing.assert_array_equal(np.asarray(found.image(found.samples()[1])), pixels[1].transpose(2, 1, 0))


def write_food101(put):
    put("food-101/meta/test.json", json.dumps({"apple_pie": ["apple_pie/1"], "pho": ["pho/2", "pho/3"]}))
    for i, name in enumerate(["apple_pie/1", "pho/2", "pho/3"]):
        put(f"food-101/images/{name}.jpg", i)


def write_dtd(put):
    put("dtd/dtd/labels/test1.txt", "banded/1.jpg\nwoven/2.jpg\nwoven/3.jpg\n")
    for i, name in enumerate(["banded/1", "woven/2", "woven/3"]):
        put(f"dtd/dtd/images/{name}.jpg", i)


def write_aircraft(put):
    put("fgvc-aircraft-2013b/data/variants.txt", "707-320\nA310\n")
    put("fgvc-aircraft-2013b/data/images_variant_test.txt", "1 707-320\n2 A310\n3 A310\n")
    for i in range(3):
        put(f"fgvc-aircraft-2013b/data/images/{i + 1}.jpg", i)


def write_pets(put):
    lines = ["great_pyrenees_1 1 2 1", "pug_2 2 2 2", "pug_3 2 2 2"]
    put("oxford-iiit-pet/annotations/test.txt", "".join(f"{line}\n" for line in lines))
    for i, line in enumerate(lines):
        put(f"oxford-iiit-pet/images/{line.split()[0]}.jpg", i)


def write_sst2(put):
    for i, name in enumerate(["negative/0", "positive/1", "positive/2"]):
        put(f"rendered-sst2/test/{name}.png", i)


def write_eurosat(put):
    for i, name in enumerate(["AnnualCrop/0", "Forest/1", "Forest/2"]):
        put(f"eurosat/2750/{name}.jpg", i)


def write_cars(put):
    (matrix := io.BytesIO(), meta := io.BytesIO())
    rows = [("0.jpg", 1), ("1.jpg", 2), ("2.jpg", 2)]
    kind = [("fname", object), ("class", np.uint8)]
    savemat(matrix, {"annotations": np.array(rows, dtype=kind)})
    savemat(meta, {"class_names": np.array(["AM General Hummer SUV 2000", "Fiat 500"], dtype=object)})
    put("stanford_cars/cars_test_annos_withlabels.mat", matrix.getvalue())
    put("stanford_cars/devkit/cars_meta.mat", meta.getvalue())
    for i in range(3):
        put(f"stanford_cars/cars_test/{i}.jpg", i)


def write_country211(put):
    for i, name in enumerate(["AD/0", "FR/1", "FR/2"]):
        put(f"country211/test/{name}.jpg", i)
    put("country211/classnames.txt", "Andorra\nFrance\n")


def write_flowers(put):
    (labels := io.BytesIO(), ids := io.BytesIO())
    savemat(labels, {"labels": np.array([[1, 2, 2]])})
    savemat(ids, {"tstid": np.array([[1, 2, 3]]), "trnid": np.array([[1]])})
    put("flowers-102/imagelabels.mat", labels.getvalue())
    put("flowers-102/setid.mat", ids.getvalue())
    for i in range(3):
        put(f"flowers-102/jpg/image_{i + 1:05d}.jpg", i)


@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize(
    ("write", "home", "first_names"),
    [
        (write_food101, "food-101", ("apple pie", "pho")),
        (write_dtd, "dtd", ("banded", "woven")),
        (write_aircraft, "fgvc-aircraft-2013b", ("707-320", "A310")),
        (write_pets, "oxford-iiit-pet", ("Great Pyrenees", "Pug")),
        (write_sst2, "rendered-sst2", ("negative", "positive")),
        (write_eurosat, "eurosat", ("annual crop land", "forest")),
        (write_cars, "stanford_cars", ("AM General Hummer SUV 2000", "Fiat 500")),
        (write_country211, "country211", ("Andorra", "France")),
        (write_flowers, "flowers-102", ("pink primrose", "hard-leaved pocket orchid")),
    ],
)
def test_pictures_in_files(put, root, picture, write, home, first_names):
    """Each is written with three pictures, of the classes 0, 1 and 1; they are read where they lie."""
    write(put)
    found = open_torchvision(root / home)
    samples = found.samples()
    assert (found.name, found.class_names[:2], [s.label for s in samples]) == (home, first_names, [0, 1, 1])
    assert found.image(samples[2]).tobytes() == decode(picture(2)).tobytes()
    assert all(s.file.is_file() for s in samples)


def write_gtsrb(put):
    for i in range(3):
        put(f"gtsrb/GTSRB/Final_Test/Images/{i}.ppm", b"P6 2 1 255\n" + bytes(range(i, i + 6)))
    put("gtsrb/GT-final_test.csv", "Filename;ClassId\n0.ppm;1\n1.ppm;0\n2.ppm;1\n")
    put("gtsrb/classnames.txt", "stop\nyield\n")


def test_gtsrb(put, root):
    """Its pictures are .ppm, which is nowhere else read; a damaged one is a bad sample."""
    write_gtsrb(put)
    found = open_torchvision(root / "gtsrb")
    samples = found.samples()
    assert (found.class_names, [s.label for s in samples]) == (("stop", "yield"), [1, 0, 1])
    np.testing.assert_array_equal(np.asarray(found.image(samples[1])), np.arange(1, 7).reshape(1, 2, 3))
    put("gtsrb/GTSRB/Final_Test/Images/1.ppm", b"P6 2")
    with pytest.raises(BadSample, match="cannot be decoded"):
        found.image(samples[1])


def test_class_names_that_nobody_knows(put, root):
    write_gtsrb(put)
    (root / "gtsrb" / "classnames.txt").unlink()
    with pytest.raises(ConfigError, match="gtsrb/classnames.txt: needed for GTSRB, a class name per line"):
        open_torchvision(root / "gtsrb")


def test_a_class_without_a_name(put, root):
    write_gtsrb(put)
    (root / "gtsrb" / "classnames.txt").write_text("stop\n")
    with pytest.raises(ConfigError, match="classes 0 to 1, named are 1"):
        open_torchvision(root / "gtsrb").samples()


def test_templates_beside(put, root):
    write_sst2(put)
    put("rendered-sst2/zeroshot_classification_templates.txt", "{c}!\n")
    assert open_torchvision(root / "rendered-sst2").templates == ("{c}!",)


def test_a_damaged_set_costs_one_line(put, root):
    """Half an archive: the sign is there, other files are not."""
    put("cifar-10-batches-py/test_batch", b"cut")
    with pytest.raises(
        ConfigError, match="cifar-10-batches-py: torchvision cannot read its split test: Dataset not found"
    ) as error:
        open_torchvision(root / "cifar-10-batches-py")
    assert "\n" not in str(error.value)


def test_no_training_split(put, root):
    """EuroSAT has none in torchvision: its pictures are the test, and no probe may learn from them."""
    write_eurosat(put)
    assert open_torchvision(root / "eurosat", split="train") is None


def test_every_layout_is_known_by_its_own_sign():
    assert len({(layout.home, layout.sign) for layout in SETS}) == len(SETS)


def test_pictures_are_rgb(put, root):
    file = io.BytesIO()
    Image.new("LA", (4, 3)).save(file, "PNG")
    put("rendered-sst2/test/negative/0.png", file.getvalue())
    put("rendered-sst2/test/positive/1.png", 1)
    found = open_torchvision(root / "rendered-sst2")
    assert found.image(found.samples()[0]).mode == "RGB"
