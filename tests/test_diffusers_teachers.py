"""Teachers from diffusers folders against diffusers' own model and sampler."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from teacher_models import one_thread as one_thread  # fixtures
from teacher_models import relative, saved
from teacher_models import small_diffusers_unet as small_diffusers_unet
from tiny import answer, dsno
from torch import Tensor

from dsno_cluster import load_teacher, solve
from dsno_cluster.config import load_config
from dsno_cluster.diffusion.guidance import Guidance, guided
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.diffusion.schedule import logsnr
from dsno_cluster.errors import UserError
from dsno_cluster.teachers import Teacher, find_teacher, teacher_info
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.spec import solve_samples, spec_of


def along(teacher: Teacher, noise: Tensor, steps: int, labels: Tensor | None = None) -> Tensor:
    """DDIM's states at every one of the teacher's own steps, (N, steps, C, H, W)."""
    grid = teacher.native_grid(steps)
    assert grid is not None
    return solve(teacher, noise, grid[1:], "ddim", steps, labels)


BETAS = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": [0.001 + 0.0003 * n for n in range(100)], "num_train_timesteps": 100},
}


@torch.no_grad()
def diffusers_images(unet: Any, scheduler: Any, noise: Tensor, steps: int, labels: Tensor) -> Tensor:
    scheduler.set_timesteps(steps)
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(unet(x, timestep, labels).sample, timestep, x, eta=0.0).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("betas", BETAS)
def test_images_of_diffusers_ddim(unet: Any, prediction: str, betas: str, tmp_path: Path) -> None:
    path, scheduler = saved(unet, tmp_path, prediction_type=prediction, **BETAS[betas])
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(4)
    expected = diffusers_images(unet, scheduler, noise, 20, labels)
    teacher = load_teacher(path, options={"schedule": "native"})
    grid = teacher.native_grid(20)
    assert grid is not None and len(grid) == 21 and grid[-1] == 0.0
    assert relative(solve(teacher, noise, [0.0], "ddim", 20, labels)[:, 0], expected) < 1e-4
    assert teacher.native_grid(20) == teacher_info(path, options={"schedule": "native"}).native_grid(20)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ends_of_the_native_grid(unet: Any, offset: int, one: bool, spacing: str, tmp_path: Path) -> None:
    """Where the last alpha is not set to one, diffusers' image is the state at the model's first level."""
    rest = {"steps_offset": offset, "set_alpha_to_one": one, "timestep_spacing": spacing}
    path, scheduler = saved(unet, tmp_path, prediction_type="v_prediction", **rest)
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
    expected = diffusers_images(unet, scheduler, noise, 10, labels)
    teacher = load_teacher(path, options={"schedule": "native"})
    states = along(teacher, noise, 10, labels)
    assert relative(states[:, -1 if one else -2], expected) < 1e-4


def test_levels_between_and_beyond_those_of_diffusers(unet: Any, tmp_path: Path) -> None:
    path, scheduler = saved(unet, tmp_path)
    teacher = load_teacher(path)
    assert teacher.native_grid(10) is None
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    levels = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)).double().log()

    def expected(timestep: float, level: float) -> Tensor:
        alpha, sigma = math.sqrt(1 / (1 + math.exp(-level))), math.sqrt(1 / (1 + math.exp(level)))
        with torch.no_grad():
            return (x - sigma * unet(x, torch.tensor(timestep), labels).sample) / alpha

    def time(level: float) -> float:  # by bisection of the schedule itself
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float(logsnr(middle)) > level else (low, middle)
        return low

    between = 0.25 * float(levels[300]) + 0.75 * float(levels[301])
    cases = [(time(float(levels[700])), 700.0, float(levels[700])), (time(between), 300.75, between)]
    cases += [(1.0, 999.0, float(levels[999])), (0.0, 0.0, float(levels[0]))]  # beyond: the nearest level's
    for t, timestep, level in cases:
        assert relative(teacher(x, t, labels), expected(timestep, level)) < 2e-4, t
    # times of one batch may differ
    together = teacher(x, torch.tensor([cases[0][0], cases[1][0]], dtype=torch.float64), labels)
    assert relative(together[1], teacher(x, cases[1][0], labels)[1]) < 1e-5


def test_a_uniform_grid_ends_near_the_native_one(unet: Any, tmp_path: Path) -> None:
    """The clamped ends do no harm: fine solutions on the model's own grid and on the uniform one agree."""
    path, _ = saved(unet, tmp_path, prediction_type="v_prediction")
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    native = load_teacher(path, options={"schedule": "native"})
    fine = along(native, noise, 200, labels)[:, -1]
    uniform = solve(load_teacher(path), noise, [0.0], "ddim", 200, labels)[:, 0]
    assert relative(uniform, fine) < 0.03


