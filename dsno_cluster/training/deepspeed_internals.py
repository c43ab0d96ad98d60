"""All uses of DeepSpeed's internals: the attributes that hold master weights, moments and the loss scale.

They follow the sources of versions 0.17 to 0.19; `pyproject.toml` has the upper bound.
"""

from __future__ import annotations

import collections
import logging
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dsno_cluster.errors import WorkError
from dsno_cluster.training.fragments import MASTER, MOMENTS, Fragment


def import_deepspeed() -> Any:
    """The deepspeed module, quiet, and without its compiled operators.

    Training uses none of them. DeepSpeed would find out which of them it could compile, with a C++ compiler and nvcc, and on
    a CPU compile one for inference, which takes half a minute and a compiler that a laptop may not have.
    """
    for name in ("DeepSpeed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # it uses names that torch has deprecated
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # its barriers say this if a single rank has set its device but not bound it to the group
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    import deepspeed

    # older versions have found out while they were imported
    deepspeed.ops.__compatible_ops__ = collections.defaultdict(bool)
    return deepspeed


def forget_groups() -> None:
    """Drop DeepSpeed's references to process groups that were destroyed, so that it makes new ones if it is used again."""
    from deepspeed.utils import groups

    if hasattr(groups, "_release_process_group_references"):
        groups._release_process_group_references()
    else:  # before 0.19.8
        groups._WORLD_GROUP = groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None


def fragments_of(engine: Any, *, replicas: bool = False) -> dict[str, Fragment]:
    """This rank's fragment of every parameter of a DeepSpeed engine, by name; an empty one has count 0.

    If the stage replicates a parameter, each rank owns an equal share of it; with `replicas` a fragment is all that the
    rank holds. The engine must have its moments (`begin_moments`).
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()

    def find(parameter: Any) -> Fragment:
        if stage == 0:
            return _of_stage_0(optimizer, parameter, share=not replicas)
        return _of_stage_3(optimizer, parameter) if stage == 3 else _of_stage_1_and_2(optimizer, parameter)

    return {name: find(parameter) for name, parameter in engine.module.named_parameters()}


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """The full shape of a parameter, which ZeRO-3 may have partitioned."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def begin_moments(engine: Any) -> None:
    """Create zero moments and a step count of 0, before the first step.

    The optimiser would create them at its first step; some stages do so with an extra step, which they count.
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        masters = _weights(optimizer)
    elif stage == 3:
        masters = optimizer.fp32_partitioned_groups_flat
    else:
        masters = optimizer.single_partition_of_fp32_groups
    inner = _torch_optimizer(optimizer)
    for master in masters:
        moments = {name: torch.zeros_like(master, requires_grad=False) for name in MOMENTS}
        # a fused optimiser counts its steps on the device
        at = master.device if inner.defaults.get("fused") else None
        inner.state[master] = {"step": torch.zeros((), device=at), **moments}


def _of_stage_0(optimizer: Any, master: Tensor, *, share: bool) -> Fragment:
    rank, world = (dist.get_rank(), dist.get_world_size()) if share else (0, 1)
    start, stop = master.numel() * rank // world, master.numel() * (rank + 1) // world
    state = _torch_optimizer(optimizer).state[master]
    whole = {MASTER: master.detach(), **{name: state[name] for name in MOMENTS}}
    return Fragment(start, stop - start, {k: tensor.view(-1)[start:stop] for k, tensor in whole.items()})


# Parameters are Any if DeepSpeed has given them attributes of its own.


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
    start = min(size * dist.get_rank(), numel)  # the last partitions are padded, or only padding
    return _cut(
        optimizer, optimizer.fp32_partitioned_groups_flat[group], offset, start, min(size, numel - start)
    )


def _cut(optimizer: Any, flat: Tensor, offset: int, start: int, count: int) -> Fragment:
    state = optimizer.optimizer.state[flat]
    whole = {MASTER: flat.detach(), **{name: state[name] for name in MOMENTS}}
    return Fragment(start, count, {name: tensor.narrow(0, offset, count) for name, tensor in whole.items()})


def _weights(optimizer: Any) -> list[nn.Parameter]:
    """The weights, all of which stage 0 updates in place."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def optimizer_steps(engine: Any) -> int:
    """Steps that the optimiser itself has counted, without those skipped after float16 overflows."""
    states = list(_torch_optimizer(engine.optimizer).state.values())
    return int(states[0]["step"]) if states else 0


def set_optimizer_steps(engine: Any, steps: int) -> None:
    for state in _torch_optimizer(engine.optimizer).state.values():
        state["step"].fill_(float(steps))


SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def loss_scaler_state(engine: Any) -> dict[str, float]:
    """The state of float16's dynamic loss scaling; empty without it."""
    scaler = _loss_scaler(engine)
    return {name: float(getattr(scaler, name)) for name in SCALER_FIELDS if hasattr(scaler, name)}


def set_loss_scaler_state(engine: Any, state: dict[str, float]) -> None:
    scaler = _loss_scaler(engine)
    for name, value in state.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value if name == "cur_scale" else int(value))


def without_norm() -> dict[str, bool]:
    """The setting with which stages 1 and 2 do not compute the norm of the gradient; older versions always do."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return {"compute_grad_norm": False} if "compute_grad_norm" in DeepSpeedZeroConfig.model_fields else {}


def scale_losses(engine: Any) -> None:
    """Make an engine of stage 1, 2 or 3 scale its loss dynamically, for layers whose gradients are float16.

    DeepSpeed itself does so only if the weights are float16 too. All ranks skip a step if a gradient of any of them is
    not finite. A step then raises WorkError if the scale cannot be made smaller.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    class Scaler(DynamicLossScaler):  # type: ignore[misc]
        def update_scale(self, overflow: bool) -> None:
            smallest = self.cur_scale <= self.min_scale and self.cur_hysteresis <= 1
            if overflow and smallest:
                raise WorkError(
                    "training.precision float16: gradients are not finite even if the loss is not scaled; take bfloat16 or "
                    "float32, or a smaller training.lr"
                )
            super().update_scale(overflow)

    optimizer = engine.optimizer
    optimizer.check_grad_overflow = True  # stages 1 and 2 would not look
    # the values of DeepSpeed's own float16, whose checkpoints continue here
    optimizer.loss_scaler = Scaler(
        init_scale=2.0**16,
        scale_window=1000,
        min_scale=1.0,
        delayed_shift=2,
        consecutive_hysteresis=False,
    )


def _loss_scaler(engine: Any) -> Any:
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return scaler if getattr(scaler, "dynamic", False) else None
