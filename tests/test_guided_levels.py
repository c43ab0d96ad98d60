"""Guidance at some noise levels, in some channels and by a weaker teacher, against closed forms, and in configs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from edm_files import expected, snapshot
from teacher_models import one_thread as one_thread  # fixture
from teacher_models import relative
from test_guidance import counted
from tiny import TINY, answer, dsno
from torch import Tensor

from dsno_cluster import count_evaluations, load_teacher, solve
from dsno_cluster.config import load_config
from dsno_cluster.diffusion.guidance import Guidance, guided
from dsno_cluster.diffusion.schedule import alpha_sigma, noise_level, time_of_angle
from dsno_cluster.diffusion.solvers import SOLVERS, Method
from dsno_cluster.errors import UserError
from dsno_cluster.teachers import Teacher, find_teacher, gaussian_teacher, gaussian_trajectory
from dsno_cluster.teachers.of_config import load_of_config
from dsno_cluster.trajectories.solve_actor import check_teacher
from dsno_cluster.trajectories.spec import former_specs, read_spec, solve_shard, spec_of

MEAN, OTHER, STD, SCALE = 0.5, 0.2, 0.4, 3.0
MOVED = OTHER + SCALE * (MEAN - OTHER)  # the mean to which guidance by a Gaussian of the same width leads
GUIDE = [
    "teacher.guide=closed-form:gaussian",
    "teacher.guide_options={mean: 0.0, std: 1.0, shape: [1, 8, 8]}",
]
SCALED = "trajectories.guidance_scale=2.0"


def guided_gaussian(shape: tuple[int, int, int] = (1, 2, 2)) -> Teacher:
    return gaussian_teacher(MEAN, STD, shape).guided_by(gaussian_teacher(OTHER, STD, shape))


def noise_of(count: int, *shape: int) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_weaker_gaussian_moves_the_mean(solver: str) -> None:
    """x0 is linear in the mean, so the guided flow is that of a Gaussian at the moved mean."""
    noise = noise_of(8, 1, 2, 2)
    found = solve(guided_gaussian(), noise, [0.5, 0.0], solver, 256, guidance_scale=SCALE)
    exact = torch.stack([gaussian_trajectory(noise, t, MOVED, STD) for t in (0.5, 0.0)], dim=1)
    assert relative(found, exact) < (2e-2 if solver == "ddim" else 2e-3)
    unguided = solve(guided_gaussian(), noise, [0.5, 0.0], solver, 256)
    assert relative(unguided, exact) > 0.1


def exact_steps(noise: Tensor, pieces: list[tuple[float, float]]) -> Tensor:
    """The exact state at the last of the `pieces` (time, mean), each the flow of one Gaussian from the time before."""
    x, last = noise, 1.0
    for time, mean in pieces:
        widths = [float((a**2 * STD**2 + s**2).sqrt()) for a, s in map(alpha_sigma, (last, time))]
        before, after = (float(alpha_sigma(t)[0]) for t in (last, time))
        x, last = after * mean + (widths[1] / widths[0]) * (x - before * mean), time
    return x


def test_an_interval_guides_only_there() -> None:
    noise, high, low = noise_of(8, 1, 2, 2), 0.75, 0.25
    # guided at levels above low and up to high: the interval that begins at t is solved with the level of t
    interval = noise_level(low), noise_level(high)
    found = solve(
        guided_gaussian(), noise, [0.0], "ddim", 4096, guidance_scale=SCALE, guidance_interval=interval
    )[:, 0]
    exact = exact_steps(noise, [(high, MEAN), (low, MOVED), (0.0, MEAN)])
    assert relative(found, exact) < 2e-3
    for other in ([(high, MOVED), (low, MOVED), (0.0, MEAN)], [(high, MEAN), (low, MOVED), (0.0, MOVED)]):
        assert relative(exact_steps(noise, other), exact) > 1e-2


def test_the_ends_of_an_interval() -> None:
    """Above `low` and up to `high`, whatever rounding makes of them."""
    times = [time_of_angle(a) for a in (0.3, 0.7, 1.1)]
    for shift in (1.0, 1.0 + 1e-12, 1.0 - 1e-12):
        ends = noise_level(times[0]) * shift, noise_level(times[1]) * shift
        assert [Guidance(2.0, ends).acts(t) for t in times] == [False, True, False]
    assert Guidance(2.0).acts(0.3) and not Guidance(1.0).acts(0.3)


def test_guided_channels() -> None:
    noise = noise_of(4, 4, 2, 2)
    found = solve(
        guided_gaussian((4, 2, 2)), noise, [0.0], "heun", 256, guidance_scale=SCALE, guidance_channels=3
    )[:, 0]
    exact = torch.cat(
        [
            gaussian_trajectory(noise[:, :3], 0.0, MOVED, STD),
            gaussian_trajectory(noise[:, 3:], 0.0, MEAN, STD),
        ],
        dim=1,
    )
    assert relative(found, exact) < 2e-3


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("times", [(0.25, 0.0), (0.5, 0.25)], ids=["to the end", "before the end"])
def test_the_count_is_the_evaluations_that_were_made(solver: str, times: tuple[float, ...]) -> None:
    teacher = load_teacher("package:digits-teacher")
    noise, labels = noise_of(2, 1, 8, 8), torch.arange(2)
    sizes, counting = counted(teacher)
    for interval in ((0.0, 0.5), (0.4, 3.0), (2.0, 1e6), (1e5, 1e6)):
        solve(counting, noise, times, solver, 9, labels, 2.5, guidance_interval=interval)
        made = count_evaluations(solver, 9, 2.5, times, guidance_interval=interval)
        assert sum(sizes) == 2 * made
        inside = Method(solver, 9, guidance_scale=2.5, guidance_interval=interval).guided_evaluations(times)
        assert sizes.count(4) == inside
        sizes.clear()


def test_a_guide_without_classes_beside_a_network_with_them(tmp_path: Path) -> None:
    """EDM2's guidance: the guide's answer, and the way from it to the original network's."""
    right = expected("edm2_cond")
    teacher = load_teacher(snapshot("edm2_cond", tmp_path))
    for name in ("skip_vp", "ddpmpp_cond"):  # without classes, and with the same
        guide = load_teacher(snapshot(name, tmp_path))
        denoise = guided(teacher.guided_by(guide), right["labels"], Guidance(1.7))
        for i, sigma in enumerate(right["sigmas"].tolist()):
            y = right["x0"] + sigma * right["noise"]
            x, t = y / (1 + sigma**2) ** 0.5, time_of_angle(torch.tensor(sigma).double().atan().item())
            weak = guide(x, t, right["labels"] if guide.num_classes else None)
            assert relative(denoise(x, t), torch.lerp(weak, right["denoised"][:, i], 1.7)) < 1e-5
    with pytest.raises(UserError, match=r"states of 1x2x2, the teacher that it guides of 3x8x8"):
        teacher.guided_by(gaussian_teacher(0.0, 1.0, (1, 2, 2)))
    with pytest.raises(UserError, match=r"the guide has 3 classes, the teacher that it guides 0"):
        load_teacher(snapshot("skip_vp", tmp_path)).guided_by(teacher)


