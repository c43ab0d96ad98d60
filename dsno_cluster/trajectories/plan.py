"""What gen-trajectories will do and cost: arithmetic first, measured seconds and accuracy where asked.

The arithmetic needs neither the teacher nor torch.
"""

from __future__ import annotations

import json
import socket
from dataclasses import asdict, dataclass
from typing import Any

from dsno_cluster import console
from dsno_cluster.config import Config, files_not_there
from dsno_cluster.diffusion.noise import GENERATOR, noise_checksum
from dsno_cluster.diffusion.solvers import count_evaluations, grid_points, usual_grid
from dsno_cluster.errors import UserError
from dsno_cluster.files import shown_path
from dsno_cluster.teachers import Teacher, TeacherInfo, check_fits, load_teacher, teacher_info
from dsno_cluster.trajectories.shards import MANIFEST, canonical_hash

LARGE_ERROR = 0.1  # relative, of a solver: what a student learns from it is visibly another image
FORMAT_VERSION = 2  # of a shard's bytes, see shards.py; 2 added the checksum in its header

_HOW = (
    "point teacher.path at a folder of ours (as `dsno-cluster train-teacher` and `import-weights` write it), a diffusers "
    "folder, a published checkpoint, or package.module:function"
)


class NoTeacher(UserError):
    """The config names no teacher, or one that is not there."""


@dataclass(frozen=True)
class Size:
    """How much there is to do; sizes are in bytes."""

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
    """`folder` is the key prefix of the data set below storage.root; `note` is what the user may not expect, or None."""

    spec: dict[str, Any]
    folder: str
    size: Size
    note: str | None = None


@dataclass(frozen=True)
class Cost:
    """Measured on `device`: seconds of one network evaluation of one sample, and what that makes of a plan."""

    device: str
    seconds_per_evaluation: float
    device_hours: float
    devices: int
    wall_hours: float


@dataclass(frozen=True)
class Found:
    """What was measured for a plan: cost, relative error by time point; `problem` keeps the teacher from being used yet."""

    measured: Cost | None = None
    error: dict[str, float] | None = None
    problem: str | None = None


def size_of(config: Config, native: tuple[float, ...] | None = None) -> Size:
    """The arithmetic of a config; `native` are the teacher's own steps where it is solved on them."""
    settings, network = config.trajectories, config.network
    numbers = settings.num_points * network.channels * network.image_size**2
    size = {"float16": 2, "float32": 4}[settings.dtype]
    return Size(
        num_samples=settings.num_samples,
        num_shards=settings.num_samples // settings.samples_per_shard,
        evaluations_per_sample=count_evaluations(
            settings.solver,
            settings.steps,
            settings.guidance_scale,
            settings.time_points,
            native or settings.grid,
        ),
        bytes_per_shard=settings.samples_per_shard * (numbers * size + (8 if network.num_classes else 0)),
    )


def make_plan(config: Config) -> Plan:
    """The plan of a config. Raises UserError where it names no teacher or one that is not there."""
    teacher = find_teacher(config)
    spec = trajectory_spec(config, teacher)
    size = size_of(config, own_steps(config, teacher))
    note = None
    if teacher.clips and not config.trajectories.clip_denoised:
        note = (
            "the teacher's scheduler bounds the clean image (clip_sample or thresholding), this config does not: its "
            "trajectories are other ones unless trajectories.clip_denoised=true"
        )
    return Plan(spec=spec, folder=f"trajectories/{canonical_hash(spec)}/", size=size, note=note)


def check_reachable(config: Config, folder: str) -> None:
    """Raises WorkError, or UserError, where the storage of the data set in `folder` cannot be read from here."""
    from dsno_cluster.storage import open_storage

    open_storage(config.storage.root, config.storage.endpoint_url).stat(folder + MANIFEST)


def measure_cost(config: Config, teacher: Teacher, devices: int) -> Cost:
    """Time the teacher on its device, at the config's batch size and threads, for about two seconds.

    `devices` of them (GPUs, or actors of `trajectories.threads` CPU threads) then share the work.
    """
    import statistics
    import time

    import torch

    from dsno_cluster.device import device_name

    settings = config.trajectories
    device = teacher.device
    noise, labels = _probes(config, teacher, settings.batch_size)
    seconds: list[float] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        for _ in range(100):
            began = time.perf_counter()
            teacher(noise, 0.5, labels)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            if len(seconds) > 3 and sum(seconds) > 2.0:
                break
    finally:
        torch.set_num_threads(threads)
    each = statistics.median(seconds[1:]) / settings.batch_size
    hours = each * size_of(config, own_steps(config, teacher)).evaluations / 3600
    return Cost(device_name(), each, hours, devices, hours / devices)


