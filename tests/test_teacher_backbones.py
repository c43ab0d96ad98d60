"""Students on the network of their teacher, of every family: where they begin, their forms, and the path by the commands."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_folders import randomized
from edm_files import SNAPSHOTS, snapshot
from safetensors.torch import load_file
from teacher_models import PUBLISHED, relative, saved_unet
from teacher_models import one_thread as one_thread  # fixture
from tiny import DATA, TINY, answer, dsno
from torch import Tensor, nn
from training_runs import ends, link_data, start_ranks

from dsno_cluster import load_student, load_teacher
from dsno_cluster.config import Config, Network, load_config, validate
from dsno_cluster.diffusion.schedule import logsnr_at, time_points
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.forecast import estimate_memory
from dsno_cluster.networks.activations import parameter_count, shape_of
from dsno_cluster.networks.descriptions import ADMDescription
from dsno_cluster.networks.temporal import TemporalConv
from dsno_cluster.provenance import Environment
from dsno_cluster.storage import FolderStorage
from dsno_cluster.students.dsno import DSNO, Form, StudentModel
from dsno_cluster.teachers import Teacher, find_teacher, open_teacher
from dsno_cluster.teachers.teacher import TeacherFamily
from dsno_cluster.training.beginning import make_student, new_student
from dsno_cluster.training.loop import train
from dsno_cluster.training.memory import training_memory
from dsno_cluster.trajectories.plan import make_plan
from dsno_cluster.trajectories.shards import commit_manifest, make_manifest, write_shard
from dsno_cluster.trajectories.spec import solve_shard

NOWHERE = Environment(device="cpu", versions={})
QUARTERS = time_points("quadratic", 4)
SERIES = Form(3, operator="series")
CONVOLUTION = Form(2)
ADM = {
    "family": "openai-adm", "num_head_channels": 8, "new_attention_order": False, "beta_schedule": "linear",
    "image_size": 16,
}  # fmt: skip
OPENAI_EDM = {"family": "openai-edm", "num_heads": 2, "new_attention_order": True, "image_size": 16}
U_NETS = [
    *SNAPSHOTS, "adm", "openai_edm", "own", "flax_both", "diffusers", "diffusers_v_of_pure_noise", "diffusers_edm",
    "diffusers_flow", "diffusers_ve",
]  # fmt: skip
TRANSFORMERS = ["dit", "sit", "diffusers_dit"]


def opened(name: str, folder: Path) -> TeacherFamily:
    """A small teacher, in the format in which people have its kind."""
    if name in SNAPSHOTS:
        return open_teacher(snapshot(name, folder))
    if name in ("adm", "dit", "sit"):
        options = ADM if name == "adm" else {"family": name, "num_heads": 4}
        return open_teacher(str(DATA / "state_dicts" / name / "weights.pt"), options=options)
    if name == "openai_edm":
        described = ADMDescription(
            channels=3, out_channels=3, features=32, widths=(32, 64), blocks_per_level=1, attention_levels=(1,),
            num_classes=4, film=True, resample="block", heads=2,
        )  # fmt: skip
        saved_unet(folder / "model.pt", described)
        return open_teacher(str(folder / "model.pt"), options=OPENAI_EDM)
    if name == "own":
        return open_teacher("package:digits-teacher")
    if name == "flax_both":
        return open_teacher(str(PUBLISHED / "teacher_flax_both"))
    return open_teacher(of_diffusers(name, folder))


def of_diffusers(name: str, folder: Path) -> str:
    diffusers = pytest.importorskip("diffusers")
    if name == "diffusers_dit":
        network = diffusers.DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
            num_embeds_ada_norm=10,
        )  # fmt: skip
    else:
        network = diffusers.UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8, num_class_embeds=3, attention_head_dim=8,
            time_embedding_type="fourier" if name == "diffusers_ve" else "positional",
        )  # fmt: skip
    randomized(network).save_pretrained(folder / name)
    scheduler, settings = {
        "diffusers_v_of_pure_noise": (
            "DDIMScheduler",
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        ),
        "diffusers_edm": ("EDMEulerScheduler", {}),
        "diffusers_flow": ("FlowMatchEulerDiscreteScheduler", {}),
        "diffusers_ve": ("ScoreSdeVeScheduler", {}),
    }.get(name, ("DDPMScheduler", {}))
    getattr(diffusers, scheduler)(**settings).save_pretrained(folder / name)
    return str(folder / name)


def asked(teacher: Teacher) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(1)
    return torch.randn(3, *teacher.shape), torch.tensor([2, 0, 1]) if teacher.num_classes else None


def student_of(family: TeacherFamily, form: Form, **more: Any) -> DSNO:
    """The warm-started student, whose temporal convolutions are the identity."""
    info = family.info()
    assert info.shape is not None and info.num_classes is not None and info.backbone is not None
    channels, *sides = info.shape
    network = Network(
        state_size=(sides[0], sides[1]), state_channels=channels, num_classes=info.num_classes, **more
    )
    student = DSNO(network, form, QUARTERS, backbone=info.backbone, init="zero")
    student.warm_start(family.network_weights())
    return student.eval()


# ---- where a student begins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*U_NETS, *TRANSFORMERS])
def test_a_series_begins_as_the_one_step_answer_of_its_teacher(name: str, tmp_path: Path) -> None:
    family = opened(name, tmp_path)
    teacher, student = family.load("float32"), student_of(family, SERIES)
    noise, labels = asked(teacher)
    answered = teacher(noise, 1.0, labels)
    assert relative(student.sample(noise, labels), answered) < 1e-5
    assert relative(student.trajectory(noise, labels), answered[:, None].expand(-1, 4, -1, -1, -1)) < 1e-5
    # with `data` this is DDIM's step, which keeps 4.5e-5 of the noise at t=0
    data = student_of(family, Form(3, "series", "data"))
    step = 1.0 * answered + 4.54e-5 * noise
    assert relative(data.sample(noise, labels), step) < 1e-5


@pytest.mark.parametrize("name", U_NETS)
def test_convolutions_begin_as_the_network_at_each_level(name: str, tmp_path: Path) -> None:
    """The network is given the teacher's own time of each level, and at t=1 its answer is the teacher's."""
    family = opened(name, tmp_path)
    teacher, student = family.load("float32"), student_of(family, CONVOLUTION)
    noise, labels = asked(teacher)
    backbone = family.info().backbone
    assert backbone is not None
    rows = torch.tensor([[backbone.times.at(logsnr_at(t)) for t in (1.0, *QUARTERS)]])
    given: list[Tensor] = []
    assert teacher.network is not None
    teacher.network.register_forward_pre_hook(lambda _m, inputs, *_: given.append(inputs[1]))
    for t in (1.0, *QUARTERS):
        teacher(noise[:1], t, None if labels is None else labels[:1])
    theirs = torch.stack([time.flatten()[0].float() for time in given])
    near = {"adm_iddpm": 1.0, "diffusers_ve": 1e-4}.get(name, 1e-3)  # the first rounds to a whole level
    torch.testing.assert_close(rows[0], theirs, rtol=1e-4, atol=near)
    bases = student._bases(student.times, False, noise.device, noise.dtype)
    with torch.no_grad():
        at_noise = student.backbone(noise, rows[:, :1].expand(1, 4), labels, *bases)
    answered = teacher(noise, 1.0, labels)
    for point in range(4):
        assert relative(at_noise[:, point], answered) < 1e-5
    # temporal convolutions follow each block, not those that resample nor the last one in the middle
    assert sum(isinstance(module, TemporalConv) for module in student.modules()) == 7


@pytest.mark.parametrize("name", U_NETS)
def test_convolutions_mix_points(name: str, tmp_path: Path) -> None:
    student = student_of(opened(name, tmp_path), CONVOLUTION)
    noise, labels = asked(opened(name, tmp_path).load("float32"))
    alone = student.trajectory(noise, labels)
    for module in student.modules():
        if isinstance(module, TemporalConv):
            nn.init.normal_(module.weight, std=0.02)
    mixed = student.trajectory(noise, labels)
    assert relative(mixed, alone) > 1e-5
    assert torch.equal(copy.deepcopy(student).trajectory(noise, labels), mixed)
    assert relative(student.sample(noise, labels), mixed[:, -1]) < 1e-5


@pytest.mark.parametrize("name", [*U_NETS, *TRANSFORMERS])
def test_a_student_is_described_without_its_teacher(name: str, tmp_path: Path) -> None:
    """Its description, as JSON, makes the same network; everything that the network keeps is a weight."""
    family = opened(name, tmp_path)
    student = student_of(family, SERIES)
    described = student.describe().values()
    model = validate(StudentModel, json.loads(json.dumps(described)), "here")
    assert model.backbone == family.info().backbone and "diffusers" not in described
    again = DSNO(model.network, model.form, model.times, backbone=model.backbone).eval()
    weights = dict(student.named_parameters())
    assert weights.keys() == student.state_dict().keys()
    assert all(weight.requires_grad for weight in weights.values())
    again.load_state_dict(weights)
    noise, labels = asked(family.load("float32"))
    assert torch.equal(again.sample(noise, labels), student.sample(noise, labels))


@pytest.mark.parametrize("name", ["ddpmpp_cond", "edm2_cond", "adm", "dit"])
def test_every_weight_of_a_series_learns(name: str, tmp_path: Path) -> None:
    """Also those of the terms that begin with nothing."""
    student = student_of(opened(name, tmp_path), SERIES).train()
    noise, labels = asked(opened(name, tmp_path).load("float32"))
    before = {key: weight.clone() for key, weight in student.named_parameters()}
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        student(noise, labels).square().mean().backward()
        optimizer.step()
    still = [key for key, weight in student.named_parameters() if torch.equal(weight, before[key])]
    assert not still


# ---- precision, recomputation, memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpmpp_cond", "adm_iddpm", "edm2_cond", "adm", "sit", "diffusers_flow"])
def test_bfloat16_is_close(name: str, tmp_path: Path) -> None:
    student = student_of(opened(name, tmp_path), SERIES)
    noise, labels = asked(opened(name, tmp_path).load("float32"))
    exact = student.sample(noise, labels)
    half = student.accelerate(precision="bfloat16").sample(noise, labels)
    assert half.dtype == torch.float32 and 1e-6 < relative(half, exact) < 0.03


def elements_kept(student: DSNO, noise: Tensor, labels: Tensor | None) -> int:
    """The elements that a forward pass keeps for the backward pass, which is then made."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = student(noise, labels)
    states.square().mean().backward()
    return sum(sizes)


