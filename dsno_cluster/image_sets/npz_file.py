"""Files of numpy arrays (.npz): batches of images, and statistics of them. Nothing in them is unpickled."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

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
    name = next((name for name in IMAGES if name in array_names(file)), None)
    if name is None:
        return None
    try:
        with zipfile.ZipFile(file) as archive:
            info = archive.getinfo(f"{name}.npy")
            with archive.open(info) as member:
                version = np.lib.format.read_magic(member)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = header(member)
                before = member.tell()
    except _DAMAGED as error:
        raise UserError(f"{file}: {name} cannot be read: {said_by('numpy', error)}") from None
    if dtype != np.uint8 or len(shape) != 4:
        raise UserError(f"{file}: {name} is {dtype} of {shape}; images are uint8 of four axes")
    if 0 in shape:
        raise UserError(f"{file}: {name} is empty: its shape is {shape}")
    if info.compress_type != zipfile.ZIP_STORED:
        return name, read_arrays(file, [name])[0]
    try:
        with file.open("rb") as raw:  # the lengths in the local header give the offset of the member's bytes
            raw.seek(info.header_offset)
            local = raw.read(30)
        skip = 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
        start = info.header_offset + skip + before
        return name, np.memmap(file, np.uint8, "r", start, shape, "F" if fortran else "C")
    except _DAMAGED as error:
        raise UserError(f"{file}: {name} cannot be read: {said_by('numpy', error)}") from None
