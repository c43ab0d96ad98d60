"""Teachers from state dicts of OpenAI's U-Nets, DiT and SiT, against outputs of the original code (tests/data/state_dicts)."""

from __future__ import annotations

import argparse
import itertools
import math
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from teacher_models import ADM, STATE_DICTS, relative, saved_unet, weights_of
from teacher_models import one_thread as one_thread  # fixture
from tiny import DATA
from torch import Tensor

from dsno_cluster import load_teacher, solve
from dsno_cluster.config import load_config
from dsno_cluster.diffusion.discrete_levels import respaced_timesteps
from dsno_cluster.diffusion.guidance import Guidance, guided
from dsno_cluster.diffusion.schedule import alpha_sigma, angle, flow_scales, time_of_angle
from dsno_cluster.errors import UserError
from dsno_cluster.networks.adm_unet import ADMUNet
from dsno_cluster.networks.descriptions import ADMDescription, TransformerDescription
from dsno_cluster.networks.transformer import Transformer
from dsno_cluster.teachers import Teacher, find_teacher, transformers
from dsno_cluster.teachers.openai_published import PUBLISHED
from dsno_cluster.teachers.openai_shapes import describe, original_names
from dsno_cluster.teachers.openai_unets import settings_of
from dsno_cluster.teachers.state_dict_file import StateDict
from dsno_cluster.teachers.transformers import family_and_heads, original_name

SMALL = ADMDescription(
    channels=3,
    out_channels=3,
    features=32,
    widths=(32, 64),
    blocks_per_level=1,
    attention_levels=(1,),
    num_classes=0,
    film=False,
    resample="convolution",
)


def expected_of(name: str) -> dict[str, Tensor]:
    return load_file(DATA / "state_dicts" / name / "expected.safetensors")


def opened(name: str, **options: Any) -> Teacher:
    return load_teacher(str(weights_of(name)), options=STATE_DICTS[name] | options)


def states(name: str, expected: dict[str, Tensor]) -> list[tuple[float, Tensor]]:
    """The cosine time and the variance-preserving state of each level of the fixture."""
    if name == "sit":
        times = expected["times"].double().tolist()
        norms = [math.hypot(u, 1 - u) for u in times]
        angles = [math.atan2(1 - u, u) for u in times]
        return [
            (time_of_angle(angle), (x.double() / norm).float())
            for x, angle, norm in zip(expected["x_t"].unbind(1), angles, norms, strict=True)
        ]
    signals = expected["alphas_cumprod"][expected["timesteps"]].tolist()
    angles = [math.acos(math.sqrt(signal)) for signal in signals]
    return [(time_of_angle(a), x) for a, x in zip(angles, expected["x_t"].unbind(1), strict=True)]


@pytest.mark.parametrize("name", STATE_DICTS)
def test_clean_images_are_those_of_the_original(name: str) -> None:
    expected, teacher = expected_of(name), opened(name)
    clean = expected["x0_from_velocity" if name == "sit" else "pred_xstart"]
    for i, (t, x) in enumerate(states(name, expected)):
        assert relative(teacher(x, t, expected["labels"]), clean[:, i]) < 1e-5


@pytest.mark.parametrize(
    ("channels", "key"), [(None, "guided_1.5"), (3, "guided_1.5_three_channels")], ids=["all", "three"]
)
@pytest.mark.parametrize("name", ["dit", "sit"])
def test_guidance_is_that_of_the_original(name: str, channels: int | None, key: str) -> None:
    """On all channels, and on the first three, as the sampling code of both repositories has it."""
    expected, teacher = expected_of(name), opened(name)
    assert teacher.null_class == teacher.num_classes == 10
    denoise = guided(teacher, expected["labels"], Guidance(1.5, channels=channels))
    for i, (t, x) in enumerate(states(name, expected)):
        if name == "sit":
            rest = 1 - float(expected["times"][i])
            clean = expected["x_t"][:, i] + rest * expected[key][:, i]
        else:
            alpha, sigma = (float(s) for s in alpha_sigma(t))
            clean = (x - sigma * expected[key][:, i]) / alpha
        assert relative(denoise(x, t), clean) < 1e-5


