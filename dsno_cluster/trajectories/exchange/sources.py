"""Somebody's trajectories, before they are converted: their parts, how many samples each has, and at which times."""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import JsonValue

from dsno_cluster import console
from dsno_cluster.diffusion.scales import SCALES, ScaleName, largest_timestep, noise_timestep
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import FolderStorage, Storage
from dsno_cluster.trajectories.exchange.formats import FORMATS
from dsno_cluster.trajectories.exchange.index import INDEX, ExportIndex, read_foreign_index, read_index
from dsno_cluster.trajectories.exchange.samples import BadPart, ForeignSample, OpenPart, PartFile
from dsno_cluster.trajectories.spec import ExchangeFormat


@dataclass(frozen=True)
class SourcePart:
    """A file of samples [start, stop) and its sha256."""

    key: str
    start: int
    stop: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Trajectories to import. `timesteps` are the path's, without the clean end, or None for pairs of noise and image."""

    storage: Storage
    format: ExchangeFormat
    parts: tuple[SourcePart, ...]
    index: ExportIndex | None

    @property
    def num_samples(self) -> int:
        return self.parts[-1].stop

    @property
    def sha256(self) -> str:
        """A hash of the names and contents of all parts."""
        return canonical_hash({part.key: part.sha256 for part in self.parts})

    @property
    def where(self) -> str:
        return self.storage.url


def find_source(storage: Storage, format: ExchangeFormat | None) -> Source:
    """The parts below a storage, each read once for its sha256 and number of samples, unless an index of ours has them.

    Raises UserError if there are none, or of several formats, and BadPart for a part that cannot be read.
    """
    index = read_index(storage)
    if index is not None and format not in (None, index.format):
        raise UserError(f"--format {format}: {storage.url}/{INDEX} says {index.format}")
    if index is not None:
        parts = tuple(SourcePart(p.key, p.start, p.stop, p.sha256) for p in index.parts)
        return Source(storage, index.format, parts, index)
    keys = [stat.key for stat in storage.list("") if not stat.key.rpartition("/")[2].startswith(".")]
    there = {name: [key for key in keys if key.endswith(way.ending)] for name, way in FORMATS.items()}
    named = [format] if format else [name for name, found in there.items() if found]
    if len(named) > 1:
        raise UserError(f"{storage.url}: holds parts of {' and '.join(named)}; choose one with --format")
    if not named or not there[named[0]]:
        endings = ", ".join(f"{FORMATS[n].ending} ({n})" for n in (named or FORMATS))
        raise UserError(f"{storage.url}: no trajectories to import here: no file that ends in {endings}")
    chosen = named[0]
    return Source(
        storage, chosen, tuple(_survey(storage, chosen, sorted(there[chosen], key=_by_numbers))), None
    )


def _survey(storage: Storage, format: ExchangeFormat, keys: Sequence[str]) -> list[SourcePart]:
    found: list[SourcePart] = []
    with console.progress("reading", len(keys), "parts") as advance:
        for key in keys:
            with open_file(storage, key) as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
                file.seek(0)
                count = len(FORMATS[format].open(file, f"{storage.url}/{key}"))
            start = found[-1].stop if found else 0
            found.append(SourcePart(key, start, start + count, sha256))
            advance(1)
    return found


def _by_numbers(key: str) -> list[tuple[int, str]]:
    """Sorts shard_2 before shard_10."""
    return [(int(text), "") if text.isdigit() else (-1, text) for text in re.split(r"(\d+)", key)]


def open_file(storage: Storage, key: str) -> PartFile:
    """A part, open for reading: a file of a folder, or in memory. Raises WorkError if it cannot be read."""
    if not isinstance(storage, FolderStorage):
        return io.BytesIO(storage.read(key))
    path = storage.root / key
    try:
        return path.open("rb")
    except OSError as error:
        raise WorkError(f"{path}: cannot be read: {error.strerror}") from None


class SourceReader:
    """Samples of a source by number; one part is open at a time, and was checked against its sha256."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.starts = [part.start for part in source.parts]
        self.opened: tuple[int, PartFile, OpenPart] | None = None

    def sample(self, number: int) -> ForeignSample:
        """Sample `number`. Raises BadPart, and WorkError if a part has changed."""
        at = bisect.bisect_right(self.starts, number) - 1
        if self.opened is None or self.opened[0] != at:
            self.close()
            self.opened = self._open(at)
        return self.opened[2].sample(number - self.starts[at])

    def _open(self, at: int) -> tuple[int, PartFile, OpenPart]:
        part, storage = self.source.parts[at], self.source.storage
        where = f"{storage.url}/{part.key}"
        file = open_file(storage, part.key)
        if hashlib.file_digest(file, "sha256").hexdigest() != part.sha256:
            file.close()
            of = INDEX if self.source.index else "when this command began"
            raise BadPart(f"{where}: does not have the sha256 of {of}; copy or export it again")
        file.seek(0)
        opened = FORMATS[self.source.format].open(file, where)
        if len(opened) != part.stop - part.start:
            raise BadPart(f"{where}: holds {len(opened)} samples, {INDEX} says {part.stop - part.start}")
        return at, file, opened

    def close(self) -> None:
        if self.opened is not None:
            self.opened[1].close()
            self.opened = None


@dataclass(frozen=True)
class Times:
    """The scale and times of a source's states: `timesteps` from the noise down, without 0. `ends_clean`: paths have 0 too."""

    scale: ScaleName
    timesteps: tuple[float, ...]
    ends_clean: bool


