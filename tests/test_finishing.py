"""Distribution matching through the command line: from a student, on any stage and ranks, interrupted, refused, in a path."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_teacher_backbones import words_of
from tiny import TINY, answer, dsno
from training_runs import STUDENT, checkpoints, ends, metrics, start_ranks, train, wait_for, weights, words

from dsno_cluster import load_student
from dsno_cluster.config import load_config
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.teachers import find_teacher
from dsno_cluster.training.beginning import new_student
from dsno_cluster.training.loop import seed_of_draws
from dsno_cluster.training.objectives.distribution import FIGURES, begin_distribution
from dsno_cluster.training.objectives.making import find_real_images
from dsno_cluster.trajectories.reader import Batch

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
    done = answer(*words(tmp_path, *more), "--launcher", "local")
    assert done.returncode == 2 and "student.modes 4, the config says 3" in done.stderr, done.stderr


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
    """All five parts in a row; the same command then has nothing left to do."""
    terms = "{fake_updates: 1, frechet_weight: 1, frechet_population: 64}"
    finish = f"finish={{steps: 2, lr: 1e-4, checkpoint_every: 2, heldout_every: 2, distribution: {terms}}}"
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
