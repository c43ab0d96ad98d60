"""Model folders: `model.safetensors`, `config.yaml` and `meta.json`, on disk or on S3.

`meta.json` describes the weights in `model` and carries their sha256. It is written last, so a folder that
has it is complete.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.files import not_there, shown_path
from dsno_cluster.provenance import Code, environment
from dsno_cluster.records import Record, SparseRecord, Values, read_record, record_bytes
from dsno_cluster.storage import MissingObject, Storage, open_storage
from dsno_cluster.weight_files import check_safetensors, parse_safetensors
from dsno_cluster.yaml_text import parse_yaml

if TYPE_CHECKING:
    from torch import Tensor


WEIGHTS, CONFIG, META = "model.safetensors", "config.yaml", "meta.json"
LATEST, BEST = "latest", "best"  # text files that name a step folder beside them


class ModelDescription(BaseModel):
    """A description of the weights: their kind, the sizes of the network, and keys that depend on the kind."""

    model_config = ConfigDict(frozen=True, extra="allow")
    kind: str
    network: Values

    def values(self) -> Values:
        """All of it as plain JSON values, as it was written."""
        return self.model_dump(mode="json", exclude_unset=True)


class SettingChange(BaseModel):
    """A setting of a training that was changed after `step`."""

    model_config = ConfigDict(frozen=True)
    step: int
    key: str
    before: JsonValue
    after: JsonValue


class StartModel(Record):
    """The student with which a training began: its address, name and step, and the sha256 of the weights that were taken."""

    address: str
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")  # it names folders
    step: int | None = None
    sha256: str


class FeatureWeights(Record):
    """A feature extractor of torch-fidelity's registry, and the sha256 of its weights."""

    extractor: str
    sha256: str


class AboutModel(SparseRecord):
    """What the maker of a model says about it; keys whose value is None are omitted."""

    schema_version: Literal[1] = 1
    model: ModelDescription
    made_by: str | None = None
    imported: Values | None = None  # name, sha256 and config of the published file
    seed: int | None = None  # seed of the noise that it was trained on
    train_seconds: float | None = None
    # for a teacher that was trained here
    settings: Values | None = None
    threads: int | None = None
    # for a student
    name: str | None = None
    step: int | None = None
    ended: Literal[True] | None = None  # its training ended there, before its last step
    ema_decay: float | None = None
    trajectories: str | None = None  # the folder of the data set
    run: Values | None = None  # the identity of its training
    world_size: int | None = None
    precision: str | None = None
    accumulation: int | None = None  # micro-batches of a step
    compiled: bool | None = None
    changes: tuple[SettingChange, ...] = ()
    start: StartModel | None = None  # if it began with another student
    features: FeatureWeights | None = None  # if it was trained on the features of an extractor


class ModelMeta(AboutModel):
    """`meta.json`: what the maker says about the model, the sha256 of the weights, and their provenance."""

    sha256: str
    averages: dict[str, str] = Field(
        default_factory=dict
    )  # sha256 of the weights of further moving averages, by decay
    device: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)
    code: Code | None = None


@dataclass(frozen=True)
class ModelFolder:
    """The contents of a model folder: weights by name, and `meta.json`."""

    weights: dict[str, Tensor]
    meta: ModelMeta


@dataclass(frozen=True)
class FoundModel:
    """A model whose `meta.json` was read: below `prefix` of a storage."""

    path: str
    storage: Storage
    prefix: str
    meta: ModelMeta

    def weights(self) -> dict[str, Tensor]:
        """Its weights by name, read now.

        Raises NotWeights if they are none, and WorkError if the bytes are not those of `meta.json`.
        """
        name = _weights_file(self.meta)
        data = self.storage.read(self.prefix + name)
        weights = parse_safetensors(data, self._shown_weights)
        found = hashlib.sha256(data).hexdigest()
        if found != self.meta.sha256:
            raise WorkError(f"{self._shown_weights} has sha256 {found}, its {META} says {self.meta.sha256}")
        return weights

    def check_weights(self) -> None:
        """Raises NotWeights if its weights are missing or no whole file, as judged by their header and size."""
        check_safetensors(self.storage, self.prefix + _weights_file(self.meta), self._shown_weights)

    @property
    def _shown_weights(self) -> str:
        return f"{shown_path(self.path)}: {self.prefix}{_weights_file(self.meta)}"


