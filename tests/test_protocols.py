"""Evaluation protocols against what their original programs give for the same features and images (data/make_protocols.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
import vits
from inception import save_random_inception
from pictures import EVERY, REAL_IMAGES, SAMPLE_IMAGES, SPLIT_IMAGES, picture, pictures
from report_runs import metrics, write_evaluation
from test_report import report
from tiny import TINY, dsno
from training_runs import train

from dsno_cluster.commands.evaluation import show_figures, show_metrics
from dsno_cluster.config import dump_config, load_config
from dsno_cluster.config.protocols import PROTOCOLS
from dsno_cluster.data import load_data
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.evaluate import evaluate_images
from dsno_cluster.evaluation.metrics import cmmd, frechet, inception_score, precision_recall
from dsno_cluster.evaluation.records import ImagesMetrics, Metrics
from dsno_cluster.features import INCEPTION
from dsno_cluster.features.classifiers import DigitsFeatures
from dsno_cluster.features.extractors import WeightsFile, find_weights, layer_of, load_extractor
from dsno_cluster.features.inception import CLEAN, clean_resized
from dsno_cluster.features.kernels import squared_mmd
from dsno_cluster.features.neighbours import rounded_precision_recall_on
from dsno_cluster.features.statistics import Gaussian, merge, moments_of
from dsno_cluster.files import file_sha256
from dsno_cluster.image_sets.opening import open_images
from dsno_cluster.images import to_uint8

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
        assert found[name] == pytest.approx(expected[f"{name} in 32 bits"], rel=1e-6)


def test_precision_and_recall_are_rounded_as_evaluator_py_does() -> None:
    """In 16 bits, or in 32 where a block has distances that are too large; TensorFlow's own sums depend on the device."""
    given, expected = made("adm")
    settings = load_config("configs/cifar10.yaml", ["evaluation.protocol=adm"]).evaluation
    assert settings.neighborhood_precision == "float16"
    real, samples = given["real"], given["samples"]
    near = precision_recall(settings, samples, real)
    far = precision_recall(settings, samples + given["far"], real + given["far"])
    large = precision_recall(settings, samples * given["large"], real * given["large"])
    plain = settings.model_copy(update={"neighborhood_precision": "float32"})
    not_rounded = precision_recall(plain, samples + given["far"], real + given["far"])
    for name in ("precision", "recall"):
        assert near[name] == pytest.approx(expected[name], rel=1e-6)
        assert far[name] == pytest.approx(expected[f"{name} far in 16 bits"], rel=1e-6)
        assert far[name] == pytest.approx(expected[f"{name} far"], abs=0.008)
        assert large[name] == pytest.approx(expected[f"{name} large"], rel=1e-6)
        assert abs(far[name] - not_rounded[name]) > 0.015
    assert large["precision"] != pytest.approx(near["precision"], abs=0.04)


@pytest.mark.parametrize("rows", [70, 300])
def test_blocks_of_rounded_distances_belong_together(rows: int) -> None:
    """Each feature is compared with those of all blocks, in which no distance is too large here."""
    given, _ = made("adm")
    both = [torch.from_numpy(given[name] + given["far"]) for name in ("samples", "real")]
    assert rounded_precision_recall_on(*both, 3, rows) == rounded_precision_recall_on(*both, 3)


