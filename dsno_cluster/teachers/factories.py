"""Teachers that a user's Python function makes."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsno_cluster.errors import UserError
from dsno_cluster.teachers.teacher import Teacher, plain

if TYPE_CHECKING:
    from torch import Tensor


def find_factory(path: str) -> tuple[str, str]:
    """Module name and the sha256 of its source; the working directory is searched last. Imports only parents."""
    module, _, _ = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: cannot be imported: {error}") from None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(f"{path}: there is no Python module {module} here or installed, and no such folder")
    return module, hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def teacher_from_factory(path: str, options: dict[str, Any]) -> Teacher:
    """Call `package.module:function` with the options. The result answers (x, t, labels) with x0.

    It has the attributes shape (C, H, W) and num_classes, and may have null_class, native_grid(steps), and
    network, where it is not itself a torch module.
    """
    from torch import nn

    module, source = find_factory(path)
    name = path.partition(":")[2]
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"{path}: cannot be imported: {error}") from None
    if not callable(function):
        raise UserError(f"{path}: {module} has no function {name}")
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise UserError(f"{path}: does not take the teacher options {sorted(options)}: {error}") from None
    made = function(**options)
    shape, classes = getattr(made, "shape", None), getattr(made, "num_classes", None)
    numbers = tuple(shape) if isinstance(shape, Sequence) else ()
    if not callable(made) or len(numbers) != 3 or not all(type(n) is int and n > 0 for n in numbers):
        raise UserError(f"{path}: must return a callable with shape (C, H, W), found shape {shape!r}")
    if type(classes) is not int or classes < 0:
        raise UserError(f"{path}: must return a callable with num_classes, 0 or more, found {classes!r}")

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        x0: Tensor = made(x, t_N, labels)
        if x0.shape != x.shape:
            raise UserError(f"{path}: answered shape {tuple(x0.shape)} for images {tuple(x.shape)}")
        return x0.to(x.dtype)

    network = made if isinstance(made, nn.Module) else getattr(made, "network", None)
    identity = factory_identity(path, source, options)
    null = getattr(made, "null_class", None)
    return Teacher(
        denoise,
        (numbers[0], numbers[1], numbers[2]),
        classes,
        null,
        identity,
        network,
        getattr(made, "native_grid", None),
    )


def factory_identity(path: str, source_sha256: str, options: dict[str, Any]) -> dict[str, Any]:
    """What a spec records of the teacher that a function makes."""
    return {"kind": "factory", "name": path, "source_sha256": source_sha256, "options": plain(options)}
