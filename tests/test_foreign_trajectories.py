"""Trajectories that others wrote: what their files say, what must be said in addition, and files that are damaged or hostile."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_exchange import SHAPE, everything, make_data
from tiny import answer

from dsno_cluster.diffusion.schedule import logsnr
from dsno_cluster.trajectories.exchange.export import ExportOptions, export
from dsno_cluster.trajectories.exchange.lmdb_tree import Tree
from dsno_cluster.trajectories.exchange.samples import BadPart

TIMES = "0.999,0.937,0.833,0.624"  # of FastGen's config_kd_path.py
Members = dict[str, bytes]


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def sample(key: str = "a") -> Members:
    """A sample of paths, flow matching, two classes."""
    path = random(4, *SHAPE)
    members = {
        "path.pth": saved(path),
        "noise.pth": saved(path[0].clone()),
        "latent.pth": saved(random(*SHAPE) / 3),
        "txt_emb.pth": saved(torch.tensor([0.0, 1.0])),
        "json": b"{}",
    }
    return {f"{key}.{name}": data for name, data in members.items()}


def tar_of(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def bring(folder: Path, data: bytes, name: str = "00000.tar") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return folder


def refusal(folder: Path, *words: object) -> str:
    """What an import is refused with: one line, exit status 2."""
    said = answer("import-trajectories", folder, "--out", folder.parent / "root", *words)
    assert said.returncode == 2, (said.returncode, said.stderr)
    lines = [line for line in said.stderr.splitlines() if line.startswith("dsno-cluster: ")]
    assert len(lines) == 1 and len(lines[0]) < 500
    assert "Traceback" not in said.stderr
    return lines[0]


def test_paths_of_flow_matching_become_ours(tmp_path: Path) -> None:
    """A set as FastGen's config for Wan describes it; its states are divided by (1 - t)^2 + t^2, square root."""
    folder = bring(tmp_path / "in", tar_of({**sample("a"), **sample("b")}))
    said = answer("import-trajectories", folder, "--out", tmp_path, "--scale", "flow", "--timesteps", TIMES)
    assert said.returncode == 0, said.stderr
    (found,) = (tmp_path / "trajectories").iterdir()
    spec = json.loads((found / "manifest.json").read_text())["spec"]
    for t, u in zip(spec["times"], (0.937, 0.833, 0.624), strict=False):
        assert float(logsnr(t)) == pytest.approx(2 * math.log((1 - u) / u), abs=1e-9)
    assert spec["times"][-1] == 0.0 and spec["labels"]["num_classes"] == 2
    noise, states, labels = everything(str(found))
    path = random(4, *SHAPE)
    for m, u in enumerate((0.937, 0.833, 0.624)):
        torch.testing.assert_close(states[1, m], path[m + 1] / math.hypot(1 - u, u))
    assert torch.equal(noise[0], path[0]) and torch.equal(states[0, 3], random(*SHAPE) / 3)
    assert labels is not None and labels.tolist() == [1, 1]
    assert f"imported: {found.name}" in said.stdout


def test_pairs_need_no_times(tmp_path: Path) -> None:
    members = {name: data for name, data in sample().items() if "path" not in name}
    folder = bring(tmp_path / "in", tar_of(members))
    said = answer("import-trajectories", folder, "--out", tmp_path, "--scale", "flow")
    assert said.returncode == 0, said.stderr
    (found,) = (tmp_path / "trajectories").iterdir()
    noise, states, _ = everything(str(found))
    assert states.shape == (1, 1, *SHAPE)
    assert torch.equal(noise[0], random(4, *SHAPE)[0])


def test_an_index_of_theirs_says_the_times(tmp_path: Path) -> None:
    folder = bring(tmp_path / "in", tar_of(sample()))
    times = [*map(float, TIMES.split(",")), 0.0]
    (folder / "index.json").write_text(json.dumps({"path_timesteps": times, "num_samples": 1}))
    assert "--scale edm" in refusal(folder)
    said = answer("import-trajectories", folder, "--out", tmp_path, "--scale", "flow")
    assert said.returncode == 0, said.stderr


