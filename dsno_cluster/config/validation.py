"""Validation of plain values as a model; reports the first mistake in one line, with the nearest valid key."""

from __future__ import annotations

import itertools
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from dsno_cluster.config.base import Strict
from dsno_cluster.config.paths import FOLDER
from dsno_cluster.errors import UserError, closest
from dsno_cluster.yaml_text import Written

Model = TypeVar("Model", bound=Strict)


def validate(model: type[Model], data: Any, where: str, folder: Path = Path()) -> Model:
    """`data` (YAML values, plain or `Written`) as a `model`. Raises UserError, in one line, for the first mistake.

    Relative paths are relative to `folder`, by default the working directory.
    """
    data = _as_asked(data, model)
    try:
        # JSON mode is strict about types, but accepts lists for tuples and whole numbers for floats
        return model.model_validate_json(json.dumps(data), context={FOLDER: folder})
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, model, data)}") from None
    except TypeError as error:
        raise UserError(
            f"{where}: a value is not plain YAML text, number, list or mapping ({error})"
        ) from None


def _as_asked(value: Any, annotation: Any) -> Any:
    """`value` with plain values for those that are `Written`: their texts where a type asks for text."""
    kinds = list(_kinds(annotation))
    if isinstance(value, Written):
        kind, number = type(value.value), value.value
        if kind in kinds or (kind is int and float in kinds):
            return number
        if str in kinds:
            return value.text
        whole = int in kinds and isinstance(number, float) and number.is_integer()  # such as 1e6
        return int(number) if whole else number
    if isinstance(value, list):
        items = next((typing.get_args(k) for k in kinds if typing.get_origin(k) is tuple), (Any, ...))
        each = itertools.repeat(items[0]) if items[-1] is ... else (*items, *([Any] * len(value)))
        return [_as_asked(item, kind) for item, kind in zip(value, each, strict=False)]
    if isinstance(value, dict):
        values = next((typing.get_args(k)[1] for k in kinds if typing.get_origin(k) is dict), Any)
        fields: dict[str, FieldInfo] = next((k.model_fields for k in kinds if _is_model(k)), {})
        asked = {key: field.annotation for key, field in fields.items()}
        return {key: _as_asked(item, asked.get(key, values)) for key, item in value.items()}
    return value


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types that a value may have."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        yield from _kinds(typing.get_args(annotation)[0])
    elif origin is typing.Literal:
        yield from map(type, typing.get_args(annotation))
    elif origin in (typing.Union, types.UnionType):
        for alternative in typing.get_args(annotation):
            yield from _kinds(alternative)
    else:
        yield annotation


def _one_line(error: ValidationError, model: type[BaseModel], data: Any) -> str:
    """The first mistake, as `key: what was found, what would be right`."""
    errors = error.errors(include_url=False)
    # a key that is missing may be the one that was misspelt
    unknown = [e for e in errors if e["type"] == "extra_forbidden"]
    first = unknown[0] if errors[0]["type"] == "missing" and unknown else errors[0]
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
    if first["type"] == "value_error":  # one of ours; it may begin with a path
        return f"{where}: {message}" if where else message
    return f"{where}: {message[0].lower()}{message[1:]}, found {json.dumps(first['input'])[:80]}"


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
        child = next(filter(_is_model, _kinds(field.annotation)), None) if field else None
        if child is None:
            return None
        model = child
    return model


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _all_keys(model: type[BaseModel], prefix: Sequence[int | str] = ()) -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(".".join([*map(str, prefix), name]))
        for child in filter(_is_model, _kinds(field.annotation)):
            keys += _all_keys(child, [*prefix, name])
    return keys


def nearest(word: str, choices: Sequence[str], also: type[BaseModel] | None = None) -> str:
    """'; did you mean X?', searching `choices` first, then every key of `also`."""
    pools = (choices, _all_keys(also) if also else ())
    for pool in pools:  # first the same word in another style: batch-size, BATCH_SIZE, batchSize
        for part in (str, _last):
            if same := [choice for choice in pool if _letters(part(choice)) == _letters(part(word))]:
                return f"; did you mean {' or '.join(same)}?"
    for pool in pools:
        if near := closest(word, pool):
            return f"; did you mean {near}?"
    if end := closest(_last(word), map(_last, choices)):
        return f"; did you mean {' or '.join(choice for choice in choices if _last(choice) == end)}?"
    return f"; known here: {', '.join(map(_last, choices[:12]))}" if choices else ""


def _last(key: str) -> str:
    return key.rsplit(".", 1)[-1]


def _letters(key: str) -> str:
    return re.sub("[-_]", "", key).lower()
