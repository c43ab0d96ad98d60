"""What describes a teacher's own network as the backbone of a student, so that it can be built without the teacher's file.

A student sees pure noise x only, at t=1. A teacher's clean image there, at its noisiest level, is

    x0 = skip x + gains[0] F_0(scale x + shift) + gains[1] F_1(scale x + shift) + ...

with constants that follow from its preconditioning or from what it predicts. F_i are the first parts of its output, each of
as many channels as a state; what comes after them, such as a variance, is left out. These records need no torch.
"""

from __future__ import annotations

import bisect
from typing import Annotated, Literal

from pydantic import Field

from dsno_cluster.config import Network
from dsno_cluster.config.base import Strict
from dsno_cluster.networks.descriptions import ADMDescription, TransformerDescription
from dsno_cluster.networks.edm_settings import DhariwalSettings, EDM2Settings, SongSettings
from dsno_cluster.records import Values


class OurUNet(Strict):
    """Our U-Net (`unet.py`)."""

    kind: Literal["unet"] = "unet"
    settings: Network


class SongNetwork(Strict):
    """DDPM++ or NCSN++ (`song_unet.py`)."""

    kind: Literal["song"] = "song"
    settings: SongSettings


class DhariwalNetwork(Strict):
    """EDM's ADM (`dhariwal_unet.py`)."""

    kind: Literal["dhariwal"] = "dhariwal"
    settings: DhariwalSettings


class EDM2Network(Strict):
    """EDM2's U-Net (`edm2_unet.py`)."""

    kind: Literal["edm2"] = "edm2"
    settings: EDM2Settings


class ADMNetwork(Strict):
    """The U-Net of guided- and improved-diffusion (`adm_unet.py`)."""

    kind: Literal["adm"] = "adm"
    settings: ADMDescription


class TransformerNetwork(Strict):
    """DiT or SiT (`transformer.py`)."""

    kind: Literal["transformer"] = "transformer"
    settings: TransformerDescription


class DiffusersUNet(Strict):
    """A UNet2DModel of diffusers, by its config."""

    kind: Literal["diffusers-unet"] = "diffusers-unet"
    settings: Values


class DiffusersTransformer(Strict):
    """A DiTTransformer2DModel of diffusers, by its config."""

    kind: Literal["diffusers-dit"] = "diffusers-dit"
    settings: Values


AnyNetwork = Annotated[
    OurUNet
    | SongNetwork
    | DhariwalNetwork
    | EDM2Network
    | ADMNetwork
    | TransformerNetwork
    | DiffusersUNet
    | DiffusersTransformer,
    Field(discriminator="kind"),
]
TRANSFORMERS = (TransformerNetwork, DiffusersTransformer)
WITHOUT_DROPOUT = (ADMNetwork, TransformerNetwork)


class NetworkTimes(Strict):
    """The noise level as a network counts it, at ascending log-SNRs: linear between them, beyond them that of the nearest."""

    logsnr: tuple[float, ...]
    time: tuple[float, ...]

    def at(self, logsnr: float) -> float:
        """The network's time at a log-SNR."""
        upper = bisect.bisect_left(self.logsnr, logsnr)
        if upper == 0 or upper == len(self.logsnr):
            return self.time[max(0, upper - 1)]
        low, high = self.logsnr[upper - 1 : upper + 1]
        part = (logsnr - low) / (high - low)
        return self.time[upper - 1] + part * (self.time[upper] - self.time[upper - 1])


class Backbone(Strict):
    """A teacher's network, its times, and the constants at t=1 that the top of this module explains.

    Times of a transformer may be that of t=1 only: it is evaluated nowhere else.
    """

    network: AnyNetwork
    times: NetworkTimes
    scale: float
    skip: float
    gains: Annotated[tuple[float, ...], Field(min_length=1)]
    shift: float = 0.0

    @property
    def is_transformer(self) -> bool:
        return isinstance(self.network, TRANSFORMERS)
