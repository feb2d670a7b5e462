"""A store gives back the rows that were written, of the samples they were written for, or says in one line why not."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_accel.data import embeddings
from kd_accel.data.embeddings import EmbeddingStore
from kd_accel.data.source import BadSample
from kd_accel.data.store_files import StoreInfo, captions_of, keys_sha256, pack_rows, save_shard, shard_names
from kd_accel.data_config import DataConfig
from kd_accel.schema import ConfigError, LocalError

SIZES = [3, 4, 2]
V, D = 2, 6
TEXTS = 2  # of sample i: 1 + i % TEXTS
DATA = DataConfig(shards="shards", batch_size=1, templates=["a {}", "the {}"])


@dataclass
class Keys:
    """A source that knows the names of its samples, and nothing else."""

    sizes: list[int] = field(default_factory=lambda: list(SIZES))
    files: list[str] = field(default_factory=lambda: ["a/0.tar", "a/1.tar", "a/2.tar"])
    first_key: int = 0

    @property
    def num_samples(self) -> int:
        return sum(self.sizes)

    @property
    def shard_sizes(self) -> np.ndarray:
        return np.array(self.sizes)

    def key(self, sample_id: int) -> str:
        return f"key{self.first_key + sample_id}"

    def shard(self, sample_id: int) -> str:
        return self.files[int(np.searchsorted(np.cumsum(self.sizes), sample_id, "right"))]


def info(**changes) -> StoreInfo:
    views = {"size": [8, 8], "augment": {}, "seed": 0, "count": V}
    whole = StoreInfo(
        teacher={"arch": "ViT-B-32", "pretrained": "openai", "path": None},
        weights_sha256="w",
        preprocess_sha256="p",
        embed_dim=D,
        logit_scale=100.0,
        logit_bias=None,
        teacher_towers=["image", "text"],
        towers=["image", "text"],
        views=views,
        captions=captions_of(DATA),
        precision="fp32",
        dtype="fp16",
    )
    return replace(whole, **changes)


def rows_of(sample_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(image [V, D], text [its texts, D]) of a sample, which fp16 and bf16 hold exactly."""
    image = torch.arange(V * D).view(V, D) % 4 + sample_id
    return image.float(), -(torch.arange((1 + sample_id % TEXTS) * D).view(-1, D) % 4 + sample_id).float()


@pytest.fixture
def write(tmp_path):
    """The store of a source; `bad` samples have a reason and no features."""

    def make(source: Keys | None = None, about: StoreInfo | None = None, bad: dict[int, str] | None = None) -> Path:
        source, about, bad = source or Keys(), about or info(), bad or {}
        folder = tmp_path / "store"
        folder.mkdir(exist_ok=True)
        about.write(folder)
        start = 0
        for name, size in zip(shard_names(source), source.sizes, strict=True):
            ids = range(start, start := start + size)
            images = torch.stack([rows_of(i)[0] * (float("nan") if i in bad else 1) for i in ids])
            texts = [rows_of(i)[1][: 0 if i in bad else None] for i in ids]
            save_shard(
                folder / name,
                {"image": images, "text": torch.cat(texts)},
                dtype=about.dtype,
                starts=torch.tensor([0, *np.cumsum([len(t) for t in texts])]),
                store_sha256=about.sha256(),
                keys_sha256=keys_sha256(source, ids),
                first_id=ids[0],
                bad={i - ids[0]: bad[i] for i in ids if i in bad},
            )
        return folder

    return make


def opened(folder: Path, source: Keys | None = None, data: DataConfig | None = DATA, **options) -> EmbeddingStore:
    store = EmbeddingStore(folder, **options)
    store.attach(source or Keys(), data)
    return store


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("view", [0, 1, 5])
def test_rows_come_in_the_order_they_are_asked_for(write, dtype, view):
    """Across shards, with a sample twice; the view is counted modulo V, the text by its number."""
    store = opened(write(about=info(dtype=dtype)))
    ids = np.array([8, 0, 3, 8, 1, 5, 2])
    texts = np.array([0, 0, 1, 0, 1, 1, 0])
    found = store.read(ids, view=view, texts=texts)
    assert {rows.dtype for rows in found.values()} == {torch.float16 if dtype == "fp16" else torch.bfloat16}
    expected = {
        "image": torch.stack([rows_of(i)[0][view % V] for i in ids]),
        "text": torch.stack([rows_of(i)[1][number] for i, number in zip(ids, texts, strict=True)]),
    }
    torch.testing.assert_close({n: rows.float() for n, rows in found.items()}, expected, rtol=0, atol=0)


