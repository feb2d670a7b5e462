"""kd-accel filter: what is scored, kept and written; resumed by shard; alike from a store and from the live teacher."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import embed_run
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

from kd_accel.data.index import build_index, expand_shards, load_index
from kd_accel.data.transforms import decode, eval_view
from kd_accel.embed import verb
from kd_accel.filter import features as live
from kd_accel.filter import parts
from kd_accel.filter.prompts import prompt_texts
from kd_accel.filter.verb import run
from kd_accel.filter_config import FilterConfig
from kd_accel.models.class_embeddings import prompt_embeddings
from kd_accel.models.image import encode_image
from kd_accel.models.teacher import Teacher
from kd_accel.schema import ConfigError, validate
from kd_accel.sections import TeacherConfig

PROMPTS = ["red", "green", "blue", "yellow"]
BAD = ["010003", "020019"]  # in the second and the third shard


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """60 pictures in three shards; two of them are cut off."""
    folder = tiny.write_shards(tmp_path_factory.mktemp("data") / "shards", shards=3)
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [(member.name, tar.extractfile(member).read()) for member in tar]
        with tarfile.open(path, "w") as tar:
            for name, content in members:
                tiny.add(tar, name, content[:300] if name in [f"{key}.jpg" for key in BAD] else content)
    build_index(expand_shards(str(folder)))
    return folder


@pytest.fixture
def question(shards, tiny_teacher, tmp_path):
    """A FilterConfig of the shards; keywords change it."""

    def make(**values) -> FilterConfig:
        asked = {
            "prompts": write_prompts(tmp_path, PROMPTS),
            "templates": ["a {} square"],
            "data": {"shards": str(shards)},
            "num_workers": 0,
        }
        asked |= {"teacher": {"path": str(tiny_teacher)}, "out": str(tmp_path / "out"), "batch_size": 7}
        return validate(FilterConfig, {**asked, **values})

    return make


def write_prompts(folder: Path, prompts: list[str]) -> str:
    file = folder / f"{len(prompts)}_prompts.txt"
    file.write_text("\n".join(prompts), encoding="utf-8")
    return str(file)


@pytest.fixture(scope="module")
def truth(shards, tiny_teacher):
    """(keys [58], cosines [58, 4]) of every readable image, one at a time."""
    teacher = Teacher(TeacherConfig(path=str(tiny_teacher)))
    prompts, keys, rows = prompt_embeddings(PROMPTS, ["a {} square"], teacher), [], []
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension == "jpg" and key not in BAD:
                    view = eval_view(decode(tar.extractfile(member).read()), teacher.contract.image)
                    rows.append(encode_image(teacher.clip, view[None], teacher.contract.image)[0])
                    keys.append(key)
    return keys, (F.normalize(torch.stack(rows).float(), dim=1) @ prompts.T).detach()


def selected(config):
    return Path(config.out, "selected.txt").read_text().split()


def best(keys, scores, count):
    """The `count` best keys, in the order of the data."""
    order = sorted(range(len(keys)), key=lambda i: (-scores[i], keys[i]))[:count]
    return [keys[i] for i in sorted(order)]


@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_has_a_score(question, shards, truth, workers):
    """Key, shard, index, best prompt and its cosine; unreadable ones have nan, -1 and a reason, and nothing stops."""
    config = question(num_workers=workers)
    run(config)
    rows = pq.read_table(Path(config.out, "scores.parquet")).to_pylist()
    keys, cosines = truth
    assert [row["key"] for row in rows] == [f"{s:02d}{i:04d}" for s in range(3) for i in range(20)]
    assert {(row["key"][:2], row["shard"]) for row in rows} == {(f"{s:02d}", f"{shards}/{s:05d}.tar") for s in range(3)}
    assert [row["index"] for row in rows] == [*range(20)] * 3
    read = [row for row in rows if row["key"] not in BAD]
    assert [row["key"] for row in read] == keys
    assert [row["best_prompt"] for row in read] == cosines.argmax(1).tolist()
    torch.testing.assert_close(torch.tensor([row["score"] for row in read]), cosines.amax(1), rtol=0, atol=1e-5)
    assert [(row["key"], row["best_prompt"]) for row in rows if np.isnan(row["score"])] == [(key, -1) for key in BAD]
    errors = [json.loads(line) for line in Path(config.out, "errors.jsonl").read_text().splitlines()]
    assert [(error["key"], error["index"]) for error in errors] == [(BAD[0], 3), (BAD[1], 19)]
    assert all(error["reason"].startswith("image cannot be decoded") for error in errors)
    assert selected(config) == keys


def test_the_best_of_each_prompt_are_kept(question, truth, capsys):
    config = question(top_k=3)
    run(config)
    keys, cosines = truth
    wanted = set().union(*(best(keys, cosines[:, p].tolist(), 3) for p in range(4)))
    assert selected(config) == [key for key in keys if key in wanted]
    assert f"60 images, 2 of them unreadable\ntop_k=3: {len(wanted)} left" in capsys.readouterr().out


def test_scores_and_shares_are_bounds(question, truth):
    """min_score, fraction (of the readable images, rounded up) and max_per_prompt; over the same scores."""
    keys, cosines = truth
    scores, prompts = cosines.amax(1).tolist(), cosines.argmax(1).tolist()
    middle = sorted(scores)[29]
    run(question(min_score=middle - 1e-4))
    assert selected(question()) == [key for key, score in zip(keys, scores, strict=True) if score > middle - 1e-4]
    run(question(fraction=0.3))
    assert selected(question()) == best(keys, scores, 18)  # 0.3 x 58 = 17.4
    run(question(max_per_prompt=2))
    groups = [[(k, s) for k, s, p in zip(keys, scores, prompts, strict=True) if p == prompt] for prompt in range(4)]
    wanted = set().union(*(best(*zip(*group, strict=True), 2) for group in groups if group))
    assert selected(question()) == [key for key in keys if key in wanted]


def test_steps_follow_each_other(question, truth):
    """max_per_prompt chooses among what fraction has left."""
    keys, cosines = truth
    scores, prompts = cosines.amax(1).tolist(), cosines.argmax(1).tolist()
    run(question(fraction=0.2, max_per_prompt=1))
    first = [i for i, key in enumerate(keys) if key in best(keys, scores, 12)]  # 0.2 x 58 = 11.6
    wanted = {max((i for i in first if prompts[i] == p), key=lambda i: scores[i]) for p in {prompts[i] for i in first}}
    assert selected(question()) == [keys[i] for i in sorted(wanted)]


def test_near_duplicates_are_dropped(question, truth, shards, tmp_path):
    """A shard given twice under other names: of each picture the lower key is left; a bound near 0 leaves the best."""
    folder = tmp_path / "twice"
    folder.mkdir()
    for prefix in ("z", "a"):
        with tarfile.open(shards / "00000.tar") as tar, tarfile.open(folder / f"{prefix}.tar", "w") as copy:
            for member in tar:
                tiny.add(copy, f"{prefix}{member.name}", tar.extractfile(member).read())
    build_index(expand_shards(str(folder)))
    twice = {"data": {"shards": [str(folder / "z.tar"), str(folder / "a.tar")]}, "batch_size": 20}
    run(question(**twice, dedup_threshold=1 - 1e-6))
    assert selected(question()) == [f"a00{i:04d}" for i in range(20)]
    run(question(**twice, dedup_threshold=1e-6, top_k=1, out=str(tmp_path / "one")))
    keys, cosines = truth
    (left,) = selected(question(out=str(tmp_path / "one")))
    assert left == "a" + best(keys[:20], cosines[:20].amax(1).tolist(), 1)[0]


def test_a_rerun_goes_on_after_the_finished_shards(question, tmp_path, monkeypatch):
    """Ended in the middle of the third shard: the first two are not looked at again, and the files are the same."""
    whole, cut = question(top_k=3, out=str(tmp_path / "whole")), question(top_k=3)
    run(whole)
    seen = []
    score_shard = parts.score_shard

    def failing(features, keys, prompts, *, shard, top):
        seen.append(shard)
        if shard == 2 and seen.count(2) == 1:
            raise KeyboardInterrupt
        return score_shard(features, keys, prompts, shard=shard, top=top)

    monkeypatch.setattr(parts, "score_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        run(cut)
    run(cut)
    assert seen == [0, 1, 2, 2]
    run(cut)  # everything is there: no teacher, no image
    assert seen == [0, 1, 2, 2]
    for name in ("scores.parquet", "selected.txt", "errors.jsonl"):
        assert Path(cut.out, name).read_bytes() == Path(whole.out, name).read_bytes()


@pytest.mark.parametrize(
    ("change", "named"),
    [({"prompts": "imagenet"}, "prompts"), ({"top_k": 4}, "top_k"), ({"templates": ["{}"]}, "prompts")],
)
def test_scores_of_another_question_are_not_mixed(question, change, named):
    run(question())
    with pytest.raises(
        ConfigError, match=f"out=.* holds scores of another run, which differs in {named}: name another"
    ):
        run(question(**change))


def test_selected_shards_hold_what_was_selected(question, shards):
    """All members of the kept samples, in their order, and an index; a shard of which nothing is kept has no tar."""
    config = question(top_k=1, write_shards=True)
    run(config)
    folder, kept = Path(config.out, "shards"), selected(config)
    index = load_index(expand_shards(str(folder)), [("data.shards", ("jpg",)), ("data.caption", ("txt",))])
    assert [key.decode() for key in index.keys] == kept
    assert [path.name for path in sorted(folder.glob("*.tar"))] == sorted({f"000{key[:2]}.tar" for key in kept})
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar, tarfile.open(shards / path.name) as whole:
            for member in tar:
                assert tar.extractfile(member).read() == whole.extractfile(member.name).read()


def test_embedded_prompts_are_taken_as_they_are(question, tiny_teacher, tmp_path):
    texts = question(out=str(tmp_path / "texts"))
    run(texts)
    rows = prompt_embeddings(PROMPTS, ["a {} square"], Teacher(TeacherConfig(path=str(tiny_teacher))))
    save_file({"embeddings": 3 * rows}, tmp_path / "prompts.safetensors")
    stored = question(prompts=str(tmp_path / "prompts.safetensors"), out=str(tmp_path / "stored"))
    run(stored)
    ours, theirs = (pq.read_table(Path(config.out, "scores.parquet")).to_pandas() for config in (stored, texts))
    assert (ours.best_prompt == theirs.best_prompt).all()
    np.testing.assert_allclose(ours.score, theirs.score, rtol=0, atol=1e-6)


def test_prompts_come_from_many_places(tmp_path):
    """A file without its empty lines, sub-folders in sorted order or as they are called, ImageNet's names."""
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\n  a dog \n", encoding="utf-8")
    assert prompt_texts(str(file)) == ["a cat", "a dog"]
    for name in ("n02", "n01"):
        (tmp_path / "classes" / name).mkdir(parents=True)
    assert prompt_texts(str(tmp_path / "classes")) == ["n01", "n02"]
    (tmp_path / "classes" / "label_text.json").write_text('{"0": "tench, Tinca tinca", "1": "goldfish"}')
    assert prompt_texts(str(tmp_path / "classes")) == ["tench, Tinca tinca", "goldfish"]
    assert (len(prompt_texts("imagenet")), prompt_texts("imagenet")[0]) == (1000, "tench")
    (tmp_path / "classes" / "label_text.json").write_text('{"0": "tench"}')
    with pytest.raises(ConfigError, match=r"label_text.json: expected a name for each of 0..1"):
        prompt_texts(str(tmp_path / "classes"))
    with pytest.raises(ConfigError, match="prompts: .*nowhere.txt cannot be read"):
        prompt_texts(str(tmp_path / "nowhere.txt"))
    file.write_text("\n\n")
    with pytest.raises(ConfigError, match="holds no prompt"):
        prompt_texts(str(file))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"teacher": None}, "teacher or store is needed"),
        ({"data": None}, "give either data"),
        ({"templates": ["a photo"]}, "'a photo' has no {}"),
        ({"write_shards": True, "data": {"folder": "pictures"}}, "write_shards .* data.shards"),
        ({"fraction": 1.5}, "fraction"),
    ],
)
def test_what_does_not_fit_is_refused(question, change, told):
    with pytest.raises(ConfigError, match=told):
        question(**change)


