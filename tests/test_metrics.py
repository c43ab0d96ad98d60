"""Metrics against torch-fidelity's `calculate_metrics` on the same images, references, image sets and warnings."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from inception import Images, save_random_inception
from PIL import Image
from tiny import TINY, answer, dsno
from training_runs import train

from dsno_cluster.config import load_config
from dsno_cluster.data import load_data
from dsno_cluster.errors import UserError, WorkError
from dsno_cluster.evaluation.metrics import check_width
from dsno_cluster.evaluation.reference import find_real_data, imported
from dsno_cluster.evaluation.sample_shards import SampleSpec
from dsno_cluster.features import INCEPTION, extractors
from dsno_cluster.features.classifiers import DigitsFeatures
from dsno_cluster.features.extractors import (
    WEIGHT_FILE,
    Reading,
    find_all_weights,
    find_readings,
    find_weights,
    is_published,
    load_extractor,
)
from dsno_cluster.features.statistics import BlockMerger, merge, moments_of
from dsno_cluster.files import file_sha256
from dsno_cluster.image_sets.opening import open_images
from dsno_cluster.images import to_uint8
from dsno_cluster.model_folder import package_path
from dsno_cluster.provenance import NOWHERE
from dsno_cluster.storage import open_storage
from dsno_cluster.trajectories.shards import commit_manifest, make_manifest, write_shard

DIGITS_WEIGHTS = Path(package_path("package:digits-features")) / WEIGHT_FILE
EVERY = "evaluation.metrics=[fid, kid, inception_score, precision_recall]"
KNOBS = {"kid_subsets": 12, "kid_subset_size": 90, "isc_splits": 7, "prc_neighborhood": 4, "rng_seed": 11}
TWO_AVERAGES = "training.ema_decay=[0.9, 0.5]"
WORDS = [
    EVERY,
    "evaluation.kid_subsets=12",
    "evaluation.kid_subset_size=90",
    "evaluation.inception_splits=7",
    "evaluation.neighborhood=4",
    "evaluation.metric_seed=11",
    "evaluation.teacher_steps=[1]",
]


def torch_fidelitys(samples: torch.Tensor, real: torch.Tensor, **options: Any) -> dict[str, float]:
    """Its own figures, by our names."""
    found = torch_fidelity.calculate_metrics(
        input1=Images(samples),
        input2=Images(real),
        cuda=False,
        verbose=False,
        cache=False,
        save_cpu_ram=True,  # no worker processes
        **options,
    )
    names = {
        "frechet_inception_distance": "fid",
        "kernel_inception_distance_mean": "kid",
        "kernel_inception_distance_std": "kid_std",
        "inception_score_mean": "inception_score",
        "inception_score_std": "inception_score_std",
    }
    return {names.get(name, name): value for name, value in found.items()}


def check_equal(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Their figures; torch-fidelity has no intervals."""
    assert {name for name in ours if not name.endswith("_ci95")} == theirs.keys()
    for name in ("fid", "inception_score", "inception_score_std"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6), name
    for name in {"kid", "kid_std", "precision", "recall", "f_score", "agreement"} & theirs.keys():
        assert ours[name] == theirs[name], name


