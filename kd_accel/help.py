"""A config schema as help text: every key with its type, its limits, its default and the string below the field."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from kd_accel.schema import Schema, alternatives, kind_of

WIDTH = 100  # columns

_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", Any: "anything", NoneType: "null"}
_LIMITS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "min_length": "at least {}", "pattern": "like {}"}


def explain(schema: type[Schema]) -> str:
    """Every key of `schema` and of its sections, then the options of each `kind` that a key may have."""
    kinds: dict[type[Schema], str] = {}  # schema -> the key that was met first with it
    lines = list(_fields(schema, "", kinds))
    described: set[type[Schema]] = set()
    # a kind's own keys may bring further kinds
    while todo := [kind for kind in kinds if kind not in described]:
        kind = todo[0]
        described.add(kind)
        lines += ["", f"kind: {kind_of(kind)}, as in {kinds[kind]}", *_wrap(kind.__doc__, indent=6)]
        lines += _fields(kind, "", kinds)
    return "\n".join(lines)


def _fields(schema: type[Schema], prefix: str, kinds: dict[type[Schema], str]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        if name == "kind":
            continue
        path, members = prefix + name, alternatives(field.annotation)
        if values := [get_args(m)[1] for m in members if get_origin(m) is dict and get_args(m)[1] is not Any]:
            path, members = f"{path}.NAME", alternatives(values[0])
        sections = _schemas(members, with_kind=False)
        if sections and not prefix:
            yield ""
        yield from _wrap(f"{path}: {_type(members)}{_limits(field)}{_default(field)}", indent=2, hanging=8)
        yield from _wrap(field.description or " ".join(s.__doc__ for s in sections), indent=6)
        kinds.update((kind, path) for kind in _schemas(members, with_kind=True) if kind not in kinds)
        for section in sections:
            yield from _fields(section, f"{path}.", kinds)


def _type(members: list[Any]) -> str:
    """`members` in the user's words; kinds are named together, null comes last."""
    plain = [_word(m) for m in members if m is not NoneType and m not in _schemas(members, with_kind=True)]
    kinds = " | ".join(kind_of(s) for s in _schemas(members, with_kind=True))
    choices = plain + [f"a mapping with kind: {kinds}"] * bool(kinds) + ["null"] * (NoneType in members)
    return " or ".join(choices)


def _word(annotation: Any) -> str:
    inner = [_type(alternatives(a)) for a in get_args(annotation) if get_origin(annotation) is not Literal]
    match get_origin(annotation):
        case origin if origin is Literal:
            return " | ".join(map(str, get_args(annotation)))
        case origin if origin is list:
            return f"list of {inner[0]}"
        case origin if origin is tuple:
            return f"[{', '.join(inner)}]"
        case origin if origin is dict:
            return "mapping"
    return _WORDS.get(annotation, "section")


def _limits(field: FieldInfo) -> str:
    found = [(form, getattr(rule, name, None)) for rule in field.metadata for name, form in _LIMITS.items()]
    return "".join(f", {form.format(limit)}" for form, limit in found if limit is not None)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return " (needed)"
    if isinstance(field.default, Schema):
        return ""
    return f" (default: {json.dumps(field.default)})"


def _schemas(members: list[Any], *, with_kind: bool) -> list[type[Schema]]:
    found = [m for m in members if isinstance(m, type) and issubclass(m, Schema)]
    return [schema for schema in found if bool(kind_of(schema)) == with_kind]


def _wrap(text: str, *, indent: int, hanging: int | None = None) -> list[str]:
    first, rest = " " * indent, " " * (indent if hanging is None else hanging)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
