"""Snapshots of EDM and EDM2 as data: pickles of modules that carry the source text of their classes.

NVIDIA's `torch_utils.persistence` pickles a module as a call of `_reconstruct_persistent_obj` on the source text of the
module that defines its class, the name of the class and its state; its own reader runs that text. Here the call becomes a
`Module` with the class's name and the state, and the text is dropped. Tensors stay views of the file until they are asked
for. Nothing that a file names is imported or called: see `closed_pickle`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dsno_cluster.closed_pickle import Known, Malformed, damaged, read_pickle, shown
from dsno_cluster.weight_files import NotWeights

if TYPE_CHECKING:
    import torch

Kind = TypeVar("Kind")
MOST_AXES = 8
MOST_MODULES = 100_000  # EDM2's largest network has some 400
DEEPEST, LONGEST_NAME = 32, 200
# torch's names of storages in a file, the dtype of their elements and its size in bytes
_STORAGES = {
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}
_TORCH_MAGIC, _TORCH_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what torch.save's older format begins with
# numpy's names of dtypes in a file, as `struct` knows them
_NUMBERS = {"f2": "e", "f4": "f", "f8": "d", "b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H"}
_NUMBERS |= {"i4": "i", "u4": "I", "i8": "q", "u8": "Q"}


@dataclass(frozen=True, repr=False, eq=False)
class StoredTensor:
    """A tensor in a file: `data` is the storage that it views from element `offset` on, with `strides` in elements."""

    dtype: str
    item_bytes: int
    data: memoryview
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.item_bytes

    def tensor(self) -> torch.Tensor:
        """The tensor, contiguous, in memory of its own."""
        import torch

        dtype = getattr(torch, self.dtype)
        if self.num_bytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        first, last = self.offset, self.offset + _reach(self.shape, self.strides)
        used = bytearray(self.data[first * self.item_bytes : (last + 1) * self.item_bytes])
        return torch.frombuffer(used, dtype=dtype).as_strided(self.shape, self.strides).contiguous()


@dataclass(repr=False, eq=False)
class Module:
    """A module of a network in a file: the name of its class, and its state, as `nn.Module.__dict__` has it."""

    class_name: str
    state: dict[str, Any] = field(default_factory=dict)

    def take_state(self, state: Any) -> None:
        self.state = _mapping(state)

    def named(self) -> dict[str, Module]:
        """Its children by name. Raises Malformed if it has others than modules."""
        return _only(Module, _mapping(self.state.get("_modules", {})))

    def child(self, name: str) -> Module | None:
        return self.named().get(name)

    def own_tensors(self) -> dict[str, StoredTensor]:
        """Its own parameters and buffers by name. Raises Malformed if they are others than tensors."""
        parameters, buffers = (_mapping(self.state.get(kind, {})) for kind in ("_parameters", "_buffers"))
        return _only(StoredTensor, parameters | buffers)

    def walk(self) -> Iterator[tuple[str, Module]]:
        """Every module below this one, and itself, by its dotted name. Raises Malformed if some are shared, or too many."""
        seen: set[int] = set()
        waiting = [("", self, 0)]
        while waiting:
            name, module, depth = waiting.pop()
            if id(module) in seen or depth > DEEPEST or len(seen) > MOST_MODULES:
                raise Malformed(f"has a module in two places, or too many of them: {shown(name)}")
            seen.add(id(module))
            yield name, module
            prefix = f"{name}." if name else ""
            waiting += [(prefix + key, child, depth + 1) for key, child in module.named().items()]

    def tensors(self) -> dict[str, StoredTensor]:
        """The tensors of this module and those below it, by the names of a state dict. Raises Malformed as `walk`."""
        return {
            f"{name}.{key}" if name else key: tensor
            for name, module in self.walk()
            for key, tensor in module.own_tensors().items()
        }


@dataclass(repr=False, eq=False)
class _NumpyType:
    code: str

    def take_state(self, state: Any) -> None:
        """The byte order and what else a dtype's state has."""
        if type(state) is not tuple or len(state) < 2 or state[1] not in ("<", "|", "="):
            raise damaged()

    def numbers(self, data: memoryview, count: int) -> tuple[Any, ...]:
        form = f"<{count}{_NUMBERS[self.code]}"
        if struct.calcsize(form) != len(data):
            raise damaged()
        return struct.unpack(form, data)


