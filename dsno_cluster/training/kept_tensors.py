"""Tensors that are computed once for a run and kept in a file, for its next start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import safetensors.torch
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.storage import FolderStorage
from dsno_cluster.weight_files import NotWeights, parse_safetensors


def kept_tensors(
    folder: FolderStorage, name: str, keys: Sequence[str], make: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors `keys` in the file `name`, on the CPU.

    If it is missing, or does not hold them, `make` gives them, and they are kept in it.
    """
    if folder.stat(name) is not None:
        try:
            kept = parse_safetensors(folder.read(name), name)
            return {key: kept[key] for key in keys}
        except (NotWeights, KeyError) as error:
            console.say(f"note: {error}; it is made again")
    made = {key: tensor.cpu().contiguous() for key, tensor in make().items()}
    folder.write(name, safetensors.torch.save(made))
    return made
