"""Teachers: pretrained denoisers behind one interface, `teacher(x, t, labels) -> x0`.

`load_teacher(path)` is the door. `identity` is what a trajectory spec records of a teacher: everything about it
that can change a byte.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsno_cluster.config import Network, validate
from dsno_cluster.diffusion.schedule import alpha_sigma, logsnr
from dsno_cluster.errors import UserError
from dsno_cluster.models.unet import UNet
from dsno_cluster.models.weights import read_meta, read_model

KIND = "denoiser"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Teacher:
    """A denoiser. `shape` is (C, H, W); `null_class` is the label that means none, where there is one."""

    denoise: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    shape: tuple[int, int, int]
    num_classes: int
    null_class: int | None
    identity: dict[str, Any]
    network: nn.Module | None = None

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.network.parameters()), _CPU) if self.network else _CPU

    def to(self, device: torch.device) -> Teacher:
        """This teacher with its network moved to `device`."""
        if self.network is not None:
            self.network.to(device)
        return self

    def __call__(self, x: Tensor, t: float | Tensor, labels: Tensor | None = None) -> Tensor:
        """Noisy images (N, C, H, W) at time t (a float, a 0-d tensor or (N,)) -> clean images x0, unclipped.

        `t` is the cosine time: 0 is data, 1 pure noise. Without labels a teacher with a null class answers
        unconditionally. Raises ValueError where labels are missing or not wanted.
        """
        if labels is None and self.null_class is not None:
            labels = torch.full((len(x),), self.null_class, device=x.device)
        if (labels is None) != (self.num_classes == 0):
            raise ValueError(
                f"this teacher has {self.num_classes} classes; labels given: {labels is not None}"
            )
        t_N = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(len(x))
        with torch.no_grad():
            return self.denoise(x, t_N, labels)


def load_teacher(path: str, endpoint_url: str | None = None) -> Teacher:
    """The teacher at a folder path, an S3 address or `package:NAME`, on CPU.

    Raises UserError where there is none.
    """
    folder = read_model(str(path), endpoint_url)
    identity = _identity(path, folder.meta)
    network = validate(Network, identity["network"], f"{path}/meta.json")
    unet = UNet(network)
    unet.load_state_dict(folder.weights)
    return unet_teacher(unet.eval().requires_grad_(False), network, identity)


def teacher_identity(path: str, endpoint_url: str | None = None) -> dict[str, Any]:
    """What a trajectory spec records of the teacher at `path`, read without its weights.

    Raises UserError where there is none, or one of a kind that is not read here.
    """
    return _identity(path, read_meta(str(path), endpoint_url))


def _identity(path: str, meta: dict[str, Any]) -> dict[str, Any]:
    model = meta["model"]
    if model["kind"] != KIND:
        raise UserError(f"{path}: holds a {model['kind']!r} model, not a teacher")
    if (model.get("prediction"), model.get("schedule")) != ("v", "cosine"):
        raise UserError(
            f"{path}: predicts {model.get('prediction')!r} on schedule {model.get('schedule')!r}; "
            "this version reads 'v' on 'cosine'"
        )
    return {**model, "sha256": meta["sha256"]}


def describe(network: Network) -> dict[str, Any]:
    """What `meta.json` says under `model` of a teacher trained here: a v-prediction U-Net."""
    return {"kind": KIND, "network": network.model_dump(mode="json"), "prediction": "v", "schedule": "cosine"}


def unet_teacher(unet: UNet, network: Network, identity: dict[str, Any]) -> Teacher:
    """A U-Net that predicts v (Salimans & Ho 2022): x0 = alpha x - sigma v."""

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = (s.to(x.dtype)[:, None, None, None] for s in alpha_sigma(t_N))
        v = unet(x, logsnr(t_N).to(x.dtype)[:, None], labels)[:, 0]
        return alpha * x - sigma * v

    null = network.num_classes if network.null_class else None
    shape = (network.channels, network.image_size, network.image_size)
    return Teacher(denoise, shape, network.num_classes, null, identity, unet)


def gaussian_teacher(mean: float, std: float, shape: tuple[int, int, int]) -> Teacher:
    """The exact denoiser of data N(mean, std^2 I): its trajectories are known, `gaussian_trajectory`.

    x0 = (alpha std^2 x + sigma^2 mean) / (alpha^2 std^2 + sigma^2)
    """

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = (s.to(x.dtype)[:, None, None, None] for s in alpha_sigma(t_N))
        return (alpha * std**2 * x + sigma**2 * mean) / (alpha**2 * std**2 + sigma**2)

    identity = {"kind": "gaussian", "mean": mean, "std": std, "shape": list(shape)}
    return Teacher(denoise, shape, 0, None, identity)


def gaussian_trajectory(noise: Tensor, t: float, mean: float, std: float) -> Tensor:
    """The exact state at time t of the probability flow of N(mean, std^2 I) from `noise` at t=1."""

    def scale(time: float) -> float:
        alpha, sigma = alpha_sigma(time)
        return float((alpha**2 * std**2 + sigma**2).sqrt())

    alpha_1, alpha_t = float(alpha_sigma(1.0)[0]), float(alpha_sigma(t)[0])
    return alpha_t * mean + (scale(t) / scale(1.0)) * (noise - alpha_1 * mean)
