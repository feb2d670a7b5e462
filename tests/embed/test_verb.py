"""kd-accel embed: what it stores is what training would have computed, whole or not at all, and checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import embed_run
import numpy as np
import pytest
import tiny
import torch
from embed_run import BROKEN, FP16, SIZES, embed_config, losses, seen, train_config
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kd_accel import assembly, cli, train
from kd_accel.config import TrainConfig
from kd_accel.config_files import dump
from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.data.open import open_source
from kd_accel.data.store_files import StoreInfo
from kd_accel.embed import verb
from kd_accel.models.class_embeddings import class_embeddings
from kd_accel.models.teacher import Teacher
from kd_accel.schema import ConfigError, validate
from kd_accel.sections import TeacherConfig

N = sum(SIZES)
SIX_STEPS = {"lr": 1e-3, "steps": 6, "schedule": "constant"}  # of four per epoch
LOSS = 0.005  # share by which fp16 may move a loss whose logits are divided by 0.02; seen: 0.0004


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Read only."""
    return embed_run.write_data(tmp_path_factory.mktemp("embed") / "shards")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A teacher of more pixels than the student; read only."""
    model = tiny.arch(24, 12, image_size=48)
    return tiny.write_teacher(tmp_path_factory.mktemp("embed_teacher") / "release", model)


@pytest.fixture(scope="module")
def store(tmp_path_factory, data, teacher) -> Path:
    """Two views of everything, fp16; read only."""
    folder = tmp_path_factory.mktemp("store") / "store"
    verb.run(embed_config(folder.parent, data, teacher, out=str(folder)))
    return folder


@pytest.fixture
def make(tmp_path, data, teacher):
    """Runs `kd-accel embed`; keywords are keys of its config."""

    def run(**changes) -> Path:
        changes = {"out": str(tmp_path / "store")} | changes
        verb.run(embed_config(tmp_path, data, teacher, **changes))
        return Path(changes["out"])

    return run


def cached(store: Path, **changes) -> dict:
    return {"placement": "cached", "store": str(store)} | changes


def test_a_store_says_what_it_holds(store):
    info = StoreInfo.read(store, "store")
    assert (info.towers, info.dtype, info.embed_dim) == (["image", "text"], "fp16", 12)
    assert (info.views["size"], info.views["count"], info.views["seed"]) == ([48, 48], 2, 7)
    assert info.logit_scale == pytest.approx(50)
    assert sorted(path.name for path in store.iterdir()) == [
        "0000.safetensors", "0001.safetensors", "0002.safetensors", "bad_samples.jsonl", "store.json",
    ]  # fmt: skip
    shard = load_file(store / "0001.safetensors")
    assert shard["image"].shape == (SIZES[1], 2, 12)
    texts = [0 if i in BROKEN else 2 * (1 + i % 3) for i in range(SIZES[0], SIZES[0] + SIZES[1])]  # two templates
    assert shard["text_starts"].tolist() == [0, *np.cumsum(texts)]
    bad = [json.loads(line) for line in (store / "bad_samples.jsonl").read_text().splitlines()]
    assert [(record["id"], record["key"]) for record in bad] == [(i, f"s{i:04d}") for i in BROKEN]
    assert shard["image"].isnan().flatten(1).any(1).nonzero()[:, 0].tolist() == [BROKEN[1] - SIZES[0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_stored_features_are_the_live_teachers(store, tmp_path, data, teacher, workers):
    """Every number, to the precision of fp16, of every sample of two epochs: other crops and captions in each, two
    micro-batches, replaced samples. No weights: their file is gone, and the teacher is no module."""
    wanted = embed_run.values(tmp_path, data, teacher)
    wanted["data"]["num_workers"] = workers
    live = seen(validate(TrainConfig, wanted), epochs=2)
    gone = shutil.copytree(teacher, tmp_path / "teacher")
    (gone / "open_clip_model.safetensors").unlink()
    config = validate(TrainConfig, wanted | {"teacher": cached(store)})
    assert not isinstance(assembly.build_teachers(config)["teacher"], torch.nn.Module)
    found = seen(config, epochs=2)
    assert [ids for ids, _ in found] == [ids for ids, _ in live]
    assert not {i for ids, _ in found for i in ids} & set(BROKEN)
    for (_, a), (_, b) in zip(found, live, strict=True):
        torch.testing.assert_close({n: rows.float() for n, rows in a.items()}, b, rtol=FP16, atol=FP16 * 1e-3)
    assert furthest(live[:8], found[8:]) > 100 * FP16, "views and captions hardly matter: this would prove nothing"


def furthest(ours, theirs) -> float:
    """Of the rows that two lists of batches have for a sample: the largest difference, as a share of the row's."""
    a, b = (
        {i: row for ids, said in each for i, row in zip(ids, said["image"], strict=True)} for each in (ours, theirs)
    )
    return max(((a[i].float() - b[i].float()).norm() / b[i].float().norm()).item() for i in a.keys() & b.keys())


