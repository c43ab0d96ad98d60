"""The speed of a training, and its memory use."""

from __future__ import annotations

import contextlib
import resource
import time
from collections.abc import Iterator

import torch


class Pace:
    """Seconds of training so far, images per second, and the share of time spent waiting for data."""

    def __init__(self, before: float) -> None:
        self.before, self.began = before, time.perf_counter()
        self.images, self.waited = 0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def step(self, images: int) -> None:
        self.images += images

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.began

    @property
    def images_per_second(self) -> float:
        return self.images / (time.perf_counter() - self.began)

    @property
    def data_wait(self) -> float:
        return self.waited / (time.perf_counter() - self.began)


def memory_gb(device: torch.device) -> float:
    """Peak memory of this rank in GB: on the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
