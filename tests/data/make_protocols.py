"""Makes tests/data/protocols: what the original programs of evaluation protocols give for small made-up inputs.

    python tests/data/make_protocols.py adm CHECKOUT_OF_OPENAI_GUIDED_DIFFUSION
    python tests/data/make_protocols.py edm CHECKOUT_OF_NVLABS_EDM

The programs import TensorFlow and others that nothing here needs: an empty module stands in for each. Where they compute by a
TensorFlow session, numpy does what its graph says, in the graph's precision.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import safetensors.numpy

OUT = Path(__file__).parent / "protocols"
SPLIT = 100  # samples in a part of the Inception Score


def features(seed: int, count: int, width: int, shift: float) -> np.ndarray:
    """Features that are not Gaussian, (count, width) float32."""
    drawn = np.random.default_rng(seed).standard_normal((count, width))
    return (np.abs(drawn + shift) * np.arange(1, width + 1) ** -0.3).astype(np.float32)


def write(name: str, tensors: dict[str, Any]) -> None:
    OUT.mkdir(exist_ok=True)
    arrays = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    safetensors.numpy.save_file(arrays, OUT / f"{name}.safetensors")


def imported(checkout: str, name: str, stand_ins: tuple[str, ...]) -> Any:
    """A module of a checkout."""
    with mock.patch.dict(sys.modules, {each: mock.MagicMock() for each in stand_ins}):
        sys.path.insert(0, checkout)
        return importlib.import_module(name)


def softmax(rows: np.ndarray) -> np.ndarray:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    found: np.ndarray = powers / powers.sum(axis=1, keepdims=True)
    return found


def distances(u: np.ndarray, v: np.ndarray, precision: type) -> np.ndarray:
    """The squared distances of evaluator.py's graph, (N, M) float32; each operation rounds to the precision."""
    u, v = u.astype(precision), v.astype(precision)
    norm_u = np.square(u).astype(np.float32).sum(axis=1).astype(precision)
    norm_v = np.square(v).astype(np.float32).sum(axis=1).astype(precision)
    products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(precision)
    found = np.maximum(norm_u[:, None] - precision(2) * products + norm_v[None], precision(0))
    return found.astype(np.float32)


def distance_block(precision: type) -> SimpleNamespace:
    """Stands in for the graph of evaluator.py's DistanceBlock."""

    def less_thans(u: np.ndarray, of_u: np.ndarray, v: np.ndarray, of_v: np.ndarray) -> tuple[Any, Any]:
        found = distances(u, v, precision)[..., None]
        return (found <= of_v).any(axis=1), (found <= of_u[:, None]).any(axis=0)

    return SimpleNamespace(pairwise_distances=lambda u, v: distances(u, v, precision), less_thans=less_thans)


def make_adm(checkout: str) -> None:
    stand_ins = ("tensorflow", "tensorflow.compat", "tensorflow.compat.v1", "requests")
    module = imported(f"{checkout}/evaluations", "evaluator", stand_ins)
    real, samples = features(0, 300, 24, 0.0), features(1, 400, 24, 0.3)
    spatial_real, spatial = features(2, 300, 18, 0.0), features(3, 400, 18, 0.2)
    weights = np.random.default_rng(4).standard_normal((24, 10)).astype(np.float32)
    evaluator = object.__new__(module.Evaluator)
    evaluator.softmax, evaluator.softmax_input, evaluator.softmax_batch_size = None, "input", 512
    evaluator.sess = SimpleNamespace(run=lambda _, feed_dict: softmax(feed_dict["input"] @ weights))
    statistics = [evaluator.compute_statistics(x) for x in (real, samples, spatial_real, spatial)]
    found = {
        "fid": statistics[1].frechet_distance(statistics[0]),
        "sfid": statistics[3].frechet_distance(statistics[2]),
        "inception_score": evaluator.compute_inception_score(samples, SPLIT),
    }
    for name, precision in (("", np.float32), (" in 16 bits", np.float16)):
        module.DistanceBlock = lambda _, precision=precision: distance_block(precision)
        evaluator.manifold_estimator = module.ManifoldEstimator(None)
        found[f"precision{name}"], found[f"recall{name}"] = evaluator.compute_prec_recall(real, samples)
    write(
        "adm",
        {
            "real": real,
            "samples": samples,
            "spatial real": spatial_real,
            "spatial samples": spatial,
            "logits": samples @ weights,
            "mu": statistics[0].mu,
            "sigma": statistics[0].sigma,
            "mu_s": statistics[2].mu,
            "sigma_s": statistics[2].sigma,
            **{f"expected {name}": np.float64(value) for name, value in found.items()},
        },
    )


def make_edm(checkout: str) -> None:
    import torch

    module = imported(checkout, "fid", ("click", "tqdm", "dnnlib", "torch_utils", "training"))
    real, samples = features(0, 300, 24, 0.0), features(1, 400, 24, 0.3)

    def take(images: Any, **_: Any) -> Any:
        return images

    def zeros(shape: list[int], dtype: Any, **_: Any) -> Any:
        """Of 24 features, which take the place of 2048."""
        return torch.full([24] * len(shape), 0.0, dtype=dtype)

    def statistics(rows: np.ndarray) -> Any:
        """By calculate_inception_stats, with the features in place of images and the network that gives them back."""
        batches = torch.from_numpy(rows).split(64)
        data = mock.MagicMock(__len__=lambda _: len(rows))
        with (
            mock.patch.object(module.pickle, "load", return_value=SimpleNamespace(to=lambda _: take)),
            mock.patch.object(module.dataset, "ImageFolderDataset", return_value=data),
            mock.patch.object(module.torch.utils.data, "DataLoader", return_value=batches),
            mock.patch.object(
                module.tqdm, "tqdm", side_effect=lambda loader, **_: [(x, None) for x in loader]
            ),
            mock.patch.object(module.torch, "distributed", mock.MagicMock()),
            mock.patch.object(module.dist, "get_rank", return_value=0),
            mock.patch.object(module.dist, "get_world_size", return_value=1),
            mock.patch.object(module.torch, "zeros", zeros),
        ):
            return module.calculate_inception_stats("", device=torch.device("cpu"))

    mu, sigma = statistics(real)
    distance = module.calculate_fid_from_inception_stats(*statistics(samples), mu, sigma)
    write(
        "edm",
        {"real": real, "samples": samples, "mu": mu, "sigma": sigma, "expected fid": np.float64(distance)},
    )


if __name__ == "__main__":
    {"adm": make_adm, "edm": make_edm}[sys.argv[1]](sys.argv[2])
