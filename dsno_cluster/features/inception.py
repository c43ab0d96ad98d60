"""Inception with the layer of sFID, which torch-fidelity's lacks, and with clean-fid's way of resizing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

CLEAN = "inception-v3-clean"  # the same weights; images are resized as clean-fid does

SPATIAL = "spatial"
CHANNELS = 7  # of 192, so that there are nearly as many numbers as FID's 2048 (Nash et al. 2021)
SPATIAL_WIDTH = 17 * 17 * CHANNELS


class WithSpatial(nn.Module):
    """Inception that gives `layers`, one of which is `spatial`: the first channels of `mixed_6/conv` of the TensorFlow graph.

    Those are torch-fidelity's `Mixed_6d.branch1x1`, flattened as ADM's evaluator does, with channels last.
    """

    def __init__(self, inception: FeatureExtractorInceptionV3, layers: Sequence[str]) -> None:
        super().__init__()
        self.inception, self.layers = inception, tuple(layers)
        inception.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    @staticmethod
    def layers_of_inception(layers: Sequence[str]) -> list[str]:
        """The layers that the network inside must give for these; if only `spatial` is asked for, one that lies behind it."""
        return [layer for layer in layers if layer != SPATIAL] or ["768"]

    def _keep(self, _block: nn.Module, _inputs: object, output: Tensor) -> None:
        self.kept = output[:, :CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 images (N, 3, H, W) -> the features of each layer, (N, D) float32."""
        others = iter(self.inception(images))
        return tuple(self.kept if layer == SPATIAL else next(others) for layer in self.layers)


class CleanInception(FeatureExtractorInceptionV3):
    """Inception on images that are resized to 299 x 299 as clean-fid does (Parmar et al. 2022)."""

    # the layers up to the pooled features, in their order
    TRUNK = (
        *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
        *("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
        *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
        *("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
        *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
    )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 images (N, 3, H, W) -> the requested features, (N, D) float32."""
        size = self.INPUT_IMAGE_SIZE
        resized = torch.stack([clean_resized(image, size) for image in images.cpu()])
        found = (resized.to(images.device, self.feature_extractor_internal_dtype) - 128) / 128
        for name in self.TRUNK:
            found = getattr(self, name)(found)
        pooled = found.flatten(1)
        every = {"2048": pooled, "logits_unbiased": pooled @ self.fc.weight.T}
        return tuple(every[layer].float() for layer in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "2048", "logits_unbiased"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


def clean_resized(image_CHW: Tensor, size: int) -> Tensor:
    """A uint8 image (C, H, W) as clean-fid resizes it: float32 (C, size, size) in [0, 255].

    By Pillow's bicubic filter, which widens with the reduction, one channel at a time and without rounding between.
    """
    channels = [
        np.asarray(Image.fromarray(channel).resize((size, size), Image.Resampling.BICUBIC))
        for channel in image_CHW.numpy().astype(np.float32)
    ]
    return torch.from_numpy(np.stack(channels).clip(0, 255))


if CLEAN not in FEATURE_EXTRACTORS_REGISTRY:  # torch-fidelity refuses a second registration
    register_feature_extractor(CLEAN, CleanInception)