# ---- configs -------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str], str]] = {
    "reversed": ([SCALED, "trajectories.guidance_interval=[3, 0.3]"], "must be [low, high] in noise level"),
    "empty": ([SCALED, "trajectories.guidance_interval=[1, 1]"], "must be [low, high] in noise level"),
    "negative": ([SCALED, "trajectories.guidance_interval=[-1, 1]"], "must be [low, high] in noise level"),
    "three ends": ([SCALED, "trajectories.guidance_interval=[0, 1, 2]"], "trajectories.guidance_interval"),
    "no level": (
        [SCALED, "trajectories.guidance_interval=[1e5, 1e6]"],
        "has none of the noise levels at which the teacher is evaluated",
    ),
    "interval alone": (["trajectories.guidance_interval=[0.3, 3]"], "no effect with guidance_scale 1"),
    "channels alone": (["trajectories.guidance_channels=1"], "no effect with guidance_scale 1"),
    "no channels": ([SCALED, "trajectories.guidance_channels=0"], "trajectories.guidance_channels"),
    "all channels": ([SCALED, "trajectories.guidance_channels=1"], "must be below network.state_channels 1"),
    "guide alone": (GUIDE, "teacher.guide has no effect with trajectories.guidance_scale 1"),
    "options alone": (["teacher.guide_options={mean: 0}"], "guide_options are those of a guide"),
    "guide of nothing": ([*GUIDE, SCALED, "teacher.path=null"], "guide needs a teacher that it guides"),
    "no guide there": ([SCALED, "teacher.guide=/nowhere/at-all"], "teacher.guide: /nowhere/at-all"),
    "other states": (
        [SCALED, GUIDE[0], "teacher.guide_options={mean: 0, std: 1, shape: [1, 4, 4]}"],
        "teacher.guide: closed-form:gaussian has states of 1x4x4, the teacher that it guides of 1x8x8",
    ),
    "other option": ([SCALED, GUIDE[0], "teacher.guide_options={men: 0}"], "unknown teacher option men"),
}


