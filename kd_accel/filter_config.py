"""The keys of kd-accel filter. Imports no torch."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from kd_accel.data_config import SourceConfig
from kd_accel.schema import Schema
from kd_accel.sections import TeacherConfig


class ServiceConfig(Schema):
    """A clip-retrieval backend of your own: LAION's public one has been down since January 2024."""

    url: str
    """Address of its knn-service, for instance http://localhost:1234/knn-service."""
    index_name: str
    """Which of its indices."""
    num_images: int = Field(50, gt=0)
    """Images per prompt."""
    num_result_ids: int = Field(3000, gt=0)
    """Neighbours that the service looks at before it drops duplicates and unsafe images."""
    timeout_s: float = Field(30, gt=0)
    """Seconds until a request has failed."""
    retries: int = Field(3, ge=0)
    """Further tries of a request that failed, after 1, 2, 4, ... seconds."""


class FilterConfig(Schema):
    """kd-accel filter PROMPTS: score images by the prompt they fit best, and keep the best ones.

    The steps from top_k on are taken in their order; those that are null are not. min_score, fraction and
    max_per_prompt may be changed and the command run again: the images are not looked at a second time."""

    positional: ClassVar[str] = "prompts"
    prompts: str
    """A text file with a prompt per line, a folder whose sub-folders are the classes, or imagenet.

    A .safetensors with `embeddings` [P, d] beside a store needs no model at all."""
    templates: list[str] = Field(["{}"], min_length=1)
    """What a prompt, for instance a class name, is put into; of several the mean embedding counts."""
    out: str
    """Folder for scores.parquet, selected.txt, errors.jsonl; for urls.tsv of a service."""
    data: SourceConfig | None = None
    """The images."""
    teacher: TeacherConfig | None = None
    """The model that compares images and prompts."""
    store: str | None = None
    """Read the images' features from what kd-accel embed wrote; the teacher is then the store's."""
    service: ServiceConfig | None = None
    """Ask a search service in place of data; writes urls.tsv, which kd-accel download takes."""
    top_k: int | None = Field(None, gt=0)
    """Keep the images that are among the top_k of some prompt."""
    min_score: float | None = Field(None, ge=-1, le=1)
    """Keep images whose cosine with their best prompt is at least this."""
    fraction: float | None = Field(None, gt=0, le=1)
    """Keep this share of all readable images, those with the best scores."""
    max_per_prompt: int | None = Field(None, gt=0)
    """Keep the best images of those that share their best prompt."""
    dedup_threshold: float | None = Field(None, gt=0, le=1)
    """Drop an image whose cosine with a better one that is kept is at least this."""
    write_shards: bool = False
    """Copy what is selected to tars of its own, out/shards; for data.shards only."""
    batch_size: int = Field(256, gt=0)
    """Images per forward pass."""
    num_workers: int = Field(2, ge=0)
    """Loader processes."""
    precision: Literal["bf16", "fp32"] = "fp32"
    """Of the teacher."""

    @field_validator("templates")
    @classmethod
    def _placeholders(cls, value: Any) -> Any:
        if odd := [template for template in value if "{}" not in template]:
            raise ValueError(f"'{odd[0]}' has no {{}}, where the prompt goes")
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if (self.data is None) == (self.service is None):
            raise ValueError("give either data, to score images, or service, to search for some")
        if self.data is not None and self.teacher is None and self.store is None:
            raise ValueError("teacher or store is needed, to say what images look like")
        if self.service is not None and self.prompts.endswith(".safetensors"):
            raise ValueError("service takes prompts as text")
        if self.write_shards and (self.data is None or self.data.shards is None):
            raise ValueError("write_shards copies tars: it needs data.shards")
        return self
