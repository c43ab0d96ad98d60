"""The evaluation protocols of papers: which keys of `evaluation` belong together, as their programs have them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dsno_cluster.yaml_text import Written

ProtocolName = Literal["edm", "adm", "clean-fid", "fd-dinov2", "cmmd"]
ERROR = "trajectory_error"  # may be measured besides: no figure of a protocol depends on it
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
        "protocol of EDM (fid.py)",
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
            "neighborhood_precision": "float16",
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


# keys that belong to an extractor, and mean nothing with another one
OF_EXTRACTOR = {
    "feature_extractor": ("weights_path", "weights_sha256"),
    "precision_recall_extractor": ("precision_recall_weights_path", "precision_recall_weights_sha256"),
}


def with_keys_of_protocol(
    given: Mapping[str, Any], asked: Collection[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The given keys of `evaluation` with those of the protocol that they name, and the given ones that gave way to it.

    `asked` are those that come from the command line. A protocol from there takes the place of what the file says, and a protocol
    from the file only says what the file does not.
    """
    protocol = PROTOCOLS.get(str(_plain(given.get("protocol"))))
    if protocol is None:
        return dict(given), []
    if "protocol" not in asked:
        return {**protocol.keys, **given}, []
    values = {**given, **{key: value for key, value in protocol.keys.items() if key not in asked}}
    if "metrics" not in asked and ERROR in _listed(given.get("metrics")):
        values["metrics"] = [*values["metrics"], ERROR]
    for extractor, files in OF_EXTRACTOR.items():
        if values.get(extractor) != given.get(extractor):
            values = {key: value for key, value in values.items() if key not in files or key in asked}
    if "best_metric" not in asked and values.get("best_metric") not in _listed(values["metrics"]):
        values.pop("best_metric", None)
    replaced = [key for key in given if key not in values or _plain(values[key]) != _plain(given[key])]
    return values, replaced


def _listed(value: Any) -> list[Any]:
    """The elements of what was written; none of what is no list, which is refused later."""
    return value if isinstance(value, list) else []


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, Written) else value


def contradiction(name: str, values: Mapping[str, Any]) -> str | None:
    """How the values of `evaluation` contradict a protocol, the first of them; None if they do not."""
    protocol = PROTOCOLS[name]
    for key, wanted in protocol.keys.items():
        value = values[key]
        if key == "metrics":
            value, wanted = sorted({*value} - {ERROR}), sorted(wanted)
        value = list(value) if isinstance(value, tuple) else value
        if value != wanted:
            return f"protocol {name} goes with {key} {_shown(wanted)}, not {_shown(value)}: leave one of the two out"
    if protocol.batch and not values["reference"].endswith(".npz"):
        return f"protocol {name} goes with an .npz of its form as reference, not {values['reference']}"
    return None


def _shown(value: Any) -> str:
    """A value as YAML writes it."""
    return f"[{', '.join(value)}]" if isinstance(value, list) else json.dumps(value)
