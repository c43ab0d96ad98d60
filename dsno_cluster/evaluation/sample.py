"""sample: draws images from a student into a file and reports the rate; its teacher may refine them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.device import compute_device
from dsno_cluster.diffusion.guidance import Guidance
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.refine import refine, refinement_method
from dsno_cluster.images import grid_png, to_uint8
from dsno_cluster.model_folder import read_config_of, read_meta
from dsno_cluster.storage import write_file
from dsno_cluster.students.dsno import DSNO, load_student
from dsno_cluster.teachers import check_fits, load_teacher


@dataclass(frozen=True)
class Refinement:
    """Refinement by `steps` of the teacher from the state at `time` (default: the one nearest to 0.25).

    `teacher` names another teacher than the student's config.
    """

    steps: int
    time: float | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class Drawing:
    """How images are drawn: the student, how it computes, and whether its teacher refines them.

    `sha256`, if given, is that of the student's weights; `label` is the class of every image, None for random
    classes.
    """

    checkpoint: str
    endpoint_url: str | None = None
    sha256: str | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    refinement: Refinement | None = None
    label: int | None = None


@dataclass(frozen=True)
class OpenDrawing:
    """A loaded student on `device`; `draw` gives images (N, C, H, W) in [-1, 1] from noise and labels there."""

    student: DSNO
    device: torch.device
    draw: Callable[[Tensor, Tensor | None], Tensor]
    label: int | None


def open_drawing(drawing: Drawing) -> OpenDrawing:
    """Load the student.

    Raises UserError if it, the class of the label, or the teacher to refine with does not exist.
    """
    student = load_student(
        drawing.checkpoint,
        drawing.endpoint_url,
        sha256=drawing.sha256,
        precision=drawing.precision,
        compile=drawing.compile,
    )
    if drawing.label is not None and not drawing.label < (classes := student.network.num_classes):
        which = f"classes 0..{classes - 1}" if classes else "no classes"
        raise UserError(f"--label {drawing.label}: the student at {drawing.checkpoint} has {which}")
    device = compute_device()
    student.to(device)
    if drawing.refinement is None:
        return OpenDrawing(student, device, student.sample, drawing.label)
    refined = _refined(student, device, drawing.checkpoint, drawing.endpoint_url, drawing.refinement)
    return OpenDrawing(student, device, refined, drawing.label)


def draw_images(opened: OpenDrawing, seed: int, indices: range) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) of the given samples of `seed`, and their labels (N,) or None, on CPU."""
    network = opened.student.network
    noise = sample_noise(seed, indices, network.state_shape).to(opened.device)
    labels = sample_labels(seed, indices, network.num_classes) if network.num_classes else None
    if opened.label is not None:
        labels = torch.full((len(indices),), opened.label)
    images = opened.draw(noise, labels)
    return images.cpu(), labels


def sample_to_file(drawing: Drawing, out: str, num: int, seed: int, batch_size: int) -> None:
    """Write `num` images to `out`: a grid (.png) or arrays `images` uint8 (N, C, H, W) and `labels` (.npz).

    Image i depends only on (seed, i). Raises UserError if there is no student, or no teacher to refine with,
    and WorkError if the file cannot be written.
    """
    opened = open_drawing(drawing)
    if read_meta(drawing.checkpoint, drawing.endpoint_url).seed == seed:
        console.say(
            f"--seed {seed} is the one of its training: these noises, or some of them, are those that it was trained on"
        )
    parts, seconds = [], []
    for start in range(0, num, batch_size):
        began = time.perf_counter()
        parts.append(draw_images(opened, seed, range(start, min(start + batch_size, num))))
        seconds.append(time.perf_counter() - began)
    images = torch.cat([part[0] for part in parts])
    labels = None if parts[0][1] is None else torch.cat([part[1] for part in parts if part[1] is not None])
    if out.endswith(".npz"):
        import io

        buffer = io.BytesIO()
        pixels = to_uint8(images).numpy()
        if labels is None:
            np.savez(buffer, images=pixels)
        else:
            np.savez(buffer, images=pixels, labels=labels.numpy())
        data = buffer.getvalue()
    else:
        data = grid_png(images, columns=max(1, round(num**0.5)))
    write_file(out, data, drawing.endpoint_url)
    # the first batch warms up, so its time says nothing about the rate
    later = sum(len(part[0]) for part in parts[1:])
    rate = (
        f", {later / sum(seconds[1:]):.0f} images/s after the first batch" if later else ", warm-up included"
    )
    console.say(f"{num} images in {sum(seconds):.2f} s{rate}: {out}")


def _refined(
    student: DSNO, device: torch.device, checkpoint: str, endpoint_url: str | None, refinement: Refinement
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """A function that draws images refined by the teacher.

    Raises UserError if no teacher, or none that fits, is named.
    """
    config: dict[str, Any] = read_config_of(checkpoint, endpoint_url)
    teacher_config, settings = config.get("teacher") or {}, config.get("trajectories") or {}
    path = refinement.teacher or teacher_config.get("path")
    if path is None:
        raise UserError(f"--refine: {checkpoint} names no teacher; name one with --teacher PATH")
    own = {} if refinement.teacher else teacher_config
    try:
        teacher = load_teacher(path, endpoint_url, options=own.get("options") or {})
        if guide := own.get("guide"):
            teacher = teacher.guided_by(load_teacher(guide, endpoint_url, options=own.get("guide_options")))
        teacher.to(device)
    except UserError as error:
        raise UserError(f"--refine: {error}; name one with --teacher PATH") from None
    check_fits(student.network, teacher.info, path)
    start = refinement.time
    if start is None:
        between = [t for t in student.times if t > 0.0]
        if not between:
            raise UserError(f"--refine: {checkpoint} has only t=0, where nothing is left to refine")
        start = min(between, key=lambda t: abs(t - 0.25))
    interval = settings.get("guidance_interval")
    guidance = Guidance(
        settings.get("guidance_scale", 1.0),
        tuple(interval) if interval else None,
        settings.get("guidance_channels"),
    )
    clip = settings.get("clip_denoised", False)
    evaluations = 1 + refinement_method(start, refinement.steps, guidance).evaluations()
    console.say(
        f"the student's states at t = {start:.4g}, then {refinement.steps} step(s) of {path}: "
        f"{evaluations} network evaluations an image"
    )

    def draw(noise: Tensor, labels: Tensor | None) -> Tensor:
        try:
            return refine(student, teacher, noise, labels, start, refinement.steps, guidance, clip)
        except ValueError as error:
            raise UserError(f"--refine-from {start}: {error}") from None

    return draw
