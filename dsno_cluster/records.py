"""Records: the JSON files of this project, each a frozen model that its readers and writers share.

A record declares `schema_version: Literal[1] = 1`, and a file of another version is refused. Within a
version, keys are only added, with defaults: a reader ignores keys that it does not know, so an older program
can read newer files, and it fills in keys that an older file lacks.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

from dsno_cluster.errors import UserError, WorkError

Values = dict[str, JsonValue]  # a JSON object whose keys are not ours


class Record(BaseModel):
    """Frozen; ignores unknown keys. Floats may be NaN or infinite, as Python's JSON writes them."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")

    def values(self) -> Values:
        """As plain JSON values."""
        return self.model_dump(mode="json")


class SparseRecord(Record):
    """A record that omits optional keys whose value is None or empty."""

    @model_serializer(mode="wrap")
    def _only_known(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        needed = {name for name, field in type(self).model_fields.items() if field.is_required()}
        return {
            key: value
            for key, value in dump(self).items()
            if key in needed or value not in (None, [], (), {})
        }


AnyRecord = TypeVar("AnyRecord", bound=Record)


def read_record(
    model: type[AnyRecord], data: bytes, where: str, error: type[UserError] | type[WorkError] = UserError
) -> AnyRecord:
    """The record in the JSON `data` of the file `where`.

    Raises `error`, in one line, if `data` is not such a record.
    """
    try:
        return model.model_validate_json(data)
    except ValidationError as problem:
        versions = [e["input"] for e in problem.errors() if e["loc"] == ("schema_version",)]
        if versions:
            known = model.model_fields["schema_version"].default
            raise error(
                f"{where}: schema version {versions[0]}; this dsno-cluster reads version {known}"
            ) from None
        raise error(f"{where}: not {_kind(model)} ({first_mistake(problem)})") from None


def record_bytes(record: Record) -> bytes:
    """The record as indented JSON, its keys in the model's order."""
    return (json.dumps(record.values(), indent=2) + "\n").encode()


def canonical_hash(content: Mapping[str, JsonValue]) -> str:
    """A hash of 16 hexadecimal digits, equal for equal values whatever the order of their keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def first_mistake(problem: ValidationError) -> str:
    """The first mistake that pydantic found, as `key: what is wrong`."""
    first = problem.errors(include_url=False, include_input=False)[0]
    key = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" if key else message


def _kind(model: type[Record]) -> str:
    """The model's name in words: TrainingState is a training state."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", model.__name__).lower()
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
