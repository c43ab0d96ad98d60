"""A set of images, whatever its files are: how many, of which shape, and each of them by its index."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config.base import Named, later
from dsno_cluster.files import shown_path

Shape = tuple[int, int, int]  # (C, H, W)
Rows = Callable[[Sequence[int]], Tensor]  # the rows of these indices, in their order


class DataIdentity(Named):
    """The identity of images, or of their statistics.

    It is a hash of their content; for pictures, of their files' names, sizes and times, and `reading` is the
    version of how their pixels are read.
    """

    kind: str
    sha256: str | None = later(None)
    bytes: int | None = later(None)
    files: str | None = later(None)
    reading: int | None = later(None)


@dataclass(frozen=True)
class ImageSet:
    """`count` images uint8 (C, H, W) of one shape: `at` gives those of some indices, `labels_at` their classes (N,) int64.

    `labels_at` is None if the classes are not known. `note`: which files of a folder were left out, if any were.
    With `dtype` float32 they are states of a model, latents for example, which are no images.
    """

    address: str
    count: int
    shape: Shape
    identify: Callable[[], DataIdentity]
    at: Rows
    labels_at: Rows | None = None
    note: str | None = None
    dtype: torch.dtype = torch.uint8
    classes_in: str = "its manifest"  # where their classes are looked for

    def read(self, start: int, stop: int) -> Tensor:
        """Images [start, stop)."""
        return self.at(range(start, stop))

    def labels(self, start: int, stop: int) -> Tensor | None:
        """The classes of images [start, stop), if they are known."""
        return None if self.labels_at is None else self.labels_at(range(start, stop))

    def say_note(self) -> None:
        """Say which files were left out, if any were."""
        if self.note is not None:
            console.say(f"note: {shown_path(self.address)}: {self.note}")

    @functools.cached_property
    def identity(self) -> DataIdentity:
        """Their identity, computed only when asked for: a whole file may have to be read."""
        return self.identify()


def rows_of(rows: Tensor) -> Rows:
    """The rows of a tensor in memory."""
    return lambda indices: rows[torch.as_tensor(indices, dtype=torch.int64)]


def lazily(make: Callable[[], Rows]) -> Rows:
    """The rows that `make` gives, which is called when they are first asked for, and only once."""
    made = functools.cache(make)
    return lambda indices: made()(indices)


def among(rows: Rows, chosen: Tensor) -> Rows:
    """The rows of the `chosen` indices, numbered anew."""
    return lambda indices: rows(chosen[torch.as_tensor(indices, dtype=torch.int64)].tolist())


def shape_of(image: Tensor) -> Shape:
    """(C, H, W) of an image."""
    channels, height, width = image.shape
    return int(channels), int(height), int(width)
