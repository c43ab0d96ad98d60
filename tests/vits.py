"""Tiny DINOv2 and CLIP with weights by name and shape: under the published files' names, and under those of the original code."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """A vision transformer: sizes in pixels, heads of 64 channels each, width of CLIP's embedding."""

    image: int
    patch: int = 14
    width: int = 128
    heads: int = 2
    depth: int = 2
    embedding: int = 48

    @property
    def positions(self) -> int:
        return (self.image // self.patch) ** 2 + 1


DINOV2 = Shape(image=70)  # 5 x 5 positions, to be interpolated to the 16 x 16 of 224 pixels
CLIP = Shape(image=42)


def drawn(shapes: dict[str, tuple[int, ...]]) -> Tensors:
    """Weights of moderate size, each by its name alone; norms' and layer scales' are about 1."""
    found = {}
    for name, shape in shapes.items():
        generator = np.random.default_rng(zlib.crc32(name.encode()))
        values = generator.standard_normal(shape) * (0.1 if len(shape) < 2 else shape[-1] ** -0.5)
        about_one = name.endswith("lambda1") or ("norm" in name and name.endswith("weight"))
        found[name] = torch.from_numpy((values + about_one).astype(np.float32))
    return found


def linear(name: str, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def dinov2_weights(shape: Shape = DINOV2) -> Tensors:
    """Under the names of facebook/dinov2-large on the Hugging Face Hub."""
    width = shape.width
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.cls_token": (1, 1, width),
        "embeddings.mask_token": (1, width),
        "embeddings.position_embeddings": (1, shape.positions, width),
        "embeddings.patch_embeddings.projection.weight": (width, 3, shape.patch, shape.patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        **norm("layernorm", width),
    }
    for i in range(shape.depth):
        layer = f"encoder.layer.{i}"
        for each in ("query", "key", "value"):
            shapes |= linear(f"{layer}.attention.attention.{each}", width, width)
        shapes |= linear(f"{layer}.attention.output.dense", width, width)
        shapes |= norm(f"{layer}.norm1", width) | norm(f"{layer}.norm2", width)
        shapes |= {f"{layer}.layer_scale{n}.lambda1": (width,) for n in (1, 2)}
        shapes |= linear(f"{layer}.mlp.fc1", 4 * width, width) | linear(f"{layer}.mlp.fc2", width, 4 * width)
    return drawn(shapes)


def as_dinov2(published: Tensors) -> Tensors:
    """The same weights under the names of facebookresearch/dinov2."""
    found = {
        "cls_token": published["embeddings.cls_token"],
        "mask_token": published["embeddings.mask_token"],
        "pos_embed": published["embeddings.position_embeddings"],
    }
    for kind in ("weight", "bias"):
        found[f"patch_embed.proj.{kind}"] = published[f"embeddings.patch_embeddings.projection.{kind}"]
        found[f"norm.{kind}"] = published[f"layernorm.{kind}"]
        for i in range(DINOV2.depth):
            theirs, ours = f"blocks.{i}", f"encoder.layer.{i}"
            parts = [published[f"{ours}.attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
            found[f"{theirs}.attn.qkv.{kind}"] = torch.cat(parts)
            found[f"{theirs}.attn.proj.{kind}"] = published[f"{ours}.attention.output.dense.{kind}"]
            for same in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                found[f"{theirs}.{same}.{kind}"] = published[f"{ours}.{same}.{kind}"]
    for i in range(DINOV2.depth):
        for n in (1, 2):
            found[f"blocks.{i}.ls{n}.gamma"] = published[f"encoder.layer.{i}.layer_scale{n}.lambda1"]
    return found


def clip_weights(shape: Shape = CLIP) -> Tensors:
    """Under the names of openai/clip-vit-large-patch14-336 on the Hugging Face Hub."""
    width, vision = shape.width, "vision_model"
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}.embeddings.class_embedding": (width,),
        f"{vision}.embeddings.patch_embedding.weight": (width, 3, shape.patch, shape.patch),
        f"{vision}.embeddings.position_embedding.weight": (shape.positions, width),
        **norm(f"{vision}.pre_layrnorm", width),
        **norm(f"{vision}.post_layernorm", width),
        "visual_projection.weight": (shape.embedding, width),
    }
    for i in range(shape.depth):
        layer = f"{vision}.encoder.layers.{i}"
        for each in ("q", "k", "v", "out"):
            shapes |= linear(f"{layer}.self_attn.{each}_proj", width, width)
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        shapes |= linear(f"{layer}.mlp.fc1", 4 * width, width) | linear(f"{layer}.mlp.fc2", width, 4 * width)
    return drawn(shapes)


def as_clip(published: Tensors) -> Tensors:
    """The same weights under the names of openai/CLIP."""
    vision = "vision_model"
    found = {
        "class_embedding": published[f"{vision}.embeddings.class_embedding"],
        "conv1.weight": published[f"{vision}.embeddings.patch_embedding.weight"],
        "positional_embedding": published[f"{vision}.embeddings.position_embedding.weight"],
        "proj": published["visual_projection.weight"].T,
    }
    for kind in ("weight", "bias"):
        found[f"ln_pre.{kind}"] = published[f"{vision}.pre_layrnorm.{kind}"]
        found[f"ln_post.{kind}"] = published[f"{vision}.post_layernorm.{kind}"]
        for i in range(CLIP.depth):
            theirs, ours = f"transformer.resblocks.{i}", f"{vision}.encoder.layers.{i}"
            parts = [published[f"{ours}.self_attn.{n}_proj.{kind}"] for n in ("q", "k", "v")]
            found[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(parts)
            found[f"{theirs}.attn.out_proj.{kind}"] = published[f"{ours}.self_attn.out_proj.{kind}"]
            for name, same in (
                ("ln_1", "layer_norm1"),
                ("ln_2", "layer_norm2"),
                ("mlp.c_fc", "mlp.fc1"),
                ("mlp.c_proj", "mlp.fc2"),
            ):
                found[f"{theirs}.{name}.{kind}"] = published[f"{ours}.{same}.{kind}"]
    return found
