"""Temporal convolutions after blocks of networks that cannot pass on what they need.

A temporal convolution follows each residual (+ attention) block, but not one that resamples; in the middle it lies between
attention and the second block (Zheng et al. 2023, figure 3). It is attached to a block as a submodule `temporal` and a
forward hook, so that the network's own tensors keep their names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from dsno_cluster.networks.temporal import FourierBasis, TemporalConv


class BlockTemporal(TemporalConv):
    """A temporal convolution whose basis is set before a pass. After the `last` one, points no longer interact."""

    basis: FourierBasis | None = None
    last: bool = False


def mix_after(blocks: Iterable[tuple[nn.Module, int]], modes: int, init: str, *, ends: bool = True) -> None:
    """Let a temporal convolution follow each of the blocks, which come with their channels, in the order of a forward pass.

    `ends`: what comes after the last of them treats each point by itself.
    """
    temporal = None
    for block, channels in blocks:
        temporal = BlockTemporal(channels, modes, init)
        block.temporal = temporal
        block.register_forward_hook(_mix)
    if temporal is not None:
        temporal.last = ends


def set_basis(network: nn.Module, basis: FourierBasis | None, last_basis: FourierBasis | None) -> None:
    """The basis of the next pass, and that of the last convolution if it is another one."""
    for module in network.modules():
        if isinstance(module, BlockTemporal):
            module.basis = last_basis if module.last and last_basis is not None else basis


def _mix(block: nn.Module, _inputs: Any, hidden: Tensor) -> Tensor:
    temporal = block.temporal
    assert isinstance(temporal, BlockTemporal)
    assert temporal.basis is not None
    mixed: Tensor = temporal(hidden, temporal.basis)
    return mixed
