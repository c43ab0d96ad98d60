"""The Frechet loss: samples' features get the mean and covariance of those of real images.

The population whose moments are compared is larger than a batch (Yang et al. 2026, *Representation Frechet Loss for Visual
Generation*): the moments of the student's features are moving averages. The gradient of the Frechet distance with respect to a
feature vector f of N is 2 (f - T(f)) / N, where T is the optimal transport from the Gaussian of the student's features to that of
the real ones. So the loss is the mean of |f - T(f)|^2 with T held constant, and a batch of any size will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.device import allowing_tf32
from dsno_cluster.errors import UserError
from dsno_cluster.features.extractors import (
    Extractor,
    load_fid_extractor,
    main_weights,
    moments_of_images,
)
from dsno_cluster.features.statistics import Gaussian
from dsno_cluster.features.transport import Transport, as_tensors, gaussian_of, mixed, root_of, transport
from dsno_cluster.storage import FolderStorage
from dsno_cluster.teachers import LoadedDecoder, States
from dsno_cluster.training.kept_tensors import kept_tensors
from dsno_cluster.training.real_images import RealImages

IMAGES = 64  # images at a time of which a backward pass holds what the extractor computed


class FrechetTerm:
    """The Frechet loss of states, in the features of an extractor, with the moments of the student's features.

    These are the same on every rank; `begin` and `loss` are collective. `decoder` makes images of the student's
    states; None: these are images.
    """

    def __init__(
        self,
        extractor: Extractor,
        decoder: LoadedDecoder | None,
        real: Gaussian[Tensor],
        population: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.extractor, self.decoder = extractor, decoder
        self.population, self.world_size, self.begun = population, world_size, False
        self.real = Gaussian(real.mean.to(device), real.covariance.to(device))
        self.root = root_of(self.real.covariance)
        self.carried: tuple[int, Transport] | None = None  # the transport of a step
        # how many samples ever were in the moments
        self.seen = torch.zeros((), dtype=torch.float64, device=device)
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

    def loss(self, states_NCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The loss of states (N, C, H, W), with a gradient, and the Frechet distance of the moments, scalars.

        The transport is that of the moments after the first micro-batch of the optimiser step `step`: the host waits for it.
        """
        features = self._features(states_NCHW)
        self._add(features.detach())
        if self.carried is None or self.carried[0] != step:
            self.carried = step, transport(Gaussian(self.mean, self.covariance), self.real, self.root)
        _, carry = self.carried
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
        """The features of states, (N, D) float32, with a gradient if the states have one.

        A backward pass computes them again, part by part, so that it never holds more than one.
        """
        size = IMAGES if self.decoder is None else min(IMAGES, self.decoder.at_a_time(states_NCHW))
        return torch.cat(
            [
                checkpoint(self._of_part, part, use_reentrant=False)
                if part.requires_grad and len(part) < len(states_NCHW)
                else self._of_part(part)
                for part in states_NCHW.split(size)
            ]
        )

    def _of_part(self, states_NCHW: Tensor) -> Tensor:
        (layer,) = self.extractor.layers
        with allowing_tf32(False):  # as `eval` has them
            images = [states_NCHW] if self.decoder is None else self.decoder.parts(states_NCHW)
            return torch.cat([self.extractor.of_float(part)[layer] for part in images])


def make_frechet_term(
    config: Config, states: States, moments: Gaussian[Tensor], device: torch.device, world_size: int
) -> FrechetTerm:
    """The term of a config, given the `moments` of the real images. Raises as `find_real_moments` does."""
    decoder = states.decoder.load(device) if states.decoder else None
    population = config.training.distribution.frechet_population
    extractor = load_fid_extractor(config.evaluation, states.image_shape, device)
    extractor.network.requires_grad_(False)
    return FrechetTerm(extractor, decoder, moments, population, world_size, device)


def find_real_moments(
    config: Config, states: States, real: RealImages, device: torch.device
) -> Gaussian[Tensor]:
    """The moments of the real images in the features of the config's extractor; kept in `run.dir`, for the next time.

    Raises UserError or WorkError as `load_fid_extractor` does, and UserError for states that nothing decodes, a single image,
    and features that are not finite.
    """
    settings, weights = config.evaluation, main_weights(config.evaluation)
    states.check_decoded("training.distribution.frechet_weight", "set it to 0")
    if real.count < 2:
        raise UserError("data: the Frechet loss needs two real images or more")

    def measure() -> dict[str, Tensor]:
        with console.progress("features of the real images", real.count, "images") as advance:

            def batches() -> Iterator[Tensor]:
                for images in real.picture_batches(settings.batch_size):
                    yield images
                    advance(len(images))

            found = gaussian_of_images(load_fid_extractor(settings, states.image_shape, device), batches())
        return {"mean": found.mean, "covariance": found.covariance}

    folder = FolderStorage(config.run_dir / "real-images")
    name = f"{real.identity}-{weights.extractor}-{weights.sha256}.safetensors"
    return Gaussian(**kept_tensors(folder, name, ["mean", "covariance"], measure))


def frechet_loss(features_ND: Tensor, targets_ND: Tensor) -> Tensor:
    """The mean over samples of the squared distance of features (N, D) from where they are carried to, a scalar float32."""
    apart: Tensor = features_ND.double() - targets_ND
    return apart.square().sum(dim=1).mean().float()


def gaussian_of_images(extractor: Extractor, batches: Iterable[Tensor]) -> Gaussian[Tensor]:
    """The moments of the features of images, uint8 (n, C, H, W), with ddof 0 as `gaussian_of` has them.

    Raises UserError if features are not finite.
    """
    found = moments_of_images(extractor, batches)
    if not np.isfinite(found.m2).all():
        raise UserError(
            "evaluation.feature_extractor: its features of the real images are not finite; are its weights damaged?"
        )
    return as_tensors(Gaussian(found.mean, found.m2 / found.count))


def _of_all_ranks(features_ND: Tensor, world_size: int) -> Gaussian[Tensor]:
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
