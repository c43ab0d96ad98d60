"""What the hot loops do on a GPU, followed on pretended tensors: layouts hold, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edm_files import FEW_SNAPSHOTS, snapshot
from gpu_tensors import CUDA, Seen, channels_first, moved, pretended_gpu
from teacher_models import saved_unet
from tiny import DATA
from torch import Tensor, nn

from dsno_cluster import load_teacher, solve
from dsno_cluster.config import Network, load_config
from dsno_cluster.data import Split
from dsno_cluster.diffusion.solvers import SOLVERS
from dsno_cluster.networks.descriptions import ADMDescription
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.networks.normalization import in_any_layout
from dsno_cluster.networks.unet import UNet
from dsno_cluster.students.dsno import DSNO, Form
from dsno_cluster.teachers import Teacher, find_teacher, teacher_info
from dsno_cluster.teachers.fake_score import trainable_copy
from dsno_cluster.teachers.identity import UNetDescription
from dsno_cluster.teachers.unet_denoiser import unet_info, unet_teacher
from dsno_cluster.training.objectives.distribution import DistributionObjective, Matching
from dsno_cluster.training.objectives.trajectories import TrajectoryObjective
from dsno_cluster.training.real_images import RealImages
from dsno_cluster.training.train_teacher import velocity_loss
from dsno_cluster.trajectories.reader import Batch

TIMES = (0.5, 0.25, 0.1, 0.0)
FORMS = {
    "convolution": Form(3),
    "drawn": Form(3, points="drawn"),
    "series": Form(4, "series", "data"),
}


def network(classes: int = 0) -> Network:
    return Network(
        image_size=16,
        channels=3,
        width=32,
        multipliers=(1, 2),
        blocks_per_level=1,
        embedding_dim=64,
        attention_resolutions=(8,),
        heads=2,
        num_classes=classes,
        null_class=bool(classes),
    )


DIFFUSERS = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 8,
    "num_class_embeds": 11,
}
SCHEDULER = {
    "prediction_type": "epsilon",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "trained_betas": None,
}


@pytest.fixture(autouse=True)
def attention_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernels of a GPU return; on pretended tensors torch takes the slow way, which copies."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.empty_like(v.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)


def seen_by(call: Callable[[], object]) -> Seen:
    """What a call does that is not its first: what it keeps on the device it has copied there before."""
    for _ in range(2):
        with Seen() as seen:
            call()
    return seen


@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("form", FORMS)
def test_a_student(form: str, classes: int) -> None:
    student = DSNO(network(classes), FORMS[form], TIMES)
    labels = torch.tensor([0, 1, 2, 3]) if classes else None
    with pretended_gpu():
        moved(student)
        noise = torch.empty(4, 3, 16, 16, device=CUDA)
        wrong = channels_first(student)
        seen = seen_by(lambda: student(noise, labels, [0, 2, 3]))
        drawn = seen_by(lambda: student.sample(noise, labels))
    assert not wrong
    assert not seen.waits and not drawn.waits
    # the noise on its way in, the copies for each point in the first block and of its skips, the states on their way out
    assert sum(seen.copies.values()) <= 5, seen.copies


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("count", [4, 16])  # of four points each: diffusers treats 64 images differently
def test_a_student_with_the_network_of_diffusers(count: int, training: bool) -> None:
    pytest.importorskip("diffusers")
    model = DiffusersModel(config=DIFFUSERS | {"dropout": 0.1}, scheduler=SCHEDULER)
    student = DSNO(network(11), Form(2), TIMES, backbone=model).train(training)
    assert all(m.training is training for m in student.modules() if isinstance(m, nn.Dropout))
    labels = torch.tensor([0, 1, 2, 3]).repeat(count // 4)
    with pretended_gpu():
        moved(student)
        noise = torch.empty(count, 3, 16, 16, device=CUDA)
        wrong = channels_first(student)
        seen = seen_by(lambda: student(noise, labels))
    assert not wrong and not seen.waits


ON_TEACHERS = [("ddpmpp_cond", 8), ("edm2_cond", 8), ("adm", 16)]


@pytest.mark.parametrize(
    ("name", "side", "form"),
    [*((*case, form) for case in ON_TEACHERS for form in ("convolution", "series")), ("dit", 8, "series")],
)
def test_a_student_with_the_network_of_its_teacher(name: str, side: int, form: str, tmp_path: Path) -> None:
    adm = {"num_head_channels": 8, "new_attention_order": False, "beta_schedule": "linear", "image_size": 16}
    options = {"adm": adm, "dit": {"family": name, "num_heads": 4}}.get(name)
    path = (
        str(DATA / "state_dicts" / name / "weights.pt")
        if name in ("adm", "dit")
        else snapshot(name, tmp_path)
    )
    info = teacher_info(path, options=options)
    assert info.shape is not None and info.num_classes is not None
    channels = info.shape[0]
    states = Network(state_size=side, state_channels=channels, num_classes=info.num_classes)
    student = DSNO(states, FORMS[form], TIMES, backbone=info.backbone)
    labels = torch.tensor([0, 1, 2, 2])
    with pretended_gpu():
        moved(student)
        noise = torch.empty(4, channels, side, side, device=CUDA)
        wrong = channels_first(student)
        seen = seen_by(lambda: student(noise, labels, [0, 2, 3]))
        drawn = seen_by(lambda: student.sample(noise, labels))
    assert not wrong
    assert not seen.waits and not drawn.waits
    # the noise on its way in, its copies for each point, the states on their way out, and a transformer's tokens put together
    assert sum(seen.copies.values()) <= 4, seen.copies


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_teacher(solver: str) -> None:
    description = UNetDescription(network=network(10), prediction="both")
    weights = UNet(description.network, out_channels=6).state_dict()
    teacher = unet_teacher(
        unet_info("here", description, "0" * 64, None), description, weights, "float32", "here"
    )
    wrong, seen = solved(teacher, solver)
    assert not wrong and not seen.waits


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DDIMScheduler", {}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        ("EDMEulerScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {}),
    ],
    ids=["betas", "zero terminal SNR", "EDM", "flow"],
)
def test_a_teacher_of_diffusers(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    diffusers.UNet2DModel(**DIFFUSERS).save_pretrained(tmp_path)
    getattr(diffusers, name)(**settings).save_pretrained(tmp_path)
    wrong, seen = solved(load_teacher(str(tmp_path), options={"null_class": 10}), "heun")
    assert not wrong and not seen.waits


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("family", ["openai-adm", "openai-edm"])
def test_a_teacher_of_openai(tmp_path: Path, family: str, film: bool) -> None:
    learned_variance = family == "openai-adm"
    described = ADMDescription(
        channels=3,
        out_channels=6 if learned_variance else 3,
        features=32,
        widths=(32, 64),
        blocks_per_level=1,
        attention_levels=(1,),
        num_classes=4,
        film=film,
        resample="block" if film else "convolution",
        heads=2,
    )
    saved_unet(tmp_path / "model.pt", described)
    options = {"family": family, "num_heads": 2, "new_attention_order": True, "image_size": 16}
    options |= {"beta_schedule": "linear"} if learned_variance else {}
    teacher = load_teacher(str(tmp_path / "model.pt"), options=options)
    wrong, seen = solved(teacher, "heun")
    # the state on its way in, at each of five evaluations, and no activation
    assert not wrong and not seen.waits and sum(seen.copies.values()) <= 5, seen


@pytest.mark.parametrize("family", ["dit", "sit"])
def test_a_teacher_of_transformers(family: str) -> None:
    path = str(DATA / "state_dicts" / family / "weights.pt")
    teacher = load_teacher(path, options={"family": family, "num_heads": 4})
    wrong, seen = solved(teacher, "heun")
    # the state on its way in and the tokens put together to a state, at each of ten evaluations, and no activation
    assert not wrong and not seen.waits and sum(seen.copies.values()) <= 20, seen


@pytest.mark.parametrize("name", FEW_SNAPSHOTS)
def test_a_teacher_of_edm(name: str, tmp_path: Path) -> None:
    wrong, seen = solved(load_teacher(snapshot(name, tmp_path)), "heun-edm")
    assert not wrong and not seen.waits
    # activations are not copied: only the images on their way in, and filters of resampling
    assert not [copy for copy in seen.copies if ", 3, 8, 8)" not in copy and ", 1, 4, 4)" not in copy]


def solved(teacher: Teacher, solver: str) -> tuple[list[str], Seen]:
    """What solving does, with guidance if there is a null class: modules that are channels-first, and waits and copies."""
    labels = torch.tensor([0, 1, 2, 3]) if teacher.num_classes else None
    scale = 1.0 if teacher.null_class is None else 2.0
    assert teacher.network is not None
    teacher.network.to(memory_format=torch.channels_last)  # as `Teacher.to` does
    with pretended_gpu():
        moved(teacher.network)
        noise = torch.empty(4, *teacher.shape, device=CUDA)
        there = None if labels is None else labels.to(CUDA)
        wrong = channels_first(teacher.network)
        return wrong, seen_by(
            lambda: solve(teacher, noise, [0.5, 0.0], solver, 3, there, guidance_scale=scale)
        )


def test_the_loss_of_a_step() -> None:
    """On points that are drawn: the student, its labels, the distances and the step's figures."""
    config = load_config(
        "configs/digits.yaml",
        ["student={operator: convolution, modes: 3, points: drawn}", "training.most_points=3"],
    )
    times, shape = config.trajectories.time_points, config.network.state_shape
    student = DSNO(config.network, Form(3, points="drawn"), times)
    states, labels = torch.zeros(4, len(times), *shape), torch.tensor([0, 1, 2, 3])
    objective = TrajectoryObjective(config, torch.device("cpu"))
    objective.device = CUDA
    with pretended_gpu():
        objective.weights_on_device_M = objective.weights_M.to(CUDA)
        moved(student)
        batch = Batch(np.arange(4), torch.zeros(4, *shape), states, labels)
        seen = seen_by(lambda: objective.loss(student, batch, 7))
    assert not seen.waits


