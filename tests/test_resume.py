"""Training that is killed, preempted, moved to other ranks or out of disk: the same command ends as if nothing was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from tiny import TINY, answer, dsno, small_disk
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

THIRTY = [
    "training.steps=30",
    "training.checkpoint_every=5",
    "network.dropout=0.1",
    "training.ema_decay=[0.9, 0.5]",
]


@pytest.fixture(scope="module")
def whole_of_one(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of thirty steps on one rank that nothing disturbed; with dropout."""
    return undisturbed(tiny_data, tmp_path_factory.mktemp("whole"), ranks=1)


@pytest.fixture(scope="module")
def whole_of_two(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tiny_data, tmp_path_factory.mktemp("whole"), ranks=2)


def undisturbed(data: Path, out: Path, ranks: int) -> Path:
    train(data, out, *THIRTY, "--tasks-per-node", str(ranks))
    return out


def same_bytes(out: Path, whole: Path) -> bool:
    files = [f"{STUDENT}/step-000000030/{name}.safetensors" for name in ("model", "ema-0.5")]
    return all((out / file).read_bytes() == (whole / file).read_bytes() for file in files)


def test_killed_at_any_moment_one_rank_resumes_to_the_same_bytes(
    whole_of_one: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = link_data(tiny_data, tmp_path / "out")
    command = [sys.executable, "-m", "dsno_cluster.cli", *words(out, *THIRTY, "--launcher", "local")]
    aside = [".step-000000005.tmp", "step-000000010", ".step-000000015.tmp", "step-000000020"]
    killed = 0
    for moment in aside:  # while a checkpoint is being written, and just after one
        victim = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        seen = out / STUDENT / "resume" / moment
        wait_for(lambda v=victim, seen=seen: seen.exists() or v.poll() is not None, pause=0.0005)
        killed += victim.poll() is None
        victim.kill()
        victim.wait()
    assert killed == len(aside)
    done = dsno(*command[3:])
    assert done.returncode == 0, done.stderr
    assert same_bytes(out, whole_of_one)
    assert [line["step"] for line in metrics(out)] == list(range(1, 31))
    assert [line["loss"] for line in metrics(out)] == [line["loss"] for line in metrics(whole_of_one)]
    assert not list((out / STUDENT / "resume").glob(".step*"))
    assert checkpoints(out) == [25, 30]
    third = dsno(*command[3:])
    assert third.returncode == 0 and "finished already" in third.stderr
    nothing = answer(*command[3:], "--dry-run")
    assert "nothing to do: digits has already reached step 30" in nothing.stdout, nothing.stderr
    slower = dsno(*command[3:], "training.lr=1e-5")
    assert slower.returncode == 2 and "now it is 1e-05; a new run needs another name=" in slower.stderr
    other = dsno(*command[3:], "training.loss=l2")
    assert other.returncode == 2 and "loss l1, now it is l2" in other.stderr, other.stderr
    # a run of that name from elsewhere would leave `latest` at a student of this one
    elsewhere = dsno(*command[3:], "training.loss=l2", f"run.dir={tmp_path / 'elsewhere'}")
    assert elsewhere.returncode == 2 and "loss l1, now it is l2" in elsewhere.stderr, elsewhere.stderr


@pytest.mark.slow
def test_a_learning_rate_that_is_changed_on_the_way_is_told(tiny_data: Path, tmp_path: Path) -> None:
    out = link_data(tiny_data, tmp_path / "out")
    train(tiny_data, out, "training.steps=2", "training.lr=2e-4")
    for steps in (4, 6):
        done = train(tiny_data, out, f"training.steps={steps}", "training.lr=1e-3")
        said = "training.lr: 0.0002 until step 2, 0.001 from here on" in done.stderr
        assert said == (steps == 4), done.stderr
    meta = json.loads((out / STUDENT / "step-000000006/meta.json").read_text())
    assert meta["changes"] == [{"step": 2, "key": "training.lr", "before": 0.0002, "after": 0.001}]
    assert answer("report", *TINY, f"storage.root={out}", "--out", str(out / "x.html")).returncode == 0
    assert "training.lr was 0.0002 until step 2" in (out / "x.html").read_text()


@pytest.mark.slow
def test_before_the_first_step_there_is_nothing_to_wait_for(tiny_data: Path, tmp_path: Path) -> None:
    """Ctrl-C while minutes of preparation are on their way."""
    out = link_data(tiny_data, tmp_path / "out")
    long = ["training.heldout_every=1", "training.heldout_samples=100000", "--launcher", "local"]
    command = [sys.executable, "-m", "dsno_cluster.cli", *words(out, *long)]
    job = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert job.stderr is not None
    assert any("solving 100000 held-out trajectories" in line for line in job.stderr)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    assert job.returncode == 130 and "Traceback" not in said, said
    assert not checkpoints(out)


@pytest.mark.slow
def test_one_of_two_ranks_killed_ends_the_job_and_the_same_command_finishes_it(
    whole_of_two: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = link_data(tiny_data, tmp_path / "out")
    command = [*words(out, *THIRTY), "--launcher", "local", "--tasks-per-node", "2"]
    job = subprocess.Popen(
        [sys.executable, "-m", "dsno_cluster.cli", *command], stderr=subprocess.PIPE, text=True
    )
    wait_for(lambda: 5 in checkpoints(out))
    # the command's child is submitit's controller, whose children are the ranks
    ranks = [rank for controller in psutil.Process(job.pid).children() for rank in controller.children()]
    (second,) = [r for r in ranks if r.environ()["SUBMITIT_LOCAL_GLOBALID"] == "1"]
    second.kill()
    _, said = job.communicate(timeout=120)
    assert job.returncode == 1 and "Traceback" not in said, said
    assert "rank 1 on " in said and "was ended by SIGKILL; the same command resumes" in said, said
    assert not any(r.is_running() and r.status() != psutil.STATUS_ZOMBIE for r in ranks)
    again = dsno(*command)
    assert again.returncode == 0, again.stderr
    assert same_bytes(out, whole_of_two)


# Other ranks sum gradients in another order: losses agree to float32 rounding (see test_training.py).
@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("1", "2"), ("3", "2")),
        (("3", "2"), ("0", "4")),
        (("0", "2"), ("2", "4")),
    ],
    ids=["z1x2 to z3x2", "z3x2 to z0x4", "z0x2 to z2x4"],
)
def test_goes_on_with_another_stage_on_other_ranks(
    before: tuple[str, str], after: tuple[str, str], tiny_data: Path, tmp_path: Path
) -> None:
    steady = ["training.lr_decay=none", "training.warmup=0"]  # both depend on how many steps there will be
    train(tiny_data, tmp_path / "whole", "training.steps=8", *steady)
    out = tmp_path / "out"
    for steps, (stage, ranks) in (("4", before), ("8", after)):
        how = [f"training.zero_stage={stage}", "--tasks-per-node", ranks, *steady]
        done = train(tiny_data, out, f"training.steps={steps}", *how)
    assert "steps 4 to 8" in done.stderr
    lines, expected = metrics(out), metrics(tmp_path / "whole")
    assert [line["loss"] for line in lines] == pytest.approx([x["loss"] for x in expected], rel=5e-4)
    found, truth = weights(out, 8), weights(tmp_path / "whole", 8)
    start = weights(tmp_path / "whole", 2)
    moved = torch.cat([(truth[k] - start[k]).flatten() for k in truth])
    apart = torch.cat([(truth[k] - found[k]).flatten() for k in truth])
    assert float(apart.norm() / moved.norm()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "stage"),
    [("bfloat16", "1"), ("float16", "2"), ("bfloat16", "0"), ("bfloat16", "3"), ("float16", "0")],
)
def test_half_precision_keeps_the_last_bits_of_its_master_weights(
    precision: str, stage: str, tiny_data: Path, tmp_path: Path
) -> None:
    """And float16 the scale of its loss."""
    out = link_data(tiny_data, tmp_path / "out")
    how = [f"training.precision={precision}", f"training.zero_stage={stage}", "training.steps=8"]
    train(tiny_data, out, *how)
    model = out / STUDENT / "step-000000008/model.safetensors"
    truth, lines = model.read_bytes(), metrics(out)
    shutil.rmtree(out / STUDENT / "resume/step-000000008")
    shutil.rmtree(model.parent)
    again = train(tiny_data, out, *how)
    assert "steps 6 to 8" in again.stderr
    assert model.read_bytes() == truth
    assert [x["loss"] for x in metrics(out)] == [x["loss"] for x in lines]
    assert [x.get("loss_scale") for x in metrics(out)] == [x.get("loss_scale") for x in lines]
    assert (lines[-1].get("loss_scale", 0) > 1) == (precision == "float16")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_saves_on_all_and_the_same_command_goes_on(
    number: int, whole_of_two: Path, tiny_data: Path, tmp_path: Path
) -> None:
    out = link_data(tiny_data, tmp_path / "out")
    often = [*THIRTY, "training.checkpoint_every=1000"]  # so that it is the signal that saves
    ranks = start_ranks(out, 2, *often)
    wait_for(lambda: (out / STUDENT / "metrics.jsonl").is_file() and len(metrics(out)) >= 2)
    kill(ranks[1], number)
    codes, errors = ends(ranks)
    assert codes == [130, 130], errors
    (saved,) = checkpoints(out)
    assert saved == metrics(out)[-1]["step"] < 30 and f"saved at step {saved}" in errors[0], errors
    codes, errors = ends(start_ranks(out, 2, *often))
    assert codes == [0, 0], errors
    assert same_bytes(out, whole_of_two)