def test_classes_and_null_class_of_diffusers(unet: Any, tmp_path: Path) -> None:
    path, _ = saved(unet, tmp_path)
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 3])
    plain, with_null = load_teacher(path), load_teacher(path, options={"null_class": 4})
    assert (plain.num_classes, plain.null_class) == (5, None)
    assert (with_null.num_classes, with_null.null_class) == (4, 4)
    nulls = torch.full((3,), 4)
    assert torch.equal(with_null(x, 0.5), plain(x, 0.5, nulls))
    two = guided(with_null, labels, Guidance(2.0))(x, 0.5)
    assert torch.allclose(two, 2 * plain(x, 0.5, labels) - plain(x, 0.5, nulls), atol=1e-5)
    with pytest.raises(ValueError, match="null class"):
        guided(plain, labels, Guidance(2.0))
    with pytest.raises(UserError, match="must be the last of them, 4"):
        load_teacher(path, options={"null_class": 0})


def test_places_and_forms_of_diffusers_folders(unet: Any, tmp_path: Path) -> None:
    path, scheduler = saved(unet, tmp_path / "pipeline", prediction_type="v_prediction")
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    expected = load_teacher(path)(x, 0.4, labels)
    assert torch.equal(load_teacher(f"{path}/unet")(x, 0.4, labels), expected)  # finds ../scheduler
    unet.save_pretrained(tmp_path / "alone")
    with pytest.raises(UserError, match=r"has no scheduler_config\.json"):
        load_teacher(str(tmp_path / "alone"))
    options = {"prediction_type": "v_prediction", "beta_schedule": "linear"}
    assert torch.equal(load_teacher(str(tmp_path / "alone"), options=options)(x, 0.4, labels), expected)
    scheduler.save_pretrained(tmp_path / "alone")
    assert torch.equal(load_teacher(str(tmp_path / "alone"))(x, 0.4, labels), expected)
    unet.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(load_teacher(str(tmp_path / "sharded"), options=options)(x, 0.4, labels), expected)


