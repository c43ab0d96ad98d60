"""Memory of training: the estimate against what torch's allocator counts, and the choice of a micro-batch by it."""

from __future__ import annotations

import pytest
import torch
from test_gpu_layout import DIFFUSERS, SCHEDULER
from tiny import TINY
from torch.profiler import ProfilerActivity, profile

from dsno_cluster.config import Config, load_config
from dsno_cluster.networks.diffusers_model import DiffusersModel
from dsno_cluster.students.dsno import DSNO
from dsno_cluster.training.beginning import make_student
from dsno_cluster.training.memory import (
    activation_bytes,
    denoising_network,
    held_bytes,
    matching_bytes,
    most_points,
    parameter_count,
    training_memory,
)
from dsno_cluster.training.objectives.losses import l1

SERIES: list[str] = []
PUBLISHED = ["student={operator: convolution, modes: 3, points: all}"]
IMAGES = 32


def configured(*more: str) -> Config:
    return load_config("configs/digits.yaml", [*TINY, *more])


def counted_by_the_allocator(config: Config, images: int) -> int:
    """The peak of a real forward and backward pass, as torch's profiler saw each allocation."""
    student = make_student(config, None).accelerate(precision=config.training.precision)
    student.recompute(config.training.recompute)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    points, shape = most_points(config), config.network.state_shape
    labels = torch.zeros(images, dtype=torch.int64)

    def train() -> None:
        noise, target = torch.zeros(images, *shape), torch.zeros(images, len(points), *shape)
        l1(student(noise, labels, points).float(), target).mean().backward()

    train()  # the first pass also makes what is kept for later ones
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        train()
    now = peak = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


@pytest.mark.parametrize("form", [SERIES, PUBLISHED], ids=["series", "published"])
@pytest.mark.parametrize(
    ("precision", "recompute"),
    [
        ("bfloat16", "cheap"),
        *(pytest.param("float32", what, marks=pytest.mark.slow) for what in ("none", "cheap", "blocks")),
        *(pytest.param("bfloat16", what, marks=pytest.mark.slow) for what in ("none", "blocks")),
    ],
)
def test_activations_are_those_that_the_allocator_counts(
    precision: str, recompute: str, form: list[str]
) -> None:
    config = configured(*form, f"training.precision={precision}", f"training.recompute={recompute}")
    real = counted_by_the_allocator(config, IMAGES)
    # with little kept, the scratch memory of the kernels of one block shows, which no operation does
    tolerance = 0.2 if recompute == "blocks" else 0.15
    memory = training_memory(config, micro_batch=IMAGES, device="cpu")
    assert memory.activations == pytest.approx(real, rel=tolerance)


def test_estimates_and_real_passes_do_not_meet() -> None:
    """The levels of a diffusers model are kept from one evaluation to the next, but not those of an estimate."""
    pytest.importorskip("diffusers")
    sizes = "network={state_size: 16, state_channels: 3, num_classes: 11}"
    config = configured(sizes, "student.backbone=teacher", "data.name=null", "evaluation.reference=x.npz",
                        "evaluation.metrics=[trajectory_error]")  # fmt: skip
    model = DiffusersModel(config=DIFFUSERS, scheduler=SCHEDULER)
    student = make_student(config, model)
    noise, labels = torch.zeros(1, *config.network.state_shape), torch.tensor([0])
    before = student(noise, labels)
    assert training_memory(config, backbone=model, device="cpu").activations > 0
    assert torch.equal(student(noise, labels), before)


MATCHED = ["training.objective=distribution"]


def test_what_distribution_matching_adds() -> None:
    """The fake score network takes what the student does, without an average; the teacher takes its weights only."""
    student = training_memory(configured(), device="cpu")
    matched = training_memory(configured(*MATCHED), device="cpu")
    copy = sum(p.numel() for p in denoising_network(configured(), None).parameters())
    assert matched.fake_score == 4 * 4 * copy and matched.teacher == 4 * copy
    assert matched.held == student.held + matched.fake_score + matched.teacher
    # the copy sees samples and as many real images; without the adversarial loss, only the samples
    alone = training_memory(configured(*MATCHED, "training.distribution.adversarial_weight=0"), device="cpu")
    assert matched.per_image >= alone.per_image > student.per_image / 2
    half = training_memory(configured(*MATCHED, "teacher.precision=bfloat16"), device="cpu")
    assert half.teacher == matched.teacher // 2


def test_recomputing_saves_memory_of_the_fake_score_network_too() -> None:
    """It is the larger holder, as it sees real images beside as many samples."""
    kept, recomputed = (
        training_memory(configured(*MATCHED, f"training.recompute={what}"), device="cpu").per_image
        for what in ("none", "blocks")
    )
    assert recomputed < 0.6 * kept


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_divide_the_fake_score_network(stage: int) -> None:
    config = configured(*MATCHED, f"training.zero_stage={stage}")
    copy = sum(p.numel() for p in denoising_network(config, None).parameters())
    expected = {1: 4 + 4 + 3, 2: 4 + 1 + 3, 3: 1 + 1 + 3}[stage]
    exchanged = {1: 4, 2: 4, 3: 12}[stage]
    found = matching_bytes(config, 4, None)["fake_score"]
    assert found == pytest.approx((expected + exchanged) * copy, rel=1e-3)


def test_an_estimate_leaves_nothing_behind() -> None:
    config = configured()
    activation_bytes(config, 2)
    student = DSNO.trajectory(make_student(config, None), torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]))
    assert type(student) is torch.Tensor and bool(student.isfinite().all())


def test_what_is_held_by_stage() -> None:
    """Bytes of weights, gradients, optimiser and averages for each parameter, on 4 ranks (ZeRO, figure 1, float32)."""
    expected = {0: (4, 4, 8, 1), 1: (4, 4, 3, 1), 2: (4, 1, 3, 1), 3: (1, 1, 3, 1)}
    for stage, parts in expected.items():
        held = held_bytes(configured(f"training.zero_stage={stage}"), 4, 1000)
        assert [held[x] / 1000 for x in ("weights", "gradients", "optimizer", "averages")] == list(parts)
    alone = held_bytes(configured("training.zero_stage=3"), 1, 1000)
    assert alone["optimizer"] == 8000 and alone["buffers"] == 0  # one rank has nothing to partition


def test_the_parts_make_the_whole() -> None:
    memory = training_memory(configured("training.accumulation=2"), ranks=2)
    assert memory.micro_batch == 4 and memory.weights == 4 * parameter_count(configured())
    assert memory.total == memory.held + memory.fixed + 4 * memory.per_image > memory.held > 0
