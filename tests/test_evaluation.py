"""Evaluation against torch-fidelity's and the yardstick's own numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from tiny import DATA, TINY, answer, dsno

from dsno_cluster import __version__
from dsno_cluster.config import load_config
from dsno_cluster.data import load_data
from dsno_cluster.device import device_name
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.features.classifiers import DigitsFeatures
from dsno_cluster.features.extractors import Extractor, find_weights, load_extractor
from dsno_cluster.features.statistics import frechet_distance, merge, moments_of
from dsno_cluster.images import to_uint8

EXPECTED = safetensors.torch.load_file(DATA / "digits-features-expected.safetensors")


def yardstick() -> Extractor:
    return load_extractor(
        find_weights(DigitsFeatures.NAME, "package:digits-features", None), ["64", "logits"]
    )


def test_yardstick_features_and_logits() -> None:
    extractor = yardstick()
    digest = "981af2fbed32a3c2cffad69420d35480a2c87f812018898b857ea6e7af2a5879"
    assert find_weights(DigitsFeatures.NAME, "package:digits-features", None).sha256 == digest
    features, logits = extractor.network.of_float(EXPECTED["images"])
    assert torch.allclose(features, EXPECTED["features"], atol=1e-5)
    assert torch.allclose(logits, EXPECTED["logits"], atol=1e-4)


def test_yardstick_statistics_and_split() -> None:
    """The known distance of the 297 held-out digits, from float images and from 8-bit ones."""
    extractor = yardstick()
    train, held_out = load_data("digits")
    whole = moments_of(extractor.network.of_float(train.images)[0].numpy())
    assert np.allclose(whole.mean, EXPECTED["train_mu"].numpy(), atol=1e-4)
    assert np.allclose(whole.covariance, EXPECTED["train_sigma"].numpy(), atol=1e-4)
    rounded = moments_of(extractor(to_uint8(held_out.images))["64"].numpy())
    assert frechet_distance(rounded.mean, rounded.covariance, whole.mean, whole.covariance) == pytest.approx(
        1.86, abs=0.02
    )


def test_moments_do_not_cancel_for_large_means() -> None:
    features = np.random.default_rng(0).standard_normal((1000, 5)) + 1e6
    merged = merge(moments_of(part) for part in np.array_split(features, 7))
    assert np.allclose(merged.covariance, np.cov(features, rowvar=False), rtol=1e-6)
    assert np.allclose(merged.mean, features.mean(0), rtol=1e-12)


def test_eight_bit_is_rounded_to_nearest_and_clamped() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0 / 255 - 1e-4, 1.0, 2.0])
    assert to_uint8(values).tolist() == [0, 0, 128, 128, 255, 255]


def test_weights_are_checked_before_they_are_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not one of"):
        find_weights("inception", None, None)
    with pytest.raises(UserError, match="missing"):
        find_weights(DigitsFeatures.NAME, str(tmp_path / "none.safetensors"), None)
    with pytest.raises(WorkError, match="sha256"):
        find_weights(DigitsFeatures.NAME, "package:digits-features", "00")
    (tmp_path / "inception.pth").write_bytes(b"\x80\x02pickle")
    with pytest.raises(UserError, match="weights_sha256"):
        find_weights("inception-v3-compat", str(tmp_path / "inception.pth"), None)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The demo end to end, at a reduced size; its storage root and what it printed."""
    root = tmp_path_factory.mktemp("demo")
    done = dsno("demo", *TINY, f"storage.root={root}", "evaluation.keep_samples=true", "--launcher", "local")
    assert done.returncode == 0, done.stderr
    return root, done.stdout, done.stderr


def test_demo_end_to_end(demo: tuple[Path, str, str]) -> None:
    root, stdout, _ = demo
    folder = root / "evaluation/digits"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["num_samples"] == 200 and metrics["checkpoint"]["step"] == 4
    assert metrics["feature_extractor"]["weights_sha256"].startswith("981af2fb")
    assert metrics["real_held_out"]["fid"] == pytest.approx(1.86, abs=0.02)
    assert [row["evaluations"] for row in metrics["teacher_rows"]] == [1, 2, 6]
    assert list(metrics["student"]["trajectory_error"]) == ["0.5625", "0.25", "0.0625", "0.0"]
    assert metrics["student"]["cost_in_teacher_evaluations"] > 0
    assert "student" in stdout and "relative error" in stdout
    assert [row["as_trajectories"] for row in metrics["teacher_rows"]] == [False, False, True]
    assert metrics["checkpoint"]["path"].endswith("students/digits/step-000000004")
    manifest = json.loads(next(root.glob("trajectories/*/manifest.json")).read_text())
    student = json.loads((root / "students/digits/step-000000004/meta.json").read_text())
    for made_by in (manifest["environment"], student, metrics):
        assert made_by["device"] == device_name() and made_by["code"]["version"] == __version__
    assert metrics["seconds"] > 0
    for name in ("samples.png", "trajectory.png"):
        picture = np.asarray(Image.open(folder / name))
        assert picture.ndim == 3 and picture.std() > 20  # something is drawn