@pytest.mark.slow
def test_images_have_the_figures_that_adm_and_edm_give_them(tmp_path: Path) -> None:
    """From files to figures, with random weights of Inception on both sides."""
    weights = save_random_inception(tmp_path / "inception.pth")
    for name, images in (("real", REAL_IMAGES), ("samples", SAMPLE_IMAGES)):
        np.savez(tmp_path / f"{name}.npz", arr_0=pictures(*images))
    words = [
        "metrics=[fid, sfid, inception_score, precision_recall]",
        f"num_samples={SAMPLE_IMAGES[1]}",
        f"feature_extractor={INCEPTION}",
        f"weights_path={weights}",
        f"weights_sha256={file_sha256(weights)}",
        f"reference={tmp_path / 'real.npz'}",
        f"inception_splits={SAMPLE_IMAGES[1] // SPLIT_IMAGES}",
        "inception_shuffle=false",
        "neighborhood_precision=float16",
    ]
    config = load_config(
        "configs/digits.yaml", [f"storage.root={tmp_path}", *(f"evaluation.{word}" for word in words)]
    )
    found = evaluate_images(config, str(tmp_path / "samples.npz")).figures
    adm, edm = made("adm")[1], made("edm")[1]
    assert found.fid == pytest.approx(edm["fid of images"], rel=1e-6)
    for name in ("fid", "sfid", "inception_score"):
        assert found.figure(name) == pytest.approx(adm[f"{name} of images"], rel=1e-6), name
    for name, (_, count, _) in (("precision", SAMPLE_IMAGES), ("recall", REAL_IMAGES)):  # to two images
        assert found.figure(name) == pytest.approx(adm[f"{name} of images"], abs=2.01 / count), name


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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["protocol=edm", "num_samples=1000"], "protocol edm goes with num_samples 50000, not 1000"),
        (["protocol=edm", "draws=1"], "protocol edm goes with draws 3, not 1"),
        (["protocol=edm", "metrics=[kid]"], "protocol edm goes with metrics [fid], not [kid]"),
        (["protocol=adm", "inception_shuffle=true"], "goes with inception_shuffle false, not true"),
        (["protocol=adm", "precision_recall_extractor=vgg16"], "goes with precision_recall_extractor null"),
        (["protocol=adm", "reference=data"], "goes with an .npz of its form as reference, not data"),
        (["draws=2", "metrics=[kid]"], "draws 2 goes with metrics [fid]"),
        (["protocol=edm", "metrics="], "evaluation.metrics: input should be a valid array, found null"),
        (["protocol=edm", "metrics=5"], "evaluation.metrics: input should be a valid array, found 5"),
    ],
)
def test_what_contradicts_a_protocol_is_refused(words: list[str], says: str) -> None:
    given = " ".join(words)
    metrics = [] if "metrics" in given else ["metrics=[fid, sfid, inception_score, precision_recall]"]
    words = [f"evaluation.{word}" for word in (metrics if "adm" in given else []) + words]
    with pytest.raises(UserError) as refused:
        load_config("configs/cifar10.yaml", words)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_a_protocol_sets_what_belongs_together(tmp_path: Path) -> None:
    """Also the metrics, if the config names none; a config that was written with it is read back."""
    plain = load_config("configs/cifar10.yaml")
    lines = dump_config(plain).splitlines()
    unsaid = ("  metrics:", "  num_samples: 50000", "  neighborhood:", "  - fid", "  - trajectory_error")
    file = tmp_path / "bare.yaml"
    file.write_text("\n".join(line for line in lines if not line.startswith(unsaid)))
    found = load_config(str(file), ["evaluation.protocol=adm", "evaluation.num_samples=50000"])
    settings = found.evaluation
    assert settings.metrics == ("fid", "sfid", "inception_score", "precision_recall")
    assert settings.neighborhood == 3 and not settings.inception_shuffle and settings.drawn == 50_000
    written = tmp_path / "written.yaml"
    written.write_text(dump_config(found))
    assert load_config(str(written)).evaluation == settings
    assert load_config("configs/cifar10.yaml", ["evaluation.protocol=edm"]).evaluation.drawn == 150_000
    assert "protocol" not in dump_config(plain) and "draws" not in dump_config(plain)


NAMED_BATCH = ["evaluation.reference=reference.npz"]


