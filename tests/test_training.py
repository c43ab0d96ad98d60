"""Training through the real engine: ranks, ZeRO stages, averages, resume, losses."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny import TINY, answer, dsno
from training_runs import ends, link_data, metrics, start_ranks, train, weights, words

from dsno_cluster import load_student
from dsno_cluster.config import load_config
from dsno_cluster.diffusion.schedule import loss_weights
from dsno_cluster.training.beginning import new_student
from dsno_cluster.training.objectives import losses
from dsno_cluster.training.objectives.trajectories import TrajectoryObjective
from dsno_cluster.training.optim import drawn_points, ema_decay_at, learning_rate
from dsno_cluster.trajectories.reader import Batch

# what the plain loop is compared with: the series of the digits config, and convolutions on drawn points
FORMS = {
    "series": [],
    "drawn": [
        *(
            "student.operator=convolution",
            "student.prediction=state",
            "student.modes=2",
            "student.points=drawn",
        ),
        *("training.end_share=0.3", "training.most_points=4", "training.time_weighting=sqrt"),
    ],
}


def new_student_weights(form: str) -> dict[str, torch.Tensor]:
    config = load_config("configs/digits.yaml", [*TINY, *FORMS[form]])
    torch.manual_seed(config.seed)
    return {k: v.clone() for k, v in new_student(config).state_dict().items()}


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
DECAYS = (0.9, 0.2)


@functools.cache
def plain_loop(
    tiny_data: Path, form: str, optimizer_name: str = "adam", weight_decay: float = 0.0
) -> tuple[list[float], dict[float, dict[str, torch.Tensor]]]:
    """The truth: the same training as a dozen lines of torch, without engine, reader's ranks or checkpoints."""
    from dsno_cluster.storage import open_storage
    from dsno_cluster.trajectories.reader import ShardReader, open_trajectories, read_batches

    torch.set_num_threads(1)
    config = load_config("configs/digits.yaml", [*TINY, *FORMS[form], f"storage.root={tiny_data}"])
    storage = open_storage(str(tiny_data))
    folder = f"trajectories/{next((tiny_data / 'trajectories').iterdir()).name}/"
    manifest = open_trajectories(storage, folder, 96)
    torch.manual_seed(config.seed)
    student = new_student(config)
    optimizer = OPTIMIZERS[optimizer_name](student.parameters(), weight_decay=weight_decay)
    averages = {d: {k: v.clone() for k, v in student.state_dict().items()} for d in DECAYS}
    objective = TrajectoryObjective(config, torch.device("cpu"))
    history = []
    batches = read_batches(
        ShardReader(storage, folder, manifest), seed=0, first_sample=0, batch_size=16, rank=0, world_size=1
    )
    for step, (batch,) in zip(range(4), batches, strict=False):
        rate = learning_rate(step, 4, config.training.lr, config.training.warmup, "cosine")
        optimizer.param_groups[0]["lr"] = rate
        loss, _ = objective.loss(student, batch, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(float(loss.detach()))
        for d, average in averages.items():
            decay = ema_decay_at(step, d, ramp=True)
            averages[d] = {k: decay * average[k] + (1 - decay) * v for k, v in student.state_dict().items()}
    return history, averages


# Losses agree to float32 rounding. Adam divides a gradient by its own size, so a parameter whose gradient is
# rounding noise moves either way: how far the averaged weights moved is compared as a whole, not one by one.
LOSS_TOLERANCE, MOVE_TOLERANCE = 2e-4, 0.05


def apart(
    found: dict[str, torch.Tensor], average: dict[str, torch.Tensor], start: dict[str, torch.Tensor]
) -> float:
    """How far weights are from an average, relative to how far that moved from the start."""
    assert found.keys() == start.keys()
    moved = torch.cat([(average[k] - start[k]).flatten() for k in start])
    assert float(moved.norm()) > 1e-4
    return float(torch.cat([(found[k] - average[k]).flatten() for k in start]).norm() / moved.norm())


@pytest.mark.parametrize(
    ("form", "stage", "tasks", "more"),
    [
        ("series", 1, 1, []),
        ("drawn", 2, 2, []),
        pytest.param("series", 3, 2, ["training.optimizer=radam"], marks=pytest.mark.slow),
        pytest.param("drawn", 0, 2, ["training.accumulation=2"], marks=pytest.mark.slow),
        pytest.param(
            "series", 1, 4, ["training.optimizer=adamw", "training.weight_decay=0.1"], marks=pytest.mark.slow
        ),
        pytest.param("drawn", 3, 2, ["training.recompute=blocks"], marks=pytest.mark.slow),
        pytest.param("series", 2, 2, ["training.recompute=cheap"], marks=pytest.mark.slow),
    ],
    ids=["z1", "z2x2", "z3x2 radam", "z0x2 accumulation", "z1x4 adamw", "z3 recompute", "z2 cheap"],
)
def test_ranks_and_stages_train_like_the_plain_loop(
    form: str, stage: int, tasks: int, more: list[str], tiny_data: Path, tmp_path: Path
) -> None:
    changed = dict(word.removeprefix("training.").split("=") for word in more)
    decay = float(changed.get("weight_decay", 0.0))
    history, averages = plain_loop(tiny_data, form, changed.get("optimizer", "adam"), decay)
    out = tmp_path / "out"
    where = [f"training.zero_stage={stage}", "--tasks-per-node", str(tasks)]
    train(tiny_data, out, *FORMS[form], *more, *where, f"training.ema_decay={list(DECAYS)}")
    assert [line["loss"] for line in metrics(out)] == pytest.approx(history, rel=LOSS_TOLERANCE)
    start = new_student_weights(form)
    for d, file in zip(DECAYS, ("model.safetensors", "ema-0.2.safetensors"), strict=True):
        assert apart(weights(out, file=file), averages[d], start) < MOVE_TOLERANCE
    meta = json.loads((out / "students/digits/step-000000004/meta.json").read_text())
    assert meta["world_size"] == tasks and meta["step"] == 4
    student = load_student(str(out))  # a run folder means its latest
    noise = torch.randn(3, 1, 8, 8)
    end = student.trajectory(noise, torch.arange(3), [0.0])[:, 0]
    assert torch.allclose(student.sample(noise, torch.arange(3)), end, atol=1e-5)


@pytest.mark.slow
def test_one_of_several_averages_is_asked_for(tiny_data: Path, tmp_path: Path) -> None:
    from dsno_cluster.errors import UserError

    out = tmp_path / "out"
    train(tiny_data, out, "training.ema_decay=[0.9, 0.2]")
    of = {d: load_student(str(out), ema=d).state_dict() for d in (None, 0.9, 0.2)}
    name = "backbone.conv_out.weight"
    assert torch.equal(of[None][name], of[0.9][name]) and not torch.equal(of[0.9][name], of[0.2][name])
    assert torch.equal(of[0.2][name], weights(out, file="ema-0.2.safetensors")[name])
    with pytest.raises(UserError, match=r"no average of decay 0\.7; it has 0\.9, 0\.2"):
        load_student(str(out), ema=0.7)
    words = ["eval", *TINY, f"storage.root={out}", "--launcher", "local", "--actors", "1"]
    assert dsno(*words, "evaluation.ema_decay=0.2").returncode == 0
    found = json.loads((out / "evaluation/digits/metrics.json").read_text())["checkpoint"]
    assert found["ema_decay"] == 0.2
    told = dsno(*words, "evaluation.ema_decay=0.7")
    assert told.returncode == 2 and "0.9, 0.2" in told.stderr


@pytest.mark.slow
def test_bfloat16_and_gradient_clipping_train(tiny_data: Path, tmp_path: Path) -> None:
    more = ["training.precision=bfloat16", "training.gradient_clip=1.0", "training.zero_stage=2"]
    # as a launcher starts an only rank, without LOCAL_RANK and an address to meet at
    train(tiny_data, tmp_path / "half", *more, RANK="0", WORLD_SIZE="1")
    train(tiny_data, tmp_path / "full", "training.zero_stage=2")
    half, full = (np.array([line["loss"] for line in metrics(tmp_path / name)]) for name in ("half", "full"))
    # weights, gradients and their sums stay float32, so that only the layers' rounding is left
    assert half == pytest.approx(full, rel=0.01) and not np.array_equal(half, full)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "half").values())


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "x", "WORLD_SIZE": "1"}, "RANK=x in the environment is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE=-1 in the environment is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "x"}, "MASTER_PORT=x in the environment is not a whole number"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK=3 in the environment is not below WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1 in the environment is not below WORLD_SIZE=1"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 in the environment, and no RANK and no LOCAL_RANK and no MASTER_ADDR and no"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
            "WORLD_SIZE=2 in the environment, and no LOCAL_RANK; a launcher such as torchrun sets RANK,",
        ),
    ],
)  # fmt: skip
def test_half_of_a_launcher_is_one_line(
    variables: dict[str, str], says: str, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    link_data(tiny_data, tmp_path / "out")
    told = answer(*words(tmp_path / "out"), "--launcher", "local", **variables)
    assert told.returncode == 2 and f"dsno-cluster: {says}" in told.stderr, told.stderr
    assert len(told.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_failing_rank_ends_the_job_with_its_reason(tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(tiny_data / "trajectories", out / "trajectories")
    for shard in out.glob("trajectories/*/shard-*"):
        shard.write_bytes(b"\0" * shard.stat().st_size)
    words = ["train", *TINY, f"storage.root={out}", "--launcher", "local", "--tasks-per-node", "2"]
    failed = dsno(*words)
    assert failed.returncode == 1
    assert "sha256" in failed.stderr and "Traceback" not in failed.stderr, failed.stderr


def test_warm_start_is_the_teacher_and_wants_its_shapes() -> None:
    published = ["student.operator=convolution", "student.modes=2", "student.prediction=state"]
    student = new_student(load_config("configs/digits.yaml", published))
    teacher = safetensors.torch.load_file(
        Path(__import__("dsno_cluster").__file__).parent / "assets/digits-teacher/model.safetensors"
    )
    own = student.backbone.state_dict()
    assert all(torch.equal(own[k], -v if k.startswith("conv_out.") else v) for k, v in teacher.items())
    assert {k.split(".")[-2] for k in own.keys() - teacher.keys()} == {"temporal"}
    from dsno_cluster.errors import UserError

    with pytest.raises(UserError, match=r"student\.warm_start: the teacher has"):
        new_student(load_config("configs/digits.yaml", ["network.width=64"]))


def test_losses_by_hand() -> None:
    predicted, target = torch.zeros(2, 2, 1, 1, 2), torch.tensor([3.0, 4.0]).expand(2, 2, 1, 1, 2).clone()
    target[:, 1] = 1.0
    assert losses.l1(predicted, target).tolist() == [3.5, 1.0]
    assert losses.l2(predicted, target).tolist() == [12.5, 1.0]
    c = 0.03
    expected = np.mean([np.hypot(3, c) - c, np.hypot(4, c) - c]), np.hypot(1, c) - c
    assert losses.pseudo_huber(predicted, target).tolist() == pytest.approx(expected)
    assert float(losses.weighted(torch.tensor([3.5, 1.0]), torch.tensor([1.0, 10.0]))) == 6.75


def test_the_objective_by_hand() -> None:
    """At the points that are drawn for a step, weights times distances; at the others nothing is known."""
    words = [*TINY, *FORMS["drawn"], "network.state_size=4", "network.attention_resolutions=[2]"]
    config = load_config("configs/digits.yaml", words)
    objective = TrajectoryObjective(config, torch.device("cpu"))
    noise, states = torch.zeros(2, 1, 4, 4), torch.arange(4.0).reshape(1, 4, 1, 1, 1).expand(2, 4, 1, 4, 4)
    batch = Batch(np.arange(2), noise, states, torch.tensor([3, 7]))
    asked: list[list[int]] = []

    def student(noise: torch.Tensor, labels: torch.Tensor | None, points: list[int]) -> torch.Tensor:
        assert labels is batch.labels
        asked.append(points)
        return torch.full((2, len(points), 1, 4, 4), 5.0)

    weights_M = loss_weights("sqrt", config.trajectories.time_points).float()
    for step in range(6):
        loss, figures = objective.loss(student, batch, step)
        points = drawn_points(config.seed, step, 4, 0.3, 4)
        assert asked[step] == points
        expected = sum(float(weights_M[i]) * (5.0 - i) for i in points) / len(points)
        seen = objective.summary(figures.tolist(), step)
        assert float(loss) == pytest.approx(expected) and seen.loss == pytest.approx(expected)
        assert seen.distance_per_time == tuple(5.0 - i if i in points else None for i in range(4))
    assert len({len(points) for points in asked}) > 1


def test_training_learns(tmp_path: Path) -> None:
    """The digits config with few trajectories and steps; it begins with 0.47 at t=0, and 300 steps come to 0.17."""
    few = [
        "trajectories.num_samples=1024",
        "trajectories.steps=8",
        "training.steps=150",
        "training.threads=1",
    ]
    more = ["training.ema_decay=0.98", "training.heldout_every=75", "training.picture_every=null"]
    for command in (["gen-trajectories", "--actors", "1"], ["train"]):
        done = dsno(*command, *few, *more, f"storage.root={tmp_path}", "--launcher", "local")
        assert done.returncode == 0, done.stderr
    errors = [
        line["heldout_error_per_time"] for line in metrics(tmp_path) if "heldout_error_per_time" in line
    ]
    assert all(after < before for before, after in zip(*errors, strict=True))
    assert errors[-1][-1] < 0.2 and max(errors[-1][:2]) < 0.11, errors


# As rank RANK, with the last word, which the other rank does not get.
ON_ONE_RANK = """
import os, sys
from dsno_cluster.cli import main
*words, rank, changed = sys.argv[1:]
sys.exit(main([*words, changed] if os.environ["RANK"] == rank else words))
"""


def test_only_rank_0_reads_the_teacher(tiny_data: Path, tmp_path: Path) -> None:
    """The config of the other rank names a teacher that does not exist; the weights come from rank 0."""
    out = link_data(tiny_data, tmp_path / "out")
    held = ["training.heldout_every=2", "training.heldout_samples=8", f"training.ema_decay={list(DECAYS)}"]
    ranks = start_ranks(out, 2, *held, "1", f"teacher.path={tmp_path / 'nowhere'}", script=ON_ONE_RANK)
    codes, errors = ends(ranks)
    assert codes == [0, 0], errors
    history, averages = plain_loop(tiny_data, "series")
    assert [line["loss"] for line in metrics(out)] == pytest.approx(history, rel=LOSS_TOLERANCE)
    assert apart(weights(out), averages[DECAYS[0]], new_student_weights("series")) < MOVE_TOLERANCE


# Rank 0 is stopped during work that the other ranks wait for. A rank that does not learn of it hangs, or fails
# with another error.
STOPPED = """
import os, signal, sys
import torch, torch.distributed as dist
from dsno_cluster.training.preemption import StopSignals
from dsno_cluster.training.ranks import Ranks, on_rank_0

dist.init_process_group("gloo")
ranks = Ranks(dist.get_rank(), 0, 2, torch.device("cpu"))
for stop in (lambda: signal.raise_signal(signal.SIGTERM), lambda: signal.raise_signal(signal.SIGINT), lambda: sys.exit(7)):
    with StopSignals():
        try:
            on_rank_0(ranks, stop)
        except BaseException as error:
            print(type(error).__name__, getattr(error, "code", ""), file=sys.stderr)
dist.barrier()
dist.destroy_process_group()
"""


def test_what_stops_rank_0_stops_the_others_alike(tmp_path: Path) -> None:
    codes, errors = ends(start_ranks(tmp_path, 2, script=STOPPED), timeout=60)
    assert codes == [0, 0], errors
    expected = ["Preempted", "KeyboardInterrupt", "SystemExit 7"]
    said = [[line.strip() for line in error.splitlines()] for error in errors]
    assert all([line for line in lines if line in expected] == expected for lines in said), errors


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("teacher.path=nowhere", "nowhere: no such folder"),
        ("network.width=64", "student.warm_start: the teacher has"),
    ],
)
def test_what_fails_on_rank_0_is_said_by_all(
    changed: str, says: str, tiny_data: Path, tmp_path: Path
) -> None:
    out = link_data(tiny_data, tmp_path / "out")
    codes, errors = ends(start_ranks(out, 2, "0", changed, script=ON_ONE_RANK), timeout=60)
    assert codes == [2, 2] and all(says in error for error in errors), errors
    assert not any("Traceback" in error for error in errors), errors


def test_published_weights() -> None:
    """DESIGN of the paper's loss on the quadratic grid: 1, 2.4, 10, 10 000."""
    times = (0.5625, 0.25, 0.0625, 0.0)
    assert loss_weights("snr", times).tolist() == pytest.approx([1.0, 2.414, 10.15, 1e4], rel=1e-3)
    assert loss_weights("flat", times).tolist() == [1.0] * 4
    assert loss_weights("sqrt", times).tolist() == pytest.approx([1.0, 1.554, 3.186, 100.0], rel=1e-3)


def test_perceptual_loss_against_its_definition(tmp_path: Path) -> None:
    """LPIPS without calibration: unit-normalised features of five VGG layers, computed here by forward hooks."""
    from torchvision.models import vgg16

    torch.manual_seed(0)
    network = vgg16(weights=None).eval()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "vgg.safetensors")
    distance = losses.make_distance("lpips", str(tmp_path / "vgg.safetensors"))
    a, b = torch.rand(2, 3, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 3, 32, 32) * 2 - 1
    found = distance(a, b)

    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    expected = torch.zeros(2, 3)
    for n in range(2):
        for m in range(3):
            kept: list[list[torch.Tensor]] = []
            for x in (a[n, m], b[n, m]):
                features: list[torch.Tensor] = []
                hooks = [
                    network.features[i].register_forward_hook(
                        lambda _m, _i, out, into=features: into.append(out.clone())
                    )
                    for i in (3, 8, 15, 22, 29)
                ]
                with torch.no_grad():
                    network.features(((x - shift[:, None, None]) / scale[:, None, None])[None])
                for hook in hooks:
                    hook.remove()
                kept.append([f / f.norm(dim=1, keepdim=True) for f in features])
            expected[n, m] = sum((f - g).square().sum(1).mean() for f, g in zip(*kept, strict=True))
    assert torch.allclose(found, expected.mean(0), rtol=1e-4)
    assert float(distance(a, a).abs().max()) == 0.0


