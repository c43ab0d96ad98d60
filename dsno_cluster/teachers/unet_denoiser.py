"""Our own U-Net as a denoiser: what is known about it, and the teacher made from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsno_cluster.diffusion.predictions import clean_images, out_channels
from dsno_cluster.errors import UserError, said_by
from dsno_cluster.networks.backbones import OurUNet
from dsno_cluster.teachers.backbones import of_cosine_times
from dsno_cluster.teachers.facts import ALL_SIGMAS, PREDICTED, Facts, number_of_parameters
from dsno_cluster.teachers.identity import UNetDescription, UNetIdentity
from dsno_cluster.teachers.teacher import Teacher, TeacherInfo, check_schedule, is_distilled
from dsno_cluster.weight_files import check_fit

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dsno_cluster.networks.unet import UNet
    from dsno_cluster.teachers.state_dict_file import Denoise


def unet_info(path: str, description: UNetDescription, sha256: str, schedule: Any) -> TeacherInfo:
    """What is known about a U-Net teacher. `schedule` None: its own steps if it was distilled to few.

    Raises UserError for an unknown schedule, and for native if the teacher names no steps of its own.
    """
    network, steps = description.network, description.num_steps
    if network.missing_sizes:
        raise UserError(f"{path}: its network has no {', '.join(network.missing_sizes)}")
    schedule = check_schedule(schedule or ("native" if is_distilled(steps) else "continuous"), path)
    if schedule == "native" and steps is None:
        raise UserError(f"{path}: schedule native: its meta names no num_steps of its own; leave it out")
    former = UNetIdentity(**dict(description), sha256=sha256)
    identity = former.model_copy(update={"network": network.model_copy(update={"dropout": 0.0})})
    own_steps = None if schedule == "continuous" or steps is None else uniform_grid(steps)
    return TeacherInfo(
        identity,
        network.state_shape,
        network.num_classes,
        network.num_classes if network.null_class else None,
        native=None if own_steps is None else lambda _: own_steps,
        num_steps=None if own_steps is None else steps,
        backbone=of_cosine_times(OurUNet(settings=identity.network), description.prediction),
        has_network=True,
        former_identities=() if former == identity else (former,),
    )


def unet_facts(description: UNetDescription) -> Facts:
    """What `inspect-teacher` says of a U-Net of ours."""
    from dsno_cluster.networks.unet import UNet

    network, steps = description.network, description.num_steps
    channels = out_channels(description.prediction, network.state_channels)
    return Facts(
        "U-Net of dsno-cluster",
        PREDICTED[description.prediction],
        "cosine, every level" if not is_distilled(steps) else f"cosine, the levels of its {steps} steps only",
        number_of_parameters(lambda: UNet(network, out_channels=channels)),
        ALL_SIGMAS,
        native=None if steps is None else lambda _: uniform_grid(steps),
        steps=steps or 64,
    )


def uniform_grid(steps: int) -> tuple[float, ...]:
    """`steps` equal intervals from t=1 to t=0."""
    return tuple((steps - i) / steps for i in range(steps + 1))


def unet_teacher(
    info: TeacherInfo, description: UNetDescription, weights: dict[str, Tensor], precision: str, path: str
) -> Teacher:
    """The teacher of these weights, on CPU, its layers in `precision`.

    Raises UserError, naming `path`, if the weights are not those of the network that is described.
    """
    import torch

    from dsno_cluster.networks.unet import UNet

    network, prediction, dtype = description.network, description.prediction, getattr(torch, precision)
    channels = out_channels(prediction, network.state_channels)
    try:
        with torch.device("meta"):  # so that nothing is allocated before the weights are known to fit
            wanted = UNet(network, out_channels=channels).state_dict()
    except (ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f"{path}: its description makes no network: {said_by('torch', error)}") from None
    check_fit(weights, wanted, f"{path}: its weights do not fit its description")
    unet = UNet(network, out_channels=channels)
    unet.load_state_dict(weights)
    unet.to(memory_format=torch.channels_last)
    unet.eval().requires_grad_(False).to(dtype)
    return Teacher(info, denoiser(unet, prediction, dtype), unet)


def denoiser(unet: UNet, prediction: str, dtype: torch.dtype) -> Denoise:
    """The denoiser (x, t_N, labels) -> x0 of a U-Net whose layers are in `dtype`, on the cosine schedule."""
    from dsno_cluster.diffusion.schedule import alpha_sigma, logsnr

    def denoise(x: Tensor, t_N: Tensor, labels: Tensor | None) -> Tensor:
        alpha, sigma = (s.to(x.dtype)[:, None, None, None] for s in alpha_sigma(t_N))
        output = unet(x.to(dtype), logsnr(t_N).float()[:, None], labels)[:, 0].to(x.dtype)
        return clean_images(prediction, output, x, alpha, sigma)

    return denoise
