"""The DeepSpeed engine, and exponential moving averages of the weights under every ZeRO stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsno_cluster.config import Config
from dsno_cluster.torch_internals import lerp_all
from dsno_cluster.training.deepspeed_internals import (
    begin_moments,
    fragments_of,
    import_deepspeed,
    scale_losses,
    whole_shape,
    without_norm,
)
from dsno_cluster.training.fragments import MASTER, Fragment, SavedFragments
from dsno_cluster.training.optim import ema_decay_at, make_optimizer
from dsno_cluster.training.ranks import Ranks, keep_waiting

# Elements sent at once. DeepSpeed's default of 500 million suits networks a hundred times larger: it would
# buffer all of ours, which partitioning is meant to avoid.
BUCKET = 10_000_000


def engine_stage(config: Config, ranks: int) -> int:
    """The ZeRO stage at which so many ranks train: one has nothing to partition, and stage 0 is faster.

    The loss is scaled, as float16 needs it, by the other stages.
    """
    stage: int = config.training.zero_stage
    if config.training.precision == "float16":
        return max(1, stage)
    return 0 if ranks == 1 else stage


def make_engine(model: nn.Module, config: Config, ranks: Ranks) -> Any:
    """The DeepSpeed engine of a model, whose weights, gradients and their sums are float32 at every precision.

    The training loop sets the learning rate itself, step by step.
    """
    settings = config.training
    deepspeed = import_deepspeed()
    stage = engine_stage(config, ranks.world_size)
    # DeepSpeed reads the norm back at each step; a GPU must not wait for that
    clips, scales = settings.gradient_clip > 0.0, settings.precision == "float16"
    norm_needed = clips or scales or ranks.device.type == "cpu"
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(model, settings, fused=ranks.device.type == "cuda"),
        dist_init_required=False,
        config={
            "train_batch_size": settings.batch_size,
            "train_micro_batch_size_per_gpu": settings.batch_size
            // (ranks.world_size * settings.micro_batches),
            "gradient_accumulation_steps": settings.micro_batches,
            "gradient_clipping": settings.gradient_clip,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": BUCKET,
                "allgather_bucket_size": BUCKET,
                "stage3_prefetch_bucket_size": BUCKET,
                "stage3_max_live_parameters": 2 * BUCKET,
                "stage3_max_reuse_distance": 2 * BUCKET,
                **({} if norm_needed or stage not in (1, 2) else without_norm()),
            },
            "timers": {"throughput": {"enabled": False}},  # it waits for the device at each step
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        },
    )
    if scales:
        scale_losses(engine)
    begin_moments(engine)
    keep_waiting()
    return engine


@dataclass(frozen=True)
class Engines:
    """The engines of a training: the student's and, by name, those of the companions that its objective trains."""

    student: Any
    companions: Mapping[str, Any]

    @property
    def by_prefix(self) -> dict[str, Any]:
        """All of them by what the names of their parameters begin with in a checkpoint."""
        return {"": self.student, **{companion_prefix(name): e for name, e in self.companions.items()}}

    def fragments(self, *, replicas: bool = False) -> dict[str, Fragment]:
        """This rank's fragments of the parameters of all (`fragments_of`), by their names in a checkpoint."""
        return {
            prefix + name: fragment
            for prefix, engine in self.by_prefix.items()
            for name, fragment in fragments_of(engine, replicas=replicas).items()
        }

    def gradient_norm(self) -> Tensor | float | None:
        """The sum of the global norms of their gradients, None if nobody computed any; finite only if all of them are."""
        norms = [engine.get_global_grad_norm() for engine in self.by_prefix.values()]
        known = [norm for norm in norms if norm is not None]
        return sum(known[1:], start=known[0]) if known else None


def companion_prefix(name: str) -> str:
    """What the names of a companion's parameters begin with in a checkpoint."""
    return f"{name}:"


class EMA:
    """Float32 moving averages of the master weights by decay; each rank averages what it owns.

    Below float32 autocast rounds the weights for the layers: what is averaged is not rounded.
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
            lerp_all(list(average.values()), list(self.masters.values()), weight)

    @torch.no_grad()
    def load(self, saved: SavedFragments) -> None:
        """Load the averages from a checkpoint."""
        for decay, average in self.averages.items():
            for name, fragment in self.fragments.items():
                average[name].copy_(saved.read(ema_kind(decay), name, fragment.start, fragment.count))

    def whole(self, model: nn.Module, decay: float) -> dict[str, Tensor]:
        """The whole average of a decay, by parameter, on rank 0 (`whole_on_rank_0`); collective."""
        return whole_on_rank_0(model, self.fragments, self.averages[decay])


def ema_kind(decay: float) -> str:
    """The name of an average in a checkpoint."""
    return f"ema-{decay:g}"


def whole_on_rank_0(
    model: nn.Module, fragments: dict[str, Fragment], parts: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Whole tensors by parameter, assembled on rank 0 from every rank's `parts`; collective.

    They are on the CPU; other ranks get an empty dict.
    """
    whole = {}
    for name, parameter in model.named_parameters():
        shape = whole_shape(parameter)
        flat = torch.zeros(shape.numel(), device=parts[name].device)
        fragment = fragments[name]
        flat[fragment.start : fragment.start + fragment.count] = parts[name]
        dist.reduce(flat, 0)  # each element belongs to one rank and is 0 on all others
        if dist.get_rank() == 0:
            whole[name] = flat.view(shape).cpu()
    return whole
