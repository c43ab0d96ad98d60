"""The losses of distribution matching: pure functions of samples, noise levels, denoisers' outputs and logits.

x is a sample of the student, x_t = alpha x + sigma eps the same with noise, D_real(x_t) the teacher's clean image and
D_fake(x_t) that of the fake score network, which is trained on samples of the student. All are (N, C, H, W).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SMALLEST = 1e-5  # a sample's matching is divided by its mean distance, or by this if that is smaller


def with_noise(x_NCHW: Tensor, noise_NCHW: Tensor, alpha_N: Tensor, sigma_N: Tensor) -> Tensor:
    """x_t = alpha x + sigma eps, in the dtype of x."""
    alpha, sigma = (_of_samples(scale, x_NCHW) for scale in (alpha_N, sigma_N))
    return alpha * x_NCHW + sigma * noise_NCHW


def denoising_loss(denoised_NCHW: Tensor, x_NCHW: Tensor, sigma_N: Tensor) -> Tensor:
    """The loss that trains the fake score network on samples: mean of |D_fake(x_t) - x|^2 / sigma^2, a scalar.

    This is the weight SNR + 1 on a variance-preserving schedule, so the loss of a prediction of v (Salimans & Ho 2022,
    section 4), for the denoising loss of DMD (Yin et al. 2024a, equation 6).
    """
    return ((denoised_NCHW - x_NCHW) / _of_samples(sigma_N, x_NCHW)).square().mean()


def matching_direction(x_NCHW: Tensor, real_NCHW: Tensor, fake_NCHW: Tensor) -> Tensor:
    """The direction in which a sample's density under the student exceeds that under the teacher the most, (N, C, H, W).

    (D_fake - D_real) / mean|x - D_real|: the gradient of the divergence of the two distributions, with the weight of DMD
    (Yin et al. 2024a, equations 7 and 8). On a variance-preserving schedule these have a further factor alpha_t, which the
    published code lacks, and so does this. `sample_loss` of it is minimised. It is a constant: no gradient flows through it.
    """
    direction: Tensor = (fake_NCHW - real_NCHW) / _mean_distance(x_NCHW, real_NCHW)
    return direction.detach()


def matching_distance(x_NCHW: Tensor, real_NCHW: Tensor, fake_NCHW: Tensor) -> Tensor:
    """How far the two denoisers are apart, a scalar: the mean over samples of mean|D_fake - D_real| / mean|x - D_real|."""
    distance: Tensor = ((fake_NCHW - real_NCHW).abs() / _mean_distance(x_NCHW, real_NCHW)).mean()
    return distance.detach()


def score_identity_loss(x_NCHW: Tensor, real_NCHW: Tensor, fake_NCHW: Tensor, alpha: float) -> Tensor:
    """The loss of score identity distillation, a scalar (Zhou et al. 2024, equation 23).

    ((1 - alpha) |D_real - D_fake|^2 + (D_real - D_fake) (D_fake - x)) / mean|x - D_real|, averaged over pixels and samples.
    Its gradient also flows through both denoisers, to x.
    """
    apart = real_NCHW - fake_NCHW
    loss = (1.0 - alpha) * apart.square() + apart * (fake_NCHW - x_NCHW)
    return (loss / _mean_distance(x_NCHW, real_NCHW)).mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The loss of the discriminator, a scalar: mean of softplus(fake) + softplus(-real) (Goodfellow et al. 2014, equation 1).

    The logits are those of noisy real images and noisy samples (Yin et al. 2024b, equation 4).
    """
    return F.softplus(fake_logits.float()).mean() + F.softplus(-real_logits.float()).mean()


def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """The student's part in the game, a scalar: mean of softplus(-fake), which does not saturate (Goodfellow et al. 2014)."""
    return F.softplus(-fake_logits.float()).mean()


def sample_loss(x_NCHW: Tensor, direction_NCHW: Tensor) -> Tensor:
    """A scalar whose gradient with respect to x is the direction divided by the number of elements."""
    return (x_NCHW * direction_NCHW).mean()


def _mean_distance(x_NCHW: Tensor, real_NCHW: Tensor) -> Tensor:
    """mean|x - D_real| of each sample, (N, 1, 1, 1), a constant."""
    return (x_NCHW - real_NCHW).detach().abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=SMALLEST)


def _of_samples(scale_N: Tensor, like_NCHW: Tensor) -> Tensor:
    return scale_N.to(like_NCHW.device, torch.float32)[:, None, None, None]
