"""export: a data set of ours as files that other trainers read.

Parts are made one after the other, each from the shards that hold its samples, so that memory holds one part. The index is
written last: if it exists, everything that it names exists. `progress.json` notes the parts that are finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dsno_cluster import __version__, console
from dsno_cluster.config import Reader
from dsno_cluster.diffusion.scales import ScaleName
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.files import shown_path
from dsno_cluster.records import Record, read_record, record_bytes
from dsno_cluster.storage import MissingObject, Storage, open_storage
from dsno_cluster.trajectories.exchange.formats import FORMATS, Format
from dsno_cluster.trajectories.exchange.index import INDEX, Dtype, ExportIndex, plan_index, read_index
from dsno_cluster.trajectories.exchange.noting import noting
from dsno_cluster.trajectories.exchange.samples import Samples
from dsno_cluster.trajectories.exchange.webdataset import COUNTS
from dsno_cluster.trajectories.reader import ShardReader, check_noise
from dsno_cluster.trajectories.shards import (
    MANIFEST,
    Manifest,
    Shard,
    open_data_set,
    problem_of,
    trajectory_spec,
)
from dsno_cluster.trajectories.spec import ExchangeFormat

if TYPE_CHECKING:
    from torch import Tensor

PROGRESS = "progress.json"


@dataclass(frozen=True)
class ExportOptions:
    """How to export. None for `dtype`: the format's own; for `samples_per_part`: as many as a shard has."""

    format: ExchangeFormat
    scale: ScaleName = "vp"
    dtype: Dtype | None = None
    samples_per_part: int | None = None


class ExportNotes(Record):
    """What an unfinished export is of, and its finished parts, each with the etag of its object."""

    index: ExportIndex
    parts: tuple[tuple[Shard, str], ...] = ()


def export(address: str, out: str, options: ExportOptions, endpoint_url: str | None = None) -> ExportIndex:
    """Export the data set at a folder, an S3 address or a manifest to the folder or address `out`.

    Finished parts of the same export are kept. Raises UserError for a data set that cannot be exported this way and for
    an `out` that holds other files, WorkError if shards are wrong or something cannot be written.
    """
    way = FORMATS[options.format]
    way.check_installed()
    storage, manifest = open_data_set(address, endpoint_url)
    index = _planned(manifest, options, address)
    check_noise(trajectory_spec(manifest, address), address)
    target = open_storage(out, endpoint_url)
    done = _finished(target, index, way)
    parts = _part_ranges(index)
    if done is None:
        console.say(f"all {len(parts)} parts exist already: {shown_path(out)}")
        found = read_index(target)
        assert found is not None
        return found
    if done:
        console.say(f"{len(done)} of {len(parts)} parts are done, {len(parts) - len(done)} to make")
    source = ShardReader(storage, "", manifest, Reader(window_shards=1))
    lines = _make_parts(source, target, index, way, parts, done)
    finished = index.model_copy(update={"parts": tuple(lines), "made_with": f"dsno-cluster {__version__}"})
    if options.format == "webdataset":
        counts = {part.key: part.stop - part.start for part in lines}
        target.write(COUNTS, (json.dumps(counts, indent=2) + "\n").encode())
    target.write(INDEX, record_bytes(finished))
    target.delete(PROGRESS)
    with contextlib.suppress(WorkError):  # housekeeping that some servers do not offer
        target.tidy("")
    console.say(f"done: {shown_path(out)}")
    return finished


def verify_export(storage: Storage, index: ExportIndex) -> dict[str, Any]:
    """Check every byte of exported parts against their index; `problems` names each bad part."""

    def check(part: Shard) -> str | None:
        try:
            return problem_of(storage.read(part.key), part)
        except MissingObject:
            return "is missing"
        except WorkError as error:
            return f"cannot be read: {error}"

    expected = [(part.key, part.start, part.stop) for part in index.parts]
    problems = (
        []
        if expected == _part_ranges(index)
        else [f"{INDEX} does not name the parts that its own numbers give"]
    )
    with (
        ThreadPoolExecutor(4) as threads,
        console.progress("verifying", len(index.parts), "parts") as advance,
    ):
        for part, problem in zip(index.parts, threads.map(check, index.parts), strict=True):
            problems += [f"{part.key} {problem}"] if problem else []
            advance(1)
    return {
        "ok": not problems,
        "shards": len(index.parts),
        "samples": index.num_samples,
        "bytes": sum(part.size for part in index.parts),
        "problems": problems,
    }


def _planned(manifest: Manifest, options: ExportOptions, address: str) -> ExportIndex:
    spec = trajectory_spec(manifest, address)
    if spec.times[-1] != 0.0:
        raise UserError(
            f"{address}: its last time is {spec.times[-1]}, not 0: it has no clean images to export"
        )
    dtype = options.dtype or ("float16" if options.format == "lmdb" else "float32")
    if options.format == "lmdb" and dtype != "float16":
        raise UserError("--dtype float32: readers of --format lmdb take float16 only; leave --dtype out")
    return plan_index(
        format=options.format,
        scale=options.scale,
        dtype=dtype,
        times=spec.times,
        shape=spec.shape,
        num_samples=manifest.num_samples,
        num_classes=spec.labels.num_classes,
        members=FORMATS[options.format].members,
        samples_per_part=options.samples_per_part or manifest.per_shard,
        source_hash=manifest.spec_hash,
        source=manifest.spec,
    )


