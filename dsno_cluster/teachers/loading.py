"""The doors to a teacher by its path: the network, or what is known without it."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from dsno_cluster.diffusion.predictions import with_last_layer_of_x0
from dsno_cluster.errors import UserError
from dsno_cluster.model_folder import CONFIG, LATEST, META, read_meta, read_model
from dsno_cluster.storage import open_storage, split_path
from dsno_cluster.teachers.closed_forms import closed_form_teacher
from dsno_cluster.teachers.factories import factory_identity, find_factory, teacher_from_factory
from dsno_cluster.teachers.teacher import PRECISIONS, Teacher, TeacherInfo, check_options
from dsno_cluster.teachers.unets import identity_of, load_unet_teacher, read_published, unet_info

if TYPE_CHECKING:
    from torch import Tensor


def load_teacher(
    path: str, endpoint_url: str | None = None, *, precision: str = "float32", **options: Any
) -> Teacher:
    """The teacher at `path`, on CPU. What `path` and `options` may be stands at the top of this package.

    `precision` is that of a network's weights and layers; states, noise levels and x0 stay float32.
    Raises UserError where there is none, and for options that its kind does not take.
    """
    path = str(path)
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is not one of: {', '.join(PRECISIONS)}")
    kind = _kind(path, endpoint_url)
    if kind in ("closed-form", "factory"):
        if precision != "float32":
            raise UserError(f"{path}: precision {precision} is for networks read from files, not a {kind}")
        return (
            closed_form_teacher(path, options)
            if kind == "closed-form"
            else teacher_from_factory(path, options)
        )
    if kind == "diffusers":
        from dsno_cluster.teachers import diffusers_folder

        return diffusers_folder.load(path, endpoint_url, precision, options)
    if kind == "published":
        model, weights = read_published(path, endpoint_url, options)
        return load_unet_teacher(path, model, weights, precision, options.get("schedule"))
    check_options(options, ("schedule",), path)
    folder = read_model(path, endpoint_url)
    identity = identity_of(path, folder.meta)
    return load_unet_teacher(path, identity, folder.weights, precision, options.get("schedule"))


def teacher_info(path: str, endpoint_url: str | None = None, **options: Any) -> TeacherInfo:
    """What is known of the teacher at `path` without building it. `options` are those of `load_teacher`.

    Our own checkpoints are read without their weights; other files are read whole, for their sha256.
    Raises UserError where there is none, and for options that its kind does not take.
    """
    path = str(path)
    options.pop("precision", None)
    kind = _kind(path, endpoint_url)
    if kind == "closed-form":
        teacher = closed_form_teacher(path, options)
        return TeacherInfo(teacher.identity, teacher.shape, teacher.num_classes, teacher.null_class)
    if kind == "factory":
        _, source = find_factory(path)
        return TeacherInfo(factory_identity(path, source, options), None, None)
    if kind == "diffusers":
        from dsno_cluster.teachers import diffusers_folder

        return diffusers_folder.info(path, endpoint_url, options)
    if kind == "published":
        return unet_info(path, read_published(path, endpoint_url, options)[0], options.get("schedule"))
    check_options(options, ("schedule",), path)
    return unet_info(path, identity_of(path, read_meta(path, endpoint_url)), options.get("schedule"))


def warm_start_weights(path: str, endpoint_url: str | None = None, **options: Any) -> dict[str, Tensor]:
    """A U-Net teacher's weights as a student's that answers states: the last layer gives x0 at t=1.

    There x is pure noise, so x0 is the output of a network that predicts x0 (or both: its first half) and
    minus that of one that predicts v; one that predicts eps says nothing of x0, so its last layer is left out.
    Names are those of our U-Net, or of a diffusers teacher's own network (`DiffusersBackbone`).
    Raises UserError for a teacher that is no U-Net.
    """
    kind = _kind(str(path), endpoint_url)
    if kind == "diffusers":
        from dsno_cluster.teachers import diffusers_folder

        return diffusers_folder.warm_start_weights(path, endpoint_url, options)
    if kind == "ours":
        folder = read_model(str(path), endpoint_url)
        model, weights = identity_of(path, folder.meta), folder.weights
    elif kind == "published":
        model, weights = read_published(path, endpoint_url, options)
    else:
        raise UserError(
            f"student.warm_start: the {kind} teacher at {path} is not a U-Net of this project; set student.warm_start=false"
        )
    return with_last_layer_of_x0(weights, "conv_out.", model["prediction"], model["network"]["channels"])


def diffusers_model(path: str, endpoint_url: str | None = None, **options: Any) -> dict[str, Any]:
    """Config and scheduler of a diffusers teacher, from which a student's backbone is built.

    Raises UserError for another kind of teacher.
    """
    kind = _kind(str(path), endpoint_url)
    if kind != "diffusers":
        raise UserError(
            f"student.backbone diffusers: the teacher at {path} is of kind {kind}; take backbone=unet"
        )
    identity = teacher_info(path, endpoint_url, **options).identity
    return {"config": identity["config"], "scheduler": identity["scheduler"]}


def _kind(path: str, endpoint_url: str | None) -> str:
    """ours, diffusers, published, factory or closed-form."""
    if path.startswith("closed-form:"):
        return "closed-form"
    if path.startswith("package:"):
        return "ours"
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", path) and not os.path.exists(path):
        return "factory"
    parent, name = split_path(path)
    if name not in ("", ".", "..") and open_storage(parent, endpoint_url).stat(name) is not None:
        return "published"
    storage = open_storage(path, endpoint_url)
    if storage.stat(META) is not None or storage.stat(LATEST) is not None:
        return "ours"
    if any(storage.stat(key) is not None for key in ("config.json", "unet/config.json", "model_index.json")):
        return "diffusers"
    return "published" if storage.stat(CONFIG) is not None else "ours"
