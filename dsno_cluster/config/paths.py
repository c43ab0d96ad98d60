"""The types of paths in a config.

When a config is loaded, `~` and `$VARIABLES` are expanded and relative paths become absolute, so that a
process that starts in another folder or on another node finds the same files. Addresses (`s3://...`,
`package:NAME`) stay as they are. Relative paths are relative to the working directory, or to the `folder`
passed to `validate`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from dsno_cluster.errors import UserError
from dsno_cluster.storage import absolute_address, split_address

FOLDER = "folder"  # key of pydantic's validation context: the folder that relative paths are relative to
NAMED_IMAGES = ("data", "held-out")  # references that are not paths
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def resolved(path: str, info: ValidationInfo) -> str:
    """A path made absolute; an address as it is."""
    if "://" in path or path.startswith("package:"):
        return path
    return absolute_address(_expanded(path), _folder(info))


def _root(path: str, info: ValidationInfo) -> str:
    try:
        if "://" in path:
            split_address(path)
    except UserError as error:
        raise ValueError(str(error)) from None  # pydantic adds the key's name
    return resolved(path, info)


def _teacher(path: str, info: ValidationInfo) -> str:
    is_factory = _FACTORY.fullmatch(path) and not (_folder(info) / path).exists()
    return path if is_factory or path.startswith("closed-form:") else resolved(path, info)


def _reference(path: str, info: ValidationInfo) -> str:
    return path if path in NAMED_IMAGES else resolved(path, info)


def _node_path(path: str, info: ValidationInfo) -> str:
    return path if "$" in path else resolved(path, info)


LocalPath = Annotated[str, AfterValidator(resolved)]
"""A file or folder, or `package:NAME`."""

StorageRoot = Annotated[str, AfterValidator(_root)]
"""A folder, or s3://bucket/prefix."""

TeacherPath = Annotated[str, AfterValidator(_teacher)]
"""A folder, a file or an address; or package.module:function or closed-form:NAME, which are not paths."""

ReferencePath = Annotated[str, AfterValidator(_reference)]
"""Files, a folder or an address; or one of NAMED_IMAGES."""

NodePath = Annotated[str, AfterValidator(_node_path)]
"""A folder whose `$VARIABLES` belong to the node that uses it: they are expanded only by `on_this_node`."""


def on_this_node(path: str, key: str) -> Path:
    """A `NodePath` with this node's variables.

    Raises UserError, naming the `key`, if a variable is not set here.
    """
    try:
        return Path(_expanded(path)).absolute()
    except ValueError as error:
        raise UserError(f"{key}: {error}") from None


def is_file_path(path: str) -> bool:
    """Whether a resolved path or address refers to files, not to something inside Python."""
    return "://" in path or os.path.isabs(path)


def _folder(info: ValidationInfo) -> Path:
    return Path((info.context or {}).get(FOLDER, ""))


def _expanded(path: str) -> str:
    expanded = os.path.expanduser(os.path.expandvars(path))
    if unset := re.search(r"\$(\w+|\{\w+\})", expanded):
        raise ValueError(f"{path} names a variable that is not set here: {unset[0]}")
    return expanded
