"""Teachers of every kind against truth from elsewhere: published outputs, diffusers' own sampler, closed forms."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import safetensors.torch
import torch
import yaml
from tiny import DATA, dsno
from torch import Tensor

from dsno_cluster import load_teacher, solve
from dsno_cluster.config import Network, load_config, with_absolute_paths
from dsno_cluster.device import compute_device
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.diffusion.schedule import alpha_sigma, logsnr
from dsno_cluster.diffusion.solvers import guided
from dsno_cluster.diffusion.teachers import (
    Teacher,
    check_fits,
    mixture_teacher,
    teacher_identity,
    teacher_info,
    warm_start_weights,
)
from dsno_cluster.errors import UserError
from dsno_cluster.models.importers import import_weights
from dsno_cluster.models.unet import UNet
from dsno_cluster.models.weights import software_versions
from dsno_cluster.trajectories.generate import solve_batch
from dsno_cluster.trajectories.plan import make_plan, open_teacher

PUBLISHED = DATA / "published"
FLAX = ["teacher_flax_x", "teacher_flax_both"]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def along(teacher: Teacher, noise: Tensor, steps: int, labels: Tensor | None = None) -> Tensor:
    """DDIM's states at every one of the teacher's own steps, (N, steps, C, H, W)."""
    grid = teacher.native_grid(steps)
    assert grid is not None
    return solve(teacher, noise, grid[1:], "ddim", steps, labels)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- published progressive-distillation checkpoints ---------------------------------------------------------


@pytest.mark.parametrize("name", FLAX)
@pytest.mark.parametrize("door", ["file", "folder", "imported"])
def test_outputs_of_published_teachers(name: str, door: str, tmp_path: Path) -> None:
    folder = PUBLISHED / name
    expected = safetensors.torch.load_file(folder / "expected.safetensors")
    if door == "file":
        teacher = load_teacher(str(folder / "teacher"), config=str(folder / "config.yaml"))
    elif door == "folder":
        teacher = load_teacher(str(folder))
    else:
        import_weights(str(folder / "teacher"), str(folder / "config.yaml"), str(tmp_path / "a" / "b"))
        teacher = load_teacher(str(tmp_path / "a" / "b"))
    found = torch.stack([teacher(expected["x"], t, expected["labels"]) for t in expected["times"]], dim=1)
    assert relative(found, expected["output"]) < 1e-5
    # distilled to 16 steps, whatever number is asked for
    assert teacher.native_grid(512) == tuple(1 - i / 16 for i in range(17))
    assert teacher.num_classes == int(
        yaml.safe_load((folder / "config.yaml").read_text())["model"]["num_classes"]
    )


def test_own_steps_of_a_distilled_teacher_are_ddim_steps() -> None:
    teacher = load_teacher(str(PUBLISHED / "teacher_flax_x"))
    noise, labels = torch.randn(1, *teacher.shape), torch.zeros(1, dtype=torch.int64)
    for solver in ("heun", "dpmpp-2m", "abm3"):
        with pytest.raises(ValueError, match="one step of 'ddim'"):
            solve(teacher, noise, [0.5, 0.0], solver, 16, labels)
        assert solve(teacher, noise, [0.5], solver, 2, labels, grid="uniform").isfinite().all()  # as asked
    states = solve(teacher, noise, [0.5, 0.0], "ddim", 16, labels)
    assert torch.equal(solve(teacher, noise, [0.5, 0.0], "ddim", 4, labels), states)  # its own 16, always
    plain = load_teacher(str(PUBLISHED / "teacher_flax_x"), schedule="continuous")
    assert solve(plain, noise, [0.5], "abm3", 4, labels).isfinite().all()


@pytest.mark.parametrize("mean_type", ["eps", "v"])
def test_other_parametrisations_of_published_teachers(mean_type: str, tmp_path: Path) -> None:
    """The x fixture's expected output is the bare output of its network."""
    folder = PUBLISHED / "teacher_flax_x"
    expected = safetensors.torch.load_file(folder / "expected.safetensors")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["model"]["mean_type"] = mean_type
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    teacher = load_teacher(str(folder / "teacher"), config=str(tmp_path / "config.yaml"))
    for i, t in enumerate(expected["times"]):
        alpha, sigma = (
            torch.sigmoid(expected["logsnr"][i]).sqrt(),
            torch.sigmoid(-expected["logsnr"][i]).sqrt(),
        )
        x, output = expected["x"], expected["output"][:, i]
        x0 = (x - sigma * output) / alpha if mean_type == "eps" else alpha * x - sigma * output
        assert relative(teacher(x, t, expected["labels"]), x0) < 2e-5


