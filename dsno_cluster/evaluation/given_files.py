"""What a config names for training and evaluation, looked at before any work: `plan` judges it.

Nothing is downloaded, and heavy libraries are imported only if there is a file to open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from dsno_cluster.config import Config, files_not_there
from dsno_cluster.config.paths import NAMED_IMAGES
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.files import nearest_existing, not_there


def problems_of_files(config: Config) -> list[UserError | WorkError]:
    """Why files and extractors that the config names cannot be used.

    A file that does not exist is a problem only if its name looks misspelt: later stages need it, not
    gen-trajectories.
    """
    found: list[UserError | WorkError] = [
        UserError(f"{key}: {path}: {not_there(path)}")
        for key, path in files_not_there(config).items()
        if nearest_existing(path)
    ]
    for check in _checks(config):
        try:
            check()
        except (UserError, WorkError) as error:
            found.append(error)
    return found


def _checks(config: Config) -> Iterator[Callable[[], None]]:
    """A check of each file that exists and is used."""
    missing, settings = files_not_there(config), config.evaluation
    if config.training.needs_vgg and "training.lpips_weights" not in missing:
        yield lambda: _check_lpips(config)
    for section, trained in (("training", config), ("finish", config.finished)):
        if trained is not None and trained.training.learns_features:
            yield partial(
                _check_learned, settings.feature_extractor, f"{section}.distribution.frechet_weight"
            )
    if set(settings.metrics) == {"trajectory_error"}:
        return
    if settings.reference not in NAMED_IMAGES and "evaluation.reference" not in missing:
        yield lambda: _check_reference(config)
    given = {key: getattr(settings, key) for key in ("weights_path", "precision_recall_weights_path")}
    if any(path and not path.startswith("package:") for path in given.values()) and not any(
        f"evaluation.{key}" in missing for key in given
    ):
        yield lambda: _check_extractors(config)


def _check_lpips(config: Config) -> None:
    from dsno_cluster.training.objectives.losses import check_lpips_weights

    check_lpips_weights(config.training)


def _check_learned(extractor: str, key: str) -> None:
    from dsno_cluster.features.extractors import check_differentiable

    check_differentiable(extractor, key)


def _check_reference(config: Config) -> None:
    from dsno_cluster.evaluation.metrics import OF_REFERENCE
    from dsno_cluster.evaluation.reference import compared_data
    from dsno_cluster.features.extractors import find_readings

    readings = find_readings(config.evaluation)
    compared = {metric: reading for metric, reading in readings.items() if metric in OF_REFERENCE}
    _, images = compared_data(config, compared, {reading.extractor for reading in compared.values()})
    if images is not None:
        images.say_note()


def _check_extractors(config: Config) -> None:
    from dsno_cluster.features.extractors import check_given_weights

    check_given_weights(config.evaluation)
