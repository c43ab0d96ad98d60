"""Trainable copies of teachers of every family: what they answer, what of them learns, and the head on their middle."""

from __future__ import annotations

import copy as copies
import re
from pathlib import Path

import pytest
import torch
from diffusers_folders import randomized
from edm_files import snapshot
from teacher_models import PUBLISHED, relative, saved_unet
from teacher_models import one_thread as one_thread  # fixture
from test_teacher_backbones import COMMON, TRANSFORMERS, U_NETS, opened
from torch import Tensor, nn
from training_runs import ends, start_ranks

from dsno_cluster.config import load_config
from dsno_cluster.diffusion.schedule import alpha_sigma
from dsno_cluster.errors import UserError
from dsno_cluster.networks.descriptions import ADMDescription
from dsno_cluster.networks.discriminator import DiscriminatorHead
from dsno_cluster.networks.edm2_unet import EDM2UNet, MPLayer
from dsno_cluster.networks.middle import middle_of
from dsno_cluster.networks.recompute import recompute_in_backward
from dsno_cluster.networks.unet import UNet
from dsno_cluster.teachers import ConfiguredTeacher, find_teacher, open_teacher
from dsno_cluster.teachers.fake_score import trainable_copy
from dsno_cluster.teachers.teacher import TeacherFamily

OTHERS = ["flax_x", "improved", "diffusers_oblong", "diffusers_without_middle"]
ALL = [*U_NETS, *TRANSFORMERS, *OTHERS]


def family_of(name: str, folder: Path) -> TeacherFamily:
    if name not in OTHERS:
        return opened(name, folder)
    if name == "flax_x":
        return open_teacher(str(PUBLISHED / "teacher_flax_x"))
    if name == "improved":
        described = ADMDescription(
            channels=3, out_channels=6, features=32, widths=(32, 64), blocks_per_level=1, attention_levels=(1,),
            num_classes=0, film=False, resample="convolution", heads=2,
        )  # fmt: skip
        saved_unet(folder / "model.pt", described)
        options = {
            "family": "openai-adm", "num_heads": 2, "new_attention_order": False, "beta_schedule": "cosine",
            "image_size": 8, "diffusion_steps": 100, "rescale_timesteps": True,
        }  # fmt: skip
        return open_teacher(str(folder / "model.pt"), options=options)
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.UNet2DModel(
        sample_size=(8, 16), in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"), norm_num_groups=8,
        mid_block_type=None if name == "diffusers_without_middle" else "UNetMidBlock2D",
    )  # fmt: skip
    randomized(network).save_pretrained(folder / name)
    diffusers.DDPMScheduler().save_pretrained(folder / name)
    return open_teacher(str(folder / name))


def configured(family: TeacherFamily, *words: str) -> ConfiguredTeacher:
    info = family.info()
    assert info.shape is not None
    channels, height, width = info.shape
    network = (
        f"network={{state_size: [{height}, {width}], state_channels: {channels}, num_classes: {info.num_classes}, "
        f"null_class: {str(info.null_class is not None).lower()}}}"
    )
    config = load_config("configs/digits.yaml", [*COMMON, network, *words])
    return ConfiguredTeacher(config, "here", family, info, config.trajectories.method)


def asked(teacher: ConfiguredTeacher, count: int = 3) -> tuple[Tensor, Tensor, Tensor | None]:
    """States of the teacher's shape at times of their own, which are between data and pure noise, and labels."""
    assert teacher.info.shape is not None
    draw = torch.Generator().manual_seed(1)
    t_N = torch.linspace(0.35, 0.95, count, dtype=torch.float64)
    alpha, sigma = (s.float()[:, None, None, None] for s in alpha_sigma(t_N))
    clean = 0.5 * torch.randn(count, *teacher.info.shape, generator=draw).clamp(-2.0, 2.0)
    x = alpha * clean + sigma * torch.randn(clean.shape, generator=draw)
    labels = torch.arange(count) % teacher.info.num_classes if teacher.info.num_classes else None
    return x, t_N, labels


