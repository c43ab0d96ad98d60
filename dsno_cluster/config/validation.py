"""Validation of plain values as a model; reports the first mistake in one line, with the nearest valid key."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from dsno_cluster.config.base import Strict
from dsno_cluster.config.paths import FOLDER
from dsno_cluster.errors import UserError, closest

Model = TypeVar("Model", bound=Strict)


def validate(model: type[Model], data: Any, where: str, folder: Path = Path()) -> Model:
    """`data` (plain YAML values) as a `model`. Raises UserError, in one line, for the first mistake.

    Relative paths are relative to `folder`, by default the working directory.
    """
    try:
        # JSON mode is strict about types, but accepts lists for tuples and whole numbers for floats
        return model.model_validate_json(json.dumps(data), context={FOLDER: folder})
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, model, data)}") from None
    except TypeError as error:
        raise UserError(
            f"{where}: a value is not plain YAML text, number, list or mapping ({error})"
        ) from None


def _one_line(error: ValidationError, model: type[BaseModel], data: Any) -> str:
    """The first mistake, as `key: what was found, what would be right`."""
    errors = error.errors(include_url=False)
    first = errors[0]
    keys = _keys_of(first, data)
    for other in errors[1:]:  # among a union's alternatives, take the one that matches the input most deeply
        deeper = _keys_of(other, data)
        if len(deeper) > len(keys) and deeper[: len(keys)] == keys:
            first, keys = other, deeper
            break
    where = ".".join(map(str, keys))
    if first["type"] == "extra_forbidden":
        parent = _model_at(model, keys[:-1])
        hint = (
            nearest(where, _all_keys(model))
            if parent is None
            else nearest(where, _all_keys(parent, keys[:-1]), model)
        )
        return f"unknown key {where}{hint}"
    if first["type"] == "missing":
        return f"key {where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, found {json.dumps(first['input'])[:80]}"


def _keys_of(error: ErrorDetails, data: Any) -> list[int | str]:
    """Where in `data` an error is.

    Pydantic's location also names a union's alternatives, which are not in `data`.
    """
    keys: list[int | str] = []
    for part in error["loc"]:
        children = dict(enumerate(data)) if isinstance(data, list) else data
        if isinstance(children, dict) and part in children:
            keys.append(part)
            data = children[part]
    return [*keys, error["loc"][-1]] if error["type"] == "missing" else keys


def _model_at(model: type[BaseModel], keys: Sequence[int | str]) -> type[BaseModel] | None:
    for key in keys:
        field = model.model_fields.get(str(key))
        child = next((t for t in _types(field.annotation) if _is_model(t)), None) if field else None
        if child is None:
            return None
        model = child
    return model


def _types(annotation: Any) -> Iterable[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _all_keys(model: type[BaseModel], prefix: Sequence[int | str] = ()) -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(".".join([*map(str, prefix), name]))
        for child in _types(field.annotation):
            if _is_model(child):
                keys += _all_keys(child, [*prefix, name])
    return keys


def nearest(word: str, choices: Sequence[str], also: type[BaseModel] | None = None) -> str:
    """'; did you mean X?', searching `choices` first, then every key of `also`."""
    for pool in (choices, _all_keys(also) if also else ()):
        if near := closest(word, pool):
            return f"; did you mean {near}?"
    last = word.rsplit(".", 1)[-1]
    if end := closest(last, [c.rsplit(".", 1)[-1] for c in choices]):
        same = [choice for choice in choices if choice.rsplit(".", 1)[-1] == end]
        return f"; did you mean {' or '.join(same)}?"
    return f"; known here: {', '.join(c.rsplit('.', 1)[-1] for c in choices[:12])}" if choices else ""
