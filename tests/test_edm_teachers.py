"""Teachers from snapshots of EDM and EDM2, against the outputs of the original code."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from edm_files import FEW_SNAPSHOTS, SNAPSHOTS, expected, snapshot
from teacher_models import one_thread as one_thread  # fixture
from teacher_models import relative
from tiny import DATA
from torch import Tensor

from dsno_cluster import load_teacher, solve
from dsno_cluster.config import load_config
from dsno_cluster.diffusion import preconditioning
from dsno_cluster.diffusion.schedule import alpha_sigma, karras_sigmas, time_of_angle
from dsno_cluster.errors import UserError
from dsno_cluster.teachers import Teacher, find_teacher, teacher_info
from dsno_cluster.teachers.loading import open_teacher

SAMPLED = [name for name in SNAPSHOTS if name != "edm2_cond"]


def states(x0: Tensor, noise: Tensor, sigma: float) -> tuple[Tensor, float]:
    """x0 + sigma noise as a state of ours, and its time."""
    alpha = 1 / math.sqrt(1 + sigma**2)
    return ((x0.double() + sigma * noise.double()) * alpha).float(), time_of_angle(math.atan(sigma))


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_the_clean_image_is_that_of_the_original(name: str, tmp_path: Path) -> None:
    teacher, right = load_teacher(snapshot(name, tmp_path)), expected(name)
    labels = right.get("labels")
    wanted = {"denoised": labels} | ({} if labels is None else {"denoised_without_label": None})
    for key, given in wanted.items():
        for i, sigma in enumerate(right["sigmas"].tolist()):
            x, t = states(right["x0"], right["noise"], sigma)
            assert relative(teacher(x, t, given), right[key][:, i]) < 5e-6, (key, sigma)
    if labels is not None:  # "no class" is a label too
        nulls = torch.full_like(labels, teacher.null_class or 0)
        assert torch.equal(teacher(x, t, nulls), teacher(x, t))
        assert relative(teacher(x, t, labels), teacher(x, t)) > 1e-3


@pytest.mark.parametrize("name", SAMPLED)
def test_heun_on_the_native_grid_is_the_sampler_of_edm(name: str, tmp_path: Path) -> None:
    teacher = load_teacher(snapshot(name, tmp_path), options={"schedule": "native"})
    right = expected(name)
    grid = teacher.native_grid(18)
    assert grid is not None and len(grid) == 19
    found = solve(teacher, right["latents"], grid[1:], "heun-edm", 18, right.get("labels"))
    assert relative(found[:, -1], right["end"]) < 5e-6
    for i, t in enumerate(grid[1::6]):
        assert relative(found[:, 6 * i] / float(alpha_sigma(t)[0]), right["states"][:, i]) < 5e-6
    # Heun's method in another variable takes other steps
    assert (
        relative(solve(teacher, right["latents"], [0.0], "heun", 18, right.get("labels"))[:, 0], right["end"])
        > 1e-3
    )


def test_what_is_known_of_a_snapshot(tmp_path: Path) -> None:
    paths = {name: snapshot(name, tmp_path) for name in SNAPSHOTS}
    for name, path in paths.items():
        info = teacher_info(path)
        classes = 3 if "labels" in expected(name) else 0
        assert (info.shape, info.num_classes, info.null_class) == ((3, 8, 8), classes, classes or None)
        assert info.native_grid(18) is None and not info.distilled
    assert len({teacher_info(path).identity.model_dump_json() for path in paths.values()}) == len(paths)
    with pytest.raises(UserError, match="unknown teacher option null_class; this kind takes schedule"):
        teacher_info(paths["skip_vp"], options={"null_class": 3})
    with pytest.raises(UserError, match="'own' is not one of: native, continuous"):
        teacher_info(paths["skip_vp"], options={"schedule": "own"})
    with pytest.raises(UserError, match="warm_start=false"):
        open_teacher(paths["skip_vp"]).warm_start()


def sigmas_of(name: str, steps: int, folder: Path) -> list[float]:
    grid = teacher_info(snapshot(name, folder), options={"schedule": "native"}).native_grid(steps)
    assert grid is not None and grid[-1] == 0.0 and all(a > b for a, b in itertools.pairwise(grid))
    alphas_sigmas = (alpha_sigma(t) for t in grid[:-1])
    return [float(sigma / alpha) for alpha, sigma in alphas_sigmas]


def test_native_grids(tmp_path: Path) -> None:
    """The ends are those of EDM's sampler, within what the network permits; discrete levels are its own."""
    for name, low in (("ddpmpp_cond", 0.002), ("ncsnpp_ve", 0.02), ("skip_vp", 0.002), ("edm2_cond", 0.002)):
        found = sigmas_of(name, 18, tmp_path)
        assert found == pytest.approx(karras_sigmas(18, low, 80.0), rel=1e-9)
        assert (found[0], found[-1]) == pytest.approx((80.0, low), rel=1e-9)
        assert sigmas_of(name, 1, tmp_path) == pytest.approx([80.0], rel=1e-9)
    iddpm = sigmas_of("adm_iddpm", 18, tmp_path)
    assert iddpm != pytest.approx(karras_sigmas(18, iddpm[-1], 80.0), rel=1e-4)
    with pytest.raises(
        ValueError, match=r"256 steps, of which some fall on the same of the model's 1000 levels"
    ):
        sigmas_of("adm_iddpm", 256, tmp_path)


