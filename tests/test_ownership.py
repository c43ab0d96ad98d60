"""Two trainings of one name: one continues, the other names it and ends, and their published files never mix."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from s3_server import KEYS
from test_storage import s3_endpoint  # noqa: F401
from tiny import answer, dsno
from training_runs import STUDENT, link_data, train, wait_for, words

from dsno_cluster.config import load_config
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.model_folder import AboutModel, ModelDescription
from dsno_cluster.storage import Storage, only_writer, open_storage
from dsno_cluster.training.identity import Inputs
from dsno_cluster.training.ownership import Claim, Owner, only_run, students_claim
from dsno_cluster.training.publish import Publisher


def data_on_s3(data: Path, root: str, endpoint: str) -> Storage:
    """A storage root on S3 with the trajectories of `data`."""
    storage = open_storage(root, endpoint)
    folder = next((data / "trajectories").iterdir())
    for path in folder.iterdir():
        storage.write(f"trajectories/{folder.name}/{path.name}", path.read_bytes())
    return storage


def owner_in(storage: Storage) -> dict[str, str]:
    return dict(json.loads(storage.read(f"{STUDENT}/owner.json")))


@pytest.mark.parametrize("kind", [pytest.param("folder", marks=pytest.mark.slow), "s3"])
def test_of_two_trainings_of_one_name_only_one_publishes(
    kind: str,
    tiny_data: Path,
    tmp_path: Path,
    s3_endpoint: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    root = str(tmp_path / "root") if kind == "folder" else "s3://bucket/owned"
    where = [f"storage.root={root}", f"storage.endpoint_url={s3_endpoint}"]
    storage = data_on_s3(tiny_data, root, s3_endpoint)
    command = [sys.executable, "-m", "dsno_cluster.cli", *words(tmp_path), *where]
    runs = [
        subprocess.Popen(
            [*command, f"run.dir={tmp_path / run}", "--launcher", "local"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for run in ("one", "other")
    ]
    said = [run.communicate(timeout=300)[1] for run in runs]
    codes = [run.returncode for run in runs]
    assert sorted(codes) == [0, 2], said
    winner = ("one", "other")[codes.index(0)]
    refusal = said[codes.index(2)]
    assert f"belongs to the training with run.dir={tmp_path / winner} (" in refusal, refusal
    assert "Traceback" not in refusal and "choose another name=" in refusal
    assert owner_in(storage)["run_dir"] == str(tmp_path / winner)
    mine = (tmp_path / winner / STUDENT / "step-000000004/model.safetensors").read_bytes()
    assert storage.read(f"{STUDENT}/step-000000004/model.safetensors") == mine

    def again(run: str, *more: str) -> subprocess.CompletedProcess[str]:
        return answer(*words(tmp_path), *where, f"run.dir={tmp_path / run}", "--dry-run", *more)

    assert "already reached step 4" in again(winner).stdout  # the same training, known by its run.dir
    shutil.rmtree(tmp_path / winner)
    gone = again(winner)
    assert gone.returncode == 2 and "an earlier training in" in gone.stderr, gone.stderr
    assert f"delete {storage.url}/{STUDENT} to begin again" in gone.stderr
    assert again(winner, "name=another").returncode == 0
    for stat in list(storage.list(STUDENT)):
        storage.delete(stat.key)
    assert again(winner).returncode == 0


def claim(tmp_path: Path, run: str) -> Claim:
    config = load_config(
        "configs/digits.yaml", [f"storage.root={tmp_path / 'root'}", f"run.dir={tmp_path / run}"]
    )
    return students_claim(config, Inputs("trajectories/x/"))


def test_a_name_is_held_by_the_run_folder_not_by_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the folder moves, or another node resumes; a record that somebody deletes is written again."""
    mine = claim(tmp_path, "one")
    mine.hold()
    record = mine.storage.read(mine.key)
    with pytest.raises(UserError, match=r"belongs to the training with run\.dir="):
        claim(tmp_path, "other").hold()
    monkeypatch.setattr("socket.gethostname", lambda: "node2")
    (tmp_path / "one").rename(tmp_path / "moved")
    claim(tmp_path, "moved").hold()
    assert mine.storage.read(mine.key) == record
    mine.storage.delete(mine.key)
    claim(tmp_path, "moved").hold()
    assert Owner.model_validate_json(mine.storage.read(mine.key)).id == json.loads(record)["id"]
    mine.storage.write(mine.key, b"not a record")
    with pytest.raises(UserError, match=r"owner\.json: not an owner"):
        claim(tmp_path, "moved").hold()


