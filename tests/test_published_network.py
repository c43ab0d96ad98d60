"""The U-Net and its temporal convolutions against the published implementation's outputs."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch
from conftest import DATA
from published import load_published_student

from dsno_cluster.diffusion.schedule import logsnr, loss_weights
from dsno_cluster.models.temporal import TemporalConv


@pytest.mark.parametrize("name", ["cifar_like", "imagenet_like"])
def test_outputs_of_the_published_network(name: str) -> None:
    unet = load_published_student(DATA / "published" / name)
    expected = safetensors.torch.load_file(DATA / "published" / name / "expected.safetensors")
    labels = expected["labels"] if unet.num_classes else None
    with torch.no_grad():
        states = unet(expected["noise"], expected["logsnr"][None], labels)
    error = (states - expected["trajectory"]).norm() / expected["trajectory"].norm()
    assert error < 2e-5
    assert torch.allclose(logsnr(expected["times"]).float(), expected["logsnr"], atol=1e-5)
    weights = loss_weights("snr", expected["times"].tolist()).float()
    assert torch.allclose(weights, expected["loss_weight"], rtol=1e-4)


@pytest.mark.parametrize(
    ("points", "modes"), [(1, 1), (2, 2), (3, 2), (4, 1), (4, 2), (4, 3), (5, 3), (8, 5)]
)
def test_temporal_convolution_is_the_fourier_one(points: int, modes: int) -> None:
    """Against the definition with complex numbers: u + LeakyReLU(irfft(R . rfft(u)))."""
    torch.manual_seed(0)
    conv = TemporalConv(6, modes).double()
    torch.nn.init.normal_(conv.weight)
    u = torch.randn(2, points, 6, 3, 3, dtype=torch.float64)
    spectrum = torch.fft.rfft(u, dim=1)[:, :modes]
    mixed = torch.einsum(
        "nkihw,iok->nkohw", spectrum, torch.view_as_complex(conv.weight.detach().contiguous())
    )
    expected = u + torch.nn.functional.leaky_relu(torch.fft.irfft(mixed, n=points, dim=1), 0.01)
    found = conv(u.flatten(0, 1), points).reshape(u.shape)
    assert torch.allclose(found, expected, atol=1e-12)
