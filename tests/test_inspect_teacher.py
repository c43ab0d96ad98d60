"""`inspect-teacher`: what it says of a teacher of each family, and that the YAML it prints is a config that `plan` accepts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edm_files import snapshot
from teacher_models import PUBLISHED, saved, saved_unet, weights_of
from teacher_models import STATE_DICTS as OPTIONS
from teacher_models import one_thread as one_thread  # fixtures
from teacher_models import small_diffusers_unet as small_diffusers_unet
from test_state_dicts import SMALL
from tiny import DATA, answer

from dsno_cluster import load_teacher
from dsno_cluster.teachers.inspection import proposed_unet
from dsno_cluster.yaml_text import dump_yaml, parse_yaml

NATIVE = {"schedule": "native"}
FUNCTION = """
import torch

class Shrink(torch.nn.Module):
    shape, num_classes = (2, 8, 4), 0

    def forward(self, x, t, labels):
        return 0.5 * x

def build(**options):
    return Shrink()
"""


@pytest.fixture
def teachers(
    tmp_path: Path, unet: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], tuple[str, dict[str, Any]]]:
    """Makes a teacher of a family; returns its path and its options."""

    def made(name: str) -> tuple[str, dict[str, Any]]:
        family, _, native = name.partition(" ")
        more = NATIVE if native else {}
        if family.startswith("edm-"):
            return snapshot(family.removeprefix("edm-"), tmp_path), more
        if family in OPTIONS:
            sized = {"image_size": 16} if family == "adm" else {}
            return str(weights_of(family)), OPTIONS[family] | sized | more
        if family == "consistency":
            saved_unet(tmp_path / "edm.pt", SMALL, two_dimensional=True)
            heads = {"family": "openai-edm", "num_heads": 1, "image_size": 8}
            return str(tmp_path / "edm.pt"), heads | more
        if family == "pipeline":
            return str(DATA / "dit_pipeline"), more
        if family == "diffusers":
            return saved(unet, tmp_path / "folder")[0], more
        if family == "flax":
            return str(PUBLISHED / "teacher_flax_x"), more
        if family == "function":
            (tmp_path / "inspected_function.py").write_text(FUNCTION)
            monkeypatch.syspath_prepend(str(tmp_path))
            return "inspected_function:build", {}
        if family == "closed":
            return "closed-form:gaussian", {"mean": 0.1, "std": 0.5, "shape": [3, 8, 16]}
        return "package:digits-teacher", {}

    return made


def words_of(options: dict[str, Any]) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in options.items()]


FAMILIES = {
    "ours": "U-Net of dsno-cluster, 827,873 parameters",
    "flax": "U-Net of dsno-cluster",
    "edm-ddpmpp_cond": "SongUNet of EDM",
    "edm-ddpmpp_cond native": "solver heun-edm, 18 as a rule, from sigma 80 to sigma 0.002, then the image\n",
    "edm-adm_iddpm native": "F, preconditioned by iDDPMPrecond",
    "edm-edm2_cond": "UNet of EDM2",
    "adm": "betas linear, 1000 levels; sigma 0.01 to 157.4",
    "adm native": "solver ddim, 250 as a rule, from sigma",
    "consistency native": "U-Net of consistency_models",
    "dit": "the states are latents: name an AutoencoderKL's folder as teacher.decoder\nclasses      10, and class 10, which",
    "dit native": 'classes      10, and class 10, which means "none"',
    "sit native": "solver ddim, 50 as a rule, from pure noise to sigma",
    "diffusers": "UNet2DModel",
    "diffusers native": "the noise eps",
    "pipeline": "dit_pipeline/vae, for images of 32x32 in 3 channels\n",
    "function": "your own function",
    "closed": "the exact denoiser of a gaussian",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_prints_is_a_config(
    family: str, teachers: Callable[[str], tuple[str, dict[str, Any]]], tmp_path: Path
) -> None:
    path, options = teachers(family)
    found = answer("inspect-teacher", path, *words_of(options))
    assert found.returncode == 0, found.stderr
    assert FAMILIES[family] in found.stdout
    said, _, pasted = found.stdout.partition("\n\n")
    base = parse_yaml(Path("configs/digits.yaml").read_text(), "digits.yaml")
    base |= parse_yaml(pasted, "pasted")
    base |= {
        "storage": {"root": str(tmp_path / "runs")},
        "evaluation": {"num_samples": 10, "metrics": ["trajectory_error"], "reference": "data"},
    }
    (tmp_path / "pasted.yaml").write_text(dump_yaml(base))
    planned = answer("plan", str(tmp_path / "pasted.yaml"))
    assert planned.returncode == 0, planned.stderr
    assert "fits" in planned.stdout
    teacher = load_teacher(path, options=options)
    channels, height, width = teacher.shape
    assert f"states       {channels} channels of {height}x{width}\n" in said
    if teacher.network is not None and family != "function":
        number = sum(p.numel() for p in teacher.network.parameters())
        assert f", {number:,} parameters" in said


@pytest.mark.parametrize("family", ["ours", "edm-adm_iddpm", "sit", "function"])
def test_as_json(family: str, teachers: Callable[[str], tuple[str, dict[str, Any]]]) -> None:
    path, options = teachers(family)
    found = json.loads(answer("inspect-teacher", path, *words_of(options), "--json").stdout)
    teacher = load_teacher(path, options=options)
    assert (tuple(found["shape"]), found["num_classes"], found["null_class"]) == (
        teacher.shape,
        teacher.num_classes,
        teacher.null_class,
    )
    assert found["sections"]["network"]["num_classes"] == teacher.num_classes
    if family == "sit":
        assert found["sigmas"] == [0.0, None] and found["times"][1] == 1.0  # pure noise is no number of JSON


def test_licences_that_the_folder_has(tmp_path: Path, unet: Any) -> None:
    path, _ = saved(unet, tmp_path)
    assert "\nlicence " not in answer("inspect-teacher", path).stdout
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags:\n- x\n---\n# A model\n")
    (tmp_path / "LICENSE.txt").write_text(
        "\n  # Attribution-NonCommercial 4.0\x1b[31m International\n" + 4096 * "more "
    )
    said = answer("inspect-teacher", path).stdout
    assert "licence      README.md: license: apache-2.0\n" in said
    assert "licence      LICENSE.txt: Attribution-NonCommercial 4.0 [31m International\n" in said
    for broken in ("---\nlicense: [\n---\n", "no front matter", "---\n- 1\n---\n", "---\nlicense"):
        (tmp_path / "README.md").write_text(broken)
        found = answer("inspect-teacher", path)
        assert found.returncode == 0 and "README.md" not in found.stdout
    shutil.copy(weights_of("dit"), tmp_path / "dit.pt")
    beside = answer("inspect-teacher", str(tmp_path / "dit.pt"), *words_of(OPTIONS["dit"])).stdout
    assert "LICENSE.txt: Attribution" in beside


WRONG: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "name one PATH"),
    "two": (["a", "b"], "name one PATH"),
    "nowhere": (["/nowhere/at/all"], "/nowhere/at/all"),
    "no teacher": (["configs"], "configs: no"),
    "unknown option": (["package:digits-teacher", "heads=4"], "unknown teacher option heads"),
    "missing option": ([str(weights_of("dit")), "num_heads=4"], "one of: dit, sit"),
    "no size": ([str(weights_of("adm")), *words_of(OPTIONS["adm"])], "image_size=64"),
    "no YAML": (["package:digits-teacher", "schedule=[1"], "not YAML"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_teacher_is_one_line(case: str) -> None:
    words, said = WRONG[case]
    found = answer("inspect-teacher", *words)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.count("\n") == 1 and said in found.stderr, found.stderr


@pytest.mark.parametrize(
    "size", [(8, 8), (7, 9), (12, 20), (16, 16), (28, 28), (32, 64), (64, 64), (96, 96), (256, 256)]
)
def test_a_proposed_unet_can_be_built(size: tuple[int, int]) -> None:
    from dsno_cluster.config import Network
    from dsno_cluster.networks.unet import UNet

    network = Network(
        state_size=size,
        state_channels=3,
        **{
            key: tuple(value) if isinstance(value, list) else value
            for key, value in proposed_unet(*size).items()
        },
    )
    assert network.missing_sizes == []
    with torch.device("meta"):
        UNet(network)
