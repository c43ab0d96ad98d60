"""A teacher's weights as the starting point of a student on our U-Net or with `student.backbone=diffusers`.

Students with `student.backbone=teacher` keep the whole last layer instead: see `networks/backbones.py`.

A student predicts states. At t=1, where x is pure noise, x0 is the output of a network that predicts x0 (for
`both`: its first half) and minus the output of one that predicts v; eps contains no information on x0, so
that last layer is dropped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsno_cluster.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def with_last_layer_of_x0(
    weights: dict[str, Tensor], last_layer: str, prediction: str, channels: int
) -> dict[str, Tensor]:
    """The weights with the last layer, named `last_layer`, changed to give x0 at t=1; without it for eps."""
    last = {name: tensor for name, tensor in weights.items() if name.startswith(last_layer)}
    others = {name: tensor for name, tensor in weights.items() if name not in last}
    if prediction == "eps":
        return others
    sign = -1 if prediction == "v" else 1
    return others | {name: sign * tensor[:channels] for name, tensor in last.items()}


def no_unet(path: str, kind: str) -> UserError:
    """The error for a teacher whose weights no student can start from."""
    return UserError(
        f"student.warm_start: the {kind} teacher at {path} is not a U-Net of this project; take its own network "
        "(student.backbone=teacher), or set student.warm_start=false"
    )


def no_network(path: str, kind: str) -> UserError:
    """The error for a teacher without a network that a student could be built on."""
    return UserError(
        f"student.backbone: the {kind} teacher at {path} has no network that is known here; set student.backbone=unet"
    )
