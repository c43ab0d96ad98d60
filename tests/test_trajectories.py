"""Shards: pure functions of (spec, index), verified by bytes, committed last, continued after anything."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from data_sets import a_spec
from tiny import TINY, answer, dsno

from dsno_cluster import load_teacher, solve
from dsno_cluster.config import load_config
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.provenance import NOWHERE
from dsno_cluster.records import canonical_hash
from dsno_cluster.storage import open_storage
from dsno_cluster.trajectories.reader import ShardReader, epoch_order, open_trajectories, read_batches
from dsno_cluster.trajectories.shards import (
    MadeShards,
    Shard,
    commit_manifest,
    encode_shard,
    make_manifest,
    read_manifest,
    write_made_shards,
    write_shard,
)

DIGITS = "configs/digits.yaml"


def data_set(root: Path) -> Path:
    return next((root / "trajectories").iterdir())


def shard_bytes(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(data_set(root).glob("shard-*"))}


def test_shards_hold_what_the_solver_says(tiny_data: Path) -> None:
    teacher = load_teacher("package:digits-teacher")
    torch.set_num_threads(1)
    tensors = safetensors.torch.load_file(data_set(tiny_data) / "shard-000002.safetensors")
    samples = range(32, 48)
    noise, labels = sample_noise(0, samples, (1, 8, 8)), sample_labels(0, samples, 10)
    states = solve(teacher, noise, (0.5625, 0.25, 0.0625, 0.0), "dpmpp-2m", 6, labels)
    assert tensors["states"].shape == (4, 16, 1, 8, 8) and tensors["states"].dtype == torch.float16
    assert torch.equal(tensors["labels"], labels)
    assert torch.equal(tensors["states"], states.transpose(0, 1).half())


def test_the_manifest_names_every_shard_and_no_secret(tiny_data: Path) -> None:
    manifest = json.loads((data_set(tiny_data) / "manifest.json").read_text())
    assert [s["key"] for s in manifest["shards"]] == [f"shard-{i:06d}.safetensors" for i in range(6)]
    assert manifest["num_samples"] == 96 and manifest["spec"]["teacher"]["sha256"]
    assert manifest["spec_hash"] == data_set(tiny_data).name
    verified = answer("verify", str(data_set(tiny_data)), "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["samples"] == 96


@pytest.mark.slow
def test_same_bytes_from_one_actor_and_a_longer_run_adds_shards(tiny_data: Path, tmp_path: Path) -> None:
    half = ["trajectories.num_samples=48", f"storage.root={tmp_path}", "--launcher", "local", "--actors", "1"]
    assert dsno("gen-trajectories", *TINY, *half).returncode == 0
    made = shard_bytes(tmp_path)
    assert made == {k: v for k, v in shard_bytes(tiny_data).items() if k in made} and len(made) == 3
    times = {p: p.stat().st_mtime_ns for p in data_set(tmp_path).glob("shard-*")}

    whole = dsno(
        "gen-trajectories", *TINY, f"storage.root={tmp_path}", "--launcher", "local", "--actors", "1"
    )
    assert whole.returncode == 0, whole.stderr
    assert shard_bytes(tmp_path) == shard_bytes(tiny_data)
    assert all(p.stat().st_mtime_ns == when for p, when in times.items())  # nothing was made twice
    names = [s["key"] for s in json.loads((data_set(tmp_path) / "manifest.json").read_text())["shards"]]
    assert len(names) == 6


def test_same_sha256_from_two_and_from_four_actors(tiny_data: Path, tmp_path: Path) -> None:
    words = ["gen-trajectories", *TINY, f"storage.root={tmp_path}", "--launcher", "local", "--actors", "4"]
    run = dsno(*words)
    assert run.returncode == 0, run.stderr
    ours, theirs = (
        json.loads((data_set(root) / "manifest.json").read_text()) for root in (tmp_path, tiny_data)
    )
    assert ours["shards"] == theirs["shards"] and len(ours["shards"]) == 6


def test_a_damaged_data_set_is_mended_by_the_same_command(tiny_data: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(tiny_data, root)
    (data_set(root) / "shard-000002.safetensors").unlink()
    words = ["gen-trajectories", *TINY, f"storage.root={root}", "--launcher", "local", "--actors", "1"]
    mended = dsno(*words)
    assert mended.returncode == 0 and "1 to make" in mended.stderr, mended.stderr
    assert shard_bytes(root) == shard_bytes(tiny_data)
    assert answer("verify", str(data_set(root))).returncode == 0

    manifest = data_set(root) / "manifest.json"
    content = json.loads(manifest.read_text())
    content["spec"]["seed"] = 1
    manifest.write_text(json.dumps(content))
    changed = answer("verify", str(data_set(root)))
    assert changed.returncode == 1 and "changed after it was written" in changed.stderr


def test_what_no_actor_can_do_stops_at_once(tmp_path: Path) -> None:
    """A place that cannot be written: no shard succeeds, so the run ends after a few, with the reason."""
    (tmp_path / "trajectories").write_text("a file, not a folder")
    words = ["gen-trajectories", *TINY, f"storage.root={tmp_path}", "--launcher", "local", "--actors", "1"]
    failed = dsno(*words)
    assert failed.returncode == 1, failed.stderr
    assert "cannot be written" in failed.stderr and "Traceback" not in failed.stderr
    # what it was about to do, and why it could not; on a busy machine also that actors are waited for
    lines = [line for line in failed.stderr.splitlines() if not line.startswith("waiting for actors")]
    assert len(lines) == 2, failed.stderr


def test_killed_driver_leaves_whole_shards_and_the_same_command_finishes(
    tiny_data: Path, tmp_path: Path
) -> None:
    words = ["gen-trajectories", *TINY, f"storage.root={tmp_path}", "--launcher", "local", "--actors", "1"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "dsno_cluster.cli", *words], stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob("trajectories/*/shard-000001*")):
        time.sleep(0.02)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not list(tmp_path.glob("trajectories/*/manifest.json"))
    note = json.loads((data_set(tmp_path) / "progress.json").read_text())
    assert note["environment"]["device"]  # from before the first shard
    assert answer("verify", str(data_set(tmp_path))).returncode == 2  # unfinished: there is no manifest
    done = shard_bytes(tmp_path)
    assert done and done == {k: v for k, v in shard_bytes(tiny_data).items() if k in done}

    again = dsno(*words)
    assert again.returncode == 0 and "shards are done" in again.stderr, again.stderr
    manifest = json.loads((data_set(tmp_path) / "manifest.json").read_text())
    assert manifest["environment"]["seconds"] > note["environment"]["seconds"]  # those of both runs
    assert shard_bytes(tmp_path) == shard_bytes(tiny_data)
    assert answer("verify", str(data_set(tmp_path))).returncode == 0
    third = answer(*words)
    assert third.returncode == 0 and "exist already" in third.stderr


@pytest.mark.parametrize("note", ["of this device", "of another device", "missing"])
@pytest.mark.slow
def test_a_shard_that_no_note_names_must_vouch_for_itself(tiny_data: Path, tmp_path: Path, note: str) -> None:
    """As a killed driver leaves them, before it noted any shard."""
    root = tmp_path / "root"
    shutil.copytree(tiny_data, root)
    folder = data_set(root)
    environment = json.loads((folder / "manifest.json").read_text())["environment"]
    (folder / "manifest.json").unlink()
    if note == "of another device":
        environment["device"] = "Another Device 9000"
    if note != "missing":
        storage = open_storage(str(root))
        write_made_shards(storage, f"trajectories/{folder.name}/", MadeShards(environment=environment))
    flipped, misplaced = folder / "shard-000002.safetensors", folder / "shard-000004.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-5] ^= 1
    flipped.write_bytes(data)
    misplaced.write_bytes((folder / "shard-000003.safetensors").read_bytes())

    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    again = dsno("gen-trajectories", *TINY, f"storage.root={root}", "--launcher", "local", "--actors", "1")
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    changed = [name for name in sorted(before) if before[name] != after[name]]
    if note == "of another device":
        assert again.returncode == 2 and "was made on Another Device 9000" in again.stderr, again.stderr
        assert not changed and not (folder / "manifest.json").exists()
        return
    assert again.returncode == 0, again.stderr
    assert changed == [flipped.name, misplaced.name]
    assert shard_bytes(root) == shard_bytes(tiny_data)
    assert answer("verify", str(folder)).returncode == 0


@pytest.mark.parametrize(
    "bits", ["of this device", pytest.param("of another device", marks=pytest.mark.slow)]
)
def test_whole_shards_whose_manifest_was_lost_are_kept(tiny_data: Path, tmp_path: Path, bits: str) -> None:
    """Nothing says what made them, so one is made again: it must have the same bytes."""
    root = tmp_path / "root"
    shutil.copytree(tiny_data, root)
    folder = data_set(root)
    lost = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").unlink()
    if bits == "of another device":
        tensors = safetensors.torch.load_file(folder / "shard-000000.safetensors")
        tensors["states"] += 0.01
        (folder / "shard-000000.safetensors").write_bytes(encode_shard(tensors, 0))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    again = dsno("gen-trajectories", *TINY, f"storage.root={root}", "--launcher", "local", "--actors", "1")
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")} == before
    if bits == "of another device":
        assert (
            again.returncode == 1 and "shard-000000.safetensors: exists, made with other bits" in again.stderr
        )
        assert not (folder / "manifest.json").exists() and not (folder / "progress.json").exists()
        return
    assert again.returncode == 0 and "to make" not in again.stderr, again.stderr
    found = json.loads((folder / "manifest.json").read_text())
    assert (found["shards"], found["spec"]) == (lost["shards"], lost["spec"])
    assert found["environment"]["device"] == lost["environment"]["device"]
    assert answer("verify", str(folder)).returncode == 0


def test_the_first_writer_of_a_shard_wins(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    ours, theirs = {"states": torch.zeros(2, 3, 1, 4, 4)}, {"states": torch.ones(2, 3, 1, 4, 4)}
    first = write_shard(storage, "d/", 0, 0, ours)
    assert write_shard(storage, "d/", 0, 0, ours) == first
    with pytest.raises(WorkError, match=r"shard-000000.*made with other bits"):
        write_shard(storage, "d/", 0, 0, theirs)
    (found,) = storage.list("d/")
    write_shard(storage, "d/", 0, 0, theirs, replace=found.etag)  # that one was bad
    with pytest.raises(WorkError, match="made with other bits"):  # and this one was not
        write_shard(storage, "d/", 0, 0, ours, replace=found.etag)
    assert torch.equal(safetensors.torch.load(storage.read("d/" + first.key))["states"], theirs["states"])


def test_interrupt_stops_cleanly(tmp_path: Path) -> None:
    words = ["gen-trajectories", *TINY, "trajectories.num_samples=16000", f"storage.root={tmp_path}"]
    driver = subprocess.Popen(
        [sys.executable, "-m", "dsno_cluster.cli", *words, "--launcher", "local"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(tmp_path.glob("trajectories/*/shard-000001*")):
        time.sleep(0.02)
    driver.send_signal(signal.SIGINT)
    _, stderr = driver.communicate(timeout=60)
    assert driver.returncode == 130
    assert "the same command" in stderr and "Traceback" not in stderr


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_verify_names_the_bad_shard(tiny_data: Path, tmp_path: Path, damage: str) -> None:
    folder = shutil.copytree(data_set(tiny_data), tmp_path / "copy")
    bad = folder / "shard-000003.safetensors"
    data = bytearray(bad.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        bad.write_bytes(data)
    elif damage == "cut":
        bad.write_bytes(data[:-1])
    else:
        bad.unlink()
    result = answer("verify", str(folder / "manifest.json"), "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 1 and not report["ok"]
    assert len(report["problems"]) == 1 and "shard-000003" in report["problems"][0]
    assert "shard-000003" in result.stderr and "`dsno-cluster gen-trajectories`" in result.stderr

    config = load_config(DIGITS, TINY)
    storage = open_storage(str(tmp_path))
    batches = read_batches(
        ShardReader(storage, "copy/", open_trajectories(storage, "copy/", 96)),
        seed=config.seed,
        first_sample=0,
        batch_size=96,
        rank=0,
        world_size=1,
    )
    # training does not read it either, and says how it comes back
    with pytest.raises(WorkError, match=r"shard-000003.*`dsno-cluster gen-trajectories`") as caught:
        next(batches)
    assert ("delete it" in str(caught.value)) == (damage != "remove")


@pytest.mark.parametrize("last", [90, 9999])
def test_verify_compares_the_sample_ranges(tiny_data: Path, tmp_path: Path, last: int) -> None:
    folder = shutil.copytree(data_set(tiny_data), tmp_path / "copy")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][-1]["stop"] = manifest["num_samples"] = last
    (folder / "manifest.json").write_text(json.dumps(manifest))
    result = answer("verify", str(folder), "--json")
    assert result.returncode == 1, result.stdout
    (problem,) = json.loads(result.stdout)["problems"]
    assert problem == f"shard-000005.safetensors holds 16 samples, the manifest says 80 to {last - 1}"


def test_verify_compares_a_folder_named_by_a_hash_with_the_spec(tiny_data: Path, tmp_path: Path) -> None:
    wrong = shutil.copytree(data_set(tiny_data), tmp_path / "0123456789abcdef")
    result = answer("verify", str(wrong))
    assert result.returncode == 1 and data_set(tiny_data).name in result.stderr, result.stderr
    copied = shutil.copytree(wrong, tmp_path / "my-copy")
    assert answer("verify", str(copied)).returncode == 0
    assert answer("verify", ".", cwd=data_set(tiny_data)).returncode == 0


def test_commit_is_conditional_and_never_shrinks(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    spec = a_spec(per_shard=4)
    shards = tuple(
        Shard(key=f"shard-{i:06d}.safetensors", start=i * 4, stop=i * 4 + 4, size=10, sha256=f"{i}")
        for i in range(3)
    )
    commit_manifest(storage, "d/", make_manifest(spec, shards[:2], NOWHERE))
    commit_manifest(storage, "d/", make_manifest(spec, shards, NOWHERE))
    commit_manifest(storage, "d/", make_manifest(spec, shards[:1], NOWHERE))  # a late, smaller run
    found = read_manifest(storage, "d/")
    assert found is not None and found[0].shards == shards
    other = shards[0].model_copy(update={"sha256": "another"})
    with pytest.raises(WorkError, match="other bytes for shard-000000"):
        commit_manifest(storage, "d/", make_manifest(spec, [other, *shards[1:]], NOWHERE))


def test_reader_gives_every_sample_once_in_one_order_for_any_world_size(tiny_data: Path) -> None:
    storage, folder = open_storage(str(tiny_data)), f"trajectories/{data_set(tiny_data).name}/"
    manifest = open_trajectories(storage, folder, 96)

    def indices(world_size: int, accumulation: int, first: int = 0) -> list[np.ndarray]:
        ranks = [
            read_batches(
                ShardReader(storage, folder, manifest),
                seed=3,
                first_sample=32 * first,
                batch_size=32,
                rank=rank,
                world_size=world_size,
                accumulation=accumulation,
            )
            for rank in range(world_size)
        ]
        batches = []
        for _ in range(6 - first):  # two epochs
            parts = [[part.indices for part in next(rank)] for rank in ranks]
            batches.append(
                np.concatenate([parts[r][a] for a in range(accumulation) for r in range(world_size)])
            )
        return batches

    alone = indices(1, 1)
    for epoch in (alone[:3], alone[3:]):
        assert sorted(np.concatenate(epoch)) == list(range(96))
    assert not np.array_equal(np.concatenate(alone[:3]), np.concatenate(alone[3:]))
    for world_size, accumulation in ((2, 1), (4, 2), (1, 4)):
        assert all(map(np.array_equal, indices(world_size, accumulation), alone))
    assert all(map(np.array_equal, indices(2, 1, first=4), alone[4:]))  # a resumed run, of another world size
    assert sorted(epoch_order(manifest, 3, 0, window=2)) == list(range(96))


def test_reader_pairs_noise_states_and_labels(tiny_data: Path) -> None:
    storage, folder = open_storage(str(tiny_data)), f"trajectories/{data_set(tiny_data).name}/"
    manifest = open_trajectories(storage, folder, 96)
    (batch,) = next(
        read_batches(
            ShardReader(storage, folder, manifest),
            seed=0,
            first_sample=16,
            batch_size=16,
            rank=0,
            world_size=1,
        )
    )
    assert torch.equal(batch.noise, sample_noise(0, map(int, batch.indices), (1, 8, 8)))
    assert batch.labels is not None
    assert torch.equal(batch.labels, sample_labels(0, map(int, batch.indices), 10))
    states = solve(
        load_teacher("package:digits-teacher"),
        batch.noise,
        (0.5625, 0.25, 0.0625, 0.0),
        "dpmpp-2m",
        6,
        batch.labels,
    )
    assert torch.allclose(batch.states, states, atol=2e-3)  # float16 storage


def test_reader_refuses_what_it_cannot_read_right(tiny_data: Path, tmp_path: Path) -> None:
    storage, folder = open_storage(str(tiny_data)), f"trajectories/{data_set(tiny_data).name}/"
    with pytest.raises(UserError, match="has 96 trajectories"):
        open_trajectories(storage, folder, 97)
    with pytest.raises(UserError, match="gen-trajectories"):
        open_trajectories(storage, "nothing/", 1)
    content = json.loads((data_set(tiny_data) / "manifest.json").read_text())
    content["spec"]["noise"]["first_sample_sha256"] = "0" * 64
    content["spec_hash"] = canonical_hash(content["spec"])
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="other noise for the same seed"):
        open_trajectories(open_storage(str(tmp_path)), "", 96)


def test_another_spec_is_another_folder(tiny_data: Path) -> None:
    from dsno_cluster.trajectories.plan import make_plan

    folders = {make_plan(load_config(DIGITS, TINY)).folder}
    changes = ["seed=2", "trajectories.solver=ddim", "trajectories.steps=7", "trajectories.dtype=float32"]
    changes += [
        "trajectories.times=[0.5, 0.2, 0.1, 0.0]",
        "trajectories.threads=2",
        "trajectories.clip_denoised=true",
    ]
    for change in [*changes, "trajectories.guidance_scale=1.5", "trajectories.batch_size=8"]:
        folders.add(make_plan(load_config(DIGITS, [*TINY, change])).folder)
    assert len(folders) == 10
    assert make_plan(load_config(DIGITS, [*TINY, "trajectories.num_samples=32"])).folder in folders
