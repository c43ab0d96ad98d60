"""What `plan` says of precision, memory, training and evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_tensors import pretended_gpu
from tiny import TINY, answer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dsno_cluster import load_teacher
from dsno_cluster.config import load_config
from dsno_cluster.diffusion.accuracy import relative_errors
from dsno_cluster.evaluation.forecast import (
    Evaluation,
    Stages,
    Training,
    estimate_memory,
    measure_evaluation,
    measure_training,
    report,
    seconds_of_one,
)
from dsno_cluster.features.extractors import load_fid_extractor
from dsno_cluster.networks.activations import inference_elements, shape_of
from dsno_cluster.networks.unet import UNet
from dsno_cluster.teachers import compared_samplings
from dsno_cluster.torch_internals import LiveMemory
from dsno_cluster.training.memory import training_memory
from dsno_cluster.trajectories.plan import Cost, Found, make_plan
from dsno_cluster.trajectories.precision import (
    PrecisionCost,
    as_values,
    measure_faster,
    measure_precision,
    report_precision,
    verdict,
)
from dsno_cluster.trajectories.spec import solve_samples, spec_of

HALF = ["teacher.precision=bfloat16", "teacher.compile=false"]
CPU = torch.device("cpu")
COST = Cost("a chip", 1e-3, 1.0, 1, 1.0)


def test_the_cost_of_a_precision_is_the_difference_of_its_states() -> None:
    config = load_config("configs/digits.yaml", [*TINY, *HALF])
    plan = make_plan(config)
    teacher = plan.teacher.load()
    found = measure_precision(plan, teacher, 8)
    assert found is not None and found.name == "bfloat16"
    exact = load_teacher("package:digits-teacher")
    spec = spec_of(config, plan.teacher)
    half, whole = (solve_samples(spec, one, config.seed, range(8))[0] for one in (teacher, exact))
    expected = relative_errors(half, whole)
    assert list(found.relative_error.values()) == pytest.approx(expected, rel=1e-5)
    assert all(1e-4 < error < 0.05 for error in expected)
    assert list(found.relative_error) == ["0.5625", "0.25", "0.0625", "0.0"]


def test_float32_costs_nothing_and_tf32_nothing_on_a_cpu() -> None:
    plan = make_plan(load_config("configs/digits.yaml", TINY))
    assert measure_precision(plan, plan.teacher.load(), 2) is None
    tf32 = make_plan(load_config("configs/digits.yaml", [*TINY, "teacher.precision=tf32"]))
    found = measure_precision(tf32, tf32.teacher.load(), 2)
    assert found is not None and set(found.relative_error.values()) == {0.0}


@pytest.mark.slow
def test_what_bfloat16_would_gain_is_measured_beside_float32() -> None:
    plan = make_plan(load_config("configs/digits.yaml", TINY))
    found = measure_faster(plan, plan.teacher.load(), 4)
    assert found is not None and found.compiled and found.seconds_per_evaluation
    assert all(1e-4 < error < 0.05 for error in found.relative_error.values())
    lines = report_precision(None, found, Found(COST, dict.fromkeys(found.relative_error, 0.5)))
    assert lines[0].startswith("note          teacher.precision=bfloat16 takes ")


def test_nothing_is_offered_where_there_is_no_network_or_no_float32() -> None:
    for words in (HALF, ["teacher.path=closed-form:mixture"]):
        options = "{means: [0.5, -0.5], stds: 0.25, shape: [1, 8, 8], classes: [0, 1], null_class: true}"
        more = [] if words == HALF else [f"teacher.options={options}", "network.num_classes=2"]
        plan = make_plan(load_config("configs/digits.yaml", [*TINY, *words, *more]))
        assert measure_faster(plan, plan.teacher.load(), 2) is None


@pytest.mark.parametrize(
    ("error", "solver", "said"),
    [
        (0.001, 0.02, "below a tenth of the solver's error"),
        (0.003, 0.02, "below a tenth of 0.1, the error of a good student"),
        (0.003, None, "below a tenth of 0.1, the error of a good student"),
        (0.02, 0.02, "above a tenth of 0.1"),
        (0.02, 0.5, "below a tenth of the solver's error"),
    ],
)
def test_an_error_of_precision_is_judged_beside_the_others(
    error: float, solver: float | None, said: str
) -> None:
    cost = PrecisionCost("bfloat16", True, {"0.5": error / 2, "0.0": error}, 2.5e-4)
    of_solver = None if solver is None else {"0.5": solver, "0.0": solver}
    assert said in verdict(cost, of_solver)
    told = "\n".join(report_precision(cost, cost, Found(COST, of_solver)))
    assert told.count(said) == 2 and "bfloat16, compiled: relative error at t: 0.5" in told
    assert "0.00025 s an evaluation here, 4 times as fast as float32" in told
    values = as_values(cost, None, of_solver)
    assert values["faster_precision"] is None
    assert json.loads(json.dumps(values))["precision"]["relative_error"]["0.0"] == error


@pytest.mark.parametrize("name", ["digits", "mnist32", "cifar10", "imagenet64"])
def test_memory_of_a_forward_pass_is_about_what_lives_together(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = load_config(f"configs/{name}.yaml").network
    shape = shape_of(network)
    assert shape is not None
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v: torch.empty_like(v)
    )
    with pretended_gpu(), torch.no_grad():
        unet = UNet(network)
        labels = torch.zeros(2, dtype=torch.int64) if network.num_classes else None
        noise, level = torch.empty(2, *network.state_shape), torch.empty(2, 1)
        with LiveMemory() as live:
            unet(noise, level, labels)
    assert 0.6 < 2 * 4 * inference_elements(shape) / live.peak < 1.4


def test_plan_says_memory_and_what_is_not_measured() -> None:
    told = answer("plan", *TINY)
    assert told.returncode == 0, told.stderr
    assert "memory        about " in told.stdout and "images of the teacher" in told.stdout
    assert "training      0.8 M parameters, 4 steps of 16 images: 64 in all" in told.stdout
    assert "hours of training and of eval: not measured; --measure does" in told.stdout
    values = json.loads(answer("plan", *TINY, "--json").stdout)
    assert values["training"] is None and values["evaluation"] is None and values["precision"] is None
    assert values["memory"]["student_parameters"] == 828_740
    twice = json.loads(
        answer("plan", *TINY, "--json", "trajectories.guidance_scale=2", "evaluation.batch_size=100").stdout
    )
    for batch in ("teacher_batch", "student_batch"):  # twice the images, the same weights
        assert 1.3 < twice["memory"][batch] / values["memory"][batch] < 2


@pytest.mark.slow
def test_hours_follow_from_passes_that_are_timed() -> None:
    config = load_config("configs/digits.yaml", TINY)
    plan = make_plan(config)
    training = measure_training(config, plan, CPU, 4, gpus=False)
    memory = training_memory(config, ranks=4, device="cpu")
    assert (training.bytes, training.held_bytes) == (memory.total, memory.held) and training.micro_batch == 4
    assert training.seconds_per_image > 0
    assert training.device_hours == pytest.approx(training.seconds_per_image * 64 / 3600)
    assert training.wall_hours == pytest.approx(training.device_hours / 4)
    evaluation = measure_evaluation(config, plan, CPU, 0.5, 2)
    assert evaluation.seconds_per_features is not None
    calls = 200 * sum(row.evaluations for row in compared_samplings(config, plan.teacher))
    calls += 20 * plan.size.evaluations_per_sample
    ours = 220 * evaluation.seconds_per_sample + 4 * 200 * evaluation.seconds_per_features
    assert evaluation.device_hours == pytest.approx((0.5 * calls + ours) / 3600)
    assert evaluation.wall_hours == pytest.approx(evaluation.device_hours / 2)
    lines = "\n".join(report(config, estimate_memory(config, plan.teacher), Stages(training, evaluation)))
    assert "on each of 4 rank(s)" in lines and "its features" in lines and "not measured" not in lines


MATCHED = ["finish.enabled=true", "finish.distribution={}"]
FRECHET = ["finish.enabled=true"]


def test_plan_says_what_finishing_takes() -> None:
    """As a line of its own; `finish` that is not enabled changes nothing."""
    plain, finished = (answer("plan", *TINY, *more).stdout for more in ([], FRECHET))
    assert "finishing" not in plain
    line = "finishing     300 steps of 512 images: 153,600 in all\n"
    assert line in finished and finished.replace(line, "") == plain


class Operations(TorchDispatchMode):
    """Counts the floating-point operations of products and convolutions; torch's own counter allows no `autograd.grad`."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            self.count += flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def counted(call: Callable[[int], None], most: int) -> float:
    """In place of the seconds of a call: its operations for one image."""
    with Operations() as operations:
        call(2)
    return operations.count / 2


