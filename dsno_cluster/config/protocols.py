"""The evaluation protocols of papers: which keys of `evaluation` belong together, as their programs have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

ProtocolName = Literal["edm", "adm", "clean-fid", "fd-dinov2", "cmmd"]
INCEPTION = "inception-v3-compat"  # the network whose Frechet distance the field calls FID


@dataclass(frozen=True)
class Protocol:
    """A protocol by the `title` that tables have, and the values of its `keys`, written as in YAML.

    `batch`: whether the reference must be an .npz.
    """

    title: str
    keys: Mapping[str, Any]
    batch: bool = False


PROTOCOLS: dict[str, Protocol] = {
    "edm": Protocol(
        "protocol of EDM (fid.py): the minimum of three draws",
        {"num_samples": 50_000, "draws": 3, "metrics": ["fid"], "feature_extractor": INCEPTION},
    ),
    "adm": Protocol(
        "protocol of ADM (evaluator.py)",
        {
            "num_samples": 50_000,
            "draws": 1,
            "metrics": ["fid", "sfid", "inception_score", "precision_recall"],
            "feature_extractor": INCEPTION,
            "precision_recall_extractor": None,
            "inception_splits": 10,
            "inception_shuffle": False,
            "neighborhood": 3,
        },
        batch=True,
    ),
    "clean-fid": Protocol(
        "protocol of clean-fid",
        {
            "num_samples": 50_000,
            "draws": 1,
            "metrics": ["fid"],
            "feature_extractor": "inception-v3-clean",
        },
    ),
    "fd-dinov2": Protocol(
        "protocol of FD-DINOv2 (dgm-eval)",
        {"num_samples": 50_000, "draws": 1, "metrics": ["fid"], "feature_extractor": "dinov2"},
    ),
    "cmmd": Protocol(
        "protocol of CMMD",
        {"num_samples": 30_000, "draws": 1, "metrics": ["cmmd"], "feature_extractor": "clip"},
    ),
}


def with_keys_of_protocol(given: Mapping[str, Any]) -> dict[str, Any]:
    """The given keys of `evaluation`, with those of the protocol that they name where they do not say them."""
    protocol = PROTOCOLS.get(str(given.get("protocol")))
    return {**(protocol.keys if protocol else {}), **given}


def contradiction(name: str, values: Mapping[str, Any]) -> str | None:
    """How the values of `evaluation` contradict a protocol, the first of them; None if they do not.

    The trajectory error may be measured besides: no figure of a protocol depends on it.
    """
    protocol = PROTOCOLS[name]
    for key, wanted in protocol.keys.items():
        value = values[key]
        if key == "metrics":
            value, wanted = sorted({*value} - {"trajectory_error"}), sorted(wanted)
        value = list(value) if isinstance(value, tuple) else value
        if value != wanted:
            return f"protocol {name} goes with {key} {_shown(wanted)}, not {_shown(value)}: leave one of the two out"
    if protocol.batch and not values["reference"].endswith(".npz"):
        return f"protocol {name} goes with an .npz of its form as reference, not {values['reference']}"
    return None


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    return f"[{', '.join(value)}]" if isinstance(value, list) else json.dumps(value)
