"""docs/filter.md: its YAML and its commands are valid, and its table has the steps in their order."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from kd_accel.augment_config import AugmentConfig
from kd_accel.cli import parse
from kd_accel.filter_config import FilterConfig
from kd_accel.schema import validate

DOC = (Path(__file__).resolve().parent.parent / "docs/filter.md").read_text(encoding="utf-8")
COMMANDS = [line for block in re.findall(r"```bash\n(.*?)```", DOC, re.DOTALL) for line in block.splitlines()]
AUGMENTS = [part for block in re.findall(r"```yaml\n(.*?)```", DOC, re.DOTALL) for part in yaml.safe_load_all(block)]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_accepted(command):
    program, *words = shlex.split(command)
    assert program == "kd-accel"
    assert parse(words)[0] == "filter"


def test_augmentations_are_accepted():
    """And the first one is the default, as it says."""
    configs = [validate(AugmentConfig, part["data"]["augment"]) for part in AUGMENTS]
    assert len(configs) == 4
    assert configs[0].scale == AugmentConfig().scale
    assert configs[0].ratio == pytest.approx(AugmentConfig().ratio, abs=1e-4)


def test_the_table_has_the_steps_in_their_order():
    steps = re.findall(r"^\| `(\w+)` \|", DOC, re.MULTILINE)
    fields = list(FilterConfig.model_fields)
    assert steps == fields[fields.index("top_k") : fields.index("dedup_threshold") + 1]


def test_the_service_is_accepted():
    service = yaml.safe_load(re.search(r"`service: ({.*?})`", DOC)[1])
    validate(FilterConfig, {"prompts": "imagenet", "out": "x", "service": service})
