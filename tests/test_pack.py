"""kd-accel pack: the same samples as in the source, in shards whose bytes depend on nothing else."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import REPO, kill_tree
from PIL import Image

from kd_accel import pack
from kd_accel.config_files import load
from kd_accel.data.index import build_index, expand_shards
from kd_accel.data.open import open_one
from kd_accel.data_config import SourceConfig
from kd_accel.pack_config import PackConfig
from kd_accel.schema import ConfigError


def picture(seed: int, size: tuple[int, int] = (30, 20), kind: str = "JPEG") -> bytes:
    """An image of its own for every seed; `size` is (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(file, kind)
    return file.getvalue()


def write_table(folder: Path, num_samples: int, size: tuple[int, int] = (30, 20)) -> Path:
    """pairs.csv with `num_samples` pictures, captions and class numbers."""
    folder.mkdir()
    lines = ["filepath,title,cls"]
    for i in range(num_samples):
        (folder / f"{i}.v1.jpg").write_bytes(picture(i, size))
        lines.append(f'{i}.v1.jpg,"caption {i}, \u00e9",{i % 3}')
    (folder / "pairs.csv").write_text("\n".join(lines))
    return folder / "pairs.csv"


def run(out: Path, **values) -> None:
    pack.run(load(PackConfig, out=str(out), **values))


def samples(config: dict, **more) -> list:
    source = open_one(load(SourceConfig, **config, **more), images=True, captions=True)
    return [source.read(i) for i in range(source.num_samples)]


def files(folder: Path, pattern: str = "*.tar") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob(pattern))}


def test_samples_come_back(tmp_path, capsys):
    """Pictures keep their bytes; keys are ids; the shards are indexed."""
    table = write_table(tmp_path / "in", 7)
    run(tmp_path / "out", table=str(table), label="cls", samples_per_shard=3)
    before = samples({"table": str(table)}, label="cls")
    after = samples({"shards": str(tmp_path / "out")}, label="cls")
    assert [(s.image, s.captions, s.label) for s in after] == [(s.image, s.captions, s.label) for s in before]
    assert [s.key for s in after] == [f"{i:09d}" for i in range(7)]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["samples"] == 7
    tars, others = [f"0000{i}.tar" for i in range(3)], [f"0000{i}.idx.npz" for i in range(3)]
    assert sorted(files(tmp_path / "out", "*")) == sorted([*tars, *others, "manifest.json", "pack.json"])
    assert "7 samples in 3 shards: 3 written now, 0 already were." in capsys.readouterr().out


def test_the_bytes_depend_on_the_samples_alone(tmp_path):
    """Any number of workers, at any time; headers name no user and no time."""
    table = write_table(tmp_path / "in", 20)
    for workers in (0, 1, 2):
        run(tmp_path / f"out{workers}", table=str(table), samples_per_shard=4, num_workers=workers, short_side=16)
    expected = files(tmp_path / "out0")
    assert len(expected) == 5
    assert files(tmp_path / "out1") == expected
    assert files(tmp_path / "out2") == expected
    with tarfile.open(tmp_path / "out0/00000.tar") as tar:
        headers = {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar}
    assert headers == {(0, 0, 0, "root", "root")}


def test_several_captions(tmp_path):
    """The first in KEY.txt, all of them in KEY.json, generated ones apart; also of samples that have only one."""
    rows = [
        {"image": "0.jpg", "caption": ["a \u00e9", "b"], "fake": ["x", "y"]},
        {"image": "0.jpg", "caption": "c", "fake": []},
    ]
    (tmp_path / "0.jpg").write_bytes(picture(0))
    (tmp_path / "in.json").write_text(json.dumps(rows))
    run(tmp_path / "out", table=str(tmp_path / "in.json"), synthetic="fake")
    shards = {"shards": str(tmp_path / "out")}
    assert [s.captions for s in samples(shards)] == [("a \u00e9",), ("c",)]
    assert [s.captions for s in samples(shards, caption="json:captions")] == [("a \u00e9", "b"), ("c",)]
    first = open_one(load(SourceConfig, **shards, synthetic="json:synthetic"), images=True, captions=True).read(0)
    assert first.synthetic == ("x", "y")


def test_text_alone_and_pictures_alone(tmp_path):
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    run(tmp_path / "text", table=str(tmp_path / "in.txt"), image=None)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.jpg").write_bytes(picture(0))
    run(tmp_path / "pictures", folder=str(tmp_path / "flat"))
    for folder, names in (("text", ["000000000.txt", "000000001.txt"]), ("pictures", ["000000000.jpg"])):
        with tarfile.open(tmp_path / folder / "00000.tar") as tar:
            assert tar.getnames() == names


