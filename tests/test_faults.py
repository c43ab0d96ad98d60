"""Faults while trajectories are made: the work goes on or stops with the reason, and the same command finishes it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import TINY, answer, dsno, small_disk

# A teacher that misbehaves on some samples, as long as a file says so: how it does stands in that file.
FAULTY = """
import os, time
from pathlib import Path
import torch
from dsno_cluster import load_teacher
from dsno_cluster.diffusion.noise import sample_noise

class Faulty:
    shape, num_classes = (1, 8, 8), 10
    def __init__(self, folder, samples):
        self.teacher = load_teacher("package:digits-teacher")
        self.folder = Path(folder)
        self.marked = sample_noise(0, samples, self.shape)
    def __call__(self, x, t, labels=None):
        fault = self.folder / "fault"
        if float(torch.as_tensor(t).max()) == 1.0 and fault.exists() and any(torch.equal(a, b) for a in x for b in self.marked):
            with (self.folder / "attempts").open("a") as file:
                file.write("x")
            exec(fault.read_text())
        return self.teacher(x, t, labels)

def make(folder, samples):
    return Faulty(folder, samples)
"""


def words(root: Path, folder: Path, actors: int = 1, shards: Sequence[int] = (2,)) -> list[str]:
    """A run of the faulty teacher, 6 shards of 16; it misbehaves on one sample of each of `shards`."""
    return [
        "gen-trajectories",
        *TINY,
        "network.null_class=false",
        f"storage.root={root}",
        "teacher.path=faulty_teacher:make",
        f"teacher.options={{folder: '{folder}', samples: {[16 * shard + 8 for shard in shards]}}}",
        "--launcher",
        "local",
        "--actors",
        str(actors),
    ]


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    (tmp_path / "faulty_teacher.py").write_text(FAULTY)
    return tmp_path


def shards(root: Path) -> dict[str, float]:
    return {p.name: p.stat().st_mtime_ns for p in sorted(root.glob("trajectories/*/shard-*"))}


@pytest.mark.slow
def test_a_shard_that_always_fails_stops_the_run_after_the_others(faulty: Path) -> None:
    (faulty / "fault").write_text("raise ValueError('no such number')")
    root = faulty / "root"
    failed = dsno(*words(root, faulty), PYTHONPATH=str(faulty))
    assert failed.returncode == 1, failed.stderr
    assert "no such number" in failed.stderr and "Traceback" not in failed.stderr, failed.stderr
    assert (faulty / "attempts").read_text() == "xxx"
    made = shards(root)
    assert len(made) == 5 and "shard-000002.safetensors" not in made
    assert not list(root.glob("trajectories/*/manifest.json"))

    (faulty / "fault").unlink()
    healed = dsno(*words(root, faulty), PYTHONPATH=str(faulty))
    assert healed.returncode == 0 and "1 to make" in healed.stderr, healed.stderr
    assert {name: when for name, when in shards(root).items() if name in made} == made  # nothing made twice
    folder = next((root / "trajectories").iterdir())
    assert answer("verify", str(folder)).returncode == 0
    assert sorted(p.name for p in folder.iterdir()) == ["manifest.json", *shards(root)]


@pytest.mark.slow
def test_shards_that_always_fail_do_not_keep_the_others_from_being_made(faulty: Path) -> None:
    (faulty / "fault").write_text("raise ValueError('no such number')")
    root = faulty / "root"
    failed = dsno(*words(root, faulty, shards=(0, 1, 2)), PYTHONPATH=str(faulty))
    assert failed.returncode == 1 and "3 of 6 tasks failed again and again" in failed.stderr, failed.stderr
    assert "no such number" in failed.stderr and (faulty / "attempts").read_text() == 9 * "x"
    assert list(shards(root)) == [f"shard-{index:06d}.safetensors" for index in (3, 4, 5)]


@pytest.mark.slow
def test_a_run_whose_shards_all_fail_once_heals(faulty: Path) -> None:
    (faulty / "fault").write_text(
        "if len((self.folder / 'attempts').read_text()) <= 6: raise OSError('for a moment')"
    )
    root = faulty / "root"
    healed = dsno(*words(root, faulty, shards=range(6)), PYTHONPATH=str(faulty))
    assert healed.returncode == 0 and len(shards(root)) == 6, healed.stderr


@pytest.mark.slow
def test_a_cause_that_all_shards_share_stops_a_long_run_soon(faulty: Path) -> None:
    (faulty / "fault").write_text("raise ValueError(f'cannot run, {time.time()} s')")
    root = faulty / "root"
    command = [*words(root, faulty, shards=range(60)), "trajectories.num_samples=960"]
    failed = dsno(*command, PYTHONPATH=str(faulty))
    assert failed.returncode == 1 and "cannot run" in failed.stderr, failed.stderr
    assert 16 <= len((faulty / "attempts").read_text()) < 24 and not shards(root)


@pytest.mark.slow
def test_a_shard_that_another_run_made_with_other_bits_is_left_alone(faulty: Path) -> None:
    (faulty / "fault").write_text(
        "path = next(self.folder.glob('root/trajectories/*')) / 'shard-000002.safetensors'\n"
        "path.write_bytes(b'theirs')"
    )
    root = faulty / "root"
    failed = dsno(*words(root, faulty), PYTHONPATH=str(faulty))
    assert failed.returncode == 1, failed.stderr
    assert "shard-000002.safetensors: exists, made with other bits" in failed.stderr, failed.stderr
    assert "Traceback" not in failed.stderr and len(shards(root)) == 6
    (theirs,) = root.glob("trajectories/*/shard-000002*")
    assert theirs.read_bytes() == b"theirs" and not list(root.glob("trajectories/*/manifest.json"))
    (faulty / "fault").unlink()
    again = dsno(*words(root, faulty), PYTHONPATH=str(faulty))  # which sees that it is no shard
    assert again.returncode == 0 and "1 to make" in again.stderr, again.stderr
    assert answer("verify", str(theirs.parent)).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["once", "always"])
def test_shards_that_vanish_before_the_manifest_is_written_are_made_again(faulty: Path, how: str) -> None:
    """While one of the shards 1 and 4 is made, the other is deleted."""
    root = faulty / "root"
    (faulty / "fault").write_text(
        f"if {how!r} == 'always' or len((self.folder / 'attempts').read_text()) <= 2:\n"
        "    for shard in (1, 4):\n"
        "        for path in self.folder.glob(f'root/trajectories/*/shard-{shard:06d}*'): path.unlink()\n"
    )
    made = dsno(*words(root, faulty, shards=(1, 4)), PYTHONPATH=str(faulty))
    assert "1 shards have vanished since they were made; they are made again" in made.stderr, made.stderr
    if how == "always":
        assert made.returncode == 1 and "does a lifecycle rule of the bucket" in made.stderr, made.stderr
        assert (faulty / "attempts").read_text() == "xxxx" and not list(
            root.glob("trajectories/*/manifest.json")
        )
        return
    assert made.returncode == 0 and len(shards(root)) == 6, made.stderr
    assert answer("verify", str(next((root / "trajectories").iterdir()))).returncode == 0


def factory(folder: Path, words: str) -> list[str]:
    """A run with a teacher of a package `changing`, whose class body has `words`."""
    (folder / "changing").mkdir()
    (folder / "changing" / "teacher.py").write_text(
        "class Flat:\n    shape, num_classes = (1, 8, 8), 10\n"
        f"    {words}\n    def __call__(self, x, t, labels=None): return 0 * x\n"
    )
    (folder / "changing" / "__init__.py").touch()
    root = [f"storage.root={folder / 'root'}", "--launcher", "local", "--actors", "1"]
    return [
        "gen-trajectories", *TINY, "network.null_class=false", "teacher.path=changing.teacher:Flat", *root
    ]  # fmt: skip


@pytest.mark.slow
def test_a_teacher_that_changed_since_the_run_began_is_refused(tmp_path: Path) -> None:
    command = factory(tmp_path, "pass")
    (tmp_path / "changing" / "__init__.py").write_text(  # each process that looks finds another teacher
        "from pathlib import Path\n"
        "with Path(__file__).with_name('teacher.py').open('a') as file: file.write('# changed\\n')\n"
    )
    refused = dsno(*command, PYTHONPATH=str(tmp_path))
    assert refused.returncode == 2, refused.stderr
    assert "the teacher changed, or differs on this node" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr and not list(tmp_path.glob("root/trajectories/*/*"))


@pytest.mark.slow
def test_a_factory_with_steps_of_its_own_names_the_key(tmp_path: Path) -> None:
    command = factory(tmp_path, "native_grid = lambda self, steps: (1.0, 0.6, 0.3, 0.0)")
    refused = dsno(*command, PYTHONPATH=str(tmp_path))
    assert refused.returncode == 2 and "trajectories.grid" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr and "tasks failed" not in refused.stderr
    made = dsno(*command, "trajectories.grid=uniform", PYTHONPATH=str(tmp_path))
    assert made.returncode == 0, made.stderr
    spec = json.loads(next(tmp_path.glob("root/trajectories/*/manifest.json")).read_text())["spec"]
    assert spec["grid"] == "uniform between time points"


def test_an_actor_that_dies_is_replaced(faulty: Path) -> None:
    (faulty / "fault").write_text(
        "if len((self.folder / 'attempts').read_text()) < 3: os.kill(os.getpid(), 9)"
    )
    root = faulty / "root"
    done = dsno(*words(root, faulty), PYTHONPATH=str(faulty))
    assert done.returncode == 0, done.stderr
    assert (faulty / "attempts").read_text() == "xxx" and len(shards(root)) == 6


@pytest.mark.slow
def test_shards_that_kill_every_actor_stop_a_long_run_and_name_memory(faulty: Path) -> None:
    (faulty / "fault").write_text("os.kill(os.getpid(), 9)")
    root = faulty / "root"
    command = [*words(root, faulty, actors=2, shards=range(20)), "trajectories.num_samples=320"]
    failed = dsno(*command, PYTHONPATH=str(faulty))
    assert failed.returncode == 1 and "each killed two actors" in failed.stderr, failed.stderr
    # a dead actor had two shards at a time, and both are counted
    assert "mem_gb" in failed.stderr and 16 <= len((faulty / "attempts").read_text()) < 40


@pytest.mark.slow
def test_idle_actors_run_the_slowest_shard_again(faulty: Path) -> None:
    """The first attempt hangs for longer than the test may take."""
    (faulty / "fault").write_text("if len((self.folder / 'attempts').read_text()) < 2: time.sleep(3600)")
    root = faulty / "root"
    done = dsno(*words(root, faulty, actors=2), PYTHONPATH=str(faulty), timeout=240)
    assert done.returncode == 0, done.stderr
    assert (faulty / "attempts").read_text() == "xx" and len(shards(root)) == 6


@pytest.mark.slow
def test_two_runs_of_one_spec_do_no_harm(tiny_data: Path, tmp_path: Path) -> None:
    import sys

    command = ["gen-trajectories", *TINY, f"storage.root={tmp_path}", "--launcher", "local", "--actors", "1"]
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "dsno_cluster.cli", *command], stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for run in runs:
        _, stderr = run.communicate(timeout=240)
        assert run.returncode == 0, stderr
    folder = next((tmp_path / "trajectories").iterdir())
    assert json.loads(answer("verify", str(folder), "--json").stdout)["ok"]
    theirs = next((tiny_data / "trajectories").iterdir())
    for path in theirs.glob("shard-*"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


@pytest.mark.slow
def test_a_full_disk_is_said_and_the_same_command_goes_on(tiny_data: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "40k") as resize:
        command = [
            "gen-trajectories", *TINY, f"storage.root={disk}", "--launcher", "local", "--actors", "1"
        ]  # fmt: skip
        full = dsno(*command)
        assert full.returncode == 1, full.stderr
        assert "No space left on device" in full.stderr and "Traceback" not in full.stderr, full.stderr
        assert not list(disk.glob("trajectories/*/manifest.json"))
        resize("10m")
        more = dsno(*command)
        assert more.returncode == 0, more.stderr
        for path in tiny_data.glob("trajectories/*/shard-*"):
            assert path.read_bytes() == (disk / path.relative_to(tiny_data)).read_bytes()
