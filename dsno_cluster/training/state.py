"""What a rank holds of the training state, as named fragments, and the files that they are saved in.

Under any ZeRO stage a rank owns, of each parameter, one run of its elements: master weights in float32, and the
optimiser's moments. Checkpoints are written fragment by fragment, each rank its own, without any communication, and
read back into whatever fragments another stage or another number of ranks has.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsno_cluster.errors import WorkError

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of Adam, AdamW and RAdam alike


@dataclass(frozen=True)
class Fragment:
    """Elements `start` to `start + count` of a flattened parameter.

    `tensors` are (count,) float32 views of what training itself changes: `master`, and the moments by name.
    """

    start: int
    count: int
    tensors: dict[str, Tensor]


def fragments_of(engine: Any, *, replicas: bool = False) -> dict[str, Fragment]:
    """This rank's fragment of every parameter of a DeepSpeed engine, by name; an empty one has count 0.

    Where the stage replicates a parameter, each rank owns an equal share of it; with `replicas` a fragment is all that the
    rank has. The engine must have its moments (`begin_moments`).
    """
    optimizer = engine.optimizer
    find: Callable[[Any, Any], Fragment]
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):
        find = _of_stage_3
    elif hasattr(optimizer, "single_partition_of_fp32_groups"):
        find = _of_stage_1_and_2
    else:
        masters = _replicated_masters(optimizer)

        def find(optimizer: Any, parameter: Any) -> Fragment:
            return _of_stage_0(optimizer, masters[parameter], share=not replicas)

    return {name: find(optimizer, parameter) for name, parameter in engine.module.named_parameters()}


def begin_moments(engine: Any) -> None:
    """Zero moments and a step count of 0, before the first step.

    The optimiser would make them at its first step; some stages make them with a step of their own, which they count.
    """
    optimizer = engine.optimizer
    inner = _torch_optimizer(optimizer)
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", None) or getattr(
        optimizer, "single_partition_of_fp32_groups", None
    )
    for master in masters or _replicated_masters(optimizer).values():
        moments = {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}
        inner.state[master] = {"step": torch.zeros(()), **moments}


def _of_stage_0(optimizer: Any, master: Tensor, *, share: bool) -> Fragment:
    rank, world = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
    start, stop = master.numel() * rank // world, master.numel() * (rank + 1) // world
    state = _torch_optimizer(optimizer).state[master]
    whole = {MASTER: master.detach(), **{name: state[name] for name in MOMENTS}}
    return Fragment(start, stop - start, {k: tensor.view(-1)[start:stop] for k, tensor in whole.items()})


# Parameters are Any where DeepSpeed has given them attributes of its own.


def _of_stage_1_and_2(optimizer: Any, parameter: Any) -> Fragment:
    mapping = parameter._hp_mapping
    if mapping is None:
        nothing = torch.empty(0, device=optimizer.single_partition_of_fp32_groups[0].device)
        return Fragment(0, 0, dict.fromkeys((MASTER, *MOMENTS), nothing))
    flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    here = mapping.get_hp_fragment_address()
    return _cut(optimizer, flat, here.start, mapping.lp_fragment_address.start, here.numel)


def _of_stage_3(optimizer: Any, parameter: Any) -> Fragment:
    group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
    numel = int(parameter.ds_numel)
    start = min(size * dist.get_rank(), numel)  # the last partitions are padded, or padding alone
    return _cut(
        optimizer, optimizer.fp32_partitioned_groups_flat[group], offset, start, min(size, numel - start)
    )


def _cut(optimizer: Any, flat: Tensor, offset: int, start: int, count: int) -> Fragment:
    state = optimizer.optimizer.state[flat]
    whole = {MASTER: flat.detach(), **{name: state[name] for name in MOMENTS}}
    return Fragment(start, count, {name: tensor.narrow(0, offset, count) for name, tensor in whole.items()})


def _replicated_masters(optimizer: Any) -> dict[nn.Parameter, Tensor]:
    """The float32 weights that stage 0 steps, by parameter: themselves, or copies of those in half precision."""
    if not hasattr(optimizer, "fp32_groups"):
        return {p: p for group in optimizer.param_groups for p in group["params"]}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {low: high for group in groups for low, high in zip(*group, strict=True)}


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def optimizer_steps(engine: Any) -> int:
    """Steps that the optimiser itself has counted: without those that fp16's overflows skipped."""
    states = list(_torch_optimizer(engine.optimizer).state.values())
    return int(states[0]["step"]) if states else 0


