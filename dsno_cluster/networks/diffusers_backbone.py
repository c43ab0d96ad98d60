"""diffusers' models, and a UNet2DModel as the backbone of a student, with temporal convolutions and our U-Net's interface.

The model's tensors keep diffusers' names, below `unet.`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsno_cluster.diffusion.discrete_levels import noise_levels, timesteps_at
from dsno_cluster.errors import UserError, said_by
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.networks.mixed_blocks import mix_after, set_basis
from dsno_cluster.networks.normalization import keep_layouts, repeat
from dsno_cluster.networks.temporal import FourierBasis
from dsno_cluster.records import Values
from dsno_cluster.torch_internals import actual_tensors

PAIRED = (
    *("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    *("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
)


def unet2d_model(config: Values, where: str) -> Any:
    """A freshly initialised diffusers UNet2DModel of that config.

    Raises UserError if diffusers is not installed, or cannot build it.
    """
    unet = _of_config("UNet2DModel", config, where)
    keep_layouts(unet)
    return unet


def dit_model(config: Values, where: str) -> Any:
    """A freshly initialised diffusers DiTTransformer2DModel of that config. Raises UserError as `unet2d_model`."""
    return _of_config("DiTTransformer2DModel", {**config, "_class_name": "DiTTransformer2DModel"}, where)


def autoencoder_model(config: Values, where: str) -> Any:
    """A freshly initialised diffusers AutoencoderKL of that config. Raises UserError as `unet2d_model`."""
    return _of_config("AutoencoderKL", config, where)


def _of_config(name: str, config: Values, where: str) -> Any:
    try:
        import diffusers
    except ImportError:
        raise UserError(f"{where}: reading it needs diffusers: pip install diffusers") from None
    if not hasattr(diffusers, name):
        raise UserError(
            f"{where}: reading it needs a newer diffusers, which has {name}: pip install -U diffusers"
        )
    try:
        return getattr(diffusers, name).from_config(config)
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        AssertionError,
    ) as error:
        raise UserError(
            f"{where}: no network can be built of its config.json: {said_by('diffusers', error)}"
        ) from None


class DiffusersBackbone(nn.Module):
    """The UNet2DModel of `model`, whose last layer has `out_channels`."""

    def __init__(
        self,
        model: DiffusersModel,
        *,
        modes: int,
        out_channels: int,
        init: str = "published",
    ) -> None:
        super().__init__()
        self.unet = unet2d_model(
            {**model.config, "out_channels": out_channels}, "a student with a diffusers backbone"
        )
        with actual_tensors():  # the levels are numbers, also of a network whose memory is estimated
            self.levels = noise_levels(model.scheduler, "scheduler")
        _keep_layouts_in_training(self.unet)
        if modes:
            mix_after(mixed_blocks(self.unet), modes, init)

    def forward(
        self,
        x_NCHW: Tensor,
        logsnr: Tensor,
        labels_N: Tensor | None = None,
        basis: FourierBasis | None = None,
        last_basis: FourierBasis | None = None,
    ) -> Tensor:
        """As `UNet.forward`. Levels outside the scheduler's range are replaced by its nearest."""
        count, points = x_NCHW.shape[0], logsnr.shape[1]
        timestep_B = timesteps_at(self.levels, logsnr).expand(count, points).reshape(-1).float()
        x_BCHW = repeat(x_NCHW.contiguous(memory_format=torch.channels_last), count * points)
        labels_B = None if labels_N is None else labels_N.repeat_interleave(points)
        set_basis(self.unet, basis, last_basis)
        output: Tensor = self.unet(x_BCHW, timestep_B, labels_B, return_dict=False)[0]
        return output.reshape(count, -1, *output.shape[1:])


def _keep_layouts_in_training(unet: Any) -> None:
    """Keep activations channels-last where diffusers makes them contiguous.

    Its residual blocks do so before their 1x1 convolution while they train, which nothing else in them asks (their
    dropout has its own state); its upsampling does so from 64 images on.
    """
    for module in unet.modules():
        kind: Any = type(module)
        if kind.__name__ == "ResnetBlock2D":
            module.__class__ = _never_training(kind)
            module.training = False
        if kind.__name__ == "Upsample2D" and isinstance(getattr(module, "conv", None), nn.Conv2d):
            module.conv.register_forward_pre_hook(_channels_last)


@functools.cache
def _never_training(kind: Any) -> type[nn.Module]:
    """That kind of module, of which the children train but not the module itself; the name stays."""

    def train(self: nn.Module, mode: bool = True) -> nn.Module:
        kind.train(self, mode)
        self.training = False
        return self

    return type(kind.__name__, (kind,), {"train": train})


def _channels_last(_conv: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


def mixed_blocks(unet: Any) -> Iterator[tuple[nn.Module, int]]:
    """The blocks of a UNet2DModel that temporal convolutions follow, and their channels.

    Raises UserError if a level's residual and attention blocks do not come in pairs.
    """
    for level in (*unet.down_blocks, *unet.up_blocks):
        kind = type(level).__name__
        if kind not in PAIRED:
            raise UserError(
                f"student.backbone: blocks of kind {kind} are not supported with student.operator=convolution; "
                f"{', '.join(PAIRED)} are"
            )

    def of_level(level: Any) -> Iterator[tuple[nn.Module, int]]:
        for resnet, block in zip(level.resnets, getattr(level, "attentions", level.resnets), strict=True):
            yield block, resnet.out_channels

    for level in unet.down_blocks:
        yield from of_level(level)
    middle = unet.mid_block
    if middle is not None:
        has_attention = len(middle.attentions) > 0 and middle.attentions[0] is not None
        yield middle.attentions[0] if has_attention else middle.resnets[0], middle.resnets[0].out_channels
    for level in unet.up_blocks:
        yield from of_level(level)
