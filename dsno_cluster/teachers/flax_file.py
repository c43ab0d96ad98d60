"""Flax msgpack checkpoints, read without flax: data only, no code executed, lengths bounded by the file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsno_cluster.errors import UserError, said_by

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

MAX_KEYS = 100_000  # of one msgpack map; the published ImageNet-64 network has 89 modules
ARRAY_TYPE, BFLOAT16 = 1, "bfloat16"  # flax's msgpack extension type of an array, and the dtype numpy lacks
FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True)
class Packed:
    """An array as it is in the file; it is decoded only when needed."""

    code: int
    data: bytes


def read_flax(data: bytes, where: str) -> tuple[dict[str, Tensor], int | None]:
    """`ema_params` flattened to names with slashes, and `num_sample_steps` (None if it has none).

    Optimiser state is skipped undecoded. Raises UserError for anything but nested maps of arrays.
    """
    tree = _unpack(data, where)
    if not isinstance(tree, dict) or not isinstance(tree.get("ema_params"), dict):
        raise UserError(f"{where}: holds no map of arrays `ema_params`; it is not a published teacher")
    params: dict[str, Tensor] = {}

    def walk(node: Any, name: str) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                walk(child, f"{name}/{key}" if name else key)
        elif isinstance(node, Packed) and node.code == ARRAY_TYPE:
            params[name] = _tensor(node.data, f"{where}: {name}")
        else:
            raise UserError(f"{where}: {name} is {type(node).__name__}, not an array")

    walk(tree["ema_params"], "")
    steps = tree.get("num_sample_steps")
    if isinstance(steps, Packed) and steps.code == ARRAY_TYPE:
        steps = _array(steps.data, f"{where}: num_sample_steps").reshape(-1)[:1].tolist()[:1]
        steps = steps[0] if steps else None
    return params, steps if isinstance(steps, int) and steps > 0 else None


def _unpack(data: bytes, where: str) -> Any:
    """Unpack msgpack with limits: no length exceeds the file, no map or list exceeds `MAX_KEYS`."""
    import msgpack

    try:
        return msgpack.unpackb(data, ext_hook=Packed, max_map_len=MAX_KEYS, max_array_len=MAX_KEYS)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise UserError(
            f"{where}: is cut off, damaged or not flax msgpack: {said_by('msgpack', error)}"
        ) from None


def _array(data: bytes, where: str) -> np.ndarray[Any, Any]:
    """A flax array, (shape, dtype name, little-endian bytes), as numpy; bfloat16 as float32."""
    import numpy as np

    content = _unpack(data, where)
    if not isinstance(content, list) or len(content) != 3:
        raise UserError(f"{where}: an array must be (shape, dtype, bytes)")
    shape, name, buffer = content
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and n >= 0 for n in shape):
        raise UserError(f"{where}: {str(shape)[:60]!r} is no shape of an array")
    if name not in (*FLOATS, BFLOAT16, "int32", "int64") or not isinstance(buffer, bytes):
        raise UserError(f"{where}: an array of {str(name)[:40]!r}, which is not read here")
    dtype = np.dtype("uint16" if name == BFLOAT16 else name).newbyteorder("<")
    if len(buffer) != math.prod(shape) * dtype.itemsize:
        raise UserError(f"{where}: {len(buffer)} bytes do not make an array {shape} of {name}")
    array = np.frombuffer(buffer, dtype).reshape(shape)
    return (array.astype(np.uint32) << 16).view(np.float32) if name == BFLOAT16 else array


def _tensor(data: bytes, where: str) -> Tensor:
    """A flax array of floating-point numbers as a float32 tensor with its own memory."""
    import numpy as np
    import torch

    array = _array(data, where)
    if array.dtype.kind != "f":
        raise UserError(f"{where}: holds {array.dtype}, not floating-point weights")
    tensor = torch.from_numpy(array.astype(np.float32, copy=True))
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{where}: holds values that are not finite")
    return tensor
