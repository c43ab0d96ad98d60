"""Progressive distillation's teachers (Salimans & Ho 2022) as published: a flax file and its YAML."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, ClassVar

from dsno_cluster.errors import UserError
from dsno_cluster.files import shown_path
from dsno_cluster.model_folder import CONFIG, META
from dsno_cluster.storage import open_storage, read_file, split_path
from dsno_cluster.students.published_format import recognise
from dsno_cluster.teachers.facts import Facts
from dsno_cluster.teachers.flax_teachers import read_published_teacher
from dsno_cluster.teachers.identity import TeacherIdentity, UNetDescription, UNetIdentity
from dsno_cluster.teachers.teacher import Options, Source, Teacher, TeacherInfo, check_options
from dsno_cluster.teachers.unet_denoiser import unet_facts, unet_info, unet_teacher
from dsno_cluster.teachers.warm_start import with_last_layer_of_x0
from dsno_cluster.weight_files import HEAD, NotWeights, disguise

if TYPE_CHECKING:
    from torch import Tensor


class PublishedFile:
    """A flax file, with its YAML as option `config`, or a folder with such a file and its config.yaml."""

    kind: ClassVar[str] = "published"
    identities: ClassVar[tuple[type[TeacherIdentity], ...]] = (UNetIdentity,)

    def __init__(self, source: Source, options: Options) -> None:
        check_options(options, ("config", "schedule"), source.path)
        self.source, self.options = source, options

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.is_file or source.has(CONFIG)

    def info(self) -> TeacherInfo:
        description, _, sha256 = self._read
        return unet_info(self.source.path, description, sha256, self.options.get("schedule"))

    def facts(self) -> Facts:
        return unet_facts(self._read[0])

    def load(self, precision: str) -> Teacher:
        description, weights, _ = self._read
        return unet_teacher(self.info(), description, weights, precision, self.source.path)

    def warm_start(self) -> dict[str, Tensor]:
        description, weights, _ = self._read
        return with_last_layer_of_x0(
            weights, "conv_out.", description.prediction, description.network.state_channels
        )

    def network_weights(self) -> dict[str, Tensor]:
        return self._read[1]

    def forget(self) -> None:
        self.source.forget()
        self.__dict__.pop("_read", None)

    @functools.cached_property
    def _read(self) -> tuple[UNetDescription, dict[str, Tensor], str]:
        """The network's description, its weights, and the sha256 of the file."""
        path, endpoint_url = self.source.path, self.source.endpoint_url
        config = self.options.get("config")
        if self.source.is_file and config is None:
            raise _config_is_needed(path, endpoint_url)
        if not self.source.is_file:
            config = config or f"{path.rstrip('/')}/{CONFIG}"
            path = f"{path.rstrip('/')}/{_only_checkpoint(path, endpoint_url)}"
        data, text = read_file(path, endpoint_url), read_file(str(config), endpoint_url)
        teacher = read_published_teacher(data, path, text, str(config))
        return teacher.description, teacher.weights, hashlib.sha256(data).hexdigest()


def _config_is_needed(path: str, endpoint_url: str | None) -> UserError:
    """Why a file, given without a published YAML, is no teacher: it needs one, or is only a part of a folder."""
    parent, name = split_path(path)
    head = open_storage(parent, endpoint_url).read(name, 0, HEAD)
    if not name.endswith((".json", ".yaml")) and (problem := disguise(head)):
        return NotWeights(f"{path}: {problem}")
    if recognise(head) == "flax":
        return UserError(f"{path}: is a file; give the published YAML of this checkpoint as option config=")
    return UserError(
        f"{path}: is a file, and a teacher is the folder with its weights and its config: name {shown_path(parent)}"
    )


def _only_checkpoint(path: str, endpoint_url: str | None) -> str:
    """The only file of a folder that is a flax msgpack checkpoint by its content.

    Raises UserError if not exactly one is.
    """
    storage = open_storage(path, endpoint_url)
    keys = [s.key for s in storage.list("") if "/" not in s.key]
    heads = {key: storage.read(key, 0, 512) for key in keys}
    found = [key for key, head in heads.items() if recognise(head) == "flax"]
    if not found:
        for key, head in heads.items():
            if "." not in key and (problem := disguise(head)):  # as the published checkpoints are named
                raise NotWeights(f"{path}: {key} {problem}")
    if len(found) != 1:
        raise UserError(
            f"{path}: holds {len(found) or 'no'} flax checkpoints beside its {CONFIG}, one is needed"
            + (f": {', '.join(found)}" if found else f" (or a model's {META}); it holds {', '.join(keys)}")
        )
    return found[0]
