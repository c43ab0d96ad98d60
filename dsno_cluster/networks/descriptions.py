"""The networks of other authors' state dicts, as records; they need no torch."""

from __future__ import annotations

from typing import Literal

from dsno_cluster.config.base import PositiveInt, Strict


class ADMDescription(Strict):
    """The U-Net of Dhariwal & Nichol 2021 (section 3), of which that of Nichol & Dhariwal 2021 is a special case.

    `widths` are the channels of each resolution, the finest first; `attention_levels` are the resolutions, by their
    place in `widths`, whose blocks attend. The embedding of the noise level begins with `features` sines and cosines and
    has four times as many numbers. `film`: a block scales and shifts by the embedding, and does not only add it.
    `resample`: by residual blocks or by convolutions. Attention has `heads` heads, or heads of `head_channels`.
    """

    channels: PositiveInt
    out_channels: PositiveInt
    features: PositiveInt
    widths: tuple[PositiveInt, ...]
    blocks_per_level: PositiveInt
    attention_levels: tuple[int, ...]
    num_classes: int
    film: bool
    resample: Literal["block", "convolution"]
    heads: PositiveInt | None = None
    head_channels: PositiveInt | None = None

    def heads_of(self, channels: int) -> int:
        """The number of heads of an attention over so many channels."""
        return self.heads or channels // (self.head_channels or channels)


class TransformerDescription(Strict):
    """The transformer of Peebles & Xie 2023 (section 3) over states (channels, size, size).

    A token is a square of `patch_size`. The embedding of the noise level begins with `features` sines and cosines. The table
    of labels has `num_classes` rows and one more, which means "no class".
    """

    channels: PositiveInt
    out_channels: PositiveInt
    size: PositiveInt
    patch_size: PositiveInt
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp_width: PositiveInt
    features: PositiveInt
    num_classes: PositiveInt
