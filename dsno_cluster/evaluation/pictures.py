"""Pictures of an evaluation: two with captions, and three plain ones from which the report is composed.

`layout` describes what is where in the plain ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.diffusion.noise import sample_noise
from dsno_cluster.diffusion.solvers import solve_with
from dsno_cluster.evaluation.records import Layout, Metrics
from dsno_cluster.evaluation.table import (
    all_rows,
    conditions,
    error_lines,
    figures_of,
    spread_notes,
    student_rows,
    table_rows,
)
from dsno_cluster.images import GAP, PAPER, pixel_scale, png_bytes, tile_of
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.teachers import LoadedDecoder, States, Teacher
from dsno_cluster.trajectories.spec import TrajectorySpec

_INK, _MUTED = (28, 30, 34), (110, 114, 122)
_TEACHER, _STUDENT = (38, 90, 160), (186, 84, 20)
NAMES = ("samples.png", "trajectory.png", "teacher.png", "student.png", "strips.png")
STRIPS = 4  # samples that are shown through time


def layout(config: Config, states: States | None = None) -> Layout:
    """The layout of a config's plain pictures of such `states`, by default images."""
    network = config.network
    states = states or States(network.state_shape)
    classes = min(network.num_classes, 10)
    channels, height, width = states.image_shape
    rows, gap = classes or 4, max(1, height // 16)
    count = min(STRIPS, rows)
    return Layout(
        rows=rows,
        columns=config.evaluation.picture_columns,
        classes=classes,
        tile=width,
        tile_height=None if height == width else height,
        gap=gap,
        pair_gap=3 * gap,
        strips=tuple(sorted({round(i * (rows - 1) / max(1, count - 1)) for i in range(count)})),
        times=(1.0, *config.trajectories.time_points),
        states="decoded" if states.decoder else "latents" if states.undecoded else "images",
        channels=channels if states.undecoded else None,
    )


@dataclass(frozen=True)
class Pictured:
    """What pictures show of states, (..., C, H, W) on CPU: the images of both from the same noise in the rows of `layout`,
    (N, ...), and of the samples `through_time` the noise (S, ...) and both at each time point (S, M, ...).

    `features` (K, D), if the metric `nearest` is measured: of the student's images of `nearest_picture.shown_samples`.
    """

    theirs: Tensor
    ours: Tensor
    through_time: tuple[int, ...]
    noise: Tensor
    their_states: Tensor
    our_states: Tensor
    teacher_evaluations: int  # network evaluations for an image of the teacher's
    features: np.ndarray | None = None


def solve_pictured(
    config: Config,
    spec: TrajectorySpec,
    student: DSNO,
    teacher: Teacher,
    decoder: LoadedDecoder | None = None,
) -> Pictured:
    """The teacher's and the student's states from the pictured noise, computed on their device, and decoded if they are latents.

    The noise is decoded as every state is, or else shown at half contrast, to lie within the range of images.
    """
    plain, device = layout(config), next(student.parameters()).device
    classes, columns = plain.rows, plain.columns
    noise = sample_noise(config.evaluation.seed, range(classes * columns), teacher.shape).to(device)
    labels = torch.arange(classes).repeat_interleave(columns) if student.network.num_classes else None
    theirs = solve_with(spec.method, teacher, noise, spec.times, labels)
    ours = student.trajectory(noise, labels, spec.times)
    picked = list(_through_time(plain))

    def shown(states: Tensor) -> Tensor:
        if decoder is None:
            return states.cpu()
        images = torch.cat([part.cpu() for part in decoder.parts(states.flatten(0, -4))])
        return images.reshape(*states.shape[:-3], *images.shape[1:])

    return Pictured(
        shown(theirs[:, -1]),
        shown(ours[:, -1]),
        tuple(picked),
        shown(noise[picked] if decoder else noise[picked] / 2),
        shown(theirs[picked]),
        shown(ours[picked]),
        spec.method.evaluations(spec.times),
    )


def _of_trajectory(plain: Layout) -> int:
    """The sample in trajectory.png: the first of a class of digits whose strokes are clear."""
    return plain.columns * min(3, plain.rows - 1)


def _through_time(plain: Layout) -> tuple[int, ...]:
    """The samples whose states are shown at every time point."""
    return tuple(sorted({_of_trajectory(plain), *(plain.columns * row for row in plain.strips)}))


def _caption(plain: Layout) -> str | None:
    """What is shown of the states, if these are no images."""
    if plain.states == "decoded":
        return "States are latents; each is decoded, the noise too."
    if plain.states == "latents":
        return f"States are latents of {plain.channels} channels, not decoded: the first three as colours."
    return None


def pictures(
    config: Config, pictured: Pictured, metrics: Metrics, states: States | None = None
) -> dict[str, bytes]:
    """The pictures of `states` as PNG bytes by name (`NAMES`), all from the same noise.

    samples.png and trajectory.png show teacher over student with captions; teacher.png, student.png and
    strips.png follow `layout`.
    """
    plain = layout(config, states)
    classes, columns = plain.rows, plain.columns

    def rows(images: Tensor) -> Tensor:
        return images.reshape(classes, columns, *images.shape[1:])

    names = [f"{i}" if plain.classes else "" for i in range(classes)]
    last = rows(pictured.theirs), rows(pictured.ours)
    caption = _caption(plain)
    samples = _samples_picture(*last, names, pictured.teacher_evaluations, metrics, caption)
    both = [
        torch.cat([pictured.noise[:, None], states], dim=1)
        for states in (pictured.their_states, pictured.our_states)
    ]
    one = pictured.through_time.index(_of_trajectory(plain))
    trajectory = _trajectory_picture(both[0][one], both[1][one], plain.times, caption)
    picked = [pictured.through_time.index(columns * row) for row in plain.strips]
    pairs = [states[picked] for states in both]
    teacher, student = (_plain_grid(images, plain.gap) for images in last)
    strips = _plain_grid(torch.stack(pairs, 1).flatten(0, 1), plain.gap, plain.pair_gap)
    return dict(zip(NAMES, (samples, trajectory, teacher, student, strips), strict=True))


def _plain_grid(images: Tensor, gap: int, pair_gap: int = 0) -> bytes:
    """Images (R, K, C, H, W), not enlarged, on a transparent sheet.

    `pair_gap` more after every second row.
    """
    rows, columns = images.shape[:2]
    height, width = images.shape[-2] + gap, images.shape[-1] + gap
    size = (columns * width + gap, rows * height + (rows - 1) // 2 * pair_gap + gap)
    sheet = Image.new("RGBA", size, (0, 0, 0, 0))
    for r in range(rows):
        for k in range(columns):
            sheet.paste(tile_of(images[r, k], 1), (gap + k * width, gap + r * height + r // 2 * pair_gap))
    return png_bytes(sheet)


def _samples_picture(
    theirs: Tensor,
    ours: Tensor,
    names: list[str],
    teacher_evaluations: int,
    metrics: Metrics,
    caption: str | None,
) -> bytes:
    """A pair of rows per class, teacher over student, (R, K, C, H, W) each, with the table beside them."""
    row_count, columns = theirs.shape[:2]
    scale = pixel_scale(theirs)
    height, tile = (side * scale for side in theirs.shape[-2:])
    font, small, bold = _font(15), _font(13), _font(19)
    left, top, pair = 96, 84, 2 * height + 3 * GAP + 8
    grid_width = columns * (tile + GAP)
    header, table = table_rows(metrics)
    lines = error_lines(metrics)
    column_widths = [max(_width(font, row[i]) for row in [header, *table]) + 22 for i in range(len(header))]
    count, by = metrics.num_samples, conditions(metrics)
    notes = [
        *(
            [f"{count} samples against {metrics.reference.count or 'the'} real images, {by}."]
            if figures_of(metrics)
            else []
        ),
        "NFE: network evaluations an image. Cost: the same in evaluations of the teacher,",
        "measured: a published-form student answers all its time points at once.",
        *spread_notes(figures_of(metrics), all_rows(metrics)),
        *([] if caption is None else [caption]),
    ]
    if metrics.student.images_per_second is not None:
        notes.append(f"One-step samples: {metrics.student.images_per_second:.0f} images/s on one actor.")
    if lines:
        notes += [
            "",
            "Relative error of the student against the teacher's trajectory,",
            "on noise held out from training" + (", before -> after finishing:" if metrics.before else ":"),
            *lines,
        ]
    beside = max(sum(column_widths) + 10, *(_width(small, line) + 16 for line in notes))
    below = top + 27 * (len(table) + 1) + 20 * (len(notes) + 1)
    size = (left + grid_width + 40 + beside, max(top + row_count * pair + 12, below))
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((16, 12), "Same noise, teacher over student", fill=_INK, font=bold)
    draw.text(
        (16, 40), f"teacher: {teacher_evaluations} network evaluations an image", fill=_TEACHER, font=small
    )
    draw.text((16, 58), "student: one", fill=_STUDENT, font=small)
    for r in range(row_count):
        y = top + r * pair
        draw.text((16, y + height - 8), names[r], fill=_INK, font=bold)
        for images, dy, colour, word in (
            (theirs, 0, _TEACHER, "teacher"),
            (ours, height + GAP, _STUDENT, "student"),
        ):
            draw.text((34, y + dy + height // 2 - 8), word, fill=colour, font=small)
            for k in range(columns):
                sheet.paste(tile_of(images[r, k], scale), (left + k * (tile + GAP), y + dy))

    x0, y = left + grid_width + 40, top
    for n, row in enumerate([header, *table]):
        x = x0
        ink = _MUTED if n == 0 else _STUDENT if n == len(table) else _INK
        for text, width in zip(row, column_widths, strict=True):
            draw.text((x, y), text, fill=ink, font=font)
            x += width
        y += 27
        if n in (0, len(table) - len(student_rows(metrics))):
            draw.line((x0, y - 5, x0 + sum(column_widths) - 22, y - 5), fill=_MUTED)
    for line in notes:
        y += 20
        draw.text((x0, y), line, fill=_MUTED, font=small)
    return png_bytes(sheet)


def _trajectory_picture(theirs: Tensor, ours: Tensor, times: tuple[float, ...], caption: str | None) -> bytes:
    """One sample through time, from noise at t=1 to the image, (M, C, H, W): teacher over student."""
    scale = 2 * pixel_scale(theirs)
    height, tile = (side * scale for side in theirs.shape[-2:])
    small = _font(14)
    left, top = 84, 34
    bottom = top + 2 * (height + GAP) + 10
    width = max(left + len(times) * (tile + GAP) + 12, 16 + _width(small, caption or "") + 16)
    sheet = Image.new("RGB", (width, bottom + (24 if caption else 0)), PAPER)
    draw = ImageDraw.Draw(sheet)
    if caption:
        draw.text((16, bottom), caption, fill=_MUTED, font=small)
    for k, t in enumerate(times):
        draw.text((left + k * (tile + GAP), 10), f"t = {t:.4g}", fill=_MUTED, font=small)
    for r, (states, colour, word) in enumerate(((theirs, _TEACHER, "teacher"), (ours, _STUDENT, "student"))):
        y = top + r * (height + GAP)
        draw.text((16, y + height // 2 - 8), word, fill=colour, font=small)
        for k, image in enumerate(states):
            sheet.paste(tile_of(image, scale), (left + k * (tile + GAP), y))
    return png_bytes(sheet)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _width(font: Any, text: str) -> int:
    return int(font.getlength(text))
