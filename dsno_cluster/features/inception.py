"""Inception with the layer of sFID, which torch-fidelity's has not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

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
        """The layers that the network inside must give for these; one that is far enough behind `spatial` if it is alone."""
        return [layer for layer in layers if layer != SPATIAL] or ["768"]

    def _keep(self, _block: nn.Module, _inputs: object, output: Tensor) -> None:
        self.kept = output[:, :CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 images (N, 3, H, W) -> the features of each layer, (N, D) float32."""
        others = iter(self.inception(images))
        return tuple(self.kept if layer == SPATIAL else next(others) for layer in self.layers)