MATCHED = {  # and what is copied in one update of either network: labels, real images and theirs, labels of an anchor
    "gradient": (["training.distribution={adversarial_weight: 0.05, trajectory_weight: 0.1}"], 3 + 2),
    "samples only": (["training.distribution={adversarial_weight: 0.05}"], 3 + 1),
    "score-identity": (
        [
            "training.distribution={matching: score-identity, adversarial_weight: 0}",
            "trajectories.guidance_scale=1.5",
            "trajectories.guidance_interval=[0.1, 2.0]",
        ],
        1 + 1,
    ),
}


@pytest.mark.parametrize("terms", MATCHED)
@pytest.mark.parametrize("form", FORMS)
def test_the_losses_of_distribution_matching(
    form: str, terms: str, pinned: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the fake score network and of the student; one of the published form computes all points together."""
    # torch does not go backward on a GPU that is not there
    monkeypatch.setattr(torch.autograd, "grad", lambda _loss, x: (torch.zeros_like(x),))
    described = ", ".join(f"{key}: {value}" for key, value in asdict(FORMS[form]).items())
    settings, copied = MATCHED[terms]
    config = load_config(
        "configs/digits.yaml",
        [
            f"student={{{described}}}",
            "training.most_points=3",
            "training.objective=distribution",
            *settings,
        ],
    )
    times, shape = config.trajectories.time_points, config.network.state_shape
    found = find_teacher(config)
    student, fake_score = DSNO(config.network, FORMS[form], times), trainable_copy(found, seed=0)
    teacher = found.load(compile=False)
    assert teacher.network is not None
    labels = torch.tensor([0, 1, 2, 3])

    def drawn(indices: Sequence[int]) -> Tensor:
        return torch.zeros(len(indices), *shape)

    with pretended_gpu():
        for network in (student, fake_score, teacher.network):
            moved(network)
        real = RealImages(50, 0, "", drawn, drawn, drawn, torch.zeros(50, dtype=torch.int64))
        objective = DistributionObjective(config, Matching(teacher, fake_score, real), None, CUDA)
        batch = Batch(np.arange(4), drawn(labels), torch.zeros(4, len(times), *shape), labels)
        learning = seen_by(lambda: objective.fake_loss(student, fake_score, batch, 7, 0))
        step = seen_by(lambda: objective.loss(student, batch, 7))
    assert not learning.waits and not step.waits
    assert len(pinned) == 2 * copied


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that are put into pinned memory, which is only pretended."""
    found: list[Tensor] = []

    def pin(x: Tensor) -> Tensor:
        found.append(x)
        return x

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    return found


def test_the_loss_of_a_teacher(pinned: list[Tensor]) -> None:
    """The images are on the GPU; what is drawn for a step on the CPU is copied there from pinned memory."""
    config = load_config("configs/digits.yaml", ["teacher_training.label_dropout=0.1"])
    unet = UNet(config.network)
    with pretended_gpu():
        moved(unet)
        data = Split(torch.empty(50, 1, 8, 8, device=CUDA), torch.zeros(50, dtype=torch.int64, device=CUDA))
        seen = seen_by(lambda: velocity_loss(unet, data, config, 7))
    assert not seen.waits and len(pinned) == 2 * 4


@pytest.mark.parametrize("with_film", [False, True])
def test_group_norm_in_any_layout_is_that_of_torch(with_film: bool) -> None:
    torch.manual_seed(0)
    norm = nn.GroupNorm(4, 16, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x_NCHW = (torch.randn(3, 16, 5, 7) + 2.0).contiguous(memory_format=torch.channels_last)
    film_BD = torch.randn(6, 32) if with_film else None
    expected = norm(x_NCHW)
    if film_BD is not None:
        scale, shift = film_BD[:, :, None, None].chunk(2, dim=1)
        expected = expected.repeat_interleave(2, dim=0) * (scale + 1.0) + shift
    found = in_any_layout(norm, x_NCHW, film_BD)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    sequence_NCL = torch.randn(2, 16, 9)
    torch.testing.assert_close(
        in_any_layout(norm, sequence_NCL, None), norm(sequence_NCL), atol=1e-5, rtol=1e-5
    )