def flax_tree(unet: UNet) -> dict[str, dict[str, Any]]:
    """A network of ours under flax's names, shapes and layouts, written out from the published flax code."""
    tree: dict[str, Any] = {}

    def put(name: str, value: Tensor) -> None:
        node = tree
        *parents, leaf = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value

    def dense(name: str, layer: Any) -> None:
        put(f"{name}/kernel", layer.weight.flatten(1).T)
        put(f"{name}/bias", layer.bias)

    def conv(name: str, layer: Any) -> None:
        put(f"{name}/kernel", layer.weight.permute(2, 3, 1, 0))
        put(f"{name}/bias", layer.bias)

    def norm(name: str, layer: Any) -> None:  # padded, as old flax wrote them
        put(f"{name}/scale", layer.weight[None, None, None])
        put(f"{name}/bias", layer.bias[None, None, None])

    def residual(name: str, block: Any) -> None:
        norm(f"{name}/norm1", block.norm_in)
        conv(f"{name}/conv1", block.conv_in)
        dense(f"{name}/temb_proj", block.film)
        norm(f"{name}/norm2", block.norm_out)
        conv(f"{name}/conv2", block.conv_out)
        if not isinstance(block.skip, torch.nn.Identity):
            dense(f"{name}/nin_shortcut", block.skip)

    def attention(name: str, block: Any) -> None:
        heads, channels = block.heads, block.out.weight.shape[0]
        size = channels // heads
        norm(f"{name}/norm", block.norm)
        for h in range(heads):  # head by head: rows [q | k | v] of each
            for i, letter in enumerate("qkv"):
                rows = slice((3 * h + i) * size, (3 * h + i + 1) * size)
                kernel, bias = block.qkv.weight[rows, :, 0, 0], block.qkv.bias[rows]
                node = tree.setdefault(name, {}).setdefault(letter, {"kernel": [], "bias": []})
                node["kernel"].append(kernel.T)
                node["bias"].append(bias)
        for letter in "qkv":
            node = tree[name][letter]
            tree[name][letter] = {
                "kernel": torch.stack(node["kernel"], 1),
                "bias": torch.stack(node["bias"]),
            }
        put(f"{name}/proj_out/kernel", block.out.weight[:, :, 0, 0].T.reshape(heads, size, channels))
        put(f"{name}/proj_out/bias", block.out.bias)

    dense("dense0", unet.embed_level_in)
    dense("dense1", unet.embed_level_out)
    if unet.embed_class is not None:
        dense("class_emb", unet.embed_class)
    conv("conv_in", unet.conv_in)
    for side, resample in (("down", "downsample"), ("up", "upsample")):
        for i, level in enumerate(getattr(unet, side)):
            n = i if side == "down" else len(unet.up) - 1 - i
            for j, block in enumerate(level.blocks):
                residual(f"{side}_{n}.block_{j}", block.residual)
                if block.attention is not None:
                    attention(f"{side}_{n}.attn_{j}", block.attention)
            if level.resample is not None:
                residual(f"{side}_{n}.{resample}", level.resample)
    residual("mid.block_1", unet.middle_in.residual)
    attention("mid.attn_1", unet.middle_in.attention)
    residual("mid.block_2", unet.middle_out)
    norm("norm_out", unet.norm_out)
    conv("conv_out", unet.conv_out)
    return tree


def packed(tree: Any, dtype: str = "float32") -> Any:
    """Tensors as flax writes them: msgpack extension 1 of (shape, dtype name, bytes)."""
    if isinstance(tree, dict):
        return {key: packed(value, dtype) for key, value in tree.items()}
    if not isinstance(tree, Tensor):
        return tree
    data = tree.detach().to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy().tobytes()
    return msgpack.ExtType(1, msgpack.packb((list(tree.shape), dtype, data)))


SIZES = {
    "three levels, two blocks, no classes": (
        {"image_size": 16, "channels": 1, "width": 32, "multipliers": (1, 2, 3), "blocks_per_level": 2},
        {"attention_resolutions": (4,), "heads": 4, "embedding_dim": 96},
    ),
    "one level, classes, head size": (
        {"image_size": 8, "channels": 3, "num_classes": 7, "width": 64, "multipliers": (1,)},
        {"blocks_per_level": 1, "attention_resolutions": (8,), "head_dim": 16, "embedding_dim": 64},
    ),
    "a first level narrower than an attention head": (
        {"image_size": 8, "channels": 3, "num_classes": 3, "width": 32, "multipliers": (1, 2)},
        {"blocks_per_level": 1, "attention_resolutions": (4,), "head_dim": 64, "embedding_dim": 32},
    ),
    "a first level that does not divide into the heads of the middle": (
        {"image_size": 8, "channels": 3, "width": 32, "multipliers": (1, 3)},
        {"blocks_per_level": 1, "heads": 3, "embedding_dim": 32},
    ),
    "head size over several widths": (
        {"image_size": 8, "channels": 2, "num_classes": 2, "width": 32, "multipliers": (2, 1)},
        {"blocks_per_level": 3, "attention_resolutions": (4, 8), "head_dim": 32, "embedding_dim": 128},
    ),
}


def random_unet(network: Network, out_channels: int) -> UNet:
    torch.manual_seed(0)
    unet = UNet(network, out_channels=out_channels)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return unet.eval()


def published_yaml(network: Network, **model: Any) -> dict[str, Any]:
    data = {"image_size": network.image_size, "num_channels": network.channels}
    theirs = {
        "nf": network.width,
        "ch_mult": list(network.multipliers),
        "temb_dim": network.embedding_dim,
        "num_classes": network.num_classes,
        "num_res_blocks": network.blocks_per_level,
        "attn_resolutions": [*network.attention_resolutions, 999],  # a size that no level has does nothing
        "mean_type": "x",
        "time_conv": True,  # the students' YAML is what comes with the published teachers
    }
    theirs |= {"head_dim": network.head_dim} if network.head_dim else {"num_attn_heads": network.heads}
    return {"data": data, "model": theirs | model}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("inferred", [False, True])
