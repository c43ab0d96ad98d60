"""Comparison of the student with the teacher during training, on noise that training never sees."""

from __future__ import annotations

from dataclasses import dataclass

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
from dsno_cluster.training.beginning import Beginning
from dsno_cluster.training.heldout_distance import HeldOutDistance
from dsno_cluster.training.judging import images_to_judge_by
from dsno_cluster.training.kept_tensors import kept_tensors
from dsno_cluster.training.metrics_log import metrics_file
from dsno_cluster.training.real_images import RealImages
from dsno_cluster.trajectories.shards import Manifest, trajectory_spec
from dsno_cluster.trajectories.spec import TrajectorySpec, solve_samples, spec_of


@dataclass(frozen=True)
class HeldOutFigures:
    """What was measured of a student on held-out noise: relative errors by time, and the distance from other images.

    Errors are not measured of a student that is finished without trajectories at hand. `judged_by` is the figure by which the
    best checkpoint is chosen, the smaller the better; None: by none.
    """

    errors: tuple[float, ...] | None = None
    distance: float | None = None
    judged_by: float | None = None

    @property
    def anything(self) -> bool:
        return self.errors is not None or self.distance is not None


class HeldOut:
    """Compares a student with the teacher and with other images on held-out noise, and draws its images.

    Trajectories need the teacher; the distance is one of distribution matching (`images_to_judge_by`). `student` is modified:
    it takes the weights that are measured. The teacher's trajectories from the noise of `evaluation.seed` are solved once and
    kept beside metrics.jsonl. `basis` is a hash of what the figure is measured of by which checkpoints are judged; None if they
    are not.
    """

    def __init__(
        self,
        config: Config,
        teacher: ConfiguredTeacher | None,
        student: DSNO,
        beginning: Beginning,
        real: RealImages | None,
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
        settings, measured = config.training, config.training.heldout_every is not None
        self.matched = settings.objective == "distribution"
        if settings.picture_every is not None or (measured and self.matched):
            self.decoder = states.decoder.load(device) if states.decoder else None
        if settings.picture_every is not None and states.undecoded:
            console.say(
                f"the states are latents that nothing decodes: pictures of samples show the first three of {shape[0]} "
                "channels as colours; teacher.decoder names the folder of an AutoencoderKL"
            )
        self.target = self.distance = self.basis = None
        if measured and beginning.manifest is not None:
            assert teacher is not None  # on rank 0; without one nothing is compared
            self.target = heldout_states(config, teacher, beginning.manifest, device)
            if not self.matched:
                self.basis = _key(config, _solved(config, teacher, beginning.manifest))
        if measured and self.matched:
            folder, samples = beginning.inputs.trajectories, settings.distribution.heldout_samples
            images = images_to_judge_by(config, real, states, self.decoder, folder, beginning.manifest)
            if images is not None:
                self.distance = HeldOutDistance(config, images.batches, self.decoder, device, samples)
                self.basis = canonical_hash(
                    {"distance": self.distance.settings, "from": list(images.identity)}
                )

    def load(self, weights: dict[str, Tensor]) -> None:
        self.student.load_state_dict(weights)

    def figures(self) -> HeldOutFigures:
        """Those of the loaded student, as `eval` measures them."""
        errors = distance = None
        if self.target is not None:
            errors = tuple(relative_errors(self.student.trajectory(self.noise, self.labels), self.target))
        if self.distance is not None:
            distance = self.distance.of(self.student.sample)
        if self.matched:
            return HeldOutFigures(errors, distance, distance)
        assert errors is not None  # whoever learns trajectories has some
        return HeldOutFigures(errors, distance, errors[-1])

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


def _key(config: Config, spec: TrajectorySpec) -> str:
    """A hash of the held-out trajectories."""
    seed, count = config.evaluation.seed, config.training.heldout_samples
    return canonical_hash({"spec": spec.model_dump(mode="json"), "seed": seed, "samples": count})


def heldout_states(
    config: Config, teacher: ConfiguredTeacher, manifest: Manifest, device: torch.device
) -> Tensor:
    """The teacher's states for the held-out noises, (N, M, C, H, W) float32, from their file or solved now."""
    count, seed = config.training.heldout_samples, config.evaluation.seed
    spec = _solved(config, teacher, manifest)
    folder = FolderStorage(metrics_file(config).parent)
    name = f"heldout-{_key(config, spec)}.safetensors"

    def solve() -> dict[str, Tensor]:
        console.say(f"solving {count} held-out trajectories with the teacher")
        # too few samples for the minutes of compiling
        network = teacher.load(compile=False).to(device)
        parts = []
        for start in range(0, count, config.trajectories.batch_size):
            indices = range(start, min(start + config.trajectories.batch_size, count))
            parts.append(solve_samples(spec, network, seed, indices)[0].float())
        return {"states": torch.cat(parts)}

    return kept_tensors(folder, name, ["states"], solve)["states"].to(device)
