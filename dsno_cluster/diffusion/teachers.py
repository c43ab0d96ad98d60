"""Teachers: pretrained denoisers behind one interface, `teacher(x, t, labels) -> x0`.

`load_teacher(path, **options)` is the door. What `path` is decides the kind:

    a folder or URL of ours      model.safetensors, config.yaml, meta.json; package:NAME for one that ships
    a diffusers folder           a UNet2DModel, alone or in a pipeline folder (`diffusers_folder.py`)
    a flax msgpack file          a published progressive-distillation teacher, with `config=PUBLISHED.yaml`;
                                 or the folder of such a file and its config.yaml (`models/importers.py`)
    package.module:function      a Python factory, called with the options
    closed-form:gaussian         options mean, std, shape
    closed-form:mixture          options means, stds, shape, weights, classes, null_class

`teacher_info` is what can be known without building the network; its `identity` is what a trajectory spec
records: everything about the teacher that can change a byte. Importing this module does not import torch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsno_cluster.config import Network, validate
from dsno_cluster.errors import UserError
from dsno_cluster.models.importers import (
    PREDICTIONS,
    out_channels,
    read_object,
    read_published_teacher,
    recognise,
)
from dsno_cluster.models.weights import (
    CONFIG,
    LATEST,
    META,
    read_meta,
    read_model,
    split_path,
)
from dsno_cluster.storage import open_storage

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dsno_cluster.models.unet import UNet

KIND = "denoiser"
PRECISIONS = ("float32", "bfloat16", "float16")

# A model whose meta says that it has at most so many steps was distilled to them, and knows no other levels.
MOST_DISTILLED_STEPS = 128

Shape = tuple[int, int, int]
NativeGrid = Callable[[int], tuple[float, ...]]


@dataclass(frozen=True)
class TeacherInfo:
    """What is known of a teacher without its network: the fields of `Teacher` by the same names.

    `shape` and `num_classes` are None for a Python factory, which tells them once it is called.
    """

    identity: dict[str, Any]
    shape: Shape | None
    num_classes: int | None
    null_class: int | None = None
    native: NativeGrid | None = None
    num_steps: int | None = None

    def native_grid(self, steps: int) -> tuple[float, ...] | None:
        """See `Teacher.native_grid`."""
        return None if self.native is None else self.native(steps)

    @property
    def distilled(self) -> bool:
        """See `Teacher.distilled`."""
        return _distilled(self.num_steps)


@dataclass(frozen=True)
class Teacher:
    """A denoiser. `shape` is (C, H, W); `null_class` is the label that means none, where there is one.

    `num_steps` is set where its native grid has that one number of steps, whatever number is asked for.
    """

    denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    shape: Shape
    num_classes: int
    null_class: int | None
    identity: dict[str, Any]
    network: nn.Module | None = None
    native: NativeGrid | None = field(default=None, repr=False)
    num_steps: int | None = None

    @property
    def device(self) -> torch.device:
        import torch

        cpu = torch.device("cpu")
        return next((p.device for p in self.network.parameters()), cpu) if self.network else cpu

    def to(self, device: torch.device) -> Teacher:
        """This teacher with its network moved to `device`."""
        if self.network is not None:
            self.network.to(device)
        return self

    def native_grid(self, steps: int) -> tuple[float, ...] | None:
        """The cosine times of the teacher's own solver steps, descending to 0; None: any grid will do.

        A teacher with `num_steps` has those, whatever `steps` says. The first time may lie below 1: the noise
        is then the state at the teacher's noisiest level. Raises ValueError for more steps than it has levels.
        """
        return None if self.native is None else self.native(steps)

    @property
    def distilled(self) -> bool:
        """Whether each step of the native grid is one DDIM step of the network, and no other solver's."""
        return _distilled(self.num_steps)

    def __call__(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """Noisy images (N, C, H, W) at time t (a float, a 0-d tensor or (N,)) -> clean images x0, unclipped.

        `t` is the cosine time: 0 is data, 1 pure noise. `labels` are int64 (N,) in 0..num_classes-1, or
        `null_class`. Without labels a teacher with a null class answers unconditionally. Raises ValueError
        where labels are missing or not wanted.
        """
        import torch

        if labels is None and self.null_class is not None:
            labels = torch.full((len(x),), self.null_class, device=x.device)
        if (labels is None) != (self.num_classes == 0):
            raise ValueError(
                f"this teacher has {self.num_classes} classes; labels given: {labels is not None}"
            )
        t_N = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x))
        with torch.no_grad():
            return self.denoise(x, t_N, labels)


