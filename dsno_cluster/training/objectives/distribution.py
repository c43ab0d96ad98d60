"""The distribution objective: one-step samples as likely under the teacher, and as real, as its own and real images.

Distribution matching with two time scales (Yin et al. 2024b, DMD2): before each step of the student, a fake score network,
which begins as the teacher, is updated a few times on new samples of the student. Its head tells noisy samples from noisy real
images. The student then moves its samples to where the teacher's density exceeds their own, to where the head takes them for
real, and to where their features are distributed as those of real images. Each term that has no weight is left out, the fake
score network with the terms that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.device import autocast_to, copied_to, pinned_for
from dsno_cluster.diffusion.guidance import guided
from dsno_cluster.diffusion.schedule import alpha_sigma
from dsno_cluster.features.statistics import Gaussian
from dsno_cluster.students.dsno import form_of
from dsno_cluster.teachers import ConfiguredTeacher
from dsno_cluster.teachers.fake_score import FakeScore, trainable_copy
from dsno_cluster.teachers.teacher import Teacher
from dsno_cluster.training.objectives import Companion, Network, StepFigures, Student
from dsno_cluster.training.objectives.frechet import FrechetTerm, make_frechet_term
from dsno_cluster.training.objectives.matching import (
    adversarial_loss,
    denoising_loss,
    discriminator_loss,
    matching_direction,
    matching_distance,
    sample_loss,
    score_identity_loss,
    with_noise,
)
from dsno_cluster.training.objectives.trajectories import TrajectoryObjective
from dsno_cluster.training.real_images import RealImages
from dsno_cluster.trajectories.reader import Batch

FAKE_SCORE = "fake_score"
FIGURES = {  # as metrics.jsonl names them, and in words
    "fake_loss": "loss of the fake score network",
    "matching": "distance of the two denoisers",
    "discriminator_loss": "loss of the discriminator",
    "adversarial_loss": "adversarial loss",
    "frechet_distance": "Frechet distance",
}


@dataclass(frozen=True)
class Matching:
    """What tells a sample's density under the student from that under the teacher: the teacher, and the fake score network.

    `fake_score` must have the teacher's weights or those of a checkpoint; `real` are needed for an adversarial loss.
    """

    teacher: Teacher
    fake_score: FakeScore
    real: RealImages | None


class DistributionObjective:
    """Matching of the student's distribution with the teacher's, an adversarial loss, the Frechet loss, and the trajectory loss
    as an anchor.

    A step's figures are `FIGURES`, of which those of weight 0 stay 0, and with an anchor the distances at all time points.
    `matching` is needed for the first two, `frechet` for the third. Draws are from torch's generators, which the loop seeds for
    each update.
    """

    def __init__(
        self,
        config: Config,
        matching: Matching | None,
        frechet: FrechetTerm | None,
        device: torch.device,
    ) -> None:
        self.config, self.settings, self.device = config, config.training.distribution, device
        self.matching, self.frechet = matching, frechet
        self.through = self.settings.matching == "score-identity"  # gradients flow through the denoisers
        self.last = len(config.trajectories.time_points) - 1
        anchored = self.settings.trajectory_weight > 0.0
        self.anchor = TrajectoryObjective(config, device) if anchored else None
        self.figure_names = (*FIGURES.values(), *(self.anchor.figure_names if self.anchor else ()))
        self.companions: Mapping[str, Companion] = {}
        self.real: RealImages | None = None
        self.state: Mapping[str, Tensor] = {} if frechet is None else frechet.state
        self.guidance = config.trajectories.method.guidance
        if matching is not None:
            self.teacher = matching.teacher.with_gradients() if self.through else matching.teacher
            self.real = matching.real if self.settings.adversarial_weight else None
            self.draw_times = _drawn_times(matching.teacher, self.settings.noise_range, device)
            self.companions = {
                FAKE_SCORE: Companion(
                    matching.fake_score,
                    self.settings.fake_lr or config.training.lr,
                    self.settings.fake_updates,
                    self.settings.fake_warmup,
                    self.fake_loss,
                )
            }

    def fake_loss(
        self, student: Student, network: Network, batch: Batch, step: int, update: int
    ) -> tuple[Tensor, Tensor]:
        """The denoising loss on new samples and the discriminator's loss, weighted, and the figures."""
        noise, labels = self._drawn(batch)
        count = len(noise)
        with torch.no_grad():
            x = self._states(student, noise, labels, [self.last])[:, -1]
        noisy, sigma, t = self._with_noise(x)
        there = None if labels is None else labels.to(self.device, non_blocking=True)
        if self.real is None:
            denoised, _ = self._fake(network, noisy, t, there)
            loss = denoising_loss(denoised, x, sigma)
            return loss, self._figures(fake_loss=loss)
        real, real_labels = self._real(count)
        noisy_real, _, t_real = self._with_noise(real)
        both = None if there is None or real_labels is None else torch.cat([there, real_labels])
        denoised, logits = self._fake(network, torch.cat([noisy, noisy_real]), torch.cat([t, t_real]), both)
        loss = denoising_loss(denoised[:count], x, sigma)
        game = discriminator_loss(logits[count:], logits[:count])
        total = loss + self.settings.adversarial_weight * game
        return total, self._figures(fake_loss=loss, discriminator_loss=game)

    def loss(self, student: Student, batch: Batch, step: int) -> tuple[Tensor, Tensor]:
        """A scalar with the gradient of the weighted sum of matching, adversarial and trajectory loss, and the figures.

        Samples are of new noise: those of the trajectories' own, which the student knows, are better than others.
        """
        if self.frechet is not None:
            self.frechet.begin(lambda: self._states(student, *self._drawn(batch), [self.last])[:, -1])
        noise, labels = self._drawn(batch)
        count = len(noise)
        if self.anchor is None:
            x = self._states(student, noise, labels, [self.last])[:, -1]
            direction, figures = self._direction(x, labels, step)
            return sample_loss(x, direction), figures
        points = self.anchor.points(step)
        together = sorted({*points, self.last})
        noise = torch.cat([noise, batch.noise.to(self.device, non_blocking=True)])
        both = None
        if labels is not None and batch.labels is not None:
            both = pinned_for(self.device, torch.cat([labels, batch.labels]))
        states = self._states(student, noise, both, together)
        x = states[:count, -1]
        direction, figures = self._direction(x, labels, step)
        # `points` are all of them, or those of the step and perhaps the last
        anchored, distances_M = self.anchor.loss_of(states[count:, : len(points)], batch, points)
        loss = sample_loss(x, direction) + self.settings.trajectory_weight * anchored
        return loss, torch.cat([figures[: len(FIGURES)], distances_M])

    def summary(self, figures: Sequence[float], step: int) -> StepFigures:
        settings = self.settings
        of_matching, of_trajectories = figures[: len(FIGURES)], figures[len(FIGURES) :]
        known = {
            name: value for name, value in zip(FIGURES, of_matching, strict=True) if self._computed(name)
        }
        loss = settings.matching_weight * known.get("matching", 0.0)
        loss += settings.adversarial_weight * known.get("adversarial_loss", 0.0)
        loss += settings.frechet_weight * known.get("frechet_distance", 0.0)
        watched = tuple(known.get(name) for name in FIGURES)
        if self.anchor is None:
            return StepFigures(loss, (), watched, known)
        anchored = self.anchor.summary(of_trajectories, step)
        loss += settings.trajectory_weight * anchored.loss
        return StepFigures(loss, anchored.distance_per_time, watched + anchored.watched, known)

    def _computed(self, figure: str) -> bool:
        """Whether a figure is computed with the weights of the config."""
        settings = self.settings
        weights = {
            "fake_loss": settings.matching_weight + settings.adversarial_weight,
            "matching": settings.matching_weight,
            "frechet_distance": settings.frechet_weight,
        }
        return weights.get(figure, settings.adversarial_weight) > 0.0

    def _direction(self, x_NCHW: Tensor, labels: Tensor | None, step: int) -> tuple[Tensor, Tensor]:
        """The gradient of all losses of samples with respect to these, times their number of elements; figures.

        It is taken for itself, so that the engine of the student goes backward through the student only.
        """
        x = x_NCHW.detach().float().requires_grad_()
        figures: dict[str, Tensor] = {}
        total = torch.zeros((), device=self.device)
        if self.matching is not None:
            total, figures = self._matched(x, labels, self.matching.fake_score)
        if self.frechet is not None:
            loss, figures["frechet_distance"] = self.frechet.loss(x, step)
            total = total + self.settings.frechet_weight * loss
        # of about 1 in every element, in which half precision does not vanish
        (direction,) = torch.autograd.grad(total * x.numel(), x)
        return direction, self._figures(**figures)

    def _matched(
        self, x: Tensor, labels: Tensor | None, fake_score: FakeScore
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted losses for which noise is added to samples, and their figures."""
        settings = self.settings
        noisy, _, t = self._with_noise(x)
        there = None if labels is None else labels.to(self.device, non_blocking=True)
        fake, logits = self._fake(fake_score, noisy, t, there)
        total, figures = torch.zeros((), device=self.device), {}
        if settings.matching_weight:
            real = guided(self.teacher, there, self.guidance)(noisy, t)
            if self.through:
                matching = score_identity_loss(x, real, fake, settings.identity_alpha)
            else:
                matching = sample_loss(x, matching_direction(x, real, fake))
            total = total + settings.matching_weight * matching
            figures["matching"] = matching_distance(x, real, fake)
        if self.real is not None:
            figures["adversarial_loss"] = adversarial_loss(logits)
            total = total + settings.adversarial_weight * figures["adversarial_loss"]
        return total, figures

    def _drawn(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """New noise on the device and new labels on the CPU, as many as a batch has, of each class as many as of any other."""
        classes = self.config.network.num_classes
        labels = None
        if classes:
            labels = (torch.randperm(len(batch.noise)) + torch.randint(classes, ())) % classes
            labels = pinned_for(self.device, labels)
        return torch.randn(batch.noise.shape, device=self.device), labels

    def _states(
        self, student: Student, noise: Tensor, labels: Tensor | None, points: Sequence[int]
    ) -> Tensor:
        """The student's states at `points`, float32; at all points, if it computes them together."""
        if not form_of(self.config.student).points_apart:
            points = range(self.last + 1)
        return student(noise, labels, points).float()

    def _with_noise(self, x_NCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Samples with noise of levels drawn for them, the levels' sigma and their cosine times, (N,) float64."""
        t_N = self.draw_times(len(x_NCHW))
        alpha_N, sigma_N = alpha_sigma(t_N)
        noisy = with_noise(x_NCHW, torch.randn_like(x_NCHW), alpha_N, sigma_N)
        return noisy, sigma_N, t_N

    def _real(self, count: int) -> tuple[Tensor, Tensor | None]:
        """Real states drawn for an update, and their labels, on the device."""
        assert self.real is not None
        drawn = torch.randint(self.real.count, (count,))
        labels = self.real.labels(drawn)
        return (
            copied_to(self.device, self.real.states(drawn)),
            None if labels is None else copied_to(self.device, labels),
        )

    def _fake(
        self, network: Network, x_NCHW: Tensor, t_N: Tensor, labels_N: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The fake score network's x0 and the logits of its head, float32."""
        with autocast_to(self.config.training.precision, self.device):
            x0, logits = network(x_NCHW, t_N, labels_N)
        return x0.float(), logits.float()

    def _figures(self, **known: Tensor) -> Tensor:
        """The figures of a step, (F,), 0 for those that are not known."""
        none = torch.zeros((), device=self.device)
        values = [known.get(name, none).detach() for name in FIGURES]
        rest = len(self.figure_names) - len(FIGURES)
        return torch.cat([torch.stack(values), none.expand(rest)])


def _drawn_times(
    teacher: Teacher, noise_range: tuple[float, float], device: torch.device
) -> Callable[[int], Tensor]:
    """A function that draws so many cosine times, (N,) float64, uniformly from a range.

    Those of a distilled teacher are the times of its own steps, as it knows no other levels.
    """
    low, high = noise_range
    if not teacher.distilled:
        return lambda count: low + (high - low) * torch.rand(count, dtype=torch.float64, device=device)
    own = teacher.native_grid(teacher.num_steps or 0) or ()
    known = torch.tensor([t for t in own if t > 0.0], dtype=torch.float64, device=device)
    return lambda count: known[torch.randint(len(known), (count,), device=device)]


def begin_distribution(
    config: Config,
    teacher: ConfiguredTeacher,
    real: RealImages | None,
    device: torch.device,
    real_moments: Gaussian[Tensor] | None = None,
    world_size: int = 1,
) -> DistributionObjective:
    """The objective with what its terms need on `device`: the teacher and a copy of it as the fake score network, and for the
    Frechet loss the extractor and `real_moments`, those of the real images.

    Raises UserError for a teacher of which there is no copy, and as `ConfiguredTeacher.load`, `RealImages.states` and
    `load_fid_extractor` do.
    """
    settings, matching, frechet = config.training.distribution, None, None
    if settings.needs_fake_score:
        if real is not None and settings.adversarial_weight:
            real.states([0])  # read and encoded here, where all ranks agree on a failure
        fake_score = trainable_copy(teacher, config.training_seed)
        matching = Matching(teacher.load(compile=False).to(device), fake_score, real)
    if real_moments is not None:
        frechet = make_frechet_term(config, teacher.states, real_moments, device, world_size)
    return DistributionObjective(config, matching, frechet, device)
