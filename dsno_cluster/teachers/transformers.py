"""State dicts of DiT and SiT: what their shapes say, what the options must, and the denoiser that follows.

Both have the same tensors. dit (Peebles & Xie 2023) predicts eps on OpenAI's linear schedule of 1000 levels, sit (Ma et al. 2024)
the velocity x0 - eps on the linear path. If half of the output is for a variance, the first half counts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dsno_cluster.diffusion.discrete_levels import native_timesteps, openai_levels
from dsno_cluster.diffusion.schedule import LOGSNR_MIN, flow_grid, flow_scales
from dsno_cluster.errors import UserError
from dsno_cluster.networks.backbones import Backbone, NetworkTimes, TransformerNetwork
from dsno_cluster.networks.descriptions import TransformerDescription
from dsno_cluster.teachers.backbones import of_levels
from dsno_cluster.teachers.decoders import MOST_COLOURS
from dsno_cluster.teachers.discrete import of_discrete_levels
from dsno_cluster.teachers.facts import PREDICTED, Facts, sigmas_of_levels
from dsno_cluster.teachers.identity import DiTIdentity, SiTIdentity
from dsno_cluster.teachers.state_dict_file import Reading, StateDict, heads_given, one_of
from dsno_cluster.teachers.teacher import NativeGrid, Options, TeacherInfo, check_options, check_schedule
from dsno_cluster.weight_files import check_fit

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dsno_cluster.teachers.state_dict_file import Denoise

DIT, SIT = "dit", "sit"
_HEADS = ("num_heads", "num_head_channels")
_OPTIONS = {
    DIT: ("family", *_HEADS, "schedule", "timestep_respacing"),
    SIT: ("family", *_HEADS, "schedule"),
}
# Heads of the published sizes S, B, L and XL (Peebles & Xie 2023, table 1), by width and depth.
_PUBLISHED_HEADS = {(384, 12): 6, (768, 12): 12, (1024, 24): 16, (1152, 28): 16}
DIT_LEVELS = 1000


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of such a transformer."""
    return "x_embedder.proj.weight" in tensors and "blocks.0.adaLN_modulation.1.weight" in tensors


def read(state: StateDict, options: Options) -> Reading:
    """The teacher of a state dict. Raises UserError if its network is another one, or an option is missing or wrong."""
    import torch

    from dsno_cluster.networks.transformer import Transformer

    without_heads = describe(state)
    family, heads = family_and_heads(state, without_heads, options)
    described = without_heads.model_copy(update={"heads": heads})
    with torch.device("meta"):
        network = Transformer(described)
    names = {ours: original_name(ours) for ours in network.state_dict()}
    wanted = {names[ours]: tensor for ours, tensor in network.state_dict().items()}
    check_fit(state.tensors, wanted, f"{state.path}: does not fit the transformer that its shapes describe")

    def build(dtype: torch.dtype) -> tuple[nn.Module, Denoise]:
        transformer = Transformer(described)
        transformer.load_state_dict({ours: state.tensors[theirs] for ours, theirs in names.items()})
        transformer.to(memory_format=torch.channels_last)
        transformer.eval().requires_grad_(False).to(dtype)
        if family == DIT:
            levels = openai_levels("linear", DIT_LEVELS)
            return transformer, of_discrete_levels(transformer, dtype, levels, 1.0, "eps")
        return transformer, _sit(transformer, dtype)

    facts = _facts(family, described, sum(parameter.numel() for parameter in network.parameters()), options)
    return Reading(_info(state, described, family, options), facts, build)


def describe(state: StateDict) -> TransformerDescription:
    """The network that the shapes of a state dict describe, as if it had one head.

    Raises UserError if they do not fit together.
    """
    path = state.path
    width, channels, patch, other = state.shape("x_embedder.proj.weight", 4)
    tokens = state.shape("pos_embed", 3)[1]
    outputs = state.shape("final_layer.linear.weight", 2)[0]
    rows = state.shape("y_embedder.embedding_table.weight", 2)[0]
    side = math.isqrt(tokens)
    if patch != other or side * side != tokens:
        raise UserError(f"{path}: its {tokens} tokens of {patch}x{other} do not make a square: not supported")
    if outputs not in (patch * patch * channels, 2 * patch * patch * channels):
        raise UserError(
            f"{path}: each token gives {outputs} numbers; {patch}x{patch} of {channels} channels are expected, or twice that"
        )
    if rows < 2:
        raise UserError(
            f"{path}: its table of labels has {rows} row; one for a class and one for none are expected"
        )
    return TransformerDescription(
        channels=channels,
        out_channels=outputs // patch**2,
        size=side * patch,
        patch_size=patch,
        width=width,
        depth=state.count("blocks"),
        heads=1,
        mlp_width=state.shape("blocks.0.mlp.fc1.weight", 2)[0],
        features=state.shape("t_embedder.mlp.0.weight", 2)[1],
        num_classes=rows - 1,
    )


