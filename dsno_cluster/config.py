"""What to compute: strict pydantic models, read from YAML and dotted overrides into one frozen object.

`load_config("configs/digits.yaml", ["training.lr=1e-4"])` is the door. Every mistake in the input is a
`UserError` of one line that names the key and the nearest right one. Where to run stands in `Profile`.
"""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import types
import typing
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from dsno_cluster.errors import UserError
from dsno_cluster.storage import endpoint_problem, split_address


def _root(value: str) -> str:
    try:
        if "://" in value:
            split_address(value)
    except UserError as error:
        raise ValueError(str(error)) from None  # which pydantic gathers with the key's name
    return os.path.expanduser(value)


def _endpoint(value: str) -> str:
    if problem := endpoint_problem(value):
        raise ValueError(problem)
    return value


PositiveInt = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
FolderPath = Annotated[str, AfterValidator(os.path.expanduser)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StorageConfig(Strict):
    """Where shared results live."""

    root: Annotated[str, AfterValidator(_root)] = Field("runs", description="a folder, or s3://bucket/prefix")
    endpoint_url: Annotated[str, AfterValidator(_endpoint)] | None = Field(
        None, description="S3 endpoint; credentials come from the usual AWS sources"
    )


class RunConfig(Strict):
    dir: FolderPath | None = Field(
        None,
        description="local folder for resume state, logs, metrics; default: storage.root, or ./runs/<name>",
    )


class DataConfig(Strict):
    name: Literal["digits"] | None = Field(
        None, description="real images, for train-teacher and as the reference of evaluation"
    )


class Network(Strict):
    """The U-Net, the same for teacher and student (the student adds temporal convolutions)."""

    image_size: PositiveInt
    channels: PositiveInt
    num_classes: Annotated[int, Field(ge=0)] = 0
    null_class: bool = Field(False, description="one more class that means 'no label', for guidance")
    width: PositiveInt = Field(description="channels of the first level, a multiple of 32")
    multipliers: Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
    blocks_per_level: PositiveInt
    attention_resolutions: tuple[PositiveInt, ...] = ()
    heads: PositiveInt = Field(1, description="attention heads; head_dim wins where it is set")
    head_dim: PositiveInt | None = None
    embedding_dim: PositiveInt
    dropout: BelowOne = 0.0

    @property
    def class_slots(self) -> int:
        return self.num_classes + int(self.null_class)

    @model_validator(mode="after")
    def _fits_together(self) -> Network:
        if self.width % 32:
            raise ValueError(f"width {self.width} is not a multiple of 32, the groups of the group norms")
        if self.image_size % 2 ** (len(self.multipliers) - 1):
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {len(self.multipliers) - 1} times"
            )
        sizes = [self.image_size // 2**i for i in range(len(self.multipliers))]
        for multiplier, size in zip(self.multipliers, sizes, strict=True):
            attends = size in self.attention_resolutions or size == sizes[-1]  # the middle always does
            if attends and (self.width * multiplier) % (self.head_dim or self.heads):
                raise ValueError(f"{self.width * multiplier} channels do not divide into the attention heads")
        if not set(self.attention_resolutions) <= set(sizes):
            raise ValueError(
                f"attention_resolutions {list(self.attention_resolutions)} are not all among {sizes}"
            )
        if self.null_class and not self.num_classes:
            raise ValueError("null_class needs num_classes above 0")
        return self


PlainValue = bool | int | float | str | None


class TeacherConfig(Strict):
    path: str | None = Field(
        None,
        description="folder or URL of a teacher, package:NAME for one that ships, package.module:function, or "
        "closed-form:gaussian|mixture",
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the network's weights and layers; states stay float32"
    )
    options: dict[str, PlainValue | tuple[Any, ...]] = Field(
        default_factory=dict,
        description="what load_teacher takes for this kind of teacher, e.g. {schedule: native, null_class: 10}",
    )


class TeacherTraining(Strict):
    """`train-teacher`: a denoiser trained on `data` with v-prediction."""

    steps: PositiveInt = 3000
    batch_size: PositiveInt = 128
    lr: Annotated[float, Field(gt=0)] = 1e-3
    warmup: Annotated[int, Field(ge=0)] = 100
    ema_decay: BelowOne = 0.999
    label_dropout: Fraction = Field(0.1, description="share of labels replaced by the null class")
    checkpoint_every: PositiveInt = 1000


class TimeGrid(Strict):
    spacing: Literal["quadratic", "uniform"]
    points: PositiveInt


class Trajectories(Strict):
    num_samples: PositiveInt
    samples_per_shard: PositiveInt
    batch_size: PositiveInt
    threads: PositiveInt = Field(
        1, description="CPU threads of each actor; part of the spec, as bits depend on it"
    )
    solver: Literal["ddim", "heun", "dpmpp-2m", "abm3"] = "abm3"
    grid: Literal["auto", "uniform", "fine-end"] = Field(
        "auto",
        description="how the steps lie in time; auto: the teacher's own where it has some, else what suits the solver",
    )
    steps: PositiveInt
    times: tuple[float, ...] | TimeGrid
    dtype: Literal["float32", "float16"] = Field("float16", description="storage dtype of the states")
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    clip_denoised: bool = False

    @property
    def time_points(self) -> tuple[float, ...]:
        """The times of the stored states, descending, (M,)."""
        if isinstance(self.times, TimeGrid):
            from dsno_cluster.diffusion.schedule import time_points

            return time_points(self.times.spacing, self.times.points)
        return self.times

    @property
    def num_points(self) -> int:
        return self.times.points if isinstance(self.times, TimeGrid) else len(self.times)

    @model_validator(mode="after")
    def _fits_together(self) -> Trajectories:
        if self.num_samples % self.samples_per_shard:
            raise ValueError(
                f"num_samples {self.num_samples} is not a multiple of {self.samples_per_shard} samples_per_shard"
            )
        if isinstance(self.times, tuple):
            t = self.times
            if not t or t[-1] != 0.0 or t[0] >= 1.0 or any(a <= b for a, b in itertools.pairwise(t)):
                raise ValueError("times must descend strictly from below 1 to exactly 0")
        from dsno_cluster.diffusion.solvers import grid_points

        grid_points(self.time_points, self.solver, self.steps, self.grid)  # says where steps are too few
        return self


class Reader(Strict):
    """How training reads trajectories."""

    shuffle: Literal["window", "none"] = Field(
        "window",
        description="window: shards, and samples within windows of them; none: in the order of making",
    )
    window_shards: PositiveInt = Field(8, description="shards that samples are shuffled among")
    prefetch_batches: PositiveInt = Field(2, description="batches read ahead in the background")
    cache_dir: FolderPath | None = Field(
        None, description="local folder that keeps shards of S3; processes share it"
    )
    cache_gb: Annotated[float, Field(gt=0)] = Field(100.0, description="size that the cache may have, GB")


class StudentConfig(Strict):
    backbone: Literal["unet", "diffusers"] = Field(
        "unet", description="unet: ours, as `network` says; diffusers: the teacher's own UNet2DModel"
    )
    operator: Literal["convolution", "series"] = Field(
        "convolution",
        description="convolution: M evaluations' worth of backbone, mixed by temporal convolutions (published); "
        "series: one, whose last layer gives a cosine series in time",
    )
    modes: Annotated[int, Field(ge=0)] = Field(
        2,
        description="Fourier modes kept by the temporal convolutions, at most M//2+1 (0: no such layers); or terms of "
        "the series, 1 to M",
    )
    prediction: Literal["state", "data"] = Field(
        "state",
        description="of the last layer; state: x_t itself (published); data: F in x_t = alpha_t F + sigma_t noise",
    )
    points: Literal["all", "drawn"] = Field(
        "all",
        description="time points that convolutions see in a training step; all: together (published); drawn: some, "
        "often t=0 alone, so that a sample costs one evaluation of the backbone",
    )
    temporal_init: Literal["published", "zero"] = Field(
        "zero", description="of the temporal convolutions; zero: they begin as the identity"
    )
    warm_start: bool = Field(True, description="start from the teacher's weights where shapes allow")

    @model_validator(mode="after")
    def _fits_together(self) -> StudentConfig:
        if self.operator == "series" and self.modes == 0:
            raise ValueError("modes 0: a series needs one term or more")
        if self.operator == "series" and self.points == "drawn":
            raise ValueError("points drawn is for operator convolution; a series gives all points at once")
        return self


class Training(Strict):
    steps: PositiveInt
    batch_size: PositiveInt = Field(description="global: the sum over ranks and accumulation")
    accumulation: PositiveInt = 1
    lr: Annotated[float, Field(gt=0)]
    warmup: Annotated[int, Field(ge=0)] = Field(
        0, description="optimiser steps; clipped to the length of the run"
    )
    lr_decay: Literal["cosine", "halving", "none"] = "cosine"
    halve_at: tuple[PositiveInt, ...] = Field(
        (), description="optimiser steps where lr_decay=halving halves the rate"
    )
    end_share: Fraction = Field(
        0.5, description="student.points=drawn: share of the steps that ask for t=0 alone"
    )
    most_points: PositiveInt = Field(
        1, description="student.points=drawn: the other steps ask for 1 to so many points, drawn from all"
    )
    loss: Literal["l1", "l2", "pseudo-huber", "lpips"] = "l1"
    time_weighting: Literal["snr", "sqrt", "flat"] = "snr"
    lpips_weights: str | None = Field(None, description="torchvision's VGG-16 state dict, for loss=lpips")
    lpips_sha256: str | None = Field(None, description="sha256 that the file of lpips_weights must have")
    zero_stage: Literal[0, 1, 2, 3] = 1
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of weights and layers; master weights stay float32, float16 scales its loss"
    )
    optimizer: Literal["adam", "adamw", "radam"] = "adam"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    recompute: Literal["none", "cheap", "blocks"] = Field(
        "none",
        description="activation checkpointing: what backward computes again to save memory; cheap: norms and "
        "activations, blocks: whole residual blocks",
    )
    compile: bool = Field(False, description="torch.compile the backbone")
    gradient_clip: Annotated[float, Field(ge=0)] = Field(
        0.0, description="largest global gradient norm; 0: none"
    )
    ema_decay: BelowOne | Annotated[tuple[BelowOne, ...], Field(min_length=1)] = Field(
        0.9999,
        description="one, or several averages at once; others load the first unless they ask for another",
    )
    ema_ramp: bool = Field(True, description="decay min(ema_decay, (1 + n) / (10 + n)) at step n")
    checkpoint_every: PositiveInt = 1000
    keep_checkpoints: PositiveInt = Field(
        2, description="newest checkpoints kept to resume from, beside the best by held-out error"
    )
    log_every: PositiveInt = 50
    tensorboard: bool = Field(False, description="also write TensorBoard's event files, beside metrics.jsonl")
    heldout_every: PositiveInt | None = Field(
        None, description="steps between measurements of the trajectory error on held-out noise; null: none"
    )
    heldout_samples: PositiveInt = Field(64, description="held-out noises, those of evaluation.seed")
    picture_every: PositiveInt | None = Field(
        None, description="steps between pictures of samples from fixed noise; null: none"
    )
    divergence_factor: Annotated[float, Field(ge=0)] = Field(
        20.0, description="stop where a time point's distance is so many times its running mean; 0: never"
    )
    threads: PositiveInt | None = Field(None, description="CPU threads of each rank; default: cores / ranks")
    online: bool = Field(
        False,
        description="make the trajectories while training, without keeping them; reader.shuffle must be none",
    )
    online_actors: PositiveInt | None = Field(
        None, description="Ray actors that make them; default: as many as there is room for"
    )
    online_staged_shards: PositiveInt = Field(16, description="most shards that are on disk at once")

    @property
    def ema_decays(self) -> tuple[float, ...]:
        return self.ema_decay if isinstance(self.ema_decay, tuple) else (self.ema_decay,)

    @model_validator(mode="after")
    def _fits_together(self) -> Training:
        if len({f"{decay:g}" for decay in self.ema_decays}) < len(self.ema_decays):  # files are named so
            raise ValueError(f"ema_decay {list(self.ema_decays)}: two are the same to six digits")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of accumulation {self.accumulation}"
            )
        if (self.lr_decay == "halving") != bool(self.halve_at):
            raise ValueError("halve_at and lr_decay=halving go together")
        if self.loss == "lpips" and not self.lpips_weights:
            raise ValueError(
                "loss lpips needs lpips_weights, the path of torchvision's VGG-16 weights; or take loss=l1"
            )
        return self


