"""The rules between `finish` and the other groups of keys, which hold for the experiment that it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TINY, answer

from dsno_cluster.config import load_config
from dsno_cluster.errors import UserError

DIGITS = "configs/digits.yaml"
ON = "finish.enabled=true"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["training.online=true", "reader.shuffle=none", "finish.distribution.trajectory_weight=1"],
            "finish: in the training that it makes, training.online_staged_shards 16: reading ahead needs 18",
        ),
        (
            ["training.accumulation=3", "training.batch_size=48"],
            "finish: in the training that it makes, training: batch_size 512 is not a multiple of accumulation 3",
        ),
        (
            ["training.ema_decay=[0.999, 0.9999]", "evaluation.ema_decay=0.9999"],
            "evaluation.ema_decay 0.9999: finish begins with the first of training.ema_decay, 0.999",
        ),
        (["training.objective=distribution"], "training.objective distribution finishes a student already"),
        (["finish.distribution.patience=2", "finish.heldout_every=null"], "set finish.heldout_every"),
        (
            ["data.name=null", "evaluation.reference=x.npz"],
            "finish.distribution.frechet_weight needs real images",
        ),
        (
            ["evaluation.protocol=cmmd"],
            "adds precision_recall, nearest to what protocol cmmd measures: set finish.further_metrics=[]",
        ),
        ([f"name={'n' * 250}"], "finish: in the training that it makes, name: "),
    ],
)
def test_what_finish_cannot_do_is_refused_at_once(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(DIGITS, [ON, *overrides])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    load_config(DIGITS, ["finish.enabled=false", *overrides])  # nothing but finish is wrong with them


def test_a_finishing_that_reads_no_trajectories_stages_none() -> None:
    """At its batch size, the shards that are read ahead would be too many."""
    finished = load_config(DIGITS, [ON, "training.online=true", "reader.shuffle=none"]).finished
    assert finished is not None and not finished.training.reads_trajectories


def test_the_finished_student_has_one_average() -> None:
    both = ["training.ema_decay=[0.999, 0.9999]", "evaluation.ema_decay=0.999"]
    finished = load_config(DIGITS, [ON, *both]).finished
    assert finished is not None
    assert finished.evaluation.ema_decay is None and finished.training.ema_decay == 0.999


@pytest.mark.parametrize("command", [["run"], ["run", "--dry-run"], ["demo"]])
@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "evaluation.feature_extractor=inception-v3-clean",
            "finish.distribution.frechet_weight: inception-v3-clean resizes images in 8 bits",
        ),
        ("training.start=nowhere", "training.start: nowhere: "),
        ("evaluation.weights_path=nowhere.safetensors", "nowhere.safetensors is missing"),
        ("data={images: nowhere}", "data.images: "),
    ],
)
def test_what_finish_lacks_is_reported_before_anything_is_made(
    command: list[str], override: str, says: str, tmp_path: Path
) -> None:
    compared = [
        "evaluation.metrics=[trajectory_error]",
        "finish.further_metrics=[]",
        "evaluation.reference=held-out",
    ]
    words = [*TINY, f"storage.root={tmp_path}", *compared, ON, override]
    done = answer(*command, *words, "--launcher", "local")
    assert done.returncode == 2 and says in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())
