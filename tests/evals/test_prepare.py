"""HuggingFace datasets as evaluation sets: the same images, captions and labels, whole or absent."""

from __future__ import annotations

import csv
import hashlib
import json
import tarfile
from pathlib import Path

import datasets
import pytest
from datasets.arrow_writer import ArrowWriter
from webdataset import WebDataset

from kd_accel.data.transforms import decode
from kd_accel.evals import prepare
from kd_accel.evals.find import find_sets, find_task
from kd_accel.evals.winogavil_set import open_winogavil
from kd_accel.prepare_config import PrepareConfig
from kd_accel.schema import ConfigError

CAPTIONS = [["a dog", "a dog\nthat  runs"], ["a cat"], ["caf\u00e9", " "]]
IMAGE = datasets.Image()


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """`datasets` copies parquet files into its cache; and says nothing of it here."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def stored(data: bytes) -> dict:
    return {"bytes": data, "path": None}


@pytest.fixture
def flickr(picture) -> datasets.Dataset:
    """As nlphuji/flickr_1k_test_image_text_retrieval has it: an image and a list of captions."""
    features = datasets.Features({"image": IMAGE, "caption": [datasets.Value("string")]})
    return datasets.Dataset.from_dict({"image": [stored(picture(i)) for i in range(3)], "caption": CAPTIONS}, features)


@pytest.fixture
def animals(picture) -> datasets.Dataset:
    features = datasets.Features({"image": IMAGE, "label": datasets.ClassLabel(names=["cat", "dog"])})
    return datasets.Dataset.from_dict({"image": [stored(picture(i)) for i in range(3)], "label": [1, 0, 1]}, features)


def saved(dataset: datasets.Dataset, tmp_path: Path) -> str:
    dataset.save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def run(source, out: Path, **more) -> None:
    prepare.run(PrepareConfig(source=str(source), out=str(out), **more))


def content(folder: Path) -> dict[str, str]:
    """Digest of every file, to see that two folders are alike to the last byte."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_retrieval(flickr, tmp_path, picture):
    """Every caption is one line, and images keep their bytes; CLIP_benchmark's files are there."""
    run(saved(flickr, tmp_path), tmp_path / "set", task="retrieval", samples_per_shard=2)
    [found] = find_sets(tmp_path / "set")
    assert found.kind == "retrieval"
    samples = found.samples()
    assert [s.captions for s in samples] == [("a dog", "a dog that runs"), ("a cat",), ("caf\u00e9",)]
    with tarfile.open(tmp_path / "set" / "test" / "0.tar") as tar:
        assert tar.getnames() == ["0000000.png", "0000000.txt", "0000001.png", "0000001.txt"]
        assert tar.extractfile("0000001.png").read() == picture(1)
    assert (tmp_path / "set" / "test" / "nshards.txt").read_text() == "2\n"
    assert sorted(path.name for path in (tmp_path / "set" / "test").iterdir()) == ["0.tar", "1.tar", "nshards.txt"]
    assert (tmp_path / "set" / "dataset_type.txt").read_text() == "retrieval\n"
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["dataset_type.txt", "test"]


def test_webdataset_reads_it_too(flickr, animals, tmp_path, picture):
    """As CLIP_benchmark's build_wds_dataset does, image by image."""
    run(saved(flickr, tmp_path / "a"), tmp_path / "pairs", task="retrieval")
    run(saved(animals, tmp_path / "b"), tmp_path / "classes", task="zero_shot")

    def read(folder: Path, truth: str) -> list:
        tars = [str(folder / "test" / f"{i}.tar") for i in range(int((folder / "test/nshards.txt").read_text()))]
        return list(WebDataset(tars, shardshuffle=False).decode("pilrgb").to_tuple("webp;png;jpg;jpeg", truth))

    pairs, classes = read(tmp_path / "pairs", "txt"), read(tmp_path / "classes", "cls")
    assert [text.splitlines() for _, text in pairs] == [["a dog", "a dog that runs"], ["a cat"], ["caf\u00e9"]]
    assert [label for _, label in classes] == [1, 0, 1]
    assert [image.tobytes() for image, _ in pairs] == [decode(picture(i)).tobytes() for i in range(3)]


