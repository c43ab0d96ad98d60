"""The progress of the stages as metrics for Prometheus, read by its own client's parser."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tiny import TINY, dsno
from training_runs import link_data, metrics, words

from dsno_cluster import console
from dsno_cluster.cluster import prometheus
from dsno_cluster.cluster.prometheus import progress_exported, read_progress
from dsno_cluster.cluster.stage import RayOptions, SharedOptions, StageResult
from dsno_cluster.config import Config, load_config
from dsno_cluster.errors import Preempted, WorkError
from dsno_cluster.stages import GEN_TRAJECTORIES

Samples = dict[str, dict[tuple[str, ...], float]]


def read(file: Path, name: str = "digits", stage: str = "train") -> Samples:
    """The samples of a file by metric, and by the labels that they have besides the run and the stage."""
    found: Samples = {}
    for family in text_string_to_metric_families(file.read_text()):
        assert family.documentation and family.type in ("counter", "gauge")
        for sample in family.samples:
            assert re.fullmatch("dsno_[a-z_]+", sample.name)
            # Prometheus's rules: counters and only they end in _total, base units, no colons
            assert sample.name.endswith("_total") == (family.type == "counter"), sample.name
            labels = dict(sample.labels)
            assert (labels.pop("run"), labels.pop("stage")) == (name, stage)
            found.setdefault(sample.name, {})[tuple(labels.values())] = sample.value
    return found


def state(found: Samples) -> str:
    (now,) = (labels[0] for labels, value in found["dsno_stage_state"].items() if value == 1)
    assert sum(found["dsno_stage_state"].values()) == 1
    return now


def test_a_generation(tiny_data: Path) -> None:
    found = read(tiny_data / "prometheus/digits-gen-trajectories.prom", stage="gen-trajectories")
    assert state(found) == "done"
    assert found["dsno_trajectories_total"] == found["dsno_trajectories_planned"] == {(): 96}
    assert found["dsno_shards_total"] == found["dsno_shards_planned"] == {(): 6}
    assert found["dsno_trajectories_per_second"][()] > 0


def test_a_training(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    link_data(tiny_data, out)
    watched = ["training.heldout_every=2", "training.heldout_samples=8"]
    began = time.time()
    done = dsno(*words(out, *watched), "--launcher", "local")
    assert done.returncode == 0, done.stderr
    found, last = read(out / "prometheus/digits-train.prom"), metrics(out)[-1]
    assert state(found) == "done"
    assert found["dsno_training_steps_total"] == found["dsno_training_steps_planned"] == {(): 4}
    assert found["dsno_training_loss"][()] == last["loss"]
    assert found["dsno_training_learning_rate"][()] == last["lr"]
    assert found["dsno_training_images_per_second"][()] > 0
    assert found["dsno_training_seconds_total"][()] == pytest.approx(last["seconds"], abs=0.01)
    errors = {(str(i),): error for i, error in enumerate(last["heldout_error_per_time"])}
    assert found["dsno_training_heldout_error_ratio"] == errors
    start, progress = (found[f"dsno_stage_{what}_timestamp_seconds"][()] for what in ("start", "progress"))
    assert began <= start <= progress <= time.time()


@pytest.mark.slow
def test_an_evaluation(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    link_data(tiny_data, out)
    for stage in (words(out), ["eval", *TINY, f"storage.root={out}", "--actors", "1"]):
        done = dsno(*stage, "--launcher", "local")
        assert done.returncode == 0, done.stderr
    found = read(out / "prometheus/digits-eval.prom", stage="eval")
    assert state(found) == "done"
    assert found["dsno_evaluation_samples_total"] == found["dsno_evaluation_samples_planned"]
    assert found["dsno_evaluation_samples_total"][()] >= 200


def run_stage(config: Config, work: Callable[[], None], options: RayOptions | None = None) -> None:
    """Run a stage whose work is a function, as launchers run stages."""

    def do(config: Config, options: RayOptions, address: str | None, found: None) -> StageResult:
        work()
        return StageResult("somewhere")

    replace(GEN_TRAJECTORIES, work=do).run(config, options or RayOptions(), None, None)


def reach(done: int, error: Exception | Preempted | None = None) -> Callable[[], None]:
    """Work that has done so many of 10 trajectories, and ends or fails then."""

    def work() -> None:
        with console.progress("solving", 10, "trajectories", done=done):
            if error is not None:
                raise error

    return work


def find_nothing_to_do() -> None:
    """Work that an earlier start, or another task, has finished."""


def fail_at_once() -> None:
    raise WorkError("no")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config("configs/digits.yaml", [f"run.dir={tmp_path}"])


def test_a_start_that_finds_the_work_done_says_so(config: Config) -> None:
    file = config.run_dir / "prometheus/digits-gen-trajectories.prom"
    with pytest.raises(Preempted):
        run_stage(config, reach(7, Preempted()))
    before = read(file, stage="gen-trajectories")
    with pytest.raises(WorkError):
        run_stage(config, fail_at_once)
    assert read(file, stage="gen-trajectories") == before
    run_stage(config, find_nothing_to_do)
    after = read(file, stage="gen-trajectories")
    assert (state(before), state(after)) == ("interrupted", "done")
    for start in ("dsno_stage_start_timestamp_seconds", "dsno_stage_start_order", "dsno_stage_state_order"):
        assert before.pop(start)[()] < after.pop(start)[()]
    del before["dsno_stage_state"], after["dsno_stage_state"]
    assert after == before
    written = file.read_bytes(), file.stat().st_mtime_ns
    run_stage(config, find_nothing_to_do)  # it is known to be done since the last start
    assert (file.read_bytes(), file.stat().st_mtime_ns) == written


def test_the_tasks_of_an_array(config: Config) -> None:
    """One that is lost says no more; another does its work, and the stage is done until it begins again."""

    def task(place: int, work: Callable[[], None]) -> None:
        run_stage(config, work, SharedOptions(array=3, place=place))

    folder, lost = config.run_dir / "prometheus", {}

    def until_it_is_lost() -> None:
        reach(4)()
        lost.update({file: file.read_bytes() for file in folder.iterdir()})

    def now() -> tuple[str, int | None]:
        progress = read_progress(config, "gen-trajectories")
        assert progress is not None
        return progress.state, progress.done

    assert read_progress(config, "gen-trajectories") is None
    task(0, until_it_is_lost)
    for file, content in lost.items():
        file.write_bytes(content)
    assert now() == ("running", 4)
    with pytest.raises(WorkError):
        task(1, reach(5, WorkError("no")))
    assert now() == ("failed", 5)
    task(2, reach(10))
    with pytest.raises(WorkError):
        fail_in_another_experiment(config)
    assert now() == ("done", 10)
    names = [f"digits-gen-trajectories-{place}.prom" for place in range(3)]
    assert sorted(file.name for file in folder.iterdir()) == [*names, "digits-gen-trajectories-x-train.prom"]
    samples = read(folder / names[2], stage="gen-trajectories")
    assert samples["dsno_trajectories_total"] == {("2",): 10}
    assert samples["dsno_stage_state"]["done", "2"] == 1
    with pytest.raises(WorkError):
        run_stage(config, reach(6, WorkError("no")))  # by itself, for more trajectories
    assert now() == ("failed", 6)
    task(1, find_nothing_to_do)
    assert now() == ("done", 5)
    with pytest.raises(WorkError):
        run_stage(config, reach(7, WorkError("no")))
    task(2, find_nothing_to_do)  # its file says so already, but is older than that failure
    assert now() == ("done", 10)


def test_tasks_whose_clocks_differ(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was before what is known all the same."""

    def task(place: int, ahead: float, work: Callable[[], None]) -> None:
        """A task on a host whose clock is so many seconds ahead."""
        monkeypatch.setattr(prometheus, "time", SimpleNamespace(time=lambda: time.time() + ahead))
        run_stage(config, work, SharedOptions(array=2, place=place))

    def now() -> str:
        progress = read_progress(config, "gen-trajectories")
        assert progress is not None
        return progress.state

    with pytest.raises(WorkError):
        task(0, 90, reach(5, WorkError("no")))
    task(1, 0, reach(10))
    assert now() == "done"
    with pytest.raises(WorkError):
        task(0, -90, reach(3, WorkError("no")))  # for more trajectories
    assert now() == "failed"


