"""What names a data set: a typed spec, whose hash stays what it was."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from data_sets import a_spec
from edm_files import snapshot
from teacher_models import PUBLISHED
from tiny import DATA, TINY, answer

from dsno_cluster.config import Config, Network, load_config
from dsno_cluster.config.base import Named, later
from dsno_cluster.diffusion.solvers import solve
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.evaluation.watch import settings_hashes
from dsno_cluster.provenance import NOWHERE
from dsno_cluster.storage import FolderStorage
from dsno_cluster.teachers import find_teacher, load_teacher
from dsno_cluster.training.identity import Inputs, check_same_run, run_identity
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.shards import make_manifest
from dsno_cluster.trajectories.spec import (
    TrajectorySpec,
    former_specs,
    read_spec,
    solve_samples,
    solve_shard,
    spec_of,
)

FLAX = PUBLISHED / "teacher_flax_x"
UNCONDITIONAL = ("network.num_classes=0", "network.null_class=false")
# the folder of a data set of each family of teachers, as the first version named it
GOLDEN: dict[str, tuple[str, list[str]]] = {
    "ours": ("f68cf7a0ef8d6663", []),
    "gaussian": (
        "e343a7747c62c89b",
        [
            "teacher.path=closed-form:gaussian",
            "teacher.options={mean: 0, std: 0.5, shape: [1, 8, 8]}",
            *UNCONDITIONAL,
        ],
    ),
    "mixture": (
        "9dc04160507e7b6b",
        [
            "teacher.path=closed-form:mixture",
            "teacher.options={means: [0.5, -0.5], stds: 0.25, shape: [1, 8, 8], classes: [0, 1], null_class: true}",
            "network.num_classes=2",
        ],
    ),
    "published": (
        "8e015dc3701db791",  # with the dropout of its YAML, which later versions leave out
        [
            f"teacher.path={FLAX}/teacher",
            f"teacher.options={{config: {FLAX}/config.yaml}}",
            *("network.image_size=16", "network.channels=3", "network.null_class=false"),
            *("network.attention_resolutions=[8]", "trajectories.solver=ddim", "trajectories.steps=16"),
            "trajectories.times={spacing: uniform, points: 4}",
        ],
    ),
    "factory": (
        "586be1c2d2f6cc78",
        [
            "teacher.path=golden_teacher:build",
            "teacher.options={shrink: 0.5, sizes: [1, 2]}",
            "trajectories.solver=heun",
            *UNCONDITIONAL,
        ],
    ),
    "diffusers": (
        "e534d53ec91f93f7",
        [
            f"teacher.path={DATA}/golden_diffusers",
            "teacher.options={schedule: native}",
            *("trajectories.solver=ddim", "trajectories.steps=10", "trajectories.times=[0.0]"),
            "student.modes=1",
            *UNCONDITIONAL,
        ],
    ),
    "openai-adm": (
        "e3fb89064fa7a7b5",
        [
            f"teacher.path={DATA}/state_dicts/adm/weights.pt",
            "teacher.options={num_head_channels: 8, new_attention_order: false, beta_schedule: linear, image_size: 16}",
            *(
                "network.image_size=16",
                "network.channels=3",
                "network.num_classes=6",
                "network.null_class=false",
            ),
            "network.attention_resolutions=[8]",
        ],
    ),
    "dit": (
        "96d0939fd3515d64",
        [
            f"teacher.path={DATA}/state_dicts/dit/weights.pt",
            "teacher.options={family: dit, num_heads: 4, schedule: native}",
            *("network.channels=4", "trajectories.steps=10", "trajectories.times=[0.0]", "student.modes=1"),
        ],
    ),
    "sit": (
        "baf89307a4d02206",
        [
            f"teacher.path={DATA}/state_dicts/sit/weights.pt",
            "teacher.options={family: sit, num_heads: 4}",
            "network.channels=4",
        ],
    ),
}


@pytest.fixture(autouse=True)
def golden_teacher_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(DATA)])


def spec_and_former(config: Config) -> tuple[TrajectorySpec, ...]:
    teacher = find_teacher(config)
    spec = spec_of(config, teacher)
    return spec, *former_specs(spec, teacher)


@pytest.mark.parametrize("family", GOLDEN)
def test_hashes_are_those_of_the_first_version(family: str) -> None:
    golden, overrides = GOLDEN[family]
    config = load_config("configs/digits.yaml", overrides)
    specs = spec_and_former(config)
    assert specs[-1].hash == golden
    for spec in specs:  # as its manifest has it
        content = json.loads(json.dumps(make_manifest(spec, [], NOWHERE).spec))
        assert read_spec(content, "here") == spec and read_spec(content, "here").hash == spec.hash


OTHER_SCHEDULES = {
    "EDM": ("5115c9ad3e987f0a", {"_class_name": "EDMEulerScheduler", "sigma_max": 40.0}),
    "a flow": ("d774d5cfcc58fd6e", {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}),
    "a consistency model": ("0299b4b2c049e9aa", {"_class_name": "CMStochasticIterativeScheduler"}),
    "zero terminal SNR": (
        "668b273e4f5e2d5e",
        {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ),
}


@pytest.mark.parametrize("kind", OTHER_SCHEDULES)
def test_hashes_of_other_schedules_of_diffusers(kind: str, tmp_path: Path) -> None:
    golden, scheduler = OTHER_SCHEDULES[kind]
    folder = shutil.copytree(DATA / "golden_diffusers", tmp_path / "teacher")
    (folder / "scheduler_config.json").write_text(json.dumps(scheduler))
    steps = 1 if kind == "a consistency model" else 10
    words = [*GOLDEN["diffusers"][1], f"teacher.path={folder}", f"trajectories.steps={steps}"]
    (spec,) = spec_and_former(load_config("configs/digits.yaml", words))
    assert spec.hash == golden
    content = json.loads(json.dumps(make_manifest(spec, [], NOWHERE).spec))
    assert read_spec(content, "here") == spec


@pytest.mark.parametrize(
    ("name", "golden"), [("edm2_cond", "191da0e39f4d9afd"), ("ncsnpp_ve", "917a7cadce4ac90c")]
)
def test_hashes_of_snapshots_of_edm(name: str, golden: str, tmp_path: Path) -> None:
    classes = ("network.num_classes=3",) if name == "edm2_cond" else UNCONDITIONAL
    words = [f"teacher.path={snapshot(name, tmp_path)}", "network.channels=3", *classes]
    spec = spec_of(config := load_config("configs/digits.yaml", words), find_teacher(config))
    assert spec.hash == golden
    content = json.loads(json.dumps(make_manifest(spec, [], NOWHERE).spec))
    assert read_spec(content, "here") == spec


def test_dropout_is_no_part_of_what_names_a_data_set(tmp_path: Path) -> None:
    """It acts in training only. A data set that was named with it is still found, whole or unfinished."""
    yaml = (FLAX / "config.yaml").read_text()
    assert "dropout: 0.1" in yaml
    (tmp_path / "none.yaml").write_text(yaml.replace("dropout: 0.1", "dropout: 0.0"))
    golden, overrides = GOLDEN["published"]
    there = [*overrides, f"storage.root={tmp_path / 'runs'}"]
    none = [*there, f"teacher.options={{config: {tmp_path / 'none.yaml'}}}"]
    folders = {make_plan(load_config("configs/digits.yaml", words)).folder for words in (there, none)}
    assert len(folders) == 1 and f"trajectories/{golden}/" not in folders
    for file in ("progress.json", "manifest.json"):
        FolderStorage(tmp_path / "runs").write(f"trajectories/{golden}/{file}", b"{}")
        assert make_plan(load_config("configs/digits.yaml", there)).folder == f"trajectories/{golden}/"
        FolderStorage(tmp_path / "runs").delete(f"trajectories/{golden}/{file}")


def test_a_run_on_a_data_set_of_a_former_name_is_the_same_run(tmp_path: Path) -> None:
    """Also online, where no data set was written that could be found by its former name."""
    golden, overrides = GOLDEN["published"]
    root = [f"storage.root={tmp_path}", "training.online=true", "reader.shuffle=none"]
    config = load_config("configs/digits.yaml", [*overrides, *root])
    plan = make_plan(config)
    former = f"trajectories/{golden}/"
    assert plan.folder != former and plan.other_folders == (former,)
    saved, now = (run_identity(config, Inputs(folder)) for folder in (former, plan.folder))
    check_same_run("there", saved, now, (plan.folder, *plan.other_folders))
    other = saved.model_copy(update={"trajectories": "trajectories/0123456789abcdef/"})
    with pytest.raises(UserError, match="was saved with trajectories"):
        check_same_run("there", other, now, (plan.folder, *plan.other_folders))


@pytest.mark.parametrize(
    ("name", "golden"), [("digits", "d083451669fef101"), ("imagenet64", "1269a3efb5251009")]
)
def test_the_settings_of_an_evaluation_are_named_as_before(name: str, golden: str) -> None:
    """`eval --watch` does not measure again what an earlier version measured; the second names files by relative paths."""
    config = load_config(f"configs/{name}.yaml", ["evaluation.compile=false"])  # as the files said then
    assert settings_hashes(config)[0] == golden


def test_a_key_that_is_added_later_changes_no_hash() -> None:
    """As long as it has its default, which means what was done before there was one."""

    class LaterNetwork(Network):
        gate: bool = later(False)

    network = load_config("configs/digits.yaml").network
    now = LaterNetwork(**dict(network))
    assert now.model_dump(mode="json") == network.model_dump(mode="json")
    used = LaterNetwork(**dict(network), gate=True)
    assert used.model_dump(mode="json") == {**network.model_dump(mode="json"), "gate": True}

    class Ordinary(Named):
        key: int = 0

    assert Ordinary().model_dump() == {"key": 0}  # others are always there


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teacher": {"kind": "oracle"}}, "teacher of kind 'oracle'"),
        ({"schedule": "linear"}, "schedule"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_a_spec_that_this_version_does_not_know_is_one_line(change: dict[str, Any], said: str) -> None:
    content = a_spec().model_dump(mode="json") | change
    with pytest.raises(UserError, match=rf"^here: .*{said}"):
        read_spec(content, "here")


def test_a_shard_is_a_function_of_the_spec() -> None:
    """Actors compute from it: `solve_shard` gives what `solve` gives with the config's own settings."""
    overrides = [
        "trajectories.samples_per_shard=8",
        "trajectories.batch_size=4",
        "trajectories.num_samples=16",
    ]
    guided = [
        "trajectories.guidance_scale=2.0",
        "trajectories.clip_denoised=true",
        "trajectories.dtype=float32",
    ]
    config = load_config("configs/digits.yaml", [*overrides, *guided])
    found = find_teacher(config)
    spec, teacher = spec_of(config, found), found.load()
    from dsno_cluster.diffusion.noise import sample_labels, sample_noise

    settings, indices = config.trajectories, range(8, 16)
    noise, labels = sample_noise(0, indices, (1, 8, 8)), sample_labels(0, indices, 10)
    expected = solve(
        teacher, noise, settings.time_points, settings.solver, settings.steps, labels, 2.0, clip_denoised=True
    )
    made = solve_shard(read_spec(spec.model_dump(mode="json"), "here"), teacher, 1)
    assert torch.equal(made["labels"], labels)
    assert torch.allclose(made["states"].transpose(0, 1), expected, atol=1e-5)


