"""The real data with which samples are compared: statistics imported from a file, or computed once and kept.

Statistics of images are kept in the storage as `evaluation/references/<key>.safetensors`; the key is a hash of the images'
identity, their number, and the extractors' names, layers and weights, so two references cannot be confused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from dsno_cluster.config import Config, Evaluation, files_not_there
from dsno_cluster.config.base import Named
from dsno_cluster.config.paths import NAMED_IMAGES
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.metrics import (
    FRECHET,
    OF_REFERENCE,
    STATISTICS,
    Collected,
    Reference,
    ReferenceParts,
    check_count,
    check_width,
)
from dsno_cluster.evaluation.sources import HELD_OUT, ImageSource
from dsno_cluster.features import INCEPTION
from dsno_cluster.features.extractors import Reading, Readings, WeightsFile, check_shape, is_published
from dsno_cluster.features.inception import CLEAN
from dsno_cluster.features.statistics import Gaussian
from dsno_cluster.features.vision_transformers import PUBLISHED_WIDTHS, TRANSFORMERS
from dsno_cluster.files import file_sha256, not_there
from dsno_cluster.image_sets.image_set import DataIdentity, ImageSet
from dsno_cluster.image_sets.npz_file import array_names, find_images, npz_file, read_arrays
from dsno_cluster.image_sets.opening import open_images
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import MissingObject, Storage

# what means and covariances are called in a kept file; FID's as in older files
_NAMES = {"fid": ("mean", "covariance"), "sfid": ("sfid mean", "sfid covariance")}
ENOUGH = 10_000  # images; the FID of fewer is far above that of 50 000, and such figures are not published
ALIKE = 1e-3  # by how much of its largest number a stored covariance may miss being one


class Held(Named):
    """What is kept for a metric: a layer of an extractor, row by row or as moments."""

    layer: str
    weights_sha256: str
    by_row: bool


class ReferenceSpec(Named):
    """All that determines the statistics of a reference's images, which it `holds` by metric.

    Its hash names their file.
    """

    images: DataIdentity
    count: int
    holds: dict[str, Held]


@dataclass(frozen=True)
class RealData:
    """The reference as known before the pool runs: imported statistics, images, what is `kept`.

    `readings` are the layers that metrics need from the images, `spec` is all that determines their
    statistics.
    """

    statistics: Reference | None = None
    images: ImageSet | None = None
    readings: Readings = field(default_factory=dict)
    spec: ReferenceSpec | None = None
    kept: Reference | None = None

    @property
    def source(self) -> ImageSource | None:
        """The images that the pool has to measure, if any."""
        if self.images is None or self.kept is not None:
            return None
        return ImageSource("images", address=self.images.address, is_reference=True)

    @property
    def identity(self) -> DataIdentity | ReferenceParts | None:
        """The identity of the reference, as `Reference` has it; None if nothing is compared."""
        statistics = None if self.statistics is None else self.statistics.identity
        if statistics is None or self.images is None:
            return statistics or (self.images.identity if self.images else None)
        return ReferenceParts(statistics=_one(statistics), images=self.images.identity)

    @property
    def count(self) -> int | None:
        known = self.statistics or self.kept
        return known.count if known else self.images.count if self.images else None


def imported(settings: Evaluation) -> Reference | None:
    """mu and sigma of an .npz file as EDM, ADM and pytorch-fid write them; None for anything else.

    The count is not that of ADM's `arr_0`: its mu and sigma are those of the whole data set, its images only
    a part of it. Raises UserError if a file is not such an .npz, or if its mu and sigma may be by another extractor.
    """
    if not settings.reference.endswith(".npz"):
        _refuse_facts(settings)
        return None
    try:
        return _statistics(npz_file(settings.reference), settings)
    except UserError as error:
        message = str(error)
        raise UserError(
            message if message.startswith("evaluation.") else f"evaluation.reference: {message}"
        ) from None


def _statistics(file: Path, settings: Evaluation) -> Reference | None:
    if not file.exists():
        raise UserError(
            f"{file} is missing ({not_there(file)}); put an .npz with mu and sigma of the real data, or with its images, there"
        )
    names = array_names(file)
    asked, said = settings.feature_extractor, settings.reference_extractor
    unusable = None
    if "mu" not in names or "sigma" not in names:
        unusable = f"{file} has neither mu and sigma nor images (images, arr_0); it holds {', '.join(names) or 'nothing'}"
    elif said is None and asked in (CLEAN, *TRANSFORMERS):
        unusable = (
            f"{file} has mu and sigma, but does not say by which extractor they were made; those of EDM, ADM and pytorch-fid "
            f"are by {INCEPTION}. Name images, or set evaluation.reference_extractor={asked} if it was that one"
        )
    if unusable is not None:
        if find_images(file) is None:
            raise UserError(unusable)
        _refuse_facts(settings)
        return None
    if said not in (None, asked):
        raise UserError(
            f"evaluation.reference_extractor {said}: samples are measured by evaluation.feature_extractor {asked}, and features "
            "of two extractors do not compare"
        )
    found = {
        metric: _read_statistics(file, keys) for metric, keys in STATISTICS.items() if set(keys) <= set(names)
    }
    resolution = settings.reference_resolution
    if resolution is None and find_images(file) is not None:
        resolution = open_images(str(file)).shape[1]
    identity = DataIdentity(kind="mu and sigma", sha256=file_sha256(file))
    return Reference(identity, found, settings.reference_count, resolution)


def _read_statistics(file: Path, names: tuple[str, str]) -> Gaussian[np.ndarray]:
    """The mean (D,) and covariance (D, D) of these names. Raises UserError unless they are of real, finite numbers."""
    mean, covariance = read_arrays(file, list(names))
    named = tuple(zip(names, (mean, covariance), strict=True))
    for name, array in named:
        if array.dtype.kind not in "fiu":
            raise UserError(f"{file}: {name} is {array.dtype}, not real numbers")
        if not array.size:
            raise UserError(f"{file}: {name} is empty: its shape is {array.shape}")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"{file} has {names[0]} of {mean.shape} and {names[1]} of {covariance.shape}; they do not fit together: "
            "(D,) and (D, D) do"
        )
    for name, array in named:
        if bad := int(np.count_nonzero(~np.isfinite(array))):
            raise UserError(f"{file}: {bad} of the {array.size} numbers of {name} are NaN or infinite")
    largest = float(np.abs(covariance).max())
    if (
        np.abs(covariance - covariance.T).max() > ALIKE * largest
        or covariance.diagonal().min() < -ALIKE * largest
    ):
        raise UserError(
            f"{file}: {names[1]} is no covariance: it is not symmetric, or its diagonal has negative numbers"
        )
    return Gaussian(mean.astype(np.float64), covariance.astype(np.float64))


def _refuse_facts(settings: Evaluation) -> None:
    for key in ("reference_count", "reference_resolution", "reference_extractor"):
        if getattr(settings, key) is not None:
            raise UserError(
                f"evaluation.{key}: is only for an .npz with mu and sigma; {settings.reference} has images, which show it"
            )


def check_reference_is_there(config: Config) -> None:
    """Raises UserError if the metrics need a reference that is not on this machine; checks nothing else."""
    settings = config.evaluation
    if not set(OF_REFERENCE) & set(settings.metrics) or "evaluation.reference" not in files_not_there(config):
        return
    reference_images(config, imported(settings), {})


def reference_images(config: Config, statistics: Reference | None, readings: Readings) -> ImageSet | None:
    """The images whose features `readings` need; None if imported `statistics` are enough.

    Raises UserError if a metric needs images and the reference has none.
    """
    settings = config.evaluation
    if statistics is None:
        try:
            return open_images(settings.reference, config.storage.endpoint_url, config.data)
        except UserError as error:
            raise UserError(f"evaluation.reference: {error}") from None
    lacking = [metric for metric in readings if metric not in statistics.statistics]
    if not lacking:
        return None
    if find_images(Path(settings.reference)) is None:
        held = " and ".join(name for metric in statistics.statistics for name in STATISTICS[metric])
        raise UserError(
            f"evaluation.metrics: {' and '.join(lacking)} cannot be measured against {settings.reference}, which holds only "
            f"{held}; name images as evaluation.reference"
        )
    return open_images(settings.reference)


def held_out_images(config: Config) -> ImageSet | None:
    """The real images that were held out, which are measured beside the samples; None if there are none.

    Images of one's own are opened for it only if the rest of them is the reference: there may be millions.
    """
    data = config.data
    if data.name is None and (data.images is None or config.evaluation.reference not in NAMED_IMAGES):
        return None
    images = open_images(HELD_OUT.address, config.storage.endpoint_url, data)
    return images if images.count > 1 else None


def reference_spec(images: ImageSet, readings: Readings, weights: dict[str, WeightsFile]) -> ReferenceSpec:
    """All that determines the statistics of a reference's images."""
    holds = {
        metric: Held(
            layer=reading.key, weights_sha256=weights[reading.extractor].sha256, by_row=metric not in FRECHET
        )
        for metric, reading in readings.items()
    }
    return ReferenceSpec(images=images.identity, count=images.count, holds=holds)


