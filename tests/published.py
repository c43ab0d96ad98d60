"""A small reader of the published implementation's weights (its `ema`), for the parity tests."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import torch
import yaml
from torch import Tensor

from dsno_cluster.config import Network
from dsno_cluster.models.unet import UNet


def published_network(config: dict) -> Network:
    model, data = config["model"], config["data"]
    return Network(
        image_size=data["image_size"],
        channels=data["num_channels"],
        num_classes=model["num_classes"],
        width=model["nf"],
        multipliers=tuple(model["ch_mult"]),
        blocks_per_level=model["num_res_blocks"],
        attention_resolutions=tuple(model["attn_resolutions"]),
        heads=model.get("num_attn_heads", 1),
        head_dim=model.get("head_dim"),
        embedding_dim=model["temb_dim"],
        dropout=model["dropout"],
    )


def load_published_student(folder: Path) -> UNet:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    weights = safetensors.torch.load_file(folder / "ema.safetensors")
    unet = UNet(published_network(config), modes=config["model"]["num_modes"])
    unet.load_state_dict(renamed(weights, unet))
    return unet.eval()


def renamed(theirs: dict[str, Tensor], unet: UNet) -> dict[str, Tensor]:
    """The published list of modules, in its order, as our named ones."""
    ours: dict[str, Tensor] = {}
    position = iter(range(10_000))

    def take(prefix: str, names: dict[str, str]) -> None:
        index = next(position)
        for their_name, our_name in names.items():
            tensor = theirs.pop(f"all_modules.{index}.{their_name}", None)
            if tensor is None:
                raise KeyError(f"all_modules.{index}.{their_name}")
            if their_name.endswith(".W"):  # their 1x1 convolution is a (C_in, C_out) matrix
                tensor = tensor.T[:, :, None, None]
            ours[f"{prefix}.{our_name}"] = tensor

    plain = {"weight": "weight", "bias": "bias"}

    def residual(prefix: str, block: torch.nn.Module) -> None:
        names = {}
        pairs = {"GroupNorm_0": "norm_in", "Conv_0": "conv_in", "Dense_0": "film", "GroupNorm_1": "norm_out"}
        for their_name, our_name in {**pairs, "Conv_1": "conv_out"}.items():
            names |= {f"{their_name}.{p}": f"{our_name}.{p}" for p in plain}
        if not isinstance(block.skip, torch.nn.Identity):
            names |= {"NIN_0.W": "skip.weight", "NIN_0.b": "skip.bias"}
        take(prefix, names)

    def stage(prefix: str, block: torch.nn.Module) -> None:
        residual(f"{prefix}.residual", block.residual)
        if block.attention is not None:
            take(
                f"{prefix}.attention",
                {f"GroupNorm_0.{p}": f"norm.{p}" for p in plain}
                | {
                    "NINs.W": "qkv.weight",
                    "NINs.b": "qkv.bias",
                    "NIN_3.W": "out.weight",
                    "NIN_3.b": "out.bias",
                },
            )
        if block.temporal is not None:
            take(f"{prefix}.temporal", {"t_conv.weights1": "weight"})

    def levels(name: str) -> None:
        for i, level in enumerate(getattr(unet, name)):
            for j, block in enumerate(level.blocks):
                stage(f"{name}.{i}.blocks.{j}", block)
            if level.resample is not None:
                residual(f"{name}.{i}.resample", level.resample)

    take("embed_level_in", plain)
    take("embed_level_out", plain)
    if unet.embed_class is not None:
        take("embed_class", plain)
    take("conv_in", plain)
    levels("down")
    stage("middle_in", unet.middle_in)
    residual("middle_out", unet.middle_out)
    levels("up")
    take("norm_out", plain)
    take("conv_out", plain)
    if theirs:
        raise KeyError(f"not taken: {sorted(theirs)}")
    return ours
