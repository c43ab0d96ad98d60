"""What a config's stages will take: memory by arithmetic, memory of training and hours if they are measured.

The arithmetic needs no torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dsno_cluster import console
from dsno_cluster.config import Config, Profile, load_profile
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.networks.activations import (
    UNetShape,
    inference_elements,
    largest_tensor,
    parameter_count,
    samples_at_a_time,
    shape_of,
)
from dsno_cluster.teachers import ConfiguredTeacher, States, Teacher, compared_samplings
from dsno_cluster.trajectories.plan import Plan, bytes_text

if TYPE_CHECKING:
    import torch

    from dsno_cluster.networks.backbones import Backbone
    from dsno_cluster.networks.diffusers_model import DiffusersModel
    from dsno_cluster.training.objectives.frechet import FrechetTerm

NUMBER_BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}
WORKSPACE = 2  # peak with the workspace of convolutions and copies, as a multiple of what lives together
LONG_ENOUGH = 0.5  # seconds of a call that is timed


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on a device of a batch of the teacher and of one of the student in `eval`; None: not known."""

    teacher_batch: int | None
    student_batch: int | None
    student_parameters: int | None


@dataclass(frozen=True)
class Training:
    """Bytes on each of `ranks`, and the hours of all steps, without the time that ranks wait for each other."""

    ranks: int
    held_bytes: int
    bytes_per_image: int
    micro_batch: int
    bytes: int
    seconds_per_image: float
    device_hours: float
    wall_hours: float
    seconds_per_step: float = 0.0  # besides those of its images, on each rank
    without_features: bool = (
        False  # the Frechet loss is not counted: weights of its extractor are missing here
    )


@dataclass(frozen=True)
class Evaluation:
    """Seconds of a student's sample and of an image's features (None: no weights here), and the hours of one `eval`.

    They include all rows of the teacher.
    """

    devices: int
    seconds_per_sample: float
    seconds_per_features: float | None
    device_hours: float
    wall_hours: float


@dataclass(frozen=True)
class Stages:
    """What was measured; None: it was not."""

    training: Training | None = None
    evaluation: Evaluation | None = None
    finishing: Training | None = None  # the training that the config's `finish` makes


def estimate_memory(config: Config, teacher: ConfiguredTeacher | None) -> Memory:
    """The memory of batches, from the sizes of the networks. Without a teacher, its network counts as `network`."""
    settings, network, student = config.trajectories, config.network, config.student
    # classifier-free guidance is one batch of both; a guide is a second network, evaluated after the first
    joint = settings.guidance_scale != 1.0 and config.teacher.guide is None
    at_once = settings.batch_size * (2 if joint else 1)
    of_guide = teacher.guide.info.unet if teacher and teacher.guide else None
    of_teacher = teacher.info.unet if teacher else shape_of(network)
    of_student = shape_of(network) if student.backbone == "unet" else None
    if teacher is not None and student.backbone != "unet":
        backbone = teacher.info.diffusers if student.backbone == "diffusers" else teacher.info.backbone
        of_student = None if backbone is None else shape_of(backbone, network.sides)
    series = student.operator == "series"
    out = network.state_channels * (student.modes if series else 1)
    modes = 0 if series else student.modes
    points = 1 if series or student.points == "drawn" else settings.num_points
    parameters = teacher_batch = student_batch = None
    if of_teacher is not None:
        number = NUMBER_BYTES[config.teacher.precision]
        weights = parameter_count(of_teacher, network.state_channels, 0, network.class_slots)
        if of_guide is not None:
            weights += parameter_count(of_guide, network.state_channels, 0, network.class_slots)
        teacher_batch = number * weights + _activations(of_teacher, at_once, 1, number)
    if of_student is not None:
        parameters = parameter_count(of_student, out, modes, network.class_slots)
        number, at_once = NUMBER_BYTES[config.evaluation.precision], config.evaluation.batch_size
        student_batch = NUMBER_BYTES["float32"] * parameters + _activations(
            of_student, at_once, points, number
        )
    return Memory(teacher_batch, student_batch, parameters)


def _activations(shape: UNetShape, samples: int, points: int, number: int) -> int:
    """Bytes of a batch, or of the largest part of it that passes through together."""
    together = samples_at_a_time(largest_tensor(shape, shape.channels) * points, samples)
    return WORKSPACE * inference_elements(shape) * together * points * number