def test_a_picture_that_is_none_of_ours_is_no_reason_to_stop(question, tmp_path):
    """Every image unreadable: rows with nan, nothing selected, exit without an error."""
    folder = tmp_path / "odd"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "EPS")
        tiny.add(tar, "a.jpg", file.getvalue())
    build_index(expand_shards(str(folder)))
    config = question(data={"shards": str(folder)}, top_k=1, dedup_threshold=0.9)
    run(config)
    assert selected(config) == []


@pytest.fixture
def stored(tmp_path, tiny_teacher):
    """(data, a store of its first view) with some unreadable samples."""
    data, folder = embed_run.write_data(tmp_path / "data"), tmp_path / "store"
    verb.run(embed_run.embed_config(tmp_path, data, tiny_teacher, out=str(folder), towers=["image"], verify=0))
    return data, folder


def test_stored_features_take_the_place_of_images(question, stored, tiny_teacher, tmp_path, monkeypatch):
    """No image is read, the teacher is the store's, and what could not be read then has the reason of then."""
    data, store = stored
    monkeypatch.setattr(live, "eval_view", None)
    config = question(data={"shards": str(data)}, store=str(store), teacher=None, top_k=2)
    run(config)
    features = torch.cat([load_file(path)["image"][:, 0] for path in sorted(store.glob("*.safetensors"))])
    prompts = prompt_embeddings(PROMPTS, ["a {} square"], Teacher(TeacherConfig(path=str(tiny_teacher))))
    cosines = F.normalize(features.float(), dim=1) @ prompts.T
    rows = pq.read_table(Path(config.out, "scores.parquet")).to_pandas()
    np.testing.assert_allclose(rows.score, cosines.amax(1), rtol=0, atol=1e-6)
    bad = [json.loads(line) for line in (store / "bad_samples.jsonl").read_text().splitlines()]
    errors = [json.loads(line) for line in Path(config.out, "errors.jsonl").read_text().splitlines()]
    assert [(e["key"], e["reason"]) for e in errors] == [(b["key"], b["reason"]) for b in bad] != []
    chosen = cosines.nan_to_num(-1).topk(2, dim=0).indices.unique().tolist()
    assert selected(config) == [rows.key[i] for i in chosen]


def test_a_store_of_another_teacher_is_refused(question, stored, tmp_path):
    """The same architecture with other weights."""
    data, store = stored
    other = tiny.write_teacher(tmp_path / "other")
    weights = load_file(other / "open_clip_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "open_clip_model.safetensors")
    with pytest.raises(ConfigError, match="teacher.store: the features in .* with other weights than this teacher"):
        run(question(data={"shards": str(data)}, store=str(store), teacher={"path": str(other)}))


def test_prompts_of_another_width_are_refused(question, tmp_path):
    save_file({"embeddings": torch.randn(3, 5)}, tmp_path / "prompts.safetensors")
    with pytest.raises(ConfigError, match="prompts have 5 numbers, images 12: not of one teacher"):
        run(question(prompts=str(tmp_path / "prompts.safetensors")))
