"""The identity of a teacher: everything about it that can change a byte of a trajectory.

An identity is part of a trajectory spec, whose hash names a data set, so its dump must never change: see
`config.base.Named`. Each family of teachers has its own model.
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal

from pydantic import JsonValue

from dsno_cluster.config import Network
from dsno_cluster.config.base import Named, PositiveInt, StrictNumber, later

Prediction = Literal["x", "eps", "v", "both"]

DENOISER: Final = "denoiser"  # the kind of our own U-Net, in `meta.json` and in its identity


class TeacherIdentity(Named):
    """The base of all identities; `kind` names the form."""

    kind: str


class UNetDescription(TeacherIdentity):
    """The `model` entry of `meta.json` for our own U-Net: enough to build it and to interpret its output.

    `num_steps` is the number of steps that it was distilled to or sampled with, if its publisher names one.
    """

    kind: Literal["denoiser"] = DENOISER
    network: Network
    prediction: Prediction = "v"
    schedule: Literal["cosine"] = "cosine"
    num_steps: PositiveInt | None = later(None)


class UNetIdentity(UNetDescription):
    """Our own U-Net and the sha256 of its weights (for a published checkpoint: of its file).

    Dropout acts only in training and is 0 here. Versions before 0.2 kept the network's own.
    """

    sha256: str


class DiffusersIdentity(TeacherIdentity):
    """A diffusers model: its config, what is read of its scheduler, and its weights' sha256."""

    kind: Literal["diffusers"] = "diffusers"
    sha256: str | dict[str, str]
    config: dict[str, JsonValue]
    scheduler: dict[str, JsonValue]
    shape: tuple[int, int, int]
    num_classes: int
    null_class: int | None


class EDMIdentity(TeacherIdentity):
    """A snapshot of EDM or EDM2: its file's sha256, and the classes that it names."""

    kind: Literal["edm"] = "edm"
    sha256: str
    preconditioning: str
    network: str


class ADMIdentity(TeacherIdentity):
    """A U-Net of guided- or improved-diffusion: its file's sha256, and what its shapes do not say."""

    kind: Literal["openai-adm"] = "openai-adm"
    sha256: str
    num_heads: int | None
    num_head_channels: int | None
    new_attention_order: bool
    beta_schedule: Literal["linear", "cosine"]
    diffusion_steps: int
    rescale_timesteps: bool
    predict_xstart: bool


class OpenAIEDMIdentity(TeacherIdentity):
    """A teacher of OpenAI's consistency models: its file's sha256, and what its shapes do not say."""

    kind: Literal["openai-edm"] = "openai-edm"
    sha256: str
    num_heads: int | None
    num_head_channels: int | None
    new_attention_order: bool


class DiTIdentity(TeacherIdentity):
    """A DiT: its file's sha256, and what its shapes do not say."""

    kind: Literal["dit"] = "dit"
    sha256: str
    num_heads: int


class SiTIdentity(TeacherIdentity):
    """A SiT on the linear path: its file's sha256, and what its shapes do not say."""

    kind: Literal["sit"] = "sit"
    sha256: str
    num_heads: int


class FactoryIdentity(TeacherIdentity):
    """A Python function: its name, the sha256 of its module's source, and the options it is called with."""

    kind: Literal["factory"] = "factory"
    name: str
    source_sha256: str
    options: dict[str, JsonValue]


class GaussianIdentity(TeacherIdentity):
    kind: Literal["gaussian"] = "gaussian"
    mean: StrictNumber
    std: StrictNumber
    shape: tuple[int, int, int]


class MixtureIdentity(TeacherIdentity):
    kind: Literal["mixture"] = "mixture"
    means: list[JsonValue]
    stds: list[StrictNumber]
    shape: tuple[int, int, int]
    weights: list[StrictNumber]
    classes: list[int] | None
    null_class: bool


def weights_sha256(identity: TeacherIdentity) -> str | None:
    """The sha256 of a teacher's weights; of several files, that of the lines that `sha256sum` prints for them in order.

    None for a teacher without weights in files.
    """
    found = getattr(identity, "sha256", None)
    if not isinstance(found, dict):
        return found
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