def test_published_teachers_of_other_sizes(size: str, both: bool, inferred: bool, tmp_path: Path) -> None:
    network = Network(**SIZES[size][0], **SIZES[size][1])
    unet = random_unet(network, network.channels * (2 if both else 1))
    tree = flax_tree(unet)
    moments = {"0": tree, "1": {"w": torch.zeros(3, dtype=torch.int32)}}  # optimiser state: not read
    content = {"step": 5, "optimizer": packed(moments), "ema_params": packed(tree)}
    if both:
        content["num_sample_steps"] = msgpack.ExtType(1, msgpack.packb(([], "int32", b"\x04\0\0\0")))
    (tmp_path / "some_teacher").write_bytes(msgpack.packb(content))
    settings = published_yaml(network)
    if inferred:  # the YAML says just what tensors cannot tell
        settings = {"data": {"image_size": network.image_size}, "model": {"mean_type": "x"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))

    teacher = load_teacher(str(tmp_path))
    x = torch.randn(2, network.channels, network.image_size, network.image_size)
    labels = torch.tensor([0, 1]) if network.num_classes else None
    with torch.no_grad():
        output = unet(x, logsnr(0.4).float().reshape(1, 1), labels)[:, 0]
    alpha, sigma = (float(s) for s in alpha_sigma(0.4))
    if both:
        direct, eps = output.chunk(2, dim=1)
        output = sigma**2 * direct + alpha**2 * (x - sigma * eps) / alpha
    assert relative(teacher(x, 0.4, labels), output) < 1e-5
    assert teacher.shape == (network.channels, network.image_size, network.image_size)
    assert teacher.native_grid(10) == ((1.0, 0.75, 0.5, 0.25, 0.0) if both else None)
    info = teacher_info(str(tmp_path))
    assert info.identity == teacher.identity and info.native_grid(10) == teacher.native_grid(10)


@pytest.fixture
def small_checkpoint(tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any], Callable[..., str]]:
    """A small published checkpoint as (tree, YAML), and a function that saves them and returns the error."""
    network = Network(
        image_size=8,
        channels=3,
        num_classes=4,
        width=32,
        multipliers=(1, 1),
        blocks_per_level=1,
        heads=2,
        embedding_dim=32,
    )

    def error(tree: Any, settings: Any, data: bytes | None = None) -> str:
        data = msgpack.packb({"step": 1, "ema_params": packed(tree)}) if data is None else data
        (tmp_path / "ckpt").write_bytes(data)
        (tmp_path / "p.yaml").write_text(yaml.safe_dump(settings))
        with pytest.raises(UserError) as caught:
            load_teacher(str(tmp_path / "ckpt"), config=str(tmp_path / "p.yaml"))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return flax_tree(random_unet(network, 3)), published_yaml(network), error


def test_published_tensors_that_do_not_fit_are_named(small_checkpoint: Any) -> None:
    tree, settings, error = small_checkpoint
    del tree["down_1.block_0"]["temb_proj"]["bias"]
    assert "down_1.block_0/temb_proj/bias is missing" in error(tree, settings)
    tree["down_1.block_0"]["temb_proj"]["bias"] = torch.zeros(64)
    tree["mid.attn_2"] = {"extra": {"kernel": torch.zeros(2)}}
    assert "mid.attn_2/extra/kernel is not of this network" in error(tree, settings)
    del tree["mid.attn_2"]
    whole = tree["up_0.block_1"]["conv2"]["kernel"]
    tree["up_0.block_1"]["conv2"]["kernel"] = whole[:, :, :-1]
    assert "up_0.block_1/conv2/kernel has shape (3, 3, 31, 32), expected (3, 3, 32, 32)" in error(
        tree, settings
    )
    tree["up_0.block_1"]["conv2"]["kernel"] = whole
    tree["conv_in"]["kernel"] = torch.full((3, 3, 3, 32), math.nan)
    assert "conv_in/kernel: holds values that are not finite" in error(tree, settings)
    del tree["conv_in"]["kernel"]
    assert "has no tensor conv_in/kernel" in error(tree, settings)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.nf", 64, "model.nf 32"),
        ("model.num_classes", 10, "model.num_classes 4"),
        ("model.num_attn_heads", 1, r"model.num_attn_heads [2]"),
        ("model.attn_resolutions", [4], "model.attn_resolutions []"),
        ("model.num_res_blocks", 2, "model.num_res_blocks 1"),
        ("data.num_channels", 1, "data.num_channels 3"),
        ("model.mean_type", "both", "mean_type 'both' does not fit 3 output channels"),
        ("model.pred_eps", True, "model.pred_eps True is not implemented"),
        ("model.with_nin", True, "model.with_nin True is not implemented"),
        ("model.fourier_feature", True, "model.fourier_feature True is not implemented"),
        ("model.num_pad", 1, "model.num_pad 1 is not implemented"),
        ("model.logsnr_type", "sigmoid", "model.logsnr_type 'sigmoid' is not implemented"),
        ("data.image_size", None, "data.image_size None"),
        ("data.num_steps", "many", "data.num_steps 'many'"),
    ],
)
def test_published_yaml_that_does_not_fit_is_named(
    small_checkpoint: Any, key: str, value: Any, message: str
) -> None:
    tree, settings, error = small_checkpoint
    section, name = key.split(".")
    settings[section][name] = value
    assert message in error(tree, settings)