@pytest.mark.parametrize("config", ["digits", "digits-best", "mnist32", "cifar10", "imagenet64"])
@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_a_protocol_on_the_command_line_goes_with_every_config(
    name: str, config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It takes the place of what the file says, and says of what."""
    path, words = f"configs/{config}.yaml", [f"evaluation.protocol={name}"]
    plain = load_config(path).evaluation
    found = load_config(path, [*words, *(NAMED_BATCH if name == "adm" else [])])
    settings, protocol = found.evaluation, PROTOCOLS[name]
    assert {*settings.metrics} == {*protocol.keys["metrics"], "trajectory_error"}
    assert settings.feature_extractor == protocol.keys["feature_extractor"]
    assert settings.num_samples == protocol.keys["num_samples"]
    if settings.feature_extractor != plain.feature_extractor:
        assert settings.weights_path is None and settings.weights_sha256 is None
    said = capsys.readouterr().err
    for key in ("num_samples", "metrics", "feature_extractor", "weights_path"):
        changed = getattr(settings, key) != getattr(plain, key)
        assert (f"takes the place of what {path} says of" in said and key in said) or not changed
    written = tmp_path / "written.yaml"
    written.write_text(dump_config(found))
    assert load_config(str(written)) == found and "takes the place" not in capsys.readouterr().err
    with pytest.raises(UserError, match="goes with num_samples"):
        load_config(path, [*words, "evaluation.num_samples=70"])


def test_the_protocol_is_in_the_table_and_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"fid": 1.7912, "fid_ci95": 0.0213, "fid_draws": [1.8112, 1.7912, 1.8034]}
    student = {"cost_in_teacher_evaluations": 1.0, "images_per_second": 9.0, **row}
    extractor = {"name": INCEPTION, "weights_sha256": "6726825d"}
    made_up = metrics(protocol="edm", draws=3, student=student, feature_extractor=extractor)
    show_metrics(Metrics.model_validate(made_up))
    shown = capsys.readouterr().out
    assert "protocol of EDM (fid.py), the minimum of 3 draws" in shown
    assert "1.79 ± 0.02 (1.81, 1.79, 1.80)" in shown and "±: half of the 95 % interval" in shown
    write_evaluation(tmp_path, made_up)
    page = report(tmp_path)
    for said in ("protocol of EDM (fid.py)", "1.79 ± 0.02 (1.81, 1.79, 1.80)", "95 % interval"):
        assert said in page.text, said


def test_images_are_measured_by_a_protocol_only_if_they_are_as_many(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, held_out = load_data("digits")
    np.savez(tmp_path / "few.npz", images=to_uint8(held_out.images).numpy())
    config = load_config("configs/digits.yaml", [f"storage.root={tmp_path}", "evaluation.metrics=[fid]"])

    def by_edm(count: int) -> ImagesMetrics:
        changes = {"protocol": "edm", "num_samples": count}
        settings = config.evaluation.model_copy(update=changes)
        return evaluate_images(config.model_copy(update={"evaluation": settings}), str(tmp_path / "few.npz"))

    with pytest.raises(UserError, match=r"evaluation\.protocol edm: is of 300 images, .*few\.npz has 297"):
        by_edm(300)
    found = by_edm(297)
    assert found.protocol == "edm"
    show_figures(found)
    said = " ".join(capsys.readouterr().out.split())
    assert "protocol of EDM (fid.py), one draw, where the protocol takes the minimum of 3" in said
    (file,) = (tmp_path / "evaluation/digits").glob("samples-*.json")
    assert json.loads(file.read_text())["protocol"] == "edm"


@pytest.mark.slow
def test_draws_are_those_of_further_samples(tiny_data: Path, tmp_path: Path) -> None:
    """Each has the figure of its own images; the smallest is the row's."""
    train(tiny_data, tmp_path)
    words = [*TINY, f"storage.root={tmp_path}", "evaluation.metrics=[fid]", "evaluation.num_samples=100"]
    more = ["evaluation.draws=2", "evaluation.keep_samples=true", "--launcher", "local", "--json"]
    done = dsno("eval", *words, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    (kept,) = (tmp_path / "samples").iterdir()
    images = open_images(str(kept))
    assert images.count == 200 and found["draws"] == 2 and found["num_samples"] == 100
    weights = find_weights(DigitsFeatures.NAME, None, None)
    extractor = load_extractor(weights, ["64"])
    train_images, _ = load_data("digits")
    real = moments_of(extractor(to_uint8(train_images.images))["64"].numpy()).gaussian
    each = []
    for draw in range(2):
        rows = extractor(images.read(100 * draw, 100 * draw + 100))["64"].numpy()
        each.append(frechet("fid", moments_of(rows), rows, real))
    row = found["student"]
    assert row["fid_draws"] == pytest.approx([figures["fid"] for figures in each], rel=1e-6)
    assert row["fid"] == min(row["fid_draws"]) and each[0]["fid"] != pytest.approx(each[1]["fid"], rel=1e-6)
    best = each[row["fid_draws"].index(row["fid"])]
    assert row["fid_ci95"] == pytest.approx(best["fid_ci95"], rel=1e-4)
    assert all(len(teachers["fid_draws"]) == 2 for teachers in found["teacher_rows"])


def test_clean_fid_gives_what_its_program_gives() -> None:
    """Its resizing of larger and smaller images, of which a part of the pixels is kept; its distance."""
    given, expected = made("clean_fid")
    for size in (32, 310):
        image = torch.from_numpy(picture(size, size + 9)).permute(2, 0, 1)
        ours = clean_resized(image, 299).permute(1, 2, 0)[::EVERY, ::EVERY].numpy()
        assert np.allclose(ours, given[f"resized {size}"], rtol=0, atol=255e-6), size
        assert ours.min() >= 0 and ours.max() <= 255
    features = made("adm")[0]
    real = moments_of(features["real"])
    found = distance(features["samples"], real.mean, real.covariance)
    assert found == pytest.approx(expected["fid"], rel=1e-6)


@pytest.mark.slow
def test_clean_inception_is_inception_where_nothing_is_resized(tmp_path: Path) -> None:
    file = save_random_inception(tmp_path / "inception.pth")
    images = torch.from_numpy(np.stack([picture(299, 299), picture(299, 299)[::-1]])).permute(0, 3, 1, 2)
    layers = ["2048", "logits_unbiased"]
    clean, plain = (
        load_extractor(WeightsFile(name, file, file_sha256(file)), layers)(images.contiguous())
        for name in (CLEAN, INCEPTION)
    )
    for layer in layers:
        assert torch.allclose(clean[layer], plain[layer], rtol=1e-5, atol=1e-6), layer


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest error, by the length of a row."""
    lengths = np.linalg.norm(expected, axis=1)
    return float((np.linalg.norm(found - expected, axis=1) / lengths).max())


def features_by(
    extractor: str, weights: dict[str, torch.Tensor], folder: Path, sizes: tuple[int, int]
) -> np.ndarray:
    """The features of two pictures, by a file of these weights."""
    file = folder / "model.safetensors"
    safetensors.torch.save_file(weights, file)
    found = find_weights(extractor, str(file), file_sha256(file))
    loaded = load_extractor(found, [layer_of(extractor, "fid")])
    images = [torch.from_numpy(picture(size, size)).permute(2, 0, 1)[None].contiguous() for size in sizes]
    return torch.cat([next(iter(loaded(each).values())) for each in images]).numpy()


def test_dinov2_gives_what_dgm_eval_gives(tmp_path: Path) -> None:
    """With random weights: the features of its encoder around the original network, and its distance."""
    pytest.importorskip("transformers")
    given, expected = made("fd_dinov2")
    found = features_by("dinov2", vits.dinov2_weights(), tmp_path, (40, 300))
    assert found.shape == (2, vits.DINOV2.width)
    assert relative_error(found, given["features"]) < 1e-6
    features = made("adm")[0]
    ours = moments_of(features["real"])
    assert distance(features["samples"], ours.mean, ours.covariance) == pytest.approx(
        expected["fid"], rel=1e-6
    )


def test_cmmd_gives_what_its_program_gives(tmp_path: Path) -> None:
    """The embeddings of the original CLIP with random weights; the distance in 64 bits, and in 32 to the precision of those."""
    pytest.importorskip("transformers")
    given, expected = made("cmmd")
    found = features_by("clip", vits.clip_weights(), tmp_path, (40, 100))
    assert found.shape == (2, vits.CLIP.embedding)
    assert relative_error(found, given["features"]) < 1e-6
    embeddings = [
        rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for rows in map(made("adm")[0].get, ("samples", "real"))
    ]
    row = cmmd(*embeddings)
    assert row["cmmd"] == pytest.approx(expected["cmmd in 64 bits"], rel=1e-6)
    assert row["cmmd"] == pytest.approx(expected["cmmd"], abs=1e-3)
    blocks, _ = squared_mmd(*map(torch.from_numpy, embeddings), 10.0, numbers=1000)
    assert 1000 * blocks == pytest.approx(row["cmmd"], rel=1e-9)


def test_weights_that_are_not_a_transformers_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    ours = vits.dinov2_weights()
    without = {name: tensor for name, tensor in ours.items() if "mlp.fc2" not in name}
    wide = {
        name: tensor[..., :90].contiguous() if "mlp.fc2.weight" in name else tensor
        for name, tensor in ours.items()
    }
    for extractor, weights, says in [
        ("dinov2", vits.clip_weights(), "has no embeddings.patch_embeddings"),
        ("clip", ours, "has no vision_model.embeddings"),
        ("dinov2", without, "missing keys: .*mlp.fc2"),
        ("dinov2", wide, "mismatched keys: .*mlp.fc2"),
    ]:
        with pytest.raises(UserError, match=says) as refused:
            features_by(extractor, weights, tmp_path, (40, 40))
        assert "\n" not in str(refused.value)


def test_transformers_is_asked_for_by_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"need transformers: pip install 'dsno-cluster\[protocols\]'"):
        find_weights("dinov2", "weights.safetensors", None)
