"""The student: the solution operator of the sampling ODE, from noise to states, in one evaluation.

Load one with `load_student(path)`, then call `student.sample(noise, labels)` or `student.trajectory(noise,
labels)`. Its `operator` is the way in which the network depends on time:

    convolution   as published: the backbone is evaluated at M time points, which temporal convolutions mix
    series        the backbone is evaluated once; its last layer gives the coefficients of a cosine series in time

Its `prediction` is the meaning of the last layer: the state itself, as published, or `data`, the clean image
F at which the chord from the noise through the state points, x_t = alpha_t F + sigma_t x_1. The form `data`
contains x_1 by construction, F hardly changes with t, and at t = 0 it is the state: the network's output is
not multiplied by the sigma that vanishes there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from dsno_cluster.config import Network, StudentConfig, too_many_modes, validate
from dsno_cluster.config.base import Strict
from dsno_cluster.device import autocast_to
from dsno_cluster.diffusion.discrete_levels import ascending_levels
from dsno_cluster.diffusion.preconditioning import middles_of_levels
from dsno_cluster.diffusion.schedule import alpha_sigma, logsnr, logsnr_at, same_time, time_points
from dsno_cluster.errors import UserError
from dsno_cluster.files import shown_path
from dsno_cluster.model_folder import META, ModelDescription, ModelMeta, read_model
from dsno_cluster.networks.activations import largest_tensor, samples_at_a_time, shape_of
from dsno_cluster.networks.backbones import Backbone
from dsno_cluster.networks.diffusers_backbone import DiffusersBackbone
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.networks.dropout import DropoutSwitch
from dsno_cluster.networks.recompute import recompute_in_backward
from dsno_cluster.networks.teacher_backbone import TeacherBackbone
from dsno_cluster.networks.temporal import cosine_series, fourier_basis
from dsno_cluster.networks.unet import UNet
from dsno_cluster.torch_internals import compile_in_place, uncompiled
from dsno_cluster.weight_files import check_fit

KIND: Literal["dsno"] = "dsno"
FINEST = 16  # a published-form student is evaluated on grids of at most this many times its own points

FEW_PARAMETERS = 10_000_000


@dataclass(frozen=True)
class Form:
    """How a student depends on time: see the top of this module.

    `modes`: Fourier modes of the convolutions (0: no convolutions), or terms of the series. `points`: whether
    the convolutions were trained on `all` time points together, and must be evaluated that way, or on `drawn`
    ones, and can be evaluated at any subset, even a single point.
    """

    modes: int
    operator: str = "convolution"
    prediction: str = "state"
    points: str = "all"

    @property
    def points_apart(self) -> bool:
        """Whether any set of times can be evaluated by itself, without the other points."""
        return self.operator == "series" or self.points == "drawn" or self.modes == 0


def form_of(student: StudentConfig) -> Form:
    """The form that a config asks for."""
    return Form(student.modes, student.operator, student.prediction, student.points)


class StudentModel(Strict):
    """The `model` entry of a student's `meta.json`: enough to build its network again.

    It is our U-Net of `network`, or a teacher's: `backbone`, or `diffusers` as `student.backbone=diffusers` has it.
    """

    kind: Literal["dsno"] = KIND
    network: Network
    modes: int
    operator: Literal["convolution", "series"] = "convolution"
    prediction: Literal["state", "data"] = "state"
    points: Literal["all", "drawn"] = "all"
    times: tuple[float, ...]
    diffusers: DiffusersModel | None = None
    backbone: Backbone | None = None

    @property
    def form(self) -> Form:
        return Form(self.modes, self.operator, self.prediction, self.points)


def student_model(meta: ModelMeta, where: str) -> StudentModel:
    """The description of a student in `meta.json`.

    Raises UserError if it describes another kind of model, or none.
    """
    if meta.model.kind != KIND:
        raise UserError(f"{shown_path(where)}: holds a {meta.model.kind!r} model, not a student")
    return validate(StudentModel, meta.model.values(), f"{where}/{META}: model")


class DSNO(DropoutSwitch):
    """The solution operator of the probability-flow ODE (Zheng et al. 2023), for states of `network`'s shape.

    The network is our U-Net unless `backbone` describes another one: a teacher's. `init` is that of the temporal
    convolutions. With `precision` bfloat16 or float16 it runs in autocast; states remain float32.
    """

    def __init__(
        self,
        network: Network,
        form: Form,
        times: Sequence[float],
        *,
        backbone: Backbone | DiffusersModel | None = None,
        init: str = "published",
    ) -> None:
        super().__init__()
        self.network, self.form, self.described = network, form, backbone
        self.times = tuple(float(t) for t in times)
        series = form.operator == "series"
        if problem := too_many_modes(form.operator, form.modes, len(self.times)):
            raise ValueError(problem)
        self.precision = "float32"
        self.compiled_only: Callable[[int, int], bool] | None = None
        self.graphs = False
        channels = network.state_channels
        modes, out_channels = (0, form.modes * channels) if series else (form.modes, channels)
        if backbone is None:
            self.backbone: nn.Module = UNet(network, modes, out_channels, init)
        elif isinstance(backbone, DiffusersModel):
            self.backbone = DiffusersBackbone(backbone, modes=modes, out_channels=out_channels, init=init)
        else:
            self.backbone = TeacherBackbone(
                backbone, channels, modes=modes, out_channels=out_channels, dropout=network.dropout, init=init
            )

    def forward(
        self, noise_NCHW: Tensor, labels_N: Tensor | None = None, points: Sequence[int] | None = None
    ) -> Tensor:
        """Noise (N, C, H, W) at t=1 -> states (N, M, C, H, W) at `self.times`, or only at its `points`."""
        times = self.times if points is None else tuple(self.times[i] for i in points)
        return self._states(noise_NCHW, labels_N, times)

    @torch.no_grad()
    def trajectory(
        self, noise: Tensor, labels: Tensor | None = None, times: Sequence[float] | None = None
    ) -> Tensor:
        """States at `times` (default: the model's own), (N, M, C, H, W), in the noise's dtype.

        A series can be evaluated at any time in [0, 1], convolutions at the model's own times and between
        them: see `docs/operator.md`. Raises ValueError for a time at which the model has no state, naming
        those it has, and for labels that are missing or out of range.
        """
        if times is None:
            return self._in_parts(noise, labels, self.times)
        asked = tuple(_nearest(float(t), self.times) for t in times)
        if not asked or not all(0.0 <= t <= 1.0 for t in asked):
            raise ValueError(f"times {list(asked)} must be one or more, each within [0, 1]")
        if self.form.operator == "series":
            return self._in_parts(noise, labels, asked)
        together = self._together(asked)
        states = self._in_parts(noise, labels, together)
        return states if together == asked else states[:, [together.index(t) for t in asked]]

    @torch.no_grad()
    def sample(self, noise: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images from noise in one evaluation, (N, C, H, W): the last state, in [-1, 1] up to overshoot."""
        if self.form.points_apart:
            return self._in_parts(noise, labels, self.times[-1:])[:, 0]
        return self._in_parts(noise, labels, self.times, last_only=True)[:, 0]

    def warm_start(self, teacher: dict[str, Tensor]) -> None:
        """Start from a teacher's weights: those of its own network, if that is the backbone, or of our U-Net's layers.

        They become a series' constant term: at first every state is one DDIM step of the teacher from the
        noise. Raises UserError for tensors that the backbone does not have.
        """
        if isinstance(self.backbone, TeacherBackbone):
            self.backbone.start_from(teacher)
        else:
            _start_from(self.backbone, teacher)

    def accelerate(
        self,
        *,
        precision: str = "float32",
        compile: bool = False,
        only: Callable[[int, int], bool] | None = None,
        graphs: bool = False,
    ) -> DSNO:
        """This student with its network run in `precision` (float32, or autocast in a half one) and, if asked, compiled.

        It is compiled for each shape; with `only`, those of a number of images and of time points for which that is true.
        `graphs`: a GPU replays the compiled passes as CUDA graphs.
        """
        self.precision, self.compiled_only, self.graphs = precision, only, graphs
        if compile:
            compile_in_place(self.backbone, graphs=graphs)
        return self

    @property
    def is_small(self) -> bool:
        """Whether a GPU would wait for the launches of its kernels."""
        return sum(p.numel() for p in self.parameters()) < FEW_PARAMETERS

    def recompute(self, what: str) -> DSNO:
        """This student with activation checkpointing, as `training.recompute` names it."""
        recompute_in_backward(self.backbone, what)
        return self

    def describe(self) -> ModelDescription:
        """The `model` entry of `meta.json`, enough to build the network again (`StudentModel`)."""
        known = {
            "network": self.network,
            **asdict(self.form),
            "times": self.times,
            "diffusers": self.described if isinstance(self.described, DiffusersModel) else None,
            "backbone": self.described if isinstance(self.described, Backbone) else None,
        }
        model = StudentModel.model_validate(known)
        left_out = {name for name in ("diffusers", "backbone") if getattr(model, name) is None}
        return ModelDescription.model_validate(model.model_dump(mode="json", exclude=left_out))

    def _in_parts(
        self, noise: Tensor, labels: Tensor | None, times: tuple[float, ...], last_only: bool = False
    ) -> Tensor:
        """`_states` of so few samples at a time that no tensor inside the network has 2^31 elements."""
        points = 1 if self.form.operator == "series" else len(times)
        most = samples_at_a_time(self._largest * points, len(noise))
        if len(noise) <= most:
            return self._states(noise, labels, times, last_only)
        if labels is not None and len(labels) != len(noise):
            labels = self._checked(labels, len(noise), noise.device)  # raises
        parts = [
            self._states(
                noise[i : i + most], None if labels is None else labels[i : i + most], times, last_only
            )
            for i in range(0, len(noise), most)
        ]
        return torch.cat(parts)

    @functools.cached_property
    def _largest(self) -> int:
        """Elements of the largest tensor that a sample makes in the network at each point; 1 if that is not known."""
        terms = self.form.modes if self.form.operator == "series" else 1
        shape = shape_of(self.described or self.network, self.network.sides)
        return 1 if shape is None else largest_tensor(shape, terms * self.network.state_channels)

    def _states(
        self, noise: Tensor, labels: Tensor | None, times: tuple[float, ...], last_only: bool = False
    ) -> Tensor:
        """States at `times`, computed together, (N, M, C, H, W).

        Only the last, (N, 1, C, H, W), if `last_only`.
        """
        device, dtype = noise.device, noise.dtype
        if tuple(noise.shape[1:]) != self.network.state_shape:
            raise ValueError(
                f"noise must be (N, {', '.join(map(str, self.network.state_shape))}), found {tuple(noise.shape)}"
            )
        labels = self._checked(labels, len(noise), device)
        x = noise.to(next(self.backbone.parameters()).dtype)  # bfloat16 if the whole network is
        points = 1 if self.form.operator == "series" else len(times)
        wanted = self.compiled_only is None or self.compiled_only(len(noise), points)
        network = self.backbone if wanted else uncompiled(self.backbone)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        output: Tensor
        with autocast_to(self.precision, device):
            if self.form.operator == "series":
                output = network(x, self._levels((1.0,), device), labels)
            else:
                bases = self._bases(times, last_only, device, x.dtype)
                output = network(x, self._levels(times, device), labels, *bases)
        output = output.to(dtype, copy=self.graphs)  # the next replay of a graph writes into the same memory
        if self.form.operator == "series":
            coefficients_NKX = output.reshape(len(noise), self.form.modes, -1)
            output = _series(times, self.form.modes, device, dtype) @ coefficients_NKX
            output = output.reshape(len(noise), len(times), *noise.shape[1:])
        elif last_only:
            output, times = output[:, -1:], times[-1:]
        if self.form.prediction == "data":
            alpha_M, sigma_M = _scales(times, device, dtype)
            output = alpha_M * output + sigma_M * noise[:, None]
        return output.contiguous()

    def _levels(self, times: tuple[float, ...], device: torch.device) -> Tensor:
        """The noise levels at `times` as the backbone counts them, (1, M) float32."""
        if isinstance(self.described, Backbone):
            known = self.described.times
            return _row(tuple(known.at(logsnr_at(t)) for t in times), device)
        return _logsnrs(times, device)

    def _bases(
        self, times: tuple[float, ...], last_only: bool, device: torch.device, dtype: torch.dtype
    ) -> Any:
        """The Fourier bases of all temporal convolutions and of the last one; nothing if there are none."""
        if not self.form.modes:
            return ()
        own = len(self.times)
        phases = tuple(self._phase(t) for t in times)
        nyquist = own // 2 if own % 2 == 0 else None
        make = functools.partial(fourier_basis, phases, self.form.modes, nyquist, device=device, dtype=dtype)
        return make(), make(wanted=(len(times) - 1,)) if last_only else None

    def _spacing(self) -> str | None:
        """quadratic or uniform, if the model's times are such a grid."""
        if len(self.times) == 1:
            return None
        own = torch.tensor(self.times)
        names = ("uniform", "quadratic")
        return next((n for n in names if torch.allclose(torch.tensor(time_points(n, len(own))), own)), None)

    def _phase(self, time: float) -> float:
        """Where `time` lies on the period of the Fourier modes; the model's own times at 0, 1/M, 2/M, ...

        A grid of M points that starts at phase 0 ends one interval before the period does. The missing
        interval, which closes the circle, is the first one in time, from pure noise.
        """
        own = len(self.times)
        if time in self.times:
            return self.times.index(time) / own
        root = time if self._spacing() == "uniform" else time**0.5
        return (1.0 - root - 1.0 / own) % 1.0

    def _together(self, asked: tuple[float, ...]) -> tuple[float, ...]:
        """The times that must be computed together to evaluate `asked`.

        Raises ValueError if there are none.
        """
        spacing, own = self._spacing(), len(self.times)
        if self.form.points_apart and (spacing or set(asked) <= set(self.times)) and max(asked) < 1.0:
            return tuple(sorted(set(asked), reverse=True))
        if set(asked) <= set(self.times):
            return self.times
        for factor in range(2, FINEST + 1) if spacing else ():
            finer = time_points(cast(str, spacing), factor * own)
            finer = tuple(_nearest(_nearest(t, asked), self.times) for t in finer)
            if set(asked) <= set(finer):
                return finer
        between = f", and on the {spacing} grids of 2 to {FINEST} times as many points" if spacing else ""
        if spacing and self.form.points == "drawn":
            between = ", and any others in [0, 1)"
        strangers = [t for t in asked if t not in self.times]
        raise ValueError(f"times {strangers} are not among those of this model: {list(self.times)}{between}")

    def _checked(self, labels_N: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """The labels on `device`. They are checked where they are: on the CPU, nothing waits for a GPU."""
        classes = self.network.num_classes
        if (labels_N is None) != (classes == 0):
            raise ValueError(
                f"this model has {classes} classes: {'labels are needed' if classes else 'it takes no labels'}"
            )
        if labels_N is None:
            return None
        if labels_N.shape != (count,):
            raise ValueError(
                f"labels must be {count}, one for each noise, found shape {tuple(labels_N.shape)}"
            )
        if count and not 0 <= int(labels_N.min()) <= int(labels_N.max()) < classes:
            raise ValueError(
                f"labels must lie in 0..{classes - 1}, found {int(labels_N.min())}..{int(labels_N.max())}"
            )
        return labels_N.to(device, non_blocking=True)


@torch.no_grad()
def _start_from(backbone: nn.Module, teacher: dict[str, Tensor]) -> None:
    """Copy tensors whose last layer gives x0 at t=1 (`teachers.warm_start`); those that are not given stay."""
    own = backbone.state_dict()
    for name, tensor in teacher.items():
        rows = len(tensor)
        fits = name in own and own[name].shape[1:] == tensor.shape[1:]
        grown = name.split(".")[-2] == "conv_out" and fits and len(own[name]) % rows == 0
        if not grown and not (fits and len(own[name]) == rows):
            found = "no such tensor" if name not in own else f"{tuple(own[name].shape)}"
            raise UserError(
                f"student.warm_start: the teacher has {name} {tuple(tensor.shape)}, the student of this config {found}; "
                "take over the teacher's network (student.backbone=teacher), or set student.warm_start=false"
            )
        own[name].zero_()
        own[name][:rows] = tensor
    backbone.load_state_dict(own)


def _nearest(time: float, times: Sequence[float]) -> float:
    """The one of `times` that equals `time` up to rounding, else `time` itself."""
    return next((t for t in times if same_time(t, time)), time)


# Tensors that depend only on times are computed once per set of times, device and dtype; never as inference
# tensors, which a later training step could not use.


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _logsnrs(times: tuple[float, ...], device: torch.device) -> Tensor:
    return logsnr(torch.tensor(times, dtype=torch.float64)).to(device, torch.float32)[None]


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _row(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(device, torch.float32)[None]


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _scales(times: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """alpha and sigma, each (M, 1, 1, 1)."""
    alpha, sigma = alpha_sigma(torch.tensor(times, dtype=torch.float64))
    return alpha.to(device, dtype)[:, None, None, None], sigma.to(device, dtype)[:, None, None, None]


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _series(times: tuple[float, ...], modes: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return cosine_series(times, modes).to(device, dtype)


@contextlib.contextmanager
def forgetting_time_tensors() -> Iterator[None]:
    """In this context the tensors above, the Fourier bases and the teachers' levels are made anew, and are forgotten at its end.

    It is for passes on pretended tensors, whose values must not reach a real one.
    """
    kept = (_logsnrs, _row, _scales, _series, fourier_basis, ascending_levels, middles_of_levels)
    for made in kept:
        made.cache_clear()
    try:
        yield
    finally:
        for made in kept:
            made.cache_clear()


def load_student(
    path: str,
    endpoint_url: str | None = None,
    *,
    ema: float | None = None,
    sha256: str | None = None,
    precision: str = "float32",
    compile: bool = False,
) -> DSNO:
    """The student of a run folder (its `latest`), a step folder or an import folder, on CPU, for inference.

    `ema` is the decay of the moving average to load, if it was trained with several (default: the first of
    them). `precision` (float32, bfloat16) and `compile` are those of `DSNO.accelerate`. Raises UserError if
    the folder holds no such student, and WorkError if `sha256` is given and its weights have another one.
    """
    folder = read_model(str(path), endpoint_url, ema, sha256)
    model = student_model(folder.meta, str(path))
    student = DSNO(model.network, model.form, model.times, backbone=model.backbone or model.diffusers)
    check_fit(folder.weights, student.state_dict(), f"{path}: its weights do not fit its {META}")
    student.load_state_dict(folder.weights)
    student.to(memory_format=torch.channels_last)  # not in training: DeepSpeed needs contiguous weights
    return student.eval().requires_grad_(False).accelerate(precision=precision, compile=compile)