def set_optimizer_steps(engine: Any, steps: int) -> None:
    for state in _torch_optimizer(engine.optimizer).state.values():
        state["step"].fill_(float(steps))


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaler_state(engine: Any) -> dict[str, float]:
    """Where the dynamic loss scaling of fp16 stands; empty without it."""
    scaler = _loss_scaler(engine)
    return {name: float(getattr(scaler, name)) for name in _SCALER if hasattr(scaler, name)}


def set_loss_scaler_state(engine: Any, state: dict[str, float]) -> None:
    scaler = _loss_scaler(engine)
    for name, value in state.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value if name == "cur_scale" else int(value))


def _loss_scaler(engine: Any) -> Any:
    if not engine.fp16_enabled():
        return None
    # the name for stages 1 to 3; stage 0 has a config of the same fields, or in older versions fields of its own
    for name in ("loss_scaler", "loss_scale_config"):
        if getattr(engine.optimizer, name, None) is not None:
            return getattr(engine.optimizer, name)
    return engine.optimizer


def write_fragments(
    file: Path, fragments: dict[str, Fragment], averages: dict[str, dict[str, Tensor]]
) -> None:
    """Write this rank's fragments, and of each moving average by name the same elements, as safetensors.

    Tensors are called KIND/PARAMETER; where each parameter's fragment starts stands in the file's metadata. Raises
    WorkError where the disk does not take it.
    """
    held = {name: fragment for name, fragment in fragments.items() if fragment.count}
    tensors = {f"{kind}/{name}": t for name, part in held.items() for kind, t in part.tensors.items()}
    tensors |= {f"{kind}/{name}": average[name] for kind, average in averages.items() for name in held}
    starts = json.dumps({name: fragment.start for name, fragment in held.items()})
    try:
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            file,
            {"starts": starts},
        )
    except (OSError, safetensors.SafetensorError) as error:
        raise WorkError(f"{file}: cannot be written: {error}") from error


class SavedFragments:
    """The fragment files of one checkpoint, whatever stage and number of ranks wrote them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pieces: dict[str, list[tuple[int, int, Any]]] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            try:
                file = safetensors.safe_open(path, "pt")
                starts = json.loads(file.metadata()["starts"])
                for key in file.keys():  # noqa: SIM118 (no mapping)
                    start = starts[key.partition("/")[2]]
                    part = file.get_slice(key)
                    self.pieces.setdefault(key, []).append((start, start + part.get_shape()[0], part))
            except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
                raise WorkError(f"{path}: cannot be read: {error}") from error

    def read(self, kind: str, name: str, start: int, count: int) -> Tensor:
        """Elements `start` to `start + count` of a parameter's `kind`, (count,) float32. Raises WorkError for a gap."""
        wanted, found = torch.empty(count), 0
        for first, last, part in self.pieces.get(f"{kind}/{name}", ()):
            low, high = max(first, start), min(last, start + count)
            if low < high:
                wanted[low - start : high - start] = part[low - first : high - first]
                found += high - low
        if found != count:
            raise WorkError(f"{self.folder}: has {found} of the {count} elements wanted of {kind}/{name}")
        return wanted

    @torch.no_grad()
    def load(self, fragments: dict[str, Fragment]) -> None:
        """Copy what was saved into the fragments of the running training."""
        for name, fragment in fragments.items():
            for kind, tensor in fragment.tensors.items():
                tensor.copy_(self.read(kind, name, fragment.start, fragment.count))

    @torch.no_grad()
    def load_weights(self, model: nn.Module) -> None:
        """The whole saved master weights, into a model that no engine has cut yet."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.read(MASTER, name, 0, parameter.numel()).view(parameter.shape))


def whole_on_rank_0(
    model: nn.Module, fragments: dict[str, Fragment], parts: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Whole tensors, put together on rank 0 from every rank's `parts`, by parameter; collective.

    On the CPU; other ranks get an empty dict.
    """
    whole = {}
    for name, parameter in model.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)  # the whole shape, under ZeRO-3
        flat = torch.zeros(shape.numel(), device=parts[name].device)
        fragment = fragments[name]
        flat[fragment.start : fragment.start + fragment.count] = parts[name]
        dist.reduce(flat, 0)  # each element is one rank's, and 0 on all others
        if dist.get_rank() == 0:
            whole[name] = flat.view(shape).cpu()
    return whole