@pytest.mark.slow
def test_control_c_at_the_terminal_saves_a_job_of_two_ranks(tiny_data: Path, tmp_path: Path) -> None:
    """The terminal sends SIGINT to the whole process group; the ranks are told once, and save."""
    out = link_data(tiny_data, tmp_path / "out")
    often = [*THIRTY, "training.checkpoint_every=1000", "training.steps=3000"]
    command = [sys.executable, "-m", "dsno_cluster.cli", *words(out, *often), "--launcher", "local"]
    job = subprocess.Popen(
        [*command, "--tasks-per-node", "2"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: (out / STUDENT / "metrics.jsonl").is_file() and len(metrics(out)) >= 2)
    ranks = psutil.Process(job.pid).children(recursive=True)
    second = subprocess.run([*command, "--tasks-per-node", "2"], capture_output=True, text=True, check=False)
    assert second.returncode == 1 and "another training writes there" in second.stderr, second.stderr
    os.killpg(job.pid, signal.SIGINT)
    _, said = job.communicate(timeout=120)
    assert job.returncode == 130 and "Traceback" not in said, said
    assert checkpoints(out) == [metrics(out)[-1]["step"]]
    assert not any(r.is_running() and r.status() != psutil.STATUS_ZOMBIE for r in ranks)


@pytest.mark.slow
def test_a_notice_to_leave_is_requeued_and_finishes_by_submitit(tiny_data: Path, tmp_path: Path) -> None:
    """The whole cycle of submitit's local executor: the notice that it gives, save, requeue, finish."""
    import submitit
    from submitit.local.local import LocalJobEnvironment

    from dsno_cluster.cluster.rendezvous import free_ports
    from dsno_cluster.cluster.runs import create_run
    from dsno_cluster.cluster.stage import Submission
    from dsno_cluster.cluster.task import StageTask
    from dsno_cluster.config import load_config, load_profile
    from dsno_cluster.stages import TRAIN

    out = link_data(tiny_data, tmp_path / "out")
    config = load_config(
        "configs/digits.yaml", words(out, "training.steps=150", "training.checkpoint_every=100000")[1:]
    )
    submission = Submission(TRAIN, config, load_profile(TRAIN.name, {}), "a test")
    run = create_run(submission, snapshot=False)
    executor = submitit.LocalExecutor(run.folder / "submitit", max_num_timeout=10)
    executor.update_parameters(timeout_min=10, tasks_per_node=2, nodes=1)
    os.environ["MASTER_PORT"] = str(free_ports(1)[0])
    job = executor.submit(StageTask(TRAIN, TRAIN.options(), str(run.folder)))
    controller = psutil.Process(int(job.job_id))
    # before the first step there would be nothing to save
    wait_for(lambda: (out / STUDENT / "metrics.jsonl").is_file() and len(metrics(out)) >= 2, pause=0.1)
    for rank in controller.children():  # as Slurm and the local executor do: to every task
        rank.send_signal(LocalJobEnvironment._usr_sig())
    job.results()
    log = (job.paths.stderr.parent / f"{job.job_id}_0_log.err").read_text()
    assert "stopped by a signal: saved at step" in log and "the job asks to be requeued" in log, log
    assert checkpoints(out)[-1] == 150 and metrics(out)[-1]["step"] == 150


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before_whole(
    whole_of_two: Path, tiny_data: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "60m") as resize:
        out = link_data(tiny_data, tmp_path / "out")
        command = [*words(out, *THIRTY, f"run.dir={disk}"), "--launcher", "local", "--tasks-per-node", "2"]
        full = dsno(*command)
        before = checkpoints(disk)
        assert full.returncode == 1 and before and before[-1] < 30, full.stderr
        assert f"the checkpoint of step {before[-1]} is whole" in full.stderr, full.stderr
        assert "No space left on device" in full.stderr and "Traceback" not in full.stderr, full.stderr
        resize("1g")
        done = dsno(*command)
        assert done.returncode == 0, done.stderr
        assert same_bytes(out, whole_of_two)


def test_the_newest_checkpoints_are_kept_and_the_best(tiny_data: Path, tmp_path: Path) -> None:
    """A learning rate that soon makes the student worse, so that an early checkpoint is the best."""
    out = tmp_path / "out"
    worse = [
        "training.lr=0.05",
        "training.lr_decay=none",
        "training.ema_decay=0",
        "training.divergence_factor=0",
    ]
    often = ["training.steps=10", "training.checkpoint_every=2", "training.keep_checkpoints=1"]
    train(tiny_data, out, *worse, *often, "training.heldout_every=2", "training.heldout_samples=8")
    errors = {
        x["step"]: x["heldout_error_per_time"][-1] for x in metrics(out) if "heldout_error_per_time" in x
    }
    assert list(errors) == [2, 4, 6, 8, 10]
    best = min(errors, key=lambda step: errors[step])
    assert best < 10
    assert (out / STUDENT / "best").read_text().strip() == f"step-{best:09d}"
    assert checkpoints(out) == [best, 10]
    assert (out / STUDENT / "latest").read_text().strip() == "step-000000010"


def test_a_damaged_checkpoint_is_named(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train(tiny_data, out)
    file = out / STUDENT / "resume/step-000000004/rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    failed = dsno(*words(out, "training.steps=6"), "--launcher", "local")
    assert failed.returncode == 1 and str(file) in failed.stderr and "Traceback" not in failed.stderr
    assert json.loads((file.parent / "state.json").read_text())["step"] == 4


def test_a_damaged_state_is_one_line_and_strange_files_are_left_alone(
    tiny_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    train(tiny_data, out)
    resume = out / STUDENT / "resume"
    # such as folder markers of a copy through S3
    for stray in ("step-000000099", "step-12.bak", "notes.txt"):
        (resume / stray).touch()
    (resume / "step-000000004/.marker").touch()
    file = resume / "step-000000004/state.json"
    whole = file.read_text()
    command = [*words(out, "training.steps=6"), "--launcher", "local"]
    state, delete = json.loads(whole), f"delete {file.parent} to continue"
    aside, newer = (
        f"move {file.parent} away",
        "a newer dsno-cluster wrote it, and this version cannot continue it",
    )
    for damaged, says, advice in [
        (whole[:100], "cannot be read (", delete),
        ("[]", "should be an object", aside),
        (json.dumps(state | {"optimizer_steps": "four"}), "optimizer_steps: ", aside),
        (json.dumps(state | {"schema_version": 2}), "schema_version: ", newer),
        (
            json.dumps(state | {"identity": state["identity"] | {"colour": "blue"}}),
            "identity.colour: ",
            newer,
        ),
    ]:
        file.write_text(damaged)
        failed = dsno(*command)
        assert failed.returncode == 1 and len(failed.stderr.splitlines()) == 1, failed.stderr
        assert f"{file}: " in failed.stderr and says in failed.stderr, failed.stderr
        assert advice in failed.stderr and ("delete" in failed.stderr) == (advice == delete), failed.stderr
    file.write_text(whole)
    done = dsno(*command)
    assert done.returncode == 0 and "steps 4 to 6" in done.stderr, done.stderr
    assert (resume / "notes.txt").exists()