def hostile() -> Iterator[tuple[str, bytes]]:
    """What is no checkpoint, by a name for each."""
    good = msgpack.packb({"ema_params": {"a": packed(torch.zeros(4))}})
    array = lambda *c: msgpack.packb({"ema_params": {"a": msgpack.ExtType(1, msgpack.packb(c))}})  # noqa: E731
    yield "truncated", good[:-3]
    yield "trailing", good + b"\0"
    yield "empty", b""
    yield "huge map", b"\xdf\xff\xff\xff\xff"
    yield "huge array", b"\x81\xa1a\xdd\xff\xff\xff\xff"
    yield "deep", b"\x81\xa1a" * 100_000
    yield "short array", array([4], "float32", b"\0" * 12)
    yield "negative shape", array([-1, -4], "float32", b"\0" * 16)
    yield "objects", array([1], "O", b"\0" * 8)
    yield "no tuple", array([1])
    yield "pickle", b"\x80\x04\x95\x00"
    yield "torch zip", b"PK\x03\x04 and so on"
    yield "no parameters", msgpack.packb({"step": 1})


@pytest.mark.parametrize(("name", "data"), [pytest.param(n, d, id=n) for n, d in hostile()])
def test_hostile_checkpoints_are_refused(small_checkpoint: Any, name: str, data: bytes) -> None:
    _, settings, error = small_checkpoint
    error({}, settings, data)


def test_bfloat16_checkpoint(tmp_path: Path, small_checkpoint: Any) -> None:
    tree, settings, _ = small_checkpoint
    settings["data"]["image_size"] = 8
    for name, dtype in (("a", "float32"), ("b", "bfloat16")):
        (tmp_path / name).write_bytes(msgpack.packb({"ema_params": packed(tree, dtype)}))
    (tmp_path / "p").write_text(yaml.safe_dump(settings))
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
    a, b = (load_teacher(str(tmp_path / n), config=str(tmp_path / "p"))(x, 0.5, labels) for n in "ab")
    assert 0 < relative(b, a) < 0.1


# ---- diffusers ---------------------------------------------------------------------------------------------

BETAS = {
    "linear": {"beta_schedule": "linear"},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": [0.001 + 0.0003 * n for n in range(100)], "num_train_timesteps": 100},
}


@pytest.fixture(scope="module")
def unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=5,
    ).eval()


def saved(unet: Any, folder: Path, **scheduler: Any) -> tuple[str, Any]:
    """The model in a pipeline folder with its scheduler, and that scheduler as DDIM."""
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler(clip_sample=False, thresholding=False, **scheduler)
    unet.save_pretrained(folder / "unet")
    ddim.save_pretrained(folder / "scheduler")
    return str(folder), ddim


@torch.no_grad()
def diffusers_images(unet: Any, scheduler: Any, noise: Tensor, steps: int, labels: Tensor) -> Tensor:
    scheduler.set_timesteps(steps)
    x = noise
    for timestep in scheduler.timesteps:
        x = scheduler.step(unet(x, timestep, labels).sample, timestep, x, eta=0.0).prev_sample
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("betas", BETAS)
def test_images_of_diffusers_ddim(unet: Any, prediction: str, betas: str, tmp_path: Path) -> None:
    path, scheduler = saved(unet, tmp_path, prediction_type=prediction, **BETAS[betas])
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(4)
    expected = diffusers_images(unet, scheduler, noise, 20, labels)
    teacher = load_teacher(path, schedule="native")
    grid = teacher.native_grid(20)
    assert grid is not None and len(grid) == 21 and grid[-1] == 0.0
    assert relative(solve(teacher, noise, [0.0], "ddim", 20, labels)[:, 0], expected) < 1e-4
    assert teacher.native_grid(20) == teacher_info(path, schedule="native").native_grid(20)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ends_of_the_native_grid(unet: Any, offset: int, one: bool, spacing: str, tmp_path: Path) -> None:
    """Where the last alpha is not set to one, diffusers' image is the state at the model's first level."""
    rest = {"steps_offset": offset, "set_alpha_to_one": one, "timestep_spacing": spacing}
    path, scheduler = saved(unet, tmp_path, prediction_type="v_prediction", **rest)
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
    expected = diffusers_images(unet, scheduler, noise, 10, labels)
    teacher = load_teacher(path, schedule="native")
    states = along(teacher, noise, 10, labels)
    assert relative(states[:, -1 if one else -2], expected) < 1e-4


