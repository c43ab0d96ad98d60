"""The student: its forms of time, its backbones, the times it answers, and options that must not change its answers."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DATA, TINY, answer, dsno
from torch import Tensor

from dsno_cluster import load_student, load_teacher, solve
from dsno_cluster.config import Network, load_config
from dsno_cluster.diffusion.schedule import alpha_sigma, logsnr, time_points
from dsno_cluster.networks.temporal import TemporalConv, cosine_series, fourier_basis
from dsno_cluster.networks.unet import UNet
from dsno_cluster.students.dsno import DSNO, Form
from dsno_cluster.teachers.importing import import_weights
from dsno_cluster.training.beginning import new_student
from dsno_cluster.training.optim import drawn_points

PUBLISHED = DATA / "published"
SMALL = Network(
    image_size=8, channels=2, num_classes=3, width=32, multipliers=(1, 2), blocks_per_level=1,
    attention_resolutions=(4,), heads=2, embedding_dim=32,
)  # fmt: skip
QUARTERS = time_points("quadratic", 4)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def student_of(form: Form, times: tuple[float, ...] = QUARTERS, network: Network = SMALL) -> DSNO:
    """A student whose every weight is random: at initialisation several of its layers are nearly zero."""
    torch.manual_seed(0)
    student = DSNO(network, form, times)
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return student.eval().requires_grad_(False)


def question(count: int = 3, channels: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, channels, 8, 8), torch.arange(count) % 3


FORMS = {
    "published": Form(2),
    "published, data": Form(3, prediction="data"),
    "drawn": Form(2, prediction="data", points="drawn"),
    "no convolutions": Form(0, points="drawn"),
    "series": Form(4, operator="series", prediction="data"),
    "series of states": Form(3, operator="series"),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_sample_is_the_end_of_the_trajectory(form: Form) -> None:
    student, (noise, labels) = student_of(form), question()
    together = form.operator == "convolution" and form.points == "all"
    end = (
        student.trajectory(noise, labels)[:, -1]
        if together
        else student.trajectory(noise, labels, [0.0])[:, 0]
    )
    assert relative(student.sample(noise, labels), end) < 1e-5
    assert student.trajectory(noise, labels).shape == (3, 4, 2, 8, 8)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_student_is_written_and_read(form: Form, tmp_path: Path) -> None:
    from dsno_cluster.model_folder import AboutModel, write_model
    from dsno_cluster.storage import open_storage

    student, (noise, labels) = student_of(form), question()
    write_model(
        open_storage(str(tmp_path)), "s/", student.state_dict(), "", AboutModel(model=student.describe())
    )
    again = load_student(str(tmp_path / "s"))
    assert again.form == form
    assert relative(again.trajectory(noise, labels), student.trajectory(noise, labels)) < 1e-5


# ---- times ---------------------------------------------------------------------------------------------------


def test_a_finer_grid_keeps_the_curve_of_a_published_student(tmp_path: Path) -> None:
    """The operator is defined by Fourier modes: a curve of these modes is mapped alike from any uniform grid."""
    torch.manual_seed(0)
    conv = TemporalConv(5, 2).double()
    torch.nn.init.normal_(conv.weight)
    coefficients = torch.randn(3, 2, 5, 3, 3, dtype=torch.float64)

    def curve(points: int) -> Tensor:
        phase = 2 * math.pi * torch.arange(points, dtype=torch.float64) / points
        rows = torch.stack([torch.ones(points).double(), phase.cos(), phase.sin()], dim=1)
        return torch.einsum("pf,fnchw->npchw", rows, coefficients)

    coarse = conv(
        curve(4).flatten(0, 1), fourier_basis(tuple(i / 4 for i in range(4)), 2, 2, dtype=torch.float64)
    )
    fine = conv(
        curve(12).flatten(0, 1), fourier_basis(tuple(i / 12 for i in range(12)), 2, 2, dtype=torch.float64)
    )
    assert torch.allclose(coarse.unflatten(0, (2, 4)), fine.unflatten(0, (2, 12))[:, ::3], atol=1e-12)

    folder = PUBLISHED / "cifar_like"
    import_weights(str(folder / "solver-model_1000.pt"), str(folder / "config.yaml"), str(tmp_path / "s"))
    student = load_student(str(tmp_path / "s"))
    noise = torch.randn(2, *student.network.state_shape)
    own = student.trajectory(noise)
    # together with the others
    assert torch.equal(student.trajectory(noise, times=[0.25, 0.0]), own[:, [1, 3]])
    finer = time_points("quadratic", 8)
    answers = student.trajectory(noise, times=finer)
    assert answers.shape[1] == 8 and bool(answers.isfinite().all())
    between = student.trajectory(noise, times=[finer[2], 0.0])
    assert relative(between, answers[:, [2, 7]]) < 1e-5
    with pytest.raises(ValueError, match=r"0\.5625.*quadratic grids of 2 to 16"):
        student.trajectory(noise, times=[0.3])
    with pytest.raises(ValueError, match="within"):
        student.trajectory(noise, times=[1.5])


def test_a_trained_students_finer_curve_lies_between_its_own_points() -> None:
    """More points of a series at inference than in training: near the teacher's states there."""
    teacher = load_teacher("package:digits-teacher")
    torch.manual_seed(0)
    noise, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    fine = time_points("quadratic", 8)
    truth = solve(teacher, noise, fine, "abm3", 40, labels)
    config = ["student.operator=series", "student.prediction=data", "student.modes=4"]
    student = new_student(load_config("configs/digits.yaml", config))
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    for _ in range(60):  # learns these sixteen by heart, at four of the eight times
        loss = (student(noise, labels) - truth[:, 1::2]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    errors = [
        relative(student.eval().trajectory(noise, labels, [t])[:, 0], truth[:, i]) for i, t in enumerate(fine)
    ]
    assert max(errors[2::2]) < 1.5 * max(errors[1::2]) + 0.02, errors


def test_a_series_answers_any_time_and_holds_the_noise() -> None:
    student, (noise, labels) = student_of(FORMS["series"]), question()
    states = student.trajectory(noise, labels, [1.0, 0.7, 0.123, 0.7, 0.0])
    assert relative(states[:, 0], noise) < 1e-4  # alpha(1) is 4.5e-5, not 0
    assert torch.equal(states[:, 1], states[:, 3])
    values = cosine_series([0.0, 0.25, 1.0], 3)
    expected = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -1.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(values, expected, atol=1e-12)


def test_points_that_were_drawn_are_asked_alone_or_together() -> None:
    student, (noise, labels) = student_of(FORMS["drawn"]), question()
    pair = student.trajectory(noise, labels, [0.0, 0.25])
    assert relative(student.trajectory(noise, labels, [0.25, 0.0])[:, [1, 0]], pair) < 1e-6
    whole = student.trajectory(noise, labels)
    assert relative(student(noise, labels, [1, 3]), pair[:, [1, 0]]) < 1e-6
    assert relative(whole[:, [3, 1]], pair) > 1e-3  # the points asked for meet in the convolutions
    plain = student_of(FORMS["no convolutions"])
    assert (
        relative(plain.trajectory(noise, labels, [0.25])[:, 0], plain.trajectory(noise, labels)[:, 1]) < 1e-5
    )


def test_drawn_points_depend_on_seed_and_step_alone() -> None:
    draws = [drawn_points(3, step, 4, 0.5, 2) for step in range(4000)]
    assert draws == [drawn_points(3, step, 4, 0.5, 2) for step in range(4000)]
    assert all(d == sorted(set(d)) and set(d) <= set(range(4)) and len(d) in (1, 2) for d in draws)
    assert sum(len(d) == 2 for d in draws) / 4000 == pytest.approx(0.25, abs=0.03)
    assert sum(d == [3] for d in draws) / 4000 == pytest.approx(0.5 + 0.25 / 4, abs=0.03)
    assert [drawn_points(0, step, 4, 1.0, 4) for step in range(20)] == [[3]] * 20


# ---- at initialisation ---------------------------------------------------------------------------------------


def test_a_series_begins_as_the_teachers_step_from_the_noise() -> None:
    """x_t = alpha_t x0(x_1, 1) + sigma_t x_1: DDIM in one step."""
    teacher = load_teacher("package:digits-teacher")
    config = ["student.operator=series", "student.prediction=data", "student.modes=3"]
    student = new_student(load_config("configs/digits.yaml", config)).eval()
    noise, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    for t, state in zip(student.times, student.trajectory(noise, labels).unbind(1), strict=True):
        assert (
            relative(
                state, solve(teacher, noise, [t], "ddim", 1 if t == 0 else 2, labels, grid=[1.0, t])[:, 0]
            )
            < 1e-4
        )


@pytest.mark.parametrize("kind", ["published", "diffusers"])
def test_a_student_begins_as_a_teacher_of_x0(kind: str, tmp_path: Path) -> None:
    """At time t the student is the teacher's denoiser at t on the same input, for every t at once."""
    if kind == "published":
        path = str(PUBLISHED / "teacher_flax_x")
        more = [f"network={load_teacher(path).identity.network.model_dump_json()}"]
    else:
        path = diffusers_folder(tmp_path, "sample")
        more = ["student.backbone=diffusers", *DIFFUSERS_NETWORK]
    teacher = load_teacher(path)
    uniform = "trajectories.times={spacing: uniform, points: 4}"
    common = [
        f"teacher.path={path}",
        uniform,
        "trajectories.solver=ddim",
        "trajectories.steps=16",
        "data.name=null",
    ]
    config = load_config("configs/digits.yaml", [*common, *REFERENCE, *CONVOLUTION, *more])
    student = new_student(config).eval()
    channels, height, width = teacher.shape
    torch.manual_seed(0)
    x, labels = (
        torch.randn(2, channels, height, width),
        torch.tensor([1, 2]) if teacher.num_classes else None,
    )
    states = student.trajectory(x, labels)
    for i, t in enumerate(student.times):
        assert relative(states[:, i], teacher(x, t, labels)) < 2e-5, t
    published = new_student(
        load_config(
            "configs/digits.yaml",
            [*common, *REFERENCE, *CONVOLUTION, *more, "student.temporal_init=published"],
        )
    ).eval()
    assert relative(published.trajectory(x, labels), states) > 1e-4


CONVOLUTION = ["student.operator=convolution", "student.prediction=state", "student.modes=2"]
REFERENCE = ["evaluation.reference=x.npz", "evaluation.metrics=[trajectory_error]"]
DIFFUSERS_NETWORK = [
    "network={image_size: 8, channels: 2, num_classes: 3, width: 32, multipliers: [1, 2], blocks_per_level: 1, "
    "embedding_dim: 32}"
]


def diffusers_folder(tmp_path: Path, prediction: str) -> str:
    """A small UNet2DModel with attention on one side of each level, saved with its scheduler."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=2, out_channels=2, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8, attention_head_dim=8, num_class_embeds=3,
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "diffusers")
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction)
    scheduler.save_pretrained(tmp_path / "diffusers" / "scheduler")
    return str(tmp_path / "diffusers")


@pytest.mark.slow
def test_the_path_of_a_diffusers_student(tmp_path: Path) -> None:
    """Trajectories of a diffusers teacher, a student on its own network, and samples of it, by the commands."""
    path = diffusers_folder(tmp_path, "epsilon")
    words = [
        *TINY, f"storage.root={tmp_path}", f"teacher.path={path}", "data.name=null", *REFERENCE, *DIFFUSERS_NETWORK,
        "student.backbone=diffusers", "trajectories.clip_denoised=true", *CONVOLUTION,
    ]  # fmt: skip
    for command in ("gen-trajectories", "train"):
        done = dsno(command, *words, "--launcher", "local")
        assert done.returncode == 0, done.stderr
    student = load_student(str(tmp_path / "students/digits"))
    temporal = [name for name in student.state_dict() if ".temporal." in name]
    # two down, two times two up, the middle
    assert len(temporal) == 2 + 4 + 1
    noise, labels = question()
    assert relative(student.sample(noise, labels), student.trajectory(noise, labels)[:, -1]) < 1e-5
    assert (
        float((student.trajectory(noise, labels)[:, 0] - student.trajectory(noise, labels)[:, 3]).norm())
        > 1e-3
    )
    drawn = answer(
        "sample", str(tmp_path / "students/digits"), "--num", "2", "--out", str(tmp_path / "x.npz")
    )
    assert drawn.returncode == 0, drawn.stderr
    wrong = dsno("train", *words, "teacher.path=package:digits-teacher", "--launcher", "local", "name=x")
    assert wrong.returncode == 2, wrong.stderr


# ---- speed options that change nothing ------------------------------------------------------------------------


@pytest.mark.slow  # compiling takes most of a minute
@pytest.mark.parametrize("name", ["drawn", "series"])
def test_compiled_students_answer_the_same(name: str) -> None:
    form = FORMS[name]
    noise, labels = question(4)
    plain, compiled = student_of(form), student_of(form).accelerate(compile=True)
    assert relative(compiled.sample(noise, labels), plain.sample(noise, labels)) < 1e-4
    assert relative(compiled.trajectory(noise, labels), plain.trajectory(noise, labels)) < 1e-4


@pytest.mark.parametrize("name", ["published", "series"])
def test_bfloat16_is_close(name: str) -> None:
    form = FORMS[name]
    noise, labels = question(4)
    plain, half = student_of(form), student_of(form).accelerate(precision="bfloat16")
    found = half.sample(noise, labels)
    assert found.dtype == torch.float32
    assert 1e-6 < relative(found, plain.sample(noise, labels)) < 0.05


def test_what_does_not_depend_on_time_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first convolutions see N images, not N times M; the last sees N where the end alone is asked for."""
    student, (noise, labels) = student_of(FORMS["published"]), question()
    backbone = student.backbone
    assert isinstance(backbone, UNet)
    seen: dict[str, int] = {}

    def watch(name: str, module: torch.nn.Module) -> None:
        module.register_forward_hook(lambda _m, inputs, _o: seen.__setitem__(name, len(inputs[0])))

    watch("first", backbone.conv_in)
    first: Any = backbone.down[0]
    watch("block", first.blocks[0].residual.conv_in)
    watch("second", first.blocks[0].residual.conv_out)
    watch("last", backbone.conv_out)
    student.trajectory(noise, labels)
    assert seen == {"first": 3, "block": 3, "second": 12, "last": 12}
    student.sample(noise, labels)
    assert seen["last"] == 3 and seen["second"] == 12
    alone = student_of(FORMS["series"])
    watch("series", alone.backbone.conv_out)  # type: ignore[arg-type]
    alone.trajectory(noise, labels)
    assert seen["series"] == 3


# ---- configs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["student.operator=series", "student.modes=5"], "student.modes 5 is above 4 = M for M=4"),
        (["student.operator=convolution", "student.modes=4"], "above 3 = M//2+1"),
        (["student.operator=series", "student.modes=0"], "one term or more"),
        (["student.operator=series", "student.points=drawn"], "points drawn is for operator convolution"),
        (["training.most_points=5"], "most_points 5 is above M=4"),
        (
            ["student.operator=convolution", "student.modes=2", "student.points=drawn"],
            "student.points=drawn needs 2",
        ),
        (["student.operatr=series"], "did you mean student.operator"),
    ],
)
def test_students_that_cannot_be(words: list[str], says: str) -> None:
    from dsno_cluster.errors import UserError

    with pytest.raises(UserError, match=r"^configs/digits\.yaml: ") as raised:
        load_config("configs/digits.yaml", words)
    assert says in str(raised.value)


