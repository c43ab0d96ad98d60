"""U-Net teachers: our own checkpoints and published ones."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from dsno_cluster.config import Network, validate
from dsno_cluster.diffusion.predictions import PREDICTIONS, clean_images, out_channels
from dsno_cluster.errors import UserError
from dsno_cluster.model_folder import CONFIG, META, ModelMeta
from dsno_cluster.storage import open_storage, read_file, split_path
from dsno_cluster.students.published_format import recognise
from dsno_cluster.teachers.flax_teachers import read_published_teacher
from dsno_cluster.teachers.identity import KIND
from dsno_cluster.teachers.teacher import (
    Teacher,
    TeacherInfo,
    check_options,
    check_schedule,
    is_distilled,
)

if TYPE_CHECKING:
    from torch import Tensor


def identity_of(path: str, meta: ModelMeta) -> dict[str, Any]:
    """The identity of a checkpoint of ours, from its `meta.json`. Raises UserError where that is no teacher's."""
    model = meta.model.values()
    if model["kind"] != KIND:
        raise UserError(f"{path}: holds a {model['kind']!r} model, not a teacher")
    if model.get("prediction") not in PREDICTIONS or model.get("schedule") != "cosine":
        raise UserError(
            f"{path}: predicts {model.get('prediction')!r} on schedule {model.get('schedule')!r}; "
            f"this version reads {', '.join(PREDICTIONS)} on 'cosine'"
        )
    return {**model, "sha256": meta.sha256}


def unet_info(path: str, identity: dict[str, Any], schedule: str | None) -> TeacherInfo:
    """What is known of a U-Net teacher. `schedule` None: its own steps where it was distilled to few.

    Raises UserError for an unknown schedule, and for native where the teacher names no steps of its own.
    """
    network = validate(Network, identity["network"], f"{path}: its network")
    if network.missing_sizes:
        raise UserError(f"{path}: its network has no {', '.join(network.missing_sizes)}")
    steps = identity.get("num_steps")
    schedule = check_schedule(schedule or ("native" if is_distilled(steps) else "continuous"), path)
    if schedule == "native" and steps is None:
        raise UserError(f"{path}: schedule native: its meta names no num_steps of its own; leave it out")
    null = network.num_classes if network.null_class else None
    shape = network.image_shape
    if schedule == "continuous" or steps is None:
        return TeacherInfo(identity, shape, network.num_classes, null)
    grid = uniform_grid(steps)
    return TeacherInfo(identity, shape, network.num_classes, null, lambda _: grid, steps)


def uniform_grid(steps: int) -> tuple[float, ...]:
    """`steps` equal intervals from t=1 to t=0."""
    return tuple((steps - i) / steps for i in range(steps + 1))


def read_published(
    path: str, endpoint_url: str | None, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Identity and weights of a published checkpoint: a file with option `config`, or the folder of both."""
    check_options(options, ("config", "schedule"), path)
    parent, name = split_path(path)
    is_file = open_storage(parent, endpoint_url).stat(name) is not None
    config = options.get("config")
    if is_file and config is None:
        raise UserError(f"{path}: is a file; give the published YAML of this checkpoint as option config=")
    if not is_file:
        config = config or f"{path.rstrip('/')}/{CONFIG}"
        path = f"{path.rstrip('/')}/{_only_checkpoint(path, endpoint_url)}"
    data, text = read_file(path, endpoint_url), read_file(str(config), endpoint_url)
    teacher = read_published_teacher(data, path, text, str(config))
    return {**teacher.model, "sha256": hashlib.sha256(data).hexdigest()}, teacher.weights


def _only_checkpoint(path: str, endpoint_url: str | None) -> str:
    """The one file of a folder that is a flax msgpack checkpoint by its content."""
    storage = open_storage(path, endpoint_url)
    keys = [s.key for s in storage.list("") if "/" not in s.key]
    found = [key for key in keys if recognise(storage.read(key, 0, 4)) == "flax"]
    if len(found) != 1:
        raise UserError(
            f"{path}: holds {len(found) or 'no'} flax checkpoints beside its {CONFIG}, one is needed"
            + (f": {', '.join(found)}" if found else f" (or a model's {META}); it holds {', '.join(keys)}")
        )
    return found[0]


def load_unet_teacher(
    path: str, identity: dict[str, Any], weights: dict[str, Tensor], precision: str, schedule: str | None
) -> Teacher:
    """The teacher of these weights, on CPU. `schedule`: native, continuous or None, as in `unet_info`."""
    import torch

    from dsno_cluster.diffusion.schedule import alpha_sigma, logsnr
    from dsno_cluster.networks.unet import UNet

    info = unet_info(path, identity, schedule)
    network = validate(Network, identity["network"], f"{path}: its network")
    dtype, prediction = getattr(torch, precision), identity["prediction"]
    unet = UNet(network, out_channels=out_channels(prediction, network.channels))
    unet.load_state_dict(weights)
    unet.to(memory_format=torch.channels_last)
    unet.eval().requires_grad_(False).to(dtype)

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = (s.to(x.dtype)[:, None, None, None] for s in alpha_sigma(t_N))
        output = unet(x.to(dtype), logsnr(t_N).float()[:, None], labels)[:, 0].to(x.dtype)
        return clean_images(prediction, output, x, alpha, sigma)

    return Teacher(
        denoise,
        network.image_shape,
        network.num_classes,
        info.null_class,
        identity,
        unet,
        info.native,
        info.num_steps,
    )
