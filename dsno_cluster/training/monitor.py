"""What a training shows of itself: metrics.jsonl, TensorBoard, held-out error, pictures; and when it must stop."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.diffusion.accuracy import relative_errors
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.images import grid_png
from dsno_cluster.model_folder import step_name
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import FolderStorage
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.teachers import find_teacher
from dsno_cluster.training.engine import Ranks
from dsno_cluster.trajectories.reader import Batch
from dsno_cluster.trajectories.shards import Manifest, trajectory_spec
from dsno_cluster.trajectories.spec import solve_samples

NAMED = 8  # samples and shards of a bad batch
SETTLED = 50  # steps that a time point was seen in, before its running mean tells what is normal


def metrics_file(config: Config) -> Path:
    return config.run_dir / config.student_prefix / "metrics.jsonl"


def trim_metrics(config: Config, step: int) -> None:
    """Drop lines of steps after `step`, which a resumed run will write again, and one that a crash cut short."""
    file = metrics_file(config)
    lines = file.read_text().splitlines() if file.is_file() else []
    kept = [line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    FolderStorage(file.parent).write(file.name, "".join(kept).encode())


class Metrics:
    """Appends lines to metrics.jsonl, and to TensorBoard's files where the config asks for them."""

    def __init__(self, config: Config, start: int) -> None:
        self.file = metrics_file(config)
        trim_metrics(config, start)
        self.board = tensorboard(config, start) if config.training.tensorboard else None

    def write(self, line: dict[str, Any]) -> None:
        try:
            with self.file.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise WorkError(f"{self.file}: cannot be written: {error.strerror}") from error
        if self.board is not None:
            for name, value in line.items():
                values = value if isinstance(value, list) else [value]
                tags = [f"{name}/{i}" for i in range(len(values))] if isinstance(value, list) else [name]
                for tag, number in zip(tags, values, strict=True):
                    if number is not None and name != "step":
                        self.board.add_scalar(tag, number, line["step"])
            self.board.flush()

    def picture(self, step: int, png: bytes, images_NCHW: Tensor) -> None:
        """Samples from fixed noise: `samples/step-000001000.png` beside metrics.jsonl."""
        FolderStorage(self.file.parent / "samples").write(f"{step_name(step)}.png", png)
        if self.board is not None:
            self.board.add_images("samples", (images_NCHW.clamp(-1, 1) + 1) / 2, step)


def tensorboard(config: Config, start: int) -> Any:
    """A writer of TensorBoard's event files. Raises UserError where the package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "training.tensorboard: the package tensorboard is not installed; pip install tensorboard, "
            "or set it to false"
        ) from None
    folder = metrics_file(config).parent / "tensorboard"
    return SummaryWriter(str(folder), purge_step=start + 1)


class HeldOut:
    """The student's trajectories from noise that training never sees, against the teacher's.

    `student` is changed: it takes the weights that are measured. The teacher's trajectories of the noises of
    `evaluation.seed` are solved once and kept beside metrics.jsonl.
    """

    def __init__(self, config: Config, student: DSNO, manifest: Manifest, device: torch.device) -> None:
        self.student = student.eval().requires_grad_(False).to(device)
        count, network = config.training.heldout_samples, config.network
        shape = network.image_shape
        seed, indices = config.evaluation.seed, range(count)
        self.noise = sample_noise(seed, indices, shape).to(device)
        self.labels = (
            sample_labels(seed, indices, network.num_classes).to(device) if network.num_classes else None
        )
        self.target = None
        if config.training.heldout_every is not None:
            self.target = heldout_states(config, manifest, device)

    def load(self, weights: dict[str, Tensor]) -> None:
        self.student.load_state_dict(weights)

    def errors(self) -> list[float]:
        """Relative error of the loaded student at each time point, as `eval` measures it."""
        assert self.target is not None
        return list(relative_errors(self.student.trajectory(self.noise, self.labels), self.target))

    def picture(self, count: int = 64) -> tuple[bytes, Tensor]:
        """A grid of the loaded student's images from the first noises, as PNG, and the images (N, C, H, W)."""
        labels = None if self.labels is None else self.labels[:count]
        images = self.student.sample(self.noise[:count], labels).cpu()
        return grid_png(images, columns=max(1, round(len(images) ** 0.5))), images


def heldout_states(config: Config, manifest: Manifest, device: torch.device) -> Tensor:
    """The teacher's states for the held-out noises, (N, M, C, H, W) float32, from their file or solved now."""
    count, seed = config.training.heldout_samples, config.evaluation.seed
    key = canonical_hash({"spec": manifest.spec, "seed": seed, "samples": count})
    folder = FolderStorage(metrics_file(config).parent)
    name = f"heldout-{key}.safetensors"
    if folder.stat(name) is not None:
        return safetensors.torch.load(folder.read(name))["states"].to(device)
    console.say(f"solving {count} held-out trajectories with the teacher")
    teacher, spec = find_teacher(config).load().to(device), trajectory_spec(manifest, "the data set")
    parts = []
    for start in range(0, count, config.trajectories.batch_size):
        indices = range(start, min(start + config.trajectories.batch_size, count))
        parts.append(solve_samples(spec, teacher, seed, indices)[0].float())
    states = torch.cat(parts)
    folder.write(name, safetensors.torch.save({"states": states.cpu().contiguous()}))
    return states


class DivergenceWatch:
    """Knows what distance is normal at each time point: its running mean."""

    def __init__(self, factor: float, points: int) -> None:
        self.factor, self.means, self.seen = factor, [0.0] * points, [0] * points

    def state(self) -> dict[str, Any]:
        return {"means": self.means, "seen": self.seen}

    def load(self, state: dict[str, Any]) -> None:
        self.means, self.seen = list(state["means"]), list(state["seen"])

    def problem(self, distances: Sequence[float | None]) -> str | None:
        """What is wrong with a step's distances, by time point, None where not drawn; None where nothing is."""
        for i, distance in enumerate(distances):
            if distance is None:
                continue
            if self.factor and self.seen[i] >= SETTLED and distance > self.factor * self.means[i]:
                return (
                    f"the distance at time point {i} is {distance:.3g}, {distance / self.means[i]:.0f} times its running mean "
                    f"(training.divergence_factor {self.factor:g})"
                )
            weight = max(0.02, 1.0 / (self.seen[i] + 1))
            self.means[i] += weight * (distance - self.means[i])
            self.seen[i] += 1
        return None


def describe_batch(batches: Sequence[Batch], manifest: Manifest, ranks: Ranks) -> str:
    """Samples and shards of a step's global batch; those whose states are not finite alone, if any. Collective.

    In words that fit a line: the first `NAMED` of each.
    """
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

    def some(items: Sequence[Any]) -> str:
        more = f" and {len(items) - NAMED} more" if len(items) > NAMED else ""
        return ", ".join(map(str, items[:NAMED])) + more

    what = "states that are not finite, " if broken.any() else ""
    return (
        f"{what}samples {some(sorted(samples.tolist()))} of {some([manifest.shards[i].key for i in numbers])}"
    )


def memory_gb(device: torch.device) -> float:
    """Most memory that this rank has held: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def finite(numbers: Sequence[float | None]) -> bool:
    return all(math.isfinite(x) for x in numbers if x is not None)
