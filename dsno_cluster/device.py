"""The devices that this process computes on."""

from __future__ import annotations

import contextlib
import gc
import platform
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dsno_cluster.errors import UserError

# torch 2.9 and later says this. The names that it prefers do not exist in earlier versions, and must not be mixed with the others
warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CONTEXT_BYTES = (
    1 << 30
)  # a GPU's memory that a process holds beside torch's tensors, for kernels and the like


def compute_device() -> torch.device:
    """The first GPU that this process sees, or the CPU; disables TensorFloat-32.

    Convolutions on a GPU would otherwise round their inputs to TensorFloat-32, whose 10 bits of mantissa are
    accurate to 5e-4: as large as the errors by which solvers are chosen. `allowing_tf32` is for a precision that
    says so.
    """
    allow_tf32(False)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast_to(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """A context whose layers run in a half precision, with float32 weights; in float32 and tf32 they run as they are."""
    half = HALVES.get(precision)
    return torch.autocast(device.type, half) if half else contextlib.nullcontext()


def pinned_for(device: torch.device, x: Tensor) -> Tensor:
    """A CPU tensor, moved to pinned memory if the device is a GPU, so that copying it there does not make the host wait."""
    return x.pin_memory() if device.type == "cuda" else x


def copied_to(device: torch.device, x: Tensor) -> Tensor:
    """A CPU tensor on the device. The host does not wait until the device has done its earlier work."""
    return pinned_for(device, x).to(device, non_blocking=True)


def visible_gpus() -> int:
    """How many GPUs this process may use: those of CUDA_VISIBLE_DEVICES, or all; 0 if torch is one for CPUs."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def rank_device(local_rank: int, local_ranks: int | None) -> torch.device:
    """The device of a rank, `local_rank` of `local_ranks` (None: not known) on this machine; the CPU without GPUs.

    A rank that sees one GPU takes it: it may be one that no other rank sees, as a scheduler gives each task its own.
    Of several GPUs, rank k takes the k-th that it sees. Raises UserError if they are fewer than the ranks.
    """
    gpus = visible_gpus()
    if gpus == 0:
        return torch.device("cpu")
    if gpus == 1:
        return torch.device("cuda", 0)
    if (ranks := max(local_rank + 1, local_ranks or 0)) > gpus:
        raise too_many_ranks(ranks, gpus)
    return torch.device("cuda", local_rank)


def too_many_ranks(ranks: int, gpus: int) -> UserError:
    """What is wrong if `ranks` processes on this machine see `gpus` GPUs together."""
    return UserError(
        f"{ranks} training processes on {socket.gethostname()}, where they see {gpus} GPU(s): training runs one process per GPU, "
        f"so start {gpus} (--tasks-per-node, or CUDA_VISIBLE_DEVICES with more GPUs; empty, it trains on CPUs)"
    )


def training_precision(device: torch.device) -> Literal["bfloat16", "float32"]:
    """What `training.precision=auto` means on a device: bfloat16 if it is a GPU that computes in it, not one that emulates it."""
    halves = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if halves else "float32"


def wait_for_gpu() -> None:
    """Wait until all work that was given to the GPU is done, if this process uses one, so that a clock counts it."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def gpu_identity(device: torch.device) -> str:
    """What tells a GPU of this machine from its others, whatever number this process knows it by."""
    return str(torch.cuda.get_device_properties(device).uuid)


def limit_memory(share: float) -> None:
    """Let this process's tensors take at most `share` of its GPU's memory, less what every process takes besides.

    A process then fails for lack of memory itself, in place of a neighbour on the same GPU. Without a GPU nothing is limited.
    """
    if not torch.cuda.is_available() or share >= 1.0:
        return
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(max(share - CONTEXT_BYTES / total, share / 2))


def give_back_memory() -> None:
    """Return the memory of tensors that nothing refers to any more to the GPU, for other processes."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def allow_tf32(allowed: bool) -> None:
    """Whether GPUs may round inputs to TensorFloat-32, in the whole process from now on."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")


@contextlib.contextmanager
def allowing_tf32(allowed: bool = True) -> Iterator[None]:
    """In this context GPUs may round inputs to TensorFloat-32 or, if not `allowed`, may not, in the whole process."""
    before = torch.backends.cudnn.allow_tf32
    allow_tf32(allowed)
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
