"""Reading of progressive distillation's teachers (Salimans & Ho 2022), flax msgpack files, as our U-Net."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from dsno_cluster.config import Network, validate
from dsno_cluster.diffusion.predictions import PREDICTIONS, out_channels
from dsno_cluster.errors import UserError
from dsno_cluster.students.published_format import (
    RESIDUAL,
    published_parts,
    published_settings,
    recognise,
    say_wrong,
)
from dsno_cluster.teachers.flax_file import read_flax
from dsno_cluster.teachers.identity import Prediction, UNetDescription
from dsno_cluster.weight_files import HEAD, disguise

if TYPE_CHECKING:
    from torch import Tensor

    from dsno_cluster.networks.unet import UNet


@dataclass(frozen=True)
class PublishedTeacher:
    """The description of the network, and its float32 weights under our names."""

    description: UNetDescription
    weights: dict[str, Tensor]


def read_published_teacher(data: bytes, where: str, config: bytes, config_path: str) -> PublishedTeacher:
    """The `ema_params` of a progressive-distillation teacher (Salimans & Ho 2022), as a network of ours.

    Sizes are inferred from the tensors and must agree with the published YAML. An output layer of 2C channels
    is parametrised as `both`, whatever the YAML's mean_type says.

    Raises UserError as `import_weights` does.
    """
    from dsno_cluster.networks.unet import UNet

    if (kind := recognise(data[:HEAD])) != "flax":
        what = {
            "torch": "is a torch zip file (a published DSNO student?), not a teacher in flax msgpack",
            "safetensors": "is a safetensors file, not flax msgpack",
            "pickle": "is a pickle, which may run code when read; only flax msgpack is read here",
            "unknown": "is not a flax msgpack checkpoint (it begins with no msgpack map)",
        }
        raise UserError(f"{where}: {disguise(data[:HEAD]) or what[kind]}")
    settings = published_settings(config, config_path)
    params, steps = read_flax(data, where)
    network = _network(params, settings, where, config_path)
    prediction = _prediction(params, network, settings, where, config_path)
    import torch

    with torch.device("meta"):
        unet = UNet(network, out_channels=out_channels(prediction, network.state_channels))
    weights = _from_flax(params, unet, where)
    steps = steps or settings["data"].get("num_steps")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise UserError(f"{config_path}: data.num_steps {steps!r} is not a positive whole number")
    description = UNetDescription(network=network, prediction=prediction, num_steps=steps)
    return PublishedTeacher(description, weights)


def _network(params: dict[str, Tensor], settings: dict[str, Any], where: str, path: str) -> Network:
    """The network that the tensors describe, checked against the YAML. Only the YAML has the image size."""
    model, data = settings["model"], settings["data"]
    size = data.get("image_size")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{path}: data.image_size {size!r} is not a positive whole number")

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in params:
            raise UserError(f"{where}: has no tensor {name}")
        found = _without_leading_ones(tuple(params[name].shape), rank)
        if len(found) != rank or 0 in found:
            raise UserError(f"{where}: {name} has shape {found}, expected {rank} dimensions above 0")
        return found

    def count(pattern: str) -> int:
        prefixes = {name.partition("/")[0] for name in params}
        return next(i for i in range(len(prefixes) + 1) if pattern.format(i) not in prefixes)

    channels, width = shape("conv_in/kernel", 4)[2:]
    levels = count("down_{}.block_0")
    widths = [shape(f"down_{i}.block_0/conv1/kernel", 4)[3] for i in range(levels)]
    if not levels or any(w % width for w in widths):
        raise UserError(f"{where}: the levels have {widths} channels, not multiples of conv_in's {width}")
    attention = [name for name in params if name.endswith("/q/kernel")]
    per_head = {shape(name, 3)[1:] for name in attention}  # (heads, head_dim) of each
    attending = [i for i in range(levels) if f"down_{i}.attn_0/q/kernel" in params]
    inferred = {
        "model.nf": width,
        "model.temb_dim": shape("dense0/kernel", 2)[1],
        "model.ch_mult": [w // width for w in widths],
        "model.num_res_blocks": count("down_0.block_{}"),
        "model.num_classes": shape("class_emb/kernel", 2)[0] if "class_emb/kernel" in params else 0,
        "data.num_channels": channels,
        "model.attn_resolutions": sorted(size // 2**i for i in attending),
    }
    given = {f"data.{k}": v for k, v in data.items()} | {f"model.{k}": v for k, v in model.items()}
    if isinstance(given.get("model.attn_resolutions"), list):  # sizes that no level has mean nothing
        sizes = [size // 2**i for i in range(levels)]
        given["model.attn_resolutions"] = sorted(s for s in given["model.attn_resolutions"] if s in sizes)
    if given.get("model.num_classes") == 1:  # in the flax code this means unconditional
        given["model.num_classes"] = inferred["model.num_classes"] if inferred["model.num_classes"] else 0
    for key, found in inferred.items():
        if given.get(key) is not None and given[key] != found:
            raise UserError(f"{where}: its tensors have {key} {found}, {path} says {given[key]}")
    heads, head_dim = _heads(per_head, model, where, path)
    return validate(
        Network,
        {
            "image_size": size,
            "channels": channels,
            "num_classes": inferred["model.num_classes"],
            "width": width,
            "multipliers": inferred["model.ch_mult"],
            "blocks_per_level": inferred["model.num_res_blocks"],
            "attention_resolutions": inferred["model.attn_resolutions"],
            "heads": heads,
            "head_dim": head_dim,
            "embedding_dim": inferred["model.temb_dim"],
            "dropout": model.get("dropout", 0.0),
        },
        f"{where} with {path}",
    )


def _heads(
    per_head: set[tuple[int, ...]], model: dict[str, Any], where: str, path: str
) -> tuple[int, int | None]:
    """Heads and head_dim. The YAML's head_dim wins over its num_attn_heads, as in the published network."""
    counts, dims = {heads for heads, _ in per_head}, {dim for _, dim in per_head}
    for key, found in (("head_dim", dims), ("num_attn_heads", counts)):
        if model.get(key) is not None:
            if found != {model[key]}:
                raise UserError(
                    f"{where}: its tensors have model.{key} {sorted(found)}, {path} says {model[key]}"
                )
            break
    if len(counts) == 1 and (len(dims) > 1 or model.get("head_dim") is None):
        return next(iter(counts)), None
    if len(dims) == 1:
        return 1, next(iter(dims))
    raise UserError(f"{where}: its attention blocks share neither heads nor head size: {sorted(per_head)}")


