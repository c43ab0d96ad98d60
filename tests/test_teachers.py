"""Teachers that a Python factory makes, closed forms, and what holds for teachers of every kind."""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_models import PUBLISHED, relative, saved
from teacher_models import one_thread as one_thread  # fixtures
from teacher_models import small_diffusers_unet as small_diffusers_unet
from torch import Tensor

from dsno_cluster import load_teacher, solve
from dsno_cluster.config import load_config
from dsno_cluster.device import compute_device
from dsno_cluster.diffusion.guidance import Guidance, guided
from dsno_cluster.diffusion.schedule import alpha_sigma, logsnr
from dsno_cluster.errors import UserError
from dsno_cluster.networks.unet import UNet
from dsno_cluster.provenance import software_versions
from dsno_cluster.teachers import (
    check_fits,
    mixture_teacher,
    open_teacher,
    teacher_info,
)
from dsno_cluster.teachers.identity import FactoryIdentity

# ---- Python factories --------------------------------------------------------------------------------------

FACTORY = """
import torch
class Shrink(torch.nn.Module):
    def __init__(self, factor, classes):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.shape, self.num_classes, self.null_class = (1, 4, 4), classes, classes or None
    def forward(self, x, t, labels):
        assert t.shape == (len(x),)
        return self.factor * x + (0 if labels is None else labels[:, None, None, None])
def build(factor, classes=0):
    return Shrink(factor, classes)
def wrong():
    return lambda x, t, labels: x
"""


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_models").mkdir()
    (tmp_path / "my_models/__init__.py").write_text("")
    (tmp_path / "my_models/shrink.py").write_text(FACTORY)
    path, x = "my_models.shrink:build", torch.ones(2, 1, 4, 4)
    half = {"factor": 0.5}
    identity = teacher_info(path, options=half).identity
    teacher = load_teacher(path, options=half)
    assert torch.equal(teacher(x, 0.3), 0.5 * x) and teacher.shape == (1, 4, 4)
    assert teacher.identity == identity and identity == FactoryIdentity(
        name=path, source_sha256=hashlib.sha256(FACTORY.encode()).hexdigest(), options=half
    )
    conditional = load_teacher(path, options={"factor": 0.5, "classes": 3})
    assert torch.equal(conditional(x, 0.3), 3 + 0.5 * x)  # the null class where no label is given
    assert solve(teacher, torch.randn(2, 1, 4, 4), [0.0], "ddim", 4).shape == (2, 1, 1, 4, 4)
    (tmp_path / "my_models/shrink.py").write_text(FACTORY + "\n# changed\n")
    assert teacher_info(path, options=half).identity != identity
    for wrong, options, message in (
        ("my_models.shrink:build", {"size": 1}, "does not take the teacher options"),
        ("my_models.shrink:nothing", {}, "has no function nothing"),
        ("my_models.shrink:wrong", {}, "shape"),
        ("my_models.nowhere:build", {}, "no Python module my_models.nowhere"),
        ("nowhere.at.all:build", {}, "cannot be imported"),
    ):
        with pytest.raises(UserError, match=message):
            load_teacher(wrong, options=options)


# ---- closed forms ------------------------------------------------------------------------------------------

MIXTURE = {"means": [-0.7, 0.5, 0.9], "stds": [0.1, 0.3, 0.05], "weights": [0.5, 0.3, 0.2]}


def mixture_cdf(x: Tensor, t: float) -> Tensor:
    """P(X_t <= x) of one pixel of the mixture."""
    alpha, sigma = (float(s) for s in alpha_sigma(t))
    terms = zip(MIXTURE["means"], MIXTURE["stds"], MIXTURE["weights"], strict=True)
    total = torch.zeros_like(x)
    for mean, std, weight in terms:
        spread = math.sqrt(alpha**2 * std**2 + sigma**2)
        total += weight * 0.5 * torch.erfc(-(x - alpha * mean) / (spread * math.sqrt(2)))
    return total


def test_mixture_is_the_posterior_mean() -> None:
    """Against quadrature of E[x0 | x] over a fine grid of x0."""
    teacher = load_teacher("closed-form:mixture", options={**MIXTURE, "shape": [1, 1, 1]})
    x0 = torch.linspace(-4, 4, 200_001, dtype=torch.float64)
    density = sum(
        w / s * torch.exp(-0.5 * ((x0 - m) / s) ** 2)
        for m, s, w in zip(MIXTURE["means"], MIXTURE["stds"], MIXTURE["weights"], strict=True)
    )
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = (float(s) for s in alpha_sigma(t))
        for x in (-1.3, 0.0, 0.4, 1.1):
            posterior = density * torch.exp(-0.5 * ((x - alpha * x0) / sigma) ** 2)
            expected = float((posterior * x0).sum() / posterior.sum())
            found = float(teacher(torch.full((1, 1, 1, 1), x, dtype=torch.float64), t))
            assert found == pytest.approx(expected, abs=1e-6)


