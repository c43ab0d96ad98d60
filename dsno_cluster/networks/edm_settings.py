"""What describes the networks of EDM and EDM2: the arguments that their checkpoints record, without torch.

The names are those in the checkpoints; the defaults are those of the public code.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Size = Annotated[int, Field(gt=0, le=2**20)]
Count = Annotated[int, Field(ge=0, le=2**20)]
Balance = Annotated[float, Field(ge=0.0, le=1.0)]


class _Settings(BaseModel):
    """Arguments as a file has them: lists may stand for tuples; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    img_resolution: Size
    label_dim: Count = 0
    channel_mult: Annotated[tuple[Size, ...], Field(min_length=1, max_length=12)]
    num_blocks: Annotated[int, Field(ge=0, le=64)]
    attn_resolutions: Annotated[tuple[Count, ...], Field(max_length=32)] = ()
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    # heads of the blocks with attention, by the blocks' names ("enc.16x16_block0"); the files record them
    heads: dict[str, Annotated[int, Field(gt=0, le=2**16)]] = Field(default_factory=dict)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """The height and width of the images of each level."""
        return tuple(self.img_resolution >> level for level in range(len(self.channel_mult)))

    @model_validator(mode="after")
    def _can_be_halved(self) -> _Settings:
        if self.img_resolution % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(
                f"img_resolution {self.img_resolution} cannot be halved {len(self.channel_mult) - 1} times"
            )
        return self


class SongSettings(_Settings):
    """DDPM++ and NCSN++ (Song et al. 2021, *Score-Based Generative Modeling through SDEs*), as EDM has them."""

    in_channels: Size
    out_channels: Size
    augment_dim: Count = 0
    model_channels: Size = 128
    channel_mult: Annotated[tuple[Size, ...], Field(min_length=1, max_length=12)] = (1, 2, 2, 2)
    channel_mult_emb: Size = 4
    num_blocks: Annotated[int, Field(ge=0, le=64)] = 4
    attn_resolutions: Annotated[tuple[Count, ...], Field(max_length=32)] = (16,)
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.10
    label_dropout: float = 0.0
    embedding_type: Literal["positional", "fourier"] = "positional"
    channel_mult_noise: Size = 1
    encoder_type: Literal["standard", "skip", "residual"] = "standard"
    decoder_type: Literal["standard", "skip"] = "standard"
    resample_filter: Annotated[tuple[Size, ...], Field(min_length=2, max_length=16)] = (1, 1)


class DhariwalSettings(_Settings):
    """ADM (Dhariwal & Nichol 2021, *Diffusion Models Beat GANs on Image Synthesis*), as EDM has it."""

    in_channels: Size
    out_channels: Size
    augment_dim: Count = 0
    model_channels: Size = 192
    channel_mult: Annotated[tuple[Size, ...], Field(min_length=1, max_length=12)] = (1, 2, 3, 4)
    channel_mult_emb: Size = 4
    num_blocks: Annotated[int, Field(ge=0, le=64)] = 3
    attn_resolutions: Annotated[tuple[Count, ...], Field(max_length=32)] = (32, 16, 8)
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.10
    label_dropout: float = 0.0


class EDM2Settings(_Settings):
    """EDM2's magnitude-preserving U-Net (Karras et al. 2024, *Analyzing and Improving the Training Dynamics*)."""

    img_channels: Size
    model_channels: Size = 192
    channel_mult: Annotated[tuple[Size, ...], Field(min_length=1, max_length=12)] = (1, 2, 3, 4)
    channel_mult_noise: Size | None = None
    channel_mult_emb: Size | None = None
    num_blocks: Annotated[int, Field(ge=0, le=64)] = 3
    attn_resolutions: Annotated[tuple[Count, ...], Field(max_length=32)] = (16, 8)
    label_balance: Balance = 0.5
    concat_balance: Balance = 0.5
    resample_filter: Annotated[tuple[Size, ...], Field(min_length=2, max_length=16)] = (1, 1)
    channels_per_head: Size = 64
    res_balance: Balance = 0.3
    attn_balance: Balance = 0.3
    clip_act: Annotated[float, Field(gt=0)] | None = 256
