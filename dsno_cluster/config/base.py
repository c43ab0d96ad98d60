"""What the models of the config share: strictness, and the types of their numbers."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


def _sha256_start(digits: str) -> str:
    if not re.fullmatch("[0-9a-f]{8,64}", digits):
        raise ValueError(f"{digits!r} is not 8 to 64 digits of 0-9 and a-f")
    return digits


Sha256Start = Annotated[str, AfterValidator(_sha256_start)]


class Strict(BaseModel):
    """Frozen; refuses unknown keys, values of another type and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