def devices_of(profile: Profile, threads: int) -> int:
    """How many GPUs, or actors of so many CPU threads, a profile of Ray actors has."""
    from dsno_cluster.cluster.crew import actors_that_fit

    a_node = {"CPU": profile.cpus_per_task, "GPU": profile.gpus_per_node}
    each = profile.gpus_per_actor if profile.gpus_per_node else 0
    return profile.nodes * max(1, actors_that_fit(a_node, threads, each))


def measure_stages(config: Config, plan: Plan, teacher: Teacher, seconds_per_evaluation: float) -> Stages:
    """Training and evaluation on what their profiles say, by passes on the teacher's device."""
    ranks, actors = load_profile("train", {}), load_profile("eval", {})
    number, gpus = ranks.nodes * ranks.tasks_per_node, ranks.gpus_per_node > 0
    training = measure_training(config, plan, teacher.device, number, gpus=gpus)
    devices = devices_of(actors, config.evaluation.threads)
    evaluation = measure_evaluation(config, plan, teacher.device, seconds_per_evaluation, devices)
    finished, finishing = config.finished, None
    if finished is not None:
        finishing = measure_training(finished, plan, teacher.device, number, gpus=gpus)
    return Stages(training, evaluation, finishing)


def measure_training(config: Config, plan: Plan, device: torch.device, ranks: int, *, gpus: bool) -> Training:
    """The memory of training on each of `ranks`, and its hours by passes that are timed on `device`."""
    from dsno_cluster.training.memory import training_memory

    backbone = plan.teacher.backbone()
    what = "finishing" if config.training.objective == "distribution" else "training"
    console.say(f"estimating the memory of {what}, and timing its passes")
    memory = training_memory(
        config,
        ranks=ranks,
        backbone=backbone,
        teacher=plan.teacher.info.backbone,
        device="cuda" if gpus else "cpu",
    )
    fits = max(1, int((_free_bytes(device) - memory.held) / max(1, memory.per_image)))
    frechet = _frechet_term(config, plan.teacher.states, device)
    each = _training_seconds(config, device, plan, frechet, min(memory.micro_batch, fits))
    a_step = 0.0 if frechet is None else _transport_seconds(frechet)
    hours = config.training.steps * (each * config.training.batch_size + a_step * ranks) / 3600
    return Training(
        ranks,
        memory.held,
        memory.per_image,
        memory.micro_batch,
        memory.total,
        each,
        hours,
        hours / ranks,
        a_step,
        config.training.learns_features and frechet is None,
    )


def _training_seconds(
    config: Config, device: torch.device, plan: Plan, frechet: FrechetTerm | None, most: int
) -> float:
    """Seconds of the passes of the objective for one image, in a micro-batch of `most` if that is quick enough to try.

    Nothing is compiled; a precision `auto` is the one that the device would get.
    """
    import torch

    from dsno_cluster.device import allow_tf32, training_precision, wait_for_gpu
    from dsno_cluster.networks.recompute import recompute_in_backward
    from dsno_cluster.training.beginning import make_student
    from dsno_cluster.training.memory import (
        denoising_network,
        fake_score_pass,
        matching_pass,
        one_pass,
    )
    from dsno_cluster.training.objectives.losses import distance_of_shapes

    settings = config.training
    precision = training_precision(device) if settings.precision == "auto" else settings.precision
    config = config.model_copy(update={"training": settings.model_copy(update={"precision": precision})})
    student = make_student(config, plan.teacher.backbone()).accelerate(precision=precision)
    student.recompute(settings.recompute)
    student.to(device).train()
    distance = distance_of_shapes(settings.loss)
    if isinstance(distance, torch.nn.Module):
        distance.to(device)

    matched, distribution = settings.objective == "distribution", settings.distribution
    fake = None
    if matched and distribution.needs_fake_score:
        fake = denoising_network(config, plan.teacher.info.backbone).to(device)
        recompute_in_backward(fake, settings.recompute)
    more = None if frechet is None else lambda x: frechet.loss(x, 0)[0]

    def train(count: int) -> None:
        if matched:
            if fake is not None:
                for _ in range(distribution.fake_updates):
                    fake_score_pass(student, fake, config, count, device)
            matching_pass(student, fake, distance, config, count, device, more)
        else:
            one_pass(student, distance, config, count, device)
        wait_for_gpu()

    allow_tf32(precision == "tf32")
    try:
        return seconds_of_one(train, most)
    finally:
        allow_tf32(False)


