"""The classes of a folder's pictures, as people note them.

Looked for are, in this order:

    dataset.json        {"labels": [["00000/img00000000.png", 3], ...]}, as EDM's and StyleGAN's dataset tools write it
    labels.csv          rows of file and class, with or without a heading
    names of subfolders the first folder of each picture's path, numbered in sorted order, as torchvision's ImageFolder does
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dsno_cluster.errors import UserError, said_by
from dsno_cluster.storage import MissingObject, Storage

DATASET, TABLE = "dataset.json", "labels.csv"
PLACES = f"{DATASET} and {TABLE} in the folder, then the names of its subfolders"


def picture_labels(names: Sequence[str], folder: Storage, num_classes: int) -> Tensor | None:
    """The classes (N,) int64 of pictures by their paths below the `folder`; None if nothing says them.

    Raises UserError if a file of classes is damaged or leaves out a picture, and for other than `num_classes` subfolders,
    whose numbers would not be those of the network's classes.
    """
    where = folder.url
    if (data := _read(folder, DATASET)) is not None:
        noted = _of_dataset(data, f"{where}/{DATASET}")
        return None if noted is None else _numbers(names, noted, f"{where}/{DATASET}")
    if (data := _read(folder, TABLE)) is not None:
        return _numbers(names, _of_table(data, f"{where}/{TABLE}"), f"{where}/{TABLE}")
    folders = [name.partition("/")[0] if "/" in name else None for name in names]
    if None in folders:
        return None
    numbers = {folder: number for number, folder in enumerate(sorted({str(f) for f in folders}))}
    if len(numbers) != num_classes:
        raise UserError(
            f"{where}: its pictures are in {len(numbers)} subfolders, and the network has {num_classes} classes; note the "
            f"class of each picture in {DATASET} or {TABLE}"
        )
    return torch.tensor([numbers[str(folder)] for folder in folders])


def _read(folder: Storage, name: str) -> bytes | None:
    try:
        return folder.read(name)
    except MissingObject:
        return None


def _of_dataset(data: bytes, where: str) -> dict[str, Any] | None:
    try:
        found = json.loads(data)
        labels = found.get("labels")
        return (
            None if labels is None else {str(name).replace("\\", "/"): c for name, c in dict(labels).items()}
        )
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{where}: is not as EDM\'s dataset tool writes it, {{"labels": [[file, class], ...]}}: {said_by("json", error)}'
        ) from None


def _of_table(data: bytes, where: str) -> dict[str, Any]:
    try:
        rows = [row for row in csv.reader(io.StringIO(data.decode("utf-8-sig"))) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{where}: is not a table in UTF-8: {said_by('csv', error)}") from None
    if rows and not _is_number(rows[0][-1]):
        rows = rows[1:]  # a heading
    if wrong := next((row for row in rows if len(row) != 2 or not _is_number(row[1])), None):
        raise UserError(
            f"{where}: the row {','.join(wrong)[:80]!r} is not a file and its class, a whole number"
        )
    return {name.strip(): int(number) for name, number in rows}


def _is_number(text: str) -> bool:
    text = text.strip()
    return text.isascii() and text.isdigit() and len(text) < 10


def _numbers(names: Sequence[str], noted: dict[str, Any], where: str) -> Tensor:
    missing = [name for name in names if name not in noted]
    if missing:
        raise UserError(f"{where}: says no class of {missing[0]}, nor of {len(missing) - 1} other pictures")
    found = [noted[name] for name in names]
    if wrong := next((n for n in found if type(n) is not int), None):
        raise UserError(f"{where}: the class {str(wrong)[:40]!r} is no whole number")
    return torch.tensor(found)
