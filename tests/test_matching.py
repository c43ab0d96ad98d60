"""The losses of distribution matching, against values computed by hand and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsno_cluster.diffusion.schedule import alpha_sigma
from dsno_cluster.training.objectives.matching import (
    adversarial_loss,
    denoising_loss,
    discriminator_loss,
    matching_direction,
    matching_distance,
    sample_loss,
    score_identity_loss,
    with_noise,
)


def images(*samples: list[float]) -> Tensor:
    """Samples of one row of pixels, (N, 1, 1, W) float64."""
    return torch.tensor(samples, dtype=torch.float64)[:, None, None]


# two samples of two pixels: mean|x - real| is 2 and 0.5
X = images([1.0, -1.0], [0.0, 0.5])
REAL = images([0.0, 2.0], [0.5, 0.0])
FAKE = images([2.0, 2.0], [1.5, -1.0])


def test_noise_is_added_at_each_samples_level() -> None:
    noisy = with_noise(X, torch.ones_like(X), torch.tensor([0.5, 1.0]), torch.tensor([2.0, 0.0]))
    assert torch.equal(noisy, images([2.5, 1.5], [0.0, 0.5]))


def test_denoising_loss_is_that_of_a_prediction_of_v() -> None:
    """(D - x)^2 / sigma^2: of 1, 9, 2.25 and 2.25 over 4, 4, 1 and 1; and |v - v'|^2 for v = (alpha x_t - x) / sigma."""
    loss = denoising_loss(FAKE, X, torch.tensor([2.0, 1.0]))
    assert float(loss) == pytest.approx((0.25 + 2.25 + 2.25 + 2.25) / 4)
    alpha, sigma = (
        s[:, None, None, None] for s in alpha_sigma(torch.tensor([0.3, 0.8], dtype=torch.float64))
    )
    noisy = alpha * X + sigma * torch.full_like(X, 0.7)
    true, predicted = ((alpha * noisy - x0) / sigma for x0 in (X, FAKE))
    found = denoising_loss(FAKE, X, sigma[:, 0, 0, 0])
    assert float(found) == pytest.approx(float((true - predicted).square().mean()), rel=1e-6)


def test_matching_direction_and_distance() -> None:
    """(fake - real) / mean|x - real|: (2, 0) / 2 and (1, -1) / 0.5."""
    assert torch.equal(matching_direction(X, REAL, FAKE), images([1.0, 0.0], [2.0, -2.0]))
    assert float(matching_distance(X, REAL, FAKE)) == pytest.approx((1 + 0 + 2 + 2) / 4)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sample_loss(x, matching_direction(x, REAL, FAKE)), x)
    assert torch.equal(gradient, images([1.0, 0.0], [2.0, -2.0]) / 4)


def test_matching_leads_from_one_gaussian_to_another() -> None:
    """With the denoisers of two Gaussians, which are closed forms, x moves towards the teacher's mean and nowhere at it."""
    alpha, sigma = 0.8, 0.6

    def denoiser(mean: float, noisy: Tensor) -> Tensor:  # of unit variance: mean + alpha (x_t - alpha mean)
        return mean + alpha * (noisy - alpha * mean)

    x = torch.randn(1000, 1, 2, 2, generator=torch.Generator().manual_seed(0)) + 3.0
    noisy = alpha * x + sigma * torch.randn_like(x)
    down = matching_direction(x, denoiser(1.0, noisy), denoiser(3.0, noisy))
    assert bool((down > 0).all())  # x falls
    assert matching_direction(x, denoiser(3.0, noisy), denoiser(3.0, noisy)).abs().max() == 0.0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_score_identity_loss(alpha: float) -> None:
    """apart = real - fake = (-2, 0), (-1, 1); fake - x = (1, 3), (1.5, -1.5); divided by 2 and 0.5."""
    by_hand = (
        ((1 - alpha) * 4 + -2 * 1) / 2 + 0.0 + ((1 - alpha) * 1 - 1.5) / 0.5 + ((1 - alpha) * 1 - 1.5) / 0.5
    ) / 4
    assert float(score_identity_loss(X, REAL, FAKE, alpha)) == pytest.approx(by_hand)


def test_score_identity_loss_has_the_gradient_of_the_fisher_divergence() -> None:
    """Of Gaussians with alpha = 0.5, the expected loss is half of E|D_real - D_fake|^2, for an optimal fake score network.

    Zhou et al. 2024, theorem 3: E[(D_real - D_fake) (D_fake - x)] = 0 for every function D_real of x_t.
    """
    a, s = 0.8, 0.6
    draw = torch.Generator().manual_seed(1)
    x = 2.0 + torch.randn(400_000, 1, 1, 1, generator=draw, dtype=torch.float64)
    noisy = a * x + s * torch.randn(x.shape, generator=draw, dtype=torch.float64)
    fake = 2.0 + a * (noisy - a * 2.0)
    real = 0.5 + 1.3 * (noisy - a * 0.5)
    product = float(((real - fake) * (fake - x)).mean())
    assert abs(product) < 0.01 < float((real - fake).square().mean())


def test_the_game() -> None:
    """softplus(0) = ln 2, and softplus(z) - softplus(-z) = z."""
    zero = torch.zeros(3, 5)
    assert float(discriminator_loss(zero, zero)) == pytest.approx(2 * math.log(2))
    assert float(adversarial_loss(zero)) == pytest.approx(math.log(2))
    two = torch.full((3, 5), 2.0)
    assert float(discriminator_loss(two, -two)) == pytest.approx(2 * math.log1p(math.exp(-2)))
    assert float(discriminator_loss(-two, two)) == pytest.approx(2 * math.log1p(math.exp(2)))
    assert float(adversarial_loss(-two) - adversarial_loss(two)) == pytest.approx(2.0)
