"""What people want to know of a teacher beyond what the code needs: for `inspect-teacher`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsno_cluster.diffusion.schedule import LOGSNR_MAX, LOGSNR_MIN

if TYPE_CHECKING:
    from torch import nn

PREDICTED = {"x": "the clean image x0", "eps": "the noise eps", "v": "v", "both": "x0 and eps, combined"}
ALL_SIGMAS = (
    math.exp(-LOGSNR_MAX / 2),
    math.exp(-LOGSNR_MIN / 2),
)  # range of the cosine schedule, from t=0 to t=1


@dataclass(frozen=True)
class Facts:
    """A teacher in words and numbers.

    `network` names it, `parameters` counts its weights (None: not known), `prediction` says what it gives and how it is
    preconditioned, `schedule` which noise levels it was trained on; they lie between the two `sigmas`, relative to the image,
    the cleanest first. `native` gives the times of the authors' own sampler, which is `solver` here and takes `steps` as a
    rule; None: the file names none.
    """

    network: str
    prediction: str
    schedule: str
    parameters: int | None = None
    sigmas: tuple[float, float] | None = None
    native: Callable[[int], tuple[float, ...]] | None = None
    solver: str = "ddim"
    steps: int = 50


def sigmas_of_levels(levels: tuple[float, ...]) -> tuple[float, float]:
    """The cleanest and the noisiest sigma / alpha of descending log-SNRs; pure noise is infinite."""
    return math.exp(-levels[0] / 2), math.exp(-levels[-1] / 2)


def number_of_parameters(build: Callable[[], nn.Module]) -> int:
    """How many weights the network that `build` makes has; none of them is allocated."""
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build().parameters())
