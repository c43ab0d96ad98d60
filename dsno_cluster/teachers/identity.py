"""What `meta.json` says under `model` of a U-Net teacher."""

from __future__ import annotations

from typing import Any

from dsno_cluster.config import Network

KIND = "denoiser"


def denoiser_meta(network: Network, prediction: str = "v") -> dict[str, Any]:
    """What `meta.json` says under `model` of a U-Net teacher; `prediction` is x, eps, v or both."""
    return {
        "kind": KIND,
        "network": network.model_dump(mode="json"),
        "prediction": prediction,
        "schedule": "cosine",
    }
