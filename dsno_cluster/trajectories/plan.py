"""The plan of gen-trajectories: its size by arithmetic, and, if asked for, measured cost and accuracy.

The arithmetic needs neither the teacher nor torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dsno_cluster import console
from dsno_cluster.config import Config, files_not_there
from dsno_cluster.diffusion.solvers import Method
from dsno_cluster.errors import UserError
from dsno_cluster.files import shown_path
from dsno_cluster.storage import open_storage
from dsno_cluster.teachers import ConfiguredTeacher, Teacher, compared_samplings, find_teacher
from dsno_cluster.trajectories.shards import MADE_SHARDS, MANIFEST
from dsno_cluster.trajectories.spec import TrajectorySpec, former_specs, spec_of

if TYPE_CHECKING:
    from torch import Tensor

LARGE_ERROR = 0.1  # relative error of a solver above which images differ visibly


@dataclass(frozen=True)
class Size:
    """The amount of work; sizes are in bytes."""

    num_samples: int
    num_shards: int
    evaluations_per_sample: int
    bytes_per_shard: int

    @property
    def evaluations(self) -> int:
        return self.num_samples * self.evaluations_per_sample

    @property
    def bytes(self) -> int:
        return self.num_shards * self.bytes_per_shard


@dataclass(frozen=True)
class Plan:
    """A data set to make. `note` says what the user may not expect, or is None."""

    spec: TrajectorySpec
    teacher: ConfiguredTeacher
    size: Size
    note: str | None = None

    @property
    def folder(self) -> str:
        """The key prefix of the data set below storage.root."""
        return self.spec.folder

    @property
    def other_folders(self) -> tuple[str, ...]:
        """What other versions call the same data set."""
        own = spec_of(self.teacher.config, self.teacher)
        names = (one.folder for one in (own, *former_specs(own, self.teacher)))
        return tuple(name for name in names if name != self.folder)


@dataclass(frozen=True)
class Cost:
    """Seconds of one evaluation of one sample, measured on `device`, and a plan's hours at that speed."""

    device: str
    seconds_per_evaluation: float
    device_hours: float
    devices: int
    wall_hours: float


@dataclass(frozen=True)
class Found:
    """Measurements for a plan: cost, relative error by time point.

    `problem`: why the teacher cannot be used yet; `files`: why other files of the config cannot be used.
    """

    measured: Cost | None = None
    error: dict[str, float] | None = None
    problem: str | None = None
    files: tuple[str, ...] = ()


def size_of(config: Config, method: Method | None = None) -> Size:
    """The size of a config's data set; `method` is how its teacher is solved, once that is known."""
    settings, network = config.trajectories, config.network
    numbers = settings.num_points * math.prod(network.state_shape)
    size = {"float16": 2, "float32": 4}[settings.dtype]
    return Size(
        num_samples=settings.num_samples,
        num_shards=settings.num_samples // settings.samples_per_shard,
        evaluations_per_sample=(method or settings.method).evaluations(settings.time_points),
        bytes_per_shard=settings.samples_per_shard * (numbers * size + (8 if network.num_classes else 0)),
    )


def make_plan(config: Config, teacher: ConfiguredTeacher | None = None) -> Plan:
    """The plan of a config; its `teacher` is found unless given.

    Raises UserError for a config with imported trajectories, and as `find_teacher` does.
    """
    if config.trajectories.imported is not None:
        raise UserError(
            f"trajectories.imported: {config.trajectories.imported}: nothing is to be made for this config, whose "
            "trajectories were imported; `train` reads them"
        )
    teacher = teacher or find_teacher(config)
    notes = list(teacher.info.notes)
    if teacher.info.clips and not config.trajectories.clip_denoised:
        notes.append(
            "the teacher's scheduler bounds the clean image (clip_sample or thresholding), this config does not: its "
            "trajectories differ from the scheduler's unless trajectories.clip_denoised=true"
        )
    note = "; ".join(notes) or None
    return Plan(_spec(config, teacher), teacher, size_of(config, teacher.method), note)


def _spec(config: Config, teacher: ConfiguredTeacher) -> TrajectorySpec:
    """The spec of the config's data set; if an earlier version began the data set, that version's spec."""
    spec = spec_of(config, teacher)
    if former := former_specs(spec, teacher):
        storage = open_storage(config.storage.root, config.storage.endpoint_url)
        for one in (spec, *former):
            if any(storage.stat(one.folder + file) is not None for file in (MANIFEST, MADE_SHARDS)):
                return one
    return spec


def check_reachable(config: Config, folder: str) -> None:
    """Raises WorkError, or UserError, if the storage of the data set in `folder` cannot be read from here."""
    open_storage(config.storage.root, config.storage.endpoint_url).stat(folder + MANIFEST)


