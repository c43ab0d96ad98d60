"""What only a GPU can show; `make test-gpu` runs it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import TINY, dsno

from dsno_cluster import load_teacher, solve

pytestmark = pytest.mark.gpu


def test_a_shard_made_twice_has_the_same_bytes(tmp_path: Path) -> None:
    made = []
    for name, share in (("one", "1"), ("other", "0.5")):
        words = ["gen-trajectories", *TINY, f"storage.root={tmp_path / name}", "--launcher", "local"]
        done = dsno(*words, "--gpus-per-actor", share)
        assert done.returncode == 0, done.stderr
        made.append({p.name: p.read_bytes() for p in (tmp_path / name).glob("trajectories/*/shard-*")})
    assert len(made[0]) == 6 and made[0] == made[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    done = dsno("gen-trajectories", *TINY, f"storage.root={root}", "--launcher", "local")
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_a_training_step(precision: str, data: Path) -> None:
    words = ["train", *TINY, f"storage.root={data}", f"name={precision}", f"training.precision={precision}"]
    done = dsno(*words, "--launcher", "local", PYTHONWARNINGS="default,ignore::ResourceWarning")
    assert done.returncode == 0 and f"rank(s), ZeRO stage {int(precision == 'float16')}" in done.stderr
    assert "arning" not in done.stderr + done.stdout, done.stderr
    assert (data / "students" / precision / "step-000000004/model.safetensors").is_file()


def test_a_teacher_without_a_network_keeps_states_on_the_device() -> None:
    options = {"mean": 0.2, "std": 0.5, "shape": [1, 8, 8]}
    teacher = load_teacher("closed-form:gaussian", options=options).to(torch.device("cuda"))
    noise = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    there, here = (solve(teacher, x, [0.5, 0.0], "heun", 8) for x in (noise.cuda(), noise))
    assert there.is_cuda and not here.is_cuda
    torch.testing.assert_close(there.cpu(), here)
