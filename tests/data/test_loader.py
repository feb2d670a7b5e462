"""The loader: one exact order for any number of workers and ranks, exactly resumed, bad samples replaced alike."""

from __future__ import annotations

import json
import random
import shutil
import signal
from contextlib import closing
from itertools import islice

import numpy as np
import psutil
import pytest
import tiny
import torch

from kd_accel.data.index import build_index, expand_shards
from kd_accel.data.loader import TrainLoader
from kd_accel.data.order import epoch_order
from kd_accel.data_config import DataConfig
from kd_accel.schema import ConfigError

SIZES = [7, 5, 9]  # N = 21


@pytest.fixture
def make_loader(contract):
    """A loader of a folder; keywords of DataConfig and TrainLoader alike."""

    def make(folder, *, rank=0, world_size=1, seed=5, contracts=None, **values):
        if not {"batch_size", "global_batch_size"} & values.keys():
            values["batch_size"] = 4
        config = DataConfig(**{"shards": str(folder), "num_workers": 0, "shuffle_window": 2, **values})
        contracts = contracts or {"student": contract()}
        return TrainLoader(config, contracts=contracts, seed=seed, rank=rank, world_size=world_size)

    return make


def take(loader, count):
    """Of every step its only micro-batch."""
    return [batch for (batch,) in islice(loader, count)]


def ids(batches):
    return [batch.ids.tolist() for batch in batches]


