"""Plain values to a model; its first mistake told in one line, with the nearest right key."""

from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dsno_cluster.config.base import Strict
from dsno_cluster.config.paths import FOLDER
from dsno_cluster.config.trajectories import TimeGrid
from dsno_cluster.errors import UserError

Model = TypeVar("Model", bound=Strict)


def validate(model: type[Model], data: Any, where: str, folder: Path = Path()) -> Model:
    """`data` (plain YAML values) as `model`; UserError with one line for the first mistake.

    Relative paths become those of `folder`, by default the working directory.
    """
    try:
        # JSON mode is strict about types, yet takes lists for tuples and whole numbers for floats
        return model.model_validate_json(json.dumps(data), context={FOLDER: folder})
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, model)}") from None
    except TypeError as error:
        raise UserError(
            f"{where}: a value is not plain YAML text, number, list or mapping ({error})"
        ) from None


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake, as `key: what was found, what would be right`."""
    errors = error.errors(include_url=False)
    first = errors[0]
    keys = _written_keys(first["loc"])
    for other in errors[1:]:  # of a union's alternatives, the one that agrees furthest with what was written
        deeper = _written_keys(other["loc"])
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


def _written_keys(location: Sequence[int | str]) -> list[int | str]:
    """The keys that a person wrote: without the names of a union's alternatives that pydantic adds."""
    keys = [p for p in location if isinstance(p, int) or (re.fullmatch(r"\w+", p) and p != TimeGrid.__name__)]
    return keys[:-1] if keys and keys[-1] in ("tuple", "float", "int", "str") else keys


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
    """'; did you mean X?', looking first among `choices`, then at every key of `also`."""
    for pool in (choices, _all_keys(also) if also else ()):
        close = difflib.get_close_matches(word, pool, n=1, cutoff=0.6)
        if close:
            return f"; did you mean {close[0]}?"
    last = word.rsplit(".", 1)[-1]
    ends = difflib.get_close_matches(last, [c.rsplit(".", 1)[-1] for c in choices], n=1, cutoff=0.6)
    if ends:
        same = [choice for choice in choices if choice.rsplit(".", 1)[-1] == ends[0]]
        return f"; did you mean {' or '.join(same)}?"
    return f"; known here: {', '.join(c.rsplit('.', 1)[-1] for c in choices[:12])}" if choices else ""
