"""Every scheduler class of diffusers: x0 and steps as the class has them, or refused with the reason."""

from __future__ import annotations

import importlib
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_folders import randomized, ratio_of, saved_scheduler, time_of, write
from teacher_models import one_thread as one_thread  # fixture
from teacher_models import relative
from torch import Tensor

from dsno_cluster import load_teacher, solve
from dsno_cluster.errors import UserError
from dsno_cluster.teachers import Teacher, teacher_info
from dsno_cluster.teachers.diffusers_schedulers import REFUSED, SUPPORTED

diffusers = pytest.importorskip("diffusers")
UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
FOURIER = {**UNET, "time_embedding_type": "fourier"}


def saved(tmp_path: Path, config: dict[str, Any], scheduler: Any) -> tuple[str, Any]:
    """A folder with a network of that config and the scheduler, and the network."""
    unet = randomized(diffusers.UNet2DModel.from_config(config))
    content = scheduler if isinstance(scheduler, dict) else saved_scheduler(scheduler)
    return write(tmp_path, unet, config, content), unet


def class_of(name: str) -> Any:
    """A scheduler class of diffusers. Two of them need torchsde, only for random numbers that no test here draws."""
    modules = {
        "CosineDPMSolverMultistepScheduler": "scheduling_cosine_dpmsolver_multistep",
        "DPMSolverSDEScheduler": "scheduling_dpmsolver_sde",
    }
    if name not in modules:
        return getattr(diffusers, name)
    try:
        import torchsde
    except ImportError:
        torchsde = types.ModuleType("torchsde")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchsde", torchsde)
        return getattr(importlib.import_module(f"diffusers.schedulers.{modules[name]}"), name)


def noise(teacher: Teacher) -> Tensor:
    return torch.randn(2, *teacher.shape, generator=torch.Generator().manual_seed(1))


def test_every_public_class_is_supported_or_refused(tmp_path: Path) -> None:
    public = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    public -= {"SchedulerMixin"}
    assert len(public) > 45
    assert public <= SUPPORTED.keys() | REFUSED.keys()
    assert not SUPPORTED.keys() & REFUSED.keys()
    path, _ = saved(tmp_path, UNET, {"_class_name": "DDIMScheduler"})
    for name, reason in REFUSED.items():
        (tmp_path / "scheduler/scheduler_config.json").write_text(f'{{"_class_name": "{name}"}}')
        (tmp_path / "model_index.json").unlink(missing_ok=True)
        with pytest.raises(UserError) as refused:
            teacher_info(path)
        assert f"{name} is not supported: {reason}" in str(refused.value)


def test_the_defaults_are_those_of_diffusers() -> None:
    """A key that an old file lacks has the value with which diffusers would load it."""
    from dsno_cluster.teachers.diffusers_schedulers import BETAS

    for name, row in SUPPORTED.items():
        if name in ("KarrasEDMScheduler", "KarrasVeScheduler"):  # diffusers has none, or only its name
            continue
        theirs = class_of(name)().config
        ours = {**(BETAS if row.kind == "betas" else {}), **row.defaults}
        for key in ours.keys() & theirs.keys():
            assert ours[key] == theirs[key], (name, key)


BETAS = [
    *("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler"),
]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", BETAS)
@torch.no_grad()
def test_x0_on_betas(name: str, prediction: str, tmp_path: Path) -> None:
    """Also for samplers in sigma, whose networks are those of the same betas."""
    known = {"clip_sample": False} if "DD" in name else {}
    scheduler = getattr(diffusers, name)(prediction_type=prediction, **known)
    path, unet = saved(tmp_path, UNET, scheduler)
    teacher = load_teacher(path)
    scheduler.set_timesteps(4)
    x = noise(teacher)
    for i, t in enumerate(scheduler.timesteps):
        signal = float(scheduler.alphas_cumprod[int(t)])
        sigma = math.sqrt((1 - signal) / signal)
        y = x if "DD" in name else x * math.sqrt(1 + sigma**2)
        output = unet(scheduler.scale_model_input(y, t), t).sample
        expected = scheduler.step(output, t, y).pred_original_sample
        assert relative(teacher(x, time_of(sigma)), expected) < 1e-4, i


SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")


