"""Training on imported trajectories: without a teacher, and like on those that were exported."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, answer
from training_runs import metrics, train

from dsno_cluster.config import load_config
from dsno_cluster.storage import open_storage
from dsno_cluster.trajectories.exchange.export import ExportOptions, export
from dsno_cluster.trajectories.exchange.importing import Imported, ImportOptions, import_trajectories
from dsno_cluster.trajectories.reader import ShardReader, open_trajectories, read_batches
from dsno_cluster.trajectories.spec import ImportedFrom, ImportedLabels, ImportedSpec, read_spec

ALONE = ("teacher.path=null", "student.warm_start=false")


@pytest.fixture(scope="module")
def imported(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Imported]:
    """The tiny data set, exported and imported: its storage root, and what was imported."""
    root = tmp_path_factory.mktemp("imported")
    (data,) = tiny_data.glob("trajectories/*")
    export(str(data), str(root / "out"), ExportOptions("webdataset"))
    return root, import_trajectories(str(root / "out"), str(root), ImportOptions(samples_per_shard=16))


def keys(found: tuple[Path, Imported], *more: str) -> list[str]:
    root, imported = found
    times = f"trajectories.times={list(imported.spec.times)}"
    given = [f"storage.root={root}", f"trajectories.imported={imported.spec.hash}", times, *ALONE, *more]
    own = {word.partition("=")[0] for word in given}
    return [*(word for word in TINY if word.partition("=")[0] not in own), *given]


def batches(root: Path, folder: str) -> Iterator[list[Any]]:
    storage = open_storage(str(root))
    reader = ShardReader(storage, folder, open_trajectories(storage, folder, 96))
    return read_batches(reader, seed=0, first_sample=0, batch_size=16, rank=0, world_size=1)


@pytest.mark.slow
def test_training_reads_the_same_batches(imported: tuple[Path, Imported], tiny_data: Path) -> None:
    """Over two epochs: so a student gets the same losses."""
    root, found = imported
    (data,) = tiny_data.glob("trajectories/*")
    ours, theirs = batches(tiny_data, f"trajectories/{data.name}/"), batches(root, found.spec.folder)
    for _ in range(12):
        (one,), (other,) = next(ours), next(theirs)
        assert np.array_equal(one.indices, other.indices)
        assert torch.equal(one.noise, other.noise) and torch.equal(one.states, other.states)
        assert one.labels is not None and torch.equal(one.labels, other.labels)


def test_a_config_names_them(imported: tuple[Path, Imported]) -> None:
    words = keys(imported)
    said = answer("train", *words, "--launcher", "local", "--dry-run")
    assert said.returncode == 0 and imported[1].spec.hash in said.stdout + said.stderr, said.stderr
    assert answer("verify", "configs/digits.yaml", *words).returncode == 0
    assert "imported from webdataset" in answer("inspect", "configs/digits.yaml", *words).stdout
    assert "would train" in answer("train", *words, "teacher.path=package:digits-teacher", "--dry-run").stdout


REFUSED = {
    "training.heldout_every: needs a teacher": ["training.heldout_every=2"],
    "student.warm_start: needs a teacher": ["student.warm_start=true"],
    "trajectories.times: [0.5, 0.0], those of the imported": [
        "trajectories.times=[0.5,0.0]",
        "student.modes=1",
    ],
    "network.num_classes: 4, the imported": ["network.num_classes=4"],
    "network: images of (3, 8, 8)": ["network.state_channels=3"],
    "has 96 trajectories, trajectories.num_samples is 100": ["trajectories.num_samples=100"],
    "no finished trajectories": [f"trajectories.imported={'0' * 16}"],
    "trajectories.imported: string should match": ["trajectories.imported=best"],
    "training.online makes trajectories": ["training.online=true", "reader.shuffle=none"],
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_does_not_fit_is_one_line(imported: tuple[Path, Imported], said: str) -> None:
    told = answer("train", *keys(imported, *REFUSED[said]), "--launcher", "local")
    assert told.returncode == 2 and said in told.stderr, told.stderr
    assert told.stderr.count("\n") == 1


def test_what_needs_the_teacher_says_so(imported: tuple[Path, Imported], tmp_path: Path) -> None:
    for stage in ("gen-trajectories", "plan"):
        told = answer(stage, *keys(imported))
        assert told.returncode == 2 and "whose trajectories were imported" in told.stderr
    config = load_config("configs/digits.yaml", keys(imported))
    from dsno_cluster.teachers import NoTeacher, find_teacher

    with pytest.raises(NoTeacher, match="imported trajectories need none; name the model that made them"):
        find_teacher(config)


@pytest.mark.slow
def test_a_student_trains_on_them_as_on_the_original(
    imported: tuple[Path, Imported], tiny_data: Path, tmp_path: Path
) -> None:
    """The same losses to the last digit; with a teacher given, also the same held-out errors."""
    root, _ = imported
    train(tiny_data, tmp_path / "original", "student.warm_start=false", "training.heldout_every=2")
    words = [word for word in keys(imported) if word not in TINY and not word.startswith("storage.root")]
    train(root, tmp_path / "alone", *words)
    given = [word for word in words if word != "teacher.path=null"]
    train(root, tmp_path / "given", *given, "training.heldout_every=2")
    original = metrics(tmp_path / "original")
    for name in ("alone", "given"):
        assert [line["loss"] for line in metrics(tmp_path / name)] == [line["loss"] for line in original]
    errors = [line.get("heldout_error_per_time") for line in original]
    assert [line.get("heldout_error_per_time") for line in metrics(tmp_path / "given")] == errors
    assert any(error is not None for error in errors)


def test_the_name_of_an_import_stays() -> None:
    """It is in users' configs."""
    source = ImportedFrom(
        format="webdataset", sha256="0123456789abcdef", scale="flow", timesteps=(0.999, 0.5), noise_scale=1.0
    )
    spec = ImportedSpec(
        format_version=2,
        source=source,
        times=(0.5, 0.0),
        labels=ImportedLabels(num_classes=10),
        shape=(3, 8, 8),
        dtype="float16",
        samples_per_shard=500,
    )
    assert spec.hash == "b3b1d71f60694958"
    assert read_spec(spec.model_dump(mode="json"), "here") == spec
