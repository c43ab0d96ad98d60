"""Teachers from a diffusers folder: a UNet2DModel in pixels or a DiT in latents, used as its scheduler says.

What a folder is, its files say: `model_index.json`, the model's config, the scheduler's, and the autoencoder beside them.
Options add what no file says.

    diffusers_files.py       finds and reads the files
    diffusers_networks.py    the models
    diffusers_schedulers.py  the scheduler classes as one table
    diffusers_schedules.py   a scheduler's config and the options as a schedule
    diffusers_denoisers.py   a network on a schedule as a denoiser
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from dsno_cluster.errors import UserError
from dsno_cluster.networks.backbones import Backbone, DiffusersTransformer, DiffusersUNet
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.teachers import diffusers_networks, diffusers_schedules
from dsno_cluster.teachers.backbones import of_levels, of_scalings
from dsno_cluster.teachers.decoders import KIND, MOST_COLOURS, Decoder, decoder_of
from dsno_cluster.teachers.diffusers_denoisers import denoiser, scalings_of
from dsno_cluster.teachers.diffusers_files import (
    EMA,
    Parts,
    Weights,
    find_parts,
    is_folder_of_diffusers,
    read_weights,
)
from dsno_cluster.teachers.diffusers_networks import UNET, Model, read_model
from dsno_cluster.teachers.diffusers_schedules import Schedule, read_schedule
from dsno_cluster.teachers.facts import Facts, number_of_parameters
from dsno_cluster.teachers.identity import DiffusersIdentity, TeacherIdentity
from dsno_cluster.teachers.teacher import (
    Options,
    Source,
    Teacher,
    TeacherInfo,
    check_options,
    check_schedule,
)
from dsno_cluster.teachers.warm_start import no_unet, with_last_layer_of_x0

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = ("schedule", "ema", *diffusers_networks.OPTIONS, *diffusers_schedules.OPTIONS)


@dataclass(frozen=True)
class Folder:
    """A folder as read."""

    info: TeacherInfo
    model: Model
    schedule: Schedule
    weights: Weights


class DiffusersFolder:
    """A folder of `save_pretrained`: a model and its scheduler, by themselves or in a pipeline."""

    kind: ClassVar[str] = "diffusers"
    identities: ClassVar[tuple[type[TeacherIdentity], ...]] = (DiffusersIdentity,)

    def __init__(self, source: Source, options: Options) -> None:
        check_options(options, OPTIONS, source.path)
        self.source, self.options = source, options

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return is_folder_of_diffusers(source)

    @functools.cached_property
    def _folder(self) -> Folder:
        return _read(self.source, self.options)

    def _network(self) -> Any:
        """The network with its weights, float32."""
        folder = self._folder
        tensors = folder.weights.tensors(self.source.path)
        return diffusers_networks.build(folder.model, tensors, self.source.path)

    def info(self) -> TeacherInfo:
        return self._folder.info

    def facts(self) -> Facts:
        folder = self._folder
        model, schedule = folder.model, folder.schedule
        parameters = number_of_parameters(lambda: diffusers_networks.network_of(model, self.source.path))
        native = None if isinstance(schedule.native, str) else schedule.native
        steps = 1 if schedule.distilled else 50
        return replace(schedule.facts(model.kind), parameters=parameters, native=native, steps=steps)

    def load(self, precision: str) -> Teacher:
        import torch

        folder, dtype, network = self._folder, getattr(torch, precision), self._network()
        network.eval().requires_grad_(False)
        for (
            parameter
        ) in network.parameters():  # not network.to(dtype), whose warnings do not apply to this model
            parameter.data = parameter.data.to(dtype)
        return Teacher(folder.info, denoiser(network, folder.schedule, dtype), network)

    def warm_start(self) -> dict[str, Tensor]:
        """The weights under the names of a `DiffusersBackbone`."""
        folder = self._folder
        if folder.info.diffusers is None:
            raise no_unet(self.source.path, self.kind)
        weights = {f"unet.{name}": tensor for name, tensor in self._network().state_dict().items()}
        return with_last_layer_of_x0(
            weights, "unet.conv_out.", folder.schedule.prediction, folder.model.shape[0]
        )

    def network_weights(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._network().state_dict()
        return state

    def forget(self) -> None:
        self.source.forget()
        self.__dict__.pop("_folder", None)


def _read(source: Source, options: Options) -> Folder:
    path = source.path
    parts = find_parts(source, options.get("ema"))
    schedule = read_schedule(parts.scheduler, options, path)
    config = {k: v for k, v in parts.config.items() if not k.startswith("_") or k == "_class_name"}
    model = read_model(config, options, schedule.kind, path)
    _check_supported(model, parts, path)
    decoder = decoder_of(parts.autoencoder, source, model.shape[0]) if parts.autoencoder else None
    weights = read_weights(source, parts.prefix)
    identity = DiffusersIdentity(
        sha256=weights.sha256,
        config=config,
        scheduler=schedule.values,
        shape=model.shape,
        num_classes=model.num_classes,
        null_class=model.null_class,
    )
    former = schedule.former_values
    if model.config.get("attn_norm_num_groups", 0) is None:
        model = diffusers_networks.completed(model, weights.tensors(path))
    on_betas = model.kind == UNET and schedule.kind == "betas"
    info = TeacherInfo(
        identity,
        model.shape,
        model.num_classes,
        model.null_class,
        clips=schedule.clips,
        backbone=_backbone(model, schedule),
        diffusers=DiffusersModel(config=model.config, scheduler=schedule.values) if on_betas else None,
        former_identities=(identity.model_copy(update={"scheduler": former}),) if former else (),
        has_network=True,
        decoder=decoder,
        latent=parts.autoencoder is not None or model.shape[0] > MOST_COLOURS,
        notes=_notes(weights, parts, decoder),
    )
    return Folder(_with_steps(info, schedule, options, path), model, schedule, weights)


def _backbone(model: Model, schedule: Schedule) -> Backbone | None:
    kind = DiffusersUNet if model.kind == UNET else DiffusersTransformer
    network = kind(settings=model.config)
    if schedule.kind == "betas":
        return of_levels(network, schedule.levels, schedule.prediction)
    return of_scalings(network, *scalings_of(schedule))


def _with_steps(info: TeacherInfo, schedule: Schedule, options: Options, path: str) -> TeacherInfo:
    """Its own steps, if they are asked for. A consistency model has one and no other."""
    chosen = check_schedule(options.get("schedule", "native" if schedule.distilled else "continuous"), path)
    if schedule.distilled and chosen == "continuous":
        raise UserError(
            f"{path}: schedule continuous, but a consistency model gives the end of the trajectory in one step, and no other "
            "point of it; leave schedule out"
        )
    if chosen == "continuous":
        return info
    if isinstance(schedule.native, str):
        raise UserError(f"{path}: schedule native: {schedule.native}; leave schedule out")
    return replace(info, native=schedule.native, num_steps=1 if schedule.distilled else None)


def _check_supported(model: Model, parts: Parts, path: str) -> None:
    """Raises UserError for a model of texts, and for a U-Net whose latents nothing here decodes."""
    if parts.text:
        raise UserError(
            f"{path}: is conditioned on text (it has {parts.text}); only classes are supported as conditions"
        )
    if parts.autoencoder and model.kind == UNET and parts.autoencoder.class_name != KIND:
        raise UserError(
            f"{path}: is a latent diffusion model: its states are latents of {parts.autoencoder.folder}/ "
            f"({parts.autoencoder.class_name}), not images, and only {KIND} is supported as a decoder"
        )


def _notes(weights: Weights, parts: Parts, decoder: Decoder | None) -> tuple[str, ...]:
    notes = []
    if weights.variant:
        notes.append(
            f"the teacher's weights are those of variant {weights.variant}; no float32 ones are there"
        )
    if parts.autoencoder:
        found = parts.autoencoder
        what = f"the teacher's states are latents of {found.folder}/ ({found.class_name})"
        here = f", whose files are not there: teacher.decoder names an {KIND}" if decoder is None else ""
        if found.has_files and decoder is None:
            here = f", and only {KIND} is supported as a decoder: teacher.decoder names one"
        notes.append(what + here)
    if parts.prefix == f"{EMA}/":
        notes.append(f"the teacher's weights are the moving average in {EMA}/")
    return tuple(notes)
