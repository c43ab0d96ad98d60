"""verify: checks every byte of a data set against its manifest, or of an export of one against its index."""

from __future__ import annotations

import os
import re
from typing import Any

from dsno_cluster import console
from dsno_cluster.storage import open_storage
from dsno_cluster.trajectories.exchange.export import verify_export
from dsno_cluster.trajectories.exchange.index import INDEX, read_index
from dsno_cluster.trajectories.shards import (
    MANIFEST,
    Manifest,
    find_bad_shards,
    manifest_problems,
    open_data_set,
)


def verify(address: str, endpoint_url: str | None = None) -> dict[str, Any]:
    """Check the data set or export at a folder, an S3 address or its manifest; `problems` names each bad shard or part.

    A folder may be copied and renamed, but one that is named after a spec's hash must hold that spec.
    Raises UserError if there is no manifest.
    """
    exported = open_storage(address.removesuffix(INDEX).rstrip("/") or ".", endpoint_url)
    if not address.endswith(MANIFEST) and (index := read_index(exported)) is not None:
        return verify_export(exported, index)
    storage, manifest = open_data_set(address, endpoint_url)
    problems = _wrong_name(storage.url, manifest) + manifest_problems(manifest)
    with console.progress("verifying", len(manifest.shards), "shards") as advance:
        for shard, problem in find_bad_shards(storage, "", manifest):
            problems += [f"{shard.key} {problem}"] if problem else []
            advance(1)
    sizes = sum(shard.size for shard in manifest.shards)
    return {
        "ok": not problems,
        "shards": len(manifest.shards),
        "samples": manifest.num_samples,
        "bytes": sizes,
        "problems": problems,
    }


def _wrong_name(url: str, manifest: Manifest) -> list[str]:
    name = os.path.basename(url if "://" in url else os.path.abspath(url))
    spec_hash = manifest.spec_hash
    if not re.fullmatch("[0-9a-f]{16}", name) or name == spec_hash:
        return []
    return [f"{MANIFEST} is that of {spec_hash}, the folder is named {name}"]
