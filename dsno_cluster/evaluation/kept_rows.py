"""Images of unfinished rows of the teacher, kept batch by batch, so that an evaluation that is stopped solves none twice.

They lie beside the rows that are finished, as `evaluation/teachers/<row>-<device and versions>-shard-000000.safetensors`,
and are deleted when their row is recorded. They only save work: one that is missing or damaged is drawn again.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsno_cluster.config import Evaluation
from dsno_cluster.diffusion.noise import GENERATOR, noise_checksum
from dsno_cluster.errors import WorkError
from dsno_cluster.provenance import Environment
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import MissingObject, Storage
from dsno_cluster.teachers import DecoderIdentity, Sampling
from dsno_cluster.trajectories.shards import decode_shard, encode_shard, shard_key, vouches_for_itself
from dsno_cluster.trajectories.spec import GRIDS, NoiseRule, TrajectorySpec

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "evaluation/teachers/"


@dataclass(frozen=True)
class KeptRows:
    """The kept images of rows whose samples are those of `settings`, of the teacher of the trajectories' `spec`.

    `decoder` made the images of its states; None: these are images.
    """

    storage: Storage
    spec: TrajectorySpec
    settings: Evaluation
    decoder: DecoderIdentity | None = None

    def read(self, sampling: Sampling, made_by: Environment, samples: range) -> Tensor | None:
        """The images of a batch of samples as they were kept, uint8 (N, C, H, W), or None."""
        try:
            data = self.storage.read(self._key(sampling, made_by, samples))
        except MissingObject:
            return None
        shape = self.spec.shape if self.decoder is None else self.decoder.image_shape
        expected = {"images": ("uint8", [len(samples), *shape])}
        return decode_shard(data)["images"] if vouches_for_itself(data, samples.start, expected) else None

    def keep(self, sampling: Sampling, made_by: Environment, samples: range, images_NCHW: Tensor) -> None:
        """Keep the uint8 images of a batch of samples, if the storage takes them."""
        data = encode_shard({"images": images_NCHW}, samples.start)
        with contextlib.suppress(WorkError):  # the figures are made without it
            self.storage.write(self._key(sampling, made_by, samples), data)

    def count(self, samplings: Iterable[Sampling]) -> int:
        """How many samples are kept of these rows, by the actors that kept most of each."""
        total = 0
        for sampling in samplings:
            prefix = FOLDER + self._row(sampling)
            by_maker = Counter(
                stat.key.removeprefix(prefix).partition("-shard-")[0] for stat in self.storage.list(prefix)
            )
            total += max(by_maker.values(), default=0) * self.settings.batch_size
        return total

    def drop(self, samplings: Iterable[Sampling]) -> None:
        """Delete what is kept of these rows."""
        for sampling in samplings:
            for stat in list(self.storage.list(FOLDER + self._row(sampling))):
                self.storage.delete(stat.key)

    def _key(self, sampling: Sampling, made_by: Environment, samples: range) -> str:
        """By everything that can change a byte: the spec of the row, and the device and versions, as bits depend on them."""
        maker = canonical_hash(Environment(device=made_by.device, versions=made_by.versions).values())[:8]
        index = samples.start // self.settings.batch_size
        return f"{FOLDER}{self._row(sampling)}{maker}-{shard_key(index)}"

    @functools.cached_property
    def _noise(self) -> NoiseRule:
        return NoiseRule(
            generator=GENERATOR, first_sample_sha256=noise_checksum(self.settings.seed, self.spec.shape)
        )

    def _row(self, sampling: Sampling) -> str:
        """The row's samples as a data set of their own: the hash of its spec, and that of what decoded them."""
        method, seed, size = sampling.method, self.settings.seed, self.settings.batch_size
        row = {
            "solver": method.solver,
            "steps": method.steps,
            "grid": GRIDS[method.grid] if isinstance(method.grid, str) else method.grid,
            "times": sampling.times,
            "clip_denoised": method.clip_denoised,
            "guidance_scale": method.guidance_scale,
            "joint_guidance": method.joint_guidance,
            "guidance_interval": method.guidance_interval,
            "guidance_channels": method.guidance_channels,
            "seed": seed,
            "samples_per_shard": size,
            "batch_size": size,
            "threads": self.settings.threads,
            "noise": self._noise,
        }
        decoded = (
            "" if self.decoder is None else canonical_hash(self.decoder.model_dump(mode="json"))[:8] + "-"
        )
        return f"{self.spec.model_copy(update=row).hash}-{decoded}"
