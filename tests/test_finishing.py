"""Distribution matching through the command line: from a student, on any stage and ranks, interrupted, refused, in a path."""

from __future__ import annotations

import copy
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from test_guided_levels import GUIDE, SCALED
from test_latents import LATENTS, OF_STATE_DICT
from test_published_students import imported
from test_student import CONVOLUTION, DIFFUSERS_NETWORK, REFERENCE, diffusers_folder
from test_teacher_backbones import words_of
from tiny import TINY, answer, dsno
from torch import Tensor
from training_runs import (
    STUDENT,
    checkpoints,
    ends,
    kill,
    link_data,
    metrics,
    start_ranks,
    train,
    wait_for,
    weights,
    words,
)

from dsno_cluster import load_student
from dsno_cluster.config import load_config
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.stages import parts_of
from dsno_cluster.teachers import find_teacher
from dsno_cluster.training.beginning import new_student
from dsno_cluster.training.loop import seed_of_draws
from dsno_cluster.training.objectives.distribution import FIGURES, begin_distribution
from dsno_cluster.training.objectives.making import find_real_images
from dsno_cluster.trajectories.reader import Batch, blank_batch

FINISHED = [
    "training.objective=distribution",
    "training.lr=1e-4",
    "training.betas=[0.0, 0.99]",
    "training.distribution={fake_updates: 2, fake_warmup: 1, adversarial_weight: 0.05, trajectory_weight: 0.1}",
]
HELD_OUT = [
    "training.heldout_every=2",
    "training.heldout_samples=4",
    "training.distribution.heldout_samples=40",
]


