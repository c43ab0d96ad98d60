"""Randomness belongs to the sample."""

from __future__ import annotations

import torch

from dsno_cluster.diffusion.noise import noise_checksum, sample_labels, sample_noise


def test_noise_does_not_depend_on_the_batch() -> None:
    shape = (3, 8, 8)
    together = sample_noise(7, range(100), shape)
    assert torch.equal(together[40:60], sample_noise(7, range(40, 60), shape))
    assert torch.equal(together[[99, 3]], sample_noise(7, [99, 3], shape))
    labels = sample_labels(7, range(100), 10)
    assert torch.equal(labels[40:60], sample_labels(7, range(40, 60), 10))


def test_noise_is_standard_normal_and_of_its_seed() -> None:
    noise = sample_noise(0, range(2000), (1, 8, 8))
    assert abs(float(noise.mean())) < 0.01 and abs(float(noise.std()) - 1) < 0.01
    assert not torch.equal(noise[:5], sample_noise(1, range(5), (1, 8, 8)))
    flat = noise.flatten(1)
    correlation = float((flat[:-1] * flat[1:]).mean())
    assert abs(correlation) < 0.01  # neighbouring samples are independent
    counts = torch.bincount(sample_labels(0, range(5000), 10), minlength=10)
    assert counts.min() > 400 and counts.max() < 600


def test_noise_is_what_it_was() -> None:
    """A data set's starting noise is not stored: another generator would silently mix trajectories."""
    assert noise_checksum(0, (1, 8, 8)) == "f0fdad885ade2a44855981a1370bb94318e0c9af00a9c833cdd42746a4b7708d"
