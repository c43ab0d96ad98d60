"""Comparison of the student with the teacher during training, on noise that training never sees."""

from __future__ import annotations

import safetensors.torch
import torch
from torch import Tensor

from dsno_cluster import console
from dsno_cluster.config import Config
from dsno_cluster.diffusion.accuracy import relative_errors
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.images import grid_png, shown_channels
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import FolderStorage
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.teachers import ConfiguredTeacher, states_of
from dsno_cluster.training.metrics_log import metrics_file
from dsno_cluster.trajectories.shards import Manifest, trajectory_spec
from dsno_cluster.trajectories.spec import TrajectorySpec, solve_samples, spec_of
from dsno_cluster.weight_files import NotWeights, parse_safetensors


class HeldOut:
    """Compares a student's trajectories from held-out noise with the teacher's, and draws its images, which needs no teacher.

    `student` is modified: it takes the weights that are measured. The teacher's trajectories from the noise
    of `evaluation.seed` are solved once and kept beside metrics.jsonl.
    """

    def __init__(
        self,
        config: Config,
        teacher: ConfiguredTeacher | None,
        student: DSNO,
        manifest: Manifest,
        device: torch.device,
    ) -> None:
        self.student = student.eval().requires_grad_(False).to(device)
        count, network = config.training.heldout_samples, config.network
        shape = network.state_shape
        seed, indices = config.evaluation.seed, range(count)
        self.noise = sample_noise(seed, indices, shape).to(device)
        self.labels = sample_labels(seed, indices, network.num_classes) if network.num_classes else None
        states = teacher.states if teacher is not None else states_of(config)
        self.decoder = None
        if config.training.picture_every is not None:
            self.decoder = states.decoder.load(device) if states.decoder else None
            if states.undecoded:
                console.say(
                    f"the states are latents that nothing decodes: pictures of samples show the first three of {shape[0]} "
                    "channels as colours; teacher.decoder names the folder of an AutoencoderKL"
                )
        self.target = None
        if config.training.heldout_every is not None:
            assert teacher is not None  # on rank 0; without one nothing is compared
            self.target = heldout_states(config, teacher, manifest, device)

    def load(self, weights: dict[str, Tensor]) -> None:
        self.student.load_state_dict(weights)

    def errors(self) -> tuple[float, ...]:
        """Relative error of the loaded student at each time point, as `eval` measures it."""
        assert self.target is not None
        return tuple(relative_errors(self.student.trajectory(self.noise, self.labels), self.target))

    def picture(self, count: int = 64) -> tuple[bytes, Tensor]:
        """A grid of the loaded student's images from the first noises, as PNG, and the images (N, C, H, W).

        C is 1 or 3: the first channels of states that are no images.
        """
        labels = None if self.labels is None else self.labels[:count]
        states = self.student.sample(self.noise[:count], labels)
        parts = [states] if self.decoder is None else self.decoder.parts(states)
        images = shown_channels(torch.cat([part.cpu() for part in parts]))
        return grid_png(images, columns=max(1, round(len(images) ** 0.5))), images


def _solved(config: Config, teacher: ConfiguredTeacher, manifest: Manifest) -> TrajectorySpec:
    """How held-out trajectories are solved: as the data set's or, if that was imported, as the config says."""
    spec = trajectory_spec(manifest, "the data set")
    return spec if isinstance(spec, TrajectorySpec) else spec_of(config, teacher)


def heldout_states(
    config: Config, teacher: ConfiguredTeacher, manifest: Manifest, device: torch.device
) -> Tensor:
    """The teacher's states for the held-out noises, (N, M, C, H, W) float32, from their file or solved now."""
    count, seed = config.training.heldout_samples, config.evaluation.seed
    spec = _solved(config, teacher, manifest)
    key = canonical_hash({"spec": spec.model_dump(mode="json"), "seed": seed, "samples": count})
    folder = FolderStorage(metrics_file(config).parent)
    name = f"heldout-{key}.safetensors"
    if folder.stat(name) is not None:
        try:
            return parse_safetensors(folder.read(name), name)["states"].to(device)
        except (NotWeights, KeyError) as error:
            console.say(f"note: {error}; it is made again")
    console.say(f"solving {count} held-out trajectories with the teacher")
    # too few samples for the minutes of compiling
    network = teacher.load(compile=False).to(device)
    parts = []
    for start in range(0, count, config.trajectories.batch_size):
        indices = range(start, min(start + config.trajectories.batch_size, count))
        parts.append(solve_samples(spec, network, seed, indices)[0].float())
    states = torch.cat(parts)
    folder.write(name, safetensors.torch.save({"states": states.cpu().contiguous()}))
    return states.to(device)