def test_attention_packed_whole(tmp_path: Path) -> None:
    """The fixture packs it head by head. Its rows in the other order are the same network."""
    tensors = torch.load(weights_of("adm"), weights_only=True)
    for name in tensors:
        if ".qkv." in name:
            by_head = tensors[name].reshape(4, 3, 8, *tensors[name].shape[1:])
            tensors[name] = torch.cat([by_head[:, i].flatten(0, 1) for i in range(3)])
    torch.save(tensors, tmp_path / "whole.pt")
    expected = expected_of("adm")
    wrong, right = (
        load_teacher(str(tmp_path / "whole.pt"), options=ADM | {"new_attention_order": order})
        for order in (False, True)
    )
    t, x = states("adm", expected)[1]
    clean = expected["pred_xstart"][:, 1]
    assert relative(right(x, t, expected["labels"]), clean) < 1e-5
    assert relative(wrong(x, t, expected["labels"]), clean) > 1e-4


def test_teachers_of_consistency_models(tmp_path: Path) -> None:
    """Preconditioned as EDM, within sigma 0.002 to 80; a network whose blocks add the embedding and resample by convolutions."""
    network = saved_unet(
        tmp_path / "edm.pt", SMALL.model_copy(update={"head_channels": 16}), two_dimensional=True
    )
    options = {"family": "openai-edm", "num_head_channels": 16, "image_size": 16}
    teacher = load_teacher(str(tmp_path / "edm.pt"), options=options)
    assert teacher.shape == (3, 16, 16) and teacher.num_classes == 0 and teacher.null_class is None
    torch.manual_seed(1)
    y = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for sigma, used in ((0.0002, 0.002), (0.002, 0.002), (0.7, 0.7), (80.0, 80.0), (500.0, 80.0)):
        root, data = math.sqrt(used**2 + 0.25), 0.5
        with torch.no_grad():
            output = network((y / root).float(), torch.full((2,), 250 * math.log(used)))
        clean = data**2 / root**2 * y + used * data / root * output.double()
        alpha = 1 / math.sqrt(1 + used**2)  # a state outside the range is one at its end
        assert relative(teacher((alpha * y).float(), time_of_angle(math.atan(sigma))), clean.float()) < 1e-4
    native = load_teacher(str(tmp_path / "edm.pt"), options=options | {"schedule": "native"}).native_grid(18)
    assert native is not None and len(native) == 19 and native[-1] == 0.0
    sigmas = [math.tan(angle(t)) for t in native[:-1]]
    roots = [80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7)) for i in range(18)]
    assert sigmas == pytest.approx([root**7 for root in roots])  # Karras et al. 2022, eq. 5


@pytest.mark.parametrize(
    ("spacing", "steps", "expected"),
    [
        ("ddim", 25, [960, 920, 880]),
        ("ddim", 1000, [999, 998, 997]),
        ("even", 250, [999, 995, 991]),
        ("even", 3, [999, 500, 0]),
        ("even", 1, [0]),
    ],
)
def test_timesteps_as_openai_respaces_them(spacing: str, steps: int, expected: list[int]) -> None:
    timesteps = respaced_timesteps(1000, steps, spacing)
    assert timesteps[:3] == expected and len(timesteps) == steps and timesteps[-1] == 0


@pytest.mark.parametrize(
    ("name", "spacing", "timesteps"),
    [
        ("adm", "ddim", [800, 600, 400, 200, 0]),
        ("adm", "even", [999, 749, 500, 250, 0]),
        ("dit", "even", [999, 749, 500, 250, 0]),
        ("dit", "ddim", [800, 600, 400, 200, 0]),
    ],
)
def test_ddim_on_own_steps_is_that_of_the_original(name: str, spacing: str, timesteps: list[int]) -> None:
    """Dhariwal & Nichol's sampler (Song et al. 2021, eq. 12, eta 0), as they write it: by alphas_cumprod of kept timesteps."""
    expected, teacher = expected_of(name), opened(name, schedule="native", timestep_respacing=spacing)
    labels, signal = expected["labels"], expected["alphas_cumprod"].tolist()
    x = noise = torch.randn(4, *expected["x_t"].shape[2:], generator=torch.Generator().manual_seed(3))
    assert teacher.network is not None
    for i, timestep in enumerate(timesteps):
        now, then = signal[timestep], signal[timesteps[i + 1]] if i + 1 < len(timesteps) else 1.0
        with torch.no_grad():
            eps = teacher.network(x, torch.full((4,), float(timestep)), labels)[:, : x.shape[1]]
        x0 = math.sqrt(1 / now) * x - math.sqrt(1 / now - 1) * eps
        x = math.sqrt(then) * x0 + math.sqrt(1 - then) * eps
    assert relative(solve(teacher, noise, [0.0], "ddim", 5, labels)[:, 0], x) < 1e-4


