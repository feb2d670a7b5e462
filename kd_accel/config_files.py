"""YAML files and a.b=c words as one mapping, checked as a config: what `base:` includes, what lies over what.

    config = load(TrainConfig, ["configs/demo.yaml"], ["data.batch_size=64"])

Imports no torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from kd_accel.schema import ConfigError, S, Schema, validate


def load(schema: type[S], files: Sequence[str | Path] = (), overrides: Sequence[str] = (), **values: Any) -> S:
    """Merge `files` (left to right), then `values`, then `overrides` ("a.b=c"), and validate them as `schema`.

    Raises ConfigError with one line per problem: path, value, what is allowed, and the nearest key for an unknown one.
    """
    merged: dict = {}
    for file in files:
        merged = _merge(merged, read(Path(file)))
    merged = _merge(merged, values)
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    return validate(schema, merged)


def dump(config: Schema) -> str:
    """The resolved config as YAML; `load` reads it back to an equal config."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def read(path: Path, above: tuple[Path, ...] = ()) -> dict:
    """The mapping in `path`, unchecked, laid over the file that its `base:` names (relative to `path`).

    `above` are the files whose `base:` led here. Raises ConfigError when a file is missing, not YAML or not a mapping.
    """
    if path.resolve() in above:
        raise ConfigError(f"{path}: base files include each other in a circle")
    values = _parse_yaml(_read_text(path, above), str(path)) or {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected one file name (got {base!r}); a base may name a base of its own")
    return _merge(read(path.parent / base, (*above, path.resolve())), values)


def _read_text(path: Path, above: tuple[Path, ...]) -> str:
    named_in = f" (the base of {above[-1].name})" if above else ""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file{named_in}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read{named_in}: {error}") from None


def _parse_yaml(text: str, name: str) -> Any:
    loader = _Loader(text)
    loader.name = name  # what errors call it
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{name}{where}: not valid YAML: {problem}") from None
    finally:
        loader.dispose()


def _parse_override(text: str) -> dict:
    """`a.b=c` as {"a": {"b": c}}, where c is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"'{text}' is not of the form key=value (for instance data.batch_size=64)")
    if not value.strip():
        raise ConfigError(f"{key}: no value after '='; write {key}=null to unset it, or {key}='\"\"' for an empty text")
    *outer, last = key.split(".")
    parsed = {last: _parse_yaml(value, text)}
    for part in reversed(outer):
        parsed = {part: parsed}
    return parsed


def _merge(under: dict, over: dict) -> dict:
    """`over` laid on `under`; mappings are merged, everything else is replaced.

    A mapping that chooses another `kind` replaces the one below it: options of the old kind must not linger.
    """
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and _are_of_a_kind(below, value):
            value = _merge(below, value)
        merged[key] = value
    return merged


def _are_of_a_kind(under: dict, over: dict) -> bool:
    return "kind" not in under or "kind" not in over or under["kind"] == over["kind"]


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars: `5e-4` is a number; `on`, `1:30` and `2024-01-01` are text. A key given twice is an error."""

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            line = node.start_mark.line + 1
            raise ConfigError(f"{node.start_mark.name}: key '{twice[0]}' is given twice in the mapping at line {line}")
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what _Loader would not read back as text."""

    yaml_implicit_resolvers = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", list("-+0123456789")),
    ("float", r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?|[-+]?\.inf|\.nan", list("-+.0123456789")),
    ("merge", r"<<", ["<"]),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
