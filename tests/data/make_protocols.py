"""Makes tests/data/protocols: what the original programs of evaluation protocols give for small made-up inputs.

    python tests/data/make_protocols.py adm CHECKOUT_OF_OPENAI_GUIDED_DIFFUSION
    python tests/data/make_protocols.py edm CHECKOUT_OF_NVLABS_EDM
    python tests/data/make_protocols.py clean-fid CHECKOUT_OF_CLEAN_FID    (or where pip installed clean-fid)
    python tests/data/make_protocols.py fd-dinov2 CHECKOUT_OF_DGM_EVAL CHECKOUT_OF_DINOV2
    python tests/data/make_protocols.py cmmd CHECKOUT_OF_GOOGLE_RESEARCH CHECKOUT_OF_OPENAI_CLIP

The programs import TensorFlow and others that nothing here needs: an empty module stands in for each. Where they compute by a
TensorFlow session, numpy does what its graph says, in the graph's precision.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import safetensors.numpy
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import vits
from pictures import EVERY, picture

OUT = Path(__file__).parent / "protocols"
SPLIT = 100  # samples in a part of the Inception Score
CLIP_MEAN, CLIP_STD = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)  # of clip/clip.py


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
    sys.modules.update({each: mock.MagicMock() for each in stand_ins})
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


def make_clean_fid(checkout: str) -> None:
    resize, distance = (imported(checkout, f"cleanfid.{name}", ()) for name in ("resize", "fid"))
    images = {size: picture(size, size + 9) for size in (32, 310)}
    resized = {size: resize.build_resizer("clean")(image) for size, image in images.items()}
    real, samples = features(0, 300, 24, 0.0), features(1, 400, 24, 0.3)
    write(
        "clean_fid",
        {
            **{f"resized {size}": found[::EVERY, ::EVERY] for size, found in resized.items()},
            "expected fid": np.float64(distance.fid_from_feats(samples, real)),
        },
    )


def make_fd_dinov2(dgm_eval: str, dinov2: str) -> None:
    import torch

    distances = imported(f"{dgm_eval}/dgm_eval/metrics", "fd", ())
    package = ModuleType("dgm_eval.models")  # without the other encoders, and what they import
    package.__path__ = [f"{dgm_eval}/dgm_eval/models"]
    sys.modules[package.__name__] = package
    encoders = imported(dgm_eval, "dgm_eval.models.dinov2", ())
    vision = imported(dinov2, "dinov2.models.vision_transformer", ())
    shape = vits.DINOV2
    network = vision.DinoVisionTransformer(
        img_size=shape.image,
        patch_size=shape.patch,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.heads,
        init_values=1.0,
        block_chunks=0,
    )
    network.load_state_dict(vits.as_dinov2(vits.dinov2_weights()))
    with mock.patch.object(torch.hub, "load", return_value=network.eval()):
        encoder = encoders.DINOv2Encoder()
    pictures = [picture(40, 40), picture(300, 300)]
    found = [encoder(encoder.transform(Image.fromarray(each))[None]) for each in pictures]
    real, samples = features(0, 300, 24, 0.0), features(1, 400, 24, 0.3)
    write(
        "fd_dinov2",
        {
            "features": torch.cat(found).detach().numpy(),
            "expected fid": np.float64(distances.compute_FD_with_reps(real, samples)),
        },
    )


def make_cmmd(google_research: str, clip: str) -> None:
    import jax
    import torch

    distance = imported(f"{google_research}/cmmd", "distance", ())
    model = imported(f"{clip}/clip", "model", ())
    shape = vits.CLIP
    network = model.VisionTransformer(
        shape.image, shape.patch, shape.width, shape.depth, shape.heads, shape.embedding
    )
    network.load_state_dict(vits.as_clip(vits.clip_weights()))
    found = []
    for each in (picture(40, 40), picture(100, 100)):
        # cmmd/io_util.py resizes in 8 bit; embedding.py normalises as CLIP does
        small = Image.fromarray(each).resize((shape.image, shape.image), resample=Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(small).astype(np.float32) / 255).permute(2, 0, 1)
        normal = (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
        embedding = network.eval()(normal[None])
        found.append(embedding / embedding.norm(dim=-1, keepdim=True))  # as scenic's CLIP does
    real, samples = (
        f / np.linalg.norm(f, axis=1, keepdims=True)
        for f in (features(0, 300, 24, 0.0), features(1, 400, 24, 0.3))
    )
    with jax.enable_x64(True):
        in_64_bits = distance.mmd(samples.astype(np.float64), real.astype(np.float64))
    write(
        "cmmd",
        {
            "features": torch.cat(found).detach().numpy(),
            "expected cmmd": np.float64(distance.mmd(samples, real)),
            "expected cmmd in 64 bits": np.float64(in_64_bits),
        },
    )


if __name__ == "__main__":
    makers = {
        "adm": make_adm,
        "edm": make_edm,
        "clean-fid": make_clean_fid,
        "fd-dinov2": make_fd_dinov2,
        "cmmd": make_cmmd,
    }
    makers[sys.argv[1]](*sys.argv[2:])
