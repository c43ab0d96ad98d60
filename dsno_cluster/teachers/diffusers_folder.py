"""Teachers from a diffusers folder: a UNet2DModel and its scheduler's discrete noise levels.

A model trained on levels n = 0..N-1 of cumulative signal abar_n (diffusers' alphas_cumprod) can be evaluated
at any log-SNR between log(abar / (1 - abar)) of its first and last level: its timestep n, a real number, is
interpolated linearly in log-SNR. A state outside that range is treated as one at the nearest level: the
network's timestep, and the alpha and sigma that turn its output into x0, are those of that level. So the
network is only used where it was trained, and its output is never divided by an alpha smaller than those it
was trained with.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from dsno_cluster.diffusion.discrete_levels import level_at, noise_levels
from dsno_cluster.diffusion.predictions import clean_images
from dsno_cluster.errors import UserError
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.storage import split_path
from dsno_cluster.teachers.identity import DiffusersIdentity, TeacherIdentity
from dsno_cluster.teachers.teacher import (
    NativeGrid,
    Options,
    Shape,
    Source,
    Teacher,
    TeacherInfo,
    check_options,
    check_schedule,
)
from dsno_cluster.teachers.warm_start import with_last_layer_of_x0
from dsno_cluster.weight_files import (
    check_fit,
    check_safetensors_data,
    disguise,
    parse_safetensors,
)

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
PREDICTIONS = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}
SPACINGS = ("leading", "trailing", "linspace")

# The keys that are read from a scheduler's config, with diffusers' own defaults; each is also an option of
# load_teacher.
SCHEDULER_CONFIG = "scheduler_config.json"
SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
}
OPTIONS = ("schedule", "null_class", "sample_size", *SCHEDULER)

# Names of attention layers in early versions of diffusers, and their names now.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class Folder:
    """A folder as read: the model's `config` and `scheduler` as plain values, the weights' `files` by name."""

    config: dict[str, Any]
    scheduler: dict[str, Any]
    files: dict[str, bytes]
    info: TeacherInfo
    levels: tuple[float, ...]

    @property
    def prediction(self) -> str:
        """What the network predicts: x, eps or v."""
        return PREDICTIONS[self.scheduler["prediction_type"]]


class DiffusersFolder:
    """A folder of `save_pretrained`: a UNet2DModel and its scheduler, by itself or in a pipeline."""

    kind: ClassVar[str] = "diffusers"
    identities: ClassVar[tuple[type[TeacherIdentity], ...]] = (DiffusersIdentity,)

    def __init__(self, source: Source, options: Options) -> None:
        check_options(options, OPTIONS, source.path)
        self.source, self.options = source, options

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return any(source.has(key) for key in ("config.json", "unet/config.json", "model_index.json"))

    @functools.cached_property
    def _folder(self) -> Folder:
        return _read(self.source, self.options)

    def info(self) -> TeacherInfo:
        return self._folder.info

    def load(self, precision: str) -> Teacher:
        import torch

        folder, dtype = self._folder, getattr(torch, precision)
        unet, prediction, levels = _network(folder, self.source.path), folder.prediction, folder.levels
        unet.eval().requires_grad_(False)
        for parameter in unet.parameters():  # not unet.to(dtype), whose warnings do not apply to this model
            parameter.data = parameter.data.to(dtype)

        def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
            timestep_N, alpha, sigma = level_at(levels, t_N)
            images = x.to(dtype)
            if x.is_cuda:  # not on a CPU: the bits of data sets that exist
                images = images.contiguous(memory_format=torch.channels_last)
            output = unet(images, timestep_N.float(), labels, return_dict=False)[0].to(x.dtype)
            scales = (s.to(x.dtype)[:, None, None, None] for s in (alpha, sigma))
            return clean_images(prediction, output, x, *scales)

        return Teacher(folder.info, denoise, unet)

    def warm_start(self) -> dict[str, Tensor]:
        """The weights under the names of a `DiffusersBackbone`."""
        folder = self._folder
        assert folder.info.shape is not None
        network = _network(folder, self.source.path)
        weights = {f"unet.{name}": tensor for name, tensor in network.state_dict().items()}
        return with_last_layer_of_x0(weights, "unet.conv_out.", folder.prediction, folder.info.shape[0])

    def forget(self) -> None:
        self.source.forget()
        self.__dict__.pop("_folder", None)


def _network(folder: Folder, path: str) -> Any:
    """The UNet2DModel with its weights. Raises UserError if the files do not fit this network."""
    from dsno_cluster.networks.diffusers_backbone import unet2d_model

    unet = unet2d_model(folder.config, path)
    weights = {
        _present_name(k): v
        for name, data in folder.files.items()
        for k, v in parse_safetensors(data, f"{path}: {name}").items()
    }
    check_fit(weights, unet.state_dict(), f"{path}: does not fit its config.json")
    unet.load_state_dict(weights)
    return unet


def _read(source: Source, options: Options) -> Folder:
    path = source.path
    prefix = "" if source.has("config.json") else "unet/"
    config = _json(source, f"{prefix}config.json")
    if config is None:
        raise UserError(f"{path}: a diffusers pipeline without unet/config.json is not read here")
    config = {k: v for k, v in config.items() if not k.startswith("_") or k == "_class_name"}
    shape, num_classes, null = _images_and_classes(config, path, options)
    saved = _saved_scheduler(source)
    scheduler = _scheduler(saved, path, options)
    levels = noise_levels(scheduler, path)
    files = _weights(source, prefix)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}
    schedule = check_schedule(options.get("schedule", "continuous"), path)
    identity = DiffusersIdentity(
        sha256=digests[WEIGHTS] if len(digests) == 1 and WEIGHTS in digests else digests,
        config=config,
        scheduler=scheduler,
        shape=shape,
        num_classes=num_classes,
        null_class=null,
    )
    info = TeacherInfo(
        identity,
        shape,
        num_classes,
        null,
        native=_native(scheduler, levels) if schedule == "native" else None,
        clips=bool(saved and (saved.get("clip_sample") or saved.get("thresholding"))),
        backbone=DiffusersModel(config=config, scheduler=scheduler),
    )
    return Folder(config, scheduler, files, info, levels)


def _present_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def _json(source: Source, key: str) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    data = source.read(key)
    if data is None:
        return None
    try:
        content = json.loads(data)
    except ValueError as error:
        problem = disguise(data) or f"not JSON: {error}"
        raise UserError(f"{source.storage.url}/{key}: {problem}") from None
    if not isinstance(content, dict):
        raise UserError(f"{source.storage.url}/{key}: holds {type(content).__name__}, not an object")
    return content


def _images_and_classes(config: dict[str, Any], path: str, options: Options) -> tuple[Shape, int, int | None]:
    """Shape, number of classes without the null class, and the null class."""
    expected = {"_class_name": "UNet2DModel", "time_embedding_type": "positional", "class_embed_type": None}
    for key, right in expected.items():
        if config.get(key, right) != right:
            raise UserError(f"{path}: {key} {config[key]!r} is not supported, only {right!r}")
    channels, out = config.get("in_channels", 3), config.get("out_channels", 3)
    if channels != out:
        raise UserError(f"{path}: {channels} channels in, {out} out: a learned variance is not supported")
    size = options.get("sample_size", config.get("sample_size"))
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if not (type(height) is int and type(width) is int and height > 0 and width > 0):
        raise UserError(f"{path}: sample_size {size!r} is no image size; give option sample_size=")
    embeddings, null = config.get("num_class_embeds") or 0, options.get("null_class")
    if null is not None and (embeddings < 2 or null != embeddings - 1):
        raise UserError(
            f"{path}: null_class {null!r}: the model has {embeddings} class embeddings; the null class must be the last "
            f"of them{f', {embeddings - 1}' if embeddings > 1 else ''}"
        )
    return (channels, height, width), embeddings - (null is not None), null


def _saved_scheduler(source: Source) -> dict[str, Any] | None:
    """The scheduler's config as it was saved, or None."""
    found = _json(source, f"scheduler/{SCHEDULER_CONFIG}") or _json(source, SCHEDULER_CONFIG)
    parent, last = split_path(source.path)
    if found is None and last == "unet":  # the unet folder of a pipeline
        found = _json(Source(parent, source.endpoint_url), f"scheduler/{SCHEDULER_CONFIG}")
    return found


