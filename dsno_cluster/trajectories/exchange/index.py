"""index.json, which says what exported parts hold: at which times, in which scale, and with which sha256."""

from __future__ import annotations

import json
from typing import Literal

from pydantic import Field, JsonValue

from dsno_cluster.diffusion.scales import (
    FORMULAS,
    ScaleName,
    factor_of,
    logsnr_of,
    noise_factor,
    noise_timestep,
    timestep_of,
)
from dsno_cluster.errors import UserError
from dsno_cluster.records import Record, read_record
from dsno_cluster.storage import MissingObject, Storage
from dsno_cluster.trajectories.shards import Shard
from dsno_cluster.trajectories.spec import ExchangeFormat

INDEX = "index.json"
Dtype = Literal["float16", "float32"]


class ExportIndex(Record):
    """What exported trajectories are.

    A sample's path is its noise and then its states at all times but the last, which is the latent: the clean image.
    `path_timesteps` are the times of the path's states in the time of `scale`, (steps,), and `t_list` the same and 0;
    `path_logsnr` says the same for any schedule. `cosine_times` are those of our states, without the noise and with
    the latent. `noise_scale` is what unit noise was multiplied with. `source` is the spec that names our data set.
    """

    schema_version: Literal[1] = 1
    format: ExchangeFormat
    scale: ScaleName
    formula: str
    dtype: Dtype
    shape: tuple[int, int, int]
    num_samples: int
    num_classes: int
    path_timesteps: tuple[float, ...]
    t_list: tuple[float, ...]
    path_logsnr: tuple[float, ...]
    noise_scale: float
    cosine_times: tuple[float, ...]
    members: dict[str, str]
    samples_per_part: int
    source_hash: str
    source: dict[str, JsonValue]
    made_with: str = ""
    parts: tuple[Shard, ...] = Field(default=())

    @property
    def factors(self) -> tuple[float, ...]:
        """What our states at `cosine_times` were multiplied with, (M,)."""
        return tuple(factor_of(self.scale, timestep) for timestep in self.t_list[1:])

    @property
    def without_parts(self) -> ExportIndex:
        """What the parts were made from."""
        return self.model_copy(update={"parts": (), "made_with": ""})


def plan_index(
    format: ExchangeFormat,
    scale: ScaleName,
    dtype: Dtype,
    times: tuple[float, ...],
    shape: tuple[int, int, int],
    num_samples: int,
    num_classes: int,
    members: dict[str, str],
    samples_per_part: int,
    source_hash: str,
    source: dict[str, JsonValue],
) -> ExportIndex:
    """The index of parts that are still to be made.

    Raises UserError for a state that is noisier than the noise of the scale's trainers.
    """
    first = noise_timestep(scale)
    path = (first, *(timestep_of(scale, t) for t in times[:-1]))
    if len(path) > 1 and path[1] >= first:
        raise UserError(
            f"--scale {scale}: the state at t={times[0]:g} is at {path[1]:g} there, and the noise stands at {first:g}; take "
            "--scale vp, or a data set whose first time is further from 1"
        )
    return ExportIndex(
        format=format,
        scale=scale,
        formula=FORMULAS[scale],
        dtype=dtype,
        shape=shape,
        num_samples=num_samples,
        num_classes=num_classes,
        path_timesteps=path,
        t_list=(*path, 0.0),
        path_logsnr=tuple(logsnr_of(scale, timestep) for timestep in path),
        noise_scale=noise_factor(scale, first),
        cosine_times=times,
        members=members,
        samples_per_part=samples_per_part,
        source_hash=source_hash,
        source=source,
    )


def read_index(storage: Storage) -> ExportIndex | None:
    """The index of an export of ours; None if there is none. Raises UserError for one that this version does not read."""
    content = read_foreign_index(storage)
    if content is None or "source_hash" not in content:
        return None
    return read_record(ExportIndex, json.dumps(content).encode(), f"{storage.url}/{INDEX}")


def read_foreign_index(storage: Storage) -> dict[str, JsonValue] | None:
    """The index of anybody's parts as plain values; None if there is none. Raises UserError unless it is a JSON object."""
    where = f"{storage.url}/{INDEX}"
    try:
        content = json.loads(storage.read(INDEX))
    except MissingObject:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({str(error)[:100]})") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds a {type(content).__name__}, not an object with path_timesteps")
    return content
