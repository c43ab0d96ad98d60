"""LMDB environments as the ODE regression of CausVid and Self-Forcing reads them.

`latents_{i}_data` is row i as float16, (steps, frames, C, H, W) from the noise to the clean state, `prompts_{i}_data` its
prompt as UTF-8, and `latents_shape` the number of rows and their shape as text (`causvid/data.py`, `utils/lmdb.py`).
An image is a video of one frame, and a class number stands in the place of the prompt.
"""

from __future__ import annotations

import io
import mmap
import tempfile
from pathlib import Path

import numpy as np

from dsno_cluster.errors import UserError
from dsno_cluster.trajectories.exchange.lmdb_tree import Tree
from dsno_cluster.trajectories.exchange.samples import BadPart, ForeignSample, PartFile, Samples
from dsno_cluster.trajectories.exchange.webdataset import class_number

DATA = "data.mdb"
MEMBERS = {
    "latents_{i}_data": "float16 (steps + 1, 1, C, H, W): the noise, the states at path_timesteps, and the clean image",
    "prompts_{i}_data": "the class as a number in UTF-8; empty without classes",
    "latents_shape": "the shape of all rows together, as text: N, steps + 1, 1, C, H, W",
    "prompts_shape": "the number of rows, as text",
}
_PAGE = 4096


def part_key(number: int) -> str:
    """One environment a part; `ShardingLMDBDataset` takes the folder lmdb/, in which nothing else may lie."""
    return f"lmdb/shard_{number:05d}/{DATA}"


def check_installed() -> None:
    """Raises UserError without the library."""
    try:
        import lmdb  # noqa: F401
    except ImportError:
        raise UserError(
            "--format lmdb: needs the package lmdb: pip install 'dsno-cluster[export]', or pip install lmdb"
        ) from None


def encode(samples: Samples) -> bytes:
    """The data file of an environment with the samples, numbered from 0."""
    import lmdb

    rows = [
        np.stack([*path.numpy(), latent.numpy()])[:, None]
        for path, latent in zip(samples.path, samples.latent, strict=True)
    ]
    shape = " ".join(map(str, (len(rows), *rows[0].shape)))
    pages = sum(-(-(row.nbytes + 64) // _PAGE) + 1 for row in rows)
    with tempfile.TemporaryDirectory(prefix="dsno-lmdb-") as folder:
        environment = lmdb.open(folder, map_size=2 * _PAGE * (pages + 64), lock=False, sync=False)
        try:
            with environment.begin(write=True) as transaction:
                for index, row in enumerate(rows):
                    transaction.put(f"latents_{index}_data".encode(), row.tobytes())
                    label = "" if samples.labels is None else str(int(samples.labels[index]))
                    transaction.put(f"prompts_{index}_data".encode(), label.encode())
                transaction.put(b"latents_shape", shape.encode())
                transaction.put(b"prompts_shape", str(len(rows)).encode())
            environment.sync(True)
        finally:
            environment.close()
        return Path(folder, DATA).read_bytes()


class LmdbPart:
    """An open environment. Raises BadPart if it is damaged, or is not one of ODE pairs."""

    def __init__(self, file: PartFile, where: str) -> None:
        self.where = where
        self.tree = Tree(_mapped(file, where), where)
        self.shape = self._shape()
        self.count = self.shape[0]

    def _shape(self) -> tuple[int, ...]:
        text = self.tree.get(b"latents_shape")
        if text is None:
            raise BadPart(f"{self.where}: has no latents_shape, as the ODE pairs of CausVid have")
        words = bytes(text[:200]).decode(errors="replace").split()
        if not words or not all(word.isascii() and word.isdigit() and len(word) < 12 for word in words):
            raise BadPart(f"{self.where}: latents_shape {' '.join(words)[:60]!r} is not a list of sizes")
        shape = tuple(map(int, words))
        frames = shape[2] if len(shape) == 6 else None
        if frames is None or min(shape) < 1:
            raise BadPart(
                f"{self.where}: latents_shape {' '.join(words)}: needs 6 sizes above 0: rows, steps, frames, C, H, W"
            )
        if frames != 1:
            raise BadPart(
                f"{self.where}: latents_shape {' '.join(words)}: videos of {frames} frames; students here take images, 1 frame"
            )
        return shape

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> ForeignSample:
        import torch

        where = f"{self.where}: latents_{index}_data"
        row = self.tree.get(f"latents_{index}_data".encode())
        if row is None:
            raise BadPart(f"{where}: is missing, latents_shape says {self.count} rows")
        steps, _, *shape = self.shape[1:]
        needed = 2 * int(np.prod(self.shape[1:], dtype=object))
        if len(row) != needed:
            raise BadPart(f"{where}: has {len(row):,} bytes; float16 of latents_shape has {needed:,}")
        states = np.frombuffer(row, np.float16).reshape(steps, *shape).copy()
        prompt = bytes(self.tree.get(f"prompts_{index}_data".encode()) or b"")
        label = class_number(prompt, f"{self.where}: prompts_{index}_data") if prompt else None
        path = torch.from_numpy(states)
        return ForeignSample(where, path[:-1], None, path[-1], label, None)


def _mapped(file: PartFile, where: str) -> memoryview:
    if isinstance(file, io.BytesIO):
        return file.getbuffer().toreadonly()
    try:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except ValueError:  # it is empty
        raise BadPart(f"{where}: is empty; copy it again") from None