def _scheduler(found: dict[str, Any] | None, path: str, options: Options) -> dict[str, Any]:
    """The values of SCHEDULER: options first, then the scheduler's config as it was saved, then diffusers' defaults."""
    if found is None and not {"prediction_type", "beta_schedule"} <= options.keys():
        raise UserError(
            f"{path}: has no {SCHEDULER_CONFIG}, here or in scheduler/; save it there (scheduler.save_pretrained), or give "
            "'teacher.options={prediction_type: epsilon, beta_schedule: linear}' as the model was trained"
        )
    found = found or {}
    if found.get("rescale_betas_zero_snr"):
        raise UserError(f"{path}: rescale_betas_zero_snr true is not supported")
    if "beta_schedule" not in {**found, **options}:
        raise UserError(f"{path}: {found.get('_class_name', 'its scheduler')} has no beta_schedule")
    values = {key: options.get(key, found.get(key, default)) for key, default in SCHEDULER.items()}
    choices = {"prediction_type": tuple(PREDICTIONS), "timestep_spacing": SPACINGS}
    for key, allowed in choices.items():
        if values[key] not in allowed:
            raise UserError(f"{path}: {key} {values[key]!r} is not one of: {', '.join(allowed)}")
    if type(values["num_train_timesteps"]) is not int or values["num_train_timesteps"] < 2:
        raise UserError(f"{path}: num_train_timesteps {values['num_train_timesteps']!r} must be 2 or more")
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def _weights(source: Source, prefix: str) -> dict[str, bytes]:
    """The safetensors files, one or several with an index. Raises UserError for pickles and missing parts."""
    path, index = source.path, _json(source, f"{prefix}{WEIGHTS}.index.json")
    names = [WEIGHTS]
    if index is not None:
        names = sorted({str(name) for name in index.get("weight_map", {}).values()})
        if not names or any("/" in name or not name.endswith(".safetensors") for name in names):
            raise UserError(f"{path}: {WEIGHTS}.index.json names files that are not safetensors beside it")
    files = {}
    for name in names:
        data = source.read(prefix + name)
        if data is None:
            pickles = [s.key for s in source.storage.list(prefix) if s.key.endswith((".bin", ".pt", ".ckpt"))]
            if pickles:
                raise UserError(
                    f"{path}: {pickles[0]} is a pickle, which may run code when read; save the model as safetensors"
                )
            raise UserError(f"{path}: no weights: {source.storage.url}/{prefix}{name}: no such file")
        check_safetensors_data(data, f"{path}: {prefix}{name}")
        files[name] = data
    return files