@pytest.mark.slow
def test_figures_do_not_depend_on_the_actors(demo: tuple[Path, str, str], tmp_path: Path) -> None:
    root = tmp_path / "again"
    shutil.copytree(demo[0], root)
    shutil.rmtree(root / "evaluation")  # the teacher's rows too
    shutil.rmtree(root / "samples")
    words = [*TINY, f"storage.root={root}", "evaluation.keep_samples=true", "--launcher", "local"]
    done = dsno("eval", *words, "--actors", "1", "--json")
    assert done.returncode == 0, done.stderr
    ours = json.loads(done.stdout)  # one JSON object and nothing else
    theirs = json.loads((demo[0] / "evaluation/digits/metrics.json").read_text())
    for metrics in (ours, theirs):
        for timing in ("cost_in_teacher_evaluations", "images_per_second"):
            del metrics["student"][timing]
        del metrics["checkpoint"]["path"], metrics["seconds"]
    assert ours == theirs
    kept = sorted(p.name for p in (root / "samples").rglob("*"))
    assert kept[1:] == ["manifest.json", *(f"shard-{i:06d}.safetensors" for i in range(4))]
    assert dsno("verify", str(next((root / "samples").iterdir()))).returncode == 0


@pytest.mark.slow
def test_an_evaluation_that_was_killed_goes_on_with_the_rows_that_are_missing(
    demo: tuple[Path, str, str], tmp_path: Path
) -> None:
    root = tmp_path / "again"
    shutil.copytree(demo[0], root)
    shutil.rmtree(root / "evaluation")
    words = ["eval", *TINY, f"storage.root={root}", "evaluation.keep_samples=true", "--launcher", "local"]
    command = [sys.executable, "-m", "dsno_cluster.cli", *words]
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list((root / "evaluation").glob("teachers/*.json")):  # the dearest row, which is measured first
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert not (root / "evaluation/digits/metrics.json").exists()
    again = dsno(*words)
    kept = re.search(r"(\d) of the teacher's 3 rows were measured before", again.stderr)
    assert again.returncode == 0 and kept and int(kept[1]) >= 1, again.stderr
    ours, theirs = (
        json.loads((at / "evaluation/digits/metrics.json").read_text())["teacher_rows"]
        for at in (root, demo[0])
    )
    assert ours == theirs


@pytest.mark.slow
def test_sigterm_ends_an_evaluation_as_ctrl_c_does(demo: tuple[Path, str, str], tmp_path: Path) -> None:
    """In a line, without the crash report that Ray's own handler prints."""
    root = tmp_path / "again"
    shutil.copytree(demo[0], root)
    shutil.rmtree(root / "evaluation")
    words = ["eval", *TINY, "evaluation.num_samples=5000", f"storage.root={root}", "--launcher", "local"]
    command = [sys.executable, "-m", "dsno_cluster.cli", *words]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert job.stderr is not None
    assert any("to measure" in line for line in job.stderr)
    time.sleep(3)  # Ray has started, or starts
    job.terminate()
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 130 and said == "dsno-cluster: interrupted; the same command resumes\n", said


@pytest.mark.slow
def test_the_trajectory_error_alone_draws_no_images(demo: tuple[Path, str, str], tmp_path: Path) -> None:
    """What is left to those who have neither real images nor Inception's weights."""
    root = tmp_path / "again"
    shutil.copytree(demo[0], root)
    words = [
        "eval",
        *TINY,
        f"storage.root={root}",
        "evaluation.metrics=[trajectory_error]",
        "evaluation.reference=none",
        "evaluation.num_samples=100",  # of none of them
    ]
    done = dsno(*words, "--launcher", "local")
    assert done.returncode == 0 and "relative error" in done.stdout, done.stderr
    assert "this replaces the evaluation of step 4 by 200 samples" in done.stderr, done.stderr
    # those of evaluation.trajectory_samples
    assert "to measure: 20 trajectories\n" in done.stderr, done.stderr
    assert "20/20 samples" in done.stderr, done.stderr
    metrics = json.loads((root / "evaluation/digits/metrics.json").read_text())
    before = json.loads((demo[0] / "evaluation/digits/metrics.json").read_text())
    assert metrics["student"]["trajectory_error"] == before["student"]["trajectory_error"]
    assert metrics["teacher_rows"] == [] and metrics["warnings"] == []
    assert dsno("report", *TINY, f"storage.root={root}").returncode == 0


