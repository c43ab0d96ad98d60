"""WebDataset tars as NVlabs/FastGen reads them for knowledge distillation.

Its loaders take the members `path.pth`, `noise.pth`, `latent.pth` and, for the condition, `txt_emb.pth` of each sample
(`PairLoaderConfig` and `PathLoaderConfig` in its `fastgen/configs/data.py`). Its class-conditional networks take a class
as a one-hot vector, and a data set without classes has a vector of length 0, as `ImageFolderDataset` there.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from dsno_cluster.errors import said_by
from dsno_cluster.trajectories.exchange.samples import BadPart, ForeignSample, PartFile, Samples
from dsno_cluster.weight_files import parse_torch

if TYPE_CHECKING:
    from torch import Tensor

MEMBERS = {
    "path.pth": "(steps, C, H, W): the noise, and the states at path_timesteps",
    "noise.pth": "(C, H, W): the first state of the path",
    "latent.pth": "(C, H, W): the clean image, at the end of the path",
    "txt_emb.pth": "the condition: the class as a one-hot vector (num_classes,), of length 0 without classes",
    "cls": "the class as a number; absent without classes",
}
COUNTS = "shard_count.json"  # samples of each tar, for FastGen's deterministic loader
_TENSORS = ("path.pth", "noise.pth", "latent.pth", "txt_emb.pth")
_READ = (*_TENSORS, "cls")
_BLOCK = 512


def part_key(number: int) -> str:
    """FastGen sorts tars by the number in their name."""
    return f"{number:05d}.tar"


def encode(samples: Samples) -> bytes:
    """A tar of the samples. Equal samples give equal bytes, with the same version of torch."""
    import torch

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for row, (path, latent) in enumerate(zip(samples.path, samples.latent, strict=True)):
            key = f"{samples.start + row:09d}"
            label = None if samples.labels is None else int(samples.labels[row])
            one_hot = torch.zeros(samples.num_classes)
            if label is not None:
                one_hot[label] = 1.0
                _add(tar, f"{key}.cls", str(label).encode())
            tensors = (path, path[0], latent, one_hot)
            for name, tensor in zip(_TENSORS, tensors, strict=True):
                _add(tar, f"{key}.{name}", _saved(tensor))
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # of owner 0 and time 0
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def _saved(tensor: Tensor) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(tensor.clone(), buffer)  # a view would bring the whole batch along
    return buffer.getvalue()


TarSamples = list[tuple[str, dict[str, tarfile.TarInfo]]]  # key, and members by the end of their names


def open_tar(file: PartFile, where: str, kinds: Collection[str]) -> tuple[tarfile.TarFile, TarSamples]:
    """A tar and its samples in order, each with its members KEY.KIND of these `kinds`.

    Raises BadPart for a tar that is damaged or cut off, and for members whose names or kinds no WebDataset has.
    """
    found: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (closed with its file)
        for member in tar:
            _note(member, found, kinds, where)
        _check_end(tar, file, where)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        raise BadPart(f"{where}: is cut off, or not a tar: {said_by('tarfile', error)}") from None
    return tar, [(key, members) for key, members in found.items() if members]


def _note(
    member: tarfile.TarInfo,
    found: dict[str, dict[str, tarfile.TarInfo]],
    kinds: Collection[str],
    tar: str,
) -> None:
    name, where = member.name, f"{tar}: {member.name[:100]}"
    if name.startswith("/") or ".." in name.split("/"):
        raise BadPart(f"{where}: a name that leads out of the archive; no WebDataset has one")
    if member.isdir():
        return
    if not member.isreg() or member.issparse():
        raise BadPart(f"{where}: is a link, a device or a sparse file; no WebDataset has one")
    folder, _, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    members = found.setdefault(f"{folder}/{stem}", {})
    if kind not in kinds:
        return
    if kind in members:
        raise BadPart(f"{where}: occurs twice")
    members[kind] = member


def _check_end(tar: tarfile.TarFile, file: PartFile, where: str) -> None:
    """A tar that is cut off between two members looks whole, except that its end mark is missing."""
    file.seek(tar.offset)
    mark = file.read(_BLOCK)
    if len(mark) < _BLOCK or mark.strip(b"\0"):
        raise BadPart(f"{where}: is cut off: the end mark of a tar is missing")


def read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> bytes:
    """The bytes of a regular member. Raises BadPart."""
    file = tar.extractfile(member)
    assert file is not None  # it is a regular one
    try:
        return file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadPart(f"{where}: {member.name}: cannot be read: {said_by('tarfile', error)}") from None


class TarPart:
    """An open tar. Only regular members are read, into memory; nothing is unpacked to the disk. Raises as `open_tar`."""

    def __init__(self, file: PartFile, where: str) -> None:
        self.where = where
        self.tar, self.samples = open_tar(file, where, _READ)
        if not self.samples:
            raise BadPart(f"{where}: holds no sample with {', '.join(_TENSORS[:3])}")

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> ForeignSample:
        key, members = self.samples[index]
        where = f"{self.where}: {key.lstrip('/')}"
        tensors = {
            name: self._tensor(members[name], f"{where}.{name}") for name in _TENSORS if name in members
        }
        condition = tensors.get("txt_emb.pth")
        label, num_classes = (
            (None, None) if condition is None else class_of(condition, f"{where}.txt_emb.pth")
        )
        if "cls" in members:
            number = class_number(read_member(self.tar, members["cls"], self.where), f"{where}.cls")
            if label is not None and label != number:
                raise BadPart(f"{where}: txt_emb.pth says class {label}, cls says {number}")
            label = number
        path, noise, latent = (tensors.get(name) for name in _TENSORS[:3])
        return ForeignSample(where, path, noise, latent, label, num_classes)

    def _tensor(self, member: tarfile.TarInfo, where: str) -> Tensor:
        import torch

        data = read_member(self.tar, member, self.where)
        if zipfile.is_zipfile(io.BytesIO(data)) and (unpacked := _unpacked(data, where)) > len(data):
            raise BadPart(
                f"{where}: unpacks to {unpacked:,} bytes from {len(data):,}; torch.save does not compress"
            )
        found: Any = parse_torch(data, where)
        if not isinstance(found, torch.Tensor) or found.layout != torch.strided:
            raise BadPart(f"{where}: holds a {type(found).__name__}; a plain tensor is needed")
        if found.numel() * found.element_size() > len(data):
            raise BadPart(
                f"{where}: a tensor of {tuple(found.shape)} in {len(data):,} bytes; save it with .contiguous()"
            )
        return found


def _unpacked(data: bytes, where: str) -> int:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise BadPart(f"{where}: is damaged: {said_by('zipfile', error)}") from None


def class_of(condition: Tensor, where: str) -> tuple[int | None, int]:
    """The class and the number of classes in a one-hot vector; (None, 0) for an empty one. Raises BadPart."""
    if condition.ndim != 1:
        raise BadPart(
            f"{where}: a condition of shape {tuple(condition.shape)}; students here take a class, a one-hot vector"
        )
    if not condition.numel():
        return None, 0
    ones = (condition == 1).nonzero()
    if len(ones) != 1 or int((condition != 0).sum()) != 1:
        raise BadPart(f"{where}: is no one-hot vector; students here take classes")
    return int(ones), len(condition)


def class_number(data: bytes, where: str) -> int:
    """The class in a text of digits. Raises BadPart."""
    text = data[:40].decode(errors="replace").strip()
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise BadPart(f"{where}: {text!r} is no class number; students here take classes, no texts")
    return int(text)
