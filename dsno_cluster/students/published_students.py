"""Reading of DSNO's published students (torch zip files) as students of ours."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsno_cluster.config import Network, too_many_modes, validate
from dsno_cluster.errors import UserError
from dsno_cluster.records import Values
from dsno_cluster.students.published_format import (
    RESIDUAL,
    published_parts,
    published_settings,
    say_wrong,
    whole_number,
)
from dsno_cluster.weight_files import parse_torch

if TYPE_CHECKING:
    from torch import Tensor

    from dsno_cluster.networks.unet import UNet


@dataclass(frozen=True)
class PublishedStudent:
    """A published student: the `model` entry for our `meta.json`, and float32 weights under our names."""

    model: Values
    weights: dict[str, Tensor]


def read_published_student(data: bytes, where: str, config: bytes, config_path: str) -> PublishedStudent:
    """The `ema` of a published DSNO checkpoint (`solver-model_*.pt`), as a student of ours.

    Sizes that follow from the tensors must agree with the published YAML; heads, time points and the
    resolutions of attention are known only from the YAML. Raises UserError as `import_weights` does.
    """
    import torch

    from dsno_cluster.networks.unet import UNet
    from dsno_cluster.students.dsno import DSNO, Form

    settings = published_settings(config, config_path)
    theirs = _read_torch_zip(data, where)
    times = _published_times(settings, config_path)
    modes = (
        whole_number(settings, "model.num_modes", config_path)
        if settings["model"].get("time_conv", True)
        else 0
    )
    network = _student_network(theirs, settings, where, config_path)
    form = Form(modes)
    if problem := too_many_modes(form.operator, modes, len(times)):
        raise UserError(f"{config_path}: model.num_{problem}")
    with torch.device("meta"):
        student = DSNO(network, form, times)
    assert isinstance(student.backbone, UNet)
    weights = from_published_torch(theirs, student.backbone, f"{where} with {config_path}")
    return PublishedStudent(
        student.describe().values(), {f"backbone.{name}": tensor for name, tensor in weights.items()}
    )


def _published_times(settings: dict[str, Any], path: str) -> tuple[float, ...]:
    """The time points of a published student, descending: the last num_t of its t_idx, on its grid of t_dim.

    Quadratic t = (i / (t_dim - 1))^2 over reversed t_idx, uniform t = 1 - i / (t_dim - 1) over t_idx, both
    stretched to [epsilon, 1]. (The published index formula gives these only for its own two configs.)
    """
    data = settings["data"]
    indices, points = data.get("t_idx"), whole_number(settings, "model.num_t", path)
    last = whole_number(settings, "data.t_dim", path) - 1
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
    classes = whole_number(settings, "model.num_classes", path)
    first = tuple(theirs["all_modules.0.weight"].shape) if "all_modules.0.weight" in theirs else ()
    expected = (whole_number(settings, "model.temb_dim", path), whole_number(settings, "model.nf", path))
    if first != expected:
        raise UserError(
            f"{where}: all_modules.0.weight has shape {first or 'none'}, {path} says (model.temb_dim, model.nf) {expected}"
        )
    size, levels = whole_number(settings, "data.image_size", path), model.get("ch_mult")
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


def _read_torch_zip(data: bytes, where: str) -> dict[str, Tensor]:
    """The tensors of `ema` by name. Raises UserError if the file is not a published checkpoint."""
    import argparse

    import torch

    saved = parse_torch(data, where, allowed=[argparse.Namespace])
    ema = saved.get("ema") if isinstance(saved, dict) else None
    if not isinstance(ema, dict) or not ema or not all(isinstance(v, torch.Tensor) for v in ema.values()):
        raise UserError(f"{where}: holds no tensors `ema`; it is not a published DSNO checkpoint")
    # DDP prefixes the names
    tensors = {str(name).removeprefix("module."): tensor for name, tensor in ema.items()}
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.layout != torch.strided:
            raise UserError(f"{where}: {name} is not a plain tensor")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise UserError(f"{where}: {name} holds values that are not finite floating-point numbers")
    return {name: tensor.float() for name, tensor in tensors.items()}


def from_published_torch(theirs: dict[str, Tensor], unet: UNet, where: str) -> dict[str, Tensor]:
    """The published torch network's `all_modules.N.*`, under our names and layouts.

    Raises UserError, beginning with `where`, that names the tensors that are missing, surplus or misshapen.
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
            names = {f"{inner}.": f"{torch_name}." for inner, (_, _, torch_name) in RESIDUAL.items()}
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
    say_wrong(where, wrong, left)
    return ours