def test_training_from_the_store_is_training_live(store, make, tmp_path, data, teacher):
    """Each step's loss into the second epoch, and the list of replaced samples; a store of one view is not enough."""
    sections = {"live": {}, "cached": {"teacher": cached(store)}, "one view": {"teacher": cached(make(views=1))}}
    for name, section in sections.items():
        train.run(train_config(tmp_path, data, teacher, name=name.replace(" ", "_"), optim=SIX_STEPS, **section))
    live, found, one_view = (losses(tmp_path / name.replace(" ", "_")) for name in sections)
    assert found == pytest.approx(live, rel=LOSS)
    assert one_view[:4] == found[:4]
    assert one_view[4:] != pytest.approx(live[4:], rel=2 * LOSS)
    replaced = [(tmp_path / name / "bad_samples.jsonl").read_text() for name in ("live", "cached")]
    assert replaced[0] == replaced[1]


def test_a_temperature_of_the_config_wins(store, tmp_path, data, teacher):
    """Else it is the one that the live teacher had."""
    for given, scale in ((None, 50), (0.1, 10)):
        config = train_config(tmp_path, data, teacher, teacher=cached(store, temperature=given, weight=0.5))
        spec = assembly.build_teachers(config)["teacher"].spec
        assert (spec.logit_scale, spec.weight, spec.embed_dim) == (pytest.approx(scale), 0.5, 12)


def test_another_teacher_than_was_stored(store, tmp_path, data, teacher):
    """The names that the config gives are those that the store was made with."""
    assembly.build_teachers(train_config(tmp_path, data, teacher, teacher=cached(store, path=str(teacher))))
    with pytest.raises(ConfigError, match=r"^teacher.path=elsewhere: .* holds features of path=.*: drop path, or name"):
        assembly.build_teachers(train_config(tmp_path, data, teacher, teacher=cached(store, path="elsewhere")))


def test_a_tower_that_terms_read_and_the_store_has_not(make, tmp_path, data, teacher):
    """Live, feature_mse compares both towers: it must not go on with one alone, without a word."""
    wanted = {"objective": {"terms": {"feature": {"kind": "feature_mse"}}}, "teacher": cached(make(towers=["image"]))}
    with pytest.raises(ConfigError, match=r"^teacher.store: terms read the text features of teacher, which are not in"):
        seen(train_config(tmp_path, data, teacher, **wanted), epochs=1)


def test_a_live_run_goes_on_from_the_store(store, tmp_path, data, teacher):
    """Resumed with placement=cached, as the run that stayed live: the placement decides nothing that is learned."""
    for name, steps in (("live", 6), ("resumed", 3)):
        train.run(train_config(tmp_path, data, teacher, name=name, optim=SIX_STEPS | {"steps": steps}))
    section = cached(store, path=str(teacher), temperature=0.02)
    train.run(train_config(tmp_path, data, teacher, name="resumed", optim=SIX_STEPS, teacher=section, resume="auto"))
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "live"), rel=LOSS)


