"""The files of a diffusers folder: configs, `model_index.json`, and weights in the forms that people have them."""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dsno_cluster.errors import UserError
from dsno_cluster.storage import absolute_address, split_path
from dsno_cluster.teachers.diffusers_schedules import Saved
from dsno_cluster.teachers.teacher import Source
from dsno_cluster.weight_files import (
    NotWeights,
    check_safetensors_data,
    check_torch_data,
    container,
    disguise,
    parse_safetensors,
    parse_torch,
)

if TYPE_CHECKING:
    from torch import Tensor

STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
SCHEDULER_CONFIG = "scheduler_config.json"
MODEL_INDEX = "model_index.json"
# Variants in the order of preference; "" is float32.
VARIANTS = ("", "fp16", "bf16")
MODELS = ("unet", "transformer")
EMA = "unet_ema"
AUTOENCODERS = ("vae", "vqvae", "movq", "vqgan")
TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "bert")


@dataclass(frozen=True)
class Autoencoder:
    """What turns the states of a latent diffusion model into images: its folder below `root`, and its config.

    `has_files`: its config exists, and is not only named in `model_index.json`.
    """

    root: str
    folder: str
    config: dict[str, Any]
    has_files: bool

    @property
    def class_name(self) -> str:
        return str(self.config.get("_class_name", "an autoencoder"))


@dataclass(frozen=True)
class Parts:
    """Where the parts of a folder are, by its files.

    `prefix` leads to the model's config and weights. `listed` are the classes in `model_index.json`, by component.
    """

    prefix: str
    config: dict[str, Any]
    listed: dict[str, str] = field(default_factory=dict)
    scheduler: Saved | None = None
    autoencoder: Autoencoder | None = None
    text: str | None = None


@dataclass(frozen=True)
class Weights:
    """Files of weights by name. `variant` is "" for those in the usual precision."""

    files: dict[str, bytes]
    variant: str

    @property
    def sha256(self) -> str | dict[str, str]:
        """That of the file, or those of several files by name; a single file of an unusual name is named too."""
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.files.items())}
        return digests[WEIGHTS] if len(digests) == 1 and WEIGHTS in digests else digests

    def tensors(self, where: str) -> dict[str, Tensor]:
        """All tensors by name. Raises NotWeights for a file that is none, or would run code."""
        import torch

        found: dict[str, Tensor] = {}
        for name, data in self.files.items():
            if container(data) == "safetensors":
                found |= parse_safetensors(data, f"{where}: {name}")
                continue
            content = parse_torch(data, f"{where}: {name}")
            if not isinstance(content, Mapping) or not all(
                isinstance(value, torch.Tensor) for value in content.values()
            ):
                raise NotWeights(f"{where}: {name}: holds {type(content).__name__}, not tensors by name")
            found |= {str(key): tensor for key, tensor in content.items()}
        return found


def is_folder_of_diffusers(source: Source) -> bool:
    """Whether a folder has a model of `save_pretrained`, or a pipeline."""
    configs = (f"{name}/config.json" for name in (*MODELS, EMA))
    return any(source.has(key) for key in ("config.json", *configs, MODEL_INDEX))


def find_parts(source: Source, ema: bool | None) -> Parts:
    """The parts of a folder. Raises UserError if there is no model, or its files are no JSON."""
    parent, last = split_path(absolute_address(source.path))
    above = Source(parent, source.endpoint_url) if last in (*MODELS, EMA) else None
    index = read_json(source, MODEL_INDEX) or (read_json(above, MODEL_INDEX) if above else None) or {}
    listed = _listed(index, source.path)
    prefix = _prefix(source, listed, ema)
    config = read_json(source, f"{prefix}config.json")
    if config is None:
        raise UserError(
            f"{source.path}: has no {prefix}config.json, though {MODEL_INDEX} names its {prefix[:-1]}"
        )
    whole = above if above and not source.has(MODEL_INDEX) else source
    return Parts(
        prefix,
        config,
        listed,
        _saved_scheduler(source, above, listed),
        _autoencoder(whole, listed),
        next((name for name in TEXT if name in listed or whole.has(f"{name}/config.json")), None),
    )