def test_levels_of_the_schedule_reach_the_network() -> None:
    """A student of one point without convolutions is its U-Net at that level."""
    student, (noise, labels) = student_of(Form(0), (0.0,)), question()
    level = logsnr(torch.tensor([0.0])).float()[None]
    assert torch.equal(student.sample(noise, labels), student.backbone(noise, level, labels)[:, 0])
    alpha, sigma = alpha_sigma(0.25)
    data, state = (student_of(Form(0, prediction=p), (0.25, 0.0)) for p in ("data", "state"))
    by_hand = float(alpha) * state.trajectory(noise, labels) + float(sigma) * noise[:, None]
    assert relative(data.trajectory(noise, labels)[:, 0], by_hand[:, 0]) < 1e-6


# ---- what went wrong once ---------------------------------------------------------------------------------------


def test_own_times_off_by_rounding_are_own_times() -> None:
    thirds = student_of(Form(1), (1 - 1 / 3, 1 - 2 / 3, 0.0))
    noise, labels = question()
    assert torch.equal(
        thirds.trajectory(noise, labels, [2 / 3, 1 / 3, 0.0]), thirds.trajectory(noise, labels)
    )
    fifths = student_of(Form(2), time_points("quadratic", 5))
    times = torch.tensor(fifths.times)  # float32
    assert torch.equal(fifths.trajectory(noise, labels, times), fifths.trajectory(noise, labels))
    near = fifths.trajectory(noise, labels, [0.64, 0.64 + 1e-9, 0.49 + 1e-9])
    assert torch.equal(near[:, 0], near[:, 1])