def assert_same(ours, theirs):
    """Ids, pixels and tokens of two lists of batches."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close((a.ids, a.image, a.text), (b.ids, b.image, b.text), rtol=0, atol=0)


def test_a_batch_is_what_the_shards_hold(make_shards, make_loader):
    """uint8 views, int64 ids, and the caption of the very sample that the id names."""
    loader = make_loader(make_shards(SIZES))
    assert (loader.num_samples, loader.batch_size, loader.global_batch, loader.steps_per_epoch) == (21, 4, 4, 5)
    (batch,) = take(loader, 1)
    assert (batch.image.dtype, batch.image.shape) == (torch.uint8, (4, 3, 16, 16))
    assert batch.ids.dtype == torch.int64
    captions = [bytes(row.tolist()).rstrip(b"\0").decode() for row in batch.text["student"]]
    assert captions == [f"caption {i}" for i in batch.ids.tolist()]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_rank(make_shards, make_loader, world_size):
    """W ranks x b give, in rank order, the rows of 1 rank x W*b: ids, pixels and tokens, over two epochs."""
    folder = make_shards(SIZES)
    whole = take(make_loader(folder, batch_size=8), 5)
    b = 8 // world_size
    ranks = [take(make_loader(folder, batch_size=b, rank=r, world_size=world_size), 5) for r in range(world_size)]
    for r, batches in enumerate(ranks):
        rows = slice(r * b, (r + 1) * b)
        for part, full in zip(batches, whole, strict=True):
            expected = full.ids[rows], full.image[rows], full.text["student"][rows]
            torch.testing.assert_close((part.ids, part.image, part.text["student"]), expected, rtol=0, atol=0)


def test_an_epoch_deals_every_sample_once(make_shards, make_loader):
    """No id twice in an epoch; another order and other crops in the next one."""
    loader = make_loader(make_shards(SIZES), batch_size=7)
    first, second = (take(loader, 3) for _ in range(2))
    for epoch in (first, second):
        assert sorted(sum(ids(epoch), [])) == list(range(21))
    assert ids(first) != ids(second)
    views = [
        {i: view for batch in epoch for i, view in zip(batch.ids.tolist(), batch.image, strict=True)}
        for epoch in (first, second)
    ]
    assert sum(not torch.equal(views[0][i], views[1][i]) for i in range(21)) > 10


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("done", [3, 5, 7])  # within an epoch of five batches, at its end, in the next one
def test_resume_is_exact(make_shards, make_loader, workers, done):
    """The batches after a checkpoint are those of the uninterrupted run, whatever the number of workers."""
    folder = make_shards(SIZES)
    whole = take(make_loader(folder), 12)
    before = make_loader(folder, num_workers=workers)
    take(before, done)
    state = json.loads(json.dumps(before.state_dict()))
    assert (state["epoch"], state["batches_done"]) == divmod(done, 5)
    after = make_loader(folder, num_workers=2 - workers)
    after.load_state_dict(state)
    assert_same(take(after, 12 - done), whole[done:])


def test_augmentation_is_the_same_for_any_number_of_workers(make_shards, make_loader):
    """Every change switched on: pixels are a function of (seed, epoch, sample id), whoever makes them."""
    folder = make_shards(SIZES)
    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 0.8}
    more = {"rotation": 10, "rand_augment": {"num_ops": 2}, "color_jitter": jitter, "grayscale": 0.2}
    augment = {"scale": (0.3, 1), "flip": 0.5, "vertical_flip": 0.5, **more}
    runs = [take(make_loader(folder, num_workers=workers, augment=augment), 7) for workers in (0, 1, 2)]
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])
    plain = take(make_loader(folder), 7)
    assert all(not torch.equal(a.image, b.image) for a, b in zip(runs[0], plain, strict=True))


def test_the_state_counts_what_was_yielded(make_shards, make_loader):
    """Not what the workers have prefetched; a new iterator of the same loader goes on after the last batch as well."""
    folder = make_shards(SIZES)
    loader = make_loader(folder, num_workers=2)
    iterator = iter(loader)
    first = next(iterator)
    assert (loader.epoch, loader.batches_done) == (0, 1)
    assert_same(first + take(loader, 3), take(make_loader(folder), 4))


def test_another_world_size_goes_on_in_the_same_global_order(make_shards, make_loader):
    """As long as the global batch is the same."""
    folder = make_shards(SIZES)
    whole = ids(take(make_loader(folder, batch_size=4), 8))
    one = make_loader(folder, global_batch_size=4)
    take(one, 3)
    ranks = [make_loader(folder, global_batch_size=4, rank=rank, world_size=2) for rank in (0, 1)]
    for rank in ranks:
        rank.load_state_dict(one.state_dict())
    left, right = (ids(take(rank, 5)) for rank in ranks)
    assert [a + b for a, b in zip(left, right, strict=True)] == whole[3:]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"batch_size": 3}, r"data.global_batch_size: .* global_batch=4, this run has global_batch=3"),
        ({"seed": 6}, r"seed: .* seed=5, this run has seed=6"),
        ({"shuffle_window": 1}, r"data.shuffle_window: .* shuffle_window=2, this run has shuffle_window=1"),
        ({"shards": "0000.tar"}, r"data: .* num_samples=21, this run has num_samples=7"),
    ],
)
def test_another_order_is_refused(make_shards, make_loader, change, key):
    """A place in one order says nothing about another one: both values and the key to change."""
    folder = make_shards(SIZES)
    if "shards" in change:
        change = {"shards": str(folder / change["shards"])}
    with pytest.raises(ConfigError, match=f"^{key}"):
        make_loader(folder, **change).load_state_dict(make_loader(folder).state_dict())


def test_batches_that_cannot_be_dealt_are_refused(make_shards, make_loader):
    """A global batch that does not divide, and one that is larger than the data: both numbers and the key."""
    folder = make_shards(SIZES)
    with pytest.raises(ConfigError, match="data.global_batch_size=8 cannot be dealt evenly to 3 processes"):
        make_loader(folder, global_batch_size=8, world_size=3)
    with pytest.raises(ConfigError, match="21 samples are fewer than one batch of 24 .* lower data.batch_size"):
        make_loader(folder, batch_size=8, world_size=3)


BAD = {1: "no caption", 4: "no image", 8: "empty caption", 9: "not UTF-8", 15: "cut image", 19: "no JPEG"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_bad_samples_of_every_kind_are_replaced_and_recorded(make_shards, make_loader, broken, workers, world_size):
    """By the next usable id (8 -> 10, 19 -> 0), alike for any number of workers and ranks; other rows stay."""
    sizes = [7, 5, 8]  # N = 20: five batches of four deal every id
    folder = make_shards(sizes, BAD)
    order = epoch_order(np.array(sizes), seed=5, epoch=0, window=2, global_batch=4).ravel()
    loaders = [
        make_loader(folder, global_batch_size=4, rank=r, world_size=world_size, num_workers=workers)
        for r in range(world_size)
    ]
    used = [np.array(ids(take(loader, 5))) for loader in loaders]
    usable = {1: 2, 4: 5, 8: 10, 9: 10, 15: 16, 19: 0}
    assert np.concatenate(used, axis=1).ravel().tolist() == [usable.get(i, i) for i in order]

    records = {record["id"]: record for loader in loaders for record in loader.take_bad()}
    assert sorted(records) == sorted(BAD)
    for i, record in records.items():
        shard = folder / f"{np.searchsorted(np.cumsum(sizes), i, 'right'):04d}.tar"
        assert record.pop("reason").startswith(broken[BAD[i]][1])
        assert record == {"id": i, "key": f"{i:06d}", "shard": str(shard), "replaced_by": usable[i], "epoch": 0}


def test_records_are_taken_once_and_only_of_yielded_batches(make_shards, make_loader):
    """What the workers have prefetched is recorded when it is yielded, so a resumed run counts nothing twice."""
    folder = make_shards(SIZES, dict.fromkeys(range(0, 21, 2), "no caption"))
    loader = make_loader(folder, num_workers=2)
    iterator = iter(loader)
    for _ in range(5):
        (batch,) = next(iterator)
        records = loader.take_bad()
        assert {record["replaced_by"] for record in records} <= set(batch.ids.tolist())
        assert loader.take_bad() == []
    assert loader.bad_samples == []


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_a_usable_sample_is_one_clear_line(make_shards, make_loader, workers):
    """Also when a worker finds out."""
    loader = make_loader(make_shards([6], dict.fromkeys(range(6), "no JPEG")), num_workers=workers)
    with pytest.raises(ConfigError, match=r"^data: no usable sample in 6 in a row from 00000\d in .*0000.tar on: .*$"):
        take(loader, 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_worker_errors_surface_as_themselves(make_shards, make_loader, contract, workers):
    """A mistake of ours in a worker keeps its type and its words, and a shard deleted meanwhile its name."""

    def tokenize(captions):
        raise LookupError("no such word")

    folder = make_shards(SIZES)
    loader = make_loader(folder, contracts={"student": contract(tokenize=tokenize)}, num_workers=workers)
    with pytest.raises(LookupError, match="no such word"):
        take(loader, 1)
    loader = make_loader(folder, num_workers=workers)
    shutil.rmtree(folder)
    with pytest.raises(FileNotFoundError, match=r"000\d.tar"):
        take(loader, 1)


def test_models_share_view_and_tokens_where_their_contracts_allow(make_shards, make_loader, contract):
    """One view at the largest size; one tokenisation, one tensor per tokenizer and context length."""
    calls = []

    def counted(length):
        def tokenize(captions):
            calls.append(length)
            return torch.zeros(len(captions), length, dtype=torch.int64)

        return tokenize

    contracts = {
        "student": contract((16, 24), tokenize=counted(16)),
        "teacher": contract((20, 12), tokenize=counted(16)),
        "longer": contract(context_length=20, tokenize=counted(20)),
        "other": contract(tokenizer="words", tokenize=counted(16)),
    }
    (batch,) = take(make_loader(make_shards(SIZES), contracts=contracts), 1)
    assert batch.image.shape == (4, 3, 20, 24)
    assert batch.text["student"] is batch.text["teacher"]
    assert batch.text["longer"].shape == (4, 20)
    assert batch.text["other"] is not batch.text["student"]
    assert sorted(calls[:3]) == [16, 16, 20]


@pytest.mark.parametrize("workers", [0, 1])
def test_no_global_generator_is_touched(make_shards, make_loader, workers):
    """Loading moves neither torch's, numpy's nor Python's generator, so dropout resumes exactly beside it."""
    folder = make_shards(SIZES)
    before = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
    take(make_loader(folder, num_workers=workers), 7)
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()) == before


