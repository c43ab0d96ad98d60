"""The report through its command, on files of made-up runs."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_runs import curve, history, metrics, write_curve, write_evaluation
from tiny import TINY
from training_runs import link_data

from dsno_cluster.cli import main
from dsno_cluster.cluster.runs import config_of_run, create_run
from dsno_cluster.cluster.stage import Submission
from dsno_cluster.commands.evaluation import show_history
from dsno_cluster.config import dump_config, load_config, load_profile
from dsno_cluster.evaluation.records import History
from dsno_cluster.stages import TRAIN

VOID = {"meta", "input", "img", "br", "link", "hr"}
PAPER = "https://arxiv.org/abs/2211.13449"


class Page(HTMLParser):
    """A parsed page; what is not closed in order is a problem."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.problems: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"<{name}> is not closed" for name in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if len(dict(attrs)) < len(attrs):
            self.problems.append(f"<{tag}> repeats an attribute")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def report(root: Path, *words: str) -> Page:
    """The page that the command writes of the run below `root`."""
    out = root / "out.html"
    assert main(["report", *words, f"storage.root={root}", "--out", str(out)]) == 0
    return Page(out.read_text(encoding="utf-8"))


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A run with everything but trajectories and a student."""
    write_evaluation(tmp_path, metrics(warnings=["5000 samples are few."]), history())
    write_curve(tmp_path, curve())
    return tmp_path


def test_one_file_that_needs_nothing_else(whole: Path) -> None:
    page = report(whole)
    assert page.problems == []
    assert [a["lang"] for a in page.all("html")] == ["en"] and page.all("title")
    for name, attributes in page.elements:
        assert name not in ("link", "iframe", "object", "embed", "base")
        assert name != "script" or not attributes, "scripts are inline"
        for key in ("src", "href", "xlink:href", "poster", "srcset", "action"):
            value = attributes.get(key) or ""
            assert value.startswith(("data:", "#")) or value in ("", PAPER), (name, value)
        assert "url(" not in (attributes.get("style") or "")
        assert not [key for key in attributes if key.startswith("on")]
    text = (whole / "out.html").read_text()
    assert "@import" not in text and "url(" not in text
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"].removeprefix("#") for a in page.all("a") if (a["href"] or "").startswith("#")} <= set(
        ids
    )
    assert all(image["alt"] for image in page.all("img"))
    pngs = {(image["src"] or "").removeprefix("data:image/png;base64,") for image in page.all("img")}
    folder = whole / "evaluation" / "digits"
    assert pngs == {
        base64.b64encode((folder / name).read_bytes()).decode()
        for name in ("teacher.png", "student.png", "strips.png")
    }


def test_says_what_was_measured(whole: Path) -> None:
    page = report(whole)
    for said in (
        *("4.56", "11.38", "0.83", "0.27", "1.86"),  # distances of the table
        *("0.0123 ± 0.0045", "0.810", "0.988"),  # other figures that the rows have
        "5,000 samples each, against 1,500 real images",
        "5000 samples are few.",
        "the teacher is as good from 4 evaluations on",
        "falls from 1 at step 10 to 0.0333 at step 300",
        "At step 300: t = 0.5625: 0.0333; t = 0.25: 0.0667; t = 0.0625: 0.1; t = 0: 0.138.",
        "0.146",  # the evaluated student's error at t = 0
        "Best so far: 3.34 at step 300 (EMA 0.999).",
        "18 each, 294,912 in all",
        "300 steps, 14,400 trajectories seen",
        "362 images a second",
        *("a CPU of two cores", "0123456789ab with changes", "63 s"),
        "dsno-cluster gen-trajectories digits.yaml",
    ):
        assert said in page.text, said
    assert "F-score" not in page.text  # no row has it
    assert "FID" not in page.text and "Frechet distance" in page.text  # digits-features is not Inception
    saved = next(a for a in page.all("a") if a.get("download"))
    data = base64.b64decode((saved["href"] or "").partition("base64,")[2])
    assert saved["download"] == "digits.yaml"
    (whole / "again.yaml").write_bytes(data)
    config = load_config(str(whole / "again.yaml"))
    assert config == load_config("configs/digits.yaml", [f"storage.root={whole}"])


def test_a_cost_that_could_not_be_measured_is_left_out(tmp_path: Path) -> None:
    unknown = {"cost_in_teacher_evaluations": None, "images_per_second": None}
    found = metrics(warnings=["the cost could not be measured: no clock"])
    write_evaluation(tmp_path, {**found, "student": {**found["student"], **unknown}})
    page = report(tmp_path)
    assert page.problems == [] and "the cost could not be measured: no clock" in page.text
    assert "Student, 1 evaluation 4.56" in page.text and "student 1 - 4.56" in page.text
    assert "Teacher at about that cost" not in page.text and "by cost of an image" not in page.text
    assert "images a second, on one actor" not in page.text and "A sample of the student" not in page.text
    assert "None" not in page.text


BY_HAND = ["training.objective=distribution", "training.start=students/first"]
MADE = "16,384 trajectories of 18 evaluations each"
NO_IMAGES = ["data.name=null", "evaluation.reference=x.npz", "training.distribution.adversarial_weight=0"]


@pytest.mark.parametrize(
    ("words", "sentence", "cost", "made_before"),
    [
        ([], f"trained to step 300 of 3,400 on {MADE}.", "18 each, 294,912 in all", True),
        (BY_HAND, "finished to step 300 of 3,400.", None, False),
        (
            [*BY_HAND, "training.distribution.trajectory_weight=0.1"],
            f"finished to step 300 of 3,400, anchored to {MADE}.",
            "18 each, 294,912 in all",
            True,
        ),
        (
            [*BY_HAND, *NO_IMAGES],
            f"finished to step 300 of 3,400, judged by the ends of {MADE}.",
            "18 each, 294,912 in all",
            True,
        ),
        (
            ["training.online=true", "reader.shuffle=none"],
            f"trained to step 300 of 3,400 on {MADE}, made while training.",
            "16,384, made while training Evaluations of the teacher 18 each Training",
            False,
        ),
        (
            [f"trajectories.imported={'0' * 16}"],
            "trained to step 300 of 3,400 on 16,384 trajectories imported from elsewhere.",
            "not known: the trajectories were imported",
            False,
        ),
    ],
    ids=["trajectories", "finished", "anchored", "judged", "online", "imported"],
)
@pytest.mark.parametrize("known_by", ["its config", "the student's folder"])
def test_from_what_a_student_has_learned(
    words: list[str], sentence: str, cost: str | None, made_before: bool, known_by: str, tmp_path: Path
) -> None:
    write_curve(tmp_path, curve())
    if known_by == "the student's folder":
        step = tmp_path / "students/digits/step-000000300"
        step.mkdir()
        (tmp_path / "students/digits/latest").write_text(step.name)
        meta = {"sha256": "0", "model": {"kind": "dsno", "network": {}}, "step": 300}
        (step / "meta.json").write_text(json.dumps(meta))
        (step / "config.yaml").write_text(dump_config(load_config("configs/digits.yaml", words)))
        words = []
    page = report(tmp_path, *words)
    assert page.problems == [] and sentence in page.text
    finished = sentence.startswith("finished")
    counted = "Finishing 300 steps, 14,400 samples drawn" if finished else "14,400 trajectories seen"
    assert counted in page.text and ("Samples trained on" in page.text) == finished
    assert ("Evaluations of the teacher" in page.text) == (cost is not None)
    assert cost is None or cost in page.text
    assert ("gen-trajectories digits.yaml" in page.text) == made_before
    assert "dsno-cluster train digits.yaml" in page.text


def test_stored_trajectories_are_a_cost_only_if_they_were_needed(tiny_data: Path, tmp_path: Path) -> None:
    root = link_data(tiny_data, tmp_path)
    write_curve(root, curve())
    for words in ([], BY_HAND, ["training.online=true", "reader.shuffle=none"]):
        page = report(root, *TINY, *words)
        needed = not words
        for said in ("bytes) in 6 shards", "Time to make them", "package trajectories"):
            assert (said in page.text) == needed, (words, said)


def test_watched_checkpoints_alone_are_a_report(tmp_path: Path) -> None:
    """What `eval --watch` writes: no metrics.json but those of the checkpoints, rows of several settings."""
    past = history()
    for row in past["rows"]:
        row |= {"evaluation": "now", "trajectory_error": {"0.25": 0.1, "0.0": 30 / row["step"]}}
        row["folder"] = f"evaluation/digits/step-{row['step']:09d}-ema-{row['ema_decay']:g}/"
    past["rows"].insert(
        0, {"step": 100, "ema_decay": 0.9, "evaluation": "before", "fid": 0.01, "folder": "elsewhere/"}
    )
    # the best one, by fewer samples
    past["rows"].append(
        {"step": 300, "ema_decay": 0.999, "evaluation": "after", "fid": 90.0, "folder": "elsewhere/"}
    )
    past["best"] |= {"metric": "trajectory_error", "value": 0.1}
    write_evaluation(tmp_path, metrics(), past)
    folder = tmp_path / "evaluation" / "digits"
    best = folder / "step-000000300-ema-0.999"
    best.mkdir()
    for name in ("metrics.json", "teacher.png", "student.png", "strips.png"):
        (folder / name).rename(best / name)
    page = report(tmp_path)
    assert page.problems == [] and len(page.all("img")) == 3
    assert "4.56" in page.text and "Best so far: 3.34 at step 300 (EMA 0.999)." in page.text
    assert (
        "mean trajectory error against step" in page.text and "Best so far: 0.1000 at step 300" in page.text
    )


def test_the_distances_of_checkpoints_have_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the chart, in what it says in words, and in the table of `eval --watch`."""
    past = history()
    for row in past["rows"]:
        row["fid_ci95"] = row["fid"] / 10
    write_evaluation(tmp_path, metrics(), past)
    page = report(tmp_path)
    assert "Best so far: 3.34 ± 0.33 at step 300 (EMA 0.999)." in page.text
    bars = [a for name, a in page.elements if name == "line" and "spread" in (a.get("class") or "")]
    assert len(bars) == 2 * 6  # the chart is drawn in two widths
    assert all(float(bar["y1"] or 0) > float(bar["y2"] or 0) for bar in bars)
    show_history(load_config("configs/digits.yaml"), History.model_validate(past))
    said = capsys.readouterr().out
    assert "3.34 ± 0.33" in said and "±: half of the 95 % interval" in said