def read_json(source: Source, key: str) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file. Raises UserError for anything else."""
    data = source.read(key)
    if data is None:
        return None
    where = f"{source.storage.url}/{key}"
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        problem = disguise(data) if not data.lstrip().startswith((b"{", b"[")) else None
        raise UserError(f"{where}: {problem or f'not JSON: {error}'}") from None
    if not isinstance(content, dict):
        raise UserError(f"{where}: holds {type(content).__name__}, not an object")
    return content


def read_weights(source: Source, prefix: str) -> Weights:
    """The weights of a model: safetensors before `.bin`, float32 before float16, one file before several with an index.

    Raises UserError if there are none, or parts of them are missing or damaged.
    """
    for variant in VARIANTS:
        middle = f".{variant}" if variant else ""
        for suffix in ("safetensors", "bin"):
            index = f"{STEM}.{suffix}.index{middle}.json"
            single = f"{STEM}{middle}.{suffix}"
            if (named := read_json(source, prefix + index)) is not None:
                names = _indexed(named, f"{source.path}: {prefix}{index}", suffix)
                return Weights({n: _part(source, prefix, n, index) for n in names}, variant)
            if source.has(prefix + single):
                return Weights({single: _part(source, prefix, single, None)}, variant)
    folder = source.storage.url + (f"/{prefix[:-1]}" if prefix else "")
    others = [posixpath.basename(s.key) for s in source.storage.list(prefix) if _looks_like_weights(s.key)]
    found = f"; found {', '.join(sorted(others)[:4])}" if others else ""
    raise UserError(
        f"{source.path}: no weights: {folder} has no {STEM}.safetensors or .bin, by itself, with an index, or as variant "
        f"fp16 or bf16{found}"
    )


def _prefix(source: Source, listed: dict[str, str], ema: bool | None) -> str:
    """The key prefix of the model: its folder within a pipeline, or "". Raises UserError if there is none."""
    if ema is not None and not isinstance(ema, bool):
        raise UserError(f"{source.path}: option ema {ema!r} is not one of: true, false")
    if ema:
        if source.has("config.json") or not source.has(f"{EMA}/config.json"):
            raise UserError(f"{source.path}: option ema is true, but there is no {EMA}/config.json")
        return f"{EMA}/"
    if source.has("config.json"):
        return ""
    for name in MODELS:
        if name in listed or source.has(f"{name}/config.json"):
            return f"{name}/"
    components = f"; its {MODEL_INDEX} names {', '.join(listed)}" if listed else ""
    raise UserError(
        f"{source.path}: a diffusers pipeline without unet/config.json or transformer/config.json is not read here{components}"
    )


def _listed(index: dict[str, Any], path: str) -> dict[str, str]:
    """Class names by component, of `model_index.json`: an entry is [library, class], with nulls if it is left out."""
    listed = {}
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and entry != [None, None]:
            if not all(isinstance(word, str) for word in entry):
                raise UserError(f"{path}: {MODEL_INDEX}: {name} is {entry!r}, not a library and a class")
            listed[name] = entry[1]
        elif name in (*MODELS, "scheduler") and entry != [None, None]:
            raise UserError(f"{path}: {MODEL_INDEX}: {name} is {entry!r}, not a library and a class")
    return listed


def _saved_scheduler(source: Source, above: Source | None, listed: dict[str, str]) -> Saved | None:
    """The scheduler's config as it was saved; for the unet folder of a pipeline it is beside that.

    It is empty if only `model_index.json` names the class.
    """
    places = [(source, f"scheduler/{SCHEDULER_CONFIG}"), (source, SCHEDULER_CONFIG)]
    if above:
        places.append((above, f"scheduler/{SCHEDULER_CONFIG}"))
    for place, key in places:
        if found := read_json(place, key):
            return Saved(found, key, listed.get("scheduler"))
    return Saved({}, MODEL_INDEX, listed["scheduler"]) if "scheduler" in listed else None


def _autoencoder(source: Source, listed: dict[str, str]) -> Autoencoder | None:
    for name in AUTOENCODERS:
        config = read_json(source, f"{name}/config.json")
        if name in listed or config is not None:
            named = {"_class_name": listed[name]} if name in listed else {}
            return Autoencoder(source.path, name, named | (config or {}), has_files=config is not None)
    return None


def _indexed(index: dict[str, Any], where: str, suffix: str) -> list[str]:
    """The names of the files in an index of weights."""
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise UserError(f"{where}: has no weight_map that names files")
    names = sorted({str(name) for name in weights.values()})
    foreign = [name for name in names if "/" in name or "\\" in name or not name.endswith(f".{suffix}")]
    if foreign:
        raise UserError(f"{where}: names {foreign[0]!r}, which is no .{suffix} file beside it")
    return names


def _part(source: Source, prefix: str, name: str, index: str | None) -> bytes:
    data, where = source.read(prefix + name), f"{source.path}: {prefix}{name}"
    if data is None:
        raise UserError(f"{where}: is missing, though {index} names it")
    if name.endswith(".safetensors") or container(data) == "safetensors":
        check_safetensors_data(data, where)
    else:
        check_torch_data(data, where)
    return data


def _looks_like_weights(key: str) -> bool:
    return key.endswith((".safetensors", ".bin", ".pt", ".ckpt", ".pth", ".msgpack", ".onnx"))