def _frechet_term(config: Config, states: States, device: torch.device) -> FrechetTerm | None:
    """The Frechet loss with moments that are drawn; None if the config has none, or its weights are not here."""
    import torch

    from dsno_cluster.features.extractors import (
        check_differentiable,
        load_fid_extractor,
        main_weights_at_hand,
    )
    from dsno_cluster.features.transport import gaussian_of
    from dsno_cluster.training.objectives.frechet import make_frechet_term

    if not config.training.learns_features:
        return None
    try:
        check_differentiable(config.evaluation.feature_extractor, "training.distribution.frechet_weight")
        if main_weights_at_hand(config.evaluation) is None:
            return None
        extractor = load_fid_extractor(config.evaluation, states.image_shape, device)
    except (UserError, WorkError):  # `plan` says what is wrong with the extractor and its file
        return None
    (features,) = extractor(torch.zeros(1, *states.image_shape, dtype=torch.uint8)).values()
    with torch.random.fork_rng(devices=[]):
        drawn = gaussian_of(torch.randn(2 * features.shape[1], features.shape[1]))
    term = make_frechet_term(config, states, drawn, device, 1)
    term.mean.copy_(drawn.mean)
    term.covariance.copy_(drawn.covariance)
    term.seen.fill_(term.population)
    term.loss(torch.zeros(1, *states.shape, device=device), 0)  # later ones of that step need no transport
    return term


def _transport_seconds(term: FrechetTerm) -> float:
    """Seconds of the transport between the moments, which each step computes once."""
    from dsno_cluster.device import wait_for_gpu
    from dsno_cluster.features.statistics import Gaussian
    from dsno_cluster.features.transport import transport

    def carry(_: int) -> None:
        transport(Gaussian(term.mean, term.covariance), term.real, term.root)
        wait_for_gpu()

    return seconds_of_one(carry, 1)


def measure_evaluation(
    config: Config, plan: Plan, device: torch.device, seconds_per_evaluation: float, devices: int
) -> Evaluation:
    """The hours of one evaluation on `devices`, from batches of the student and of features timed on `device`.

    `seconds_per_evaluation` are the teacher's, of one image.
    """
    import torch

    settings = config.evaluation
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        sample = _sample_seconds(config, device, plan.teacher.backbone())
        features = _feature_seconds(config, plan.teacher.states.image_shape)
        decoding = _decoding_seconds(config, plan.teacher.states, device)
    finally:
        torch.set_num_threads(threads)
    rows = compared_samplings(config, plan.teacher) if _draws_images(config) else []
    evaluations = settings.drawn * sum(row.evaluations for row in rows)
    seconds = settings.drawn * (len(rows) + 1) * ((features or 0.0) + decoding)
    seconds += settings.drawn * sample if rows else 0.0
    if "trajectory_error" in settings.metrics:
        evaluations += settings.trajectory_samples * plan.size.evaluations_per_sample
        seconds += settings.trajectory_samples * sample
    hours = (seconds + evaluations * seconds_per_evaluation) / 3600
    return Evaluation(devices, sample, features, hours, hours / devices)


def _draws_images(config: Config) -> bool:
    return set(config.evaluation.metrics) != {"trajectory_error"}


def _sample_seconds(
    config: Config, device: torch.device, backbone: Backbone | DiffusersModel | None
) -> float:
    import torch

    from dsno_cluster.device import wait_for_gpu
    from dsno_cluster.diffusion.noise import sample_labels, sample_noise
    from dsno_cluster.training.beginning import make_student

    settings, network = config.evaluation, config.network
    student = make_student(config, backbone).accelerate(precision=settings.precision)
    student.to(memory_format=torch.channels_last)
    student.eval().requires_grad_(False).to(device)

    def draw(count: int) -> None:
        noise = sample_noise(1, range(count), network.state_shape).to(device)
        labels = sample_labels(1, range(count), network.num_classes) if network.num_classes else None
        student.sample(noise, labels)
        wait_for_gpu()

    return seconds_of_one(draw, settings.batch_size)


def _decoding_seconds(config: Config, states: States, device: torch.device) -> float:
    """Seconds in which one latent is decoded; 0 if the states are images, or no images are measured."""
    if states.decoder is None or not _draws_images(config):
        return 0.0
    import torch

    from dsno_cluster.device import wait_for_gpu

    decoder = states.decoder.load(device, config.evaluation.precision)

    def decode(count: int) -> None:
        for _ in decoder.parts(torch.zeros(count, *states.shape, device=device)):
            pass
        wait_for_gpu()

    return seconds_of_one(decode, config.evaluation.batch_size)