@dataclass(repr=False, eq=False)
class NumpyArray:
    """An array in a file: its shape, and its numbers in C order."""

    shape: tuple[int, ...] = (0,)
    numbers: tuple[Any, ...] = ()

    def take_state(self, state: Any) -> None:
        match state:
            case (int(), tuple() as shape, _NumpyType() as dtype, bool(fortran), memoryview() as data):
                self._fill(shape, dtype, data, in_order=not fortran or len(shape) < 2)
            case _:
                raise damaged()

    def _fill(self, shape: tuple[int, ...], dtype: _NumpyType, data: memoryview, *, in_order: bool) -> None:
        if not _sizes(shape) or not in_order or math.prod(shape) > len(data):
            raise damaged()
        self.shape, self.numbers = shape, dtype.numbers(data, math.prod(shape))

    @classmethod
    def of_buffer(cls, arguments: tuple[Any, ...]) -> NumpyArray:
        """An array as protocol 5 has it: the arguments of numpy's `_frombuffer`."""
        array = cls()
        match arguments:
            case (memoryview() as data, _NumpyType() as dtype, tuple() as shape, str(order)):
                array._fill(shape, dtype, data, in_order=order == "C" or len(shape) < 2)
            case _:
                raise damaged()
        return array


@dataclass(frozen=True, repr=False, eq=False)
class _Storage:
    """The elements of a storage; while the stream that holds it is read, only their number."""

    dtype: str
    item_bytes: int
    key: str
    count: int
    data: memoryview = field(default_factory=lambda: memoryview(b""))


def read_snapshot(data: bytes, where: str) -> dict[str, Any]:
    """The mapping that a snapshot of EDM or EDM2 holds: plain data, `Module`s, `StoredTensor`s and `NumpyArray`s.

    Raises NotWeights, beginning with `where`, for a file that is cut off, damaged, or names anything else than such
    snapshots do. Nothing is run.
    """
    value, end = read_pickle(memoryview(data), where, _KNOWN)
    if end != len(data):
        raise NotWeights(f"{where}: has {len(data) - end:,} bytes too many after its pickle")
    if type(value) is not dict:
        raise NotWeights(f"{where}: is a pickle of {type(value).__name__}, not a snapshot of EDM")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if type(value) is not dict or not all(type(key) is str for key in value):
        raise damaged()
    return value


def _only(kind: type[Kind], values: dict[str, Any]) -> dict[str, Kind]:
    """Those of the values that are not None, which must all be of one kind and have names fit for a message."""
    found = {name: value for name, value in values.items() if value is not None}
    if not all(isinstance(value, kind) for value in found.values()):
        raise damaged()
    if not all(name.isprintable() and len(name) <= LONGEST_NAME for name in found):
        raise damaged()
    return found


def _sizes(values: Any) -> bool:
    """Whether these are sizes of a tensor's axes, or its strides."""
    return (
        type(values) is tuple and len(values) <= MOST_AXES and all(type(n) is int and n >= 0 for n in values)
    )


def _reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """How far the last element lies from the first one."""
    return sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


# What becomes of the calls in a file. Each takes the arguments as one tuple.


def _module(arguments: tuple[Any, ...]) -> Module:
    match arguments:
        case ({"type": "class", "class_name": str(name), "state": dict() as state},):
            return Module(name, _mapping(state))
        case ({"type": "class", "class_name": str(name), "state": None},):  # it has no attributes
            return Module(name)
        case ({"type": str(kind)},):
            raise Malformed(f"holds a persistent {shown(kind)}, not a class")
    raise damaged()


def _module_dict(arguments: tuple[Any, ...]) -> Module:
    if arguments:
        raise damaged()
    return Module("ModuleDict")


