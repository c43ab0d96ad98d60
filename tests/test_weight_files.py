"""Weights as people have them: pointers, web pages, files that were cut off. Each is one line that names the file.

The same bad bytes are put in the place of every kind of weights.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from teacher_models import PUBLISHED, saved
from teacher_models import small_diffusers_unet as small_diffusers_unet  # fixture
from tiny import TINY, answer, dsno

from dsno_cluster import load_student
from dsno_cluster.config import files_not_there, load_config
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.features import INCEPTION
from dsno_cluster.features.classifiers import DigitsFeatures
from dsno_cluster.features.extractors import find_weights
from dsno_cluster.files import file_sha256
from dsno_cluster.model_folder import package_path
from dsno_cluster.teachers import find_teacher
from dsno_cluster.teachers.importing import import_weights
from dsno_cluster.training.heldout import heldout_states
from dsno_cluster.training.objectives.losses import check_lpips_weights
from dsno_cluster.training.online import planned_manifest
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.weight_files import parse_safetensors

DIGITS_TEACHER = Path(package_path("package:digits-teacher"))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 132735322\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"


class _RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trap",)


BAD: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "pointer": (lambda whole: POINTER, "Git LFS pointer"),
    "page": (lambda whole: PAGE, "web page"),
    "answer": (lambda whole: b'{"error": "Repository not found"}', "Repository not found"),
    "empty": (lambda whole: b"", "is empty"),
    "cut": (lambda whole: whole[: len(whole) * 2 // 3], "cut off"),
    "cut early": (lambda whole: whole[:100], "cut off"),
    "packed": (gzip.compress, "gzip"),
    "pickle": (
        lambda whole: pickle.dumps({"ema": _RunsCode()}),
        "could run code|may run code|more than tensors",
    ),
}
bad_files = pytest.mark.parametrize("kind", BAD)


def spoil(file: Path, kind: str) -> str:
    """Put bad bytes in the place of a file; what a message must say of it."""
    make, says = BAD[kind]
    file.write_bytes(make(file.read_bytes()))
    return says


def check_refused(done: Any, file: str, says: str) -> None:
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    line = done.stderr.splitlines()[-1]
    assert file in line and any(word in line for word in says.split("|")), line
    assert len([text for text in done.stderr.splitlines() if text.startswith("dsno-cluster: ")]) == 1


@bad_files
def test_a_teacher_of_ours(kind: str, tmp_path: Path) -> None:
    shutil.copytree(DIGITS_TEACHER, tmp_path / "teacher")
    says = spoil(tmp_path / "teacher/model.safetensors", kind)
    planned = answer("plan", "teacher.path=teacher", cwd=tmp_path)
    check_refused(planned, "model.safetensors", says)
    assert ": fits" not in planned.stdout and "16,384 of 4 time points" in planned.stdout
    check_refused(
        answer("gen-trajectories", "teacher.path=teacher", "--dry-run", cwd=tmp_path), "teacher", says
    )
    assert not (tmp_path / "trap").exists()


@bad_files
def test_a_student(kind: str, tmp_path: Path) -> None:
    folder = PUBLISHED / "one_point"
    import_weights(
        str(folder / "solver-model_1000.pt"), str(folder / "config.yaml"), str(tmp_path / "student")
    )
    says = spoil(tmp_path / "student/model.safetensors", kind)
    for words in (["--out", "x.png"], ["--shards", "drawn", "--num", "64"]):
        check_refused(answer("sample", "student", *words, cwd=tmp_path), "student: model.safetensors", says)
    assert not (tmp_path / "drawn").exists()


@bad_files
def test_a_diffusers_folder(kind: str, unet: Any, tmp_path: Path) -> None:
    saved(unet, tmp_path / "teacher")
    says = spoil(tmp_path / "teacher/unet/diffusion_pytorch_model.safetensors", kind)
    words = [
        "teacher.path=teacher",
        "network.state_channels=3",
        "network.num_classes=5",
        "network.null_class=false",
    ]
    check_refused(answer("plan", *words, cwd=tmp_path), "unet/diffusion_pytorch_model.safetensors", says)


@bad_files
@pytest.mark.parametrize("model", ["one_point/solver-model_1000.pt", "teacher_flax_x/teacher"])
def test_a_published_checkpoint(kind: str, model: str, tmp_path: Path) -> None:
    source = PUBLISHED / model
    file = tmp_path / source.name
    shutil.copy(source, file)
    shutil.copy(source.parent / "config.yaml", tmp_path)
    says = spoil(file, kind)
    imported = answer("import-weights", file.name, "--config", "config.yaml", "--out", "out", cwd=tmp_path)
    check_refused(imported, file.name, says)
    assert not (tmp_path / "out").exists() and not (tmp_path / "trap").exists()
    if "flax" in model:
        alone = answer("plan", f"teacher.path={file.name}", cwd=tmp_path)
        assert alone.returncode == 2 and file.name in alone.stderr
        if kind in ("pointer", "page", "answer", "empty", "packed"):
            (tmp_path / "folder").mkdir()
            for part in (file, tmp_path / "config.yaml"):
                shutil.copy(part, tmp_path / "folder")
            check_refused(answer("plan", "teacher.path=folder", cwd=tmp_path), file.name, says)


def state_dict(form: str) -> bytes:
    """Some weights as `torch.save` wrote them, in its present form or in the one before."""
    file = Path(form)
    torch.save({"w": torch.arange(10_000.0)}, file, _use_new_zipfile_serialization=form == "zip")
    data = file.read_bytes()
    file.unlink()
    return data


def test_vgg_is_not_asked_for_where_no_trajectory_is_compared() -> None:
    """CIFAR-10's weights are not here, and its student is finished by its samples."""
    cifar10 = str(Path(__file__).parents[1] / "configs/cifar10.yaml")
    words = [
        "training.objective=distribution",
        "training.distribution={adversarial_weight: 0, trajectory_weight: 0.1}",
    ]
    with pytest.raises(UserError, match=r"training\.lpips_weights: .* is missing"):
        check_lpips_weights(load_config(cifar10, words).training)
    assert "training.lpips_weights" in files_not_there(load_config(cifar10, words))
    without = load_config(cifar10, [words[0], "training.distribution={adversarial_weight: 0}"])
    check_lpips_weights(without.training)
    assert "training.lpips_weights" not in files_not_there(without)