def _feature_seconds(config: Config, shape: Sequence[int]) -> float | None:
    """Seconds of the features of one image (C, H, W) that the metrics read; None if weights are missing here."""
    if not _draws_images(config):
        return None
    import torch

    from dsno_cluster.device import wait_for_gpu
    from dsno_cluster.features.extractors import BATCH, find_readings, load_extractor, weights_at_hand

    readings = find_readings(config.evaluation)
    try:
        weights = weights_at_hand(config.evaluation)
    except (UserError, WorkError):  # `plan` says what is wrong with files
        return None
    if weights is None:
        return None
    extractors = [
        load_extractor(file, [r.layer for r in readings.values() if r.extractor == name])
        for name, file in weights.items()
    ]

    def extract(count: int) -> None:
        images = torch.zeros(count, *shape, dtype=torch.uint8)
        for extractor in extractors:
            extractor(images)
        wait_for_gpu()

    return seconds_of_one(extract, BATCH)


def seconds_of_one(call: Callable[[int], None], most: int) -> float:
    """Seconds of `call(count)` for each of `count`, which doubles up to `most` until a call takes `LONG_ENOUGH`."""
    count, most = 1, max(1, most)
    while True:
        seconds = _seconds(call, count)
        if seconds < LONG_ENOUGH:
            seconds = min(seconds, _seconds(call, count))  # the first of a size prepares things
        if seconds >= LONG_ENOUGH or count >= most:
            return seconds / count
        count = min(2 * count, most)


def _seconds(call: Callable[[int], None], count: int) -> float:
    began = time.perf_counter()
    call(count)
    return time.perf_counter() - began


def _free_bytes(device: torch.device) -> int:
    """The memory that is free on the device now; of a CPU's, half."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def as_values(memory: Memory, stages: Stages) -> dict[str, object]:
    """The forecast as values of JSON: sizes in bytes, times in seconds and hours."""
    return {"memory": asdict(memory), **asdict(stages)}


def report(config: Config, memory: Memory, stages: Stages) -> list[str]:
    """The forecast as lines for people."""
    training, evaluation, finished = stages.training, stages.evaluation, config.finished
    known = {"the teacher": memory.teacher_batch, "the student in `eval`": memory.student_batch}
    sizes = {
        "the teacher": config.trajectories.batch_size,
        "the student in `eval`": config.evaluation.batch_size,
    }
    told = [f"{bytes_text(size)} for {sizes[who]} images of {who}" for who, size in known.items() if size]
    lines = [f"memory        about {', '.join(told)} (arithmetic)"] if told else []
    weights = f"{memory.student_parameters / 1e6:,.1f} M parameters, " if memory.student_parameters else ""
    lines += _training_lines("training", weights, config, training)
    if finished is not None:
        lines += _training_lines("finishing", "", finished, stages.finishing)
    if training is None or evaluation is None:
        lines.append(
            "              memory of training, hours of training and of eval: not measured; --measure does"
        )
        return lines
    lines += [
        f"eval          {evaluation.seconds_per_sample:.3g} s a sample, "
        + (
            "features not measured"
            if evaluation.seconds_per_features is None
            else f"{evaluation.seconds_per_features:.3g} s its features"
        )
        + f", with the teacher's rows {evaluation.device_hours:,.2f} device-hours; "
        f"{console.duration(3600 * evaluation.wall_hours)} on {evaluation.devices} device(s)",
    ]
    return lines


def _training_lines(title: str, weights: str, config: Config, measured: Training | None) -> list[str]:
    """The forecast of a training, its memory and hours if they were measured."""
    steps, size = config.training.steps, config.training.batch_size
    lines = [f"{title:<14}{weights}{steps:,} steps of {size:,} images: {steps * size:,} in all"]
    if measured is None:
        return lines
    a_step = f" and {measured.seconds_per_step:.3g} s a step" if measured.seconds_per_step else ""
    lines += [
        f"              {bytes_text(measured.bytes)} on each of {measured.ranks} rank(s): {bytes_text(measured.held_bytes)}, and "
        f"{bytes_text(measured.bytes_per_image)} for each of {measured.micro_batch} images in a micro-batch",
        f"              {measured.seconds_per_image:.3g} s an image{a_step}, not compiled: {measured.device_hours:,.2f} "
        f"device-hours; {console.duration(3600 * measured.wall_hours)} on {measured.ranks} rank(s)",
    ]
    if measured.without_features:
        lines.append(
            "              the Frechet loss is not counted: the weights of evaluation.feature_extractor are not here"
        )
    return lines
