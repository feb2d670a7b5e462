"""Every command of docs/*.md would start, and docs/coming-from.md names no key and no file that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_readme import check, commands

from kd_accel.config import TrainConfig
from kd_accel.config_files import load
from kd_accel.schema import ConfigError

REPO = Path(__file__).resolve().parent.parent
COMING = (REPO / "docs/coming-from.md").read_text(encoding="utf-8")
FILE = re.compile(r"(configs|launch)/[\w./]+|[\w/]+\.(yaml|pt|json|jsonl|csv|log|onnx|safetensors)")


def of_page(text: str) -> list[str]:
    """The commands in blocks and between backticks, but for those that leave words out; of a verb alone, its help."""
    launched = re.findall(r"`(accelerate launch [^`\n]+ -m kd_accel [^`\n]+)`", text)
    lines = [line for line in [*commands(text), *launched] if "..." not in line]
    return [re.sub(r"^kd-accel (\w+)$", r"kd-accel help \1", line) for line in lines]


def told(text: str) -> list[tuple[str, str]]:
    """(config of the heading, what stands between backticks in the last column of a table below it)."""
    parts = re.split(r"^### .*?`(configs/\w+\.yaml)`.*$", text, flags=re.MULTILINE)[1:]
    sections = zip(parts[::2], parts[1::2], strict=True)
    rows = [(config, row) for config, body in sections for row in re.findall(r"^\|.*\| (.*?) \|$", body, re.MULTILINE)]
    return [(config, word) for config, row in rows for word in re.findall(r"`([^`]+)`", row)]


def keys(text: str) -> list[tuple[str, str]]:
    """Of those the keys of train: `section.key`, `key=value`."""
    key = re.compile(r"(?=.*[.=])[a-z_]+(\.\w+)*(=.*)?")
    return [(config, word) for config, word in told(text) if key.fullmatch(word) and not FILE.fullmatch(word)]


def complaints(config: str, word: str) -> list[str]:
    """What a config with this key would be told about the key itself; without a value, only that it is unknown."""
    key, equals, value = word.partition("=")
    try:
        load(TrainConfig, [REPO / config], [f"{key}={value if equals else 'x'}"])
    except ConfigError as error:
        about = [line for line in str(error).splitlines() if line.startswith(key)]
        return about if equals else [line for line in about if "unknown key" in line]
    return []


@pytest.mark.parametrize("page", sorted(path.name for path in (REPO / "docs").glob("*.md")))
def test_commands_would_start(page, monkeypatch):
    monkeypatch.chdir(REPO)
    wrong = {}
    for line in of_page((REPO / "docs" / page).read_text(encoding="utf-8")):
        try:
            check(line)
        except (ConfigError, AssertionError) as error:
            wrong[line] = str(error)
    assert wrong == {}


def test_keys_are_those_of_the_schema():
    found = keys(COMING)
    assert len(found) > 100
    assert {config for config, _ in told(COMING)} == set(re.findall(r"^### .*?`(.*?)`", COMING, re.MULTILINE))
    assert {f"{config}: {word}": wrong for config, word in found if (wrong := complaints(config, word))} == {}


def test_files_exist():
    named = {word for _, word in told(COMING) if word.startswith(("configs/", "launch/"))}
    assert named
    assert [path for path in sorted(named) if not (REPO / path).is_file()] == []


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("optim.lrr=1", "unknown key"),
        ("optim.lrr", "unknown key"),
        ("optim.lr=fast", "should be a number"),
        ("objective.terms.gcl.variant=v9", "v9"),
        ("objective.terms.gcl.gama", "unknown key"),
    ],
)
def test_a_key_that_is_not_there_is_found(word, expected):
    text = (
        f"### A: `configs/fastclip_kd.yaml`\n\n| flag | here |\n|---|---|\n| `--x` | so `{word}`, or so `precision` |\n"
    )
    ((config, found),) = keys(text)
    assert found == word
    (line,) = complaints(config, found)
    assert expected in line
