"""A teacher as the rest of the package sees it, and what is known of one without its network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsno_cluster.config import Network
from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


PRECISIONS = ("float32", "bfloat16", "float16")
# A model whose meta says that it has at most so many steps was distilled to them, and knows no other levels.
MOST_DISTILLED_STEPS = 128
Shape = tuple[int, int, int]
NativeGrid = Callable[[int], tuple[float, ...]]


@dataclass(frozen=True)
class TeacherInfo:
    """What is known of a teacher without its network: the fields of `Teacher` by the same names.

    `shape` and `num_classes` are None for a Python factory, which tells them once it is called. `clips`: its usual sampler
    bounds the clean image, which is left to `trajectories.clip_denoised` here.
    """

    identity: dict[str, Any]
    shape: Shape | None
    num_classes: int | None
    null_class: int | None = None
    native: NativeGrid | None = None
    num_steps: int | None = None
    clips: bool = False

    def native_grid(self, steps: int) -> tuple[float, ...] | None:
        """See `Teacher.native_grid`."""
        return None if self.native is None else self.native(steps)

    @property
    def distilled(self) -> bool:
        """See `Teacher.distilled`."""
        return is_distilled(self.num_steps)


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
        return is_distilled(self.num_steps)

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


def is_distilled(num_steps: int | None) -> bool:
    """Whether a model whose meta says `num_steps` knows no other levels than those steps."""
    return num_steps is not None and num_steps <= MOST_DISTILLED_STEPS


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


def check_options(options: dict[str, Any], allowed: Sequence[str], path: str) -> None:
    """Raises UserError for an option that is not among `allowed`."""
    for name in options:
        if name not in allowed:
            raise UserError(
                f"{path}: unknown teacher option {name}; this kind takes {', '.join(allowed) or 'none'}"
            )


def check_schedule(schedule: Any, path: str) -> str:
    """The teacher option `schedule`. Raises UserError where it is none of the two."""
    if schedule not in ("native", "continuous"):
        raise UserError(f"{path}: schedule {schedule!r} is not one of: native, continuous")
    return str(schedule)


def plain(value: Any) -> Any:
    """Options as JSON has them: tuples and sequences become lists."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
