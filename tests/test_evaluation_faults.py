"""Evaluations that meet trouble: actors that die or differ, other writers, files that are foreign, damaged or older."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tiny import DATA, TINY, answer, distilled_experiment, dsno
from training_runs import train, wait_for

from dsno_cluster.config import load_config
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.diffusion.solvers import solve_with
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.evaluation.history import best_of, read_history
from dsno_cluster.evaluation.look_up import Comparison, Student, Subject, find_student, look_up
from dsno_cluster.evaluation.measure import MeasuredStudent, Surroundings
from dsno_cluster.evaluation.pictures import Pictured
from dsno_cluster.evaluation.records import Figures, HistoryRow, TeacherRow, rewrite
from dsno_cluster.evaluation.store import Findings, say_replaced, store
from dsno_cluster.evaluation.teacher_rows import FURTHER_ROWS, SHIPPED_ROWS, keep_row, known_rows, row_keys
from dsno_cluster.evaluation.watch import checkpoints, note_row, settings_hashes, watch
from dsno_cluster.model_folder import package_path
from dsno_cluster.provenance import NOWHERE
from dsno_cluster.records import Record, canonical_hash
from dsno_cluster.storage import FolderStorage, open_storage
from dsno_cluster.teachers import compared_samplings, find_teacher
from dsno_cluster.teachers.importing import import_weights

DIGITS_TEACHER = Path(package_path("package:digits-teacher"))
HERE = ["--launcher", "local", "--actors"]

# The shipped teacher, whose every call first does what a file says. A call for 50 samples is one of a block of the rows or of
# the timing, one for 30 is for the pictures.
WATCHFUL = """
import os
from pathlib import Path
from dsno_cluster import load_teacher

class Watchful:
    shape, num_classes, null_class = (1, 8, 8), 10, 10
    def __init__(self, folder):
        self.teacher, self.folder = load_teacher("package:digits-teacher"), Path(folder)
        exec((self.folder / "begin").read_text())
    def once(self, name):
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
    def __call__(self, x, t, labels=None):
        exec((self.folder / "call").read_text())
        return self.teacher(x, t, labels)
"""


@pytest.fixture(scope="module")
def student_root(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage root with a trained student. Copy it before changing it."""
    root = tmp_path_factory.mktemp("student")
    train(tiny_data, root)
    return root


@pytest.fixture
def root(student_root: Path, tmp_path: Path) -> Path:
    shutil.copytree(student_root / "students", tmp_path / "root/students")
    return tmp_path / "root"


def watched(root: Path, folder: Path, begin: str = "", call: str = "") -> list[str]:
    """An evaluation whose teacher does `begin` when it is made and `call` when it is called."""
    (folder / "watchful_teacher.py").write_text(WATCHFUL)
    (folder / "begin").write_text(begin)
    (folder / "call").write_text(call)
    teacher = ["teacher.path=watchful_teacher:Watchful", f"teacher.options={{folder: '{folder}'}}"]
    return ["eval", *TINY, f"storage.root={root}", *teacher]


def metrics_of(root: Path) -> dict[str, Any]:
    return dict(json.loads((root / "evaluation/digits/metrics.json").read_text()))


