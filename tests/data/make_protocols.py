"""Makes tests/data/protocols: what the original programs of evaluation protocols give for small made-up inputs.

    python tests/data/make_protocols.py adm CHECKOUT_OF_OPENAI_GUIDED_DIFFUSION
    python tests/data/make_protocols.py edm CHECKOUT_OF_NVLABS_EDM
    python tests/data/make_protocols.py clean-fid CHECKOUT_OF_CLEAN_FID    (or where pip installed clean-fid)
    python tests/data/make_protocols.py fd-dinov2 CHECKOUT_OF_DGM_EVAL CHECKOUT_OF_DINOV2
    python tests/data/make_protocols.py cmmd CHECKOUT_OF_GOOGLE_RESEARCH CHECKOUT_OF_OPENAI_CLIP

`adm` needs TensorFlow, in an environment of its own that has this project too. The published weights of Inception were not at
hand: torch-fidelity's network with random ones stands in for ADM's graph and for EDM's pickle, between their own reading of image
files and their own figures.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import mkdtemp
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import safetensors.numpy
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import vits
from inception import save_random_inception
from pictures import EVERY, REAL_IMAGES, SAMPLE_IMAGES, SPLIT_IMAGES, picture, pictures

OUT = Path(__file__).parent / "protocols"
SPLIT = 100  # samples in a part of the Inception Score
FAR = np.float32(
    2.0
)  # features that are shifted by it have other neighbours in 16 bits, and which order is taken shows
LARGE = np.float32(60.0)  # features times it have some distances that 16 bits cannot hold
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
    """As evaluator.py's graph, (N, M) float32; each operation rounds to the precision, but sums, as a GPU's, are of 32 bits."""
    u, v = u.astype(precision), v.astype(precision)
    norm_u = np.square(u).astype(np.float32).sum(axis=1).astype(precision)
    norm_v = np.square(v).astype(np.float32).sum(axis=1).astype(precision)
    products = (u.astype(np.float32) @ v.astype(np.float32).T).astype(precision)
    found = np.maximum(norm_u[:, None] - precision(2) * products + norm_v[None], precision(0))
    return found.astype(np.float32)


def distance_block(precision: type) -> SimpleNamespace:
    """Stands in for the graph of evaluator.py's DistanceBlock, of one precision; TensorFlow's sums depend on the device."""

    def less_thans(u: np.ndarray, of_u: np.ndarray, v: np.ndarray, of_v: np.ndarray) -> tuple[Any, Any]:
        found = distances(u, v, precision)[..., None]
        return (found <= of_v).any(axis=1), (found <= of_u[:, None]).any(axis=0)

    return SimpleNamespace(pairwise_distances=lambda u, v: distances(u, v, precision), less_thans=less_thans)


def random_inception() -> tuple[Callable[[np.ndarray], dict[str, np.ndarray]], np.ndarray]:
    """Features by layer of images (N, H, W, C), and the weights of the class logits (2048, 1008)."""
    import torch

    from dsno_cluster.features.extractors import WeightsFile, load_extractor
    from dsno_cluster.files import file_sha256

    file = save_random_inception(Path(mkdtemp()) / "inception.pth")
    extractor = load_extractor(
        WeightsFile("inception-v3-compat", file, file_sha256(file)), ["2048", "spatial"]
    )

    def found(images_NHWC: np.ndarray) -> dict[str, np.ndarray]:
        images = torch.from_numpy(np.asarray(images_NHWC).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()
        return {layer: rows.numpy() for layer, rows in extractor(images).items()}

    return found, torch.load(file, weights_only=True)["fc.weight"].T.numpy()


def adm_of_images(module: Any, tf: Any) -> dict[str, float]:
    """The figures of evaluator.py from its two files."""
    extract, weights = random_inception()

    def feature_graph(images: Any) -> Any:
        def both(batch: np.ndarray) -> list[np.ndarray]:
            found = extract(batch)
            return [found["2048"], found["spatial"]]

        return tf.numpy_function(both, [images], [tf.float32, tf.float32])

    with (
        mock.patch.object(module, "_create_feature_graph", feature_graph),
        mock.patch.object(
            module, "_create_softmax_graph", lambda rows: tf.nn.softmax(tf.matmul(rows, weights))
        ),
    ):
        evaluator = module.Evaluator(tf.Session())
    folder, read = mkdtemp(), []
    for name, images in (("real", REAL_IMAGES), ("samples", SAMPLE_IMAGES)):
        np.savez(f"{folder}/{name}.npz", arr_0=pictures(*images))
        activations = evaluator.read_activations(f"{folder}/{name}.npz")
        read.append((activations, evaluator.read_statistics(f"{folder}/{name}.npz", activations)))
    (real, of_real), (samples, of_samples) = read
    precision, recall = evaluator.compute_prec_recall(real[0], samples[0])
    return {
        "fid": of_samples[0].frechet_distance(of_real[0]),
        "sfid": of_samples[1].frechet_distance(of_real[1]),
        "inception_score": evaluator.compute_inception_score(samples[0], SPLIT_IMAGES),
        "precision": precision,
        "recall": recall,
    }


def make_adm(checkout: str) -> None:
    import tensorflow.compat.v1 as tf  # after torch, which `inception` imports: the other order crashes

    tf.disable_eager_execution()
    module = imported(f"{checkout}/evaluations", "evaluator", ())
    of_images = adm_of_images(module, tf)
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
    near, far = (real, samples), (real + FAR, samples + FAR)
    large = (real * LARGE, samples * LARGE)
    for name, precision, both in ((" in 32 bits", np.float32, near), (" far in 16 bits", np.float16, far)):
        with mock.patch.object(module, "DistanceBlock", lambda _, p=precision: distance_block(p)):
            evaluator.manifold_estimator = module.ManifoldEstimator(None)
        found[f"precision{name}"], found[f"recall{name}"] = evaluator.compute_prec_recall(*both)
    evaluator.manifold_estimator = module.ManifoldEstimator(tf.Session())
    for name, both in (("", near), (" far", far), (" large", large)):
        found[f"precision{name}"], found[f"recall{name}"] = evaluator.compute_prec_recall(*both)
    write(
        "adm",
        {
            "real": real,
            "samples": samples,
            "spatial real": spatial_real,
            "spatial samples": spatial,
            "logits": samples @ weights,
            "far": FAR[None],
            "large": LARGE[None],
            "mu": statistics[0].mu,
            "sigma": statistics[0].sigma,
            "mu_s": statistics[2].mu,
            "sigma_s": statistics[2].sigma,
            **{f"expected {name}": np.float64(value) for name, value in found.items()},
            **{f"expected {name} of images": np.float64(value) for name, value in of_images.items()},
        },
    )


def make_edm(checkout: str) -> None:
    import torch

    module = imported(checkout, "fid", ())
    real, samples = features(0, 300, 24, 0.0), features(1, 400, 24, 0.3)

    def zeros(shape: list[int], dtype: Any, **_: Any) -> Any:
        """Of 24 features, which take the place of 2048."""
        return torch.full([24] * len(shape), 0.0, dtype=dtype)

    def statistics(source: str, detector: Callable[[Any], Any]) -> Any:
        """By calculate_inception_stats, with a network in place of the one that it downloads; in one process."""
        network = SimpleNamespace(to=lambda _: lambda images, return_features: detector(images))
        with (
            mock.patch.object(module.dnnlib.util, "open_url", return_value=nullcontext()),
            mock.patch.object(module.pickle, "load", return_value=network),
            mock.patch.object(module.torch, "distributed", mock.MagicMock()),
            mock.patch.object(module.dist, "get_rank", return_value=0),
            mock.patch.object(module.dist, "get_world_size", return_value=1),
        ):
            return module.calculate_inception_stats(source, num_workers=1, device=torch.device("cpu"))

    def of_features(rows: np.ndarray) -> Any:
        """With the features in place of images and the network that gives them back."""
        batches = torch.from_numpy(rows).split(64)
        data = mock.MagicMock(__len__=lambda _: len(rows))
        with (
            mock.patch.object(module.dataset, "ImageFolderDataset", return_value=data),
            mock.patch.object(module.torch.utils.data, "DataLoader", return_value=batches),
            mock.patch.object(
                module.tqdm, "tqdm", side_effect=lambda loader, **_: [(x, None) for x in loader]
            ),
            mock.patch.object(module.torch, "zeros", zeros),
        ):
            return statistics("", lambda images: images)

    extract, _ = random_inception()

    def of_images(images: np.ndarray) -> Any:
        folder = mkdtemp()
        for i, image in enumerate(images):
            Image.fromarray(image).save(f"{folder}/{i:06d}.png")
        return statistics(folder, lambda x: torch.from_numpy(extract(x.permute(0, 2, 3, 1).numpy())["2048"]))

    from_images = module.calculate_fid_from_inception_stats(
        *of_images(pictures(*SAMPLE_IMAGES)), *of_images(pictures(*REAL_IMAGES))
    )
    mu, sigma = of_features(real)
    distance = module.calculate_fid_from_inception_stats(*of_features(samples), mu, sigma)
    write(
        "edm",
        {
            "real": real,
            "samples": samples,
            "mu": mu,
            "sigma": sigma,
            "expected fid": np.float64(distance),
            "expected fid of images": np.float64(from_images),
        },
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
