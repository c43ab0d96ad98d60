"""A small reader of the published implementation's weights (its `ema`), for the parity tests."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import yaml

from dsno_cluster.config import Network
from dsno_cluster.models.importers import from_published_torch
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
    unet.load_state_dict(from_published_torch(weights, unet))
    return unet.eval()
