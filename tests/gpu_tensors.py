"""Pretend tensors on a GPU, for tests on machines without one.

torch's fake tensors have shapes, strides and devices but no values. An operation on them gives the strides that it has on
CUDA, so that layouts can be followed; and whatever would wait for a value, or for a copy between host and device, is seen.
"""

from __future__ import annotations

import contextlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
READS = ("aten::nonzero", "aten::equal")
COPIES = ("aten::clone", "aten::_to_copy", "aten::copy_")


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within, tensors are pretended ones, and CUDA a device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def moved(model: nn.Module) -> nn.Module:
    """The model with pretended weights on a GPU, of the same shapes, strides and dtypes."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    there = torch.empty_strided(
                        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA
                    )
                    tensors[name] = (
                        nn.Parameter(there, tensor.requires_grad) if tensors is module._parameters else there
                    )
    return model


@dataclass
class Seen(TorchDispatchMode):
    """What operations in its context did: `waits` of the host, and `copies` of whole activations, by kind."""

    waits: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    values: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition(".")[0]
        if name == "aten::_local_scalar_dense":  # `int(x)`: pretended tensors have no values
            self.waits.update([name] if args[0].is_cuda else [])
            return self.values.uniform(0.2, 0.8)
        result = func(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, Tensor)]
        if name in READS:
            self.waits[name] += 1
        if name in COPIES and isinstance(result, Tensor) and given:
            source = given[1] if name == "aten::copy_" else given[0]
            if source.device.type != result.device.type and not (kwargs or {}).get("non_blocking"):
                self.waits[f"{name} {source.device.type} to {result.device.type} {tuple(source.shape)}"] += 1
            elif source.dim() >= 4 and source.dtype == result.dtype:
                self.copies[f"{name} {tuple(source.shape)}"] += 1
        if name.startswith("aten::index") and args[0].is_cuda and isinstance(args[1], (list, tuple)):
            by_list = [index for index in args[1] if isinstance(index, Tensor) and not index.is_cuda]
            self.waits.update(f"{name} by a list" for _ in by_list)
        return result


def channels_first(model: nn.Module) -> list[str]:
    """Names of modules whose images (B, C, H, W) are not channels-last; filled as the model runs."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            images = isinstance(output, Tensor) and output.dim() == 4
            if images and not output.is_contiguous(memory_format=torch.channels_last):
                found.append(name)

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(look(name))
    return found
