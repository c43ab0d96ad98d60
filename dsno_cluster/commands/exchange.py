"""The commands of trajectories for other trainers, and from them: export, import-trajectories."""

from __future__ import annotations

from dsno_cluster.commands.arguments import Arguments
from dsno_cluster.commands.trajectories import DATA_SET, data_set_address


def export_trajectories(arguments: Arguments) -> None:
    options = arguments.options
    address, endpoint_url = arguments.address(DATA_SET, data_set_address)
    from dsno_cluster.trajectories.exchange.export import ExportOptions, export

    how = ExportOptions(options.format, options.scale, options.dtype, options.samples_per_part)
    index = export(address, options.out, how, endpoint_url)
    sizes = sum(part.size for part in index.parts)
    print(
        f"{index.num_samples} samples in {len(index.parts)} parts, {sizes} bytes; path_timesteps "
        f"{', '.join(f'{t:.6g}' for t in index.path_timesteps)} in the scale {index.scale}"
    )


def import_trajectories(arguments: Arguments) -> None:
    source = arguments.only_word(
        "SOURCE: a folder or s3:// address of tars, of LMDB environments or of .npz files"
    )
    from dsno_cluster.trajectories.exchange import importing

    options = arguments.options
    how = importing.ImportOptions(
        format=options.format,
        scale=options.scale,
        timesteps=options.timesteps,
        noise_scale=options.noise_scale,
        classes=options.classes,
        dtype=options.dtype,
        samples_per_shard=options.samples_per_shard,
    )
    print(
        importing.config_keys(importing.import_trajectories(source, options.out, how, options.endpoint_url))
    )