def family_and_heads(state: StateDict, described: TransformerDescription, given: Options) -> tuple[str, int]:
    """Family and heads, by the options and by what the file does say."""
    options = dict(given)
    if "family" not in options and _variance_was_never_trained(state, described):
        options["family"] = SIT
    family = one_of("family", options, state.path, (DIT, SIT))
    check_options(given, _OPTIONS[family], state.path)
    published = _PUBLISHED_HEADS.get((described.width, described.depth))
    if published and not given.keys() & set(_HEADS):
        options["num_heads"] = published
    heads, head_channels = heads_given(options, state.path, [described.width])
    return family, heads or described.width // (head_channels or described.width)


def _variance_was_never_trained(state: StateDict, described: TransformerDescription) -> bool:
    """Whether the last layer has outputs for a variance, and all of them are 0, as they are before training.

    SiT's loss has no variance, so its published file has kept the zeros with which this layer begins; DiT trains them.
    """
    if described.out_channels == described.channels:
        return False
    rows = state.tensors["final_layer.linear.weight"].unflatten(0, (-1, described.out_channels))
    return not bool(rows[:, described.channels :].any())


def _facts(family: str, described: TransformerDescription, parameters: int, options: Options) -> Facts:
    variance = ", and a variance, which is not used" if described.out_channels > described.channels else ""
    if family == SIT:
        velocity = f"the velocity x0 - eps of a linear path{variance}"
        return Facts(
            "SiT", velocity, "linear flow, every level", parameters, (0.0, math.inf), flow_grid, steps=50
        )
    levels = openai_levels("linear", DIT_LEVELS)
    native = native_timesteps(levels, str(options.get("timestep_respacing", "even")))
    return Facts(
        "DiT",
        PREDICTED["eps"] + variance,
        f"betas linear, {DIT_LEVELS} levels",
        parameters,
        sigmas_of_levels(levels),
        native,
        steps=250,
    )


def _info(state: StateDict, described: TransformerDescription, family: str, options: Options) -> TeacherInfo:
    schedule = check_schedule(options.get("schedule", "continuous"), state.path)
    if family == DIT:
        even = {"timestep_respacing": "even"} | dict(options)
        spacing = one_of("timestep_respacing", even, state.path, ("ddim", "even"))
        native: NativeGrid = native_timesteps(openai_levels("linear", DIT_LEVELS), spacing)
    else:
        native = flow_grid
    return TeacherInfo(
        (DiTIdentity if family == DIT else SiTIdentity)(sha256=state.sha256, num_heads=described.heads),
        (described.channels, described.size, described.size),
        described.num_classes,
        null_class=described.num_classes,
        native=native if schedule == "native" else None,
        has_network=True,
        latent=described.channels > MOST_COLOURS,
        backbone=_backbone(described, family),
    )


def _backbone(described: TransformerDescription, family: str) -> Backbone:
    network = TransformerNetwork(settings=described)
    if family == DIT:
        return of_levels(network, openai_levels("linear", DIT_LEVELS), "eps")
    time, scale = (float(s) for s in flow_scales(1.0))
    times = NetworkTimes(logsnr=(LOGSNR_MIN,), time=(time,))
    return Backbone(network=network, times=times, scale=scale, skip=scale, gains=(1.0 - time,))


def _sit(transformer: nn.Module, dtype: torch.dtype) -> Denoise:
    """x0 = x_u + (1 - u) v of the state x_u = u x0 + (1 - u) eps (Ma et al. 2024, section 2, with u = 1 - their t)."""

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        time_N, scale_N = flow_scales(t_N)
        scale, rest = (s.to(x.dtype)[:, None, None, None] for s in (scale_N, 1.0 - time_N))
        state = scale * x
        velocity: Tensor = transformer(state.to(dtype), time_N.float(), labels)[:, : x.shape[1]].to(x.dtype)
        return state + rest * velocity

    return denoise


_NAMES = {
    "positions": "pos_embed",
    "cut": "x_embedder.proj",
    "embed_time_in": "t_embedder.mlp.0",
    "embed_time_out": "t_embedder.mlp.2",
    "embed_class": "y_embedder.embedding_table",
    "steer_out": "final_layer.adaLN_modulation.1",
    "linear_out": "final_layer.linear",
    "steer": "adaLN_modulation.1",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp_in": "mlp.fc1",
    "mlp_out": "mlp.fc2",
}


def original_name(name: str) -> str:
    """The name in the original's state dict of a tensor of our network."""
    if name in _NAMES:
        return _NAMES[name]
    layer, _, kind = name.rpartition(".")
    if match := re.fullmatch(r"(blocks\.\d+)\.(.+)", layer):
        return f"{match[1]}.{_NAMES[match[2]]}.{kind}"
    return f"{_NAMES[layer]}.{kind}"
