"""Every speed that the documents name for a GPU, each with its mark, in one program of at most five minutes.

    python benchmarks/gpu.py [--published DIR] [--json FILE] [--minutes 5] [--parts generation samples ...]
    python benchmarks/gpu.py --small        tiny networks on any device: whether the program itself works

The networks have the sizes of configs/cifar10.yaml, digits.yaml and mnist32.yaml, and random weights. Every fast case is
compared with float32. `bytes` makes one shard in two processes, the second with the GPU's memory nearly full. With
`--published DIR`, a checkout of the published implementation (not part of this project), its network is timed too. Parts for
which no time is left are named at the end. Marks are those of an H200; on it the exit status is 1 if a figure misses one.
Nothing else may run.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from sampler import call_of, published_network, randomise
from torch import Tensor
from training import our_step

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from inception import save_random_inception

from dsno_cluster import console
from dsno_cluster.cluster.rendezvous import free_ports
from dsno_cluster.config import Config, dump_config, load_config
from dsno_cluster.device import compute_device, device_name, give_back_memory, gpu_versions, wait_for_gpu
from dsno_cluster.diffusion.noise import sample_labels, sample_noise
from dsno_cluster.evaluation.features import WeightsFile, load_extractor
from dsno_cluster.evaluation.statistics import BlockMerger, moments_of
from dsno_cluster.evaluation.table import INCEPTION
from dsno_cluster.model_folder import AboutModel, ModelDescription, write_model
from dsno_cluster.networks.unet import UNet
from dsno_cluster.storage import open_storage
from dsno_cluster.students.dsno import DSNO, Form
from dsno_cluster.teachers import Teacher, find_teacher
from dsno_cluster.teachers.identity import UNetDescription
from dsno_cluster.training.choices import accelerate
from dsno_cluster.training.ranks import join_ranks
from dsno_cluster.trajectories.spec import solve_samples, solve_shard, spec_of
from dsno_cluster.weight_files import file_sha256

MARKED_DEVICE = "H200"
# images, evaluations or steps a second
MARKS = {
    "teacher, bfloat16 compiled": 9000.0,
    "sample, published form": 2000.0,
    "sample, series": 8000.0,
    "training, published form": 600.0,
    "training, series": 2000.0,
    "training the digits student": 120.0,
    "teacher of 32x32 digits": 60000.0,
    "Inception features": 5000.0,
    "merging moments": 10000.0,
}
# the largest relative error of a fast case against float32; random weights amplify rounding more than trained ones do
LARGEST_ERROR = 0.02
# in place of the CIFAR-10 network
SMALL_NETWORK = (
    "network={state_size: 16, state_channels: 3, width: 32, multipliers: [1, 1], blocks_per_level: 1, "
    "attention_resolutions: [8], heads: 1, embedding_dim: 64}"
)
FORMS = {
    "published form": "student={operator: convolution, modes: 2, prediction: state, temporal_init: published}",
    "series": "student={operator: series, modes: 4, prediction: data}",
}
# cases of a student: the end of the figure's name, its precision, whether it is compiled
CASES = (
    (", float32", "float32", False),
    (", bfloat16", "bfloat16", False),
    ("", "bfloat16", True),
)
TEACHERS = {
    "float32": ("float32", False),
    "tf32": ("tf32", False),
    "bfloat16": ("bfloat16", False),
    "bfloat16 compiled": ("bfloat16", True),
}


@dataclass(frozen=True)
class Figure:
    """A measured rate, the mark that it should reach, and what else was seen; `error` is relative, against float32."""

    name: str
    value: float
    unit: str
    memory: int | None = None
    error: float | None = None

    @property
    def mark(self) -> float | None:
        return MARKS.get(self.name)

    @property
    def met(self) -> bool:
        right = self.error is None or self.error <= LARGEST_ERROR
        return right and (self.mark is None or self.value >= self.mark)


@dataclass
class Bench:
    """What is measured, where, and until when."""

    small: bool
    published: Path | None
    compile: bool
    folder: Path
    until: float
    seconds: float  # that each timing takes, at least
    device: torch.device = field(default_factory=compute_device)

    def config(self, name: str, *changes: str) -> Config:
        """A shipped config with its teacher and storage in our folder."""
        words = [f"storage.root={self.folder / name}", f"teacher.path={self.folder / name / 'teachers/t'}"]
        words += ["training.threads=1"] if self.small else []
        words += [SMALL_NETWORK] if self.small and name == "cifar10" else []
        return load_config(f"configs/{name}.yaml", [*words, *changes])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny networks: only whether the program works")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled cases uncompiled")
    parser.add_argument("--published", type=Path, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written too")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    # a process of `bytes`
    parser.add_argument("--shard-of", nargs=2, metavar=("FOLDER", "FREE"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.published is not None and not (options.published / "models/tddpmm.py").is_file():
        parser.error(
            f"--published {options.published}: has no models/tddpmm.py; it is not a checkout of the published code"
        )
    if options.shard_of:
        folder, free = options.shard_of
        print(shard_digest(bench_of(options, Path(folder)), float(free)))
        return
    if not options.small and not torch.cuda.is_available():
        parser.error("no GPU is visible here; --small runs the same program on a CPU, with tiny networks")
    print(f"{device_name()}, torch {torch.__version__}, {gpu_versions()}")
    figures: list[Figure] = []
    missing: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/kernels")
        bench = bench_of(options, Path(folder))
        for part in options.parts:
            found, problem = run_part(bench, part)
            figures += found
            missing += [f"{part}: {problem}"] if problem else []
    judged = MARKED_DEVICE in device_name() and not options.small
    show(figures, missing, judged)
    if options.json:
        record = {"device": device_name(), "torch": torch.__version__, **gpu_versions()}
        options.json.write_text(
            json.dumps({**record, "figures": [asdict(f) for f in figures], "missing": missing}, indent=2)
            + "\n"
        )
    if missing or (judged and not all(figure.met for figure in figures)):
        sys.exit(1)


def bench_of(options: argparse.Namespace, folder: Path) -> Bench:
    until = time.monotonic() + 60 * options.minutes
    seconds = 0.0 if options.small else 2.0
    return Bench(options.small, options.published, not options.no_compile, folder, until, seconds)


def run_part(bench: Bench, part: str) -> tuple[list[Figure], str | None]:
    """The figures of a part, and why some are missing."""
    figures: list[Figure] = []
    if time.monotonic() > bench.until:
        return [], "no time was left (--minutes)"
    began = time.monotonic()
    try:
        for figure in PARTS[part](bench):
            figures.append(figure)
            console.say(f"{figure.name}: {figure.value:,.0f} {figure.unit}")
            release()
            if time.monotonic() > bench.until:
                return figures, "no time was left for all of it (--minutes)"
    except torch.OutOfMemoryError as error:
        return figures, " ".join(str(error).split())[:160]
    finally:
        release()
        console.say(f"{part} took {time.monotonic() - began:.0f} s")
    return figures, None


def show(figures: list[Figure], missing: list[str], judged: bool) -> None:
    rows = [
        [
            figure.name,
            f"{figure.value:,.0f} {figure.unit}",
            "" if figure.mark is None else f"{figure.mark:,.0f}",
            "" if figure.memory is None else f"{figure.memory / 2**30:.1f} GiB",
            "" if figure.error is None else f"{figure.error:.1e}",
            ""
            if not judged or (figure.mark is None and figure.error is None)
            else "ok"
            if figure.met
            else "SHORT",
        ]
        for figure in figures
    ]
    console.table(
        f"figures; marks are of an {MARKED_DEVICE}", ["", "rate", "mark", "memory", "error", ""], rows
    )
    for problem in missing:
        print(f"not measured: {problem}")


# ---- the parts


def generation(bench: Bench) -> Iterator[Figure]:
    """The CIFAR-10 teacher as an actor solves with it, in each precision."""
    batch = 8 if bench.small else 500
    exact: list[Tensor] = []
    for name, (precision, compiled) in TEACHERS.items():
        changes = (
            f"teacher.precision={precision}",
            f"teacher.compile={str(compiled and bench.compile).lower()}",
        )
        solving = (
            f"trajectories.batch_size={batch}",
            "trajectories.steps=8",
            "trajectories.times=[0.5, 0.0]",
        )
        config = bench.config("cifar10", *changes, *solving)
        save_teacher(config)
        found = find_teacher(config)
        teacher, spec = found.load().to(bench.device), spec_of(config, found)
        outputs = probes(teacher, batch)
        exact = exact or outputs
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(outputs, exact, strict=True))
        evaluations = batch * found.method.evaluations(spec.times)

        solve = functools.partial(solve_samples, spec, teacher, 0, range(batch))

        value, memory = rate(bench, solve, evaluations)
        yield Figure(f"teacher, {name}", value, "evaluations/s", memory, error)


def samples(bench: Bench) -> Iterator[Figure]:
    """One-step samples of the student in both forms."""
    batch = 4 if bench.small else 128
    if bench.published is not None:
        config = bench.config("cifar10")
        model = published_network(config, bench.published).to(bench.device)
        value, memory = rate(bench, call_of(model, "published", "sample", config, batch), batch)
        yield Figure("sample, the published network", value, "images/s", memory)
    for name, form in FORMS.items():
        config = bench.config("cifar10", form)
        noise = sample_noise(0, range(batch), config.network.state_shape).to(bench.device)
        exact: Tensor | None = None
        for case, precision, compiled in CASES:
            student = student_of(config).to(bench.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
            student.eval().requires_grad_(False)
            student.accelerate(precision=precision, compile=compiled and bench.compile)
            with torch.no_grad():
                images = student.sample(noise)
                exact = images if exact is None else exact
                error = float((images - exact).norm() / exact.norm())
                value, memory = rate(bench, functools.partial(student.sample, noise), batch)
            yield Figure(f"sample, {name}{case}", value, "images/s", memory, error)


def training(bench: Bench) -> Iterator[Figure]:
    """Training steps through the engine: the CIFAR-10 student in both forms, and the digits student."""
    begin_rank()
    if bench.published is not None:
        config, batch = bench.config("cifar10"), 4 if bench.small else 128
        model = published_network(config, bench.published).to(bench.device)
        value, memory = rate(bench, call_of(model, "published", "step", config, batch), batch)
        yield Figure("training, the published network", value, "images/s", memory)
    for name, form in FORMS.items():
        for case, precision, compiled in CASES:
            # the larger one is the marks'; without compilation it does not fit
            batch = 4 if bench.small else 256 if compiled else 128
            changes = training_of(batch, precision, compiled and bench.compile)
            config = bench.config("cifar10", form, *changes)
            value, memory = rate(bench, step_of(config), batch)
            yield Figure(f"training, {name}{case}", value, "images/s", memory)
    config = bench.config("digits", *training_of(48, "bfloat16", bench.compile))
    value, memory = rate(bench, step_of(config), 1)
    yield Figure("training the digits student", value, "steps/s", memory)


def small_teacher(bench: Bench) -> Iterator[Figure]:
    """The 32x32 digits teacher, 7.7 M parameters."""
    batch = 2 if bench.small else 1024
    config = bench.config(
        "mnist32", f"trajectories.batch_size={batch}", f"teacher.compile={str(bench.compile).lower()}"
    )
    save_teacher(config)
    found = find_teacher(config)
    teacher, spec = found.load().to(bench.device), spec_of(config, found)
    evaluations = batch * found.method.evaluations(spec.times)
    value, memory = rate(bench, lambda: solve_samples(spec, teacher, 0, range(batch)), evaluations)
    yield Figure("teacher of 32x32 digits", value, "evaluations/s", memory)


def features(bench: Bench) -> Iterator[Figure]:
    """Inception's features of 32x32 images with their moments, as an actor makes them; then the driver's merging."""
    count = 2 if bench.small else 1000
    file = save_random_inception(bench.folder / "inception.pth")
    extractor = load_extractor(WeightsFile(INCEPTION, file, file_sha256(file)), ["2048"])
    images = torch.randint(
        0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    value, memory = rate(bench, lambda: moments_of(extractor(images)["2048"].numpy()), count)
    yield Figure("Inception features", value, "images/s", memory)
    width, blocks = (64, 4) if bench.small else (2048, 50)
    block = moments_of(np.random.default_rng(0).normal(size=(1000, width)))

    def merge_all() -> None:
        merger = BlockMerger(blocks)
        for index in range(blocks):
            merger.add(index, block)

    yield Figure("merging moments", rate(bench, merge_all, 1000 * blocks)[0], "images/s")


def same_bytes(bench: Bench) -> Iterator[Figure]:
    """One shard in two processes, the second with little free memory. The error is 0 if their bytes are the same."""
    save_teacher(shard_config(bench))
    digests = []
    for free in ("0", "24"):  # GiB that are left; 0: all
        words = [sys.executable, __file__, "--shard-of", str(bench.folder), free]
        words += ["--small"] if bench.small else []
        words += [] if bench.compile else ["--no-compile"]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True)
        digests.append(done.stdout.split()[-1])
    yield Figure(
        "one shard, twice: different digests", len(set(digests)) - 1, "", error=float(len(set(digests)) - 1)
    )


PARTS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "generation": generation,
    "samples": samples,
    "training": training,
    "small": small_teacher,
    "features": features,
    "bytes": same_bytes,
}


# ---- what the parts share


def rate(bench: Bench, call: Callable[[], object], items: int) -> tuple[float, int | None]:
    """Items a second of a call that makes `items`, warm, and the allocator's peak in bytes on a GPU."""
    call()  # compiles
    wait_for_gpu()
    began = time.perf_counter()
    call()
    wait_for_gpu()
    calls = max(1, math.ceil(bench.seconds / (time.perf_counter() - began)))
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    wait_for_gpu()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else None
    return items * calls / seconds, peak


