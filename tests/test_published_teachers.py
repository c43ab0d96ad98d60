"""Published progressive-distillation checkpoints against outputs of the published code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import safetensors.torch
import torch
import yaml
from teacher_models import PUBLISHED, relative
from teacher_models import one_thread as one_thread  # a fixture
from torch import Tensor

from dsno_cluster import load_teacher, solve
from dsno_cluster.config import Network
from dsno_cluster.diffusion.schedule import alpha_sigma, logsnr
from dsno_cluster.errors import UserError
from dsno_cluster.networks.unet import UNet
from dsno_cluster.teachers import teacher_info
from dsno_cluster.teachers.importing import import_weights

FLAX = ["teacher_flax_x", "teacher_flax_both"]


def test_an_import_does_not_replace_another_model(tmp_path: Path) -> None:
    one, other = ([str(PUBLISHED / name / file) for file in ("teacher", "config.yaml")] for name in FLAX)
    import_weights(*one, str(tmp_path / "t"))
    before = (tmp_path / "t/model.safetensors").read_bytes()
    with pytest.raises(
        UserError, match=r"--out .*/t: holds another model, that of teacher; name a new folder"
    ):
        import_weights(*other, str(tmp_path / "t"))
    import_weights(*one, str(tmp_path / "t"))
    assert (tmp_path / "t/model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


@pytest.mark.parametrize("name", FLAX)
@pytest.mark.parametrize("door", ["file", "folder", "imported"])
def test_outputs_of_published_teachers(name: str, door: str, tmp_path: Path) -> None:
    folder = PUBLISHED / name
    expected = safetensors.torch.load_file(folder / "expected.safetensors")
    if door == "file":
        teacher = load_teacher(str(folder / "teacher"), options={"config": str(folder / "config.yaml")})
    elif door == "folder":
        teacher = load_teacher(str(folder))
    else:
        imported = [str(folder / "teacher"), str(folder / "config.yaml")]
        import_weights(*imported, str(tmp_path / "a" / "b"))
        with pytest.raises(UserError, match=r"--out .*/a: .* holds other files, which would be lost"):
            import_weights(*imported, str(tmp_path / "a"))
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
    plain = load_teacher(str(PUBLISHED / "teacher_flax_x"), options={"schedule": "continuous"})
    assert solve(plain, noise, [0.5], "abm3", 4, labels).isfinite().all()


@pytest.mark.parametrize("mean_type", ["eps", "v"])
def test_other_parametrisations_of_published_teachers(mean_type: str, tmp_path: Path) -> None:
    """The x fixture's expected output is the bare output of its network."""
    folder = PUBLISHED / "teacher_flax_x"
    expected = safetensors.torch.load_file(folder / "expected.safetensors")
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    settings["model"]["mean_type"] = mean_type
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    teacher = load_teacher(str(folder / "teacher"), options={"config": str(tmp_path / "config.yaml")})
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
    data = {"image_size": network.state_size, "num_channels": network.state_channels}
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
    unet = random_unet(network, network.state_channels * (2 if both else 1))
    tree = flax_tree(unet)
    moments = {"0": tree, "1": {"w": torch.zeros(3, dtype=torch.int32)}}  # optimiser state: not read
    content = {"step": 5, "optimizer": packed(moments), "ema_params": packed(tree)}
    if both:
        content["num_sample_steps"] = msgpack.ExtType(1, msgpack.packb(([], "int32", b"\x04\0\0\0")))
    (tmp_path / "some_teacher").write_bytes(msgpack.packb(content))
    settings = published_yaml(network)
    if inferred:  # the YAML says just what tensors cannot tell
        settings = {"data": {"image_size": network.state_size}, "model": {"mean_type": "x"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))

    teacher = load_teacher(str(tmp_path))
    x = torch.randn(2, *network.state_shape)
    labels = torch.tensor([0, 1]) if network.num_classes else None
    with torch.no_grad():
        output = unet(x, logsnr(0.4).float().reshape(1, 1), labels)[:, 0]
    alpha, sigma = (float(s) for s in alpha_sigma(0.4))
    if both:
        direct, eps = output.chunk(2, dim=1)
        output = sigma**2 * direct + alpha**2 * (x - sigma * eps) / alpha
    assert relative(teacher(x, 0.4, labels), output) < 1e-5
    assert teacher.shape == network.state_shape
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
            load_teacher(str(tmp_path / "ckpt"), options={"config": str(tmp_path / "p.yaml")})
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
    a, b = (
        load_teacher(str(tmp_path / n), options={"config": str(tmp_path / "p")})(x, 0.5, labels) for n in "ab"
    )
    assert 0 < relative(b, a) < 0.1
