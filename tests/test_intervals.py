"""The intervals of distances: features are drawn again and again from distributions whose distance is known."""

from __future__ import annotations

import numpy as np
import pytest
from report_runs import metrics

from dsno_cluster.config import load_config
from dsno_cluster.evaluation.metrics import frechet, kid
from dsno_cluster.evaluation.records import Figures, Metrics
from dsno_cluster.evaluation.table import all_rows, figures_of, known_figures, spread_notes
from dsno_cluster.features.statistics import Gaussian, moments_of

WIDTH = 8
SPREADS = 1.0 / np.arange(1, WIDTH + 1) ** 0.5  # standard deviations of the reference's features


def measured(features: np.ndarray) -> Figures:
    reference = Gaussian(np.zeros(WIDTH), np.diag(SPREADS**2))
    found = frechet("fid", moments_of(features), features.astype(np.float32), reference)
    return Figures.model_validate(found)


def repeated(draws: int, count: int, scale: float, shift: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and half intervals of `draws` sets of `count` features of a Gaussian."""
    generator = np.random.default_rng(seed)
    found = [
        measured(generator.standard_normal((count, WIDTH)) * SPREADS * scale + shift) for _ in range(draws)
    ]
    return np.array([row.fid for row in found]), np.array([row.fid_ci95 for row in found])


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.3), (1.2, 0.0), (0.8, 0.1)])
def test_an_interval_holds_the_known_distance_of_gaussians(scale: float, shift: float) -> None:
    """It is (1 - scale)^2 tr C + |shift|^2, and about 95 of 100 intervals hold it; the distance's own bias is small here."""
    known = (1 - scale) ** 2 * (SPREADS**2).sum() + WIDTH * shift**2
    found, halves = repeated(400, 4000, scale, shift, 0)
    assert 0.91 <= (np.abs(found - known) <= halves).mean() <= 0.98
    assert halves.mean() == pytest.approx(1.96 * found.std(ddof=1), rel=0.1)


def test_two_samplers_that_differ_are_told_apart_and_equal_ones_are_not() -> None:
    better, worse, again = (
        repeated(1, 5000, scale, 0.0, seed) for scale, seed in ((1.2, 1), (1.3, 2), (1.2, 3))
    )

    def differ(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> bool:
        return bool(abs(one[0] - other[0]) > (one[1] ** 2 + other[1] ** 2) ** 0.5)

    assert differ(better, worse) and not differ(better, again)


def test_the_interval_of_a_perfect_sampler_is_not_too_narrow() -> None:
    """Near a distance of 0 the first derivative vanishes, and only an upper bound can be expected."""
    found, halves = repeated(200, 400, 1.0, 0.0, 0)
    assert (np.abs(found - found.mean()) <= halves).mean() >= 0.93
    assert halves.mean() < 4 * found.std(ddof=1)


def test_the_interval_is_that_of_the_bootstrap() -> None:
    """Of features that are far from Gaussian."""
    generator = np.random.default_rng(5)
    features = np.abs(generator.standard_normal((1500, WIDTH))) ** 1.5 * SPREADS
    drawn = [measured(features[generator.integers(0, 1500, 1500)]).fid for _ in range(600)]
    assert measured(features).fid_ci95 == pytest.approx(1.96 * np.std(drawn, ddof=1), rel=0.1)


def test_kid_varies_as_its_interval_says() -> None:
    words = ["evaluation.kid_subsets=60", "evaluation.kid_subset_size=100", "evaluation.num_samples=1000"]
    settings = load_config("configs/digits.yaml", words).evaluation
    generator = np.random.default_rng(0)

    def once() -> Figures:
        sides = [
            (generator.standard_normal((1000, WIDTH)) * SPREADS + shift).astype(np.float32)
            for shift in (0.2, 0.0)
        ]
        return Figures.model_validate(kid(settings, *sides))

    found = [once() for _ in range(200)]
    values = np.array([row.kid for row in found])
    halves = np.array([row.kid_ci95 for row in found])
    assert 0.92 <= (np.abs(values - values.mean()) <= halves).mean() <= 0.99
    assert halves.mean() == pytest.approx(1.96 * values.std(ddof=1), rel=0.2)


def test_no_interval_where_none_can_be_told() -> None:
    """A covariance that has no inverse; subsets that are most of the samples."""
    generator = np.random.default_rng(0)
    few = measured(generator.standard_normal((WIDTH, WIDTH)))
    assert few.fid is not None and few.fid_ci95 is None
    words = ["evaluation.kid_subset_size=60", "evaluation.num_samples=100"]
    features = generator.standard_normal((100, WIDTH)).astype(np.float32)
    assert kid(load_config("configs/digits.yaml", words).evaluation, features, features)["kid_ci95"] is None


def test_tables_show_intervals_and_older_figures_as_they_were() -> None:
    known = {figure.key: figure for figure in known_figures("inception-v3-compat")}
    fid_of, kid_of, score = known["fid"], known["kid"], known["inception_score"]
    assert fid_of.text(Figures(fid=0.312, fid_ci95=0.0204)) == "0.31 ± 0.02"
    assert fid_of.text(Figures(fid=1.7912, fid_ci95=0.0031)) == "1.791 ± 0.003"
    assert kid_of.text(Figures(kid=0.0123, kid_std=0.0045, kid_ci95=0.0011)) == "0.0123 ± 0.0011"
    older = Metrics.model_validate(metrics())
    assert fid_of.text(older.student) == "4.56" and kid_of.text(older.student) == "0.0123 ± 0.0045"
    assert spread_notes(figures_of(older), all_rows(older)) == [
        "± of kernel distance: standard deviation over parts of the samples."
    ]
    row = Figures(fid=2.0, fid_ci95=0.1, inception_score=9.0, inception_score_std=0.2)
    notes = spread_notes([fid_of, score], [row])
    assert len(notes) == 2 and "95 % interval" in notes[0] and "Inception score" in notes[1]
