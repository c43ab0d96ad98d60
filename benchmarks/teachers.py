"""Are the networks of foreign teachers as fast here as in their authors' code?

Each original network whose checkout is given by path is built with random weights and saved as its authors save it, and
`load_teacher` reads the file. Both then get the same states: the outputs are compared, and both are timed in turn on the same
device, so that what else the machine does meets both. Ratios below 1 say that ours is faster. At tiny sizes about a minute on
one core:

    python benchmarks/teachers.py [--edm DIR] [--edm2 DIR] [--guided-diffusion DIR] [--dit DIR] [--sit DIR] [--published]

DiT and SiT need timm.
"""

from __future__ import annotations

import argparse
import importlib
import pickle
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsno_cluster import console, load_teacher
from dsno_cluster.device import compute_device, device_name, wait_for_gpu

CLASSES = 10
Inputs = tuple[
    Tensor, Tensor, Tensor
]  # states (N, C, H, W), noise levels (N,) as the network counts them, labels (N,)


@dataclass(frozen=True)
class Case:
    """A network: `build` gives the original, `save` writes its file, `call` evaluates the original.

    `options` are those of `load_teacher`; `shape` is that of the states, (C, H, W).
    """

    name: str
    build: Callable[[], nn.Module]
    save: Callable[[Any, Path], None]
    call: Callable[[Any, Inputs], Tensor]
    shape: tuple[int, int, int]
    options: dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("edm", "edm2", "guided-diffusion", "dit", "sit"):
        parser.add_argument(f"--{name}", metavar="DIR", help=f"a checkout of {name}")
    parser.add_argument(
        "--published", action="store_true", help="networks of published sizes (default: tiny ones)"
    )
    parser.add_argument("--batch", type=int, default=4, help="states at a time (default: 4)")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs of calls (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    families = (
        (options.edm, edm),
        (options.edm2, edm2),
        (options.guided_diffusion, openai),
        (options.dit, lambda checkout, published: transformer("DiT", checkout, published)),
        (options.sit, lambda checkout, published: transformer("SiT", checkout, published)),
    )
    # a checkout after the other: modules of several have the same names, and are needed until their networks are saved
    rows = [
        measured(case, options.batch, options.pairs)
        for checkout, cases in families
        if checkout
        for case in cases(checkout, options.published)
    ]
    if not rows:
        parser.error("name one checkout or more")
    header = ["network", "parameters", "outputs differ by", "original, s", "ours, s", "ours / original"]
    console.table(
        f"one call of {options.batch} states on {device_name()}, {options.threads} CPU threads", header, rows
    )


def measured(case: Case, batch: int, pairs: int) -> list[str]:
    """A row of the table."""
    device = compute_device()
    torch.manual_seed(0)
    original = case.build().eval().requires_grad_(False)
    for parameter in original.parameters():  # many layers begin at zero, and would hide a difference
        if not parameter.any():
            parameter.copy_(0.02 * torch.randn(parameter.shape))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "original"
        case.save(original, file)
        network = load_teacher(str(file), options=case.options).to(device).network
    assert network is not None
    original.to(device)
    x = torch.randn(batch, *case.shape, device=device)
    labels = torch.arange(batch, device=device) % CLASSES
    inputs = x, torch.linspace(0.1, 0.9, batch, device=device), labels
    with torch.no_grad():
        theirs, ours = case.call(original, inputs), network(*inputs)
        ours = ours[:, : theirs.shape[1]]  # SiT's own code leaves out the half for a variance
        difference = float((ours - theirs).norm() / theirs.norm())
        times = [
            (seconds(lambda: case.call(original, inputs), device), seconds(lambda: network(*inputs), device))
            for _ in range(pairs)
        ]
    parameters = sum(p.numel() for p in original.parameters())
    ratio = statistics.median(own / other for other, own in times)
    each = [f"{statistics.median(column):.3g}" for column in zip(*times, strict=True)]
    return [case.name, f"{parameters:,}", f"{difference:.1e}", *each, f"{ratio:.2f}"]


def seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    # of one thread on a busy machine, the time that it ran says more than the time that passed
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    call()
    wait_for_gpu()
    return clock() - began


def imported(checkout: str, name: str) -> Any:
    """A module of a checkout; those of other checkouts with the same names are forgotten."""
    top = {"training", "torch_utils", "dnnlib", "guided_diffusion", "models"}
    for known in [known for known in sys.modules if known.partition(".")[0] in top]:
        del sys.modules[known]
    sys.path.insert(0, str(Path(checkout).absolute()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def edm(checkout: str, published: bool) -> list[Case]:
    networks = imported(checkout, "training.networks")
    size = 32 if published else 16
    small: dict[str, Any] = (
        {} if published else {"model_channels": 32, "num_blocks": 1, "attn_resolutions": [8]}
    )
    ncsnpp = {
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
    }
    forms: dict[str, dict[str, Any]] = {
        "EDM, DDPM++": {"model_type": "SongUNet"} | small,
        "EDM, NCSN++": {"model_type": "SongUNet"} | ncsnpp | small,
        "EDM, ADM": {"model_type": "DhariwalUNet"} | small,
    }

    def case(name: str, form: dict[str, Any]) -> Case:
        wide = 64 if published and form["model_type"] == "DhariwalUNet" else size
        return Case(
            name,
            lambda: networks.EDMPrecond(img_resolution=wide, img_channels=3, label_dim=CLASSES, **form),
            save_snapshot,
            lambda network, inputs: network.model(inputs[0], inputs[1], one_hot(inputs[2])),
            (3, wide, wide),
            {},
        )

    return [case(name, form) for name, form in forms.items()]


def edm2(checkout: str, published: bool) -> list[Case]:
    networks = imported(checkout, "training.networks_edm2")
    size = 64 if published else 16
    small = {} if published else {"model_channels": 64, "num_blocks": 1, "channel_mult": [1, 2]}
    return [
        Case(
            "EDM2",
            lambda: networks.Precond(
                img_resolution=size, img_channels=3, label_dim=CLASSES, use_fp16=False, **small
            ),
            save_snapshot,
            lambda network, inputs: network.unet(inputs[0], inputs[1], one_hot(inputs[2])),
            (3, size, size),
            {},
        )
    ]


def openai(checkout: str, published: bool) -> list[Case]:
    unet = imported(checkout, "guided_diffusion.unet")
    size = 64 if published else 16
    sizes: dict[str, Any] = {"model_channels": 192, "num_res_blocks": 3, "attention_resolutions": (2, 4, 8)}
    if not published:
        sizes = {
            "model_channels": 128,
            "num_res_blocks": 1,
            "attention_resolutions": (2,),
            "channel_mult": (1, 2),
        }
    else:
        sizes["channel_mult"] = (1, 2, 3, 4)
    heads = {"num_head_channels": 64}

    def case(new_order: bool) -> Case:
        return Case(
            f"guided-diffusion, {'new' if new_order else 'legacy'} order",
            lambda: unet.UNetModel(
                image_size=size,
                in_channels=3,
                out_channels=6,
                num_classes=CLASSES,
                use_scale_shift_norm=True,
                resblock_updown=True,
                use_new_attention_order=new_order,
                **sizes,
                **heads,
            ),
            save_state_dict,
            lambda network, inputs: network(*inputs),
            (3, size, size),
            {
                "family": "openai-adm",
                "new_attention_order": new_order,
                "beta_schedule": "cosine",
                "image_size": size,
                **heads,
            },
        )

    return [case(True), case(False)]


def transformer(name: str, checkout: str, published: bool) -> list[Case]:
    models = imported(checkout, "models")
    size = 32 if published else 16
    small = {} if published else {"hidden_size": 96, "depth": 4, "num_heads": 4}
    heads = 16 if published else 4
    return [
        Case(
            name,
            lambda: getattr(models, name)(input_size=size, num_classes=CLASSES, **small),
            save_state_dict,
            lambda network, inputs: network(*inputs),
            (4, size, size),
            {"family": name.lower(), "num_heads": heads},
        )
    ]


def one_hot(labels: Tensor) -> Tensor:
    return nn.functional.one_hot(labels, CLASSES).float()


def save_snapshot(network: nn.Module, file: Path) -> None:
    with file.open("wb") as opened:
        pickle.dump({"ema": network}, opened)


def save_state_dict(network: nn.Module, file: Path) -> None:
    torch.save(network.state_dict(), file)


if __name__ == "__main__":
    main()
