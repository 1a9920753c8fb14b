"""pydantic's errors in the words of a config file: each names the key, what was found and what would do."""

from __future__ import annotations

import difflib
import json
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError

# key → the branches of its union
_BRANCHES = {"source": ("str", "list[str]"), "objective": ("kpu", "gkd")}


def explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per mistake in values for `model`: the key, what was found, what would do."""
    lines = []
    for item in error.errors(include_url=False):
        loc = _keys(item["loc"])
        key, found = ".".join(str(part) for part in loc), kind_of(item.get("input"))
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{_suggest(model, item['loc'])}")
        elif item["type"] == "missing" and isinstance(loc[-1], int):  # the second of two numbers
            lines.append(f"{key.rpartition('.')[0]}: found {found}; it should be a list of two numbers")
        elif item["type"] in ("tuple_type", "too_long"):
            lines.append(f"{key}: found {found}; it should be a list of two numbers")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing; it has no default")
        elif item["type"] == "string_pattern_mismatch":  # Name is the only one with a pattern
            lines.append(f"{key}: found {found}; it should be letters, digits, _ and -, the first a letter or digit")
        elif item["type"] == "impossible":
            lines.append(f"{key}.{item['msg']}" if key else item["msg"])
        else:
            what = _lower_first(item["msg"].replace("Input should", "it should"))
            if lines and lines[-1].startswith(f"{key}: found"):  # the next branch of a union
                lines[-1] += f" or {what.removeprefix('it should be ')}"
            else:
                lines.append(f"{key}: found {found}; {what}")
    return lines


def _keys(loc: tuple[Any, ...]) -> list[Any]:
    # pydantic names the branch as if it were a key.
    pairs = zip((None, *loc), loc, strict=False)
    return [key for before, key in pairs if key != "[key]" and key not in _BRANCHES.get(before, ())]


def _suggest(model: type[BaseModel], loc: tuple[Any, ...]) -> str:
    fields = _fields_at(model, loc[:-1])
    close = difflib.get_close_matches(str(loc[-1]), fields, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known here: {', '.join(fields)}"


def _fields_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    for part, branch in zip(loc, (*loc, None)[1:], strict=True):
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        for nested in _models_in(annotation):
            if part not in _BRANCHES or branch in typing.get_args(nested.model_fields["recipe"].annotation):
                model = nested
    return list(model.model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType | types.GenericAlias) or typing.get_origin(annotation):
        return [model for arg in typing.get_args(annotation) for model in _models_in(arg)]
    return []


def kind_of(value: Any) -> str:
    """A value as JSON, cut short, and what kind it is."""
    text = json.dumps(value, default=str)
    kind = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "an integer", float: "a number"}
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({kind.get(type(value), 'null')})"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