def stored_reference(storage: Storage, spec: ReferenceSpec, images: ImageSet) -> Reference | None:
    """The statistics that were kept for `spec`, or None."""
    try:
        data = storage.read(_key(spec))
        tensors = safetensors.numpy.load(data)
    except (MissingObject, safetensors.SafetensorError):
        return None
    features = {k.removeprefix("features "): v for k, v in tensors.items() if k.startswith("features ")}
    return Reference(
        images.identity,
        {
            metric: Gaussian(tensors[mean], tensors[covariance])
            for metric, (mean, covariance) in _NAMES.items()
            if mean in tensors
        },
        images.count,
        images.shape[1],
        features,
    )


def reference_of(images: ImageSet, readings: Readings, collected: Collected) -> Reference:
    """The reference from what was collected from its images."""
    return Reference(
        images.identity,
        {metric: collected.mergers[metric].result().gaussian for metric in FRECHET if metric in readings},
        images.count,
        images.shape[1],
        collected.features,
    )


def store_reference(storage: Storage, spec: ReferenceSpec, reference: Reference) -> None:
    tensors = {f"features {layer}": rows for layer, rows in reference.features.items()}
    for metric, gaussian in reference.statistics.items():
        tensors |= dict(zip(_NAMES[metric], (gaussian.mean, gaussian.covariance), strict=True))
    text = json.dumps(spec.model_dump(mode="json"), sort_keys=True)
    storage.write(_key(spec), safetensors.numpy.save(tensors, {"spec": text}))


