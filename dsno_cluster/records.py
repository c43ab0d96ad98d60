"""The JSON that we write into files, as typed models with a schema version.

A file of an older version is read with the defaults of what it lacks; keys that this version does not know are kept.
"""

from __future__ import annotations

import json
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

Values = dict[str, JsonValue]  # a JSON object whose keys are another's business


class Record(BaseModel):
    """What one file, or one line of a file, holds. Files without `schema_version` are of the first."""

    model_config = ConfigDict(frozen=True, extra="allow")
    newest: ClassVar[int] = 1  # the schema version that is written, and the newest that is read
    schema_version: int = 1

    def values(self) -> Values:
        """What is known, as plain JSON values, `schema_version` last; what is None or empty is left out."""
        known: Values = self.model_dump(mode="json", exclude={"schema_version"})
        said: Values = {key: value for key, value in known.items() if value not in (None, [], {})}
        return {**said, "schema_version": self.newest}


AnyRecord = TypeVar("AnyRecord", bound=Record)


def parse_record(model: type[AnyRecord], text: bytes | str) -> AnyRecord:
    """`text`, which is JSON, as a record. Raises ValueError of one line that says what is wrong with it."""
    try:
        record = model.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from None
    if record.schema_version > model.newest:
        raise ValueError(
            f"schema version {record.schema_version}, of a newer dsno-cluster; this one reads up to {model.newest}"
        )
    return record


def first_mistake(error: ValidationError) -> str:
    """The first mistake that pydantic found, as `key: what is wrong`."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return f"not JSON: {first['msg'].removeprefix('Invalid JSON: ')}"
    where = ".".join(map(str, first["loc"]))
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def to_json(record: Record, indent: int | None = None) -> str:
    return json.dumps(record.values(), indent=indent)
