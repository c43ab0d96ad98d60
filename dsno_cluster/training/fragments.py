"""A rank's part of the training state, as named fragments, and the files in which they are saved.

Under any ZeRO stage a rank owns one contiguous range of each parameter's elements: float32 master weights and
the optimiser's moments. Each rank writes its own fragments to the checkpoint, without communication, and they
can be read back into the fragments of another stage or another number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from dsno_cluster.errors import WorkError

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, AdamW and RAdam


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + count` of a flattened parameter.

    `tensors` are (count,) float32 views of the tensors that training changes: `master`, and the moments by
    name.
    """

    start: int
    count: int
    tensors: dict[str, Tensor]


def write_fragments(
    file: Path, fragments: dict[str, Fragment], averages: dict[str, dict[str, Tensor]]
) -> None:
    """Write this rank's fragments, and the same elements of each moving average, by name, as safetensors.

    What no average has, such as a companion's parameters, has none.

    Tensors are called KIND/PARAMETER; the file's metadata has the start of each parameter's fragment. Raises
    WorkError if the file cannot be written.
    """
    held = {name: fragment for name, fragment in fragments.items() if fragment.count}
    tensors = {f"{kind}/{name}": t for name, part in held.items() for kind, t in part.tensors.items()}
    tensors |= {
        f"{kind}/{name}": tensor
        for kind, average in averages.items()
        for name, tensor in average.items()
        if name in held
    }
    starts = json.dumps({name: fragment.start for name, fragment in held.items()})
    write_tensors(file, tensors, {"starts": starts})


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as safetensors. Raises WorkError if the file cannot be written."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        safetensors.torch.save_file(on_cpu, file, metadata)
    except (OSError, safetensors.SafetensorError) as error:
        raise WorkError(f"{file}: cannot be written: {error}") from error


@torch.no_grad()
def load_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `write_tensors` wrote into the tensors of that name. Raises WorkError if it cannot be read, or has others."""
    try:
        saved = safetensors.torch.load_file(file)
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
    except (OSError, safetensors.SafetensorError, KeyError, RuntimeError) as error:
        raise WorkError(f"{file}: cannot be read: {error}") from error


class SavedFragments:
    """The fragment files of a checkpoint, written by any stage and number of ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pieces: dict[str, list[tuple[int, int, Any]]] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            try:
                file = safetensors.safe_open(path, "pt")
                starts = json.loads(file.metadata()["starts"])
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    start = starts[key.partition("/")[2]]
                    part = file.get_slice(key)
                    self.pieces.setdefault(key, []).append((start, start + part.get_shape()[0], part))
            except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
                raise WorkError(f"{path}: cannot be read: {error}") from error

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements `start` to `start + count` of a parameter's `kind`, (count,) float32. Raises WorkError for a gap."""
        wanted, found = torch.empty(count), 0
        for first, last, part in self.pieces.get(f"{kind}/{name}", ()):
            low, high = max(first, start), min(last, start + count)
            if low < high:
                wanted[low - start : high - start] = part[low - first : high - first]
                found += high - low
        if found != count:
            raise WorkError(f"{self.folder}: has {found} of the {count} elements wanted of {kind}/{name}")
        return wanted

    @torch.no_grad()
    def load(self, fragments: dict[str, Fragment]) -> None:
        """Copy the saved state into the fragments of the running training."""
        for name, fragment in fragments.items():
            for kind, tensor in fragment.tensors.items():
                tensor.copy_(self.read(kind, name, fragment.start, fragment.count))

    @torch.no_grad()
    def load_weights(self, model: nn.Module, prefix: str = "") -> None:
        """Copy the whole saved master weights into a model that no engine has partitioned yet.

        `prefix` is what its parameters' names begin with in the checkpoint.
        """
        for name, parameter in model.named_parameters():
            parameter.copy_(self.read(MASTER, prefix + name, 0, parameter.numel()).view(parameter.shape))
