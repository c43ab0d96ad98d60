"""Other authors' networks made fit for training here: DeepSpeed flattens weights, and checkpoints keep nothing else."""

from __future__ import annotations

from torch import nn

# The class of diffusers whose frequencies are parameters, though they are not trained.
_CONSTANT = "GaussianFourierProjection"


def give_weights_an_axis(network: nn.Module) -> None:
    """Reshape weights that are single numbers without an axis to (1,)."""
    for module in network.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 0:
                module.register_parameter(name, nn.Parameter(parameter.detach().reshape(1)))


def keep_constants_out(network: nn.Module) -> None:
    """Leave only what a network's authors train in its state dict; frequencies and tables of positions stay as they are."""
    for module in network.modules():
        buffers = dict(module.named_buffers(recurse=False))
        if type(module).__name__ == _CONSTANT:
            for name, parameter in list(module.named_parameters(recurse=False)):
                delattr(module, name)
                buffers[name] = parameter.detach()
        for name, buffer in buffers.items():
            module.register_buffer(name, buffer, persistent=False)
