"""A config before it is checked: the JSON files merged, `--set` applied, what teachers share handed to each of them."""

import json
from pathlib import Path
from typing import Any

from kpu_fast.config_errors import kind_of


class ConfigError(ValueError):
    """A config that cannot be used. The message has one line per mistake."""


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The object in a JSON file, merged over that of the file which its `extends` names, relative to it.

    seen: the files that led to this one. Raises ConfigError, naming the file.
    """
    if path.resolve() in seen:
        raise ConfigError(f"{path}: extends: the files extend each other in a circle")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); expected a JSON file such as configs/random.json"
        ) from None
    except (ValueError, RecursionError) as error:  # bad JSON, bad UTF-8, or nested without end
        raise ConfigError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: found {kind_of(tree)} at the top; expected an object")
    if {"config", "commit", "versions"} <= tree.keys():  # what a run leaves: config.resolved.json
        try:
            tree = with_older_ways(tree["config"])
        except (AttributeError, KeyError, TypeError):
            raise ConfigError(f"{path}: looks like what a run records, but its config is damaged") from None
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: found {kind_of(base)}; expected the name of another config file")
    try:
        return _merge(read_tree(path.parent / base, (*seen, path.resolve())), tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error}") from None


def with_older_ways(tree: dict[str, Any]) -> dict[str, Any]:
    """A recorded config with the keys that the version which recorded it had not, as it did.

    Only those whose default is something else, or that are read as they are. Raises KeyError, TypeError or
    AttributeError where it is none.
    """
    if tree["objective"].setdefault("recipe", "kpu") == "kpu":
        tree["objective"].setdefault("centre", False)
    for teacher in tree["teachers"].values():
        teacher["data"].setdefault("aspect_ratio_grouping", teacher["data"].get("fit") != "pad")
        teacher["data"].setdefault("buckets", [])
    return tree


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key!r} appears twice in one object")
    return dict(pairs)


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    return base | {key: _merge(base.get(key), value) for key, value in over.items()}


def settle_teachers(tree: dict[str, Any]) -> None:
    """Leave out teachers set to null, hand the shared source to those that have none, and `images_of` its data."""
    teachers, source = tree.get("teachers"), tree.get("source")
    if not isinstance(teachers, dict):
        return
    tree["teachers"] = teachers = {name: teacher for name, teacher in teachers.items() if teacher is not None}
    found = {name: teacher for name, teacher in teachers.items() if isinstance(teacher, dict)}
    for teacher in found.values():
        data = teacher.get("data")
        if isinstance(data, dict) and isinstance(source, str | list) and teacher.get("images_of") is None:
            data.setdefault("source", source)
    for name, teacher in found.items():
        if (other := teacher.get("images_of")) is not None:
            teacher["data"] = _data_of(name, teacher.get("data"), other, found)


def _data_of(name: str, own: Any, other: Any, teachers: dict[str, dict[str, Any]]) -> Any:
    """The data of `other`, on whose images `name` teaches. `own`: what `name` says itself, which may say no other."""
    key, having = f"teachers.{name}.images_of", [n for n, its in teachers.items() if its.get("images_of") is None]
    if other not in having:
        names = " or ".join(map(json.dumps, having)) or "none is left"
        raise ConfigError(f"{key}: found {json.dumps(other)}; expected a teacher with images of its own: {names}")
    data = teachers[other].get("data")
    if own is not None and not isinstance(own, dict):
        raise ConfigError(f"teachers.{name}.data: found {json.dumps(own)} with {key}; leave data out")
    for field, value in (own or {}).items():
        if not isinstance(data, dict) or field not in data or data[field] != value:
            raise ConfigError(
                f'teachers.{name}.data.{field}: found {json.dumps(value)}, but {key} is "{other}", whose images and '
                "batches it takes as they are; leave data out, or set it to null"
            )
    return data


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set what `path.to.key=value` says, in place. Raises ConfigError where there is no such place."""
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {override}: expected path.to.key=value, e.g. --set optimizer.lr=1e-4")
    targets = [tree]
    for i, key in enumerate(keys[:-1]):
        targets = [child for target in targets for child in _children(target, key)]
        if not targets or not all(isinstance(target, dict) for target in targets):
            raise ConfigError(f"--set {override}: {'.'.join(keys[: i + 1])} is not an object with keys below it")
    for target in targets:
        for key in _keys(target) if keys[-1] == "*" else [keys[-1]]:
            target[key] = _value_of(text)  # its own for each target: a later override may be of one of them


def _value_of(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _children(target: dict[str, Any], key: str) -> list[Any]:
    if key == "*":
        return [target[key] for key in _keys(target)]
    if target.get(key) is None:
        target[key] = {}
    return [target[key]]


def _keys(target: dict[str, Any]) -> list[str]:
    return [key for key, value in target.items() if value is not None]  # a teacher that is left out stays left out