def step_name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:09d}"


def package_path(path: str) -> str:
    """The path of the file or folder NAME inside the package, for `package:NAME`; any other path as it is."""
    if not path.startswith("package:"):
        return path
    name = path.removeprefix("package:")
    target = Path(str(resources.files("dsno_cluster"))) / "assets" / name
    if not target.exists():
        folders = [at for at in sorted(target.parent.iterdir()) if at.is_dir()]
        kinds = {True: "a teacher", False: "an extractor's weights"}
        shipped = " and ".join(f"package:{at.name} ({kinds[(at / META).is_file()]})" for at in folders)
        raise UserError(f"{path}: the package ships {shipped}")
    return str(target)


def read_model(
    path: str, endpoint_url: str | None = None, ema: float | None = None, sha256: str | None = None
) -> ModelFolder:
    """The model at a folder path, an S3 address or `package:NAME`; a run folder means its `latest`, and `best` in it its best.

    `ema` chooses among a student's moving averages by decay. Raises UserError if there is no model, or no such
    average, and WorkError if the bytes are not those of `meta.json`, or not those of `sha256` if that is given.
    """
    found = find_model(path, endpoint_url, ema)
    if sha256 not in (None, found.meta.sha256):
        raise WorkError(
            f"{shown_path(path)}: its weights have sha256 {found.meta.sha256[:8]} now, not {sha256[:8]}: they were replaced "
            "meanwhile"
        )
    return ModelFolder(found.weights(), found.meta)


def read_meta(path: str, endpoint_url: str | None = None, ema: float | None = None) -> ModelMeta:
    """Only `meta.json` of a model, without its weights; `ema` and errors as in `read_model`."""
    return find_model(path, endpoint_url, ema).meta


def find_model(path: str, endpoint_url: str | None = None, ema: float | None = None) -> FoundModel:
    """The model at a path, its weights not read yet; `ema` and errors as in `read_model`."""
    path = _followed(path, endpoint_url)
    storage, prefix = _locate(open_storage(package_path(path), endpoint_url), path)
    return FoundModel(path, storage, prefix, _read_meta(storage, prefix, ema))


def model_address(path: str, endpoint_url: str | None = None) -> str:
    """The address of the model folder itself: for a run folder, the step folder that its `latest` names now.

    Raises UserError if there is no model.
    """
    path = _followed(path, endpoint_url)
    _, prefix = _locate(open_storage(package_path(path), endpoint_url), path)
    return f"{path.rstrip('/')}/{prefix.rstrip('/')}" if prefix else path


def evaluated_by_default(address: str, endpoint_url: str | None = None) -> str:
    """The address of the student in a run folder that `eval` takes: its newest or, if distribution matching made it, its best.

    It is the objective of the newest student itself that decides. Raises UserError if there is none.
    """
    run = read_meta(address, endpoint_url).run or {}
    if run.get("objective") != "distribution":
        return address
    best = open_storage(address, endpoint_url).stat(BEST)
    return address if best is None else f"{address}/{BEST}"


def read_config_of(path: str, endpoint_url: str | None = None) -> Values:
    """The config in a model's folder, as plain values; empty if there is none.

    Raises UserError if there is no model.
    """
    storage, prefix = _locate(open_storage(package_path(path), endpoint_url), path)
    try:
        config = parse_yaml(storage.read(prefix + CONFIG).decode(), f"{storage.url}/{prefix}{CONFIG}")
    except MissingObject:
        return {}
    return config if isinstance(config, dict) else {}


def _weights_file(meta: ModelMeta) -> str:
    """The file with the weights of the moving average that `meta` describes."""
    average = "" if meta.ema_decay is None else f"{meta.ema_decay:g}"
    return _average_file(average) if average in meta.averages else WEIGHTS


