"""The student that a training begins with, `training.start`."""

from __future__ import annotations

from torch import Tensor

from dsno_cluster.config import Config
from dsno_cluster.diffusion.schedule import same_times
from dsno_cluster.errors import UserError
from dsno_cluster.files import shown_path
from dsno_cluster.model_folder import ModelMeta, StartModel, model_address, read_meta, read_model
from dsno_cluster.students.dsno import DSNO, StudentModel, student_model


def find_start(config: Config) -> StartModel | None:
    """The student that `training.start` names, its weights not read yet; None if it names none.

    Raises UserError if there is none.
    """
    if config.training.start is None:
        return None
    address, meta = _named(config, config.training.start)
    return StartModel(address=address, name=meta.name, step=meta.step, sha256=meta.sha256)


def _named(config: Config, path: str) -> tuple[str, ModelMeta]:
    """The address of the step that the path of a start leads to, and its `meta.json`."""
    endpoint = config.storage.endpoint_url
    try:
        address = model_address(path, endpoint)
        return address, read_meta(address, endpoint)
    except UserError as error:
        raise UserError(f"training.start: {error}") from None


def check_start(config: Config, student: DSNO) -> None:
    """Raises UserError as `find_start`, and as `start_weights` for a start that is not alike; reads no weights.

    `student` may be on the meta device.
    """
    if config.training.start is not None:
        address, meta = _named(config, config.training.start)
        _check_alike(meta, address, student)


def start_weights(config: Config, start: StartModel, student: DSNO) -> dict[str, Tensor]:
    """The weights of the start, for the student.

    Raises UserError, naming the first difference, unless the start has the network, form and times of the student, and
    WorkError if its weights are no longer those that were found.
    """
    found = read_model(start.address, config.storage.endpoint_url, sha256=start.sha256)
    _check_alike(found.meta, start.address, student)
    return found.weights


def _check_alike(meta: ModelMeta, address: str, student: DSNO) -> None:
    theirs = student_model(meta, address)
    ours = StudentModel.model_validate_json(student.describe().model_dump_json())
    where = f"training.start: the student at {shown_path(address)}"
    for key in ("operator", "modes", "prediction", "points"):
        if (before := getattr(theirs, key)) != (now := getattr(ours, key)):
            raise UserError(f"{where} has student.{key} {before}, the config says {now}")
    if not same_times(theirs.times, ours.times):
        raise UserError(f"{where} has the time points {list(theirs.times)}, the config {list(ours.times)}")
    if (theirs.backbone, theirs.diffusers) != (ours.backbone, ours.diffusers):
        raise UserError(f"{where} is built on another network than that of the config; see student.backbone")
    for key in type(ours.network).model_fields:
        before, now = getattr(theirs.network, key), getattr(ours.network, key)
        if key != "dropout" and before != now:
            raise UserError(f"{where} has network.{key} {before}, the config says {now}")
