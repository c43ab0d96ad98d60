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
from dsno_cluster.storage import FolderStorage
from dsno_cluster.teachers import find_teacher
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.spec import spec_of


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_compiled_as_the_network_of_edm2(tmp_path: Path) -> None:
    """By inductor, whose results are compared: torch 2.14 compiles `torch.add` with an alpha wrongly."""
    path = snapshot("edm2_cond", tmp_path)
    plain, compiled = (load_teacher(path, compile=c) for c in (False, True))
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([2, 3])
    for t in (0.9, 0.3):
        assert relative(compiled(x, t, labels), plain(x, t, labels)) < 1e-5


@pytest.mark.slow
def test_two_processes_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(
        "TORCHINDUCTOR_CACHE_DIR", raising=False
    )  # torch sets it when it compiles in this process
    words = [*TINY, "teacher.precision=bfloat16", "--actors", "1", "--launcher", "local"]
    made = []
    for name in ("one", "other"):
        done = dsno("gen-trajectories", *words, f"storage.root={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert "compiles the teacher" in done.stderr
        made.append({p.name: p.read_bytes() for p in (tmp_path / name).glob("trajectories/*/shard-*")})
    assert made[0] and made[0] == made[1]
    # the kernels are kept, and are each run's own here: neither took them from the other
    assert all(any((tmp_path / name / "kernels").iterdir()) for name in ("one", "other"))


def test_a_compiled_teacher_makes_another_data_set() -> None:
    """With auto the precision decides, and nothing that a machine has."""
    names = {
        (precision, compile): spec_of(config, find_teacher(config)).hash
        for precision in ("float32", "tf32", "bfloat16", "float16")
        for compile in ("auto", "true", "false")
        for config in [
            load_config(
                "configs/digits.yaml", [f"teacher.precision={precision}", f"teacher.compile={compile}"]
            )
        ]
    }
    assert names["float32", "false"] == names["float32", "auto"] == "f68cf7a0ef8d6663"
    assert names["tf32", "false"] == names["tf32", "auto"] != names["tf32", "true"]
    # as earlier versions named them
    assert names["bfloat16", "auto"] == names["bfloat16", "true"] == "c3aa8fb770c8e436"
    assert names["bfloat16", "false"] == "b5246bebf392b8e6"
    assert names["float16", "auto"] == names["float16", "true"] != names["float16", "false"]
    assert len(set(names.values())) == 8


def test_a_data_set_of_an_earlier_version_in_bfloat16_is_found(tmp_path: Path) -> None:
    """It was not compiled unless that was asked for."""
    there = ["teacher.precision=bfloat16", f"storage.root={tmp_path}"]
    former = "trajectories/b5246bebf392b8e6/"
    assert make_plan(load_config("configs/digits.yaml", there)).spec.compiled
    FolderStorage(tmp_path).write(f"{former}progress.json", b"{}")
    for compile, folder in (("auto", former), ("false", former), ("true", "trajectories/c3aa8fb770c8e436/")):
        plan = make_plan(load_config("configs/digits.yaml", [*there, f"teacher.compile={compile}"]))
        assert plan.folder == folder and plan.spec.compiled == (compile == "true")


def test_auto_compiles_nothing_that_has_no_network(tmp_path: Path) -> None:
    options = "{mean: 0, std: 0.5, shape: [1, 8, 8]}"
    words = ["teacher.path=closed-form:gaussian", f"teacher.options={options}", "teacher.precision=bfloat16"]
    config = load_config("configs/digits.yaml", [*words, "network.num_classes=0", "network.null_class=false"])
    assert not find_teacher(config).compiled


def test_a_teacher_without_a_network_is_not_compiled() -> None:
    options = {"mean": 0.0, "std": 0.5, "shape": [1, 8, 8]}
    with pytest.raises(UserError, match="no network to compile"):
        load_teacher("closed-form:gaussian", options=options, compile=True)
