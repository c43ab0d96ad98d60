"""Which device this process computes on."""

from __future__ import annotations

import platform

import torch


def compute_device() -> torch.device:
    """The GPU that this process sees first, or the CPU; float32 on it is float32 from now on.

    Convolutions on a GPU would otherwise round their inputs to TensorFloat-32, whose 10 bits of mantissa are good
    to 5e-4: as much as the errors that solvers are chosen by, and nothing in a spec would say so.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
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
