"""Makes tests/data/edm: tiny snapshots of EDM and EDM2 with random weights, and what the original code gives for them.

    python tests/data/make_edm.py edm CHECKOUT_OF_NVLABS_EDM
    python tests/data/make_edm.py edm2 CHECKOUT_OF_NVLABS_EDM2

The source texts in the pickles are a placeholder. `sampler_*` are the states of EDM's deterministic sampler, without
churn, at its own noise levels. One snapshot is written as torch 1.12 and numpy 1.26 write them.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

OUT = Path(__file__).parent / "edm"
SIGMAS = (0.002, 0.05, 0.5, 5.0, 80.0)
STEPS, CLASSES, SIZE, IMAGES = 18, 3, 8, 2
SHAPE = {
    "img_resolution": SIZE,
    "img_channels": 3,
    "model_channels": 8,
    "num_blocks": 1,
    "channel_mult": [1, 2],
}
SONG = {**SHAPE, "model_type": "SongUNet", "attn_resolutions": [4]}
NCSN = {"embedding_type": "fourier", "channel_mult_noise": 2}
FILTER = {"resample_filter": [1, 3, 3, 1]}
# name: the class of the preconditioning and its arguments
EDM: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpmpp_cond": ("EDMPrecond", {**SONG, "label_dim": CLASSES, "augment_dim": 9}),
    "ncsnpp_ve": ("VEPrecond", {**SONG, **NCSN, **FILTER, "encoder_type": "residual"}),
    "skip_vp": ("VPPrecond", {**SONG, **FILTER, "encoder_type": "skip", "decoder_type": "skip"}),
    "adm_iddpm": (
        "iDDPMPrecond",
        {**SHAPE, "model_type": "DhariwalUNet", "attn_resolutions": [4], "label_dim": CLASSES},
    ),
}
EDM2 = {
    "edm2_cond": ("Precond", {**SHAPE, "attn_resolutions": [4], "label_dim": CLASSES, "channels_per_head": 4})
}


class OldPickler(pickle._Pickler):
    """Writes numpy's names as they were before numpy 2."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = getattr(obj, "__module__", None) or ""
        if module.startswith("numpy._core"):
            self.save(module.replace("numpy._core", "numpy.core"))  # type: ignore[attr-defined]
            self.save(obj.__name__)  # type: ignore[attr-defined]
            self.write(pickle.STACK_GLOBAL)  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]

    dispatch = {**pickle._Pickler.dispatch, type(len): save_global, type(np.dtype): save_global}  # noqa: RUF012


def write(content: dict[str, Any], file: Path, *, old: bool) -> None:
    if old:
        for module in content["ema"].modules():
            for name in ("_parameters", "_buffers", "_modules"):
                module.__dict__[name] = OrderedDict(module.__dict__[name])
    opened = io.BytesIO()
    (OldPickler if old else pickle.Pickler)(opened, protocol=4).dump(content)
    file.write_bytes(gzip.compress(opened.getvalue(), mtime=0))


def randomize(network: nn.Module, magnitude_preserving: bool) -> None:
    """Weights of 8 bits of mantissa, which compress well, whatever their dtype."""
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 0:
                parameter.copy_(0.8 + 0.1 * noise)
            elif parameter.dim() == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(
                    noise if magnitude_preserving else noise / math.sqrt(2 * parameter[0].numel())
                )
            parameter.copy_(parameter.bfloat16())


def sampled(network: Any, latents: Tensor, rows: Tensor | None, sampler: str) -> Tensor:
    """The states of the original's sampler, (N, steps, C, H, W) float64."""
    states: list[Tensor] = []
    text = sampler.replace("    return x_next", "        states.append(x_next)\n    return x_next")
    scope = {"np": np, "torch": torch, "states": states}
    exec(text, scope)
    scope["edm_sampler"](network, latents.double(), rows, num_steps=STEPS)  # type: ignore[operator]
    return torch.stack(states, dim=1)


def main(which: str, checkout: str) -> None:
    sys.path.insert(0, checkout)
    import dnnlib
    from torch_utils import persistence

    persistence._module_to_src = lambda module: "# source text left out"
    if which == "edm":
        from training import networks
        from training.augment import AugmentPipe as Extra

        # the original's heads have 64 channels, for which a network this small has not enough
        original = networks.UNetBlock

        class SmallHeads(original):  # type: ignore[valid-type, misc]
            def __new__(cls, *arguments: Any, **settings: Any) -> Any:
                small = {"channels_per_head": 4} if "channels_per_head" in settings else {}
                return original(*arguments, **{**settings, **small})

        networks.UNetBlock = SmallHeads
        text = (Path(checkout) / "generate.py").read_text()
        sampler = text[text.index("def edm_sampler") : text.index("#----", text.index("def edm_sampler"))]
    else:
        from training import networks_edm2 as networks
        from training.encoders import StandardRGBEncoder as Extra

        sampler = ""
    torch.set_num_threads(1)
    OUT.mkdir(exist_ok=True)
    for name, (kind, settings) in (EDM if which == "edm" else EDM2).items():
        torch.manual_seed(0)
        network = getattr(networks, kind)(**{"label_dim": 0, **settings}).eval().requires_grad_(False)
        if which == "edm":
            networks.UNetBlock = original
        randomize(network, which == "edm2")
        if which == "edm2":
            network.to(torch.float16)
        content = dnnlib.EasyDict(encoder=Extra()) if which == "edm2" else {"augment_pipe": Extra()}
        content |= {"dataset_kwargs": dnnlib.EasyDict(path="a.zip"), "ema": network}
        write(content, OUT / f"{name}.pkl.gz", old=name == "adm_iddpm")
        network.to(torch.float32)
        x0, noise, latents = (torch.randn(IMAGES, 3, SIZE, SIZE) for _ in range(3))
        labels = torch.arange(IMAGES) % CLASSES
        rows = torch.eye(CLASSES)[labels] if settings.get("label_dim") else None
        found = {"x0": x0, "noise": noise, "sigmas": torch.tensor(SIGMAS, dtype=torch.float64)}
        of_sigmas = [torch.tensor(sigma, dtype=torch.float64) for sigma in SIGMAS]
        found["denoised"] = torch.stack([network(x0 + s * noise, s, rows).float() for s in of_sigmas], 1)
        if rows is not None:
            none = torch.stack([network(x0 + s * noise, s, None).float() for s in of_sigmas], 1)
            found |= {"labels": labels, "denoised_without_label": none}
        if sampler:
            states = sampled(network, latents, rows, sampler)
            found |= {"latents": latents, "states": states[:, ::6].float(), "end": states[:, -1].float()}
        safetensors.torch.save_file(
            {key: value.contiguous() for key, value in found.items()}, OUT / f"{name}.safetensors"
        )
        if which == "edm":
            networks.UNetBlock = SmallHeads


if __name__ == "__main__":
    main(*sys.argv[1:])