@pytest.fixture
def pairs(tmp_path) -> dict:
    """The section of a table that names 8 pictures and their texts."""
    for i in range(8):
        Image.new("RGB", (64, 56), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "pairs.csv").write_text("filepath,title\n" + "".join(f"{i}.png,number {i}\n" for i in range(8)))
    return {"table": str(tmp_path / "pairs.csv"), "global_batch_size": 4, "num_workers": 0}


def test_texts_of_a_table_with_pictures(make, tmp_path, teacher, pairs):
    """A row is known by its picture's path, in training and in a store of nothing but texts."""
    store = make(data=pairs, towers=["text"], verify=0)
    section = {"path": str(teacher), "store": str(store)}
    found = seen(train_config(tmp_path, "", teacher, data=pairs, teacher=section), epochs=1)
    assert len(found) == 4
    assert {features["text"].dtype for _, features in found} == {torch.float16}


@pytest.mark.parametrize("npy", ["all.npy", "npy"])
def test_texts_of_a_table_to_files_and_back(make, tmp_path, teacher, pairs, npy):
    """Of other programs' features too: training on pictures finds in both stores the samples that it reads."""
    of_texts = {"data": pairs, "towers": ["text"], "verify": 0}
    make(**of_texts)
    make(to_npy=str(tmp_path / npy), **of_texts)
    folder = make(from_npy=str(tmp_path / npy), out=str(tmp_path / "imported"), **of_texts)
    terms = {"regression": {"kind": "simreg", "match": {"image": "text"}}}
    wanted = {"data": pairs, "objective": {"terms": terms}}
    stores = [tmp_path / "store", folder]
    first, second = (
        seen(train_config(tmp_path, "", teacher, teacher=cached(store, temperature=0.05), **wanted), epochs=1)
        for store in stores
    )
    assert len(first) == 4
    for (ids, a), (same, b) in zip(first, second, strict=True):
        assert ids == same
        assert a["text"].equal(b["text"])


def hybrid(make, tmp_path, data, release) -> TrainConfig:
    """Texts from the store, images live."""
    store = make(towers=["text"], verify=0)
    return train_config(tmp_path, data, release, teacher={"path": str(release), "store": str(store)})


def test_one_tower_from_the_store_the_other_live(make, tmp_path, data, teacher):
    live = seen(train_config(tmp_path, data, teacher), epochs=1)
    found = seen(hybrid(make, tmp_path, data, teacher), epochs=1)
    for (_, a), (_, b) in zip(found, live, strict=True):
        assert a["text"].dtype == torch.float16
        assert a["image"].equal(b["image"])
        torch.testing.assert_close(a["text"].float(), b["text"], rtol=FP16, atol=FP16 * 1e-3)


def test_a_hybrid_of_other_weights(make, tmp_path, data, teacher):
    """One number of the live teacher changed since."""
    release = shutil.copytree(teacher, tmp_path / "release")
    config = hybrid(make, tmp_path, data, release)
    assembly.build_teachers(config)
    weights = load_file(release / "open_clip_model.safetensors")
    weights["ln_final.bias"][0] += 1e-6
    save_file(weights, release / "open_clip_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"^teacher.store: .*with other weights than this teacher: embed it again"):
        assembly.build_teachers(config)


def test_a_hybrid_of_other_preprocessing(make, tmp_path, data, teacher):
    release = shutil.copytree(teacher, tmp_path / "release")
    config = hybrid(make, tmp_path, data, release)
    described = json.loads((release / "open_clip_config.json").read_text())
    described["preprocess_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (release / "open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"^teacher.store: .*with other preprocessing than this teacher"):
        assembly.build_teachers(config)


def test_other_keys_are_refused(store, tmp_path, teacher):
    """Shards of the same names and sizes, with other samples in them."""
    other = embed_run.write_data(tmp_path / "shards", prefix="t")
    with pytest.raises(ConfigError, match=r"^teacher.store: .*0000.safetensors holds features of other samples than"):
        seen(train_config(tmp_path, other, teacher, teacher=cached(store)), epochs=1)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("augment", {"scale": [0.5, 1.0]}, r"^data.augment: the store of teacher holds .*, this run asks for"),
        ("templates", ["{}"], r"^teacher.store: the store holds texts of data.templates=\['{}', 'a picture of {}'\]"),
    ],
)
def test_other_views_and_texts_are_refused(store, tmp_path, data, teacher, key, value, said):
    wanted = embed_run.values(tmp_path, data, teacher, teacher=cached(store))
    wanted["data"][key] = value
    with pytest.raises(ConfigError, match=said):
        seen(validate(TrainConfig, wanted), epochs=1)


