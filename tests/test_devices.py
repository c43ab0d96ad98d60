"""Which device a rank or an actor takes, and what it leaves; GPUs are pretended."""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gpu_tensors import CUDA, pretended_gpu
from tiny import answer
from torch import Tensor, nn

from dsno_cluster import device, load_teacher, solve
from dsno_cluster.cluster import crew, ray_on_slurm, ray_pool
from dsno_cluster.cluster.crew import Crew, actors_that_fit
from dsno_cluster.cluster.launchers import LOCAL
from dsno_cluster.cluster.stage import Stage, StageOptions, StageResult, Submission
from dsno_cluster.config import Config, load_config, load_profile
from dsno_cluster.errors import LOST_RANK, UserError, WorkError
from dsno_cluster.stages import TRAIN
from dsno_cluster.teachers.teacher import Teacher
from dsno_cluster.training import loop, ranks

GIB = 1 << 30
H200 = SimpleNamespace(total_memory=100 * GIB, uuid="GPU-1")


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend that this process sees so many GPUs."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)

    return see


@pytest.mark.parametrize(
    ("gpus", "local_rank", "local_ranks", "expected"),
    [
        (0, 3, 4, "cpu"),
        (1, 0, 1, "cuda:0"),
        (1, 3, 4, "cuda:0"),  # each rank sees a GPU of its own
        (4, 3, 4, "cuda:3"),
        (8, 1, 2, "cuda:1"),
        (4, 2, None, "cuda:2"),
    ],
)
def test_the_device_of_a_rank(
    gpus: int, local_rank: int, local_ranks: int | None, expected: str, with_gpus: Callable[[int], None]
) -> None:
    with_gpus(gpus)
    assert str(device.rank_device(local_rank, local_ranks)) == expected


@pytest.mark.parametrize(("local_rank", "local_ranks"), [(0, 4), (3, 4), (2, None)])
def test_more_ranks_than_gpus(
    local_rank: int, local_ranks: int | None, with_gpus: Callable[[int], None]
) -> None:
    with_gpus(2)
    with pytest.raises(UserError, match=r"see 2 GPU\(s\): .* so start 2 \(--tasks-per-node") as found:
        device.rank_device(local_rank, local_ranks)
    assert "\n" not in str(found.value)


