"""The models of diffusers that can be teachers: what their configs say, and the networks with their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dsno_cluster.errors import UserError
from dsno_cluster.teachers.diffusers_schedulers import Kind
from dsno_cluster.teachers.teacher import Options, Shape
from dsno_cluster.weight_files import check_fit

if TYPE_CHECKING:
    from torch import Tensor, nn

UNET, DIT = "UNet2DModel", "DiTTransformer2DModel"
# What older versions of diffusers called a DiT, among others.
OLD_DIT = "Transformer2DModel"
_MIDDLE_NORM = "mid_block.attentions.0.group_norm.weight"
# Blocks of OpenAI's converted models before diffusers was released with them: they resample by residual blocks.
_OLD_BLOCKS = {"AttnDownsampleBlock2D": "AttnDownBlock2D", "AttnUpsampleBlock2D": "AttnUpBlock2D"}
# Keys that the moving average of a training script adds to its model's config.
_OF_AVERAGES = (
    *("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"),
)
# Keys of older transformers that play no part in a DiT.
_OF_OLD_DITS = ("cross_attention_dim", "num_vector_embeds", "only_cross_attention", "use_linear_projection")
OPTIONS = ("null_class", "sample_size", "num_classes")

# Names of attention layers in early versions of diffusers, and their names now.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class Model:
    """What a model's config says.

    `config` is what diffusers builds the network from. With `packed_per_head` the rows of the query, key and value
    matrices, one below the other, are those of the first head's query, key and value, then of the second's, and so on.
    """

    kind: str
    config: dict[str, Any]
    shape: Shape
    num_classes: int
    null_class: int | None
    packed_per_head: bool = False


def read_model(config: dict[str, Any], options: Options, schedule: Kind, path: str) -> Model:
    """Raises UserError for a model of another class, and for a setting that is not supported."""
    name = config.get("_class_name", UNET)
    if name == UNET:
        return _unet(config, options, schedule, path)
    if name in (DIT, OLD_DIT):
        return _dit(config, options, path)
    raise UserError(f"{path}: _class_name {name!r} is not supported, only {UNET} and {DIT}")


def completed(model: Model, tensors: Mapping[str, Tensor]) -> Model:
    """The model with what its weights say and its config does not.

    A conversion of ADM left out that its middle attention is normalised as the others are.
    """
    config = model.config
    if _MIDDLE_NORM not in tensors or config.get("attn_norm_num_groups", 0) is not None:
        return model
    return replace(model, config={**config, "attn_norm_num_groups": config.get("norm_num_groups", 32)})


def build(model: Model, tensors: Mapping[str, Tensor], path: str) -> Any:
    """The network with its weights. Raises UserError if these do not fit its config."""
    config = model.config
    if _MIDDLE_NORM in tensors and config.get("attn_norm_num_groups", 0) is None:
        # a conversion of ADM left out that its middle attention is normalised as the others are
        config = {**config, "attn_norm_num_groups": config.get("norm_num_groups", 32)}
    network = network_of(replace(model, config=config), path)
    weights = fitting_weights(network, tensors, path)
    if model.packed_per_head:
        weights = _unpacked(network, weights)
    network.load_state_dict(weights)
    return network


def fitting_weights(network: nn.Module, tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors under the names that the network has for them. Raises UserError if they do not fit it."""
    wanted = network.state_dict()
    weights = _present(tensors, wanted)
    check_fit(weights, wanted, f"{path}: does not fit its config.json")
    return weights


def network_of(model: Model, path: str) -> Any:
    """The network of a model, with random weights."""
    from dsno_cluster.networks.diffusers_backbone import dit_model, unet2d_model

    return (unet2d_model if model.kind == UNET else dit_model)(model.config, path)


def _unet(config: dict[str, Any], options: Options, schedule: Kind, path: str) -> Model:
    """diffusers' U-Net, and ADM's as forks of diffusers convert it (`time_embedding_type` adm).

    ADM's embedding of time is diffusers' positional one with the cosines first and no shift of frequencies.
    """
    time = config.get("time_embedding_type", "positional")
    shifts = config.get("flip_sin_to_cos", True), config.get("freq_shift", 0)
    if time == "fourier" and schedule in ("betas", "edm", "consistency"):
        raise UserError(
            f"{path}: time_embedding_type 'fourier' takes the logarithm of the network's time, which is 0 or less with this "
            "scheduler"
        )
    if time == "learned":
        raise UserError(
            f"{path}: time_embedding_type 'learned' is not supported: it knows whole timesteps only"
        )
    if time not in ("positional", "fourier", "adm") or (time == "adm" and shifts != (True, 0)):
        raise UserError(
            f"{path}: time_embedding_type {time!r} is not supported, only positional, fourier and adm"
        )
    if time != "fourier" and schedule == "ve":
        raise UserError(
            f"{path}: time_embedding_type {time!r} with a variance-exploding scheduler is not supported, only fourier"
        )
    channels, classes, null = _channels(config, path), *_unet_classes(config, options, path)
    usable = {k: v for k, v in config.items() if k not in ("attention_legacy_order", *_OF_AVERAGES)}
    if time == "adm":
        usable["time_embedding_type"] = "positional"
    for kind, resampling in (("down_block_types", "downsample_type"), ("up_block_types", "upsample_type")):
        blocks = config.get(kind)
        if isinstance(blocks, list) and any(block in _OLD_BLOCKS for block in blocks):
            usable |= {kind: [_OLD_BLOCKS.get(block, block) for block in blocks], resampling: "resnet"}
    legacy = config.get("attention_legacy_order", False)
    if not isinstance(legacy, bool):
        raise UserError(f"{path}: attention_legacy_order {legacy!r} is not one of: true, false")
    size = _size(options.get("sample_size", config.get("sample_size")), path)
    return Model(UNET, usable, (channels, *size), classes, null, packed_per_head=legacy)