def test_a_student_of_more_pixels_than_the_stored_views(store, tmp_path, data, teacher):
    student = {"arch": tiny.arch(image_size=56), "projector": "linear"}
    with pytest.raises(ConfigError, match=r"^the store of teacher holds .* views of 48 x 48 pixels.*wants 56 x 56"):
        seen(train_config(tmp_path, data, teacher, student=student, teacher=cached(store)), epochs=1)


def test_class_names_need_a_live_teacher(store, tmp_path, data, teacher):
    """The way out is named: embed them once."""
    (tmp_path / "classes.txt").write_text("red\nblue\n")
    term = {"kind": "label_ce", "classes": str(tmp_path / "classes.txt"), "teacher": "teacher"}
    wanted = embed_run.values(tmp_path, data, teacher, teacher=cached(store), objective={"terms": {"label": term}})
    wanted["data"]["label"] = "cls"
    config = validate(TrainConfig, wanted)
    teachers = assembly.build_teachers(config)
    with pytest.raises(
        ConfigError, match=r"^objective.terms.label.classes: class names are embedded by a live teacher"
    ):
        assembly._class_embeddings(config, assembly.build_student(config, teachers), teachers)


def test_no_student_starts_from_a_stored_teacher(store, tmp_path, data, teacher):
    student = {"arch": tiny.arch(24, 12, image_size=48), "init": "teacher"}
    config = train_config(tmp_path, data, teacher, student=student, teacher=cached(store))
    with pytest.raises(
        ConfigError, match=r"^student.init=teacher: of a teacher with placement=cached there are no weigh"
    ):
        assembly.build_student(config, assembly.build_teachers(config))


# The verb ----------------------------------------------------------------------------------------------------------


def test_a_rerun_goes_on_where_it_stopped(make, capsys):
    """What is whole stays untouched; a missing and a damaged file are made again, as they were."""
    folder = make(verify=0)
    files = sorted(folder.glob("*.safetensors"))
    first = [path.read_bytes() for path in files]
    when = files[0].stat().st_mtime_ns
    files[1].unlink()
    files[2].write_bytes(first[2][:-1])
    make(verify=0)
    assert [path.read_bytes() for path in files] == first
    assert files[0].stat().st_mtime_ns == when
    assert f"{SIZES[1] + SIZES[2]} of {N} samples embedded now, in 2 of 3 shards" in capsys.readouterr().out


def test_a_rerun_with_other_settings(make):
    """Every setting that differs, with both values, in one line; the store stays as it is."""
    folder = make(verify=0)
    before = (folder / "store.json").read_text()
    with pytest.raises(
        ConfigError,
        match=r"^out=.*: another store .*\(views.count: there 2, here 1; dtype: there fp16, here int8\)$",
    ):
        make(views=1, dtype="int8")
    assert (folder / "store.json").read_text() == before


