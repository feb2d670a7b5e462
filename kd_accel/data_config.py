"""The section data: where samples lie, how they are dealt and shown. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from kd_accel.augment_config import AugmentConfig
from kd_accel.cache_config import CacheConfig
from kd_accel.schema import Schema, check_one_given, without_nulls


class SourceConfig(Schema):
    """Where samples lie: give one of shards, table, folder, dataset."""

    KINDS: ClassVar = ("shards", "table", "folder", "dataset")

    shards: str | list[str] | None = None
    """Webdataset tars, with brace ranges: "data/{00000..00139}.tar"; a folder means every tar in it.

    Index them once: kd-accel index FOLDER. Addresses (http, https, s3, hf) are fetched ahead into cache."""
    cache: CacheConfig = CacheConfig()
    table: str | list[str] | None = None
    """Files with a row per sample: csv, tsv, jsonl, parquet, COCO's or ALBEF's json, or txt with a caption per line."""
    folder: str | None = None
    """A folder of pictures; where they lie in sub-folders, those are the classes."""
    dataset: str | None = None
    """A HuggingFace dataset: a directory of save_to_disk, a folder that load_dataset reads, or a name on the Hub."""
    split: str = "train"
    """Part of the HuggingFace dataset."""
    image: str | None = "auto"
    """Column of a table that holds the picture or its path; null: there are only captions.

    auto: filepath in csv, tsv, jsonl and parquet, image in json and HuggingFace datasets."""
    image_root: str | None = None
    """Folder from which relative paths of a table start; null: that of the table, and COCO's own."""
    caption: str | list[str] | None = "auto"
    """Extension of the tar member, or column of the table, that holds the caption; auto: txt in tars, caption in json
    and HuggingFace datasets, title in other tables, the sub-folder's name in folders.

    Columns of a file without header are named by number: "0". For a folder, a json file {sub-folder: text}.

    json:captions is the key captions of the member .json. A list in it, or a list of fields, is several captions, of
    which every epoch draws one. null: there are only pictures."""
    synthetic: str | list[str] | None = None
    """Field, written as in caption, of captions that a model wrote (MobileCLIP, arXiv 2311.17049)."""
    label: str | None = None
    """Extension of the tar member (webdataset's cls), or column, that holds the class number; null: no labels.

    Of a folder of pictures: auto, the number of the sub-folder among the sorted ones."""
    max_samples: int | None = Field(None, gt=0)
    """The first so many rows of a table, folder or HuggingFace dataset; null: all."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        check_one_given(**{kind: getattr(self, kind) for kind in self.KINDS})
        return self


class MixedSourceConfig(SourceConfig):
    """One of several sources."""

    weight: float = Field(1.0, gt=0)
    """Passes over it per epoch: 2 shows every sample twice, 0.5 a random half of them."""


class DataConfig(SourceConfig):
    """Where the samples come from, and how they are dealt."""

    sources: Annotated[dict[str, MixedSourceConfig], BeforeValidator(without_nulls)] = {}
    """Several sources by name, each with its weight, in place of shards, table, folder or dataset."""
    loader: Literal["indexed", "stream"] = "indexed"
    """stream: tars as webdataset streams them, without an index; resume is approximate, and samples have no ids."""
    num_samples: int | None = Field(None, gt=0)
    """Of a stream: samples that are counted as an epoch."""
    stream_buffer: int = Field(5000, gt=0)
    """Of a stream: samples of a loader process that are mixed with each other."""
    allow_pipe: bool = False
    """Of a stream: shards may be commands, "pipe:aws s3 cp s3://... -"; they are run as they stand."""
    templates: list[str] = Field(["{}"], min_length=1)
    """What a caption, for instance a class name, is put into; of several every epoch draws one."""
    synthetic_probability: float = Field(0.5, ge=0, le=1)
    """How often a synthetic caption is shown in place of a real one."""
    batch_size: int | None = Field(None, gt=0)
    """Samples per process and forward pass; a step sees batch_size x train.accumulate x processes."""
    global_batch_size: int | None = Field(None, gt=0)
    """Samples per optimizer step over all processes, instead of batch_size; a run may then resume on more or fewer."""
    num_workers: int = Field(2, ge=0)
    """Loader processes per training process; 0 decodes in the training process itself."""
    shuffle_window: int = Field(8, gt=0)
    """Shards whose samples are mixed with each other; larger mixes better, smaller reads nearer to sequential."""
    augment: AugmentConfig = AugmentConfig()
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Share of unreadable samples above which the run stops; each one is replaced and listed in bad_samples.jsonl."""

    @field_validator("templates")
    @classmethod
    def _placeholders(cls, value: Any) -> Any:
        if odd := [template for template in value if "{}" not in template and "{c}" not in template]:
            raise ValueError(f"'{odd[0]}' has no {{}}, where the caption goes")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        check_one_given(**{kind: getattr(self, kind) for kind in (*self.KINDS, "sources")})
        return self

    @model_validator(mode="after")
    def _stream_fits(self) -> Self:
        if self.loader == "stream" and (self.shards is None or self.num_samples is None):
            raise ValueError("loader=stream needs shards, and num_samples, which are counted as an epoch")
        if self.loader == "indexed" and (self.num_samples is not None or self.allow_pipe):
            raise ValueError("num_samples and allow_pipe belong to loader=stream; an index knows its samples")
        return self

    @model_validator(mode="after")
    def _one_batch_size(self) -> Self:
        check_one_given(batch_size=self.batch_size, global_batch_size=self.global_batch_size)
        return self