class Evaluation(Strict):
    num_samples: Annotated[int, Field(ge=2)]
    batch_size: PositiveInt = 250
    threads: PositiveInt = 1
    precision: Literal["float32", "bfloat16"] = Field("float32", description="of the student's network")
    compile: bool = Field(False, description="torch.compile the student's network")
    ema_decay: BelowOne | None = Field(
        None, description="which of the student's moving averages; default: the first of training.ema_decay"
    )
    seed: Seed = Field(
        1, description="seed of the evaluated noise; must differ from the seed of the trajectories"
    )
    metrics: tuple[Literal["fid", "agreement", "trajectory_error"], ...] = ("fid", "trajectory_error")
    feature_extractor: str = "inception-v3-compat"
    weights_path: str | None = Field(
        None, description="weights of the extractor; package:NAME for one that ships"
    )
    weights_sha256: str | None = Field(
        None, description="first digits of the sha256 that weights_path must have"
    )
    reference: str = Field(description="the real data: 'data' for data.name, or an .npz with mu and sigma")
    trajectory_samples: PositiveInt = Field(500, description="held-out noises for the trajectory error")
    teacher_steps: tuple[PositiveInt, ...] = Field(
        (1, 4, 8, 64), description="DDIM steps of the teacher's rows"
    )
    keep_samples: bool = Field(False, description="write the student's samples as shards under storage.root")
    picture_columns: PositiveInt = 8

    @model_validator(mode="after")
    def _fits_together(self) -> Evaluation:
        if self.keep_samples and self.num_samples % self.batch_size:
            raise ValueError(
                f"keep_samples writes shards of batch_size {self.batch_size}: num_samples {self.num_samples} must be a multiple"
            )
        if self.weights_sha256 is not None and len(self.weights_sha256) < 8:
            raise ValueError("weights_sha256 must be 8 digits or more")
        return self


