"""Narrow networks with random weights, in folders as the repositories of diffusers models have them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tiny import DATA
from torch import Tensor

CONFIGS = DATA / "diffusers_configs"


def time_of(ratio: float) -> float:
    """The cosine time at which sigma / alpha is `ratio`."""
    low = math.atan(math.exp(-10))
    high = math.atan(math.exp(10))
    return min(max((math.atan(ratio) - low) / (high - low), 0.0), 1.0)


def ratio_of(t: float) -> float:
    """sigma / alpha at a cosine time."""
    low = math.atan(math.exp(-10))
    return math.tan(low + t * (math.atan(math.exp(10)) - low))


def of_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    assert isinstance(content, dict)
    return content


def narrow(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet2DModel's config with few channels, groups and layers, and small images; everything else is kept."""
    widths = sorted(set(config["block_out_channels"]))
    smaller = {"block_out_channels": [8 * (1 + widths.index(w)) for w in config["block_out_channels"]]}
    smaller |= {"layers_per_block": 1, "norm_num_groups": 4, "sample_size": 2 ** len(widths)}
    smaller["sample_size"] = max(8, 2 ** (len(config["block_out_channels"]) - 1))
    for key, value in {"attention_head_dim": 8, "attn_norm_num_groups": 4, "num_class_embeds": 5}.items():
        if config.get(key):
            smaller[key] = value
    return {**config, **smaller}


def randomized(network: Any, seed: int = 0) -> Any:
    """The network with weights in which nothing starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(values * 0.5 / math.sqrt(parameter[0].numel()))
            else:
                parameter.add_(0.1 * values)
    return network.eval()


def write(
    folder: Path, unet: Any, config: Mapping[str, Any], scheduler: Mapping[str, Any], **saving: Any
) -> str:
    """A pipeline's folder: the model with its config as given, the scheduler's config, and `model_index.json`."""
    unet.save_pretrained(folder / "unet", **saving)
    (folder / "unet/config.json").write_text(json.dumps(dict(config)))
    (folder / "scheduler").mkdir(exist_ok=True)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(dict(scheduler)))
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def saved_scheduler(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config as `save_pretrained` writes it."""
    content = json.loads(scheduler.to_json_string())
    assert isinstance(content, dict)
    return content


Network = Callable[..., Tensor]
