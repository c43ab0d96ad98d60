"""What made something is on record, and actors that differ in it are refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsno_cluster import device
from dsno_cluster.config import load_config
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.look_up import ImagesComparison
from dsno_cluster.evaluation.measure import Surroundings
from dsno_cluster.evaluation.records import Figures
from dsno_cluster.evaluation.store import store_images
from dsno_cluster.image_sets.image_set import DataIdentity
from dsno_cluster.provenance import Environment, environment
from dsno_cluster.records import read_record
from dsno_cluster.storage import open_storage
from dsno_cluster.trajectories.generate import check_alike


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, cudnn: int) -> Environment:
    """What a process with that cuDNN records."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(device, "_driver_version", lambda: "580.65.06")
    return environment()


def test_actors_that_differ_in_cudnn_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    first, same, other = (on_a_gpu(monkeypatch, cudnn) for cudnn in (91002, 91002, 90800))
    assert first.versions.items() >= {"cuda": "13.0", "cudnn": "91002", "driver": "580.65.06"}.items()
    check_alike(same, first)
    with pytest.raises(UserError, match=r"the actors' versions differ: .*90800.*91002"):
        check_alike(other, first)


def test_without_a_gpu_no_version_of_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not {"cuda", "cudnn", "driver"} & set(environment().versions)


def test_an_older_record_is_read() -> None:
    older = {"device": "a CPU", "versions": {"torch": "2.6"}, "code": {"version": "0.1"}, "seconds": 3.5}
    found = read_record(Environment, json.dumps(older).encode(), "manifest.json")
    assert found.model_dump(mode="json") == older


def test_figures_are_recorded_with_the_versions_of_the_actors(tmp_path: Path) -> None:
    """The process that records them may see no GPU."""
    config = load_config("configs/digits.yaml", [f"storage.root={tmp_path}"])
    images = SimpleNamespace(shape=(1, 8, 8), count=10, identity=DataIdentity(kind="random"))
    comparison = ImagesComparison(config, open_storage(str(tmp_path)), "there", images, {}, {}, None)  # type: ignore[arg-type]
    theirs = {"torch": "2.11", "cuda": "13.0", "cudnn": "91002", "driver": "580.65.06"}
    made_by = Surroundings(None, Environment(device="NVIDIA H200", versions=theirs))
    store_images(comparison, Figures(), made_by)
    (file,) = tmp_path.glob("evaluation/digits/samples-*.json")
    assert json.loads(file.read_text())["versions"] == theirs