def _distilled(num_steps: int | None) -> bool:
    return num_steps is not None and num_steps <= MOST_DISTILLED_STEPS


# ---- doors -------------------------------------------------------------------------------------------------


def load_teacher(
    path: str, endpoint_url: str | None = None, *, precision: str = "float32", **options: Any
) -> Teacher:
    """The teacher at `path`, on CPU. What `path` and `options` may be stands at the top of this module.

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
        return _closed_form(path, options) if kind == "closed-form" else _from_factory(path, options)
    if kind == "diffusers":
        from dsno_cluster.diffusion import diffusers_folder

        return diffusers_folder.load(path, endpoint_url, precision, options)
    if kind == "published":
        model, weights = _published(path, endpoint_url, options)
        return _unet_teacher_of(path, model, weights, precision, options.get("schedule"))
    _only(options, ("schedule",), path)
    folder = read_model(path, endpoint_url)
    identity = _identity(path, folder.meta)
    return _unet_teacher_of(path, identity, folder.weights, precision, options.get("schedule"))


def teacher_info(path: str, endpoint_url: str | None = None, **options: Any) -> TeacherInfo:
    """What is known of the teacher at `path` without building it. `options` are those of `load_teacher`.

    Our own checkpoints are read without their weights; other files are read whole, for their sha256.
    Raises UserError where there is none, and for options that its kind does not take.
    """
    path = str(path)
    options.pop("precision", None)
    kind = _kind(path, endpoint_url)
    if kind == "closed-form":
        teacher = _closed_form(path, options)
        return TeacherInfo(teacher.identity, teacher.shape, teacher.num_classes, teacher.null_class)
    if kind == "factory":
        _, source = _find_factory(path)
        identity = {"kind": "factory", "name": path, "source_sha256": source, "options": _plain(options)}
        return TeacherInfo(identity, None, None)
    if kind == "diffusers":
        from dsno_cluster.diffusion import diffusers_folder

        return diffusers_folder.info(path, endpoint_url, options)
    if kind == "published":
        return _unet_info(path, _published(path, endpoint_url, options)[0], options.get("schedule"))
    _only(options, ("schedule",), path)
    return _unet_info(path, _identity(path, read_meta(path, endpoint_url)), options.get("schedule"))


def teacher_identity(path: str, endpoint_url: str | None = None, **options: Any) -> dict[str, Any]:
    """`teacher_info(...).identity`: what a trajectory spec records of the teacher at `path`."""
    return teacher_info(path, endpoint_url, **options).identity


def check_fits(network: Network, teacher: TeacherInfo | Teacher, path: str) -> None:
    """Raises UserError unless a teacher's images and classes, as far as they are known, are the network's."""
    if teacher.shape is None:
        return
    channels, height, width = teacher.shape
    if height != width:
        raise UserError(f"{path}: its images are {height}x{width}; only square ones are supported here")
    theirs = {
        "image_size": height,
        "channels": channels,
        "num_classes": teacher.num_classes,
        "null_class": teacher.null_class is not None,
    }
    for key, value in theirs.items():
        if getattr(network, key) != value:
            raise UserError(
                f"network.{key}: the config says {getattr(network, key)}, the teacher at {path} has {value}"
            )


def warm_start_weights(path: str, endpoint_url: str | None = None, **options: Any) -> dict[str, Tensor]:
    """A U-Net teacher's weights as a student's that answers states: the last layer gives x0 at t=1.

    There x is pure noise, so x0 is the output of a network that predicts x0 (or both: its first half) and
    minus that of one that predicts v; one that predicts eps says nothing of x0, so its last layer is left out.
    Names are those of our U-Net, or of a diffusers teacher's own network (`DiffusersBackbone`).
    Raises UserError for a teacher that is no U-Net.
    """
    kind = _kind(str(path), endpoint_url)
    if kind == "diffusers":
        from dsno_cluster.diffusion import diffusers_folder

        return diffusers_folder.warm_start_weights(path, endpoint_url, options)
    if kind == "ours":
        folder = read_model(str(path), endpoint_url)
        model, weights = _identity(path, folder.meta), folder.weights
    elif kind == "published":
        model, weights = _published(path, endpoint_url, options)
    else:
        raise UserError(
            f"student.warm_start: the {kind} teacher at {path} is not a U-Net of this project; set student.warm_start=false"
        )
    return with_last_layer_of_x0(weights, "conv_out.", model["prediction"], model["network"]["channels"])


def with_last_layer_of_x0(
    weights: dict[str, Tensor], last_layer: str, prediction: str, channels: int
) -> dict[str, Tensor]:
    """The weights with the last layer, named `last_layer`, turned to give x0 at t=1; without it for eps."""
    last = {name: tensor for name, tensor in weights.items() if name.startswith(last_layer)}
    others = {name: tensor for name, tensor in weights.items() if name not in last}
    if prediction == "eps":
        return others
    sign = -1 if prediction == "v" else 1
    return others | {name: sign * tensor[:channels] for name, tensor in last.items()}


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


def _only(options: dict[str, Any], allowed: Sequence[str], path: str) -> None:
    """Raises UserError for an option that is not among `allowed`."""
    for name in options:
        if name not in allowed:
            raise UserError(
                f"{path}: unknown teacher option {name}; this kind takes {', '.join(allowed) or 'none'}"
            )


def _plain(value: Any) -> Any:
    """Options as JSON has them: tuples and sequences become lists."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