def release() -> None:
    """Give back the memory of the last case."""
    torch._dynamo.reset()
    give_back_memory()


def probes(teacher: Teacher, batch: int) -> list[Tensor]:
    """The teacher's x0 of the same noisy images at a few times."""
    noise = sample_noise(3, range(batch), teacher.shape).to(teacher.device)
    labels = sample_labels(3, range(batch), teacher.num_classes) if teacher.num_classes else None
    return [teacher(noise, t, labels).float() for t in (0.9, 0.5, 0.1)]


def save_teacher(config: Config) -> None:
    """A model folder with random weights where the config has its teacher."""
    network, root = config.network, config.storage.root
    if (Path(root) / "teachers/t").exists():
        return
    unet = UNet(network)
    randomise(unet)
    about = AboutModel(
        model=ModelDescription.model_validate(UNetDescription(network=network).model_dump(mode="json"))
    )
    write_model(open_storage(root, None), "teachers/t/", unet.state_dict(), dump_config(config), about)


def student_of(config: Config) -> DSNO:
    """The config's student with random weights."""
    settings = config.student
    form = Form(settings.modes, settings.operator, settings.prediction, settings.points)
    student = DSNO(config.network, form, config.trajectories.time_points)
    randomise(student)
    return student


def step_of(config: Config) -> Callable[[], object]:
    """A training step of the config's student, compiled and replayed as `train` does it."""
    student = student_of(config)
    accelerate(student, config, join_ranks(config))
    return our_step(config, student)


