"""The distance of held-out images during training, against numpy on the same images, in the features of the shipped digits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from tiny import TINY
from torch import Tensor
from torch_fidelity.utils import create_feature_extractor

from dsno_cluster.config import Config, load_config
from dsno_cluster.data import load_data
from dsno_cluster.device import allowing_tf32
from dsno_cluster.diffusion.noise import sample_noise
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.features.classifiers import DigitsFeatures
from dsno_cluster.images import to_uint8
from dsno_cluster.model_folder import package_path
from dsno_cluster.teachers.decoders import open_decoder
from dsno_cluster.training.heldout_distance import HeldOutDistance

CPU = torch.device("cpu")
WEIGHTS = Path(package_path("package:digits-features")) / "weights.safetensors"
REAL = to_uint8(load_data("digits")[1].images)
SAMPLES = 120


def config_of(*words: str) -> Config:
    return load_config("configs/digits.yaml", [*TINY, *words])


def opened(*words: str, samples: int = SAMPLES, **other: Any) -> HeldOutDistance:
    return HeldOutDistance(config_of(*words), REAL.split(100), other.get("decoder"), CPU, samples)


class Student:
    """Images that depend on noise and class, beyond [-1, 1] too; what it was asked for is kept."""

    def __init__(self) -> None:
        self.noises: list[Tensor] = []
        self.labels: list[Tensor] = []

    def __call__(self, noise_NCHW: Tensor, labels_N: Tensor | None) -> Tensor:
        assert labels_N is not None
        self.noises.append(noise_NCHW)
        self.labels.append(labels_N)
        return self.images(noise_NCHW, labels_N)

    @staticmethod
    def images(noise_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        return 0.7 * noise_NCHW + 0.1 * labels_N[:, None, None, None] - 0.9


def numpys_distance(images: np.ndarray, real: np.ndarray) -> float:
    """Of images in [-1, 1] and real ones of 8 bits, all at once, in float64."""
    network = create_feature_extractor(
        DigitsFeatures.NAME, ["64"], cuda=False, feature_extractor_weights_path=str(WEIGHTS), verbose=False
    )
    eight_bits = np.clip(np.rint(127.5 * images + 127.5), 0, 255).astype(np.uint8)
    with torch.no_grad():
        ours, theirs = (
            network(torch.from_numpy(x))[0].double().numpy() for x in (eight_bits, np.asarray(real))
        )
    a, b = np.cov(ours, rowvar=False), np.cov(theirs, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    return float(((ours.mean(0) - theirs.mean(0)) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * root)


@pytest.mark.parametrize("batch_size", [120, 50, 7])
def test_the_distance_is_numpys(batch_size: int) -> None:
    student = Student()
    found = opened(f"evaluation.batch_size={batch_size}").of(student)
    images = student.images(torch.cat(student.noises), torch.cat(student.labels)).numpy()
    assert images.shape == (SAMPLES, 1, 8, 8) and images.min() < -1.01 and images.max() > 1.01
    assert found == pytest.approx(numpys_distance(images, REAL.numpy()), rel=1e-8)
    assert found > 1


def test_real_images_from_themselves() -> None:
    real = load_data("digits")[1].images
    served = iter(real.split(50))
    found = opened(samples=len(real)).of(lambda noise, labels: next(served))
    assert found == pytest.approx(0.0, abs=1e-6)


def test_noises_that_neither_training_nor_evaluation_has() -> None:
    student, config = Student(), config_of()
    opened().of(student)
    noises, labels = torch.cat(student.noises), torch.cat(student.labels)
    assert len({noise.numpy().tobytes() for noise in noises}) == SAMPLES
    assert set(labels.tolist()) == set(range(10))
    for seed in (config.seed, config.evaluation.seed):
        taken = {noise.numpy().tobytes() for noise in sample_noise(seed, range(500), (1, 8, 8))}
        assert not taken & {noise.numpy().tobytes() for noise in noises}
    again = Student()
    opened("evaluation.num_samples=300", "evaluation.batch_size=32").of(again)
    assert torch.equal(torch.cat(again.noises), noises) and torch.equal(torch.cat(again.labels), labels)


def test_it_leaves_random_numbers_and_precision_as_they_are() -> None:
    seen = []

    def sample(noise: Tensor, labels: Tensor | None) -> Tensor:
        seen.append((torch.backends.cudnn.allow_tf32, torch.is_grad_enabled()))
        return noise

    torch.manual_seed(3)
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    with allowing_tf32():  # as in a training of that precision
        distance = opened()
        first = distance.of(sample)
        assert torch.backends.cudnn.allow_tf32
    assert torch.equal(torch.get_rng_state(), before) and np.array_equal(np.random.get_state()[1], numpys)
    assert distance.of(sample) == first and opened().of(sample) == first
    assert set(seen) == {(False, False)}


def test_latents_are_decoded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    latent = [
        "data.name=null",
        "evaluation.reference=none.npz",
        "network.state_channels=4",
        "student.warm_start=false",
    ]
    decoder = open_decoder(str(tmp_path / "vae"), None, 4, "teacher.decoder").load()
    latents: list[Tensor] = []

    def sample(noise: Tensor, labels: Tensor | None) -> Tensor:
        latents.append(0.5 * noise)
        return latents[-1]

    found = opened(*latent, "evaluation.batch_size=25", samples=70, decoder=decoder).of(sample)
    assert [len(part) for part in latents] == [25, 25, 20] and latents[0].shape[1:] == (4, 8, 8)
    with torch.no_grad():
        images = vae.eval().decode(torch.cat(latents) / vae.config.scaling_factor).sample
    assert found == pytest.approx(numpys_distance(images.numpy(), REAL.numpy()), rel=1e-5)


REFUSED: dict[str, tuple[type[Exception], list[str], str]] = {
    "no weights": (UserError, ["weights_path=none.pt"], "evaluation.weights_path: .*none.pt is missing"),
    "other weights": (
        WorkError,
        ["weights_sha256=00000000"],
        "evaluation.weights_path: .* has sha256 .*, not 0",
    ),
    "another's weights": (
        UserError,
        ["weights_path=package:mnist-features"],
        "not hold the weights of digits-fe",
    ),
    "no extractor": (UserError, ["feature_extractor=digit", "metrics=[fid]"], "'digit' is not one of: "),
    "larger images": (
        UserError,
        ["feature_extractor=mnist-features", "weights_path=null"],
        "mnist-features reads images of 1x32x32, the samples are 1x8x8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_eval_refuses_is_refused_alike(case: str) -> None:
    kind, words, says = REFUSED[case]
    with pytest.raises(kind, match=says):
        opened(*(f"evaluation.{word}" for word in words))


@pytest.mark.parametrize(
    ("real", "says"),
    [
        (torch.zeros(5, 1, 32, 32, dtype=torch.uint8), "the held-out real images are 1x32x32"),
        (REAL[:1], "needs 2 or more, there is 1"),
    ],
)
def test_real_images_that_do_not_do(real: Tensor, says: str) -> None:
    with pytest.raises(UserError, match=says):
        HeldOutDistance(config_of(), [real], None, CPU, SAMPLES)
