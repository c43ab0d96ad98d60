"""One-step sampling and one training step: our network against the published one, and against our own T=1 U-Net.

With `--published DIR`, a checkout of the published implementation (not part of this project), its network is built with the
config's sizes, its weights are imported, and both are timed in turn in one process, on the same inputs; their outputs are
compared too. Without it only the ratios to a plain evaluation of our U-Net are printed. Peak memory is that of a process of
its own for each case, over what it held before (CPU), or the allocator's peak (GPU).

    python benchmarks/sampler.py [--config configs/cifar10.yaml] [--batch 4] [--rounds 5] [--published DIR]
    python benchmarks/sampler.py --config configs/digits.yaml --batch 48 --published DIR

bfloat16 is autocast of ours against float32 of theirs, as they ship it. Nothing else may run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from dsno_cluster import console
from dsno_cluster.config import Config, load_config
from dsno_cluster.device import compute_device, device_name, wait_for_gpu
from dsno_cluster.diffusion.schedule import logsnr, time_points
from dsno_cluster.networks.unet import UNet
from dsno_cluster.students.dsno import DSNO, Form
from dsno_cluster.students.published_students import from_published_torch

CASES = (
    "published", "float32", "float32 recompute", "float32 compiled", "bfloat16", "bfloat16 compiled", "series", "T=1 U-Net"
)  # fmt: skip


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/cifar10.yaml")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--published", type=Path, metavar="DIR")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="default: all")
    parser.add_argument("--works", nargs="+", choices=("sample", "step"), default=("sample", "step"))
    # a process of ours
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "WORK"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.published is None and options.cases is not CASES and "published" in options.cases:
        parser.error("--cases published: needs --published DIR")
    if options.published is not None and not (options.published / "models/tddpmm.py").is_file():
        parser.error(
            f"--published {options.published}: has no models/tddpmm.py; it is not a checkout of the published code"
        )
    config = load_config(options.config)
    network = config.network.model_copy(update={"channels": 3})  # the published network knows no other
    config = config.model_copy(update={"network": network})
    if options.memory_of:
        print(peak_memory(config, options.published, options.batch, *options.memory_of))
        return
    base = "published" if options.published else "T=1 U-Net"
    # all are compared with the base, so it is among them
    cases = [c for c in CASES if c == base or (c in options.cases and c != "published")]
    parameters = sum(p.numel() for p in build("float32", config, None).parameters())
    print(f"{options.config}: {parameters / 1e6:.1f} M parameters, batch {options.batch}, {device_name()}")
    for work in options.works:
        models = {case: build(case, config, options.published) for case in cases}
        calls = {case: call_of(models[case], case, work, config, options.batch) for case in cases}
        seconds = in_turn(calls, options.rounds)
        rows = []
        for case in cases:
            ratios = [b / s for b, s in zip(seconds[base], seconds[case], strict=True)]
            memory = run_memory(options, case, work)
            rows.append([
                case, f"{statistics.median(seconds[case]) * 1e3:.0f} ms",
                f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} .. {max(ratios):.2f}", f"{memory / 2**20:.0f} MiB",
            ])  # fmt: skip
        title = {"sample": "a one-step sample", "step": "a training step"}[work]
        console.table(
            f"{title}, in turn",
            ["network", "median", f"times faster than {base}", "rounds", "peak memory"],
            rows,
        )
        if work == "sample" and options.published:
            compare({case: call() for case, call in calls.items()})


def build(case: str, config: Config, published: Path | None) -> nn.Module:
    """The network of a case; all of one architecture have the same weights."""
    network = config.network
    torch.manual_seed(0)
    if case == "published":
        assert published is not None
        return published_network(config, published).to(compute_device())
    times = time_points("quadratic", 4)
    if case == "T=1 U-Net":
        student = DSNO(network, Form(0), (0.0,))
    elif case == "series":
        student = DSNO(network, Form(4, "series", "data"), times)
    else:
        student = DSNO(network, Form(2), times)
    randomise(student)
    if case not in ("series", "T=1 U-Net") and published is not None:
        theirs = published_network(config, published)
        assert isinstance(student.backbone, UNet)
        student.backbone.load_state_dict(
            from_published_torch(theirs.state_dict(), student.backbone, "benchmark")
        )
    student.to(compute_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    if case == "float32 recompute":
        student.recompute("cheap")
    precision = "bfloat16" if case.startswith("bfloat16") else "float32"
    return student.accelerate(precision=precision, compile=case.endswith("compiled"))


def published_network(config: Config, folder: Path) -> nn.Module:
    """The published TDDPMm of the config's sizes; the same weights at every call."""
    sys.path.insert(0, str(folder))
    from models.tddpmm import TDDPMm  # type: ignore[import-not-found]

    network = config.network
    model = {
        "nf": network.width, "temb_dim": network.embedding_dim, "ch_mult": list(network.multipliers or ()),
        "num_res_blocks": network.blocks_per_level, "attn_resolutions": list(network.attention_resolutions),
        "num_attn_heads": network.heads, "head_dim": network.head_dim, "num_classes": network.class_slots,
        "dropout": network.dropout, "time_conv": True, "with_nin": False, "num_modes": 2, "pred_eps": False,
        "resblock_type": "biggan", "resamp_with_conv": False, "conditional": True, "logsnr_type": "inv_cos",
        "fourier_feature": False, "init_scale": 0.0, "nonlinearity": "swish", "normalization": "GroupNorm",
    }  # fmt: skip
    data = {"image_size": network.state_size, "num_channels": network.state_channels}
    torch.manual_seed(0)
    built: nn.Module = TDDPMm(SimpleNamespace(model=SimpleNamespace(**model), data=SimpleNamespace(**data)))
    randomise(built)
    return built


