"""Config keys of the trackers of a training: training.wandb."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from dsno_cluster.config.base import SECRETS, Strict

_NO_KEY = (
    "wandb's key is never written into a config; run `wandb login`, or set WANDB_API_KEY in the environment"
)
_LIKE_A_KEY = r"[0-9a-f]{40}|wandb_v\d+_\w+"


def _no_key(name: str) -> str:
    if re.search(_LIKE_A_KEY, name):
        raise ValueError(f"this looks like a key: {_NO_KEY}")
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{name!r}: letters, digits, `.`, `_` and `-` only")
    return name


Name = Annotated[str, AfterValidator(_no_key)]


class Wandb(Strict):
    """The run of Weights & Biases that a training is logged to. Its key comes from `wandb login` or WANDB_API_KEY."""

    project: Name = Field(description="the project")
    entity: Name | None = Field(None, description="the user or team; null: wandb's default")
    mode: Literal["offline", "online"] = Field(
        "offline",
        description="offline: into a folder beside metrics.jsonl, for `wandb sync`; online: to wandb's server",
    )

    @model_validator(mode="before")
    @classmethod
    def _has_no_key(cls, values: Any) -> Any:
        # before any other message could repeat the value
        if not isinstance(values, dict):
            raise ValueError("not a section; write {project: NAME}, or null")
        for name in values:
            if re.search(SECRETS, str(name).upper()):
                raise ValueError(f"{name}: {_NO_KEY}")
        return values
