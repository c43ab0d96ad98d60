"""Files of weights as people have them: what a file really is, and its tensors, read without running code.

A weights file is often something else: a Git LFS pointer, the web page of a failed download, a file that was
cut off. Each is reported in one line that names the file.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dsno_cluster.errors import UserError, said_by
from dsno_cluster.storage import Storage

if TYPE_CHECKING:
    from torch import Tensor

HEAD = 1 << 20  # bytes that are read first; they hold the header of nearly every safetensors file
_ZIP, _GZIP = b"PK\x03\x04", b"\x1f\x8b"
_TORCH = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # a number, pickled, with which torch.save began before it wrote zips
_MARKUP = (b"<!doctype", b"<html", b"<head", b"<body", b"<?xml", b"<!--", b"<script")
_AGAIN = "download or copy it again"


class NotWeights(UserError):
    """A file is not what its place says: a pointer, a web page, another format, or cut off."""


def disguise(head: bytes) -> str | None:
    """What a file is that begins with `head`, if that is never a file of weights or arrays; else None.

    The answer continues a sentence: "is a Git LFS pointer, ...".
    """
    head = head[:512]
    if not head:
        return f"is empty; {_AGAIN}"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; `git lfs pull` in its repository fetches that"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_MARKUP):
        return f"is a web page, perhaps the answer to a failed download; {_AGAIN}"
    if head.startswith(_GZIP):
        return "is compressed by gzip; unpack it first"
    if re.fullmatch(rb"[\t\r\n\x20-\x7e]+", head):
        return f"is text that begins with {head[:40].decode().strip()!r}; {_AGAIN}"
    return None


def file_sha256(file: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def container(head: bytes) -> str:
    """The format of a file of weights by its first bytes: 'safetensors', 'zip', 'pickle' or 'unknown'."""
    # first of all, since the length of a header may begin as a pickle does; none is longer than 2^40 bytes
    if head[5:9] == b"\0\0\0{":
        return "safetensors"
    if head[:4] == _ZIP:
        return "zip"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    return "unknown"


def is_torch_file(head: bytes) -> bool:
    """Whether a file begins as `torch.save` begins its files."""
    return head.startswith((_ZIP, _TORCH))


def check_safetensors(storage: Storage, key: str, where: str) -> None:
    """Raises NotWeights unless `key` is a whole safetensors file, as judged by its header and its size."""
    found = storage.stat(key)
    if found is None:
        raise NotWeights(f"{where}: is missing")
    head = storage.read(key, 0, HEAD)
    if container(head) == "safetensors" and (end := _header_end(head)) > len(head) and end <= found.size:
        head += storage.read(key, len(head), end)
    _check_header(head, found.size, where)


def check_safetensors_data(data: bytes, where: str) -> None:
    """As `check_safetensors`, for a file that is in memory."""
    _check_header(data, len(data), where)


def check_torch_data(data: bytes, where: str) -> None:
    """Raises NotWeights unless `torch.save` wrote the file and its end is not missing; its content is not read."""
    with io.BytesIO(data) as opened:
        _check_torch(opened, where)


def parse_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises NotWeights."""
    import safetensors.torch

    check_safetensors_data(data, where)
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise NotWeights(f"{where}: {said_by('safetensors', error)}") from None


def parse_torch(file: bytes | Path, where: str, allowed: Sequence[type] = ()) -> Any:
    """What `torch.save` wrote: tensors in plain containers and objects of the `allowed` types, nothing that can run code.

    From a path, tensors are mapped where the format permits it. Raises NotWeights.
    """
    import torch

    with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as opened:
        _check_torch(opened, where)
        mapped = isinstance(file, Path) and _is_zip(opened)
        try:
            with torch.serialization.safe_globals(list(allowed)):
                source = str(file) if mapped else opened
                return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped or None)
        except (
            *(pickle.UnpicklingError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, struct.error),
            *(LookupError, AssertionError, TypeError, AttributeError, NotImplementedError, OSError),
        ) as error:
            raise NotWeights(f"{where}: {_of_torch(error, allowed)}") from None


def _of_torch(error: Exception, allowed: Sequence[type]) -> str:
    """Why torch could not read a file, without its advice to read it with less care."""
    text = " ".join(str(error).split())
    if unsafe := re.search(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", text):
        kinds = " and ".join(["tensors", *(f"{kind.__module__}.{kind.__qualname__}" for kind in allowed)])
        return f"names {unsafe[1]}, which could run code; only {kinds} are read"
    if careful := re.search(r"WeightsUnpickler error: (.*?)(?: Check the documentation| Please|$)", text):
        return f"is damaged, or holds more than tensors: torch says: {careful[1][:100]}"
    return f"is cut off or damaged: {said_by('torch', error)}"


def parse_weights(file: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a state dict, as safetensors or as `torch.save` wrote it. Raises NotWeights."""
    with file.open("rb") as opened:
        head = opened.read(HEAD)
    if disguise(head) is None and container(head) == "safetensors":
        return parse_safetensors(file.read_bytes(), where)
    import torch

    found = parse_torch(file, where)
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise NotWeights(f"{where}: holds {type(found).__name__}, not tensors by name")
    return {str(name): tensor for name, tensor in found.items()}


def check_fit(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str) -> None:
    """Raises UserError, beginning with `what`, that names the first tensors that are not those of a network.

    They are missing, surplus, misshapen or not finite.
    """
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is not of this network" for name in found if name not in wanted]
    wrong += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    wrong += [
        f"{name} holds numbers that are not finite"
        for name in wanted
        if name in found and found[name].is_floating_point() and not bool(found[name].isfinite().all())
    ]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{what}: {'; '.join(wrong[:4])}{more}")


def _check_torch(file: BinaryIO, where: str) -> None:
    """Raises NotWeights for a file that `torch.save` did not write, or whose end is missing."""
    head = file.read(HEAD)
    file.seek(0)
    if problem := disguise(head):
        raise NotWeights(f"{where}: {problem}")
    kind = container(head)
    if kind == "zip" and not _is_zip(file):
        raise NotWeights(f"{where}: is cut off: the end of the file is missing; {_AGAIN}")
    if kind in ("safetensors", "unknown"):
        raise NotWeights(f"{where}: is not a file of torch.save")


def _is_zip(file: BinaryIO) -> bool:
    """Whether a file ends as a zip does; it is read from its beginning again afterwards."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # its end is damaged
        return False
    finally:
        file.seek(0)


def _header_end(head: bytes) -> int:
    return 8 + int.from_bytes(head[:8], "little")


def _check_header(head: bytes, size: int, where: str) -> None:
    """Raises NotWeights unless a file of `size` bytes that begins with `head` is a whole safetensors file.

    `head` holds the header, unless the file ends before it does.
    """
    if problem := disguise(head):
        raise NotWeights(f"{where}: {problem}")
    kind = container(head)
    if kind in ("zip", "pickle"):
        raise NotWeights(
            f"{where}: is a file of torch.save or another pickle, which may run code when read; save the model as safetensors"
        )
    if kind != "safetensors":
        raise NotWeights(f"{where}: is not a safetensors file")
    end = _header_end(head)
    if end <= size:
        try:
            entries = json.loads(head[8:end])
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            end += max(ends, default=0)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise NotWeights(f"{where}: has a damaged header: {said_by('json', error)}") from None
    if size < end:
        raise NotWeights(f"{where}: is cut off: it has {size:,} bytes of {end:,}; {_AGAIN}")
    if size > end:
        raise NotWeights(f"{where}: has {size - end:,} bytes too many after its tensors; {_AGAIN}")
