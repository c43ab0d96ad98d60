"""Real images to train on: where they and their classes come from, what is held out, and what a model of latents is given."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from s3_server import KEYS
from test_storage import s3_endpoint  # noqa: F401
from tiny import DATA, answer
from torch import Tensor
from torchvision.datasets import ImageFolder

from dsno_cluster.config import Config, load_config
from dsno_cluster.data import load_data
from dsno_cluster.errors import UserError
from dsno_cluster.image_sets.opening import open_images
from dsno_cluster.image_sets.tar_images import expand_braces
from dsno_cluster.images import to_uint8
from dsno_cluster.storage import open_storage
from dsno_cluster.teachers import States, states_of
from dsno_cluster.training import encoded_images
from dsno_cluster.training import real_images as module
from dsno_cluster.training import train_teacher as teacher_module
from dsno_cluster.training.real_images import RealImages, real_images
from dsno_cluster.training.train_teacher import TeacherRun, train_teacher, velocity_loss

COUNT, CLASSES = 20, 10
PIPELINE = DATA / "dit_pipeline"
NO_CLASSES = ["network.num_classes=0", "network.null_class=false"]
EIGHT = ["network.state_channels=3", "network.state_size=8", "teacher.path=null"]


def config_of(images: Path | str, *words: str) -> Config:
    given = ["data.name=null", f"data.images={images}", "evaluation.reference=none.npz", *EIGHT, *words]
    return load_config("configs/digits.yaml", given)


def found_in(images: Path | str, *words: str) -> RealImages:
    found = real_images(config_of(images, *words))
    assert found is not None
    return found


def pixels(count: int = COUNT, size: int = 8, colours: int = 3) -> np.ndarray:
    """Noise uint8 (N, H, W, C)."""
    return np.random.RandomState(1).randint(0, 256, (count, size, size, colours), np.uint8)


def labels(count: int = COUNT) -> np.ndarray:
    return (np.arange(count) * 7) % CLASSES


def save_png(path: Path, image_HWC: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_HWC).save(path)


def tar_of(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def encoded(image_HWC: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image_HWC).save(data, "PNG")
    return data.getvalue()


def npy(array: np.ndarray, **options: Any) -> bytes:
    data = io.BytesIO()
    np.save(data, array, **options)
    return data.getvalue()


def as_subfolders(folder: Path) -> Path:
    for i, (image, label) in enumerate(zip(pixels(), labels(), strict=True)):
        save_png(folder / f"class-{label}" / f"{i:02d}.png", image)
    return folder


def as_edm(folder: Path) -> Path:
    """As EDM's dataset tool writes: folders of a thousand images, and the classes in one file."""
    names = [f"{i // 12:05d}/img{i:08d}.png" for i in range(COUNT)]
    for name, image in zip(names, pixels(), strict=True):
        save_png(folder / name, image)
    pairs = [[name, int(label)] for name, label in zip(names, labels(), strict=True)]
    (folder / "dataset.json").write_text(json.dumps({"labels": pairs}))
    return folder


