"""Teachers whose network is compiled: the same answers, the same bytes, no more compilations than shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from edm_files import snapshot
from teacher_models import one_thread as one_thread  # fixtures
from teacher_models import relative
from tiny import DATA, TINY, dsno

from dsno_cluster import load_teacher, solve
from dsno_cluster.config import load_config
from dsno_cluster.errors import UserError
from dsno_cluster.teachers import find_teacher
from dsno_cluster.trajectories.spec import spec_of

pytestmark = pytest.mark.slow


def test_compiled_without_graph_breaks_once_for_each_shape() -> None:
    from torch._dynamo.utils import counters

    plain, compiled = (load_teacher("package:digits-teacher", compile=c) for c in (False, True))
    torch.manual_seed(0)
    counters.clear()
    for count in (8, 3, 8, 3):  # whole batches and a last one
        noise, labels = torch.randn(count, 1, 8, 8), torch.arange(count)
        found, expected = (
            solve(teacher, noise, [0.25, 0.0], "heun", 4, labels, guidance_scale=2.0)
            for teacher in (compiled, plain)
        )
        assert relative(found, expected) < 1e-4
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], counters


@pytest.mark.parametrize("name", ["adm", "dit"])  # SiT has the network of DiT
def test_state_dicts_compiled_without_graph_breaks(name: str) -> None:
    from torch._dynamo.utils import counters

    adm = {"num_head_channels": 8, "new_attention_order": False, "beta_schedule": "linear", "image_size": 16}
    options = adm if name == "adm" else {"family": name, "num_heads": 4}
    path = str(DATA / "state_dicts" / name / "weights.pt")
    plain, compiled = (load_teacher(path, options=options, compile=c) for c in (False, True))
    scale = 1.0 if name == "adm" else 2.0
    torch.manual_seed(0)
    counters.clear()
    for count in (4, 3, 4, 3):
        noise, labels = torch.randn(count, *plain.shape), torch.arange(count)
        found, expected = (
            solve(teacher, noise, [0.25, 0.0], "heun", 4, labels, guidance_scale=scale)
            for teacher in (compiled, plain)
        )
        assert relative(found, expected) < 1e-4
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], counters


def test_compiled_as_the_network_of_edm2(tmp_path: Path) -> None:
    """By inductor, whose results are compared: torch 2.14 compiles `torch.add` with an alpha wrongly."""
    path = snapshot("edm2_cond", tmp_path)
    plain, compiled = (load_teacher(path, compile=c) for c in (False, True))
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([2, 3])
    for t in (0.9, 0.3):
        assert relative(compiled(x, t, labels), plain(x, t, labels)) < 1e-5


def test_two_processes_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(
        "TORCHINDUCTOR_CACHE_DIR", raising=False
    )  # torch sets it when it compiles in this process
    words = [*TINY, "teacher.compile=true", "--actors", "1", "--launcher", "local"]
    made = []
    for name in ("one", "other"):
        done = dsno("gen-trajectories", *words, f"storage.root={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert "first compiles" in done.stderr
        made.append({p.name: p.read_bytes() for p in (tmp_path / name).glob("trajectories/*/shard-*")})
    assert made[0] and made[0] == made[1]
    # the kernels are kept, and are each run's own here: neither took them from the other
    assert all(any((tmp_path / name / "kernels").iterdir()) for name in ("one", "other"))


def test_a_compiled_teacher_makes_another_data_set() -> None:
    folders = set()
    for value in ("true", "false"):
        config = load_config("configs/digits.yaml", [f"teacher.compile={value}"])
        folders.add(spec_of(config, find_teacher(config)).folder)
    assert "trajectories/f68cf7a0ef8d6663/" in folders and len(folders) == 2


def test_a_teacher_without_a_network_is_not_compiled() -> None:
    options = {"mean": 0.0, "std": 0.5, "shape": [1, 8, 8]}
    with pytest.raises(UserError, match="no network to compile"):
        load_teacher("closed-form:gaussian", options=options, compile=True)