@pytest.mark.slow
def test_students_from_before_there_were_records_belong_to_who_has_checkpoints(
    tiny_data: Path, tmp_path: Path
) -> None:
    out, run = link_data(tiny_data, tmp_path / "out"), tmp_path / "run"
    train(tiny_data, out, f"run.dir={run}")
    (out / STUDENT / "owner.json").unlink()
    (run / STUDENT / "resume/owner.json").unlink()
    command = [*words(out), "--launcher", "local"]
    stranger = answer(*command, f"run.dir={tmp_path / 'new'}", "--dry-run")
    assert stranger.returncode == 2, stranger.stderr
    assert "holds students up to step-000000004 of a training that" in stranger.stderr, stranger.stderr
    resumed = dsno(*command, f"run.dir={run}")
    assert resumed.returncode == 0 and "finished already" in resumed.stderr, resumed.stderr
    owner = (out / STUDENT / "owner.json").read_text()
    assert owner == (run / STUDENT / "resume/owner.json").read_text()
    # where a training publishes into its own run.dir, checkpoints may be deleted to begin again
    shutil.copytree(out / STUDENT, tmp_path / "own" / STUDENT)
    (tmp_path / "own" / STUDENT / "owner.json").unlink()
    again = train(tiny_data, tmp_path / "own")
    assert "holds students of an earlier training up to step-000000004" in again.stderr, again.stderr


def test_a_name_that_was_taken_over_is_published_to_no_more(tmp_path: Path) -> None:
    """Somebody deletes the students of a training that runs, and begins another of that name."""
    settings = [f"storage.root={tmp_path / 'root'}", f"run.dir={tmp_path / 'one'}"]
    publisher = Publisher(load_config("configs/digits.yaml", settings), Inputs("trajectories/x/"))
    about = AboutModel(model=ModelDescription(kind="x", network={}))
    shared = publisher.shared
    publisher.publish(1, {0.9: {"w": torch.zeros(1)}}, about)
    wait_for(lambda: shared.stat(f"{STUDENT}/latest") is not None)
    shutil.rmtree(tmp_path / "root")
    claim(tmp_path, "other").hold()
    publisher.publish(2, {0.9: {"w": torch.zeros(1)}}, about)
    wait_for(lambda: publisher.lost is not None)
    with pytest.raises(WorkError, match=rf"belongs to the training with run\.dir={tmp_path / 'other'}"):
        publisher.publish(3, {0.9: {"w": torch.zeros(1)}}, about)
    with pytest.raises(WorkError, match="a student is not uploaded, step-000000002"):
        publisher.finish()
    assert [stat.key for stat in shared.list("students/")] == [f"{STUDENT}/owner.json"]
    assert (tmp_path / "one" / STUDENT / "step-000000002/meta.json").is_file()  # nothing is lost


def test_of_two_trainings_of_one_teacher_only_one_publishes(tmp_path: Path) -> None:
    few = ["teacher_training.steps=2", "teacher_training.checkpoint_every=1", "teacher_training.batch_size=8"]
    command = ["train-teacher", *few, f"storage.root={tmp_path / 'root'}"]
    made = answer(*command, f"run.dir={tmp_path / 'one'}")
    assert made.returncode == 0, made.stderr
    other = answer(*command, f"run.dir={tmp_path / 'other'}", "teacher_training.lr=0.5")
    assert other.returncode == 2 and f"run.dir={tmp_path / 'one'} (" in other.stderr, other.stderr
    owner = tmp_path / "root/teachers/digits-owner.json"
    assert f"delete {owner} if nobody needs it" in other.stderr, other.stderr
    with only_run(tmp_path / "one/teachers", ".digits.lock"):
        second = answer(*command, f"run.dir={tmp_path / 'one'}")
    assert second.returncode == 1 and "another training writes there now" in second.stderr, second.stderr
    again = answer(*command, f"run.dir={tmp_path / 'one'}", "teacher_training.lr=0.5")
    assert again.returncode == 0, again.stderr  # as before: its owner may train it again
    owner.unlink()
    assert answer(*command, f"run.dir={tmp_path / 'other'}").returncode == 0


@pytest.mark.parametrize("kind", ["folder", "s3"])
def test_writers_of_the_same_files_take_turns(
    kind: str,
    tmp_path: Path,
    s3_endpoint: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    root = str(tmp_path) if kind == "folder" else "s3://bucket/turns"
    first, second = (open_storage(root, s3_endpoint) for _ in range(2))

    def write() -> None:
        with only_writer(second, "x/writing.json"):
            for name in ("a", "b"):
                second.write(f"x/{name}", b"second")

    other = threading.Thread(target=write)
    said = []

    def is_said(words: str) -> bool:
        said.append(capsys.readouterr().err)
        return words in "".join(said)

    with only_writer(first, "x/writing.json"):
        first.write("x/a", b"first")
        other.start()
        wait_for(lambda: is_said("x/writing.json: process "), pause=0.05)
        first.write("x/b", b"first")
        assert first.read("x/a") == b"first"
    other.join()
    assert [first.read(f"x/{name}") for name in ("a", "b")] == [b"second"] * 2
    assert first.stat("x/writing.json") is None
    # one that was killed is not waited for without end
    monkeypatch.setattr("dsno_cluster.storage.writer.ENDED_SECONDS", 0.5)
    first.write("x/writing.json", b"{}")
    write()
    assert first.stat("x/writing.json") is None
