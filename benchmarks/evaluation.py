"""Evaluation: our actors against torch-fidelity in one process, the merge of moments, and the driver's memory.

    python benchmarks/evaluation.py inception [--images 128] [--rounds 3]
    python benchmarks/evaluation.py merge
    python benchmarks/evaluation.py memory

`inception`: images a second of FID's features of the real Inception network with random weights, on the same images: two
actors of one thread, torch-fidelity on one thread, and torch-fidelity by its default on all cores, in turn. Actors and
processes are up before their time counts. `merge`: seconds to merge moments of 2048 features against the number of blocks.
`memory`: peak of a process that holds what the driver holds for 50 000 samples and as many real ones, and makes FID, KID,
Inception Score, and precision and recall from them (some ten minutes). Nothing else may run.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from inception import Images, save_random_inception

from dsno_cluster import console
from dsno_cluster.cluster.ray_pool import KEEP_MEMORY
from dsno_cluster.config import Config, load_config
from dsno_cluster.features import INCEPTION
from dsno_cluster.features.extractors import Reading, find_all_weights, find_readings
from dsno_cluster.files import file_sha256

SIZE = 64  # pixels
WIDTH, LOGITS = 2048, 1008


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", nargs="?", choices=("inception", "merge", "memory"))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--one-process", nargs=3, metavar=("FILE", "WEIGHTS", "THREADS"), help=argparse.SUPPRESS
    )
    options = parser.parse_args(argv)
    if options.one_process:
        file, weights, threads = options.one_process
        print(torch_fidelity_seconds(file, weights, int(threads)))
        return
    if options.part in (None, "inception"):
        inception(options.images, options.rounds)
    if options.part in (None, "merge"):
        merge_time()
    if options.part == "memory":
        memory()


def inception(count: int, rounds: int) -> None:
    """Images a second, ours and torch-fidelity's, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        weights = save_random_inception(Path(folder) / "inception.pth")
        pixels = np.random.default_rng(0).integers(0, 256, (count, 3, SIZE, SIZE), dtype=np.uint8)
        file = Path(folder) / "images.npz"
        np.savez(file, images=pixels)
        config = load_config(
            "configs/digits.yaml",
            [
                f"evaluation.feature_extractor={INCEPTION}",
                f"evaluation.weights_path={weights}",
                f"evaluation.weights_sha256={file_sha256(weights)}",
                "evaluation.metrics=[fid]",
                "evaluation.batch_size=32",
            ],
        )
        rates: dict[str, list[float]] = {
            name: [] for name in ("two actors", "torch-fidelity, one thread", "torch-fidelity, its default")
        }
        for _ in range(rounds):
            rates["two actors"].append(count / actors_seconds(config, file, count))
            for name, threads in (("one thread", 1), ("its default", os.cpu_count() or 1)):
                command = [sys.executable, __file__, "--one-process", str(file), str(weights), str(threads)]
                # as it comes: without what Ray on this machine has set for our actors
                env = {key: value for key, value in os.environ.items() if key not in KEEP_MEMORY}
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
                rates[f"torch-fidelity, {name}"].append(count / float(done.stdout.split()[-1]))
    ours = rates["two actors"]
    rows = [
        [
            name,
            f"{statistics.median(found):.2f}",
            f"{min(found):.2f}..{max(found):.2f}",
            ""
            if found is ours
            else f"{statistics.median([a / b for a, b in zip(ours, found, strict=True)]):.2f}",
        ]
        for name, found in rates.items()
    ]
    console.table(
        f"Inception's features of {count} images of {SIZE} pixels",
        ["who", "images/s", "range", "two actors are"],
        rows,
    )


