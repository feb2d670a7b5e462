"""The prompts of OpenAI's list, counted and looked at where they are put together from parts."""

from __future__ import annotations

import pytest

from kd_accel.evals.prompts import PROMPTS


@pytest.mark.parametrize(
    ("task", "count", "some"),
    [
        ("cifar10", 18, {"a photo of a {c}.", "a black and white photo of the {c}.", "a photo of the big {c}."}),
        ("vtab/cifar100", 18, {"a low contrast photo of a {c}.", "a photo of a small {c}."}),
        ("ucf101", 48, {"a photo of a person {c}.", "a demonstration of the person practicing {c}."}),
        ("cars", 8, {"a photo of my dirty {c}.", "i love my {c}!"}),
        ("country211", 5, {"a photo i took in {c}.", "a photo showing the country of {c}."}),
        ("vtab/dtd", 8, {"a photo of a {c} texture.", "a photo of the {c} object."}),
        ("vtab/eurosat", 3, {"a centered satellite photo of {c}.", "a centered satellite photo of the {c}."}),
        ("gtsrb", 3, {'a zoomed in photo of a "{c}" traffic sign.', 'a close up photo of a "{c}" traffic sign.'}),
        ("imagenet1k", 80, {"a bad photo of a {c}."}),
    ],
)
def test_prompts(task, count, some):
    """openai/CLIP, data/prompts.md."""
    assert len(PROMPTS[task]) == len(set(PROMPTS[task])) == count
    assert some <= set(PROMPTS[task])


def test_every_prompt_has_one_place_for_the_name():
    assert all(prompt.count("{c}") == 1 and "_" not in prompt for prompts in PROMPTS.values() for prompt in prompts)