class Config(Strict):
    """One experiment."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    seed: Seed = 0
    storage: StorageConfig = StorageConfig()
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    network: Network
    teacher: TeacherConfig = TeacherConfig()
    teacher_training: TeacherTraining = TeacherTraining()
    trajectories: Trajectories
    reader: Reader = Reader()
    student: StudentConfig = StudentConfig()
    training: Training
    evaluation: Evaluation

    @property
    def run_dir(self) -> Path:
        if self.run.dir is not None:
            return Path(self.run.dir)
        return Path("runs") / self.name if "://" in self.storage.root else Path(self.storage.root)

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        points = self.trajectories.num_points
        student = self.student
        most, formula = (points, "M") if student.operator == "series" else (points // 2 + 1, "M//2+1")
        if student.modes > most:
            raise ValueError(
                f"student.modes {student.modes} is above {most} = {formula} for M={points} time points"
            )
        if student.points == "drawn" and student.modes > 0 and self.training.most_points == 1:
            raise ValueError(
                "training.most_points 1: temporal convolutions mix points, so student.points=drawn needs 2 or more; "
                "or take student.modes=0"
            )
        if self.training.most_points > points:
            raise ValueError(
                f"training.most_points {self.training.most_points} is above M={points} time points"
            )
        if self.evaluation.seed == self.seed:
            raise ValueError(
                f"evaluation.seed {self.seed} equals seed: the student would be judged on its training noise"
            )
        if "agreement" in self.evaluation.metrics and self.evaluation.feature_extractor != "digits-features":
            raise ValueError(
                "evaluation.metrics: agreement needs evaluation.feature_extractor digits-features"
            )
        if self.name == "teachers":
            raise ValueError("name teachers is taken: the teachers' measured rows are kept below it")
        if self.trajectories.guidance_scale != 1.0 and not self.network.null_class:
            raise ValueError(
                "trajectories.guidance_scale other than 1 needs a teacher with network.null_class"
            )
        if self.training.online and self.reader.shuffle != "none":
            raise ValueError("training.online reads samples in the order of making: set reader.shuffle=none")
        ahead = (self.reader.prefetch_batches + 2) * self.training.batch_size
        shards = 2 * (-(-ahead // self.trajectories.samples_per_shard) + 1)  # half of them are made at a time
        if self.training.online and self.training.online_staged_shards < shards:
            raise ValueError(
                f"training.online_staged_shards {self.training.online_staged_shards}: reading ahead needs {shards} of them"
            )
        if self.training.loss == "lpips" and (self.network.channels != 3 or self.network.image_size < 16):
            raise ValueError("training.loss lpips needs colour images of 16x16 or more")
        if self.evaluation.reference == "data" and self.data.name is None:
            raise ValueError("evaluation.reference data needs data.name")
        return self


class Profile(Strict):
    """Where one stage runs: a file of `jobs/`. Options of the command line win over it."""

    nodes: PositiveInt = 1
    tasks_per_node: PositiveInt = Field(
        1, description="processes per node; of train one per GPU, of the Ray stages one"
    )
    gpus_per_node: Annotated[int, Field(ge=0)] = 0
    cpus_per_task: PositiveInt = 1
    mem_gb: PositiveInt = Field(description="memory per node, GB")
    time_minutes: PositiveInt
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = Field(None, description="node features, e.g. a100")
    setup: tuple[str, ...] = Field(
        (), description="shell lines run on the first node before the job, e.g. module load"
    )
    environment: dict[str, str] = Field(default_factory=dict, description="variables of the job; no secrets")
    interface: str | None = Field(
        None,
        description="network interface between the nodes, e.g. ib0; default: the one that leads to the others",
    )
    save_seconds: PositiveInt = Field(
        120, description="the job is told so long before its time limit, to save and be requeued"
    )
    retries: Annotated[int, Field(ge=0)] = Field(
        3, description="how often in a row the job is started again though the last attempt gained nothing"
    )
    sbatch: dict[str, str | int | bool] = Field(default_factory=dict, description="further sbatch options")

    @model_validator(mode="after")
    def _fits_together(self) -> Profile:
        for key in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
                raise ValueError(f"environment: {key!r} is not the name of a variable")
            if re.search("SECRET|TOKEN|PASSWORD", key.upper()):
                raise ValueError(
                    f"environment: {key} looks like a secret, and the script would show it; S3 credentials belong in "
                    "~/.aws/credentials or in the shell that submits"
                )
        if self.time_minutes * 60 <= self.save_seconds:
            raise ValueError(
                f"save_seconds {self.save_seconds}: not below the time limit of {self.time_minutes} minutes"
            )
        return self


Model = TypeVar("Model", bound=Strict)


def load_config(path: str, overrides: Sequence[str] = ()) -> Config:
    """Read an experiment. `overrides` are `dotted.key=value`, the value read as YAML.

    Raises UserError, in one line, for a file that is missing or not YAML and for anything in it that is
    unknown, of the wrong type or impossible together.
    """
    file = find_file(path, "configs")
    data = _read_yaml(file)
    for override in overrides:
        key, _, text = override.partition("=")
        _set(data, key, parse_yaml(text, override), override)
    data.setdefault("name", Path(path).stem)
    return validate(Config, data, str(path))


def load_profile(stage: str, changes: dict[str, Any], *, on_slurm: bool = True) -> Profile:
    """The profile `jobs/<stage>.yaml`, with the values of `changes` that are not None in place of its own.

    Raises UserError, in one line, as `load_config`, and `on_slurm` for tasks that do not suit the stage.
    """
    path = f"jobs/{stage}.yaml"
    data = _read_yaml(find_file(path, "jobs"))
    profile = validate(Profile, {**data, **{k: v for k, v in changes.items() if v is not None}}, path)
    if not on_slurm:
        return profile
    if stage != "train" and profile.tasks_per_node != 1:
        raise UserError(
            f"{path}: tasks_per_node {profile.tasks_per_node}: {stage} takes 1; its Ray actors fill the node"
        )
    if stage == "train" and profile.gpus_per_node and profile.tasks_per_node != profile.gpus_per_node:
        raise UserError(
            f"{path}: tasks_per_node {profile.tasks_per_node} with gpus_per_node {profile.gpus_per_node}: training runs one "
            "task per GPU, so give both the same number"
        )
    return profile


def load_resolved_profile(file: Path) -> Profile:
    """A profile that `dump_profile` wrote."""
    return validate(Profile, _read_yaml(file), str(file))


def dump_profile(profile: Profile) -> str:
    """The profile as YAML that `load_resolved_profile` reads back to an equal object."""
    return yaml.safe_dump(profile.model_dump(mode="json"), sort_keys=False)


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def with_absolute_paths(config: Config) -> Config:
    """The same experiment, for a process that may start in another folder or on another node."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if "://" not in path and Path(path).exists() else path

    storage, run, teacher = config.storage, config.run, config.teacher
    options = dict(teacher.options)
    if "://" not in storage.root:
        storage = storage.model_copy(update={"root": str(Path(storage.root).absolute())})
    run = run.model_copy(update={"dir": str(config.run_dir.absolute())})
    if teacher.path is not None:
        # the YAML of a published teacher; the options of a Python factory are its own, and part of the spec
        if isinstance(options.get("config"), str) and ("://" in teacher.path or Path(teacher.path).exists()):
            options["config"] = absolute(str(options["config"]))
        teacher = teacher.model_copy(update={"path": absolute(teacher.path), "options": options})
    return config.model_copy(update={"storage": storage, "run": run, "teacher": teacher})