def _part_ranges(index: ExportIndex) -> list[tuple[str, int, int]]:
    """(key, start, stop) of each part."""
    size, key = index.samples_per_part, FORMATS[index.format].part_key
    starts = range(0, index.num_samples, size)
    return [(key(n), start, min(start + size, index.num_samples)) for n, start in enumerate(starts)]


def _finished(target: Storage, index: ExportIndex, way: Format) -> dict[str, tuple[Shard, str]] | None:
    """The finished parts of this export at its target, by key; None if the whole export is.

    Claims the target. Raises UserError if it holds anything else.
    """
    where = target.url
    existing, notes = read_index(target), _read_notes(target)
    before = existing.without_parts if existing else notes.index if notes else None
    found = {stat.key: stat for stat in target.list("") if stat.key.endswith(way.ending)}
    if before is None and (found or target.stat(INDEX) is not None or target.stat(MANIFEST) is not None):
        held = next(iter(found), INDEX if target.stat(INDEX) is not None else MANIFEST)
        raise UserError(
            f"{where}: holds {held}, which no export of this kind wrote; name a new folder with --out"
        )
    if before is not None and (key := _differing(before, index)):
        was, now = getattr(before, key), getattr(index, key)
        told = f"{key} {was}, not {now}" if len(f"{was}{now}") < 80 else f"another {key}"
        raise UserError(
            f"{where}: holds an export of {told}; name a new folder with --out, or delete that one"
        )
    noted = {part.key: (part, etag) for part, etag in notes.parts} if notes else {}
    if existing:
        noted |= {part.key: (part, found[part.key].etag) for part in existing.parts if part.key in found}
    wanted = {key: (start, stop) for key, start, stop in _part_ranges(index)}
    kept = {
        key: (part, etag)
        for key, (part, etag) in noted.items()
        if key in found
        and (found[key].size, found[key].etag) == (part.size, etag)
        and wanted.get(key) == (part.start, part.stop)
    }
    if existing and len(kept) == len(wanted):
        return None
    target.write(PROGRESS, record_bytes(ExportNotes(index=index, parts=tuple(kept.values()))))
    if existing:  # what it names is about to change
        target.delete(INDEX)
    return kept


def _differing(before: ExportIndex, now: ExportIndex) -> str | None:
    """The first key in which two exports differ; the later one may be of a data set that has grown."""
    keys = (key for key in ExportIndex.model_fields if key not in ("num_samples", "parts", "made_with"))
    if before.num_samples > now.num_samples:
        return "num_samples"
    return next((key for key in keys if getattr(before, key) != getattr(now, key)), None)


def _read_notes(target: Storage) -> ExportNotes | None:
    try:
        return read_record(ExportNotes, target.read(PROGRESS), PROGRESS)
    except (MissingObject, UserError):
        return None


def _make_parts(
    source: ShardReader,
    target: Storage,
    index: ExportIndex,
    way: Format,
    parts: list[tuple[str, int, int]],
    done: dict[str, tuple[Shard, str]],
) -> list[Shard]:
    """The lines of all parts; those that are not `done` are made."""

    def note() -> None:
        target.write(PROGRESS, record_bytes(ExportNotes(index=index, parts=tuple(done.values()))))

    already = sum(part.stop - part.start for part, _ in done.values())
    with (
        console.progress("exporting", index.num_samples, "samples", done=already) as advance,
        noting(note) as finished,
    ):
        for key, start, stop in parts:
            if key in done:
                continue
            try:
                done[key] = _write_part(source, target, index, way, key, range(start, stop))
            except KeyboardInterrupt:
                console.say("interrupted: finished parts are kept, the same command makes the others")
                raise
            finished()
            advance(stop - start)
    return [done[key][0] for key, _, _ in parts]


def _write_part(
    source: ShardReader, target: Storage, index: ExportIndex, way: Format, key: str, samples: range
) -> tuple[Shard, str]:
    data = way.encode(read_samples(source, index, samples))
    target.write(key, data)
    stat = target.stat(key)
    if stat is None or stat.size != len(data):
        raise WorkError(f"{target.url}/{key}: not there after it was written")
    sha256 = hashlib.sha256(data).hexdigest()
    return Shard(key=key, start=samples.start, stop=samples.stop, size=len(data), sha256=sha256), stat.etag


def read_samples(source: ShardReader, index: ExportIndex, samples: range) -> Samples:
    """Samples of a data set in the dtype and scale of an index.

    Raises WorkError as the reader does, and UserError for numbers that the dtype cannot hold.
    """
    import torch

    batch = source.batch(np.arange(samples.start, samples.stop))
    dtype = getattr(torch, index.dtype)
    steps = [batch.noise * index.noise_scale]
    steps += [_scaled(batch.states[:, m], factor) for m, factor in enumerate(index.factors)]
    path, latent = torch.stack(steps[:-1], 1).to(dtype), steps[-1].to(dtype)
    if not bool(path.isfinite().all() and latent.isfinite().all()):
        raise UserError(
            f"samples {samples.start} to {samples.stop - 1}: numbers that {index.dtype} cannot hold in the scale {index.scale}; "
            "take --dtype float32"
        )
    return Samples(samples.start, path, latent, batch.labels, index.num_classes)


def _scaled(states: Tensor, factor: float) -> Tensor:
    return states if factor == 1.0 else states * factor