@pytest.mark.slow
def test_an_actor_that_dies_at_work_is_replaced_and_changes_no_figure(root: Path, tmp_path: Path) -> None:
    fault = "if len(x) == 50 and self.once('died'): os.kill(os.getpid(), 9)"
    words = [*watched(root, tmp_path, call=fault), *HERE, "2"]
    done = dsno(*words, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and (tmp_path / "died").exists(), done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    found = metrics_of(root)
    shutil.rmtree(root / "evaluation")
    assert dsno(*words, PYTHONPATH=str(tmp_path)).returncode == 0
    undisturbed = metrics_of(root)
    assert found["teacher_rows"] == undisturbed["teacher_rows"] and len(found["teacher_rows"]) == 3
    assert found["student"]["fid"] == undisturbed["student"]["fid"]
    assert found["student"]["trajectory_error"] == undisturbed["student"]["trajectory_error"]


def test_an_actor_that_dies_while_the_cost_is_measured_is_replaced(root: Path, tmp_path: Path) -> None:
    """And one that draws the pictures: the only calls for 50 and for 30 samples, where no images are compared."""
    fault = "if len(x) in (30, 50) and self.once(f'died at {len(x)}'): os.kill(os.getpid(), 9)"
    words = watched(root, tmp_path, call=fault)
    alone = ["evaluation.metrics=[trajectory_error]", "evaluation.picture_columns=3"]
    done = dsno(*words, *alone, *HERE, "1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert sorted(p.name for p in tmp_path.glob("died*")) == ["died at 30", "died at 50"]
    assert metrics_of(root)["student"]["cost_in_teacher_evaluations"] > 0
    assert (root / "evaluation/digits/samples.png").is_file()


@pytest.mark.parametrize("fails", ["the cost", pytest.param("the pictures", marks=pytest.mark.slow)])
def test_figures_are_kept_if_cost_or_pictures_fail_for_good(fails: str, root: Path, tmp_path: Path) -> None:
    """The other one is still made; a picture of an earlier evaluation does not stay beside these figures."""
    call = f"if len(x) == {50 if fails == 'the cost' else 30}: raise ValueError('no such number')"
    words = watched(root, tmp_path, call=call)
    folder = root / "evaluation/digits"
    folder.mkdir(parents=True)
    (folder / "teacher.png").write_bytes(b"of an earlier evaluation")
    alone = ["evaluation.metrics=[trajectory_error]", "evaluation.picture_columns=3"]
    done = dsno(*words, *alone, *HERE, "1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    found = metrics_of(root)
    assert found["student"]["trajectory_error"]["0.0"] > 0
    (warning,) = found["warnings"]
    assert warning.startswith(f"{fails} could not be m") and "no such number" in warning, warning
    assert f"note: {warning}" in done.stdout, done.stdout
    pictures = sorted(path.name for path in folder.glob("*.png"))
    if fails == "the cost":
        assert found["student"]["cost_in_teacher_evaluations"] is None
        assert found["student"]["images_per_second"] is None
        assert "cost of a sample" not in done.stdout
        assert len(pictures) == 5 and (folder / "teacher.png").read_bytes()[:4] == b"\x89PNG"
    else:
        assert found["student"]["cost_in_teacher_evaluations"] > 0
        assert pictures == [] and found["pictures"] is None


@pytest.mark.slow
def test_actors_on_devices_that_differ_are_refused(root: Path, tmp_path: Path) -> None:
    begin = "import dsno_cluster.device as device; device.device_name = lambda: f'chip {os.getpid()}'"
    refused = dsno(*watched(root, tmp_path, begin), *HERE, "2", PYTHONPATH=str(tmp_path))
    assert refused.returncode == 2, refused.stderr
    assert "the actors' device differ: chip " in refused.stderr and "an evaluation needs" in refused.stderr
    assert not (root / "evaluation/digits/metrics.json").exists()


def saved_diffusers_teacher(folder: Path) -> list[str]:
    """A teacher whose identity takes reading its weights; the words that name it."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        num_class_embeds=11,
    )
    unet.save_pretrained(folder / "unet")
    diffusers.DDIMScheduler(clip_sample=False, thresholding=False).save_pretrained(folder / "scheduler")
    return [f"teacher.path={folder}", "teacher.options={null_class: 10}"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["diffusers", "own"])
def test_the_driver_reads_each_file_of_the_teacher_once(family: str, root: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    if family == "own":
        shutil.copytree(DIGITS_TEACHER, teacher)
        words = [f"teacher.path={teacher}"]
    else:
        words = saved_diffusers_teacher(teacher)
    script = f"""
import collections, json, sys
from dsno_cluster.storage import FolderStorage
reads, real = collections.Counter(), FolderStorage.read
def read(self, key, *args):
    reads[str(self.root / key)] += 1
    return real(self, key, *args)
FolderStorage.read = read
from dsno_cluster.cli import main
status = main(sys.argv[1:])
open({str(tmp_path / "reads.json")!r}, "w").write(json.dumps(reads))
sys.exit(status)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, "eval", *TINY, f"storage.root={root}", *words, *HERE, "1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(metrics_of(root)["teacher_rows"]) == 3
    counted = json.loads((tmp_path / "reads.json").read_text())
    of_teacher = {name: count for name, count in counted.items() if name.startswith(str(teacher))}
    assert of_teacher and set(of_teacher.values()) == {1}, of_teacher
    weights = [name for name in of_teacher if name.endswith(".safetensors")]
    assert len(weights) == 1  # of ours only the header, as meta.json says its sha256


def test_a_student_of_a_version_that_knew_fewer_keys_is_evaluated(root: Path, tmp_path: Path) -> None:
    file = next(root.glob("students/digits/step-000000004/meta.json"))
    meta = json.loads(file.read_text())
    del meta["model"]["network"]["head_dim"]  # as if the key had been added since
    meta["model"]["times"] = [time + 1e-12 for time in meta["model"]["times"]]
    file.write_text(json.dumps(meta))
    words = ["eval", *TINY, f"storage.root={root}", "--dry-run", "--launcher", "local"]
    assert answer(*words, cwd=tmp_path).returncode == 0
    assert find_student(load_config("configs/digits.yaml", words[1:-3])).step == 4
    other = answer(*words, "network.embedding_dim=64", cwd=tmp_path)
    assert other.returncode == 2 and "network: not that of the student" in other.stderr, other.stderr


def comparison(root: Path, *words: str, sha256: str = "ab" * 32, step: int = 4) -> Comparison:
    """The comparison of a student that is made up."""
    config = load_config("configs/digits.yaml", [f"storage.root={root}", *words])
    decay = config.evaluation.ema_decay
    student = Student(f"{root}/students/digits/step", sha256, step, decay, 1.0)
    return look_up(Subject(config, find_teacher(config), student))


def written_by(of: Comparison) -> None:
    """metrics.json as an evaluation of this comparison writes it, with figures that do not matter."""
    checkpoint = of.subject.student
    settings = of.config.evaluation
    content = {
        "name": "digits",
        "num_samples": settings.num_samples,
        "reference": {"what": settings.reference},
        "feature_extractor": {
            "name": settings.feature_extractor,
            "weights_sha256": of.weights[settings.feature_extractor].sha256,
        },
        "other_extractors": {},
        "seeds": {"noise": settings.seed},
        "checkpoint": {
            "path": checkpoint.address,
            "step": checkpoint.step,
            "ema_decay": checkpoint.ema_decay,
            "sha256": checkpoint.sha256,
        },
        "precision": settings.precision,
        "student": {"source": "student", "cost_in_teacher_evaluations": 1.0, "images_per_second": 1.0},
    }
    of.storage.write(of.folder + "metrics.json", json.dumps(content).encode())


def test_what_is_replaced_is_said_before_the_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another student or extractor at the same step too."""

    def said(*words: str, **of: Any) -> str:
        say_replaced(comparison(tmp_path, *words, **of))
        return capsys.readouterr().err

    assert said() == ""
    written_by(comparison(tmp_path))
    assert said() == ""
    wide = tmp_path / "other.safetensors"
    weights = Path(package_path("package:digits-features")) / "weights.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(weights), wide, {"made": "again"})
    for words, of, differs in [
        ([], {"sha256": "cd" * 32}, "the student"),
        ([], {"step": 5}, "its step"),
        (["evaluation.ema_decay=0.5"], {}, "ema_decay"),
        (["evaluation.num_samples=60"], {}, "num_samples"),
        ([f"evaluation.weights_path={wide}"], {}, "the feature extractor"),
        (["evaluation.seed=9"], {}, "seed"),
    ]:
        line = said(*words, **of)
        assert "replaces the evaluation of step 4 by 5000 samples" in line, line
        assert f"which differs in {differs}; to keep that, copy" in line, line
    (tmp_path / "evaluation/digits/metrics.json").write_text("{}")
    assert "replaces a file that cannot be read" in said()


def findings(brightness: float) -> Findings:
    """What an evaluation without a metric on images found, with flat pictures."""
    times, columns = 4, 3
    images = torch.full((10 * columns, 1, 8, 8), brightness)
    through_time = tuple(columns * row for row in (0, 3, 6, 9))
    noise = torch.zeros(len(through_time), 1, 8, 8)
    states = torch.full((len(through_time), times, 1, 8, 8), brightness)
    pictured = Pictured(images, images, through_time, noise, states, states, 1)
    student = MeasuredStudent((brightness,) * times, (), None, pictured)
    return Findings({}, student, Figures(), None, Surroundings(None, NOWHERE))


def test_two_evaluations_that_end_at_once_do_not_mix_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first is held up between its files until the second has begun to write its own."""
    few = ["evaluation.metrics=[trajectory_error]", "evaluation.picture_columns=3"]
    folder = tmp_path / "evaluation/digits"
    first_is_there, second_is_there, written = threading.Event(), threading.Event(), FolderStorage.write

    def write(storage: FolderStorage, key: str, data: bytes, **how: Any) -> None:
        if key.endswith("trajectory.png") and threading.current_thread() is first:
            first_is_there.set()
            second_is_there.wait(60)
        written(storage, key, data, **how)

    def say(message: str) -> None:
        if "writes there now" in message:
            second_is_there.set()

    first, second = (
        threading.Thread(target=store, args=(comparison(tmp_path, *few), findings(x), 0.0, None))
        for x in (-0.5, 0.5)
    )
    monkeypatch.setattr(FolderStorage, "write", write)
    monkeypatch.setattr("dsno_cluster.console.say", say)
    first.start()
    first_is_there.wait(60)
    second.start()
    wait_for(lambda: second_is_there.is_set() or not second.is_alive())
    second_is_there.set()
    first.join()
    second.join()
    together = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert json.loads(together["metrics.json"])["student"]["trajectory_error"]["0.0"] == 0.5
    shutil.rmtree(folder)
    alone = threading.Thread(target=store, args=(comparison(tmp_path, *few), findings(0.5), 0.0, None))
    alone.start()
    alone.join()
    pictures = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert {name: data for name, data in together.items() if name != "metrics.json"} == pictures


def test_a_foreign_file_beside_a_teacher_is_ignored_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(DIGITS_TEACHER, teacher)
    whole = comparison(tmp_path, f"teacher.path={teacher}")
    assert len(whole.known) == 5 and capsys.readouterr().err == ""
    for content in ("{", "[]", '{"accuracy": 0.9}', '{"spec": {"teacher": {"kind": "new"}}, "rows": {}}'):
        (teacher / SHIPPED_ROWS).write_text(content)
        assert comparison(tmp_path, f"teacher.path={teacher}").known == {}
        note = capsys.readouterr().err
        assert note.startswith(f"note: {teacher / SHIPPED_ROWS}: ") and note.endswith("it is ignored\n"), note
        assert len(note.splitlines()) == 1


@pytest.mark.parametrize("content", ["{", '{"schema_version": 2, "rows": {"new": {}}}'])
def test_rows_in_the_storage_that_cannot_be_read_are_not_replaced(content: str, tmp_path: Path) -> None:
    """They took hours, and a newer version may read them. The look-up refuses them before the work."""
    of = comparison(tmp_path)
    keep_row(of.storage, of.spec, of.samplings[0], TeacherRow(source="teacher", evaluations=1, fid=0.5))
    (file,) = (tmp_path / "evaluation/teachers").iterdir()
    file.write_text(content)
    with pytest.raises(UserError, match="move it away") as unread:
        keep_row(of.storage, of.spec, of.samplings[1], TeacherRow(source="teacher", evaluations=4, fid=0.5))
    assert str(file) in str(unread.value) and "\n" not in str(unread.value)
    with pytest.raises(UserError, match="move it away"):
        comparison(tmp_path)
    assert file.read_text() == content


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [{"step": "x"}], "best": null}'])
def test_a_damaged_history_is_one_line_with_the_way_forward(content: str, tmp_path: Path) -> None:
    file = tmp_path / "evaluation/digits/history.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    words = ["eval", "--watch", *TINY, f"storage.root={tmp_path}", "--launcher", "local"]
    refused = answer(*words, cwd=Path())
    assert refused.returncode == 2 and str(file) in refused.stderr, refused.stderr
    assert "delete it" in refused.stderr or "move it away" in refused.stderr, refused.stderr
    assert "Traceback" not in refused.stderr and file.read_text() == content


def test_names_that_are_folders_of_evaluations_are_refused() -> None:
    for name in ("references", "teachers"):
        with pytest.raises(UserError, match=f"name {name} is taken"):
            load_config("configs/digits.yaml", [f"name={name}"])


def test_rows_of_two_evaluations_at_once_are_all_kept(tmp_path: Path) -> None:
    of = comparison(tmp_path, "evaluation.num_samples=60", "evaluation.teacher_steps=[1, 2, 3, 4, 5, 6, 7]")
    assert not of.known and len(of.samplings) == 8
    both = threading.Barrier(2)

    def keep(rows: slice) -> None:
        both.wait()
        for sampling in of.samplings[rows]:
            row = TeacherRow(source="teacher", evaluations=sampling.evaluations, fid=0.5)
            keep_row(of.storage, of.spec, sampling, row)

    threads = [threading.Thread(target=keep, args=(rows,)) for rows in (slice(0, 4), slice(4, 8))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = known_rows(of.storage, of.spec, of.subject.teacher, list(of.samplings))
    assert {s.evaluations for s in found} == {s.evaluations for s in of.samplings}


class Disturbed(FolderStorage):
    """A folder to which another writer writes first, so many times."""

    def __init__(self, root: Path, rival: Any, times: int = 1) -> None:
        super().__init__(root)
        self.rival, self.left = rival, times

    def write(self, key: str, data: bytes, **conditions: Any) -> None:
        if self.left:
            self.left -= 1
            self.rival()
        super().write(key, data, **conditions)


def test_a_history_that_another_evaluation_adds_to_keeps_all_rows(tmp_path: Path) -> None:
    config = load_config("configs/digits.yaml", [f"storage.root={tmp_path}"])
    rows = [HistoryRow(step=step, ema_decay=None, sha256=str(step), fid=1.0) for step in (1, 2, 3, 4)]
    for theirs, ours in (rows[:2], rows[2:]):  # first there is no file, then there is one
        settings = settings_hashes(config)
        rival = partial(note_row, open_storage(str(tmp_path)), config, [], settings, theirs)
        note_row(Disturbed(tmp_path, rival), config, [], settings, ours)
    assert read_history(open_storage(str(tmp_path)), config).rows == tuple(rows)


@pytest.mark.parametrize("paths", ["relative", "absolute"])
def test_a_history_of_an_earlier_version_is_continued(
    paths: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows were named by paths as they were written in local runs, and by absolute ones in jobs."""
    digits = str(Path("configs/digits.yaml").absolute())
    monkeypatch.chdir(tmp_path)
    words = [*TINY, f"storage.root={root}", "evaluation.reference=real.npz"]
    config = load_config(digits, words)
    meta = json.loads(next(root.glob("students/digits/step-000000004/meta.json")).read_text())
    settings = config.evaluation.model_dump(mode="json", exclude={"ema_decay", "best_metric"})
    assert settings["reference"] == str(tmp_path / "real.npz")
    if paths == "relative":
        settings["reference"] = "real.npz"
    measured = {"evaluation": canonical_hash(settings), "ema_decay": meta["ema_decay"], "fid": 1.0}
    students = checkpoints(open_storage(str(root)), config, {})
    rows = [{"step": student.step, "sha256": student.sha256, **measured} for student in students]
    FolderStorage(root).write("evaluation/digits/history.json", json.dumps({"rows": rows}).encode())
    monkeypatch.setattr("dsno_cluster.evaluation.watch.evaluate", None)  # it is not called
    history = watch(config, find_teacher(config))
    assert len(rows) == 2 and len(history.rows) == 2
    assert history.best is not None and history.best.value == 1.0


@pytest.mark.parametrize("theirs", [{"fid": 0.8}, {"trajectory_error": {"0.0": 0.1}}])
def test_the_best_is_told_by_its_own_row(
    theirs: dict[str, Any], root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by one of an evaluation with other settings, in which the same student has another figure, or none."""
    config = load_config("configs/digits.yaml", [*TINY, f"storage.root={root}"])
    ours = {"evaluation": settings_hashes(config)[0]}
    rows = [
        {"step": student.step, "ema_decay": student.ema_decay, "sha256": student.sha256, **found}
        for student in checkpoints(open_storage(str(root)), config, {})
        for found in ({**ours, "fid": 1.0 / student.step}, {"evaluation": "of other settings", **theirs})
    ]
    FolderStorage(root).write("evaluation/digits/history.json", json.dumps({"rows": rows}).encode())
    monkeypatch.setattr("dsno_cluster.evaluation.watch.evaluate", None)  # it is not called
    watch(config, find_teacher(config))
    assert "best by fid: 0.25 at step 4" in capsys.readouterr().err


def test_a_checkpoint_without_a_finite_figure_is_not_the_best() -> None:
    bad, good = float("nan"), {"0.5": 0.2, "0.0": 0.4}
    rows = [
        HistoryRow(
            step=1, ema_decay=None, fid=bad, inception_score=bad, trajectory_error={**good, "0.0": bad}
        ),
        HistoryRow(step=2, ema_decay=None, fid=4.0, inception_score=1.5, trajectory_error=good),
        HistoryRow(step=3, ema_decay=None, fid=5.0, inception_score=float("inf")),
    ]
    for metric in ("fid", "inception_score", "trajectory_error"):
        best = best_of(rows, metric)
        assert best is not None and best.step == 2
        assert best_of(rows[:1], metric) is None


def test_a_file_that_never_stops_changing_is_given_up(tmp_path: Path) -> None:
    class Count(Record):
        number: int

    numbers = iter(range(1000))

    def rival() -> None:
        rewrite(FolderStorage(tmp_path), "count.json", lambda: Count(number=next(numbers)))

    with pytest.raises(WorkError, match="kept changing under 10 attempts"):
        rewrite(Disturbed(tmp_path, rival, 1000), "count.json", lambda: Count(number=-1))


def test_the_steps_of_a_distilled_teacher_are_one_row(tmp_path: Path) -> None:
    """DDIM with all of its steps, and what made the trajectories: each measured once, under either name."""
    published = DATA / "published/teacher_flax_x"
    import_weights(str(published / "teacher"), str(published / "config.yaml"), str(tmp_path / "teacher"))
    experiment, steps = distilled_experiment(tmp_path / "teacher")
    experiment["evaluation"]["teacher_steps"] = [1, steps]
    (tmp_path / "distilled.yaml").write_text(json.dumps(experiment))
    config = load_config(str(tmp_path / "distilled.yaml"), [])
    teacher = find_teacher(config)
    rows = compared_samplings(config, teacher)
    assert [row.evaluations for row in rows] == [1, steps]
    assert [row.as_trajectories for row in rows] == [False, True]
    assert row_keys(rows[1]) == (f"ddim {steps} through 0.5 0.0 on auto", f"ddim {steps} through 0.0")
    network = teacher.load()
    noise = sample_noise(1, range(2), network.shape)
    labels = sample_labels(1, range(2), network.num_classes) if network.num_classes else None
    images = [
        solve_with(row.method, network, noise, row.times, labels)[:, -1] for row in (rows[1], *rows[1].same)
    ]
    assert len(images) == 2 and torch.allclose(*images, atol=1e-3)


def test_a_row_measured_under_the_other_name_is_found(tmp_path: Path) -> None:
    ddim = ["trajectories.solver=ddim", "trajectories.steps=16", "trajectories.times=[0.5, 0.25, 0.0]"]
    words = [*ddim, "student.modes=1", "evaluation.teacher_steps=[1, 16]", "evaluation.num_samples=60"]
    of = comparison(tmp_path, *words)
    assert [sampling.evaluations for sampling in of.samplings] == [1, 16] and not of.known
    alone = comparison(tmp_path, words[-1], "evaluation.teacher_steps=[16]")
    few = next(sampling for sampling in alone.samplings if sampling.method.steps == 16)
    keep_row(of.storage, of.spec, few, TeacherRow(source="teacher, ddim", evaluations=16, fid=0.25))
    known = comparison(tmp_path, *words).known
    assert [(s.as_trajectories, row.fid) for s, row in known.items()] == [(True, 0.25)]
    # through other points it is another row
    assert len(comparison(tmp_path, *words, "trajectories.times=[0.3, 0.0]").samplings) == 3


def test_plan_counts_the_rows_that_eval_measures(tmp_path: Path) -> None:
    config = str(Path("configs/imagenet64.yaml").absolute())
    assert "some 1,450,000 more by `eval`" in answer("plan", config, cwd=tmp_path).stdout  # 29 a sample
    digits = load_config("configs/digits.yaml")
    each = sum(s.evaluations for s in compared_samplings(digits, find_teacher(digits)))
    planned = answer("plan", cwd=tmp_path).stdout
    assert f"some {each * digits.evaluation.num_samples:,} more by `eval`" in planned, planned


def test_what_names_the_files_of_an_evaluation_stays(tmp_path: Path) -> None:
    """Rows and statistics that earlier versions kept are found by these."""
    for file, words in ((FURTHER_ROWS, ["finish.enabled=true"]), (SHIPPED_ROWS, [])):
        of = comparison(tmp_path, *words)
        shipped = json.loads((DIGITS_TEACHER / file).read_text())
        assert of.spec.model_dump(mode="json") == shipped["spec"]
        assert {row_keys(sampling)[0] for sampling in of.samplings} == set(shipped["rows"])
    assert of.real.spec is not None
    assert canonical_hash(of.real.spec.model_dump(mode="json")) == "36dbd3a215270cba"
    knobs = ["evaluation.metrics=[fid, kid, inception_score, precision_recall]", "evaluation.seed=3"]
    spec = comparison(tmp_path, *knobs).spec.model_dump(mode="json")
    assert canonical_hash(spec) == "1ebbff921ccd3b59"