@pytest.fixture
def opened(tmp_path, data, teacher):
    """opened(folder): the store, ready to be read."""

    def make(folder: Path) -> EmbeddingStore:
        config = train_config(tmp_path, data, teacher).data
        store = EmbeddingStore(folder)
        store.attach(open_source(config, images=True, captions=True)[0], config)
        return store

    return make


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_other_types_of_numbers(make, store, opened, dtype):
    """As precise as they are: bf16 is off by half of its 8th bit, int8 by a 254th of a row's largest."""
    where = {"ids": np.array([0, 33]), "view": 1, "texts": np.array([1, 0])}
    found, reference = opened(make(dtype=dtype)).read(**where), opened(store).read(**where)
    for tower, exact in reference.items():
        exact = exact.float()
        bound = exact.abs() * 2**-8 if dtype == "bf16" else exact.abs().amax(dim=1, keepdim=True) / 254
        off = (found[tower].float() - exact).abs()
        assert (off <= bound + 2 * exact.abs() * FP16).all()  # the reference's own rounding
        assert off.max() > 0


def test_only_what_the_terms_read(make, tmp_path, data, teacher):
    """Unless towers says otherwise; a tower that the teacher does not have is an error."""
    objective = {"terms": {"clip": {"kind": "clip"}, "text": {"kind": "embedding_mse", "match": {"text": "text"}}}}
    assert StoreInfo.read(make(objective=objective, verify=0), "out").towers == ["text"]
    folder = make(objective=objective, towers=["image"], verify=0, out=str(tmp_path / "images"))
    assert StoreInfo.read(folder, "out").towers == ["image"]
    one = {"embed_dim": 12, "vision_cfg": tiny.arch(24, 12)["vision_cfg"]}
    release = tiny.write_teacher(tmp_path / "one", one)
    with pytest.raises(ConfigError, match=r"^towers: teacher has no text tower"):
        make(teacher={"path": str(release)}, objective={"terms": {"clip": {"kind": "clip"}}}, towers=["text"])


def test_the_config_that_reads_a_store_makes_it(make, tmp_path, teacher):
    """placement=cached and the store's name may already be there."""
    config = {"path": str(teacher), "placement": "cached", "store": str(tmp_path / "store"), "temperature": 0.02}
    assert (make(teacher=config, verify=0) / "store.json").is_file()
    with pytest.raises(ConfigError, match=r"^teacher: a store cannot be made of a store: set arch and pretrained, or"):
        make(teacher=config | {"path": None})


def test_one_of_several_teachers(make, tmp_path, data, teacher):
    """Its own store each, of the same views; the second one is made from a config that reads the first."""
    small = tiny.write_teacher(tmp_path / "small", tiny.arch(16, 12))
    terms = {n: {"kind": "feature_mse", "teacher": n} for n in ("large", "small")}
    teachers = {"large": {"path": str(teacher)}, "small": {"path": str(small)}}
    several = {"teacher": None, "objective": {"terms": terms}, "verify": 0}
    with pytest.raises(ConfigError, match=r"^teacher_name: which of large, small"):
        make(teachers=teachers, **several)
    with pytest.raises(ConfigError, match=r"^teacher_name: no teacher 'medium'; one of large, small"):
        make(teachers=teachers, teacher_name="medium", **several)
    large = make(teachers=teachers, teacher_name="large", out=str(tmp_path / "l"), **several)
    teachers["large"] = cached(large)
    with pytest.raises(ConfigError, match=r"^views=1: the store of large has 2: take as many"):
        make(teachers=teachers, teacher_name="small", views=1, out=str(tmp_path / "s"), **several)
    made = make(teachers=teachers, teacher_name="small", out=str(tmp_path / "s"), **several)
    assert StoreInfo.read(made, "s").views == StoreInfo.read(large, "l").views


def test_verify_finds_other_views(store, make):
    """Features of the crops of another seed: a line with the worst sample and its cosine."""
    with pytest.raises(
        ConfigError, match=r"^out=.*: the image features stored of sample s00\d\d in .*tar have a cosine of 0\.\d"
    ):
        make(out=str(store), verify_only=True, verify=1, seed=9)


