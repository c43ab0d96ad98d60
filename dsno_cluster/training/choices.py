"""What a config leaves to the machine, decided when a run begins: precision, compilation and the number of micro-batches.

All ranks decide alike, and a run that resumes keeps what can change its numbers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.device import training_precision
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.torch_internals import run_what_cannot_be_compiled
from dsno_cluster.training.beginning import Beginning
from dsno_cluster.training.checkpoint import CheckpointState
from dsno_cluster.training.engine import engine_stage
from dsno_cluster.training.memory import TrainingMemory, most_points, one_pass, training_memory
from dsno_cluster.training.objectives.losses import distance_of_shapes
from dsno_cluster.training.ranks import Ranks
from dsno_cluster.trajectories.generate import kernels_folder

SPARE = 0.1  # share of the free memory that is left for fragments between tensors and for other libraries
WORTH_COMPILING = 1000  # steps that a run must still have before it

Budget = Callable[[torch.device], int]


def decide(config: Config, ranks: Ranks, state: CheckpointState | None) -> Config:
    """The config with its precision and compilation chosen; that of micro-batches is left (`decide_accumulation`)."""
    settings = config.training
    if settings.precision == "auto":
        precision = training_precision(ranks.device) if state is None else state.precision
        config = _with(config, precision=precision)
    compile = settings.compile
    if compile == "auto":
        begun = 0 if state is None else state.step
        compile = (
            ranks.device.type == "cuda"
            and engine_stage(config, ranks.world_size) < 3  # its hooks break the graph
            and settings.steps - begun >= WORTH_COMPILING
        )
        if compile:  # nobody asked for it, so that it must not end a run
            run_what_cannot_be_compiled()
    return _with(config, compile=compile)


def decide_accumulation(
    config: Config,
    ranks: Ranks,
    beginning: Beginning,
    student: DSNO,
    *,
    free: Budget | None = None,
    tries: bool | None = None,
) -> Config:
    """The config with the fewest micro-batches whose training fits into the memory that is `free` on every rank.

    The estimate decides, and on a GPU (`tries`) a pass of the student on zeros, beside as much memory as the training will
    hold. On as many ranks as before, a run that resumes keeps its number. Collective.
    """
    settings, state = config.training, beginning.state
    if settings.accumulation != "auto":
        return config
    if state is not None and state.accumulation is not None and state.world_size == ranks.world_size:
        return _with(config, accumulation=state.accumulation)
    available = _smallest((free or free_memory)(ranks.device), ranks)
    usable = int(available * (1 - SPARE))
    kind: Literal["cuda", "cpu"] = "cuda" if ranks.device.type == "cuda" else "cpu"
    memory = training_memory(
        config, ranks=ranks.world_size, backbone=beginning.backbone, teacher=beginning.network, device=kind
    )
    choices = [
        k for k in range(1, settings.batch_size + 1) if settings.batch_size % (ranks.world_size * k) == 0
    ]
    sizes = {k: settings.batch_size // (ranks.world_size * k) for k in choices}
    fitting = [k for k in choices if memory.at(sizes[k]).total <= usable] or choices[-1:]
    if tries is None:  # a pass of the student is not the largest of distribution matching
        tries = kind == "cuda" and settings.objective == "trajectories"
    if tries:
        while len(fitting) > 1 and not _passes(config, ranks, student, memory.at(sizes[fitting[0]])):
            fitting = fitting[1:]
    chosen = fitting[0]
    if ranks.rank == 0:
        console.say(
            f"training.accumulation auto: {chosen} micro-batch(es) of {sizes[chosen]} images on each rank, for which "
            f"{memory.at(sizes[chosen]).total / 1e9:.3g} GB are estimated and {available / 1e9:.3g} GB are free"
        )
    return _with(config, accumulation=chosen)


def accelerate(student: DSNO, config: Config, ranks: Ranks) -> None:
    """Give the student the config's precision, and compile its network if that was decided."""
    settings = config.training
    points = compiled_points(config)
    if settings.compile:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", kernels_folder(config))
        if ranks.rank == 0:
            only = "" if points is None else f", for {' and '.join(map(str, sorted(points)))} time points"
            console.say(
                f"the student's network is compiled{only}, with kernels kept in {kernels_folder(config)}: the first step takes "
                "longer, up to some minutes"
            )
    student.accelerate(
        precision=settings.precision,
        compile=bool(settings.compile),
        only=None if points is None else lambda images, count: count in points,
        graphs=_as_graphs(student, config, ranks),
    )


def compiled_points(config: Config) -> frozenset[int] | None:
    """The numbers of time points for which the network is compiled, at most two; None: any, as there is only one."""
    if config.student.points != "drawn":
        return None
    return frozenset({1, len(most_points(config))})


def _as_graphs(student: DSNO, config: Config, ranks: Ranks) -> bool:
    """Whether the compiled passes are replayed as CUDA graphs: where launches bound, and shapes and addresses stay."""
    settings = config.training
    return (
        bool(settings.compile)
        and ranks.device.type == "cuda"
        and engine_stage(config, ranks.world_size) == 0
        and settings.micro_batches == 1
        and settings.objective == "trajectories"  # the other evaluates the student between its passes
        and settings.recompute == "none"
        and (config.student.points != "drawn" or settings.most_points == 1)
        and student.is_small
    )


def free_memory(device: torch.device) -> int:
    """Bytes that this process can still take: of the GPU, or its share of what the machine or its cgroup has left."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    beside = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or 1)
    return min([int(psutil.virtual_memory().available), *_left_in_cgroup()]) // beside


def _left_in_cgroup(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """Bytes that the memory limit of this process's cgroup leaves, if it has one (cgroup v2)."""
    try:
        own = Path("/proc/self/cgroup").read_text().partition("0::/")[2].strip()
        folder = root / own
        limit = (folder / "memory.max").read_text().strip()
        return [] if limit == "max" else [int(limit) - int((folder / "memory.current").read_text())]
    except (OSError, ValueError):
        return []


def _smallest(count: int, ranks: Ranks) -> int:
    """The smallest of all ranks' counts; collective."""
    least = torch.tensor([count], dtype=torch.int64, device=ranks.device)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def _passes(config: Config, ranks: Ranks, student: DSNO, memory: TrainingMemory) -> bool:
    """Whether a pass on zeros fits on every rank beside what the training will hold; collective."""
    fits = 1
    try:
        student.to(ranks.device).accelerate(precision=config.training.precision)
        distance = distance_of_shapes(config.training.loss)
        if isinstance(distance, torch.nn.Module):
            distance.to(ranks.device)
        # the pass makes the weights and gradients itself
        beside = memory.optimizer + memory.averages + memory.buffers
        reserved = torch.empty(beside, dtype=torch.uint8, device=ranks.device)
        one_pass(student, distance, config, memory.micro_batch, ranks.device)
        del reserved
    except torch.OutOfMemoryError:
        fits = 0
    student.zero_grad(set_to_none=True)
    student.cpu()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return bool(_smallest(fits, ranks))


def _with(config: Config, **changes: object) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})
