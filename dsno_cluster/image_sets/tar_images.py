"""WebDataset tars as a set of images: members KEY.png, .jpg, .jpeg, .webp or .npy, and KEY.cls or KEY.json for the class.

The tars are walked once; then each image is read by its place in them, and nothing is unpacked to the disk.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsno_cluster.errors import UserError, said_by
from dsno_cluster.image_sets.image_set import DataIdentity, ImageSet, Shape, rows_of, shape_of
from dsno_cluster.image_sets.npz_file import parse_npy
from dsno_cluster.image_sets.picture_files import READING, decode_picture, refuse_bombs
from dsno_cluster.image_sets.picture_images import in_threads, pictures_at
from dsno_cluster.storage import Storage, open_storage
from dsno_cluster.trajectories.exchange.sources import open_file
from dsno_cluster.trajectories.exchange.webdataset import class_number, open_tar, read_member

PIXELS = ("png", "jpg", "jpeg", "webp")
STATES = "npy"
CLASSES = ("cls", "json")
PLACES = 'the members KEY.cls, a number, and KEY.json, {"label": number}'
_WILD = re.compile(r"[*?\[{]")


class _Place(NamedTuple):
    """Where an image is: the number of its tar, its name, offset and size in it; its class, if that is known."""

    tar: int
    name: str
    offset: int
    size: int
    label: int | None


def is_name_of_tars(address: str) -> bool:
    """Whether an address names tars: one of them, or several by a pattern."""
    return address.endswith(".tar")


def tars_at(address: str, endpoint_url: str | None) -> tuple[Storage, list[str]]:
    """The folder or prefix, and the keys of the tars in it, that an address with `*`, `?`, `{a,b}` and `{000..146}` names.

    Raises UserError if none is there, or one of those that braces name is missing.
    """
    wild = _WILD.search(address)
    folder = address[: wild.start() if wild else len(address)].rpartition("/")[0]
    pattern = address[len(folder) + 1 :]
    storage = open_storage(folder, endpoint_url)
    there = [stat.key for stat in storage.list("")]
    found: list[str] = []
    for name in expand_braces(pattern):
        matching = [key for key in there if _matches(key, name)]
        if not matching:
            raise UserError(f"{storage.url}/{name}: no such tar")
        found += [key for key in matching if key not in found]
    return storage, found


def tars_in(storage: Storage) -> list[str]:
    """The keys of the tars of a folder or prefix, without those in folders below it."""
    return [s.key for s in storage.list("") if s.key.endswith(".tar") and "/" not in s.key]


def expand_braces(pattern: str) -> list[str]:
    """What a shell makes of `{a,b}` and `{008..146}`: the names, in order; numbers keep their zeros in front."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        first, last = numbers.groups()
        width = len(first) if first.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = found[1].split(",")
    before, after = pattern[: found.start()], pattern[found.end() :]
    return list(
        itertools.chain.from_iterable(expand_braces(f"{before}{choice}{after}") for choice in choices)
    )


def tar_images(
    storage: Storage, keys: Sequence[str], address: str, states: Shape | None, *, num_classes: int
) -> ImageSet:
    """The image set of the tars of these keys, in their order.

    With the shape of `states`, members .npy of floating-point numbers of that shape are taken as states. Raises UserError,
    naming the member, for a damaged tar, for a sample of two images, and for images of two kinds or sizes.
    """
    refuse_bombs()
    places = [
        place for number, key in enumerate(keys) for place in _places(storage, key, number, num_classes)
    ]
    if not places:
        raise UserError(f"{address}: holds no KEY.{', KEY.'.join((*PIXELS, STATES))}")
    of_states = {_kind(place.name) == STATES for place in places}
    if len(of_states) > 1:
        raise UserError(f"{address}: holds .{STATES} and pictures; keep those of one kind in a set")

    def where(index: int) -> str:
        return f"{storage.url}/{keys[places[index].tar]}: {places[index].name}"

    def data(index: int) -> bytes:
        place = places[index]
        return storage.read(keys[place.tar], place.offset, place.offset + place.size)

    def identify() -> DataIdentity:
        digest = hashlib.sha256()
        for place in places:
            digest.update(json.dumps([keys[place.tar], place.name, place.size]).encode())
        return DataIdentity(kind="tars", files=digest.hexdigest(), reading=READING)

    labels = _labels(places, where) if num_classes else None
    labels_at = None if labels is None else rows_of(labels)
    if True not in of_states:
        read, at = pictures_at(where, lambda i: decode_picture(data(i), where(i)))
        return ImageSet(address, len(places), shape_of(read(0)), identify, at, labels_at, classes_in=PLACES)
    if states is None:
        raise UserError(f"{address}: holds states (.{STATES}), and pictures are needed")

    def state(index: int) -> Tensor:
        return torch.from_numpy(parse_npy(data(index), states, where(index)))

    state(0)  # a mistake is reported at once
    return ImageSet(
        address,
        len(places),
        states,
        identify,
        lambda indices: in_threads(state, indices),
        labels_at,
        dtype=torch.float32,
        classes_in=PLACES,
    )


def _places(storage: Storage, key: str, number: int, num_classes: int) -> Iterator[_Place]:
    """The images of tar `number`; a sample without an image is left out."""
    where = f"{storage.url}/{key}"
    with open_file(storage, key) as file:
        tar, samples = open_tar(file, where, (*PIXELS, STATES, *CLASSES))
        for name, members in samples:
            shown = f"{where}: {name.lstrip('/')}"
            images = [kind for kind in members if kind not in CLASSES]
            if len(images) > 1:
                raise UserError(f"{shown}: has {' and '.join(images)}; keep one image of each sample")
            if not images:
                continue
            label = None
            if num_classes:
                noted = {kind: read_member(tar, members[kind], where) for kind in CLASSES if kind in members}
                label = _label(noted, shown)
            member = members[images[0]]
            yield _Place(number, member.name, member.offset_data, member.size, label)


def _kind(name: str) -> str:
    return name.rpartition("/")[2].partition(".")[2]


def _label(noted: dict[str, bytes], where: str) -> int | None:
    found = set()
    if "cls" in noted:
        found.add(class_number(noted["cls"], f"{where}.cls"))
    if "json" in noted:
        try:
            content = json.loads(noted["json"])
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}.json: cannot be read: {said_by('json', error)}") from None
        label = content.get("label") if isinstance(content, dict) else None
        if label is not None and type(label) is not int:
            raise UserError(f"{where}.json: the label {str(label)[:40]!r} is no whole number")
        if label is not None:
            found.add(label)
    if len(found) > 1:
        raise UserError(
            f"{where}: cls and json say different classes: {' and '.join(map(str, sorted(found)))}"
        )
    return next(iter(found), None)


def _labels(places: Sequence[_Place], where: Callable[[int], str]) -> Tensor | None:
    """The classes (N,) of all images; None if none has one. Raises UserError if only some have."""
    found = [place.label for place in places]
    if set(found) == {None}:
        return None
    if None in found:
        raise UserError(f"{where(found.index(None))}: has no class, and others have; looked for are {PLACES}")
    return torch.tensor(found)


def _matches(key: str, pattern: str) -> bool:
    """As in a shell, `*` does not match a slash."""
    return key.count("/") == pattern.count("/") and fnmatch.fnmatchcase(key, pattern)
