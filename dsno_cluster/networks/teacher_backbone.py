"""A teacher's own network as the backbone of a student.

Its last layer is widened to the student's outputs. What the network keeps beside its weights, such as frequencies, becomes
weights: training keeps, averages and saves weights only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsno_cluster.networks.adm_unet import ADMUNet, Step
from dsno_cluster.networks.backbones import (
    ADMNetwork,
    AnyNetwork,
    Backbone,
    DhariwalNetwork,
    DiffusersTransformer,
    DiffusersUNet,
    EDM2Network,
    OurUNet,
    SongNetwork,
    TransformerNetwork,
)
from dsno_cluster.networks.dhariwal_unet import DhariwalUNet
from dsno_cluster.networks.diffusers_backbone import dit_model, mixed_blocks, unet2d_model
from dsno_cluster.networks.edm2_unet import EDM2UNet, MPBlock
from dsno_cluster.networks.edm_layers import UNetBlock
from dsno_cluster.networks.mixed_blocks import mix_after, set_basis
from dsno_cluster.networks.normalization import repeat
from dsno_cluster.networks.song_unet import SongUNet
from dsno_cluster.networks.temporal import FourierBasis
from dsno_cluster.networks.trainable import give_weights_an_axis
from dsno_cluster.networks.transformer import Transformer
from dsno_cluster.networks.unet import UNet

OURS = (SongUNet, DhariwalUNet, EDM2UNet, ADMUNet, Transformer)
WHOSE = "a student on the network of its teacher"


class TeacherBackbone(nn.Module):
    """The network that `described` describes, for states of `channels`; its last layer has `out_channels`.

    With `modes`, temporal convolutions follow its blocks; transformers have none. `init` is theirs.
    """

    def __init__(
        self,
        described: Backbone,
        channels: int,
        *,
        modes: int,
        out_channels: int,
        dropout: float = 0.0,
        init: str = "published",
    ) -> None:
        super().__init__()
        if modes and described.is_transformer:
            raise ValueError("a transformer has no temporal convolutions: its student is a series")
        self.described, self.channels, self.out_channels = described, channels, out_channels
        if isinstance(described.network, OurUNet):
            settings = described.network.settings.model_copy(update={"dropout": dropout})
            self.network: Any = UNet(settings, modes, out_channels, init)
            return
        self.network = _build(described.network, out_channels, dropout)
        _make_all_weights(self.network)
        if modes:
            mix_after(_mixed(self.network), modes, init, ends=_ends_apart(described.network))

    def forward(
        self,
        x_NCHW: Tensor,
        time: Tensor,
        labels_N: Tensor | None = None,
        basis: FourierBasis | None = None,
        last_basis: FourierBasis | None = None,
    ) -> Tensor:
        """As `UNet.forward`, with the network's own times, (N, M) or (1, M), in place of log-SNRs -> (N, M, C_out, H, W)."""
        scale, shift, skip = self.described.scale, self.described.shift, self.described.skip
        x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        given = x_NCHW if (scale, shift) == (1.0, 0.0) else scale * x_NCHW + shift
        output: Tensor
        if isinstance(self.network, UNet):
            output = self.network(given, time, labels_N, basis, last_basis)
        else:
            output = self._of_images(given, time, labels_N, basis, last_basis)
        if skip == 0.0:
            return output
        rest = self.out_channels - self.channels
        return output + F.pad(skip * x_NCHW, (0, 0, 0, 0, 0, rest))[:, None]

    def _of_images(
        self,
        x_NCHW: Tensor,
        time: Tensor,
        labels_N: Tensor | None,
        basis: FourierBasis | None,
        last_basis: FourierBasis | None,
    ) -> Tensor:
        """The output of a network that takes one time for each image, (N, M, C_out, H, W)."""
        count, points = x_NCHW.shape[0], time.shape[1]
        x_BCHW = repeat(x_NCHW, count * points)
        time_B = time.expand(count, points).reshape(-1)
        labels_B = None if labels_N is None else labels_N.repeat_interleave(points)
        set_basis(self.network, basis, last_basis)
        output: Tensor
        if isinstance(self.network, OURS):
            output = self.network(x_BCHW, time_B, labels_B)
        else:
            output = self.network(x_BCHW, time_B, class_labels=labels_B, return_dict=False)[0]
        return output.reshape(count, -1, *output.shape[1:])

    @torch.no_grad()
    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Take over the weights of the teacher's network, so that the first `channels` outputs are its x0 at t=1.

        The other outputs begin with 0. The weights must be those of the network that is described.
        """
        own = self.network.state_dict()
        last = set(_last_layers(self.network))
        started = {
            name: self._widened(tensor) if name.rpartition(".")[0] in last else torch.atleast_1d(tensor)
            for name, tensor in weights.items()
        }
        if isinstance(self.network, EDM2UNet):  # filters of unit magnitude cannot vanish, their gains can
            terms = self.out_channels // self.channels
            started["out_conv.weight"] = weights["out_conv.weight"].repeat(terms, 1, 1, 1)
            started["out_gain"] = torch.zeros_like(own["out_gain"])
            started["out_gain"][: self.channels] = self.described.gains[0] * weights["out_gain"]
        self.network.load_state_dict(own | started)

    def _widened(self, tensor: Tensor) -> Tensor:
        """A tensor of the last layer: its rows are those of all channels, once for each pixel of a transformer's token."""
        squares = _squares(self.described.network)
        rows = tensor.unflatten(0, (squares, -1))
        parts = rows.split(self.channels, dim=1)
        wide = rows.new_zeros(squares, self.out_channels, *rows.shape[2:])
        for gain, part in zip(self.described.gains, parts, strict=False):
            wide[:, : self.channels] += gain * part
        widened: Tensor = wide.flatten(0, 1)
        return widened