def middle_by_name(network: nn.Module) -> nn.Module:
    """The module that is the middle by its name in the network."""
    named = dict(network.named_modules())
    for name in ("middle_out", "mid_block"):
        if name in named:
            return named[name]
    for pattern in (
        r"enc\.\d+x\d+_block\d+",
        r"blocks\.\d+",
        r"transformer_blocks\.\d+",
        r"down_blocks\.\d+",
    ):
        found = [module for name, module in named.items() if re.fullmatch(pattern, name)]
        if found:
            return found[0] if "blocks" in pattern and "down" not in pattern else found[-1]
    raise AssertionError(list(named))


# ---- what a copy answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_copy_answers_as_its_teacher(name: str, tmp_path: Path) -> None:
    """Before it is trained, in training mode too, whatever the teacher's own dropout was; and nearly so in bfloat16."""
    teacher = configured(family_of(name, tmp_path), "teacher.precision=bfloat16")
    copy, (x, t_N, labels) = trainable_copy(teacher, seed=5).train(), asked(teacher)
    right = teacher.opened.load("float32")(x, t_N, labels)
    x0, logits = copy(x, t_N, labels)
    assert x0.dtype == logits.dtype == torch.float32 and relative(x0.detach(), right) < 1e-6
    assert not any(module.training for module in copy.modules())
    if teacher.info.null_class is not None:
        without = teacher.opened.load("float32")(x, t_N, torch.full((3,), teacher.info.null_class))
        assert relative(copy(x, t_N)[0].detach(), without) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        half, half_logits = copy(x, t_N, labels)
    assert half.dtype == half_logits.dtype == torch.float32
    assert 1e-6 < relative(half.detach(), x0.detach()) < 0.03
    assert relative(half_logits.detach(), logits.detach()) < 0.1
    half.sum().backward()


@pytest.mark.parametrize("name", ALL)
def test_logits_are_the_heads_answer_to_the_middle(name: str, tmp_path: Path) -> None:
    teacher = configured(family_of(name, tmp_path))
    copy, (x, t_N, labels) = trainable_copy(teacher, seed=5), asked(teacher)
    seen: list[Tensor] = []
    middle_by_name(copy.network).register_forward_hook(
        lambda _m, _i, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    _, logits = copy(x, t_N, labels)
    (features,) = seen
    places = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
    assert places.shape[:2] == logits.shape and 1 < logits.shape[1] < x[0, 0].numel()
    torch.testing.assert_close(logits, copy.head(places))


def test_the_head_judges_each_place_by_itself() -> None:
    head = DiscriminatorHead(6)
    images_NCHW = torch.randn(2, 6, 3, 4)
    logits = head(images_NCHW)
    assert logits.shape == (2, 12)
    # by hand, at one pixel: normalised over channels, two layers
    h = images_NCHW[1, :, 2, 1]
    h = (h - h.mean()) / (h.var(correction=0) + 1e-5).sqrt()
    h = head.hidden.weight @ h + head.hidden.bias
    expected = head.out.weight @ (h * h.sigmoid()) + head.out.bias
    torch.testing.assert_close(logits[1, 2 * 4 + 1], expected[0])
    torch.testing.assert_close(head(images_NCHW.flatten(2).transpose(1, 2)), logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(images_NCHW), logits)


# ---- what learns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_gradients_reach_everything(name: str, tmp_path: Path) -> None:
    teacher = configured(family_of(name, tmp_path))
    copy, (x, t_N, labels) = trainable_copy(teacher, seed=5), asked(teacher)
    x.requires_grad_()
    weights = dict(copy.named_parameters())
    draw = torch.Generator().manual_seed(2)
    x0, logits = copy(x, t_N, labels)
    of_x0, of_logits = (torch.randn(y.shape, generator=draw) for y in (x0, logits))
    ((x0 * of_x0).sum() + (logits * of_logits).sum()).backward()
    still = [key for key, weight in weights.items() if weight.grad is None or not weight.grad.any()]
    assert not still and x.grad is not None and x.grad.flatten(1).any(dim=1).all()
    # a loss on one part alone: weights that play no part in it get zeros, so that all ranks have the same gradients
    for part, others in ((0, "head."), (1, "network.")):
        copy.zero_grad()
        copy(x, t_N, labels)[part].sum().backward()
        assert all(weight.grad is not None for weight in weights.values())
        assert any(key.startswith(others) and not weight.grad.any() for key, weight in weights.items())


@pytest.mark.parametrize("name", ["own", "edm2_cond", "diffusers", "dit"])
def test_activations_can_be_recomputed(name: str, tmp_path: Path) -> None:
    """The middle is noted once, in the forward pass, and the gradients stay."""
    teacher = configured(family_of(name, tmp_path))
    plain, saving = trainable_copy(teacher, seed=5), trainable_copy(teacher, seed=5)
    recompute_in_backward(saving.network, "blocks")
    for copy in (plain, saving):
        torch.cat([y.flatten() for y in copy(*asked(teacher))]).square().sum().backward()
    for (key, weight), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert weight.grad is not None and other.grad is not None
        torch.testing.assert_close(other.grad, weight.grad, msg=key)


@pytest.mark.parametrize("name", ["edm2_cond", "diffusers_dit"])
def test_gradients_are_those_of_finite_differences(name: str, tmp_path: Path) -> None:
    teacher = configured(family_of(name, tmp_path))
    copy, (x, t_N, labels) = trainable_copy(teacher, seed=5), asked(teacher, 2)
    draw = torch.Generator().manual_seed(2)
    shapes = [y.shape for y in copy(x, t_N, labels)]
    of_x0, of_logits = (torch.randn(shape, generator=draw) for shape in shapes)

    def loss() -> Tensor:
        x0, logits = copy(x, t_N, labels)
        return (x0.double() * of_x0).sum() + (logits.double() * of_logits).sum()

    moved = [x.requires_grad_(), *copy.parameters()]
    gradients = torch.autograd.grad(loss(), moved)
    for chosen in (slice(0, 1), slice(1, None)):  # the state, the weights
        along = [g / torch.cat([h.flatten() for h in gradients[chosen]]).norm() for g in gradients[chosen]]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients[chosen], along, strict=True))
        values = []
        for step in (3e-3, -6e-3):
            with torch.no_grad():
                for tensor, d in zip(moved[chosen], along, strict=True):
                    tensor.add_(step * d)
            values.append(float(loss().detach()))
        assert (values[0] - values[1]) / 6e-3 == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("name", ALL)
