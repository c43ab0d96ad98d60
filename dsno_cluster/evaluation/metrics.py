"""Metrics from features: FID, KID, Inception Score, precision and recall by torch-fidelity's own functions; copies by ours.

`Collected` takes the blocks of a set of samples in any order and ends up with what the metrics need: merged
moments, and the rows of features only for those metrics that need them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dsno_cluster import console
from dsno_cluster.config import Evaluation
from dsno_cluster.config.base import Named
from dsno_cluster.device import compute_device
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.nearest import copy_distance, nearest_figures, nearest_training
from dsno_cluster.evaluation.records import Figures
from dsno_cluster.features import intervals
from dsno_cluster.features.extractors import Reading, Readings
from dsno_cluster.features.inception import SPATIAL, SPATIAL_WIDTH
from dsno_cluster.features.kernels import squared_mmd
from dsno_cluster.features.neighbours import precision_recall_on, rounded_precision_recall_on
from dsno_cluster.features.statistics import BlockMerger, Gaussian, Moments, distance_from
from dsno_cluster.image_sets.image_set import DataIdentity

# metrics that compare means and covariances, and what these are called in an .npz
STATISTICS = {"fid": ("mu", "sigma"), "sfid": ("mu_s", "sigma_s")}
FRECHET = tuple(STATISTICS)
BY_ROW = ("kid", "cmmd", "inception_score", "precision_recall", "nearest")  # need each sample's features
OF_REFERENCE = (*FRECHET, "kid", "cmmd", "precision_recall", "nearest")  # compare with real images
CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0  # of its paper, and of its program
WHOLE_MATRIX = (
    10_000  # up to this many samples, torch-fidelity's default, which holds all distances, fits in memory
)
ROWS_AT_A_TIME = 2_000  # with more samples, the distances are computed in blocks of this many rows


Found = dict[str, float | None]  # figures by their names in `Figures`


@dataclass(frozen=True)
class BlockResult:
    """A block's moments by metric, features by layer, and number of the right class."""

    moments: dict[str, Moments]
    features: dict[str, np.ndarray]
    agreeing: int


