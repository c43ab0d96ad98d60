"""The base classes and number types of the config's models."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]
# tf32: float32, but a GPU may round the inputs of matrix products and convolutions to TensorFloat-32
Precision = Literal["float32", "tf32", "bfloat16", "float16"]
# in the upper-case name of a key or a variable: its value is a secret
SECRETS = r"SECRET|TOKEN(?!IZER)|PASSW|_PWD$|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIAL"
StrictNumber = int | float  # kept as written: 1 and 1.0 are different bytes in JSON


def _sha256_start(digits: str) -> str:
    if not re.fullmatch("[0-9a-f]{8,64}", digits):
        raise ValueError(f"{digits!r} is not 8 to 64 digits of 0-9 and a-f")
    return digits


Sha256Start = Annotated[str, AfterValidator(_sha256_start)]


class Strict(BaseModel):
    """Frozen; refuses unknown keys, values of another type and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def later(default: Any, **field: Any) -> Any:
    """A field with a default that was added to a `Named` model after its first release."""
    return Field(default, json_schema_extra={"later": True}, **field)


def renamed(name: str, older: str, **field: Any) -> Any:
    """The field `name` of a `Named` model, which was called `older` at first: read by either name, dumped by the older.

    For a key of the config, `renamed.py` says how long people may use the older name.
    """
    return Field(validation_alias=AliasChoices(name, older), json_schema_extra={"dumped_as": older}, **field)


class Named(Strict):
    """A model whose canonical hash identifies what users made, such as a data set.

    Its dump must not change in a new version. A field that is added later (`later`) is omitted from the dump
    while it has its default, which must mean what earlier versions did.
    """

    @model_serializer(mode="wrap")
    def _without_later_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if not isinstance(extra, dict) or name not in content:
                continue
            if extra.get("later") and getattr(self, name) == field.default:
                content.pop(name)
            if dumped_as := extra.get("dumped_as"):
                content[str(dumped_as)] = content.pop(name)
        return content