def test_trajectories_of_the_mixture_keep_their_quantile() -> None:
    """In one dimension the probability flow is monotone, so F_t(x_t) is constant along every trajectory."""
    teacher = mixture_teacher(**MIXTURE, shape=(1, 1, 1))
    noise = torch.linspace(-2, 2, 21, dtype=torch.float64).reshape(-1, 1, 1, 1)
    times = (0.75, 0.5, 0.25)
    states = solve(teacher, noise, times, "heun", 400)
    for t, state in zip(times, states.unbind(1), strict=True):
        assert torch.allclose(mixture_cdf(state, t), mixture_cdf(noise, 1.0), atol=1e-4)


def test_guidance_of_a_mixture_with_classes() -> None:
    shape = (1, 2, 2)
    both = {"means": [-0.5, [[[0.5, 0.5], [1.0, 0.5]]]], "stds": [0.2, 0.3], "weights": [0.4, 0.6]}
    teacher = load_teacher(
        "closed-form:mixture", options={**both, "shape": shape, "classes": [0, 1], "null_class": True}
    )
    assert (teacher.num_classes, teacher.null_class) == (2, 2)
    alone = [mixture_teacher([both["means"][k]], both["stds"][k], shape) for k in (0, 1)]
    x, labels = torch.randn(4, *shape), torch.tensor([0, 1, 1, 0])
    conditional = torch.stack([alone[k](x, 0.6)[i] for i, k in enumerate(labels.tolist())])
    unconditional = mixture_teacher(**both, shape=shape)(x, 0.6)
    assert torch.allclose(teacher(x, 0.6, labels), conditional, atol=1e-6)
    assert torch.allclose(teacher(x, 0.6), unconditional, atol=1e-6)
    expected = unconditional + 3.0 * (conditional - unconditional)
    assert torch.allclose(guided(teacher, labels, Guidance(3.0))(x, 0.6), expected, atol=1e-5)
    end = solve(teacher, torch.randn(64, *shape), [0.0], "ddim", 64, torch.zeros(64, dtype=torch.int64))
    assert abs(float(end.mean()) + 0.5) < 0.1


def test_closed_forms_that_are_refused() -> None:
    for path, options, message in (
        ("closed-form:cauchy", {}, "closed-form:gaussian, closed-form:mixture"),
        ("closed-form:gaussian", {"mean": 0.0, "std": 1.0}, "needs the teacher options shape"),
        ("closed-form:gaussian", {"mean": 0.0, "std": -1.0, "shape": [1, 2, 2]}, "std: -1.0"),
        ("closed-form:gaussian", {"mean": 0, "std": 1, "shape": [2, 2]}, r"shape must be \[C, H, W\]"),
        (
            "closed-form:gaussian",
            {"mean": 0, "std": 1, "shape": [1, 2, 2], "x": 1},
            "unknown teacher option x",
        ),
        ("closed-form:mixture", {"means": [0, 1], "stds": [1], "shape": [1, 2, 2]}, "2 means, 1 stds"),
        ("closed-form:mixture", {"means": [[0, 1]], "stds": 1, "shape": [1, 2, 2]}, "expected 1 or 4"),
    ):
        with pytest.raises(UserError, match=message):
            load_teacher(path, options=options)


# ---- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_precision_of_inference(precision: str, tolerance: float, unet: Any, tmp_path: Path) -> None:
    path, _ = saved(unet, tmp_path)
    digits = "package:digits-teacher"
    for where, x in ((digits, torch.randn(4, 1, 8, 8)), (path, torch.randn(4, 3, 8, 8))):
        labels = torch.arange(4)
        full, less = load_teacher(where), load_teacher(where, precision=precision)
        for t in (0.9, 0.5, 0.2):
            found = less(x, t, labels)
            assert found.dtype == torch.float32
            assert 0 < relative(found, full(x, t, labels)) < tolerance
        assert less.identity == full.identity
    # the noise level itself is not rounded: bfloat16 has one number for the log-SNR of both these times
    bare = load_teacher(str(PUBLISHED / "teacher_flax_x"), precision=precision)
    x = torch.randn(2, 3, 16, 16)
    near = [bare(x, t, labels[:2]) for t in (0.2, 0.2002)]
    assert not torch.equal(*near)
    with pytest.raises(UserError, match="precision 'int8'"):
        load_teacher(digits, precision="int8")