@pytest.fixture(scope="module")
def start(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a student that learned trajectories."""
    out = tmp_path_factory.mktemp("start")
    train(tiny_data, out)
    return out / STUDENT


@pytest.fixture(scope="module")
def finished(tiny_data: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finishing run that nothing disturbed, on one rank."""
    out = tmp_path_factory.mktemp("finished")
    train(tiny_data, out, *FINISHED, *HELD_OUT, f"training.start={start}")
    return out


def test_it_begins_with_the_student_that_is_named(start: Path, tiny_data: Path, tmp_path: Path) -> None:
    """One step of a rate of nearly 0 leaves the samples as they were."""
    few = ["training.steps=1", "training.checkpoint_every=1", "training.ema_decay=0.0"]
    train(tiny_data, tmp_path, *FINISHED, *few, "training.lr=1e-12", f"training.start={start}")
    noise, labels = sample_noise(1, range(8), (1, 8, 8)), sample_labels(1, range(8), 10)
    before, after = (load_student(str(path)).sample(noise, labels) for path in (start, tmp_path / STUDENT))
    assert torch.allclose(before, after, atol=1e-5)
    meta = json.loads((tmp_path / STUDENT / "step-000000001" / "meta.json").read_text())
    of_start = json.loads((start / "step-000000004" / "meta.json").read_text())
    assert meta["start"]["sha256"] == of_start["sha256"] and meta["start"]["name"] == "digits"


def test_a_run_logs_its_figures_and_keeps_the_best_by_the_held_out_distance(finished: Path) -> None:
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert set(line["figures"]) == {"fake_loss", "matching", "discriminator_loss", "adversarial_loss"}
        assert all(value > 0 for value in line["figures"].values()) and len(line["distance_per_time"]) == 4
        by_hand = line["figures"]["matching"] + 0.05 * line["figures"]["adversarial_loss"]
        assert line["loss"] == pytest.approx(by_hand + 0.1 * sum(line["distance_per_time"]) / 4)
    distances = {line["step"]: line["heldout_distance"] for line in lines if "heldout_distance" in line}
    assert set(distances) == {2, 4} and all(x > 0 for x in distances.values())
    smallest = min(distances, key=lambda step: distances[step])
    assert (finished / STUDENT / "best").read_text().strip() == f"step-{smallest:09d}"


def test_interrupted_it_resumes_to_the_same_bytes(
    finished: Path, start: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Both networks, their optimisers and the average."""
    more = [*FINISHED, *HELD_OUT, f"training.start={start}"]
    out = tmp_path / "killed"
    train(tiny_data, out, *more)  # whole, then back to the checkpoint of step 2
    back_to_step_2(out)
    train(tiny_data, out, *more)
    for file in ("step-000000004/model.safetensors", "resume/step-000000004/rank-00000.safetensors"):
        assert (out / STUDENT / file).read_bytes() == (finished / STUDENT / file).read_bytes()
    assert [line["figures"] for line in metrics(out)] == [line["figures"] for line in metrics(finished)]


def back_to_step_2(out: Path) -> None:
    """Take away what was saved at step 4."""
    shutil.rmtree(out / STUDENT / "resume" / "step-000000004")
    shutil.rmtree(out / STUDENT / "step-000000004")
    (out / STUDENT / "latest").write_text("step-000000002\n")


def test_killed_it_resumes_to_the_same_bytes(
    finished: Path, start: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / "trajectories").parent.mkdir(parents=True)
    (out / "trajectories").symlink_to(tiny_data / "trajectories")
    more = [*FINISHED, *HELD_OUT, f"training.start={start}", "--launcher", "local"]
    command = [sys.executable, "-m", "dsno_cluster.cli", *words(out, *more)]
    victim = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_for(lambda: bool(checkpoints(out)) or victim.poll() is not None)
    victim.kill()
    victim.wait()
    done = dsno(*command[3:])
    assert done.returncode == 0, done.stderr
    file = "step-000000004/model.safetensors"
    assert (out / STUDENT / file).read_bytes() == (finished / STUDENT / file).read_bytes()


@pytest.mark.slow
def test_recomputing_activations_changes_nothing(
    finished: Path, start: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Of either network."""
    train(tiny_data, tmp_path, *FINISHED, *HELD_OUT, f"training.start={start}", "training.recompute=blocks")
    file = "resume/step-000000004/rank-00000.safetensors"
    assert (tmp_path / STUDENT / file).read_bytes() == (finished / STUDENT / file).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_preempted_it_resumes_to_the_same_bytes(
    count: int, start: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Nothing but the signal saves it; two ranks draw different samples and share the states of both networks."""
    more = [*FINISHED, f"training.start={start}", "training.zero_stage=2"]
    more += ["training.steps=20", "training.checkpoint_every=1000"]
    whole, out = (link_data(tiny_data, tmp_path / name) for name in ("whole", "out"))
    statuses, errors = ends(start_ranks(whole, count, *more))
    assert statuses == [0] * count, errors
    ranks = start_ranks(out, count, *more)
    wait_for(lambda: (out / STUDENT / "metrics.jsonl").is_file() and len(metrics(out)) >= 2)
    kill(ranks[-1], signal.SIGUSR2)
    statuses, errors = ends(ranks)
    assert statuses == [130] * count, errors
    (saved,) = checkpoints(out)
    assert saved == metrics(out)[-1]["step"] < 20
    statuses, errors = ends(start_ranks(out, count, *more))
    assert statuses == [0] * count, errors
    files = [f"resume/step-000000020/rank-{rank:05d}.safetensors" for rank in range(count)]
    for file in ("step-000000020/model.safetensors", *files):
        assert (out / STUDENT / file).read_bytes() == (whole / STUDENT / file).read_bytes(), file
    assert [line["figures"] for line in metrics(out)] == [line["figures"] for line in metrics(whole)]


WARMED = [
    *FINISHED[:-1],
    "training.distribution={fake_updates: 2, fake_warmup: 6, adversarial_weight: 0.05}",
]
# a training whose last rank gets a signal in an update before the first step; it says where its progress begins
SIGNALLED = """
import os, signal, sys
from dsno_cluster import console
from dsno_cluster.training import loop
from dsno_cluster.training.objectives.distribution import DistributionObjective
from dsno_cluster.training.readback import Readback
learn = DistributionObjective.fake_loss
def signalled(self, student, network, batch, step, update):
    if (step, update) == (0, {update}) and int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        os.kill(os.getpid(), signal.SIGUSR2)
    return learn(self, student, network, batch, step, update)
DistributionObjective.fake_loss = signalled
loop.Readback = lambda ranks: Readback(ranks, behind={behind})
from dsno_cluster.cli import main
with console.recording(lambda tally: print(tally.title, "from", tally.reached, file=sys.stderr)):
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("count", "stage", "behind"),
    [
        (1, 0, False),
        pytest.param(1, 0, True, marks=pytest.mark.slow),
        pytest.param(2, 2, False, marks=pytest.mark.slow),
        pytest.param(2, 3, False, marks=pytest.mark.slow),
    ],
)
def test_preempted_before_the_first_step_it_resumes_to_the_same_bytes(
    count: int, stage: int, behind: bool, start: Path, tmp_path: Path
) -> None:
    """Twice within the warm-up, which a signal to one rank ends after its update, or the next if figures are read late."""
    more = [*WARMED, f"training.start={start}", f"training.zero_stage={stage}"]
    whole, out = tmp_path / "whole", tmp_path / "out"
    statuses, errors = ends(start_ranks(whole, count, *more))
    assert statuses == [0] * count, errors
    begun = 0
    for update in (1, 3):
        script = SIGNALLED.format(update=update, behind=behind)
        statuses, errors = ends(start_ranks(out, count, *more, script=script))
        made = update + 1 + behind
        assert statuses == [130] * count and f"saved at update {made} before the first step" in errors[0], (
            errors
        )
        assert f"before the first step from {begun}\n" in errors[0], errors[0]
        assert checkpoints(out) == [0] and not (out / STUDENT / "latest").exists()
        begun = made
    plan = answer(*words(out, *more), "--launcher", "local", "--dry-run")
    assert plan.returncode == 0 and "would train digits for 4 steps" in plan.stdout + plan.stderr
    script = SIGNALLED.format(update=-1, behind=behind)
    statuses, errors = ends(start_ranks(out, count, *more, script=script))
    assert statuses == [0] * count, errors
    assert f"before the first step from {begun}\n" in errors[0]
    assert (
        f"training the student from {begun}\n" in errors[0]
    )  # further than where an attempt without it begins
    files = [f"resume/step-000000004/rank-{rank:05d}.safetensors" for rank in range(count)]
    for file in ("step-000000004/model.safetensors", *files):
        assert (out / STUDENT / file).read_bytes() == (whole / STUDENT / file).read_bytes(), file
    assert [line["figures"] for line in metrics(out)] == [line["figures"] for line in metrics(whole)]


def test_a_fake_score_network_that_is_not_finite_ends_the_run(start: Path, tmp_path: Path) -> None:
    """In the step that sees it; the checkpoint before is whole, and the line names no trajectories, as none were read."""
    script = (
        "import sys\n"
        "from dsno_cluster.training import loop\n"
        "take = loop.take_step\n"
        "def poisoned(engines, objective, batches, config, ranks, step):\n"
        "    if step == 2:\n"
        "        next(engines.companions['fake_score'].module.parameters()).data.fill_(float('nan'))\n"
        "    return take(engines, objective, batches, config, ranks, step)\n"
        "loop.take_step = poisoned\n"
        "from dsno_cluster.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    more = [*ONLY_MATCHING, f"training.start={start}"]
    (status,), (error,) = ends(start_ranks(tmp_path, 1, *more, script=script))
    assert status == 1 and "step 3: the loss is not finite" in error, error
    assert (
        "the batch: samples of the student from new noise; the last good checkpoint is that of step 2"
        in error
    )
    assert checkpoints(tmp_path) == [2]


FRECHET = [
    *FINISHED[:-1],
    "training.distribution={matching_weight: 0, adversarial_weight: 0, frechet_weight: 1, frechet_population: 40}",
]


def test_the_frechet_loss_resumes_to_the_same_bytes(start: Path, tiny_data: Path, tmp_path: Path) -> None:
    """It needs no second network; its moments of the student's features are in the checkpoint."""
    more = [*FRECHET, f"training.start={start}"]
    train(tiny_data, tmp_path / "whole", *more)
    train(tiny_data, tmp_path / "halves", *more)  # whole, then back to the checkpoint of step 2
    back_to_step_2(tmp_path / "halves")
    train(tiny_data, tmp_path / "halves", *more)
    for file in ("rank-00000.safetensors", "objective.safetensors"):
        whole, halves = (
            tmp_path / out / STUDENT / "resume/step-000000004" / file for out in ("whole", "halves")
        )
        assert whole.read_bytes() == halves.read_bytes(), file
    lines = metrics(tmp_path / "whole")
    assert all(set(line["figures"]) == {"frechet_distance"} and line["loss"] > 0 for line in lines)
    meta = json.loads((tmp_path / "whole" / STUDENT / "step-000000004/meta.json").read_text())
    assert meta["features"]["extractor"] == "digits-features"


def test_without_an_anchor_no_trajectories_are_needed(start: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The run is the same with and without them, and may be continued either way; only their held-out error is not logged."""
    more = [*FRECHET, *HELD_OUT, f"training.start={start}"]
    without, beside = tmp_path / "without", tmp_path / "beside"
    done = dsno(*words(without, *more), "training.online=true", "reader.shuffle=none", "--launcher", "local")
    assert done.returncode == 0, done.stderr
    assert not (without / STUDENT / "staging").exists() and not (without / "trajectories").exists()
    train(tiny_data, beside, *more, "reader.shuffle=none")
    file = "resume/step-000000004/rank-00000.safetensors"
    assert (without / STUDENT / file).read_bytes() == (beside / STUDENT / file).read_bytes()
    first, second = (
        json.loads((out / STUDENT / "resume/step-000000004/state.json").read_text())
        for out in (without, beside)
    )
    assert first["identity"] == second["identity"] and first["best"] == second["best"]
    measured = [
        {key for line in metrics(out) for key in line if key.startswith("heldout")}
        for out in (without, beside)
    ]
    assert measured == [{"heldout_distance"}, {"heldout_distance", "heldout_error_per_time"}]


NO_IMAGES = ["data.name=null", "evaluation.reference=x.npz"]
ONLY_MATCHING = [*FINISHED[:-1], "training.distribution.adversarial_weight=0"]


@pytest.mark.parametrize(
    ("more", "refused"),
    [
        (FRECHET, None),
        (FINISHED, "run `dsno-cluster gen-trajectories`"),
        ([*ONLY_MATCHING, *NO_IMAGES], None),
        ([*ONLY_MATCHING, *NO_IMAGES, *HELD_OUT], "(data.images), or by training.heldout_every=null"),
    ],
    ids=["none", "an anchor", "no real images, nothing held out", "no real images"],
)
def test_who_needs_trajectories(more: list[str], refused: str | None, start: Path, tmp_path: Path) -> None:
    done = answer(*words(tmp_path, *more, f"training.start={start}"), "--launcher", "local", "--dry-run")
    assert done.returncode == (2 if refused else 0), done.stderr
    if refused:
        assert refused in done.stderr and done.stderr.count("\n") == 1, done.stderr
    else:
        assert "on samples of its own" in done.stdout + done.stderr
    path = parts_of(load_config("configs/digits.yaml", words(tmp_path, *more)[1:]))
    assert ("gen-trajectories" in [part.stage.name for part in path]) == bool(refused)


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_the_frechet_loss_on_two_ranks(stage: int, start: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Both have the same moments, and go on from a checkpoint of one rank; the distance falls."""
    more = [*FRECHET, f"training.start={start}", f"training.zero_stage={stage}"]
    train(tiny_data, tmp_path, *more, "training.steps=2")
    train(tiny_data, tmp_path, *more, "training.steps=6", "--tasks-per-node", "2")
    values = [line["figures"]["frechet_distance"] for line in metrics(tmp_path)]
    assert len(values) == 6 and values[-1] < values[0]


STAGES = [0, 2, pytest.param(1, marks=pytest.mark.slow), 3]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_at_every_stage_agree(stage: int, start: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The stages divide states and do not change numbers; a checkpoint of one is continued at another."""
    more = [*FINISHED, f"training.start={start}", f"training.zero_stage={stage}"]
    train(tiny_data, tmp_path / "a", *more, "--tasks-per-node", "2")
    train(tiny_data, tmp_path / "b", *more[:-1], "training.zero_stage=0", "--tasks-per-node", "2")
    a, b = (weights(tmp_path / out) for out in ("a", "b"))
    # Adam with a first beta of 0 turns rounding of tiny gradients into steps of the size of the rate
    assert all(torch.allclose(a[name], b[name], atol=2e-4) for name in b)
    figures = [line["figures"] for line in metrics(tmp_path / "a")]
    expected = [line["figures"] for line in metrics(tmp_path / "b")]
    for found, wanted in zip(figures, expected, strict=True):
        assert found == pytest.approx(wanted, rel=2e-2)
    other = "training.zero_stage=0" if stage else "training.zero_stage=3"
    resumed = [*more[:-1], other, "training.steps=6", "--tasks-per-node", "2"]
    train(tiny_data, tmp_path / "a", *resumed)
    assert checkpoints(tmp_path / "a")[-1] == 6


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precisions(precision: str, start: Path, tiny_data: Path, tmp_path: Path) -> None:
    more = [*FINISHED, f"training.start={start}", f"training.precision={precision}"]
    train(tiny_data, tmp_path, *more)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ["training.distribution={matching: score-identity}"],
        ["training.distribution={adversarial_weight: 0}", "data.name=null", "evaluation.reference=none.npz"],
        ["training.distribution={matching_weight: 0}"],
        ["trajectories.guidance_scale=1.5", "training.distribution={matching: score-identity}"],
        ["training.accumulation=2"],
        ["training.recompute=blocks", "training.gradient_clip=1"],
        ["training.distribution={frechet_weight: 0.1, frechet_population: 16, trajectory_weight: 0.1}"],
        [FRECHET[-1], "training.precision=bfloat16", "training.accumulation=2"],
    ],
    ids=[
        *["score-identity", "no real images", "only adversarial", "guided", "accumulated", "recomputed"],
        *["all terms", "only Frechet"],
    ],
)
def test_variants(more: list[str], tiny_data: Path, tmp_path: Path) -> None:
    """Each from the teacher's weights, as no start is named."""
    if any("guidance" in word for word in more):
        done = dsno("gen-trajectories", *TINY, f"storage.root={tmp_path}", more[0], "--launcher", "local")
        assert done.returncode == 0, done.stderr
    train(tiny_data, tmp_path, *FINISHED[:-1], "training.steps=2", *more)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path, 2).values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        "student={operator: convolution, modes: 2, prediction: state, temporal_init: published}",
        "student={operator: convolution, modes: 2, points: drawn}",
        "student={backbone: teacher, operator: series, modes: 4, prediction: data, warm_start: true}",
    ],
)
def test_forms_of_the_student(form: str, tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_data, tmp_path, *FINISHED, "training.steps=2", "training.most_points=2", form)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path, 2).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpmpp_cond", "edm2_cond", "adm", "dit"])
def test_teachers_of_other_families(name: str, tmp_path: Path) -> None:
    """In pixels and latents, preconditioned or on discrete levels; from the teacher's weights, and resumed."""
    matched = [*words_of(name, tmp_path), "training.objective=distribution", "training.threads=1"]
    matched += ["training.distribution={adversarial_weight: 0, fake_updates: 1, trajectory_weight: 0.1}"]
    where = [f"storage.root={tmp_path / 'out'}", "--launcher", "local"]
    for command, *more in (
        ("gen-trajectories",),
        ("train", "training.steps=2"),
        ("train", "training.steps=3"),
    ):
        done = dsno(command, *matched, *more, *where)
        assert done.returncode == 0, done.stderr
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out", 3).values())


def in_latents(folder: Path) -> list[str]:
    """A transformer of latents, whose autoencoder encodes the real images, and through which features are seen."""
    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (100, 1, 8, 8), np.uint8)
    np.savez(folder / "real.npz", images=images, labels=np.arange(100) % 10)
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4}
    diffusers.AutoencoderKL(in_channels=1, out_channels=1, **sizes).save_pretrained(folder / "vae")
    terms = "{fake_updates: 1, adversarial_weight: 0.05, frechet_weight: 0.1, frechet_population: 32}"
    return [
        *(*TINY, *LATENTS, *OF_STATE_DICT, f"teacher.decoder={folder / 'vae'}"),
        *(f"data.images={folder / 'real.npz'}", f"training.distribution={terms}", *HELD_OUT),
    ]