def test_samples_are_the_students(demo: tuple[Path, str, str], tmp_path: Path) -> None:
    from dsno_cluster import load_student
    from dsno_cluster.diffusion.noise import sample_labels, sample_noise

    student_path = str(demo[0] / "students/digits")
    for batch in (3, 16):  # the batch size changes nothing
        words = ["sample", student_path, "--num", "16", "--seed", "5", "--batch-size", str(batch)]
        done = dsno(*words, "--out", str(tmp_path / f"{batch}.npz"))
        assert done.returncode == 0, done.stderr
        assert ("images/s after the first batch" if batch == 3 else "warm-up included") in done.stderr
    found = [np.load(tmp_path / f"{batch}.npz") for batch in (3, 16)]
    assert np.abs(found[0]["images"].astype(int) - found[1]["images"]).max() <= 1
    labels = sample_labels(5, range(16), 10)
    images = load_student(student_path).sample(sample_noise(5, range(16), (1, 8, 8)), labels)
    assert np.abs(found[1]["images"].astype(int) - to_uint8(images).numpy()).max() <= 1
    assert np.array_equal(found[1]["labels"], labels.numpy())
    words = ["sample", student_path, "--num", "2", "--seed", "5", "--out", "of-one.npz", "--label"]
    assert answer(*words, "7", cwd=tmp_path).returncode == 0
    of_one = np.load(tmp_path / "of-one.npz")
    images = load_student(student_path).sample(sample_noise(5, range(2), (1, 8, 8)), torch.tensor([7, 7]))
    assert np.abs(of_one["images"].astype(int) - to_uint8(images).numpy()).max() <= 1
    assert of_one["labels"].tolist() == [7, 7] and labels[:2].tolist() != [7, 7]
    none = answer(*words, "10", cwd=tmp_path)
    assert none.returncode == 2 and "has classes 0..9" in none.stderr, none.stderr


def test_a_student_is_not_judged_on_the_noise_that_it_was_trained_on(
    demo: tuple[Path, str, str], tmp_path: Path
) -> None:
    student = str(demo[0] / "students/digits")
    words = [*TINY, f"storage.root={demo[0]}", "seed=7", "evaluation.seed=0", "--student", student]
    judged = answer("eval", *words, "--launcher", "local", cwd=tmp_path)
    assert judged.returncode == 2 and "trained on the noise of that seed" in judged.stderr, judged.stderr
    words = ["sample", student, "--num", "4", "--batch-size", "4", "--seed", "0"]
    shards = answer(*words, "--shards", "drawn", cwd=tmp_path)
    assert shards.returncode == 2 and "trained on the noise of that seed" in shards.stderr, shards.stderr
    picture = answer(*words, "--out", "x.png", cwd=tmp_path)  # may be wanted, to look at
    assert picture.returncode == 0 and "those that it was trained on" in picture.stderr, picture.stderr
    other = answer(*words[:-2], "--out", "x.png", cwd=tmp_path)
    assert other.returncode == 0 and "trained on" not in other.stderr, other.stderr


def test_a_student_that_is_replaced_meanwhile_is_not_taken_for_the_first(
    demo: tuple[Path, str, str], tmp_path: Path
) -> None:
    """Each actor opens the student by itself, at any time; a training may go on beside."""
    from dsno_cluster import load_student
    from dsno_cluster.evaluation.look_up import find_student

    shutil.copytree(demo[0] / "students", tmp_path / "students")
    config = load_config("configs/digits.yaml", [*TINY, f"storage.root={tmp_path}"])
    student = find_student(config)
    path = student.address
    newer = tmp_path / "students/digits/step-000000005"
    shutil.copytree(path, newer)
    (tmp_path / "students/digits/latest").write_text(newer.name + "\n")
    assert Path(path).name == "step-000000004"
    load_student(path, sha256=student.sha256)
    with pytest.raises(WorkError, match="were replaced meanwhile"):
        load_student(path, sha256="0" * 64)


def test_students_refuse_what_they_cannot_answer(demo: tuple[Path, str, str]) -> None:
    from dsno_cluster import load_student

    student = load_student(str(demo[0] / "students/digits/step-000000004"))
    noise, labels = torch.zeros(2, 1, 8, 8), torch.tensor([1, 2])
    assert torch.allclose(
        student.trajectory(noise, labels, [0.25]), student.trajectory(noise, labels)[:, 1:2], atol=1e-6
    )
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        student.trajectory(noise, labels, times=[-0.1])
    with pytest.raises(ValueError, match=r"noise must be \(N, 1, 8, 8\), found \(2, 1, 16, 16\)"):
        student.sample(torch.zeros(2, 1, 16, 16), labels)
    with pytest.raises(ValueError, match="labels are needed"):
        student.sample(noise)
    with pytest.raises(ValueError, match=r"0\.\.9"):
        student.sample(noise, torch.tensor([1, 10]))
    with pytest.raises(UserError, match="not a student"):
        load_student("package:digits-teacher")