@pytest.mark.parametrize(
    ("kind", "zero_snr"),
    [*((kind, zero) for kind in SCHEDULES for zero in (False, True)), ("exp", False)],
)
def test_schedules_of_betas(kind: str, zero_snr: bool) -> None:
    from dsno_cluster.diffusion.discrete_levels import noise_levels
    from dsno_cluster.teachers.diffusers_schedulers import BETAS

    if kind == "exp":
        theirs = diffusers.HeunDiscreteScheduler(beta_schedule=kind, num_train_timesteps=100)
    else:
        theirs = diffusers.DDPMScheduler(
            beta_schedule=kind, rescale_betas_zero_snr=zero_snr, num_train_timesteps=100
        )
    values = {**BETAS, "beta_schedule": kind, "num_train_timesteps": 100, "rescale_betas_zero_snr": zero_snr}
    start = {"beta_start": theirs.config.beta_start, "beta_end": theirs.config.beta_end}
    found = torch.tensor(noise_levels({**values, **start}, "here"), dtype=torch.float64).sigmoid()
    assert torch.allclose(found, theirs.alphas_cumprod.double(), atol=1e-7, rtol=1e-4)
    assert (found[-1] == 0) == zero_snr


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@torch.no_grad()
def test_zero_terminal_snr(prediction: str, tmp_path: Path) -> None:
    """The last level is pure noise: the solution starts there, and its x0 is the scheduler's."""
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, **settings)
    path, unet = saved(tmp_path, UNET, scheduler)
    teacher = load_teacher(path, options={"schedule": "native"})
    x = noise(teacher)
    scheduler.set_timesteps(1000)
    for n in (999, 998, 400, 0):
        signal = float(scheduler.alphas_cumprod[n])
        t = time_of(math.sqrt((1 - signal) / signal)) if signal else 1.0
        expected = scheduler.step(unet(x, torch.tensor(n)).sample, n, x).pred_original_sample
        assert relative(teacher(x, t), expected) < 1e-4, n
    scheduler.set_timesteps(10)
    state = x
    for t in scheduler.timesteps:
        state = scheduler.step(unet(state, t).sample, t, state).prev_sample
    assert relative(solve(teacher, x, [0.0], "ddim", 10)[:, 0], state) < 1e-4


def test_zero_terminal_snr_needs_another_prediction_than_eps(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, UNET, diffusers.DDIMScheduler(rescale_betas_zero_snr=True))
    with pytest.raises(UserError, match="prediction_type epsilon: the last level is pure noise"):
        load_teacher(path)


PRECONDITIONED = {
    "edm euler": diffusers.EDMEulerScheduler(),
    "edm euler, exponential": diffusers.EDMEulerScheduler(sigma_schedule="exponential", sigma_data=1.0),
    "edm euler, v": diffusers.EDMEulerScheduler(prediction_type="v_prediction", sigma_max=20.0, rho=5.0),
    "cosine dpm": class_of("CosineDPMSolverMultistepScheduler")(solver_order=1),
}


@torch.no_grad()
def stepped(network: Callable[..., Any], scheduler: Any, x: Tensor, steps: int) -> Tensor:
    """The image as diffusers' pipelines make it from noise x."""
    scheduler.set_timesteps(steps)
    state = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = network(scheduler.scale_model_input(state, t), t).sample
        state = scheduler.step(output, t, state).prev_sample
    return state


@pytest.mark.parametrize("name", PRECONDITIONED)
@torch.no_grad()
def test_preconditioned_networks(name: str, tmp_path: Path) -> None:
    scheduler = PRECONDITIONED[name]
    path, unet = saved(tmp_path, UNET, scheduler)
    teacher = load_teacher(path, options={"schedule": "native"})
    x = noise(teacher)
    low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
    for sigma in (low, math.sqrt(low * high), high):
        y, s = x * math.sqrt(1 + sigma**2), torch.tensor(sigma)
        output = unet(scheduler.precondition_inputs(y, s), scheduler.precondition_noise(s[None])).sample
        expected = scheduler.precondition_outputs(y, output, s)
        assert relative(teacher(x, time_of(sigma)), expected) < 1e-4, sigma
    if name == "cosine dpm":
        return  # it adds noise
    found = solve(teacher, x, [0.0], "ddim", 9)[:, 0]
    assert relative(found, stepped(unet, scheduler, x, 9)) < 1e-4


