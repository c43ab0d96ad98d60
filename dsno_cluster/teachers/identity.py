"""What tells one teacher from another: everything about it that can change a byte of a trajectory.

An identity is part of a trajectory spec, whose hash names a data set, so its dump must stay what it was: see
`config.base.Named`. Each family of teachers has a model of its own.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import JsonValue

from dsno_cluster.config import Network
from dsno_cluster.config.base import Named, PositiveInt, StrictNumber, later

Prediction = Literal["x", "eps", "v", "both"]

DENOISER: Final = "denoiser"  # the kind of a U-Net of ours, in `meta.json` and in its identity


class TeacherIdentity(Named):
    """`kind` names the family's form."""

    kind: str


class UNetDescription(TeacherIdentity):
    """What `meta.json` says under `model` of a U-Net of ours: enough to build it and to read its output.

    `num_steps` is the number of steps that it was distilled to or sampled with, if its publisher names one.
    """

    kind: Literal["denoiser"] = DENOISER
    network: Network
    prediction: Prediction = "v"
    schedule: Literal["cosine"] = "cosine"
    num_steps: PositiveInt | None = later(None)


class UNetIdentity(UNetDescription):
    """A U-Net of ours and the sha256 of its weights (of a published checkpoint: of its file).

    Dropout is 0 in it: it acts in training only. Versions before 0.2 kept the network's own.
    """

    sha256: str


class DiffusersIdentity(TeacherIdentity):
    """A diffusers model: its config, what is read of its scheduler, and its weights' sha256, of several files by name."""

    kind: Literal["diffusers"] = "diffusers"
    sha256: str | dict[str, str]
    config: dict[str, JsonValue]
    scheduler: dict[str, JsonValue]
    shape: tuple[int, int, int]
    num_classes: int
    null_class: int | None


class FactoryIdentity(TeacherIdentity):
    """A Python function by its name, its module's source and the options it is called with."""

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