@bad_files
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_vgg(kind: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "vgg16.pth"
    if form == "safetensors":
        safetensors.torch.save_file({"w": torch.arange(10_000.0)}, file)
    else:
        file.write_bytes(state_dict(form))
    words = [
        *(
            "training.loss=lpips",
            "training.lpips_weights=vgg16.pth",
            "network.state_channels=3",
            "network.state_size=32",
        ),
        *(
            "network.attention_resolutions=[16]",
            "network.null_class=false",
            "teacher.path=closed-form:gaussian",
        ),
        *("network.num_classes=0", "teacher.options={mean: 0.3, std: 0.4, shape: [3, 32, 32]}"),
        "evaluation.metrics=[trajectory_error]",
    ]
    config = load_config(str(Path(__file__).parents[1] / "configs/digits.yaml"), words)
    with pytest.raises(
        UserError, match=r"vgg16\.pth does not hold VGG-16's weights: features\.0\.weight is missing"
    ):
        check_lpips_weights(config.training)
    says = spoil(file, kind)
    planned = answer("plan", *words)
    check_refused(planned, "training.lpips_weights", says)
    assert not (tmp_path / "trap").exists()


@bad_files
def test_weights_of_an_extractor(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if their sha256 is given, which a message had asked for: nothing in them runs."""
    monkeypatch.chdir(tmp_path)
    for name, data in (
        (
            DigitsFeatures.NAME,
            (Path(package_path("package:digits-features")) / "weights.safetensors").read_bytes(),
        ),
        (INCEPTION, state_dict("zip")),
        (INCEPTION, state_dict("legacy")),
    ):
        file = tmp_path / "weights.pth"
        file.write_bytes(data)
        find_weights(name, str(file), file_sha256(file))
        says = spoil(file, kind)
        with pytest.raises(UserError) as refused:
            find_weights(name, str(file), file_sha256(file))
        line = str(refused.value)
        assert "weights.pth" in line and any(word in line for word in says.split("|")), line
        assert "\n" not in line and not (tmp_path / "trap").exists()


@bad_files
def test_the_state_of_an_unfinished_teacher(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "runs/teachers/digits-resume.pt"
    file.parent.mkdir(parents=True)
    file.write_bytes(state_dict("zip"))
    says = spoil(file, kind)
    done = answer("train-teacher", "teacher_training.steps=1", cwd=tmp_path)
    check_refused(done, "digits-resume.pt", says)
    assert "delete that file to begin anew" in done.stderr and not (tmp_path / "trap").exists()


@pytest.mark.parametrize("kind", ["empty", "cut"])
def test_held_out_states_that_were_kept(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are only kept to save time, so they are made again."""
    words = [*TINY, f"storage.root={tmp_path}", "training.heldout_samples=4"]
    config = load_config(str(Path(__file__).parents[1] / "configs/digits.yaml"), words)
    teacher = find_teacher(config)
    manifest = planned_manifest(make_plan(config, teacher))
    states = heldout_states(config, teacher, manifest, torch.device("cpu"))
    (file,) = tmp_path.glob("students/digits/heldout-*.safetensors")
    whole = file.read_bytes()
    says = spoil(file, kind)
    capsys.readouterr()
    assert torch.equal(heldout_states(config, teacher, manifest, torch.device("cpu")), states)
    assert says in capsys.readouterr().err and file.read_bytes() == whole


def test_plan_opens_the_weights_of_an_extractor(tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(PAGE)
    planned = answer("plan", "evaluation.weights_path=weights.pth", cwd=tmp_path)
    check_refused(planned, "evaluation.weights_path", "web page")
    assert "package:digits-teacher: fits" in planned.stdout


def replace_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Other weights in a model folder, and their sha256 in its meta.json."""
    file, meta_file = folder / "model.safetensors", folder / "meta.json"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    meta = json.loads(meta_file.read_text())
    meta_file.write_text(json.dumps({**meta, "sha256": file_sha256(file)}))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors: tensors.popitem(), "is missing"),
        (lambda tensors: tensors.update(w=torch.zeros(2)), "w is not of this network"),
        (lambda tensors: next(iter(tensors.values())).fill_(math.nan), "holds numbers that are not finite"),
        (
            lambda tensors: tensors.update(
                {name: tensor[..., :1].contiguous() for name, tensor in tensors.items()}
            ),
            "has shape",
        ),
    ],
    ids=["one less", "one more", "NaN", "smaller"],
)
def test_weights_that_are_whole_but_not_those_that_are_described(
    change: Callable[[dict[str, torch.Tensor]], Any], says: str, tmp_path: Path
) -> None:
    """NaN would become trajectories and images of NaN, without a word."""
    shutil.copytree(DIGITS_TEACHER, tmp_path / "teacher")
    replace_weights(tmp_path / "teacher", change)
    measured = answer("plan", "teacher.path=teacher", "--measure", cwd=tmp_path)
    check_refused(measured, "teacher: its weights do not fit its description", says)
    folder = PUBLISHED / "one_point"
    import_weights(
        str(folder / "solver-model_1000.pt"), str(folder / "config.yaml"), str(tmp_path / "student")
    )
    replace_weights(tmp_path / "student", change)
    with pytest.raises(UserError, match=rf"its weights do not fit its meta\.json: .*{says}"):
        load_student(str(tmp_path / "student"))


@pytest.mark.slow
def test_what_only_an_actor_sees_is_one_line(tmp_path: Path) -> None:
    """Weights of an extractor are whole, and another's."""
    safetensors.torch.save_file({"w": torch.zeros(2)}, tmp_path / "other.safetensors")
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 1, 8, 8), np.uint8))
    words = ["evaluation.weights_path=other.safetensors", "evaluation.metrics=[fid]", "--launcher", "local"]
    done = dsno("eval", "--samples", "x.npz", *words, "--actors", "1", cwd=tmp_path)
    check_refused(done, "other.safetensors: does not hold the weights of digits-features", "torch says")


