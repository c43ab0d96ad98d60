"""Teachers made by a user's Python function: `package.module:function`, called with the options."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import ValidationError

from dsno_cluster.errors import UserError
from dsno_cluster.teachers.facts import ALL_SIGMAS, PREDICTED, Facts
from dsno_cluster.teachers.identity import FactoryIdentity, TeacherIdentity
from dsno_cluster.teachers.teacher import Options, Source, Teacher, TeacherInfo, only_float32, plain
from dsno_cluster.teachers.warm_start import no_network, no_unet

if TYPE_CHECKING:
    from torch import Tensor


class Factory:
    """A function of the user's that returns a teacher: a callable that maps (x, t, labels) to x0.

    The teacher has the attributes shape (C, H, W) and num_classes, and may have null_class,
    native_grid(steps), and network, if it is not itself a torch module.
    """

    kind: ClassVar[str] = "factory"
    identities: ClassVar[tuple[type[TeacherIdentity], ...]] = (FactoryIdentity,)

    def __init__(self, source: Source, options: Options) -> None:
        self.path, self.options = source.path, options

    @classmethod
    def recognises(cls, source: Source) -> bool:
        name = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
        return re.fullmatch(name, source.path) is not None and not os.path.exists(source.path)

    def info(self) -> TeacherInfo:
        return self._info

    @functools.cached_property
    def _info(self) -> TeacherInfo:
        _, source = _find_module(self.path)
        try:
            options = plain(dict(self.options))
            identity = FactoryIdentity(name=self.path, source_sha256=source, options=options)
        except ValidationError:
            raise UserError(
                f"{self.path}: its options name a data set, so they are plain text, numbers, lists and mappings: {options}"
            ) from None
        return TeacherInfo(identity, None, None)

    def facts(self) -> Facts:
        return Facts("your own function", PREDICTED["x"], "that of the function", sigmas=ALL_SIGMAS)

    def load(self, precision: str) -> Teacher:
        only_float32(precision, self.path, self.kind)
        return _made(self.path, self._info, self.options)

    def warm_start(self) -> dict[str, Tensor]:
        raise no_unet(self.path, self.kind)

    def network_weights(self) -> dict[str, Tensor]:
        raise no_network(self.path, self.kind)

    def forget(self) -> None:
        """Nothing is kept."""


def _find_module(path: str) -> tuple[str, str]:
    """The module's name and the sha256 of its source.

    The working directory is searched last. Imports only parents.
    """
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


def _made(path: str, info: TeacherInfo, options: Options) -> Teacher:
    """Call the function and complete `info` from the attributes of its result."""
    from torch import nn

    module, _, name = path.partition(":")
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
        import torch

        # called, a teacher of ours keeps nothing for a backward pass
        trains = isinstance(made, Teacher) and torch.is_grad_enabled()
        x0: Tensor = (made.denoise if trains else made)(x, t_N, labels)
        if x0.shape != x.shape:
            raise UserError(f"{path}: answered shape {tuple(x0.shape)} for images {tuple(x.shape)}")
        return x0.to(x.dtype)

    known = replace(
        info,
        shape=(numbers[0], numbers[1], numbers[2]),
        num_classes=classes,
        null_class=getattr(made, "null_class", None),
        native=getattr(made, "native_grid", None),
    )
    network = made if isinstance(made, nn.Module) else getattr(made, "network", None)
    return Teacher(known, denoise, network)
