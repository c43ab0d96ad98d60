"""Records: the JSON files that this project writes, each a frozen model that its readers and writers share.

A record that may change its meaning declares `schema_version: Literal[1] = 1`, and a file of another version is
refused. Within a version keys are only added, with defaults: a reader ignores those that it does not know, so that
an older program reads what a newer one wrote, and fills in those that an older file lacks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from dsno_cluster.errors import UserError, WorkError


class Record(BaseModel):
    """Frozen; ignores unknown keys. Floats may be NaN or infinite, as Python's JSON writes them."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(
    model: type[AnyRecord], data: bytes, where: str, error: type[UserError] | type[WorkError] = UserError
) -> AnyRecord:
    """The record that the JSON `data` of the file `where` holds. Raises `error`, in one line, if it holds another thing."""
    try:
        return model.model_validate_json(data)
    except ValidationError as problem:
        raise error(f"{where}: not {_kind(model)} ({_first_mistake(problem)})") from None


def record_bytes(record: Record, *, exclude_none: bool = False) -> bytes:
    """The record as indented JSON, its keys as the model declares them; `exclude_none` leaves those without a value out."""
    content = record.model_dump(mode="json", exclude_none=exclude_none)
    return (json.dumps(content, indent=2) + "\n").encode()


def _kind(model: type[Record]) -> str:
    """The model's name in words: TrainingState is a training state."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", model.__name__).lower()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _first_mistake(problem: ValidationError) -> str:
    first = problem.errors(include_url=False, include_input=False)[0]
    key = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def canonical_hash(content: Mapping[str, JsonValue]) -> str:
    """Sixteen hexadecimal digits; equal for equal values, whatever their order."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
