"""Texts by their stored embeddings: exact words in, the stored rows out, one line for what is not there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
from safetensors.torch import save_file

from kd_accel.eval_config import MeasureConfig
from kd_accel.evals.encoder import load_encoder
from kd_accel.evals.find import find_sets
from kd_accel.evals.measure import OnSet, measure
from kd_accel.evals.plan import Job
from kd_accel.evals.sets import SetError
from kd_accel.evals.stored_texts import StoredTexts
from kd_accel.schema import ConfigError

CPU = torch.device("cpu")
TEMPLATES = ("a photo of a {c}.", "{c}")


@pytest.fixture
def write(tmp_path):
    """(texts, rows [n, d], name of the .npy, of the .txt) -> the .npy."""

    def write(texts, rows, name="text_embeddings.npy", words="text_prompts.txt") -> Path:
        np.save(tmp_path / name, np.asarray(rows, dtype=np.float32))
        (tmp_path / words).write_text("\n".join(texts) + "\n")
        return tmp_path / name

    return write


@pytest.fixture
def image_run(tmp_path) -> Path:
    """The release of an image tower alone, 8 wide."""
    model = {key: value for key, value in tiny.arch().items() if key != "text_cfg"}
    return tiny.write_teacher(tmp_path / "image", model)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text_embeddings.npy", "text_prompts.txt"),
        ("openclip_text_embeddings.npy", "openclip_text_prompts.txt"),
        ("classes.npy", "classes.txt"),
    ],
)
def test_rows_are_found_by_their_exact_words(write, name, words):
    texts = StoredTexts.read(write(["cat", "dog", "red cat"], np.eye(3), name, words), CPU)
    assert texts(["red cat", "cat", "cat"]).tolist() == [[0, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert texts([]).shape == (0, 3)
    with pytest.raises(ConfigError, match="1 of 2 texts are not among its 3 texts: 'Cat'"):
        texts(["cat", "Cat"])


def test_our_own_files(tmp_path, write):
    """What kd-accel embed prompts=... writes: rows and names in one file; the id goes by content."""
    rows = torch.eye(2)
    save_file({"embeddings": rows}, tmp_path / "c.safetensors", metadata={"names": json.dumps(["cat", "dog"])})
    stored = StoredTexts.read(tmp_path / "c.safetensors", CPU)
    assert torch.equal(stored(["dog"]), rows[1:])
    assert stored.id == StoredTexts.read(write(["cat", "dog"], rows), CPU).id
    assert stored.id != StoredTexts.read(write(["dog", "cat"], rows), CPU).id
    assert stored.id != StoredTexts.read(write(["cat", "dog"], 2 * rows), CPU).id


def test_templates_are_used_where_every_prompt_is_stored(write):
    """Else class names stand alone; where they are not all stored either, the line counts them and names the first."""
    prompts = [template.replace("{c}", name) for name in ("cat", "dog") for template in TEMPLATES]
    stored = StoredTexts.read(write([*prompts, "cow"], np.eye(5)), CPU)
    assert stored.templates(("cat", "dog"), TEMPLATES) == TEMPLATES
    assert stored.templates(("cat", "dog", "cow"), TEMPLATES) == ("{c}",)
    names = ("cat", "cow", "hen", "ox", "pig", "emu")
    with pytest.raises(ConfigError, match=r"4 of 6 class names are not among its 5 texts: 'hen', 'ox', 'pig', \.\.\.;"):
        stored.templates(names, TEMPLATES)


@pytest.mark.parametrize(
    ("texts", "rows", "said"),
    [
        (["cat"], np.eye(2), r"an array \[2, 2\] of 1 texts; needed is \[1, d\]"),
        (["cat"], np.zeros(3), r"an array \[3\] of 1 texts"),
        (["cat", "cat"], np.eye(2), "'cat' is stored twice, with different embeddings"),
        (["cat", "", "dog"], np.eye(3), "line 2 is empty"),
        (["cat", "dog"], [[1, 0], [float("nan"), 0]], "the embedding of 'dog' is not finite"),
    ],
)
def test_files_that_contradict_themselves(write, texts, rows, said):
    with pytest.raises(ConfigError, match=said):
        StoredTexts.read(write(texts, rows), CPU)


def test_equal_rows_of_a_text_given_twice_are_no_contradiction(write):
    assert StoredTexts.read(write(["cat", "cat"], np.ones((2, 3))), CPU)(["cat"]).tolist() == [[1, 1, 1]]


def test_files_that_cannot_be_read(tmp_path, write):
    with pytest.raises(ConfigError, match=r"texts, one per line, are missing: looked for .*b\.txt$"):
        StoredTexts.read(write(["cat"], np.eye(1), "b.npy", "else.txt"), CPU)
    with pytest.raises(ConfigError, match=r"looked for .*text_embeddings\.txt and .*text_prompts\.txt$"):
        StoredTexts.read(write(["cat"], np.eye(1), words="else.txt"), CPU)
    np.save(tmp_path / "i.npy", np.eye(2, dtype=np.int64))
    with pytest.raises(ConfigError, match="holds int64, not embeddings"):
        StoredTexts.read(tmp_path / "i.npy", CPU)
    for name in ("x.npy", "x.safetensors"):
        (tmp_path / name).write_bytes(b"junk")
        with pytest.raises(ConfigError, match=rf"{name}: "):
            StoredTexts.read(tmp_path / name, CPU)
    save_file({"rows": torch.eye(2)}, tmp_path / "y.safetensors")
    with pytest.raises(ConfigError, match="expected the tensor 'embeddings' with names"):
        StoredTexts.read(tmp_path / "y.safetensors", CPU)


def test_zero_shot_with_a_student_that_has_no_text_tower(image_run, write, write_benchmark, labelled, tmp_path):
    """Every class's row is the classifier: top-1 equals the largest cosine, computed by hand."""
    rows = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    file = write([f"thing {i}" for i in range(3)], rows)
    folder = write_benchmark(tmp_path / "things", labelled([0, 1, 2, 0, 1, 2, 2]), num_classes=3)
    encoder = load_encoder(image_run, text_from=str(file))
    [eval_set] = find_sets(str(folder))
    config = MeasureConfig(data=str(folder), batch_size=3, num_workers=0)
    row = measure(OnSet(encoder, Job(eval_set), config), "zero_shot")
    samples = eval_set.samples()
    from kd_accel.data.transforms import eval_view

    views = torch.stack([eval_view(eval_set.image(sample), encoder.image_input) for sample in samples])
    images = encoder.encode_images(views).double().numpy()
    cosines = (images / np.linalg.norm(images, axis=1, keepdims=True)) @ (
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
    ).T
    assert row["metrics"]["acc1"] == (cosines.argmax(1) == [sample.label for sample in samples]).mean()


