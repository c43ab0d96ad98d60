"""Guidance: a denoiser moved away from another one, which knows less. Pure functions of denoisers.

x0 = other + scale (x0(label) - other). The other is the same network without a class (classifier-free guidance, Ho &
Salimans 2022, eq. 6) or a weaker network (autoguidance, Karras et al. 2024b, eq. 3).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from dsno_cluster.diffusion.schedule import logsnr, noise_level

if TYPE_CHECKING:
    from torch import Tensor

    Time = float | Tensor  # the cosine time of all samples, or that of each, (N,)
    Denoiser = Callable[[Tensor, Time], Tensor]  # (x_NCHW, t) -> predicted clean x0, the shape of x

# relative: a level that differs from an end of the interval by rounding counts as equal to it
LEVEL_TOLERANCE = 1e-6


class TeacherLike(Protocol):
    def __call__(self, x: Tensor, t: Time, labels: Tensor | None = None) -> Tensor: ...


@dataclass(frozen=True)
class Guidance:
    """How a denoiser is guided; scale 1 is the conditional denoiser itself.

    `interval` (low, high): guided only at noise levels sigma / alpha above `low` and up to `high` (Kynkaanniemi et al. 2024,
    eq. 5); elsewhere the scale is 1, and one evaluation is enough. `channels`: only so many first channels are guided, and
    the others are those of the label, as in the sampling code of DiT and SiT. `joint`: the two evaluations of
    classifier-free guidance are one batch of 2N samples, which is faster on a GPU and may differ in the last bits.
    """

    scale: float = 1.0
    interval: tuple[float, float] | None = None
    channels: int | None = None
    joint: bool = False

    def acts(self, t: float) -> bool:
        """Whether x0 at cosine time `t` is guided, and so costs two evaluations."""
        if self.scale == 1.0:
            return False
        if self.interval is None:
            return True
        low, high = self._ends(self.interval)
        return low < noise_level(t) <= high

    def combine_where_it_acts(self, x0: Tensor, other: Tensor, t_N: Tensor) -> Tensor:
        """`combine` for the samples that are guided at their own cosine times; the others keep the denoiser's `x0`."""
        guided = self.combine(x0, other)
        if self.interval is None:
            return guided
        low, high = self._ends(self.interval)
        level_N = (-0.5 * logsnr(t_N)).exp().to(x0.device)
        return guided.where(((low < level_N) & (level_N <= high))[:, None, None, None], x0)

    def _ends(self, interval: tuple[float, float]) -> tuple[float, float]:
        low, high = (end * (1.0 + LEVEL_TOLERANCE) for end in interval)
        return low, high

    def combine(self, x0: Tensor, other: Tensor) -> Tensor:
        """The guided x0 (N, C, H, W) of the denoiser's `x0` and the `other`'s."""
        guided = other + self.scale * (x0 - other)
        if self.channels is None:
            return guided
        import torch

        return torch.cat([guided[:, : self.channels], x0[:, self.channels :]], dim=1)


UNGUIDED = Guidance()


def check_guidance(guidance: Guidance) -> None:
    """Raises ValueError for an interval that is none, a number of channels below 1, and for either without guidance."""
    interval, channels = guidance.interval, guidance.channels
    if interval is not None and not 0.0 <= interval[0] < interval[1]:
        raise ValueError(
            f"guidance_interval {list(interval)} must be [low, high] in noise level sigma, with 0 <= low < high"
        )
    if channels is not None and channels < 1:
        raise ValueError(f"guidance_channels {channels} must be 1 or more")
    named = [
        name
        for name, value in (("guidance_interval", interval), ("guidance_channels", channels))
        if value is not None
    ]
    if named and guidance.scale == 1.0:
        raise ValueError(f"{named[0]} has no effect with guidance_scale 1, which guides nothing")


def guided(teacher: TeacherLike, labels: Tensor | None, guidance: Guidance) -> Denoiser:
    """The teacher as a denoiser of (x, t), guided by its `guide` if it has one (see `Teacher`), else by its null class.

    `t` is one cosine time for all samples, or that of each, (N,); then guidance costs two evaluations of all samples, of
    which an interval guides those at levels within it. A guide is evaluated with the same labels, or without any if it has no
    classes. Raises ValueError for guidance of a teacher that has no guide and either no null class or no labels to leave out.
    """
    check_guidance(guidance)

    def plain(x: Tensor, t: Time) -> Tensor:
        return teacher(x, t, labels)

    if guidance.scale == 1.0:
        return plain
    import torch

    both = _by_guide(teacher, labels) or _by_null_class(teacher, labels, guidance)

    def denoise(x: Tensor, t: Time) -> Tensor:
        if isinstance(t, torch.Tensor) and t.ndim == 1:
            return guidance.combine_where_it_acts(*both(x, t), t)
        time = float(t)
        return guidance.combine(*both(x, time)) if guidance.acts(time) else plain(x, time)

    return denoise


Both = Callable[["Tensor", "Time"], "tuple[Tensor, Tensor]"]  # (x_NCHW, t) -> the denoiser's x0, the other's


def _by_guide(teacher: TeacherLike, labels: Tensor | None) -> Both | None:
    guide = getattr(teacher, "guide", None)
    if guide is None:
        return None
    known = labels if guide.num_classes else None
    return lambda x, t: (teacher(x, t, labels), guide(x, t, known))


def _by_null_class(teacher: TeacherLike, labels: Tensor | None, guidance: Guidance) -> Both:
    import torch

    null_class = getattr(teacher, "null_class", None)
    if labels is None or null_class is None:
        raise ValueError(f"guidance_scale {guidance.scale} needs labels and a teacher with a null class")
    nulls = labels.new_full(labels.shape, null_class)
    if not guidance.joint:

        def apart(x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
            without = teacher(x, t, nulls)
            return teacher(x, t, labels), without

        return apart
    labels_2N = torch.cat([nulls, labels])

    def joint(x: Tensor, t: Time) -> tuple[Tensor, Tensor]:
        of_both = torch.cat([t, t]) if isinstance(t, torch.Tensor) else t
        without, with_label = teacher(torch.cat([x, x]), of_both, labels_2N).chunk(2)
        return with_label, without

    return joint
