"""Activation checkpointing: the backward pass recomputes activations instead of keeping them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dsno_cluster.networks import adm_unet, transformer, unet
from dsno_cluster.networks.edm2_unet import MPBlock
from dsno_cluster.networks.edm_layers import UNetBlock
from dsno_cluster.torch_internals import ATTENTION_KERNELS

# Results that are expensive to compute: `cheap` keeps them and recomputes only what lies between them.
_DEAR = [
    torch.ops.aten.convolution.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    *ATTENTION_KERNELS,
]
_BLOCKS = (
    *(unet.ResidualBlock, unet.Attention, adm_unet.ResidualBlock, adm_unet.Attention),
    *(UNetBlock, MPBlock, transformer.Block),
)
_DIFFUSERS_BLOCKS = ("ResnetBlock2D", "Attention", "BasicTransformerBlock")


def recompute_in_backward(backbone: nn.Module, what: str) -> None:
    """Make the blocks of a backbone keep less for backward, without changing results.

    none: keep everything. cheap: keep the results of convolutions and matrix products and recompute norms and
    activations, for a few per cent more time. blocks: keep only each block's input, for about a third more
    time.
    """
    if what == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "cheap":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _DEAR)
    for module in backbone.modules():
        if isinstance(module, _BLOCKS) or type(module).__name__ in _DIFFUSERS_BLOCKS:
            module.forward = functools.partial(checkpoint, module.forward, **options)