def _key(spec: ReferenceSpec) -> str:
    return f"evaluation/references/{canonical_hash(spec.model_dump(mode='json'))}.safetensors"


def merged(statistics: Reference | None, images: Reference | None) -> Reference | None:
    """One reference from imported mu and sigma, features of images, or both (ADM's batches).

    None from neither.
    """
    if statistics is None or images is None:
        return statistics or images
    return Reference(
        ReferenceParts(statistics=_one(statistics.identity), images=_one(images.identity)),
        {**images.statistics, **statistics.statistics},
        statistics.count,
        statistics.resolution or images.resolution,
        images.features,
    )


def _one(identity: DataIdentity | ReferenceParts) -> DataIdentity:
    assert isinstance(identity, DataIdentity)  # only a merged reference has parts
    return identity


def compared_data(
    config: Config, compared: Readings, extractors: Iterable[str]
) -> tuple[Reference | None, ImageSet | None]:
    """Imported statistics and the images that the metrics need; neither if nothing is compared.

    Raises UserError if they do not fit the metrics or their extractors.
    """
    if not compared:
        return None, None
    settings = config.evaluation
    statistics = imported(settings)
    for metric, gaussian in (statistics.statistics if statistics else {}).items():
        if metric in compared:
            check_width(metric, gaussian.mean, compared[metric])
    images = reference_images(config, statistics, compared)
    if images is not None:
        what = f"evaluation.reference {settings.reference}"
        of_images = [
            metric for metric in compared if statistics is None or metric not in statistics.statistics
        ]
        check_count(settings, of_images, images.count, what)
        check_shape(extractors, images.shape, what)
    return statistics, images