def test_levels_between_and_beyond_those_of_diffusers(unet: Any, tmp_path: Path) -> None:
    path, scheduler = saved(unet, tmp_path)
    teacher = load_teacher(path)
    assert teacher.native_grid(10) is None
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    levels = (scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)).double().log()

    def expected(timestep: float, level: float) -> Tensor:
        alpha, sigma = math.sqrt(1 / (1 + math.exp(-level))), math.sqrt(1 / (1 + math.exp(level)))
        with torch.no_grad():
            return (x - sigma * unet(x, torch.tensor(timestep), labels).sample) / alpha

    def time(level: float) -> float:  # by bisection of the schedule itself
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if float(logsnr(middle)) > level else (low, middle)
        return low

    between = 0.25 * float(levels[300]) + 0.75 * float(levels[301])
    cases = [(time(float(levels[700])), 700.0, float(levels[700])), (time(between), 300.75, between)]
    cases += [(1.0, 999.0, float(levels[999])), (0.0, 0.0, float(levels[0]))]  # beyond: the nearest level's
    for t, timestep, level in cases:
        assert relative(teacher(x, t, labels), expected(timestep, level)) < 2e-4, t
    # times of one batch may differ
    together = teacher(x, torch.tensor([cases[0][0], cases[1][0]], dtype=torch.float64), labels)
    assert relative(together[1], teacher(x, cases[1][0], labels)[1]) < 1e-5


def test_a_uniform_grid_ends_near_the_native_one(unet: Any, tmp_path: Path) -> None:
    """The clamped ends do no harm: fine solutions on the model's own grid and on the uniform one agree."""
    path, _ = saved(unet, tmp_path, prediction_type="v_prediction")
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    native = load_teacher(path, schedule="native")
    fine = along(native, noise, 200, labels)[:, -1]
    uniform = solve(load_teacher(path), noise, [0.0], "ddim", 200, labels)[:, 0]
    assert relative(uniform, fine) < 0.03


def test_classes_and_null_class_of_diffusers(unet: Any, tmp_path: Path) -> None:
    path, _ = saved(unet, tmp_path)
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 1, 3])
    plain, with_null = load_teacher(path), load_teacher(path, null_class=4)
    assert (plain.num_classes, plain.null_class) == (5, None)
    assert (with_null.num_classes, with_null.null_class) == (4, 4)
    nulls = torch.full((3,), 4)
    assert torch.equal(with_null(x, 0.5), plain(x, 0.5, nulls))
    two = guided(with_null, labels, 2.0)(x, 0.5)
    assert torch.allclose(two, 2 * plain(x, 0.5, labels) - plain(x, 0.5, nulls), atol=1e-5)
    with pytest.raises(ValueError, match="null class"):
        guided(plain, labels, 2.0)
    with pytest.raises(UserError, match="must be the last of them, 4"):
        load_teacher(path, null_class=0)


def test_places_and_forms_of_diffusers_folders(unet: Any, tmp_path: Path) -> None:
    path, scheduler = saved(unet, tmp_path / "pipeline", prediction_type="v_prediction")
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    expected = load_teacher(path)(x, 0.4, labels)
    assert torch.equal(load_teacher(f"{path}/unet")(x, 0.4, labels), expected)  # finds ../scheduler
    unet.save_pretrained(tmp_path / "alone")
    with pytest.raises(UserError, match=r"has no scheduler_config\.json"):
        load_teacher(str(tmp_path / "alone"))
    options = {"prediction_type": "v_prediction", "beta_schedule": "linear"}
    assert torch.equal(load_teacher(str(tmp_path / "alone"), **options)(x, 0.4, labels), expected)
    scheduler.save_pretrained(tmp_path / "alone")
    assert torch.equal(load_teacher(str(tmp_path / "alone"))(x, 0.4, labels), expected)
    unet.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert torch.equal(load_teacher(str(tmp_path / "sharded"), **options)(x, 0.4, labels), expected)


def test_attention_under_the_names_of_old_diffusers(unet: Any, tmp_path: Path) -> None:
    from diffusers import UNet2DModel

    path, _ = saved(unet, tmp_path)
    x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
    expected = load_teacher(path)(x, 0.5, labels)
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, tensor in safetensors.torch.load_file(file).items():
        for new, before in old.items():
            name = name.replace(new, before)
        weights[name] = tensor
    assert sum(".query." in name for name in weights) > 2
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    assert torch.equal(load_teacher(path)(x, 0.5, labels), expected)
    theirs = UNet2DModel.from_pretrained(tmp_path / "unet").state_dict()
    assert all(torch.equal(tensor, unet.state_dict()[name]) for name, tensor in theirs.items())


def experiment(path: str, *more: str) -> list[str]:
    """Overrides of the digits config for a few trajectories of the diffusers model at `path`."""
    return [
        *("network.channels=3", "network.num_classes=5", "network.null_class=false", f"teacher.path={path}"),
        *("trajectories.num_samples=4", "trajectories.samples_per_shard=2", "trajectories.batch_size=2"),
        *("trajectories.times=[0.0]", "trajectories.steps=10", "student.modes=1"),
        *more,
    ]


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_evaluations_on_the_native_grid_are_counted(
    unet: Any, one: bool, guidance: float, tmp_path: Path
) -> None:
    """Where the last alpha is not set to one, the native grid has one more interval than steps."""
    from dsno_cluster.evaluation.teacher_rows import evaluations_of, teacher_sources

    path, _ = saved(unet, tmp_path, set_alpha_to_one=one, timestep_spacing="trailing")
    null = ["network.num_classes=4", "network.null_class=true"]
    native = "teacher.options={schedule: native, null_class: 4}"
    config = load_config(
        "configs/digits.yaml", experiment(path, *null, native, f"trajectories.guidance_scale={guidance}")
    )
    teacher = open_teacher(config)
    calls: list[Any] = []
    assert teacher.network is not None
    hook = teacher.network.register_forward_pre_hook(lambda *_: calls.append(1))
    solve_batch(config, teacher, 0, range(2))
    hook.remove()
    assert len(calls) == (10 if one else 11) * int(guidance)
    assert make_plan(config).size.evaluations_per_sample == len(calls)
    counted = [evaluations_of(s, config) for s in teacher_sources(config) if s.grid == "auto"]
    assert counted == [len(calls)]