def test_verify_of_a_good_store(store, make, capsys):
    make(out=str(store), verify_only=True, verify=1)
    assert f"{N} samples looked at again: cosines of 0.99999" in capsys.readouterr().out.replace("1.000000", "0.99999")


def test_verify_with_other_weights(store, make, tmp_path):
    other = tiny.write_teacher(tmp_path / "other", tiny.arch(16, 12))
    with pytest.raises(ConfigError, match=r"^out=.*: the store there is of other weights"):
        make(out=str(store), verify_only=True, teacher={"path": str(other)})


def test_features_that_are_not_finite(make, tmp_path, teacher, opened):
    """Its sample is a bad one, with the reason; the store is whole."""
    release = shutil.copytree(teacher, tmp_path / "nan")
    weights = load_file(release / "open_clip_model.safetensors")
    weights["token_embedding.weight"][320] = torch.nan  # "a" at the end of a word
    save_file(weights, release / "open_clip_model.safetensors", metadata={"format": "pt"})
    folder = make(teacher={"path": str(release)}, verify=0)
    reasons = [json.loads(line)["reason"] for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert reasons.count("the teacher's text features are not finite") == N - len(BROKEN)  # "a picture of ..."


def test_prompts(make, tmp_path, teacher):
    """One unit row per line, equal to what a live teacher makes of the lines as class names."""
    (tmp_path / "classes.txt").write_text("red\ngreen\nblue\n")
    options = {"prompts": str(tmp_path / "classes.txt"), "prompt_templates": ["a {}", "the {}"]}
    out = make(**options, out=str(tmp_path / "new" / "classes.safetensors"))
    expected = class_embeddings(
        options["prompts"],
        templates=options["prompt_templates"],
        teacher=Teacher(TeacherConfig(path=str(teacher))),
        key="classes",
    )
    torch.testing.assert_close(load_file(out)["embeddings"], expected)
    torch.testing.assert_close(class_embeddings(str(out), templates=[], teacher=None, key="classes"), expected)
    with safe_open(out, "pt") as file:
        assert json.loads(file.metadata()["names"]) == ["red", "green", "blue"]


def test_to_files_of_other_programs_and_back(store, make, opened, tmp_path, capsys):
    """KEY.npy of every good sample, fp32; the store made of them has the same numbers, and the same bad samples."""
    make(out=str(store), to_npy=str(tmp_path / "npy"))
    files = sorted((tmp_path / "npy").glob("*.npy"))
    assert len(files) == N - len(BROKEN)
    assert np.load(files[0]).dtype == np.float32
    folder = make(
        from_npy=str(tmp_path / "npy"), teacher={"placement": "cached", "store": "later", "temperature": 0.05}
    )
    where = {"ids": np.array([33, 1]), "view": 0, "texts": np.zeros(2, dtype=int)}
    torch.testing.assert_close(
        opened(folder).read(**where)["image"], opened(store).read(**where)["image"], rtol=0, atol=0
    )
    bad = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert [(record["id"], record["reason"]) for record in bad] == [(i, f"there is no s{i:04d}.npy") for i in BROKEN]
    assert f"{len(BROKEN)} unreadable samples" in capsys.readouterr().out


def test_training_on_imported_features(store, make, tmp_path, data, teacher):
    """They count for every view, with the temperature that the config gives; without one it is asked for."""
    make(out=str(store), to_npy=str(tmp_path / "npy"))
    feature = {"objective": {"terms": {"image": {"kind": "embedding_mse", "match": {"image": "image"}}}}}
    given = {"placement": "cached", "store": str(tmp_path / "store"), "temperature": 0.05}
    folder = make(from_npy=str(tmp_path / "npy"), teacher=given | {"temperature": None}, **feature)
    config = train_config(tmp_path, data, teacher, teacher=given, **feature)
    found = seen(config, epochs=2)
    exact = opened_rows(folder)
    for ids, said in found:
        assert said["image"].equal(torch.stack([exact[i] for i in ids]))
    with pytest.raises(ConfigError, match=r"^teacher.temperature: the features in .* came from files"):
        seen(train_config(tmp_path, data, teacher, teacher=given | {"temperature": None}, **feature), epochs=1)


def opened_rows(folder: Path) -> torch.Tensor:
    """[N, d]: first views as they lie in the files."""
    return torch.cat([load_file(path)["image"][:, 0] for path in sorted(folder.glob("*.safetensors"))])


def test_one_array_of_all_samples(store, make, tmp_path):
    """[N, d] by row, out and in; another length is refused with both."""
    make(out=str(store), to_npy=str(tmp_path / "all.npy"))
    rows = np.load(tmp_path / "all.npy")
    assert rows.shape == (N, 12)
    assert np.isnan(rows).any(axis=1).nonzero()[0].tolist() == list(BROKEN)
    folder = make(from_npy=str(tmp_path / "all.npy"))
    assert opened_rows(folder).nan_to_num(0).equal(torch.from_numpy(rows).nan_to_num(0).half())
    np.save(tmp_path / "short.npy", rows[:-1])
    with pytest.raises(ConfigError, match=rf"short.npy: {N - 1} rows, but the data has {N} samples"):
        make(from_npy=str(tmp_path / "short.npy"), out=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("content", "said"),
    [(np.zeros((2, 3)), r"holds an array \[2, 3\]: one row"), (np.array(["a"]), "holds <U1, not numbers")],
)
def test_files_that_hold_something_else(make, tmp_path, content, said):
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "s0000.npy", content)
    with pytest.raises(ConfigError, match=said):
        make(from_npy=str(tmp_path / "npy"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompts": "a.txt"}, "prompts need a file .safetensors"),
        ({"out": "a.safetensors"}, "prompts need a file .safetensors"),
        ({"prompts": "a.txt", "out": "a.safetensors", "verify_only": True}, "give one of prompts and verify_only"),
        ({"from_npy": "a", "towers": ["image", "text"]}, "hold the features of one tower"),
    ],
)
def test_keys_that_do_not_go_together(make, changes, said):
    with pytest.raises(ConfigError, match=said):
        make(**changes)