def find_times(
    source: Source, first: ForeignSample, scale: ScaleName | None, timesteps: Sequence[float] | None
) -> Times:
    """The times of a source's states: those of its index, or the given ones, for the steps that its `first` sample has.

    Raises UserError if they are missing, contradict the index or the samples, or are no times of the scale.
    """
    if source.index is not None:
        _refuse_other(source, scale, timesteps)
        return Times(source.index.scale, source.index.path_timesteps, ends_clean=False)
    content = read_foreign_index(source.storage) or {}
    chosen = scale or _scale_in(content, source.where)
    if chosen is None:
        raise UserError(
            f"{source.where}: nothing says in which scale its states are; name it: --scale edm (x0 + sigma eps), --scale flow "
            "((1 - t) x0 + t eps) or --scale vp (cos(t) x0 + sin(t) eps)"
        )
    given = tuple(timesteps) if timesteps else _timesteps_in(content, source.where)
    if first.path is None:
        if given and len([t for t in given if t > 0]) != 1:
            raise UserError(
                f"{first.where}: has noise and image only, but {len(given)} times are given; leave --timesteps out"
            )
        start = given[0] if given else noise_timestep(chosen)
        return Times(chosen, _checked(chosen, (start,)), ends_clean=False)
    steps = len(first.path)
    if given is None:
        raise UserError(
            f"{source.where}: nothing says at which times the {steps} states of its paths are; name them, from the noise down: "
            "--timesteps 0.999,0.937,0.833,0.624"
        )
    inner = given[:-1] if given[-1] == 0.0 else given
    if len(inner) not in (steps, steps - 1) or (len(inner) == steps - 1 and given[-1] != 0.0):
        raise UserError(
            f"{first.where}: its path has {steps} states, and {len(given)} times are given: {', '.join(map(str, given))}"
        )
    return Times(chosen, _checked(chosen, inner), ends_clean=len(inner) == steps - 1)


def _refuse_other(source: Source, scale: ScaleName | None, timesteps: Sequence[float] | None) -> None:
    index = source.index
    assert index is not None
    if scale not in (None, index.scale):
        raise UserError(f"--scale {scale}: {source.where}/{INDEX} says {index.scale}")
    if timesteps and tuple(timesteps) not in (index.path_timesteps, index.t_list):
        raise UserError(f"--timesteps: {source.where}/{INDEX} has others; leave the option out")


def _scale_in(content: dict[str, JsonValue], where: str) -> ScaleName | None:
    found = content.get("scale")
    if found is not None and found not in SCALES:
        raise UserError(
            f"{where}/{INDEX}: scale {str(found)[:40]!r} is not one of: {', '.join(SCALES)}; name it with --scale"
        )
    return next((scale for scale in SCALES if scale == found), None)


def _timesteps_in(content: dict[str, JsonValue], where: str) -> tuple[float, ...] | None:
    found = content.get("path_timesteps")
    if found is None:
        return None
    numbers = [t for t in found if isinstance(t, int | float)] if isinstance(found, list) else []
    if not isinstance(found, list) or not found or len(numbers) != len(found):
        raise UserError(f"{where}/{INDEX}: path_timesteps {str(found)[:60]} is not a list of numbers")
    return tuple(map(float, numbers))


def _checked(scale: ScaleName, timesteps: tuple[float, ...]) -> tuple[float, ...]:
    end = largest_timestep(scale)
    told = ", ".join(f"{t:g}" for t in timesteps)
    if not all(map(math.isfinite, timesteps)) or any(a <= b for a, b in itertools.pairwise(timesteps)):
        raise UserError(f"times {told}: must descend strictly, from the noise down")
    if timesteps[-1] <= 0 or timesteps[0] > end or (len(timesteps) > 1 and timesteps[1] >= end):
        hint = (
            "; times of 1000 are a thousand times too large" if scale == "flow" and timesteps[0] > 1 else ""
        )
        raise UserError(f"times {told}: those of --scale {scale} lie above 0 and up to {end:.4g}{hint}")
    return timesteps
