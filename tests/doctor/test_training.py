"""What a config names and is not to be had; the words are train's own."""

from __future__ import annotations

import shutil
from collections import namedtuple

import pytest
import tiny
from distributed.test_eval import write_set
from torch import nn

from kd_accel.doctor import training
from kd_accel.doctor.findings import Finding


def found(config, what: str) -> list[Finding]:
    return [finding for finding in training.findings(config) if finding.what == what]


def test_a_training_with_nothing_wrong(changed, tmp_path):
    """Nothing is written."""
    before = sorted(tmp_path.rglob("*"))
    findings = [*training.findings(changed()), *training.output_folder(changed())]
    assert {finding.what: finding.status for finding in findings} == dict.fromkeys(
        ["run", "batch", "models", "data", "disk", "output"], "ok"
    )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("keys", "what", "said"),
    [
        (["data.shards=nowhere"], "data", "nowhere"),
        (["data.batch_size=41"], "data", "41"),
        (["data={batch_size: null, global_batch_size: 9}", "train.accumulate=2"], "batch", "choose a multiple of 2"),
        (["teacher.path=nowhere"], "models", "nowhere: no such directory"),
        (["student.arch=ViT-B-17"], "models", "ViT-B-17"),
        (["log.trackers=[nobody]"], "trackers", "unknown tracker 'nobody'"),
        (["resume=nowhere"], "run", "resume=nowhere: not a checkpoint directory"),
        (["eval={data: nowhere}"], "eval", "nowhere"),
    ],
)
def test_what_is_not_there_is_a_failure(changed, keys, what, said):
    (finding,) = found(changed(*keys), what)
    assert finding.status == "FAIL"
    assert said in finding.said


def test_too_few_shards_for_the_workers_of_a_stream(changed):
    keys = ["data.loader=stream", "data.num_samples=40", "data.num_workers=3"]
    shards = f"{changed().data.shards}/{{00000..00001}}.tar"
    (finding,) = found(changed(*keys, f"data.shards={shards}"), "data")
    assert finding.status == "FAIL"
    assert "2 shards are fewer than the 3 processes that read them" in finding.said


def test_a_shard_that_was_lost(changed, tmp_path):
    """Its index, which lies beside it, is lost with it."""
    folder = tiny.write_shards(tmp_path / "shards")
    names = f"data.shards={folder}/{{00000..00001}}.tar"
    assert found(changed(names), "data")[0].status == "ok"
    (folder / "00001.tar").unlink()
    (finding,) = found(changed(names), "data")
    assert finding.status == "FAIL"
    assert "00001.tar" in finding.said


def test_an_unreadable_sample_is_said(changed, tmp_path):
    """Training replaces it; where they are all like this, the first step shows it."""
    folder = tiny.write_shards(tmp_path / "shards", shards=1, per_shard=4)
    tar = folder / "00000.tar"
    data = tar.read_bytes()
    at = data.index(b"\xff\xd8")  # the first picture
    tar.write_bytes(data[:at] + bytes(200) + data[at + 200 :])
    (finding,) = found(changed(f"data.shards={folder}"), "data")
    assert finding.status == "warn"
    assert finding.said.startswith("1 of its first 4 samples are unreadable: ")


def test_an_evaluation_beside_a_tower_that_does_not_fit(changed, tmp_path, tiny_teacher):
    write_set(tmp_path / "sets" / "classes", [0, 1])
    section = f"eval={{data: {tmp_path / 'sets'}, text_from: {tiny_teacher}}}"
    (finding,) = found(changed(section), "eval")
    assert finding.status == "FAIL"
    assert "its text embeddings are 12 wide" in finding.said
    (finding,) = found(changed(section, "student.arch.embed_dim=12"), "eval")
    assert finding.status == "ok"


def test_no_token_for_the_hub(changed, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    (finding,) = found(changed("hub.repo=me/student"), "hub")
    assert finding.status == "FAIL"
    assert "set HF_TOKEN" in finding.said
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    (finding,) = found(changed("hub.repo=me/student"), "hub")
    assert finding.status == "ok"


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(("checkpoints", "status"), [(0.9, "FAIL"), (2.9, "warn"), (3.1, "ok")])
def test_room_for_checkpoints(changed, monkeypatch, checkpoints, status):
    """Two are kept, and the third is written beside them."""
    student = nn.Linear(10_000_000, 1, bias=False)
    free = int(checkpoints * 16 * 10_000_000)  # fp32: weights, two moments, the release
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))
    (finding,) = training.checked("disk", lambda: training._disk(changed(), student))
    assert finding.status == status
    assert "takes about 152.6 MiB" in finding.said  # 16e7 / 2**20


def test_what_a_checkpoint_takes_is_not_too_little(changed, tmp_path):
    """Of a run that was trained, less its text files."""
    from kd_accel import train

    config = changed("optim.steps=1")
    train.run(config)
    (said,) = [finding.said for finding in found(config.model_copy(update={"resume": "auto"}), "disk")]
    files = list((tmp_path / "runs" / "run" / "checkpoints").glob("step_*/**/*.safetensors"))
    real = sum(file.stat().st_size for file in files) / 2**20
    estimated = float(said.rpartition("about ")[2].removesuffix(" MiB"))
    assert estimated == pytest.approx(real, rel=0.1)


def test_a_folder_that_cannot_be_written_to(changed, tmp_path):
    """A file is in its way: root may write everywhere else."""
    (tmp_path / "file").touch()
    (finding,) = training.output_folder(changed(f"output_dir={tmp_path}/file/runs"))
    assert finding.status == "FAIL"
    assert "file/runs: cannot be written to" in finding.said