def test_int8_is_off_by_a_254th_of_the_rows_largest(write):
    """Half a step of 1/127 of the largest, which is the bound of rounding; small and large rows alike."""
    rows = torch.randn(50, 3, 64) * torch.logspace(-6, 4, 50)[:, None, None]
    integers, scale = pack_rows(rows, "int8")
    assert (integers.dtype, scale.shape) == (torch.int8, (50, 3))
    off = (integers * scale[..., None] - rows).abs()
    largest = rows.abs().amax(dim=-1, keepdim=True)
    assert (off <= largest / 254 * (1 + 1e-5)).all()  # fp32's own rounding
    assert (off > largest / 400).any(), "never near the bound: this would prove nothing"


def test_int8_rows_that_are_zero_or_bad():
    """Zeros stay zeros; nan stays nan, in its own row alone."""
    rows = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [2.0, -4.0]])
    integers, scale = pack_rows(rows, "int8")
    back = integers * scale[:, None]
    assert back[0].tolist() == [0, 0]
    assert back[1].isnan().all()
    assert back[2].tolist() == pytest.approx([64 * 4 / 127, -4.0])


def test_int8_store_reads_as_it_was_packed(write):
    store = opened(write(about=info(dtype="int8")))
    ids = np.array([4, 1])
    found = store.read(ids, view=1, texts=np.zeros(2, dtype=int))
    images = torch.stack([rows_of(i)[0][1] for i in ids])
    assert found["image"].dtype == torch.float32
    torch.testing.assert_close(found["image"], images, rtol=0, atol=float(images.abs().max()) / 254)


def test_a_number_that_fp16_cannot_hold():
    with pytest.raises(ConfigError, match=r"^dtype=fp16 holds numbers up to 65504, a feature is 7e\+04"):
        pack_rows(torch.tensor([[7e4, 1.0]]), "fp16")
    assert pack_rows(torch.tensor([[7e4, 1.0]]), "bf16")[0].isfinite().all()


def test_only_the_towers_that_are_asked_for(write):
    """And views matter to no one who reads no image features."""
    store = opened(write(), towers={"text"})
    assert (store.towers, store.views) == ({"text"}, None)
    assert store.read(np.array([1]), view=0, texts=np.array([0])).keys() == {"text"}


def test_a_bad_sample_has_its_reason(write):
    """Nan in the file, BadSample for whoever asks first; its neighbours keep their rows and texts."""
    folder = write(bad={1: "image cannot be decoded", 4: "caption is empty"})
    store = opened(folder)
    with pytest.raises(BadSample, match="caption is empty"):
        store.check(4)
    store.check(5)
    found = store.read(np.array([2, 5, 3]), view=0, texts=np.array([0, 1, 1]))
    assert found["image"].float().equal(torch.stack([rows_of(i)[0][0] for i in (2, 5, 3)]))
    assert found["text"].float().equal(torch.stack([rows_of(i)[1][n] for i, n in ((2, 0), (5, 1), (3, 1))]))
    assert [(bad["id"], bad["key"], bad["shard"]) for bad in store.bad_samples()] == [
        (1, "key1", "a/0.tar"),
        (4, "key4", "a/1.tar"),
    ]
    images = opened(folder, data=None, towers={"image"}).read(np.arange(3), view=1, texts=np.zeros(3, dtype=int))[
        "image"
    ]
    assert images.isnan().all(dim=1).tolist() == [False, True, False]


def test_picklable_and_reopened(write):
    """A worker gets no mapped file, and maps its own."""
    store = opened(write())
    copy = pickle.loads(pickle.dumps(store))
    assert store._open
    assert not copy._open
    assert copy.read(np.array([7]), view=0, texts=np.array([0]))["image"].float().equal(rows_of(7)[0][:1])


