"""Evaluation protocols against what their original programs give for the same features and images (data/make_protocols.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from inception import save_random_inception
from report_runs import metrics, write_evaluation
from test_report import report
from tiny import TINY, dsno
from training_runs import train

from dsno_cluster.commands.evaluation import show_metrics
from dsno_cluster.config import dump_config, load_config
from dsno_cluster.data import load_data
from dsno_cluster.errors import UserError
from dsno_cluster.evaluation.evaluate import evaluate_images
from dsno_cluster.evaluation.metrics import frechet, inception_score, precision_recall
from dsno_cluster.evaluation.records import ImagesMetrics, Metrics
from dsno_cluster.features import INCEPTION
from dsno_cluster.features.classifiers import DigitsFeatures
from dsno_cluster.features.extractors import WeightsFile, find_weights, load_extractor
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


def test_the_protocol_is_in_the_table_and_in_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"fid": 1.7912, "fid_ci95": 0.0213, "fid_draws": [1.8112, 1.7912, 1.8034]}
    student = {"cost_in_teacher_evaluations": 1.0, "images_per_second": 9.0, **row}
    extractor = {"name": INCEPTION, "weights_sha256": "6726825d"}
    made_up = metrics(protocol="edm", draws=3, student=student, feature_extractor=extractor)
    show_metrics(Metrics.model_validate(made_up))
    shown = capsys.readouterr().out
    assert "protocol of EDM (fid.py): the minimum of three draws" in shown
    assert "1.79 ± 0.02 (1.81, 1.79, 1.80)" in shown and "±: half of the 95 % interval" in shown
    write_evaluation(tmp_path, made_up)
    page = report(tmp_path)
    for said in ("protocol of EDM (fid.py)", "1.79 ± 0.02 (1.81, 1.79, 1.80)", "95 % interval"):
        assert said in page.text, said


def test_images_are_measured_by_a_protocol_only_if_they_are_as_many(tmp_path: Path) -> None:
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
