"""Detection of divergence: a figure of a step that is not finite, or far above its running mean."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from dsno_cluster.training.ranks import Ranks
from dsno_cluster.trajectories.reader import Batch
from dsno_cluster.trajectories.shards import Manifest

NAMED = 8  # samples and shards of a bad batch
SETTLED = 50  # steps that must have computed a figure before its running mean counts as normal


class NormalDistances(BaseModel):
    """The running mean of each figure of a step, and the number of steps that computed it."""

    model_config = ConfigDict(frozen=True)
    means: tuple[float, ...]
    seen: tuple[int, ...]


class DivergenceWatch:
    """Tracks what is normal of the figures with these `names`; `before` is the state from a checkpoint."""

    def __init__(self, factor: float, names: Sequence[str], before: NormalDistances | None = None) -> None:
        count = len(names)
        before = before or NormalDistances(means=(0.0,) * count, seen=(0,) * count)
        self.factor, self.names = factor, names
        self.means, self.seen = list(before.means), list(before.seen)

    def normal(self) -> NormalDistances:
        return NormalDistances(means=tuple(self.means), seen=tuple(self.seen))

    def problem(self, figures: Sequence[float | None]) -> str | None:
        """What is wrong with a step's figures (None for those that it did not compute), or None if nothing is."""
        if not all(math.isfinite(figure) for figure in figures if figure is not None):
            return "the loss is not finite"
        for i, figure in enumerate(figures):
            if figure is None:
                continue
            if self.factor and self.seen[i] >= SETTLED and figure > self.factor * self.means[i]:
                return (
                    f"the {self.names[i]} is {figure:.3g}, {figure / self.means[i]:.0f} times its running mean "
                    f"(training.divergence_factor {self.factor:g})"
                )
            weight = max(0.02, 1.0 / (self.seen[i] + 1))
            self.means[i] += weight * (figure - self.means[i])
            self.seen[i] += 1
        return None


def describe_batch(batches: Sequence[Batch], manifest: Manifest | None, ranks: Ranks) -> str:
    """Samples and shards of a step's global batch; only those with non-finite states, if any.

    It names the first `NAMED` of each. Collective.
    """
    if manifest is None or not any(len(batch.indices) for batch in batches):
        return "samples of the student from new noise"
    indices = torch.cat([torch.from_numpy(batch.indices) for batch in batches])
    finite = torch.cat([batch.states.isfinite().flatten(1).all(1) for batch in batches])
    mine = torch.stack([indices, (~finite).long()]).to(ranks.device)
    gathered = [torch.empty_like(mine) for _ in range(ranks.world_size)]
    dist.all_gather(gathered, mine)
    samples, broken = torch.cat(gathered, dim=1).cpu()
    if broken.any():
        samples = samples[broken.bool()]
    per_shard = manifest.shards[0].stop - manifest.shards[0].start
    numbers = sorted({i // per_shard for i in samples.tolist()})

    def some(items: Sequence[object]) -> str:
        more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
        return ", ".join(map(str, items[:NAMED])) + more

    what = "states that are not finite, " if broken.any() else ""
    return (
        f"{what}samples {some(sorted(samples.tolist()))} of {some([manifest.shards[i].key for i in numbers])}"
    )
