"""What `inspect-teacher` says of a teacher, and the sections of a config that use it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsno_cluster.config import Network
from dsno_cluster.config.networks import UNET_SIZES
from dsno_cluster.diffusion.schedule import noise_level, time_of_angle, time_points
from dsno_cluster.errors import UserError
from dsno_cluster.teachers.facts import Facts
from dsno_cluster.teachers.identity import weights_sha256
from dsno_cluster.teachers.licences import LicenceNote, licence_notes
from dsno_cluster.teachers.loading import open_teacher
from dsno_cluster.teachers.teacher import Options, Source, TeacherInfo, is_distilled, plain
from dsno_cluster.yaml_text import dump_yaml

Sections = dict[str, dict[str, Any]]

POINTS = 4  # time points of a proposal
NUM_SAMPLES, PER_SHARD = 100_000, 500
LARGE_STATE = 3 * 32 * 32  # numbers of a state above which a proposal's batches are small
LEVELS = 4  # most levels of a proposed U-Net


@dataclass(frozen=True)
class OwnSteps:
    """The authors' own steps: the solver that takes them here, their usual number, the sigmas they go through at the ends."""

    solver: str
    steps: int
    sigmas: tuple[float, float | None]


@dataclass(frozen=True)
class FoundDecoder:
    """What turns the teacher's states into images: its folder, and (C, H, W) of an image."""

    folder: str
    image_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Inspected:
    """A teacher as `inspect-teacher` found it.

    `shape` is (C, H, W). `sigmas` and `times` are the ends of the noise levels it was trained on, the cleanest first; None:
    pure noise, or not known. `sections` are those of a config that uses it.
    """

    path: str
    kind: str
    network: str
    parameters: int | None
    shape: tuple[int, int, int]
    num_classes: int
    null_class: int | None
    prediction: str
    schedule: str
    sigmas: tuple[float | None, float | None] | None
    times: tuple[float, float] | None
    own_steps: OwnSteps | None
    sha256: str | None
    clips: bool
    latent: bool
    decoder: FoundDecoder | None
    notes: tuple[str, ...]
    licences: tuple[LicenceNote, ...]
    sections: Sections


def inspect_teacher(path: str, options: Options, endpoint_url: str | None = None) -> Inspected:
    """What the teacher's files say, and sections of a config to paste. Only a Python function is loaded for that.

    Raises UserError if it is no teacher, or an option is missing or wrong.
    """
    opened = open_teacher(path, endpoint_url, options)
    info, facts = opened.info(), opened.facts()
    if info.shape is None and info.num_classes is None:  # a function says them only once it is called
        info = opened.load("float32").info
    if info.shape is None or info.num_classes is None:
        raise UserError(
            f"{path}: its file does not say the size of its images; give it: `dsno-cluster inspect-teacher {path} image_size=64`"
        )
    low, high = facts.sigmas or (math.nan, math.nan)
    return Inspected(
        path=path,
        kind=opened.kind,
        network=facts.network,
        parameters=facts.parameters,
        shape=info.shape,
        num_classes=info.num_classes,
        null_class=info.null_class,
        prediction=facts.prediction,
        schedule=facts.schedule,
        sigmas=facts.sigmas and (_finite(low), _finite(high)),
        times=facts.sigmas and (time_of_angle(math.atan(low)), time_of_angle(math.atan(high))),
        own_steps=_own_steps(facts),
        sha256=weights_sha256(info.identity),
        clips=info.clips,
        latent=info.latent,
        decoder=None
        if info.decoder is None
        else FoundDecoder(info.decoder.folder, info.decoder.image_shape(info.shape)),
        notes=info.notes,
        licences=licence_notes(Source(path, endpoint_url)),
        sections=_sections(path, options, info, facts),
    )


def _finite(sigma: float) -> float | None:
    return sigma if math.isfinite(sigma) else None


def _own_steps(facts: Facts) -> OwnSteps | None:
    if facts.native is None:
        return None
    grid = facts.native(facts.steps)
    first = noise_level(grid[0])
    return OwnSteps(facts.solver, facts.steps, (noise_level(grid[-2]), first if grid[0] < 1.0 else None))


# ---- sections of a config ------------------------------------------------------------------------------------


def _sections(path: str, options: Options, info: TeacherInfo, facts: Facts) -> Sections:
    assert info.shape is not None
    trajectories = _trajectories(info, facts)
    points = trajectories["times"]
    count = points["points"] if isinstance(points, dict) else len(points)
    channels, height, width = info.shape
    network: dict[str, Any] = {
        "state_size": height if height == width else [height, width],
        "state_channels": channels,
        "num_classes": info.num_classes,
        "null_class": info.null_class is not None,
    }
    sizes, student = _student(info, count)
    teacher: dict[str, Any] = {"path": path} | ({"options": plain(dict(options))} if options else {})
    return {
        "network": network | sizes,
        "teacher": teacher,
        "trajectories": trajectories,
        "student": student,
    }