def test_a_native_schedule_from_the_command_line(unet: Any, tmp_path: Path) -> None:
    path, _ = saved(unet, tmp_path, set_alpha_to_one=False, timestep_spacing="trailing")
    words = experiment(path, "teacher.options={schedule: native}", f"storage.root={tmp_path / 'root'}")
    planned = dsno("plan", *words, "--json")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["evaluations_per_sample"] == 11
    for command in ("plan", "gen-trajectories"):
        refused = dsno(command, *words, "trajectories.steps=2000")
        assert refused.returncode == 2, refused.stderr
        assert "trajectories.steps: 2000 steps, where the model has 1000 levels" in refused.stderr
        assert len(refused.stderr.splitlines()) == 1


def test_guided_trajectories_of_a_diffusers_model(unet: Any, tmp_path: Path) -> None:
    path, _ = saved(unet, tmp_path / "model", prediction_type="v_prediction")
    root = tmp_path / "root"
    null = ["network.num_classes=4", "network.null_class=true", "teacher.options={null_class: 4}"]
    words = experiment(path, *null, "trajectories.guidance_scale=3", "trajectories.dtype=float32")
    made = dsno("gen-trajectories", *words, f"storage.root={root}", "--launcher", "local", "--actors", "1")
    assert made.returncode == 0, made.stderr
    shard = safetensors.torch.load_file(next(root.glob("trajectories/*/shard-000001.safetensors")))
    teacher = load_teacher(path, null_class=4)
    noise, labels = sample_noise(0, range(2, 4), (3, 8, 8)), sample_labels(0, range(2, 4), 4)
    solver = load_config("configs/digits.yaml").trajectories.solver
    guided_states = solve(teacher, noise, [0.0], solver, 10, labels, guidance_scale=3.0)
    assert torch.equal(shard["labels"], labels)
    assert relative(shard["states"].transpose(0, 1), guided_states) < 1e-5
    assert relative(shard["states"].transpose(0, 1), solve(teacher, noise, [0.0], solver, 10, labels)) > 0.01


def test_diffusers_folders_that_are_refused(unet: Any, tmp_path: Path) -> None:
    path, _ = saved(unet, tmp_path / "a")

    def refused(match: str, config: dict[str, Any] | None = None, **options: Any) -> None:
        copy = tmp_path / "b"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
        file = copy / "unet" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **(config or {})}))
        with pytest.raises(UserError, match=match):
            load_teacher(str(copy), **options)

    refused("unknown teacher option steps", steps=3)
    refused("schedule 'mine'", schedule="mine")
    refused("'UNet2DConditionModel' is not supported", {"_class_name": "UNet2DConditionModel"})
    refused("'fourier' is not supported", {"time_embedding_type": "fourier"})
    refused("'timestep' is not supported", {"class_embed_type": "timestep"})
    refused("a learned variance", {"out_channels": 6})
    refused("sample_size None", {"sample_size": None})
    refused("does not fit its config.json: .*class_embedding.weight has shape", {"num_class_embeds": 7})
    refused("beta_schedule 'sigmoid'", beta_schedule="sigmoid")
    refused("prediction_type 'flow'", prediction_type="flow")
    (tmp_path / "a/unet/diffusion_pytorch_model.safetensors").rename(
        tmp_path / "a/unet/diffusion_pytorch_model.bin"
    )
    refused("diffusion_pytorch_model.bin is a pickle")


# ---- Python factories --------------------------------------------------------------------------------------

