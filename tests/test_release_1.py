"""What the release at commit 361e54f left behind still works; `data/release_1/README.md` says what it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tiny import DATA, answer, dsno
from torch import Tensor

from dsno_cluster import load_student, load_teacher, solve
from dsno_cluster.config import load_config
from dsno_cluster.errors import UserError
from dsno_cluster.model_folder import AboutModel
from dsno_cluster.provenance import environment
from dsno_cluster.records import record_bytes
from dsno_cluster.training.checkpoint import Best, CheckpointState, RunNotes
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.solve_actor import SolveActor

RELEASE = DATA / "release_1"
STUDENTS = Path("runs/students/release")
TRAJECTORIES = Path("runs/trajectories/1c6b6ab28439a2bd")
EXPECTED = safetensors.torch.load_file(RELEASE / "expected.safetensors")
# of what CPUs of other makes compute from the same weights, and of where thirty steps of Adam then end
TOLERANCE, TRAINED_TOLERANCE = 1e-4, 3e-4


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of the folder, for a test to work in."""
    return Path(shutil.copytree(RELEASE, tmp_path / "release"))


def test_its_unfinished_training_continues_and_ends_with_its_weights(release: Path) -> None:
    killed_amid = release / STUDENTS / "resume/.step-000000020.tmp"
    assert killed_amid.is_dir()
    done = dsno("train", "release.yaml", "--launcher", "local", cwd=release, OMP_NUM_THREADS="1")
    assert done.returncode == 0 and "steps 10 to 40" in done.stderr, done.stderr
    found = safetensors.torch.load_file(release / STUDENTS / "step-000000040/model.safetensors")
    final = {name: EXPECTED[f"final/{name}"] for name in found}
    assert len(final) == sum(name.startswith("final/") for name in EXPECTED)
    together = [torch.cat([tensors[name].flatten() for name in final]) for tensors in (found, final)]
    assert relative(*together) < TRAINED_TOLERANCE
    lines = (release / STUDENTS / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert all(line.startswith('{"step": ') for line in lines)
    assert steps == [5, 10, 15, 20, 25, 30, 35, 40] and not killed_amid.exists()
    again = dsno("train", "release.yaml", "--launcher", "local", cwd=release)
    assert again.returncode == 0 and "finished already at step 40" in again.stderr, again.stderr


def test_its_student_answers_as_it_did() -> None:
    noise, labels = EXPECTED["noise"], EXPECTED["labels"]
    for decay in (0.9, 0.99):
        student = load_student(str(RELEASE / STUDENTS / "step-000000020"), ema=decay)
        assert relative(student.sample(noise, labels), EXPECTED[f"sample_{decay}"]) < TOLERANCE
        if decay == 0.9:
            assert relative(student.trajectory(noise, labels), EXPECTED["trajectory_0.9"]) < TOLERANCE


# ---- keys that came later, simulated by a file that lacks one ------------------------------------------------


def edit(file: Path, *keys: str, **changes: object) -> None:
    """Change values below `keys` of a JSON file; None removes one."""
    whole = json.loads(file.read_text())
    inner = whole
    for key in keys:
        inner = inner[key]
    for name, value in changes.items():
        assert name in inner
        inner[name] = value
        if value is None:
            del inner[name]
    file.write_text(json.dumps(whole))


@pytest.mark.parametrize("file", ["resume/step-000000010/state.json", "step-000000010/meta.json"])
def test_a_key_that_its_identity_lacks_has_its_default(file: str, release: Path) -> None:
    path = release / STUDENTS / file
    run = "identity" if file.endswith("state.json") else "run"
    edit(path, run, "network", dropout=None, heads=None)
    edit(path, run, "student", temporal_init=None, points=None)
    few = ["training.steps=11", "training.heldout_every=null", "--launcher", "local"]
    done = dsno("train", "release.yaml", *few, cwd=release)
    assert done.returncode == 0 and "steps 10 to 11" in done.stderr, done.stderr


@pytest.mark.parametrize("file", ["resume/step-000000010/state.json", "step-000000010/meta.json"])
def test_another_value_in_its_identity_is_refused(file: str, release: Path) -> None:
    path = release / STUDENTS / file
    run = "identity" if file.endswith("state.json") else "run"
    edit(path, run, "network", dropout=0.2)
    refused = dsno("train", "release.yaml", "--launcher", "local", cwd=release)
    assert refused.returncode == 2 and "was saved with network {" in refused.stderr, refused.stderr
    assert "'dropout': 0.2" in refused.stderr and "new run with name=" in refused.stderr, refused.stderr
    edit(path, run, "network", dropout=0.0)
    edit(path, run, seed=3)
    refused = dsno("train", "release.yaml", "--launcher", "local", cwd=release)
    assert refused.returncode == 2 and "was saved with seed 3, now it is 0" in refused.stderr, refused.stderr


def test_a_key_that_its_students_lack_has_its_default(release: Path) -> None:
    folder = release / STUDENTS / "step-000000020"
    edit(folder / "meta.json", "model", "network", dropout=None, heads=None)
    edit(folder / "meta.json", "model", points=None)
    found = load_student(str(folder)).sample(EXPECTED["noise"], EXPECTED["labels"])
    assert relative(found, EXPECTED["sample_0.9"]) < TOLERANCE


def test_what_a_newer_version_says_more_is_kept_and_another_schema_is_refused(release: Path) -> None:
    folder = release / STUDENTS / "step-000000020"
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"colour": "blue", "schema_version": 1}))
    assert load_student(str(folder)).times == (0.5625, 0.25, 0.0625, 0.0)
    for damaged, says in [
        (json.dumps(meta | {"schema_version": 2}), "schema version 2; this dsno-cluster reads version 1"),
        (json.dumps({k: v for k, v in meta.items() if k != "sha256"}), "sha256: Field required"),
        (json.dumps(meta | {"model": {"kind": "dsno"}}), "model.network: Field required"),
        (json.dumps(meta | {"averages": [0.99]}), "averages: "),
        ("{", "Invalid JSON"),
    ]:
        (folder / "meta.json").write_text(damaged)
        with pytest.raises(UserError, match=r"meta\.json: ") as told:
            load_student(str(folder))
        assert says in str(told.value)
    more = {**meta["model"], "colour": "blue"}  # what it means for the answers nobody here knows
    (folder / "meta.json").write_text(json.dumps(meta | {"model": more}))
    with pytest.raises(UserError, match=r"meta\.json: model: unknown key colour"):
        load_student(str(folder))


