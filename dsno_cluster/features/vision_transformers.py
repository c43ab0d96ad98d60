"""DINOv2 and CLIP as feature extractors of torch-fidelity's registry: networks by transformers, weights from a file."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor

from dsno_cluster.errors import UserError
from dsno_cluster.weight_files import parse_weights

DINOV2, CLIP = "dinov2", "clip"
PUBLISHED_WIDTHS = {DINOV2: 1024, CLIP: 768}  # numbers of features of the sizes with which the field measures
HEAD_CHANNELS = 64  # of every published size of both
Tensors = dict[str, Tensor]


class VisionTransformer(FeatureExtractorBase):
    """One layer, `LAYER`, of images that Pillow resizes in 8 bit with its bicubic filter and `MEAN` and `STD` normalise.

    How large the network is follows from its weights. They are those of a file of the Hugging Face Hub, by its names.
    """

    NAME: ClassVar[str]
    LAYER: ClassVar[str]
    MEAN: ClassVar[tuple[float, float, float]]
    STD: ClassVar[tuple[float, float, float]]

    def __init__(
        self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: object
    ) -> None:
        super().__init__(name, features_list)
        where = f"{feature_extractor_weights_path} for {name}"
        tensors = parse_weights(Path(feature_extractor_weights_path), feature_extractor_weights_path)
        try:
            self.network, self.size = self.build(tensors)
        except KeyError as error:
            raise UserError(
                f"{where}: has no {error.args[0]}; take the safetensors file of a published model"
            ) from None
        self.requires_grad_(False)
        self.eval()

    def build(self, tensors: Tensors) -> tuple[nn.Module, int]:
        """The network with these weights, and the size of the images that it reads, in pixels."""
        raise NotImplementedError

    def embed(self, images: Tensor) -> Tensor:
        """Normalised images (N, 3, size, size) -> (N, D)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """uint8 images (N, 3, H, W) -> the layer, (N, D) float32."""
        resized = torch.stack([_resized(image, self.size) for image in images.cpu()]).to(images.device)
        mean, std = (torch.tensor(of, device=images.device)[:, None, None] for of in (self.MEAN, self.STD))
        return (self.embed((resized.float() / 255 - mean) / std),)

    @classmethod
    def get_provided_features_list(cls) -> tuple[str, ...]:
        return (cls.LAYER,)

    @classmethod
    def get_default_feature_layer_for_metric(cls, _metric: str) -> str:
        return cls.LAYER

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(2, 3, 8, 8, dtype=torch.uint8)


class Dinov2(VisionTransformer):
    """The class token of DINOv2 (Oquab et al. 2024), as dgm-eval takes it (Stein et al. 2023): FD-DINOv2 with ViT-L/14."""

    NAME, LAYER = DINOV2, "class token"
    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    SIZE = 224
    # what the original code adds to the number of patches before it divides, so that its grid is a little finer
    OFFSET = 0.1

    def build(self, tensors: Tensors) -> tuple[nn.Module, int]:
        import transformers

        patches = tensors["embeddings.patch_embeddings.projection.weight"]
        width, patch = patches.shape[0], patches.shape[-1]
        config = transformers.Dinov2Config(
            hidden_size=width,
            num_hidden_layers=_depth(tensors, "encoder.layer."),
            num_attention_heads=width // HEAD_CHANNELS,
            image_size=self.SIZE,
            patch_size=patch,
            use_swiglu_ffn=any("mlp.weights_in" in name for name in tensors),
        )
        key = "embeddings.position_embeddings"
        positions = self._positions(tensors[key], self.SIZE // patch)
        return _with_weights(transformers.Dinov2Model, config, {**tensors, key: positions}), self.SIZE

    def _positions(self, stored: Tensor, grid: int) -> Tensor:
        """The position embeddings (1, 1 + grid^2, D) from those of another grid, as the original code interpolates them.

        transformers does without `OFFSET`, which changes the features.
        """
        known = math.isqrt(stored.shape[1] - 1)
        if known == grid:
            return stored
        of_patches = stored[:, 1:].float().reshape(1, known, known, -1).permute(0, 3, 1, 2)
        scale = (grid + self.OFFSET) / known
        found = nn.functional.interpolate(of_patches, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([stored[:, :1], found.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        found: Tensor = self.network(images).last_hidden_state[:, 0]
        return found


class Clip(VisionTransformer):
    """The image embedding of CLIP (Radford et al. 2021) of length 1, by which CMMD is measured with ViT-L/14 at 336 pixels."""

    NAME, LAYER = CLIP, "embedding"
    MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

    def build(self, tensors: Tensors) -> tuple[nn.Module, int]:
        import transformers

        of_images = {
            k: v for k, v in tensors.items() if k.startswith(("vision_model.", "visual_projection."))
        }
        of_images.pop(
            "vision_model.embeddings.position_ids", None
        )  # older files have these numbers 0, 1, 2...
        patches = tensors["vision_model.embeddings.patch_embedding.weight"]
        width, patch = patches.shape[0], patches.shape[-1]
        positions = tensors["vision_model.embeddings.position_embedding.weight"]
        size = math.isqrt(positions.shape[0] - 1) * patch
        config = transformers.CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=_depth(tensors, "vision_model.encoder.layers."),
            num_attention_heads=width // HEAD_CHANNELS,
            image_size=size,
            patch_size=patch,
            projection_dim=tensors["visual_projection.weight"].shape[0],
        )
        return _with_weights(transformers.CLIPVisionModelWithProjection, config, of_images), size

    def embed(self, images: Tensor) -> Tensor:
        embedding = self.network(images).image_embeds
        found: Tensor = embedding / embedding.norm(dim=-1, keepdim=True)
        return found


def check_installed() -> None:
    """Raises UserError if the library is not installed; does not import it."""
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            f"evaluation.feature_extractor: {DINOV2} and {CLIP} need transformers: pip install 'dsno-cluster[protocols]'"
        )


def _with_weights(kind: Any, config: Any, tensors: Tensors) -> nn.Module:
    """A network of transformers with these weights, all of them and no others. Raises UserError if they are not its own."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # what it would report, the error says in one line
    logging.disable_progress_bar()
    # mismatched sizes do not pass by this: they are among the problems
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    network, found = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, found[problem])):
            raise UserError(
                f"the weights are not those of {kind.__name__}: {problem.replace('_', ' ')}: {names[0]}"
            )
    loaded: nn.Module = network.float()
    return loaded


def _depth(tensors: Tensors, prefix: str) -> int:
    """The number of layers whose names begin with `prefix` and their number."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)})


def _resized(image_CHW: Tensor, size: int) -> Tensor:
    """A uint8 image (C, H, W) at size x size, uint8."""
    picture = Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())
    resized = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(resized.copy()).permute(2, 0, 1)


TRANSFORMERS: dict[str, type[VisionTransformer]] = {kind.NAME: kind for kind in (Dinov2, Clip)}

for name, kind in TRANSFORMERS.items():
    if name not in FEATURE_EXTRACTORS_REGISTRY:  # torch-fidelity refuses a second registration
        register_feature_extractor(name, kind)
