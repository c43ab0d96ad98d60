"""The memory that training takes on each rank, found without a device and without allocating anything.

What lies still (weights, gradients, optimiser states, averages) is counted. Activations are followed on torch's fake
tensors, which have shapes but no values: a forward and a backward pass of the network itself, at its precision and its
`training.recompute`, and the storages that live at the same time.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.device import HALVES, autocast_to
from dsno_cluster.networks.backbones import Backbone, OurUNet
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.networks.normalization import as_on_gpu
from dsno_cluster.networks.recompute import recompute_in_backward
from dsno_cluster.networks.teacher_backbone import TeacherBackbone
from dsno_cluster.students.dsno import DSNO, forgetting_time_tensors, form_of
from dsno_cluster.teachers.backbones import of_cosine_times
from dsno_cluster.torch_internals import LiveMemory, pretended_tensors
from dsno_cluster.training.beginning import make_student
from dsno_cluster.training.engine import BUCKET, engine_stage
from dsno_cluster.training.objectives.losses import Distance, distance_of_shapes

FLOAT32 = 4  # bytes
MEASURED = (2, 4)  # micro-batches from which the memory of others follows: it grows evenly


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each rank: what is held between steps, and the activations of a micro-batch at their peak."""

    weights: int
    gradients: int
    optimizer: int  # master weights, where they are others than the weights, and moments
    averages: int
    buffers: int  # through which ranks exchange gradients and weights
    fake_score: int  # all that distribution matching holds of the fake score network
    teacher: int  # the weights that distribution matching evaluates
    fixed: int  # activations that do not grow with the micro-batch
    per_image: int
    micro_batch: int

    @property
    def held(self) -> int:
        """What does not depend on the micro-batch."""
        of_student = self.weights + self.gradients + self.optimizer + self.averages + self.buffers
        return of_student + self.fake_score + self.teacher

    @property
    def activations(self) -> int:
        return self.fixed + self.per_image * self.micro_batch

    @property
    def total(self) -> int:
        return self.held + self.activations

    def at(self, micro_batch: int) -> TrainingMemory:
        """The same training with another micro-batch."""
        return replace(self, micro_batch=micro_batch)


