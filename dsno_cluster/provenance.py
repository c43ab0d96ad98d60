"""What made something: the device, the versions of what could change a number, and the code; recorded beside results."""

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
    """The package's version, and the git commit if it is a checkout; `dirty`: with changes on top."""

    version: str
    commit: str | None = None
    dirty: bool | None = None


class Environment(SparseRecord):
    """What made a file: device model, versions and code; not part of any spec.

    `versions` are by name: of packages, and with a GPU of `cuda`, `cudnn` and `driver` (not in older files).
    """

    device: str
    versions: dict[str, str] = Field(default_factory=dict)
    code: Code | None = None
    seconds: float | None = None  # that the work took


NOWHERE = Environment(device="none", versions={})  # of what is planned and not made yet


def environment() -> Environment:
    """That of this process."""
    from dsno_cluster.device import device_name, gpu_versions

    versions = software_versions() | gpu_versions()
    return Environment(device=device_name(), versions=versions, code=code_version())


def software_versions() -> dict[str, str]:
    """Versions of packages recorded beside results: what could change a number."""
    versions = {"dsno-cluster": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "ray", "deepspeed", "diffusers", "safetensors", "torch-fidelity"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@cache
def code_version() -> Code:
    """What this process runs; in the copy of a run folder that of the checkout it was made from."""
    package = Path(__file__).resolve().parent
    with contextlib.suppress(OSError, ValueError, KeyError):
        return Code.model_validate(json.loads((package.parents[1] / "run.json").read_text())["code"])

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                # an installation of another user's is code that we run anyway
                ["git", "-c", "safe.directory=*", "-C", str(package), *words],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:  # installed, or git is not there
        return Code(version=__version__)
    dirty = bool(git("status", "--porcelain", "."))
    return Code(version=__version__, commit=git("rev-parse", "HEAD"), dirty=dirty)