def on_a_diffusers_unet(folder: Path) -> list[str]:
    """A student that takes over the network of a diffusers teacher, whose copy is trained too."""
    path = diffusers_folder(folder, "epsilon")
    return [
        *(*TINY, f"teacher.path={path}", "data.name=null", *REFERENCE, *DIFFUSERS_NETWORK, *CONVOLUTION),
        *("student.backbone=diffusers", "trajectories.clip_denoised=true"),
        "training.distribution={fake_updates: 1, adversarial_weight: 0}",
    ]


def with_a_guide(_folder: Path) -> list[str]:
    """A weaker teacher guides the denoiser that is matched, through which gradients flow."""
    terms = "{fake_updates: 1, matching: score-identity, adversarial_weight: 0.05}"
    return [*TINY, *GUIDE, SCALED, f"training.distribution={terms}"]


def from_a_published_student(folder: Path) -> list[str]:
    """Of the published network and its time points; its closed-form teacher is replaced in the copy by our U-Net."""
    at = imported("cifar_like", folder)
    student = load_student(at)
    images = np.random.default_rng(0).integers(0, 256, (20, 3, 16, 16), np.uint8)
    np.savez(folder / "real.npz", images=images)
    return [
        *(*TINY, *REFERENCE, f"training.start={at}", "data.name=null", f"data.images={folder / 'real.npz'}"),
        *("teacher.path=closed-form:gaussian", "teacher.options={mean: 0.0, std: 0.5, shape: [3, 16, 16]}"),
        *(f"network={student.network.model_dump_json()}", f"trajectories.times={list(student.times)}"),
        f"student={{operator: convolution, modes: {student.form.modes}, prediction: state, warm_start: false}}",
        "training.distribution={fake_updates: 1, fake_warmup: 1, adversarial_weight: 0.05}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [in_latents, on_a_diffusers_unet, with_a_guide, from_a_published_student],
    ids=lambda x: x.__name__,
)
def test_finished_without_trajectories_and_resumed(
    given: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    matched = ["training.objective=distribution", "training.lr=1e-4", *given(tmp_path), "training.threads=1"]
    for steps in (2, 3):
        where = [f"storage.root={tmp_path / 'out'}", f"training.steps={steps}", "--launcher", "local"]
        done = dsno("train", *matched, *where)
        assert done.returncode == 0, done.stderr
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out", 3).values())
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [1, 2, 3]
    config = load_config("configs/digits.yaml", matched)
    terms = config.training.distribution
    expected = {"fake_loss", "matching"}
    expected |= {"discriminator_loss", "adversarial_loss"} if terms.adversarial_weight else set()
    expected |= {"frechet_distance"} if terms.frechet_weight else set()
    for line in lines:
        assert set(line["figures"]) == expected and all(value > 0 for value in line["figures"].values())
    measured = config.training.heldout_every is not None
    assert ["heldout_distance" in line for line in lines] == [False, measured, measured]


@pytest.mark.slow
def test_a_teacher_without_a_network(tmp_path: Path) -> None:
    """The fake score network is our U-Net, which learns the student's samples before the first step."""
    sizes = "network={state_size: 8, state_channels: 1, width: 32, multipliers: [1], blocks_per_level: 1, embedding_dim: 32}"
    closed = ["teacher.path=closed-form:mixture", "data.name=null", "evaluation.reference=none.npz", sizes]
    closed += ["student.warm_start=false", "evaluation.metrics=[trajectory_error]"]
    closed += ["teacher.options={means: [-0.5, 0.5], stds: [0.2, 0.3], shape: [1, 8, 8]}"]
    where = [f"storage.root={tmp_path}", "--launcher", "local"]
    made = dsno("gen-trajectories", *TINY, *closed, *where)
    assert made.returncode == 0, made.stderr
    matched = [
        "training.objective=distribution",
        "training.distribution={adversarial_weight: 0, fake_warmup: 5}",
    ]
    done = dsno("train", *TINY, *closed, *matched, *where)
    assert done.returncode == 0, done.stderr
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path).values())