def measure_cost(plan: Plan, teacher: Teacher, devices: int) -> Cost:
    """Time the teacher on its device, and work out the hours of the plan.

    The work is to be shared by `devices` (GPUs, or actors of `trajectories.threads` CPU threads).
    """
    from dsno_cluster.device import device_name

    each = seconds_per_evaluation(plan, teacher)
    hours = each * plan.size.evaluations / 3600
    return Cost(device_name(), each, hours, devices, hours / devices)


def seconds_per_evaluation(plan: Plan, teacher: Teacher) -> float:
    """Seconds of an evaluation of one image, at the config's batch size and threads, timed for about two seconds.

    With a guide it is the mean over the evaluations of both networks that a trajectory needs.
    """
    spec = plan.spec
    noise, labels = probe_samples(spec, teacher, spec.batch_size)
    each = _timed(spec, teacher, noise, labels)
    if teacher.guide is None:
        return each
    theirs = _timed(spec, teacher.guide, noise, labels if teacher.guide.num_classes else None)
    own, guided = len(spec.method.visited(spec.times)), spec.method.guided_evaluations(spec.times)
    return (own * each + guided * theirs) / (own + guided)


def _timed(spec: TrajectorySpec, teacher: Teacher, noise: Tensor, labels: Tensor | None) -> float:
    """The median seconds of one network's evaluation of one of these samples together."""
    import statistics
    import time

    import torch

    from dsno_cluster.device import wait_for_gpu

    seconds: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(spec.threads)
    try:
        for _ in range(100):
            began = time.perf_counter()
            teacher(noise, 0.5, labels)
            wait_for_gpu()
            seconds.append(time.perf_counter() - began)
            if len(seconds) > 3 and sum(seconds[1:]) > 2.0:  # the first may compile
                break
    finally:
        torch.set_num_threads(threads)
    return statistics.median(seconds[1:]) / spec.batch_size


def measure_errors(plan: Plan, teacher: Teacher, probes: int) -> dict[str, float]:
    """Relative error of the config's solver at each time point on `probes` samples, against a very fine solution.

    Raises UserError for a teacher with its own steps: it is exact on those and has no finer solution.
    """
    from dsno_cluster.diffusion.accuracy import reference_method, relative_errors
    from dsno_cluster.diffusion.solvers import solve_with

    _refuse_own_steps(plan)
    spec = plan.spec
    method, times = spec.method, spec.times
    finest = reference_method(method, times)
    noise, labels = probe_samples(spec, teacher, probes)
    calls = finest.evaluations(times) + method.evaluations(times)
    console.say(
        f"measuring the solver's error on {probes} samples (--probes): {calls:,} evaluations of them all, about "
        f"{console.duration(calls * call_seconds(teacher, noise, labels))}"
    )
    reference = solve_with(finest, teacher, noise, times, labels)
    states = solve_with(method, teacher, noise, times, labels)
    return errors_by_time(spec, relative_errors(states, reference))


def choose_solver(
    config: Config, plan: Plan, teacher: Teacher, tolerance: float, probes: int
) -> tuple[Config, dict[str, float]]:
    """The config with the cheapest solver, grid and steps within `tolerance` at every time point, and its errors.

    Measured on `probes` samples. Raises UserError if none is accurate enough, or the teacher has its own
    steps.
    """
    from dsno_cluster.diffusion.accuracy import Choice, cheapest, reference_method

    _refuse_own_steps(plan)
    spec = plan.spec
    noise, labels = probe_samples(spec, teacher, probes)

    def tell(choice: Choice) -> None:
        console.say(f"{choice.method.solver}, {choice.method.steps} steps: off by {max(choice.errors):.2g}")

    calls = reference_method(spec.method, spec.times).evaluations(spec.times)
    console.say(
        f"looking for the cheapest solver within {tolerance:g}, on {probes} samples (--probes): first a very fine solution, "
        f"{calls:,} evaluations of them all, about {console.duration(calls * call_seconds(teacher, noise, labels))}"
    )
    found = cheapest(spec.method, teacher, noise, spec.times, tolerance, labels, tried=tell)
    method = found.method
    chosen = {"solver": method.solver, "grid": method.grid, "steps": method.steps}
    settings = config.trajectories.model_copy(update=chosen)
    return config.model_copy(update={"trajectories": settings}), errors_by_time(spec, found.errors)


def _refuse_own_steps(plan: Plan) -> None:
    teacher = plan.teacher
    if teacher.own_steps is not None:
        raise UserError(
            f"the teacher at {teacher.path} has {plan.spec.steps} steps of its own, so there is no finer "
            "solution to measure an error against; leave --tolerance out, or set teacher.options={schedule: continuous}"
        )


def probe_samples(spec: TrajectorySpec, teacher: Teacher, count: int) -> tuple[Tensor, Tensor | None]:
    """Noise (N, C, H, W) and labels (N,) of the data set's first samples, on the teacher's device."""
    from dsno_cluster.diffusion.noise import sample_labels, sample_noise

    labels, classes = None, spec.labels.num_classes
    if classes:
        labels = sample_labels(spec.seed, range(count), classes).to(teacher.device)
    return sample_noise(spec.seed, range(count), spec.shape).to(teacher.device), labels