def test_schedules() -> None:
    halved = [learning_rate(s, 10, 1.0, 2, "halving", (4, 8)) for s in range(10)]
    assert halved == [0.5, 1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert learning_rate(0, 4, 1.0, 1000, "none") == 0.25  # warm-up is clipped to the run
    assert [ema_decay_at(n, 0.5, ramp=True) for n in (0, 1, 100)] == [0.1, 2 / 11, 0.5]
    assert ema_decay_at(0, 0.9999, ramp=False) == 0.9999


COUNTING = """
import sys, torch.distributed as dist
sent = 0
def counted(name):
    call = getattr(dist, name)
    def count(*words, **more):
        global sent
        tensor = more.get("tensor", more.get("input", words[0] if words else None))
        sent += tensor.numel() * tensor.element_size() if hasattr(tensor, "numel") else 0
        return call(*words, **more)
    setattr(dist, name, count)
for name in ("all_reduce", "reduce", "reduce_scatter_tensor"):
    counted(name)
from dsno_cluster.cli import main
status = main(sys.argv[1:])
print("bytes", sent, file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["0", "1"])
def test_accumulation_reduces_once_a_step(stage: str, tiny_data: Path, tmp_path: Path) -> None:
    """Four micro-batches a step send the gradients as often as one."""
    sent = []
    for accumulation in ("1", "4"):
        out = link_data(tiny_data, tmp_path / accumulation)
        how = [f"training.zero_stage={stage}", f"training.accumulation={accumulation}"]
        ranks = start_ranks(out, 2, *how, script=COUNTING)
        codes, errors = ends(ranks)
        assert codes == [0, 0], errors
        sent.append(int(errors[0].rsplit("bytes", 1)[1]))
    gradients = 4 * sum(tensor.numel() for tensor in weights(tmp_path / "1").values())
    assert sent[0] > 4 * gradients  # four steps
    assert sent[1] == sent[0]
