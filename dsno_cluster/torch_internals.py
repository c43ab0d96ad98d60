"""All uses of torch's internals; `pyproject.toml` has the upper bound."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
        raise UserError(f"compiling a teacher needs torch 2.9 or newer, this is {torch.__version__}")
    network.compile(dynamic=False, options={"deterministic": True})


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
