"""Reading, merging, checking and writing configs; every message has the path, the value and the way out."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from kd_accel.config_files import dump, load, read
from kd_accel.schedules import Cosine, Scheduled
from kd_accel.schema import ConfigError, Schema, flat


class Small(Schema):
    kind: Literal["small"] = "small"
    size: int = 1


class Large(Schema):
    kind: Literal["large"] = "large"
    size: int = Field(gt=10)
    weight: Scheduled = 1.0


class Section(Schema):
    rate: float = Field(1.0, gt=0)
    pair: tuple[float, float] = (0.0, 1.0)
    count: int = 1
    on: bool = True

    @model_validator(mode="after")
    def _ordered(self):
        if self.pair[0] > self.pair[1]:
            raise ValueError("pair: the smaller number comes first")
        return self


class Root(Schema):
    name: str = Field("run", pattern=r"^\w+$")
    mode: Literal["fast", "exact"] = "fast"
    section: Section = Section()
    paths: str | list[str] = "all"
    parts: dict[str, Annotated[Small | Large, Field(discriminator="kind")] | None] = {}


class Needy(Schema):
    parts: Large
    title: str


def message(*overrides: str, schema: type[Schema] = Root) -> str:
    """What the user reads after giving `overrides`."""
    with pytest.raises(ConfigError) as error:
        load(schema, [], overrides)
    return str(error.value)


@pytest.fixture
def write(tmp_path):
    def _write(name: str, text: str):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return _write


def test_later_files_then_values_then_overrides_win(write):
    """Each source replaces single keys of the ones before it and leaves the others."""
    first = write("a.yaml", "section: {rate: 1, count: 1}\nname: a\nmode: exact")
    second = write("b.yaml", "section: {rate: 2}\nname: b")
    config = load(Root, [first, second], ["section.count=4"], name="c")
    assert config == Root(section=Section(rate=2, count=4), name="c", mode="exact")


def test_base_lies_under_the_file_that_names_it(write):
    """`base:` is relative to its own file, and a base may have a base."""
    write("deep/root.yaml", "section: {rate: 1, count: 1}\nname: root")
    write("deep/middle.yaml", "base: root.yaml\nsection: {rate: 2}")
    top = write("top.yaml", "base: deep/middle.yaml\nsection: {on: false}")
    assert load(Root, [top]) == Root(section=Section(rate=2, count=1, on=False), name="root")


def test_a_circle_of_bases_is_named(write):
    write("a.yaml", "base: b.yaml")
    with pytest.raises(ConfigError, match=r"b\.yaml: base files include each other in a circle"):
        read(write("b.yaml", "base: a.yaml"))


def test_another_kind_replaces_and_the_same_kind_merges():
    """Options of a kind do not linger when another kind is chosen."""
    parts = {"a": {"kind": "large", "size": 20, "weight": 3.0}}
    assert load(Root, [], ["parts.a.kind=small"], parts=parts).parts["a"] == Small()
    assert load(Root, [], ["parts.a.size=30"], parts=parts).parts["a"] == Large(size=30, weight=3.0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 0.0005),
        ("1E3", 1000.0),
        ("-2.5", -2.5),
        (".5", 0.5),
        ("3", 3),
        ("on", "on"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("[1, a]", [1, "a"]),
        ("{a: {b: 1}}", {"a": {"b": 1}}),
        ('"3"', "3"),
        ("x=y", "x=y"),
    ],
)
def test_values_are_yaml_1_2(text, value, write):
    """Numbers with an exponent are numbers; words, clock times and dates stay text."""
    parsed = read(write("a.yaml", f"a: {text}"))["a"]
    assert parsed == value
    assert type(parsed) is type(value)


def test_anchors_and_merge_keys_work(write):
    assert read(write("a.yaml", "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}"))["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("name", ["5e-4", "true", "null", "3", "a b", "on", "~", "", "1_000", "2024-01-01"])
def test_dump_reads_back_equal(name, write):
    """Also text that looks like something else."""
    weight = {"kind": "cosine", "start": 1.0, "end": 1e-7, "steps": 3}
    parts = {"a": {"kind": "large", "size": 20, "weight": weight}}
    config = load(Root, paths=[name, name], section={"rate": 5e-4}, parts=parts)
    again = load(Root, [write("a.yaml", dump(config))])
    assert again == config
    assert again.parts["a"].weight == Cosine(start=1.0, end=1e-7, steps=3)


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        Root().name = "other"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        # wrong types
        ("section.rate=quick", 'section.rate: should be a number (got "quick")'),
        ("section.rate=true", 'section.rate: should be a number (got "true")'),
        ("section.count=1.5", "section.count: should be a whole number (got 1.5)"),
        ("section.count=64k", 'section.count: should be a whole number (got "64k")'),
        ("section.count=null", "section.count: should be a whole number (got null)"),
        ("section.on=maybe", 'section.on: should be true or false (got "maybe")'),
        ("name=3", "name: should be text (got 3); put it in quotes"),
        ("name.a=b", 'name: should be text (got {"a": "b"})'),
        ("mode=quick", "mode: should be 'fast' or 'exact' (got \"quick\")"),
        ("paths=3", "paths: should be text or a list [a, b, ...] (got 3)"),
        ("paths=[a, 3]", "paths.1: should be text (got 3); put it in quotes"),
        ("parts=3", "parts: should be a mapping of keys to values (got 3)"),
        # whole sections
        ("section=null", "section: should be a mapping of keys to values (got null)"),
        ("section=3", "section: should be a mapping of keys to values (got 3)"),
        # out of range
        ("section.rate=-1", "section.rate: should be greater than 0 (got -1)"),
        ("section.rate=.inf", "section.rate: should be a finite number (got Infinity)"),
        ("name=a/b", "name: should match pattern '^\\w+$' (got \"a/b\")"),
        # lists
        ("section.pair=3", "section.pair: should be a list [a, b, ...] (got 3)"),
        ("section.pair=[1]", "section.pair.1: this item of the list is missing"),
        ("section.pair=[1, 2, 3]", "section.pair: should have at most 2 items, not 3 (got [1, 2, 3])"),
        ("section.pair=[1, x]", 'section.pair.1: should be a number (got "x")'),
        (
            "section.pair.0=1",
            'section.pair: should be a list [a, b, ...] (got {"0": 1});'
            " items of a list cannot be set one by one, give the whole list",
        ),
        # rules over several keys
        ("section.pair=[2, 1]", "section: pair: the smaller number comes first"),
        # unknown keys
        ("section.rat=3", "section.rat: unknown key (got 3); did you mean 'rate'?"),
        ("sektion.rate=3", "sektion: unknown key (got {\"rate\": 3}); did you mean 'section'?"),
        ("zzz=3", "zzz: unknown key (got 3); one of name, mode, section, paths, parts"),
        ("parts.a={kind: small, sise: 3}", "parts.a.sise: unknown key (got 3); did you mean 'size'?"),
        # kinds
        ("parts.a.kind=smal", "parts.a: unknown kind 'smal'; did you mean 'small'?"),
        ("parts.a.kind=zzz", "parts.a: unknown kind 'zzz'; one of small, large"),
        ("parts.a.size=3", "parts.a: the key 'kind' is missing (got {\"size\": 3}); one of small, large"),
        ("parts.a=3", "parts.a: should be a mapping of keys to values (got 3)"),
        ("parts.a={kind: large, size: 3}", "parts.a.size: should be greater than 10 (got 3)"),
        ("parts.a={kind: large}", "parts.a.size: this key is needed"),
        # names that are also words of pydantic
        ("parts.int={kind: small, size: x}", 'parts.int.size: should be a whole number (got "x")'),
        ("parts.small={kind: small, size: x}", 'parts.small.size: should be a whole number (got "x")'),
        # schedules
        ("parts.a={kind: large, size: 20, weight: x}", 'parts.a.weight: should be a number (got "x")'),
        (
            "parts.a={kind: large, size: 20, weight: {kind: cosine, start: x, end: 0, steps: 3}}",
            'parts.a.weight.start: should be a number (got "x")',
        ),
        (
            "parts.a={kind: large, size: 20, weight: {kind: linear, start: 1, end: 0}}",
            "parts.a.weight: give the length as exactly one of steps, epochs, samples, not 0",
        ),
        # the override itself
        ("=3", "'=3' is not of the form key=value (for instance data.batch_size=64)"),
        ("a..b=3", "'a..b=3' is not of the form key=value (for instance data.batch_size=64)"),
        ("name", "'name' is not of the form key=value (for instance data.batch_size=64)"),
        ("name=", "name: no value after '='; write name=null to unset it, or name='\"\"' for an empty text"),
        ("paths=[a", "paths=[a, line 1: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("parts={a: 1, a: 2}", "parts={a: 1, a: 2}: key 'a' is given twice in the mapping at line 1"),
    ],
)
def test_message(override, expected):
    """One line with the path as the user wrote it, what is wrong, the value, and a hint."""
    assert message(override) == expected


def test_missing_keys_and_sections():
    """A missing section says which of its keys have no default."""
    assert message(schema=Needy) == "parts: this section is needed, with size\ntitle: this key is needed"


def test_all_problems_at_once():
    """One line each, in the order of the schema."""
    lines = message("section.rate=-1", "mode=quick", "section.cuont=3", "name=3").splitlines()
    assert [line.split(":")[0] for line in lines] == ["name", "mode", "section.rate", "section.cuont"]


def test_long_values_are_cut():
    line = message(f"section.rate={'x' * 200}")
    assert len(line) < 130
    assert line.endswith("...)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [1", r"line 2: not valid YAML"),
        ("- a\n- b", r"expected a mapping of keys to values, got list"),
        ("a: 1\nb: 2\na: 3", r"key 'a' is given twice in the mapping at line 1"),
        ("base: [a.yaml, b.yaml]", r"base: expected one file name \(got \['a.yaml', 'b.yaml'\]\)"),
        ("base: nowhere.yaml", r"nowhere\.yaml: no such file \(the base of given\.yaml\)"),
        ("a: 1\n---\nb: 2", r"line 2: not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", r"not valid YAML: could not determine a constructor"),
    ],
)
def test_files_that_cannot_be_read(text, expected, write):
    """The message begins with the file and says where in it."""
    path = write("given.yaml", text)
    with pytest.raises(ConfigError, match=expected) as error:
        read(path)
    assert str(error.value).startswith(str(path.parent))


def test_an_empty_file_says_nothing(write):
    assert read(write("a.yaml", "# only a comment\n")) == {}


def test_a_missing_file_hints_at_its_neighbour(write):
    path = write("experiment.yaml", "name: a")
    with pytest.raises(ConfigError) as error:
        read(path.with_name("experimnt.yaml"))
    assert str(error.value) == f"{path.with_name('experimnt.yaml')}: no such file; did you mean {path}?"


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path)


def test_flat_keeps_every_leaf_under_its_path():
    """What trackers and the report's config diff call a setting is what the user types on the command line."""
    nested = {"data": {"batch_size": 8, "shards": ["a", "b"]}, "teacher": None, "objective": {"terms": {}}}
    expected = {"data.batch_size": 8, "data.shards": "['a', 'b']", "teacher": None, "objective.terms": "{}"}
    assert flat(nested) == expected
