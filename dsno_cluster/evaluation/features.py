"""Feature extractors by torch-fidelity's registry; weights by path, their sha256 recorded beside every figure.

`digits-features` is a small CNN for 8x8 digits, the yardstick of `configs/digits.yaml`: its weights ship.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.models.weights import package_path

DIGITS = "digits-features"
WEIGHT_FILE = "weights.safetensors"


class DigitsFeatures(FeatureExtractorBase):
    """64 features and 10 class logits of digits; test accuracy of the logits 0.9966."""

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: object
    ) -> None:
        super().__init__(name, features_list)
        self.f = nn.Sequential(
            *[nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(32)],
            *[nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(64), nn.MaxPool2d(2)],
            *[nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(64), nn.MaxPool2d(2)],
            *[nn.Flatten(), nn.Linear(256, 64), nn.ReLU()],
        )
        self.o = nn.Linear(64, 10)
        weights = safetensors.torch.load_file(feature_extractor_weights_path)
        self.load_state_dict(weights)
        self.eval()

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "64", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits"}.get(metric, "64")

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(2, 1, 8, 8, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 images (N, 1, 8, 8) -> the requested features, float32."""
        return self.of_float(images.float() / 127.5 - 1.0)

    def of_float(self, images: Tensor) -> tuple[Tensor, ...]:
        """The same from float images in [-1, 1]."""
        features = self.f(images.clamp(-1.0, 1.0))
        every = {"64": features, "logits": self.o(features)}
        return tuple(every[name] for name in self.features_list)


if DIGITS not in FEATURE_EXTRACTORS_REGISTRY:  # torch-fidelity refuses a second registration
    register_feature_extractor(DIGITS, DigitsFeatures)


@dataclass(frozen=True)
class Extractor:
    """`features` and (or None) `logits` of uint8 images; `name` and `sha256` go beside every figure."""

    network: FeatureExtractorBase
    name: str
    sha256: str
    channels: int
    layers: tuple[str, ...]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (N, C, H, W) -> features by layer, float32 on CPU, "features" being the layer of the distance."""
        images = images.expand(-1, self.channels, -1, -1) if images.shape[1] == 1 else images
        device = next(self.network.parameters()).device
        found = {k: v.cpu() for k, v in zip(self.layers, self.network(images.to(device)), strict=True)}
        return found | {"features": found[self.layers[0]]}


def load_extractor(name: str, weights_path: str | None, weights_sha256: str | None) -> Extractor:
    """An extractor of torch-fidelity's registry with weights from a file.

    Raises UserError for an unknown name or missing weights and WorkError where the file has another sha256:
    torch-fidelity unpickles its weights, so a file is used only with a hash to check.
    """
    if name not in FEATURE_EXTRACTORS_REGISTRY:
        known = ", ".join(sorted(FEATURE_EXTRACTORS_REGISTRY))
        raise UserError(f"evaluation.feature_extractor: {name!r} is not one of: {known}")
    if weights_path is None:
        raise UserError(f"evaluation.weights_path: the weights of {name} are needed; name their file")
    file = Path(package_path(weights_path))
    file = file / WEIGHT_FILE if file.is_dir() else file
    if not file.is_file():
        raise UserError(
            f"evaluation.weights_path: {weights_path} is missing; put the weights of {name} there"
        )
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    if weights_sha256 and not sha256.startswith(weights_sha256):
        raise WorkError(f"evaluation.weights_path: {file} has sha256 {sha256}, not {weights_sha256}")
    if name != DIGITS and not weights_sha256:
        raise UserError(
            f"evaluation.weights_sha256: needed for {file.name}, whose loading can run code; its sha256 is {sha256}"
        )
    cls = FEATURE_EXTRACTORS_REGISTRY[name]
    layers = [cls.get_default_feature_layer_for_metric("fid")]
    layers += ["logits"] if name == DIGITS else []
    network = create_feature_extractor(
        name, layers, cuda=torch.cuda.is_available(), feature_extractor_weights_path=str(file), verbose=False
    )
    return Extractor(network, name, sha256, 1 if name == DIGITS else 3, tuple(layers))