def test_a_training_config_is_enough(capsys, tmp_path, data, teacher):
    """The command line: sections that embedding does not need are no errors."""
    path = tmp_path / "train.yaml"
    path.write_text(dump(train_config(tmp_path, data, teacher)))
    assert cli.main(["embed", str(path), f"out={tmp_path / 'store'}", "views=1"]) == 0
    assert f"{N} of {N} samples embedded now" in capsys.readouterr().out
    assert cli.main(["embed", str(path)]) == 2
    assert "out: this key is needed" in capsys.readouterr().err


@pytest.mark.distributed
def test_two_ranks_write_the_files_of_one(store, tmp_path, data, teacher, run_ranks):
    """Of one name and content each, and one list of bad samples."""
    path = tmp_path / "train.yaml"
    path.write_text(dump(train_config(tmp_path, data, teacher)))
    words = ["-m", "kd_accel", "embed", path, f"out={tmp_path / 'store'}", "views=2", "data.num_workers=1"]
    said = run_ranks(words)
    assert said.count("samples looked at again") == 1
    for file in store.iterdir():
        assert (tmp_path / "store" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.slow
@pytest.mark.distributed
def test_two_zero2_ranks_train_alike_live_and_from_the_store(store, tmp_path, data, teacher, run_ranks):
    """Each step's loss, of micro-batches, into the second epoch."""
    for name, section in (("live", None), ("cached", cached(store))):
        changes = {"name": name, "optim": SIX_STEPS} | ({} if section is None else {"teacher": section})
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump(train_config(tmp_path, data, teacher, **changes)))
        env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
        run_ranks(["-m", "kd_accel", "train", path], env=env)
    assert losses(tmp_path / "cached") == pytest.approx(losses(tmp_path / "live"), rel=LOSS)