def test_more_local_ranks_than_gpus_are_refused_before_they_start(with_gpus: Callable[[int], None]) -> None:
    config = load_config("configs/digits.yaml")
    two, one = (
        Submission(TRAIN, config, load_profile("train", {"tasks_per_node": tasks}), "") for tasks in (2, 1)
    )
    with_gpus(0)
    LOCAL.check(two)
    with_gpus(1)
    LOCAL.check(one)
    with pytest.raises(UserError, match=r"^2 training processes on .*see 1 GPU"):
        LOCAL.check(two)


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch, with_gpus: Callable[[int], None]) -> list[dict[str, Any]]:
    """Pretend NCCL and DeepSpeed; what each process group is made with."""
    made: list[dict[str, Any]] = []
    store = dist.HashStore()
    monkeypatch.setattr(ranks, "rendezvous", lambda *_, **__: iter([(store, 0, 0)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda backend, **how: made.append({"backend": backend, **how})
    )
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    ours = SimpleNamespace(init_distributed=lambda **_: None)
    monkeypatch.setattr(ranks, "import_deepspeed", lambda: ours)
    for name, value in {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "x", "MASTER_PORT": "1"
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return made


def a_config() -> Config:
    return load_config("configs/digits.yaml", ["training.batch_size=16", "training.threads=1"])


@pytest.mark.parametrize(("gpus", "local_rank", "expected"), [(1, "3", 0), (4, "3", 3)])
def test_deepspeed_is_told_the_same_device(
    gpus: int,
    local_rank: str,
    expected: int,
    joining: list[dict[str, Any]],
    with_gpus: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with_gpus(gpus)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    found = ranks.join_ranks(a_config())
    assert found.device == torch.device("cuda", expected)
    assert os.environ["LOCAL_RANK"] == str(expected)
    (how,) = joining
    assert (how["backend"], how["device_id"], how["timeout"]) == ("nccl", found.device, timedelta(minutes=30))


def test_two_ranks_with_one_gpu(
    joining: list[dict[str, Any]], with_gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpus(1)
    ranks.join_ranks(a_config())
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(UserError, match=r"^2 training processes on .*see 1 GPU"):
        ranks.join_ranks(a_config())
    assert len(joining) == 1


def test_a_group_ends_with_its_context_and_can_be_made_again() -> None:
    before = dict(os.environ)
    for fails in (False, True, False):
        expected = pytest.raises(WorkError) if fails else contextlib.nullcontext()
        with expected, ranks.joined_ranks(a_config()) as here:
            assert here.world_size == 1 and dist.is_initialized()
            if fails:
                raise WorkError("in its middle")
        assert not dist.is_initialized()
        changed = {name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ}
        assert changed == changed & before.keys()


NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, {}, NCCL version 2.27.5\n{}"
LOST = NCCL.format(
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.\n"
    "Last error:\nsocketProgress: Connection closed by remote peer node2<41235>",
)
TWICE = NCCL.format(
    "invalid usage (run with NCCL_DEBUG=WARN for details)",
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\n"
    "Last error:\nDuplicate GPU detected : rank 1 and rank 0 both on CUDA device 1b000",
)
FULL = NCCL.format(
    "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'",
)
ABORTED = (
    "NCCL communicator was aborted on rank 1. Original reason for failure was: [Rank 1] Watchdog caught collective operation "
    "timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE) ran for 1800000 milliseconds before timing out."
)


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            dist.DistBackendError(LOST),
            WorkError,
            f"{LOST_RANK} (NCCL: remote process exited or there was a network error: socketProgress: Connection closed by "
            "remote peer node2<41235>); the same command resumes from the beginning",
        ),
        (dist.DistBackendError(ABORTED), WorkError, f"{LOST_RANK} (NCCL communicator was aborted on rank 1."),
        (dist.DistBackendError(TWICE), UserError, "two training processes have the same GPU (NCCL: invalid"),
        (dist.DistBackendError(FULL), UserError, "NCCL error in: "),
        (dist.DistStoreError("wait timeout after 1800000ms"), WorkError, f"{LOST_RANK} (wait timeout after"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), UserError, "CUDA out of memory. Tried to; less"),
        (RuntimeError("[enforce fail at gloo/tcp] reset by peer"), WorkError, f"{LOST_RANK} ([enforce fail"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError, "mat1 and mat2"),
    ],
)  # fmt: skip
def test_a_lost_rank_is_a_line_of_ours(
    error: RuntimeError, kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    @contextlib.contextmanager
    def joined(config: Config) -> Iterator[None]:
        raise error
        yield

    monkeypatch.setattr(loop, "joined_ranks", joined)
    with pytest.raises(kind) as found:
        loop.train(load_config("configs/digits.yaml", [f"storage.root={tmp_path}"]))
    assert type(found.value) is kind and str(found.value).startswith(says)
    assert kind is RuntimeError or "\n" not in str(found.value)


class Held:
    """Large, on the GPU, and in a circle, as an engine is."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("fails", [False, True])
def test_a_stage_gives_back_what_it_held(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Held]] = []
    emptied: list[bool] = []

    def work(config: Config, options: StageOptions, ray_address: str | None, found: Any) -> StageResult:
        engine = Held()
        held.append(weakref.ref(engine))
        try:
            if fails:
                raise ValueError("a rank")
        except ValueError as error:
            raise WorkError("in our words") from error
        return StageResult("there")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(held[0]() is None))
    stage: Stage[Any] = Stage("a", "b", "ranks", "training", StageOptions, *[work] * 3)  # type: ignore[arg-type]
    if fails:
        with pytest.raises(WorkError) as found:
            stage.run(a_config(), StageOptions(), None, None)
        assert isinstance(found.value.__cause__, ValueError)  # both are still alive
    else:
        assert stage.run(a_config(), StageOptions(), None, None).address == "there"
    assert emptied == [True]


@pytest.mark.parametrize(
    ("share", "limit"),
    [(0.5, 0.49), (0.25, 0.24), (0.02, 0.01), (0.012, 0.006), (1.0, None)],
)
def test_an_actor_keeps_to_its_share(
    share: float, limit: float | None, with_gpus: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    context = SimpleNamespace(get_assigned_resources=lambda: {"CPU": 1.0, "GPU": share})
    ray = SimpleNamespace(is_initialized=lambda: True, get_runtime_context=lambda: context)
    monkeypatch.setitem(
        sys.modules, "ray", ray
    )  # ours: the real one reads its settings when it is first imported
    with_gpus(1)
    crew.keep_to_share()
    assert limits == ([] if limit is None else [pytest.approx(limit)])
    with_gpus(0)
    crew.keep_to_share()
    assert len(limits) == (limit is not None)


@pytest.mark.parametrize(
    ("gpus", "each", "fit"), [(2, 1, 2), (2, 0.25, 8), (1, 1 / 3, 3), (1, 0.4, 2), (8, 2, 4), (1, 2, 0)]
)
def test_actors_that_fit_on_gpus(gpus: int, each: float, fit: int) -> None:
    assert actors_that_fit({"CPU": 100, "GPU": gpus}, 1, each) == fit
    assert actors_that_fit({"CPU": 2, "GPU": gpus}, 1, each) == min(2, fit)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, Any]]:
    """What Ray is started with on this machine."""
    calls: list[dict[str, Any]] = []
    ray = SimpleNamespace(init=lambda **how: calls.append(how), shutdown=lambda: None)
    monkeypatch.setattr(ray_pool, "import_ray", lambda own=False: ray)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return calls


@pytest.mark.parametrize(
    ("gpus", "crew", "cpus", "asks"),
    [
        (0, Crew(3), 6, 0),
        (0, Crew(3, 0.25), 6, 0),
        (2, Crew(), 4, 1),
        (2, Crew(1), 2, 1),
        (2, Crew(None, 0.25), 16, 0.25),
        (2, Crew(5, 0.25), 10, 0.25),
    ],
)
def test_ray_is_told_what_this_process_sees(
    gpus: int,
    crew: Crew,
    cpus: int,
    asks: float,
    started: list[dict[str, Any]],
    with_gpus: Callable[[int], None],
) -> None:
    with_gpus(gpus)
    with ray_pool.open_ray(crew, 2) as cluster:
        assert cluster.actor_options()["num_gpus"] == asks
        assert cluster.capacity() == cpus // 2
    assert (started[0]["num_gpus"], started[0]["num_cpus"]) == (gpus, cpus)


@pytest.mark.parametrize(
    ("crew", "says"),
    [
        (Crew(3), r"--actors 3: .* 2 GPU\(s\), and an actor takes one \(--gpus-per-actor\); take at most 2"),
        (Crew(5, 0.5), r"--actors 5: .* an actor takes 0.5 \(--gpus-per-actor\); take at most 4"),
        (Crew(None, 4), r"--gpus-per-actor 4: this machine has 2 GPU"),
    ],
)
def test_more_actors_than_gpus_have_room_for(
    crew: Crew, says: str, started: list[dict[str, Any]], with_gpus: Callable[[int], None]
) -> None:
    with_gpus(2)
    with pytest.raises(UserError, match=says), ray_pool.open_ray(crew, 1):
        pass
    assert not started


def test_ray_on_a_node_of_slurm_is_told_its_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options: list[str] = []

    @contextlib.contextmanager
    def processes(given: list[str], folder: Path) -> Iterator[None]:
        options.extend(given)
        yield

    monkeypatch.setattr(ray_on_slurm, "_ray_processes", processes)
    monkeypatch.setattr(ray_on_slurm, "_wait_for_port", lambda *_: None)
    node = ray_on_slurm.Node(["localhost"], 0, None, cpus=16, gpus=3, memory_gb=8, job="7")
    with ray_on_slurm.ray_head(node, tmp_path):
        pass
    assert "--num-gpus=3" in options and "--num-cpus=16" in options


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "nan", "inf"])
def test_a_share_that_cannot_be(value: str) -> None:
    told = answer("gen-trajectories", "--gpus-per-actor", value, "--dry-run", "--launcher", "local")
    assert told.returncode == 2 and "neither a part of a GPU" in told.stderr


class Scaled(nn.Module):
    """A network without parameters, as that of the FromScale example in the documents."""

    def __init__(self, with_buffer: bool = False) -> None:
        super().__init__()
        if with_buffer:
            self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_a_teacher_of_which_only_buffers_are_moved_says_where_it_is() -> None:
    info = load_teacher("closed-form:gaussian", options={"mean": 0.0, "std": 0.5, "shape": [1, 8, 8]}).info
    for with_buffer, expected in ((True, "meta"), (False, "cpu")):
        network = Scaled(with_buffer)
        teacher = Teacher(info, lambda x, t, labels: x, network).to(torch.device("meta"))
        assert teacher.device.type == expected


@pytest.mark.parametrize("solver", ["ddim", "heun", "abm3"])
def test_states_of_a_teacher_without_parameters_are_where_the_noise_is(solver: str) -> None:
    """The states of students and teachers are then compared where the student is."""
    options = {"mean": 0.0, "std": 0.5, "shape": [1, 8, 8]}
    closed = load_teacher("closed-form:gaussian", options=options)
    seen: list[torch.device] = []

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        seen.extend((x.device, t_N.device))
        return Scaled()(x)

    for teacher in (closed, Teacher(closed.info, denoise, Scaled())):
        with pretended_gpu():
            noise = torch.empty(4, 1, 8, 8, device=CUDA)
            assert solve(teacher, noise, [0.5, 0.0], solver, 4).device == CUDA
            assert teacher(noise, 0.5).device == CUDA
    assert {at.type for at in seen} == {"cpu"}


def test_tests_hide_gpus() -> None:
    """From themselves and from what they start."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and device.visible_gpus() == 0