FACTORY = """
import torch
class Shrink(torch.nn.Module):
    def __init__(self, factor, classes):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.shape, self.num_classes, self.null_class = (1, 4, 4), classes, classes or None
    def forward(self, x, t, labels):
        assert t.shape == (len(x),)
        return self.factor * x + (0 if labels is None else labels[:, None, None, None])
def build(factor, classes=0):
    return Shrink(factor, classes)
def wrong():
    return lambda x, t, labels: x
"""


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_models").mkdir()
    (tmp_path / "my_models/__init__.py").write_text("")
    (tmp_path / "my_models/shrink.py").write_text(FACTORY)
    path, x = "my_models.shrink:build", torch.ones(2, 1, 4, 4)
    identity = teacher_identity(path, factor=0.5)
    teacher = load_teacher(path, factor=0.5)
    assert torch.equal(teacher(x, 0.3), 0.5 * x) and teacher.shape == (1, 4, 4)
    assert teacher.identity == identity and identity["options"] == {"factor": 0.5}
    conditional = load_teacher(path, factor=0.5, classes=3)
    assert torch.equal(conditional(x, 0.3), 3 + 0.5 * x)  # the null class where no label is given
    assert solve(teacher, torch.randn(2, 1, 4, 4), [0.0], "ddim", 4).shape == (2, 1, 1, 4, 4)
    (tmp_path / "my_models/shrink.py").write_text(FACTORY + "\n# changed\n")
    assert teacher_identity(path, factor=0.5)["source_sha256"] != identity["source_sha256"]
    for wrong, options, message in (
        ("my_models.shrink:build", {"size": 1}, "does not take the teacher options"),
        ("my_models.shrink:nothing", {}, "has no function nothing"),
        ("my_models.shrink:wrong", {}, "shape"),
        ("my_models.nowhere:build", {}, "no Python module my_models.nowhere"),
        ("nowhere.at.all:build", {}, "cannot be imported"),
    ):
        with pytest.raises(UserError, match=message):
            load_teacher(wrong, **options)


# ---- closed forms ------------------------------------------------------------------------------------------

MIXTURE = {"means": [-0.7, 0.5, 0.9], "stds": [0.1, 0.3, 0.05], "weights": [0.5, 0.3, 0.2]}


def mixture_cdf(x: Tensor, t: float) -> Tensor:
    """P(X_t <= x) of one pixel of the mixture."""
    alpha, sigma = (float(s) for s in alpha_sigma(t))
    terms = zip(MIXTURE["means"], MIXTURE["stds"], MIXTURE["weights"], strict=True)
    total = torch.zeros_like(x)
    for mean, std, weight in terms:
        spread = math.sqrt(alpha**2 * std**2 + sigma**2)
        total += weight * 0.5 * torch.erfc(-(x - alpha * mean) / (spread * math.sqrt(2)))
    return total


def test_mixture_is_the_posterior_mean() -> None:
    """Against quadrature of E[x0 | x] over a fine grid of x0."""
    teacher = load_teacher("closed-form:mixture", **MIXTURE, shape=[1, 1, 1])
    x0 = torch.linspace(-4, 4, 200_001, dtype=torch.float64)
    density = sum(
        w / s * torch.exp(-0.5 * ((x0 - m) / s) ** 2)
        for m, s, w in zip(MIXTURE["means"], MIXTURE["stds"], MIXTURE["weights"], strict=True)
    )
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = (float(s) for s in alpha_sigma(t))
        for x in (-1.3, 0.0, 0.4, 1.1):
            posterior = density * torch.exp(-0.5 * ((x - alpha * x0) / sigma) ** 2)
            expected = float((posterior * x0).sum() / posterior.sum())
            found = float(teacher(torch.full((1, 1, 1, 1), x, dtype=torch.float64), t))
            assert found == pytest.approx(expected, abs=1e-6)


def test_trajectories_of_the_mixture_keep_their_quantile() -> None:
    """In one dimension the probability flow is monotone, so F_t(x_t) is constant along every trajectory."""
    teacher = mixture_teacher(**MIXTURE, shape=(1, 1, 1))
    noise = torch.linspace(-2, 2, 21, dtype=torch.float64).reshape(-1, 1, 1, 1)
    times = (0.75, 0.5, 0.25)
    states = solve(teacher, noise, times, "heun", 400)
    for t, state in zip(times, states.unbind(1), strict=True):
        assert torch.allclose(mixture_cdf(state, t), mixture_cdf(noise, 1.0), atol=1e-4)


def test_guidance_of_a_mixture_with_classes() -> None:
    shape = (1, 2, 2)
    both = {"means": [-0.5, [[[0.5, 0.5], [1.0, 0.5]]]], "stds": [0.2, 0.3], "weights": [0.4, 0.6]}
    teacher = load_teacher("closed-form:mixture", **both, shape=shape, classes=[0, 1], null_class=True)
    assert (teacher.num_classes, teacher.null_class) == (2, 2)
    alone = [mixture_teacher([both["means"][k]], both["stds"][k], shape) for k in (0, 1)]
    x, labels = torch.randn(4, *shape), torch.tensor([0, 1, 1, 0])
    conditional = torch.stack([alone[k](x, 0.6)[i] for i, k in enumerate(labels.tolist())])
    unconditional = mixture_teacher(**both, shape=shape)(x, 0.6)
    assert torch.allclose(teacher(x, 0.6, labels), conditional, atol=1e-6)
    assert torch.allclose(teacher(x, 0.6), unconditional, atol=1e-6)
    expected = unconditional + 3.0 * (conditional - unconditional)
    assert torch.allclose(guided(teacher, labels, 3.0)(x, 0.6), expected, atol=1e-5)
    end = solve(teacher, torch.randn(64, *shape), [0.0], "ddim", 64, torch.zeros(64, dtype=torch.int64))
    assert abs(float(end.mean()) + 0.5) < 0.1


