"""Files of numpy arrays (.npz): batches of images, and statistics of them. Nothing in them is unpickled."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from dsno_cluster.errors import UserError, said_by
from dsno_cluster.files import not_there
from dsno_cluster.weight_files import HEAD, disguise

IMAGES = ("images", "arr_0")  # names of an array of images: ours, and ADM's
_DAMAGED = (
    *(OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, MemoryError, OverflowError),
    *(
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ),  # the last two: compressed otherwise, encrypted
)


def npz_file(address: str) -> Path:
    """The file at an .npz's address.

    Raises UserError for an s3:// address, from which only shards are read.
    """
    if "://" in address:
        raise UserError(f"{address}: an .npz is read only from a folder; copy it to one")
    return Path(address)


def array_names(file: Path) -> list[str]:
    """The names of the arrays. Raises UserError, in one line, for a file that is no .npz or was cut off."""
    if not file.exists():
        raise UserError(f"{file}: is missing: {not_there(file)}")
    try:
        with file.open("rb") as opened:
            head = opened.read(HEAD)
        if problem := disguise(head):
            raise UserError(f"{file}: {problem}")
        if head.startswith(b"\x93NUMPY"):
            raise UserError(f"{file}: is a single array (.npy), no .npz of arrays by name")
        if not zipfile.is_zipfile(file):
            cut = head.startswith(b"PK")
            raise UserError(
                f"{file}: {'is cut off; download or copy it again' if cut else 'is not an .npz file'}"
            )
        with zipfile.ZipFile(file) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    except _DAMAGED as error:
        raise UserError(f"{file}: cannot be read: {said_by('zipfile', error)}") from None


def read_arrays(file: Path, names: list[str]) -> list[np.ndarray]:
    """The arrays of these names. Raises UserError as `array_names` does, and if one is missing or damaged."""
    if missing := [name for name in names if name not in array_names(file)]:
        raise UserError(f"{file}: has no {' and no '.join(missing)}")
    try:
        with np.load(file, allow_pickle=False) as found:
            arrays = [found[name] for name in names]
    except _DAMAGED as error:
        what = " and ".join(names)
        raise UserError(f"{file}: {what} cannot be read: {said_by('numpy', error)}") from None
    return arrays


def find_images(file: Path) -> tuple[str, np.ndarray] | None:
    """Name and array of an .npz batch's images, memory-mapped if uncompressed; None if it has none.

    Raises UserError as `array_names` does, and if the images are not uint8 of four axes or there are none.
    """
    if (found := find_array(file, IMAGES)) is None:
        return None
    check_images(file, *found)
    return found


def check_images(file: Path, name: str, images: np.ndarray) -> None:
    """Raises UserError unless an array of an .npz is of images, uint8 of four axes."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise UserError(f"{file}: {name} is {images.dtype} of {images.shape}; images are uint8 of four axes")
    if 0 in images.shape:
        raise UserError(f"{file}: {name} is empty: its shape is {images.shape}")


def find_array(file: Path, names: Sequence[str]) -> tuple[str, np.ndarray] | None:
    """The first of these names that an .npz has, and its array, memory-mapped if uncompressed; None if it has none.

    Raises UserError as `array_names` does, and for an array of objects, which would have to be unpickled.
    """
    there = array_names(file)
    name = next((name for name in names if name in there), None)
    if name is None:
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as member:
                shape, fortran, dtype = _header(member)
                before = member.tell()
        if dtype.hasobject:
            raise UserError(f"{file}: {name} is an array of objects, which is not read")
        if info.compress_type != zipfile.ZIP_STORED or 0 in shape:
            return name, read_arrays(file, [name])[0]
        with file.open("rb") as raw:  # the lengths in the local header give the offset of the member's bytes
            raw.seek(info.header_offset)
            local = raw.read(30)
        skip = 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        start = info.header_offset + skip + before
        return name, np.memmap(file, dtype, "r", start, shape, "F" if fortran else "C")
    except _DAMAGED as error:
        raise UserError(f"{file}: {name} cannot be read: {said_by('numpy', error)}") from None


def parse_npy(data: bytes, shape: Sequence[int], where: str) -> np.ndarray:
    """The floating-point array of that `shape` in an .npy, as float32.

    Raises UserError, beginning with `where`, for anything else; the header is judged before any array is made.
    """
    opened = io.BytesIO(data)
    try:
        found, fortran, dtype = _header(opened)
        if found != tuple(shape) or dtype.kind != "f":
            wanted = "x".join(map(str, shape))
            raise UserError(f"{where}: is {dtype} of {found}, not floating-point numbers of {wanted}")
        flat = np.frombuffer(data, dtype, int(np.prod(found)), opened.tell())
        return flat.reshape(found, order="F" if fortran else "C").astype(np.float32)
    except _DAMAGED as error:
        raise UserError(f"{where}: cannot be read: {said_by('numpy', error)}") from None


def _header(opened: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is in Fortran's order, and dtype of an .npy, which is read up to its numbers."""
    version = np.lib.format.read_magic(opened)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return header(opened)
