"""Everything of torch that it does not promise; `pyproject.toml` has the bound above."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def lerp_all(tensors: Sequence[Tensor], ends: Sequence[Tensor], weight: float) -> None:
    """Move every tensor by `weight` of the way to its end, in place, in few kernels."""
    torch._foreach_lerp_(list(tensors), list(ends), weight)


def check_rank_0_answers() -> None:
    """Raises DistError if rank 0, which keeps the store of the process group, is gone."""
    dist.distributed_c10d._get_default_store().check(["alive"])