# ---- U-Nets: our own checkpoints and published ones ---------------------------------------------------------


def describe(network: Network, prediction: str = "v") -> dict[str, Any]:
    """What `meta.json` says under `model` of a U-Net teacher; `prediction` is x, eps, v or both."""
    return {
        "kind": KIND,
        "network": network.model_dump(mode="json"),
        "prediction": prediction,
        "schedule": "cosine",
    }


def _identity(path: str, meta: dict[str, Any]) -> dict[str, Any]:
    model = meta["model"]
    if model["kind"] != KIND:
        raise UserError(f"{path}: holds a {model['kind']!r} model, not a teacher")
    if model.get("prediction") not in PREDICTIONS or model.get("schedule") != "cosine":
        raise UserError(
            f"{path}: predicts {model.get('prediction')!r} on schedule {model.get('schedule')!r}; "
            f"this version reads {', '.join(PREDICTIONS)} on 'cosine'"
        )
    return {**model, "sha256": meta["sha256"]}


def _unet_info(path: str, identity: dict[str, Any], schedule: str | None) -> TeacherInfo:
    network = validate(Network, identity["network"], f"{path}: its network")
    steps = identity.get("num_steps")
    schedule = schedule or ("native" if _distilled(steps) else "continuous")
    if schedule not in ("native", "continuous"):
        raise UserError(f"{path}: schedule {schedule!r} is not one of: native, continuous")
    if schedule == "native" and steps is None:
        raise UserError(f"{path}: schedule native: its meta names no num_steps of its own; leave it out")
    null = network.num_classes if network.null_class else None
    shape = (network.channels, network.image_size, network.image_size)
    if schedule == "continuous" or steps is None:
        return TeacherInfo(identity, shape, network.num_classes, null)
    grid = uniform_grid(steps)
    return TeacherInfo(identity, shape, network.num_classes, null, lambda _: grid, steps)


def uniform_grid(steps: int) -> tuple[float, ...]:
    """`steps` equal intervals from t=1 to t=0."""
    return tuple((steps - i) / steps for i in range(steps + 1))


