"""Which caption of a sample is shown: a pure function of (seed, epoch, sample id).

A sample's texts are its captions, each in every template, and after them its synthetic captions: always in this order,
so that a text's number is enough to find what is stored of it.
"""

from __future__ import annotations

import numpy as np

from kd_accel.data.source import BadSample, Sample
from kd_accel.data_config import DataConfig

STREAM = 1  # augmentation draws from [seed, epoch, id], captions from [seed, epoch, id, STREAM]


def all_texts(sample: Sample, templates: list[str]) -> list[str]:
    """Every text that the sample may be shown with; raises BadSample where there is none."""
    texts = [fill(template, caption) for caption in sample.captions for template in templates] + list(sample.synthetic)
    if not texts:
        raise BadSample("caption is missing")
    return texts


def draw_text(sample: Sample, config: DataConfig, *, seed: int, epoch: int) -> tuple[str, int]:
    """(text, its number in all_texts): synthetic with the configured probability, else one of captions x templates."""
    texts = all_texts(sample, config.templates)
    if len(texts) == 1:
        return texts[0], 0
    rng = np.random.default_rng([seed, epoch, sample.id, STREAM])
    written = len(texts) - len(sample.synthetic)
    synthetic = len(sample.synthetic) > 0 and (not written or rng.random() < config.synthetic_probability)
    number = int(written + rng.integers(len(sample.synthetic)) if synthetic else rng.integers(written))
    return texts[number], number


def fill(template: str, caption: str) -> str:
    """The caption in the place of {} or, as in evaluation sets, {c}."""
    return template.replace("{}", caption).replace("{c}", caption)
