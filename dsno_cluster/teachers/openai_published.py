"""OpenAI's published U-Nets: their sizes, and what their authors' sampling commands say besides."""

from __future__ import annotations

from typing import Any, Literal

from dsno_cluster.networks.descriptions import ADMDescription

ADM, EDM = "openai-adm", "openai-edm"

_GUIDED: dict[str, Any] = {"family": ADM, "num_head_channels": 64, "new_attention_order": False}
_GUIDED |= {"beta_schedule": "linear", "diffusion_steps": 1000}
_IMPROVED: dict[str, Any] = {"family": ADM, "num_heads": 4, "new_attention_order": False}
_IMPROVED |= {"beta_schedule": "cosine", "diffusion_steps": 4000, "rescale_timesteps": True}
_EDM: dict[str, Any] = {"family": EDM, "num_head_channels": 64, "new_attention_order": True}


def _sizes(
    width: int,
    multipliers: tuple[float, ...],
    blocks: int,
    attention: tuple[int, ...],
    classes: int = 0,
    out: int = 6,
    *,
    film: bool = True,
    resample: Literal["block", "convolution"] = "block",
) -> ADMDescription:
    widths = tuple(int(multiplier * width) for multiplier in multipliers)
    return ADMDescription(
        channels=3,
        out_channels=out,
        features=width,
        widths=widths,
        blocks_per_level=blocks,
        attention_levels=attention,
        num_classes=classes,
        film=film,
        resample=resample,
    )


_OF_256 = (1, 1, 2, 2, 4, 4)
PUBLISHED: tuple[tuple[ADMDescription, dict[str, Any]], ...] = (
    # guided-diffusion: 64x64_diffusion.pt, 128x128_, 256x256_, 256x256_diffusion_uncond.pt and lsun_*.pt, 512x512_
    (
        _sizes(192, (1, 2, 3, 4), 3, (1, 2, 3), 1000),
        _GUIDED | {"new_attention_order": True, "beta_schedule": "cosine", "image_size": 64},
    ),
    (
        _sizes(256, (1, 1, 2, 3, 4), 2, (2, 3, 4), 1000),
        {k: v for k, v in _GUIDED.items() if k != "num_head_channels"} | {"num_heads": 4, "image_size": 128},
    ),
    (_sizes(256, _OF_256, 2, (3, 4, 5), 1000), _GUIDED | {"image_size": 256}),
    (_sizes(256, _OF_256, 2, (3, 4, 5)), _GUIDED | {"image_size": 256}),
    (_sizes(256, (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6), 1000), _GUIDED | {"image_size": 512}),
    # improved-diffusion: cifar10_uncond_*, imagenet64_uncond_*, imagenet64_cond_270M_250K, lsun_uncond_*
    (_sizes(128, (1, 2, 2, 2), 3, (1, 2), resample="convolution"), _IMPROVED | {"image_size": 32}),
    (_sizes(128, (1, 2, 3, 4), 3, (2, 3), resample="convolution"), _IMPROVED | {"image_size": 64}),
    (
        _sizes(192, (1, 2, 3, 4), 3, (2, 3), 1000, resample="convolution"),
        _IMPROVED | {"rescale_timesteps": False, "image_size": 64},
    ),
    (
        _sizes(128, _OF_256, 2, (4,), film=False, resample="convolution"),
        _IMPROVED | {"num_heads": 1, "beta_schedule": "linear", "diffusion_steps": 1000, "image_size": 256},
    ),
    # consistency_models: edm_imagenet64_ema.pt, edm_bedroom256_ema.pt and edm_cat256_ema.pt
    (_sizes(192, (1, 2, 3, 4), 3, (1, 2, 3), 1000, out=3), _EDM | {"image_size": 64}),
    (_sizes(256, _OF_256, 2, (3, 4, 5), out=3, film=False), _EDM | {"image_size": 256}),
)