def test_zero_shot(animals, tmp_path):
    """Class names come from the source, prompts are the simple one."""
    run(saved(animals, tmp_path), tmp_path / "wds_pets_test", task="zero_shot")
    [found] = find_sets(tmp_path / "wds_pets_test")
    assert (found.kind, found.class_names, found.templates) == ("zero_shot", ("cat", "dog"), ("a photo of a {c}.",))
    assert [s.label for s in found.samples()] == [1, 0, 1]


def test_both_splits_in_one_set(animals, tmp_path):
    """The training split of a linear probe joins the test; of another set it would not."""
    source = saved(animals, tmp_path)
    run(source, tmp_path / "root" / "pets", task="zero_shot")
    run(source, tmp_path / "root" / "pets", task="zero_shot", into="train")
    for split in ("test", "train"):
        assert len(find_task("pets", [tmp_path / "root"], split).samples()) == 3
    (tmp_path / "root" / "pets" / "classnames.txt").write_text("cat\nhorse\n")
    (tmp_path / "root" / "pets" / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="classnames.txt: belongs to another set"):
        run(source, tmp_path / "root" / "pets", task="zero_shot", into="train")


def test_names_and_prompts_of_files(animals, tmp_path):
    (tmp_path / "names.txt").write_text("a cat\na dog\nno animal\n")
    (tmp_path / "prompts.txt").write_text("{c}\na {c}\n")
    files = {"class_names": str(tmp_path / "names.txt"), "templates": str(tmp_path / "prompts.txt")}
    numbers = animals.cast_column("label", datasets.Value("int64"))
    run(saved(numbers, tmp_path), tmp_path / "set", task="zero_shot", **files)
    [found] = find_sets(tmp_path / "set")
    assert (found.class_names, found.templates) == (("a cat", "a dog", "no animal"), ("{c}", "a {c}"))


def write_parquet(dataset: datasets.Dataset, root: Path) -> Path:
    """As the branch refs/convert/parquet of a repository: CONFIG/SPLIT/0000.parquet."""
    (root / "TEST" / "test").mkdir(parents=True)
    (root / "TEST" / "train").mkdir()
    for i in range(2):
        dataset.shard(2, i, contiguous=True).to_parquet(root / "TEST" / "test" / f"000{i}.parquet")
    dataset.select([0]).to_parquet(root / "TEST" / "train" / "0000.parquet")
    return root


def write_arrow(dataset: datasets.Dataset, root: Path) -> Path:
    """As a script left it in a cache: NAME-SPLIT.arrow in some folders, with images as they were given."""
    home = root / "nlphuji___flickr" / "TEST" / "1.1.0" / "3f2a"
    home.mkdir(parents=True)
    for split, rows in {"test": dataset, "train": dataset.select([0])}.items():
        write_table(home / f"flickr-{split}.arrow", rows)
    return root


def write_table(path: Path, rows: datasets.Dataset) -> None:
    with ArrowWriter(features=rows.features, path=str(path)) as writer:
        writer.write_table(rows.with_format("arrow")[:])
        writer.finalize()


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_other_sources_give_the_same_bytes(flickr, tmp_path, write):
    """Parquet files, and the cache of a dataset whose script no longer runs."""
    run(saved(flickr, tmp_path), tmp_path / "set", task="retrieval")
    run(write(flickr, tmp_path / "other"), tmp_path / "same", task="retrieval")
    assert content(tmp_path / "same") == content(tmp_path / "set")


def test_images_that_are_paths(flickr, tmp_path, picture):
    """A cache of a script holds the places of unpacked files; one that is gone is named."""
    rows = []
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(picture(i))
        rows.append({"bytes": None, "path": str(tmp_path / f"{i}.png")})
    by_path = datasets.Dataset.from_dict({"image": rows, "caption": CAPTIONS}, flickr.features)
    source = write_arrow(by_path, tmp_path / "cached")
    run(source, tmp_path / "set", task="retrieval")
    [found] = find_sets(tmp_path / "set")
    assert found.image(found.samples()[2]).tobytes() == decode(picture(2)).tobytes()
    (tmp_path / "1.png").unlink()
    with pytest.raises(ConfigError, match=r"row 1: its file .*1.png cannot be read: No such file"):
        run(source, tmp_path / "again", task="retrieval")
    assert not (tmp_path / "again" / "test").exists()


