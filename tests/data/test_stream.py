"""Streaming: the samples that the tars hold, dealt to every process once per pass, with what cannot be used listed."""

from __future__ import annotations

import os
import pickle
import shutil
import tarfile
from itertools import islice
from pathlib import Path

import pytest
import torch
from faulty_server import FaultyServer

from kd_accel.data.stream import TarStream, Unusable, expand_streams
from kd_accel.data.stream_loader import StreamLoader
from kd_accel.data.transforms import decode
from kd_accel.schema import ConfigError, LocalError
from kd_accel.types import Batch

SIZES = [4, 4, 4, 4]  # samples per shard


class Rows:
    """What the tests look at of a batch: ids, the number in the caption, the pass."""

    def row(self, sample, epoch):
        decode(sample.image)
        return sample.id, int(sample.captions[0].split()[1]), epoch

    def join(self, rows):
        return rows

    def batch(self, joined):
        ids, numbers, passes = (torch.tensor(column) for column in zip(*joined, strict=True))
        return Batch(ids, None, {"number": numbers, "pass": passes})


@pytest.fixture
def stream(make_shards):
    """(sizes or an existing folder, keywords of TarStream) -> the stream."""

    def make(sizes=SIZES, bad=None, *, folder=None, **keys):
        folder = folder or make_shards(sizes, bad, index=False)
        urls = [str(path) for path in sorted(folder.glob("*.tar"))]
        return TarStream(urls, **{"seed": 5, "buffer": 1, "captions": ["txt"], **keys})

    return make


@pytest.fixture
def make_loader():
    def make(stream, *, samples_per_epoch=16, **keys):
        common = {"batch_size": 2, "seed": 5, "rank": 0, "world_size": 1, "num_workers": 0}
        return StreamLoader(stream, Rows(), samples_per_epoch=samples_per_epoch, **{**common, **keys})

    return make


def numbers(steps):
    """The captions' numbers, in order."""
    return [int(number) for step in steps for batch in step for number in batch.text["number"]]


def one_pass(stream, count, part=0, parts=1, shards_done=0):
    return [found for _, found in islice(stream.samples(part, parts, shards_done), count)]


def test_a_pass_has_every_sample_once(stream, jpeg):
    """The same samples as by id, and ids that stay theirs; the next pass is in another order."""
    read = one_pass(stream(), 32)
    first, second = read[:16], read[16:]
    assert sorted(sample.key for sample in first) == [f"{i:06d}" for i in range(16)]
    assert [sample.key for sample in first] != [sample.key for sample in second]
    assert {sample.key: sample.id for sample in first} == {sample.key: sample.id for sample in second}
    assert len({sample.id for sample in first}) == 16
    for sample in first:
        assert (sample.image, sample.captions) == (jpeg(int(sample.key)), (f"caption {int(sample.key)}",))
        assert 0 <= sample.id < 2**63