def test_unusable_samples_are_listed(tmp_path, capsys):
    """What training would refuse is left out, also when a whole shard is; nothing else moves."""
    table = write_table(tmp_path / "in", 6)
    (tmp_path / "in/1.v1.jpg").write_bytes(b"<html>404</html>")
    (tmp_path / "in/2.v1.jpg").unlink()
    (tmp_path / "in/3.v1.jpg").write_bytes(picture(3)[:-200])
    run(tmp_path / "out", table=str(table), samples_per_shard=2)
    kept = samples({"shards": str(tmp_path / "out")})
    assert [s.key for s in kept] == ["000000000", "000000004", "000000005"]
    listed = [json.loads(line) for line in (tmp_path / "out/bad_samples.jsonl").read_text().splitlines()]
    assert [(r["id"], r["key"], r["shard"]) for r in listed] == [(i, f"{i}.v1.jpg", str(table)) for i in (1, 2, 3)]
    assert [r["reason"][:24] for r in listed] == [
        "image cannot be decoded:",
        "image cannot be read: '2",
        "image cannot be decoded:",
    ]
    assert "3 unusable samples are left out" in capsys.readouterr().out
    run(tmp_path / "out", table=str(table), samples_per_shard=2)
    assert "3 samples in 3 shards: 0 written now, 3 already were." in capsys.readouterr().out
    assert len((tmp_path / "out/bad_samples.jsonl").read_text().splitlines()) == 3


def test_a_killed_run_goes_on(tmp_path):
    """SIGKILL to all its processes: whole shards are not written again, and the result is that of a run in one go."""
    table = write_table(tmp_path / "in", 100, (800, 600))
    values = {"table": str(table), "samples_per_shard": 10, "short_side": 256, "num_workers": 2}
    config = load(PackConfig, out=str(tmp_path / "out"), **values).model_dump_json()
    code = "import sys; from kd_accel import pack; from kd_accel.pack_config import PackConfig as C; "
    code += "pack.run(C.model_validate_json(sys.argv[1]))"
    with subprocess.Popen([sys.executable, "-c", code, config], cwd=REPO) as process:
        while len(list((tmp_path / "out").glob("*.tar"))) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        kill_tree(process.pid)
    whole = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert 2 <= len(whole) < 10
    run(tmp_path / "out", **values)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    run(tmp_path / "one_go", **values)
    assert files(tmp_path / "out") == files(tmp_path / "one_go")
    assert len(samples({"shards": str(tmp_path / "out")})) == 100
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_other_settings_are_refused(tmp_path):
    """Another number of workers is not another setting."""
    table = write_table(tmp_path / "in", 3)
    run(tmp_path / "out", table=str(table), num_workers=0)
    run(tmp_path / "out", table=str(table), num_workers=1)
    with pytest.raises(
        ConfigError, match="out=.*: was begun with quality=90, not 80: give the same, or another folder"
    ):
        run(tmp_path / "out", table=str(table), quality=80)
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    with pytest.raises(ConfigError, match="was begun with num_samples=3, not 2"):
        run(tmp_path / "out", table=str(table))


def test_a_folder_of_other_shards_is_refused(tmp_path, train_shards):
    table = write_table(tmp_path / "in", 3)
    before = files(train_shards, "*")
    with pytest.raises(ConfigError, match="holds shards that pack did not write there"):
        run(train_shards, table=str(table))
    assert files(train_shards, "*") == before


def test_a_place_that_cannot_be_written(tmp_path):
    table = write_table(tmp_path / "in", 3)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="out=.*: cannot be written: Not a directory"):
        run(tmp_path / "file/out", table=str(table))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_cannot_be_written(tmp_path, workers):
    """One line, also out of a worker."""
    table = write_table(tmp_path / "in", 3)
    (tmp_path / "in/1.v1.jpg").unlink()
    (tmp_path / "out/.00000.bad.jsonl").mkdir(parents=True)  # where the list of the bad one belongs
    with pytest.raises(ConfigError, match="00000.tar: .*Is a directory.*: run again") as error:
        run(tmp_path / "out", table=str(table), num_workers=workers)
    assert "\n" not in str(error.value)


def test_a_worker_that_is_killed(tmp_path, monkeypatch):
    """One line, and no shard that is not whole."""
    table = write_table(tmp_path / "in", 3)
    monkeypatch.setattr(pack, "resized", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(ConfigError, match="num_workers: a worker's process was ended from outside"):
        run(tmp_path / "out", table=str(table), num_workers=1)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_shards_are_packed_again_smaller(data_root, tmp_path):
    """Real tars through their own index: half the pixels per side, every caption."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").symlink_to(data_root / "pairs/val_unseen/000000.tar")
    build_index(expand_shards(str(tmp_path / "in")))
    run(tmp_path / "out", shards=str(tmp_path / "in"), short_side=36, samples_per_shard=200)
    before, after = samples({"shards": str(tmp_path / "in")}), samples({"shards": str(tmp_path / "out")})
    assert [s.captions for s in after] == [s.captions for s in before]
    assert len(after) == 485
    assert {min(Image.open(io.BytesIO(s.image)).size) for s in after} == {36}