def test_an_image_that_nobody_can_decode_stays(flickr, tmp_path, picture):
    """It counts as unreadable in the evaluation; without it the set would be another one."""
    rows = [stored(picture(0)), stored(b"no picture"), stored(picture(2)[:60])]
    broken = datasets.Dataset.from_dict({"image": rows, "caption": CAPTIONS}, flickr.features)
    run(saved(broken, tmp_path), tmp_path / "set", task="retrieval")
    [found] = find_sets(tmp_path / "set")
    assert len(found.samples()) == 3
    with tarfile.open(tmp_path / "set" / "test" / "0.tar") as tar:
        assert tar.extractfile("0000001.jpg").read() == b"no picture"


def test_a_killed_run_leaves_no_set_and_is_gone_on_with(flickr, tmp_path, monkeypatch):
    """The first tar is not written again; the end is that of a run that nobody killed."""
    source, written, image_bytes = saved(flickr, tmp_path), [], prepare.image_bytes
    run(source, tmp_path / "whole", task="retrieval", samples_per_shard=1)

    def dies(stored, what):
        written.append(what)
        if len(written) == 2:
            raise KeyboardInterrupt
        return image_bytes(stored, what)

    monkeypatch.setattr(prepare, "image_bytes", dies)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "set", task="retrieval", samples_per_shard=1)
    assert [path.name for path in (tmp_path / "set").iterdir()] == [".test.part"]
    with pytest.raises(ConfigError, match="holds no evaluation set"):
        find_sets(tmp_path / "set")
    (tmp_path / "set" / ".test.part" / ".1.tar.99.tmp").write_bytes(b"cut")
    written[:] = ["a", "b"]
    run(source, tmp_path / "set", task="retrieval", samples_per_shard=1)
    assert written[2:] == ["image=image: row 1", "image=image: row 2"]
    assert content(tmp_path / "set") == content(tmp_path / "whole")


def test_an_unfinished_run_with_other_settings_is_begun_anew(flickr, tmp_path):
    part = tmp_path / "set" / ".test.part"
    part.mkdir(parents=True)
    (part / "0.tar").write_bytes(b"of another set")
    (part / "prepare.json").write_text("{}")
    run(saved(flickr, tmp_path), tmp_path / "set", task="retrieval")
    assert len(find_sets(tmp_path / "set")[0].samples()) == 3


def test_a_set_that_is_there_stays(flickr, tmp_path):
    source = saved(flickr, tmp_path)
    run(source, tmp_path / "set", task="retrieval")
    before = content(tmp_path / "set")
    with pytest.raises(ConfigError, match="holds test/ already"):
        run(source, tmp_path / "set", task="retrieval")
    assert content(tmp_path / "set") == before


@pytest.fixture
def winogavil(picture) -> datasets.Dataset:
    """As nlphuji/winogavil: candidates by name, with a copy of each picture per question."""
    names = {"bison": 0, "beard": 1, "flea": 2}
    rows = [("pogonophile", ["flea", "beard"], ["beard"]), ("herd", ["bison", "flea", "beard"], ["flea", "bison"])]
    features = datasets.Features(
        {
            "cue": datasets.Value("string"),
            "candidates": [datasets.Value("string")],
            "candidate_images": [IMAGE],
            "associations": [datasets.Value("string")],
        }
    )
    images = [[stored(picture(names[name])) for name in candidates] for _, candidates, _ in rows]
    cues, candidates, associations = (list(values) for values in zip(*rows, strict=True))
    columns = {"cue": cues, "candidates": candidates, "candidate_images": images, "associations": associations}
    return datasets.Dataset.from_dict(columns, features)


def test_winogavil(winogavil, tmp_path, picture):
    """Each picture once; a question's candidates keep their order."""
    run(saved(winogavil, tmp_path), tmp_path / "set", task="winogavil", samples_per_shard=2)
    found = open_winogavil(tmp_path / "set")
    samples = found.samples()
    assert [found.image(s).tobytes() for s in samples] == [decode(picture(i)).tobytes() for i in (2, 1, 0)]
    assert [(q.cue, q.candidates, q.associations) for q in found.questions()] == [
        ("pogonophile", (0, 1), (1,)),
        ("herd", (2, 0, 1), (2, 0)),
    ]
    with tarfile.open(tmp_path / "set" / "test" / "1.tar") as tar:
        assert tar.extractfile("0000002.txt").read() == b"bison"