def test_what_the_files_do_not_say_is_asked_for(tmp_path: Path) -> None:
    folder = bring(tmp_path / "in", tar_of(sample()))
    assert "nothing says in which scale" in refusal(folder)
    assert "nothing says at which times the 4 states" in refusal(folder, "--scale", "flow")
    flow = ("--scale", "flow", "--timesteps")
    assert "its path has 4 states, and 2 times" in refusal(folder, *flow, "0.9,0.5")
    assert "thousand times too large" in refusal(folder, *flow, "999,937,833,624")
    assert "must descend strictly" in refusal(folder, *flow, "0.9,0.5,0.6,0.1")
    assert "--classes 5: " in refusal(folder, *flow, TIMES, "--classes", "5")
    assert "not numbers with commas" in refusal(folder, *flow, "much")
    assert "--noise-scale" in refusal(folder, *flow, TIMES, "--noise-scale", "80")
    assert "--noise-scale" in refusal(folder, "--scale", "edm", "--timesteps", "80,5,2,1")
    assert "no file that ends in" in refusal(tmp_path / "nothing")
    (folder / "x.npz").write_bytes(b"")
    assert "choose one with --format" in refusal(folder, *flow, TIMES)


class Runs:
    """An object that runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch /tmp/dsno-cluster-was-here",)


def bomb() -> bytes:
    """A file of torch.save whose tensor is compressed a thousand times."""
    buffer = io.BytesIO()
    whole = zipfile.ZipFile(io.BytesIO(saved(torch.zeros(1 << 22))))
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    return buffer.getvalue()


# what is put in place of members of a good sample, and what is then said
BAD_SAMPLES: dict[str, tuple[dict[str, Any], str]] = {
    "code": ({"latent.pth": pickle.dumps(Runs(), 2)}, "which could run code"),
    "code in a zip": ({"latent.pth": saved(Runs())}, "which could run code"),
    "a dictionary": ({"latent.pth": saved({"x": torch.zeros(2)})}, "holds a dict"),
    "a bomb": ({"latent.pth": bomb()}, "torch.save does not compress"),
    "a stretched tensor": ({"latent.pth": saved(torch.zeros(1).expand(1, 9999, 9999))}, "save it with .contiguous()"),
    "a cut file": ({"latent.pth": saved(random(*SHAPE))[:-40]}, "is cut off"),
    "a web page": ({"latent.pth": b"<html>404"}, "is a web page"),
    "whole numbers": ({"latent.pth": saved(torch.zeros(SHAPE, dtype=torch.int64))}, "states are floating-point numbers"),
    "a video": ({"latent.pth": saved(random(1, 2, 4, 4))}, "(1, 2, 4, 4)"),
    "no image": ({"latent.pth": None}, "its latent is missing"),
    "no path in the second": ({"b.path.pth": None}, "has no path"),
    "another shape": ({"b.latent.pth": saved(random(1, 2, 2))}, "its latent is (1, 2, 2)"),
    "another number of steps": ({"b.path.pth": saved(random(3, *SHAPE))}, "its path is (3, 1, 4, 4)"),
    "NaN": ({"b.latent.pth": saved(torch.full(SHAPE, math.nan))}, "in/00000.tar: b: has numbers that are not finite"),
    "another noise": ({"b.noise.pth": saved(random(*SHAPE))}, "is not the first state"),
    "a text": ({"txt_emb.pth": saved(random(77, 8))}, "students here take a class"),
    "no one-hot vector": ({"txt_emb.pth": saved(torch.tensor([0.5, 0.5]))}, "is no one-hot vector"),
    "other classes": ({"b.txt_emb.pth": saved(torch.tensor([0.0, 1.0, 0.0]))}, "expected one of 2"),
    "no class": ({"b.txt_emb.pth": None}, "its class is None"),
    "two classes": ({"b.cls": b"0"}, "txt_emb.pth says class 1, cls says 0"),
    "a class of words": ({"cls": b"cat"}, "'cat' is no class number"),
    "classes without a number": ({"txt_emb.pth": None, "cls": b"1"}, "name the number with --classes"),
    "a name that leads out": ({"../c.latent.pth": b"x"}, "leads out of the archive"),
    "an absolute name": ({"/c.latent.pth": b"x"}, "leads out of the archive"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SAMPLES)
def test_a_bad_sample_is_one_line(tmp_path: Path, case: str) -> None:
    changes, said = BAD_SAMPLES[case]
    members = {**sample("a"), **sample("b")}
    for name, data in changes.items():
        for one in [name] if name.startswith(("b.", "/", "..")) else [f"a.{name}", f"b.{name}"]:
            members.pop(one, None)
            members |= {} if data is None else {one: data}
    folder = bring(tmp_path / "in", tar_of(members))
    told = refusal(folder, "--scale", "flow", "--timesteps", TIMES)
    assert said in told, told
    assert not os.path.exists("/tmp/dsno-cluster-was-here")
    assert not list((tmp_path / "root").rglob("manifest.json"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "root") == ["in"]


def test_links_in_a_tar_are_refused(tmp_path: Path) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            member = tarfile.TarInfo("a.latent.pth")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        assert "is a link, a device" in refusal(bring(tmp_path / "in", buffer.getvalue()), "--scale", "flow")


def test_a_tar_that_is_cut_off_is_found_at_any_place(tmp_path: Path) -> None:
    """Also between two members, where it looks like a whole one."""
    whole = tar_of({**sample("a"), **sample("b")})
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        ends = [member.offset for member in tar][1:]
    for end in [*ends, *(at + 300 for at in ends), *(at + 700 for at in ends), 0, 100]:
        told = refusal(bring(tmp_path / "in", whole[:end]), "--scale", "flow", "--timesteps", TIMES)
        assert "is cut off" in told, (end, told)


def archive(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_bad_archives_are_one_line(tmp_path: Path) -> None:
    noise, latent = random(2, *SHAPE).numpy(), random(2, *SHAPE).numpy()
    objects = np.empty(2, object)
    objects[:] = [Runs(), Runs()]
    packed = io.BytesIO()
    np.savez_compressed(packed, noise=np.zeros((99, 9, 99, 99)), latent=np.zeros((99, 9, 99, 99)))
    cases = {
        "allow_pickle": archive(noise=noise, latent=objects),
        "needs latent": archive(noise=noise),
        "differ": archive(noise=noise, latent=latent[:1]),
        "labels are float32": archive(noise=noise, latent=latent, labels=noise[:, 0, 0, 0]),
        "latent is int64": archive(noise=noise, latent=np.zeros((2, *SHAPE), int)),
        "no trajectories do": packed.getvalue(),
        "cannot be read": archive(noise=noise, latent=latent)[:-100],
    }
    for said, data in cases.items():
        told = refusal(bring(tmp_path / "in", data, "x.npz"), "--scale", "flow")
        assert said in told, told
    assert not os.path.exists("/tmp/dsno-cluster-was-here")


def exported_lmdb(tmp_path: Path) -> bytes:
    pytest.importorskip("lmdb")
    export(
        str(make_data(tmp_path / "data")), str(tmp_path / "out"), ExportOptions("lmdb", samples_per_part=20)
    )
    return (tmp_path / "out/lmdb/shard_00000/data.mdb").read_bytes()


def test_our_reader_of_lmdb_finds_what_the_library_wrote(tmp_path: Path) -> None:
    """Values of all sizes, in a tree of several levels, some of them deleted and written again."""
    lmdb = pytest.importorskip("lmdb")
    random_bytes = np.random.default_rng(0)
    written = {}
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 26) as environment:
        for turn in range(3):
            with environment.begin(write=True) as transaction:
                for i in range(turn, 3000, turn + 1):
                    key, value = (
                        f"key_{i}".encode(),
                        random_bytes.bytes(int(random_bytes.integers(0, 9000 if i % 9 == 0 else 60))),
                    )
                    transaction.put(key, value)
                    written[key] = value
                for i in range(0, 3000, 7):
                    transaction.delete(f"key_{i}".encode())
                    written.pop(f"key_{i}".encode(), None)
    tree = Tree(memoryview((tmp_path / "db/data.mdb").read_bytes()), "db")
    assert tree.entries == len(written)
    for i in range(3000):
        found = tree.get(f"key_{i}".encode())
        assert (None if found is None else bytes(found)) == written.get(f"key_{i}".encode())
    assert tree.get(b"") is None and tree.get(b"zzz") is None


def test_a_damaged_lmdb_file_is_one_line(tmp_path: Path) -> None:
    """The library ends the process with a signal for some of these."""
    whole = exported_lmdb(tmp_path)
    flow = ("--scale", "vp", "--timesteps", "1.57,0.9,0.4,0.1", "--classes", "3")
    for end in (0, 100, 4096, 8192, len(whole) // 2, len(whole) - 4096):
        told = refusal(bring(tmp_path / f"cut{end}", whole[:end], "data.mdb"), *flow)
        assert "cut off" in told or "empty" in told or "not an LMDB file" in told, told
    said = answer("import-trajectories", bring(tmp_path / "in", whole, "data.mdb"), "--out", tmp_path, *flow)
    assert said.returncode == 0, said.stderr
    for value in (b"20 5 2 1 4 4", b"20 5 1 4 4", b"a b", b"20 5 1 1 9 4", b"99 5 1 1 4 4"):
        data = whole.replace(b"20 5 1 1 4 4", value.ljust(12))
        assert "latents_" in refusal(bring(tmp_path / "in", data, "data.mdb"), *flow)


def test_no_change_of_a_byte_ends_the_process(tmp_path: Path) -> None:
    """Every place of the pages that hold the tree, turned over: a value, None or BadPart."""
    whole = exported_lmdb(tmp_path)
    pages = [at for at in range(0, len(whole), 4096) if struct.unpack_from("<H", whole, at + 10)[0] & 0x0B]
    keys = [
        b"latents_shape",
        *(f"{name}_{i}_data".encode() for name in ("latents", "prompts") for i in (0, 9, 19)),
    ]
    for at in (byte for page in pages for byte in range(page, page + 200)):
        data = bytearray(whole)
        data[at] ^= 0xFF
        try:
            tree = Tree(memoryview(data), "x")
            for key in keys:
                tree.get(key)
        except BadPart:
            continue


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[1, 2]", "holds a list"),
        ("{", "not JSON"),
        ('{"source_hash": "x"}', "not an export index"),
        ('{"path_timesteps": "soon", "scale": "flow"}', "not a list of numbers"),
        ('{"scale": "log"}', "is not one of: vp, edm, flow"),
    ],
)
def test_a_bad_index_is_one_line(tmp_path: Path, content: str, said: str) -> None:
    folder = bring(tmp_path / "in", tar_of(sample()))
    (folder / "index.json").write_text(content)
    assert said in refusal(folder)


def changed_index(out: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((out / "index.json").read_text())
    change(index)
    (out / "index.json").write_text(json.dumps(index))


def test_parts_are_checked_against_their_index(tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(str(make_data(tmp_path / "data")), str(out), ExportOptions("npz"))
    assert "says vp" in refusal(out, "--scale", "edm")
    assert "has others" in refusal(out, "--timesteps", "1.5,0.1")
    assert "says npz" in refusal(out, "--format", "webdataset")
    (out / "part-000002.npz").write_bytes((out / "part-000001.npz").read_bytes())
    assert "part-000002.npz: does not have the sha256 of index.json" in refusal(out)
    (out / "part-000002.npz").unlink()
    said = answer("import-trajectories", out, "--out", tmp_path / "root")
    assert said.returncode == 1 and "part-000002.npz" in said.stderr
    changed_index(out, lambda index: index["parts"].pop())
    assert answer("verify", out).returncode == 1
