"""All uses of torch's internals; `pyproject.toml` has the upper bound."""

from __future__ import annotations

from collections.abc import Sequence

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
        raise UserError(
            f"teacher.compile: compiling a teacher needs torch 2.9 or newer, this is {torch.__version__}; update it, or set "
            "teacher.compile=false"
        )
    network.compile(dynamic=False, options={"deterministic": True})


def check_rank_0_answers() -> None:
    """Raises DistError if rank 0, which keeps the store of the process group, is gone."""
    dist.distributed_c10d._get_default_store().check(["alive"])