@pytest.mark.parametrize("what", ["cheap", "blocks"])
@pytest.mark.parametrize("name", ["ddpmpp_cond", "edm2_cond", "adm", "dit", "diffusers_dit"])
def test_recomputation_changes_nothing(name: str, what: str, tmp_path: Path) -> None:
    family = opened(name, tmp_path)
    form = SERIES if name in TRANSFORMERS else CONVOLUTION
    plain, saving = student_of(family, form).train(), student_of(family, form).train().recompute(what)
    noise, labels = asked(family.load("float32"))
    kept = [elements_kept(student, noise, labels) for student in (plain, saving)]
    for (key, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=key)
    assert kept[1] < 0.7 * kept[0]


EDM_NETWORK = "network={state_size: 8, state_channels: 3, num_classes: 3, null_class: true}"
ADM_NETWORK = "network={state_size: 16, state_channels: 3, num_classes: 6}"
DIT_NETWORK = "network={state_size: 8, state_channels: 4, num_classes: 10, null_class: true}"
COMMON = [
    *TINY, "student={backbone: teacher, operator: series, modes: 3, prediction: state}", "data.name=null",
    "evaluation.reference=x.npz", "evaluation.metrics=[trajectory_error]", "trajectories.num_samples=32",
    "training.lr_decay=none", "training.warmup=0", "training.lr=1e-5",
]  # fmt: skip