def test_the_state_is_what_is_trained(name: str, tmp_path: Path) -> None:
    """Weights with an axis, as DeepSpeed needs them, whose state another copy takes over; tables that are fixed stay so."""
    teacher = configured(family_of(name, tmp_path))
    copy, (x, t_N, labels) = trainable_copy(teacher, seed=5), asked(teacher)
    weights = dict(copy.named_parameters())
    assert weights.keys() == copy.state_dict().keys()
    assert {key.partition(".")[0] for key in weights} == {"network", "head"}
    for key, weight in weights.items():
        assert weight.requires_grad and weight.ndim > 0 and weight.is_contiguous(), key
        assert weight.dtype == torch.float32, key
        assert not re.search(r"freqs|phases|positions|pos_embed$|time_proj", key), key
    with torch.no_grad():
        for weight in weights.values():
            weight.add_(0.01 * torch.randn(weight.shape))
    other = trainable_copy(teacher, seed=6)
    other.load_state_dict({key: weight.clone() for key, weight in weights.items()})
    assert all(map(torch.equal, copy(x, t_N, labels), other(x, t_N, labels)))


def test_filters_of_edm2_are_normalised_whenever_they_are_used(tmp_path: Path) -> None:
    """Its magnitudes do not matter, as in EDM2's own training; the teacher's filters are fixed."""
    teacher = configured(open_teacher(snapshot("edm2_cond", tmp_path)))
    copy, (x, t_N, labels) = trainable_copy(teacher, seed=5), asked(teacher)
    assert isinstance(copy.network, EDM2UNet)
    x0 = copy(x, t_N, labels)[0]
    with torch.no_grad():
        for module in copy.network.modules():
            if isinstance(module, MPLayer):
                module.weight.mul_(1.5)
    assert relative(copy(x, t_N, labels)[0].detach(), x0.detach()) < 1e-3


def test_the_head_is_drawn_from_its_seed() -> None:
    teacher = find_teacher(load_config("configs/digits.yaml"))
    first, same, other = (trainable_copy(teacher, seed).head.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["hidden.weight"], other["hidden.weight"])


