"""`fetch-teacher` against a stand-in for the hub: what is downloaded, continued, pinned and refused."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from edm_files import snapshot_bytes
from hub_server import Hub, serving
from teacher_models import saved
from teacher_models import small_diffusers_unet as small_diffusers_unet  # fixture
from tiny import TINY, answer

from dsno_cluster import load_teacher
from dsno_cluster.errors import UserError
from dsno_cluster.teachers.hub import wanted_files
from dsno_cluster.teachers.official_files import PLACES, official_place
from dsno_cluster.yaml_text import parse_yaml

NAME, COMMIT, LATER = "somebody/ddpm-small", "a" * 40, "b" * 40
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FOLDER = ("--out", "teacher")
EDM = "/edm/pretrained/edm-small.pkl"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as running:
        yield running


@pytest.fixture
def files(unet: Any, tmp_path: Path) -> dict[str, bytes]:
    """A repository as people have them, with much that no teacher needs."""
    folder = Path(saved(unet, tmp_path / "made")[0])
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    others = (
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "samples/1.png",
        "train.py",
    )
    texts = {"LICENSE": b"Apache License", "README.md": b"---\nlicense: apache-2.0\n---\n"}
    return found | texts | dict.fromkeys(others, b"not wanted")


def fetch(hub: Hub, where: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    quiet = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(where / "hf"),
        "HF_TOKEN": "",
    }
    return answer("fetch-teacher", *words, cwd=where, **quiet | env)


def test_a_repository(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(NAME, COMMIT, files)
    found = fetch(hub, tmp_path, NAME)
    assert found.returncode == 0, found.stderr
    folder = tmp_path / "teachers" / "somebody--ddpm-small"
    wanted = {"LICENSE", "README.md", "scheduler/scheduler_config.json", "unet/config.json", WEIGHTS}
    on_disk = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert on_disk == wanted | {"fetched.json"}
    record = json.loads((folder / "fetched.json").read_text())
    assert (record["name"], record["revision"], record["complete"]) == (NAME, COMMIT, True)
    for name in wanted:
        digest = hashlib.sha256(files[name]).hexdigest()
        assert record["files"][name] == {"size": len(files[name]), "sha256": digest}
        assert (folder / name).read_bytes() == files[name]
    assert f"# revision {COMMIT}\n" in found.stdout
    section = parse_yaml(found.stdout, "printed")["teacher"]
    assert section == {
        "path": "teachers/somebody--ddpm-small",
        "sha256": hashlib.sha256(files[WEIGHTS]).hexdigest(),
    }
    assert load_teacher(str(folder)).shape == (3, 8, 8)
    before = len(hub.asked)
    again = fetch(hub, tmp_path, NAME)
    assert again.returncode == 0 and again.stdout == found.stdout
    assert len(hub.asked) == before  # no network is needed for what is there


def test_the_config_pins_the_weights(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(NAME, COMMIT, files)
    section = parse_yaml(fetch(hub, tmp_path, NAME).stdout, "printed")["teacher"]
    network = ["network={state_size: 8, state_channels: 3, num_classes: 5}", "student.backbone=diffusers"]
    evaluation = ["evaluation.metrics=[trajectory_error]", f"storage.root={tmp_path}"]
    words = [
        "plan",
        str(Path("configs/digits.yaml").absolute()),
        *TINY,
        *network,
        *evaluation,
        f"teacher.path={section['path']}",
    ]
    for digits in (section["sha256"], section["sha256"][:8]):
        planned = answer(*words, f"teacher.sha256={json.dumps(digits)}", cwd=tmp_path)
        assert planned.returncode == 0, planned.stderr
    other = answer(*words, f"teacher.sha256={'0' * 64}", cwd=tmp_path)
    assert other.returncode == 2 and other.stderr.count("\n") == 1
    assert f"teacher.sha256: the config pins {'0' * 64}" in other.stderr and section["sha256"] in other.stderr
    none = ["teacher.path=closed-form:gaussian", "teacher.options={mean: 0, std: 1, shape: [1, 8, 8]}"]
    plain = ["network.num_classes=0", "network.null_class=false", "student.warm_start=false"]
    refused = answer(
        "plan", *TINY, *none, *plain, "evaluation.metrics=[trajectory_error]", "teacher.sha256=00000000"
    )
    assert refused.returncode == 2 and "has no weights in files" in refused.stderr
    for wrong in ("abc", "'xyz45678'"):
        assert answer("plan", *TINY, f"teacher.sha256={wrong}").returncode == 2


def test_an_interrupted_download_is_continued(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(NAME, COMMIT, files)
    folder = tmp_path / "teacher"
    first = fetch(hub, tmp_path, NAME, *FOLDER, "--revision", "nowhere")
    assert first.returncode == 2 and "has no revision 'nowhere'" in first.stderr
    # as it stands after a kill: the record of an unfinished download, and some of the files
    (folder / "unet").mkdir(parents=True)
    record = {
        "schema_version": 1,
        "name": NAME,
        "url": NAME,
        "revision": COMMIT,
        "complete": False,
        "files": {},
    }
    (folder / "fetched.json").write_text(json.dumps(record))
    done = fetch(hub, tmp_path, NAME, *FOLDER)
    assert done.returncode == 0, done.stderr
    assert (folder / WEIGHTS).read_bytes() == files[WEIGHTS]
    record["revision"] = LATER
    (folder / "fetched.json").write_text(json.dumps(record))
    other = fetch(hub, tmp_path, NAME, *FOLDER)
    assert other.returncode == 2 and f"a part of revision {LATER}" in other.stderr


def test_another_revision_is_never_written_over(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(NAME, COMMIT, files)
    assert fetch(hub, tmp_path, NAME, *FOLDER).returncode == 0
    changed = files | {"README.md": b"changed"}
    hub.add(NAME, LATER, changed)
    hub.add(NAME, COMMIT, files, branch="v1")
    other = fetch(hub, tmp_path, NAME, *FOLDER, "--revision", "main")
    assert other.returncode == 2 and f"teacher: holds revision {COMMIT}" in other.stderr
    assert (tmp_path / "teacher" / "README.md").read_bytes() == files["README.md"]
    for same in ("v1", COMMIT, COMMIT[:8]):
        assert fetch(hub, tmp_path, NAME, *FOLDER, "--revision", same).returncode == 0
    assert fetch(hub, tmp_path, NAME, "--out", "later").returncode == 0
    assert (tmp_path / "later" / "README.md").read_bytes() == b"changed"
    (tmp_path / "teacher" / WEIGHTS).write_bytes(b"damaged")
    damaged = fetch(hub, tmp_path, NAME, *FOLDER)
    assert damaged.returncode == 2 and f"{WEIGHTS} is not as it was fetched" in damaged.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for folder, said in (("mine", "holds other files (notes.txt)"), ("later", "holds somebody/ddpm-small")):
        hub.add("somebody/other", COMMIT, files)
        refused = fetch(hub, tmp_path, "somebody/other", "--out", folder)
        assert refused.returncode == 2 and said in refused.stderr


def test_a_gated_repository_and_its_token(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add(NAME, COMMIT, files)
    hub.gated.add(NAME)
    for token in ("", "hf_wrong"):
        refused = fetch(hub, tmp_path, NAME, HF_TOKEN=token)
        assert refused.returncode == 2 and "is gated" in refused.stderr and "HF_TOKEN" in refused.stderr
        assert "hf_wrong" not in refused.stderr + refused.stdout
    taken = fetch(hub, tmp_path, NAME, HF_TOKEN="hf_right")
    assert taken.returncode == 0, taken.stderr
    assert "hf_right" not in taken.stderr + taken.stdout
    assert b"hf_right" not in b"".join(
        p.read_bytes() for p in (tmp_path / "teachers").rglob("*") if p.is_file()
    )


def test_what_cannot_be_fetched_is_one_line(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("somebody/text", COMMIT, files | {"text_encoder/config.json": b"{}"})
    hub.add("somebody/latents", COMMIT, files | {"vqvae/config.json": b"{}"})
    hub.add("somebody/bare", COMMIT, {"README.md": b"nothing"})
    hub.add("somebody/weightless", COMMIT, {k: v for k, v in files.items() if "pytorch_model" not in k})
    cases = {
        ("somebody/nothing",): (2, "no such model"),
        ("somebody/text",): (2, "is conditioned on text"),
        ("somebody/latents",): (2, "is a latent diffusion model"),
        ("somebody/bare",): (2, "is no diffusers folder of a teacher"),
        ("somebody/weightless",): (2, "has no unet/diffusion_pytorch_model.safetensors"),
        ("edm-cifar",): (2, "no published file known here"),
        ("64x64_difusion.pt",): (2, "did you mean 64x64_diffusion.pt?"),
        ("ftp://host/x.pkl",): (2, "is no URL like https://host/file.pkl"),
        ("http://me:secret@host/x.pkl",): (2, "is no URL like"),
        (f"{hub.url}/",): (2, "names no file"),
        (f"{hub.url}/missing.pkl",): (2, "there is no such file (HTTP 404)"),
        ("http://127.0.0.1:9/x.pkl",): (1, "cannot be reached"),
        (f"{hub.url}{EDM}", "--revision", "main"): (2, "only a repository on the hub has revisions"),
        (): (2, "name one NAME"),
    }
    for words, (status, said) in cases.items():
        refused = fetch(hub, tmp_path, *words)
        assert (refused.returncode, refused.stdout) == (status, ""), (words, refused.stderr)
        assert refused.stderr.count("\n") == 1 and said in refused.stderr, (words, refused.stderr)
        assert "secret" not in refused.stderr
    assert not any((tmp_path / "teachers").iterdir())
    unreachable = fetch(hub, tmp_path, NAME, HF_ENDPOINT="http://127.0.0.1:9")
    assert (
        unreachable.returncode == 1 and "run fetch-teacher on a machine with a network" in unreachable.stderr
    )
    assert unreachable.stderr.count("\n") == 1


def test_a_single_file(hub: Hub, tmp_path: Path) -> None:
    data = snapshot_bytes("skip_vp")
    hub.plain[EDM] = data
    hub.cut = 1000
    broken = fetch(hub, tmp_path, hub.url + EDM)
    assert broken.returncode == 1 and "the same command continues" in broken.stderr, broken.stderr
    file = tmp_path / "teachers" / "edm-small" / "edm-small.pkl"
    assert file.with_name("edm-small.pkl.part").stat().st_size == 1000 and not file.exists()
    done = fetch(hub, tmp_path, hub.url + EDM)
    assert done.returncode == 0, done.stderr
    assert hub.asked[-1] == ("GET", EDM, "bytes=1000-") and file.read_bytes() == data
    section = parse_yaml(done.stdout, "printed")["teacher"]
    assert section == {"path": "teachers/edm-small/edm-small.pkl", "sha256": hashlib.sha256(data).hexdigest()}
    before = len(hub.asked)
    assert fetch(hub, tmp_path, hub.url + EDM).stdout == done.stdout and len(hub.asked) == before


def test_a_file_that_changed_meanwhile_is_begun_anew(hub: Hub, tmp_path: Path) -> None:
    hub.plain[EDM] = b"another version, which is longer than 10 bytes"
    hub.cut = 10
    assert fetch(hub, tmp_path, hub.url + EDM).returncode == 1
    hub.plain[EDM] = snapshot_bytes("skip_vp")
    assert fetch(hub, tmp_path, hub.url + EDM).returncode == 0
    assert (tmp_path / "teachers" / "edm-small" / "edm-small.pkl").read_bytes() == hub.plain[EDM]


def test_published_names() -> None:
    assert official_place("edm-cifar10-32x32-uncond-vp.pkl").url.endswith(
        "/edm/pretrained/edm-cifar10-32x32-uncond-vp.pkl"
    )
    assert "/baseline/" in official_place("baseline-cifar10-32x32-uncond-vp.pkl").url
    assert official_place("DiT-XL-2-256x256.pt").options == {"family": "dit"}
    assert all(place.url.startswith("https://") for place in PLACES)
    with pytest.raises(UserError):
        official_place("model.pt")


STEM = "diffusion_pytorch_model"


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ([f"{STEM}.bin", f"{STEM}.safetensors"], [f"{STEM}.safetensors"]),
        ([f"{STEM}.bin", f"{STEM}.fp16.safetensors"], [f"{STEM}.bin"]),
        ([f"{STEM}.fp16.bin", f"{STEM}.fp16.safetensors"], [f"{STEM}.fp16.safetensors"]),
        (
            [
                f"{STEM}.safetensors.index.json",
                f"{STEM}-00001-of-00002.safetensors",
                f"{STEM}-00002-of-00002.safetensors",
            ],
            [
                f"{STEM}.safetensors.index.json",
                f"{STEM}-00001-of-00002.safetensors",
                f"{STEM}-00002-of-00002.safetensors",
            ],
        ),
        (
            [
                *(f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-00001-of-00001.safetensors"),
                f"{STEM}-00001-of-00001.safetensors",
            ],
            [f"{STEM}.safetensors.index.fp16.json", f"{STEM}.fp16-00001-of-00001.safetensors"],
        ),
    ],
)
def test_one_form_of_the_weights(there: list[str], wanted: list[str]) -> None:
    """That which the family reads."""
    for prefix in ("", "unet/", "transformer/"):
        names = [f"{prefix}{name}" for name in ["config.json", *there]]
        assert wanted_files(names, "a/b") == [f"{prefix}{name}" for name in ["config.json", *wanted]]