def test_without_progress_it_ends_and_stays_ended(start: Path, tiny_data: Path, tmp_path: Path) -> None:
    """At a rate at which no weight changes, the first checkpoint stays the best."""
    more = [
        *FINISHED,
        *HELD_OUT,
        f"training.start={start}",
        "training.steps=12",
        "training.lr=1e-30",
        "training.distribution.patience=2",
    ]
    done = train(tiny_data, tmp_path, *more)
    assert "ended at step 6" in done.stderr + done.stdout
    assert checkpoints(tmp_path)[-1] == 6
    again = train(tiny_data, tmp_path, *more)
    assert "finished already at step 6" in again.stderr + again.stdout
    # who waits for its checkpoints does not wait for its last step
    measured = [
        "evaluation.metrics=[trajectory_error]",
        "evaluation.teacher_steps=[]",
        "evaluation.trajectory_samples=4",
    ]
    seen = dsno("eval", "--watch", *TINY, f"storage.root={tmp_path}", *more, *measured, "--launcher", "local")
    assert seen.returncode == 0 and "best by trajectory_error: " in seen.stderr, seen.stderr


def test_a_checkpoint_by_a_signal_takes_no_part(start: Path, tiny_data: Path, tmp_path: Path) -> None:
    """One that is only there because of a signal is neither the best nor counted: the undisturbed run has none there."""
    out = link_data(tiny_data, tmp_path)
    patient = ["training.distribution.patience=1", "training.checkpoint_every=1000", "training.steps=2000"]
    (rank,) = start_ranks(out, 1, *FINISHED, *HELD_OUT, f"training.start={start}", *patient)
    wait_for(lambda: (out / STUDENT / "metrics.jsonl").is_file() and len(metrics(out)) >= 1)
    kill(rank, signal.SIGUSR2)
    codes, errors = ends([rank])
    assert codes == [130], errors
    (saved,) = checkpoints(out)
    state = json.loads((out / STUDENT / f"resume/step-{saved:09d}/state.json").read_text())
    assert metrics(out)[-1]["step"] == saved and "heldout_distance" in metrics(out)[-1]
    assert state.get("best") is None and state.get("without_progress", 0) == 0