def test_closed_forms_that_are_refused() -> None:
    for path, options, message in (
        ("closed-form:cauchy", {}, "closed-form:gaussian, closed-form:mixture"),
        ("closed-form:gaussian", {"mean": 0.0, "std": 1.0}, "needs the teacher options shape"),
        ("closed-form:gaussian", {"mean": 0.0, "std": -1.0, "shape": [1, 2, 2]}, "std: -1.0"),
        ("closed-form:gaussian", {"mean": 0, "std": 1, "shape": [2, 2]}, r"shape must be \[C, H, W\]"),
        (
            "closed-form:gaussian",
            {"mean": 0, "std": 1, "shape": [1, 2, 2], "x": 1},
            "unknown teacher option x",
        ),
        ("closed-form:mixture", {"means": [0, 1], "stds": [1], "shape": [1, 2, 2]}, "2 means, 1 stds"),
        ("closed-form:mixture", {"means": [[0, 1]], "stds": 1, "shape": [1, 2, 2]}, "expected 1 or 4"),
    ):
        with pytest.raises(UserError, match=message):
            load_teacher(path, **options)


# ---- all of them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
def test_precision_of_inference(precision: str, tolerance: float, unet: Any, tmp_path: Path) -> None:
    path, _ = saved(unet, tmp_path)
    digits = "package:digits-teacher"
    for where, x in ((digits, torch.randn(4, 1, 8, 8)), (path, torch.randn(4, 3, 8, 8))):
        labels = torch.arange(4)
        full, less = load_teacher(where), load_teacher(where, precision=precision)
        for t in (0.9, 0.5, 0.2):
            found = less(x, t, labels)
            assert found.dtype == torch.float32
            assert 0 < relative(found, full(x, t, labels)) < tolerance
        assert less.identity == full.identity
    # the noise level itself is not rounded: bfloat16 has one number for the log-SNR of both these times
    bare = load_teacher(str(PUBLISHED / "teacher_flax_x"), precision=precision)
    x = torch.randn(2, 3, 16, 16)
    near = [bare(x, t, labels[:2]) for t in (0.2, 0.2002)]
    assert not torch.equal(*near)
    with pytest.raises(UserError, match="precision 'int8'"):
        load_teacher(digits, precision="int8")


def test_config_reaches_the_teacher() -> None:
    overrides = [
        "teacher.path=closed-form:mixture",
        "teacher.options={means: [0.5, [[[1, 2], [3, 4]]]], stds: 0.5, shape: [1, 2, 2]}",
        "teacher.precision=float32",
    ]
    config = load_config("configs/digits.yaml", overrides)
    teacher = load_teacher(str(config.teacher.path), **config.teacher.options)
    assert teacher.shape == (1, 2, 2)
    with pytest.raises(UserError, match=r"network.image_size: the config says 8, .* has 2"):
        check_fits(config.network, teacher, "here")
    with pytest.raises(UserError, match="precision"):
        load_config("configs/digits.yaml", ["teacher.precision=int8"])


def test_a_relative_published_config_is_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor may start in another folder than the one that the options were written in."""
    shutil.copytree(PUBLISHED / "teacher_flax_x", tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    config = load_config(
        str(Path(__file__).parents[1] / "configs/digits.yaml"),
        ["teacher.path=teacher", "teacher.options={config: config.yaml, schedule: continuous}"],
    )
    identity = teacher_identity("teacher", **config.teacher.options)
    there = with_absolute_paths(config).teacher
    monkeypatch.chdir(tmp_path)
    assert teacher_identity(str(there.path), **there.options) == identity
    factory = config.model_copy(
        update={"teacher": config.teacher.model_copy(update={"path": "my.module:function"})}
    )
    monkeypatch.chdir(tmp_path / "here")
    assert with_absolute_paths(factory).teacher == factory.teacher  # its options are part of the spec


def test_float32_on_a_gpu_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    compute_device()
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


def test_the_version_of_diffusers_is_on_record(unet: Any) -> None:
    import diffusers

    assert software_versions()["diffusers"] == diffusers.__version__


def test_identity_needs_no_torch() -> None:
    code = """
import sys
from dsno_cluster.diffusion.teachers import teacher_info
ours = teacher_info("package:digits-teacher")
closed = teacher_info("closed-form:gaussian", mean=0.1, std=0.5, shape=[1, 4, 4])
assert (ours.shape, ours.num_classes, ours.null_class) == ((1, 8, 8), 10, 10), ours
assert (closed.shape, closed.num_classes, closed.null_class) == ((1, 4, 4), 0, None), closed
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_warm_start_takes_what_predicts_the_state() -> None:
    """At t=1 x is noise: the backbone with these weights answers the teacher's x0 there."""
    teacher = load_teacher("package:digits-teacher")
    network = load_config("configs/digits.yaml").network
    student = UNet(network)
    student.load_state_dict(warm_start_weights("package:digits-teacher"))
    x, labels = torch.randn(4, 1, 8, 8), torch.arange(4)
    with torch.no_grad():
        assert (
            relative(student(x, logsnr(torch.ones(1, 1)).float(), labels)[:, 0], teacher(x, 1.0, labels))
            < 1e-3
        )
    both = warm_start_weights(str(PUBLISHED / "teacher_flax_both"))
    assert both["conv_out.weight"].shape[0] == 3
    with pytest.raises(UserError, match=r"student.warm_start=false"):
        warm_start_weights("closed-form:gaussian", mean=0.0, std=1.0, shape=[1, 2, 2])