def test_captions_that_were_not_stored(image_run, write, write_benchmark, captioned, tmp_path):
    """A matter of this set: others go on."""
    folder = write_benchmark(tmp_path / "captions", captioned([1, 2]))
    encoder = load_encoder(image_run, text_from=str(write(["caption 0 of image 0"], np.ones((1, 8)))))
    [eval_set] = find_sets(str(folder))
    on_set = OnSet(encoder, Job(eval_set), MeasureConfig(data=str(folder), batch_size=3, num_workers=0))
    with pytest.raises(SetError, match="2 of 3 texts are not among its 1 texts: 'caption 0 of image 1'"):
        measure(on_set, "retrieval")


def test_the_embeddings_of_a_published_pipeline(data_root):
    """ImageNet's class names by open_clip, as seed-style files have them: a word's nearest neighbours are its kin."""
    file = data_root / "weights" / "openclip_laion_vitb32_imagenet1k_text_embeddings.npy"
    texts = StoredTexts.read(file, CPU)
    assert texts.embed_dim == 512
    names = list(texts.row_of)
    unit = torch.nn.functional.normalize(texts(names), dim=1)
    nearest = [names[i] for i in (unit @ unit[names.index("golden retriever")]).topk(4).indices]
    assert nearest[0] == "golden retriever"
    assert any("retriever" in name for name in nearest[1:])
    known = [name for name in open_clip.IMAGENET_CLASSNAMES if name in texts.row_of]
    assert texts.templates(tuple(known), TEMPLATES) == ("{c}",)