def test_few_files_are_open_at_a_time(write, monkeypatch):
    """The least recently used one is closed; rows stay right."""
    monkeypatch.setattr(embeddings, "MAX_OPEN", 2)
    store = opened(write())
    for i in (0, 3, 0, 8, 3, 0):
        assert store.read(np.array([i]), view=0, texts=np.array([0]))["image"].float().equal(rows_of(i)[0][:1])
        assert len(store._open) <= 2


def test_the_first_of_the_shards(write):
    """A run on the first shards alone reads a store of all; a shard that is not there is named with the way out."""
    folder = write()
    store = opened(folder, Keys(sizes=SIZES[:2]))
    assert store.read(np.array([6]), view=0, texts=np.array([0]))["image"].float().equal(rows_of(6)[0][:1])
    (folder / "1.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=r"^teacher.store: 1 of 3 shards .* first is 1.safetensors: run kd-accel embed"
    ):
        opened(folder)


def test_shards_that_now_have_other_numbers(write):
    """Crops were drawn by number: features of the views of other numbers would be of other crops, without a word."""
    last = Keys(sizes=SIZES[1:], files=["a/1.tar", "a/2.tar"], first_key=3)
    folder = write()
    with pytest.raises(LocalError, match=r"views that were drawn for samples 3, ..., which are now 0, "):
        opened(folder, last)
    store = opened(folder, last, towers={"text"})  # texts were not drawn
    assert store.read(np.array([0]), view=0, texts=np.array([1]))["text"].float().equal(rows_of(3)[1][1:])


def test_shards_of_one_name_are_numbered():
    """Files of one name in two folders, and blocks of one table."""
    source = Keys(files=["a/0.tar", "b/0.tar", "b/1.tar"])
    assert shard_names(source) == ["0-00000.safetensors", "0-00001.safetensors", "1.safetensors"]


@pytest.mark.parametrize("cut", [4, 100, -1])
def test_a_damaged_file(write, cut):
    folder = write()
    path = folder / "1.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    store = opened(folder)
    with pytest.raises(
        LocalError, match=r"^teacher.store: .*1.safetensors cannot be read .*delete it and run kd-accel"
    ):
        store.read(np.array([4]), view=0, texts=np.array([0]))


def test_a_file_of_other_samples(write):
    """A shard that was packed anew, with as many samples of other names."""
    folder = write()
    with pytest.raises(LocalError, match=r"0.safetensors holds features of other samples than a/0.tar"):
        opened(folder, Keys(first_key=1))


def test_a_file_of_another_store(write):
    """Of the same samples, copied from a store of another teacher."""
    folder = write()
    other = (folder / "1.safetensors").read_bytes()
    write(about=info(weights_sha256="other"))
    (folder / "1.safetensors").write_bytes(other)
    store = opened(folder)
    with pytest.raises(LocalError, match=r"1.safetensors belongs to another store"):
        store.check(4)


def test_captions_that_changed(write):
    """More texts than were stored of a sample: its rows would be its neighbour's."""
    store = opened(write())
    with pytest.raises(LocalError, match=r"sample key2 in a/0.tar has more texts than"):
        store.read(np.array([2]), view=0, texts=np.array([1]))


@pytest.mark.parametrize(
    ("change", "given"), [({"templates": ["{}"]}, r"data.templates=\['{}'\]"), ({"caption": "json:alt"}, "json:alt")]
)
def test_other_texts_are_refused(write, change, given):
    """Both values, and what to do; not where only image features are read."""
    data = DATA.model_copy(update=change)
    folder = write()
    with pytest.raises(
        ConfigError, match=rf"^teacher.store: the store holds texts .*this run has .*{given}.*embed again"
    ):
        opened(folder, data=data)
    opened(folder, data=data, towers={"image"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no store.json: make the store with kd-accel embed"),
        ("{", "cannot be read"),
        ('{"teacher": 1}', "cannot be read"),
    ],
)
def test_no_store(tmp_path, content, said):
    if content is not None:
        (tmp_path / "store.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"^teachers.large.store: .*{said}"):
        EmbeddingStore(tmp_path, key="teachers.large.store")


def test_a_store_of_another_format(tmp_path):
    info(format="kd_accel.store/9").write(tmp_path)
    with pytest.raises(ConfigError, match="format kd_accel.store/9, this version reads kd_accel.store/1"):
        EmbeddingStore(tmp_path)