def words_of(name: str, folder: Path) -> list[str]:
    if name in SNAPSHOTS:
        return [*COMMON, f"teacher.path={snapshot(name, folder)}", EDM_NETWORK]
    shutil.copy(DATA / "state_dicts" / name / "weights.pt", folder / f"{name}.pt")
    options, network = (
        (ADM, ADM_NETWORK) if name == "adm" else ({"family": name, "num_heads": 4}, DIT_NETWORK)
    )
    given = json.dumps(options)
    return [*COMMON, f"teacher.path={folder / f'{name}.pt'}", f"teacher.options={given}", network]


@pytest.mark.parametrize("name", ["ddpmpp_cond", "edm2_cond", "adm", "dit"])
def test_memory_is_estimated(name: str, tmp_path: Path) -> None:
    config = load_config("configs/digits.yaml", words_of(name, tmp_path))
    teacher = find_teacher(config)
    memory = training_memory(config, backbone=teacher.backbone())
    real = new_student(config, teacher)
    weights = sum(parameter.numel() for parameter in real.parameters())
    assert memory.weights == 4 * weights and memory.per_image > 0
    assert all(type(t) is nn.Parameter for t in make_student(config, teacher.backbone()).parameters())
    estimated = estimate_memory(config, teacher)
    assert (estimated.student_batch is None) == (name == "dit")
    if estimated.student_parameters is not None:
        assert estimated.student_parameters == pytest.approx(weights, rel=0.35)
    assert bool(real(torch.zeros(1, *config.network.state_shape), torch.tensor([0])).isfinite().all())


