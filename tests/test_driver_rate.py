"""What the driver of an evaluation does for many images: as exact in large blocks, on a device, and by our own neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from dsno_cluster.evaluation.measure import ImagesOf
from dsno_cluster.evaluation.sources import STUDENT, ImageSource
from dsno_cluster.features.extractors import Reading
from dsno_cluster.features.neighbours import precision_recall_on
from dsno_cluster.features.statistics import BlockMerger, Moments, _moments_by_torch, moments_of

COUNT, WIDTH = 50_000, 12
ROWS = (np.random.default_rng(3).standard_normal((COUNT, WIDTH)) * np.linspace(0.1, 3, WIDTH) + 1000).astype(
    np.float32
)


def merged(size: int, of_block: object) -> Moments:
    merger = BlockMerger(-(-COUNT // size))
    for start in range(0, COUNT, size):
        merger.add(start // size, of_block(ROWS[start : start + size]))  # type: ignore[operator]
    return merger.result()


def test_fifty_thousand_merge_as_exactly_in_large_blocks_and_on_a_device() -> None:
    exact = ROWS.astype(np.longdouble)
    centred = exact - exact.mean(0)
    covariance = (centred.T @ centred / (COUNT - 1)).astype(np.float64)
    scale = np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))

    def error(moments: Moments) -> float:
        return float(np.abs((moments.covariance - covariance) / scale).max())

    def by_torch(rows: np.ndarray) -> Moments:
        return _moments_by_torch(torch.from_numpy(rows))

    today = error(merged(250, moments_of))
    for found in (merged(1000, moments_of), merged(1000, by_torch), merged(250, by_torch)):
        assert found.count == COUNT and error(found) < max(2 * today, 1e-14)
    assert today < 1e-13


@pytest.mark.parametrize(
    ("source", "count", "shape", "batch", "block"),
    [
        (STUDENT, 50_000, (3, 32, 32), 250, 1000),
        (STUDENT, 50_000, (3, 64, 64), 250, 1000),
        (STUDENT, 50_000, (3, 256, 256), 250, 250),  # not small
        (STUDENT, 5_000, (1, 8, 8), 250, 250),  # or few actors would have work
        (STUDENT, 10_000, (1, 8, 8), 250, 500),
        (STUDENT, 50_000, (3, 32, 32), 5000, 5000),
        (ImageSource("images", address="data"), 50_000, (3, 32, 32), 250, 1024),
        (ImageSource("images", address="data"), 1_000, (3, 32, 32), 250, 256),
    ],
)
def test_many_small_images_are_measured_in_large_blocks(
    source: ImageSource, count: int, shape: tuple[int, ...], batch: int, block: int
) -> None:
    images = ImagesOf(source, count, {"fid": Reading("inception-v3-compat", "2048")}, shape)
    assert images.block_size(batch) == block


@pytest.mark.parametrize("numbers", [1, 1000, 2**28])
@pytest.mark.parametrize("neighborhood", [1, 3, 5])
def test_precision_and_recall_are_torch_fidelitys(neighborhood: int, numbers: int) -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(230, 16, generator=generator)
    samples = torch.randn(170, 16, generator=generator) * 0.8 + 0.3
    theirs = prc_features_to_metric(
        samples,
        real,
        prc_neighborhood=neighborhood,
        prc_batch_size=64,
        save_cpu_ram=True,
        verbose=False,
    )
    ours = precision_recall_on(samples, real, neighborhood, numbers)
    assert ours.keys() == theirs.keys() and 0.05 < ours["recall"] < 0.95
    for name, value in ours.items():
        assert value == pytest.approx(theirs[name], abs=1e-6), name