def _native(scheduler: dict[str, Any], levels: tuple[float, ...]) -> NativeGrid:
    """The times of the model's own DDIM steps, as diffusers' DDIMScheduler takes them, then 0.

    If the scheduler sets set_alpha_to_one to false, it returns the state at the model's first level, and the
    grid passes through that level before 0. (diffusers' DDIM steps by N // steps even if `linspace`, or a
    `trailing` spacing that does not divide N, puts the next timestep elsewhere; here each step ends where the
    next begins.)
    """
    from dsno_cluster.diffusion.schedule import time_of_angle

    count, offset = len(levels), scheduler["steps_offset"]

    def time(n: int) -> float:
        return time_of_angle(math.atan(math.exp(-levels[n] / 2)))

    def grid(steps: int) -> tuple[float, ...]:
        if not 1 <= steps <= count:
            raise ValueError(f"{steps} steps, but the model has {count} levels of its own; take fewer")
        if scheduler["timestep_spacing"] == "leading":
            timesteps = [i * (count // steps) + offset for i in reversed(range(steps))]
        elif scheduler["timestep_spacing"] == "trailing":
            timesteps = [round(count - i * count / steps) - 1 for i in range(steps)]
        else:
            timesteps = [round(i * (count - 1) / max(steps - 1, 1)) for i in reversed(range(steps))]
        if timesteps[0] >= count:
            raise ValueError(f"{steps} steps with steps_offset {offset} go beyond the {count} levels")
        if not scheduler["set_alpha_to_one"] and timesteps[-1] > 0:
            timesteps.append(0)
        return (*(time(n) for n in timesteps), 0.0)

    return grid
