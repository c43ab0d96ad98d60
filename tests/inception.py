"""What torch-fidelity is run on: its Inception with random weights (the published ones cannot be had in a test), and images."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from torch_fidelity import feature_extractor_inceptionv3 as module


class Images(torch.utils.data.Dataset):
    """What torch-fidelity reads images from."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.images[index]


def save_random_inception(file: Path) -> Path:
    """Weights drawn so that features neither vanish nor explode over the layers."""
    torch.manual_seed(0)
    cls = module.FeatureExtractorInceptionV3
    with (
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
        mock.patch.object(cls, "load_state_dict"),
    ):
        network = cls("inception-v3-compat", ["2048"])
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(part.weight)
    torch.save(network.state_dict(), file)
    return file