def _prediction(
    params: dict[str, Tensor], network: Network, settings: dict[str, Any], where: str, path: str
) -> Prediction:
    if "conv_out/bias" not in params:
        raise UserError(f"{where}: has no tensor conv_out/bias")
    last, said = int(params["conv_out/bias"].numel()), settings["model"].get("mean_type")
    if last == 2 * network.state_channels:
        return "both"
    if last != network.state_channels:
        raise UserError(f"{where}: conv_out has {last} channels for images of {network.state_channels}")
    if said not in PREDICTIONS[:3]:
        raise UserError(
            f"{path}: model.mean_type {said!r} does not fit {last} output channels: x, eps or v do"
        )
    return cast(Prediction, said)


def _from_flax(params: dict[str, Tensor], unet: UNet, where: str) -> dict[str, Tensor]:
    """Flax's tensors under our names and layouts.

    Raises UserError for missing, surplus or misshapen tensors.
    """
    import torch

    from dsno_cluster.networks.unet import Attention

    wanted = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    left, wrong, ours = dict(params), [], {}

    def take(name: str, shape: tuple[int, ...]) -> Tensor | None:
        tensor = left.pop(name, None)
        if tensor is None:
            wrong.append(f"{name} is missing")
        elif _without_leading_ones(tuple(tensor.shape), len(shape)) != shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        else:
            return tensor.reshape(shape)
        return None

    def simple(kind: str, name: str, flax: str) -> None:
        """A dense layer (in, out), a convolution (H, W, in, out) or a norm."""
        shape = wanted[f"{name}.weight"]
        if kind == "norm":
            weight = take(f"{flax}/scale", shape)
        elif kind == "conv":
            weight = take(f"{flax}/kernel", (*shape[2:], shape[1], shape[0]))
            weight = None if weight is None else weight.permute(3, 2, 0, 1)
        else:
            weight = take(f"{flax}/kernel", (shape[1], shape[0]))
            weight = None if weight is None else weight.T.reshape(shape)
        keep(f"{name}.weight", weight)
        keep(f"{name}.bias", take(f"{flax}/bias", wanted[f"{name}.bias"]))

    def attention(name: str, flax: str) -> None:
        """q, k, v of (C, heads, head_dim) and the output (heads, head_dim, C).

        Our layout packs [q|k|v] per head.
        """
        channels = wanted[f"{name}.norm.weight"][0]
        block = unet.get_submodule(name)
        assert isinstance(block, Attention)
        split = (block.heads, channels // block.heads)
        simple("norm", f"{name}.norm", f"{flax}/norm")
        weights = [take(f"{flax}/{x}/kernel", (channels, *split)) for x in "qkv"]
        biases = [take(f"{flax}/{x}/bias", split) for x in "qkv"]
        out = take(f"{flax}/proj_out/kernel", (*split, channels))
        keep(f"{name}.out.bias", take(f"{flax}/proj_out/bias", (channels,)))
        if any(x is None for x in (*weights, *biases, out)):
            return
        qkv = torch.stack([w for w in weights if w is not None])  # (3, C, heads, head_dim)
        keep(f"{name}.qkv.weight", qkv.permute(2, 0, 3, 1).reshape(3 * channels, channels, 1, 1))
        bias = torch.stack([b for b in biases if b is not None])  # (3, heads, head_dim)
        keep(f"{name}.qkv.bias", bias.permute(1, 0, 2).reshape(3 * channels))
        if out is not None:
            keep(f"{name}.out.weight", out.reshape(channels, channels).T[:, :, None, None])

    def keep(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            ours[name] = tensor.contiguous()

    for part in published_parts(unet):
        if part.kind == "attention":
            attention(part.ours, part.flax)
        elif part.kind == "residual":
            for inner, (kind, flax, _) in RESIDUAL.items():
                if f"{part.ours}.{inner}.weight" in wanted:
                    simple(kind, f"{part.ours}.{inner}", f"{part.flax}/{flax}")
        else:
            simple(part.kind, part.ours, part.flax)
    say_wrong(where, wrong, left)
    return ours


def _without_leading_ones(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """`shape` without leading ones in excess of `rank` dimensions: old flax pads norms to (1, 1, 1, C)."""
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    return shape