def training_memory(
    config: Config,
    *,
    ranks: int = 1,
    micro_batch: int | None = None,
    backbone: Backbone | DiffusersModel | None = None,
    teacher: Backbone | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> TrainingMemory:
    """The memory that a training of `config` takes on each of `ranks`, as if it were not compiled, in bytes.

    `micro_batch` is the number of images that pass through the network together; by default that of
    `training.accumulation`, of which `auto` counts as 1. A precision `auto` is the one that `device` would get. `backbone`
    is that of a config whose student has the teacher's (`ConfiguredTeacher.backbone()`), and `teacher` describes the teacher's
    own network, which distribution matching copies; None: our U-Net. It takes some seconds for a large network.
    """
    settings = config.training
    if settings.precision == "auto":
        settings = settings.model_copy(update={"precision": "bfloat16" if device == "cuda" else "float32"})
        config = config.model_copy(update={"training": settings})
    accumulation = 1 if settings.accumulation == "auto" else settings.accumulation
    per_rank = micro_batch or max(1, settings.batch_size // (ranks * accumulation))
    matched = _has_fake_score(config)
    small, large = (activation_bytes(config, count, backbone, teacher, device) for count in MEASURED)
    per_image = max(0, large - small) // (MEASURED[1] - MEASURED[0])
    held = held_bytes(config, ranks, parameter_count(config, backbone))
    held |= matching_bytes(config, ranks, teacher) if matched else {"fake_score": 0, "teacher": 0}
    return TrainingMemory(
        **held, fixed=max(0, small - per_image * MEASURED[0]), per_image=per_image, micro_batch=per_rank
    )


def _has_fake_score(config: Config) -> bool:
    """Whether a second network is trained. What the feature extractor of the Frechet loss holds is not counted."""
    return config.training.objective == "distribution" and config.training.distribution.needs_fake_score


def parameter_count(config: Config, backbone: Backbone | DiffusersModel | None = None) -> int:
    """The number of elements of all of the student's parameters."""
    with torch.device("meta"):
        return sum(p.numel() for p in make_student(config, backbone).parameters())


def held_bytes(config: Config, ranks: int, parameters: int) -> dict[str, int]:
    """The parts of `TrainingMemory.held` of a student with so many parameters.

    What a stage divides: Rajbhandari et al. 2020 (ZeRO), figure 1, with weights and gradients in float32.
    """
    settings = config.training
    stage = engine_stage(config, ranks)
    whole, share = FLOAT32 * parameters, FLOAT32 * -(-parameters // ranks)
    exchanged = FLOAT32 * min(parameters, BUCKET)
    return {
        "weights": share if stage == 3 else whole,
        "gradients": share if stage >= 2 else whole,
        # stage 0 updates the weights themselves
        "optimizer": 2 * whole if stage == 0 else 3 * share,
        "averages": share * len(settings.ema_decays),
        "buffers": (0, 1, 1, 3)[stage] * exchanged if ranks > 1 or stage else 0,
    }


def matching_bytes(config: Config, ranks: int, teacher: Backbone | None) -> dict[str, int]:
    """What distribution matching holds on each of `ranks` beside the student: the fake score network, and the teacher."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in denoising_network(config, teacher).parameters())
    of_copy = held_bytes(config, ranks, parameters)
    half = config.teacher.precision in HALVES
    return {
        "fake_score": sum(of_copy.values()) - of_copy["averages"],
        "teacher": (FLOAT32 // 2 if half else FLOAT32) * parameters,
    }


def denoising_network(config: Config, teacher: Backbone | None) -> TeacherBackbone:
    """The network that the teacher's description describes, with new weights; None: our U-Net of the config."""
    described = teacher or of_cosine_times(OurUNet(settings=config.network), "v")
    channels = config.network.state_channels
    return TeacherBackbone(described, channels, modes=0, out_channels=channels)


def activation_bytes(
    config: Config,
    images: int,
    backbone: Backbone | DiffusersModel | None = None,
    teacher: Backbone | None = None,
    device: str = "cuda",
) -> int:
    """The most that activations of a forward and backward pass on so many images hold at the same time.

    Weights and their gradients do not count. On a `device` cuda the layers are those that a GPU would run.
    """
    settings = config.training
    with (
        forgetting_time_tensors(),
        pretended_tensors(),
        as_on_gpu() if device == "cuda" else contextlib.nullcontext(),
    ):
        student = make_student(config, backbone).accelerate(precision=settings.precision)
        student.recompute(settings.recompute)
        distance = distance_of_shapes(settings.loss)
        for parameter in student.parameters():
            parameter.grad = torch.zeros_like(parameter)
        if _has_fake_score(config):
            fake = denoising_network(config, teacher)
            recompute_in_backward(fake, settings.recompute)
            for parameter in fake.parameters():
                parameter.grad = torch.zeros_like(parameter)
        live = LiveMemory()
        with live:
            if _has_fake_score(config):
                matching_passes(student, fake, distance, config, images)
            else:
                one_pass(student, distance, config, passed_images(config, images), torch.device("cpu"))
    return live.peak


def matching_passes(
    student: DSNO, fake: TeacherBackbone, distance: Distance, config: Config, images: int
) -> None:
    """The passes of a step of distribution matching, on so many images of zeros: an update of the fake score network, and one
    of the student.
    """
    shape, settings = config.network.state_shape, config.training.distribution
    judged = 2 * images if settings.adversarial_weight else images

    def denoised(x: Tensor) -> Tensor:
        labels = torch.zeros(len(x), dtype=torch.int64) if config.network.num_classes else None
        with autocast_to(config.training.precision, x.device):
            output: Tensor = fake(x, torch.zeros(1, 1), labels)
        return output.float()

    denoised(torch.zeros(judged, *shape)).square().mean().backward()
    passed = passed_images(config, images)
    labels = torch.zeros(passed, dtype=torch.int64) if config.network.num_classes else None
    points = most_points(config) if settings.trajectory_weight else most_points(config)[-1:]
    if not form_of(config.student).points_apart:
        points = list(range(len(config.trajectories.time_points)))
    states = student(torch.zeros(passed, *shape), labels, points).float()
    x = states[:images, -1].detach().requires_grad_()
    (direction,) = torch.autograd.grad(denoised(x).square().mean(), x)
    loss = (states[:images, -1] * direction).mean()
    if settings.trajectory_weight:
        loss = loss + distance(states[images:], torch.zeros_like(states[images:])).mean()
    loss.backward()


def passed_images(config: Config, images: int) -> int:
    """How many images the student computes for a micro-batch of so many.

    With the trajectory loss as an anchor of distribution matching it is twice as many: the samples are of other noise.
    """
    settings = config.training
    anchored = settings.objective == "distribution" and settings.distribution.trajectory_weight > 0.0
    return 2 * images if anchored else images


def one_pass(student: DSNO, distance: Distance, config: Config, images: int, device: torch.device) -> None:
    """A forward and backward pass on so many images of zeros, at as many time points as a step ever sees."""
    shape, points = config.network.state_shape, most_points(config)
    labels = torch.zeros(images, dtype=torch.int64) if config.network.num_classes else None
    noise = torch.zeros(images, *shape, device=device)
    target = torch.zeros(images, len(points), *shape, device=device)
    distance(student(noise, labels, points).float(), target).mean().backward()


def most_points(config: Config) -> list[int]:
    """As many time points as a step of the training ever sees together."""
    count = len(config.trajectories.time_points)
    if config.student.points == "drawn":
        count = min(count, config.training.most_points)
    return list(range(len(config.trajectories.time_points)))[-count:]
