"""Folders of pictures as people have them: which files are taken, and how a picture becomes 8-bit RGB.

Taken are the still pictures of PICTURES, in the order of their paths, in the folder, its subfolders and linked
folders. Everything else is left out, and said. A picture whose pixels in RGB are not certain is refused by name:
no figure may depend on a background or a colour profile that nobody chose.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from dsno_cluster.errors import UserError, said_by
from dsno_cluster.weight_files import HEAD, disguise

# counted up when a picture is read as other pixels than before: statistics that were kept are then computed again
READING = 2
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MODES = ("1", "L", "P", "RGB", "RGBX", "YCbCr")  # whose pixels in RGB are certain
WITH_ALPHA = ("LA", "PA", "RGBA")
_WHAT = {
    "CMYK": "ink, whose colours depend on a profile",
    "LAB": "CIE Lab",
    "I": "32-bit numbers of any range",
    "F": "floating-point numbers of any range",
}
# what Pillow raises for damaged files of its many formats
_DAMAGED = (
    *(OSError, ValueError, SyntaxError, LookupError, TypeError, AttributeError, EOFError, MemoryError),
    *(OverflowError, RuntimeError, ZeroDivisionError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)


@dataclass(frozen=True)
class FoundPictures:
    """The pictures of a folder, and how many of its files were left out, by reason.

    `names` are their paths below the folder as they were found, which differ from `files` if there are links.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]
    left_out: dict[str, int]

    @property
    def note(self) -> str | None:
        """What was left out, in words; None if nothing was."""
        if not self.left_out:
            return None
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.left_out.items()))
        return f"{len(self.files)} pictures taken, left out: {reasons}"


def find_pictures(folder: Path) -> FoundPictures:
    """The pictures in a folder and below it. A linked folder is followed, each folder once.

    Raises UserError for a folder that cannot be listed.
    """
    refuse_bombs()

    def unlisted(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be listed: {error.strerror}")

    files: list[tuple[str, str]] = []
    left_out: Counter[str] = Counter()
    root = os.path.realpath(folder)
    seen = {root}
    for here, folders, names in os.walk(folder, onerror=unlisted, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(here, name))
            if name.startswith("."):
                left_out["hidden folders"] += 1
            elif real in seen or root.startswith(real + os.sep):
                left_out["links to folders that are taken anyway"] += 1
            else:
                kept.append(name)
                seen.add(real)
        folders[:] = kept
        for name in names:
            path = os.path.join(here, name)
            if reason := _why_not(path, name):
                left_out[reason] += 1
            else:
                files.append((os.path.realpath(path), os.path.relpath(path, folder)))
    files.sort()
    return FoundPictures(tuple(Path(f) for f, _ in files), tuple(name for _, name in files), dict(left_out))


def refuse_bombs() -> None:
    """In whatever thread a picture is read from now on: a bomb is an error, and what is damaged is said by us."""
    warnings.filterwarnings("ignore", module=r"PIL\.")
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def _why_not(path: str, name: str) -> str | None:
    """Why a file is not taken as a picture, in the plural; None if it is."""
    suffix = os.path.splitext(name)[1].lower()
    if name.startswith("."):
        return "hidden files (such as .DS_Store, ._0.png)"
    if suffix not in PICTURES:
        return f"{suffix} files" if suffix else "files without a suffix"
    return None if os.path.isfile(path) else "broken links"


def read_picture(file: Path) -> np.ndarray:
    """A picture as `decode_picture` gives it. Raises UserError, naming the file, as that does."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror or error}") from None
    return decode_picture(data, str(file))


def decode_picture(data: bytes, where: str) -> np.ndarray:
    """A picture as 8-bit RGB (H, W, 3), upright as its EXIF orientation says.

    16 bits are reduced to their upper eight. Raises UserError, beginning with `where`, for a picture that is animated,
    transparent or of a mode without certain RGB, and for one that cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # in an MPO they are a photograph's previews
                raise UserError(
                    f"{where}: has {frames} frames or pages; save the one that is meant as a picture"
                )
            return _as_rgb(where, ImageOps.exif_transpose(image), image.format)
    except _DAMAGED as error:
        problem = disguise(data[:HEAD]) or f"cannot be read: {said_by('Pillow', error)}"
        raise UserError(f"{where}: {problem}") from None


def _as_rgb(where: str, image: Image.Image, form: str | None) -> np.ndarray:
    deep = image.mode.startswith("I;16") or (image.mode == "I" and form == "PNG")
    key = image.info.get("transparency")
    if image.mode in WITH_ALPHA or (key is not None and not deep):
        opaque = image.convert("RGBA")
        if opaque.getchannel("A").getextrema()[0] != 255:
            raise _transparent(where, image)
        return np.array(opaque.convert("RGB"))
    if deep:
        grey = np.asarray(image)
        if key is not None and (grey == key).any():
            raise _transparent(where, image)
        return np.repeat((grey.astype(np.int64) >> 8).astype(np.uint8)[..., None], 3, axis=2)
    if image.mode not in MODES:
        what = f" ({_WHAT[image.mode]})" if image.mode in _WHAT else ""
        raise UserError(f"{where}: is of mode {image.mode}{what}; convert it to 8-bit RGB first")
    return np.array(image.convert("RGB"))


def _transparent(where: str, image: Image.Image) -> UserError:
    return UserError(
        f"{where}: has transparent pixels (mode {image.mode}); put it on the background that is meant, and save it as RGB"
    )
