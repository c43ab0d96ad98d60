"""The figures and signals of steps, agreed among the ranks, and read back from the device without making the host wait.

On a CPU they are read at once. On a GPU the host starts the next step before it reads those of the last one, so that the
GPU always has work, unless they are due: no line, picture or checkpoint is written before its own step was judged.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dsno_cluster import liveness
from dsno_cluster.training.preemption import StopSignals
from dsno_cluster.training.ranks import Ranks
from dsno_cluster.trajectories.reader import Batch


@dataclass(frozen=True)
class Signals:
    """Whether a signal reached any rank."""

    preempt: bool = False
    interrupt: bool = False

    @property
    def any(self) -> bool:
        return self.preempt or self.interrupt

    def __or__(self, other: Signals) -> Signals:
        return Signals(self.preempt or other.preempt, self.interrupt or other.interrupt)


@dataclass(frozen=True)
class Taken:
    """Optimiser step `step` (0-based) on this rank's `batches`, or an update before it: the figures of all ranks, and their
    signals.

    `finite`: whether the norm of the gradient is; also true if nobody computed it.
    """

    step: int
    batches: list[Batch]
    figures: list[float]
    finite: bool
    signals: Signals


class Readback:
    """Steps, or updates before the first, in their order; the newest is `behind`: read only after the next, or if asked."""

    def __init__(self, ranks: Ranks, behind: bool | None = None) -> None:
        self.ranks = ranks
        self.behind = ranks.device.type == "cuda" if behind is None else behind
        self.pending: deque[Callable[[], Taken]] = deque()

    def send(
        self,
        step: int,
        batches: list[Batch],
        figures: Tensor,
        norm: Tensor | float | None,
        stop: StopSignals,
    ) -> None:
        """Send a step's figures (F,) on their way, those of this rank; collective."""
        # filled, not copied: a copy from the host would wait for the device
        flags = [figures.new_full((1,), float(flag)) for flag in (stop.preempt, stop.interrupt)]
        together = torch.cat([figures / self.ranks.world_size, *flags])
        with liveness.waiting_for_peers():
            dist.all_reduce(together)
        values = torch.cat([together, _as_tensor(norm, figures)])
        arrived = self._copied(values)

        def read() -> Taken:
            *averaged, preempt, interrupt, length = arrived()
            signals = Signals(preempt > 0, interrupt > 0)
            return Taken(step, batches, averaged, math.isfinite(length), signals)

        self.pending.append(read)

    def arrived(self, *, all: bool) -> Iterator[Taken]:
        """Steps not yet read, oldest first: those before the newest, or `all` of them."""
        while len(self.pending) > (1 if self.behind and not all else 0):
            yield self.pending.popleft()()

    def _copied(self, values: Tensor) -> Callable[[], list[float]]:
        """A function that returns the values once they have been computed, and waits until then."""
        if values.device.type != "cuda":
            return values.tolist
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> list[float]:
            with liveness.waiting_for_peers():
                copied.synchronize()
            found: list[float] = host.tolist()
            return found

        return wait


def _as_tensor(norm: Tensor | float | None, like: Tensor) -> Tensor:
    """A norm as (1,) beside other figures; 0 for none."""
    if isinstance(norm, Tensor):
        return norm.detach().reshape(1).to(like)
    return like.new_full((1,), 0.0 if norm is None else norm)
