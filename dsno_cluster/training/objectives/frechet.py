"""The Frechet loss: samples' features get the mean and covariance of those of real images.

The population whose moments are compared is larger than a batch (Yang et al. 2026, *Representation Frechet Loss for Visual
Generation*): the moments of the student's features are moving averages. The gradient of the Frechet distance with respect to a
feature vector f of N is 2 (f - T(f)) / N, where T is the optimal transport from the Gaussian of the student's features to that of
the real ones. So the loss is the mean of |f - T(f)|^2 with T held constant, and a batch of any size will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from dsno_cluster.errors import UserError
from dsno_cluster.features.extractors import Extractor
from dsno_cluster.teachers import LoadedDecoder
from dsno_cluster.training.objectives.transport import (
    Gaussian,
    Transport,
    gaussian_of,
    mixed,
    root_of,
    transport,
)


class FrechetTerm:
    """The Frechet loss of states, in the features of an extractor, with the moments of the student's features.

    These are the same on every rank; `begin` and `loss` are collective. `decoder` makes images of the student's
    states; None: these are images.
    """

    def __init__(
        self,
        extractor: Extractor,
        decoder: LoadedDecoder | None,
        real: Gaussian,
        population: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.extractor, self.decoder = extractor, decoder
        self.population, self.world_size, self.begun = population, world_size, False
        self.real = Gaussian(real.mean.to(device), real.covariance.to(device))
        self.root = root_of(self.real.covariance)
        self.seen = torch.zeros(
            (), dtype=torch.float64, device=device
        )  # samples that ever were in the moments
        self.mean, self.covariance = torch.zeros_like(self.real.mean), torch.zeros_like(self.real.covariance)

    @property
    def state(self) -> dict[str, Tensor]:
        """What training changes, from which it resumes."""
        return {"seen": self.seen, "mean": self.mean, "covariance": self.covariance}

    def begin(self, draw: Callable[[], Tensor]) -> None:
        """Fill the moments with `population` samples of `draw`, states (N, C, H, W), unless they are filled."""
        while not self.begun:
            self.begun = float(self.seen) >= self.population
            if not self.begun:
                with torch.no_grad():
                    self._add(self._features(draw()))

    def loss(self, states_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of states (N, C, H, W), with a gradient, and the Frechet distance of the moments, scalars."""
        features = self._features(states_NCHW)
        self._add(features.detach())
        carry: Transport = transport(Gaussian(self.mean, self.covariance), self.real, self.root)
        return frechet_loss(features, carry(features.detach())), carry.distance.float()

    def _add(self, features_ND: Tensor) -> None:
        """Take features of every rank into the moments, in place of as many of the oldest once these are `population`."""
        new = _of_all_ranks(features_ND, self.world_size)
        count = len(features_ND) * self.world_size
        self.seen += count
        share = (count / self.seen).clamp(min=min(1.0, count / self.population))
        both = mixed(Gaussian(self.mean, self.covariance), new, share)
        self.mean.copy_(both.mean)
        self.covariance.copy_(both.covariance)

    def _features(self, states_NCHW: Tensor) -> Tensor:
        """The features of states, (N, D) float32, with a gradient if the states have one."""
        parts = [states_NCHW] if self.decoder is None else self.decoder.parts(states_NCHW)
        (layer,) = self.extractor.layers
        return torch.cat([self.extractor.of_float(part)[layer] for part in parts])


def frechet_loss(features_ND: Tensor, targets_ND: Tensor) -> Tensor:
    """The mean over samples of the squared distance of features (N, D) from where they are carried to, a scalar float32."""
    apart: Tensor = features_ND.double() - targets_ND
    return apart.square().sum(dim=1).mean().float()


def moments_of_images(extractor: Extractor, batches: Iterable[Tensor]) -> Gaussian:
    """The moments of the features of images, uint8 (n, C, H, W), which are read once. Raises UserError for a single one."""
    (layer,) = extractor.layers
    found, seen = None, 0
    for images in batches:
        new, seen = gaussian_of(extractor(images)[layer]), seen + len(images)
        found = new if found is None else mixed(found, new, len(images) / seen)
    if found is None or seen < 2:
        raise UserError("data: the Frechet loss needs two real images or more")
    return found


def _of_all_ranks(features_ND: Tensor, world_size: int) -> Gaussian:
    """The moments of as many features of each rank, centred before they are summed."""
    if world_size == 1:
        return gaussian_of(features_ND)
    features, count = features_ND.double(), len(features_ND) * world_size
    mean = features.sum(dim=0)
    dist.all_reduce(mean)
    mean /= count
    centred = features - mean
    squares = centred.T @ centred
    dist.all_reduce(squares)
    return Gaussian(mean, squares / count)
