"""Shards and their manifest: the format of a data set, and its verification.

A data set is a folder of `shard-000000.safetensors ...` and a `manifest.json` that is written last: if it
exists, everything that it names exists and is right. Tensor `states` is (M, N, C, H, W), time-major, so that
a reader of some time points reads only those; sample shards hold `images` uint8 (N, C, H, W). If there are
classes, shards also have `labels` (N,). Imported trajectories also have their `noise` (N, C, H, W). The file's
header carries `tensors_sha256` over the first sample's number and the tensors, which distinguishes a shard that
no manifest names yet from a damaged or misplaced one.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

from pydantic import JsonValue, model_validator

from dsno_cluster.config.base import Named
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.provenance import Environment
from dsno_cluster.records import Record, canonical_hash, read_record, record_bytes
from dsno_cluster.storage import MissingObject, PreconditionFailed, Storage, open_storage
from dsno_cluster.trajectories.spec import AnySpec, ImportedSpec, read_spec

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
MADE_SHARDS = "progress.json"
CHECKSUM = "tensors_sha256"

# how a shard that is gone or wrong comes back
REPAIR = (
    "the command that made the data set makes it again: `dsno-cluster gen-trajectories` with the same config, for samples "
    "`dsno-cluster sample --shards`"
)


class Shard(Record):
    """A line of a manifest: samples [start, stop) in a file of `size` bytes and the given sha256."""

    key: str
    start: int
    stop: int
    size: int
    sha256: str


class Manifest(Record):
    """A data set's contents: its spec as plain values, whose hash names it, shards, and environment.

    The spec is that of trajectories (`trajectory_spec`) or of samples (`evaluation/sample_shards.py`).
    """

    schema_version: Literal[1] = 1
    spec_hash: str
    spec: dict[str, JsonValue]
    num_samples: int
    environment: Environment
    shards: tuple[Shard, ...]

    @property
    def per_shard(self) -> int:
        """Number of samples in a shard."""
        return self.shards[0].stop - self.shards[0].start


def make_manifest(spec: Named, shards: Sequence[Shard], environment: Environment) -> Manifest:
    """The manifest of `shards`, one after the other from sample 0."""
    content = spec.model_dump(mode="json")
    return Manifest(
        spec_hash=canonical_hash(content),
        spec=content,
        num_samples=shards[-1].stop if shards else 0,
        environment=environment,
        shards=tuple(shards),
    )


def trajectory_spec(manifest: Manifest, where: str) -> AnySpec:
    """The spec of a data set of trajectories, made here or imported.

    Raises UserError for one of samples, and as `read_spec` does.
    """
    if "times" not in manifest.spec:
        raise UserError(f"{where}: holds samples, not trajectories")
    return read_spec(manifest.spec, where)


def shard_key(index: int) -> str:
    return f"shard-{index:06d}.safetensors"


def encode_shard(tensors: dict[str, Tensor], start: int) -> bytes:
    """The bytes of a shard whose first sample is `start`. Equal tensors give equal bytes."""
    import safetensors.torch

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    # only one entry of metadata: safetensors writes several in random order
    return bytes(safetensors.torch.save(whole, {CHECKSUM: _tensors_sha256(whole, start)}))


def _tensors_sha256(tensors: dict[str, Tensor], start: int) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([start, name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def decode_shard(data: bytes) -> dict[str, Tensor]:
    """The tensors of a shard. Raises WorkError for bytes that are not a safetensors file."""
    import safetensors.torch

    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise WorkError(f"not a safetensors shard: {error}") from None


def read_header(data: bytes | memoryview) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file and the offset of its tensors' bytes.

    Raises WorkError if there is none.
    """
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(bytes(data[8 : 8 + length]))
    except (struct.error, ValueError) as error:
        raise WorkError(f"not a safetensors shard: {error}") from None
    return header, 8 + length