def call_seconds(teacher: Teacher, noise: Tensor, labels: Tensor | None) -> float:
    """Seconds that the teacher takes for these samples together."""
    import time

    teacher(noise, 0.5, labels).cpu()  # warms up; waits for a GPU
    began = time.perf_counter()
    teacher(noise, 0.5, labels).cpu()
    return time.perf_counter() - began


def errors_by_time(spec: TrajectorySpec, errors: tuple[float, ...]) -> dict[str, float]:
    """Errors (M,) by time point, as text."""
    return dict(zip(map(str, spec.times), errors, strict=True))


def report(config: Config, plan: Plan | None, found: Found) -> str:
    """The plan as lines for people; `plan` None: there is no teacher yet, and so no folder named after it."""
    settings, size = config.trajectories, plan.size if plan else size_of(config)
    guided = _guidance_text(config, (plan.teacher if plan else settings).method)
    rows = sum(
        sampling.evaluations for sampling in compared_samplings(config, plan.teacher if plan else None)
    )
    lines = [
        f"teacher       {config.teacher.path}: fits"
        if found.problem is None
        else f"teacher       not yet: {found.problem}",
        f"trajectories  {size.num_samples:,} of {settings.num_points} time points, {settings.dtype}",
        f"shards        {size.num_shards:,} of {settings.samples_per_shard:,} trajectories, "
        f"{bytes_text(size.bytes_per_shard)} each",
        f"storage       {bytes_text(size.bytes)} "
        + (
            f"in {shown_path(config.storage.root)}/{plan.folder}"
            if plan
            else f"below {shown_path(config.storage.root)}/trajectories/"
        ),
        f"evaluations   {size.evaluations_per_sample} a trajectory ({settings.solver}, {settings.steps} steps{guided}), "
        f"{size.evaluations:,} in all",
    ]
    # without a metric on images, the teacher's are not drawn
    if set(config.evaluation.metrics) != {"trajectory_error"}:
        lines.append(
            f"evaluation    some {rows * config.evaluation.drawn:,} more by `eval`, once, for the teacher's own rows "
            "(evaluation.num_samples, teacher_steps, and the solver above)"
        )
    if plan and plan.note:
        lines.insert(1, f"note          {plan.note}")
    lines += [f"not usable    {problem}" for problem in found.files]
    later = {
        key: path
        for key, path in files_not_there(config).items()
        if not any(problem.startswith(f"{key}: ") for problem in found.files)  # it was said
    }
    if later:
        told = ", ".join(f"{key} {path}" for key, path in later.items())
        lines.append(f"files         not there yet, for later stages: {told}")
    if (measured := found.measured) is None:
        lines.append("time          not measured: --measure times the teacher on this machine's device")
    else:
        unit = "device" if measured.devices == 1 else f"{measured.devices} devices"
        lines += [
            f"device        {measured.device}: {measured.seconds_per_evaluation:.3g} s an evaluation of one image "
            f"at batch {settings.batch_size}",
            f"time          {measured.device_hours:,.2f} device-hours; {console.duration(3600 * measured.wall_hours)} on {unit}",
        ]
    if found.error is not None:
        lines.append(
            "accuracy      relative error at t: "
            + ", ".join(f"{t} {value:.2g}" for t, value in found.error.items())
            + " (probe samples, against a very fine solution)"
        )
        if max(found.error.values()) > LARGE_ERROR:
            lines.append(
                "              this is large: raise trajectories.steps, or let --tolerance 1e-2 choose"
            )
    return "\n".join(lines)


def _guidance_text(config: Config, method: Method) -> str:
    """How the trajectories are guided, as an addition to their solver; empty without guidance."""
    settings = config.trajectories
    if settings.guidance_scale == 1.0:
        return ""
    text = ", guided" + (f" by {shown_path(config.teacher.guide)}" if config.teacher.guide else "")
    if settings.guidance_interval is None:
        return text
    times = settings.time_points
    return f"{text} at {method.guided_evaluations(times)} of {len(method.visited(times))} noise levels"


def as_json(config: Config, plan: Plan | None, found: Found, **more: object) -> str:
    """The plan, and what else is known of its config, as one JSON object: sizes in bytes, times in seconds and hours."""
    settings, size = config.trajectories, plan.size if plan else size_of(config)
    content = {
        **asdict(size),
        "evaluations": size.evaluations,
        "bytes": size.bytes,
        "solver": settings.solver,
        "grid": settings.grid,
        "steps": settings.steps,
        "times": list(settings.time_points),
        "measured": None if found.measured is None else asdict(found.measured),
        "relative_error": found.error,
        "teacher_problem": found.problem,
        "file_problems": list(found.files),
        "note": plan.note if plan else None,
        "folder": f"{config.storage.root}/{plan.folder}" if plan else None,
        "files_not_there": files_not_there(config),
        **more,
    }
    return json.dumps(content)


def bytes_text(count: float) -> str:
    """A number of bytes as text, such as 8.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