def test_own_steps_of_sit_are_those_of_euler() -> None:
    expected, teacher = expected_of("sit"), opened("sit", schedule="native")
    labels, steps = expected["labels"], 10
    x = noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    assert teacher.network is not None
    middle = x
    for i in range(steps):
        with torch.no_grad():
            x = x + teacher.network(x, torch.full((4,), i / steps), labels)[:, :4] / steps
        middle = x if i + 1 == steps // 2 else middle
    grid = teacher.native_grid(steps)
    assert grid is not None
    found = solve(teacher, noise, [grid[5], 0.0], "ddim", steps, labels)
    scale = float(flow_scales(grid[5])[1])
    assert relative(scale * found[:, 0], middle) < 2e-4 and relative(found[:, 1], x) < 2e-4


def test_levels_outside_the_range_are_the_nearest() -> None:
    expected, teacher = expected_of("adm"), opened("adm")
    ends = [math.acos(math.sqrt(float(expected["alphas_cumprod"][n]))) for n in (0, 999)]
    x, labels = expected["x_t"][:, 0], expected["labels"]
    for end, beyond in zip(ends, (0.0, 1.0), strict=True):
        torch.testing.assert_close(teacher(x, beyond, labels), teacher(x, time_of_angle(end), labels))


def signals(beta_schedule: str, count: int) -> list[float]:
    """alphas_cumprod of Nichol & Dhariwal 2021: eq. 17, and DDPM's linear betas, which end at 0.02 for 1000 levels."""
    if beta_schedule == "linear":
        betas = [0.1 / count + n / (count - 1) * (20.0 - 0.1) / count for n in range(count)]
    else:
        curve = [math.cos((n / count + 0.008) / 1.008 * math.pi / 2) ** 2 for n in range(count + 1)]
        betas = [min(1 - after / before, 0.999) for before, after in itertools.pairwise(curve)]
    return list(itertools.accumulate((1 - beta for beta in betas), operator.mul))


@pytest.mark.parametrize("beta_schedule", ["linear", "cosine"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("x0", [False, True])
def test_other_numbers_of_levels(beta_schedule: str, rescale: bool, x0: bool) -> None:
    """improved-diffusion has 4000, whose number its network takes as it is or divided by 4."""
    teacher = opened(
        "adm",
        beta_schedule=beta_schedule,
        diffusion_steps=4000,
        rescale_timesteps=rescale,
        predict_xstart=x0,
    )
    x, labels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 5])
    assert teacher.network is not None
    for n in (40, 1000, 3000):
        signal = signals(beta_schedule, 4000)[n]
        with torch.no_grad():
            output = teacher.network(x, torch.full((2,), n / 4 if rescale else float(n)), labels)[:, :3]
        clean = output if x0 else (x - math.sqrt(1 - signal) * output) / math.sqrt(signal)
        assert relative(teacher(x, time_of_angle(math.acos(math.sqrt(signal))), labels), clean) < 1e-4


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", STATE_DICTS)
def test_low_precisions(name: str, precision: str) -> None:
    expected = expected_of(name)
    teacher = load_teacher(str(weights_of(name)), options=STATE_DICTS[name], precision=precision)
    t, x = states(name, expected)[1]
    clean = expected["x0_from_velocity" if name == "sit" else "pred_xstart"][:, 1]
    found = teacher(x, t, expected["labels"])
    assert found.dtype == torch.float32 and relative(found, clean) < 0.03


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("resample", ["block", "convolution"])
def test_the_unet_is_that_of_diffusers(film: bool, resample: str) -> None:
    """Its U-Net can have the same parts; the original's files of improved-diffusion have convolutions between resolutions."""
    diffusers = pytest.importorskip("diffusers")
    sizes = {
        "widths": (32, 64, 96),
        "attention_levels": (1,),
        "film": film,
        "resample": resample,
        "head_channels": 16,
    }
    torch.manual_seed(0)
    network = ADMUNet(SMALL.model_copy(update=sizes | {"num_classes": 5, "blocks_per_level": 2})).eval()
    for name, parameter in network.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    plain_down, plain_up = (
        ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
        if resample == "block"
        else ("DownBlock2D", "UpBlock2D")
    )
    theirs = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        layers_per_block=2,
        down_block_types=(plain_down, "AttnDownBlock2D", plain_down),
        up_block_types=(plain_up, "AttnUpBlock2D", plain_up),
        downsample_type="resnet" if resample == "block" else "conv",
        upsample_type="resnet" if resample == "block" else "conv",
        resnet_time_scale_shift="scale_shift" if film else "default",
        attention_head_dim=16,
        attn_norm_num_groups=32,
        num_class_embeds=5,
    ).eval()
    theirs.load_state_dict(in_diffusers(network, blocks=2, levels=3))
    x, time, labels = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 900.0]), torch.tensor([1, 4])
    with torch.no_grad():
        assert relative(network(x, time, labels), theirs(x, time, labels)[0]) < 1e-5