@torch.no_grad()
def test_continuous_euler_is_preconditioned(tmp_path: Path) -> None:
    """The setting of stable video diffusion: its config has betas, which play no part."""
    sigmas = {"sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True}
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", **sigmas
    )
    path, unet = saved(tmp_path, UNET, scheduler)
    teacher = load_teacher(path, options={"schedule": "native"})
    x = noise(teacher)
    assert relative(solve(teacher, x, [0.0], "ddim", 8)[:, 0], stepped(unet, scheduler, x, 8)) < 1e-4


FLOWS = {
    "euler": diffusers.FlowMatchEulerDiscreteScheduler(),
    "shifted": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "stretched": diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, shift_terminal=0.1),
    "karras": diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    "exponential": diffusers.FlowMatchEulerDiscreteScheduler(use_exponential_sigmas=True),
}


@pytest.mark.parametrize("name", FLOWS)
@torch.no_grad()
def test_flow_matching(name: str, tmp_path: Path) -> None:
    if name == "exponential" or name == "karras":
        pytest.importorskip("scipy")
    scheduler = FLOWS[name]
    path, unet = saved(tmp_path, UNET, scheduler)
    teacher = load_teacher(path, options={"schedule": "native"})
    x = noise(teacher)
    for sigma in (1.0, 0.7, 0.2, 0.01):
        state = x * math.sqrt(sigma**2 + (1 - sigma) ** 2)
        expected = state - sigma * unet(state, torch.tensor(1000 * sigma)).sample
        t = time_of(sigma / (1 - sigma)) if sigma < 1 else 1.0
        assert relative(teacher(x, t), expected) < 1e-4, sigma
    assert relative(solve(teacher, x, [0.0], "ddim", 12)[:, 0], by_flow(unet, scheduler, x, 12)) < 1e-4


@torch.no_grad()
def by_flow(network: Any, scheduler: Any, x: Tensor, steps: int) -> Tensor:
    scheduler.set_timesteps(steps)
    state = x
    for t in scheduler.timesteps:
        state = scheduler.step(network(state, t).sample, t, state).prev_sample
    return state


@torch.no_grad()
def test_scores_of_a_variance_exploding_process(tmp_path: Path) -> None:
    """Images are in [0, 1] there; diffusers' KarrasVePipeline is what turns them into ones in [-1, 1]."""
    deprecated = importlib.import_module("diffusers.schedulers.deprecated.scheduling_karras_ve")
    scheduler = deprecated.KarrasVeScheduler()
    path, unet = saved(tmp_path, FOURIER, diffusers.ScoreSdeVeScheduler(sigma_max=50.0))
    teacher = load_teacher(path, options={"schedule": "native"})
    x = noise(teacher)
    for sigma in (0.02, 0.5, 9.0, 100.0):
        y = x * math.sqrt(1 + sigma**2)
        output = (sigma / 2) * unet((y + 1) / 2, torch.tensor(sigma / 2)).sample
        expected = scheduler.step(output, sigma, 0.0, y).pred_original_sample
        assert relative(teacher(x, time_of(sigma)), expected) < 1e-4, sigma
    theirs = diffusers.ScoreSdeVeScheduler(sigma_max=50.0)
    theirs.set_timesteps(7)
    theirs.set_sigmas(7)
    assert ratios(teacher, 7) == pytest.approx([2 * float(s) for s in theirs.sigmas], rel=1e-5)


def ratios(teacher: Any, steps: int) -> list[float]:
    grid = teacher.native_grid(steps)
    assert grid is not None and grid[-1] == 0.0
    return [ratio_of(t) for t in grid[:-1]]


