"""Evaluation protocols against what their original programs give for the same features and images (data/make_protocols.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from inception import save_random_inception

from dsno_cluster.config import load_config
from dsno_cluster.evaluation.metrics import frechet, inception_score, precision_recall
from dsno_cluster.features import INCEPTION
from dsno_cluster.features.extractors import WeightsFile, load_extractor
from dsno_cluster.features.statistics import Gaussian, merge, moments_of
from dsno_cluster.files import file_sha256

DATA = Path(__file__).parent / "data/protocols"


def made(protocol: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """The inputs of the original program, and its figures."""
    found = safetensors.numpy.load_file(DATA / f"{protocol}.safetensors")
    expected = {
        k.removeprefix("expected "): float(v[0]) for k, v in found.items() if k.startswith("expected ")
    }
    return found, expected


def distance(samples: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float | None:
    parts = [moments_of(part) for part in np.array_split(samples, 7)]
    return frechet("fid", merge(parts), samples, Gaussian(mean, covariance))["fid"]


def test_adm_gives_what_evaluator_py_gives() -> None:
    given, expected = made("adm")
    words = [
        "evaluation.inception_splits=4",
        "evaluation.inception_shuffle=false",
        "evaluation.num_samples=400",
    ]
    settings = load_config("configs/digits.yaml", words).evaluation
    assert distance(given["samples"], given["mu"], given["sigma"]) == pytest.approx(expected["fid"], rel=1e-6)
    assert distance(given["spatial samples"], given["mu_s"], given["sigma_s"]) == pytest.approx(
        expected["sfid"], rel=1e-6
    )
    score = inception_score(settings, given["logits"])["inception_score"]
    assert score == pytest.approx(expected["inception_score"], rel=1e-6)
    shuffled = inception_score(settings.model_copy(update={"inception_shuffle": True}), given["logits"])
    assert shuffled["inception_score"] != pytest.approx(score, rel=1e-6)
    found = precision_recall(settings, given["samples"], given["real"])
    for name in ("precision", "recall"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
        assert found[name] == pytest.approx(expected[f"{name} in 16 bits"], abs=0.01)


def test_edm_gives_what_fid_py_gives() -> None:
    given, expected = made("edm")
    found = distance(given["samples"], given["mu"], given["sigma"])
    assert found == pytest.approx(expected["fid"], rel=1e-6)
    ours = moments_of(given["real"]).gaussian
    assert np.allclose(ours.mean, given["mu"], rtol=1e-12)
    assert np.allclose(ours.covariance, given["sigma"], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_the_layer_of_sfid_is_the_one_of_the_graph(tmp_path: Path) -> None:
    """`mixed_6/conv` is the ReLU of the first convolution of the block that torch-fidelity calls Mixed_6d."""
    file = save_random_inception(tmp_path / "inception.pth")
    weights = WeightsFile(INCEPTION, file, file_sha256(file))
    images = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    both = load_extractor(weights, ["spatial", "2048"])(images)
    assert torch.equal(both["2048"], load_extractor(weights, ["2048"])(images)["2048"])
    assert torch.equal(both["spatial"], load_extractor(weights, ["spatial"])(images)["spatial"])
    assert both["spatial"].shape == (2, 2023) and bool((both["spatial"] >= 0).all())
    tensors = torch.load(file, weights_only=True)
    seen: dict[str, torch.Tensor] = {}
    extractor = load_extractor(weights, ["768"])
    block = dict(extractor.network.named_modules())["Mixed_6d"]
    block.register_forward_hook(lambda _module, inputs, _output: seen.update(inputs=inputs[0]))
    extractor(images)
    convolved = torch.nn.functional.conv2d(seen["inputs"], tensors["Mixed_6d.branch1x1.conv.weight"][:7])
    name = "Mixed_6d.branch1x1.bn."
    mean, var, weight, bias = (
        tensors[name + n][:7] for n in ("running_mean", "running_var", "weight", "bias")
    )
    normal = torch.nn.functional.batch_norm(convolved, mean, var, weight, bias, eps=1e-3).relu()
    assert torch.allclose(both["spatial"].view(2, 17, 17, 7), normal.permute(0, 2, 3, 1), atol=1e-5)
