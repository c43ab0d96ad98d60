"""Activation checkpointing: what backward computes again in place of keeping it."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dsno_cluster.networks.unet import Attention, ResidualBlock

# Results that are dear to compute: kept by `cheap`, which computes only what lies between them again.
_DEAR = [
    torch.ops.aten.convolution.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
]
_DIFFUSERS_BLOCKS = ("ResnetBlock2D", "Attention")


def recompute_in_backward(backbone: nn.Module, what: str) -> None:
    """Have the residual and attention blocks of a backbone keep less for backward; their results stay the same.

    none: keep all. cheap: keep the results of convolutions and matrix products, compute norms and activations
    again, at a few per cent of time. blocks: keep each block's input alone, at about a third more time.
    """
    if what == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if what == "cheap":
        options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _DEAR)
    for module in backbone.modules():
        if isinstance(module, ResidualBlock | Attention) or type(module).__name__ in _DIFFUSERS_BLOCKS:
            module.forward = functools.partial(checkpoint, module.forward, **options)