def find_file(path: str, folder: str) -> Path:
    """`path` in the working directory, or the copy of it that travels with the package."""
    here = Path(path)
    if here.is_file():
        return here
    if here.is_dir():
        raise UserError(f"{path} is a folder; name a YAML file")
    package = Path(str(resources.files("dsno_cluster")))
    roots = (
        [package, package.parent] if here.parts[:1] == (folder,) else []
    )  # an installed wheel, or a checkout
    for root in roots:
        if (root / path).is_file():
            return root / path
    beside = {p.name for root in [Path(), *roots] for p in (root / here.parent).glob("*.yaml")}
    hint = _nearest(path, [str(here.parent / name) for name in sorted(beside)])
    raise UserError(f"{path}: no such file{hint}")


def validate(model: type[Model], data: Any, where: str) -> Model:
    """`data` (plain YAML values) as `model`; UserError with one line for the first mistake."""
    try:
        # JSON mode is strict about types, yet takes lists for tuples and whole numbers for floats
        return model.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(f"{where}: {_one_line(error, model)}") from None
    except TypeError as error:
        raise UserError(
            f"{where}: a value is not plain YAML text, number, list or mapping ({error})"
        ) from None


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 as a number (YAML 1.1 makes it a string) and repeated keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} stands twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str, where: str) -> Any:
    """The value that YAML text stands for. Raises UserError, naming `where`, for what is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = parse_yaml(path.read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {type(data).__name__}, not a mapping of keys to values")
    return data


def _set(data: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"{override}: {parent} is a value, not a group of keys")
        data = child
    data[last] = value


def _one_line(error: ValidationError, model: type[BaseModel]) -> str:
    """The first mistake, as `key: what was found, what would be right`."""
    errors = error.errors(include_url=False)
    first = errors[0]
    keys = _written_keys(first["loc"])
    for other in errors[1:]:  # of a union's alternatives, the one that agrees furthest with what was written
        deeper = _written_keys(other["loc"])
        if len(deeper) > len(keys) and deeper[: len(keys)] == keys:
            first, keys = other, deeper
            break
    where = ".".join(map(str, keys))
    if first["type"] == "extra_forbidden":
        parent = _model_at(model, keys[:-1])
        hint = (
            _nearest(where, _all_keys(model))
            if parent is None
            else _nearest(where, _all_keys(parent, keys[:-1]), model)
        )
        return f"unknown key {where}{hint}"
    if first["type"] == "missing":
        return f"key {where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {message}, found {json.dumps(first['input'])[:80]}"


def _written_keys(location: Sequence[int | str]) -> list[int | str]:
    """The keys that a person wrote: without the names of a union's alternatives that pydantic adds."""
    keys = [p for p in location if isinstance(p, int) or (re.fullmatch(r"\w+", p) and p != TimeGrid.__name__)]
    return keys[:-1] if keys and keys[-1] in ("tuple", "float", "int", "str") else keys