def test_plan_says_what_finishing_cannot_learn_from() -> None:
    extractor = ["evaluation.feature_extractor=inception-v3-clean", "evaluation.metrics=[trajectory_error]"]
    planned = answer("plan", *TINY, *FRECHET, *extractor, "finish.further_metrics=[]")
    assert planned.returncode == 2
    assert "not usable    finish.distribution.frechet_weight: inception-v3-clean resizes" in planned.stdout


def test_the_hours_of_finishing_are_those_of_its_own_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fake score network: its updates, the samples for them, the teacher and the step of the student itself."""
    monkeypatch.setattr("dsno_cluster.evaluation.forecast.seconds_of_one", counted)
    plan = make_plan(load_config("configs/digits.yaml", TINY))
    costs = {}
    for name, words in {
        "plain": [],
        "matched": MATCHED,
        "fewer updates": ["finish.enabled=true", "finish.distribution={fake_updates: 1}"],
        "frechet": FRECHET,
        "recomputed": [*MATCHED, "training.recompute=blocks"],
    }.items():
        config = load_config("configs/digits.yaml", [*TINY, *words])
        costs[name] = measure_training(config.finished or config, plan, CPU, 1, gpus=False)
    plain, matched, fewer, frechet, recomputed = (cost.seconds_per_image for cost in costs.values())
    assert 5 < matched / plain < 15
    assert 1.5 * fewer < matched and plain < fewer
    assert 1 < frechet / plain < 1.5
    assert recomputed > 1.1 * matched  # 1.03 if only the student did
    assert costs["frechet"].seconds_per_step > 0 == costs["matched"].seconds_per_step
    assert costs["frechet"].device_hours * 3600 == pytest.approx(
        300 * (512 * frechet + costs["frechet"].seconds_per_step)
    )
    told = report(
        load_config("configs/digits.yaml", [*TINY, *MATCHED]),
        estimate_memory(load_config("configs/digits.yaml", TINY), None),
        Stages(costs["plain"], Evaluation(1, 1.0, 1.0, 1.0, 1.0), costs["matched"]),
    )
    assert sum("on each of 1 rank(s)" in line for line in told) == 2


def test_the_frechet_loss_is_counted_if_its_weights_are_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("dsno_cluster.evaluation.forecast.seconds_of_one", counted)
    here = load_config("configs/digits.yaml", [*TINY, *FRECHET])
    words = ["evaluation.feature_extractor=inception-v3-compat", "evaluation.weights_path=null"]
    away = load_config("configs/digits.yaml", [*TINY, *FRECHET, *words, "evaluation.metrics=[fid]"])
    plan = make_plan(here)
    for config in (here, away):
        assert config.finished is not None
        found = measure_training(config.finished, plan, CPU, 1, gpus=False)
        assert found.without_features is (config is away)
        stages = Stages(found, Evaluation(1, 1.0, 1.0, 1.0, 1.0), found)
        told = "\n".join(report(config, estimate_memory(config, None), stages))
        assert ("the Frechet loss is not counted: the weights" in told) is (config is away)
    assert here.finished is not None
    memory = training_memory(here.finished, device="cpu")
    extractor = load_fid_extractor(here.evaluation, (1, 8, 8), CPU)
    weights = sum(4 * p.numel() for p in extractor.network.parameters())
    assert memory.features == weights + 4 * 8 * 64 * 64
    assert training_memory(here, device="cpu").features == 0


def test_features_whose_weights_are_not_here_are_not_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("went to the network"))
    words = ["evaluation.feature_extractor=inception-v3-compat", "evaluation.weights_path=null"]
    config = load_config("configs/digits.yaml", [*TINY, *words, "evaluation.metrics=[fid]"])
    plan = make_plan(config)
    evaluation = measure_evaluation(config, plan, CPU, 0.5, 1)
    assert evaluation.seconds_per_features is None
    training = Training(1, 10, 1, 16, 26, 0.1, 1.0, 1.0)
    told = report(config, estimate_memory(config, None), Stages(training, evaluation))
    assert "features not measured" in told[-1]


def test_timing_grows_until_a_call_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    now, counts = 0.0, []

    def call(count: int) -> None:
        nonlocal now
        counts.append(count)
        now += 0.15 * count

    monkeypatch.setattr("time.perf_counter", lambda: now)
    assert seconds_of_one(call, 100) == pytest.approx(0.15) and max(counts) == 4
    counts.clear()
    assert seconds_of_one(call, 3) == pytest.approx(0.15) and counts == [1, 1, 2, 2, 3, 3]
