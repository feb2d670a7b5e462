"""docs/losses.md names every loss term and every option with its default, and its YAML is valid."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kd_accel import terms
from kd_accel.config import ObjectiveConfig
from kd_accel.config_files import load, read
from kd_accel.schema import ConfigError, Schema, alternatives, kind_of, validate

REPO = Path(__file__).resolve().parent.parent
DOC = (REPO / "docs/losses.md").read_text(encoding="utf-8")
QUIRKS, SYSTEMS = "Where a reference has a quirk", "From the five systems"
TERMS = {kind_of(term): term for term in alternatives(terms.AnyTerm)}
COLUMNS = ["kind", "formula", "paper", "options", "source"]


def section(text: str, title: str, level: int = 2) -> str:
    """What stands below a heading, up to the next one that is as high or higher."""
    found = re.findall(rf"^#{{{level}}} {re.escape(title)}\n(.*?)(?=^#{{1,{level}}} |\Z)", text, re.M | re.S)
    assert len(found) == 1, f"{title}: {len(found)} sections of that name"
    return found[0]


def rows(text: str) -> list[dict[str, str]]:
    """The rows of all tables of terms, with `file`, the heading above."""
    found = []
    for file in re.findall(r"^### (\w+\.py)$", text, re.M):
        head, _, *body = re.findall(r"^\|(.*)\|$", section(text, file, 3), re.M)
        assert [cell.strip() for cell in head.split("|")] == COLUMNS, head
        for line in body:
            cells = [cell.strip() for cell in line.split("|")]
            found.append({"file": file} | dict(zip(COLUMNS, cells, strict=True)))
    return found


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def options_of(schema: type[Schema]) -> set[str]:
    """What a YAML file may give besides kind and weight; of a section within, its keys."""
    fields = {name: field.annotation for name, field in schema.model_fields.items() if name not in ("kind", "weight")}
    sections = {name: a for name, a in fields.items() if isinstance(a, type) and issubclass(a, Schema)}
    inside = {f"{name}.{option}" for name, inner in sections.items() for option in options_of(inner)}
    return (fields.keys() - sections.keys()) | inside


def wrong_rows(text: str) -> list[str]:
    """One line for every row that is missing, is one too many, or does not fit its schema."""
    table = rows(text)
    kinds = [kind for row in table for kind in quoted(row["kind"])]
    wrong = [f"{kind}: {kinds.count(kind)} rows" for kind in TERMS if kinds.count(kind) != 1]
    for row in table:
        kind = row["kind"].strip("`")
        if kind not in TERMS:
            wrong.append(f"{kind}: no such kind")
            continue
        if row["file"] != f"{TERMS[kind].__module__.rpartition('.')[2]}.py":
            wrong.append(f"{kind}: not in {row['file']}")
        wrong += [f"{kind}: no {column}" for column in COLUMNS if not row[column]]
        wrong += [f"{kind}: {line}" for line in wrong_options(kind, quoted(row["options"]))]
    return wrong


def wrong_options(kind: str, options: list[str]) -> list[str]:
    """What `option=default` misses, invents or gets wrong."""
    names = {option.partition("=")[0] for option in options}
    if names != options_of(TERMS[kind]):
        return [f"options differ: {', '.join(sorted(names ^ options_of(TERMS[kind])))}"]
    start = [f"terms.it.kind={kind}", "logit_bias=-10"]
    plain = load(ObjectiveConfig, overrides=start)
    return [
        f"{option} is not the default"
        for option in options
        if load(ObjectiveConfig, overrides=[*start, f"terms.it.{option}"]) != plain
    ]


def objectives(text: str) -> dict[str, list[str]]:
    """The YAML blocks below each system."""
    systems = section(text, SYSTEMS)
    names = re.findall(r"^### (.*)$", systems, re.M)
    return {name: re.findall(r"^```yaml\n(.*?)^```$", section(systems, name, 3), re.M | re.S) for name in names}


def check(block: str, file: Path) -> None:
    """Raises ConfigError when the block, written to `file`, is no objective section."""
    file.write_text(block)
    values = read(file)
    if list(values) != ["objective"]:
        raise ConfigError(f"objective is the one section here, not {', '.join(values)}")
    validate(ObjectiveConfig, values["objective"])


def test_every_kind_and_every_option_is_in_the_table():
    """One row per kind, below the name of its file, with all options and their true defaults, and nothing else."""
    assert wrong_rows(DOC) == []


def test_every_reference_mode_is_explained_once():
    kinds = [kind for kind, term in TERMS.items() if "reference" in term.model_fields]
    assert re.findall(r"^- `(\w+)`: ", section(DOC, QUIRKS), re.M) == kinds


def test_every_system_has_valid_objectives(tmp_path):
    """Five systems, at least one block each, read as a config is read; no block stands elsewhere."""
    found = objectives(DOC)
    assert len(found) == 5
    assert [name for name, blocks in found.items() if not blocks] == []
    blocks = sum(found.values(), [])
    assert 2 * len(blocks) == len(re.findall("^```", DOC, re.M))
    for block in blocks:
        check(block, tmp_path / "objective.yaml")


def test_every_config_that_is_named_exists():
    named = re.findall(r"`(configs/\w+\.yaml)`", DOC)
    assert named
    assert [path for path in named if not (REPO / path).exists()] == []


def test_the_readme_lists_the_kinds_and_leads_here():
    """In its section on losses, every kind once, file by file, and their number."""
    losses = section((REPO / "README.md").read_text(encoding="utf-8"), "Losses")
    listed = [kind for line in re.findall(r"^- .*?[;.]$", losses, re.M | re.S) for kind in quoted(line)]
    assert listed == [row["kind"].strip("`") for row in rows(DOC)]
    assert f"{len(TERMS)} kinds" in losses
    assert "(docs/losses.md)" in losses


@pytest.mark.parametrize(
    ("written", "instead", "expected"),
    [
        ("| `rkd` |", "| `rdk` |", ["rkd: 0 rows", "rdk: no such kind"]),
        ("| `rkd` |", "| `vicreg` |", ["rkd: 0 rows", "vicreg: 2 rows"]),
        ("`delta=1.0`", "", ["embedding_huber: options differ: delta"]),
        ("`delta=1.0`", "`delta=1.5`", ["embedding_huber: delta=1.5 is not the default"]),
        ("`network.dropout=0.5`", "", ["global_contrastive: options differ: network.dropout"]),
        ("| none | open_clip |", "| none | |", ["siglip: no source"]),
        ("### relational.py", "### other.py", [f"{k}: not in other.py" for k in ("rkd", "compress", "seed")]),
    ],
)
def test_a_table_that_does_not_fit_is_found(written, instead, expected):
    """The first complaints about a document with one mistake in it."""
    broken = DOC.replace(written, instead)
    assert broken != DOC
    assert wrong_rows(broken)[: len(expected)] == expected


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("objective:\n  terms: {a: {kind: sim_reg}}", "terms.a: unknown kind 'sim_reg'; did you mean 'simreg'"),
        ("objective:\n  terms: {a: {kind: simreg, delta: 1}}", "terms.a.delta: unknown key"),
        ("objective:\n  terms: {a: {kind: clip}}\noptim: {lr: 1}", "objective is the one section"),
        ("terms: {a: {kind: clip}}", "objective is the one section"),
        ("objective:\n  terms: {a: {kind: clip}", "not valid YAML"),
    ],
)
def test_a_block_that_is_not_valid_is_found(block, expected, tmp_path):
    with pytest.raises(ConfigError, match=expected):
        check(block, tmp_path / "objective.yaml")