def _ordered(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments:
        raise damaged()
    return {}


def _set(arguments: tuple[Any, ...]) -> set[str]:
    match arguments:
        case ():
            return set()
        case ([*names],) if all(type(name) is str for name in names):
            return set(names)
    raise damaged()


def _text(arguments: tuple[Any, ...]) -> str:
    match arguments:
        case (str(kind),):
            return kind
        case (str(kind), int(index)):
            return f"{kind}:{index}"
    raise damaged()


def _size(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    match arguments:
        case (tuple() | list() as sizes,) if _sizes(tuple(sizes)):
            return tuple(sizes)
    raise damaged()


def _tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments:
        case (_Storage() as storage, int(offset), tuple() as shape, tuple() as strides, *_):
            if not _sizes(shape) or not _sizes(strides) or len(shape) != len(strides) or offset < 0:
                raise damaged()
            count = math.prod(shape)
            if count > storage.count or (count and offset + _reach(shape, strides) >= storage.count):
                raise Malformed(
                    f"has a tensor {shape} that lies beyond the {storage.count:,} numbers it views"
                )
            return StoredTensor(storage.dtype, storage.item_bytes, storage.data, offset, shape, strides)
    raise damaged()


def _parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    match arguments:
        case (StoredTensor() as tensor, bool(), dict()):
            return tensor
    raise damaged()


def _storage(arguments: tuple[Any, ...]) -> _Storage:
    """A storage from the bytes of torch.save's older format: five small pickles, then the elements."""
    match arguments:
        case (memoryview() as data,):
            return _read_storage(data)
    raise damaged()


def _read_storage(data: memoryview) -> _Storage:
    at, parts = 0, []
    for _ in range(5):
        try:
            part, at = read_pickle(
                data, "", _KNOWN_OF_STORAGES, start=at, persistent=_persistent_storage, limit=200
            )
        except NotWeights as error:
            raise Malformed(f"has a storage that {str(error).removeprefix(': ')}") from None
        parts.append(part)
    match parts:
        case [magic, protocol, {"little_endian": True}, _Storage() as stored, [str(key)]] if (
            magic,
            protocol,
            key,
        ) == (_TORCH_MAGIC, _TORCH_PROTOCOL, stored.key):
            elements = data[at + 8 :]
            if bytes(data[at : at + 8]) != struct.pack("<Q", stored.count) or (
                len(elements) != stored.count * stored.item_bytes
            ):
                raise Malformed(f"has a storage of {stored.count:,} numbers that is cut off or damaged")
            return _Storage(stored.dtype, stored.item_bytes, key, stored.count, elements)
    raise damaged()


def _persistent_storage(identifier: Any) -> _Storage:
    match identifier:
        case ("storage", Known(name), str(key), str(), int(count), None) if 0 <= count < 2**63:
            dtype, item_bytes = _STORAGES[name.removeprefix("torch.")]
            return _Storage(dtype, item_bytes, key, count)
    raise damaged()


def _numpy_type(arguments: tuple[Any, ...]) -> _NumpyType:
    match arguments:
        case (str(code), *_) if code in _NUMBERS:
            return _NumpyType(code)
        case (str(code), *_):
            raise Malformed(f"has numpy data of type {shown(code)}")
    raise damaged()


def _numpy_scalar(arguments: tuple[Any, ...]) -> Any:
    match arguments:
        case (_NumpyType() as dtype, memoryview() as data):
            return dtype.numbers(data, 1)[0]
    raise damaged()


def _numpy_array(arguments: tuple[Any, ...]) -> NumpyArray:
    """An array of which the state is still to come."""
    match arguments:
        case (Known("numpy.ndarray"), (0,), memoryview()):
            return NumpyArray()
    raise damaged()


_CALLS = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _module,
    ("torch.nn.modules.container", "ModuleDict"): _module_dict,
    ("collections", "OrderedDict"): _ordered,
    ("dnnlib.util", "EasyDict"): _ordered,
    ("builtins", "set"): _set,
    ("__builtin__", "set"): _set,
    ("torch", "device"): _text,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): _numpy_type,
    ("numpy", "ndarray"): None,
    **{(f"numpy.{core}.multiarray", "scalar"): _numpy_scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _numpy_array for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): NumpyArray.of_buffer for core in ("core", "_core")},
}
_KNOWN = {key: Known(".".join(key), call) for key, call in _CALLS.items()}
_KNOWN_OF_STORAGES = {("torch", name): Known(f"torch.{name}") for name in _STORAGES}