@pytest.mark.parametrize("name", ["published", "series"])
def test_inference_mode_leaves_nothing_that_training_trips_over(name: str) -> None:
    times = (0.81, 0.37, 0.0) if name == "published" else QUARTERS
    student = student_of(Form(1) if name == "published" else FORMS["series"], times).requires_grad_(True)
    noise, labels = question()
    with torch.inference_mode():
        student.sample(noise, labels)
        student.trajectory(noise, labels)
    student(noise, labels).mean().backward()


def test_states_of_bfloat16_are_float32_and_contiguous() -> None:
    noise, labels = question()
    for form in FORMS.values():
        student = student_of(form).accelerate(precision="bfloat16")
        for states in (student.trajectory(noise, labels), student.sample(noise, labels)):
            assert states.dtype == torch.float32 and states.is_contiguous()
    with pytest.raises(ValueError, match="one for each noise"):
        student.sample(noise, labels[:1])


def test_crowded_times_are_finite() -> None:
    student = student_of(Form(3, prediction="data", points="drawn"))
    states = student.trajectory(*question(), [0.25 - 1e-5 * i for i in range(7)])
    assert bool(states.isfinite().all())
    assert float(states.abs().max()) < 100


def test_a_copy_of_a_diffusers_student_is_its_own(tmp_path: Path) -> None:
    path = diffusers_folder(tmp_path, "sample")
    config = [
        *DIFFUSERS_NETWORK,
        *REFERENCE,
        f"teacher.path={path}",
        "data.name=null",
        "student.backbone=diffusers",
    ]
    form = ["student.operator=convolution", "student.modes=2", "student.temporal_init=published"]
    student = new_student(load_config("configs/digits.yaml", [*config, *form])).eval()
    noise, labels = question()
    before = student.trajectory(noise, labels)
    again = copy.deepcopy(student)
    assert torch.equal(again.trajectory(noise, labels), before)
    for name, parameter in again.named_parameters():
        if ".temporal." in name:
            parameter.data.zero_()
    assert not torch.allclose(again.trajectory(noise, labels), before)
    assert torch.equal(student.trajectory(noise, labels), before)


def test_without_convolutions_the_end_alone_is_computed() -> None:
    student, (noise, labels) = student_of(Form(0)), question()
    seen: list[int] = []
    last: Any = student.backbone.conv_out
    last.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    assert relative(student.sample(noise, labels), student.trajectory(noise, labels)[:, -1]) < 1e-5
    assert seen == [3, 12]