def _build(described: AnyNetwork, out_channels: int, dropout: float) -> Any:
    """The network, with new weights and a last layer of `out_channels`."""
    with_dropout = {"dropout": dropout}
    match described:
        case SongNetwork():
            return SongUNet(
                described.settings.model_copy(update={**with_dropout, "out_channels": out_channels})
            )
        case DhariwalNetwork():
            return DhariwalUNet(
                described.settings.model_copy(update={**with_dropout, "out_channels": out_channels})
            )
        case EDM2Network():
            return EDM2UNet(described.settings.model_copy(update=with_dropout), out_channels)
        case ADMNetwork():
            return ADMUNet(described.settings.model_copy(update={"out_channels": out_channels}))
        case TransformerNetwork():
            transformer = Transformer(described.settings.model_copy(update={"out_channels": out_channels}))
            nn.init.normal_(transformer.positions, std=0.02)
            return transformer
        case DiffusersUNet():
            return unet2d_model({**described.settings, **with_dropout, "out_channels": out_channels}, WHOSE)
        case DiffusersTransformer():
            dit = dit_model({**described.settings, **with_dropout, "out_channels": out_channels}, WHOSE)
            for module in dit.modules():
                if hasattr(module, "dropout_prob"):  # of labels, which a student always has
                    module.dropout_prob = 0.0
            return dit


def _last_layers(network: nn.Module) -> list[str]:
    """The names of the layers whose sum is the output."""
    if isinstance(network, SongUNet):
        return [f"dec.{name}" for name in network.dec if name.endswith("_aux_conv")]
    named = ("out_conv", "conv_out", "linear_out", "proj_out_2")
    return [name for name, _ in network.named_children() if name in named]


def _squares(described: AnyNetwork) -> int:
    """The number of pixels of a token; 1 for a U-Net."""
    if isinstance(described, TransformerNetwork):
        return described.settings.patch_size**2
    if isinstance(described, DiffusersTransformer):
        patch = described.settings.get("patch_size", 2)
        assert isinstance(patch, int)
        return patch**2
    return 1


def _mixed(network: Any) -> Iterator[tuple[nn.Module, int]]:
    """The blocks that temporal convolutions follow, with their channels, in the order of a forward pass."""
    if isinstance(network, ADMUNet):
        middle = network.middle_attention
        yield from _steps(network.down)
        yield middle, middle.out.out_channels
        yield from _steps(network.up)
    elif isinstance(network, SongUNet | DhariwalUNet | EDM2UNet):
        for name, module in (*network.enc.items(), *network.dec.items()):
            if "_block" not in name and not name.endswith("_in0"):
                continue
            if isinstance(module, UNetBlock):
                yield module, module.conv1.out_channels
            elif isinstance(module, MPBlock):
                yield module, len(module.conv_res1.weight)
    else:
        yield from mixed_blocks(network)


def _steps(steps: nn.ModuleList) -> Iterator[tuple[nn.Module, int]]:
    for step in steps:
        assert isinstance(step, Step)
        if step.residual is not None:
            yield step.attention or step.residual, step.residual.conv_out.out_channels


def _ends_apart(described: AnyNetwork) -> bool:
    """Whether what follows the last block treats each image by itself, without other levels' images or its time."""
    if isinstance(described, SongNetwork):
        return described.settings.decoder_type != "skip"
    if isinstance(described, DiffusersUNet):  # of these, one that divides the image by its time
        return described.settings.get("time_embedding_type") != "fourier"
    return True


def _make_all_weights(network: nn.Module) -> None:
    """Turn every tensor of the state dict into a weight that is trained, with one axis or more."""
    kept = network.state_dict().keys()
    for path, module in list(network.named_modules()):
        for name, buffer in list(module.named_buffers(recurse=False)):
            if f"{path}.{name}".lstrip(".") in kept:
                delattr(module, name)
                module.register_parameter(name, nn.Parameter(buffer))
    give_weights_an_axis(network)
    network.requires_grad_(True)