@pytest.mark.slow
def test_teacher_training_can_be_interrupted(tmp_path: Path) -> None:
    """The same teacher, whether or not the run was cut in two."""
    few = ["teacher_training.steps=6", "teacher_training.checkpoint_every=2", "teacher_training.batch_size=8"]
    whole = dsno("train-teacher", *few, f"storage.root={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr

    cut = f"""
import dsno_cluster.training.train_teacher as module
real = module.velocity_loss
def failing(*args):
    if args[-1] == 5:
        raise KeyboardInterrupt
    return real(*args)
module.velocity_loss = failing
from dsno_cluster.cli import main
raise SystemExit(main(["train-teacher", *{few!r}, "storage.root={tmp_path / "cut"}"]))
"""
    import subprocess
    import sys

    assert subprocess.run([sys.executable, "-c", cut], capture_output=True, check=False).returncode == 130
    resume = tmp_path / "cut/teachers/digits-resume.pt"
    state = torch.load(resume, weights_only=True)
    del state["settings"]["network"]["dropout"]  # as if the key, with a default, came with a later version
    torch.save(state, resume)
    other = dsno("train-teacher", *few, f"storage.root={tmp_path / 'cut'}", "teacher_training.lr=0.5")
    assert other.returncode == 2 and "an unfinished run with another lr;" in other.stderr, other.stderr
    again = dsno("train-teacher", *few, f"storage.root={tmp_path / 'cut'}")
    assert again.returncode == 0 and "steps 4 to 6" in again.stderr, again.stderr
    files = [tmp_path / root / "teachers/digits/model.safetensors" for root in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # nothing to go on from is left
    left = [p.name for p in sorted((tmp_path / "cut/teachers").iterdir()) if not p.name.startswith(".")]
    assert left == ["digits", "digits-owner.json"]


def test_shipped_teacher_rows_are_those_of_the_digits_config(tmp_path: Path) -> None:
    """`eval` of the default config finds every row of the teacher measured already."""
    from dsno_cluster.config import load_config
    from dsno_cluster.evaluation.look_up import Student, Subject, look_up
    from dsno_cluster.teachers import find_teacher

    def rows_of(*words: str) -> list[int]:
        config = load_config("configs/digits.yaml", [f"storage.root={tmp_path}", *words])
        subject = Subject(config, find_teacher(config), Student("none", "0" * 64, 1, None, None))
        found = look_up(subject)
        assert all(row.shipped for row in found.known.values())  # which `eval` says
        return [found.known[s].evaluations for s in found.samplings if s in found.known]

    assert rows_of() == [1, 4, 8, 18, 64]
    assert rows_of("finish.enabled=true") == [1, 4, 8, 18, 64]
    assert rows_of("evaluation.num_samples=1000") == []


def test_samples_finished_by_the_teacher(demo: tuple[Path, str, str], tmp_path: Path) -> None:
    """`sample --refine`: the student's state at a time, then DDIM as the solver module has it."""
    from dsno_cluster import load_student, load_teacher, solve
    from dsno_cluster.diffusion.noise import sample_labels, sample_noise

    path, out = str(demo[0] / "students/digits"), tmp_path / "x.npz"
    done = dsno("sample", path, "--num", "4", "--refine", "2", "--refine-from", "0.5625", "--out", str(out))
    assert done.returncode == 0 and "3 network evaluations" in done.stderr, done.stderr
    noise, labels = sample_noise(1, range(4), (1, 8, 8)), sample_labels(1, range(4), 10)
    state = load_student(path).trajectory(noise, labels, [0.5625])[:, 0]
    grid = [0.5625, 0.5625 / 4, 0.0]
    images = solve(load_teacher("package:digits-teacher"), state, [0.0], "ddim", 2, labels, grid=grid)[:, 0]
    assert np.abs(np.load(out)["images"].astype(int) - to_uint8(images).numpy()).max() <= 1
    for wrong, says in [
        (["--refine-from", "0.3"], "--refine K"),
        (["--refine", "1", "--refine-from", "1.5"], "between 0"),
        (["--refine", "1", "--teacher", str(DATA / "published/teacher_flax_x")], "network."),
    ]:
        refused = dsno("sample", path, *wrong, "--out", str(out))
        assert refused.returncode == 2 and says in refused.stderr, refused.stderr
