"""Other authors' networks made fit for training here: DeepSpeed flattens weights, and checkpoints keep nothing else."""

from __future__ import annotations

from torch import nn


def give_weights_an_axis(network: nn.Module) -> None:
    """Reshape weights that are single numbers without an axis to (1,)."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 0:
                module.register_parameter(name, nn.Parameter(parameter.detach().reshape(1)))
