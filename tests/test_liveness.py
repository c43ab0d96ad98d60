"""Signs of life, and the guard that ends a task without them."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from dsno_cluster import liveness
from dsno_cluster.cluster.guard import PULSE_SECONDS, SILENCE_SECONDS, Watch
from dsno_cluster.cluster.records import Failure, Idle, read_note
from dsno_cluster.errors import LOST_RANK
from dsno_cluster.liveness import Sign

TASK = """
import pathlib, sys, time
from dsno_cluster import liveness
from dsno_cluster.cluster.guard import guarded
with guarded(pathlib.Path(sys.argv[1]), 3, "rank 3 on here", minutes=0.01):
    for _ in range(110):
        time.sleep(0.1)
        eval(sys.argv[2])
"""


def test_a_task_whose_work_does_not_move_is_ended(tmp_path: Path) -> None:
    """Two tasks that sleep at one place; one of them says that it moves."""
    tasks = {}
    for name, work in (("moves", "liveness.moved()"), ("hangs", "time.sleep(1000)")):
        (tmp_path / name).mkdir()
        tasks[name] = subprocess.Popen([sys.executable, "-c", TASK, tmp_path / name, work])
    assert tasks["hangs"].wait(60) == -9
    failure = read_note(Failure, tmp_path / "hangs", "failure-3.json")
    assert failure is not None and failure.rank == 3 and failure.kind == "work"
    assert failure.reason.startswith("rank 3 on here hangs: it has been at <string>:")
    assert tasks["moves"].wait(60) == 0
    assert not list((tmp_path / "moves").iterdir())


def ticks(watch: Watch, *signs: Sign | None) -> list[str | None]:
    return [watch.tick(sign) for sign in signs]


def test_a_guard_counts_signs_that_say_the_same(tmp_path: Path) -> None:
    at_work, elsewhere = Sign("1", "loop.py:1"), Sign("2", "loop.py:2")
    waits = Sign("3", "ranks.py:3", waits=True)
    limit = 4 * PULSE_SECONDS
    watch = Watch(tmp_path, 1, "rank 1 on here", limit)
    assert ticks(watch, *[at_work] * 4, elsewhere, *[at_work] * 4) == [None] * 9
    assert watch.tick(at_work) == "rank 1 on here hangs: it has been at loop.py:1 for 0.333 min"
    watch = Watch(tmp_path, 1, "rank 1 on here", limit)
    assert ticks(watch, *[waits] * 8) == [None] * 8
    assert str(watch.tick(waits)).startswith(LOST_RANK)
    watch = Watch(tmp_path, 1, "rank 1 on here", limit)
    frozen = ticks(watch, at_work, *[None] * round(limit / SILENCE_SECONDS + 0.5))
    assert frozen[:-1] == [None] * (len(frozen) - 1)
    assert str(frozen[-1]).startswith("rank 1 on here hangs: its process has given no sign of life")
    assert not list(tmp_path.iterdir())


def test_the_first_task_notes_that_there_is_no_progress(tmp_path: Path) -> None:
    watch = Watch(tmp_path, 0, "rank 0 on here", 6 * PULSE_SECONDS)
    ticks(watch, *(Sign(str(i), "", progress=1) for i in range(4)))
    idle = read_note(Idle, tmp_path)
    assert idle is not None and idle.seconds == 2 * PULSE_SECONDS
    watch.tick(Sign("9", "", progress=2))
    assert not list(tmp_path.iterdir())


def test_a_sign_changes_while_the_work_moves() -> None:
    thread = threading.get_ident()
    signs = []
    for _ in range(2):
        signs.append(liveness.sign_of(thread))
    assert signs[0].mark == signs[1].mark and not signs[0].waits
    liveness.moved()
    assert liveness.sign_of(thread).mark != signs[0].mark
    with liveness.waiting_for_peers():
        assert liveness.sign_of(thread).waits
