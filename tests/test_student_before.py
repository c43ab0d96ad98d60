"""A student that was finished beside the one it was at first: what is taken over from whose evaluation, and how it is shown."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from report_runs import curve, metrics, write_curve, write_evaluation
from test_report import report
from tiny import TINY, answer, dsno
from training_runs import link_data, train

from dsno_cluster.config import load_config
from dsno_cluster.evaluation.look_up import Comparison, Student, Subject, look_up
from dsno_cluster.evaluation.records import Metrics
from dsno_cluster.evaluation.student_before import find_before
from dsno_cluster.evaluation.table import error_lines, table_rows
from dsno_cluster.model_folder import (
    AboutModel,
    ModelDescription,
    StartModel,
    find_model,
    read_meta,
    step_name,
    write_model,
)
from dsno_cluster.storage import open_storage
from dsno_cluster.teachers import find_teacher
from dsno_cluster.training.beginning import new_student

SHA256 = "ab" * 32
START = StartModel(address="runs/students/digits/step-000000300", name="digits", step=300, sha256=SHA256)
ABOUT = AboutModel(model=ModelDescription(kind="dsno", network={}))


def finished(root: Path, *words: str, start: StartModel | None = START) -> Comparison:
    """The comparison of a student, made up, that began as `start`."""
    config = load_config("configs/digits.yaml", ["name=digits-finished", f"storage.root={root}", *words])
    student = Student(f"{root}/students/digits-finished/step", "cd" * 32, 4, None, 1.0, start)
    return look_up(Subject(config, find_teacher(config), student))


def earlier(of: Comparison, **changes: Any) -> dict[str, Any]:
    """metrics.json of the student at the start, by an evaluation that is equal to this one except for the changes."""
    settings, images = of.config.evaluation, of.real.images
    assert images is not None
    return metrics(
        **{
            "num_samples": settings.num_samples,
            "reference": {"what": "data", "identity": images.identity.model_dump(mode="json")},
            "feature_extractor": {
                "name": settings.feature_extractor,
                "weights_sha256": of.weights[settings.feature_extractor].sha256,
            },
            "seeds": {"noise": settings.seed},
            "checkpoint": {"step": 300, "sha256": SHA256},
            **changes,
        }
    )


def test_meta_json_names_the_start_and_is_as_before_without_one(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    for prefix, about in [
        ("finished/", ABOUT.model_copy(update={"start": START})),
        ("plain/", ABOUT),
    ]:
        write_model(storage, prefix, {"w": torch.zeros(1)}, "", about)
    assert read_meta(str(tmp_path / "finished")).start == START
    assert read_meta(str(tmp_path / "plain")).start is None
    assert "start" not in json.loads((tmp_path / "plain/meta.json").read_text())


def test_the_row_of_an_equal_evaluation_is_taken_over(tmp_path: Path) -> None:
    of = finished(tmp_path)
    before = earlier(of)
    write_evaluation(tmp_path, before)
    found = find_before(of)
    assert found.warning is None and found.row is not None
    taken = found.row.values()
    who = {"source": "student before finishing", "name": "digits", "step": 300, "sha256": SHA256}
    assert taken == {**before["student"], **who}
    assert find_before(finished(tmp_path, start=None)).row is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoint": {"step": 200, "sha256": "ef" * 32}}, "is of step 200 of digits, not of step 300"),
        ({"num_samples": 4000}, "differs from this evaluation in num_samples;"),
        ({"seeds": {"noise": 2}}, "differs from this evaluation in seed;"),
        (
            {"feature_extractor": {"name": "digits-features", "weights_sha256": "00"}},
            "in the feature extractor;",
        ),
        (
            {"reference": {"what": "data", "identity": {"kind": "data", "sha256": "0" * 64}}},
            "in the reference;",
        ),
        ({"teacher": {"kind": "other"}}, "in the teacher;"),
        ({"precision": "bfloat16", "num_samples": 7}, "in num_samples, precision;"),
    ],
)
def test_the_row_of_another_evaluation_is_not(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    of = finished(tmp_path)
    write_evaluation(tmp_path, earlier(of, **changes))
    found = find_before(of)
    assert found.row is None and found.warning is not None
    assert says in found.warning and "\n" not in found.warning
    assert "evaluate step 300 of digits first" in found.warning
    assert str(tmp_path / "evaluation/digits/metrics.json") in found.warning


def test_without_an_evaluation_of_the_start_it_is_said_what_to_do(tmp_path: Path) -> None:
    missing = find_before(finished(tmp_path))
    assert missing.row is None and missing.warning is not None
    assert "digits/metrics.json is missing; evaluate step 300 of digits first" in missing.warning
    (tmp_path / "evaluation/digits").mkdir(parents=True)
    (tmp_path / "evaluation/digits/metrics.json").write_text("{")
    damaged = find_before(finished(tmp_path))
    assert damaged.row is None and damaged.warning is not None and "not JSON" in damaged.warning
    nameless = find_before(finished(tmp_path, start=START.model_copy(update={"name": None})))
    assert nameless.row is None and nameless.warning is not None
    assert "has no name" in nameless.warning and START.address in nameless.warning


def both(**changes: Any) -> dict[str, Any]:
    """A metrics.json with both students."""
    found = metrics()
    errors = {"0.5625": 0.02, "0.25": 0.05, "0.0625": 0.1, "0.0": 0.11}
    row = {**found["student"], "fid": 7.89, "cost_in_teacher_evaluations": 1.1, "trajectory_error": errors}
    who = {"source": "student before finishing", "name": "first", "step": 100, "sha256": SHA256}
    return {**found, "name": "digits", "before": {**row, **who}, **changes}


def test_the_table_shows_both_students_and_the_errors_of_both() -> None:
    found = Metrics.model_validate(both())
    header, rows = table_rows(found)
    assert [row[0] for row in rows][-3:] == ["teacher, dpmpp-2m", "student before finishing", "student"]
    column = header.index("Frechet distance")
    assert [[*row[1:3], row[column]] for row in rows[-2:]] == [["1", "1.1", "7.89"], ["1", "1.0", "4.56"]]
    assert error_lines(found) == [
        "t = 0.5625: 0.020 -> 0.036",
        "t = 0.25: 0.050 -> 0.080",
        "t = 0.0625: 0.100 -> 0.130",
        "t = 0: 0.110 -> 0.146",
    ]
    alone = Metrics.model_validate(metrics())
    assert alone.before is None and error_lines(alone)[0] == "t = 0.5625: 0.036"
    assert [row[0] for row in table_rows(alone)[1]][-2:] == ["teacher, dpmpp-2m", "student"]


def test_the_report_shows_the_samples_of_both(tmp_path: Path) -> None:
    write_evaluation(tmp_path, both())
    there = both(name="first", checkpoint={"step": 100, "sha256": SHA256}, before=None)
    for name, content in (
        ("metrics.json", json.dumps(there).encode()),
        ("student.png", b"samples of the first student"),
    ):
        file = tmp_path / "evaluation/first" / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content)
    page = report(tmp_path)
    assert page.problems == [] and len(page.all("input")) == 2
    shown = {(image["src"] or "").partition("base64,")[2]: image["alt"] for image in page.all("img")}
    alt = shown[base64.b64encode(b"samples of the first student").decode()]
    assert alt is not None and alt.startswith("Samples of the student before finishing, one row for each")
    for said in ("student before finishing 1 1.1 7.89", "before finishing 0.02 0.05 0.1 0.11"):
        assert said in page.text, said
    # another student has been evaluated there meanwhile
    there["checkpoint"]["sha256"] = "ef" * 32
    (tmp_path / "evaluation/first/metrics.json").write_text(json.dumps(there))
    page = report(tmp_path)
    assert page.problems == [] and len(page.all("input")) == 1 and "7.89" in page.text


def publish(root: Path, name: str, objective: str, steps: tuple[int, ...], best: int) -> None:
    """Students of a run, made up, the last of them the newest."""
    config = load_config("configs/digits.yaml", [])
    model = new_student(config, find_teacher(config)).describe()
    for step in steps:
        about = AboutModel(model=model, step=step, run={"objective": objective})
        write_model(
            open_storage(str(root)), f"students/{name}/{step_name(step)}/", {"w": torch.zeros(1)}, "", about
        )
    for file, named in (("latest", steps[-1]), ("best", best)):
        (root / f"students/{name}" / file).write_text(step_name(named) + "\n")


def test_the_report_of_a_path_shows_the_finished_student(tmp_path: Path) -> None:
    """Once there is anything of it; with the curves of both trainings."""
    words = ["finish.enabled=true"]
    write_evaluation(tmp_path, metrics())
    write_curve(tmp_path, curve())
    page = report(tmp_path, *words)
    assert page.text.count("Training loss") > 0 and "4.56" in page.text and "digits-finished" not in page.text
    write_curve(tmp_path, [{"step": 7, "loss": 0.25, "seconds": 3.0}], "digits-finished")
    page = report(tmp_path, *words)
    assert page.problems == [] and "4.56" not in page.text
    for said in (
        "digits-finished",
        "finished to step 7 of 300, after a training on 16,384 trajectories of 18 evaluations each.",
        "18 each, 294,912 in all",
        "Finishing 7 steps, 3,584 samples drawn",
        "Not evaluated yet: dsno-cluster run configs/digits.yaml finish.enabled=true",
        "Training loss before finishing The loss falls from 1 at step 10 to 0.0333 at step 300.",
        "The loss is 0.25 at step 7",
        "Training before finishing 300 steps",
        "dsno-cluster run digits.yaml",
    ):
        assert said in page.text, said
    after = both(checkpoint={"step": 50, "sha256": SHA256})
    write_evaluation(
        tmp_path, {**after, "student": {**after["student"], "fid": 1.23}}, name="digits-finished"
    )
    page = report(tmp_path, *words)
    assert page.problems == [] and "student before finishing 1 1.1 7.89" in page.text
    assert "Evaluated at step 50." in page.text and "1.23" in page.text
    # the one that `eval` takes of a finished student is its best, not the newest
    publish(tmp_path, "digits-finished", "distribution", (50, 100), best=50)
    assert "The evaluation is of step" not in report(tmp_path, *words).text
    publish(tmp_path, "digits-finished", "distribution", (50, 100), best=100)
    said = "The evaluation is of step 50; the best student is of step 100."
    publish(tmp_path, "digits-finished", "distribution", (50, 100, 150), best=100)
    assert said in report(tmp_path, *words).text
    assert "digits-finished" not in report(tmp_path).text  # nobody asked for it


def test_eval_takes_the_best_of_a_student_that_was_finished(tmp_path: Path) -> None:
    """Whatever objective the config has: its name alone says which student is meant."""
    for objective, taken in (("distribution", 50), ("trajectories", 100)):
        publish(tmp_path, objective, objective, (50, 100), best=50)
        address = f"{tmp_path}/students/{objective}"
        for config in ("trajectories", "distribution"):
            words = [f"name={objective}", f"storage.root={tmp_path}", f"training.objective={config}"]
            done = answer("eval", *words, "--dry-run", "--launcher", "local")
            assert f"{address}/{step_name(taken)}" in done.stderr + done.stdout, done


@pytest.mark.slow
def test_a_finished_student_is_evaluated_beside_its_start(tiny_data: Path, tmp_path: Path) -> None:
    root = link_data(tiny_data, tmp_path)
    train(tiny_data, root)
    first = find_model(str(root / "students/digits"))
    about = AboutModel.model_validate(
        {
            **first.meta.values(),
            "name": "digits-finished",
            "start": {
                "address": first.path,
                "name": "digits",
                "step": first.meta.step,
                "sha256": first.meta.sha256,
            },
        }
    )
    moved = {name: tensor * 1.01 for name, tensor in first.weights().items()}
    write_model(open_storage(str(root)), "students/digits-finished/step-000000004/", moved, "", about)
    (root / "students/digits-finished/latest").write_text("step-000000004\n")
    words = ["eval", *TINY, f"storage.root={root}", "--launcher", "local"]
    alone = dsno(*words, "name=digits-finished")
    assert alone.returncode == 0, alone.stderr
    assert alone.stderr.count("evaluate step 4 of digits first") == 1 and "note: " in alone.stdout
    assert dsno(*words).returncode == 0
    done = dsno(*words, "name=digits-finished")
    assert done.returncode == 0, done.stderr
    assert "student before finishing" in done.stdout and " -> " in done.stdout
    found, before = (
        json.loads((root / f"evaluation/{name}/metrics.json").read_text())
        for name in ("digits-finished", "digits")
    )
    assert found["warnings"] == [] and found["before"]["name"] == "digits"
    assert found["before"]["fid"] == before["student"]["fid"] != found["student"]["fid"]
    assert before["before"] is None