def test_a_worker_uses_one_thread(make_shards, make_loader, contract):
    """Torch's and the tokenizers' threads: workers share the cores with each other and with training."""

    def threads(captions):
        import os

        quiet = os.environ.get("TOKENIZERS_PARALLELISM") == "false"
        return torch.full((len(captions), 1), torch.get_num_threads() if quiet else -1)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    loader = make_loader(make_shards(SIZES), contracts={"student": contract(tokenize=threads)}, num_workers=1)
    (batch,) = take(loader, 1)
    torch.set_num_threads(before)
    assert batch.text["student"].unique().tolist() == [1]


def test_a_worker_leaves_stopping_to_its_parent(make_shards, make_loader):
    """SIGTERM to everyone must not end it before the parent has saved; closing the batches does."""
    loader, program = make_loader(make_shards(SIZES), num_workers=1), psutil.Process()
    before = program.children()
    with closing(iter(loader)) as batches:
        next(batches)
        (worker,) = [c for c in program.children() if c not in before and c.cmdline() == program.cmdline()]
        worker.send_signal(signal.SIGTERM)
        for _ in range(10):
            next(batches)
        assert worker.is_running()
    assert worker not in program.children()


@pytest.mark.parametrize("broken", ["no JPEG", "no such word"])
def test_no_worker_outlives_an_error(make_shards, make_loader, contract, broken):
    """Not even while its traceback is kept: at exit Python would wait for a worker that does not heed SIGTERM."""

    def tokenize(captions):
        raise LookupError("no such word")

    folder = make_shards([6], dict.fromkeys(range(6), broken) if broken == "no JPEG" else None)
    loader = make_loader(folder, contracts={"student": contract(tokenize=tokenize)}, num_workers=2)
    program = psutil.Process()
    before = program.children()
    with pytest.raises((ConfigError, LookupError)) as kept:
        take(loader, 1)
    left = [child for child in program.children() if child not in before and child.cmdline() == program.cmdline()]
    assert kept.traceback
    assert left == []


