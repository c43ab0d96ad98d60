"""What a training shows, when it stops by itself, and how its students reach a storage that does not always answer."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from faulty_s3 import faulty_s3
from PIL import Image
from test_storage import KEYS
from test_storage import s3_endpoint as s3_endpoint  # the fixture
from tiny import TINY, dsno
from training_runs import (
    STUDENT,
    checkpoints,
    ends,
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
from dsno_cluster.model_folder import package_path
from dsno_cluster.storage import open_storage
from dsno_cluster.training.divergence import DivergenceWatch
from dsno_cluster.trajectories.shards import commit_manifest, read_manifest, read_shard, write_shard


@pytest.mark.slow
def test_metrics_pictures_and_held_out_errors(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    watched = ["training.heldout_every=2", "training.heldout_samples=20", "training.picture_every=2"]
    done = train(tiny_data, out, *watched, "training.tensorboard=true")
    assert "images/s" in done.stderr and "data wait" in done.stderr and "by time" in done.stderr
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert len(line["distance_per_time"]) == 4 and line["images_per_second"] > 0
        assert 0 <= line["data_wait"] < 1 and 0.1 < line["memory_gb"] < 20 and line["lr"] > 0
    assert ["heldout_error_per_time" in line for line in lines] == [False, True, False, True]

    # the error is the one that eval measures, of the same noise
    evaluated = dsno("eval", *TINY, f"storage.root={out}", "--launcher", "local", "--actors", "1", "--json")
    expected = json.loads(evaluated.stdout)["student"]["trajectory_error"]
    assert lines[-1]["heldout_error_per_time"] == pytest.approx(list(expected.values()), rel=1e-5)

    picture = Image.open(out / STUDENT / "samples/step-000000004.png").convert("L")
    student = load_student(str(out))
    with torch.no_grad():
        images = student.sample(sample_noise(1, range(20), (1, 8, 8)), sample_labels(1, range(20), 10))
    first = (127.5 * images[0, 0] + 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    assert np.array_equal(np.asarray(picture)[4 : 4 + 48 : 6, 4 : 4 + 48 : 6], first)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / STUDENT / "tensorboard"))
    board.Reload()
    shown = [(event.step, event.value) for event in board.Scalars("loss")]
    assert shown == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    assert "heldout_error_per_time/3" in board.Tags()["scalars"] and board.Tags()["images"] == ["samples"]


def with_bad_sample(tiny_data: Path, out: Path, sample: int) -> None:
    """The tiny data set with one sample whose states are not finite, though every checksum agrees."""
    storage, theirs = open_storage(str(out)), open_storage(str(tiny_data))
    folder = f"trajectories/{next((tiny_data / 'trajectories').iterdir()).name}/"
    manifest, _ = read_manifest(theirs, folder) or (None, "")
    assert manifest is not None
    lines = []
    for index, shard in enumerate(manifest.shards):
        tensors = read_shard(theirs, folder, shard)
        if shard.start <= sample < shard.stop:
            tensors["states"][2, sample - shard.start, 0, 0, 0] = torch.nan
        lines.append(write_shard(storage, folder, index, shard.start, tensors))
    commit_manifest(storage, folder, manifest.model_copy(update={"shards": tuple(lines)}))


@pytest.mark.parametrize("ranks", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_names_step_sample_and_the_good_checkpoint(
    ranks: str, tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with_bad_sample(tiny_data, out, 37)
    # in production order, sample 37 is in the third batch of 16
    command = [*words(out, "reader.shuffle=none"), "--launcher", "local", "--tasks-per-node", ranks]
    failed = dsno(*command)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    assert "step 3: the loss is not finite" in failed.stderr, failed.stderr
    assert "samples 37 of shard-000002.safetensors" in failed.stderr, failed.stderr
    assert "step 2, " in failed.stderr and str(out / STUDENT / "resume/step-000000002") in failed.stderr
    assert checkpoints(out) == [2]
    assert all(tensor.isfinite().all() for tensor in weights(out, 2).values())


@pytest.mark.slow
def test_a_training_that_diverges_stops(tiny_data: Path, tmp_path: Path) -> None:
    """By a loss that is not finite, or by one that is out of all proportion: here, a hair above its mean."""
    out = tmp_path / "out"
    link_data(tiny_data, out)
    wild = ["training.lr=1e30", "training.lr_decay=none", "training.ema_decay=0.999"]
    failed = dsno(*words(out, *wild), "--launcher", "local")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    assert "not finite" in failed.stderr and "samples" in failed.stderr, failed.stderr
    strict = ["training.steps=200", "training.divergence_factor=1.0001", "name=strict"]
    failed = dsno(*words(out, *strict), "--launcher", "local")
    assert failed.returncode == 1 and "times its running mean" in failed.stderr, failed.stderr


def test_divergence_is_told_by_time_point_and_not_at_once() -> None:
    watch = DivergenceWatch(5.0, ["distance at time point 0", "distance at time point 1"])
    assert all(watch.problem([1.0, None]) is None for _ in range(49))
    assert watch.problem([1.0, 0.1]) is None
    assert watch.problem([4.9, 3.0]) is None  # of the second point it has seen nothing yet
    found = watch.problem([6.0, 0.1])
    assert found is not None and "time point 0" in found
    assert DivergenceWatch(0.0, ["distance at time point 0"]).problem([1e9]) is None


@pytest.mark.slow
def test_uploads_are_tried_again_and_never_stop_training(
    tiny_data: Path, tmp_path: Path, s3_endpoint: str
) -> None:
    """The storage refuses the first student until training is over; then the same command uploads it."""
    root, run = "s3://bucket/uploads", tmp_path / "run"
    folder = next((tiny_data / "trajectories").iterdir())
    os.environ.update(KEYS)
    storage = open_storage(root, s3_endpoint)
    for path in folder.iterdir():
        storage.write(f"trajectories/{folder.name}/{path.name}", path.read_bytes())
    with faulty_s3(s3_endpoint) as s3:
        s3.fault = lambda method, path, number: "500" if method == "PUT" and "step-000000002" in path else ""
        where = [f"storage.root={root}", f"storage.endpoint_url={s3.url}", f"run.dir={run}"]
        command = [*words(tmp_path), *where, "training.keep_checkpoints=1", "--launcher", "local"]
        failed = dsno(*command)
        assert failed.returncode == 1 and "a student is not uploaded, step-000000002" in failed.stderr, (
            failed.stderr
        )
        assert "training continues" in failed.stderr and "bucket" in failed.stderr
        assert checkpoints(run) == [4]
        assert storage.read("students/digits/latest").decode().strip() == "step-000000004"
        here = [p.name for p in sorted((run / STUDENT).glob("step-*"))]
        assert here == ["step-000000002", "step-000000004"]  # kept, as it is nowhere else
        s3.fault = lambda method, path, number: ""
        again = dsno(*command)
        assert again.returncode == 0 and "finished already" in again.stderr, again.stderr
    for step in (2, 4):
        assert storage.stat(f"students/digits/step-{step:09d}/meta.json") is not None
    assert storage.read("students/digits/latest").decode().strip() == "step-000000004"
    assert [p.name for p in sorted((run / STUDENT).glob("step-*"))] == ["step-000000004"]
    uploaded = load_student(f"{root}/students/digits", s3_endpoint)
    theirs = load_student(str(run))
    assert all(torch.equal(a, b) for a, b in zip(uploaded.parameters(), theirs.parameters(), strict=True))


def test_tensorboard_takes_a_line_without_a_warning(tmp_path: Path) -> None:
    from dsno_cluster.training.metrics_log import MetricsLine, MetricsLog, metrics_file

    place = [f"run.dir={tmp_path}", f"storage.root={tmp_path}", "training.tensorboard=true"]
    config = load_config("configs/digits.yaml", [*TINY, *place])
    metrics_file(config).parent.mkdir(parents=True)
    line = MetricsLine(
        step=1,
        loss=0.5,
        lr=0.1,
        seconds=1.0,
        distance_per_time=(None, 0.25),
        images_per_second=1.0,
        data_wait=0.0,
        memory_gb=0.0,
    )
    log = MetricsLog(config, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        log.write(line)
        log.write(line.model_copy(update={"step": 2, "heldout_distance": 1.5}))
        line.model_dump()
    written = [json.loads(text) for text in metrics_file(config).read_text().splitlines()]
    assert [line.get("heldout_distance", "none") for line in written] == ["none", 1.5]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(metrics_file(config).parent / "tensorboard"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("heldout_distance")] == [(2, 1.5)]


def test_tensorboard_that_is_not_installed_is_said_at_once(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    link_data(tiny_data, out)
    (tmp_path / "tensorboard.py").write_text("raise ImportError('not installed')")
    failed = dsno(*words(out, "training.tensorboard=true"), "--launcher", "local", PYTHONPATH=str(tmp_path))
    assert failed.returncode == 2 and "pip install tensorboard" in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr


@pytest.mark.slow
def test_online_training_gives_the_weights_of_an_offline_run(tmp_path: Path) -> None:
    """An epoch and a half of 24 shards, of which 14 may be on disk; killed on the way, with two ranks."""
    shards = ["trajectories.num_samples=192", "trajectories.samples_per_shard=8", "trajectories.batch_size=8"]
    order = [*shards, "reader.shuffle=none", "training.steps=18", "reader.prefetch_batches=1"]
    order += ["training.checkpoint_every=4"]
    offline, out = tmp_path / "offline", tmp_path / "online"
    made = dsno("gen-trajectories", *TINY, *shards, f"storage.root={offline}", "--launcher", "local")
    assert made.returncode == 0, made.stderr
    train(offline, offline, *order, "--tasks-per-node", "2")
    online = ["training.online=true", "training.online_staged_shards=14", "training.online_actors=2"]
    command = [*words(out, *order, *online), "--launcher", "local", "--tasks-per-node", "2"]
    staged = 0

    def look(then: bool) -> bool:
        nonlocal staged
        listed = list((out / STUDENT / "staging").rglob("shard-*"))
        # those that are still there were there together when the listing ended; it may name others that went meanwhile
        staged = max(staged, sum(path.exists() for path in listed))
        return then

    job = subprocess.Popen([sys.executable, "-m", "dsno_cluster.cli", *command], stderr=subprocess.DEVNULL)
    wait_for(lambda: look(4 in checkpoints(out)))
    for process in (psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)):
        process.kill()
    job.wait()
    assert checkpoints(out)[-1] < 18
    again = subprocess.Popen(
        [sys.executable, "-m", "dsno_cluster.cli", *command], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: look(again.poll() is not None), 120)
    assert again.returncode == 0, again.communicate()[1]
    assert 8 < staged <= 14
    assert not (out / "trajectories").exists()
    model = f"{STUDENT}/step-000000018/model.safetensors"
    assert (out / model).read_bytes() == (offline / model).read_bytes()


@pytest.mark.slow
def test_a_teacher_on_s3_is_trained_from_online(
    s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its actors write to a folder of this machine, and know where the teacher is all the same."""
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    teacher = open_storage("s3://bucket/online-teacher", s3_endpoint)
    for file in Path(package_path("package:digits-teacher")).iterdir():
        teacher.write(file.name, file.read_bytes())
    how = ["training.online=true", "training.online_actors=1", "reader.shuffle=none"]
    there = ["teacher.path=s3://bucket/online-teacher", f"storage.endpoint_url={s3_endpoint}"]
    done = dsno(*words(tmp_path, *how, *there), "--launcher", "local")
    assert done.returncode == 0, done.stderr
    assert checkpoints(tmp_path)[-1] == 4


