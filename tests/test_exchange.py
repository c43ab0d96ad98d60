"""Trajectories for other trainers and from them: what is written, read with nothing of ours, and what comes back."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_sets import a_spec
from s3_server import KEYS
from test_storage import s3_endpoint  # noqa: F401
from tiny import answer
from torch import Tensor

from dsno_cluster.diffusion import scales
from dsno_cluster.diffusion.noise import sample_noise
from dsno_cluster.diffusion.schedule import alpha_sigma
from dsno_cluster.provenance import NOWHERE
from dsno_cluster.storage import FolderStorage, open_storage
from dsno_cluster.trajectories.exchange.export import ExportOptions, export
from dsno_cluster.trajectories.exchange.importing import ImportOptions, import_trajectories
from dsno_cluster.trajectories.reader import ShardReader
from dsno_cluster.trajectories.shards import commit_manifest, make_manifest, open_data_set, write_shard

TIMES, SHAPE, CLASSES = (0.5625, 0.25, 0.0625, 0.0), (1, 4, 4), 3
COUNT, PER_SHARD = 20, 5
FASTGEN = os.environ.get("FASTGEN_CHECKOUT")
LOADER = """
import json, sys, torch
from fastgen.datasets.wds_dataloaders import WDSLoader
found = []
for kind in ("noise", "path"):
    keys = {"real": "latent.pth", kind: f"{kind}.pth", "condition": "txt_emb.pth"}
    loader = WDSLoader(datatags=["WDS:" + sys.argv[1]], batch_size=4, key_map=keys, num_workers=0, train=False)
    batches = list(loader)
    found.append({key: torch.cat([b[key] for b in batches]).double().sum(0).tolist() for key in keys})
counted = WDSLoader(datatags=["WDS:" + sys.argv[1]], batch_size=4, key_map={"real": "latent.pth"}, num_workers=0,
                    deterministic=True, sampler_start_idx=8, shard_count_file=sys.argv[1] + "/shard_count.json")
print(json.dumps({"pairs": found[0], "paths": found[1], "from_8": next(iter(counted))["fname"]}))
"""


def clean_images() -> Tensor:
    """The clean images x0 (N, C, H, W) of the data set."""
    return torch.rand(COUNT, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1


def straight_states(dtype: torch.dtype) -> Tensor:
    """(M, N, C, H, W): alpha x0 + sigma eps at each time, of which the state in every other scale is known."""
    noise, clean = sample_noise(4, range(COUNT), SHAPE), clean_images()
    states = [alpha * clean + sigma * noise for alpha, sigma in map(alpha_sigma, TIMES[:-1])]
    return torch.stack([*states, clean]).to(dtype)


def make_data(root: Path, *, classes: int = CLASSES, dtype: torch.dtype = torch.float32) -> Path:
    """A finished data set of straight trajectories."""
    storage, lines, states = FolderStorage(root), [], straight_states(dtype)
    for index in range(COUNT // PER_SHARD):
        rows = slice(index * PER_SHARD, (index + 1) * PER_SHARD)
        tensors = {"states": states[:, rows]}
        if classes:
            tensors["labels"] = torch.arange(COUNT)[rows] % classes
        lines.append(write_shard(storage, "", index, rows.start, tensors))
    name = str(dtype).removeprefix("torch.")
    spec = a_spec(SHAPE, TIMES, per_shard=PER_SHARD, classes=classes, dtype=name)
    commit_manifest(storage, "", make_manifest(spec, lines, NOWHERE))
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("exchange") / "data")


def tars(folder: Path) -> dict[str, bytes]:
    """The members of all tars in a folder, by name."""
    found = {}
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                assert (member.uid, member.gid, member.mtime) == (0, 0, 0)
                content = tar.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    return found


def loaded(data: bytes) -> Tensor:
    found = torch.load(io.BytesIO(data), weights_only=True)
    assert isinstance(found, Tensor) and found.untyped_storage().nbytes() == found.nbytes
    return found


def everything(address: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Noise, states (N, M, C, H, W) and labels of a data set."""
    storage, manifest = open_data_set(address, None)
    batch = ShardReader(storage, "", manifest).batch(np.arange(manifest.num_samples))
    return batch.noise, batch.states, batch.labels