def find_real_data(
    config: Config, storage: Storage, readings: Readings, weights: dict[str, WeightsFile]
) -> RealData:
    """The config's reference: imported, kept from an earlier evaluation, or still to be measured."""
    compared = {metric: reading for metric, reading in readings.items() if metric in OF_REFERENCE}
    if not compared:
        return RealData()
    statistics, images = compared_data(config, compared, weights)
    if images is None:
        return RealData(statistics)
    if statistics is not None:  # mu and sigma exist: only features are needed from the images
        compared = {m: reading for m, reading in compared.items() if m not in statistics.statistics}
    spec = reference_spec(images, compared, weights)
    return RealData(statistics, images, compared, spec, stored_reference(storage, spec, images))


def finished_reference(storage: Storage, real: RealData, collected: Collected | None) -> Reference | None:
    """The reference with what the pool `collected` from its images, which is kept for the next evaluation."""
    found = real.kept
    if collected is not None:
        assert real.images is not None and real.spec is not None
        found = reference_of(real.images, real.readings, collected)
        store_reference(storage, real.spec, found)
    return merged(real.statistics, found)


def _width(reference: Reference, metric: str, reading: Reading) -> int | None:
    """How many features the extractor gives for a metric, as far as the reference shows it."""
    if metric in reference.statistics:
        return len(reference.statistics[metric].mean)
    rows = reference.features.get(reading.key)
    return None if rows is None else rows.shape[1]


def warnings_of(
    readings: Readings,
    weights: dict[str, WeightsFile],
    reference: Reference,
    count: int,
    resolution: int,
) -> list[str]:
    """Reasons why the figures cannot be compared with published ones. `resolution`: of the samples."""
    found = []
    inception = [metric for metric, reading in readings.items() if reading.extractor in (INCEPTION, CLEAN)]
    used = weights[readings[inception[0]].extractor] if inception else None
    if used is not None and not is_published(used):
        found.append(
            f"{', '.join(inception)}: not by the published Inception weights, but by weights of sha256 "
            f"{used.sha256[:8]}; comparable only with figures by the same"
        )
    if "fid" in inception:
        if count < ENOUGH:
            found.append(f"fid: of {count} samples; published ones are of 50000, and fewer give a larger FID")
        if reference.count is None:
            found.append(
                "fid: how many images mu and sigma are of is not recorded; say it by evaluation.reference_count"
            )
        elif reference.count < ENOUGH:
            found.append(f"fid: the reference is of only {reference.count} images")
    for metric, reading in readings.items():
        wanted, width = PUBLISHED_WIDTHS.get(reading.extractor), _width(reference, metric, reading)
        if wanted is not None and width not in (None, wanted):
            found.append(
                f"{metric}: by {reading.extractor} of {width} features; published figures are of ViT-L/14, which has {wanted}"
            )
    if reference.resolution is None:
        found.append("the reference's resolution is not recorded; say it by evaluation.reference_resolution")
    elif reference.resolution != resolution:
        found.append(
            f"the reference is of {reference.resolution} pixel images, the samples have {resolution}: features differ "
            "because of the resizing"
        )
    return found
