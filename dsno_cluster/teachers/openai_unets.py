"""State dicts of OpenAI's U-Nets: what their shapes say, what the options must, and the denoiser that follows.

openai-adm: guided-diffusion (Dhariwal & Nichol 2021) and improved-diffusion (Nichol & Dhariwal 2021) predict eps at discrete
levels, in the first half of the channels if the variance is learned. openai-edm: the teachers of consistency models
(Song et al. 2023) are preconditioned as EDM (Karras et al. 2022, table 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from dsno_cluster.diffusion import preconditioning
from dsno_cluster.diffusion.discrete_levels import native_timesteps, openai_levels
from dsno_cluster.diffusion.preconditioning import Scalings
from dsno_cluster.diffusion.schedule import karras_sigmas, logsnr, time_of_angle
from dsno_cluster.errors import UserError
from dsno_cluster.networks.backbones import ADMNetwork, Backbone
from dsno_cluster.networks.descriptions import ADMDescription
from dsno_cluster.teachers.backbones import levels_of_sigmas, of_levels, of_scalings
from dsno_cluster.teachers.discrete import of_discrete_levels
from dsno_cluster.teachers.facts import PREDICTED, Facts, number_of_parameters, sigmas_of_levels
from dsno_cluster.teachers.identity import ADMIdentity, OpenAIEDMIdentity
from dsno_cluster.teachers.openai_published import ADM, EDM, PUBLISHED
from dsno_cluster.teachers.openai_shapes import (
    as_convolution,
    describe,
    original_names,
    whole_qkv,
)
from dsno_cluster.teachers.state_dict_file import (
    Reading,
    StateDict,
    heads_given,
    one_of,
    whole_number,
)
from dsno_cluster.teachers.teacher import NativeGrid, Options, TeacherInfo, check_options, check_schedule
from dsno_cluster.weight_files import check_fit

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dsno_cluster.teachers.state_dict_file import Denoise

_ATTENTION = ("num_heads", "num_head_channels", "new_attention_order")
_OPTIONS = {
    ADM: (
        *("family", *_ATTENTION, "beta_schedule", "diffusion_steps", "rescale_timesteps", "predict_xstart"),
        *("image_size", "schedule", "timestep_respacing"),
    ),
    EDM: ("family", *_ATTENTION, "image_size", "schedule"),
}
SIGMAS = (0.002, 80.0)


@dataclass(frozen=True)
class Settings:
    """What shapes do not say. The fields after `image_size` are those of openai-adm."""

    family: str
    num_heads: int | None
    num_head_channels: int | None
    new_attention_order: bool
    image_size: int | None
    beta_schedule: Literal["linear", "cosine"] = "linear"
    diffusion_steps: int = 1000
    rescale_timesteps: bool = False
    predict_xstart: bool = False


def read(state: StateDict, options: Options) -> Reading:
    """The teacher of a state dict. Raises UserError if its network is another one, or an option is missing or wrong."""
    import torch

    from dsno_cluster.networks.adm_unet import ADMUNet

    described = describe(state)
    settings = settings_of(state, described, options)
    described = described.model_copy(
        update={"heads": settings.num_heads, "head_channels": settings.num_head_channels}
    )
    with torch.device("meta"):
        network = ADMUNet(described)
    names = original_names(network)
    found = {name: as_convolution(name, tensor) for name, tensor in state.tensors.items()}
    wanted = {names[ours]: tensor for ours, tensor in network.state_dict().items()}
    check_fit(found, wanted, f"{state.path}: does not fit the U-Net that its shapes describe")

    def build(dtype: torch.dtype) -> tuple[nn.Module, Denoise]:
        unet = ADMUNet(described)
        weights = {ours: found[theirs] for ours, theirs in names.items()}
        if not settings.new_attention_order:
            weights = {name: whole_qkv(name, tensor, described) for name, tensor in weights.items()}
        unet.load_state_dict(weights)
        unet.to(memory_format=torch.channels_last)
        unet.eval().requires_grad_(False).to(dtype)
        return unet, (_edm if settings.family == EDM else _adm)(unet, dtype, settings)

    parameters = number_of_parameters(lambda: ADMUNet(described))
    facts = _facts(settings, described, parameters, _native(settings, options, state.path))
    return Reading(_info(state, described, settings, options), facts, build)


def _facts(settings: Settings, described: ADMDescription, parameters: int, native: NativeGrid) -> Facts:
    if settings.family == EDM:
        prediction = "F, preconditioned as EDM"
        return Facts(
            "U-Net of consistency_models",
            prediction,
            "every sigma",
            parameters,
            SIGMAS,
            native,
            "heun-edm",
            40,
        )
    variance = ", and a variance, which is not used" if described.out_channels > described.channels else ""
    levels = openai_levels(settings.beta_schedule, settings.diffusion_steps)
    return Facts(
        "U-Net of guided-diffusion",
        PREDICTED["x" if settings.predict_xstart else "eps"] + variance,
        f"betas {settings.beta_schedule}, {settings.diffusion_steps} levels",
        parameters,
        sigmas_of_levels(levels),
        native,
        steps=250,
    )


def settings_of(state: StateDict, described: ADMDescription, given: Options) -> Settings:
    """The settings that the options and, for networks of published sizes, their authors' commands give."""
    path, learned_variance = state.path, described.out_channels != described.channels
    flat = state.tensors.get("middle_block.1.qkv.weight")
    two_dimensional = flat is not None and flat.ndim == 4  # so in consistency_models, and nowhere else
    known: dict[str, Any] = {}
    for sizes, settings in PUBLISHED:
        if sizes == described and (settings["family"] == EDM) == two_dimensional:
            known = dict(settings)
    if given.keys() & {"num_heads", "num_head_channels"}:
        known = {
            name: value for name, value in known.items() if name not in ("num_heads", "num_head_channels")
        }
    options = known | dict(given)
    # no EDM has a learned variance
    if learned_variance and options.setdefault("family", ADM) == EDM:
        raise UserError(f"{path}: option family {EDM}: it has a learned variance, so it is {ADM}")
    family = one_of("family", options, path, (ADM, EDM))
    check_options(given, _OPTIONS[family], path)
    attended = {described.widths[level] for level in described.attention_levels} | {described.widths[-1]}
    heads, head_channels = heads_given(options, path, sorted(attended))
    one_head = all((heads or width // (head_channels or width)) == 1 for width in attended)
    if family == EDM or one_head:  # with one head both orders are the same
        options.setdefault("new_attention_order", True)
    order = one_of("new_attention_order", options, path, (True, False))
    size = None
    if "image_size" in options:
        size, halvings = whole_number("image_size", options, path), len(described.widths) - 1
        if size % 2**halvings:
            raise UserError(
                f"{path}: option image_size {size} is not a multiple of {2**halvings}; it is halved {halvings} times"
            )
    if family == EDM:
        return Settings(family, heads, head_channels, order, size)
    betas = one_of("beta_schedule", options, path, ("linear", "cosine"))
    steps = whole_number("diffusion_steps", {"diffusion_steps": 1000} | options, path)
    if steps < 21:
        raise UserError(f"{path}: option diffusion_steps {steps}: the schedule needs 21 or more")
    if steps == 1000:  # times 1000 / 1000
        options.setdefault("rescale_timesteps", False)
    rescale = one_of("rescale_timesteps", options, path, (True, False))
    x0 = one_of("predict_xstart", {"predict_xstart": False} | options, path, (True, False))
    return Settings(family, heads, head_channels, order, size, betas, steps, rescale, x0)


def _info(state: StateDict, described: ADMDescription, settings: Settings, options: Options) -> TeacherInfo:
    native = _native(settings, options, state.path)
    schedule = check_schedule(options.get("schedule", "continuous"), state.path)
    size = settings.image_size
    return TeacherInfo(
        _identity(state.sha256, settings),
        None if size is None else (described.channels, size, size),
        described.num_classes,
        native=native if schedule == "native" else None,
        has_network=True,
        backbone=_backbone(described, settings),
        clips=True,  # as the authors' sampling commands do by default
    )


def _backbone(described: ADMDescription, settings: Settings) -> Backbone | None:
    network = ADMNetwork(settings=described)
    if settings.family == EDM:
        return of_scalings(network, _edm_scalings, levels_of_sigmas(*SIGMAS), knots=2)
    levels = openai_levels(settings.beta_schedule, settings.diffusion_steps)
    return of_levels(network, levels, _prediction(settings), _time_scale(settings))


def _identity(sha256: str, settings: Settings) -> ADMIdentity | OpenAIEDMIdentity:
    if settings.family == EDM:
        return OpenAIEDMIdentity(
            sha256=sha256,
            num_heads=settings.num_heads,
            num_head_channels=settings.num_head_channels,
            new_attention_order=settings.new_attention_order,
        )
    return ADMIdentity(
        sha256=sha256,
        num_heads=settings.num_heads,
        num_head_channels=settings.num_head_channels,
        new_attention_order=settings.new_attention_order,
        beta_schedule=settings.beta_schedule,
        diffusion_steps=settings.diffusion_steps,
        rescale_timesteps=settings.rescale_timesteps,
        predict_xstart=settings.predict_xstart,
    )


def _native(settings: Settings, options: Options, path: str) -> NativeGrid:
    """The times of the authors' own steps, then 0: timesteps of openai-adm, Karras et al. 2022, eq. 5, for openai-edm."""
    if settings.family == EDM:

        def karras(steps: int) -> tuple[float, ...]:
            return (*(time_of_angle(math.atan(sigma)) for sigma in karras_sigmas(steps, *SIGMAS)), 0.0)

        return karras
    spacing = one_of(
        "timestep_respacing", {"timestep_respacing": "ddim"} | dict(options), path, ("ddim", "even")
    )
    return native_timesteps(openai_levels(settings.beta_schedule, settings.diffusion_steps), spacing)


def _adm(unet: nn.Module, dtype: torch.dtype, settings: Settings) -> Denoise:
    levels = openai_levels(settings.beta_schedule, settings.diffusion_steps)
    return of_discrete_levels(unet, dtype, levels, _time_scale(settings), _prediction(settings))


def _time_scale(settings: Settings) -> float:
    return 1000 / settings.diffusion_steps if settings.rescale_timesteps else 1.0


def _prediction(settings: Settings) -> str:
    return "x" if settings.predict_xstart else "eps"


def _edm(unet: nn.Module, dtype: torch.dtype, settings: Settings) -> Denoise:
    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        k = _edm_scalings(logsnr(t_N))
        c_skip, c_out, c_in = (c.to(x.dtype)[:, None, None, None] for c in (k.c_skip, k.c_out, k.c_in))
        output: Tensor = unet((c_in * x).to(dtype), k.c_noise.float(), labels).to(x.dtype)
        return c_skip * x + c_out * output

    return denoise


def _edm_scalings(level_N: Tensor) -> Scalings:
    """EDM's preconditioning, with 1000 times its noise level, 250 ln sigma, as its authors' code has it."""
    sigma_N = (-0.5 * level_N).exp().clamp(*SIGMAS)
    k = preconditioning.of_states(preconditioning.edm(sigma_N), sigma_N)
    return replace(k, c_noise=1000.0 * k.c_noise)
