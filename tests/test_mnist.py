"""MNIST at 32x32: where its images come from, the yardstick, and the whole path on a few of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import DATA, dsno

from dsno_cluster.data import load_data
from dsno_cluster.errors import UserError
from dsno_cluster.features.extractors import find_weights, load_extractor

MNIST = DATA / "mnist" / "mnist.npz"  # the first 96 training and 48 test images


def test_features_are_those_of_the_yardstick() -> None:
    expected = safetensors.torch.load_file(DATA / "mnist" / "features_expected.safetensors")
    extractor = load_extractor(find_weights("mnist-features", None, None), ["64", "logits"])
    pixels = (expected["images"] * 127.5 + 127.5).round().to(torch.uint8)
    found = extractor(pixels)
    torch.testing.assert_close(found["64"], expected["features"], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(found["logits"], expected["logits"], atol=2e-4, rtol=1e-4)
    assert (found["logits"].argmax(1) == expected["labels"]).all()


def test_images_have_a_border_and_lie_in_the_range() -> None:
    train, held_out = load_data("mnist", str(MNIST))
    assert (train.images.shape, held_out.images.shape) == ((96, 1, 32, 32), (48, 1, 32, 32))
    with np.load(MNIST) as raw:
        inner = (train.images[:, 0, 2:-2, 2:-2] * 127.5 + 127.5).round().to(torch.uint8).numpy()
        assert np.array_equal(inner, raw["x_train"]) and np.array_equal(held_out.labels, raw["y_test"])
    assert (train.images[:, :, :2] == -1.0).all() and train.images.max() == 1.0


def test_files_of_torchvision(tmp_path: Path) -> None:
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    with np.load(MNIST) as raw:
        for part, kind in (("train", "train"), ("test", "t10k")):
            images, labels = raw[f"x_{part}"], raw[f"y_{part}"]
            head = struct.pack(">4i", 2051, *images.shape)
            (folder / f"{kind}-images-idx3-ubyte").write_bytes(head + images.tobytes())
            head = struct.pack(">2i", 2049, len(labels))
            (folder / f"{kind}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())
    for found, expected in zip(
        load_data("mnist", str(tmp_path)), load_data("mnist", str(MNIST)), strict=True
    ):
        assert torch.equal(found.images, expected.images) and torch.equal(found.labels, expected.labels)


@pytest.mark.parametrize(
    "where", ["an empty folder", "no folder", "no download", "other arrays", "other sizes", "no npz"]
)
def test_images_that_are_not_there(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path: Path | None = tmp_path
    if where == "no folder":
        path = tmp_path / "none"
    elif where == "no download":  # this machine reaches no server
        path = None
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:9/"])
    elif where == "other arrays":
        np.savez(path := tmp_path / "x.npz", images=np.zeros(3))
    elif where == "other sizes":
        names = {"x": np.zeros((3, 8, 8), np.uint8), "y": np.zeros(3)}
        np.savez(path := tmp_path / "x.npz", **names, xt=names["x"], yt=names["y"])
    elif where == "no npz":
        (path := tmp_path / "x.npz").write_text("<html>")
    with pytest.raises(UserError) as told:
        load_data("mnist", None if path is None else str(path))
    message = str(told.value)
    assert "\n" not in message and (str(path) in message if path else "data.path" in message), message


def test_a_path_is_for_images_that_are_files() -> None:
    told = dsno("plan", "configs/digits.yaml", f"data.path={MNIST}")
    assert told.returncode == 2 and "data" in told.stderr and "mnist" in told.stderr, told.stderr


@pytest.mark.slow
def test_the_whole_path(tmp_path: Path) -> None:
    """Teacher, trajectories, student and table on a few images with a small network."""
    words = [
        *("configs/mnist32.yaml", f"storage.root={tmp_path}", f"data.path={MNIST}"),
        *(f"teacher.path={tmp_path}/teachers/mnist32", "teacher.precision=float32", "network.width=32"),
        *("network.multipliers=[1, 1]", "network.blocks_per_level=1", "network.embedding_dim=32"),
        *("teacher_training.steps=4", "teacher_training.batch_size=16", "teacher_training.warmup=1"),
        *("trajectories.num_samples=32", "trajectories.samples_per_shard=16", "trajectories.batch_size=16"),
        *("trajectories.threads=1", "trajectories.steps=4", "training.steps=4", "training.batch_size=8"),
        *("training.heldout_every=null", "training.picture_every=null", "training.precision=float32"),
        *("evaluation.num_samples=64", "evaluation.batch_size=32", "evaluation.threads=1"),
        *("evaluation.teacher_steps=[1]", "evaluation.trajectory_samples=16"),
    ]
    made = dsno("train-teacher", *words)
    assert made.returncode == 0, made.stderr
    done = dsno("run", *words, "--launcher", "local")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "evaluation/mnist32/metrics.json").read_text())
    assert metrics["real_held_out"]["fid"] > 0 and metrics["student"]["fid"] > 0
    assert metrics["reference"]["count"] == 96 and metrics["feature_extractor"]["name"] == "mnist-features"