def test_a_copy_is_not_copied() -> None:
    copy = trainable_copy(find_teacher(load_config("configs/digits.yaml")), 1)
    with pytest.raises(TypeError, match="would go on using the weights of this one"):
        copies.deepcopy(copy)


# ---- teachers without a network -----------------------------------------------------------------------------------------

CLOSED_FORM = [
    "teacher.path=closed-form:mixture",
    "teacher.options={means: [0.5, -0.5], stds: 0.2, shape: [1, 8, 16], classes: [0, 1], null_class: true}",
    "network.state_size=[8, 16]", "network.num_classes=2", "student.backbone=unet", "student.warm_start=false",
]  # fmt: skip


def test_a_closed_form_is_replaced_by_our_unet() -> None:
    """New weights of the seed, which predict v: at first almost 0, so that x0 is alpha x."""
    config = load_config("configs/digits.yaml", [*CLOSED_FORM, "network.dropout=0.3"])
    teacher = find_teacher(config)
    before = torch.get_rng_state()
    copy, same = trainable_copy(teacher, seed=3).train(), trainable_copy(teacher, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    x, t_N, labels = asked(teacher)
    x0, logits = copy(x, t_N, labels)
    assert isinstance(copy.network, UNet) and logits.shape == (3, 4 * 8)
    alpha = alpha_sigma(t_N)[0].float()[:, None, None, None]
    torch.testing.assert_close(x0, alpha * x, atol=1e-3, rtol=1e-3)
    assert all(map(torch.equal, copy(x, t_N, labels), same(x, t_N, labels)))
    with pytest.raises(
        UserError, match=r"closed-form teacher at closed-form:mixture has no .* needs width, multipliers$"
    ):
        sizes = ["network.width=null", "network.multipliers=null", "student.backbone=teacher"]
        trainable_copy(find_teacher(load_config("configs/digits.yaml", [*CLOSED_FORM, *sizes])), 3)


FACTORIES = """
import torch
from torch import nn
from dsno_cluster import load_teacher
from dsno_cluster.config import Network
from dsno_cluster.networks.unet import UNet

SIZES = Network(
    state_size=8, state_channels=1, num_classes=10, null_class=True, width=32, multipliers=(1,), blocks_per_level=1,
    embedding_dim=32,
)
ONE = load_teacher("package:digits-teacher")


def ours():
    return load_teacher("package:digits-teacher")


def shared():
    return ONE


class Wrapped:
    shape, num_classes, null_class = (1, 8, 8), 10, 10

    def __init__(self, gradients):
        self.network, self.gradients = UNet(SIZES), gradients

    def __call__(self, x, t, labels):
        with torch.set_grad_enabled(self.gradients and torch.is_grad_enabled()):
            return self.network(x, t.float()[:, None], labels)[:, 0]


def of_network(gradients=True):
    torch.manual_seed(0)
    return Wrapped(gradients)


class Unknown(nn.Conv2d):
    shape, num_classes = (1, 8, 8), 0

    def forward(self, x, t, labels):
        return super().forward(x)


def unknown():
    return Unknown(1, 1, 3, padding=1)
"""


def of_factory(name: str, *words: str) -> ConfiguredTeacher:
    config = load_config("configs/digits.yaml", [f"teacher.path=some_teachers:{name}", *words])
    return find_teacher(config)


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_teachers.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize("name", ["ours", "of_network"])
def test_a_network_of_a_users_function_is_copied(name: str) -> None:
    teacher = of_factory(name, "student.backbone=unet", "student.warm_start=false")
    copy = trainable_copy(teacher, 1)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([3, 10])
    t_N = torch.tensor([0.3, 0.9], dtype=torch.float64)
    x0, logits = copy(x, t_N, labels)
    assert relative(x0.detach(), teacher.load()(x, t_N, labels)) < 1e-6
    (x0.sum() + logits.sum()).backward()
    assert all(weight.grad is not None for weight in copy.parameters())


@pytest.mark.usefixtures("factories")
def test_functions_of_which_no_copy_can_be_trained() -> None:
    plain = ["student.backbone=unet", "student.warm_start=false"]
    with pytest.raises(UserError, match="some_teachers:shared returns the same network at each call"):
        trainable_copy(of_factory("shared", *plain), 1)
    with pytest.raises(UserError, match="does not compute x0 by it with gradients"):
        trainable_copy(of_factory("of_network", "teacher.options={gradients: false}", *plain), 1)
    unclassed = ["network.num_classes=0", "network.null_class=false"]
    assert isinstance(trainable_copy(of_factory("unknown", *plain, *unclassed), 1).network, UNet)


def test_networks_that_are_not_known_have_no_middle() -> None:
    assert middle_of(nn.Sequential(nn.Conv2d(1, 1, 1))) is None


# ---- divided among ranks ------------------------------------------------------------------------------------------------

# Gradients of each part of the answer by itself, and of both, under ZeRO 3 are those without an engine.
UNDER_ZERO_3 = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
import torch
from test_fake_score import asked, configured, family_of
from dsno_cluster.config import load_config
from dsno_cluster.teachers.fake_score import trainable_copy
from dsno_cluster.training.deepspeed_internals import import_deepspeed
from dsno_cluster.training.ranks import joined_ranks

folder, *names = NAMES
with joined_ranks(load_config("configs/digits.yaml", ["training.threads=1"])) as ranks:
    deepspeed = import_deepspeed()
    from deepspeed.utils import safe_get_full_grad
    for name in names:
        print(name, file=sys.stderr, flush=True)
        own = Path(folder) / f"{name}-{ranks.rank}"
        own.mkdir()
        torch.manual_seed(0)  # the network of each rank is the same
        teacher = configured(family_of(name, own))
        x, t_N, labels = asked(teacher, 2)
        mine = slice(ranks.rank, ranks.rank + 1) if ranks.world_size == 2 else slice(0, 2)
        of_mine = x[mine], t_N[mine], None if labels is None else labels[mine]

        def losses(answer):
            x0, logits = (y.square().flatten(1).mean(1) for y in answer)
            return x0.mean(), logits.mean(), x0.mean() + logits.mean()

        plain, truth = trainable_copy(teacher, 5), []
        for part in range(3):
            plain.zero_grad()
            losses(plain(x, t_N, labels))[part].backward()
            truth.append({key: weight.grad.clone() for key, weight in plain.named_parameters()})
        copy = trainable_copy(teacher, 5)
        engine, *_ = deepspeed.initialize(
            model=copy,
            optimizer=torch.optim.AdamW(copy.parameters(), lr=0.0, weight_decay=0.0),
            dist_init_required=False,
            config={
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {
                    "stage": 3,
                    "stage3_param_persistence_threshold": 0,
                    "stage3_max_live_parameters": 1,
                    "stage3_max_reuse_distance": 1,
                    "stage3_prefetch_bucket_size": 1,
                },
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 10**9,
            },
        )
        assert engine.zero_optimization_stage() == 3
        assert all(p.ds_tensor is not None and p.numel() == 0 for p in engine.module.parameters())
        for part in (1, 0, 2):
            given = of_mine[0].clone().requires_grad_()
            answer = engine(given, *of_mine[1:])
            engine.backward(losses(answer)[part])
            assert given.grad.any()
            largest = max(float(right.abs().max()) for right in truth[part].values())
            for key, weight in engine.module.named_parameters():
                torch.testing.assert_close(
                    safe_get_full_grad(weight), truth[part][key], rtol=1e-3, atol=1e-5 * largest, msg=f"{name} {part} {key}"
                )
            engine.step()
        engine.destroy()
"""


@pytest.mark.parametrize(
    ("count", "names"),
    [
        (1, ["ddpmpp_cond"]),
        pytest.param(1, ["own", "adm", "dit", "diffusers"], marks=pytest.mark.slow),
        pytest.param(2, ["edm2_cond", "diffusers_dit"], marks=pytest.mark.slow),
    ],
    ids=["one", "one, others", "two"],
)
def test_an_engine_that_divides_weights_has_the_same_gradients(
    count: int, names: list[str], tmp_path: Path
) -> None:
    script = UNDER_ZERO_3.replace("NAMES", repr([str(tmp_path), *names]))
    statuses, errors = ends(start_ranks(tmp_path, count, script=script))
    assert statuses == [0] * count, "\n".join(error[-3000:] for error in errors)
