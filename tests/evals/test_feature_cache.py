"""What is read from the cache is what was computed, for that model, that set and those texts, and nothing else."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from kd_accel.evals import feature_cache
from kd_accel.evals.feature_cache import FeatureCache
from kd_accel.evals.find import find_sets
from kd_accel.evals.zero_shot import classifier

LOAD = {"batch_size": 4, "num_workers": 0}


@pytest.fixture
def computed(monkeypatch) -> list[str]:
    """The names of the functions that went to the model, as they did."""
    calls = []

    def watch(name):
        original = getattr(feature_cache, name)

        def watched(*args, **kwargs):
            calls.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(feature_cache, name, watched)

    for name in ("image_features", "text_features", "classifier"):
        watch(name)
    return calls


@pytest.fixture
def things(tmp_path, write_benchmark, labelled):
    """A set of 7 images in two tars, of which number 2 is broken."""
    samples = labelled([0, 1, 2, 3, 4, 5, 0])
    samples["s0002"]["png"] = b"junk"
    parts = dict(list(samples.items())[:3]), dict(list(samples.items())[3:])
    [eval_set] = find_sets(write_benchmark(tmp_path / "things", *parts, num_classes=6))
    return eval_set


def test_images_are_computed_once(encoder, things, tmp_path, computed):
    """By another process, so to speak, they are read: the same rows and features, without the broken image."""
    first = FeatureCache(tmp_path / "cache").image_features(encoder, things, things.samples(), **LOAD)
    second = FeatureCache(tmp_path / "cache").image_features(encoder, things, things.samples(), **LOAD)
    assert computed == ["image_features"]
    assert first.rows.tolist() == [0, 1, 3, 4, 5, 6]
    assert torch.equal(first.rows, second.rows)
    assert torch.equal(first.images, second.images)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


def test_texts_and_classifiers_are_computed_once(encoder, tmp_path, computed):
    """Each for itself: a classifier's one prompt per class is not its text features, since those are raw."""
    names, templates = ("cat", "dog", "bird"), ("{c}",)
    expected = classifier(encoder, names, templates, batch_size=4)
    cache = FeatureCache(tmp_path)
    for _ in range(2):
        assert torch.equal(cache.classifier(encoder, names, templates, batch_size=4), expected)
        texts = cache.text_features(encoder, list(names), batch_size=4)
    assert computed == ["classifier", "text_features"]
    assert not torch.equal(texts, expected)
    torch.testing.assert_close(torch.nn.functional.normalize(texts, dim=1), expected)


def test_other_texts_templates_and_models_are_computed(encoder, tmp_path, computed):
    """Where the words are the same and only their order or their part differs, too."""
    cache = FeatureCache(tmp_path)
    cache.classifier(encoder, ("a", "b"), ("{c}",), batch_size=4)
    cache.classifier(encoder, ("b", "a"), ("{c}",), batch_size=4)
    cache.classifier(encoder, ("a",), ("b", "{c}"), batch_size=4)
    other_tower = replace(encoder.text, wants=replace(encoder.text.wants, pad=1))
    cache.classifier(replace(encoder, text=other_tower), ("a", "b"), ("{c}",), batch_size=4)
    cache.classifier(encoder, ("a", "b"), ("{c}",), batch_size=1)  # rounds otherwise
    assert computed == ["classifier"] * 5


def test_a_changed_set_is_computed_again(encoder, things, tmp_path, computed, write_benchmark, labelled):
    """Another image tower, a tar written anew, fewer samples, another order; not other labels or names."""
    cache = FeatureCache(tmp_path / "cache")
    samples = things.samples()

    def is_computed(encoder=encoder, eval_set=things, samples=samples):
        computed.clear()
        cache.image_features(encoder, eval_set, samples, **LOAD)
        return bool(computed)

    assert is_computed()
    assert not is_computed(samples=[replace(sample, label=0, captions=("new",)) for sample in samples])
    assert not is_computed(eval_set=replace(things, name="vtab/things", class_names=("other",)))
    assert is_computed(samples=samples[:-1])
    assert is_computed(samples=samples[::-1])
    other_tower = replace(encoder.image, wants=replace(encoder.image.wants, mean=(0.0, 0.0, 0.0)))
    assert is_computed(encoder=replace(encoder, image=other_tower))
    assert not is_computed(encoder=replace(encoder, name="other", text=None))
    assert not is_computed()
    os.utime(things.shards[0], ns=(1, 1))
    assert is_computed()


def test_splits_that_are_read_in_their_own_way_are_kept_apart(things):
    """Samples without a file differ by nothing but the set: its class, path or fields."""
    samples = [replace(sample, file=None, offset=0, size=None) for sample in things.samples()]
    names = {
        feature_cache.fingerprint(eval_set, samples)
        for eval_set in (things, replace(things, shards=things.shards[:1]), replace(things, path=things.shards[0]))
    }
    assert len(names) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "other tensors"])
def test_a_damaged_file_is_computed_again(encoder, things, tmp_path, computed, caplog, damage):
    """One warning, the same features, and a whole file afterwards."""
    cache = FeatureCache(tmp_path / "cache")
    first = cache.image_features(encoder, things, things.samples(), **LOAD)
    [path] = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    broken = {
        "cut": content[:-1],
        "flipped": content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        "empty": b"",
        "text": b"not a tensor in sight",
    }
    if damage in broken:
        path.write_bytes(broken[damage])
    else:
        feature_cache.save_file({"rows": torch.zeros(1)}, path)
    for _ in range(2):
        found = cache.image_features(encoder, things, things.samples(), **LOAD)
        assert torch.equal(found.images, first.images)
    assert computed == ["image_features"] * 2
    assert caplog.text.count(f"{path} cannot be used (") == 1


def test_a_cache_that_cannot_be_written_costs_a_warning(encoder, tmp_path, caplog):
    """The features are there all the same."""
    (tmp_path / "file").touch()
    features = FeatureCache(tmp_path / "file" / "cache").text_features(encoder, ["a"], batch_size=4)
    assert features.shape == (1, encoder.embed_dim)
    assert "cannot be written, so its features are computed again next time: " in caplog.text


def test_without_a_folder_nothing_is_kept(encoder, things, tmp_path, computed, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for _ in range(2):
        FeatureCache(None).image_features(encoder, things, things.samples(), **LOAD)
        FeatureCache(None).text_features(encoder, ["a"], batch_size=4)
    assert computed == ["image_features", "text_features"] * 2
    assert sorted(tmp_path.rglob("*")) == before