def fail_in_another_experiment(config: Config) -> None:
    """Another experiment with a similar name, which fails."""
    other = config.model_copy(update={"name": "digits-gen-trajectories-x"})
    with progress_exported(other, "train"):
        reach(1, WorkError("no"))()


@pytest.mark.parametrize(
    ("error", "ended"),
    [(WorkError("no"), "failed"), (Preempted(), "interrupted"), (SystemExit(1), "interrupted")],
)
def test_it_says_how_a_stage_ends_and_keeps_what_was_known(
    error: BaseException, ended: str, tmp_path: Path
) -> None:
    config = load_config("configs/digits.yaml", [f"run.dir={tmp_path}", "name=odd-1.x"])
    file, seen = tmp_path / "prometheus/odd-1.x-gen-trajectories.prom", []

    def work() -> None:
        with console.progress("solving", 10, "trajectories", done=4) as advance:
            seen.append(read(file, "odd-1.x", "gen-trajectories"))
            advance(3, {"shards": 7})
            advance(3)
            raise error

    with pytest.raises(type(error)):
        run_stage(config, work)
    (begun,) = seen
    assert state(begun) == "running" and begun["dsno_trajectories_total"] == {(): 4}
    found = read(file, "odd-1.x", "gen-trajectories")
    assert state(found) == ended
    assert found["dsno_trajectories_total"] == {(): 10} and found["dsno_shards_total"] == {(): 7}
    assert [path.name for path in file.parent.iterdir()] == [file.name]  # nothing half written


def test_a_process_without_progress_writes_nothing(tmp_path: Path) -> None:
    config = load_config("configs/digits.yaml", [f"run.dir={tmp_path}"])

    def work() -> None:
        with console.progress("solving", 10, "trajectories", quiet=True) as advance:
            advance(10, {"shards": 1})

    run_stage(config, work)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_ends_no_work(tmp_path: Path) -> None:
    config = load_config("configs/digits.yaml", [f"run.dir={tmp_path}"])
    (tmp_path / "prometheus").write_text("in its place")
    done = []

    def work() -> None:
        with console.progress("solving", 1, "trajectories") as advance:
            advance(1)
        done.append(True)

    run_stage(config, work)
    assert done == [True]