def test_another_distance_is_not_compared_with(
    finished: Path, start: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """That of fewer samples is larger: no checkpoint would ever be better than one of before."""
    out = tmp_path / "copy"
    shutil.copytree(finished, out, symlinks=True)
    fewer = ["training.distribution.heldout_samples=20", "training.steps=6"]
    done = train(tiny_data, out, *FINISHED, *HELD_OUT, f"training.start={start}", *fewer)
    assert "the best checkpoint is sought anew" in done.stderr
    assert (out / STUDENT / "best").read_text().strip() == "step-000000006"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["training.start=nowhere"], "training.start: "),
        (["data.name=null", "evaluation.reference=x.npz"], "adversarial_weight needs real images"),
        (["training.distribution.matching_weight=0", "training.distribution.adversarial_weight=0"], "all 0"),
        (
            [
                "training.distribution.frechet_weight=1",
                "evaluation.feature_extractor=inception-v3-clean",
                "evaluation.metrics=[fid]",
            ],
            "resizes images in 8 bits",
        ),
        (["training.distribution.noise_range=[0.5, 0.5]"], "0 < low < high"),
        (["training.distribution.fake_lrs=1"], "did you mean training.distribution.fake_lr"),
        (["training.objective=distributions"], "training.objective"),
        (["training.distribution.patience=2"], "set training.heldout_every"),
    ],
)
def test_what_cannot_work_is_refused(more: list[str], said: str, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "trajectories").symlink_to(tiny_data / "trajectories")
    done = answer(*words(out, *FINISHED, *more), "--launcher", "local")
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1


