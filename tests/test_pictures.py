"""The plain pictures of an evaluation are as their layout says: the report lays its labels by it."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from report_runs import metrics

from dsno_cluster.config import load_config
from dsno_cluster.diffusion.noise import sample_noise
from dsno_cluster.diffusion.solvers import solve
from dsno_cluster.evaluation.pictures import layout, pictures, solve_pictured
from dsno_cluster.evaluation.records import Metrics
from dsno_cluster.images import tile_of, to_uint8
from dsno_cluster.teachers import find_teacher
from dsno_cluster.training.loop import new_student
from dsno_cluster.trajectories.spec import spec_of


def test_images_of_any_channels_have_a_tile() -> None:
    for channels, grey in [(1, True), (2, True), (3, False), (4, False)]:
        picture = np.asarray(tile_of(torch.linspace(-1, 1, channels)[:, None, None].expand(-1, 4, 4), 2))
        assert picture.shape == (8, 8, 3)
        assert (len(np.unique(picture)) == 1) == grey


def test_each_tile_lies_where_the_layout_says() -> None:
    overrides = ["evaluation.picture_columns=3", "trajectories.steps=6"]
    config = load_config("configs/digits.yaml", overrides)
    student, teacher = new_student(config).eval(), find_teacher(config)
    with torch.no_grad():
        pictured = solve_pictured(config, spec_of(config, teacher), student, teacher.load())
    drawn = pictures(config, pictured, Metrics.model_validate(metrics()))
    plain = layout(config)
    sheets = {name: np.array(Image.open(io.BytesIO(data))) for name, data in drawn.items()}
    noise = sample_noise(config.evaluation.seed, range(30), (1, 8, 8))
    labels = torch.arange(10).repeat_interleave(3)
    times = config.trajectories.time_points
    theirs = solve(teacher.load(), noise, times, "dpmpp-2m", 6, labels)
    with torch.no_grad():
        ours = student.trajectory(noise, labels, times)

    def tile(name: str, x: int, y: int) -> np.ndarray:
        size = plain.tile
        return sheets[name][y : y + size, x : x + size, 0]

    def pixels(image: torch.Tensor) -> np.ndarray:
        return to_uint8(image)[0].numpy()

    gap, step = plain.gap, plain.tile + plain.gap
    assert (plain.rows, plain.columns, plain.strips) == (10, 3, (0, 3, 6, 9))
    for row, column in ((0, 0), (4, 2), (9, 1)):
        place = (gap + column * step, gap + row * step)
        index = row * 3 + column
        assert (tile("teacher.png", *place) == pixels(theirs[index, -1])).all()
        assert (tile("student.png", *place) == pixels(ours[index, -1])).all()
    for pair, row in enumerate(plain.strips):
        for which, states in enumerate((theirs, ours)):
            y = gap + (2 * pair + which) * step + pair * plain.pair_gap
            assert (tile("strips.png", gap, y) == pixels(noise[row * 3] / 2)).all()
            assert (tile("strips.png", gap + 4 * step, y) == pixels(states[row * 3, 3])).all()
    assert sheets["teacher.png"].shape[:2] == (10 * step + gap, 3 * step + gap)
    assert sheets["strips.png"].shape[:2] == (8 * step + 3 * plain.pair_gap + gap, 5 * step + gap)
    assert (sheets["teacher.png"][0, :, 3] == 0).all()  # nothing but the page between the tiles