def actors_seconds(config: Config, file: Path, count: int) -> float:
    """Seconds from the first block handed out to the last result merged; actors are ready before."""
    from dsno_cluster.cluster.crew import Crew, shared
    from dsno_cluster.cluster.ray_pool import import_ray, local_ray, run_pool
    from dsno_cluster.evaluation.actor import EvaluationActor
    from dsno_cluster.evaluation.metrics import Collected
    from dsno_cluster.evaluation.sources import Block, ImageSource

    source, size = ImageSource("images", address=str(file)), config.evaluation.batch_size
    read = {source: find_readings(config.evaluation)}
    weights = find_all_weights(config.evaluation)
    blocks = [Block("features", source, start, min(start + size, count)) for start in range(0, count, size)]
    with local_ray(Crew(2, shared(2)), 1) as cluster:
        remote = import_ray().remote(max_concurrency=2, **cluster.actor_options())(EvaluationActor)
        actors = [remote.remote(config, weights, read) for _ in range(2)]
        import_ray().get([actor.__ray_ready__.remote() for actor in actors])
        waiting = iter(actors)
        collected = Collected(count, size)
        began = time.perf_counter()
        for block, measured in run_pool(
            lambda: next(waiting), lambda actor, b: actor.run.remote(b), blocks, cluster.capacity, in_flight=2
        ):
            collected.add(block.start, measured.result)
        collected.mergers["fid"].result()
        return time.perf_counter() - began


def torch_fidelity_seconds(file: str, weights: str, threads: int) -> float:
    """Seconds of torch-fidelity's own loop over the images, to their mean and covariance."""
    from torch_fidelity.metric_fid import fid_featuresdict_to_statistics
    from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    network = create_feature_extractor(
        INCEPTION, ["2048"], cuda=cuda, feature_extractor_weights_path=weights, verbose=False
    )
    pixels = torch.from_numpy(np.load(file)["images"])
    began = time.perf_counter()
    found = get_featuresdict_from_dataset(Images(pixels), network, 64, cuda, False, False)
    fid_featuresdict_to_statistics(found, "2048")
    return time.perf_counter() - began


def merge_time() -> None:
    """Seconds to make moments of blocks and to merge them, by the number of samples."""
    from dsno_cluster.features.statistics import BlockMerger, moments_of

    for block in (250, 1000):
        rows = np.random.default_rng(0).standard_normal((block, WIDTH)).astype(np.float32)
        moments = moments_of(rows)
        table = []
        for count in (5_000, 10_000, 20_000, 40_000):
            merger, began = BlockMerger(count // block), time.perf_counter()
            for number in range(count // block):
                merger.add(number, moments)
            merger.result()
            merging = time.perf_counter() - began
            table.append([f"{count:,}", str(count // block), f"{merging:.2f}", f"{count / merging:,.0f}"])
        console.table(
            f"moments of {WIDTH} features in blocks of {block}",
            ["samples", "blocks", "merge, s", "samples/s"],
            table,
        )


def memory() -> None:
    """Peak memory of the driver's part for 50 000 samples and 50 000 real images."""
    from dsno_cluster.evaluation.metrics import BlockResult, Collected, Reference, figures
    from dsno_cluster.features.statistics import moments_of
    from dsno_cluster.image_sets.image_set import DataIdentity

    settings = load_config(
        "configs/cifar10.yaml", ["evaluation.metrics=[fid, kid, inception_score, precision_recall]"]
    ).evaluation
    count, size = 50_000, 250
    layer, logits = Reading(INCEPTION, "2048"), Reading(INCEPTION, "logits_unbiased")
    read = {"fid": layer, "kid": layer, "inception_score": logits, "precision_recall": layer}

    def collect(seed: int, keys: dict[str, int]) -> Collected:
        found, random = Collected(count, size), np.random.default_rng(seed)
        for start in range(0, count, size):
            rows = {k: random.standard_normal((size, width), np.float32) for k, width in keys.items()}
            found.add(start, BlockResult({"fid": moments_of(rows[layer.key])}, rows, 0))
        return found

    began = time.perf_counter()
    real = collect(1, {layer.key: WIDTH})
    statistics = {"fid": real.mergers["fid"].result().gaussian}
    reference = Reference(DataIdentity(kind="random"), statistics, count, SIZE, real.features)
    samples = collect(2, {layer.key: WIDTH, logits.key: LOGITS})
    collected = peak_gb()
    shown = SimpleNamespace(**figures(settings, read, samples, reference).model_dump())
    print(
        f"50 000 samples and 50 000 real images: peak {collected:.2f} GB when collected, {peak_gb():.2f} GB at the end, "
        f"{time.perf_counter() - began:.0f} s; fid {shown.fid:.1f}, kid {shown.kid:.2g}, precision {shown.precision:.3f}"
    )


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main(sys.argv[1:])