def training_of(batch: int, precision: str, compiled: bool) -> tuple[str, ...]:
    return (
        f"training.precision={precision}",
        f"training.batch_size={batch}",
        "training.accumulation=1",
        f"training.compile={str(compiled).lower()}",
        "training.loss=l1",
    )


def begin_rank() -> None:
    """Be the only rank of a process group."""
    if not torch.distributed.is_initialized():
        names = {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_PORT": free_ports(1)[0],
            "MASTER_ADDR": "127.0.0.1",
        }
        os.environ.update({name: str(value) for name, value in names.items()})
        join_ranks(load_config("configs/digits.yaml", ["training.threads=1"]))


def shard_config(bench: Bench) -> Config:
    count = 4 if bench.small else 256
    return bench.config(
        "cifar10",
        "teacher.precision=bfloat16",
        f"teacher.compile={str(bench.compile).lower()}",
        f"trajectories.num_samples={count}",
        f"trajectories.samples_per_shard={count}",
        f"trajectories.batch_size={count}",
        "trajectories.steps=8",
        "trajectories.times=[0.5, 0.0]",
    )


def shard_digest(bench: Bench, free_gib: float) -> str:
    """The sha256 of a shard's states; all memory of the GPU but `free_gib` is taken before, if that is not 0."""
    config = shard_config(bench)
    taken: list[Tensor] = []
    if free_gib and bench.device.type == "cuda":
        available, _ = torch.cuda.mem_get_info()
        with contextlib.suppress(torch.OutOfMemoryError):
            taken.append(
                torch.empty(int(available - free_gib * 2**30), dtype=torch.uint8, device=bench.device)
            )
    found = find_teacher(config)
    tensors = solve_shard(spec_of(config, found), found.load().to(bench.device), 0)
    return hashlib.sha256(tensors["states"].contiguous().numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