# ---- its data set and teacher --------------------------------------------------------------------------------


def tree(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """Times and bytes of all files."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def test_its_data_set_is_finished_and_right(release: Path) -> None:
    before = tree(release)
    again = answer("gen-trajectories", "release.yaml", "--launcher", "local", cwd=release)
    assert again.returncode == 0 and "all 4 shards exist already" in again.stderr, again.stderr
    verified = answer("verify", "release.yaml", cwd=release)
    assert verified.returncode == 0, verified.stderr
    assert tree(release) == before


def test_its_first_shard_is_made_with_its_bytes_today(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(release)
    config = load_config("release.yaml", [f"storage.root={release / 'fresh'}"])
    plan, manifest = make_plan(config), json.loads((release / TRAJECTORIES / "manifest.json").read_text())
    assert plan.spec.model_dump(mode="json") == manifest["spec"]
    before = torch.get_num_threads()
    try:  # what runs as a Ray actor
        actor = SolveActor(plan.spec, config.teacher, config.storage, plan.folder)
        line, _ = actor.make_shard(0)
    finally:
        torch.set_num_threads(before)
    folders = (release / "fresh" / plan.folder, release / TRAJECTORIES)
    ours, theirs = (safetensors.torch.load_file(folder / line.key) for folder in folders)
    assert relative(ours["states"].float(), theirs["states"].float()) < TOLERANCE
    assert torch.equal(ours["labels"], theirs["labels"])
    if same_arithmetic(environment().model_dump(), manifest["environment"]):
        assert line.model_dump() == manifest["shards"][0]  # its sha256 too


def same_arithmetic(*environments: dict) -> bool:
    """Whether device model and the versions of the libraries that compute are equal."""
    one, other = ((e["device"], *(e["versions"][name] for name in ("torch", "numpy"))) for e in environments)
    return one == other


def test_its_teacher_answers_as_it_did(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(release)
    teacher = load_teacher("runs/teachers/release")
    noise, labels = EXPECTED["noise"], EXPECTED["labels"]
    assert relative(teacher(noise, 0.5, labels), EXPECTED["teacher_x0_at_0.5"]) < TOLERANCE
    states = solve(teacher, noise, (0.5625, 0.25, 0.0625, 0.0), "abm3", 12, labels)
    assert relative(states, EXPECTED["teacher_states"]) < TOLERANCE


def test_its_student_is_evaluated(release: Path) -> None:
    few = ["evaluation.num_samples=100", "evaluation.batch_size=50", "evaluation.trajectory_samples=20"]
    few += ["evaluation.teacher_steps=[1]", "--actors", "1", "--launcher", "local", "--json"]
    student = str(
        STUDENTS / "step-000000020"
    )  # `latest` names step 10: the run was killed before it was changed
    done = dsno("eval", "release.yaml", "--student", student, *few, cwd=release)
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics["checkpoint"]["step"] == 20 and 0 < metrics["student"]["trajectory_error"]["0.0"] < 1


def test_the_best_of_its_checkpoints_is_known_by_its_figure() -> None:
    """Which it called `error`; a smaller figure takes its place, an equal one or none does not."""
    found = CheckpointState.model_validate_json(
        (RELEASE / STUDENTS / "resume/step-000000010/state.json").read_bytes()
    )
    assert found.best is not None and (found.best.step, found.best.figure) == (10, 0.3377883805403106)
    notes = RunNotes(AboutModel.model_construct(), found.identity, best=found.best)
    kept = [(11, None), (12, 0.34), (13, 0.3377883805403106)]
    for step, figure in [*kept, (14, 0.25), (15, 0.3)]:
        notes.compare(step, figure)
        assert notes.best is not None and notes.best.step == (10 if step < 14 else 14)
    newer = found.model_copy(update={"best": notes.best})
    again = CheckpointState.model_validate_json(record_bytes(newer))
    assert again == newer and again.best is not None and again.best.figure == 0.25
    first = RunNotes(AboutModel.model_construct(), found.identity)
    first.compare(1, None)
    first.compare(1, float("nan"))
    assert first.best is None
    first.compare(2, 9.5)
    first.compare(3, float("nan"))
    assert first.best is not None and (first.best.step, first.best.figure) == (2, 9.5)
    assert first.without_progress == 1
    misled = RunNotes(AboutModel.model_construct(), found.identity, best=Best(step=1, figure=float("nan")))
    misled.compare(2, 9.5)
    assert misled.best is not None and misled.best.step == 2