def in_diffusers(network: ADMUNet, blocks: int, levels: int) -> dict[str, Tensor]:
    """The weights under the names of diffusers."""
    ends = {"embed_time_in": "time_embedding.linear_1", "embed_time_out": "time_embedding.linear_2"}
    ends |= {
        "embed_class": "class_embedding",
        "norm_out": "conv_norm_out",
        "middle_attention": "mid_block.attentions.0",
    }
    ends |= {"middle_in": "mid_block.resnets.0", "middle_out": "mid_block.resnets.1"}
    parts = {
        "norm_in": "norm1",
        "conv_in": "conv1",
        "embed": "time_emb_proj",
        "norm_out": "norm2",
        "conv_out": "conv2",
    }
    parts |= {"skip": "conv_shortcut", "norm": "group_norm", "out": "to_out.0", "conv": "conv"}
    found: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        first, *others, kind = name.split(".")
        if first in ("down", "up"):
            number = int(others.pop(0))
            level, place = divmod(number, blocks + 1)
            what = others.pop(0)
            inside = {
                "residual": f"resnets.{place}",
                "attention": f"attentions.{place}",
                "resample": f"{first}samplers.0",
            }
            where = f"{first}_blocks.{level}.{inside[what]}"
        else:
            where = ends.get(first, first)
        if others == ["qkv"]:
            for part, rows in zip(
                "qkv", tensor.flatten(1).chunk(3) if kind == "weight" else tensor.chunk(3), strict=True
            ):
                found[f"{where}.to_{part}.{kind}"] = rows
        else:
            linear = others == ["out"] and kind == "weight"
            where = ".".join([where, *(parts[other] for other in others)])
            found[f"{where}.{kind}"] = tensor.flatten(1) if linear else tensor
    return found


# ---- what shapes say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("resample", ["block", "convolution"])
@pytest.mark.parametrize("levels", [((32,), ()), ((32, 64, 96), (0, 2)), ((64, 64), ())])
def test_sizes_are_read_from_shapes(
    tmp_path: Path, levels: tuple[tuple[int, ...], tuple[int, ...]], resample: str, classes: int
) -> None:
    widths, attention = levels
    sizes = {"widths": widths, "attention_levels": attention, "resample": resample, "num_classes": classes}
    described = SMALL.model_copy(update=sizes | {"blocks_per_level": 2, "out_channels": 6, "heads": 2})
    network = saved_unet(tmp_path / "model.pt", described)
    options = {"num_heads": 2, "new_attention_order": True, "beta_schedule": "cosine", "image_size": 8}
    teacher = load_teacher(str(tmp_path / "model.pt"), options=options)  # a learned variance: openai-adm
    assert isinstance(teacher.network, ADMUNet) and teacher.num_classes == classes
    labels = torch.tensor([0, 6]) if classes else None
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0])
    with torch.no_grad():
        torch.testing.assert_close(teacher.network(x, time, labels), network(x, time, labels))


# Millions of parameters as the authors count them, and how exactly: the hyperparameters in the appendix of Dhariwal &
# Nichol 2021; the names of improved-diffusion's files; consistency_models' first network is guided-diffusion's first.
MILLIONS = (
    *((296, 1), (422, 1), (554, 1), (552, 1), (559, 1)),
    *((50, 5), (100, 25), (270, 5), (100, 25)),
    *((296, 1), (552, 30)),
)


