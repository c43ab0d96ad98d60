"""Published DSNO checkpoints, imported, against the published implementation's outputs.

The four folders of `data/published` that hold a student were written by that implementation, with random weights:
single head and none of classes; several heads and classes; five points, three modes; one point.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from tiny import DATA, answer

from dsno_cluster import load_student
from dsno_cluster.diffusion.schedule import logsnr, loss_weights
from dsno_cluster.errors import UserError
from dsno_cluster.networks.temporal import TemporalConv, fourier_basis
from dsno_cluster.teachers.importing import import_weights

PUBLISHED = DATA / "published"
CHECKPOINT = "solver-model_1000.pt"


def imported(name: str, out: Path) -> str:
    folder = PUBLISHED / name
    assert import_weights(str(folder / CHECKPOINT), str(folder / "config.yaml"), str(out / name)) == "student"
    return str(out / name)


@pytest.mark.parametrize("name", ["cifar_like", "imagenet_like", "five_points", "one_point"])
def test_outputs_of_the_published_network(name: str, tmp_path: Path) -> None:
    student = load_student(imported(name, tmp_path))
    expected = safetensors.torch.load_file(PUBLISHED / name / "expected.safetensors")
    labels = expected["labels"] if student.network.num_classes else None
    assert list(student.times) == pytest.approx(expected["times"].tolist(), abs=1e-7)
    assert torch.allclose(logsnr(expected["times"]).float(), expected["logsnr"], atol=1e-5)

    states = student.trajectory(expected["noise"], labels)
    truth = expected["trajectory"]
    assert (states - truth).norm() < 2e-5 * truth.norm()
    images = student.sample(expected["noise"], labels)
    assert (images - truth[:, -1]).norm() < 2e-5 * truth[:, -1].norm()
    if "loss_weight" in expected:
        weights = loss_weights("snr", expected["times"].tolist()).float()
        assert torch.allclose(weights, expected["loss_weight"], rtol=1e-4)


def test_an_imported_student_samples_from_the_command_line(tmp_path: Path) -> None:
    folder = PUBLISHED / "five_points"
    made = answer(
        "import-weights", str(folder / CHECKPOINT), "--config", str(folder / "config.yaml"), "--out", str(tmp_path / "s")
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert "student written" in made.stderr
    drawn = answer("sample", str(tmp_path / "s"), "--num", "3", "--out", str(tmp_path / "grid.png"))
    assert drawn.returncode == 0, drawn.stderr
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def changed(tmp_path: Path, change: Callable[[dict, dict], object]) -> tuple[str, str]:
    """The five-point checkpoint and its YAML after `change(ema, yaml)`."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(PUBLISHED / "five_points" / CHECKPOINT, weights_only=True)
    config = yaml.safe_load((PUBLISHED / "five_points" / "config.yaml").read_text())
    change(saved["ema"], config)
    torch.save(saved, tmp_path / CHECKPOINT)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return str(tmp_path / CHECKPOINT), str(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ema, c: ema.pop("all_modules.4.Conv_1.weight"), ["all_modules.4.Conv_1.weight is missing"]),
        (lambda ema, c: ema.update({"all_modules.99.weight": torch.zeros(2)}), ["99.weight is not of this network"]),
        (lambda ema, c: ema.update({"all_modules.3.weight": torch.zeros(2, 3)}), ["3.weight", "(2, 3)", "(32, 3, 3, 3)"]),
        (lambda ema, c: ema["all_modules.3.weight"].fill_(float("nan")), ["all_modules.3.weight", "finite"]),
        (lambda ema, c: c["model"].update(nf=64), ["model.nf", "64"]),
        (lambda ema, c: c["model"].update(num_modes=4), ["model.num_modes 4", "3"]),
        (lambda ema, c: c["model"].update(num_modes=2), ["weights1", "expected (32, 32, 2, 2)"]),
        (lambda ema, c: c["model"].update(num_classes=8), ["all_modules.2.weight", "(48, 8)"]),
        (lambda ema, c: c["model"].update(num_t=9), ["model.num_t 9", "1..6"]),
        (lambda ema, c: c["model"].update(pred_eps=True), ["model.pred_eps", "not implemented"]),
        (lambda ema, c: c["model"].update(with_nin=True), ["model.with_nin", "not implemented"]),
        (lambda ema, c: c["model"].update(fourier_feature=True), ["model.fourier_feature", "not implemented"]),
        (lambda ema, c: c["model"].update(num_pad=2), ["model.num_pad", "not implemented"]),
        (lambda ema, c: c["data"].update(t_idx=[0, 99]), ["data.t_idx", "0..8"]),
        (lambda ema, c: c["data"].update(time_step="cubic"), ["data.time_step", "cubic", "quad"]),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(
    tmp_path: Path, change: Callable[[dict, dict], object], words: list[str]
) -> None:
    src, config = changed(tmp_path, change)
    with pytest.raises(UserError) as raised:
        import_weights(src, config, str(tmp_path / "out"))
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


class _RunsCode:
    def __init__(self, trap: str) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.trap,)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    torch.save({"ema": {}, "args": _RunsCode(str(trap))}, tmp_path / CHECKPOINT)
    shutil.copy(PUBLISHED / "five_points" / "config.yaml", tmp_path)
    with pytest.raises(UserError, match=r"mkdir.*only tensors and argparse\.Namespace are read"):
        import_weights(str(tmp_path / CHECKPOINT), str(tmp_path / "config.yaml"), str(tmp_path / "out"))
    assert not trap.exists()


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    data = (PUBLISHED / "five_points" / CHECKPOINT).read_bytes()
    (tmp_path / CHECKPOINT).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="is cut off"):
        import_weights(
            str(tmp_path / CHECKPOINT), str(PUBLISHED / "five_points" / "config.yaml"), str(tmp_path / "out")
        )


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
    nyquist = points // 2 if points % 2 == 0 else None
    basis = fourier_basis(tuple(i / points for i in range(points)), modes, nyquist, dtype=torch.float64)
    found = conv(u.flatten(0, 1), basis).reshape(u.shape)
    assert torch.allclose(found, expected, atol=1e-12)