@pytest.mark.parametrize("case", WRONG)
def test_guidance_that_cannot_be_is_one_line(case: str, tmp_path: Path) -> None:
    words, said = WRONG[case]
    found = answer("plan", *TINY, f"storage.root={tmp_path}", *words)
    assert found.returncode == 2 and found.stderr.count("\n") == 1 and said in found.stderr, found.stderr


def test_each_of_them_names_another_data_set() -> None:
    changes: list[list[str]] = [
        [],
        ["trajectories.guidance_interval=[0.3, 3]"],
        ["trajectories.guidance_interval=[0.3, 4]"],
        GUIDE,
        [GUIDE[0], GUIDE[1].replace("0.0", "0.1")],
    ]
    configs = [load_config("configs/digits.yaml", [SCALED, *change]) for change in changes]
    specs = [spec_of(config, find_teacher(config)) for config in configs]
    assert len({spec.hash for spec in specs}) == len(changes)
    for spec in specs:
        assert read_spec(spec.model_dump(mode="json"), "here") == spec
    assert "guide" not in specs[0].model_dump(mode="json")
    assert specs[1].joint_guidance and not specs[3].joint_guidance  # two networks are no batch
    assert former_specs(specs[3], find_teacher(configs[3])) == ()


def test_a_shard_is_made_with_the_guide() -> None:
    small = ["trajectories.num_samples=8", "trajectories.samples_per_shard=8", "trajectories.dtype=float32"]
    config = load_config("configs/digits.yaml", [*TINY, *small, SCALED, *GUIDE])
    spec = spec_of(config, find_teacher(config))
    loaded = load_of_config(config.teacher, None, precision="float32", compile=False)
    check_teacher(spec, loaded, "the teacher")
    made = solve_shard(spec, loaded, 0)["states"]
    assert torch.equal(made, solve_shard(spec, find_teacher(config).load(), 0)["states"])
    weak = gaussian_teacher(0.0, 1.0, (1, 8, 8))
    teacher = load_teacher("package:digits-teacher").guided_by(weak)
    from dsno_cluster.diffusion.noise import sample_labels, sample_noise

    settings = config.trajectories
    noise, labels = sample_noise(0, range(8), (1, 8, 8)), sample_labels(0, range(8), 10)
    right = solve(teacher, noise, settings.time_points, settings.solver, settings.steps, labels, 2.0)
    assert torch.allclose(made.transpose(0, 1), right, atol=1e-5)
    for other in (
        load_teacher("package:digits-teacher"),
        teacher.guided_by(gaussian_teacher(0.1, 1.0, (1, 8, 8))),
    ):
        with pytest.raises(UserError, match="other than planned: guide"):
            check_teacher(spec, other, "the teacher")


def test_the_plan_counts_and_times_both_networks() -> None:
    interval = "trajectories.guidance_interval=[0.3, 3]"
    plans: list[dict[str, Any]] = []
    import json

    for words in ([], [SCALED, *GUIDE], [SCALED, interval]):
        plans.append(json.loads(answer("plan", *TINY, *words, "--json").stdout))
    plain, both, some = (plan["evaluations_per_sample"] for plan in plans)
    assert both == 2 * plain and plain < some < both
    said = answer("plan", *TINY, SCALED, interval, *GUIDE).stdout
    assert f"guided by closed-form:gaussian at {some - plain} of {plain} noise levels" in said


