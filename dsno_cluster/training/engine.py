"""DeepSpeed set-up, and the exponential moving average of the weights under every ZeRO stage."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsno_cluster.config import Config
from dsno_cluster.errors import UserError


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
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def make_engine(model: nn.Module, config: Config, ranks: Ranks) -> Any:
    """The DeepSpeed engine of a model, with Adam. The loop sets the learning rate itself, step by step."""
    settings = config.training
    deepspeed = _deepspeed()
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, betas=(0.9, 0.999), eps=1e-8)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_batch_size": settings.batch_size,
            "train_micro_batch_size_per_gpu": settings.batch_size
            // (ranks.world_size * settings.accumulation),
            "gradient_accumulation_steps": settings.accumulation,
            "gradient_clipping": settings.gradient_clip,
            "zero_optimization": {"stage": settings.zero_stage},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": settings.precision == "bfloat16"},
            "steps_per_print": 10**9,
        },
    )
    return engine


def _deepspeed() -> Any:
    """The deepspeed module, quiet, and without its shared-memory kernel for inference on CPU.

    Training never calls that kernel, yet DeepSpeed would compile it on first use: half a minute, and a C++
    compiler that a laptop may not have.
    """
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _local(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: its partition under ZeRO-3, else all of it."""
    return getattr(parameter, "ds_tensor", parameter).detach()


class EMA:
    """A float32 moving average of the weights; each rank averages just what it holds."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.averages = {name: _local(p).float().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """average <- decay average + (1 - decay) weights"""
        for name, parameter in self.model.named_parameters():
            self.averages[name].lerp_(_local(parameter).float(), 1.0 - decay)

    def gathered(self) -> dict[str, Tensor]:
        """The whole averaged weights by name; collective under ZeRO-3, so every rank must call it."""
        whole = {}
        for name, parameter in self.model.named_parameters():
            mine = self.averages[name]
            shape = getattr(parameter, "ds_shape", None)  # the whole shape, under ZeRO-3
            if shape is not None:
                parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, mine)
                mine = torch.cat(parts)[: shape.numel()].view(shape)  # the last partition is padded
            whole[name] = mine
        return whole

    def load(self, averages: dict[str, Tensor]) -> None:
        """Take back what `averages` of the same rank, world size and stage held."""
        for name, average in self.averages.items():
            average.copy_(averages[name])
