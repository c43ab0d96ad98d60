"""The format of published checkpoints: how one is recognised, its YAML's switches, its parts' order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsno_cluster.errors import UserError
from dsno_cluster.weight_files import container
from dsno_cluster.yaml_text import parse_yaml

if TYPE_CHECKING:
    from dsno_cluster.networks.unet import UNet


# The values in the published YAML's `model` that this network implements; other values are refused by name.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "pred_eps": (False,),
    "with_nin": (False,),
    "fourier_feature": (False,),
    "num_pad": (0,),
    "conditional": (True,),
    "resblock_type": ("biggan",),
    "normalization": ("GroupNorm",),
    "nonlinearity": ("swish",),
    "logsnr_type": ("inv_cos",),
    "logsnr_min": (-20,),
    "logsnr_max": (20,),
}


def recognise(head: bytes) -> str:
    """The kind of a checkpoint by its first bytes: 'flax', 'torch', 'pickle', 'safetensors' or 'unknown'."""
    if (kind := container(head)) != "unknown":
        return {"zip": "torch"}.get(kind, kind)
    is_map = bool(head) and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF))
    return "flax" if is_map else "unknown"


def published_settings(config: bytes, path: str) -> dict[str, Any]:
    """The published YAML, with its sections `data` and `model`.

    Raises UserError for a switch that is not implemented.
    """
    try:
        settings: dict[str, Any] = parse_yaml(config.decode(), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text: {error.reason}") from None
    for section in ("data", "model"):
        if not isinstance(settings, dict) or not isinstance(settings.get(section), dict):
            raise UserError(f"{path}: has no section {section!r}; give the published YAML of this checkpoint")
    for key, values in _IMPLEMENTED.items():
        if key in settings["model"] and _lower(settings["model"][key]) not in map(_lower, values):
            found, right = settings["model"][key], values[0]
            raise UserError(f"{path}: model.{key} {found!r} is not implemented here; only {right!r} is")
    return settings


def _lower(value: Any) -> Any:
    """The published code compares these words in lower case."""
    return value.lower() if isinstance(value, str) else value


def whole_number(settings: dict[str, Any], key: str, path: str) -> int:
    """The whole number at `section.name` of the published YAML. Raises UserError if it is not one."""
    section, name = key.split(".")
    value = settings[section].get(name)
    if type(value) is not int or value < 0:
        raise UserError(f"{path}: {key} {value!r} is not a whole number of 0 or more")
    return value


@dataclass(frozen=True)
class Part:
    """A part of the network: its kind, our name, and flax's (empty if the teachers do not have it)."""

    kind: str
    ours: str
    flax: str = ""


def published_parts(unet: UNet) -> Iterator[Part]:
    """The parts of a published network of these sizes, in the order of the published torch modules."""
    levels = len(unet.down)

    def stage(block: Any, ours: str, flax: str) -> Iterator[Part]:
        yield Part("residual", f"{ours}.residual", flax.replace("*", "block"))
        if block.attention is not None:
            yield Part("attention", f"{ours}.attention", flax.replace("*", "attn"))
        if block.temporal is not None:
            yield Part("temporal", f"{ours}.temporal")

    def side(name: str, resample: str) -> Iterator[Part]:
        for i, level in enumerate(getattr(unet, name)):
            number = i if name == "down" else levels - 1 - i  # flax numbers levels from the finest
            for j, block in enumerate(level.blocks):
                yield from stage(block, f"{name}.{i}.blocks.{j}", f"{name}_{number}.*_{j}")
            if level.resample is not None:
                yield Part("residual", f"{name}.{i}.resample", f"{name}_{number}.{resample}")

    yield Part("linear", "embed_level_in", "dense0")
    yield Part("linear", "embed_level_out", "dense1")
    if unet.embed_class is not None:
        yield Part("linear", "embed_class", "class_emb")
    yield Part("conv", "conv_in", "conv_in")
    yield from side("down", "downsample")
    yield from stage(unet.middle_in, "middle_in", "mid.*_1")
    yield Part("residual", "middle_out", "mid.block_2")
    yield from side("up", "upsample")
    yield Part("norm", "norm_out", "norm_out")
    yield Part("conv", "conv_out", "conv_out")


RESIDUAL = {  # ours: (kind, flax, published torch)
    "norm_in": ("norm", "norm1", "GroupNorm_0"),
    "conv_in": ("conv", "conv1", "Conv_0"),
    "film": ("linear", "temb_proj", "Dense_0"),
    "norm_out": ("norm", "norm2", "GroupNorm_1"),
    "conv_out": ("conv", "conv2", "Conv_1"),
    "skip": ("pointwise", "nin_shortcut", "NIN_0"),
}


def say_wrong(where: str, wrong: list[str], left: Iterable[str]) -> None:
    """Raises UserError, naming at most four tensors, if any are wrong or left over."""
    wrong = wrong + [f"{name} is not of this network" for name in left]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{where}: does not fit the network of its YAML: {'; '.join(wrong[:4])}{more}")
