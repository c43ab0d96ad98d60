"""What made something is on record, and actors that differ in it are refused."""

import json

import pytest
import torch

from dsno_cluster import device
from dsno_cluster.errors import UserError
from dsno_cluster.provenance import Environment, environment
from dsno_cluster.records import read_record
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