def test_sizes_of_the_networks(tmp_path: Path) -> None:
    for name in ("ddpmpp_cond", "adm_iddpm", "edm2_cond", "adm"):
        family = opened(name, tmp_path)
        backbone, shape = family.info().backbone, family.info().shape
        assert backbone is not None and shape is not None
        sizes = shape_of(backbone, shape[1:])
        assert sizes is not None
        network = family.load("float32").network
        assert network is not None
        real = sum(tensor.numel() for tensor in network.parameters())
        assert parameter_count(sizes, 3, 0, family.info().num_classes or 0) == pytest.approx(real, rel=0.35)


# ---- what is refused ----------------------------------------------------------------------------------------------------


def test_what_no_student_can_be_built_on(tmp_path: Path) -> None:
    convolution = "student.operator=convolution"
    refused = {
        "the teacher at .* is a transformer, whose student can only be a series; set student.operator=series": [
            *words_of("dit", tmp_path), convolution, "student.modes=2",
        ],
        "network.dropout 0.1: the network of the teacher at .* has none; set it to 0": [
            *words_of("adm", tmp_path), "network.dropout=0.1",
        ],
        "closed-form teacher at closed-form:gaussian has no network that is known here; set student.backbone=unet": [
            *COMMON, "teacher.path=closed-form:gaussian", "teacher.options={mean: 0.0, std: 1.0, shape: [1, 8, 8]}",
            "network={state_size: 8, state_channels: 1}",
        ],
        "no UNet2DModel of diffusers on betas; take backbone=teacher or unet": [
            *words_of("adm", tmp_path), "student.backbone=diffusers",
        ],
        r"student\.warm_start: .* take its own network \(student\.backbone=teacher\), or set student\.warm_start=false": [
            *words_of("adm", tmp_path), "student.backbone=unet",
            "network={state_size: 16, state_channels: 3, num_classes: 6, width: 32, multipliers: [1], blocks_per_level: 1, "
            "embedding_dim: 32}",
        ],
    }  # fmt: skip
    for says, words in refused.items():
        with pytest.raises(UserError, match=says):
            new_student(load_config("configs/digits.yaml", words))


def test_dropout_is_that_of_the_config(tmp_path: Path) -> None:
    """The snapshots were trained with dropout; a student has none unless its config says so."""
    for share in (0.0, 0.2):
        student = student_of(opened("ddpmpp_cond", tmp_path), SERIES, dropout=share)
        shares = {module.p for module in student.modules() if isinstance(module, nn.Dropout)}
        assert shares == {share}


# ---- the path by the commands -------------------------------------------------------------------------------------------


def solve_here(config: Config) -> None:
    """The trajectories of a config, made in this process."""
    plan = make_plan(config)
    teacher, storage = plan.teacher.load(), FolderStorage(Path(config.storage.root))
    each = plan.spec.samples_per_shard
    shards = [
        write_shard(storage, plan.folder, i, i * each, solve_shard(plan.spec, teacher, i))
        for i in range(plan.size.num_shards)
    ]
    commit_manifest(storage, plan.folder, make_manifest(plan.spec, shards, NOWHERE))


@pytest.mark.parametrize("name", ["ddpmpp_cond", "edm2_cond"])
def test_a_run_in_two_parts_is_one_run(name: str, tmp_path: Path) -> None:
    """A warm start, two steps, and two more: the bytes of four steps; and the student needs no teacher."""
    words = [*words_of(name, tmp_path), "training.threads=1"]
    teacher = opened(name, tmp_path).load("float32")
    one, parts = tmp_path / "one", tmp_path / "parts"
    solve_here(load_config("configs/digits.yaml", [*words, f"storage.root={one}"]))
    link_data(one, parts)
    for out, steps in ((one, 4), (parts, 2), (parts, 4)):
        train(load_config("configs/digits.yaml", [*words, f"storage.root={out}", f"training.steps={steps}"]))
    file = "students/digits/step-000000004/model.safetensors"
    assert (one / file).read_bytes() == (parts / file).read_bytes()
    (tmp_path / f"{name}.pkl").unlink()
    student = load_student(str(parts / "students/digits"))
    noise, labels = asked(teacher)
    assert 1e-6 < relative(student.sample(noise, labels), teacher(noise, 1.0, labels)) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpmpp_cond", "adm", "dit"])