def test_a_start_of_another_form_is_refused(start: Path, tiny_data: Path, tmp_path: Path) -> None:
    (tmp_path / "trajectories").symlink_to(tiny_data / "trajectories")
    more = [*FINISHED, f"training.start={start}", "student.modes=3"]
    asked = answer(*words(tmp_path, *more), "--launcher", "local", "--dry-run")
    assert asked.returncode == 2 and "student.modes 4, the config says 3" in asked.stderr, asked.stderr
    # before trajectories are made for it
    out = tmp_path / "out"
    refused = answer("run", *words(out, *more)[1:], "--launcher", "local")
    assert refused.returncode == 2 and "student.modes 4, the config says 3" in refused.stderr, refused.stderr
    assert not out.exists()


def test_another_start_is_another_run(finished: Path, tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    out = tmp_path / "copy"
    other = tmp_path / "other"
    train(tiny_data, other, "seed=0", "training.lr=2e-3")
    more = [*FINISHED, *HELD_OUT, f"training.start={other / STUDENT}", "training.steps=6"]
    done = answer(*words(out, *more), "--launcher", "local")
    assert done.returncode == 2 and "was saved with start" in done.stderr, done.stderr


def test_a_lost_rank_ends_the_other(start: Path, tiny_data: Path, tmp_path: Path) -> None:
    """One rank cannot read the start's teacher: both end, with the reason."""
    (tmp_path / "trajectories").symlink_to(tiny_data / "trajectories")
    script = (
        "import os, sys\n"
        "from dsno_cluster.training.objectives import making\n"
        "from dsno_cluster.errors import UserError\n"
        "def fail(*_):\n"
        "    raise UserError('no such teacher here')\n"
        "if os.environ['RANK'] == '1':\n"
        "    making.begin_distribution = fail\n"
        "from dsno_cluster.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    more = [*FINISHED, f"training.start={start}"]
    statuses, errors = ends(start_ranks(tmp_path, 2, *more, script=script))
    assert statuses == [2, 2] and all("no such teacher here" in error for error in errors), errors


def test_samples_are_of_new_noise(tmp_path: Path) -> None:
    """The student knows the trajectories' own noise: what is matched does not depend on it, only the anchor does."""
    config = load_config("configs/digits.yaml", [*TINY, *FINISHED[:-1]])
    anchored = load_config("configs/digits.yaml", [*TINY, *FINISHED])
    teacher = find_teacher(config)
    student = new_student(config, teacher)
    labels = torch.arange(6)
    batches = [
        Batch(labels.numpy(), torch.full((6, 1, 8, 8), noise), torch.zeros(6, 4, 1, 8, 8), labels)
        for noise in (0.0, 0.5)
    ]
    for settings, of_matching in ((config, None), (anchored, len(FIGURES))):
        real = find_real_images(settings, teacher)
        objective = begin_distribution(settings, teacher, real, torch.device("cpu"))
        figures = []
        for batch in batches:
            torch.manual_seed(3)
            figures.append(objective.loss(student, batch, 0)[1])
        assert torch.allclose(figures[0][:of_matching], figures[1][:of_matching], rtol=1e-5)
        assert float(figures[0][1]) > 0.0
    assert not torch.allclose(figures[0][len(FIGURES) :], figures[1][len(FIGURES) :], rtol=1e-2)


def test_a_guide_moves_what_is_matched() -> None:
    """At first the copy answers as the teacher does by itself, so that nothing tells them apart but guidance."""
    matching = []
    for guide in ([], [*GUIDE, SCALED]):
        config = load_config("configs/digits.yaml", [*TINY, *ONLY_MATCHING, *guide])
        teacher = find_teacher(config)
        objective = begin_distribution(config, teacher, None, torch.device("cpu"))
        torch.manual_seed(3)
        _, figures = objective.loss(new_student(config, teacher), blank_batch(6, (1, 8, 8)), 0)
        matching.append(float(figures[list(FIGURES).index("matching")]))
    assert matching[0] < 1e-3 < 0.05 < matching[1]


@pytest.mark.parametrize("weight", [0.0, 0.1], ids=["samples only", "anchored"])
def test_what_is_matched_are_the_samples_that_are_evaluated(weight: float, tmp_path: Path) -> None:
    """A student in training has no dropout: the states that any of its losses sees are those of the evaluated student."""
    anchored = f"training.distribution.trajectory_weight={weight}"
    config = load_config("configs/digits.yaml", [*TINY, *FINISHED, anchored, "network.dropout=0.2"])
    teacher = find_teacher(config)
    student = new_student(config, teacher).train()
    evaluated = copy.deepcopy(student).eval()
    compared = 0

    def seen(noise: Tensor, labels: Tensor | None, points: Sequence[int]) -> Tensor:
        nonlocal compared
        states = student(noise, labels, points)
        times = [student.times[i] for i in points]
        torch.testing.assert_close(states, evaluated.trajectory(noise, labels, times))
        compared += 1
        return states

    objective = begin_distribution(config, teacher, find_real_images(config, teacher), torch.device("cpu"))
    labels = torch.arange(6)
    batch = Batch(labels.numpy(), torch.randn(6, 1, 8, 8), torch.zeros(6, 4, 1, 8, 8), labels)
    objective.loss(seen, batch, 0)
    companion = objective.companions["fake_score"]
    companion.loss(seen, companion.network, batch, 0, 0)
    assert compared == 2
    learning = load_config("configs/digits.yaml", [*TINY, "network.dropout=0.2"])
    assert new_student(learning, teacher).train().backbone.training  # of trajectories it has dropout, as ever


def test_no_two_updates_draw_the_same(tmp_path: Path) -> None:
    """Of steps, of updates within a step, of ranks or of seeds; torch looks at half of a seed only."""
    drawn = set()
    for seed in (0, 1):
        config = load_config("configs/digits.yaml", [*TINY, *FINISHED, f"training.seed={seed}"])
        for step, update, rank in itertools.product(range(50), range(4), range(2)):
            torch.manual_seed(seed_of_draws(config, step, update, rank))
            drawn.add(tuple(torch.rand(3).tolist()))
    assert len(drawn) == 2 * 50 * 4 * 2


def test_best_in_a_path_is_the_best_student(finished: Path) -> None:
    best = (finished / STUDENT / "best").read_text().strip()
    noise, labels = sample_noise(1, range(4), (1, 8, 8)), sample_labels(1, range(4), 10)
    found, named = (
        load_student(str(finished / STUDENT / name)).sample(noise, labels) for name in ("best", best)
    )
    assert torch.equal(found, named)


def test_run_finishes_and_shows_the_student_before_and_after(tmp_path: Path) -> None:
    """All five parts in a row; the same command then trains nothing, and measures the same."""
    terms = "{fake_updates: 1, frechet_weight: 1, frechet_population: 64}"
    further = "further_metrics: [precision_recall, nearest]"
    finish = f"finish={{steps: 2, lr: 1e-4, checkpoint_every: 2, heldout_every: 2, {further}, distribution: {terms}}}"
    command = ["run", *TINY, f"storage.root={tmp_path}", "training.heldout_samples=4", finish]
    done = dsno(*command, "--launcher", "local")
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert "[4/5] train" in said and "[5/5] eval" in said and "2 finishing steps" in said
    assert "student before finishing" in said
    assert said.count("digits-features, by which the student was trained") == 1  # the second time
    rows = [
        json.loads((tmp_path / f"evaluation/{n}/metrics.json").read_text())
        for n in ("digits", "digits-finished")
    ]
    before, after = rows
    assert after["before"]["fid"] == before["student"]["fid"] != after["student"]["fid"]
    for figure in ("precision", "recall", "agreement", "nearest", "copies"):  # what a distance does not say
        assert all(
            row[figure] is not None for row in (after["before"], after["student"], *after["teacher_rows"])
        )
    assert after["before"]["sha256"] == before["checkpoint"]["sha256"]
    again = dsno(*command, "--launcher", "local")
    assert again.returncode == 0 and "finished already at step 2" in again.stdout + again.stderr
    once_more = json.loads((tmp_path / "evaluation/digits-finished/metrics.json").read_text())
    assert once_more["student"]["fid"] == after["student"]["fid"]