def test_weights_that_are_whole_and_damaged(tmp_path: Path) -> None:
    shutil.copytree(DIGITS_TEACHER, tmp_path / "teacher")
    file = tmp_path / "teacher/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    from dsno_cluster import load_teacher

    with pytest.raises(WorkError, match=r"model\.safetensors has sha256 .*, its meta\.json says"):
        load_teacher(str(tmp_path / "teacher"))
    file.unlink()
    check_refused(answer("plan", "teacher.path=teacher", cwd=tmp_path), "model.safetensors", "is missing")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan", "teacher.path=models/mine/model.safetensors"], "name models/mine"),
        (["plan", "teacher.path=models/mine/meta.json"], "name models/mine"),
        (["plan", "teacher.path=models/mnie"], "did you mean models/mine?"),
        (["plan", "teacher.path=model/mine"], "did you mean models/mine?"),
        (["plan", "teacher.path=elsewhere"], "no such folder below /"),
        (["sample", "models/mine/model.safetensors"], "name the folder that it is in, models/mine"),
        (["sample", "models/mnie"], "did you mean models/mine?"),
        (["sample", "elsewhere"], "no such folder below /"),
        (["eval", "--student", "models/mnie"], "did you mean models/mine?"),
        (["import-weights", "modles/mine", "--config", "c.yaml", "--out", "x"], "did you mean models/mine?"),
        (["import-weights", "models/mine", "--config", "c.yaml", "--out", "x"], "is a folder; name a file in it"),
        (["plan", "evaluation.reference=modles"], "did you mean models?"),
        (["plan", "evaluation.weights_path=models/mine/model.safetensor"], "did you mean models/mine/model.safetensors?"),
    ],
)  # fmt: skip
def test_a_misspelt_path_is_answered_with_the_nearest(words: list[str], says: str, tmp_path: Path) -> None:
    shutil.copytree(DIGITS_TEACHER, tmp_path / "models/mine")
    done = answer(*words, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


def test_a_header_whose_length_begins_as_a_pickle() -> None:
    """640 bytes are 80 02 in the file's first bytes, with which pickles of protocol 2 begin."""
    for padding in range(700):
        data = safetensors.torch.save({"a": torch.ones(1)}, {"b": "c" * padding})
        if data[:2] == b"\x80\x02":
            break
    assert data[:2] == b"\x80\x02"
    assert torch.equal(parse_safetensors(data, "here")["a"], torch.ones(1))
