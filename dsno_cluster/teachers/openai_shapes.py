"""The tensors of OpenAI's U-Nets: the network that their shapes describe, and their names and layouts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsno_cluster.errors import UserError
from dsno_cluster.networks.descriptions import ADMDescription
from dsno_cluster.teachers.state_dict_file import StateDict

if TYPE_CHECKING:
    from torch import Tensor

    from dsno_cluster.networks.adm_unet import ADMUNet


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of such a U-Net, or of another network of the same authors."""
    return "time_embed.0.weight" in tensors and "input_blocks.0.0.weight" in tensors


def describe(state: StateDict) -> ADMDescription:
    """The network that the shapes of a state dict describe, without its heads.

    Raises UserError if it is no denoiser of images, or its blocks are not arranged as in these U-Nets.
    """
    path, tensors = state.path, state.tensors
    if not any(name.startswith("output_blocks.") for name in tensors):
        raise UserError(f"{path}: is a classifier of noisy images (it has no output_blocks), not a denoiser")
    width, channels = state.shape("input_blocks.0.0.weight", 4)[:2]
    out_channels = state.shape("out.2.weight", 4)[0]
    if channels == 6:
        raise UserError(
            f"{path}: is an upsampler (it takes an image of low resolution besides): not supported"
        )
    if out_channels not in (channels, 2 * channels):
        raise UserError(
            f"{path}: has {channels} channels in and {out_channels} out, not {channels} or twice that"
        )
    outputs = state.count("output_blocks")
    # an output block whose last part changes the resolution ends its level
    ups = {
        i: "convolution"
        for i in range(outputs)
        for j in (1, 2)
        if f"output_blocks.{i}.{j}.conv.weight" in tensors
    }
    for i in range(outputs):
        for j in (1, 2):
            if f"output_blocks.{i}.{j}.in_layers.2.weight" in tensors:
                ups[i] = "block"
    levels = len(ups) + 1
    blocks = outputs // levels - 1
    regular = outputs == levels * (blocks + 1) and sorted(ups) == [
        level * (blocks + 1) - 1 for level in range(1, levels)
    ]
    if (
        not regular
        or blocks < 1
        or state.count("input_blocks") != levels * (blocks + 1)
        or len(set(ups.values())) > 1
    ):
        raise UserError(
            f"{path}: its blocks are not arranged as in these U-Nets: {outputs} output blocks, {len(ups)} upsamplings"
        )
    first = [1 + level * (blocks + 1) for level in range(levels)]
    widths = tuple(state.shape(f"input_blocks.{i}.0.in_layers.2.weight", 4)[0] for i in first)
    if widths[0] != width:
        raise UserError(
            f"{path}: its first convolution has {width} channels, its first block {widths[0]}: not supported"
        )
    if bad := [str(w) for w in widths if w % 32]:
        raise UserError(
            f"{path}: its levels have {', '.join(bad)} channels, which its norms cannot group by 32"
        )
    return ADMDescription(
        channels=channels,
        out_channels=out_channels,
        features=state.shape("time_embed.0.weight", 2)[1],
        widths=widths,
        blocks_per_level=blocks,
        attention_levels=tuple(
            level for level, i in enumerate(first) if f"input_blocks.{i}.1.qkv.weight" in tensors
        ),
        num_classes=state.shape("label_emb.weight", 2)[0] if "label_emb.weight" in tensors else 0,
        film=state.shape("input_blocks.1.0.emb_layers.1.weight", 2)[0] == 2 * width,
        resample="convolution" if "convolution" in ups.values() else "block",
    )


_RESIDUAL = {
    "norm_in": "in_layers.0",
    "conv_in": "in_layers.2",
    "embed": "emb_layers.1",
    "norm_out": "out_layers.0",
    "conv_out": "out_layers.3",
    "skip": "skip_connection",
}
_PARTS = _RESIDUAL | {"norm": "norm", "qkv": "qkv", "out": "proj_out"}
_ENDS = {
    "embed_time_in": "time_embed.0",
    "embed_time_out": "time_embed.2",
    "embed_class": "label_emb",
    "conv_in": "input_blocks.0.0",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {
    "middle_in": "middle_block.0",
    "middle_attention": "middle_block.1",
    "middle_out": "middle_block.2",
}


def original_names(network: ADMUNet) -> dict[str, str]:
    """The name in the original's state dict of every tensor of our network."""

    def original(name: str) -> str:
        first, *others, kind = name.split(".")
        if not others:
            return f"{_ENDS[first]}.{kind}"
        if first in _MIDDLE:
            return f"{_MIDDLE[first]}.{_PARTS[others[0]]}.{kind}"
        number, part, inner = int(others[0]), others[1], others[2]
        block, place = f"input_blocks.{number + 1}", 0 if part in ("residual", "resample") else 1
        if first == "up":
            block = f"output_blocks.{number}"
            if part == "resample":
                place = 1 if network.up[number].attention is None else 2
        if part == "resample" and inner == "conv":
            return f"{block}.{place}.{'conv' if first == 'up' else 'op'}.{kind}"
        return f"{block}.{place}.{_PARTS[inner]}.{kind}"

    return {name: original(name) for name in network.state_dict()}


def as_convolution(name: str, tensor: Tensor) -> Tensor:
    """The weights of attention's layers as those of a convolution over images."""
    over_pixels = name.endswith((".qkv.weight", ".proj_out.weight")) and tensor.ndim == 3
    return tensor[..., None] if over_pixels else tensor


def whole_qkv(name: str, tensor: Tensor, described: ADMDescription) -> Tensor:
    """The rows of qkv in the order [all q | all k | all v], from [q | k | v] of each head."""
    if ".qkv." not in name:
        return tensor
    heads = described.heads_of(len(tensor) // 3)
    rows: Tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return rows