@dataclass
class Collected:
    """The collected blocks of `count` samples, in blocks of `size`."""

    count: int
    size: int
    mergers: dict[str, BlockMerger] = field(default_factory=dict)
    features: dict[str, np.ndarray] = field(default_factory=dict)
    agreeing: int = 0

    def add(self, start: int, result: BlockResult) -> None:
        """Add a block, each block once."""
        for metric, moments in result.moments.items():
            merger = self.mergers.setdefault(metric, BlockMerger(-(-self.count // self.size)))
            merger.add(start // self.size, moments)
        for layer, rows in result.features.items():
            if layer not in self.features:
                self.features[layer] = np.empty((self.count, rows.shape[1]), np.float32)
            self.features[layer][start : start + len(rows)] = rows
        self.agreeing += result.agreeing


class ReferenceParts(Named):
    """The identity of a reference with mean and covariance from a file, features from images, or both."""

    statistics: DataIdentity | None
    images: DataIdentity | None


@dataclass(frozen=True)
class Reference:
    """The real data: `statistics` of `count` images by metric, and features (N, D) by layer.

    `identity` identifies its origin, `resolution` is the images' height. What was not recorded is None.
    """

    identity: DataIdentity | ReferenceParts
    statistics: dict[str, Gaussian[np.ndarray]]
    count: int | None
    resolution: int | None
    features: dict[str, np.ndarray] = field(default_factory=dict)


def layers_by_row(readings: Readings, of_reference: bool) -> set[str]:
    """Keys of the layers whose features the metrics need row by row; for the intervals, those of distances of samples too."""
    by_row = BY_ROW if of_reference else (*BY_ROW, *FRECHET)
    return {reading.key for metric, reading in readings.items() if metric in by_row}


def fewest(settings: Evaluation) -> dict[str, int]:
    """The smallest number of images, on either side, for the metrics that need one."""
    return {
        **dict.fromkeys((*FRECHET, "cmmd"), 2),  # a covariance, or a deviation
        "kid": settings.kid_subset_size,
        "inception_score": settings.inception_splits,
        "precision_recall": settings.neighborhood + 1,
    }


def check_count(settings: Evaluation, metrics: Iterable[str], count: int, what: str) -> None:
    """Raises UserError if `count` images of `what` are too few for one of the metrics."""
    for metric in metrics:
        if count < (needed := fewest(settings).get(metric, 0)):
            raise UserError(
                f"evaluation.metrics: {metric}, as it is set, needs {needed} images; {what} has {count}"
            )


def figures(
    settings: Evaluation,
    readings: Readings,
    samples: Collected,
    reference: Reference | None,
    copies_below: float | None = None,
) -> Figures:
    """Every metric of `readings`; the reference is needed only by those that compare with it.

    `copies_below`: the distance below which a sample is a copy (`distance_of_copies`); None: copies are not counted.
    Raises UserError if there are too few images for a metric or the reference's features have another width.
    """
    found: Found = {}
    check_count(settings, readings, samples.count, "the set of samples")
    for metric in FRECHET:
        if metric in readings:
            assert reference is not None
            features = samples.features[readings[metric].key]
            moments = samples.mergers[metric].result()
            found |= frechet(metric, moments, features, reference.statistics[metric])
    if "kid" in readings:
        found |= kid(settings, *_pair(readings["kid"], samples, reference))
    if "cmmd" in readings:
        found |= cmmd(*_pair(readings["cmmd"], samples, reference))
    if "inception_score" in readings:
        found |= inception_score(settings, samples.features[readings["inception_score"].key])
    if "precision_recall" in readings:
        found |= precision_recall(settings, *_pair(readings["precision_recall"], samples, reference))
    if "nearest" in readings:
        distances, _ = nearest_training(*_pair(readings["nearest"], samples, reference))
        found |= nearest_figures(distances, copies_below)
    if "agreement" in readings:
        found["agreement"] = samples.agreeing / samples.count
    return Figures.model_validate(found)


def best_draw(draws: Sequence[Figures]) -> Figures:
    """The figures of the draw with the smallest FID, and the FIDs of all, if there are several (Karras et al. 2022, EDM)."""
    if len(draws) == 1:
        return draws[0]
    best = min(draws, key=lambda draw: math.inf if draw.fid is None else draw.fid)
    return Figures.model_validate({**best.values(), "fid_draws": [draw.fid for draw in draws]})


def distance_of_copies(readings: Readings, held_out: Collected, reference: Reference | None) -> float:
    """The distance to the nearest training image below which images are copies, by those of real images that were held out."""
    distances, _ = nearest_training(*_pair(readings["nearest"], held_out, reference))
    return copy_distance(distances)


def _pair(reading: Reading, samples: Collected, reference: Reference | None) -> tuple[np.ndarray, np.ndarray]:
    assert reference is not None
    return samples.features[reading.key], reference.features[reading.key]


def frechet(metric: str, moments: Moments, features_ND: np.ndarray, reference: Gaussian[np.ndarray]) -> Found:
    """Frechet distance (Heusel et al. 2017) of samples, with their moments, from the reference; its interval.

    Raises UserError if features on either side are not finite.
    """
    _check_width(metric, reference.mean, len(moments.mean))
    distance = distance_from(moments, reference)
    return {
        metric: distance,
        f"{metric}_ci95": intervals.of_frechet_distance(features_ND, moments, reference),
    }


def check_width(metric: str, mean: np.ndarray, reading: Reading) -> None:
    """Raises UserError if imported means do not have the width that the layer has, if its name says it."""
    if reading.layer == SPATIAL:
        _check_width(metric, mean, SPATIAL_WIDTH)
    if reading.layer.isdecimal():
        _check_width(metric, mean, int(reading.layer))


def _check_width(metric: str, mean: np.ndarray, width: int) -> None:
    if len(mean) != width:
        name = STATISTICS[metric][0]
        raise UserError(
            f"evaluation.reference: has {name} of {len(mean)} features, the extractor gives {width}"
        )


def kid(settings: Evaluation, samples: np.ndarray, real: np.ndarray) -> Found:
    """Kernel Inception Distance (Binkowski et al. 2018) over `kid_subsets` random subsets: mean, deviation, interval."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    found = kid_features_to_metric(
        torch.from_numpy(samples),
        torch.from_numpy(real),
        kid_subsets=settings.kid_subsets,
        kid_subset_size=settings.kid_subset_size,
        rng_seed=settings.metric_seed,
        verbose=False,
    )
    deviation, count = found[KEY_METRIC_KID_STD], min(len(samples), len(real))
    half = intervals.of_subsets(deviation, settings.kid_subsets, settings.kid_subset_size, count)
    return {"kid": found[KEY_METRIC_KID_MEAN], "kid_std": deviation, "kid_ci95": half}


def cmmd(samples: np.ndarray, real: np.ndarray) -> Found:
    """CLIP's Maximum Mean Discrepancy (Jayasumana et al. 2024) and its interval. On a GPU, if this process sees one."""
    ours, theirs, device = torch.from_numpy(samples), torch.from_numpy(real), compute_device()
    try:
        found, influence = squared_mmd(ours.to(device), theirs.to(device), CMMD_BANDWIDTH)
    except torch.OutOfMemoryError:  # the actors hold it
        console.say("note: the GPU has no room for CMMD: it is computed on the CPU")
        found, influence = squared_mmd(ours, theirs, CMMD_BANDWIDTH)
    half = intervals.of_mean(influence.cpu().numpy())
    return {"cmmd": CMMD_SCALE * found, "cmmd_ci95": CMMD_SCALE * half}


def inception_score(settings: Evaluation, logits: np.ndarray) -> dict[str, float]:
    """Inception Score (Salimans et al. 2016) over `inception_splits` parts; its mean and deviation."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    found = isc_features_to_metric(
        torch.from_numpy(logits), settings.inception_splits, settings.inception_shuffle, settings.metric_seed
    )
    return {
        "inception_score": found[KEY_METRIC_ISC_MEAN],
        "inception_score_std": found[KEY_METRIC_ISC_STD],
    }


def precision_recall(settings: Evaluation, samples: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Precision, recall and their F-score (Kynkaanniemi et al. 2019) with `neighborhood` neighbours.

    On a GPU, if this process sees one: torch-fidelity's own function copies every distance to the CPU.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    rounded = settings.neighborhood_precision == "float16"
    compute = rounded_precision_recall_on if rounded else precision_recall_on
    if (device := compute_device()).type == "cuda":
        try:
            there = [torch.from_numpy(features).to(device) for features in (samples, real)]
            return compute(there[0], there[1], settings.neighborhood)
        except torch.OutOfMemoryError:  # the actors hold it
            console.say("note: the GPU has no room for precision and recall: they are computed on the CPU")
    if rounded:
        return compute(torch.from_numpy(samples), torch.from_numpy(real), settings.neighborhood)
    whole = max(len(samples), len(real)) <= WHOLE_MATRIX
    found = prc_features_to_metric(
        torch.from_numpy(samples),
        torch.from_numpy(real),
        prc_neighborhood=settings.neighborhood,
        save_cpu_ram=not whole,
        verbose=False,
        **({} if whole else {"prc_batch_size": ROWS_AT_A_TIME}),
    )
    return {name: float(found[name]) for name in ("precision", "recall", "f_score")}
