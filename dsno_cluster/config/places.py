"""Config keys of where results are kept: storage, run."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field

from dsno_cluster.config.base import Strict
from dsno_cluster.config.paths import LocalPath, StorageRoot
from dsno_cluster.storage import endpoint_problem


def _endpoint(value: str) -> str:
    if problem := endpoint_problem(value):
        raise ValueError(problem)
    return value


class StorageConfig(Strict):
    """Where shared results are kept."""

    root: StorageRoot = Field("runs", validate_default=True, description="a folder, or s3://bucket/prefix")
    endpoint_url: Annotated[str, AfterValidator(_endpoint)] | None = Field(
        None, description="the S3 server, if it is not Amazon's; credentials come from the usual AWS sources"
    )


class RunConfig(Strict):
    dir: LocalPath | None = Field(
        None,
        description="folder for resume state, logs and metrics; default: storage.root if that is a folder, else "
        "./runs/<name>",
    )