def shard_tensors(spec: AnySpec, count: int | None = None) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes of the tensors of a trajectory shard of `count` samples (default: the spec's number)."""
    count = count or spec.samples_per_shard
    tensors: dict[str, tuple[str, list[int]]] = {
        "states": (spec.dtype, [len(spec.times), count, *spec.shape])
    }
    if isinstance(spec, ImportedSpec):
        tensors["noise"] = ("float32", [count, *spec.shape])
    return tensors | ({"labels": ("int64", [count])} if spec.labels.num_classes else {})


def vouches_for_itself(data: bytes, start: int, expected: dict[str, tuple[str, list[int]]]) -> bool:
    """Whether `data` is a complete shard from `start`, with the `expected` tensors (dtype, shape)."""
    try:
        tensors = decode_shard(data)
    except WorkError:
        return False
    found = {name: (str(t.dtype).removeprefix("torch."), list(t.shape)) for name, t in tensors.items()}
    return found == expected and encode_shard(tensors, start) == data  # and so the checksum agrees


def write_shard(
    storage: Storage,
    folder: str,
    index: int,
    start: int,
    tensors: dict[str, Tensor],
    replace: str | None = None,
) -> Shard:
    """Write a shard below `folder` (ending in /) and return its line for the manifest.

    The first writer wins: an existing object is never overwritten, except a bad one, whose etag is `replace`.
    Raises WorkError if a shard with other bytes exists.
    """
    key, data = folder + shard_key(index), encode_shard(tensors, start)
    try:
        storage.write(key, data, if_absent=replace is None, if_match=replace)
    except PreconditionFailed:
        if storage.read(key) != data:
            raise WorkError(
                f"{storage.url}/{key}: exists, made with other bits (by another run, on another device or with other "
                "versions?); it was left as it is: delete it if this run's are the right ones"
            ) from None
    count = next(
        t.shape[1] if name == "states" else t.shape[0] for name, t in tensors.items() if name != "labels"
    )
    sha256 = hashlib.sha256(data).hexdigest()
    return Shard(key=shard_key(index), start=start, stop=start + count, size=len(data), sha256=sha256)


def put_shard(
    storage: Storage,
    folder: str,
    index: int,
    start: int,
    tensors: dict[str, Tensor],
    replace: str | None = None,
) -> tuple[Shard, str]:
    """`write_shard`.

    The shard's line and its object's etag. Raises WorkError if it cannot be found afterwards.
    """
    shard = write_shard(storage, folder, index, start, tensors, replace)
    stat = storage.stat(folder + shard.key)
    if stat is None or stat.size != shard.size:
        raise WorkError(f"{storage.url}/{folder}{shard.key}: not there after it was written")
    return shard, stat.etag


def read_shard(storage: Storage, folder: str, shard: Shard) -> dict[str, Tensor]:
    """The tensors of a shard, checked against the manifest. Raises WorkError, naming the shard."""
    return decode_shard(read_shard_bytes(storage, folder, shard))


def read_shard_bytes(storage: Storage, folder: str, shard: Shard) -> bytes:
    """The bytes of a shard, checked against the manifest and read again once.

    Raises WorkError, naming the shard.
    """
    where, problem = f"{storage.url}/{folder}{shard.key}", None
    for _ in range(2):
        try:
            data = storage.read(folder + shard.key)
        except MissingObject:
            raise missing_shard(where) from None
        problem = problem_of(data, shard)
        if problem is None:
            return data
    raise WorkError(f"{where}: {problem}; delete it, and {REPAIR}")


def keep_vanishing(where: str, rounds: int) -> WorkError:
    return WorkError(
        f"{where}: was gone again after each of {rounds} times that it or others were made; does a lifecycle rule of the bucket, "
        "or somebody else, delete shards?"
    )


def missing_shard(where: str) -> WorkError:
    return WorkError(f"{where}: is missing, though the manifest names it; {REPAIR}")


def contradiction(where: str, key: str) -> WorkError:
    return WorkError(f"{where}{MANIFEST}: names other bytes for {key} than were just made")


def read_manifest(storage: Storage, folder: str) -> tuple[Manifest, str] | None:
    """The manifest below `folder` and the etag to replace it with, or None if there is none.

    Raises UserError if it is not a manifest that this version reads and WorkError if it contradicts itself.
    """
    found = storage.stat(folder + MANIFEST)
    if found is None:
        return None
    where, data = f"{storage.url}/{folder}{MANIFEST}", storage.read(folder + MANIFEST)
    manifest = read_record(Manifest, data, where)
    held = manifest.shards[-1].stop if manifest.shards else 0
    if manifest.spec_hash != canonical_hash(manifest.spec) or manifest.num_samples != held:
        raise WorkError(f"{where}: its spec or count was changed after it was written")
    return manifest, found.etag


def open_data_set(address: str, endpoint_url: str | None) -> tuple[Storage, Manifest]:
    """The storage and manifest of the data set at a folder, an S3 address or its manifest.

    Raises UserError if there is no manifest, and as `read_manifest` does.
    """
    storage = open_storage(address.removesuffix(MANIFEST).rstrip("/") or ".", endpoint_url)
    found = read_manifest(storage, "")
    if found is None and (there := sum(1 for _ in storage.list("shard-"))):
        raise UserError(
            f"{address}: is unfinished: {there} shards and no {MANIFEST}; the command that began it makes the others"
        )
    if found is None:
        raise UserError(
            f"{address}: no {MANIFEST} here; each data set has its own folder below STORAGE_ROOT/trajectories/, as "
            "gen-trajectories names it"
        )
    return storage, found[0]


def commit_manifest(storage: Storage, folder: str, manifest: Manifest) -> None:
    """Write the manifest, last.

    A longer one of the same spec replaces a shorter one, never the other way round.

    Safe against a concurrent run of the same spec: the put is conditional, and the later writer looks again.
    Raises WorkError if the existing manifest contradicts what was made.
    """
    data = record_bytes(manifest)
    for _ in range(10):
        current = read_manifest(storage, folder)
        if current is not None:
            theirs = current[0].shards
            common = min(len(theirs), len(manifest.shards))
            if theirs[:common] != manifest.shards[:common]:
                bad = next(a.key for a, b in zip(theirs, manifest.shards, strict=False) if a != b)
                raise contradiction(f"{storage.url}/{folder}", bad)
            if len(theirs) >= len(manifest.shards):
                return
        try:
            if current is None:
                storage.write(folder + MANIFEST, data, if_absent=True)
            else:
                storage.write(folder + MANIFEST, data, if_match=current[1])
            return
        except PreconditionFailed:
            continue  # another run was first: look at what it wrote
    raise WorkError(f"{storage.url}/{folder}{MANIFEST}: kept changing under ten attempts to replace it")


class MadeShards(Record):
    """The notes of an unfinished run: the shards that it has made, each with the etag of its object, and what made them.

    `spec` is noted only for samples, whose folder is not named after it.
    """

    environment: Environment | None = None
    spec: dict[str, JsonValue] | None = None
    shards: tuple[tuple[Shard, str], ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_older_versions(cls, content: object) -> object:
        """Versions before 0.2 kept the spec of samples inside the environment."""
        if isinstance(content, dict) and isinstance(content.get("environment"), dict):
            return {"spec": content["environment"].get("spec"), **content}
        return content

    @property
    def by_key(self) -> dict[str, tuple[Shard, str]]:
        return {shard.key: (shard, etag) for shard, etag in self.shards}


def read_made_shards(storage: Storage, folder: str, name: str = MADE_SHARDS) -> MadeShards:
    """The notes of an interrupted run, or empty ones. They only save work, so unreadable ones count as none."""
    try:
        return read_record(MadeShards, storage.read(folder + name), folder + name)
    except (MissingObject, UserError):
        return MadeShards()


def write_made_shards(storage: Storage, folder: str, made: MadeShards, name: str = MADE_SHARDS) -> None:
    """Note the shards made so far, so that a restart need not read them all again.

    Only the manifest is binding.
    """
    storage.write(folder + name, made.model_dump_json().encode())


def find_bad_shards(storage: Storage, folder: str, manifest: Manifest) -> Iterator[tuple[Shard, str | None]]:
    """Every shard of the manifest, in order, with what is wrong with its bytes, or None."""

    def check(shard: Shard) -> tuple[Shard, str | None]:
        try:
            data = storage.read(folder + shard.key)
            return shard, problem_of(data, shard) or _wrong_range(data, shard)
        except MissingObject:
            return shard, "is missing"
        except WorkError as error:
            return shard, f"cannot be read: {error}"

    with ThreadPoolExecutor(8) as threads:
        yield from threads.map(check, manifest.shards)


def _wrong_range(data: bytes, shard: Shard) -> str | None:
    header, _ = read_header(data)
    try:  # N is the second size of `states`, the first of all others
        counts = {
            entry["shape"][name == "states"] for name, entry in header.items() if name != "__metadata__"
        }
    except (AttributeError, KeyError, IndexError, TypeError):
        return "has a header that does not tell its samples"
    if counts != {shard.stop - shard.start}:
        found = ", ".join(map(str, sorted(counts)))
        return f"holds {found} samples, the manifest says {shard.start} to {shard.stop - 1}"
    return None


def manifest_problems(manifest: Manifest) -> list[str]:
    """What is wrong with the manifest itself: gaps, overlaps, repeated or misnamed shards."""
    problems, expected = [], 0
    for index, shard in enumerate(manifest.shards):
        if shard.key != shard_key(index) or shard.start != expected or shard.stop <= shard.start:
            problems.append(
                f"{shard.key}: line {index} of the manifest should be {shard_key(index)} from sample {expected}"
            )
        expected = shard.stop
    return problems if manifest.shards else ["the manifest names no shard"]


def problem_of(data: bytes | memoryview, shard: Shard) -> str | None:
    """What is wrong with a shard's bytes, or None."""
    if len(data) != shard.size:
        return f"has {len(data)} bytes, the manifest says {shard.size}"
    if hashlib.sha256(data).hexdigest() != shard.sha256:
        return "does not have the sha256 of the manifest"
    return None
