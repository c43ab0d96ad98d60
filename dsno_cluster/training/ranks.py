"""The processes that train together, and the passing of values from rank 0 to the others."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from dsno_cluster import liveness
from dsno_cluster.cluster.rendezvous import free_ports
from dsno_cluster.config import Config
from dsno_cluster.device import allow_tf32, compute_device
from dsno_cluster.errors import LOST_RANK, Preempted, UserError, WorkError
from dsno_cluster.training.deepspeed_internals import import_deepspeed

Found = TypeVar("Found")

# If a rank hangs in a job, its guard ends it. torch's own time-outs would name no rank, and count the time for
# which a job was suspended.
GUARDED_TIMEOUT = timedelta(days=1)
_UNSET = (
    "a launcher such as torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; to train in one process, "
    "unset them"
)


@dataclass(frozen=True)
class Ranks:
    """This process's place among those that train together."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def join_ranks(config: Config) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    Without them this process is the only one. Raises UserError if they describe no group, and if the batch does
    not divide among the ranks.
    """
    rank, local_rank, world, local_world = _place()
    check_divides(config, world)

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(config.training.threads or max(1, len(os.sched_getaffinity(0)) // local_world))
    deepspeed = import_deepspeed()
    deepspeed.init_distributed(
        dist_backend="nccl" if cuda else "gloo",
        verbose=False,
        **({"timeout": GUARDED_TIMEOUT} if liveness.guarded else {}),
    )
    compute_device()
    allow_tf32(config.training.precision == "tf32")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return Ranks(rank, local_rank, world, device)


def _place() -> tuple[int, int, int, int]:
    """Rank, rank on this node, number of ranks, and their number on this node, by the environment.

    What an only rank lacks is set; DeepSpeed reads it. Raises UserError for values of which no group can be made.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    names = (*alone, "MASTER_PORT", "LOCAL_WORLD_SIZE")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if not {"RANK", "WORLD_SIZE"} & given.keys():
        given = {}
    for name, text in given.items():
        if name != "MASTER_ADDR" and not text.isdecimal():
            raise UserError(f"{name}={text} in the environment is not a whole number; {_UNSET}")
    rank, world = int(given.get("RANK", "0")), int(given.get("WORLD_SIZE", "1"))
    if rank >= world:
        raise UserError(f"RANK={rank} in the environment is not below WORLD_SIZE={world}; {_UNSET}")
    missing = [name for name in (*alone, "MASTER_PORT") if name not in given]
    if world > 1 and missing:
        raise UserError(f"WORLD_SIZE={world} in the environment, and no {' and no '.join(missing)}; {_UNSET}")
    if world == 1:
        launched = given if launched_as_rank() else {}
        os.environ.update({**alone, "MASTER_PORT": str(free_ports(1)[0]), **launched})
    return rank, int(os.environ["LOCAL_RANK"]), world, max(1, int(given.get("LOCAL_WORLD_SIZE", world)))


def launched_as_rank() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def check_divides(config: Config, world_size: int) -> None:
    """Raises UserError unless the global batch divides over ranks and accumulation."""
    settings = config.training
    accumulation = 1 if settings.accumulation == "auto" else settings.accumulation
    parts = world_size * accumulation
    if settings.batch_size % parts:
        raise UserError(
            f"training.batch_size {settings.batch_size} does not divide by {world_size} ranks x "
            f"{accumulation} accumulation; the nearest that does is "
            f"{max(1, round(settings.batch_size / parts)) * parts}"
        )


def on_rank_0(ranks: Ranks, work: Callable[[], Found]) -> Found | None:
    """The result of `work` on rank 0; None on the others, which do not run it; collective.

    If it raises, every rank raises, so that none waits for one that has failed or was stopped.
    """
    found, problem = None, None
    if ranks.rank == 0:
        try:
            found = work()
        except BaseException as error:  # noqa: BLE001 (whatever it is, the other ranks must not wait for this one)
            problem = error
    try:
        failure = _broadcast(ranks, None if problem is None else _for_others(problem))
    finally:
        # also if the others are gone, as when a signal reached all ranks
        if problem is not None:
            raise problem
    if failure is not None:
        raise failure
    return found


def from_rank_0(ranks: Ranks, work: Callable[[], Found]) -> Found:
    """The result of `work` on rank 0, on every rank; collective, with errors as in `on_rank_0`."""
    found = on_rank_0(ranks, work)
    return _broadcast(ranks, found)  # type: ignore[return-value]  # None only on the ranks that receive


def broadcast_weights(model: nn.Module, ranks: Ranks) -> None:
    """Copy the weights of rank 0 to every rank; collective."""
    if ranks.world_size == 1:
        return
    for tensor in model.state_dict().values():
        there = tensor.to(ranks.device)
        dist.broadcast(there, 0)
        tensor.copy_(there)


def _broadcast(ranks: Ranks, value: Found) -> Found:
    """Rank 0's `value` on every rank."""
    if ranks.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, device=ranks.device)
    return values[0]


def _for_others(error: BaseException) -> BaseException:
    """What the other ranks raise, so that they end as rank 0 does, if `error` ended its work."""
    if isinstance(error, UserError):
        return UserError(str(error))
    if isinstance(error, WorkError):
        return WorkError(str(error))
    stopped = "rank 0 was stopped"
    if isinstance(error, KeyboardInterrupt):
        return Preempted(stopped) if isinstance(error, Preempted) else KeyboardInterrupt(stopped)
    if isinstance(error, SystemExit):
        return SystemExit(error.code)
    return WorkError(f"{LOST_RANK} (rank 0: {error})")
