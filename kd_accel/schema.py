"""How a YAML file becomes a checked, frozen config: `base:` includes, `a.b=c` overrides, all errors at once.

    config = load(TrainConfig, ["configs/demo.yaml"], ["data.batch_size=64"])

Imports no torch.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticUndefined


class ConfigError(ValueError):
    """The user's mistake: one line per problem, printed without a traceback, exit code 2."""


class Schema(BaseModel):
    """Base of every YAML section: frozen, unknown keys are errors, the string below a field is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


S = TypeVar("S", bound=Schema)


class _Loader(yaml.SafeLoader):
    """YAML in which `5e-4` is a number (YAML 1.2) and a key given twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            line = node.start_mark.line + 1
            raise ConfigError(f"{node.start_mark.name}: key '{twice[0]}' is given twice in the mapping at line {line}")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(schema: type[S], files: list[str | Path] = (), overrides: list[str] = (), **values: Any) -> S:
    """Merge `files` (left to right), then `values`, then `overrides` ("a.b=c"), and validate them as `schema`.

    Raises ConfigError with one line per problem: path, value, what is allowed, and the nearest key for an unknown one.
    """
    merged: dict = {}
    for file in files:
        merged = _merge(merged, _read(Path(file)))
    merged = _merge(merged, values)
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    return validate(schema, merged)


def validate(schema: type[S], values: dict) -> S:
    """`values` as a `schema`; raises ConfigError with every problem at once."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(schema, problem) for problem in error.errors())) from None


def dump(config: Schema) -> str:
    """The resolved config as YAML; `load` reads it back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    """The mapping in `path`, laid over the file that its `base:` names (relative to `path`)."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base files include each other in a circle")
    values = _parse_yaml(_read_text(path), str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base: expected one file name, got {base!r}")
    return _merge(_read(path.parent / base, (*seen, path.resolve())), values)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _parse_yaml(text: str, name: str) -> Any:
    loader = _Loader(text)
    loader.name = name
    try:
        return loader.get_single_data() or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _parse_override(text: str) -> dict:
    """`a.b=c` as {"a": {"b": c}}, where c is read as YAML."""
    key, _, value = text.partition("=")
    if not all(key.split(".")):
        raise ConfigError(f"'{text}' is not of the form key=value (for instance data.batch_size=64)")
    loader = _Loader(value)
    loader.name = text
    try:
        parsed = loader.get_single_data()
    except yaml.YAMLError as error:
        raise ConfigError(f"{text}: the value is not valid YAML: {' '.join(str(error).split())}") from None
    for part in reversed(key.split(".")):
        parsed = {part: parsed}
    return parsed


def _merge(under: dict, over: dict) -> dict:
    """`over` laid on `under`; mappings are merged, everything else is replaced.

    A mapping that chooses another `kind` replaces the one below it: options of the old kind must not linger.
    """
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        same_kind = isinstance(value, dict) and isinstance(below, dict)
        if same_kind and "kind" in value and "kind" in below and value["kind"] != below["kind"]:
            same_kind = False
        merged[key] = _merge(below, value) if same_kind else value
    return merged


def _explain(schema: type[Schema], problem: dict) -> str:
    """One line for one pydantic error: path, what is wrong, the value, and the nearest known key."""
    path, known = _locate(schema, problem["loc"])
    where = ".".join(path) or "config"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    match problem["type"]:
        case "extra_forbidden":
            return f"{where}: unknown key (got {problem['input']!r}){_did_you_mean(path[-1], known)}"
        case "missing":
            return f"{where}: this key is needed"
        case "union_tag_invalid":
            tags = re.findall(r"'([^']+)'", problem["ctx"]["expected_tags"])
            tag = str(problem["ctx"]["tag"])
            return f"{where}.kind: unknown kind '{tag}'{_did_you_mean(tag, tags)}; one of {', '.join(tags)}"
        case "union_tag_not_found":
            return f"{where}: a mapping with the key 'kind' is needed (got {problem['input']!r})"
    given = "" if isinstance(problem["input"], dict) else f" (got {problem['input']!r})"
    return f"{where}: {message}{given}"


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else ""


def _locate(schema: type[Schema], location: tuple) -> tuple[list[str], list[str]]:
    """(the path as the user wrote it, the keys known beside its last part).

    pydantic's location also names the member of a union that it tried; the user never wrote that, so it is dropped.
    """
    path: list[str] = []
    here: list[Any] = [schema]  # the annotations that a value at `path` may have
    known: list[str] = []
    for part in location:
        schemas = [a for a in here if isinstance(a, type) and issubclass(a, Schema)]
        inner = [get_args(a)[-1] for a in here if get_origin(a) in (dict, list, tuple) and get_args(a)]
        fields = {name: field for s in schemas for name, field in s.model_fields.items()}
        tags = {getattr(s.model_fields.get("kind"), "default", None) for s in schemas}
        if part in fields:
            here, known = _members(fields[part].annotation), list(fields)
        elif part in tags and part not in (None, PydanticUndefined):
            here = [s for s in schemas if s.model_fields["kind"].default == part]
            continue
        elif inner and not _is_union_label(part):
            here, known = [m for a in inner for m in _members(a)], []
        elif _is_union_label(part) or part in {s.__name__ for s in schemas}:
            continue
        else:
            here, known = [], list(fields)
        path.append(str(part))
    return path, known


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation: a union's members, an Annotated's content, else itself."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [m for a in get_args(annotation) for m in _members(a)]
    return [annotation]


def _is_union_label(part: Any) -> bool:
    return isinstance(part, str) and bool(re.search(r"[\[\]()]|^(float|int|bool|str|none|literal)$", part))
