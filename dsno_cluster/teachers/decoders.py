"""How states become images: they are images, or latents that an autoencoder decodes (AutoencoderKL of diffusers).

A decoder is found without its weights (`Decoder`); `load` reads them, and `load_encoder` those of the way back. What a
state is, and what decodes it, is one record, `States`, which whoever draws or measures images asks.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.config.base import Named
from dsno_cluster.config.paths import is_file_path
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.records import Values
from dsno_cluster.storage import absolute_address
from dsno_cluster.teachers.diffusers_files import (
    Autoencoder,
    find_parts,
    is_folder_of_diffusers,
    read_json,
    read_weights,
)
from dsno_cluster.teachers.teacher import Shape, Source

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KIND: Literal["AutoencoderKL"] = "AutoencoderKL"
MOST_ELEMENTS = (
    2**26
)  # elements of the largest tensor that a decoder may make: 256 MiB, enough for an image of 512x512
MOST_COLOURS = 3  # states of more channels are no images

DecoderPrecision = Literal["float32", "bfloat16"]


class DecoderIdentity(Named):
    """Everything that can change a byte of the images of a decoder; it has no influence on states.

    `sha256` is that of its weights, by file if there are several. `image_shape` is (C, H, W).
    """

    kind: Literal["AutoencoderKL"] = KIND
    sha256: str | dict[str, str]
    config: dict[str, JsonValue]
    scaling_factor: float
    shift_factor: float
    image_shape: tuple[int, int, int]
    precision: DecoderPrecision = "float32"


@dataclass(frozen=True)
class Decoder:
    """An AutoencoderKL in a folder of `save_pretrained`, its weights not read yet.

    An image is decode(latent * std / scaling_factor + mean + shift_factor), with std 1 and mean 0 unless its config
    has them by channel, as the pipelines of diffusers do it. `factor`: how much larger an image is than its latent.
    """

    folder: str
    endpoint_url: str | None
    config: Values
    channels: int
    colours: int
    factor: int
    scaling_factor: float
    shift_factor: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def image_shape(self, state_shape: Shape) -> Shape:
        """(C, H, W) of the image of a latent."""
        _, height, width = state_shape
        return self.colours, self.factor * height, self.factor * width

    @functools.cached_property
    def sha256(self) -> str | dict[str, str]:
        """That of its weights, which are read for it. Raises UserError if there are none."""
        return read_weights(Source(self.folder, self.endpoint_url), "").sha256

    def identity(self, state_shape: Shape, precision: DecoderPrecision = "float32") -> DecoderIdentity:
        """What its images depend on."""
        return DecoderIdentity(
            sha256=self.sha256,
            config=self.config,
            scaling_factor=self.scaling_factor,
            shift_factor=self.shift_factor,
            image_shape=self.image_shape(state_shape),
            precision=precision,
        )

    def load(
        self, device: torch.device | None = None, precision: DecoderPrecision = "float32"
    ) -> LoadedDecoder:
        """The decoder with its weights on `device` (default: the CPU).

        Raises UserError if diffusers is missing or the weights do not fit, and WorkError if they are not those of `sha256`,
        if that was asked for before.
        """
        import torch

        network = self._autoencoder()
        network.encoder = network.quant_conv = None  # nothing is encoded
        network.to(device or torch.device("cpu"))
        for (
            parameter
        ) in network.parameters():  # not network.to(dtype), whose warnings do not apply to this model
            parameter.data = parameter.data.to(getattr(torch, precision))
        if device is not None and device.type == "cuda":
            network.to(memory_format=torch.channels_last)
        return LoadedDecoder(self, network, precision)

    def load_encoder(self, device: torch.device | None = None) -> LoadedEncoder:
        """The encoder of the same autoencoder on `device` (default: the CPU), in float32. Raises as `load` does."""
        import torch

        network = self._autoencoder()
        network.decoder = network.post_quant_conv = None  # nothing is decoded
        return LoadedEncoder(self, network.to(device or torch.device("cpu")))

    def _autoencoder(self) -> Any:
        """diffusers' autoencoder with its weights, which are not trained."""
        from dsno_cluster.networks.diffusers_backbone import autoencoder_model
        from dsno_cluster.teachers.diffusers_networks import fitting_weights

        weights = read_weights(Source(self.folder, self.endpoint_url), "")
        if self.__dict__.setdefault("sha256", weights.sha256) != weights.sha256:
            raise WorkError(f"{self.folder}: the decoder's weights have changed since this command began")
        network = autoencoder_model(self.config, self.folder)
        network.load_state_dict(fitting_weights(network, weights.tensors(self.folder), self.folder))
        return network.eval().requires_grad_(False)

    def scale_and_shift(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """How a latent becomes what the autoencoder decodes: latent * scale + shift, each (C, 1, 1) or (1, 1, 1)."""
        import torch

        def by_channel(values: tuple[float, ...] | None, otherwise: float) -> Tensor:
            return torch.tensor(values or (otherwise,), device=device)[:, None, None]

        return by_channel(self.std, 1.0) / self.scaling_factor, by_channel(self.mean, 0.0) + self.shift_factor

    def at_a_time(self, pixels: int) -> int:
        """How many images of so many `pixels` its networks take, whose largest tensor is of the images' size."""
        return max(1, MOST_ELEMENTS // (max(_widths(self.config)[:2]) * pixels))


@dataclass(frozen=True)
class LoadedDecoder:
    """A decoder with its weights: latents (N, C, h, w) give images (N, C, H, W) float32, in [-1, 1] up to overshoot."""

    decoder: Decoder
    network: Any
    precision: DecoderPrecision = "float32"

    def __call__(self, latents_NCHW: Tensor) -> Tensor:
        """The images, on the device of the latents."""
        import torch

        return torch.cat(list(self.parts(latents_NCHW)))

    def at_a_time(self, latents_NCHW: Tensor) -> int:
        """How many of such latents can be decoded at a time, so that the decoder's largest tensor stays below `MOST_ELEMENTS`."""
        pixels = latents_NCHW.shape[-2] * latents_NCHW.shape[-1] * self.decoder.factor**2
        return self.decoder.at_a_time(pixels)

    def parts(self, latents_NCHW: Tensor) -> Iterator[Tensor]:
        """The images of `at_a_time` latents after the other. They have gradients if the latents do."""
        import torch

        parameter = next(self.network.parameters())
        scale, shift = self.decoder.scale_and_shift(parameter.device)
        with torch.set_grad_enabled(latents_NCHW.requires_grad and torch.is_grad_enabled()):
            for part in latents_NCHW.split(self.at_a_time(latents_NCHW)):
                scaled = part.to(parameter.device, torch.float32) * scale + shift
                image = self.network.decode(scaled.to(parameter.dtype), return_dict=False)[0]
                yield image.float().to(latents_NCHW.device)


@dataclass(frozen=True)
class LoadedEncoder:
    """The encoder of an autoencoder with its weights: images (N, C, H, W) in [-1, 1] give latents (N, C, h, w) float32.

    A latent is the mean of the posterior, not a draw from it, and scaled so that decoding is its inverse:
    (z - mean - shift_factor) * scaling_factor / std, as the image-to-image pipelines of diffusers encode.
    """

    decoder: Decoder
    network: Any

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """The latents, on the device of the images; some images at a time, as for decoding."""
        import torch

        device = next(self.network.parameters()).device
        scale, shift = self.decoder.scale_and_shift(device)
        pixels = images_NCHW.shape[-2] * images_NCHW.shape[-1]
        found = []
        with torch.no_grad():
            for part in images_NCHW.split(self.decoder.at_a_time(pixels)):
                posterior = self.network.encode(part.to(device, torch.float32), return_dict=False)[0]
                found.append(((posterior.mode() - shift) / scale).to(images_NCHW.device))
        return torch.cat(found)


@dataclass(frozen=True)
class States:
    """What the states of a teacher or a student are: images, or latents, and what decodes these.

    `shape` is (C, H, W). `latent`: they are known to be latents; without a decoder, states of more channels than colours
    are taken as such too.
    """

    shape: Shape
    decoder: Decoder | None = None
    latent: bool = False

    @property
    def undecoded(self) -> bool:
        """Whether no images can be had of them."""
        return self.decoder is None and (self.latent or self.shape[0] > MOST_COLOURS)

    @property
    def image_shape(self) -> Shape:
        """(C, H, W) of their images; of the states themselves if nothing decodes them."""
        return self.shape if self.decoder is None else self.decoder.image_shape(self.shape)

    def identity(self, precision: DecoderPrecision) -> DecoderIdentity | None:
        """That of their decoder; None if the states are images."""
        return None if self.decoder is None else self.decoder.identity(self.shape, precision)

    def check_decoded(self, what: str, otherwise: str, key: str = "teacher.decoder") -> None:
        """Raises UserError, which names the `key` to set or what to do `otherwise`, if images are needed and cannot be had."""
        if self.undecoded:
            channels = self.shape[0]
            raise UserError(
                f"{what}: images are needed, and the states are latents of {channels} channels that nothing decodes; set "
                f"{key} to the folder of their {KIND}, or {otherwise}"
            )


def open_decoder(path: str, endpoint_url: str | None, channels: int | None, key: str) -> Decoder:
    """The autoencoder in a folder, or in `vae/` of a pipeline's folder, for latents of so many `channels`.

    Raises UserError, naming the `key`, if there is none, or it is of another kind.
    """
    folder = absolute_address(path).rstrip("/")
    try:
        for place in (folder, f"{folder}/vae"):
            if (config := read_json(Source(place, endpoint_url), "config.json")) is not None:
                return _of_config(config, place, endpoint_url, channels)
        raise UserError(f"{folder}: has neither config.json nor vae/config.json, that of an {KIND}")
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def decoder_of(found: Autoencoder, source: Source, channels: int) -> Decoder | None:
    """The decoder beside a model in a pipeline's folder; None if its files are not there, or it is of another kind.

    Raises UserError if it is for latents of other channels.
    """
    if not found.has_files or found.class_name != KIND:
        return None
    folder = f"{absolute_address(found.root)}/{found.folder}"
    return _of_config(found.config, folder, source.endpoint_url, channels)


def states_of(config: Config) -> States:
    """What the states of a config's teacher are, without reading its weights.

    Raises UserError as `open_decoder`.
    """
    return find_states(
        config.network.state_shape, config.teacher.decoder, config.teacher.path, config.storage.endpoint_url
    )


def find_states(
    shape: Shape,
    decoder: str | None,
    teacher: str | None,
    endpoint_url: str | None,
    key: str = "teacher.decoder",
) -> States:
    """What states (C, H, W) are, by the folder of a `decoder` or, if the teacher is a pipeline, by that.

    Raises UserError as `open_decoder`. A teacher that is not here says nothing.
    """
    if decoder is not None:
        return States(shape, open_decoder(decoder, endpoint_url, shape[0], key), latent=True)
    if teacher is None or not is_file_path(teacher):
        return States(shape)
    source = Source(teacher, endpoint_url)
    try:
        found = find_parts(source, None).autoencoder if is_folder_of_diffusers(source) else None
    except (UserError, WorkError) as error:
        console.say(f"note: {error}; states are taken as images")
        return States(shape)
    if found is None:
        return States(shape)
    return States(shape, decoder_of(found, source, shape[0]), latent=True)


def check_same_scale(chosen: Decoder, own: Decoder, key: str) -> None:
    """Raises UserError if another decoder than the pipeline's own expects latents of another scale."""
    for name in ("scaling_factor", "shift_factor", "mean", "std"):
        ours, theirs = getattr(own, name), getattr(chosen, name)
        if ours != theirs:
            raise UserError(
                f"{key}: {chosen.folder} has {name} {theirs}, the teacher's own {own.folder} has {ours}: its latents are of "
                "another scale"
            )


def _of_config(config: Values, folder: str, endpoint_url: str | None, channels: int | None) -> Decoder:
    name = config.get("_class_name")
    if name != KIND:
        raise UserError(f"{folder}: is {name}, and only {KIND} is supported as a decoder")
    plain = {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}
    latent, colours = _count(plain, "latent_channels", 4, folder), _count(plain, "out_channels", 3, folder)
    if channels not in (None, latent):
        raise UserError(f"{folder}: decodes latents of {latent} channels, and the states have {channels}")
    try:
        widths = _widths(plain)
    except (ValueError, TypeError):
        raise UserError(
            f"{folder}: block_out_channels {plain.get('block_out_channels')!r} are no numbers of channels"
        ) from None
    scaling = _number(plain, "scaling_factor", 0.18215, folder)
    if scaling == 0:
        raise UserError(f"{folder}: scaling_factor 0 is no scale")
    mean, std = (_by_channel(plain, key, latent, folder) for key in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None):
        raise UserError(f"{folder}: latents_mean and latents_std go together")
    return Decoder(
        folder,
        endpoint_url,
        plain,
        latent,
        colours,
        2 ** (len(widths) - 1),
        scaling,
        _number(plain, "shift_factor", 0.0, folder),
        mean,
        std,
    )


def _widths(config: Values) -> list[int]:
    found: Any = config.get("block_out_channels") or [64]
    if not isinstance(found, list) or any(type(width) is not int or width < 1 for width in found):
        raise ValueError(found)
    return found


def _count(config: Values, key: str, default: int, folder: str) -> int:
    value = config.get(key, default)
    if type(value) is not int or value < 1:
        raise UserError(f"{folder}: {key} {value!r} is no number of channels")
    return value


def _number(config: Values, key: str, default: float, folder: str) -> float:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{folder}: {key} {value!r} is not a number")
    return float(value)


def _by_channel(config: Values, key: str, channels: int, folder: str) -> tuple[float, ...] | None:
    values = config.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != channels:
        raise UserError(f"{folder}: {key} {values!r} is no list of {channels} numbers, one for each channel")
    return tuple(_number({key: value}, key, 0.0, folder) for value in values)