def _model_at(model: type[BaseModel], keys: Sequence[int | str]) -> type[BaseModel] | None:
    for key in keys:
        field = model.model_fields.get(str(key))
        child = next((t for t in _types(field.annotation) if _is_model(t)), None) if field else None
        if child is None:
            return None
        model = child
    return model


def _types(annotation: Any) -> Iterable[Any]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _all_keys(model: type[BaseModel], prefix: Sequence[int | str] = ()) -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(".".join([*map(str, prefix), name]))
        for child in _types(field.annotation):
            if _is_model(child):
                keys += _all_keys(child, [*prefix, name])
    return keys


def _nearest(word: str, choices: Sequence[str], also: type[BaseModel] | None = None) -> str:
    """'; did you mean X?', looking first among `choices`, then at every key of `also`."""
    for pool in (choices, _all_keys(also) if also else ()):
        close = difflib.get_close_matches(word, pool, n=1, cutoff=0.6)
        if close:
            return f"; did you mean {close[0]}?"
    last = word.rsplit(".", 1)[-1]
    ends = difflib.get_close_matches(last, [c.rsplit(".", 1)[-1] for c in choices], n=1, cutoff=0.6)
    if ends:
        return f"; did you mean {next(c for c in choices if c.endswith(ends[0]))}?"
    return f"; known here: {', '.join(c.rsplit('.', 1)[-1] for c in choices[:12])}" if choices else ""
