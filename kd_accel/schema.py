"""What a config is: frozen sections, every key checked, all mistakes told at once, a line each in the user's words.

config_files.py reads the mappings of YAML files. Imports no torch.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails


class ConfigError(ValueError):
    """The user's mistake: one line per problem, printed without a traceback, exit code 2."""


class LocalError(ConfigError):
    """A user's mistake that may show on one rank alone, like an unreadable run of samples: that rank prints it."""


class LostPeerError(LocalError):
    """Another process is gone or does not answer; this one prints it, and only that one could say why."""


class Schema(BaseModel):
    """Base of every YAML section: frozen, unknown keys are errors, the string below a field is its help text."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_as_number(cls, values: Any) -> Any:
        """pydantic would read `batch_size: true` as 1; as text it is refused with its path."""
        if not isinstance(values, dict):
            return values
        types = {name: set(alternatives(field.annotation)) for name, field in cls.model_fields.items()}
        numbers = [name for name, allowed in types.items() if bool not in allowed and allowed & {int, float}]
        return {k: str(v).lower() if isinstance(v, bool) and k in numbers else v for k, v in values.items()}


S = TypeVar("S", bound=Schema)


def without_nulls(values: Any) -> Any:
    """Of a mapping what is not null: with null a later file drops an entry of an earlier one."""
    return {key: v for key, v in values.items() if v is not None} if isinstance(values, dict) else values


def check_one_given(**values: Any) -> None:
    """Raises ValueError unless exactly one of the keys has a value, with those that have one."""
    given, names = [name for name, value in values.items() if value], list(values)
    if len(given) != 1:
        what = f"; {' and '.join(given)} are given: set all but one to null" if given else ""
        raise ValueError(f"give exactly one of {', '.join(names[:-1])} and {names[-1]}{what}")


def validate(schema: type[S], values: dict) -> S:
    """`values` as a `schema`; raises ConfigError with every problem at once."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(schema, error.errors()))) from None


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool | None]:
    """Nested mappings as one with dotted keys: {"optim": {"lr": 1}} -> {"optim.lr": 1}; lists become text."""
    result: dict[str, str | int | float | bool | None] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = str(value) if isinstance(value, dict | list) else value
    return result


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """A hint at the nearest of the `known` words, else all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean '{near[0]}'?" if near else f"; one of {', '.join(known)}" if known else ""


def one_line(error: Exception, limit: int = 300) -> str:
    """What a library says, as the end of a message of ours; `limit` characters of it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]} ..."


def alternatives(annotation: Any) -> list[Any]:
    """The types that an annotation allows: a union's members, an Annotated's content, else itself."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [m for a in get_args(annotation) for m in alternatives(a)]
    return [annotation]


def kind_of(schema: type[Schema]) -> str | None:
    """The `kind` by which a YAML mapping chooses this schema, None for a plain section."""
    return schema.model_fields["kind"].default if "kind" in schema.model_fields else None


_WANTED = {  # by the first word of pydantic's name for the problem
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "list": "a list [a, b, ...]",
    "tuple": "a list [a, b, ...]",
    "dict": "a mapping of keys to values",
    "model": "a mapping of keys to values",
}


def _explain(schema: type[Schema], problems: list[ErrorDetails]) -> list[str]:
    """One line per place: path, what is wrong, the value, and a hint."""
    located = [(*_locate(schema, problem["loc"]), problem) for problem in problems]
    lines: dict[tuple, tuple[str, str]] = {}  # path -> what is wrong, value and hint
    for path, parents, here, problem in located:
        # Problems further inside mean that another member of a union fitted this place better.
        if any(len(other) > len(path) and other[: len(path)] == path for other, *_ in located):
            continue
        wrong = _wrong(path, here, problem)
        if path in lines:
            wrong = f"{lines[path][0]} or {wrong.removeprefix('should be ')}"
        lines[path] = wrong, _given(problem) + _hint(path, parents, here, problem)
    return [": ".join(filter(None, [".".join(path), wrong + rest])) for path, (wrong, rest) in lines.items()]


def _wrong(path: tuple[str, ...], here: list[Any], problem: ErrorDetails) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return "unknown key"
        case "union_tag_invalid":
            return f"unknown kind '{problem['ctx']['tag']}'"
        case "union_tag_not_found":
            return "the key 'kind' is missing" if isinstance(problem["input"], dict) else "should be a mapping"
        case "missing" if path[-1].isdecimal():
            return "this item of the list is missing"
        case "missing":
            needed = [name for a in _schemas(here) for name, field in a.model_fields.items() if field.is_required()]
            return f"this section is needed, with {', '.join(needed)}" if needed else "this key is needed"
        case kind if wanted := re.match(rf"({'|'.join(_WANTED)})_(type|parsing|from_float|attributes_type)$", kind):
            return f"should be {_WANTED[wanted[1]]}"
    message = problem["msg"].removeprefix("Value error, ").replace(" after validation", "")
    return re.sub(r"^(Input|String|Dictionary|List|Tuple) should", "should", message)


def _given(problem: ErrorDetails) -> str:
    """The value, unless it is missing, already named, or a whole section that fails as one."""
    match problem["type"], problem["input"]:
        case (("missing" | "union_tag_invalid"), _) | ("value_error", dict()):
            return ""
    shown = json.dumps(problem["input"], ensure_ascii=False, default=str)
    return f" (got {shown if len(shown) <= 80 else shown[:77] + '...'})"


def _hint(path: tuple[str, ...], parents: list[Any], here: list[Any], problem: ErrorDetails) -> str:
    match problem["type"], problem["input"]:
        case "extra_forbidden", _:
            return did_you_mean(path[-1], [name for schema in parents for name in schema.model_fields])
        case "union_tag_invalid", _:
            return did_you_mean(str(problem["ctx"]["tag"]), _kinds(here))
        case "union_tag_not_found", _:
            return did_you_mean("", _kinds(here))
        case "string_type", int() | float():
            return "; put it in quotes"
        case (("list_type" | "tuple_type"), dict()):
            return "; items of a list cannot be set one by one, give the whole list"
    return ""


def _locate(schema: type[Schema], location: tuple) -> tuple[tuple[str, ...], list[Any], list[Any]]:
    """The path as the user wrote it, the schemas that hold its last part, and the annotations of the value there.

    pydantic's location also names the member of a union that it tried; the user never wrote that, so it is dropped.
    """
    path: tuple[str, ...] = ()
    parents: list[Any] = []
    here: list[Any] = [schema]
    for part in location:
        schemas = _schemas(here)
        fields = {name: field for s in schemas for name, field in s.model_fields.items()}
        items = [get_args(a)[-1] for a in here if get_origin(a) in (dict, list, tuple)]
        if len(schemas) > 1 and (chosen := [s for s in schemas if kind_of(s) == part]):
            here = chosen
            continue
        if part in fields:
            inside = alternatives(fields[part].annotation)
        elif items and (len(here) == 1 or not _is_union_label(part)):
            inside = [member for item in items for member in alternatives(item)]
        elif _is_union_label(part):
            continue
        else:
            inside = []  # a key that no schema knows
        path, parents, here = (*path, str(part)), schemas, inside
    return path, parents, here


def _schemas(annotations: list[Any]) -> list[type[Schema]]:
    return [a for a in annotations if isinstance(a, type) and issubclass(a, Schema)]


def _kinds(annotations: list[Any]) -> list[str]:
    return [kind for s in _schemas(annotations) if (kind := kind_of(s))]


def _is_union_label(part: Any) -> bool:
    return isinstance(part, str) and bool(re.search(r"[\[\]()]|^(float|int|bool|str|none|literal)$", part))
