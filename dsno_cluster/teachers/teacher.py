"""The interface of a teacher, what is known about one without its network, and the protocol of a family."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, get_args

from dsno_cluster import liveness
from dsno_cluster.config import Network
from dsno_cluster.config.base import Precision
from dsno_cluster.errors import UserError
from dsno_cluster.networks.activations import UNetShape, largest_tensor, samples_at_a_time, shape_of
from dsno_cluster.networks.backbones import Backbone
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.storage import MissingObject, Storage, open_storage, split_path
from dsno_cluster.teachers.facts import Facts
from dsno_cluster.teachers.identity import TeacherIdentity

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dsno_cluster.teachers.decoders import Decoder

Options = Mapping[str, Any]
Shape = tuple[int, int, int]
NativeGrid = Callable[[int], tuple[float, ...]]

PRECISIONS: tuple[str, ...] = get_args(Precision)
# A model whose meta names at most this many steps was distilled to them, and knows no other levels.
MOST_DISTILLED_STEPS = 128


@dataclass(frozen=True)
class TeacherInfo:
    """What is known about a teacher without its network.

    `shape` (C, H, W) and `num_classes` are None for a Python factory until it is called; the shape is also None if
    a file does not say it and no option does. `null_class` is the label that means "no class", if there is one.
    `native` gives the times of the teacher's own steps; `num_steps` is set if it always has that number of them,
    whatever number is asked for. `clips`: its usual sampler bounds the clean image, which only
    `trajectories.clip_denoised` does here. `backbone` describes its network, on which a student can be built; `diffusers`
    does as `student.backbone=diffusers` has it. `has_network`: its network is read from a file, and can be compiled.
    `decoder` turns its states into images; without one they are images themselves, unless they are known to be `latent`.
    `standardised`: each channel of these was brought to one mean and deviation, by numbers that no file says.
    `former_identities` are those that earlier
    versions recorded, by which their data sets are found. `notes` are what people should know of how it was read.
    """

    identity: TeacherIdentity
    shape: Shape | None
    num_classes: int | None
    null_class: int | None = None
    native: NativeGrid | None = None
    num_steps: int | None = None
    clips: bool = False
    backbone: Backbone | None = None
    diffusers: DiffusersModel | None = None
    has_network: bool = False
    decoder: Decoder | None = None
    latent: bool = False
    standardised: bool = False
    former_identities: tuple[TeacherIdentity, ...] = ()
    notes: tuple[str, ...] = ()

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

    @property
    def unet(self) -> UNetShape | None:
        """The sizes of its network, if it is a U-Net that was read from files."""
        if self.backbone is None or self.shape is None:
            return None
        return shape_of(self.backbone, self.shape[1:])


@dataclass(frozen=True)
class Teacher:
    """A denoiser: `denoise(x, t_N, labels)` gives x0.

    `network` is the module that `to` moves, if there is one. `tf32`: it is evaluated with TensorFloat-32 on a GPU.
    `guide` is the weaker teacher from which guidance leads away; it plays no part in a single call. `differentiable`: its
    answers have gradients with respect to x.
    """

    info: TeacherInfo
    denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    network: nn.Module | None = None
    tf32: bool = False
    guide: Teacher | None = None
    differentiable: bool = False

    def guided_by(self, guide: Teacher) -> Teacher:
        """This teacher with a `guide`, which `solve` uses with a guidance_scale other than 1.

        D = D_guide + scale (D - D_guide) (Karras et al. 2024b, *Guiding a Diffusion Model with a Bad Version of Itself*,
        equation 3). Raises UserError if the guide's states are others, or it has other classes than these or none.
        """
        check_guide(self.info, guide.info)
        return replace(self, guide=guide)

    def without_tf32(self) -> Teacher:
        """This teacher and its guide, evaluated without TensorFloat-32."""
        return replace(self, tf32=False, guide=self.guide and self.guide.without_tf32())

    def with_gradients(self) -> Teacher:
        """This teacher and its guide, whose answers have gradients with respect to x."""
        return replace(self, differentiable=True, guide=self.guide and self.guide.with_gradients())

    @property
    def shape(self) -> Shape:
        """(C, H, W)."""
        if self.info.shape is None:  # a factory's is known once it is loaded
            raise UserError("the size of the teacher's images is not known; give option image_size")
        return self.info.shape

    @property
    def num_classes(self) -> int:
        assert self.info.num_classes is not None
        return self.info.num_classes

    @property
    def null_class(self) -> int | None:
        return self.info.null_class

    @property
    def identity(self) -> TeacherIdentity:
        return self.info.identity

    @property
    def num_steps(self) -> int | None:
        return self.info.num_steps

    @property
    def distilled(self) -> bool:
        return self.info.distilled

    def native_grid(self, steps: int) -> tuple[float, ...] | None:
        """See `TeacherInfo.native_grid`."""
        return self.info.native_grid(steps)

    @property
    def device(self) -> torch.device:
        import torch

        found = itertools.chain(self.network.parameters(), self.network.buffers()) if self.network else ()
        return next((tensor.device for tensor in found), torch.device("cpu"))

    def to(self, device: torch.device) -> Teacher:
        """This teacher with its network moved to `device`; on a GPU its weights are channels-last."""
        import torch

        if self.network is not None:
            self.network.to(device)
            if device.type == "cuda":
                self.network.to(memory_format=torch.channels_last)
        if self.guide is not None:
            self.guide.to(device)
        return self

    def __call__(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """Noisy images (N, C, H, W) at time t (a float, a 0-d tensor or (N,)) -> clean images x0, unclipped.

        `t` is the cosine time: 0 is data, 1 pure noise. `labels` are int64 (N,) in 0..num_classes-1, or
        `null_class`. Without labels a teacher with a null class is unconditional. The result is on the device
        of x, wherever the teacher is: one without a network computes on the CPU. Raises ValueError
        if labels are missing or not wanted.
        """
        import torch

        from dsno_cluster.device import allowing_tf32

        device, count = self.device, len(x)
        liveness.moved()
        labels = self.labels_or_null(labels, count)
        if isinstance(t, torch.Tensor):
            t_N = t.to(device, torch.float64).expand(count)
        else:  # filled on the device: a copy from the host would be waited for
            t_N = torch.full((count,), t, dtype=torch.float64, device=device)
        with (
            contextlib.nullcontext() if self.differentiable else torch.no_grad(),
            allowing_tf32() if self.tf32 else contextlib.nullcontext(),
        ):
            there = None if labels is None else labels.to(device)
            most = samples_at_a_time(self._largest, count)
            if count <= most:
                return self.denoise(x.to(device), t_N, there).to(x.device)
            parts = [
                self.denoise(x[part].to(device), t_N[part], None if there is None else there[part]).to(
                    x.device
                )
                for part in (slice(i, i + most) for i in range(0, count, most))
            ]
            return torch.cat(parts)

    def labels_or_null(self, labels: Tensor | None, count: int) -> Tensor | None:
        """The labels that `denoise` wants for so many samples: those given, or else the null class, if there is one.

        Raises ValueError if labels are missing or not wanted.
        """
        import torch

        if labels is None and self.null_class is not None:
            labels = torch.full((count,), self.null_class, device=self.device)
        if (labels is None) != (self.num_classes == 0):
            raise ValueError(
                f"this teacher has {self.num_classes} classes; labels given: {labels is not None}"
            )
        return labels

    @functools.cached_property
    def _largest(self) -> int:
        """Elements of the largest tensor that a sample makes in the network; 1 if that is not known."""
        shape = self.info.unet
        return 1 if shape is None else largest_tensor(shape, 2 * self.shape[0])  # it may predict x0 and eps


class Source:
    """Where a teacher is: its path as given and, for a folder or an address, its files, each read only once."""

    def __init__(self, path: str, endpoint_url: str | None) -> None:
        self.path, self.endpoint_url = path, endpoint_url
        self._read: dict[str, bytes | None] = {}

    @functools.cached_property
    def storage(self) -> Storage:
        """The folder or S3 prefix at the path. Raises UserError as `open_storage`."""
        return open_storage(self.path, self.endpoint_url)

    @functools.cached_property
    def is_file(self) -> bool:
        """Whether the path is a file, not a folder."""
        parent, name = split_path(self.path)
        return name not in ("", ".", "..") and open_storage(parent, self.endpoint_url).stat(name) is not None

    @functools.cached_property
    def head(self) -> bytes:
        """The first bytes of the file at the path."""
        parent, name = split_path(self.path)
        return open_storage(parent, self.endpoint_url).read(name, 0, 64)

    def has(self, key: str) -> bool:
        """Whether the folder has a file with that key."""
        return self._read.get(key) is not None or self.storage.stat(key) is not None

    def read(self, key: str) -> bytes | None:
        """The bytes of a file of the folder, or None if it does not exist."""
        if key not in self._read:
            try:
                self._read[key] = self.storage.read(key)
            except MissingObject:
                self._read[key] = None
        return self._read[key]

    def forget(self) -> None:
        """Drop the bytes of the files; they are read again if they are needed again."""
        self._read.clear()


class TeacherFamily(Protocol):
    """A family of teachers: one kind of checkpoint. An instance is a teacher at a source, with its options.

    An instance keeps what it has read until `forget`, so that files are read and hashed only once.
    """

    kind: ClassVar[str]  # for people: "diffusers", "factory"
    identities: ClassVar[tuple[type[TeacherIdentity], ...]]

    def __init__(self, source: Source, options: Options) -> None:
        """Raises UserError for options that the family does not take."""
        ...

    @classmethod
    def recognises(cls, source: Source) -> bool:
        """Whether this family can read the source, judged by its content if it is a file or a folder."""
        ...

    def info(self) -> TeacherInfo:
        """What is known without building the network. Raises UserError if the source is not a teacher."""
        ...

    def facts(self) -> Facts:
        """What people want to know of it besides, without building the network. Raises UserError as `info` does."""
        ...

    def load(self, precision: str) -> Teacher:
        """The teacher, on CPU.

        Raises UserError for an unsupported precision and for weights that do not fit.
        """
        ...

    def warm_start(self) -> dict[str, Tensor]:
        """The weights under a student's names, with a last layer that gives x0 at t=1; see `warm_start.py`.

        Raises UserError if no student on our U-Net, or on `info().diffusers`, can start from them.
        """
        ...

    def network_weights(self) -> dict[str, Tensor]:
        """The state dict of the network that `info().backbone` describes, float32.

        Raises UserError if it describes none.
        """
        ...

    def forget(self) -> None:
        """Drop the weights and files that it has read; they are read again if they are needed again."""
        ...


def is_distilled(num_steps: int | None) -> bool:
    """Whether a model whose meta names `num_steps` knows only the levels of those steps."""
    return num_steps is not None and num_steps <= MOST_DISTILLED_STEPS


def check_fits(network: Network, teacher: TeacherInfo, path: str) -> None:
    """Raises UserError unless the teacher's states and classes, if they are known, are the network's."""
    if teacher.shape is None:
        if teacher.num_classes is None:  # a factory that is not called yet
            return
        raise UserError(
            f"{path}: its file does not say the size of its images; give it: 'teacher.options={{image_size: ...}}'"
        )
    channels, height, width = teacher.shape
    theirs = {
        "state_size": height if height == width else (height, width),
        "state_channels": channels,
        "num_classes": teacher.num_classes,
        "null_class": teacher.null_class is not None,
    }
    for key, value in theirs.items():
        if (ours := getattr(network, key)) != value:
            shown, has = (list(x) if isinstance(x, tuple) else x for x in (ours, value))
            raise UserError(f"network.{key}: the config says {shown}, the teacher at {path} has {has}")


def check_guide(teacher: TeacherInfo, guide: TeacherInfo, path: str = "the guide") -> None:
    """Raises UserError if a guide has other states than the teacher, or classes other than the teacher's and not none.

    What is not known yet of a factory is checked once it is loaded.
    """
    if None not in (teacher.shape, guide.shape) and teacher.shape != guide.shape:
        ours, theirs = ("x".join(map(str, shape or ())) for shape in (teacher.shape, guide.shape))
        raise UserError(f"teacher.guide: {path} has states of {theirs}, the teacher that it guides of {ours}")
    if teacher.standardised != guide.standardised:
        raise UserError(
            f"teacher.guide: {path} works on latents of another scale than the teacher that it guides"
        )
    if guide.num_classes and teacher.num_classes not in (None, guide.num_classes):
        raise UserError(
            f"teacher.guide: {path} has {guide.num_classes} classes, the teacher that it guides {teacher.num_classes}; it needs "
            "the same ones, or none"
        )


def check_options(options: Options, allowed: Sequence[str], path: str) -> None:
    """Raises UserError for an option that is not among `allowed`."""
    for name in options:
        if name not in allowed:
            raise UserError(
                f"{path}: unknown teacher option {name}; this kind takes {', '.join(allowed) or 'none'}"
            )


def check_schedule(schedule: Any, path: str) -> str:
    """The teacher option `schedule`. Raises UserError if it is neither native nor continuous."""
    if schedule not in ("native", "continuous"):
        raise UserError(f"{path}: schedule {schedule!r} is not one of: native, continuous")
    return str(schedule)


def only_float32(precision: str, path: str, kind: str) -> None:
    """Raises UserError unless the precision is float32; only networks read from files support others."""
    if precision != "float32":
        raise UserError(f"{path}: precision {precision} is for networks read from files, not a {kind}")


def plain(value: Any) -> Any:
    """Options as JSON values: tuples become lists."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
