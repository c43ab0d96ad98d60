"""Malformed checkpoints and folders of every family, as `plan` meets them: exit 2, one line, and nothing of them runs.

The cases of the families' own tests are put on the command line here too, except diffusers folders', of which
`test_diffusers_files.py` does that itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from teacher_models import STATE_DICTS as OPTIONS
from teacher_models import weights_of
from test_bad_state_dicts import BAD, WRONG_OPTIONS
from test_diffusers_files import FAULTS
from test_hostile_pickles import CHANGED, HOSTILE
from test_published_teachers import hostile
from test_weight_files import BAD as BAD_WEIGHTS
from test_weight_files import DIGITS_TEACHER
from tiny import TINY, answer

from dsno_cluster import load_teacher
from dsno_cluster.errors import UserError


def refused(folder: Path, path: str, options: dict[str, Any] | None = None, says: str = "") -> None:
    """`plan` ends with one line on this teacher, and nothing has run."""
    words = [
        f"teacher.path={path}",
        f"teacher.options={json.dumps(options or {})}",
        f"storage.root={folder / 'runs'}",
    ]
    found = answer("plan", *TINY, *words, cwd=folder)
    assert found.returncode == 2, found.stderr
    assert found.stderr.startswith("dsno-cluster: ") and found.stderr.count("\n") == 1, found.stderr
    assert len(found.stderr) < 900 and says in found.stderr, found.stderr
    assert "must not run" not in found.stdout + found.stderr
    for trap in ("trap", "must-not-be-there"):
        assert not (folder / trap).exists() and not Path(trap).exists()


@pytest.mark.parametrize("case", HOSTILE)
def test_pickles(case: str, tmp_path: Path) -> None:
    (tmp_path / "snapshot.pkl").write_bytes(HOSTILE[case][0])
    refused(tmp_path, "snapshot.pkl")


@pytest.mark.parametrize("case", BAD)
def test_state_dicts(case: str, tmp_path: Path) -> None:
    name, change, _ = BAD[case]
    torch.save(change(torch.load(weights_of(name), weights_only=True)), tmp_path / "bad.pt")
    refused(tmp_path, "bad.pt", OPTIONS[name])


@pytest.mark.parametrize(("name", "data"), [pytest.param(n, d, id=n) for n, d in hostile()])
def test_flax_files(name: str, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(data)
    (tmp_path / "config.yaml").write_text("data: {image_size: 8}\nmodel: {mean_type: x}\n")
    refused(tmp_path, "checkpoint", {"config": "config.yaml"})


# ---- folders of ours -----------------------------------------------------------------------------------------


def meta(**changes: Any) -> Callable[[Path], None]:
    """The teacher's meta.json with other values; of `model`, for keys that begin with `model_`."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / "meta.json").read_text())
        for key, value in changes.items():
            inner, _, name = key.partition("_")
            if inner == "model" and name:
                content["model"][name] = value
            else:
                content[key] = value
        (folder / "meta.json").write_text(json.dumps(content))

    return apply


def network(**changes: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "meta.json").read_text())
        content["model"]["network"] |= changes
        (folder / "meta.json").write_text(json.dumps(content))

    return apply