@pytest.mark.slow
def test_the_whole_path_with_a_guide_and_an_interval(tmp_path: Path) -> None:
    words = [*TINY, SCALED, *GUIDE, "trajectories.guidance_interval=[0.1, 10]", f"storage.root={tmp_path}"]
    words += [
        "training.heldout_every=2",
        "training.heldout_samples=8",
        "name=guided",
        "training.picture_every=null",
    ]
    for command in ("gen-trajectories", "train", "eval"):
        done = dsno(command, *words, "--launcher", "local", timeout=600)
        assert done.returncode == 0, done.stderr
    measured = dsno("plan", *words, "--measure", "--probes", "4", timeout=600)
    assert measured.returncode == 0 and "guided by closed-form:gaussian at " in measured.stdout
    online = dsno(
        "train", *words, "name=online", "training.online=true", "reader.shuffle=none", "--launcher", "local"
    )
    assert online.returncode == 0, online.stderr
    weights = [
        sorted((tmp_path / "students" / name).glob("step-*/model.safetensors"))[-1].read_bytes()
        for name in ("guided", "online")
    ]
    assert len(weights[0]) == len(weights[1])
    drawn = dsno(
        "sample",
        str(tmp_path / "students" / "guided"),
        "--num",
        "4",
        "--refine",
        "2",
        "--out",
        str(tmp_path / "x.png"),
    )
    assert drawn.returncode == 0 and "network evaluations an image" in drawn.stderr + drawn.stdout


def test_pieces_of_the_exact_flow_are_one_flow() -> None:
    """The yardstick of the interval's test."""
    noise = noise_of(2, 1, 2, 2)
    pieces = exact_steps(noise, [(t, MEAN) for t in (0.75, 0.5, 0.0)])
    assert relative(pieces, gaussian_trajectory(noise, 0.0, MEAN, STD)) < 1e-5


# ---- a time for each sample -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "guidance",
    [
        Guidance(2.5),
        Guidance(2.5, joint=True),
        Guidance(2.5, (0.4, 3.0)),
        Guidance(2.5, (0.4, 3.0), channels=1, joint=True),
        Guidance(1.0),
    ],
    ids=["apart", "joint", "interval", "interval and joint", "none"],
)
@pytest.mark.parametrize("by_guide", [False, True])
def test_samples_at_times_of_their_own(guidance: Guidance, by_guide: bool) -> None:
    """One call with a time for each sample gives what each sample gets by itself."""
    teacher = load_teacher("package:digits-teacher")
    if by_guide:
        teacher = teacher.guided_by(gaussian_teacher(OTHER, STD, (1, 8, 8)))
    times = [0.0, 0.1, time_of_angle(math.atan(0.4)), 0.3, 0.6, time_of_angle(math.atan(3.0)), 0.9, 1.0]
    noise, labels = noise_of(8, 1, 8, 8), torch.arange(8)
    together = guided(teacher, labels, guidance)(noise, torch.tensor(times, dtype=torch.float64))
    for i, t in enumerate(times):
        by_itself = guided(teacher, labels[i : i + 1], guidance)(noise[i : i + 1], t)
        torch.testing.assert_close(together[i : i + 1], by_itself, rtol=1e-6, atol=1e-5)
    if guidance.interval is not None:  # of these eight it guides the three in the middle
        plain = guided(teacher, labels, Guidance())(noise, torch.tensor(times, dtype=torch.float64))
        moved = (together - plain).flatten(1).norm(dim=1) > 1e-3
        assert moved.tolist() == [False, False, False, True, True, True, False, False]


def test_a_time_for_each_sample_in_closed_form() -> None:
    """The guided Gaussian is the exact denoiser of a Gaussian at the moved mean, where guidance acts."""
    t_N = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    x, interval = noise_of(3, 1, 2, 2), (noise_level(0.3), noise_level(0.6))
    found = guided(guided_gaussian(), None, Guidance(SCALE, interval))(x, t_N)
    moved, still = (gaussian_teacher(mean, STD, (1, 2, 2))(x, t_N) for mean in (MOVED, MEAN))
    torch.testing.assert_close(found, torch.stack([still[0], moved[1], still[2]]), rtol=1e-5, atol=1e-6)