def test_a_level_outside_of_the_range_is_the_nearest(tmp_path: Path) -> None:
    for name, high in (("ddpmpp_cond", 80.0), ("ncsnpp_ve", 100.0), ("edm2_cond", 80.0)):
        teacher = load_teacher(snapshot(name, tmp_path))
        x = torch.randn(2, 3, 8, 8)
        for outside, inside in ((1.0, high), (0.0, 0.002)):
            nearest = teacher(x, time_of_angle(math.atan(inside)))
            assert relative(teacher(x, outside), nearest) < 1e-5
        assert relative(teacher(x, time_of_angle(math.atan(high / 2))), teacher(x, 1.0)) > 1e-3


def test_preconditionings_at_their_ends() -> None:
    """In float64 also where alpha or sigma vanish; a perfect network's output has unit magnitude (EDM)."""
    sigma = torch.tensor([math.exp(-10), 0.002, 1.0, 80.0, math.exp(10)], dtype=torch.float64)
    levels = tuple(float(u) for u in torch.linspace(200.0, 0.0, 1001))
    every = {
        "edm": preconditioning.edm(sigma),
        "vp": preconditioning.vp(sigma),
        "ve": preconditioning.ve(sigma),
        "iddpm": preconditioning.iddpm(sigma, levels),
    }
    for name, k in every.items():
        of_x = preconditioning.of_states(k, sigma)
        for c in (k.c_skip, k.c_out, k.c_in, k.c_noise, of_x.c_skip, of_x.c_in):
            assert c.dtype == torch.float64 and bool(c.isfinite().all()), name
    edm = every["edm"]
    assert torch.allclose(edm.c_in**2 * (sigma**2 + 0.25), torch.ones(5, dtype=torch.float64))
    # x0 = c_skip y + c_out F, with F of unit variance for data of variance 1/4 (Karras et al. 2022, equation 113)
    variance = (1 - edm.c_skip) ** 2 * 0.25 + edm.c_skip**2 * sigma**2
    assert torch.allclose(edm.c_out**2, variance, rtol=1e-9)
    # the network's time goes back to sigma
    t = every["vp"].c_noise / 999
    assert torch.allclose(((19.9 * t**2 / 2 + 0.1 * t).exp() - 1).sqrt(), sigma, rtol=1e-6)
    assert torch.allclose(2 * every["ve"].c_noise.exp(), sigma)
    # 0.002 and 1 are nearest to the levels 1000 and 995, 80 to 600; the time counts from the other end
    assert every["iddpm"].c_noise.tolist() == [-1.0, -1.0, 4.0, 399.0, 999.0]


@pytest.mark.parametrize("name", ["ddpmpp_cond", "adm_iddpm", "edm2_cond"])
def test_in_other_precisions(name: str, tmp_path: Path) -> None:
    path, right = snapshot(name, tmp_path), expected(name)
    x, t = states(right["x0"], right["noise"], 0.5)
    exact = load_teacher(path)(x, t, right["labels"])
    for precision, most in (("bfloat16", 3e-2), ("float16", 4e-3)):
        found = load_teacher(path, precision=precision)(x, t, right["labels"])
        assert found.dtype == torch.float32 and 0 < relative(found, exact) < most


@pytest.mark.parametrize("name", FEW_SNAPSHOTS)
def test_a_graph_for_each_shape_without_breaks(name: str, tmp_path: Path) -> None:
    """As `torch.compile` sees the network; tests/test_compiled_teachers.py runs what inductor makes of some."""
    from torch._dynamo.testing import CompileCounter

    teacher, counter = load_teacher(snapshot(name, tmp_path)), CompileCounter()
    assert teacher.network is not None
    teacher.network.compile(backend=counter, dynamic=False, fullgraph=True)
    for count in (3, 2, 3):
        for t in (0.9, 0.2):
            labels = torch.arange(count) if teacher.num_classes else None
            assert teacher(torch.randn(count, 3, 8, 8), t, labels).isfinite().all()
    assert counter.frame_count == 2


def test_a_config_names_a_snapshot(tmp_path: Path) -> None:
    path = snapshot("ddpmpp_cond", tmp_path)
    words = [
        f"teacher.path={path}",
        "teacher.options={schedule: native}",
        *(
            "network.state_size=8",
            "network.state_channels=3",
            "network.num_classes=3",
            "network.null_class=true",
        ),
        *(
            "trajectories.solver=heun-edm",
            "trajectories.steps=18",
            "trajectories.times=[0.0]",
            "student.modes=1",
        ),
    ]
    config = load_config(str(DATA.parents[1] / "configs/digits.yaml"), words)
    found = find_teacher(config)
    teacher: Teacher = found.load()
    assert found.own_steps == teacher.native_grid(18) and found.method.evaluations() == 35
    found.forget()
    assert found.load().identity == found.info.identity
