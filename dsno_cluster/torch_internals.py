"""All uses of torch's internals; `pyproject.toml` has the upper bound."""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dsno_cluster.errors import UserError

# The kernels that scaled_dot_product_attention dispatches to.
ATTENTION_KERNELS = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
)


@torch.no_grad()
def lerp_all(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Interpolate every tensor towards its end by `weight`, in place, in few kernels."""
    torch._foreach_lerp_(list(tensors), list(ends), weight)


def compile_network(network: nn.Module) -> None:
    """Compile a module in place at its first calls, for each shape of its input, without graph breaks.

    No kernel is chosen by timing, so that the same input gives the same bits in every process. Raises UserError if this
    torch cannot promise that.
    """
    from torch._inductor import config

    if not hasattr(config, "deterministic"):
        raise UserError(
            f"teacher.compile: compiling a teacher needs torch 2.9 or newer, this is {torch.__version__}; update it, or set "
            "teacher.compile=false"
        )
    network.compile(dynamic=False, options={"deterministic": True})


def compile_in_place(network: nn.Module, *, graphs: bool = False) -> None:
    """Compile a module in place at its first calls, for each shape of its input; `graphs`: into CUDA graphs."""
    # what it says of functions that remember their results, or of recomputation, is of no use to who only runs them
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    # static shapes: with a symbolic number of time points, tracing does not terminate
    network.compile(dynamic=False, options={"triton.cudagraphs": True} if graphs else None)


def run_what_cannot_be_compiled() -> None:
    """From now on run a network as it is, with a warning, if it cannot be compiled."""
    from torch._dynamo import config

    config.suppress_errors = True


def uncompiled(network: nn.Module) -> Callable[..., Any]:
    """A module's call, with its hooks, as if it had not been compiled in place."""
    return network._call_impl


def check_rank_0_answers() -> None:
    """Raises DistError if rank 0, which keeps the store of the process group, is gone."""
    dist.distributed_c10d._get_default_store().check(["alive"])


def set_timeouts(timeout: timedelta) -> None:
    """Set the time-out of every process group that exists."""
    groups = dist.distributed_c10d._world.pg_map
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    for group in list(groups):
        set_timeout(timeout, group)


def abort_groups() -> None:
    """Destroy the process groups without waiting for other ranks, some of which may be lost."""
    dist.distributed_c10d._abort_process_group()


def pretended_tensors() -> contextlib.AbstractContextManager[Any]:
    """A context whose tensors have shapes, strides and dtypes, but no values and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextlib.contextmanager
def actual_tensors() -> Iterator[None]:
    """A context whose new tensors are on the CPU and have values, also within `pretended_tensors` or on the device "meta"."""
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), torch.device("cpu"):
        yield


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of the storages that operations in its context make, while they live: `now` and at the `peak`."""

    now: int
    peak: int

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # as the check of labels
            return 0
        given = {id(x.untyped_storage()) for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_iter(result):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in given:
                self._add(x.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return
        self.seen[key] = weakref.finalize(storage, self._drop, key, size)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _drop(self, key: int, size: int) -> None:
        del self.seen[key]
        self.now -= size