def text(file: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text(content)


def latest(content: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "meta.json").unlink()
        (folder / "latest").write_text(content)

    return apply


def folder_of_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


OWN: dict[str, Callable[[Path], Any]] = {
    "meta is no JSON": text("meta.json", "{'a': 1}"),
    "meta is a list": text("meta.json", "[1, 2]"),
    "meta is nested too deeply": text("meta.json", "[" * 100_000),
    "meta is a web page": text("meta.json", "<!doctype html><title>Sign in</title>"),
    "meta is empty": text("meta.json", ""),
    "meta of another version": meta(schema_version=99),
    "no model": meta(model=None),
    "a model that is a list": meta(model=[1]),
    "a student": meta(model_kind="dsno"),
    "unknown prediction": meta(model_prediction="score"),
    "unknown schedule": meta(model_schedule="linear"),
    "no steps": meta(model_num_steps=0),
    "a foreign key": meta(model_heads=3),
    "no network": meta(model_network=None),
    "a width that is no multiple": network(width=33),
    "sizes that do not halve": network(image_size=7),
    "a negative size": network(image_size=-8),
    "a width of text": network(width="wide"),
    "no sizes": network(width=None),
    "a sha256 that is none": meta(sha256=5),
    "latest leads out": latest("../../etc"),
    "latest is a list of bytes": latest("\x00\x01"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "weights are a folder": folder_of_weights,
}


@pytest.mark.parametrize("case", OWN)
def test_folders_of_ours(case: str, tmp_path: Path) -> None:
    shutil.copytree(DIGITS_TEACHER, tmp_path / "teacher")
    OWN[case](tmp_path / "teacher")
    refused(tmp_path, "teacher", says="teacher")


@pytest.mark.parametrize("width", [64, 2**20 * 32, 2**45 * 32])
def test_a_network_that_the_weights_are_not_of(width: int, tmp_path: Path) -> None:
    """Nothing is allocated for it."""
    shutil.copytree(DIGITS_TEACHER, tmp_path / "teacher")
    network(width=width)(tmp_path / "teacher")
    with pytest.raises(
        UserError, match=r"teacher: its (weights do not fit its description|description makes no network)"
    ):
        load_teacher(str(tmp_path / "teacher"))


# ---- what is no teacher at all -------------------------------------------------------------------------------

STRANGE: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda path: None,
    "an empty folder": lambda path: path.mkdir(),
    "an empty file": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("my teacher\n"),
    "a picture": lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "a program": lambda path: path.write_bytes(b"\x7fELF" + bytes(100)),
    "zeros": lambda path: path.write_bytes(bytes(4096)),
    "a zip without an end": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "an archive": lambda path: path.write_bytes(b"\x1f\x8b" + bytes(100)),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder of pictures": lambda path: [path.mkdir(), (path / "1.png").write_bytes(b"\x89PNG")],
    "a checkout": lambda path: [
        path.mkdir(),
        (path / "README.md").write_text("# x"),
        (path / "train.py").write_text(""),
    ],
    "a config that is a folder": lambda path: (path / "config.json").mkdir(parents=True),
    "a flax file of another kind": lambda path: path.write_bytes(msgpack.packb({"params": {}})),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_is_no_teacher(case: str, tmp_path: Path) -> None:
    STRANGE[case](tmp_path / "strange")
    refused(tmp_path, "strange", says="strange")


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("closed-form:cube", {}),
        ("closed-form:gaussian", {"mean": "a", "std": 1.0, "shape": [1, 8, 8]}),
        ("closed-form:mixture", {"means": [], "stds": 1.0, "shape": [1, 8, 8]}),
        ("no_such_module:build", {}),
        ("package:no-such-teacher", {}),
        ("package:../../..", {}),
        ("s3://x", {}),
        ("gs://bucket/teacher", {}),
    ],
)
def test_names_of_no_teacher(path: str, options: dict[str, Any], tmp_path: Path) -> None:
    refused(tmp_path, path, options)


def test_there_are_sixty_and_more_of_every_family() -> None:
    """What docs/teacher-files.md counts."""
    cases = {
        "EDM and EDM2": len(HOSTILE) + len(CHANGED),
        "state dicts": len(BAD) + len(WRONG_OPTIONS),
        "diffusers folders": len(FAULTS) + len(BAD_WEIGHTS),
        "flax files": len(list(hostile())) + len(BAD_WEIGHTS),
        "folders of ours": len(OWN) + len(BAD_WEIGHTS),
        "no teacher": len(STRANGE),
    }
    assert min(cases.values()) > 15 and sum(cases.values()) > 250, cases
