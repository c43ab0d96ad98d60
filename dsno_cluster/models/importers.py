"""Published checkpoints -> ours: DSNO students (torch zip) and progressive-distillation teachers (flax msgpack).

A published network is a U-Net of `unet.py` under other names. `published_parts` lists its parts in their order,
with our name and flax's; the published torch networks number the same list. No code of a file is executed:
msgpack holds data only and its reader has limits; a torch zip is read by torch's restricted unpickler, with
`argparse.Namespace` (the published training arguments) as the only class allowed besides its own.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsno_cluster.config import Network, parse_yaml, validate
from dsno_cluster.errors import UserError
from dsno_cluster.models.flax_file import read_flax
from dsno_cluster.storage import open_storage

if TYPE_CHECKING:
    from torch import Tensor

    from dsno_cluster.models.unet import UNet

PREDICTIONS = ("x", "eps", "v", "both")

# The values of the published YAML's `model` that this network implements; other values are refused by name.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "pred_eps": (False,),
    "with_nin": (False,),
    "fourier_feature": (False,),
    "num_pad": (0,),
    "conditional": (True,),
    "resblock_type": ("biggan",),
    "normalization": ("GroupNorm",),
    "nonlinearity": ("swish",),
    "logsnr_type": ("inv_cos",),
    "logsnr_min": (-20,),
    "logsnr_max": (20,),
}


@dataclass(frozen=True)
class PublishedModel:
    """`model` is what our `meta.json` says under `model`; weights carry our names, float32."""

    model: dict[str, Any]
    weights: dict[str, Tensor]


# ---- doors -------------------------------------------------------------------------------------------------


def import_weights(
    src: str, published_yaml: str, out_dir: str, endpoint_url: str | None = None, command: str = ""
) -> str:
    """Write the published student or teacher at `src`, told apart by its first bytes, as the model folder `out_dir`.

    `src`, `published_yaml` and `out_dir` are paths or S3 addresses. Returns what it was, "student" or "teacher".
    Raises UserError for a file of another kind, a switch that is not implemented, and tensors that are missing,
    surplus or misshapen, by name.
    """
    import yaml

    from dsno_cluster.models.weights import split_path, write_model

    data, text = read_object(src, endpoint_url), read_object(published_yaml, endpoint_url)
    student = recognise(data[:4]) == "torch"
    read = read_published_student if student else read_published_teacher
    published = read(data, src, text, published_yaml)
    meta = {
        "model": published.model,
        "made_by": command or "dsno_cluster.models.importers.import_weights",
        "imported": {
            "file": src.rstrip("/").rpartition("/")[2],
            "sha256": hashlib.sha256(data).hexdigest(),
            "config": parse_yaml(text.decode(), published_yaml),
        },
    }
    config = yaml.safe_dump({"network": published.model["network"]}, sort_keys=False)
    parent, name = split_path(out_dir)
    write_model(open_storage(parent, endpoint_url), f"{name}/", published.weights, config, meta)
    return "student" if student else "teacher"


def read_object(path: str, endpoint_url: str | None) -> bytes:
    """The bytes at a path or S3 address. Raises UserError where there is no such file."""
    from dsno_cluster.models.weights import split_path
    from dsno_cluster.storage import MissingObject

    parent, name = split_path(path)
    try:
        return open_storage(parent, endpoint_url).read(name)
    except MissingObject:
        raise UserError(f"{path}: no such file") from None


def recognise(head: bytes) -> str:
    """What a checkpoint is, by its first bytes: 'flax', 'torch', 'pickle' or 'unknown'."""
    if head[:4] == b"PK\x03\x04":
        return "torch"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        return "pickle"
    is_map = bool(head) and (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF))
    return "flax" if is_map else "unknown"


def read_published_teacher(data: bytes, where: str, config: bytes, config_path: str) -> PublishedModel:
    """A progressive-distillation teacher (Salimans & Ho 2022), its `ema_params`, as a network of ours.

    What the tensors tell is inferred from them and must agree with the published YAML. An output layer of
    2C channels is parametrised as `both`, whatever the YAML's mean_type says.

    Raises UserError as `import_weights` does.
    """
    from dsno_cluster.diffusion.teachers import describe
    from dsno_cluster.models.unet import UNet

    if (kind := recognise(data[:4])) != "flax":
        what = {
            "torch": "is a torch zip file (a published DSNO student?), not a teacher in flax msgpack",
            "pickle": "is a pickle, which may run code when read; only flax msgpack is read here",
            "unknown": "is not a flax msgpack checkpoint (it begins with no msgpack map)",
        }
        raise UserError(f"{where}: {what[kind]}")
    settings = _published_settings(config, config_path)
    params, steps = read_flax(data, where)
    network = _network(params, settings, where, config_path)
    prediction = _prediction(params, network, settings, where, config_path)
    import torch

    with torch.device("meta"):
        unet = UNet(network, out_channels=out_channels(prediction, network.channels))
    weights = _from_flax(params, unet, where)
    model = describe(network, prediction)
    steps = steps or settings["data"].get("num_steps")
    if steps is not None and (type(steps) is not int or steps < 1):
        raise UserError(f"{config_path}: data.num_steps {steps!r} is not a positive whole number")
    return PublishedModel(model if steps is None else {**model, "num_steps": steps}, weights)


def read_published_student(data: bytes, where: str, config: bytes, config_path: str) -> PublishedModel:
    """A published DSNO checkpoint (`solver-model_*.pt`), its `ema`, as a student of ours.

    Sizes that the tensors tell must agree with the published YAML; heads, time points and the resolutions of
    attention stand in the YAML alone.

    Raises UserError as `import_weights` does.
    """
    import torch

    from dsno_cluster.models.dsno import DSNO, Form
    from dsno_cluster.models.unet import UNet

    settings = _published_settings(config, config_path)
    theirs = _read_torch_zip(data, where)
    times = _published_times(settings, config_path)
    modes = (
        _whole(settings, "model.num_modes", config_path) if settings["model"].get("time_conv", True) else 0
    )
    network = _student_network(theirs, settings, where, config_path)
    if modes > len(times) // 2 + 1:
        raise UserError(
            f"{config_path}: model.num_modes {modes} is above {len(times) // 2 + 1} = M//2+1 for M={len(times)} time points"
        )
    with torch.device("meta"):
        student = DSNO(network, Form(modes), times)
    assert isinstance(student.backbone, UNet)
    weights = from_published_torch(theirs, student.backbone, f"{where} with {config_path}")
    return PublishedModel(
        student.describe(), {f"backbone.{name}": tensor for name, tensor in weights.items()}
    )


def out_channels(prediction: str, channels: int) -> int:
    """Channels of the last layer: twice the image's where the network predicts both x0 and eps."""
    return 2 * channels if prediction == "both" else channels