def test_workers_live_for_more_than_one_epoch(make_shards, make_loader, contract):
    """The same processes serve the next epoch: forking anew would stall training at every epoch's start."""

    def pid(captions):
        import os

        return torch.full((len(captions), 1), os.getpid())

    loader = make_loader(make_shards([4]), contracts={"student": contract(tokenize=pid)}, num_workers=1)
    pids = {int(batch.text["student"][0]) for batch in take(loader, 4)}
    assert loader.epoch == 4
    assert len(pids) == 1


def test_real_pairs_load(data_root, tmp_path, make_loader):
    """Captioned photographs of the shared data, indexed in a copy: whole batches, no bad sample."""
    folder = tmp_path / "val"
    shutil.copytree(data_root / "pairs" / "val", folder)
    folder.chmod(0o755)
    written, samples = build_index(expand_shards(str(folder)))
    loader = make_loader(folder, batch_size=64, num_workers=1)
    batches = take(loader, 4)
    assert (written, loader.num_samples) == (len(list(folder.glob("*.tar"))), samples)
    assert [batch.image.shape for batch in batches] == [(64, 3, 16, 16)] * 4
    assert len(set(sum(ids(batches), []))) == 256
    assert loader.take_bad() == []


def test_labels_stand_beside_their_samples(train_shards, make_loader):
    """data.label brings them; without it there are none. The tiny shards number their colours by id."""
    (batch,) = take(make_loader(train_shards, batch_size=8, label="cls"), 1)
    assert batch.labels.tolist() == [i % 20 % len(tiny.COLORS) for i in batch.ids.tolist()]
    assert batch.to("cpu").labels.equal(batch.labels)
    (batch,) = take(make_loader(train_shards, batch_size=8), 1)
    assert batch.labels is None
