"""plan and inspect: what trajectories will cost, and what they hold."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tiny import DATA, TINY, answer, distilled_experiment, dsno

from dsno_cluster.config import load_config
from dsno_cluster.teachers import compared_samplings, find_teacher

GAUSSIAN = [
    *("network.num_classes=0", "network.null_class=false", "teacher.path=closed-form:gaussian"),
    "teacher.options={mean: 0.3, std: 0.4, shape: [1, 8, 8]}",
]


def test_the_arithmetic_of_the_paper_needs_no_teacher_and_no_torch() -> None:
    code = (
        "import sys; from dsno_cluster.cli import main; status = main(sys.argv[1:]); "
        "sys.exit(9 if any(name in sys.modules for name in ('torch', 'ray', 'boto3', 'diffusers')) else status)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "plan", "configs/imagenet64.yaml", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    # the teacher is not there; neither are other files, which later stages need
    assert run.returncode == 2 and run.stderr.count("\n") == 1, run.stderr
    plan = json.loads(run.stdout)
    assert plan["num_samples"] == 2_300_000 and plan["num_shards"] == 2300
    assert plan["evaluations_per_sample"] == 16 and plan["evaluations"] == 36_800_000
    assert plan["bytes"] == 2_300_000 * (4 * 3 * 64 * 64 * 2 + 8)
    assert plan["measured"] is None and plan["relative_error"] is None
    assert plan["teacher_problem"].startswith("teacher.path: teachers/imagenet64-16: no such folder below")
    assert plan["folder"] is None
    assert plan["files_not_there"]["evaluation.reference"] == "weights/imagenet-64x64.npz"


def test_the_plan_is_what_is_made(tiny_data: Path) -> None:
    planned = json.loads(answer("plan", *TINY, f"storage.root={tiny_data}", "--json").stdout)
    assert planned["teacher_problem"] is None and planned["files_not_there"] == {}
    (folder,) = (tiny_data / "trajectories").iterdir()
    assert Path(planned["folder"]) == folder
    sizes = [path.stat().st_size for path in folder.glob("shard-*")]
    assert planned["num_shards"] == len(sizes)
    assert sum(sizes) == pytest.approx(planned["bytes"], abs=400 * len(sizes))  # a file has a header


@pytest.mark.slow
def test_the_cheapest_solver_within_a_tolerance_is_named_and_works(tmp_path: Path) -> None:
    found = answer("plan", *TINY, *GAUSSIAN, "--tolerance", "1e-3", "--nodes", "3")
    assert found.returncode == 0, found.stderr
    assert "off by" in found.stderr and "device-hours" in found.stdout
    told = json.loads(answer("plan", *TINY, *GAUSSIAN, "--tolerance", "1e-3", "--json").stdout)
    use = next(line for line in found.stdout.splitlines() if line.startswith("use")).split()[1:]
    assert use == [f"trajectories.{key}={told[key]}" for key in ("solver", "steps", "grid")]
    root = [f"storage.root={tmp_path}", "--launcher", "local", "--actors", "1"]
    made = dsno("gen-trajectories", *TINY, *GAUSSIAN, *use, "trajectories.dtype=float32", *root)
    assert made.returncode == 0, made.stderr

    import torch

    from dsno_cluster.diffusion.noise import sample_noise
    from dsno_cluster.teachers import gaussian_trajectory

    folder = next((tmp_path / "trajectories").iterdir())
    states = torch.from_numpy(safetensors.numpy.load_file(folder / "shard-000001.safetensors")["states"])
    noise = sample_noise(0, range(16, 32), (1, 8, 8))
    for number, t in enumerate((0.5625, 0.25, 0.0625, 0.0)):
        exact = gaussian_trajectory(noise, t, 0.3, 0.4)
        assert float((states[number] - exact).norm() / exact.norm()) < 1.2e-3


def test_measuring_says_seconds_and_errors() -> None:
    measured = json.loads(answer("plan", *TINY, *GAUSSIAN, "--measure", "--nodes", "2", "--json").stdout)
    cost = measured["measured"]
    assert cost["seconds_per_evaluation"] > 0 and cost["devices"] >= 2
    assert cost["device_hours"] == pytest.approx(
        cost["seconds_per_evaluation"] * measured["evaluations"] / 3600
    )
    assert measured["grid"] == "auto"
    assert cost["wall_hours"] == pytest.approx(cost["device_hours"] / cost["devices"])
    errors = measured["relative_error"]
    assert list(errors) == ["0.5625", "0.25", "0.0625", "0.0"] and all(0 < e < 0.5 for e in errors.values())


@pytest.mark.slow
def test_a_distilled_teacher_is_solved_on_its_own_steps(tmp_path: Path) -> None:
    published = DATA / "published" / "teacher_flax_x"
    config = tmp_path / "distilled.yaml"
    out = tmp_path / "teacher"
    imported = answer(
        "import-weights", str(published / "teacher"), "--config", str(published / "config.yaml"), "--out", str(out)
    )  # fmt: skip
    assert imported.returncode == 0, imported.stderr
    experiment, steps = distilled_experiment(out)
    config.write_text(json.dumps(experiment))
    root = [f"storage.root={tmp_path / 'root'}", "--launcher", "local", "--actors", "1"]
    made = dsno("gen-trajectories", str(config), *root)
    assert made.returncode == 0, made.stderr
    spec = json.loads(next(tmp_path.glob("root/trajectories/*/manifest.json")).read_text())["spec"]
    assert spec["grid"] == [(steps - i) / steps for i in range(steps + 1)]
    wrong = answer("gen-trajectories", str(config), f"trajectories.steps={steps * 2}", *root)
    assert wrong.returncode == 2 and f"has {steps} steps of its own" in wrong.stderr, wrong.stderr
    for solver in ("abm3", "dpmpp-2m", "heun"):
        other = answer("gen-trajectories", str(config), f"trajectories.solver={solver}", *root)
        assert other.returncode == 2 and "set trajectories.solver=ddim" in other.stderr, other.stderr
    grid = answer("gen-trajectories", str(config), "trajectories.grid=uniform", *root)
    assert grid.returncode == 2 and "set trajectories.grid=auto" in grid.stderr, grid.stderr
    chosen = load_config(str(config), [f"evaluation.teacher_steps=[1, 3, {steps // 2}, 64]"])
    rows = compared_samplings(chosen, find_teacher(chosen))
    assert [row.method.steps for row in rows] == [1, steps // 2, steps]  # through levels that it knows
    off = answer("gen-trajectories", str(config), "trajectories.times=[0.51, 0.0]", *root)
    assert off.returncode == 2 and "0.51 is not on the grid" in off.stderr, off.stderr
    asked = answer("plan", str(config), "--tolerance", "1e-3")
    assert asked.returncode == 2 and "steps of its own" in asked.stderr, asked.stderr


def test_inspect_tells_what_is_there(tiny_data: Path, tmp_path: Path) -> None:
    folder = next((tiny_data / "trajectories").iterdir())
    picture = tmp_path / "trajectories.png"
    found = answer("inspect", str(folder), "--json", "--shards", "99", "--out", str(picture))
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    files = [safetensors.numpy.load_file(path) for path in sorted(folder.glob("shard-*"))]
    states = np.concatenate([file["states"] for file in files], axis=1).astype(np.float64)
    assert told["samples_read"] == told["samples"] == 96 and told["shards"] == 6
    for line, values in zip(told["by_time"], states, strict=True):
        assert line["mean"] == pytest.approx(values.mean()) and line["std"] == pytest.approx(values.std())
        assert (line["min"], line["max"]) == (values.min(), values.max())
    labels = np.concatenate([file["labels"] for file in files])
    assert told["classes"] == np.bincount(labels, minlength=10).tolist()
    assert picture.read_bytes().startswith(b"\x89PNG")
    people = answer("inspect", str(folder / "manifest.json"))
    assert people.returncode == 0 and "96 trajectories of 1x8x8" in people.stdout
    assert answer("inspect", str(tmp_path)).returncode == 2


def test_inspect_holds_few_shards_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from data_sets import a_spec

    from dsno_cluster.provenance import NOWHERE
    from dsno_cluster.storage import open_storage
    from dsno_cluster.trajectories import inspect as module
    from dsno_cluster.trajectories.shards import Shard, commit_manifest, make_manifest, write_shard

    storage, alive, most = open_storage(str(tmp_path)), 0, 0
    states = torch.zeros(2, 4, 1, 2, 2)
    shards = tuple(write_shard(storage, "", index, 4 * index, {"states": states}) for index in range(40))
    commit_manifest(storage, "", make_manifest(a_spec((1, 2, 2), (0.5, 0.0), per_shard=4), shards, NOWHERE))
    read, lock = module.read_shard, threading.Lock()

    def gone() -> None:
        nonlocal alive
        with lock:
            alive -= 1

    def counted(*words: Any) -> dict[str, Any]:
        nonlocal alive, most
        shard: Shard = words[-1]
        if shard.start == 0:
            time.sleep(0.5)  # the others go on meanwhile
        tensors = read(*words)
        with lock:
            alive += 1
            most = max(most, alive)
        weakref.finalize(tensors["states"], gone)
        return tensors

    monkeypatch.setattr(module, "read_shard", counted)
    assert module.inspect(str(tmp_path), 40, None).samples_read == 160
    assert 1 <= most <= 8


@pytest.mark.parametrize("words", [["--tolerance", "2"], ["--tolerance", "small"], ["--probes", "0"]])
def test_wrong_options_of_plan_are_one_line(words: list[str]) -> None:
    refused = answer("plan", *words)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1