def test_the_seed_decides_the_order(stream, make_shards):
    """Nothing is drawn from the clock or the process, as webdataset does by default."""
    folder = make_shards(SIZES, index=False)
    orders = [[s.key for s in one_pass(stream(folder=folder, buffer=8, seed=seed), 16)] for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


def test_the_buffer_mixes_shards(stream, make_shards):
    """Without one, samples of a shard are neighbours."""
    folder = make_shards(SIZES, index=False)

    def changes(buffer):
        shards = [int(s.key) // 4 for s in one_pass(stream(folder=folder, buffer=buffer), 16)]
        return sum(a != b for a, b in zip(shards, shards[1:], strict=False))

    assert changes(1) == 3
    assert changes(16) > 3


@pytest.mark.parametrize("parts", [2, 4])
def test_processes_share_a_pass(stream, make_shards, parts):
    """Every sample comes to one of them, none to two."""
    folder = make_shards(SIZES, index=False)
    found = [s.key for part in range(parts) for s in one_pass(stream(folder=folder), 16 // parts, part, parts)]
    assert sorted(found) == [f"{i:06d}" for i in range(16)]


def test_unusable_samples_have_their_reason(stream, broken):
    """Those of readers by id; what only shows in the pixels is found by whoever decodes."""
    kinds = {1: "no caption", 2: "no image", 6: "empty caption", 9: "not UTF-8"}
    found = one_pass(stream(bad=kinds), 16)
    reasons = {found.key: found.reason for found in found if isinstance(found, Unusable)}
    assert reasons == {f"{i:06d}": broken[kind][1] for i, kind in kinds.items()}


def test_a_cut_shard_costs_its_rest(stream, make_shards, caplog):
    """The samples before the cut come, the loss is said, and the other shards follow."""
    folder = make_shards(SIZES, index=False)
    with tarfile.open(folder / "0001.tar") as tar:
        cut = [member for member in tar][3 * 2 + 1].offset_data + 5  # in the caption of the third sample
    os.truncate(folder / "0001.tar", cut)
    found = one_pass(stream(folder=folder), 15)
    lost = [f for f in found if isinstance(f, Unusable)]
    assert [f.key for f in lost] == [None]
    assert lost[0].shard == str(folder / "0001.tar")
    assert "the rest of the shard is lost" in caplog.text
    keys = {f.key for f in found} - {None}
    assert {f"{i:06d}" for i in [0, 1, 2, 3, 4, 5, *range(8, 16)]} <= keys


def test_shards_without_a_usable_sample_end_the_run(stream):
    """Rather than go round for ever."""
    with pytest.raises(LocalError, match="4 shards without a usable sample, .*caption is empty"):
        one_pass(stream([1] * 4, dict.fromkeys(range(4), "empty caption")), 5)


def test_over_http(make_shards, stream):
    """URLs, by fsspec: no command is run for them."""
    folder = make_shards(SIZES, index=False)
    with FaultyServer() as server:
        server.files = {f"/{path.name}": path.read_bytes() for path in folder.glob("*.tar")}
        urls = expand_streams(f"{server.url}/000{{0..3}}.tar", allow_pipe=False)
        remote = one_pass(TarStream(urls, seed=5, buffer=1, captions=["txt"]), 16)
    assert [s.key for s in remote] == [s.key for s in one_pass(stream(folder=folder), 16)]


def test_a_pipe_runs_only_where_it_is_allowed(make_shards, tmp_path):
    """It is a command of whoever wrote the config."""
    folder = make_shards([2], index=False)
    touched = tmp_path / "touched"
    shards = f"pipe:touch {touched}; cat {folder}/0000.tar"
    with pytest.raises(ConfigError, match=r"data.shards: pipe:touch .* is a command: set data.allow_pipe=true"):
        expand_streams(shards, allow_pipe=False)
    assert not touched.exists()
    found = one_pass(TarStream(expand_streams(shards, allow_pipe=True), seed=0, buffer=1, captions=["txt"]), 2)
    assert [sample.key for sample in found] == ["000000", "000001"]
    assert touched.exists()


def test_names_are_no_commands(make_shards, tmp_path):
    """What a shell would read in a path or a URL is only part of its name."""
    folder = make_shards([2], index=False)
    odd = tmp_path / f"$(touch {tmp_path.name}).tar'; touch x '.tar"
    odd.parent.mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match="no such file"):
        expand_streams(str(odd), allow_pipe=False)
    plain = tmp_path / "a'b;c.tar"
    shutil.copy(folder / "0000.tar", plain)
    urls = expand_streams(str(plain), allow_pipe=False)
    assert len(one_pass(TarStream(urls, seed=0, buffer=1, captions=["txt"]), 2)) == 2


def test_a_failed_pipe_is_a_lost_shard(make_shards):
    """The status of the command counts."""
    folder = make_shards([2], index=False)
    urls = expand_streams([f"pipe:cat {folder}/0000.tar", "pipe:exit 3"], allow_pipe=True)
    found = one_pass(TarStream(urls, seed=0, buffer=1, captions=["txt"]), 3)
    assert [f.shard for f in found if isinstance(f, Unusable)] == ["pipe:exit 3"]


def test_nothing_is_unpickled(tmp_path, write_tar, jpeg):
    """webdataset's decoder would; members that nobody asks for are not even read."""

    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    attack = pickle.dumps(Attack())
    path = write_tar(tmp_path / "0.tar", [("a", {"jpg": jpeg(0), "pyd": attack, "pickle": attack, "txt": b"t"})])
    (found,) = one_pass(TarStream([str(path)], seed=0, buffer=1, captions=["txt"]), 1)
    assert found.captions == ("t",)
    assert not (tmp_path / "owned").exists()


def test_captions_labels_and_json(tmp_path, write_tar, jpeg):
    """The fields of readers by id: several members, keys of a json member, a class number."""
    members = {"png": jpeg(0), "json": b'{"captions": ["a", " b "]}', "txt": b"c", "cls": b"7"}
    path = write_tar(tmp_path / "0.tar", [("x", members)])
    stream = TarStream([str(path)], seed=0, buffer=1, captions=["txt"], synthetic=["json:captions"], label="cls")
    (found,) = one_pass(stream, 1)
    assert (found.captions, found.synthetic, found.label) == (("c",), ("a", "b"), 7)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_of_an_epoch(stream, make_loader, num_workers):
    """As many steps as data.num_samples makes; the same again for the same seed."""
    tars = stream()
    loaders = [make_loader(tars, num_workers=num_workers) for _ in range(2)]
    assert (loaders[0].steps_per_epoch, loaders[0].global_batch, loaders[0].num_samples) == (8, 2, None)
    first, second = (numbers(islice(loader, 8)) for loader in loaders)
    assert first == second
    assert sorted(first) == list(range(16))
    assert (loaders[0].epoch, loaders[0].batches_done) == (1, 0)


def test_ranks_and_micro_batches(stream, make_loader):
    """Two ranks of two micro-batches see an epoch once between them."""
    tars = stream()
    loaders = [make_loader(tars, rank=rank, world_size=2, accumulate=2) for rank in range(2)]
    steps = [list(islice(loader, 2)) for loader in loaders]
    assert [len(step) for rank in steps for step in rank] == [2] * 4
    assert sorted(numbers(steps[0]) + numbers(steps[1])) == list(range(16))


def test_bad_samples_are_listed_and_batches_stay_whole(stream, make_loader):
    """Nothing replaces them: the next sample is taken."""
    loader = make_loader(stream(bad={3: "cut image", 9: "no caption"}))
    running = iter(loader)
    steps = list(islice(running, 7))
    assert all(len(batch.ids) == 2 for step in steps for batch in step)
    assert sorted(numbers(steps)) == [i for i in range(16) if i not in (3, 9)]
    next(running)  # what is bad behind the last good sample comes with the next batch
    assert {(record["key"], record["reason"].split(":")[0]) for record in loader.take_bad()} == {
        ("000003", "image cannot be decoded"),
        ("000009", "caption member is missing"),
    }
    assert loader.take_bad() == []


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_goes_on_behind_whole_shards(stream, make_loader, num_workers, caplog):
    """With shards of one size and a stop between two of them it is exact; the log says that it need not be."""
    tars = stream()
    whole = numbers(islice(make_loader(tars, num_workers=num_workers), 12))
    loader = make_loader(tars, num_workers=num_workers)
    list(islice(loader, 4))
    state = loader.state_dict()
    resumed = make_loader(tars, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert numbers(islice(resumed, 8)) == whole[8:]
    assert "this resume is approximate" in caplog.text
    assert (resumed.epoch, resumed.batches_done) == (1, 4)


def test_resume_on_another_number_of_processes(stream, make_loader):
    """The samples that were seen are counted, not the steps."""
    tars = stream()
    loader = make_loader(tars)
    list(islice(loader, 6))
    resumed = make_loader(tars, rank=1, world_size=2)
    resumed.load_state_dict(loader.state_dict())
    assert (resumed.epoch, resumed.batches_done) == (0, 3)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_unusable_data_is_one_line(stream, make_loader, num_workers):
    """From a worker too, and not its traceback."""
    tars = stream([1] * 4, dict.fromkeys(range(4), "empty caption"))
    with pytest.raises(LocalError, match="shards without a usable sample"):
        next(iter(make_loader(tars, num_workers=num_workers)))


def test_too_few_shards_are_named(stream, make_loader):
    """Before a process waits for a share that it has not got."""
    with pytest.raises(ConfigError, match=r"4 shards are fewer than the 6 processes .*: lower data.num_workers"):
        make_loader(stream(), world_size=3, num_workers=2)


def test_less_than_a_batch_is_named(stream, make_loader):
    with pytest.raises(ConfigError, match="1 samples are fewer than one batch of 2"):
        make_loader(stream(), samples_per_epoch=1)


def test_real_shards(data_root):
    """All pairs of the real training set, by webdataset."""
    urls = expand_streams(f"{data_root}/pairs/train/{{000000..000003}}.tar", allow_pipe=False)
    found = one_pass(TarStream(urls, seed=0, buffer=1, captions=["txt"]), 13_564)  # as its README counts them
    assert not any(isinstance(f, Unusable) for f in found)
    assert len({f.key for f in found}) == len({f.id for f in found}) == 13_564
