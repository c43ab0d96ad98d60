"""DeepSpeed set-up, and exponential moving averages of the weights under every ZeRO stage."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsno_cluster.cluster.rendezvous import free_ports
from dsno_cluster.config import Config
from dsno_cluster.device import compute_device
from dsno_cluster.errors import UserError
from dsno_cluster.training.optim import ema_decay_at, make_optimizer
from dsno_cluster.training.state import MASTER, Fragment, SavedFragments, begin_moments, whole_on_rank_0

# Elements sent at once. DeepSpeed's own 500 million are for networks of a hundred times the size: buffers of the whole of ours,
# which is what partitioning shall save.
BUCKET = 10_000_000


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device


def join_ranks(config: Config) -> Ranks:
    """Join the process group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe.

    Without them this process is the only one. Raises UserError where the batch does not divide.
    """
    if not launched_as_rank():
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_ports(1)[0]))
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    check_divides(config, world)

    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(config.training.threads or max(1, len(os.sched_getaffinity(0)) // local_world))
    deepspeed = _deepspeed()
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", verbose=False)
    compute_device()  # float32 is float32 on a GPU too, as where the trajectories were made and where eval measures
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return Ranks(rank, local_rank, world, device)


def launched_as_rank() -> bool:
    """Whether a launcher such as torchrun started this process as one of several."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def check_divides(config: Config, world_size: int) -> None:
    """Raises UserError unless the global batch divides over ranks and accumulation."""
    parts = world_size * config.training.accumulation
    if config.training.batch_size % parts:
        raise UserError(
            f"training.batch_size {config.training.batch_size} does not divide by {world_size} ranks x "
            f"{config.training.accumulation} accumulation; the nearest that does is "
            f"{max(1, round(config.training.batch_size / parts)) * parts}"
        )


def make_engine(model: nn.Module, config: Config, ranks: Ranks) -> Any:
    """The DeepSpeed engine of a model. The loop sets the learning rate itself, step by step.

    Raises UserError for a precision that this device does not have.
    """
    settings = config.training
    deepspeed = _deepspeed()
    # one rank has nothing to partition, and stage 0 is faster; half precision needs the others' float32 masters in one piece
    alone = ranks.world_size == 1 and settings.precision == "float32"
    if settings.precision == "float16" and not deepspeed.get_accelerator().is_fp16_supported():
        raise UserError(
            f"training.precision float16: this {ranks.device.type} has none; take bfloat16 or float32"
        )
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, settings),
        dist_init_required=False,
        config={
            "train_batch_size": settings.batch_size,
            "train_micro_batch_size_per_gpu": settings.batch_size
            // (ranks.world_size * settings.accumulation),
            "gradient_accumulation_steps": settings.accumulation,
            "gradient_clipping": settings.gradient_clip,
            "zero_optimization": {
                "stage": 0 if alone else settings.zero_stage,
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
                "stage3_prefetch_bucket_size": BUCKET,
                "stage3_max_live_parameters": 2 * BUCKET,
                "stage3_max_reuse_distance": 2 * BUCKET,
            },
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": settings.precision == "bfloat16"},
            "fp16": {"enabled": settings.precision == "float16"},  # loss scaling is dynamic
            "steps_per_print": 10**9,
        },
    )
    begin_moments(engine)
    return engine


def _deepspeed() -> Any:
    """The deepspeed module, quiet, and without its shared-memory kernel for inference on CPU.

    Training never calls that kernel, yet DeepSpeed would compile it on first use: half a minute, and a C++
    compiler that a laptop may not have.
    """
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # it calls torch by names that torch is about to give up
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class EMA:
    """Float32 moving averages of the master weights; each rank averages just what it owns of them.

    One for each of `decays`. Where training is in half precision the masters are averaged, not the rounded weights.
    """

    def __init__(self, fragments: dict[str, Fragment], decays: Sequence[float]) -> None:
        self.fragments = fragments
        self.masters = {name: fragment.tensors[MASTER] for name, fragment in fragments.items()}
        self.averages = {d: {name: t.clone() for name, t in self.masters.items()} for d in decays}

    @torch.no_grad()
    def update(self, step: int, ramp: bool) -> None:
        """average <- d average + (1 - d) weights, with the decay d of optimiser step `step` (`ema_decay_at`)."""
        for decay, average in self.averages.items():
            weight = 1.0 - ema_decay_at(step, decay, ramp)
            torch._foreach_lerp_(list(average.values()), list(self.masters.values()), weight)

    @torch.no_grad()
    def load(self, saved: SavedFragments) -> None:
        """Take back the averages that a checkpoint holds."""
        for decay, average in self.averages.items():
            for name, fragment in self.fragments.items():
                average[name].copy_(saved.read(ema_kind(decay), name, fragment.start, fragment.count))

    def whole(self, model: nn.Module, decay: float) -> dict[str, Tensor]:
        """The whole average of a decay, by parameter, on rank 0 (`whole_on_rank_0`); collective."""
        return whole_on_rank_0(model, self.fragments, self.averages[decay])


def ema_kind(decay: float) -> str:
    """What an average is called in a checkpoint."""
    return f"ema-{decay:g}"