def test_winogavil_is_the_same_from_the_authors_table(winogavil, tmp_path, picture):
    """Two ways to the same questions, by the names of the pictures."""
    run(saved(winogavil, tmp_path), tmp_path / "set", task="winogavil")
    table = tmp_path / "table"
    (table / "winogavil_images").mkdir(parents=True)
    for i, name in enumerate(["bison", "beard", "flea"]):
        (table / "winogavil_images" / f"{name}.jpg").write_bytes(picture(i))
    with (table / "winogavil_dataset.csv").open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["cue", "candidates", "associations"])
        for row in winogavil.select_columns(["cue", "candidates", "associations"]):
            lines.writerow([row["cue"], json.dumps(row["candidates"]), json.dumps(row["associations"])])
    asked = []
    for folder in (tmp_path / "set", table):
        found = open_winogavil(folder)
        pixels = [found.image(sample).tobytes() for sample in found.samples()]
        asked.append(
            [(q.cue, [pixels[i] for i in q.candidates], {pixels[i] for i in q.associations}) for q in found.questions()]
        )
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"source": "absent", "task": "retrieval"}, "source=.*absent: no such file or folder; .*refs/convert/parquet"),
        (
            {"task": "retrieval", "caption": "captions"},
            "caption: the source has no column 'captions'; did you mean 'caption'",
        ),
        ({"task": "retrieval", "image": "img"}, "image: the source has no column 'img'"),
        ({"task": "zero_shot"}, "label: the source has no column 'label'"),
        ({"task": "zero_shot", "label": "number"}, "class_names: the source does not name its classes"),
        ({"task": "zero_shot", "label": "number", "class_names": "names.txt"}, "label: row 1 is class 2, .* 0..1"),
        ({"task": "winogavil"}, "task=winogavil: the source has no column 'cue'"),
        ({"task": "retrieval", "image": "caption"}, "image=caption: row 0: holds no image"),
        ({"task": "retrieval", "caption": "number"}, "caption=number: row 0 holds no text"),
        ({"task": "retrieval", "caption": "empty"}, "caption=empty: row 0 has no caption"),
    ],
)
def test_what_does_not_fit_costs_one_line(flickr, tmp_path, monkeypatch, more, said):
    """And nothing is written that looks like a set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("one\ntwo\n")
    rows = flickr.add_column("number", [[0], [1], [2]] if more.get("caption") == "number" else [0, 2, 1])
    source = saved(rows.add_column("empty", ["", "", ""]), tmp_path)
    with pytest.raises(ConfigError, match=said) as error:
        run(**({"source": source, "out": tmp_path / "set"} | more))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "set" / "test").exists()


def test_a_source_without_rows_or_without_the_split(flickr, tmp_path):
    run_from = lambda source, **more: run(source, tmp_path / "set", task="retrieval", **more)  # noqa: E731
    write_table(tmp_path / "empty.arrow", flickr.select([]))
    with pytest.raises(ConfigError, match="has no rows"):
        run_from(tmp_path / "empty.arrow")
    flickr.select([]).to_parquet(tmp_path / "empty.parquet")
    with pytest.raises(ConfigError, match="cannot be read: .*no data"):
        run_from(tmp_path / "empty.parquet")
    datasets.DatasetDict({"test": flickr}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(ConfigError, match="split=tset: .*did you mean 'test'"):
        run_from(tmp_path / "dict", split="tset")
    (tmp_path / "notes").mkdir()
    with pytest.raises(ConfigError, match="holds no dataset of HuggingFace: looked for state.json"):
        run_from(tmp_path / "notes")
    parquet = write_parquet(flickr, tmp_path / "parquet")
    with pytest.raises(ConfigError, match="split=validation: none of the files"):
        run_from(parquet, split="validation")
    write_parquet(flickr, parquet / "second")
    with pytest.raises(ConfigError, match="several datasets, name one of the folders"):
        run_from(parquet)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ConfigError, match="source=.*cut: cannot be read"):
        run_from(tmp_path / "cut")


def test_a_folder_that_cannot_be_written(flickr, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="out=.*file/set: "):
        run(saved(flickr, tmp_path), tmp_path / "file" / "set", task="retrieval")
