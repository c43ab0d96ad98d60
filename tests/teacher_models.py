"""What tests of teachers share: published fixtures, a small diffusers model, an error measure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import DATA
from torch import Tensor

from dsno_cluster.networks.adm_unet import ADMUNet
from dsno_cluster.networks.descriptions import ADMDescription
from dsno_cluster.teachers.openai_shapes import original_names

PUBLISHED = DATA / "published"
# The options of the state dicts in tests/data/state_dicts.
ADM = {
    "family": "openai-adm",
    "num_head_channels": 8,
    "new_attention_order": False,
    "beta_schedule": "linear",
}
STATE_DICTS: dict[str, dict[str, Any]] = {
    "adm": ADM,
    "dit": {"family": "dit", "num_heads": 4},
    "sit": {"family": "sit", "num_heads": 4},
}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These networks are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(name="unet", scope="module")
def small_diffusers_unet() -> Any:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=5,
    ).eval()


def saved(unet: Any, folder: Path, **scheduler: Any) -> tuple[str, Any]:
    """The model in a pipeline folder with its scheduler, and that scheduler as DDIM."""
    from diffusers import DDIMScheduler

    ddim = DDIMScheduler(clip_sample=False, thresholding=False, **scheduler)
    unet.save_pretrained(folder / "unet")
    ddim.save_pretrained(folder / "scheduler")
    return str(folder), ddim


def saved_unet(path: Path, described: ADMDescription, *, two_dimensional: bool = False) -> ADMUNet:
    """A random network in a file of the original's names; attention's layers over pixels are those of one axis, or of two."""
    torch.manual_seed(0)
    network = ADMUNet(described).eval()
    tensors, names = network.state_dict(), original_names(network)
    flat = {
        names[name]: tensor[..., 0]
        if names[name].endswith(("qkv.weight", "proj_out.weight")) and not two_dimensional
        else tensor
        for name, tensor in tensors.items()
    }
    torch.save(flat, path)
    return network


def weights_of(name: str) -> Path:
    return DATA / "state_dicts" / name / "weights.pt"