def measure_errors(config: Config, teacher: Teacher, probes: int) -> dict[str, float]:
    """Relative error of the config's solver at each time point on `probes` samples, against a very fine solution.

    Raises UserError for a teacher with steps of its own: it is exact on those and has no finer solution.
    """
    from dsno_cluster.diffusion.accuracy import reference_states, relative_errors
    from dsno_cluster.diffusion.solvers import solve

    _refuse_own_steps(config, teacher)
    settings = config.trajectories
    guidance, times = settings.guidance_scale, settings.time_points
    noise, labels = _probes(config, teacher, probes)
    calls = _reference_calls(config) + count_evaluations(
        settings.solver, settings.steps, guidance, times, grid_name(config)
    )
    console.say(
        f"measuring the solver's error on {probes} samples (--probes): {calls:,} evaluations of them all, about "
        f"{console.duration(calls * _call_seconds(teacher, noise, labels))}"
    )
    rest = (labels, settings.guidance_scale, settings.clip_denoised)
    reference = reference_states(teacher, noise, settings.time_points, *rest)
    states = solve(
        teacher, noise, settings.time_points, settings.solver, settings.steps, *rest, settings.grid
    )
    return _by_time(config, relative_errors(states, reference))


def choose_solver(
    config: Config, teacher: Teacher, tolerance: float, probes: int
) -> tuple[Config, dict[str, float]]:
    """The config with the cheapest solver, grid and steps within `tolerance` at every time point, and its errors.

    Measured on `probes` samples. Raises UserError where none is good enough, or the teacher has steps of its own.
    """
    from dsno_cluster.diffusion.accuracy import Choice, cheapest

    _refuse_own_steps(config, teacher)
    settings = config.trajectories
    noise, labels = _probes(config, teacher, probes)

    def tell(choice: Choice) -> None:
        console.say(f"{choice.solver}, {choice.steps} steps: off by {max(choice.errors):.2g}")

    calls = _reference_calls(config)
    console.say(
        f"looking for the cheapest solver within {tolerance:g}, on {probes} samples (--probes): first a very fine solution, "
        f"{calls:,} evaluations of them all, about {console.duration(calls * _call_seconds(teacher, noise, labels))}"
    )
    rest = (labels, settings.guidance_scale, settings.clip_denoised)
    found = cheapest(teacher, noise, settings.time_points, tolerance, *rest, tried=tell)
    chosen = settings.model_copy(update={"solver": found.solver, "grid": found.grid, "steps": found.steps})
    return config.model_copy(update={"trajectories": chosen}), _by_time(config, found.errors)


def _refuse_own_steps(config: Config, teacher: Teacher) -> None:
    if own_steps(config, teacher) is not None:
        raise UserError(
            f"the teacher at {config.teacher.path} has {config.trajectories.steps} steps of its own, so there is no finer "
            "solution to measure an error against; leave --tolerance out, or set teacher.options={schedule: continuous}"
        )


def _probes(config: Config, teacher: Teacher, count: int) -> tuple[Any, Any]:
    from dsno_cluster.diffusion.noise import sample_labels, sample_noise

    labels = None
    if teacher.num_classes:
        labels = sample_labels(config.seed, range(count), teacher.num_classes).to(teacher.device)
    return sample_noise(config.seed, range(count), teacher.shape).to(teacher.device), labels


def _reference_calls(config: Config) -> int:
    """Evaluations of the very fine solution that errors are measured against."""
    from dsno_cluster.diffusion.accuracy import REFERENCE_STEPS

    settings = config.trajectories
    return count_evaluations(
        "abm3", REFERENCE_STEPS, settings.guidance_scale, settings.time_points, "uniform"
    )


def _call_seconds(teacher: Teacher, noise: Any, labels: Any) -> float:
    """How long the teacher takes for these samples together."""
    import time

    teacher(noise, 0.5, labels).cpu()  # warms up; a GPU is waited for
    began = time.perf_counter()
    teacher(noise, 0.5, labels).cpu()
    return time.perf_counter() - began


def _by_time(config: Config, errors: tuple[float, ...]) -> dict[str, float]:
    return dict(zip(map(str, config.trajectories.time_points), errors, strict=True))


def report(config: Config, plan: Plan | None, found: Found) -> str:
    """The plan as lines for people; `plan` None: there is no teacher yet, so no folder that is named by it."""
    settings, size = config.trajectories, plan.size if plan else size_of(config)
    guided = ", guided" if settings.guidance_scale != 1.0 else ""
    few = (
        count_evaluations("ddim", steps, settings.guidance_scale) for steps in config.evaluation.teacher_steps
    )
    rows = sum(few) + size.evaluations_per_sample
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
    # with no metric of images the teacher's are not drawn
    if set(config.evaluation.metrics) != {"trajectory_error"}:
        lines.append(
            f"evaluation    some {rows * config.evaluation.num_samples:,} more by `eval`, once, for the teacher's own rows "
            "(evaluation.num_samples, teacher_steps, and the solver above)"
        )
    if plan and plan.note:
        lines.insert(1, f"note          {plan.note}")
    if missing := files_not_there(config):
        told = ", ".join(f"{key} {path}" for key, path in missing.items())
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
                "              which is much: raise trajectories.steps, or let --tolerance 1e-2 choose"
            )
    return "\n".join(lines)


