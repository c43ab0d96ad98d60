"""Pictures and the table: what a person looks at after an evaluation."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.diffusion.noise import sample_noise
from dsno_cluster.diffusion.solvers import count_evaluations, solve
from dsno_cluster.images import GAP, PAPER, pixel_scale, png_bytes, tile_of
from dsno_cluster.models.dsno import DSNO
from dsno_cluster.trajectories.plan import grid_name, open_teacher, own_steps

_INK, _MUTED = (28, 30, 34), (110, 114, 122)
_TEACHER, _STUDENT = (38, 90, 160), (186, 84, 20)


def table_rows(metrics: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: the same figures as metrics.json, for people."""
    header = ["samples", "NFE", "cost", "Frechet distance", "right class"]
    rows = []
    held_out = metrics["real_held_out"]
    if held_out:
        rows.append([f"real, {held_out['num_samples']} held out", "", "", *_figures(held_out)])
    for row in metrics["teacher_rows"]:
        rows.append([row["source"], str(row["evaluations"]), str(row["evaluations"]), *_figures(row)])
    student = metrics["student"]
    rows.append(["student", "1", f"{student['cost_in_teacher_evaluations']:.1f}", *_figures(student)])
    return header, rows


def _figures(row: dict[str, Any]) -> list[str]:
    distance = f"{row['fid']:.2f}" if "fid" in row else ""
    return [distance, f"{row['agreement']:.3f}" if "agreement" in row else ""]


def error_lines(metrics: dict[str, Any]) -> list[str]:
    """Relative error of the student against the teacher's own trajectory, a line per time point."""
    errors = metrics["student"].get("trajectory_error", {})
    return [f"t = {float(t):.4g}: {error:.3f}" for t, error in errors.items()]


def pictures(config: Config, student: DSNO, metrics: dict[str, Any]) -> dict[str, bytes]:
    """samples.png and trajectory.png, as PNG bytes: teacher over student from the same noise."""
    classes = min(student.network.num_classes, 10) or 4
    columns = config.evaluation.picture_columns
    teacher = open_teacher(config)
    noise = sample_noise(config.evaluation.seed, range(classes * columns), teacher.shape)
    labels = torch.arange(classes).repeat_interleave(columns) if student.network.num_classes else None
    settings = config.trajectories
    times = settings.time_points
    args = (times, settings.solver, settings.steps, labels, settings.guidance_scale, settings.clip_denoised)
    theirs = solve(teacher, noise, *args, settings.grid)
    ours = student.trajectory(noise, labels, times)

    def rows(states: Tensor) -> Tensor:
        return states.reshape(classes, columns, *states.shape[1:])

    names = [f"{i}" for i in range(classes)]
    grid = own_steps(config, teacher) or grid_name(config)
    many = count_evaluations(settings.solver, settings.steps, settings.guidance_scale, times, grid)
    samples = _samples_picture(rows(theirs[:, -1]), rows(ours[:, -1]), names, many, metrics)
    # one noise: the first of a class that shows strokes well enough in every data set
    pick = columns * min(3, classes - 1)
    trajectory = _trajectory_picture(noise[pick], theirs[pick], ours[pick], times)
    return {"samples.png": samples, "trajectory.png": trajectory}


def _samples_picture(
    theirs: Tensor, ours: Tensor, names: list[str], teacher_evaluations: int, metrics: dict[str, Any]
) -> bytes:
    """A pair of rows a class, teacher over student, (R, K, C, H, W) each; the table stands beside them."""
    row_count, columns = theirs.shape[:2]
    scale = pixel_scale(theirs)
    tile = theirs.shape[-1] * scale
    font, small, bold = _font(15), _font(13), _font(19)
    left, top, pair = 96, 84, 2 * tile + 3 * GAP + 8
    grid_width = columns * (tile + GAP)
    header, table = table_rows(metrics)
    lines = error_lines(metrics)
    column_widths = [max(_width(font, row[i]) for row in [header, *table]) + 22 for i in range(len(header))]
    sheet = Image.new(
        "RGB", (left + grid_width + 40 + sum(column_widths) + 10, top + row_count * pair + 12), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((16, 12), "Same noise, teacher over student", fill=_INK, font=bold)
    draw.text(
        (16, 40), f"teacher: {teacher_evaluations} network evaluations an image", fill=_TEACHER, font=small
    )
    draw.text((16, 58), "student: one", fill=_STUDENT, font=small)
    for r in range(row_count):
        y = top + r * pair
        draw.text((16, y + tile - 8), names[r], fill=_INK, font=bold)
        for images, dy, colour, word in (
            (theirs, 0, _TEACHER, "teacher"),
            (ours, tile + GAP, _STUDENT, "student"),
        ):
            draw.text((34, y + dy + tile // 2 - 8), word, fill=colour, font=small)
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
        if n in (0, len(table) - 1):
            draw.line((x0, y - 5, x0 + sum(column_widths) - 22, y - 5), fill=_MUTED)
    extractor, count = metrics["feature_extractor"]["name"], metrics["num_samples"]
    notes = [f"{count} samples against {metrics['reference']['count'] or 'the'} real images, {extractor}."]
    notes += [
        "NFE: network evaluations an image. Cost: the same in evaluations of the teacher,",
        "measured: a published-form student answers all its time points at once.",
        f"One-step samples: {metrics['student']['images_per_second']:.0f} images/s on one actor.",
    ]
    if lines:
        notes += [
            "",
            "Relative error of the student against the teacher's trajectory,",
            "on noise held out from training:",
            *lines,
        ]
    for line in notes:
        y += 20
        draw.text((x0, y), line, fill=_MUTED, font=small)
    return png_bytes(sheet)


def _trajectory_picture(noise: Tensor, theirs: Tensor, ours: Tensor, times: tuple[float, ...]) -> bytes:
    """One sample through time, from noise at t=1 to the image: teacher over student."""
    scale = 2 * pixel_scale(noise[None])
    tile, small = noise.shape[-1] * scale, _font(14)
    left, top = 84, 34
    sheet = Image.new(
        "RGB", (left + (len(times) + 1) * (tile + GAP) + 12, top + 2 * (tile + GAP) + 10), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for k, t in enumerate((1.0, *times)):
        draw.text((left + k * (tile + GAP), 10), f"t = {t:.4g}", fill=_MUTED, font=small)
    for r, (states, colour, word) in enumerate(((theirs, _TEACHER, "teacher"), (ours, _STUDENT, "student"))):
        y = top + r * (tile + GAP)
        draw.text((16, y + tile // 2 - 8), word, fill=colour, font=small)
        for k, image in enumerate((noise / 2, *states)):  # noise at half contrast, to lie within the range
            sheet.paste(tile_of(image, scale), (left + k * (tile + GAP), y))
    return png_bytes(sheet)


def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _width(font: Any, text: str) -> int:
    return int(font.getlength(text))
