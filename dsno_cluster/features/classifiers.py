"""Small classifiers of handwritten digits as feature extractors of torch-fidelity's registry.

They measure the experiments whose images Inception was not made for. The package has their weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from dsno_cluster.weight_files import parse_weights


class Classifier(FeatureExtractorBase):
    """64 features of images of `SHAPE` and, from them by the layer `o`, the logits of 10 classes."""

    NAME: ClassVar[str]
    SHAPE: ClassVar[tuple[int, int, int]]
    o: nn.Module

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: object
    ) -> None:
        super().__init__(name, features_list)
        self.build()
        weights = parse_weights(Path(feature_extractor_weights_path), feature_extractor_weights_path)
        self.load_state_dict(weights)
        self.eval()

    def build(self) -> None:
        """Make the layers."""
        raise NotImplementedError

    def features(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) in [-1, 1] -> (N, 64)."""
        raise NotImplementedError

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits"}.get(metric, "64")

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @classmethod
    def get_dummy_input_for_compile(cls) -> Tensor:
        return torch.zeros(2, *cls.SHAPE, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 images (N, C, H, W) -> the requested features, float32."""
        return self.of_float(images.float() / 127.5 - 1.0)

    def of_float(self, images: Tensor) -> tuple[Tensor, ...]:
        """The same features from float images in [-1, 1]."""
        features = self.features(images.clamp(-1.0, 1.0))
        every = {"64": features, "logits": self.o(features)}
        return tuple(every[name] for name in self.features_list)


class DigitsFeatures(Classifier):
    """Of the 8x8 digits of scikit-learn, by which `configs/digits.yaml` is measured; test accuracy 0.9966."""

    NAME = "digits-features"
    SHAPE = (1, 8, 8)

    def build(self) -> None:
        self.f = nn.Sequential(
            *[nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(32)],
            *[nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(64), nn.MaxPool2d(2)],
            *[nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(64), nn.MaxPool2d(2)],
            *[nn.Flatten(), nn.Linear(256, 64), nn.ReLU()],
        )
        self.o = nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        found: Tensor = self.f(images)
        return found


class MnistFeatures(Classifier):
    """Of the digits of MNIST at 32x32, by which `configs/mnist32.yaml` is measured; test accuracy 0.988."""

    NAME = "mnist-features"
    SHAPE = (1, 32, 32)

    def build(self) -> None:
        self.a = nn.Conv2d(1, 32, 5, stride=2, padding=2)
        self.b = nn.Conv2d(32, 64, 5, stride=2, padding=2)
        self.c = nn.Conv2d(64, 128, 3, stride=2, padding=1)
        self.f, self.o = nn.Linear(2048, 64), nn.Linear(64, 10)

    def features(self, images: Tensor) -> Tensor:
        for layer in (self.a, self.b, self.c):
            images = layer(images).relu()
        found: Tensor = self.f(images.flatten(1)).relu()
        return found


CLASSIFIERS: dict[str, type[Classifier]] = {kind.NAME: kind for kind in (DigitsFeatures, MnistFeatures)}

for name, kind in CLASSIFIERS.items():
    if name not in FEATURE_EXTRACTORS_REGISTRY:  # torch-fidelity refuses a second registration
        register_feature_extractor(name, kind)