def as_json(config: Config, plan: Plan | None, found: Found) -> str:
    """The plan as one JSON object: sizes in bytes, times in seconds and hours."""
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
        "note": plan.note if plan else None,
        "folder": f"{config.storage.root}/{plan.folder}" if plan else None,
        "files_not_there": files_not_there(config),
    }
    return json.dumps(content)


def bytes_text(count: float) -> str:
    """Such as 8.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def teacher_path(config: Config) -> str:
    """The config's teacher; UserError that says how to get one where it names none."""
    if config.teacher.path is None:
        raise NoTeacher(f"teacher.path: none is set; {_HOW}")
    return config.teacher.path


def find_teacher(config: Config) -> TeacherInfo:
    """What is known of the config's teacher without its network.

    Raises UserError that says how to get one where it is not there, and for one whose images, classes or own
    steps are not those of the config, or whose own steps are for another solver.
    """
    path, settings = teacher_path(config), config.trajectories
    try:
        info = teacher_info(path, config.storage.endpoint_url, **config.teacher.options)
    except UserError as error:
        raise NoTeacher(f"teacher.path: {error}; {_HOW}") from None
    check_fits(config.network, info, path)
    try:
        native = own_steps(config, info)
    except ValueError as error:
        raise UserError(f"trajectories.steps: {error}") from None
    if info.distilled and settings.grid != "auto":
        raise UserError(
            f"trajectories.grid: {settings.grid}, but the distilled teacher at {path} knows the levels of its own steps alone; "
            "set trajectories.grid=auto"
        )
    if native is not None:
        if info.distilled and settings.solver != "ddim":
            raise UserError(
                f"trajectories.solver: {settings.solver}, but each of the {info.num_steps} steps of the distilled teacher "
                f"at {path} is one DDIM step; set trajectories.solver=ddim"
            )
        if info.num_steps not in (None, settings.steps):
            raise UserError(
                f"trajectories.steps: {settings.steps}, the teacher at {path} has {info.num_steps} steps of its own"
            )
        try:
            grid_points(settings.time_points, settings.solver, settings.steps, native)
        except ValueError as error:
            raise UserError(f"trajectories.times: {error}, which are the own steps of the teacher") from None
    return info


def own_steps(config: Config, teacher: TeacherInfo | Teacher) -> tuple[float, ...] | None:
    """The teacher's own steps where the config leaves the grid to it and it has some."""
    settings = config.trajectories
    return teacher.native_grid(settings.steps) if settings.grid == "auto" else None


def open_teacher(config: Config) -> Teacher:
    """The config's teacher, on CPU. Raises UserError where it does not fit the config."""
    path = teacher_path(config)
    endpoint, teacher = config.storage.endpoint_url, config.teacher
    loaded = load_teacher(path, endpoint, precision=teacher.precision, **teacher.options)
    # a factory's images, classes and steps are known only now
    check_fits(config.network, loaded, path)
    if loaded.identity["kind"] == "factory" and own_steps(config, loaded) is not None:
        raise UserError(
            f"trajectories.grid: auto, but the teacher at {path} has a native_grid, which no plan can know before it is "
            "made; set trajectories.grid to uniform or fine-end"
        )
    return loaded


def check_planned(config: Config, plan: Plan, teacher: Teacher) -> None:
    """Raises UserError unless `teacher`, as this process loaded it, gives the spec that the plan was made with."""
    spec = trajectory_spec(config, teacher)
    differing = [key for key in spec if spec[key] != plan.spec.get(key)]
    if differing:
        raise UserError(
            f"{teacher_path(config)}: the teacher changed, or differs on this node ({socket.gethostname()}), since the run "
            f"began (other than planned: {', '.join(differing)}); make it the same everywhere and start again"
        )


def grid_name(config: Config) -> str:
    """The config's grid for a teacher without steps of its own."""
    settings = config.trajectories
    return usual_grid(settings.solver) if settings.grid == "auto" else settings.grid


def trajectory_spec(config: Config, teacher: TeacherInfo | Teacher) -> dict[str, Any]:
    """Everything that can change a byte of a shard. Its hash names the folder, so two specs never mix."""
    settings, network = config.trajectories, config.network
    native = own_steps(config, teacher)
    named = {"uniform": "uniform between time points", "fine-end": "fine-end/1"}
    shape = network.image_shape
    return {
        "format_version": FORMAT_VERSION,
        "teacher": teacher.identity,
        "solver": settings.solver,
        "steps": settings.steps,
        "grid": named[grid_name(config)] if native is None else list(native),
        "times": list(settings.time_points),
        "schedule": "cosine",
        "clip_denoised": settings.clip_denoised,
        "guidance_scale": settings.guidance_scale,
        "labels": {"rule": "uniform", "num_classes": network.num_classes},
        "seed": config.seed,
        "shape": list(shape),
        "dtype": settings.dtype,
        "inference_precision": config.teacher.precision,
        "samples_per_shard": settings.samples_per_shard,
        "batch_size": settings.batch_size,
        "threads": settings.threads,
        "noise": {"generator": GENERATOR, "first_sample_sha256": noise_checksum(config.seed, shape)},
    }
