"""Keys of where results live: storage, run."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, Field

from dsno_cluster.config.base import FolderPath, Strict
from dsno_cluster.errors import UserError
from dsno_cluster.storage import endpoint_problem, split_address


def _root(value: str) -> str:
    try:
        if "://" in value:
            split_address(value)
    except UserError as error:
        raise ValueError(str(error)) from None  # which pydantic gathers with the key's name
    return os.path.expanduser(value)


def _endpoint(value: str) -> str:
    if problem := endpoint_problem(value):
        raise ValueError(problem)
    return value


class StorageConfig(Strict):
    """Where shared results live."""

    root: Annotated[str, AfterValidator(_root)] = Field("runs", description="a folder, or s3://bucket/prefix")
    endpoint_url: Annotated[str, AfterValidator(_endpoint)] | None = Field(
        None, description="S3 endpoint; credentials come from the usual AWS sources"
    )


class RunConfig(Strict):
    dir: FolderPath | None = Field(
        None,
        description="local folder for resume state, logs, metrics; default: storage.root, or ./runs/<name>",
    )
