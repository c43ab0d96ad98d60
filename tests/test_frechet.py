"""The Frechet loss, against values computed by hand, torch-fidelity's distance and numerical gradients."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from inception import save_random_inception
from torch import Tensor

from dsno_cluster.features import INCEPTION
from dsno_cluster.features.extractors import Extractor, find_weights, layer_of, load_extractor
from dsno_cluster.features.statistics import Gaussian, frechet_distance
from dsno_cluster.features.transport import gaussian_of, mixed, root_of, transport
from dsno_cluster.files import file_sha256
from dsno_cluster.teachers import decoders
from dsno_cluster.teachers.decoders import open_decoder
from dsno_cluster.training.objectives.frechet import FrechetTerm, frechet_loss, gaussian_of_images

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def diagonal(mean: list[float], variances: list[float]) -> Gaussian[Tensor]:
    covariance = torch.diag(torch.tensor(variances, dtype=torch.float64))
    return Gaussian(torch.tensor(mean, dtype=torch.float64), covariance)


def test_transport_of_independent_features_scales_each() -> None:
    """Deviations 2 and 1 become 1 and 3: factors 1/2 and 3, and a cost of 1 and 4 beside that of the means, 9 + 16."""
    start, end = diagonal([0.0, 1.0], [4.0, 1.0]), diagonal([3.0, -3.0], [1.0, 9.0])
    carry = transport(start, end, root_of(end.covariance))
    assert torch.allclose(carry.map, torch.diag(torch.tensor([0.5, 3.0], dtype=torch.float64)))
    assert math.isclose(float(carry.distance), 25.0 + 1.0 + 4.0)
    assert torch.allclose(carry(torch.tensor([[2.0, 0.0]])), torch.tensor([[4.0, -6.0]], dtype=torch.float64))


def test_what_has_no_variance_is_carried_to_the_mean() -> None:
    start, end = diagonal([0.0, 0.0, 0.0], [1.0, 0.0, 4.0]), diagonal([1.0, 2.0, 3.0], [4.0, 1.0, 0.0])
    carry = transport(start, end, root_of(end.covariance))
    assert torch.allclose(carry(torch.tensor([[1.0, 5.0, 7.0]])), torch.tensor([[3.0, 2.0, 3.0]]).double())


def test_the_distance_is_torch_fidelitys() -> None:
    """Also with fewer samples than features."""
    for count in (400, 12):
        a, b = normal(count, 20, seed=1) @ normal(20, 20, seed=2), 1.0 + 2.0 * normal(300, 20, seed=3)
        first, second = gaussian_of(a), gaussian_of(b)
        ours = transport(first, second, root_of(second.covariance)).distance
        theirs = frechet_distance(*(m.numpy() for g in (first, second) for m in (g.mean, g.covariance)))
        assert float(ours) == pytest.approx(theirs, rel=1e-6)


def test_the_transport_gives_the_other_gaussian() -> None:
    features, end = normal(500, 6) @ normal(6, 6, seed=5), gaussian_of(normal(400, 6, seed=4))
    carried = gaussian_of(transport(gaussian_of(features), end, root_of(end.covariance))(features))
    assert torch.allclose(carried.mean, end.mean) and torch.allclose(carried.covariance, end.covariance)


def test_the_gradient_is_that_of_the_frechet_distance() -> None:
    """By differences of torch-fidelity's distance of a batch, of which the moments are those of the batch itself."""
    features, end = normal(8, 3) @ normal(3, 3, seed=5), gaussian_of(normal(50, 3, seed=4))
    variable = features.clone().requires_grad_()
    carry = transport(gaussian_of(features), end, root_of(end.covariance))
    (gradient,) = torch.autograd.grad(frechet_loss(variable, carry(features)), variable)

    def distance(moved: Tensor) -> float:
        of = gaussian_of(moved)
        return frechet_distance(*(m.numpy() for m in (of.mean, of.covariance, end.mean, end.covariance)))

    for sample, number in ((0, 0), (3, 1), (7, 2)):
        step = torch.zeros_like(features)
        step[sample, number] = 1e-5
        by_difference = (distance(features + step) - distance(features - step)) / 2e-5
        assert float(gradient[sample, number]) == pytest.approx(by_difference, rel=1e-4, abs=1e-6)


def test_a_mixture_has_the_moments_of_all_samples() -> None:
    features = normal(30, 4) + 100.0
    found, wanted = (
        mixed(gaussian_of(features[:10]), gaussian_of(features[10:]), 2 / 3),
        gaussian_of(features),
    )
    assert torch.allclose(found.mean, wanted.mean) and torch.allclose(found.covariance, wanted.covariance)


def digits_extractor() -> Extractor:
    weights = find_weights("digits-features", None, None)
    return load_extractor(weights, [layer_of("digits-features", "fid")], CPU)


def test_moments_follow_the_latest_samples() -> None:
    """They are those of all samples until there are `population`; then a sample's share falls by its batch's."""
    extractor = digits_extractor()
    pictures = (255 * normal(96, 1, 8, 8).sigmoid()).to(torch.uint8)
    real = gaussian_of_images(extractor, pictures.split(40))
    assert torch.allclose(real.mean, gaussian_of(extractor(pictures)["64"]).mean)
    term = FrechetTerm(extractor, None, real, population=24, world_size=1, device=CPU)
    states = [torch.tanh(normal(8, 1, 8, 8, seed=seed)).float() for seed in range(4)]
    drawn = iter(states)
    term.begin(lambda: next(drawn))
    term.loss(states[3], 0)
    of = [gaussian_of(extractor.of_float(part)["64"]) for part in states]
    first_three = gaussian_of(extractor.of_float(torch.cat(states[:3]))["64"])
    wanted = mixed(first_three, of[3], 8 / 24)
    assert torch.allclose(term.mean, wanted.mean) and torch.allclose(term.covariance, wanted.covariance)


