"""Provenance of results: device, versions and code, recorded beside them."""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import Field

from dsno_cluster import __version__
from dsno_cluster.records import SparseRecord


class Code(SparseRecord):
    """The package's version, and the git commit if it is a checkout; `dirty`: with uncommitted changes."""

    version: str
    commit: str | None = None
    dirty: bool | None = None


class Environment(SparseRecord):
    """The device model, versions and code that made a file; not part of any spec.

    `versions` is keyed by name: packages, and with a GPU also `cuda`, `cudnn` and `driver` (not in older
    files).
    """

    device: str
    versions: dict[str, str] = Field(default_factory=dict)
    code: Code | None = None
    seconds: float | None = None  # duration of the work


NOWHERE = Environment(device="none", versions={})  # for files that are planned, not made yet


def environment() -> Environment:
    """The environment of this process."""
    from dsno_cluster.device import device_name, gpu_versions

    versions = software_versions() | gpu_versions()
    return Environment(device=device_name(), versions=versions, code=code_version())


def software_versions() -> dict[str, str]:
    """Versions of the packages that can change a result."""
    versions = {"dsno-cluster": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "ray", "deepspeed", "diffusers", "safetensors", "torch-fidelity"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@cache
def code_version() -> Code:
    """The code that this process runs; in a run folder's copy of it, the checkout that was copied."""
    package = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, ValueError, KeyError):
        return Code.model_validate(json.loads((package.parents[1] / "run.json").read_text())["code"])

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                # this code runs anyway, even if another user owns the installation
                ["git", "-c", "safe.directory=*", "-C", str(package), *words],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed, or without git
        return Code(version=__version__)
    dirty = bool(git("status", "--porcelain", "."))
    return Code(version=__version__, commit=git("rev-parse", "HEAD"), dirty=dirty)
