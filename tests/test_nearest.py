"""How near samples are to the training images, against hand-computed distances and scikit-learn's own neighbours."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from tiny import TINY, answer, dsno
from training_runs import link_data, train

from dsno_cluster.config import load_config
from dsno_cluster.data import load_data
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.history import best_of, judging_figures
from dsno_cluster.evaluation.look_up import Comparison, Student, Subject, look_up
from dsno_cluster.evaluation.nearest import copy_distance, nearest_figures, nearest_training
from dsno_cluster.evaluation.nearest_picture import nearest_picture, shown_samples, tile_place
from dsno_cluster.evaluation.pictures import layout
from dsno_cluster.evaluation.records import HistoryRow
from dsno_cluster.evaluation.reference import find_real_data
from dsno_cluster.evaluation.sources import HELD_OUT
from dsno_cluster.features import extractors
from dsno_cluster.features.classifiers import DigitsFeatures
from dsno_cluster.features.neighbours import nearest
from dsno_cluster.image_sets.opening import held_out_split, open_images
from dsno_cluster.images import GAP, pixel_scale, to_uint8
from dsno_cluster.storage import open_storage
from dsno_cluster.teachers import find_teacher

NEAREST = "evaluation.metrics=[nearest]"


def test_distances_and_figures_by_hand() -> None:
    training = np.array([[0, 0], [3, 4], [10, 0]], np.float32)
    samples = np.array([[0, 0], [0, 1], [6, 8], [10, 2]], np.float32)  # a copy, and 1, 5 and 2 away
    distances, index = nearest_training(samples, training)
    assert distances.tolist() == [0, 1, 5, 2] and index.tolist() == [0, 0, 1, 2]
    # sorted 0, 1, 2, 5: the median between 1 and 2, the 5 % quantile at 0.05 * 3 of the way from 0 to 1
    found = nearest_figures(distances, 1.0)
    assert found == pytest.approx({"nearest": 1.5, "nearest_low": 0.15, "copies": 0.25})
    assert nearest_figures(distances, None).keys() == {"nearest", "nearest_low"}
    assert copy_distance(np.arange(201.0)) == pytest.approx(2.0)  # 1 % of 200 steps


@pytest.mark.parametrize("numbers", [1, 700, 2**28])
def test_neighbours_are_scikit_learns(numbers: int) -> None:
    """In blocks of any size; of features whose norm is large beside their distances, as Inception's are."""
    generator = np.random.default_rng(0)
    training = (generator.standard_normal((230, 16)) + 100).astype(np.float32)
    samples = (generator.standard_normal((170, 16)) + 100).astype(np.float32)
    samples[:5] = training[100:105]
    by_tree = NearestNeighbors(n_neighbors=1, algorithm="kd_tree").fit(training.astype(np.float64))
    distances, index = by_tree.kneighbors(samples.astype(np.float64))
    found, at = nearest(torch.from_numpy(samples), torch.from_numpy(training), numbers)
    assert np.allclose(found.numpy(), distances[:, 0], rtol=1e-3, atol=0)
    assert (found[:5] == 0).all()  # copies, to the last bit
    assert (at.numpy() == index[:, 0]).mean() > 0.98  # except for ties within the rounding of float32


def digits_features(images: torch.Tensor) -> np.ndarray:
    weights = extractors.find_weights(DigitsFeatures.NAME, "package:digits-features", None)
    return extractors.load_extractor(weights, ["64"])(to_uint8(images))["64"].numpy().astype(np.float64)


@pytest.mark.parametrize("whose", ["named", "own"])
def test_images_that_are_copied_are_seen(whose: str, tmp_path: Path) -> None:
    """Of existing images a third are training images; the yardstick is what held-out ones have."""
    train, held_out = (part.images for part in load_data("digits"))
    data: list[str] = []
    if whose == "own":
        np.savez(tmp_path / "own.npz", images=to_uint8(train).numpy())
        data = ["data.name=null", f"data.images={tmp_path}/own.npz"]
        train, held_out = (train[part] for part in held_out_split(len(train)))
    samples = torch.cat([train[:99], held_out[50:]])
    np.savez(tmp_path / "samples.npz", images=to_uint8(samples).numpy())
    words = ["eval", NEAREST, *data, f"storage.root={tmp_path}", "--launcher", "local", "--json", "--samples"]
    done = dsno(*words, str(tmp_path / "samples.npz"), "--actors", "1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["figures"]
    neighbours = NearestNeighbors(n_neighbors=1).fit(digits_features(train))
    distances, of_real = (
        neighbours.kneighbors(digits_features(images))[0][:, 0] for images in (samples, held_out)
    )
    below = np.percentile(of_real, 1)
    assert below > 0.1 and (distances < 1e-4).sum() == 99
    wanted = {
        "nearest": np.percentile(distances, 50),
        "nearest_low": 0.0,
        "copies": (distances < below).mean(),
    }
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5) and found["copies"] >= 99 / len(samples)


def of_digits(root: Path, *words: str) -> Comparison:
    config = load_config("configs/digits.yaml", [f"storage.root={root}", *words])
    return look_up(Subject(config, find_teacher(config), Student("none", "0" * 64, 1, None, None)))


def test_rows_of_the_teacher_without_the_figure_are_measured_anew_only_if_it_is_asked_for(
    tmp_path: Path,
) -> None:
    assert len(of_digits(tmp_path).known) == 5
    asked = of_digits(tmp_path, "evaluation.metrics=[fid, agreement, nearest, trajectory_error]")
    assert asked.known == {} and len(asked.missing) == 5
    # the rows say by which held-out images copies were counted
    assert asked.spec.held_out is not None and of_digits(tmp_path).spec.held_out is None


