"""A file of `torch.save` with a network's state dict, read without running code, and what its owner must say besides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsno_cluster.errors import UserError
from dsno_cluster.files import file_sha256, in_home
from dsno_cluster.storage import read_file
from dsno_cluster.teachers.facts import Facts
from dsno_cluster.teachers.teacher import Options, Source, TeacherInfo
from dsno_cluster.weight_files import NotWeights, is_torch_file, parse_torch

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class StateDict:
    """The tensors of a file by name, as stored, and the file's path and sha256."""

    path: str
    tensors: Mapping[str, Tensor]
    sha256: str

    def shape(self, name: str, axes: int) -> tuple[int, ...]:
        """The shape of a tensor. Raises UserError if there is none or it has another number of axes."""
        if name not in self.tensors:
            raise UserError(f"{self.path}: its network cannot be read from its state dict: {name} is missing")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != axes or 0 in shape:
            raise UserError(f"{self.path}: its {name} has shape {shape}, where {axes} axes are expected")
        return shape

    def count(self, prefix: str) -> int:
        """How many parts are numbered `prefix`.0, `prefix`.1 and so on. Raises UserError if one of them is missing."""
        ends = (name.removeprefix(f"{prefix}.") for name in self.tensors if name.startswith(f"{prefix}."))
        found = {end.partition(".")[0] for end in ends}
        missing = [number for number in range(len(found)) if str(number) not in found]
        if missing:
            raise UserError(
                f"{self.path}: its network cannot be read from its state dict: {prefix}.{missing[0]} is missing"
            )
        return len(found)


@dataclass(frozen=True)
class Reading:
    """What a state dict and its options mean. `build` makes the network in a dtype and the function that gives x0 by it."""

    info: TeacherInfo
    facts: Facts
    build: Callable[[torch.dtype], tuple[nn.Module, Denoise]]


def is_state_dict(source: Source) -> bool:
    """Whether a file begins as `torch.save` begins its files."""
    return source.is_file and is_torch_file(source.head)


def read_state_dict(source: Source) -> StateDict:
    """The state dict of a file: the file's own, or of a training checkpoint its `ema`. From a local file it is mapped.

    Raises NotWeights for a file that holds anything else.
    """
    from argparse import Namespace

    import torch

    file: bytes | Path
    if "://" in source.path:
        file = read_file(source.path, source.endpoint_url)
        sha256, size = hashlib.sha256(file).hexdigest(), len(file)
    else:
        file = Path(in_home(source.path))
        sha256, size = file_sha256(file), file.stat().st_size
    found = parse_torch(file, source.path, [Namespace])  # DiT's own checkpoints keep their arguments in one
    if isinstance(found, dict) and isinstance(found.get("ema"), dict):
        found = found["ema"]
    if not isinstance(found, dict):
        raise NotWeights(f"{source.path}: holds {type(found).__name__}, not tensors by name")
    others = [str(name) for name, value in found.items() if not isinstance(value, torch.Tensor)]
    if others or not found:
        what = f"{', '.join(others[:4])}, which are no tensors" if others else "nothing"
        raise NotWeights(f"{source.path}: its state dict holds {what}; a state dict is tensors by name")
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in found.values())
    if (
        claimed > 2 * size
    ):  # views that repeat few numbers, or many of the same; twice for weights that are shared
        raise NotWeights(f"{source.path}: its tensors claim {claimed:,} bytes in a file of {size:,}")
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in found.items()}
    return StateDict(source.path, tensors, sha256)


def one_of(name: str, options: Options, path: str, allowed: Sequence[Any]) -> Any:
    """The option of that name, one of `allowed`. Raises UserError if it is not given, or is something else."""
    listed = ", ".join(_shown(value) for value in allowed)
    if name not in options:
        raise UserError(
            f"{path}: its state dict does not say {name}; give 'teacher.options={{{name}: ...}}', one of: {listed}"
        )
    value = options[name]
    if not any(value == one and type(value) is type(one) for one in allowed):
        raise UserError(f"{path}: option {name} {_shown(value)} is not one of: {listed}")
    return value


def whole_number(name: str, options: Options, path: str) -> int:
    """The option of that name, 1 or more. Raises UserError if it is something else."""
    value = options[name]
    if type(value) is not int or value < 1:
        raise UserError(f"{path}: option {name} {_shown(value)} is not a whole number of 1 or more")
    return value


def heads_given(options: Options, path: str, widths: Sequence[int]) -> tuple[int | None, int | None]:
    """The options num_heads and num_head_channels, of which one must be given, for attention over so many channels.

    Raises UserError if none or both are given, or one does not divide all of `widths`.
    """
    names = [name for name in ("num_heads", "num_head_channels") if name in options]
    possible = [n for n in range(1, min(widths) + 1) if all(width % n == 0 for width in widths)]
    listed = ", ".join(map(str, possible))
    if len(names) != 1:
        found = "both are given" if names else "its state dict does not say it"
        raise UserError(
            f"{path}: {found}: give either num_heads or num_head_channels in teacher.options; each can be one of: {listed}"
        )
    number = one_of(names[0], options, path, possible)
    return (number, None) if names[0] == "num_heads" else (None, number)


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