def _trajectories(info: TeacherInfo, facts: Facts) -> dict[str, Any]:
    """On the teacher's own steps if the options ask for them, or it knows no others; else on a solver of ours."""
    assert info.shape is not None
    batch = 64 if math.prod(info.shape) > LARGE_STATE else 250
    sizes = {"num_samples": NUM_SAMPLES, "samples_per_shard": PER_SHARD, "batch_size": batch}
    if info.native is None:
        return sizes | {
            "solver": "abm3",
            "steps": 64,
            "times": {"spacing": "quadratic", "points": POINTS},
        }
    steps = info.num_steps or facts.steps
    grid = info.native(steps)
    solver = "ddim" if is_distilled(info.num_steps) else facts.solver
    return sizes | {"solver": solver, "steps": steps, "times": _times_on(grid)}


def _times_on(grid: Sequence[float]) -> list[float]:
    """The times of a grid that are nearest to those of a proposal on any grid, descending to 0."""
    nearest = {min(grid[1:], key=lambda t: abs(t - wanted)) for wanted in time_points("quadratic", POINTS)}
    return sorted((round(t, 9) for t in nearest), reverse=True)


def _student(info: TeacherInfo, points: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sizes of the student's U-Net, as keys of `network`, and the section `student`."""
    assert info.shape is not None
    form = {"operator": "series", "modes": points, "prediction": "data"}
    own = getattr(info.identity, "network", None)
    if isinstance(own, Network):
        kept = own.model_dump(
            mode="json", include={*UNET_SIZES, "attention_resolutions", "heads", "head_dim"}
        )
        return {key: value for key, value in kept.items() if value is not None}, {"backbone": "unet", **form}
    if info.backbone is not None:
        return {}, {"backbone": "teacher", **form}
    return proposed_unet(*info.shape[1:]), {"backbone": "unet", **form, "warm_start": False}


def proposed_unet(height: int, width: int) -> dict[str, Any]:
    """Sizes of a U-Net for states of that height and width, as keys of `network`: a place to start from."""
    heights, narrow = [height], min(height, width)
    while len(heights) < LEVELS and narrow >= 8 and not (height % 2 or width % 2):
        height, width, narrow = height // 2, width // 2, narrow // 2
        heights.append(height)
    large = heights[0] >= 64
    channels = 192 if large else 128 if heights[0] >= 32 else 64
    return {
        "width": channels,
        "multipliers": [1, 2, 3, 4][: len(heights)] if large else [1, 2, 2, 2][: len(heights)],
        "blocks_per_level": 3 if large else 2,
        "attention_resolutions": [h for h in heights if 8 <= h <= 16],
        "head_dim": 64,
        "embedding_dim": 4 * channels,
    }


# ---- for people ----------------------------------------------------------------------------------------------


def report(found: Inspected) -> str:
    """What was found as lines, an empty one, and the sections as YAML."""
    channels, height, width = found.shape
    lines = [
        ("teacher", f"{found.path} ({found.kind})"),
        (
            "network",
            found.network + ("" if found.parameters is None else f", {_count(found.parameters)} parameters"),
        ),
        ("states", f"{channels} channels of {height}x{width}"),
        ("decoder", _decoder(found)),
        ("classes", _classes(found)),
        ("prediction", found.prediction),
        ("noise", _noise(found)),
        ("own steps", _own_steps_text(found)),
        *(
            [("clipping", "the authors' sampler bounds the image: trajectories.clip_denoised=true")]
            if found.clips
            else []
        ),
        *([("sha256", found.sha256)] if found.sha256 else []),
        *(("note", note) for note in found.notes),
        *(("licence", f"{note.file}: {note.text}") for note in found.licences),
    ]
    return "\n".join([*(f"{name:<13}{text}" for name, text in lines), "", yaml_of(found.sections)])


def yaml_of(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """Sections of a config as YAML, a key a line."""
    return "\n".join(
        f"{name}:\n" + "\n".join(f"  {key}: {_inline(value)}" for key, value in section.items())
        for name, section in sections.items()
    )


def as_json(found: Inspected) -> str:
    return json.dumps(asdict(found))


def _inline(value: Any) -> str:
    """A value of YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_inline(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return dump_yaml([value]).removeprefix("- ").strip()


def _count(number: int) -> str:
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.3g} {word}"
    return f"{number:,}"


def _classes(found: Inspected) -> str:
    if not found.num_classes:
        return "none"
    null = f', and class {found.null_class}, which means "none"' if found.null_class is not None else ""
    return f"{found.num_classes}{null}"


def _decoder(found: Inspected) -> str:
    if found.decoder is not None:
        channels, height, width = found.decoder.image_shape
        return f"{found.decoder.folder}, for images of {height}x{width} in {channels} channels"
    if found.latent:
        return "not here, though the states are latents: name an AutoencoderKL's folder as teacher.decoder"
    return "none: the states are images"


def _noise(found: Inspected) -> str:
    if found.sigmas is None or found.times is None:
        return found.schedule
    low, high = ("pure noise" if sigma is None else f"{sigma:.4g}" for sigma in found.sigmas)
    return f"{found.schedule}; sigma {low} to {high}, which is t {found.times[0]:.4g} to {found.times[1]:.4g}"


def _own_steps_text(found: Inspected) -> str:
    own = found.own_steps
    if own is None:
        return "none that its files name"
    low, high = own.sigmas
    first = "pure noise" if high is None else f"sigma {high:.4g}"
    option = "" if found.sections["trajectories"]["solver"] == own.solver else " (option schedule=native)"
    return (
        f"solver {own.solver}, {own.steps} as a rule, from {first} to sigma {low:.4g}, then the image{option}"
    )