def digest(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.mark.parametrize("scale", scales.SCALES)
def test_scales_are_those_of_their_papers(scale: scales.ScaleName) -> None:
    """A state alpha x0 + sigma eps becomes x0 + s eps, (1 - u) x0 + u eps or cos(a) x0 + sin(a) eps."""
    for t in (0.9, 0.5625, 0.01):
        alpha, sigma = (float(x) for x in alpha_sigma(t))
        timestep = scales.timestep_of(scale, t)
        factor = scales.factor_of(scale, timestep)
        signal = {"vp": math.cos, "edm": lambda _: 1.0, "flow": lambda u: 1 - u}[scale](timestep)
        noise = {"vp": math.sin, "edm": float, "flow": float}[scale](timestep)
        assert (factor * alpha, factor * sigma) == pytest.approx((signal, noise), rel=1e-6)
        assert scales.cosine_time(scale, timestep) == pytest.approx(t, abs=1e-12)
        assert scales.logsnr_of(scale, timestep) == pytest.approx(2 * math.log(alpha / sigma), rel=1e-6)
    assert scales.timestep_of(scale, 0.0) == 0.0 and scales.factor_of(scale, 0.0) == 1.0
    assert scales.cosine_time(scale, 0.0) == 0.0


@pytest.mark.parametrize("scale", scales.SCALES)
def test_tars_hold_the_noise_the_path_and_the_image(
    data: Path, tmp_path: Path, scale: scales.ScaleName
) -> None:
    said = answer("export", data, "--format", "webdataset", "--scale", scale, "--out", tmp_path / "out")
    assert said.returncode == 0, said.stderr
    index = json.loads((tmp_path / "out/index.json").read_text())
    times = index["path_timesteps"]
    assert index["t_list"] == [*times, 0.0] and index["scale"] == scale
    assert times[0] == {"vp": pytest.approx(math.pi / 2, abs=1e-4), "edm": 80.0, "flow": 0.999}[scale]
    signal = [{"vp": math.cos(t), "edm": 1.0, "flow": 1 - t}[scale] for t in times[1:]]
    share = [math.sin(t) if scale == "vp" else t for t in times[1:]]
    members, clean, noise = tars(tmp_path / "out"), clean_images(), sample_noise(4, range(COUNT), SHAPE)
    assert len(members) == 5 * COUNT
    for i in range(COUNT):
        path = loaded(members[f"{i:09d}.path.pth"])
        assert path.shape == (4, *SHAPE) and path.dtype == torch.float32
        assert torch.equal(loaded(members[f"{i:09d}.noise.pth"]), path[0])
        assert torch.equal(path[0], noise[i] * (80.0 if scale == "edm" else 1.0))
        for state, a, s in zip(path[1:], signal, share, strict=True):
            torch.testing.assert_close(state, a * clean[i] + s * noise[i], rtol=1e-5, atol=1e-6)
        assert torch.equal(loaded(members[f"{i:09d}.latent.pth"]), clean[i])
        one_hot = loaded(members[f"{i:09d}.txt_emb.pth"])
        assert one_hot.tolist() == [float(k == i % CLASSES) for k in range(CLASSES)]
        assert int(members[f"{i:09d}.cls"]) == i % CLASSES
    counts = json.loads((tmp_path / "out/shard_count.json").read_text())
    assert counts == {f"{k:05d}.tar": PER_SHARD for k in range(COUNT // PER_SHARD)}


def test_equal_exports_have_equal_bytes(data: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export(str(data), str(tmp_path / name), ExportOptions("webdataset"))
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_without_classes_the_condition_is_empty(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", classes=0)
    export(str(data), str(tmp_path / "out"), ExportOptions("webdataset", samples_per_part=COUNT))
    members = tars(tmp_path / "out")
    assert not any(name.endswith(".cls") for name in members)
    assert loaded(members["000000000.txt_emb.pth"]).shape == (0,)
    imported = import_trajectories(str(tmp_path / "out"), str(tmp_path), ImportOptions())
    assert everything(imported.address)[2] is None


def test_lmdb_rows_are_read_as_causvid_reads_them(data: Path, tmp_path: Path) -> None:
    lmdb = pytest.importorskip("lmdb")
    export(str(data), str(tmp_path / "out"), ExportOptions("lmdb", "flow"))
    folders = sorted((tmp_path / "out/lmdb").iterdir())
    rows, prompts = [], []
    for folder in folders:  # ShardingLMDBDataset opens all that lies there
        with (
            lmdb.open(str(folder), readonly=True, lock=False) as environment,
            environment.begin() as transaction,
        ):
            shape = tuple(map(int, transaction.get(b"latents_shape").decode().split()))
            for i in range(shape[0]):
                row = np.frombuffer(transaction.get(f"latents_{i}_data".encode()), np.float16)
                rows.append(row.reshape(shape[1:]))
                prompts.append(transaction.get(f"prompts_{i}_data".encode()).decode())
    latents = torch.from_numpy(np.stack(rows)).float()
    assert latents.shape == (COUNT, 5, 1, *SHAPE)
    assert prompts == [str(i % CLASSES) for i in range(COUNT)]
    torch.testing.assert_close(latents[:, 0, 0], sample_noise(4, range(COUNT), SHAPE), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(latents[:, -1, 0], clean_images(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("format", ["webdataset", "npz", "lmdb"])
def test_what_was_exported_comes_back(tmp_path: Path, format: Any, dtype: torch.dtype) -> None:
    """Bit by bit in our own scale, except that a format of float16 rounds."""
    if format == "lmdb":
        pytest.importorskip("lmdb")
    data = make_data(tmp_path / "data", dtype=dtype)
    name: Any = str(dtype).removeprefix("torch.")
    export(str(data), str(tmp_path / "out"), ExportOptions(format, samples_per_part=7))
    imported = import_trajectories(str(tmp_path / "out"), str(tmp_path), ImportOptions(dtype=name))
    before, after = everything(str(data)), everything(imported.address)
    exact = format != "lmdb"
    torch.testing.assert_close(after[0], before[0], rtol=0 if exact else 1e-3, atol=0 if exact else 1e-6)
    exact = exact or dtype == torch.float16
    torch.testing.assert_close(after[1], before[1], rtol=0 if exact else 1e-3, atol=0 if exact else 1e-6)
    assert before[2] is not None and after[2] is not None and torch.equal(before[2], after[2])
    assert imported.spec.times == TIMES and imported.spec.shape == SHAPE
    said = answer("verify", imported.address, "--json")
    assert json.loads(said.stdout)["ok"], said.stderr
    said = answer("inspect", imported.address, "--out", tmp_path / "picture.png")
    assert said.returncode == 0 and format in said.stdout and "noise stored" in said.stdout


@pytest.mark.parametrize("scale", ["edm", "flow"])
def test_other_scales_come_back_as_ours(data: Path, tmp_path: Path, scale: Any) -> None:
    export(str(data), str(tmp_path / "out"), ExportOptions("npz", scale))
    imported = import_trajectories(str(tmp_path / "out"), str(tmp_path), ImportOptions())
    assert imported.spec.times == pytest.approx(TIMES, abs=1e-12)
    for before, after in zip(everything(str(data))[:2], everything(imported.address)[:2], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


def test_an_imported_set_is_exported_as_any_other(data: Path, tmp_path: Path) -> None:
    export(str(data), str(tmp_path / "one"), ExportOptions("npz"))
    imported = import_trajectories(str(tmp_path / "one"), str(tmp_path), ImportOptions())
    export(imported.address, str(tmp_path / "two"), ExportOptions("npz", samples_per_part=PER_SHARD))
    assert {k: v for k, v in digest(tmp_path / "one").items() if k.endswith("npz")} == {
        k: v for k, v in digest(tmp_path / "two").items() if k.endswith("npz")
    }


KILLED = """
import os, sys
from dsno_cluster.trajectories.exchange import export, importing
from dsno_cluster.cli import main
module, name, call = {"export": (export, "_write_part", 3), "import-trajectories": (importing, "put_shard", 3)}[sys.argv[1]]
real, calls = getattr(module, name), []
def counted(*arguments):
    calls.append(1)
    if len(calls) == call:
        os._exit(9)
    return real(*arguments)
setattr(module, name, counted)
main(sys.argv[1:])
"""


def killed(*words: object) -> None:
    """Run a command and kill it when it is about to write its third part or shard."""
    command = [sys.executable, "-c", KILLED, *map(str, words)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 9


def times_written(folder: Path, pattern: str) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.glob(pattern)}


def test_a_killed_export_keeps_what_is_finished(data: Path, tmp_path: Path) -> None:
    words = ("export", data, "--format", "webdataset", "--out")
    killed(*words, tmp_path / "out")
    before = times_written(tmp_path / "out", "*.tar")
    assert len(before) == 2 and not (tmp_path / "out/index.json").exists()
    said = answer(*words, tmp_path / "out")
    assert said.returncode == 0 and "2 of 4 parts are done" in said.stderr
    assert before.items() <= times_written(tmp_path / "out", "*.tar").items()
    export(str(data), str(tmp_path / "whole"), ExportOptions("webdataset"))
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert "all 4 parts exist already" in answer(*words, tmp_path / "out").stderr
    for part in [*list(before)[:1], "00002.tar", "00003.tar"]:
        (tmp_path / "out" / part).unlink()
    killed(*words, tmp_path / "out")
    assert not (tmp_path / "out/index.json").exists(), "names parts that are not there"


def test_a_killed_import_keeps_what_is_finished(data: Path, tmp_path: Path) -> None:
    export(str(data), str(tmp_path / "out"), ExportOptions("npz"))
    words = ("import-trajectories", tmp_path / "out", "--samples-per-shard", "4", "--out")
    killed(*words, tmp_path / "root")
    (folder,) = (tmp_path / "root/trajectories").iterdir()
    before = times_written(folder, "*.safetensors")
    assert len(before) == 2 and not (folder / "manifest.json").exists()
    said = answer(*words, tmp_path / "root")
    assert said.returncode == 0 and "2 of 5 shards are done" in said.stderr
    assert before.items() <= times_written(folder, "*.safetensors").items()
    assert json.loads(answer("verify", folder, "--json").stdout)["ok"]
    assert "imported already" in answer(*words, tmp_path / "root").stderr


def test_a_lost_or_changed_part_is_found_and_made_again(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(str(data), str(out), ExportOptions("webdataset"))
    whole = digest(out)
    (out / "00001.tar").unlink()
    damaged = bytearray((out / "00002.tar").read_bytes())
    damaged[700] ^= 1
    (out / "00002.tar").write_bytes(damaged)
    said = answer("verify", out)
    assert said.returncode == 1
    assert "00001.tar is missing" in said.stderr and "00002.tar does not have the sha256" in said.stderr
    (out / "00002.tar").unlink()
    export(str(data), str(out), ExportOptions("webdataset"))
    assert digest(out) == whole


def test_other_files_are_not_mixed_with(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(str(data), str(out), ExportOptions("webdataset"))
    for more in (["--scale", "edm"], ["--dtype", "float16"], ["--samples-per-part", "3"]):
        said = answer("export", data, "--format", "webdataset", *more, "--out", out)
        assert said.returncode == 2 and "holds an export of" in said.stderr, said.stderr
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/00000.tar").write_bytes(b"")
    said = answer("export", data, "--format", "webdataset", "--out", tmp_path / "foreign")
    assert said.returncode == 2 and "holds 00000.tar, which no export" in said.stderr
    said = answer("export", data, "--format", "npz", "--out", data)
    assert said.returncode == 2 and "holds manifest.json" in said.stderr


def test_numbers_that_do_not_fit_are_refused(data: Path, tmp_path: Path) -> None:
    said = answer("export", data, "--format", "lmdb", "--dtype", "float32", "--out", tmp_path / "a")
    assert said.returncode == 2
    near = make_near(tmp_path / "near", 0.9999)
    said = answer("export", near, "--format", "npz", "--scale", "edm", "--out", tmp_path / "b")
    assert said.returncode == 2 and "the noise stands at 80" in said.stderr


def make_near(root: Path, first: float) -> Path:
    """A data set whose first time is nearly 1."""
    storage = FolderStorage(root)
    line = write_shard(storage, "", 0, 0, {"states": torch.zeros(2, 1, *SHAPE, dtype=torch.float16)})
    commit_manifest(storage, "", make_manifest(a_spec(SHAPE, (first, 0.0), per_shard=1), [line], NOWHERE))
    return root


def test_the_library_of_lmdb_is_asked_for(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    said = answer("export", data, "--format", "lmdb", "--out", tmp_path / "out")
    assert said.returncode == 2 and "pip install" in said.stderr and said.stderr.count("\n") == 1


def test_on_s3_it_is_the_same(
    data: Path,
    tmp_path: Path,
    s3_endpoint: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for key, value in KEYS.items():
        monkeypatch.setenv(key, value)
    there = ["--endpoint-url", s3_endpoint]
    manifest = json.loads((data / "manifest.json").read_text())
    storage = open_storage("s3://bucket/exchange/data", s3_endpoint)
    for line in manifest["shards"]:
        storage.write(line["key"], (data / line["key"]).read_bytes())
    storage.write("manifest.json", (data / "manifest.json").read_bytes())
    export(str(data), str(tmp_path / "out"), ExportOptions("webdataset"))
    words = (
        "s3://bucket/exchange/data",
        "--format",
        "webdataset",
        "--out",
        "s3://bucket/exchange/out",
        *there,
    )
    said = answer("export", *words)
    assert said.returncode == 0, said.stderr
    copy = open_storage("s3://bucket/exchange/out", s3_endpoint)
    found = {stat.key: hashlib.sha256(copy.read(stat.key)).hexdigest() for stat in copy.list("")}
    assert found == digest(tmp_path / "out")
    assert json.loads(answer("verify", "s3://bucket/exchange/out", "--json", *there).stdout)["ok"]
    said = answer("import-trajectories", "s3://bucket/exchange/out", "--out", "s3://bucket/exchange", *there)
    assert said.returncode == 0, said.stderr
    here = import_trajectories(str(tmp_path / "out"), str(tmp_path), ImportOptions())
    address = f"s3://bucket/exchange/trajectories/{here.spec.hash}"
    assert json.loads(answer("verify", address, "--json", *there).stdout)["ok"]


@pytest.mark.skipif(FASTGEN is None, reason="FASTGEN_CHECKOUT names no checkout of NVlabs/FastGen")
def test_fastgen_reads_the_tars(data: Path, tmp_path: Path) -> None:
    """Its own loader, with the keys of its PairLoaderConfig and PathLoaderConfig."""
    assert FASTGEN is not None
    export(str(data), str(tmp_path / "out"), ExportOptions("webdataset", "edm"))
    path = os.pathsep.join([FASTGEN, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    done = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path / "out")],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout.splitlines()[-1])
    noise, clean = sample_noise(4, range(COUNT), SHAPE).double(), clean_images().double()
    for kind in ("pairs", "paths"):
        torch.testing.assert_close(torch.tensor(read[kind]["real"]).double(), clean.sum(0))
        assert read[kind]["condition"] == [
            sum(i % CLASSES == k for i in range(COUNT)) for k in range(CLASSES)
        ]
    torch.testing.assert_close(
        torch.tensor(read["pairs"]["noise"]).double(), 80 * noise.sum(0), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(
        torch.tensor(read["paths"]["path"]).double()[0], 80 * noise.sum(0), rtol=1e-5, atol=1e-4
    )
    assert read["from_8"] == [f"{i:09d}" for i in range(8, 12)]