Z = {"use_karras_sigmas": True}
STEPS: list[tuple[str, dict[str, Any]]] = [
    *[("EulerDiscreteScheduler", {"timestep_spacing": s}) for s in ("leading", "trailing", "linspace")],
    ("EulerDiscreteScheduler", {**Z, "steps_offset": 1, "timestep_spacing": "leading"}),
    ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min", "timestep_spacing": "trailing"}),
    ("EulerDiscreteScheduler", {**Z, "sigma_min": 0.1, "sigma_max": 20.0}),
    ("EulerAncestralDiscreteScheduler", {}),
    *[("LMSDiscreteScheduler", more) for more in ({}, Z)],
    ("HeunDiscreteScheduler", {"beta_schedule": "exp"}),
    ("HeunDiscreteScheduler", Z),
    *[("KDPM2DiscreteScheduler", {"timestep_spacing": s}) for s in ("leading", "trailing", "linspace")],
    ("KDPM2AncestralDiscreteScheduler", {}),
    *[("DPMSolverMultistepScheduler", {"timestep_spacing": s}) for s in ("leading", "trailing", "linspace")],
    ("DPMSolverMultistepScheduler", {"final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2"}),
    ("DPMSolverMultistepScheduler", Z),
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 1}),
    *[("DEISMultistepScheduler", {"timestep_spacing": s}) for s in ("leading", "linspace")],
    ("SASolverScheduler", {}),
    *[("UniPCMultistepScheduler", {"timestep_spacing": s}) for s in ("leading", "trailing", "linspace")],
    ("DPMSolverSDEScheduler", {}),
    ("EDMDPMSolverMultistepScheduler", {}),
    ("CosineDPMSolverMultistepScheduler", {}),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    *[
        (f"{name}MultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", **more})
        for name in ("DPMSolver", "UniPC")
        for more in ({}, {"flow_shift": 3.0})
    ],
]


@pytest.mark.parametrize(("name", "settings"), STEPS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_own_steps(name: str, settings: dict[str, Any], steps: int, tmp_path: Path) -> None:
    """The grid passes through the noise levels of the scheduler's own `set_timesteps`."""
    scheduler = class_of(name)(**settings)
    if name.startswith("Cosine"):
        steps += 1  # a single step would start at the lowest sigma there
    path, _ = saved(tmp_path, UNET, scheduler)
    scheduler.set_timesteps(steps)
    theirs = list(dict.fromkeys(float(sigma) for sigma in scheduler.sigmas if sigma > 0))
    if "Flow" in name or settings.get("use_flow_sigmas"):
        theirs = [s / (1 - s) if s < 1 - 1e-5 else math.inf for s in theirs]
    found = ratios(teacher_info(path, options={"schedule": "native"}), steps)
    expected = [min(s, math.exp(10)) for s in theirs]
    assert found == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("name", ["DDPMScheduler", "PNDMScheduler", "UnCLIPScheduler"])
def test_own_timesteps(name: str, tmp_path: Path) -> None:
    """Of classes that know timesteps only; PNDM returns the state at its first level."""
    scheduler = getattr(diffusers, name)()
    path, _ = saved(tmp_path, UNET, scheduler)
    scheduler.set_timesteps(20)
    taken = scheduler._timesteps[::-1] if name == "PNDMScheduler" else scheduler.timesteps
    signals = [float(scheduler.alphas_cumprod[int(n)]) for n in taken]
    expected = [math.sqrt((1 - signal) / signal) for signal in signals]
    assert ratios(teacher_info(path, options={"schedule": "native"}), 20) == pytest.approx(expected, rel=2e-4)


def test_steps_that_are_not_known_here(tmp_path: Path) -> None:
    cases = [
        (diffusers.DDIMInverseScheduler(), "DDIMInverseScheduler does not only step from noise"),
        (diffusers.EulerDiscreteScheduler(use_beta_sigmas=True), "use_beta_sigmas in .* is not supported"),
        (diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "use_dynamic_shifting in"),
        (
            diffusers.EulerDiscreteScheduler(interpolation_type="log_linear"),
            "interpolation_type 'log_linear'",
        ),
    ]
    for i, (scheduler, reason) in enumerate(cases):
        path, _ = saved(tmp_path / str(i), UNET, scheduler)
        assert teacher_info(path).native is None
        with pytest.raises(UserError, match=f"schedule native: .*{reason}"):
            teacher_info(path, options={"schedule": "native"})


def test_a_consistency_model_has_one_step(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, UNET, diffusers.CMStochasticIterativeScheduler())
    with pytest.raises(UserError, match="schedule continuous, but a consistency model"):
        teacher_info(path, options={"schedule": "continuous"})
    teacher = load_teacher(path)
    with pytest.raises(ValueError, match="one step of 'ddim'"):
        solve(teacher, noise(teacher), [0.0], "heun", 8)
