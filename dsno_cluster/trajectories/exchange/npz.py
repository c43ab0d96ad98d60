"""Parts as numpy archives, for anybody: `noise`, `states`, `latent`, `labels` and their times as plain arrays."""

from __future__ import annotations

import io
import zipfile
import zlib

import numpy as np

from dsno_cluster.errors import said_by
from dsno_cluster.trajectories.exchange.samples import BadPart, ForeignSample, PartFile, Samples

MEMBERS = {
    "path": "(N, steps, C, H, W): the noise, and the states at path_timesteps",
    "latent": "(N, C, H, W): the clean image, at the end of the path",
    "labels": "(N,) int64: the class of each sample; absent without classes",
}
_MOST_COMPRESSED = 100  # times; states and noise are not compressed to the half
_DAMAGED = (
    *(OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, MemoryError, OverflowError),
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),
)


def part_key(number: int) -> str:
    return f"part-{number:06d}.npz"


def encode(samples: Samples) -> bytes:
    """An uncompressed .npz of the samples. Equal samples give equal bytes."""
    arrays = {"path": samples.path.numpy(), "latent": samples.latent.numpy()}
    if samples.labels is not None:
        arrays["labels"] = samples.labels.numpy()
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


class NpzPart:
    """An open archive of `path` (N, steps, C, H, W) and `latent`, or of `noise` and `latent`, and perhaps `labels`.

    Nothing is unpickled. Raises BadPart for a damaged archive and for arrays that do not belong together.
    """

    def __init__(self, file: PartFile, where: str) -> None:
        self.where = where
        try:
            with zipfile.ZipFile(file) as archive:
                packed = sum(entry.compress_size for entry in archive.infolist())
                unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > _MOST_COMPRESSED * max(packed, 1):
                raise BadPart(f"{where}: unpacks to {unpacked:,} bytes from {packed:,}; no trajectories do")
            file.seek(0)
            with np.load(file, allow_pickle=False) as found:
                names = set(found.files)
                self.arrays = {
                    name: found[name] for name in ("path", "noise", "latent", "labels") if name in names
                }
        except _DAMAGED as error:
            raise BadPart(f"{where}: cannot be read: {said_by('numpy', error)}") from None
        if "latent" not in self.arrays or not {"path", "noise"} & set(self.arrays):
            raise BadPart(
                f"{where}: holds {', '.join(sorted(names)) or 'nothing'}; needs latent, and path or noise"
            )
        counts = {name: len(array) if array.ndim else 0 for name, array in self.arrays.items()}
        if len(set(counts.values())) != 1 or not counts["latent"]:
            raise BadPart(f"{where}: the numbers of samples differ or are 0: {counts}")
        if "labels" in self.arrays and (
            self.arrays["labels"].ndim != 1 or self.arrays["labels"].dtype.kind not in "iu"
        ):
            raise BadPart(
                f"{where}: labels are {self.arrays['labels'].dtype}; class numbers are whole numbers (N,)"
            )

    def __len__(self) -> int:
        return len(self.arrays["latent"])

    def sample(self, index: int) -> ForeignSample:
        import torch

        def tensor(name: str) -> torch.Tensor | None:
            if name not in self.arrays:
                return None
            array = self.arrays[name][index]
            if array.dtype.kind != "f" or array.dtype.itemsize > 8:
                raise BadPart(
                    f"{self.where}: {name} is {array.dtype}; states are float16, float32 or float64"
                )
            return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))

        label = int(self.arrays["labels"][index]) if "labels" in self.arrays else None
        where = f"{self.where}: sample {index}"
        return ForeignSample(where, tensor("path"), tensor("noise"), tensor("latent"), label, None)
