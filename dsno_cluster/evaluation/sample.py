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
from dsno_cluster.students.dsno import DSNO, load_student, student_model
from dsno_cluster.teachers import DecoderIdentity, LoadedDecoder, States, check_fits, load_teacher
from dsno_cluster.teachers.decoders import find_states


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
    classes. `states` is what the student gives, found if it is None (`states_of_student`); with `raw`, states are drawn and
    not decoded.
    """

    checkpoint: str
    endpoint_url: str | None = None
    sha256: str | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    refinement: Refinement | None = None
    label: int | None = None
    states: States | None = None
    raw: bool = False

    def decoder(self) -> DecoderIdentity | None:
        """That of the decoder of its images; None if they are its states."""
        return None if self.raw or self.states is None else self.states.identity(self.precision)


@dataclass(frozen=True)
class OpenDrawing:
    """A loaded student on `device`; `draw` gives states (N, C, H, W) from noise and labels there, which `decode` makes images.

    Images are in [-1, 1] up to overshoot.
    """

    student: DSNO
    device: torch.device
    draw: Callable[[Tensor, Tensor | None], Tensor]
    label: int | None
    decode: LoadedDecoder | None = None


def states_of_student(drawing: Drawing, decoder: str | None = None) -> States:
    """What a student gives: by the folder of a `decoder`, or by its config, which names the decoder or a teacher with one.

    Raises UserError if the student or the decoder does not exist.
    """
    at, endpoint_url = drawing.checkpoint, drawing.endpoint_url
    model = student_model(read_meta(at, endpoint_url), at)
    config: dict[str, Any] = read_config_of(at, endpoint_url)
    teacher = config.get("teacher") or {}
    named, path = decoder or teacher.get("decoder"), teacher.get("path")
    key = "--decoder" if decoder else "teacher.decoder"
    return find_states(model.network.state_shape, named, path, endpoint_url, key)


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
    states, decode = drawing.states, None
    if not drawing.raw:
        states = states or states_of_student(drawing)
        states.check_decoded(drawing.checkpoint, "take --states", "--decoder")
        decode = states.decoder.load(device, drawing.precision) if states.decoder else None
    draw: Callable[[Tensor, Tensor | None], Tensor] = student.sample
    if drawing.refinement is not None:
        draw = _refined(student, device, drawing.checkpoint, drawing.endpoint_url, drawing.refinement)
    return OpenDrawing(student, device, draw, drawing.label, decode)


def draw_images(opened: OpenDrawing, seed: int, indices: range) -> tuple[Tensor, Tensor | None]:
    """Images (N, C, H, W) of the given samples of `seed`, or raw states, and their labels (N,) or None, on CPU."""
    network = opened.student.network
    noise = sample_noise(seed, indices, network.state_shape).to(opened.device)
    labels = sample_labels(seed, indices, network.num_classes) if network.num_classes else None
    if opened.label is not None:
        labels = torch.full((len(indices),), opened.label)
    states = opened.draw(noise, labels)
    parts = [states] if opened.decode is None else opened.decode.parts(states)
    return torch.cat([part.cpu() for part in parts]), labels


def sample_to_file(drawing: Drawing, out: str, num: int, seed: int, batch_size: int) -> None:
    """Write `num` images to `out`: a grid (.png) or arrays `images` uint8 (N, C, H, W) and `labels` (.npz).

    Raw ones are `states` float32 (N, C, H, W). Image i depends only on (seed, i). Raises UserError if there is no student,
    no decoder, or no teacher to refine with, and WorkError if the file cannot be written.
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
        arrays: dict[str, Any] = {"states": images} if drawing.raw else {"images": to_uint8(images)}
        arrays |= {} if labels is None else {"labels": labels}
        np.savez(buffer, **{name: array.numpy() for name, array in arrays.items()})
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
