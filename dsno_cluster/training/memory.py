"""The memory that training takes on each rank, found without a device and without allocating anything.

What lies still (weights, gradients, optimiser states, averages) is counted. Activations are followed on torch's fake
tensors, which have shapes but no values: a forward and a backward pass of the network itself, at its precision and its
`training.recompute`, and the storages that live at the same time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.device import HALVES, autocast_to
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.features.classifiers import CLASSIFIERS
from dsno_cluster.features.extractors import layer_of, load_extractor, main_weights_at_hand
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

FLOAT32, FLOAT64 = 4, 8  # bytes
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
    features: int = 0  # the extractor of the Frechet loss and its moments, if its weights are at hand

    @property
    def held(self) -> int:
        """What does not depend on the micro-batch."""
        of_student = self.weights + self.gradients + self.optimizer + self.averages + self.buffers
        return of_student + self.fake_score + self.teacher + self.features

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
    held["features"] = frechet_bytes(config)
    return TrainingMemory(
        **held, fixed=max(0, small - per_image * MEASURED[0]), per_image=per_image, micro_batch=per_rank
    )


def _has_fake_score(config: Config) -> bool:
    """Whether a second network is trained."""
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


def frechet_bytes(config: Config) -> int:
    """What the Frechet loss holds on each rank: the feature extractor, and four matrices; 0 if its weights are not at hand.

    The matrices are the two covariances, the root of one and the transport's map. What the extractor computes is not counted.
    """
    settings = config.evaluation
    if not config.training.learns_features:
        return 0
    try:
        weights = main_weights_at_hand(settings)
    except (UserError, WorkError):  # the training says what is wrong with the file
        return 0
    if weights is None:
        return 0
    extractor = load_extractor(weights, [layer_of(weights.extractor, "fid")], torch.device("cpu"))
    ours = CLASSIFIERS.get(weights.extractor)
    shape = (3, 64, 64) if ours is None else ours.SHAPE  # the others resize whatever they are given
    (features,) = extractor(torch.zeros(1, *shape, dtype=torch.uint8)).values()
    parameters = sum(p.numel() * p.element_size() for p in extractor.network.parameters())
    return parameters + 4 * FLOAT64 * features.shape[1] ** 2


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
                cpu = torch.device("cpu")
                fake_score_pass(student, fake, config, images, cpu)
                matching_pass(student, fake, distance, config, images, cpu)
            else:
                one_pass(student, distance, config, passed_images(config, images), torch.device("cpu"))
    return live.peak


def fake_score_pass(
    student: DSNO, fake: TeacherBackbone, config: Config, images: int, device: torch.device
) -> None:
    """The passes of an update of the fake score network on so many images of zeros: samples are drawn, and denoised.

    The adversarial loss has it judge as many real images.
    """
    with torch.no_grad():
        _states(student, config, images, most_points(config)[-1:], device)
    judged = 2 * images if config.training.distribution.adversarial_weight else images
    x = torch.zeros(judged, *config.network.state_shape, device=device)
    _denoised(fake, x, config, config.training.precision).square().mean().backward()


def matching_pass(
    student: DSNO,
    fake: TeacherBackbone | None,
    distance: Distance,
    config: Config,
    images: int,
    device: torch.device,
    more: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """The passes of a step of the student by distribution matching, on so many images of zeros.

    `fake` stands for the teacher too, which is the same network; without it nothing is matched. `more` is a further loss of
    samples (N, C, H, W), such as the Frechet loss.
    """
    settings = config.training.distribution
    passed = passed_images(config, images)
    points = most_points(config) if settings.trajectory_weight else most_points(config)[-1:]
    states = _states(student, config, passed, points, device)
    x = states[:images, -1].detach().requires_grad_()
    total = 0.0 * x.sum()  # so that there is a gradient whatever terms follow
    if fake is not None and settings.matching_weight:
        through = settings.matching == "score-identity"
        both = x.repeat(2, 1, 1, 1) if config.trajectories.guidance_scale != 1.0 else x
        with torch.set_grad_enabled(through):
            total = total + _denoised(fake, both, config, config.teacher.precision).square().mean()
    if fake is not None:
        total = total + _denoised(fake, x, config, config.training.precision).square().mean()
    if more is not None:
        total = total + more(x)
    (direction,) = torch.autograd.grad(total, x)
    loss = (states[:images, -1] * direction).mean()
    if settings.trajectory_weight:
        loss = loss + distance(states[images:], torch.zeros_like(states[images:])).mean()
    loss.backward()


def _states(student: DSNO, config: Config, images: int, points: list[int], device: torch.device) -> Tensor:
    """The student's states of zeros at `points`; at all of them if it computes these together."""
    if not form_of(config.student).points_apart:
        points = list(range(len(config.trajectories.time_points)))
    labels = torch.zeros(images, dtype=torch.int64) if config.network.num_classes else None
    noise = torch.zeros(images, *config.network.state_shape, device=device)
    states: Tensor = student(noise, labels, points).float()
    return states


def _denoised(network: TeacherBackbone, x_NCHW: Tensor, config: Config, precision: str) -> Tensor:
    """What a denoiser's network makes of states, float32."""
    labels = None
    if config.network.num_classes:
        labels = torch.zeros(len(x_NCHW), dtype=torch.int64, device=x_NCHW.device)
    with autocast_to(precision, x_NCHW.device):
        output: Tensor = network(x_NCHW, torch.zeros(1, 1, device=x_NCHW.device), labels)
    return output.float()


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