def _average_file(decay: str) -> str:
    return f"ema-{decay}.safetensors"


def _read_meta(storage: Storage, prefix: str, ema: float | None = None) -> ModelMeta:
    where = f"{storage.url}/{prefix}{META}"
    meta = read_record(ModelMeta, storage.read(prefix + META), where)
    if ema is None or ema == meta.ema_decay:
        return meta
    if f"{ema:g}" not in meta.averages:
        known = [str(d) for d in (meta.ema_decay, *meta.averages) if d is not None]
        raise UserError(f"{where}: has no average of decay {ema:g}; it has {', '.join(known) or 'none'}")
    return meta.model_copy(update={"ema_decay": ema, "sha256": meta.averages[f"{ema:g}"]})


def _locate(storage: Storage, path: str) -> tuple[Storage, str]:
    """The prefix of the model folder: this one, its `latest`, or that of the only student below it."""
    if storage.stat(META) is not None:
        return storage, ""
    latest = [LATEST] if storage.stat(LATEST) is not None else []
    if not latest:
        latest = [s.key for s in storage.list("students/") if s.key.endswith("/" + LATEST)]
    if len(latest) > 1:
        raise UserError(
            f"{shown_path(path)}: holds several students; name one of {', '.join(k[: -len(LATEST) - 1] for k in latest)}"
        )
    if not latest:
        raise UserError(f"{shown_path(path)}: {_no_model(path)}")
    return storage, f"{latest[0][: -len(LATEST)]}{_named_step(storage, latest[0], path)}/"


def _named_step(storage: Storage, key: str, path: str) -> str:
    """The step folder that a text file names. Raises UserError, which names `path`, if it holds no such name."""
    step = storage.read(key).decode(errors="replace").strip()
    if not re.fullmatch(r"step-\d+", step):
        raise UserError(
            f"{shown_path(path)}: {key} holds {step[:40]!r}, not the name of a step folder, such as {step_name(1000)}"
        )
    return step


def _followed(path: str, endpoint_url: str | None) -> str:
    """The step folder that a path ending in `best` or `latest` means, if it is a text file of a run folder; else the path."""
    folder, _, name = path.rstrip("/").rpartition("/")
    if name not in (LATEST, BEST) or not folder:
        return path
    try:
        storage = open_storage(package_path(folder), endpoint_url)
    except UserError:  # no such folder: whoever opens the path says so
        return path
    return path if storage.stat(name) is None else f"{folder}/{_named_step(storage, name, path)}"


def _no_model(path: str) -> str:
    """Why there is no model at a path, with the nearest folder that exists."""
    folder = Path(package_path(path))
    if "://" in path or folder.is_dir():
        return f"no model here: neither {META} nor {LATEST} in it"
    if folder.exists():
        return f"is a file; name the folder that it is in, {shown_path(folder.parent)}"
    return not_there(folder, "folder")


def write_model(
    storage: Storage,
    prefix: str,
    weights: dict[str, Tensor],
    config: str,
    about: AboutModel,
    averages: dict[float, dict[str, Tensor]] | None = None,
) -> str:
    """Write a model folder below `prefix` (ending in /), meta last. Returns the sha256 of the weights.

    `averages` are further moving averages of the same weights by decay, each in its own file.
    """
    import safetensors.torch

    def encoded(tensors: dict[str, Tensor]) -> bytes:
        return safetensors.torch.save({k: t.detach().cpu().contiguous() for k, t in tensors.items()})

    files = {WEIGHTS: encoded(weights)}
    digests = {}
    for decay, tensors in (averages or {}).items():
        files[_average_file(f"{decay:g}")] = data = encoded(tensors)
        digests[f"{decay:g}"] = hashlib.sha256(data).hexdigest()
    sha256 = hashlib.sha256(files[WEIGHTS]).hexdigest()
    known = about.values() | environment().values()
    meta = ModelMeta.model_validate({**known, "sha256": sha256, "averages": digests})
    files |= {CONFIG: config.encode(), META: record_bytes(meta)}
    storage.write_folder(prefix, files)
    return meta.sha256
