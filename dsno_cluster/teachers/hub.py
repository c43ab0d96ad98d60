"""Teachers on the Hugging Face hub: which files of a repository a diffusers folder needs, and their download.

The library reads HF_ENDPOINT, HF_TOKEN and its other variables by itself; no token is ever printed.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsno_cluster.errors import UserError, WorkError, said_by
from dsno_cluster.files import NO_ROOM
from dsno_cluster.teachers.diffusers_files import (
    AUTOENCODERS,
    EMA,
    MODEL_INDEX,
    MODELS,
    SCHEDULER_CONFIG,
    STEM,
    TEXT,
    VARIANTS,
)

REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_BESIDE = re.compile(r"(LICEN[SC]E|COPYING)[^/]*|README\.md", re.IGNORECASE)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size in bytes, and its sha256 if the hub knows it."""

    name: str
    size: int | None
    sha256: str | None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit, with the files that a diffusers folder needs."""

    name: str
    commit: str
    files: tuple[RemoteFile, ...]


def find_repository(name: str, revision: str | None) -> Repository:
    """What of a repository must be downloaded. Raises UserError for one that is no teacher, WorkError without a network."""
    with _one_line(name, revision):
        api = _library().HfApi(endpoint=_endpoint())
        found = api.model_info(name, revision=revision, files_metadata=True)
    by_name = {sibling.rfilename: sibling for sibling in found.siblings or []}
    wanted = wanted_files(list(by_name), name)
    files = (by_name[file] for file in wanted)
    return Repository(
        name,
        str(found.sha),
        tuple(RemoteFile(f.rfilename, f.size, f.lfs.sha256 if f.lfs else None) for f in files),
    )


def download(repository: Repository, file: RemoteFile, folder: Path) -> None:
    """Put a file into the folder; a download that was interrupted is continued. Raises WorkError."""
    with _one_line(repository.name, repository.commit):
        if not sys.stderr.isatty():
            _library().utils.disable_progress_bars()
        _library().hf_hub_download(
            repository.name, file.name, revision=repository.commit, local_dir=folder, endpoint=_endpoint()
        )


def wanted_files(names: Sequence[str], repository: str) -> list[str]:
    """The files that a teacher's folder needs, of all in a repository: configs, one form of the weights, and licences.

    Raises UserError if they are not those of a model in pixels or of a DiT.
    """
    there = set(names)
    if text := next((part for part in TEXT if any(name.startswith(f"{part}/") for name in names)), None):
        raise UserError(
            f"{repository}: is conditioned on text (it has {text}/); only classes are supported as conditions"
        )
    if "config.json" in there:
        prefixes = [""]
    else:
        prefixes = [f"{part}/" for part in MODELS if f"{part}/config.json" in there][:1]
    if not prefixes:
        averaged = f"; it has {EMA}/ only" if f"{EMA}/config.json" in there else ""
        raise UserError(
            f"{repository}: is no diffusers folder of a teacher: no config.json, unet/config.json or transformer/config.json"
            f"{averaged}"
        )
    latents = [f"{part}/" for part in AUTOENCODERS if f"{part}/config.json" in there]
    if latents and "vae/" not in latents and prefixes == ["unet/"]:
        raise UserError(
            f"{repository}: is a latent diffusion model (it has {latents[0]}), and only an AutoencoderKL in vae/ is supported"
        )
    fixed = [MODEL_INDEX, SCHEDULER_CONFIG, f"scheduler/{SCHEDULER_CONFIG}"]
    wanted = [name for name in fixed if name in there] + [name for name in names if _BESIDE.fullmatch(name)]
    for prefix in [*prefixes, *latents]:
        wanted += [f"{prefix}config.json", *_weights(names, prefix, repository)]
    return list(dict.fromkeys(wanted))


def _weights(names: Sequence[str], prefix: str, repository: str) -> list[str]:
    """The weights of a model in the order of preference in which `diffusers_files.read_weights` takes them."""
    for variant in VARIANTS:
        middle = f".{variant}" if variant else ""
        for suffix in ("safetensors", "bin"):
            index = f"{prefix}{STEM}.{suffix}.index{middle}.json"
            parts = re.compile(
                rf"{re.escape(prefix + STEM)}({re.escape(middle)}-\d+-of-\d+|-\d+-of-\d+{re.escape(middle)})\.{suffix}"
            )
            if index in names:
                return [index, *(name for name in names if parts.fullmatch(name))]
            if (single := f"{prefix}{STEM}{middle}.{suffix}") in names:
                return [single]
    raise UserError(
        f"{repository}: has no {prefix}{STEM}.safetensors or .bin, by itself, with an index, or as fp16 or bf16"
    )


def _library() -> Any:
    try:
        import huggingface_hub.errors
    except ImportError:
        raise UserError(
            "fetch-teacher OWNER/NAME needs huggingface_hub: pip install 'dsno-cluster[diffusers]'"
        ) from None
    return huggingface_hub


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


@contextlib.contextmanager
def _one_line(name: str, revision: str | None) -> Iterator[None]:
    """Turns what the library raises into one line."""
    errors = _library().errors
    at = _endpoint() or "https://huggingface.co"
    try:
        yield
    except errors.GatedRepoError:
        raise UserError(
            f"{name}: is gated: accept its conditions on {at}/{name}, and set HF_TOKEN to a token of that account"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"{name}: {at} has no such model, or it is private; check the name, and for a private one set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: has no revision {revision!r}: a branch, a tag or a commit's hash") from None
    except errors.HFValidationError as error:
        raise UserError(f"{name}: {said_by('huggingface_hub', error)}") from None
    except errors.OfflineModeIsEnabled:
        raise WorkError(f"{name}: HF_HUB_OFFLINE is set; unset it to download") from None
    except (errors.HfHubHTTPError, errors.FileMetadataError) as error:
        raise WorkError(f"{name}: {at} answered: {said_by('huggingface_hub', error)}") from None
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        raise _unreachable(name, at, error) from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "requests"):
            raise
        raise _unreachable(name, at, error) from None


def _unreachable(name: str, at: str, error: Exception) -> WorkError:
    return WorkError(
        f"{name}: {at} cannot be reached ({said_by('huggingface_hub', error)}); run fetch-teacher on a machine with a network, "
        "such as a login node, and copy the folder"
    )