def _published(
    path: str, endpoint_url: str | None, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Identity and weights of a published checkpoint: a file with option `config`, or the folder of both."""
    _only(options, ("config", "schedule"), path)
    parent, name = split_path(path)
    is_file = open_storage(parent, endpoint_url).stat(name) is not None
    config = options.get("config")
    if is_file and config is None:
        raise UserError(f"{path}: is a file; give the published YAML of this checkpoint as option config=")
    if not is_file:
        config = config or f"{path.rstrip('/')}/{CONFIG}"
        path = f"{path.rstrip('/')}/{_only_checkpoint(path, endpoint_url)}"
    data, text = read_object(path, endpoint_url), read_object(str(config), endpoint_url)
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


def _unet_teacher_of(
    path: str, identity: dict[str, Any], weights: dict[str, Tensor], precision: str, schedule: str | None
) -> Teacher:
    import torch

    from dsno_cluster.models.unet import UNet

    info = _unet_info(path, identity, schedule)
    network = validate(Network, identity["network"], f"{path}: its network")
    unet = UNet(network, out_channels=out_channels(identity["prediction"], network.channels))
    unet.load_state_dict(weights)
    unet.to(memory_format=torch.channels_last)
    unet.eval().requires_grad_(False)
    teacher = unet_teacher(unet, network, identity, precision=precision)
    return replace(teacher, native=info.native, num_steps=info.num_steps)


def unet_teacher(
    unet: UNet,
    network: Network,
    identity: dict[str, Any],
    *,
    precision: str = "float32",
) -> Teacher:
    """A U-Net as a teacher; `identity["prediction"]` says what it predicts, v where it says nothing."""
    import torch

    from dsno_cluster.diffusion.schedule import alpha_sigma, logsnr

    dtype, prediction = getattr(torch, precision), identity.get("prediction", "v")
    unet.to(dtype)

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = (s.to(x.dtype)[:, None, None, None] for s in alpha_sigma(t_N))
        output = unet(x.to(dtype), logsnr(t_N).float()[:, None], labels)[:, 0].to(x.dtype)
        return clean_images(prediction, output, x, alpha, sigma)

    null = network.num_classes if network.null_class else None
    shape = (network.channels, network.image_size, network.image_size)
    return Teacher(denoise, shape, network.num_classes, null, identity, unet)


def clean_images(prediction: str, output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x0 from a network's output; `alpha` and `sigma` broadcast over the images.

    v = alpha eps - sigma x0. `both` (Salimans & Ho 2022, section 4) is 2C channels, x0 then eps, weighted
    sigma^2 and alpha^2: sigma^2 x0 + alpha^2 (x - sigma eps) / alpha.
    """
    if prediction == "x":
        return output
    if prediction == "v":
        return alpha * x - sigma * output
    if prediction == "eps":
        return (x - sigma * output) / alpha
    direct, eps = output.chunk(2, dim=1)
    return sigma**2 * direct + alpha * (x - sigma * eps)


# ---- Python factories --------------------------------------------------------------------------------------


def _find_factory(path: str) -> tuple[str, str]:
    """Module name and the sha256 of its source; the working directory is searched last. Imports only parents."""
    module, _, _ = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: cannot be imported: {error}") from None
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise UserError(f"{path}: there is no Python module {module} here or installed, and no such folder")
    return module, hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def _from_factory(path: str, options: dict[str, Any]) -> Teacher:
    """Call `package.module:function` with the options. The result answers (x, t, labels) with x0.

    It has the attributes shape (C, H, W) and num_classes, and may have null_class, native_grid(steps), and
    network, where it is not itself a torch module.
    """
    from torch import nn

    module, source = _find_factory(path)
    name = path.partition(":")[2]
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise UserError(f"{path}: cannot be imported: {error}") from None
    if not callable(function):
        raise UserError(f"{path}: {module} has no function {name}")
    try:
        inspect.signature(function).bind(**options)
    except TypeError as error:
        raise UserError(f"{path}: does not take the teacher options {sorted(options)}: {error}") from None
    made = function(**options)
    shape, classes = getattr(made, "shape", None), getattr(made, "num_classes", None)
    numbers = tuple(shape) if isinstance(shape, Sequence) else ()
    if not callable(made) or len(numbers) != 3 or not all(type(n) is int and n > 0 for n in numbers):
        raise UserError(f"{path}: must return a callable with shape (C, H, W), found shape {shape!r}")
    if type(classes) is not int or classes < 0:
        raise UserError(f"{path}: must return a callable with num_classes, 0 or more, found {classes!r}")

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        x0: Tensor = made(x, t_N, labels)
        if x0.shape != x.shape:
            raise UserError(f"{path}: answered shape {tuple(x0.shape)} for images {tuple(x.shape)}")
        return x0.to(x.dtype)

    network = made if isinstance(made, nn.Module) else getattr(made, "network", None)
    identity = {"kind": "factory", "name": path, "source_sha256": source, "options": _plain(options)}
    null = getattr(made, "null_class", None)
    return Teacher(
        denoise,
        (numbers[0], numbers[1], numbers[2]),
        classes,
        null,
        identity,
        network,
        getattr(made, "native_grid", None),
    )


# ---- closed forms ------------------------------------------------------------------------------------------


def _closed_form(path: str, options: dict[str, Any]) -> Teacher:
    doors: dict[str, Callable[..., Teacher]] = {"gaussian": gaussian_teacher, "mixture": mixture_teacher}
    name = path.removeprefix("closed-form:")
    if name not in doors:
        raise UserError(f"{path}: is not one of: {', '.join(f'closed-form:{x}' for x in doors)}")
    signature = inspect.signature(doors[name])
    _only(options, list(signature.parameters), path)
    missing = [
        p.name for p in signature.parameters.values() if p.default is p.empty and p.name not in options
    ]
    if missing:
        raise UserError(f"{path}: needs the teacher options {', '.join(missing)}")
    shape = options["shape"]
    if not isinstance(shape, Sequence) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise UserError(f"{path}: option shape must be [C, H, W], found {shape!r}")
    try:
        return doors[name](**{**options, "shape": tuple(shape)})
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None


def gaussian_teacher(mean: float, std: float, shape: Shape) -> Teacher:
    """The exact denoiser of data N(mean, std^2 I): its trajectories are known, `gaussian_trajectory`.

    x0 = (alpha std^2 x + sigma^2 mean) / (alpha^2 std^2 + sigma^2)
    """
    _check_numbers("mean", [mean])
    _check_numbers("std", [std], least=0.0)

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = _scales(t_N, x)
        return (alpha * std**2 * x + sigma**2 * mean) / (alpha**2 * std**2 + sigma**2)

    identity = {"kind": "gaussian", "mean": mean, "std": std, "shape": list(shape)}
    return Teacher(denoise, shape, 0, None, identity)


def gaussian_trajectory(noise: Tensor, t: float, mean: float, std: float) -> Tensor:
    """The exact state at time t of the probability flow of N(mean, std^2 I) from `noise` at t=1."""
    from dsno_cluster.diffusion.schedule import alpha_sigma

    def scale(time: float) -> float:
        alpha, sigma = alpha_sigma(time)
        return float((alpha**2 * std**2 + sigma**2).sqrt())

    alpha_1, alpha_t = float(alpha_sigma(1.0)[0]), float(alpha_sigma(t)[0])
    return alpha_t * mean + (scale(t) / scale(1.0)) * (noise - alpha_1 * mean)


def mixture_teacher(
    means: Sequence[Any],
    stds: float | Sequence[float],
    shape: Shape,
    weights: Sequence[float] | None = None,
    classes: Sequence[int] | None = None,
    null_class: bool = False,
) -> Teacher:
    """The exact denoiser of data drawn from sum_k weights[k] N(means[k], stds[k]^2 I).

    A mean is a number (all pixels alike) or nested lists of `shape`; `weights` default to equal ones.
    `classes[k]` is the class of component k: a label then leaves only its own components, and with
    `null_class` the label max(classes)+1 means all of them.

    x0 = sum_k r_k(x) (alpha s_k^2 x + sigma^2 m_k) / (alpha^2 s_k^2 + sigma^2), with responsibilities r_k in
    proportion to weights[k] N(x; alpha m_k, (alpha^2 s_k^2 + sigma^2) I), in float64.

    Raises ValueError for lists that do not fit together.
    """
    count = len(means)
    spread = list(stds) if isinstance(stds, Sequence) else [stds] * count
    shares = [1.0] * count if weights is None else list(weights)
    members = [0] * count if classes is None else list(classes)
    if not count or not len(spread) == len(shares) == len(members) == count:
        raise ValueError(
            f"mixture: {count} means, {len(spread)} stds, {len(shares)} weights, {len(members)} classes"
        )
    _check_numbers("stds", spread, least=0.0)
    _check_numbers("weights", shares, least=0.0)
    num_classes = 0 if classes is None else max(members) + 1
    if sorted(set(members)) != list(range(max(members) + 1)) or (null_class and classes is None):
        raise ValueError(f"mixture: classes {members} must count from 0 without gaps; null_class needs them")
    if min(sum(w for w, c in zip(shares, members, strict=True) if c == k) for k in set(members)) <= 0:
        raise ValueError("mixture: every class needs a component of weight above 0")
    flat = [_flat_mean(mean, shape) for mean in means]

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        import torch

        def made(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.float64, device=x.device)

        x_NP, means_KP, variance_K = x.double().flatten(1), made(flat), made(spread) ** 2
        alpha, sigma = (s[:, None] for s in (_scales(t_N, x_NP)))  # (N, 1)
        total_NK = alpha**2 * variance_K + sigma**2
        distance_NK = (x_NP[:, None] - alpha[:, :, None] * means_KP).square().sum(-1)
        log_NK = made(shares).log() - 0.5 * (distance_NK / total_NK + x_NP.shape[1] * total_NK.log())
        if labels is not None:
            theirs = made(members)[None] == labels[:, None]
            log_NK = log_NK.masked_fill(~(theirs | (labels == num_classes)[:, None]), -math.inf)
        r_NK = log_NK.softmax(-1)
        x_share = (r_NK * alpha * variance_K / total_NK).sum(-1, keepdim=True)
        return (x_share * x_NP + (r_NK * sigma**2 / total_NK) @ means_KP).reshape(x.shape).to(x.dtype)

    identity = {
        "kind": "mixture",
        "means": _plain(means),
        "stds": spread,
        "shape": list(shape),
        "weights": shares,
        "classes": None if classes is None else members,
        "null_class": null_class,
    }
    return Teacher(denoise, shape, num_classes, num_classes if null_class else None, identity)


def _flat_mean(mean: Any, shape: Shape) -> list[float]:
    """A mean, (C, H, W) nested lists or one number, as C*H*W numbers."""

    def flatten(value: Any) -> list[float]:
        return [n for v in value for n in flatten(v)] if isinstance(value, (list, tuple)) else [value]

    numbers, size = flatten(mean), math.prod(shape)
    _check_numbers("means", numbers)
    if len(numbers) not in (1, size):
        raise ValueError(f"mixture: a mean has {len(numbers)} numbers, expected 1 or {size}")
    return numbers * size if len(numbers) == 1 else numbers


def _check_numbers(name: str, values: Sequence[Any], least: float = -math.inf) -> None:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"{name}: {value!r} is not a number")
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"{name}: {value} must be finite{'' if math.isinf(least) else ', 0 or more'}")


def _scales(t_N: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma (N,), shaped to multiply images, in the dtype of `like`; flat (N,) for flat `like`."""
    from dsno_cluster.diffusion.schedule import alpha_sigma

    shape = (-1, *[1] * (like.ndim - 1)) if like.ndim > 2 else (-1,)
    alpha, sigma = alpha_sigma(t_N)
    return alpha.to(like.dtype).reshape(shape), sigma.to(like.dtype).reshape(shape)
