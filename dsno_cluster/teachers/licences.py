"""What the files beside a teacher say of its licence: notes for people, not advice."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.storage import MissingObject, Storage, open_storage, split_path
from dsno_cluster.teachers.teacher import Source
from dsno_cluster.yaml_text import parse_yaml

NAMES = ("LICENSE", "LICENCE", "COPYING", "license", "licence")  # how the names of such files begin
CARD = "README.md"  # a model card, with YAML between lines of hyphens
MOST_BYTES = 65536  # that are read of a file
LONGEST = 120  # characters of a line that is shown


@dataclass(frozen=True)
class LicenceNote:
    """A file, and what it says: its first line, or the `license` of a model card."""

    file: str
    text: str


def licence_notes(source: Source) -> tuple[LicenceNote, ...]:
    """The notes of the teacher's folder, or of the folder that its file is in; none for what is not in files."""
    if ":" in source.path and "://" not in source.path:
        return ()
    try:
        storage = (
            open_storage(split_path(source.path)[0], source.endpoint_url)
            if source.is_file
            else source.storage
        )
        return (*_files(storage), *_card(storage))
    except (UserError, WorkError):  # it is a courtesy: the teacher was read
        return ()


def _files(storage: Storage) -> list[LicenceNote]:
    names = dict.fromkeys(s.key for start in NAMES for s in storage.list(start) if "/" not in s.key)
    notes = []
    for name in names:
        text = storage.read(name, 0, MOST_BYTES).decode(errors="replace")
        lines = [line.strip(" #*=-\t") for line in text.splitlines()]
        first = next((line for line in lines if line), "is empty")
        notes.append(LicenceNote(name, _printable(first)))
    return notes


def _card(storage: Storage) -> list[LicenceNote]:
    try:
        text = storage.read(CARD, 0, MOST_BYTES).decode(errors="replace")
    except MissingObject:
        return []
    front = re.match(r"\A---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        content = parse_yaml(front[1], CARD) if front else None
    except UserError:
        return []
    keys = ("license", "license_name", "license_link")
    said = [f"{key}: {content[key]}" for key in keys if key in content] if isinstance(content, dict) else []
    return [LicenceNote(CARD, _printable(", ".join(said)))] if said else []


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else " " for c in line)[:LONGEST]