def test_own_images_are_held_out_if_the_rest_of_them_is_the_reference(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", images=to_uint8(load_data("digits")[0].images).numpy())
    own = ["data.name=null", f"data.images={tmp_path}/own.npz", NEAREST]
    (held_out,) = [found for found in of_digits(tmp_path, *own).sets() if found.source == HELD_OUT]
    assert held_out.count == 150 and set(held_out.readings) == {"nearest"}
    other = of_digits(tmp_path, *own, f"evaluation.reference={tmp_path}/own.npz")
    assert other.spec.held_out is None and HELD_OUT not in [found.source for found in other.sets()]


def test_a_reference_without_images_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "edm.npz", mu=np.zeros(64), sigma=np.eye(64))
    config = load_config("configs/digits.yaml", [f"evaluation.reference={tmp_path / 'edm.npz'}", NEAREST])
    settings = config.evaluation
    with pytest.raises(
        UserError, match=r"nearest cannot be measured against .*, which holds only mu and sigma"
    ):
        find_real_data(
            config,
            open_storage(str(tmp_path)),
            extractors.find_readings(settings),
            extractors.find_all_weights(settings),
        )


def test_checkpoints_are_judged_by_their_copies() -> None:
    """Not by the distance: far from the training images is not good."""
    rows = [HistoryRow(step=step, ema_decay=None, nearest=far, copies=share) for step, far, share in
            ((1, 9.0, 0.5), (2, 3.0, 0.01), (3, 1.0, 0.2))]  # fmt: skip
    best = best_of(rows, "nearest")
    assert best is not None and (best.step, best.value) == (2, 0.01)
    assert judging_figures("digits-features")["nearest"].key == "copies"


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 24, 12)])
def test_each_sample_lies_beside_its_nearest_training_image(
    shape: tuple[int, int, int], tmp_path: Path
) -> None:
    config = load_config("configs/digits.yaml", ["evaluation.picture_columns=5"])
    plain, generator = layout(config), torch.Generator().manual_seed(0)
    training = torch.randint(0, 256, (40, *shape), generator=generator, dtype=torch.uint8)
    np.savez(tmp_path / "training.npz", images=training.numpy())
    drawn = torch.rand(50, *shape, generator=generator) * 2 - 1
    shown = shown_samples(plain, drawn)
    of_each_class = [5 * row + column for row in range(10) for column in range(3)]
    assert torch.equal(shown, drawn[of_each_class])
    # features on a line: those of sample k are 0.25 from those of training image 39 - k
    features, of_training = 38.75 - np.arange(30.0)[:, None], np.arange(40.0)[:, None]
    images = open_images(str(tmp_path / "training.npz"))
    png = nearest_picture(
        plain, shown, features.astype(np.float32), images, of_training.astype(np.float32), None
    )
    sheet, scale = np.asarray(Image.open(io.BytesIO(png))), pixel_scale(shown)
    height, width = (side * scale for side in shape[1:])
    for k in range(30):
        x, y = tile_place(plain, shown, k)
        for left, image in ((x, to_uint8(shown[k])), (x + width + GAP, training[39 - k])):
            tile = sheet[y : y + height : scale, left : left + width : scale]
            assert (tile == image.expand(3, -1, -1).permute(1, 2, 0).numpy()).all(), k


@pytest.mark.slow
def test_student_teacher_and_real_images_have_the_figures(tiny_data: Path, tmp_path: Path) -> None:
    root = link_data(tiny_data, tmp_path)
    train(tiny_data, root)
    asked = [*TINY, f"storage.root={root}", "evaluation.metrics=[fid, nearest]", "--launcher", "local"]
    done = dsno("eval", *asked)
    assert done.returncode == 0, done.stderr
    assert "nearest training image" in done.stdout and "copies" in done.stdout
    metrics = json.loads((root / "evaluation/digits/metrics.json").read_text())
    real, held_out = load_data("digits")
    distances = (
        NearestNeighbors(n_neighbors=1)
        .fit(digits_features(real.images))
        .kneighbors(digits_features(held_out.images))[0]
    )
    found = metrics["real_held_out"]
    assert found["nearest"] == pytest.approx(np.percentile(distances, 50), rel=1e-5)
    assert found["nearest_low"] == pytest.approx(np.percentile(distances, 5), rel=1e-5)
    assert found["copies"] == 3 / 297  # 1 %, by its definition
    assert len(metrics["teacher_rows"]) == 3
    with Image.open(root / "evaluation/digits/nearest.png") as picture:
        assert picture.height == 84 + 10 * (48 + 26) + 4  # a row for each class
    page = root / "report-digits.html"
    assert answer("report", *asked[:-2]).returncode == 0
    data = (root / "evaluation/digits/nearest.png").read_bytes()
    assert base64.b64encode(data).decode() in page.read_text()
    for row in (metrics["student"], *metrics["teacher_rows"]):
        assert 0 < row["nearest_low"] < row["nearest"] and 0 <= row["copies"] < 1
    again = dsno("eval", *asked, "evaluation.metrics=[trajectory_error]")
    assert again.returncode == 0, again.stderr
    assert not (root / "evaluation/digits/nearest.png").exists()  # of figures that are not there any more
