"""The types of paths in a config.

When a config is loaded, `~` and `$VARIABLES` are expanded and relative paths become absolute, so that a
process that starts in another folder or on another node finds the same files. In addresses (`s3://...`) only
variables are expanded; names (`package:NAME`) stay as they are. Relative paths are relative to the working
directory, or to the `folder` passed to `validate`.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from dsno_cluster.errors import UserError
from dsno_cluster.files import in_home, too_long
from dsno_cluster.storage import absolute_address, split_address

FOLDER = "folder"  # key of pydantic's validation context: the folder that relative paths are relative to
NAMED_IMAGES = ("data", "held-out")  # references that are not paths
_FACTORY = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def resolved(path: str, info: ValidationInfo) -> str:
    """A path made absolute, or an address, with its variables expanded. Raises ValueError."""
    if path.startswith("package:"):
        return path
    try:
        found = absolute_address(_with_variables(path), _folder(info))
    except UserError as error:
        raise ValueError(str(error)) from None  # pydantic adds the key's name
    if problem := too_long(found):
        raise ValueError(problem)
    return found


def _root(path: str, info: ValidationInfo) -> str:
    root = resolved(path, info)
    try:
        if "://" in root:
            split_address(root)
    except UserError as error:
        raise ValueError(str(error)) from None
    return root


def _local(path: str, info: ValidationInfo) -> str:
    if "://" in (found := resolved(path, info)):
        raise ValueError(f"{found}: must be a path on a disk")
    return found


def _teacher(path: str, info: ValidationInfo) -> str:
    is_factory = _FACTORY.fullmatch(path) and not (_folder(info) / path).exists()
    return path if is_factory or path.startswith("closed-form:") else resolved(path, info)


def _reference(path: str, info: ValidationInfo) -> str:
    return path if path in NAMED_IMAGES else resolved(path, info)


def _node_path(path: str, info: ValidationInfo) -> str:
    return path if "$" in path else _local(path, info)


def _image(path: str, info: ValidationInfo) -> str:
    return _local(path, info) if path.startswith(("/", ".", "~", "$")) else path


def _mount(mount: str, info: ValidationInfo) -> str:
    path, *inside = mount.split(":")
    if "," in mount or len(inside) > 2 or inside[1:] not in ([], ["ro"], ["rw"]):
        raise ValueError(f"{mount!r} is not PATH, PATH:INSIDE or PATH:INSIDE:ro")
    if inside and not os.path.isabs(inside[0]):
        raise ValueError(f"{mount!r}: {inside[0]!r} does not begin with /")
    return ":".join([_local(path, info), *inside])


LocalPath = Annotated[str, AfterValidator(_local)]
"""A file or folder, or `package:NAME`."""

StorageRoot = Annotated[str, AfterValidator(_root)]
"""A folder, or s3://bucket/prefix."""

TeacherPath = Annotated[str, AfterValidator(_teacher)]
"""A folder, a file or an address; or package.module:function or closed-form:NAME, which are not paths."""

ReferencePath = Annotated[str, AfterValidator(_reference)]
"""Files, a folder or an address; or one of NAMED_IMAGES."""

ImagesPath = Annotated[str, AfterValidator(resolved)]
"""A file, a folder or an address; a name of tars may have `*`, `?`, `{a,b}` and `{000..146}` in it."""

ContainerImage = Annotated[str, AfterValidator(_image)]
"""A file or folder, or an address in the words of a container runtime, which stays as it is."""

Mount = Annotated[str, AfterValidator(_mount)]
"""What a container sees of its node: a path, PATH:INSIDE or PATH:INSIDE:ro."""

NodePath = Annotated[str, AfterValidator(_node_path)]
"""A folder whose `$VARIABLES` belong to the node that uses it: they are expanded only by `on_this_node`."""


def on_this_node(path: str, key: str) -> Path:
    """A `NodePath` with this node's variables.

    Raises UserError, naming the `key`, if a variable is not set here.
    """
    try:
        return Path(in_home(_with_variables(path))).absolute()
    except (UserError, ValueError) as error:
        raise UserError(f"{key}: {error}") from None


def is_file_path(path: str) -> bool:
    """Whether a resolved path or address refers to files, not to something inside Python."""
    return "://" in path or os.path.isabs(path)


def _folder(info: ValidationInfo) -> Path:
    return Path((info.context or {}).get(FOLDER, ""))


def _with_variables(path: str) -> str:
    for name in re.findall(r"\$(\w+)|\$\{(\w+)\}", path):
        if os.environ.get("".join(name), "") == "":
            kind = "is empty here" if "".join(name) in os.environ else "is not set here"
            raise ValueError(f"{path} names a variable that {kind}: ${''.join(name)}")
    if shell := re.search(r"\$(\(|\{(?!\w+\})).*", path):
        raise ValueError(f"{path}: only $NAME and ${{NAME}} are expanded, not {shell[0]}")
    return os.path.expandvars(path)