def test_own_steps_end_on_the_prediction_also_from_the_spec() -> None:
    """The grid of a native schedule is written out in the spec; its end is that of the teacher's own sampler."""
    config = load_config("configs/digits.yaml", GOLDEN["published"][1])
    found = find_teacher(config)
    spec, teacher = spec_of(config, found), load_teacher(found.path, options=config.teacher.options)
    from dsno_cluster.diffusion.noise import sample_labels, sample_noise

    noise, labels = sample_noise(0, range(2), (3, 16, 16)), sample_labels(0, range(2), 10)
    expected = solve(teacher, noise, spec.times, "ddim", 16, labels)
    assert torch.equal(solve_samples(spec, teacher, 0, range(2))[0], expected)


def test_times_are_one_but_for_rounding() -> None:
    """1 - 1/3 and 2/3 differ in the last bit: an imported student's grid is not refused for it."""
    thirds = [1 - i / 3 for i in (1, 2)] + [0.0]
    config = load_config("configs/digits.yaml", [f"trajectories.times={thirds}", "student.modes=3"])
    uniform = ["trajectories.times={spacing: uniform, points: 3}", "student.modes=3"]
    exact = load_config("configs/digits.yaml", uniform)
    assert config.trajectories.time_points != exact.trajectories.time_points
    teacher = load_teacher("closed-form:gaussian", options={"mean": 0.1, "std": 0.5, "shape": [1, 2, 2]})
    noise = torch.randn(2, 1, 2, 2)
    grid = tuple((6 - i) / 6 for i in range(7))
    states = [
        solve(teacher, noise, times, "ddim", 6, grid=grid)
        for times in (config.trajectories.time_points, exact.trajectories.time_points)
    ]
    assert torch.equal(*states)


