"""Teachers with an exact denoiser in closed form: a Gaussian and a mixture of Gaussians."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from dsno_cluster.errors import UserError
from dsno_cluster.teachers.facts import ALL_SIGMAS, PREDICTED, Facts
from dsno_cluster.teachers.identity import GaussianIdentity, MixtureIdentity, TeacherIdentity
from dsno_cluster.teachers.teacher import (
    Options,
    Shape,
    Source,
    Teacher,
    TeacherInfo,
    check_options,
    only_float32,
    plain,
)
from dsno_cluster.teachers.warm_start import no_network, no_unet

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "closed-form:"


class ClosedForm:
    """`closed-form:gaussian` and `closed-form:mixture`.

    The options are the arguments of the function of that name.
    """

    kind: ClassVar[str] = "closed-form"
    identities: ClassVar[tuple[type[TeacherIdentity], ...]] = (GaussianIdentity, MixtureIdentity)

    def __init__(self, source: Source, options: Options) -> None:
        """Raises UserError for another name and for options that do not fit."""
        self.path = source.path
        self.teacher = _closed_form(source.path, options)

    @classmethod
    def recognises(cls, source: Source) -> bool:
        return source.path.startswith(PREFIX)

    def info(self) -> TeacherInfo:
        return self.teacher.info

    def facts(self) -> Facts:
        name = self.path.removeprefix(PREFIX)
        return Facts(f"the exact denoiser of a {name}", PREDICTED["x"], "every level", sigmas=ALL_SIGMAS)

    def load(self, precision: str) -> Teacher:
        only_float32(precision, self.path, self.kind)
        return self.teacher

    def warm_start(self) -> dict[str, Tensor]:
        raise no_unet(self.path, self.kind)

    def network_weights(self) -> dict[str, Tensor]:
        raise no_network(self.path, self.kind)

    def forget(self) -> None:
        """Nothing is kept."""


def _closed_form(path: str, options: Options) -> Teacher:
    doors: dict[str, Callable[..., Teacher]] = {"gaussian": gaussian_teacher, "mixture": mixture_teacher}
    name = path.removeprefix(PREFIX)
    if name not in doors:
        raise UserError(f"{path}: is not one of: {', '.join(f'{PREFIX}{x}' for x in doors)}")
    signature = inspect.signature(doors[name])
    check_options(options, list(signature.parameters), path)
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
    """The exact denoiser of data N(mean, std^2 I); its exact trajectories are `gaussian_trajectory`.

    x0 = (alpha std^2 x + sigma^2 mean) / (alpha^2 std^2 + sigma^2)
    """
    _check_numbers("mean", [mean])
    _check_numbers("std", [std], least=0.0)

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = _scales(t_N, x)
        return (alpha * std**2 * x + sigma**2 * mean) / (alpha**2 * std**2 + sigma**2)

    identity = GaussianIdentity(mean=mean, std=std, shape=shape)
    return Teacher(TeacherInfo(identity, shape, 0), denoise)


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

    A mean is a number (the same for all pixels) or nested lists of `shape`; `weights` default to equal ones.
    `classes[k]` is the class of component k: a label then selects only its own components, and with
    `null_class` the label max(classes)+1 selects all of them.

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

    identity = MixtureIdentity(
        means=plain(list(means)),
        stds=spread,
        shape=shape,
        weights=shares,
        classes=None if classes is None else members,
        null_class=null_class,
    )
    null = num_classes if null_class else None
    return Teacher(TeacherInfo(identity, shape, num_classes, null), denoise)


def _flat_mean(mean: Any, shape: Shape) -> list[float]:
    """A mean, given as (C, H, W) nested lists or one number, as C*H*W numbers."""

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