def test_the_path_of_a_student_on_its_teachers_network(name: str, tmp_path: Path) -> None:
    """Trajectories, a warm start, a run in two parts, an evaluation and samples, by the commands."""
    words = words_of(name, tmp_path)
    options = ADM if name == "adm" else {"family": name, "num_heads": 4} if name == "dit" else None
    path = tmp_path / (f"{name}.pkl" if name in SNAPSHOTS else f"{name}.pt")
    teacher, root = load_teacher(str(path), options=options), tmp_path / "root"
    planned = answer("plan", *words, f"storage.root={root}")
    assert planned.returncode == 0, planned.stderr
    for command, *more in (
        ("gen-trajectories",),
        ("train", "training.steps=2"),
        ("train",),
        ("eval",),
    ):
        done = dsno(command, *words, f"storage.root={root}", *more, "--launcher", "local")
        assert done.returncode == 0, done.stderr
    measured = (root / "evaluation/digits/metrics.json").read_text()
    assert "trajectory_error" in measured
    path.unlink()  # elsewhere, a student needs no teacher
    student = load_student(str(root / "students/digits"))
    noise, labels = asked(teacher)
    assert 1e-6 < relative(student.sample(noise, labels), teacher(noise, 1.0, labels)) < 0.05
    assert student.trajectory(noise, labels, times=[0.3, 0.0]).shape[:2] == (3, 2)
    told = ["--num", "2", "--out", str(tmp_path / "x.npz"), *(["--states"] if name == "dit" else [])]
    drawn = answer("sample", str(root / "students/digits"), *told)
    assert drawn.returncode == 0, drawn.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["edm2_cond", "dit"])
def test_two_ranks_divide_a_teachers_network(name: str, tmp_path: Path) -> None:
    """ZeRO 2 and 3 on two ranks give what one rank gives."""
    words = [*words_of(name, tmp_path), "training.recompute=blocks"]
    data = tmp_path / "data"
    made = dsno("gen-trajectories", *words, f"storage.root={data}", "--launcher", "local")
    assert made.returncode == 0, made.stderr
    found = {}
    for stage in (0, 2, 3):
        out = link_data(data, tmp_path / f"stage{stage}")
        ranks = start_ranks(out, 1 if stage == 0 else 2, *words[len(TINY) :], f"training.zero_stage={stage}")
        statuses, errors = ends(ranks)
        assert statuses == [0] * len(ranks), errors
        found[stage] = load_file(out / "students/digits/step-000000004/model.safetensors")
    for stage in (2, 3):
        for key, tensor in found[stage].items():
            torch.testing.assert_close(tensor, found[0][key], rtol=1e-3, atol=1e-5, msg=f"{stage} {key}")


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *[(name, form) for name in ("ddpmpp_cond", "edm2_cond", "adm") for form in (SERIES, CONVOLUTION)],
        ("dit", SERIES),
    ],
    ids=lambda given: given if isinstance(given, str) else given.operator,
)
@pytest.mark.slow
def test_captured_without_graph_breaks(name: str, form: Form, tmp_path: Path) -> None:
    """Once for each shape, in training too."""
    from torch._dynamo.utils import counters

    student = student_of(opened(name, tmp_path), form)
    noise, labels = asked(opened(name, tmp_path).load("float32"))
    plain = [student.sample(noise[:count], None if labels is None else labels[:count]) for count in (3, 2)]
    torch._dynamo.reset()  # the shapes of other students count too
    counters.clear()
    student.backbone.compile(dynamic=False, fullgraph=True, backend="eager")  # captured, then run as it is
    for count, expected in zip((3, 2, 3), (*plain, plain[0]), strict=True):
        found = student.sample(noise[:count], None if labels is None else labels[:count])
        assert relative(found, expected) < 1e-6
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"], counters
    student.train()(noise, labels).mean().backward()
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"], counters


@pytest.mark.slow  # compiling takes most of a minute
@pytest.mark.parametrize("name", ["ddpmpp_cond", "dit"])
def test_compiled_students_answer_the_same(name: str, tmp_path: Path) -> None:
    family = opened(name, tmp_path)
    noise, labels = asked(family.load("float32"))
    plain, compiled = student_of(family, SERIES), student_of(family, SERIES).accelerate(compile=True)
    assert relative(compiled.sample(noise, labels), plain.sample(noise, labels)) < 1e-4