@pytest.mark.parametrize("number", range(len(PUBLISHED)))
def test_published_unets_need_no_options(number: int) -> None:
    """Tensors of their shapes, without numbers: the networks have up to 559 million."""
    described, published = PUBLISHED[number]
    with torch.device("meta"):
        network = ADMUNet(described.model_copy(update={"heads": 1}))
    names, flat = original_names(network), published["family"] == "openai-adm"
    tensors = {
        names[name]: tensor[..., 0]
        if flat and names[name].endswith(("qkv.weight", "proj_out.weight"))
        else tensor
        for name, tensor in network.state_dict().items()
    }
    count, tolerance = MILLIONS[number]
    assert abs(sum(tensor.numel() for tensor in tensors.values()) / 1e6 - count) < tolerance
    state = StateDict("here", tensors, "0" * 64)
    assert describe(state) == described
    settings = settings_of(state, described, {})
    assert all(getattr(settings, name) == value for name, value in published.items())
    another = settings_of(state, described, {"num_heads": 1})  # an option counts more
    assert (another.num_heads, another.num_head_channels) == (1, None)


@pytest.mark.parametrize(("width", "depth", "heads", "millions"), [(1152, 28, 16, 675), (768, 12, 12, 130)])
def test_published_transformers(width: int, depth: int, heads: int, millions: int) -> None:
    """XL/2 and B/2: Peebles & Xie 2023, table 1."""
    described = TransformerDescription(
        channels=4,
        out_channels=8,
        size=32,
        patch_size=2,
        width=width,
        depth=depth,
        heads=1,
        mlp_width=4 * width,
        features=256,
        num_classes=1000,
    )
    with torch.device("meta"):
        network = Transformer(described)
    tensors = {original_name(name): tensor for name, tensor in network.state_dict().items()}
    count = sum(tensor.numel() for name, tensor in tensors.items() if name != "pos_embed")
    assert abs(count / 1e6 - millions) < 1
    last = tensors["final_layer.linear.weight"] = torch.zeros(32, width)
    last[:4] = 1.0
    state = StateDict("here", tensors, "0" * 64)
    assert transformers.describe(state) == described
    # no variance was trained, so it is SiT's; else the file does not tell
    assert family_and_heads(state, described, {}) == ("sit", heads)
    last[12] = 1.0
    with pytest.raises(UserError, match=r"does not say family; .*one of: dit, sit"):
        family_and_heads(state, described, {})
    assert family_and_heads(state, described, {"family": "dit"}) == ("dit", heads)


def test_a_training_checkpoint_is_its_ema(tmp_path: Path) -> None:
    """As the training code of DiT and SiT writes it."""
    ema = torch.load(weights_of("dit"), weights_only=True)
    whole = {
        "model": {},
        "ema": ema,
        "opt": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(a=1),
    }
    torch.save(whole, tmp_path / "0050000.pt")
    torch.save(ema, tmp_path / "older.pt", _use_new_zipfile_serialization=False)
    torch.save({f"module.{name}": x for name, x in ema.items()}, tmp_path / "parallel.pt")
    expected = expected_of("dit")
    t, x = states("dit", expected)[2]
    for name in ("0050000.pt", "older.pt", "parallel.pt"):
        teacher = load_teacher(str(tmp_path / name), options=STATE_DICTS["dit"])
        assert relative(teacher(x, t, expected["labels"]), expected["pred_xstart"][:, 2]) < 1e-5


def test_the_size_of_images_is_needed_to_make_a_data_set() -> None:
    words = [f"teacher.path={weights_of('adm')}", "network.state_size=16", "network.state_channels=3"]
    words += ["network.num_classes=6", "network.null_class=false", "network.attention_resolutions=[8]"]
    shown = ", ".join(f"{key}: {str(value).lower()}" for key, value in ADM.items())
    assert find_teacher(
        load_config("configs/digits.yaml", [*words, f"teacher.options={{{shown}, image_size: 16}}"])
    )
    with pytest.raises(UserError, match="does not say the size of its images"):
        find_teacher(load_config("configs/digits.yaml", [*words, f"teacher.options={{{shown}}}"]))
    with pytest.raises(UserError, match="option image_size"):
        _ = opened("adm").shape