def test_a_checkpoint_without_a_finite_figure_is_not_the_best(tmp_path: Path) -> None:
    past = history()
    past["rows"][0] |= {"fid": float("nan"), "fid_ci95": float("nan")}
    write_evaluation(tmp_path, metrics(), past)
    page = report(tmp_path)
    assert "Best so far: 3.34 at step 300 (EMA 0.999)." in page.text
    assert "nan" not in page.text and "nan" not in str(page.all("svg") + page.all("line"))


def test_the_chart_by_cost_has_intervals(tmp_path: Path) -> None:
    """Of the student and of the teacher's rows that have one."""
    found = metrics()
    found["student"]["fid_ci95"] = 0.33
    found["teacher_rows"][1]["fid_ci95"] = 0.05
    found["teacher_rows"][2]["fid_ci95"] = 0.02
    write_evaluation(tmp_path, found)
    page = report(tmp_path)
    assert (
        page.problems == [] and "The student has Frechet distance 4.56 ± 0.33 at a cost of 1.0" in page.text
    )
    bars = [(a["class"] or "").split()[-1] for a in page.all("line") if "spread" in (a["class"] or "")]
    assert bars == 2 * ["c1", "c2", "c0"]  # the chart is drawn in two widths


def test_held_out_distances_of_a_training(tmp_path: Path) -> None:
    """They have a chart if a run measured them; lines of older trainings have none."""
    lines = curve()
    for step, distance in ((100, 7.5), (200, 3.25), (300, 4.125)):
        lines[step // 10 - 1]["heldout_distance"] = distance
    write_curve(tmp_path, lines)
    title = "Held-out Frechet distance during training"
    said = "The distance falls from 7.5 at step 100 to 4.12 at step 300. It is lowest at step 200, with 3.25."
    page = report(tmp_path)
    assert page.problems == [] and title in page.text and said in page.text
    inception = "evaluation.feature_extractor=inception-v3-compat"
    words = [inception, "evaluation.weights_path=null", "evaluation.metrics=[fid]"]
    assert "Held-out FID during training" in report(tmp_path, *words).text
    write_curve(tmp_path / "older", curve())
    assert title not in report(tmp_path / "older").text


def test_only_inceptions_distance_is_called_fid(tmp_path: Path) -> None:
    extractor = {"name": "inception-v3-compat", "weights_sha256": "6726825d"}
    write_evaluation(tmp_path, metrics(feature_extractor=extractor))
    page = report(tmp_path)
    assert "FID" in page.text and "Frechet distance" not in page.text


def test_what_is_missing_is_said_in_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"storage.root={tmp_path}"
    assert main(["report", root]) == 2
    said = capsys.readouterr().err
    assert "nothing to report yet" in said and len(said.splitlines()) == 1
    write_curve(tmp_path, curve(10))  # one line: charts of a single point
    page = report(tmp_path)
    assert page.problems == []
    for said in (
        f"Not evaluated yet: dsno-cluster eval configs/digits.yaml {root}",
        "No pictures yet",
        "No held-out errors",
        f"Checkpoints were not evaluated one by one: dsno-cluster eval configs/digits.yaml {root} --watch",
        "none are finished",
        "the only one recorded",
    ):
        assert said in page.text, said
    assert not page.all("img") and not page.all("input")
    shutil.rmtree(tmp_path / "students")
    write_evaluation(tmp_path, metrics())
    page = report(tmp_path)
    assert f"dsno-cluster train configs/digits.yaml {root}" in page.text and "4.56" in page.text


def test_default_place_and_a_curve_that_is_being_written(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (whole / "students/digits/metrics.jsonl").open("a") as file:
        file.write('{"step": 310, "lo')
    assert main(["report", f"storage.root={whole}"]) == 0
    assert str(whole / "report-digits.html") in capsys.readouterr().out
    assert "at step 300" in Page((whole / "report-digits.html").read_text()).text


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("evaluation/digits/metrics.json", "{", "not JSON"),
        ("evaluation/digits/metrics.json", "[]", "has no 'student'"),
        ("evaluation/digits/history.json", "{}", "has no 'rows'"),
        ("students/digits/metrics.jsonl", '{"step": 1\n{"step": 2}\n', "line 1"),
    ],
)
def test_damaged_files_are_named(
    whole: Path, file: str, content: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (whole / file).write_text(content)
    assert main(["report", f"storage.root={whole}"]) == 2
    error = capsys.readouterr().err
    assert str(whole / file) in error and said in error and len(error.splitlines()) == 1


HOSTILE = """</script></style><script>alert("x")</script><img src=x onerror='alert(1)'>&"""


def test_nothing_in_files_becomes_markup(tmp_path: Path) -> None:
    found = metrics(warnings=[HOSTILE], versions={"dsno-cluster": HOSTILE, HOSTILE: "1"})
    found["teacher_rows"][0]["source"] = HOSTILE
    found["feature_extractor"] = {"name": HOSTILE}
    found["checkpoint"]["path"] = HOSTILE
    write_evaluation(tmp_path, found, history())
    write_curve(tmp_path, curve())
    step = tmp_path / "students/digits/step-000000300"
    step.mkdir()
    (tmp_path / "students/digits/latest").write_text(step.name)
    model = {"kind": HOSTILE, "network": {}}
    (step / "meta.json").write_text(
        json.dumps({"sha256": "0", "model": model, "versions": {"torch": HOSTILE}})
    )
    (step / "config.yaml").write_text(
        yaml.safe_dump({"training": {"loss": HOSTILE}, "teacher": {"path": HOSTILE}})
    )
    plain = report(tmp_path)
    page = report(tmp_path, f"teacher.path={json.dumps(HOSTILE)}", "trajectories.num_samples=256")
    assert page.problems == []
    assert len(page.all("script")) == 1 == len(page.all("style"))
    assert not [a for _, a in page.elements if "onerror" in a or a.get("src") == "x"]
    assert page.text.count(re.sub(r"\s+", " ", HOSTILE)) >= 6
    assert plain.text.count("the student was trained with") == 2  # training.loss and teacher.path


def test_a_student_that_was_trained_with_another_config_is_told(whole: Path) -> None:
    step = whole / "students/digits/step-000000400"
    step.mkdir()
    (whole / "students/digits/latest").write_text(step.name)
    meta = {"sha256": "0", "model": {"kind": "dsno", "network": {}}, "step": 400, "train_seconds": 40.0}
    (step / "meta.json").write_text(json.dumps(meta))
    config = load_config("configs/digits.yaml", ["training.lr=0.5", "training.threads=7"])
    (step / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    page = report(whole)
    assert "training.lr is 0.001 in the config of this report; the student was trained with 0.5." in page.text
    assert "training.threads is" not in page.text  # which leaves the student as it is
    assert "The evaluation is of step 300; the newest student is of step 400." in page.text
    saved = next(a for a in page.all("a") if a.get("download"))
    text = base64.b64decode((saved["href"] or "").partition("base64,")[2]).decode()
    assert yaml.safe_load(text)["training"]["lr"] == 0.5  # what reproduces the student


def test_a_submitted_run_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    elsewhere.mkdir()
    write_evaluation(here / "results", metrics())
    monkeypatch.chdir(here)
    config = load_config("configs/digits.yaml", ["storage.root=results", "trajectories.num_samples=256"])
    words = "dsno-cluster train configs/digits.yaml storage.root=results"
    submission = Submission(TRAIN, config, load_profile(TRAIN.name, {}), words)
    run = create_run(submission, snapshot=False)
    monkeypatch.chdir(elsewhere)
    for word in (run.id, str(run.folder)):
        found = config_of_run(word, ["training.steps=77"])
        assert found.storage.root == str(here / "results") == str(found.run_dir)
        assert (found.training.steps, found.trajectories.num_samples) == (77, 256)
        assert main(["report", word]) == 0
    file = run.folder / "config.yaml"  # as former versions wrote it
    file.write_text(file.read_text().replace(f"root: {here / 'results'}", "root: results"))
    assert config_of_run(run.id).storage.root == str(here / "results")
    assert str(here / "results" / "report-digits.html") in capsys.readouterr().out
    assert words in Page((here / "results" / "report-digits.html").read_text()).text
    assert main(["report", "no-such-run"]) == 2
    assert "a config's path ends in .yaml" in capsys.readouterr().err
    assert main(["report", "a.yaml", "b.yaml"]) == 2


def test_needs_neither_torch_nor_ray(whole: Path) -> None:
    """As on a login node: the heavy libraries cannot even be imported."""
    script = (
        "import sys\n"
        "for name in ('torch', 'ray', 'deepspeed', 'torch_fidelity', 'submitit'): sys.modules[name] = None\n"
        "from dsno_cluster.cli import main\n"
        f"sys.exit(main(['report', 'storage.root={whole}']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_long_curve_stays_a_small_file(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": i, "loss": 1.0 + 1 / i} for i in range(1, 50_001)]
    lines[7]["loss"] = float("nan")  # what cannot be drawn is left out
    write_curve(tmp_path, lines)
    page = report(tmp_path)
    assert page.problems == [] and (tmp_path / "out.html").stat().st_size < 200_000
    assert "to 1 at step 50,000" in page.text and "nan" not in (tmp_path / "out.html").read_text()
