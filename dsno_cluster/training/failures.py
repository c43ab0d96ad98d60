"""What torch raises if another rank or the memory of a GPU is lost to training, in our words."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dsno_cluster.config import Config
from dsno_cluster.errors import LOST_RANK, UserError, WorkError
from dsno_cluster.training.checkpoint import newest_step

LONGEST = 200  # characters of another library's words


@contextlib.contextmanager
def failures_in_a_line(config: Config) -> Iterator[None]:
    """Turn what torch raises if another rank is lost into WorkError, and lack of device memory into UserError.

    NCCL raises such errors only when it is called again. A collective that waits when its peer is lost ends with the
    process, since torch does not let a GPU continue on what a failed collective has left: whoever started the ranks says
    which of them ended, and how.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError and dist.DistError are such
        if (failure := _in_a_line(error, config)) is None:
            raise
        raise failure from error


def _in_a_line(error: RuntimeError, config: Config) -> UserError | WorkError | None:
    text = str(error)
    of_ranks = isinstance(error, dist.DistError) or "gloo" in text
    if isinstance(error, torch.OutOfMemoryError) or (of_ranks and "out of memory" in text):
        return UserError(
            f"{' '.join(text.split())[:LONGEST]}; less of it is used with training.accumulation, training.recompute, more "
            "ranks at training.zero_stage 2 or 3, or a smaller training.batch_size"
        )
    if not of_ranks:
        return None
    if "Duplicate GPU" in text:
        return UserError(
            f"two training processes have the same GPU ({_reason(text)}): start one per GPU, and let CUDA_VISIBLE_DEVICES name "
            "each of them once"
        )
    newest = newest_step(config)
    begin = f"the checkpoint of step {newest}" if newest is not None else "the beginning"
    return WorkError(f"{LOST_RANK} ({_reason(text)}); the same command resumes from {begin}")


def _reason(text: str) -> str:
    """What a library says in its first line and, if it is NCCL, last, without places in its sources and versions."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    first, last = (lines[0], lines[-1]) if lines else ("", "")
    if (found := re.match(r"NCCL error in: \S+?:\d+, (.*?)(?:, NCCL version [\d.]+)?$", first)) is not None:
        first = f"NCCL: {found[1]}"
        first += f": {last}" if "Last error:" in lines and last != "Last error:" else ""
    return first[:LONGEST]
