"""The spec of a data set: everything that can change a byte of its shards, and the solving that follows from it.

A spec's hash names the folder of its data set, so that two specs never mix. Actors compute only from a spec
and its teacher (`solve_shard`), so the spec that names a data set also determines it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from dsno_cluster.config import Config
from dsno_cluster.config.base import Named, PositiveInt, Precision, Seed, later
from dsno_cluster.diffusion.noise import GENERATOR, noise_checksum
from dsno_cluster.diffusion.scales import ScaleName
from dsno_cluster.diffusion.solvers import Method
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.records import canonical_hash, first_mistake
from dsno_cluster.teachers import ConfiguredTeacher, Teacher
from dsno_cluster.teachers.loading import AnyTeacherIdentity

if TYPE_CHECKING:
    from torch import Tensor

GridName = Literal["uniform between time points", "fine-end/1"]
FORMAT_VERSION = 2  # the layout of a shard file (shards.py); version 2 added the checksum in the header
# the spec's names for the grids of `Method`
GRIDS: dict[str, GridName] = {"uniform": "uniform between time points", "fine-end": "fine-end/1"}


class LabelRule(Named):
    """How the label of a sample follows from (seed, index): uniform over `num_classes`; 0: no labels."""

    rule: Literal["uniform"] = "uniform"
    num_classes: int


class NoiseRule(Named):
    """How a sample's noise follows from (seed, index), and the sha256 of sample 0's as a check."""

    generator: str
    first_sample_sha256: str


class TrajectorySpec(Named):
    """A data set of trajectories.

    `times` (M,) descend to 0. `grid` is a name of `GRIDS`, or the times of the teacher's own steps, on which
    the state at t=0 is the last prediction of x0. `shape` is (C, H, W), `dtype` that of the stored states,
    `inference_precision` that of the teacher, whose network may be `compiled`. `threads` are the CPU threads of
    an actor, on which bits depend. `joint_guidance`: both evaluations of guidance are one batch of 2N;
    `guidance_interval` and `guidance_channels` are those of `Guidance`, `guide` is the weaker teacher from which it leads away.
    """

    format_version: int
    teacher: AnyTeacherIdentity
    solver: str
    steps: PositiveInt
    grid: GridName | tuple[float, ...]
    times: tuple[float, ...]
    schedule: Literal["cosine"] = "cosine"
    clip_denoised: bool
    guidance_scale: float
    labels: LabelRule
    seed: Seed
    shape: tuple[int, int, int]
    dtype: Literal["float16", "float32"]
    inference_precision: Precision
    compiled: bool = later(False)
    joint_guidance: bool = later(False)
    guidance_interval: tuple[float, float] | None = later(None)
    guidance_channels: PositiveInt | None = later(None)
    guide: AnyTeacherIdentity | None = later(None)
    samples_per_shard: PositiveInt
    batch_size: PositiveInt
    threads: PositiveInt
    noise: NoiseRule = Field(description="see noise.py")

    @property
    def method(self) -> Method:
        """How its ODE is solved."""
        own_steps = not isinstance(self.grid, str)
        grid = next((name for name, text in GRIDS.items() if text == self.grid), self.grid)
        return Method(
            self.solver,
            self.steps,
            grid,
            self.guidance_scale,
            self.clip_denoised,
            clean_end=own_steps,
            joint_guidance=self.joint_guidance,
            guidance_interval=self.guidance_interval,
            guidance_channels=self.guidance_channels,
        )

    @property
    def hash(self) -> str:
        """The name of the data set: the canonical hash of the spec's dump."""
        return canonical_hash(self.model_dump(mode="json"))

    @property
    def folder(self) -> str:
        """The key prefix of the data set below the storage root."""
        return f"trajectories/{self.hash}/"


ExchangeFormat = Literal["webdataset", "lmdb", "npz"]


class ImportedFrom(Named):
    """Where imported trajectories come from: the format, and the sha256 that their index or list of files has.

    `timesteps` are those of the states that were read, in the time of `scale`, from that of the noise down. The noise was
    divided by `noise_scale`.
    """

    kind: Literal["imported"] = "imported"
    format: ExchangeFormat
    sha256: str
    scale: ScaleName
    timesteps: tuple[float, ...]
    noise_scale: float


class ImportedLabels(Named):
    """Labels that came with imported trajectories; 0 classes: none."""

    rule: Literal["stored"] = "stored"
    num_classes: int


class ImportedSpec(Named):
    """A data set of trajectories that somebody else made: nothing in it can be computed again.

    The shards hold its noise, which no seed gives. `times` (M,) descend to 0 and are cosine times, `shape` is (C, H, W).
    """

    format_version: int
    source: ImportedFrom
    times: tuple[float, ...]
    labels: ImportedLabels
    shape: tuple[int, int, int]
    dtype: Literal["float16", "float32"]
    samples_per_shard: PositiveInt
    noise: Literal["stored"] = "stored"

    @property
    def hash(self) -> str:
        """The name of the data set: the canonical hash of the spec's dump."""
        return canonical_hash(self.model_dump(mode="json"))

    @property
    def folder(self) -> str:
        """The key prefix of the data set below the storage root."""
        return imported_folder(self.hash)


