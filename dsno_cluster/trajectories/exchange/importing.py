"""import-trajectories: shards of ours from trajectories that somebody else made.

Times become cosine times by their log-SNR, states variance preserving. Which noise belongs to a sample follows from no seed
here, so the shards hold it. The data set is named by a hash of where it comes from, below STORAGE_ROOT/trajectories/.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsno_cluster import console
from dsno_cluster.diffusion.scales import ScaleName, cosine_time, factor_of, noise_factor
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.files import shown_path
from dsno_cluster.provenance import environment
from dsno_cluster.storage import Storage, open_storage
from dsno_cluster.trajectories.exchange.noting import noting
from dsno_cluster.trajectories.exchange.samples import BadPart, ForeignSample
from dsno_cluster.trajectories.exchange.sources import Source, SourceReader, Times, find_source, find_times
from dsno_cluster.trajectories.shards import (
    MADE_SHARDS,
    MadeShards,
    Shard,
    commit_manifest,
    make_manifest,
    put_shard,
    read_made_shards,
    read_manifest,
    shard_key,
    write_made_shards,
)
from dsno_cluster.trajectories.spec import (
    FORMAT_VERSION,
    ExchangeFormat,
    ImportedFrom,
    ImportedLabels,
    ImportedSpec,
)

if TYPE_CHECKING:
    from torch import Tensor

SAMPLES_PER_SHARD = 500
_SAME = (
    1e-3  # relative difference of a path's first state and the noise, which may be stored in another dtype
)
_UNIT = (0.25, 4.0)  # the standard deviation of unit noise lies between these, also if there are few numbers


@dataclass(frozen=True)
class ImportOptions:
    """How to import; None: as the source says, or usual."""

    format: ExchangeFormat | None = None
    scale: ScaleName | None = None
    timesteps: tuple[float, ...] | None = None
    noise_scale: float | None = None
    classes: int | None = None
    dtype: str | None = None
    samples_per_shard: int | None = None


@dataclass(frozen=True)
class Imported:
    """An imported data set: its spec, address and number of samples."""

    spec: ImportedSpec
    address: str
    num_samples: int


def import_trajectories(
    address: str, root: str, options: ImportOptions, endpoint_url: str | None = None
) -> Imported:
    """Make shards below the storage `root` from the parts at a folder or an S3 address.

    Finished shards of the same import are kept. Raises UserError (BadPart) for parts or samples that cannot be imported,
    and for times, a scale or classes that are missing or contradict them; WorkError if something cannot be written.
    """
    source = find_source(open_storage(address, endpoint_url), options.format)
    reader = SourceReader(source)
    first = reader.sample(0)
    times = find_times(source, first, options.scale, options.timesteps)
    spec = _spec_of(source, first, times, options)
    storage = open_storage(root, endpoint_url)
    imported = Imported(spec, f"{root.rstrip('/')}/{spec.folder.rstrip('/')}", source.num_samples)
    manifest = read_manifest(storage, spec.folder)
    sizes = {stat.key: stat.size for stat in storage.list(spec.folder + "shard-")}
    if manifest is not None and all(sizes.get(spec.folder + s.key) == s.size for s in manifest[0].shards):
        console.say(f"imported already: {shown_path(imported.address)}")
        return imported
    shards = _make_shards(storage, spec, reader, times)
    commit_manifest(storage, spec.folder, make_manifest(spec, shards, environment()))
    storage.delete(spec.folder + MADE_SHARDS)
    with contextlib.suppress(WorkError):  # housekeeping that some servers do not offer
        storage.tidy(spec.folder)
    console.say(f"done: {shown_path(imported.address)}")
    return imported


def config_keys(imported: Imported) -> str:
    """The keys of a config that trains on imported trajectories, as YAML to paste."""
    spec = imported.spec
    channels, height, width = spec.shape
    size = height if height == width else [height, width]
    times = ", ".join(map(repr, spec.times))
    return "\n".join([
        f"network: {{state_size: {size}, state_channels: {channels}, num_classes: {spec.labels.num_classes}}}",
        f"trajectories: {{imported: {spec.hash}, num_samples: {imported.num_samples}, times: [{times}]}}",
        "student: {warm_start: false}  # or name in teacher.path the model that made them",
        "training: {heldout_every: null}",
    ])  # fmt: skip


def _spec_of(source: Source, first: ForeignSample, times: Times, options: ImportOptions) -> ImportedSpec:
    latent = first.latent if first.latent is not None else None if first.path is None else first.path[-1]
    if latent is None:
        raise BadPart(f"{first.where}: has no latent, the clean image")
    if latent.ndim != 3:
        raise BadPart(
            f"{first.where}: its latent is {tuple(latent.shape)}; students here take images, (C, H, W)"
        )
    channels, height, width = latent.shape
    index = source.index
    scaled_by = index.noise_scale if index else noise_factor(times.scale, times.timesteps[0])
    dtype = options.dtype or ("float16" if str(latent.dtype) == "torch.float16" else "float32")
    return ImportedSpec(
        format_version=FORMAT_VERSION,
        source=ImportedFrom(
            format=source.format,
            sha256=source.sha256,
            scale=times.scale,
            timesteps=times.timesteps,
            noise_scale=options.noise_scale or scaled_by,
        ),
        times=(*(cosine_time(times.scale, timestep) for timestep in times.timesteps[1:]), 0.0),
        labels=ImportedLabels(num_classes=_classes(source, first, options.classes)),
        shape=(channels, height, width),
        dtype="float16" if dtype == "float16" else "float32",
        samples_per_shard=min(options.samples_per_shard or SAMPLES_PER_SHARD, source.num_samples),
    )


def _classes(source: Source, first: ForeignSample, given: int | None) -> int:
    """The number of classes. Raises UserError if nothing says it, or it is said twice and differs."""
    known = source.index.num_classes if source.index else first.num_classes
    if given is not None and known not in (None, given):
        raise UserError(f"--classes {given}: {first.where} says {known}")
    if known is None and given is None and first.label is not None:
        raise UserError(
            f"{first.where}: has a class, and nothing says of how many; name the number with --classes"
        )
    return known if known is not None else given or 0


def _make_shards(storage: Storage, spec: ImportedSpec, reader: SourceReader, times: Times) -> list[Shard]:
    count, size = reader.source.num_samples, spec.samples_per_shard
    found = {stat.key.removeprefix(spec.folder): stat for stat in storage.list(spec.folder + "shard-")}
    noted = read_made_shards(storage, spec.folder).by_key
    done = {
        key: (shard, etag)
        for key, (shard, etag) in noted.items()
        if key in found and (found[key].etag, found[key].size) == (etag, shard.size)
    }
    if done:
        console.say(
            f"{len(done)} of {-(-count // size)} shards are done, {-(-count // size) - len(done)} to make"
        )

    def note() -> None:
        write_made_shards(storage, spec.folder, MadeShards(shards=tuple(done.values())))

    already = sum(shard.stop - shard.start for shard, _ in done.values())
    with (
        contextlib.closing(reader),
        console.progress("importing", count, "samples", done=already) as advance,
        noting(note) as finished,
    ):
        for number, start in enumerate(range(0, count, size)):
            if shard_key(number) in done:
                continue
            rows = range(start, min(start + size, count))
            tensors = _convert([reader.sample(row) for row in rows], spec, times)
            stat = found.get(shard_key(number))
            replaced = stat.etag if stat is not None else None
            done[shard_key(number)] = put_shard(storage, spec.folder, number, start, tensors, replaced)
            finished()
            advance(len(rows))
    return [done[shard_key(number)][0] for number in range(-(-count // size))]


def _convert(samples: list[ForeignSample], spec: ImportedSpec, times: Times) -> dict[str, Tensor]:
    """The tensors of a shard. Raises BadPart, naming the sample that does not fit."""
    import torch

    parts = [_states_of(sample, spec, times) for sample in samples]
    noise_NCHW = torch.stack([noise for noise, _ in parts])
    states_MNCHW = torch.stack([states for _, states in parts], 1).to(getattr(torch, spec.dtype))
    finite_N = states_MNCHW.isfinite().flatten(2).all(2).all(0) & noise_NCHW.isfinite().flatten(1).all(1)
    if not bool(finite_N.all()):
        where = samples[int((~finite_N).nonzero()[0])].where
        raise BadPart(f"{where}: has numbers that are not finite in {spec.dtype}")
    std = float(noise_NCHW.std())
    if noise_NCHW.numel() >= 16 and not _UNIT[0] <= std <= _UNIT[1]:
        raise BadPart(
            f"{samples[0].where}: its noise divided by {spec.source.noise_scale:g} has the standard deviation {std:.3g}; "
            f"unit noise is needed: name what it was multiplied with, --noise-scale {std * spec.source.noise_scale:.3g}?"
        )
    tensors = {"states": states_MNCHW, "noise": noise_NCHW}
    if not spec.labels.num_classes:
        return tensors
    return tensors | {"labels": torch.tensor([_label_of(sample, spec) for sample in samples])}


def _states_of(sample: ForeignSample, spec: ImportedSpec, times: Times) -> tuple[Tensor, Tensor]:
    """Unit noise (C, H, W) float32 and variance preserving states (M, C, H, W) float32 of a sample."""
    steps = len(times.timesteps)
    path = sample.path
    if path is None:
        if sample.noise is None:
            raise BadPart(f"{sample.where}: has neither a path nor noise")
        if steps > 1:
            raise BadPart(f"{sample.where}: has no path, though the first sample has one")
        path = sample.noise[None]
    wanted = (steps + int(times.ends_clean), *spec.shape)
    if tuple(path.shape) != wanted:
        raise BadPart(f"{sample.where}: its path is {tuple(path.shape)}, expected {wanted}")
    latent = sample.latent if sample.latent is not None else path[-1] if times.ends_clean else None
    if latent is None or tuple(latent.shape) != spec.shape:
        found = "missing" if latent is None else str(tuple(latent.shape))
        raise BadPart(f"{sample.where}: its latent is {found}, expected {spec.shape}")
    for tensor in (path, latent):
        if not tensor.is_floating_point():
            raise BadPart(f"{sample.where}: holds {tensor.dtype}; states are floating-point numbers")
    path, latent = path.float(), latent.float()
    if sample.noise is not None and sample.path is not None:
        _check_same_noise(sample, path[0])
    scale, inner = times.scale, times.timesteps[1:]
    states = [path[k] / factor_of(scale, timestep) for k, timestep in enumerate(inner, 1)]
    return path[0] / spec.source.noise_scale, _stacked([*states, latent])


def _stacked(states: list[Tensor]) -> Tensor:
    import torch

    return torch.stack(states)


def _check_same_noise(sample: ForeignSample, first: Tensor) -> None:
    assert sample.noise is not None
    noise = sample.noise
    if noise.shape != first.shape or float((noise.float() - first).norm()) > _SAME * float(first.norm()):
        raise BadPart(
            f"{sample.where}: noise.pth is not the first state of path.pth; which noise belongs to it?"
        )


def _label_of(sample: ForeignSample, spec: ImportedSpec) -> int:
    count = spec.labels.num_classes
    if sample.label is None or not 0 <= sample.label < count or sample.num_classes not in (None, count):
        raise BadPart(
            f"{sample.where}: its class is {sample.label}, expected one of {count}: 0 to {count - 1}"
        )
    return sample.label
