"""A teacher's weights as the beginning of a student.

A student answers states. At t=1, where x is pure noise, x0 is the output of a network that predicts x0 (or both: its first
half) and minus that of one that predicts v; one that predicts eps says nothing of x0, so its last layer is left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def with_last_layer_of_x0(
    weights: dict[str, Tensor], last_layer: str, prediction: str, channels: int
) -> dict[str, Tensor]:
    """The weights with the last layer, named `last_layer`, turned to give x0 at t=1; without it for eps."""
    last = {name: tensor for name, tensor in weights.items() if name.startswith(last_layer)}
    others = {name: tensor for name, tensor in weights.items() if name not in last}
    if prediction == "eps":
        return others
    sign = -1 if prediction == "v" else 1
    return others | {name: sign * tensor[:channels] for name, tensor in last.items()}


def no_unet(path: str, kind: str) -> UserError:
    """What to raise for a teacher whose weights no student can begin with."""
    return UserError(
        f"student.warm_start: the {kind} teacher at {path} is not a U-Net of this project; set student.warm_start=false"
    )
