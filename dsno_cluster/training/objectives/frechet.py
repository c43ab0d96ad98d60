"""The Frechet loss: samples' features get the mean and covariance of those of real images.

The population whose moments are compared is larger than a batch (Yang et al. 2026, *Representation Frechet Loss for Visual
Generation*): the moments of the student's features are moving averages. The gradient of the Frechet distance with respect to a
feature vector f of N is 2 (f - T(f)) / N, where T is the optimal transport from the Gaussian of the student's features to that of
the real ones. So the loss is the mean of |f - T(f)|^2 with T held constant, and a batch of any size will do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import safetensors.torch
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
    WeightsFile,
    check_shape,
    find_weights,
    layer_of,
    load_extractor,
)
from dsno_cluster.storage import FolderStorage
from dsno_cluster.teachers import LoadedDecoder, States
from dsno_cluster.training.objectives.transport import (
    Gaussian,
    Transport,
    gaussian_of,
    mixed,
    root_of,
    transport,
)
from dsno_cluster.training.real_images import RealImages
from dsno_cluster.weight_files import NotWeights, parse_safetensors

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
        real: Gaussian,
        population: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.extractor, self.decoder = extractor, decoder
        self.population, self.world_size, self.begun = population, world_size, False
        self.real = Gaussian(real.mean.to(device), real.covariance.to(device))
        self.root = root_of(self.real.covariance)
        self.carry: Transport | None = None
        self.carried_at = -1
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

    def loss(self, states_NCHW: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """The loss of states (N, C, H, W), with a gradient, and the Frechet distance of the moments, scalars.

        The transport is that of the moments after the first micro-batch of the optimiser step `step`: the host waits for it.
        """
        features = self._features(states_NCHW)
        self._add(features.detach())
        if self.carry is None or step != self.carried_at:
            self.carry = transport(Gaussian(self.mean, self.covariance), self.real, self.root)
            self.carried_at = step
        return frechet_loss(features, self.carry(features.detach())), self.carry.distance.float()

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
        size = IMAGES
        if self.decoder is not None:
            height, width = states_NCHW.shape[-2:]
            size = min(
                IMAGES, self.decoder.decoder.at_a_time(height * width * self.decoder.decoder.factor**2)
            )
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
    config: Config, states: States, moments: Gaussian, device: torch.device, world_size: int
) -> FrechetTerm:
    """The term of a config, given the `moments` of the real images. Raises as `find_real_moments` does."""
    decoder = states.decoder.load(device) if states.decoder else None
    population = config.training.distribution.frechet_population
    extractor = _extractor_of(_weights_of(config), device)
    return FrechetTerm(extractor, decoder, moments, population, world_size, device)


def find_real_moments(config: Config, states: States, real: RealImages, device: torch.device) -> Gaussian:
    """The moments of the real images in the features of the config's extractor; kept in `run.dir`, for the next time.

    Raises UserError or WorkError as `find_weights` does, UserError for images or states that the extractor does not read, and
    for features that are not finite.
    """
    weights = _weights_of(config)
    states.check_decoded("training.distribution.frechet_weight", "set it to 0")
    check_shape([weights.extractor], states.image_shape, "the samples")
    folder = FolderStorage(config.run_dir / "real-images")
    name = f"{real.identity}-{weights.extractor}-{weights.sha256}.safetensors"
    if folder.stat(name) is not None:
        try:
            kept = parse_safetensors(folder.read(name), name)
            return Gaussian(kept["mean"], kept["covariance"])
        except (NotWeights, KeyError) as error:
            console.say(f"note: {error}; it is made again")
    size = config.evaluation.batch_size
    with (
        console.progress("features of the real images", real.count, "images") as advance,
        allowing_tf32(False),
    ):

        def batches() -> Iterator[Tensor]:
            for images in real.picture_batches(size):
                yield images
                advance(len(images))

        found = moments_of_images(_extractor_of(weights, device), batches())
    found = Gaussian(found.mean.cpu(), found.covariance.cpu())
    tensors = {"mean": found.mean, "covariance": found.covariance}
    folder.write(name, safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}))
    return found


def _weights_of(config: Config) -> WeightsFile:
    measured = config.evaluation
    return find_weights(measured.feature_extractor, measured.weights_path, measured.weights_sha256)


def _extractor_of(weights: WeightsFile, device: torch.device) -> Extractor:
    """The extractor with the layer that `fid` reads, its weights constant."""
    with torch.random.fork_rng(devices=[]):  # layers draw their weights before they are given them
        extractor = load_extractor(weights, [layer_of(weights.extractor, "fid")], device)
    extractor.network.requires_grad_(False)
    return extractor


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
    if not found.covariance.isfinite().all():
        raise UserError(
            "evaluation.feature_extractor: its features of the real images are not finite; are its weights damaged?"
        )
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