# ---- the published YAML ------------------------------------------------------------------------------------


def _published_settings(config: bytes, path: str) -> dict[str, Any]:
    """The YAML with its sections `data` and `model`; UserError names a switch that is not implemented."""
    try:
        settings = parse_yaml(config.decode(), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text: {error.reason}") from None
    for section in ("data", "model"):
        if not isinstance(settings, dict) or not isinstance(settings.get(section), dict):
            raise UserError(f"{path}: has no section {section!r}; give the published YAML of this checkpoint")
    for key, values in _IMPLEMENTED.items():
        if key in settings["model"] and _lower(settings["model"][key]) not in map(_lower, values):
            found, right = settings["model"][key], values[0]
            raise UserError(f"{path}: model.{key} {found!r} is not implemented here; only {right!r} is")
    return settings


def _lower(value: Any) -> Any:
    """The published code compares these words in lower case."""
    return value.lower() if isinstance(value, str) else value


def _network(params: dict[str, Tensor], settings: dict[str, Any], where: str, path: str) -> Network:
    """The network that the tensors describe, after agreeing with the YAML. The YAML alone has image sizes."""
    model, data = settings["model"], settings["data"]
    size = data.get("image_size")
    if not isinstance(size, int) or size < 1:
        raise UserError(f"{path}: data.image_size {size!r} is not a positive whole number")

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in params:
            raise UserError(f"{where}: has no tensor {name}")
        found = _without_leading_ones(tuple(params[name].shape), rank)
        if len(found) != rank or 0 in found:
            raise UserError(f"{where}: {name} has shape {found}, expected {rank} dimensions above 0")
        return found

    def count(pattern: str) -> int:
        prefixes = {name.partition("/")[0] for name in params}
        return next(i for i in range(len(prefixes) + 1) if pattern.format(i) not in prefixes)

    channels, width = shape("conv_in/kernel", 4)[2:]
    levels = count("down_{}.block_0")
    widths = [shape(f"down_{i}.block_0/conv1/kernel", 4)[3] for i in range(levels)]
    if not levels or any(w % width for w in widths):
        raise UserError(f"{where}: the levels have {widths} channels, not multiples of conv_in's {width}")
    attention = [name for name in params if name.endswith("/q/kernel")]
    per_head = {shape(name, 3)[1:] for name in attention}  # (heads, head_dim) of each
    attending = [i for i in range(levels) if f"down_{i}.attn_0/q/kernel" in params]
    inferred = {
        "model.nf": width,
        "model.temb_dim": shape("dense0/kernel", 2)[1],
        "model.ch_mult": [w // width for w in widths],
        "model.num_res_blocks": count("down_0.block_{}"),
        "model.num_classes": shape("class_emb/kernel", 2)[0] if "class_emb/kernel" in params else 0,
        "data.num_channels": channels,
        "model.attn_resolutions": sorted(size // 2**i for i in attending),
    }
    given = {f"data.{k}": v for k, v in data.items()} | {f"model.{k}": v for k, v in model.items()}
    if isinstance(given.get("model.attn_resolutions"), list):  # sizes that no level has do nothing
        sizes = [size // 2**i for i in range(levels)]
        given["model.attn_resolutions"] = sorted(s for s in given["model.attn_resolutions"] if s in sizes)
    if given.get("model.num_classes") == 1:  # how the flax code says unconditional
        given["model.num_classes"] = inferred["model.num_classes"] if inferred["model.num_classes"] else 0
    for key, found in inferred.items():
        if given.get(key) is not None and given[key] != found:
            raise UserError(f"{where}: its tensors have {key} {found}, {path} says {given[key]}")
    heads, head_dim = _heads(per_head, model, where, path)
    return validate(
        Network,
        {
            "image_size": size,
            "channels": channels,
            "num_classes": inferred["model.num_classes"],
            "width": width,
            "multipliers": inferred["model.ch_mult"],
            "blocks_per_level": inferred["model.num_res_blocks"],
            "attention_resolutions": inferred["model.attn_resolutions"],
            "heads": heads,
            "head_dim": head_dim,
            "embedding_dim": inferred["model.temb_dim"],
            "dropout": model.get("dropout", 0.0),
        },
        f"{where} with {path}",
    )


def _heads(
    per_head: set[tuple[int, ...]], model: dict[str, Any], where: str, path: str
) -> tuple[int, int | None]:
    """Heads and head_dim. The YAML's head_dim wins over its num_attn_heads, as in the published network."""
    counts, dims = {heads for heads, _ in per_head}, {dim for _, dim in per_head}
    for key, found in (("head_dim", dims), ("num_attn_heads", counts)):
        if model.get(key) is not None:
            if found != {model[key]}:
                raise UserError(
                    f"{where}: its tensors have model.{key} {sorted(found)}, {path} says {model[key]}"
                )
            break
    if len(counts) == 1 and (len(dims) > 1 or model.get("head_dim") is None):
        return next(iter(counts)), None
    if len(dims) == 1:
        return 1, next(iter(dims))
    raise UserError(f"{where}: its attention blocks share neither heads nor head size: {sorted(per_head)}")


def _prediction(
    params: dict[str, Tensor], network: Network, settings: dict[str, Any], where: str, path: str
) -> str:
    if "conv_out/bias" not in params:
        raise UserError(f"{where}: has no tensor conv_out/bias")
    last, said = int(params["conv_out/bias"].numel()), settings["model"].get("mean_type")
    if last == 2 * network.channels:
        return "both"
    if last != network.channels:
        raise UserError(f"{where}: conv_out has {last} channels for images of {network.channels}")
    if said not in PREDICTIONS[:3]:
        raise UserError(
            f"{path}: model.mean_type {said!r} does not fit {last} output channels: x, eps or v do"
        )
    return str(said)


def _whole(settings: dict[str, Any], key: str, path: str, default: int | None = None) -> int:
    """The whole number at `section.name` of the published YAML. Raises UserError where it is none."""
    section, name = key.split(".")
    value = settings[section].get(name, default)
    if type(value) is not int or value < 0:
        raise UserError(f"{path}: {key} {value!r} is not a whole number of 0 or more")
    return value


def _published_times(settings: dict[str, Any], path: str) -> tuple[float, ...]:
    """The time points of a published student, descending: the last num_t of its t_idx, on its grid of t_dim.

    Quadratic t = (i / (t_dim - 1))^2 over reversed t_idx, uniform t = 1 - i / (t_dim - 1) over t_idx, both
    stretched to [epsilon, 1]. (The published index formula gives these for its own two configs only.)
    """
    data = settings["data"]
    indices, points = data.get("t_idx"), _whole(settings, "model.num_t", path)
    last = _whole(settings, "data.t_dim", path) - 1
    if not isinstance(indices, list) or not all(type(i) is int and 0 <= i <= last for i in indices):
        raise UserError(
            f"{path}: data.t_idx {indices!r} is not a list of indices in 0..{last} (data.t_dim - 1)"
        )
    if not 1 <= points <= len(indices):
        raise UserError(f"{path}: model.num_t {points} is not in 1..{len(indices)}, the length of data.t_idx")
    spacing, epsilon = data.get("time_step"), data.get("epsilon", 0.0)
    if spacing not in ("quad", "uniform"):
        raise UserError(f"{path}: data.time_step {spacing!r} is not implemented here; quad and uniform are")
    if not isinstance(epsilon, int | float) or not 0.0 <= epsilon < 1.0:
        raise UserError(f"{path}: data.epsilon {epsilon!r} is not in [0, 1)")
    if last < 1:
        raise UserError(f"{path}: data.t_dim {last + 1} leaves no grid of times")
    if spacing == "quad":
        times = [(i / last) ** 2 for i in reversed(indices)]
    else:
        times = [1.0 - i / last for i in indices]
    times = [epsilon + (1.0 - epsilon) * t for t in times[-points:]]
    if any(a <= b for a, b in itertools.pairwise(times)):
        raise UserError(f"{path}: data.t_idx {indices} does not ascend")
    return tuple(times)


def _student_network(theirs: dict[str, Tensor], settings: dict[str, Any], where: str, path: str) -> Network:
    model, data = settings["model"], settings["data"]
    classes = _whole(settings, "model.num_classes", path)
    first = tuple(theirs["all_modules.0.weight"].shape) if "all_modules.0.weight" in theirs else ()
    expected = (_whole(settings, "model.temb_dim", path), _whole(settings, "model.nf", path))
    if first != expected:
        raise UserError(
            f"{where}: all_modules.0.weight has shape {first or 'none'}, {path} says (model.temb_dim, model.nf) {expected}"
        )
    size, levels = _whole(settings, "data.image_size", path), model.get("ch_mult")
    if not isinstance(levels, list) or not isinstance(model.get("attn_resolutions"), list):
        raise UserError(f"{path}: model.ch_mult and model.attn_resolutions must be lists")
    if model.get("head_dim") is None and model.get("num_attn_heads") is None:
        raise UserError(f"{path}: has neither model.head_dim nor model.num_attn_heads")
    sizes = [size // 2**i for i in range(len(levels))]  # a size that no level has does nothing there
    return validate(
        Network,
        {
            "image_size": size,
            "channels": data.get("num_channels", 3),
            "num_classes": classes,
            "width": expected[1],
            "multipliers": levels,
            "blocks_per_level": model.get("num_res_blocks"),
            "attention_resolutions": [s for s in model["attn_resolutions"] if s in sizes],
            "heads": model.get("num_attn_heads") or 1,
            "head_dim": model.get("head_dim"),
            "embedding_dim": expected[0],
            "dropout": model.get("dropout", 0.0),
        },
        path,
    )


# ---- the names ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A part of the network: what it is, our name, and flax's (empty where the teachers have none)."""

    kind: str
    ours: str
    flax: str = ""


def published_parts(unet: UNet) -> Iterator[Part]:
    """The parts of a published network of these sizes, in its order (the published torch modules' numbers)."""
    levels = len(unet.down)

    def stage(block: Any, ours: str, flax: str) -> Iterator[Part]:
        yield Part("residual", f"{ours}.residual", flax.replace("*", "block"))
        if block.attention is not None:
            yield Part("attention", f"{ours}.attention", flax.replace("*", "attn"))
        if block.temporal is not None:
            yield Part("temporal", f"{ours}.temporal")

    def side(name: str, resample: str) -> Iterator[Part]:
        for i, level in enumerate(getattr(unet, name)):
            number = i if name == "down" else levels - 1 - i  # flax numbers levels from the finest
            for j, block in enumerate(level.blocks):
                yield from stage(block, f"{name}.{i}.blocks.{j}", f"{name}_{number}.*_{j}")
            if level.resample is not None:
                yield Part("residual", f"{name}.{i}.resample", f"{name}_{number}.{resample}")

    yield Part("linear", "embed_level_in", "dense0")
    yield Part("linear", "embed_level_out", "dense1")
    if unet.embed_class is not None:
        yield Part("linear", "embed_class", "class_emb")
    yield Part("conv", "conv_in", "conv_in")
    yield from side("down", "downsample")
    yield from stage(unet.middle_in, "middle_in", "mid.*_1")
    yield Part("residual", "middle_out", "mid.block_2")
    yield from side("up", "upsample")
    yield Part("norm", "norm_out", "norm_out")
    yield Part("conv", "conv_out", "conv_out")


_RESIDUAL = {  # ours: (kind, flax, published torch)
    "norm_in": ("norm", "norm1", "GroupNorm_0"),
    "conv_in": ("conv", "conv1", "Conv_0"),
    "film": ("linear", "temb_proj", "Dense_0"),
    "norm_out": ("norm", "norm2", "GroupNorm_1"),
    "conv_out": ("conv", "conv2", "Conv_1"),
    "skip": ("pointwise", "nin_shortcut", "NIN_0"),
}


def _from_flax(params: dict[str, Tensor], unet: UNet, where: str) -> dict[str, Tensor]:
    """Flax's tensors under our names and layouts. UserError names what is missing, surplus or misshapen."""
    import torch

    from dsno_cluster.models.unet import Attention

    wanted = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    left, wrong, ours = dict(params), [], {}

    def take(name: str, shape: tuple[int, ...]) -> Tensor | None:
        tensor = left.pop(name, None)
        if tensor is None:
            wrong.append(f"{name} is missing")
        elif _without_leading_ones(tuple(tensor.shape), len(shape)) != shape:
            wrong.append(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        else:
            return tensor.reshape(shape)
        return None

    def simple(kind: str, name: str, flax: str) -> None:
        """A dense layer (in, out), a convolution (H, W, in, out) or a norm."""
        shape = wanted[f"{name}.weight"]
        if kind == "norm":
            weight = take(f"{flax}/scale", shape)
        elif kind == "conv":
            weight = take(f"{flax}/kernel", (*shape[2:], shape[1], shape[0]))
            weight = None if weight is None else weight.permute(3, 2, 0, 1)
        else:
            weight = take(f"{flax}/kernel", (shape[1], shape[0]))
            weight = None if weight is None else weight.T.reshape(shape)
        keep(f"{name}.weight", weight)
        keep(f"{name}.bias", take(f"{flax}/bias", wanted[f"{name}.bias"]))

    def attention(name: str, flax: str) -> None:
        """q, k, v of (C, heads, head_dim) and the output (heads, head_dim, C); ours packs [q|k|v] per head."""
        channels = wanted[f"{name}.norm.weight"][0]
        block = unet.get_submodule(name)
        assert isinstance(block, Attention)
        split = (block.heads, channels // block.heads)
        simple("norm", f"{name}.norm", f"{flax}/norm")
        weights = [take(f"{flax}/{x}/kernel", (channels, *split)) for x in "qkv"]
        biases = [take(f"{flax}/{x}/bias", split) for x in "qkv"]
        out = take(f"{flax}/proj_out/kernel", (*split, channels))
        keep(f"{name}.out.bias", take(f"{flax}/proj_out/bias", (channels,)))
        if any(x is None for x in (*weights, *biases, out)):
            return
        qkv = torch.stack([w for w in weights if w is not None])  # (3, C, heads, head_dim)
        keep(f"{name}.qkv.weight", qkv.permute(2, 0, 3, 1).reshape(3 * channels, channels, 1, 1))
        bias = torch.stack([b for b in biases if b is not None])  # (3, heads, head_dim)
        keep(f"{name}.qkv.bias", bias.permute(1, 0, 2).reshape(3 * channels))
        if out is not None:
            keep(f"{name}.out.weight", out.reshape(channels, channels).T[:, :, None, None])

    def keep(name: str, tensor: Tensor | None) -> None:
        if tensor is not None:
            ours[name] = tensor.contiguous()

    for part in published_parts(unet):
        if part.kind == "attention":
            attention(part.ours, part.flax)
        elif part.kind == "residual":
            for inner, (kind, flax, _) in _RESIDUAL.items():
                if f"{part.ours}.{inner}.weight" in wanted:
                    simple(kind, f"{part.ours}.{inner}", f"{part.flax}/{flax}")
        else:
            simple(part.kind, part.ours, part.flax)
    _say_wrong(where, wrong, left)
    return ours


def _read_torch_zip(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of `ema` by name. Raises UserError where the file is not a published checkpoint."""
    import argparse
    import pickle
    import zipfile

    import torch

    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (
        *(pickle.UnpicklingError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile),
        *(LookupError, AssertionError, TypeError, AttributeError, NotImplementedError),
    ) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        unsafe = re.search(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", reason)
        if unsafe:
            reason = (
                f"it names {unsafe[1]}, which could run code; only tensors and argparse.Namespace are read"
            )
        raise UserError(f"{where}: is not a published checkpoint: {reason[:160]}") from None
    ema = saved.get("ema") if isinstance(saved, dict) else None
    if not isinstance(ema, dict) or not ema or not all(isinstance(v, torch.Tensor) for v in ema.values()):
        raise UserError(f"{where}: holds no tensors `ema`; it is not a published DSNO checkpoint")
    tensors = {
        str(name).removeprefix("module."): tensor for name, tensor in ema.items()
    }  # as saved under DDP
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise UserError(f"{where}: {name} is not a plain tensor")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise UserError(f"{where}: {name} holds values that are not finite floating-point numbers")
    return {name: tensor.float() for name, tensor in tensors.items()}


def from_published_torch(theirs: dict[str, Tensor], unet: UNet, where: str) -> dict[str, Tensor]:
    """The published torch network's `all_modules.N.*`, under our names and layouts.

    Raises UserError that begins with `where` and names the tensors that are missing, surplus or misshapen.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    left, ours, wrong = dict(theirs), {}, []

    def take(name: str, theirs: str, shape: tuple[int, ...]) -> None:
        tensor = left.pop(theirs, None)
        if tensor is None:
            wrong.append(f"{theirs} is missing")
        elif tuple(tensor.shape) != shape:
            wrong.append(f"{theirs} has shape {tuple(tensor.shape)}, expected {shape}")
        else:  # a 1x1 convolution of theirs is a matrix (in, out)
            matrix = len(shape) == 2 and len(wanted[name]) == 4
            ours[name] = (tensor.T[:, :, None, None] if matrix else tensor).contiguous()

    for number, part in enumerate(published_parts(unet)):
        prefix = f"all_modules.{number}."
        names = {"": ""}
        if part.kind == "residual":
            names = {f"{inner}.": f"{torch_name}." for inner, (_, _, torch_name) in _RESIDUAL.items()}
        elif part.kind == "attention":
            names = {"norm.": "GroupNorm_0.", "qkv.": "NINs.", "out.": "NIN_3."}
        elif part.kind == "temporal":
            name = f"{part.ours}.weight"
            take(name, f"{prefix}t_conv.weights1", wanted[name])
            continue
        for inner, their in names.items():
            weight, bias = f"{part.ours}.{inner}weight", f"{part.ours}.{inner}bias"
            if weight not in wanted:
                continue
            if their.startswith("NIN"):
                take(weight, f"{prefix}{their}W", wanted[weight][1::-1])
                take(bias, f"{prefix}{their}b", wanted[bias])
            else:
                take(weight, f"{prefix}{their}weight", wanted[weight])
                take(bias, f"{prefix}{their}bias", wanted[bias])
    _say_wrong(where, wrong, left)
    return ours


def _say_wrong(where: str, wrong: list[str], left: Iterable[str]) -> None:
    """Raises UserError that names tensors, four at most, where there are wrong ones or any are left over."""
    wrong = wrong + [f"{name} is not of this network" for name in left]
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise UserError(f"{where}: does not fit the network of its YAML: {'; '.join(wrong[:4])}{more}")


def _without_leading_ones(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """`shape` with leading dimensions of 1 dropped down to `rank`: old flax pads norms to (1, 1, 1, C)."""
    while len(shape) > rank and shape[0] == 1:
        shape = shape[1:]
    return shape