def randomise(model: nn.Module) -> None:
    """Weights of a size that keeps activations near one: at initialisation whole branches are zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1 and "temporal" not in name and "t_conv" not in name:
                parameter.normal_(std=0.5 / (parameter[0].numel() ** 0.5))


def call_of(model: nn.Module, case: str, work: str, config: Config, batch: int) -> Callable[[], Tensor]:
    """What is timed: a sample from noise, or a whole training step with Adam."""
    network, device = config.network, compute_device()
    generator = torch.Generator().manual_seed(2)
    shape = network.state_shape
    noise = torch.randn(batch, *shape, generator=generator).to(device)
    labels = (torch.arange(batch) % network.num_classes).to(device) if network.num_classes else None
    levels = logsnr(torch.tensor(time_points("quadratic", 4))).float().to(device)
    target = torch.randn(batch, 1 if case == "T=1 U-Net" else 4, *shape, generator=generator).to(device)

    def synchronise(result: Tensor) -> Tensor:
        wait_for_gpu()
        return result

    if work == "sample":
        model.eval()

        def sample() -> Tensor:
            with torch.no_grad():
                if isinstance(model, DSNO):
                    return synchronise(model.sample(noise, labels))
                return synchronise(model(noise, levels, labels)[:, -1])

        return sample
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)

    def step() -> Tensor:
        states = model(noise, levels, labels) if case == "published" else model(noise, labels)
        loss = (states - target).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return synchronise(loss.detach())

    return step


def in_turn(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in every round, after one round (with compilation) that does not count."""
    seconds: dict[str, list[float]] = {case: [] for case in calls}
    with console.progress("timing", (rounds + 1) * len(calls), "calls") as advance:
        for turn in range(rounds + 1):
            for case, call in calls.items():
                if turn == 0:
                    call()
                began = time.perf_counter()
                call()
                if turn:
                    seconds[case].append(time.perf_counter() - began)
                advance(1)
    return seconds


def compare(images: dict[str, Tensor]) -> None:
    """How far ours are from the published images: relative, and in steps of 8-bit pixels."""
    truth = images["published"].float()
    for case in [c for c in ("float32", "float32 compiled", "bfloat16", "bfloat16 compiled") if c in images]:
        scale = float(truth.std())  # images have a standard deviation of about one half
        apart = images[case].float() - truth
        relative, pixels = float(apart.norm() / truth.norm()), float(apart.abs().mean()) / scale * 0.5 * 127.5
        print(
            f"{case}: {relative:.1e} of the published outputs, {pixels:.2f}/255 on average for images of std 0.5"
        )


def run_memory(options: argparse.Namespace, case: str, work: str) -> int:
    words = [sys.executable, __file__, "--config", options.config, "--batch", str(options.batch)]
    words += ["--published", str(options.published)] if options.published else []
    done = subprocess.run([*words, "--memory-of", case, work], stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.split()[-1])


def peak_memory(config: Config, published: Path | None, batch: int, case: str, work: str) -> int:
    """Bytes at the peak of a call, over those of network, optimiser and libraries."""
    model = build(case, config, published)
    call = call_of(model, case, work, config, batch)
    if compute_device().type == "cuda":
        call()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    if work == "step":
        for parameter in model.parameters():  # what every step holds, so that it is not counted
            parameter.grad = torch.zeros_like(parameter)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def status(field: str) -> int:
    """Bytes, from this process's status. Not getrusage: its peak begins with the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(sys.argv[1:])