@pytest.mark.slow
def test_ranks_of_online_training_do_not_wait_for_a_rank_or_a_producer_that_is_gone(tmp_path: Path) -> None:
    """Killed while the ranks wait: trajectories of a teacher that takes its time."""
    (tmp_path / "slow_teacher.py").write_text(
        "import time\nclass Slow:\n    shape, num_classes = (1, 8, 8), 10\n"
        "    def __call__(self, x, t, labels=None):\n        time.sleep(3600)\n"
    )
    how = [
        "reader.shuffle=none",
        "training.online=true",
        "training.online_actors=1",
        "student.warm_start=false",
    ]
    teacher = ["teacher.path=slow_teacher:Slow", "network.null_class=false"]
    os.environ["PYTHONPATH"] = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    for victim in ("rank", "producer"):
        ranks = start_ranks(tmp_path / victim, 2, *how, *teacher)

        def producers(ranks: list[subprocess.Popen[str]] = ranks) -> list[psutil.Process]:
            found = []
            for process in psutil.Process(ranks[0].pid).children():
                # others come and go; zombies are of this kind
                with contextlib.suppress(psutil.NoSuchProcess):
                    if "dsno_cluster.training.online" in process.cmdline() and process.children():
                        found.append(process)
            return found

        wait_for(lambda: bool(producers()))
        (ranks[0] if victim == "rank" else producers()[0]).kill()
        codes, errors = ends(ranks, timeout=60)
        assert codes == [-9 if victim == "rank" else 1, 1], errors
        assert "Traceback" not in errors[1], errors


@pytest.mark.slow
def test_online_training_tells_why_no_more_trajectories_come(tmp_path: Path) -> None:
    (tmp_path / "broken_teacher.py").write_text(
        "class Broken:\n    shape, num_classes = (1, 8, 8), 10\n"
        "    def __call__(self, x, t, labels=None): raise ValueError('no such number')\n"
    )
    how = [
        "reader.shuffle=none",
        "training.online=true",
        "training.online_actors=1",
        "student.warm_start=false",
    ]
    teacher = ["teacher.path=broken_teacher:Broken", "network.null_class=false"]
    failed = dsno(*words(tmp_path / "out", *how, *teacher), "--launcher", "local", PYTHONPATH=str(tmp_path))
    assert failed.returncode == 1 and "Traceback" not in failed.stderr, failed.stderr
    assert "no more trajectories come" in failed.stderr and "no such number" in failed.stderr, failed.stderr
