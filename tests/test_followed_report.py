"""`report --follow` in a real browser: the page changes while a run is at work, and stays where its reader was."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import CHROMIUM, browse, opened
from report_runs import curve, metrics, write_curve, write_evaluation
from training_runs import wait_for

from dsno_cluster import console
from dsno_cluster.cluster import prometheus
from dsno_cluster.cluster.prometheus import progress_exported
from dsno_cluster.config import Config, load_config
from dsno_cluster.report import progress
from dsno_cluster.report.progress import FollowedStage, Progress, look, progress_section


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def config(root: Path) -> Config:
    return load_config("configs/digits.yaml", [f"storage.root={root}"])


@contextlib.contextmanager
def followed(root: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """The command, once it has written its page."""
    words = ["report", "--follow", *more, f"storage.root={root}", "--out", str(root / "report.html")]
    process = subprocess.Popen(
        [sys.executable, "-m", "dsno_cluster.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stderr is not None
        assert "following digits" in process.stderr.readline()
        yield process
    finally:
        process.kill()
        process.wait(30)


def work(config: Config, stage: str, title: str, unit: str, done: int, total: int) -> None:
    """What a stage shows that has done all of its work."""
    with progress_exported(config, stage), console.progress(title, total, unit, done=done) as advance:
        advance(total - done)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_page_changes_with_the_run_until_its_end(root: Path, config: Config, tmp_path: Path) -> None:
    text = "document.body.innerText"

    async def watch(process: subprocess.Popen[str], solve: contextlib.ExitStack) -> None:
        assert browse(root / "report.html")[1] == []  # its console is silent
        async with opened(root / "report.html", tmp_path / "profile") as tab:
            await tab.wait_for(f"{text}.includes('256 of 512 trajectories')")
            assert await tab.value(
                f"{text}.includes('digits: gen-trajectories') && {text}.includes('running')"
            )
            assert await tab.value("document.querySelector('progress').position") == 0.5
            assert await tab.value("document.querySelectorAll('svg.chart').length") == 0
            # what a reader does
            await tab.value("document.querySelector('#settings details').open = true")
            await tab.value("document.querySelector('#settings summary').focus({preventScroll: true})")
            await tab.value("scrollTo({top: 700, behavior: 'instant'})")
            first = "[...document.querySelectorAll('main > section')].find((s) => s.getBoundingClientRect().bottom > 0)"
            section = await tab.value(f"{first}.id")
            place = f"Math.round(document.getElementById('{section}').getBoundingClientRect().top)"
            seen = await tab.value(place)
            assert section != "progress" and -600 < seen < 0

            solve.close()  # the trajectories are made, and a training begins
            lines = curve(steps=200)
            write_curve(root, lines)
            await tab.wait_for(f"{text}.includes('512 of 512 trajectories')")
            await tab.wait_for("document.querySelectorAll('#training svg.chart').length > 0")
            await tab.wait_for(f"{text}.includes('at step 200')")
            assert await tab.value("document.querySelector('#settings details').open")
            assert await tab.value("document.activeElement.closest('section')?.id") == "settings"
            assert abs(await tab.value(place) - seen) <= 1

            points = "document.querySelector('#training polyline').getAttribute('points').split(' ').length"
            before = await tab.value(points)
            with (root / "students/digits/metrics.jsonl").open("a") as file:
                file.write('{"step": 210, "loss": 0.001}\n{"step": 220, "lo')  # a line is being written
            await tab.wait_for(f"{text}.includes('0.001 at step 210')")
            assert await tab.value(points) == before + 1

            work(config, "train", "training the student", "steps", 0, 300)
            await tab.wait_for(f"{text}.includes('300 of 300 steps')")
            assert process.poll() is None  # it is not evaluated yet
            write_evaluation(root, metrics())
            work(config, "eval", "evaluating step 300", "samples", 0, 1000)
            # the last version is shown too, and does not reload
            await tab.wait_for("document.body.dataset.reload === undefined")
            assert await tab.value(f"{text}.includes('1,000 of 1,000 samples') && {text}.includes('4.56')")
            assert abs(await tab.value(place) - seen) <= 1

    with contextlib.ExitStack() as solve:
        solve.enter_context(progress_exported(config, "gen-trajectories"))
        advance = solve.enter_context(console.progress("solving", 512, "trajectories", done=256))
        solve.callback(advance, 256)
        with followed(root) as process:
            asyncio.run(watch(process, solve))
            assert process.wait(60) == 0
            assert process.stdout is not None and process.stdout.read() == f"report: {root}/report.html\n"


def test_ctrl_c_leaves_a_page_that_does_not_reload(root: Path, config: Config) -> None:
    write_curve(root, curve())
    with followed(root) as process:
        assert 'data-reload="5"' in (root / "report.html").read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr is not None and "Traceback" not in process.stderr.read()
    text = (root / "report.html").read_text()
    assert "data-reload" not in text and 'http-equiv="refresh"' not in text and "Training loss" in text


@dataclass
class Clock:
    """The clock of the host on which a stage runs."""

    ahead: float = 0.0

    def time(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    there = Clock()
    monkeypatch.setattr(prometheus, "time", there)
    return there


def test_clocks_of_hosts_may_differ(config: Config, clock: Clock) -> None:
    stages = [FollowedStage(config, name, "") for name in ("gen-trajectories", "train", "eval")]

    clock.ahead = 90
    work(config, "train", "training the student", "steps", 0, 300)
    assert not look(stages).finished
    clock.ahead = 0
    work(config, "eval", "evaluating step 300", "samples", 0, 1000)
    assert look(stages).finished
    clock.ahead = -90
    work(config, "train", "training the student", "steps", 300, 400)
    assert not look(stages).finished


def test_a_stage_is_quiet_by_the_clock_of_who_looks(
    config: Config, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, mine = [FollowedStage(config, "train", "")], Clock()
    monkeypatch.setattr(
        progress, "time", SimpleNamespace(monotonic=mine.time, strftime=time.strftime, gmtime=time.gmtime)
    )

    def quiet(seen: Progress) -> bool:
        return "nothing was heard of it since" in str(progress_section(seen))

    clock.ahead = -1000
    with progress_exported(config, "train"), console.progress("training", 300, "steps") as advance:
        seen = look(stages)
        assert not quiet(seen)
        mine.ahead += 299
        seen = look(stages, seen)
        assert not quiet(seen)
        mine.ahead += 2
        seen = look(stages, seen)
        assert quiet(seen)
        advance(300)
        seen = look(stages, seen)
        assert not quiet(seen)
    assert not quiet(look(stages, seen))


def test_a_finished_run_is_written_once(root: Path, config: Config) -> None:
    write_evaluation(root, metrics())
    work(config, "train", "training the student", "steps", 0, 300)
    work(config, "eval", "evaluating step 300", "samples", 0, 1000)
    with followed(root) as process:
        assert process.wait(60) == 0
    assert "data-reload" not in (root / "report.html").read_text()
    # begun again since, with nothing to do
    with progress_exported(config, "train"):
        pass
    with followed(root) as process:
        assert process.wait(60) == 0
    # trained further since: the evaluation is that of an older student
    work(config, "train", "training the student", "steps", 300, 400)
    with followed(root) as process, pytest.raises(subprocess.TimeoutExpired):
        process.wait(5)


def test_it_goes_over_to_the_finished_student(root: Path) -> None:
    """As soon as its training has begun, and ends with its evaluation."""
    page = root / "report.html"
    finished = load_config("configs/digits.yaml", [f"storage.root={root}", "finish.enabled=true"]).finished
    assert finished is not None
    write_evaluation(root, metrics())
    with followed(root, "finish.enabled=true") as process:
        assert "<h1>digits</h1>" in page.read_text() and "4.56" in page.read_text()
        write_curve(root, [{"step": 7, "loss": 0.25}], finished.name)
        wait_for(lambda: "finished to step 7 " in page.read_text())
        found = metrics()
        write_evaluation(root, {**found, "student": {**found["student"], "fid": 1.23}}, name=finished.name)
        work(finished, "eval", "evaluating step 7", "samples", 0, 1000)
        assert process.wait(60) == 0
    assert "<h1>digits-finished</h1>" in page.read_text()
    assert "1.23" in page.read_text() and "4.56" not in page.read_text()