AnySpec = TrajectorySpec | ImportedSpec


def imported_folder(spec_hash: str) -> str:
    """The key prefix of an imported data set below the storage root."""
    return f"trajectories/{spec_hash}/"


def spec_of(config: Config, teacher: ConfiguredTeacher) -> TrajectorySpec:
    """The spec of a config's data set."""
    settings, network, method = config.trajectories, config.network, teacher.method
    shape = network.state_shape
    return TrajectorySpec(
        format_version=FORMAT_VERSION,
        teacher=teacher.info.identity,
        solver=method.solver,
        steps=method.steps,
        grid=GRIDS[method.grid] if isinstance(method.grid, str) else method.grid,
        times=settings.time_points,
        clip_denoised=method.clip_denoised,
        guidance_scale=method.guidance_scale,
        labels=LabelRule(num_classes=network.num_classes),
        seed=config.seed,
        shape=shape,
        dtype=settings.dtype,
        inference_precision=config.teacher.precision,
        compiled=teacher.compiled,
        joint_guidance=method.joint_guidance,
        guidance_interval=method.guidance_interval,
        guidance_channels=method.guidance_channels,
        guide=teacher.guide.info.identity if teacher.guide else None,
        samples_per_shard=settings.samples_per_shard,
        batch_size=settings.batch_size,
        threads=settings.threads,
        noise=NoiseRule(generator=GENERATOR, first_sample_sha256=noise_checksum(config.seed, shape)),
    )


def former_specs(spec: TrajectorySpec, teacher: ConfiguredTeacher) -> tuple[TrajectorySpec, ...]:
    """The specs by which earlier versions named the same data set, the latest first.

    They did not compile unless they were told to, and evaluated the two halves of guidance one after the other.
    """
    chosen = spec.compiled and teacher.config.teacher.compile == "auto"
    found = [
        spec.model_copy(update={"teacher": identity, "compiled": compiled, "joint_guidance": joint})
        for identity in (spec.teacher, *teacher.info.former_identities)
        for compiled in ((True, False) if chosen else (spec.compiled,))
        for joint in ((True, False) if spec.joint_guidance else (False,))
    ]
    return tuple(one for one in found if one != spec)


def read_spec(content: object, where: str) -> AnySpec:
    """The spec in a file's plain values. Raises UserError, naming `where`, if this version cannot read it."""
    imported = isinstance(content, dict) and "source" in content
    try:
        return (ImportedSpec if imported else TrajectorySpec).model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise UserError(f"{where}: a spec that this version does not read: {first_mistake(error)}") from None


def solve_samples(
    spec: TrajectorySpec, teacher: Teacher, seed: int, indices: range
) -> tuple[Tensor, Tensor | None]:
    """States (N, M, C, H, W) float32 on the teacher's device, and labels (N,) or None, of the samples."""
    from dsno_cluster.diffusion.noise import sample_labels, sample_noise
    from dsno_cluster.diffusion.solvers import solve_with

    noise = sample_noise(seed, indices, spec.shape).to(teacher.device)
    labels = sample_labels(seed, indices, spec.labels.num_classes) if spec.labels.num_classes else None
    there = None if labels is None else labels.to(teacher.device)
    return solve_with(spec.method, teacher, noise, spec.times, there), labels


def solve_shard(spec: TrajectorySpec, teacher: Teacher, index: int) -> dict[str, Tensor]:
    """The tensors of shard `index`: `states` (M, N, C, H, W) in the spec's dtype and, if there are classes, `labels` (N,).

    The tensors are on CPU. They are solved in the calling thread, which must use the spec's number of CPU
    threads: bits depend on it. Raises WorkError for states that are not finite.
    """
    import torch

    states, labels = [], []
    start = index * spec.samples_per_shard
    stop = start + spec.samples_per_shard
    for first in range(start, stop, spec.batch_size):
        part = solve_samples(spec, teacher, spec.seed, range(first, min(first + spec.batch_size, stop)))
        states.append(part[0].to("cpu", getattr(torch, spec.dtype)))
        labels.append(part[1])
    states_MNCHW = torch.cat(states).transpose(0, 1)
    if not bool(states_MNCHW.isfinite().all()):
        raise WorkError(f"shard {index}: the teacher gave states that are not finite in {spec.dtype}")
    tensors = {"states": states_MNCHW}
    known = [part for part in labels if part is not None]
    return tensors | ({"labels": torch.cat(known)} if known else {})
