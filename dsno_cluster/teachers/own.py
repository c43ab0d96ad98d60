"""Our own teachers: model folders of `train-teacher` and `import-weights`, and those in the package."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

from dsno_cluster.config import validate
from dsno_cluster.errors import UserError
from dsno_cluster.model_folder import LATEST, META, FoundModel, find_model
from dsno_cluster.records import Values
from dsno_cluster.teachers.facts import Facts
from dsno_cluster.teachers.identity import DENOISER, TeacherIdentity, UNetDescription, UNetIdentity
from dsno_cluster.teachers.teacher import Options, Source, Teacher, TeacherInfo, check_options
from dsno_cluster.teachers.unet_denoiser import unet_facts, unet_info, unet_teacher
from dsno_cluster.teachers.warm_start import with_last_layer_of_x0

if TYPE_CHECKING:
    from torch import Tensor

PREDICTIONS, SCHEDULE = ("x", "eps", "v", "both"), "cosine"


class OwnFolder:
    """A dsno-cluster model folder, on disk or on S3, or `package:NAME`."""

    kind: ClassVar[str] = "ours"
    identities: ClassVar[tuple[type[TeacherIdentity], ...]] = (UNetIdentity,)

    def __init__(self, source: Source, options: Options) -> None:
        check_options(options, ("schedule",), source.path)
        self.path, self.endpoint_url, self.schedule = (
            source.path,
            source.endpoint_url,
            options.get("schedule"),
        )

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.path.startswith("package:") or source.has(META) or source.has(LATEST)

    def info(self) -> TeacherInfo:
        return self._info

    def facts(self) -> Facts:
        return unet_facts(self._description)

    def load(self, precision: str) -> Teacher:
        return unet_teacher(self._info, self._description, self._weights, precision, self.path)

    def warm_start(self) -> dict[str, Tensor]:
        description = self._description
        return with_last_layer_of_x0(
            self._weights, "conv_out.", description.prediction, description.network.state_channels
        )

    def network_weights(self) -> dict[str, Tensor]:
        return self._weights

    def forget(self) -> None:
        self.__dict__.pop("_weights", None)

    @functools.cached_property
    def _info(self) -> TeacherInfo:
        return unet_info(self.path, self._description, self._found.meta.sha256, self.schedule)

    @functools.cached_property
    def _description(self) -> UNetDescription:
        return _described(self.path, self._found.meta.model.values())

    @functools.cached_property
    def _found(self) -> FoundModel:
        found = find_model(self.path, self.endpoint_url)
        found.check_weights()
        return found

    @functools.cached_property
    def _weights(self) -> dict[str, Tensor]:
        return self._found.weights()


def _described(path: str, model: Values) -> UNetDescription:
    """The `model` entry of `meta.json`.

    Raises UserError if it is not a teacher's, or is of a later version.
    """
    if model["kind"] != DENOISER:
        raise UserError(f"{path}: holds a {model['kind']!r} model, not a teacher")
    if model.get("prediction") not in PREDICTIONS or model.get("schedule") != SCHEDULE:
        raise UserError(
            f"{path}: predicts {model.get('prediction')!r} on schedule {model.get('schedule')!r}; "
            f"this version reads {', '.join(PREDICTIONS)} on {SCHEDULE!r}"
        )
    return validate(UNetDescription, model, f"{path}: its model")