def inception(folder: Path) -> Extractor:
    file = save_random_inception(folder / "inception.pth")
    return load_extractor(find_weights(INCEPTION, str(file), file_sha256(file)), ["64"], CPU)


@pytest.mark.parametrize(("of", "size", "channels"), [("digits", 8, 1), ("inception", 32, 3)])
def test_features_of_floats_are_those_of_8_bit_images(
    of: str, size: int, channels: int, tmp_path: Path
) -> None:
    """With a gradient."""
    extractor = inception(tmp_path) if of == "inception" else digits_extractor()
    pictures = (255 * normal(3, channels, size, size).sigmoid()).to(torch.uint8)
    images = (pictures.float() / 127.5 - 1.0).requires_grad_()
    features = extractor.of_float(images)["64"]
    assert torch.allclose(features, extractor(pictures)["64"], rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(features.square().sum(), images)
    assert gradient.isfinite().all() and float(gradient.abs().max()) > 0.0


def test_elsewhere_torch_fidelity_still_takes_only_8_bit_images(tmp_path: Path) -> None:
    extractor = inception(tmp_path)
    extractor.of_float(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="uint8"):
        extractor.network(torch.zeros(1, 3, 32, 32))


def test_many_samples_have_the_gradient_of_each() -> None:
    """Those of parts are computed again in the backward pass."""
    extractor = digits_extractor()
    real = diagonal([0.0] * 64, [1.0] * 64)
    images = torch.tanh(normal(130, 1, 8, 8)).float().requires_grad_()
    loss, _ = FrechetTerm(extractor, None, real, population=10, world_size=1, device=CPU).loss(images, 0)
    (gradient,) = torch.autograd.grad(loss, images)
    features = extractor.of_float(images)["64"]
    carry = transport(gaussian_of(features.detach()), real, root_of(real.covariance))
    (wanted,) = torch.autograd.grad(frechet_loss(features, carry(features.detach())), images)
    assert torch.allclose(gradient, wanted, atol=1e-6)


def test_the_loss_of_latents_goes_through_the_decoder(tmp_path: Path) -> None:
    """In parts of one, with the gradient of all at once; the decoder itself is not trained."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    decoder, extractor = (
        open_decoder(str(tmp_path / "vae"), None, 4, "teacher.decoder").load(),
        digits_extractor(),
    )
    extractor.network.requires_grad_(False)
    real = diagonal([0.0] * 64, [1.0] * 64)
    latents = normal(3, 4, 8, 8).float().requires_grad_()
    gradients = []
    for most in (decoders.MOST_ELEMENTS, 1):
        with mock.patch.object(decoders, "MOST_ELEMENTS", most):
            loss, _ = FrechetTerm(extractor, decoder, real, population=3, world_size=1, device=CPU).loss(
                latents, 0
            )
            gradients += torch.autograd.grad(loss, latents)
    features = extractor.of_float(vae.eval().decode(latents / vae.config.scaling_factor).sample)["64"]
    carry = transport(gaussian_of(features.detach()), real, root_of(real.covariance))
    (wanted,) = torch.autograd.grad(frechet_loss(features, carry(features.detach())), latents)
    assert float(wanted.abs().max()) > 0.0
    assert all(torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-6) for gradient in gradients)


def _moments_of_a_rank(rank: int, folder: str) -> None:
    """The moments that a rank of two has after each of them saw its half of the same samples."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    real = diagonal([0.0] * 64, [1.0] * 64)
    term = FrechetTerm(digits_extractor(), None, real, population=12, world_size=2, device=CPU)
    halves = iter(torch.tanh(normal(12, 1, 8, 8)).float()[rank::2].split(3))
    term.begin(lambda: next(halves))
    torch.save(term.state, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_ranks_have_the_moments_of_the_samples_of_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_moments_of_a_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    wanted = gaussian_of(digits_extractor().of_float(torch.tanh(normal(12, 1, 8, 8)).float())["64"])
    assert float(first["seen"]) == 12
    for found in (first, second):  # features of other batches differ by float32's rounding
        assert torch.allclose(found["mean"], wanted.mean, atol=1e-6)
        assert torch.allclose(found["covariance"], wanted.covariance, atol=1e-6)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_not_finite_is_left_to_the_loop() -> None:
    """The step before has the cause, and is judged later."""
    term = FrechetTerm(
        digits_extractor(), None, diagonal([0.0] * 64, [1.0] * 64), population=10, world_size=1, device=CPU
    )
    loss, distance = term.loss(torch.full((4, 1, 8, 8), float("nan")), 0)
    assert not loss.isfinite() and not distance.isfinite()


def test_samples_get_the_moments_of_real_images() -> None:
    """Descent by the loss alone, of images themselves: the distance falls to a tenth."""
    extractor = digits_extractor()
    random = np.random.default_rng(0)
    pictures = torch.from_numpy(random.integers(0, 255, (200, 1, 8, 8), dtype=np.uint8))
    term = FrechetTerm(
        extractor,
        None,
        gaussian_of_images(extractor, [pictures]),
        population=100,
        world_size=1,
        device=CPU,
    )
    images = (0.5 * torch.tanh(normal(100, 1, 8, 8, seed=9)).float()).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.02)
    distances = []
    term.begin(lambda: images.detach())
    for step in range(60):
        loss, distance = term.loss(images, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        distances.append(float(distance))
    assert distances[-1] < 0.1 * distances[0]