def test_config_reaches_the_teacher() -> None:
    overrides = [
        "teacher.path=closed-form:mixture",
        "teacher.options={means: [0.5, [[[1, 2], [3, 4]]]], stds: 0.5, shape: [1, 2, 2]}",
        "teacher.precision=float32",
    ]
    config = load_config("configs/digits.yaml", overrides)
    teacher = load_teacher(str(config.teacher.path), options=config.teacher.options)
    assert teacher.shape == (1, 2, 2)
    with pytest.raises(UserError, match=r"network.state_size: the config says 8, .* has 2"):
        check_fits(config.network, teacher, "here")
    with pytest.raises(UserError, match="precision"):
        load_config("configs/digits.yaml", ["teacher.precision=int8"])


def test_a_relative_published_config_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor may start in another folder than the one that the options were written in."""
    shutil.copytree(PUBLISHED / "teacher_flax_x", tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    options = {"config": "config.yaml", "schedule": "continuous"}
    identity = teacher_info("teacher", options=options).identity
    words = [f"teacher.options={options}", "storage.root=s3://bucket/x"]
    digits = str(Path(__file__).parents[1] / "configs/digits.yaml")
    teacher = load_config(digits, ["teacher.path=teacher", *words]).teacher
    monkeypatch.chdir(tmp_path)
    assert teacher_info(str(teacher.path), options=teacher.options).identity == identity
    for other in ("my.module:function", "closed-form:gaussian"):  # whose options are part of the spec
        found = load_config(digits, [f"teacher.path={other}", *words]).teacher
        assert (found.path, found.options) == (other, options)


def test_float32_is_float32_on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured, after a process that allowed less. TensorFloat-32 of a GPU would be off by 5e-4."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.set_float32_matmul_precision("medium")
    device = compute_device()
    image, kernel = torch.randn(4, 64, 16, 16), torch.randn(64, 64, 3, 3)
    one, other = torch.randn(256, 256), torch.randn(256, 256)
    operations: tuple[tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], ...] = (
        (torch.nn.functional.conv2d, image, kernel),
        (torch.matmul, one, other),
    )
    for operation, a, b in operations:
        found = operation(a.to(device), b.to(device)).cpu()
        assert relative(found, operation(a.double(), b.double())) < 5e-6
    # what only a GPU would show above
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


def test_tf32_holds_only_while_the_teacher_is_evaluated() -> None:
    teacher, exact = (load_teacher("package:digits-teacher", precision=p) for p in ("tf32", "float32"))
    assert teacher.network is not None
    seen: list[object] = []
    teacher.network.register_forward_hook(
        lambda *_: seen.extend([torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()])
    )
    compute_device()
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    found = teacher(x, 0.5, labels)
    assert seen == [True, "high"]
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(found, exact(x, 0.5, labels))  # a CPU has no TensorFloat-32


def test_the_version_of_diffusers_is_on_record(unet: Any) -> None:
    import diffusers

    assert software_versions()["diffusers"] == diffusers.__version__


def test_identity_needs_no_torch() -> None:
    code = """
import sys
from dsno_cluster.teachers import teacher_info
ours = teacher_info("package:digits-teacher")
closed = teacher_info("closed-form:gaussian", options={"mean": 0.1, "std": 0.5, "shape": [1, 4, 4]})
assert (ours.shape, ours.num_classes, ours.null_class) == ((1, 8, 8), 10, 10), ours
assert (closed.shape, closed.num_classes, closed.null_class) == ((1, 4, 4), 0, None), closed
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_warm_start_takes_what_predicts_the_state() -> None:
    """At t=1 x is noise: the backbone with these weights answers the teacher's x0 there."""
    teacher = load_teacher("package:digits-teacher")
    network = load_config("configs/digits.yaml").network
    student = UNet(network)
    student.load_state_dict(open_teacher("package:digits-teacher").warm_start())
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    with torch.no_grad():
        assert (
            relative(student(x, logsnr(torch.ones(1, 1)).float(), labels)[:, 0], teacher(x, 1.0, labels))
            < 1e-3
        )
    both = open_teacher(str(PUBLISHED / "teacher_flax_both")).warm_start()
    assert both["conv_out.weight"].shape[0] == 3
    with pytest.raises(UserError, match=r"student.warm_start=false"):
        gaussian = {"mean": 0.0, "std": 1.0, "shape": [1, 2, 2]}
        open_teacher("closed-form:gaussian", options=gaussian).warm_start()
