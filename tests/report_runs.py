"""The files of a small run, made up, for the tests of the report."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

TIMES = [0.5625, 0.25, 0.0625, 0.0]
LAYOUT = {
    "rows": 10,
    "columns": 4,
    "classes": 10,
    "tile": 8,
    "gap": 1,
    "pair_gap": 3,
    "strips": [0, 3, 6, 9],
    "times": [1.0, *TIMES],
}


def metrics(**changes: Any) -> dict[str, Any]:
    """A metrics.json as `eval` writes it."""
    figures = {"kid": 0.0123, "kid_std": 0.0045, "precision": 0.81, "agreement": 0.9876}
    return {
        "name": "digits",
        "num_samples": 5000,
        "reference": {"what": "data", "count": 1500, "resolution": 8},
        "feature_extractor": {"name": "digits-features", "weights_sha256": "981af2fb"},
        "warnings": [],
        "seeds": {"noise": 1, "trajectories": 0},
        "checkpoint": {"path": "runs/students/digits", "step": 300, "ema_decay": 0.999, "sha256": "ab12"},
        "precision": "float32",
        "versions": {"dsno-cluster": "0.1.0", "torch": "2.14.1"},
        "code": {"version": "0.1.0", "commit": "0123456789abcdef0123", "dirty": True},
        "device": "a CPU of two cores",
        "seconds": 63.4,
        "real_held_out": {"num_samples": 297, "fid": 1.86, **figures},
        "teacher_rows": [
            {"source": "teacher, ddim", "evaluations": 1, "fid": 11.38, **figures},
            {"source": "teacher, ddim", "evaluations": 4, "fid": 0.83, **figures},
            {
                "source": "teacher, dpmpp-2m",
                "evaluations": 18,
                "fid": 0.27,
                "as_trajectories": True,
                **figures,
            },
        ],
        "student": {
            "source": "student",
            "fid": 4.56,
            **figures,
            "cost_in_teacher_evaluations": 1.04,
            "images_per_second": 362.0,
            "trajectory_error": dict(zip(map(str, TIMES), (0.036, 0.08, 0.13, 0.1457), strict=True)),
        },
        "pictures": LAYOUT,
        **changes,
    }


def curve(steps: int = 300, every: int = 10) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        line = {
            "step": step,
            "loss": 10.0 / step,
            "seconds": step / 10,
            "distance_per_time": [0.1, None, 0.3, 0.4],
        }
        line |= {"images_per_second": 321.0, "data_wait": 0.012, "memory_gb": 1.5}
        if step % 100 == 0:
            line["heldout_error_per_time"] = [x / step for x in (10, 20, 30, 41.5)]
        lines.append(line)
    return lines


def history() -> dict[str, Any]:
    rows = [
        {"step": step, "ema_decay": decay, "fid": 1000 * (2 - decay) / step}
        for decay in (0.9, 0.999)
        for step in (100, 200, 300)
    ]
    return {"rows": rows, "best": {"step": 300, "ema_decay": 0.999, "metric": "fid", "value": 3.34}}


def write_evaluation(
    root: Path, found: dict[str, Any], past: dict[str, Any] | None = None, name: str = "digits"
) -> None:
    folder = root / "evaluation" / name
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(found))
    if past is not None:
        (folder / "history.json").write_text(json.dumps(past))
    sizes = {"teacher.png": (37, 91), "student.png": (37, 91), "strips.png": (46, 82)}
    for name, size in sizes.items():
        data = io.BytesIO()
        Image.effect_noise(size, 90).save(data, "PNG")
        (folder / name).write_bytes(data.getvalue())


def write_curve(root: Path, lines: list[dict[str, Any]], name: str = "digits") -> Path:
    file = root / "students" / name / "metrics.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file
