"""The device that this process computes on."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

import torch


def compute_device() -> torch.device:
    """The first GPU that this process sees, or the CPU; disables TensorFloat-32.

    Convolutions on a GPU would otherwise round their inputs to TensorFloat-32, whose 10 bits of mantissa are
    accurate to 5e-4: as large as the errors by which solvers are chosen. `allowing_tf32` is for a precision that
    says so.
    """
    allow_tf32(False)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may round inputs to TensorFloat-32, in the whole process from now on."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")


@contextlib.contextmanager
def allowing_tf32() -> Iterator[None]:
    """In this context GPUs may round inputs to TensorFloat-32, in the whole process."""
    before = torch.backends.cudnn.allow_tf32
    allow_tf32(True)
    try:
        yield
    finally:
        allow_tf32(before)


def device_name() -> str:
    """The model of the device, recorded beside results."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return _cpu_model() or platform.machine()


def gpu_versions() -> dict[str, str]:
    """Versions of `cuda`, `cudnn` and the `driver` that this process uses; empty without a GPU."""
    if not torch.cuda.is_available():
        return {}
    found = {
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
        "driver": _driver_version(),
    }
    return {name: version for name, version in found.items() if version is not None}


def _driver_version() -> str | None:
    """The version of the kernel module, as Linux reports it."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def _cpu_model() -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), None
            )
    except OSError:
        return platform.processor() or None