def _unet_classes(config: dict[str, Any], options: Options, path: str) -> tuple[int, int | None]:
    """The number of classes without the null class, and the null class."""
    embedding, given = config.get("class_embed_type"), options.get("num_classes")
    if embedding == "timestep":
        if type(given) is not int or given < 1:
            raise UserError(
                f"{path}: class_embed_type 'timestep' does not say how many classes there are; give option num_classes"
            )
        classes = given
    elif embedding is None:
        classes = config.get("num_class_embeds") or 0
        if type(classes) is not int or classes < 0:
            raise UserError(f"{path}: num_class_embeds {classes!r} is no number of classes")
        if given is not None and given != classes:
            raise UserError(
                f"{path}: option num_classes is {given!r}, but config.json says num_class_embeds {classes}"
            )
    elif embedding == "identity":
        raise UserError(
            f"{path}: class_embed_type 'identity' is not supported: it takes embeddings, not labels"
        )
    else:
        raise UserError(f"{path}: class_embed_type {embedding!r} is not supported, only none and 'timestep'")
    null = options.get("null_class")
    if null is not None and (classes < 2 or null != classes - 1):
        raise UserError(
            f"{path}: null_class {null!r}: the model has {classes} class embeddings; the null class must be the last "
            f"of them{f', {classes - 1}' if classes > 1 else ''}"
        )
    return classes - (null is not None), null


def _dit(config: dict[str, Any], options: Options, path: str) -> Model:
    """DiT (Peebles & Xie 2023): its null class is the row after the last class."""
    norm, classes = config.get("norm_type", "ada_norm_zero"), config.get("num_embeds_ada_norm", 1000)
    if norm != "ada_norm_zero" or config.get("cross_attention_dim") is not None:
        raise UserError(
            f"{path}: this {config.get('_class_name')} is no DiT (norm_type {norm!r}, cross_attention_dim "
            f"{config.get('cross_attention_dim')!r}); only DiT is supported"
        )
    if type(classes) is not int or classes < 1:
        raise UserError(f"{path}: num_embeds_ada_norm {classes!r} is no number of classes")
    for key, right in (
        ("num_classes", classes),
        ("null_class", classes),
        ("sample_size", config.get("sample_size", 32)),
    ):
        if options.get(key, right) != right:
            raise UserError(
                f"{path}: option {key} is {options[key]!r}, but config.json says {right!r}; leave it out"
            )
    channels = _channels({"in_channels": 4, **config}, path, default_out=True)
    usable = {k: v for k, v in config.items() if k not in _OF_OLD_DITS}
    return Model(DIT, usable, (channels, *_size(config.get("sample_size", 32), path)), classes, classes)


def _channels(config: dict[str, Any], path: str, default_out: bool = False) -> int:
    """Channels of a state. The network may give twice as many: the second half is a variance, which is not used."""
    channels = config.get("in_channels", 3)
    out = config.get("out_channels", channels if default_out else 3)
    out = channels if out is None and default_out else out
    if type(channels) is not int or channels < 1 or type(out) is not int:
        raise UserError(f"{path}: in_channels {channels!r}, out_channels {out!r} are no numbers of channels")
    if out not in (channels, 2 * channels):
        raise UserError(
            f"{path}: {channels} channels in, {out} out: not supported; as many are expected, or twice as many with a learned "
            "variance (a model that is conditioned on an image has more channels in)"
        )
    return channels


def _size(size: Any, path: str) -> tuple[int, int]:
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if not (type(height) is int and type(width) is int and height > 0 and width > 0):
        raise UserError(f"{path}: sample_size {size!r} is no image size; give option sample_size=")
    return height, width


def _present(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of today; attention layers were 1x1 convolutions once."""
    weights = {}
    for name, tensor in tensors.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        target = wanted.get(name)
        if target is not None and target.ndim == 2 and tensor.shape == (*target.shape, 1, 1):
            tensor = tensor[:, :, 0, 0]
        weights[name] = tensor
    return weights


def _unpacked(network: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the rows of each attention's query, key and value in the order that diffusers expects.

    The original's legacy order splits the joint output by heads first, then into query, key and value (Dhariwal & Nichol
    2021, guided-diffusion's QKVAttentionLegacy); the conversion cut that output into three equal parts.
    """
    import torch

    ordered = dict(weights)
    for name, module in network.named_modules():
        if not hasattr(module, "to_q"):
            continue
        for kind in ("weight", "bias"):
            keys = [f"{name}.{part}.{kind}" for part in ("to_q", "to_k", "to_v")]
            if keys[0] not in weights:
                continue
            rows = torch.cat([weights[key] for key in keys]).unflatten(0, (module.heads, 3, -1))
            ordered |= {key: rows[:, i].flatten(0, 1) for i, key in enumerate(keys)}
    return ordered
