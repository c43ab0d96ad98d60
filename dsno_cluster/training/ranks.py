"""The processes that train together, and the passing of values from rank 0 to the others."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from dsno_cluster import liveness
from dsno_cluster.cluster.rendezvous import free_ports
from dsno_cluster.config import Config
from dsno_cluster.device import allow_tf32, compute_device, gpu_identity, rank_device, too_many_ranks
from dsno_cluster.errors import LOST_RANK, Preempted, UserError, WorkError
from dsno_cluster.torch_internals import abort_groups, set_timeouts
from dsno_cluster.training.deepspeed_internals import forget_groups, import_deepspeed

Found = TypeVar("Found")

# If a rank hangs in a job, its guard ends it. torch's own time-outs would name no rank, and count the time for
# which a job was suspended.
GUARDED_TIMEOUT = timedelta(days=1)
TIMEOUT = timedelta(minutes=30)  # without a guard: rank 0 may work for minutes while the others wait
_PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
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


@contextlib.contextmanager
def joined_ranks(config: Config) -> Iterator[Ranks]:
    """In this context the process is one of the ranks (`join_ranks`); it leaves their group at the end, also if it fails."""
    before = {name: os.environ.get(name) for name in _PLACE}
    try:
        ranks = join_ranks(config)
        try:
            yield ranks
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what failed is worth saying, not this
                _leave(ranks, failed=True)
            raise
        _leave(ranks, failed=False)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def _leave(ranks: Ranks, *, failed: bool) -> None:
    """Destroy the process groups. NCCL would wait for ranks that are lost, so after a failure it is aborted."""
    if failed and ranks.device.type == "cuda" and ranks.world_size > 1:
        abort_groups()
    else:
        dist.destroy_process_group()
    forget_groups()


def join_ranks(config: Config) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    Without them this process is the only one. Raises UserError if they describe no group, if the batch does not divide
    among the ranks, and if there is no GPU for each rank on a machine with GPUs.
    """
    rank, local_rank, world, local_world = _place()
    check_divides(config, world)
    device = rank_device(local_rank, local_world)
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed computes on cuda:LOCAL_RANK
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        local = local_world or world
        torch.set_num_threads(config.training.threads or max(1, len(os.sched_getaffinity(0)) // local))
    deepspeed = import_deepspeed()
    if not dist.is_initialized():
        _meet(rank, world, device)
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)
    compute_device()
    allow_tf32(config.training.precision == "tf32")
    return Ranks(rank, local_rank, world, device)


def _meet(rank: int, world: int, device: torch.device) -> None:
    """Find the other ranks and make the process group. Raises UserError if two ranks have the same GPU."""
    timeout = GUARDED_TIMEOUT if liveness.guarded else TIMEOUT
    store, _, _ = next(rendezvous("env://", rank, world, timeout=timeout))
    store.set_timeout(timeout)
    bound = None
    if device.type == "cuda":
        torch.cuda.set_device(device)
        _check_own_gpu(store, gpu_identity(device))
        # before 2.7.1 torch hangs with it
        bound = device if world > 1 and torch.__version__ >= "2.7.1" else None
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=timeout, device_id=bound
    )


def _check_own_gpu(store: Any, gpu: str) -> None:
    """Raises UserError if another rank on this machine has taken the same GPU, with which NCCL would fail."""
    if (ranks := store.add(f"{socket.gethostname()}/{gpu}", 1)) > 1:
        raise too_many_ranks(ranks, 1)


def keep_waiting() -> None:
    """Give the groups that DeepSpeed has made the time-out of ours; theirs with NCCL is ten minutes."""
    set_timeouts(GUARDED_TIMEOUT if liveness.guarded else TIMEOUT)


def barrier(ranks: Ranks) -> None:
    """Wait until every rank is here."""
    if ranks.world_size > 1:
        dist.barrier(device_ids=None if ranks.device.index is None else [ranks.device.index])


def _place() -> tuple[int, int, int, int | None]:
    """Rank, rank on this node, number of ranks, and their number on this node if it is known, by the environment.

    What an only rank lacks is set; DeepSpeed reads it. Raises UserError for values of which no group can be made.
    """
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    given = {name: os.environ[name] for name in _PLACE if name in os.environ}
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
    local_world = 1 if world == 1 else int(given.get("LOCAL_WORLD_SIZE", "0")) or None
    return rank, int(os.environ["LOCAL_RANK"]), world, local_world


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


def on_every_rank(ranks: Ranks, work: Callable[[], Found]) -> Found:
    """The result of `work`, which every rank does for itself; collective.

    If it raises on one of them, every rank raises, so that none waits for one that has failed.
    """
    found, problem = None, None
    try:
        found = work()
    except Exception as error:  # noqa: BLE001 (whatever it is, the other ranks must not wait for this one)
        problem = error
    failures: list[BaseException | None] = [None] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(failures, None if problem is None else _for_others(problem, ranks.rank))
    if problem is not None:
        raise problem
    for failure in failures:
        if failure is not None:
            raise failure
    return found  # type: ignore[return-value]  # it is the result of `work`


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


def _for_others(error: BaseException, rank: int = 0) -> BaseException:
    """What the other ranks raise, so that they end as `rank` does, if `error` ended its work."""
    if isinstance(error, UserError):
        return UserError(str(error))
    if isinstance(error, WorkError):
        return WorkError(str(error))
    stopped = "rank 0 was stopped"
    if isinstance(error, KeyboardInterrupt):
        return Preempted(stopped) if isinstance(error, Preempted) else KeyboardInterrupt(stopped)
    if isinstance(error, SystemExit):
        return SystemExit(error.code)
    return WorkError(f"{LOST_RANK} (rank {rank}: {error})")