def test_every_metric_is_torch_fidelitys_own(tmp_path: Path) -> None:
    """Whoever computes: one actor or two, in blocks of any size, from shards, pictures or arrays."""
    train, held_out = load_data("digits")
    real, samples = to_uint8(train.images), to_uint8(held_out.images)
    options = {
        "feature_extractor": DigitsFeatures.NAME,
        "feature_extractor_weights_path": str(DIGITS_WEIGHTS),
    }
    wanted = torch_fidelitys(samples, real, fid=True, kid=True, isc=True, prc=True, **options, **KNOBS)
    yardstick = load_extractor(find_weights(DigitsFeatures.NAME, "package:digits-features", None), ["logits"])
    labels = held_out.labels.clone()
    labels[::3] = (labels[::3] + 1) % 10  # a third of them wrong
    wanted["agreement"] = float((yardstick(samples)["logits"].argmax(1) == labels).double().mean())
    np.savez(tmp_path / "samples.npz", images=samples.numpy(), labels=labels.numpy())
    drawn = open_storage(str(tmp_path / "drawn"))
    shards = [
        write_shard(drawn, "", i, i * 99, {"images": samples[i * 99 :][:99], "labels": labels[i * 99 :][:99]})
        for i in range(3)
    ]
    spec = SampleSpec(
        student="0" * 64, seed=1, samples_per_shard=99, threads=1, precision="float32", compile=False
    )
    commit_manifest(drawn, "", make_manifest(spec, shards, NOWHERE))
    measured, intervals = [], []
    for actors, size, name in ((2, 37, "samples.npz"), (1, 64, "drawn")):
        done = dsno(
            *[
                "eval",
                *WORDS,
                EVERY.replace("]", ", agreement]"),
                f"storage.root={tmp_path}",
                f"evaluation.batch_size={size}",
                "--actors",
                str(actors),
            ],
            *["--samples", str(tmp_path / name), "--launcher", "local", "--json"],
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["num_samples"] == 297 and found["reference"]["count"] == 1500
        check_equal(found["figures"], wanted)
        intervals.append({name: found["figures"][name] for name in ("fid_ci95", "kid_ci95")})
        measured.append(done.stderr)
    assert intervals[0] == intervals[1] and 0 < intervals[0]["fid_ci95"] < wanted["fid"]
    assert len(list((tmp_path / "evaluation/references").iterdir())) == 1  # computed once
    # the reference's images are not measured again
    assert "1797/1797" in measured[0] and "297/297" in measured[1]


@pytest.mark.slow
def test_images_may_be_compared_with_themselves(tmp_path: Path) -> None:
    _, held_out = load_data("digits")
    np.savez(tmp_path / "same.npz", images=to_uint8(held_out.images).numpy())
    words = ["eval", "evaluation.metrics=[fid]", "evaluation.reference=same.npz", "--samples", "./same.npz"]
    done = dsno(*words, "--launcher", "local", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["figures"]["fid"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_inception_is_torch_fidelitys_own(tmp_path: Path) -> None:
    weights = save_random_inception(tmp_path / "inception.pth")
    generator = torch.Generator().manual_seed(0)

    def images(count: int, contrast: float) -> torch.Tensor:
        coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator) * contrast + 40
        return torch.nn.functional.interpolate(coarse, size=16, mode="bilinear").clamp(0, 255).to(torch.uint8)

    samples, real = images(72, 0.7), images(80, 0.8)
    options = {"feature_extractor": INCEPTION, "feature_extractor_weights_path": str(weights)}
    knobs = KNOBS | {"kid_subset_size": 50}
    wanted = torch_fidelitys(samples, real, fid=True, kid=True, isc=True, prc=True, **options, **knobs)
    np.savez(tmp_path / "samples.npz", images=samples.numpy())
    np.savez_compressed(tmp_path / "real.npz", arr_0=real.permute(0, 2, 3, 1).numpy())
    done = dsno(
        *["eval", *WORDS, f"storage.root={tmp_path}", "evaluation.batch_size=30"],
        *["evaluation.kid_subset_size=50", "evaluation.feature_extractor=inception-v3-compat"],
        *[f"evaluation.weights_path={weights}", f"evaluation.reference={tmp_path / 'real.npz'}"],
        f"evaluation.weights_sha256={file_sha256(weights)}",
        *["--actors", "2", "--samples", str(tmp_path / "samples.npz"), "--launcher", "local", "--json"],
        timeout=390,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    check_equal(found["figures"], wanted)
    warnings = " ".join(found["warnings"])
    assert "not by the published Inception weights" in warnings
    assert "of 72 samples" in warnings and "of only 80 images" in warnings


def test_blocks_merge_alike_in_any_order() -> None:
    rows = np.random.default_rng(0).standard_normal((230, 6)).astype(np.float32) + 100
    blocks = [moments_of(rows[start : start + 10]) for start in range(0, 230, 10)]
    results = []
    for seed in range(4):
        merger = BlockMerger(len(blocks))
        order = np.random.default_rng(seed).permutation(len(blocks))
        for number in order[:-1]:
            merger.add(int(number), blocks[number])
        with pytest.raises(ValueError, match="missing"):
            merger.result()
        merger.add(int(order[-1]), blocks[order[-1]])
        results.append(merger.result())
    assert all(np.array_equal(r.m2, results[0].m2) and r.count == 230 for r in results)  # to the last bit
    assert np.allclose(results[0].covariance, np.cov(rows.astype(np.float64), rowvar=False), rtol=1e-12)
    in_turn = BlockMerger(len(blocks))
    for number, block in enumerate(blocks):
        in_turn.add(number, block)
        assert len(in_turn.waiting) <= 5  # the tree's height, however many blocks there are
    assert np.allclose(merge(blocks).m2, in_turn.result().m2, rtol=1e-12)


def test_images_are_read_from_wherever_they_are(tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (5, 3, 6, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    rows = pixels.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "ours.npz", images=pixels.numpy(), labels=np.arange(5))
    np.savez(tmp_path / "adm.npz", arr_0=rows, arr_1=np.arange(5))
    np.savez_compressed(tmp_path / "small.npz", arr_0=rows)
    for number, picture in enumerate(rows):
        folder = tmp_path / f"pictures/{number // 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{number}.png")
    found = {
        name: open_images(str(tmp_path / name)) for name in ("ours.npz", "adm.npz", "small.npz", "pictures")
    }
    for name, images in found.items():
        assert images.count == 5 and images.shape == (3, 6, 6), name
        assert torch.equal(images.read(0, 5), pixels) and torch.equal(images.read(3, 5), pixels[3:]), name
    assert len({images.identity.model_dump_json() for images in found.values()}) == 4
    known = {name: images.labels_at and images.labels_at([2, 3]).tolist() for name, images in found.items()}
    assert known == {"ours.npz": [2, 3], "adm.npz": None, "small.npz": None, "pictures": None}
    Image.fromarray(rows[0][:4]).save(tmp_path / "pictures/1/9.png")
    with pytest.raises(UserError, match=r"9\.png: is \(3, 4, 6\)"):
        open_images(str(tmp_path / "pictures")).read(0, 6)
    np.savez(tmp_path / "float.npz", images=pixels.float().numpy())
    np.savez(
        tmp_path / "words.npz", images=pixels.numpy(), labels=np.array(["a", "b", "c", "d", "e"], object)
    )
    np.savez(tmp_path / "few.npz", images=pixels.numpy(), labels=np.arange(4))
    (tmp_path / "none").mkdir()
    (tmp_path / "text.npz").write_text("no zip")
    for name, says in [
        ("float.npz", "uint8"),
        ("words.npz", "labels cannot be read"),
        ("few.npz", r"labels is int64 of \(4,\), of 5 images"),
        ("none", "neither sample shards"),
        ("absent", "no such file or folder"),
        ("absent.npz", "missing"),
        ("text.npz", "is text that begins with 'no zip'"),
    ]:
        with pytest.raises(UserError, match=says):
            open_images(str(tmp_path / name))


@pytest.mark.slow
def test_samples_drawn_as_shards_are_those_of_sample(tiny_student: Path, tmp_path: Path) -> None:
    """`sample --shards`, with a shard lost; equal to the arrays of `sample --out`."""
    words = ["sample", str(tiny_student), "--num", "60", "--seed", "3", "--batch-size", "20"]
    assert answer(*words, "--out", str(tmp_path / "x.npz"), cwd=tmp_path).returncode == 0
    done = dsno(*words, "--shards", str(tmp_path / "shards"), "--actors", "2")
    assert done.returncode == 0, done.stderr
    images = open_images(str(tmp_path / "shards"))
    assert images.count == 60
    theirs = np.load(tmp_path / "x.npz")["images"].astype(int)
    assert np.abs(images.read(0, 60).numpy().astype(int) - theirs).max() <= 1
    assert torch.equal(images.read(15, 45), images.read(0, 60)[15:45])  # across shards
    assert answer("verify", str(tmp_path / "shards"), cwd=tmp_path).returncode == 0
    # as a killed run leaves it: no manifest, one shard gone
    (tmp_path / "shards/manifest.json").rename(tmp_path / "manifest.json")
    gone = tmp_path / "shards/shard-000001.safetensors"
    data = gone.read_bytes()
    gone.unlink()
    other = answer(*words[:-1], "30", "--shards", str(tmp_path / "shards"), cwd=tmp_path)
    assert other.returncode == 2 and "other samples" in other.stderr
    wrong = answer(*words[:3], "61", *words[4:], "--shards", str(tmp_path / "shards"), cwd=tmp_path)
    assert wrong.returncode == 2 and "take 80" in wrong.stderr
    (tmp_path / "manifest.json").rename(tmp_path / "shards/manifest.json")
    again = dsno(*words, "--shards", str(tmp_path / "shards"))
    assert again.returncode == 0 and "2 shards exist already" in again.stderr, again.stderr
    assert gone.read_bytes() == data


@pytest.mark.slow
def test_sampling_killed_on_the_way_is_finished_by_the_same_command(
    tiny_student: Path, tmp_path: Path
) -> None:
    def words(folder: str) -> list[str]:
        out = ["--shards", str(tmp_path / folder), "--actors", "1"]
        return ["sample", str(tiny_student), "--num", "4000", "--seed", "3", "--batch-size", "100", *out]

    driver = subprocess.Popen(
        [sys.executable, "-m", "dsno_cluster.cli", *words("killed")],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(list((tmp_path / "killed").glob("shard-*"))) < 3:
        time.sleep(0.01)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    assert not (tmp_path / "killed/manifest.json").exists()
    before = {p.name: p.read_bytes() for p in (tmp_path / "killed").glob("shard-*")}
    assert 3 <= len(before) < 40
    for folder in ("killed", "whole"):
        done = dsno(*words(folder))
        assert done.returncode == 0, done.stderr
    shards = [
        {p.name: p.read_bytes() for p in (tmp_path / folder).glob("shard-*")}
        for folder in ("killed", "whole")
    ]
    assert len(shards[0]) == 40 and shards[0] == shards[1]
    assert before.items() <= shards[0].items()
    assert dsno("verify", str(tmp_path / "killed")).returncode == 0


def digits_config(tmp_path: Path, *words: str) -> Any:
    return load_config(
        "configs/digits.yaml", [f"storage.root={tmp_path}", "evaluation.metrics=[fid]", *words]
    )


def test_references_as_the_field_writes_them(tmp_path: Path) -> None:
    """EDM's and pytorch-fid's mu and sigma, ADM's batch of statistics and some images."""
    mean, sigma = np.arange(64.0), np.eye(64)
    pixels = np.zeros((30, 8, 8, 1), np.uint8)
    np.savez(tmp_path / "edm.npz", mu=mean, sigma=sigma)
    np.savez(tmp_path / "adm.npz", arr_0=pixels, mu=mean, sigma=sigma, mu_s=mean, sigma_s=sigma)
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    storage = open_storage(str(tmp_path))

    def real(name: str, *words: str) -> Any:
        config = digits_config(tmp_path, f"evaluation.reference={tmp_path / name}", *words)
        weights = find_all_weights(config.evaluation)
        return find_real_data(config, storage, find_readings(config.evaluation), weights)

    edm = real("edm.npz", "evaluation.reference_count=50000", "evaluation.reference_resolution=8")
    assert edm.images is None and edm.statistics.count == 50000 and edm.statistics.resolution == 8
    assert np.array_equal(edm.statistics.statistics["fid"].mean, mean)
    adm = real("adm.npz")  # the statistics are of the whole data set, the 30 images a part of it
    assert adm.images is None and adm.statistics.count is None and adm.statistics.resolution == 8
    both = real("adm.npz", "evaluation.metrics=[fid, kid]", "evaluation.kid_subset_size=20")
    assert both.statistics is not None and both.images.count == 30
    assert set(both.spec.holds) == set(both.readings) == {"kid"}
    for words, says in [  # known before anything is drawn
        (
            ("evaluation.metrics=[fid, kid]", "evaluation.kid_subset_size=31"),
            "kid, as it is set, needs 31 images",
        ),
        (("evaluation.metrics=[precision_recall]", "evaluation.neighborhood=30"), "needs 31 images"),
    ]:
        with pytest.raises(UserError, match=says):
            real("adm.npz", *words)
    with pytest.raises(UserError, match="mu of 64 features, the extractor gives 2048"):
        check_width("fid", mean, Reading(INCEPTION, "2048"))
    np.savez(tmp_path / "wide.npz", mu=np.arange(2048.0), sigma=np.eye(2048))
    with pytest.raises(UserError, match="mu of 2048 features, the extractor gives 64"):
        real("wide.npz")
    # the samples' features are by clean-fid's resizing, and the file is EDM's
    clean = ["evaluation.feature_extractor=inception-v3-clean", "evaluation.weights_path=null"]
    for name, said, says in [
        (
            "wide.npz",
            "null",
            r"wide\.npz has mu and sigma, but does not say by which extractor they were made; "
            ".*reference_extractor=inception-v3-clean",
        ),
        ("wide.npz", "dinov2", "reference_extractor dinov2: samples are measured by .* inception-v3-clean"),
        ("images.npz", "inception-v3-clean", "reference_extractor: is only for an .npz with mu and sigma"),
    ]:
        with pytest.raises(UserError, match=says):
            imported(
                digits_config(
                    tmp_path,
                    f"evaluation.reference={tmp_path / name}",
                    *clean,
                    f"evaluation.reference_extractor={said}",
                ).evaluation
            )
    of_clean = digits_config(
        tmp_path,
        f"evaluation.reference={tmp_path}/wide.npz",
        *clean,
        "evaluation.reference_extractor=inception-v3-clean",
    )
    assert set(imported(of_clean.evaluation).statistics) == {"fid"}
    both = digits_config(tmp_path, f"evaluation.reference={tmp_path}/adm.npz", *clean)
    assert imported(both.evaluation) is None  # the images are compared
    with pytest.raises(UserError, match="reference_count: is only for an"):
        real("images.npz", "evaluation.reference_count=30")
    np.savez(tmp_path / "colour.npz", arr_0=np.zeros((30, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"reads images of 1x8x8, .*colour\.npz are 3x8x8"):
        real("colour.npz")
    alone = real("images.npz")
    assert alone.statistics is None and alone.images.count == 30 and set(alone.spec.holds) == {"fid"}
    with pytest.raises(
        UserError, match=r"kid cannot be measured against .*edm\.npz, which holds only mu and sigma"
    ):
        real("edm.npz", "evaluation.metrics=[fid, kid]")
    np.savez(tmp_path / "other.npz", x=mean)
    np.savez(tmp_path / "bad.npz", mu=mean, sigma=np.eye(3))
    for name, says in [("other.npz", "it holds x"), ("bad.npz", "do not fit"), ("absent.npz", "is missing")]:
        with pytest.raises(UserError, match=says):
            real(name)


def test_what_a_config_cannot_measure_is_refused(tmp_path: Path) -> None:
    for word, says in [
        ("evaluation.metrics=[fid, kid]", "kid_subset_size 1000 is above num_samples 500"),
        ("evaluation.best_metric=kid", "best_metric kid is not among"),
        ("evaluation.precision_recall_weights_path=x", "goes with precision_recall_extractor"),
        ("evaluation.metrics=[fid, prc]", "precision_recall"),
        ("evaluation.weights_sha256=abc", "'abc' is not 8 to 64 digits"),
        ("training.lpips_sha256=a", "'a' is not 8 to 64 digits"),
    ]:
        with pytest.raises(UserError, match=says):
            digits_config(tmp_path, "evaluation.num_samples=500", word)


@pytest.fixture(scope="module")
def tiny_student(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained student of two checkpoints with two averages each."""
    root = tmp_path_factory.mktemp("student")
    train(tiny_data, root, TWO_AVERAGES, "training.ema_ramp=false")  # with the ramp they are equal at first
    return root / "students/digits"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A web server of the folder that it gives."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}", folder
        http.shutdown()


def test_published_weights_are_downloaded_once_and_checked(
    server: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, folder = server
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    content = b"weights"
    digits = hashlib.sha256(content).hexdigest()[:8]
    name = f"weights-{digits}.pth"
    monkeypatch.setattr(extractors, "published_url", lambda extractor: f"{url}/{name}")
    (folder / name).write_bytes(b"something else")
    with pytest.raises(WorkError, match="it was not kept"):
        find_weights(INCEPTION, None, None)
    (folder / name).write_bytes(content)
    found = find_weights(INCEPTION, None, None)
    assert found.path.read_bytes() == content and is_published(found)
    (folder / name).unlink()
    assert find_weights(INCEPTION, None, None) == found  # from the cache
    # a copy elsewhere needs no sha256: it is the published file
    (tmp_path / "copy.pth").write_bytes(content)
    assert find_weights(INCEPTION, str(tmp_path / "copy.pth"), None).sha256 == found.sha256
    found.path.write_bytes(b"damaged")
    with pytest.raises(WorkError, match="delete it"):
        find_weights(INCEPTION, None, None)
    found.path.unlink()
    with pytest.raises(WorkError, match=rf"cannot be downloaded .*put {url}/{name} at {found.path}"):
        find_weights(INCEPTION, None, None)
    assert not [p for p in found.path.parent.iterdir() if p.name.startswith(".")]


def test_without_a_home_folder_weights_are_not_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "")
    with pytest.raises(UserError, match=r"evaluation\.weights_path: .* no home folder"):
        find_weights(INCEPTION, None, None)


@pytest.mark.slow
def test_checkpoints_are_watched(tiny_student: Path, tmp_path: Path) -> None:
    """Each checkpoint and each average is evaluated once; the best is named; a second call measures nothing."""
    root = tiny_student.parents[1]
    words = ["eval", "--watch", *TINY, f"storage.root={root}", "--launcher", "local"]
    done = dsno(*words, TWO_AVERAGES, timeout=390)
    assert done.returncode == 0, done.stderr
    history = json.loads((root / "evaluation/digits/history.json").read_text())
    assert [(row["step"], row["ema_decay"]) for row in history["rows"]] == [
        (2, 0.5),
        (2, 0.9),
        (4, 0.5),
        (4, 0.9),
    ]
    assert "Frechet distance" in done.stdout and "mean trajectory error" in done.stdout
    best = min(history["rows"], key=lambda row: row["fid"])
    assert history["best"]["value"] == best["fid"] and history["best"]["step"] == best["step"]
    assert (root / "students/digits/best-fid").read_text() == f"step-{best['step']:09d}\n"
    assert (root / best["folder"] / "metrics.json").is_file()
    again = dsno(*words, TWO_AVERAGES, "--json")
    assert again.returncode == 0 and json.loads(again.stdout) == history
    # a better one of a student that is gone, and another metric to choose by
    gone = {**best, "sha256": "0" * 64, "step": 9, "fid": 0.0}
    history["rows"].append(gone)
    (root / "evaluation/digits/history.json").write_text(json.dumps(history))
    for metric in ("fid", "agreement"):
        other = dsno(*words, TWO_AVERAGES, f"evaluation.best_metric={metric}", "--json")
        assert other.returncode == 0, other.stderr
        found = json.loads(other.stdout)
        assert found["rows"] == history["rows"] and found["best"]["metric"] == metric
        assert found["best"]["step"] in (2, 4)
        assert (root / f"students/digits/best-{metric}").is_file()
