"""Which device this process computes on."""

from __future__ import annotations

import platform

import torch


def compute_device() -> torch.device:
    """The GPU that this process sees first, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Model of the device, for the record beside what it made."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return _cpu_model() or platform.machine()


def _cpu_model() -> str | None:
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                (line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), None
            )
    except OSError:
        return platform.processor() or None