def as_table(folder: Path) -> Path:
    rows = ["file,label"]
    for i, (image, label) in enumerate(zip(pixels(), labels(), strict=True)):
        save_png(folder / f"{i:02d}.png", image)
        rows.append(f"{i:02d}.png,{label}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def as_npz(folder: Path) -> Path:
    np.savez(folder / "x.npz", images=pixels().transpose(0, 3, 1, 2), labels=labels())
    return folder / "x.npz"


def as_adm_batch(folder: Path) -> Path:
    np.savez_compressed(folder / "x.npz", pixels(), labels())
    return folder / "x.npz"


def as_tars(folder: Path) -> Path:
    for part in range(2):
        members = {}
        for i in range(part * 10, part * 10 + 10):
            members[f"{i:06d}.png"] = encoded(pixels()[i])
            members[f"{i:06d}.cls"] = str(labels()[i]).encode()
        tar_of(folder / f"train-{part:04d}.tar", members)
    return folder


def as_tars_by_name(folder: Path) -> Path:
    return as_tars(folder) / "train-{0000..0001}.tar"


def as_tars_of_json(folder: Path) -> Path:
    members = {}
    for i in range(COUNT):
        members[f"a/{i:02d}.json"] = json.dumps({"label": int(labels()[i]), "text": "x"}).encode()
        members[f"a/{i:02d}.png"] = encoded(pixels()[i])
    tar_of(folder / "x.tar", members)
    return folder / "*.tar"


IN_ORDER: list[Callable[[Path], Path]] = [
    *(as_edm, as_table, as_npz, as_adm_batch, as_tars, as_tars_by_name, as_tars_of_json),
]


@pytest.mark.parametrize("form", IN_ORDER)
def test_images_and_classes_of_every_form(form: Callable[[Path], Path], tmp_path: Path) -> None:
    found = found_in(form(tmp_path))
    order = np.random.RandomState(0).permutation(COUNT)
    training = sorted(order[: COUNT - 2])
    assert (found.count, found.heldout) == (COUNT - 2, 2)
    expected = torch.from_numpy(pixels()[training].transpose(0, 3, 1, 2)).float() / 127.5 - 1
    assert torch.equal(found.states(range(found.count)), expected)
    some = torch.tensor([5, 0, 5, 17])
    assert torch.equal(found.states(some), expected[some]) and found.states(some).dtype == torch.float32
    classes = found.labels(some)
    assert classes is not None and classes.tolist() == labels()[training][some].tolist()
    (held_out,) = found.heldout_batches(10)
    assert np.array_equal(held_out, pixels()[sorted(order[COUNT - 2 :])].transpose(0, 3, 1, 2))


def test_subfolders_are_numbered_as_torchvision_does(tmp_path: Path) -> None:
    folder = as_subfolders(tmp_path / "x")
    theirs = ImageFolder(str(folder))
    found = open_images(str(folder), num_classes=CLASSES)
    assert found.labels(0, COUNT).tolist() == theirs.targets  # type: ignore[union-attr]
    for i in range(COUNT):
        assert np.array_equal(found.read(i, i + 1)[0].permute(1, 2, 0), np.asarray(theirs[i][0]))
    assert (
        open_images(str(folder)).labels(0, COUNT) is None
    )  # as images to measure: folders say nothing there
    with pytest.raises(
        UserError, match=r"in 10 subfolders, and the network has 12 classes.*dataset\.json or labels\.csv"
    ):
        found_in(folder, "network.num_classes=12")


def test_a_folder_with_a_link_to_a_class(tmp_path: Path) -> None:
    """The class is that of the link's name, wherever it leads."""
    as_subfolders(tmp_path / "elsewhere")
    folder = tmp_path / "x"
    folder.mkdir()
    for number in range(CLASSES):
        (folder / f"{CLASSES - number:02d}").symlink_to(tmp_path / "elsewhere" / f"class-{number}")
    theirs = ImageFolder(str(folder))
    expected = {Path(path).name: label for path, label in theirs.samples}
    found = open_images(str(folder), num_classes=CLASSES)
    names = sorted(expected)  # noise: each image is found by its pixels
    for i in range(COUNT):
        image = found.read(i, i + 1)[0].permute(1, 2, 0).numpy()
        name = next(n for n in names if np.array_equal(image, pixels()[int(Path(n).stem)]))
        assert found.labels(i, i + 1).tolist() == [expected[name]]  # type: ignore[union-attr]


def test_on_s3(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for name, value in {**KEYS, "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    root = f"s3://bucket/{tmp_path.name}"
    storage = open_storage(root, s3_endpoint)
    forms: dict[str, Callable[[Path], Path]] = {"edm": as_edm, "tars": as_tars, "npz": as_npz}
    for name, form in forms.items():
        (here := tmp_path / name).mkdir()
        form(here)
        for file in here.rglob("*.*"):
            storage.write(f"{name}/{file.relative_to(here)}", file.read_bytes())
    expected = found_in(tmp_path / "edm").states(range(18))
    for address in ("edm", "tars", "tars/train-*.tar", "npz/x.npz"):
        found = found_in(f"{root}/{address}", f"storage.endpoint_url={s3_endpoint}")
        assert torch.equal(found.states(range(18)), expected), address
        assert found.labels(range(18)) is not None
    with pytest.raises(UserError, match=r"train-0002\.tar: no such tar"):
        found_in(f"{root}/tars/train-{{0001..0002}}.tar", f"storage.endpoint_url={s3_endpoint}")


def test_braces() -> None:
    """As bash expands them."""
    assert expand_braces("x-{098..101}.tar") == ["x-098.tar", "x-099.tar", "x-100.tar", "x-101.tar"]
    assert expand_braces("{a,b}-{1..2}.tar") == ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]
    assert expand_braces("x.tar") == ["x.tar"]


def test_read_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit of memory, the same images are read one by one."""
    expected = found_in(as_tars(tmp_path)).states(range(18))
    monkeypatch.setattr(module, "IN_MEMORY", 0)
    monkeypatch.setattr(module, "_all", None)
    assert torch.equal(found_in(tmp_path).states([3, 17, 3]), expected[[3, 17, 3]])


def test_the_digits_are_those_of_their_split() -> None:
    train, held_out = load_data("digits")
    found = real_images(load_config("configs/digits.yaml"))
    assert found is not None and (found.count, found.heldout) == (1500, 297)
    some = torch.tensor([1499, 0, 7])
    assert torch.equal(found.states(some), train.images[some])
    assert torch.equal(found.labels(some), train.labels[some])  # type: ignore[arg-type]
    batches = list(found.heldout_batches(100))
    assert [len(batch) for batch in batches] == [100, 100, 97]
    assert torch.equal(torch.cat(batches), to_uint8(held_out.images))
    assert real_images(config_of("x", "data.images=null")) is None


def test_what_is_held_out_is_disjoint_and_stays(tmp_path: Path) -> None:
    """The permutation is numpy's legacy one, whose numbers do not change between versions."""
    images = np.arange(200, dtype=np.uint8).reshape(200, 1, 1, 1) * np.ones((1, 3, 8, 8), np.uint8)
    np.savez(tmp_path / "x.npz", images=images)
    found = found_in(tmp_path / "x.npz", *NO_CLASSES)
    held_out = torch.cat(list(found.heldout_batches(7)))[:, 0, 0, 0].tolist()
    training = ((found.states(range(found.count))[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert len(held_out) == 20 and sorted(held_out + training) == list(range(200))
    assert held_out[:8] == [9, 21, 36, 39, 47, 58, 67, 70]
    assert found.labels([0]) is None
    words = ["evaluation.reference=data", *NO_CLASSES]
    config = config_of(tmp_path / "x.npz", *words)
    for name, expected in (("data", training), ("held-out", held_out)):
        named = open_images(name, None, config.data)
        assert named.read(0, named.count)[:, 0, 0, 0].tolist() == expected


def test_identity(tmp_path: Path) -> None:
    """That of the images and of their classes: another of either is another; where the tars lie is none."""
    first = found_in(as_tars(tmp_path / "a")).identity
    assert found_in(as_tars(tmp_path / "b")).identity == first
    assert found_in(as_edm(tmp_path / "c")).identity != first
    members = {f"{i:02d}.png": encoded(pixels()[i]) for i in range(COUNT)}
    tar_of(tmp_path / "d.tar", {**members, **{f"{i:02d}.cls": b"3" for i in range(COUNT)}})
    before = found_in(tmp_path / "d.tar").identity
    tar_of(tmp_path / "d.tar", {**members, **{f"{i:02d}.cls": b"4" for i in range(COUNT)}})
    assert found_in(tmp_path / "d.tar").identity != before


def test_grey_pictures_for_one_channel(tmp_path: Path) -> None:
    grey = pixels(colours=1)[..., 0]
    for i, image in enumerate(grey):
        save_png(tmp_path / f"{i:02d}.png", image)
    words = ["network.state_channels=1", *NO_CLASSES]
    found = found_in(tmp_path, *words)
    kept = sorted(np.random.RandomState(0).permutation(COUNT)[:18])
    assert np.array_equal(((found.states(range(18))[:, 0] + 1) * 127.5).round(), grey[kept])
    save_png(tmp_path / "00.png", pixels()[0])
    with pytest.raises(UserError, match="has images in colour, and the config's have one channel"):
        (found := found_in(tmp_path, *words)).states(range(18))
        list(found.heldout_batches(2))


LATENT = ["network.state_channels=4", "network.state_size=8", *NO_CLASSES]
OF_LATENTS = [
    *LATENT,
    "network.multipliers=[1]",
    "network.attention_resolutions=[]",
    "student.warm_start=false",
]


def latents(shape: tuple[int, ...] = (COUNT, 4, 8, 8)) -> np.ndarray:
    return np.random.RandomState(2).randn(*shape).astype(np.float16)


def as_npy_members(folder: Path) -> Path:
    tar_of(folder / "x.tar", {f"{i:02d}.npy": npy(latent) for i, latent in enumerate(latents())})
    return folder / "x.tar"


def as_array_of_latents(folder: Path) -> Path:
    np.savez(folder / "x.npz", arr_0=latents())
    return folder / "x.npz"


@pytest.mark.parametrize("form", [as_npy_members, as_array_of_latents])
def test_latents_are_taken_as_they_are(form: Callable[[Path], Path], tmp_path: Path) -> None:
    config = config_of(form(tmp_path), *OF_LATENTS, f"teacher.path={PIPELINE}")
    states = states_of(config)
    found = real_images(config, states)
    assert found is not None
    order = np.random.RandomState(0).permutation(COUNT)
    assert np.array_equal(found.states(range(18)), latents()[sorted(order[:18])].astype(np.float32))
    (held_out,) = found.heldout_batches(5)
    vae = diffusers.AutoencoderKL.from_pretrained(PIPELINE / "vae").eval()
    with torch.no_grad():
        given = torch.from_numpy(latents()[sorted(order[18:])]).float() / 0.18215
        expected = to_uint8(vae.decode(given).sample)
    assert (held_out.int() - expected.int()).abs().max() <= 1
    undecoded = real_images(config, States((4, 8, 8)))
    assert undecoded is not None and len(undecoded.states([0])) == 1
    with pytest.raises(UserError, match=r"data\.images: images are needed, and the states are latents"):
        next(undecoded.heldout_batches(1))


@pytest.fixture
def in_colour(tmp_path: Path) -> Path:
    np.savez(tmp_path / "x.npz", images=pixels(size=32).transpose(0, 3, 1, 2))
    return tmp_path / "x.npz"


def posterior_means(images: Path) -> Tensor:
    """By diffusers itself, as StableDiffusionImg2ImgPipeline scales them."""
    training = sorted(np.random.RandomState(0).permutation(COUNT)[:18])
    given = torch.from_numpy(np.load(images)["images"][training]).float() / 127.5 - 1
    vae = diffusers.AutoencoderKL.from_pretrained(PIPELINE / "vae").eval()
    with torch.no_grad():
        return vae.encode(given).latent_dist.mean * 0.18215  # type: ignore[no-any-return]


def test_images_are_encoded_for_a_teacher_of_latents(in_colour: Path, tmp_path: Path) -> None:
    words = [*OF_LATENTS, f"teacher.path={PIPELINE}", f"storage.root={tmp_path / 'runs'}"]
    config = config_of(in_colour, *words)
    found = real_images(config, states_of(config))
    assert found is not None
    assert torch.allclose(found.states(range(18)), posterior_means(in_colour), atol=1e-5)
    (held_out,) = found.heldout_batches(5)
    assert held_out.shape == (2, 3, 32, 32) and held_out.dtype == torch.uint8
    assert not (tmp_path / "runs").exists()  # few are kept in memory
    with pytest.raises(
        UserError, match=r"data.images: .*x.npz: images are needed.*teacher.decoder.*or name latents"
    ):
        real_images(config, States((4, 8, 8)))


def test_latents_of_large_sets_are_kept_in_files(
    in_colour: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run continues after the last whole file, and nothing is encoded twice."""
    monkeypatch.setattr(encoded_images, "IN_MEMORY", 0)
    monkeypatch.setattr(encoded_images, "PART", 7 * 4 * 4 * 8 * 8)
    config = config_of(
        in_colour, *OF_LATENTS, f"teacher.path={PIPELINE}", f"storage.root={tmp_path / 'runs'}"
    )
    found = real_images(config, states_of(config))
    assert found is not None
    expected = posterior_means(in_colour)
    assert torch.allclose(found.states([17, 0, 8, 0]), expected[[17, 0, 8, 0]], atol=1e-5)
    files = sorted((tmp_path / "runs").rglob("part-*.safetensors"))
    assert [len(safetensors.torch.load_file(file)["states"]) for file in files] == [7, 7, 4]
    files[1].unlink()
    kept = {file: file.stat().st_mtime_ns for file in (files[0], files[2])}
    again = real_images(config, states_of(config))
    assert again is not None and torch.allclose(again.states(range(18)), expected, atol=1e-5)
    assert {file: file.stat().st_mtime_ns for file in kept} == kept and again.identity == found.identity


def bad_size(folder: Path) -> Path:
    save_png(folder / "0.png", pixels(size=16)[0])
    save_png(folder / "1.png", pixels(size=16)[1])
    return folder


def without_classes(folder: Path) -> Path:
    for i in range(COUNT):
        save_png(folder / f"{i}.png", pixels()[i])
    return folder


def tars_without_classes(folder: Path) -> Path:
    tar_of(folder / "x.tar", {f"{i}.png": encoded(pixels()[i]) for i in range(COUNT)})
    return folder


def npz_without_classes(folder: Path) -> Path:
    np.savez(folder / "x.npz", images=pixels().transpose(0, 3, 1, 2))
    return folder / "x.npz"


def null_classes(folder: Path) -> Path:
    """As EDM's dataset tool writes for images without classes: the subfolders are none."""
    as_edm(folder)
    (folder / "dataset.json").write_text('{"labels": null}')
    return folder


def one_class_missing(folder: Path) -> Path:
    tar_of(folder / "x.tar", {"0.png": encoded(pixels()[0]), "0.cls": b"1", "1.png": encoded(pixels()[1])})
    return folder / "x.tar"


def two_classes(folder: Path) -> Path:
    tar_of(folder / "x.tar", {"0.png": encoded(pixels()[0]), "0.cls": b"1", "0.json": b'{"label": 2}'})
    return folder / "x.tar"


def too_large_a_class(folder: Path) -> Path:
    np.savez(folder / "x.npz", images=pixels().transpose(0, 3, 1, 2), labels=labels() + 1)
    return folder / "x.npz"


def a_row_missing(folder: Path) -> Path:
    as_table(folder)
    (folder / "labels.csv").write_text("00.png,1\n01.png,2\n")
    return folder


def two_images(folder: Path) -> Path:
    tar_of(folder / "x.tar", {"0.png": encoded(pixels()[0]), "0.npy": npy(np.zeros((3, 8, 8), np.float32))})
    return folder / "x.tar"


def out_of_range(folder: Path) -> Path:
    np.savez(folder / "x.npz", images=pixels().transpose(0, 3, 1, 2).astype(np.float32), labels=labels())
    return folder / "x.npz"


def other_states(folder: Path) -> Path:
    tar_of(folder / "x.tar", {"0.npy": npy(np.zeros((4, 8, 8), np.float32)), "0.cls": b"1"})
    return folder / "x.tar"


REFUSED: dict[Callable[[Path], Path], str] = {
    bad_size: "images are 3x16x16, the config's are 3x8x8; resize them first",
    without_classes: "nothing says the classes.*network has 10.*dataset.json and labels.csv.*subfolders",
    tars_without_classes: "nothing says the classes.*KEY.cls, a number, and KEY.json",
    npz_without_classes: "nothing says the classes.*the arrays labels and arr_1",
    null_classes: "nothing says the classes",
    one_class_missing: r"x\.tar: 1\.png: has no class, and others have",
    two_classes: r"x\.tar: 0: cls and json say different classes: 1 and 2",
    too_large_a_class: "has classes from 1 to 10, the network 0 to 9",
    a_row_missing: r"labels\.csv: says no class of 02\.png, nor of 17 other pictures",
    two_images: "0: has png and npy; keep one image of each sample",
    other_states: r"0\.npy: is float32 of \(4, 8, 8\), not floating-point numbers of 3x8x8",
    out_of_range: r"must be in \[-1, 1\]",
}


@pytest.mark.parametrize("form", REFUSED)
def test_images_that_are_refused(form: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^data.images: .*{REFUSED[form]}") as told:
        found_in(form(tmp_path)).states([0])
    assert "\n" not in str(told.value)


class _RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trap",)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trap = np.array([_RunsCode()], dtype=object)
    np.savez(tmp_path / "images.npz", images=trap)
    np.savez(tmp_path / "labels.npz", images=pixels().transpose(0, 3, 1, 2), labels=trap)
    tar_of(tmp_path / "npy.tar", {"0.npy": npy(trap, allow_pickle=True), "0.cls": b"0"})
    tar_of(tmp_path / "pickle.tar", {"0.npy": pickle.dumps(_RunsCode()), "0.cls": b"0"})
    for name in ("images.npz", "labels.npz", "npy.tar", "pickle.tar"):
        with pytest.raises(UserError, match=r"^data\.images: "):
            found_in(tmp_path / name)
    with pytest.raises(UserError, match="images is an array of objects, which is not read"):
        open_images(str(tmp_path / "images.npz"))
    assert not (tmp_path / "trap").exists()


def test_one_of_name_and_images() -> None:
    with pytest.raises(UserError, match="data: images takes the place of name=digits"):
        load_config("configs/digits.yaml", ["data.images=x"])
    with pytest.raises(UserError, match="reference data needs"):
        load_config("configs/digits.yaml", ["data.name=null"])


def test_a_teacher_of_images_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is trained on them; a run that was interrupted does not continue with others."""
    settings = ["steps=2", "batch_size=8", "checkpoint_every=1"]
    small = ["network.width=32", *(f"teacher_training.{setting}" for setting in settings)]
    first, other = as_npz(tmp_path), tmp_path / "other.npz"
    np.savez(other, images=255 - pixels().transpose(0, 3, 1, 2), labels=labels())
    weights = []
    for images in (first, other):
        root = tmp_path / images.stem
        train_teacher(config_of(images, *small, f"storage.root={root}"), "test")
        weights.append(safetensors.torch.load_file(root / "teachers/digits/model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())

    def interrupted(unet: Any, data: Any, config: Config, step: int) -> Tensor:
        if step == 1:
            raise KeyboardInterrupt
        return velocity_loss(unet, data, config, step)

    monkeypatch.setattr(teacher_module, "velocity_loss", interrupted)
    root = f"storage.root={tmp_path / 'again'}"
    with pytest.raises(KeyboardInterrupt):
        train_teacher(config_of(first, *small, root), "test")
    monkeypatch.undo()
    with pytest.raises(UserError, match="an unfinished run with another images"):
        train_teacher(config_of(other, *small, root), "test")
    train_teacher(config_of(first, *small, root), "test")
    again = safetensors.torch.load_file(tmp_path / "again/teachers/digits/model.safetensors")
    assert all(torch.equal(tensor, weights[0][name]) for name, tensor in again.items())
    planned = answer(
        "train-teacher",
        "data.name=null",
        f"data.images={first}",
        "evaluation.reference=none.npz",
        "--dry-run",
    )
    assert planned.returncode == 0 and f"on {first} for 2700 steps" in planned.stdout


def test_a_run_on_named_data_is_known_as_before() -> None:
    """Runs that earlier versions began continue: nothing was added to what identifies them."""
    config = load_config("configs/digits.yaml")
    run = TeacherRun(seed=0, network=config.network, training=config.teacher_training)
    assert set(run.model_dump(mode="json")) == {"seed", "network", "training"}