def bytes_kept(root: object) -> int:
    """The bytes of files and tensors that can be reached from an object."""
    seen, left, total = set(), [root], 0
    while left:
        here = left.pop()
        if id(here) in seen or isinstance(here, type | ModuleType | FunctionType):
            continue
        seen.add(id(here))
        total += len(here) if isinstance(here, bytes) else 0
        total += here.nbytes if isinstance(here, torch.Tensor) else 0
        left += gc.get_referents(here)
    return total


@pytest.mark.parametrize("family", ["ours", "published", "diffusers"])
def test_a_teacher_forgets_its_weights_but_not_what_is_known(family: str) -> None:
    found = find_teacher(load_config("configs/digits.yaml", GOLDEN[family][1]))
    network = found.load().network
    assert network is not None
    size = sum(p.nbytes for p in network.parameters())
    assert bytes_kept(found) >= size
    found.forget()
    assert bytes_kept(found) < size / 100
    assert found.load().identity == found.info.identity


def test_a_teacher_that_is_replaced_after_it_is_forgotten_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / "golden_diffusers", tmp_path / "teacher")
    words = [*GOLDEN["diffusers"][1], f"teacher.path={folder}"]
    found = find_teacher(load_config("configs/digits.yaml", words))
    file = next(folder.rglob("*.safetensors"))
    weights = safetensors.torch.load_file(file)
    safetensors.torch.save_file({name: tensor + 1 for name, tensor in weights.items()}, file)
    found.load()  # as it was read
    found.forget()
    with pytest.raises(WorkError, match="the teacher has changed since this command began"):
        found.load()


def test_a_teacher_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`plan --measure` knows it, loads it and solves with it: each of its files is read once, and hashed once."""
    reads: Counter[str] = Counter()
    read = FolderStorage.read

    def counted(self: FolderStorage, key: str, start: int = 0, end: int | None = None) -> bytes:
        reads[key] += end is None  # not what looks at a header
        return read(self, key, start, end)

    monkeypatch.setattr(FolderStorage, "read", counted)
    overrides = GOLDEN["diffusers"][1]
    for teacher, weights in (
        ([f"teacher.path={DATA}/golden_diffusers", *UNCONDITIONAL], "diffusion_pytorch_model.safetensors"),
        ([], "model.safetensors"),
        (overrides, "diffusion_pytorch_model.safetensors"),
    ):
        reads.clear()
        done = answer(
            "plan", "configs/digits.yaml", *TINY, *teacher, "--measure", "--probes", "2", cwd=Path()
        )
        assert done.returncode == 0, done.stderr
        assert reads[weights] == 1 and max(reads.values()) == 1, reads
