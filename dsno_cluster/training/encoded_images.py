"""Images as the latents of a decoder's own autoencoder: encoded once, and kept in memory or in files.

What is above `IN_MEMORY` is kept below the run's folder, in files of safetensors of `PART` bytes: each is written whole or
not at all, so that an interrupted run continues after the last, and processes that share the folder share the work.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.errors import WorkError
from dsno_cluster.files import locked_if_possible, written_aside
from dsno_cluster.image_sets.image_set import Rows, rows_of
from dsno_cluster.teachers import Decoder
from dsno_cluster.teachers.teacher import Shape

IN_MEMORY = 2**32  # bytes of latents that are kept in memory
PART = 2**28  # bytes of a file of them
BATCH = 64  # images encoded at a time

Encode = Callable[[range], Tensor]


def encoded_images(
    images: Rows,
    count: int,
    decoder: Decoder,
    shape: Shape,
    folder: Path,
    device: torch.device | None,
    quiet: bool,
) -> Rows:
    """The latents (C, h, w) of `shape` of `count` images in [-1, 1], encoded on `device`; large sets are kept in `folder`.

    Raises WorkError if they cannot be written.
    """
    encoder = functools.cache(lambda: decoder.load_encoder(device))
    size = 4 * math.prod(shape)
    with console.progress("encoding the real images", count, "images", quiet=quiet) as advance:

        def encode(rows: range) -> Tensor:
            found = []
            for start in range(rows.start, rows.stop, BATCH):
                some = range(start, min(start + BATCH, rows.stop))
                found.append(encoder()(images(some)))
                advance(len(some))
            return torch.cat(found).contiguous()  # a network may leave channels last

        if count * size <= IN_MEMORY:
            return rows_of(encode(range(count)))
        per_part = max(1, PART // size)
        parts = {
            folder / f"part-{start // per_part:05d}.safetensors": range(start, min(start + per_part, count))
            for start in range(0, count, per_part)
        }
        try:
            _write_missing(parts, encode)
        except OSError as error:
            raise WorkError(f"{error.filename or folder}: cannot be written: {error.strerror}") from error
    files = [safetensors.safe_open(file, "pt") for file in parts]

    def at(indices: Sequence[int]) -> Tensor:
        places = [divmod(index, per_part) for index in indices]
        return torch.cat([files[part].get_slice("states")[row : row + 1] for part, row in places])

    return at


def _write_missing(parts: dict[Path, range], encode: Encode) -> None:
    """Write the files that do not exist yet; those that another process is writing are waited for at the end."""
    for wait in (False, True):
        for file, rows in parts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with locked_if_possible(file.with_name(f".{file.name}.lock"), wait=wait):
                    if not file.exists():
                        with written_aside(file) as aside:
                            safetensors.torch.save_file({"states": encode(rows)}, aside)
                            os.replace(aside, file)
            except BlockingIOError:
                continue