def test_attention_under_the_names_of_old_diffusers(unet: Any, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    path, _ = saved(unet, tmp_path)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
    expected = load_teacher(path)(x, 0.5, labels)
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, tensor in safetensors.torch.load_file(file).items():
        for new, before in old.items():
            name = name.replace(new, before)
        weights[name] = tensor
    assert sum(".query." in name for name in weights) > 2
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    assert torch.equal(load_teacher(path)(x, 0.5, labels), expected)
    theirs = UNet2DModel.from_pretrained(tmp_path / "unet").state_dict()
    assert all(torch.equal(tensor, unet.state_dict()[name]) for name, tensor in theirs.items())


def experiment(path: str, *more: str) -> list[str]:
    """Overrides of the digits config for a few trajectories of the diffusers model at `path`."""
    return [
        *(
            "network.state_channels=3",
            "network.num_classes=5",
            "network.null_class=false",
            f"teacher.path={path}",
        ),
        *("trajectories.num_samples=4", "trajectories.samples_per_shard=2", "trajectories.batch_size=2"),
        *("trajectories.times=[0.0]", "trajectories.steps=10", "student.modes=1"),
        *more,
    ]


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_evaluations_on_the_native_grid_are_counted(
    unet: Any, one: bool, guidance: float, tmp_path: Path
) -> None:
    """Where the last alpha is not set to one, the native grid has one more interval than steps."""
    from dsno_cluster.teachers import compared_samplings

    path, _ = saved(unet, tmp_path, set_alpha_to_one=one, timestep_spacing="trailing")
    null = ["network.num_classes=4", "network.null_class=true"]
    native = "teacher.options={schedule: native, null_class: 4}"
    config = load_config(
        "configs/digits.yaml", experiment(path, *null, native, f"trajectories.guidance_scale={guidance}")
    )
    found = find_teacher(config)
    teacher = found.load()
    calls: list[Any] = []
    assert teacher.network is not None
    hook = teacher.network.register_forward_pre_hook(
        lambda _, inputs: calls.extend([1] * (len(inputs[0]) // 2))
    )
    solve_samples(spec_of(config, found), teacher, 0, range(2))  # guided, both halves are one batch
    hook.remove()
    assert len(calls) == (10 if one else 11) * int(guidance)
    assert make_plan(config).size.evaluations_per_sample == len(calls)
    rows = compared_samplings(config, find_teacher(config))
    counted = [row.evaluations for row in rows if row.as_trajectories]
    assert counted == [len(calls)]


def test_a_native_schedule_from_the_command_line(unet: Any, tmp_path: Path) -> None:
    path, _ = saved(unet, tmp_path, set_alpha_to_one=False, timestep_spacing="trailing")
    words = experiment(path, "teacher.options={schedule: native}", f"storage.root={tmp_path / 'root'}")
    planned = answer("plan", *words, "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["evaluations_per_sample"] == 11
    assert json.loads(planned.stdout)["note"] is None
    (file,) = Path(path).rglob("scheduler_config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clip_sample": True}))  # diffusers' default
    for more, told in (([], True), (["trajectories.clip_denoised=true"], False)):
        noted = answer("plan", *words, *more, cwd=tmp_path)
        assert ("unless trajectories.clip_denoised=true" in noted.stdout) == told, noted.stdout
    for command in ("plan", "gen-trajectories"):
        refused = answer(command, *words, "trajectories.steps=2000")
        assert refused.returncode == 2, refused.stderr
        assert "trajectories.steps: 2000 steps, but the model has 1000 levels" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


@pytest.mark.slow
def test_guided_trajectories_of_a_diffusers_model(unet: Any, tmp_path: Path) -> None:
    path, _ = saved(unet, tmp_path / "model", prediction_type="v_prediction")
    root = tmp_path / "root"
    null = ["network.num_classes=4", "network.null_class=true", "teacher.options={null_class: 4}"]
    words = experiment(path, *null, "trajectories.guidance_scale=3", "trajectories.dtype=float32")
    made = dsno("gen-trajectories", *words, f"storage.root={root}", "--launcher", "local", "--actors", "1")
    assert made.returncode == 0, made.stderr
    shard = safetensors.torch.load_file(next(root.glob("trajectories/*/shard-000001.safetensors")))
    teacher = load_teacher(path, options={"null_class": 4})
    noise, labels = sample_noise(0, range(2, 4), (3, 8, 8)), sample_labels(0, range(2, 4), 4)
    solver = load_config("configs/digits.yaml").trajectories.solver
    guided_states = solve(teacher, noise, [0.0], solver, 10, labels, guidance_scale=3.0)
    assert torch.equal(shard["labels"], labels)
    assert relative(shard["states"].transpose(0, 1), guided_states) < 1e-5
    assert relative(shard["states"].transpose(0, 1), solve(teacher, noise, [0.0], solver, 10, labels)) > 0.01


def test_diffusers_folders_that_are_refused(unet: Any, tmp_path: Path) -> None:
    path, _ = saved(unet, tmp_path / "a")

    def refused(match: str, config: dict[str, Any] | None = None, **options: Any) -> None:
        copy = tmp_path / "b"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
        file = copy / "unet" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
        with pytest.raises(UserError, match=match):
            load_teacher(str(copy), options=options)

    refused("unknown teacher option steps", steps=3)
    refused("schedule 'mine'", schedule="mine")
    refused("'UNet2DConditionModel' is not supported", {"_class_name": "UNet2DConditionModel"})
    refused("'fourier' takes the logarithm", {"time_embedding_type": "fourier"})
    refused("'learned' is not supported", {"time_embedding_type": "learned"})
    refused("'timestep' does not say how many classes", {"class_embed_type": "timestep"})
    refused("'identity' is not supported", {"class_embed_type": "identity"})
    refused("3 channels in, 4 out", {"out_channels": 4})
    refused("6 channels in, 3 out", {"in_channels": 6})
    refused("sample_size None", {"sample_size": None})
    refused("does not fit its config.json: .*class_embedding.weight has shape", {"num_class_embeds": 7})
    refused("beta_schedule is 'sigmoid', but scheduler/scheduler_config.json says", beta_schedule="sigmoid")
    refused("prediction_type is 'flow', but scheduler/scheduler_config.json says", prediction_type="flow")
    (tmp_path / "a/unet/diffusion_pytorch_model.safetensors").rename(tmp_path / "a/unet/model.ckpt")
    refused("no weights: .*found model.ckpt")
