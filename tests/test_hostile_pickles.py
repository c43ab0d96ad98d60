"""Pickles given as EDM snapshots: hostile, damaged or changed ones are one line each, and nothing of them is run."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edm_files import snapshot_bytes
from hostile_files import loaded_once as loaded_once  # fixtures
from hostile_files import read
from teacher_models import one_thread as one_thread

from dsno_cluster.errors import UserError
from dsno_cluster.persistence_pickle import read_snapshot


def refused(data: bytes, folder: Path, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        read(data, folder)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500 and line.startswith(str(folder / "snapshot.pkl")), line
    assert not (folder / "trap").exists() and not Path("trap").exists()


class Calls:
    """Pickled as the call of a function."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


RECONSTRUCT = named("torch_utils.persistence", "_reconstruct_persistent_obj")
ORDERED = named("collections", "OrderedDict")
SYSTEM = named("os", "system") + text("touch trap") + b"\x85R"
HOSTILE: dict[str, tuple[bytes, str]] = {
    "os.system": (pickle.dumps({"ema": Calls(os.system, ("touch trap",))}), "names (posix|nt).system"),
    "subprocess": (
        pickle.dumps({"ema": Calls(subprocess.Popen, (["touch", "trap"],))}),
        "names subprocess.Popen",
    ),
    "eval": (pickle.dumps({"ema": Calls(eval, ("open('trap', 'w')",))}), "names builtins.eval"),
    "exec": (pickle.dumps({"ema": Calls(exec, ("open('trap', 'w')",))}), "names builtins.exec"),
    "getattr": (b"\x80\x04" + named("builtins", "getattr") + b".", "names builtins.getattr"),
    "protocol 2": (b"\x80\x02cos\nsystem\nX\x0a\x00\x00\x00touch trap\x85R.", "names os.system"),
    "protocol 0": (b"\x80\x04cos\nsystem\n(S'touch trap'\ntR.", "names os.system"),
    "a string of protocol 0": (b"\x80\x04S'touch trap'\n.", "instruction STRING"),
    "a number of protocol 0": (b"\x80\x04I" + b"9" * 100_000 + b"\n.", "instruction INT"),
    "an instance": (b"\x80\x04(X\x0a\x00\x00\x00touch trapios\nsystem\n.", "instruction INST"),
    "an object": (b"\x80\x04(cos\nsystem\nX\x0a\x00\x00\x00touch trapo.", "names os.system"),
    "an extension": (b"\x80\x04\x82\x01.", "instruction EXT1"),
    "a persistent id": (b"\x80\x04" + text("x") + b"Q.", "outside of it"),
    "a persistent id in text": (b"\x80\x04Px\n.", "instruction PERSID"),
    "new with keywords": (b"\x80\x04" + ORDERED + b")}\x92.", "instruction NEWOBJ_EX"),
    "a buffer out of band": (b"\x80\x05\x97.", "instruction NEXT_BUFFER"),
    "an attribute of a known function": (
        b"\x80\x04" + named("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__") + b".",
        r"names torch_utils.persistence._reconstruct_persistent_obj.__globals__",
    ),
    "an attribute of a known module": (
        b"\x80\x04" + named("torch.storage", "io.open") + b".",
        "names torch.storage.io.open",
    ),
    "a name with a line in it": (b"\x80\x04" + named("os\nsystem", "a b") + b".", r"names 'os\\nsystem.a b'"),
    "a name that is a list": (b"\x80\x04]" + text("system") + b"\x93.", "damaged"),
    "a nested call": (b"\x80\x04" + ORDERED + b")R)R.", "calls what is not a function"),
    "a call of a string": (
        b"\x80\x04" + text("os.system") + text("touch trap") + b"\x85R.",
        "calls what is not a function",
    ),
    "a call within a call": (
        b"\x80\x04" + RECONSTRUCT + b"}" + text("state") + SYSTEM + b"s\x85R.",
        "names os.system",
    ),
    "a call of an array type": (b"\x80\x04" + named("numpy", "ndarray") + b")R.", "calls numpy.ndarray"),
    "a class of the torch": (b"\x80\x04" + named("torch", "load") + b".", "names torch.load"),
    "a state for a mapping": (b"\x80\x04" + ORDERED + b")R}b.", "gives a state to a dict"),
    "a state for a function": (b"\x80\x04" + ORDERED + b"}b.", "gives a state to a Known"),
    "a state for a text": (b"\x80\x04" + text("x") + b"}b.", "gives a state to a str"),
    "a state that is a list": (
        b"\x80\x04" + named("torch.nn.modules.container", "ModuleDict") + b")\x81]b.",
        "damaged",
    ),
    "no module": (b"\x80\x04" + RECONSTRUCT + b"}\x85R.", "damaged"),
    "a persistent function": (
        b"\x80\x04" + RECONSTRUCT + b"}(" + text("type") + text("function") + b"u\x85R.",
        "a persistent function, not a class",
    ),
    "bytes beyond the end": (b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.", "cut off"),
    "a text beyond the end": (b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"x.", "cut off"),
    "a frame beyond the end": (b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"N.", "cut off"),
    "a huge number": (b"\x80\x04\x8b" + struct.pack("<i", 2**30) + b"\x01.", "instruction LONG4"),
    "a long number": (b"\x80\x04\x8a\xff" + b"\x01" * 255 + b".", "damaged"),
    "a far memo": (b"\x80\x04Nr\xff\xff\xff\xff.", "is a pickle of NoneType"),
    "no memo": (b"\x80\x04h\x07.", "damaged"),
    "a key that is a list": (b"\x80\x04}]Ns.", "damaged"),
    "a key that is a tuple": (b"\x80\x04})Ns.", "damaged"),
    "a set of tuples": (b"\x80\x04\x8f()\x90.", "damaged"),
    "bytes that are no text": (b"\x80\x04X\x02\x00\x00\x00\xff\xfe.", "damaged"),
    "protocol 9": (b"\x80\x04\x80\x09N.", "damaged"),
    "nothing on the stack": (b"\x80\x04.", "damaged"),
    "too much on the stack": (b"\x80\x04NN.", "damaged"),
    "a mark that stays": (b"\x80\x04(N.", "damaged"),
    "too many instructions": (b"\x80\x04" + b"}" * 1_100_000, "more than 1,000,000"),
    "deep lists": (b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".", "is a pickle of list"),
    "more after the end": (b"\x80\x04}.}.", "2 bytes too many"),
    "an empty mapping": (b"\x80\x04}.", "it holds nothing"),
    "another mapping": (b"\x80\x04}(" + text("G\nema") + b"N" + text("D") + b"Nu.", r"it holds 'G\\nema', D"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_pickle(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data, says = HOSTILE[kind]
    refused(data, tmp_path, says)


class Persistent:
    """A persistent object of a snapshot, as a test changes it."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self.meta = meta

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.meta["state"]
        return state

    def __reduce__(self) -> tuple[Any, ...]:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)

    def __getitem__(self, name: str) -> Any:
        """The child of that dotted name."""
        first, _, rest = name.partition(".")
        child = self.state["_modules"][first]
        if isinstance(child, torch.nn.ModuleDict):
            first, _, rest = rest.partition(".")
            child = child._modules[first]
        return child[rest] if rest else child


@pytest.fixture(name="changed")
def changed_snapshot(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bytes]:
    """A function of a snapshot's name and of a change to it, which gives the bytes of the changed snapshot."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")

    def reconstruct(meta: dict[str, Any]) -> Persistent:
        return Persistent(meta)

    class EasyDict(dict[str, Any]):
        pass

    for module, value, name in (
        (persistence, reconstruct, "_reconstruct_persistent_obj"),
        (util, EasyDict, "EasyDict"),
    ):
        value.__module__, value.__qualname__ = module.__name__, name
        setattr(module, name, value)
        monkeypatch.setitem(sys.modules, module.__name__.partition(".")[0], types.ModuleType("parent"))
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def change(name: str, by: Callable[[dict[str, Any]], object], protocol: int = 4) -> bytes:
        content = pickle.loads(snapshot_bytes(name))  # noqa: S301 - ours
        by(content)
        return pickle.dumps(content, protocol=protocol)

    return change


Changed = Callable[..., bytes]


def _as_of_latents(content: dict[str, Any]) -> None:
    """As EDM2's encoder of latents keeps its scales, and torch some other things of a module."""
    scales = {"scale": np.float32(0.5) / np.float32([4.17, 4.62]), "table": np.arange(6.0).reshape(2, 3)}
    content["encoder"].state.update(
        scales, place=torch.device("cpu"), size=torch.Size([2, 3]), names={"a", "b"}
    )


@pytest.mark.parametrize("name", ["edm2_cond", "ddpmpp_cond"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_other_protocols(protocol: int, name: str, changed: Changed, tmp_path: Path) -> None:
    data = changed(name, _as_of_latents if name == "edm2_cond" else lambda content: None, protocol)
    if protocol == 2:  # has no bytes: Python writes them as a call of a codec
        refused(data, tmp_path, "names _codecs.encode")
    else:
        assert read(data, tmp_path).shape == (3, 8, 8)
    if protocol > 3 and name == "edm2_cond":
        state = read_snapshot(data, "here")["encoder"].state
        assert (state["scale"].shape, state["table"].shape) == ((2,), (2, 3))
        assert state["scale"].numbers == pytest.approx((0.5 / 4.17, 0.5 / 4.62))
        assert state["table"].numbers == (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)
        assert (state["place"], state["size"], state["names"]) == ("cpu", (2, 3), {"a", "b"})


def test_source_text_is_never_run(changed: Changed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def put(content: dict[str, Any]) -> None:
        for part in (content["ema"], content["encoder"], content["ema"]["unet"]):
            part.meta["module_src"] = "import os\nos.system('touch trap')\nraise SystemExit\n"

    read(changed("edm2_cond", put), tmp_path)
    assert not (tmp_path / "trap").exists()


def doubled(kind: Callable[[list[Any]], Any]) -> Any:
    """A structure of 2^60 parts by references to 60."""
    part = kind([])
    for _ in range(60):
        part = kind([part, part])
    return part


def in_unet(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["ema"]["unet"].state["_init_kwargs"].update(values)


def in_song(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["ema"]["model"].state["_init_kwargs"].update(values)


def in_ema(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["ema"].state.update(values)


def _share(content: dict[str, Any]) -> None:
    """Many tensors view the same numbers, and together are larger than the file."""
    large = torch.zeros(200_000)
    for i in range(50):
        content["ema"]["unet.out_conv"].state["_parameters"][f"w{i}"] = large


def _twice(content: dict[str, Any]) -> None:
    unet = content["ema"]["unet"]
    unet.state["_modules"]["other"] = unet["out_conv"]


def _in_itself(content: dict[str, Any]) -> None:
    unet = content["ema"]["unet"]
    unet.state["_modules"]["other"] = unet


def _spread(content: dict[str, Any]) -> None:
    content["ema"]["unet.out_conv"].state["_parameters"]["weight"] = torch.zeros(1).expand(10**6, 10**6)


def _pop(name: str, tensor: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["ema"][name].state["_parameters"].pop(tensor)


def _tensor(name: str, tensor: str, value: torch.Tensor) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["ema"][name].state["_parameters"].update({tensor: value})


def _filter(content: dict[str, Any]) -> None:
    content["ema"]["model.enc.4x4_down.conv0"].state["_buffers"]["resample_filter"] = torch.ones(1, 1, 4, 4)


CHANGED: dict[str, tuple[str, Callable[[dict[str, Any]], object], str]] = {
    "doubled lists": (
        "edm2_cond",
        in_ema(sigma_max=doubled(list)),
        "sigma_max of type list, not a positive number",
    ),
    "doubled tuples": ("edm2_cond", in_unet(channel_mult=doubled(tuple)), "channel_mult.0: "),
    "doubled mappings": (
        "edm2_cond",
        in_unet(clip_act=doubled(lambda parts: dict(enumerate(parts)))),
        "clip_act: ",
    ),
    "doubled modules": (
        "edm2_cond",
        in_ema(_modules=doubled(lambda parts: dict(enumerate(parts)))),
        "damaged",
    ),
    "a module twice": ("edm2_cond", _twice, "a module in two places"),
    "a module in itself": ("edm2_cond", _in_itself, "damaged"),
    "shared numbers": ("edm2_cond", _share, "share their numbers"),
    "spread numbers": ("edm2_cond", _spread, "beyond the 1 numbers"),
    "a name of two lines": ("edm2_cond", _tensor("unet.out_conv", "a\nb", torch.zeros(1)), "damaged"),
    "too many blocks": ("edm2_cond", in_unet(num_blocks=10**9), "num_blocks: "),
    "too many levels": ("edm2_cond", in_unet(channel_mult=[1] * 100), "channel_mult: "),
    "too many channels": ("edm2_cond", in_unet(model_channels=2**20), "has shape .* expected"),
    "far too many channels": ("edm2_cond", in_unet(model_channels=2**70), "model_channels: "),
    "a size that cannot be halved": ("edm2_cond", in_unet(img_resolution=9), "cannot be halved 1 times"),
    "an unknown argument": ("edm2_cond", in_unet(window_size=7), "UNet: window_size: "),
    "an argument of another type": ("edm2_cond", in_unet(img_channels="os.system"), "img_channels: "),
    "arguments that are no mapping": ("edm2_cond", in_ema(_modules=None), "damaged"),
    "an unknown preconditioning": (
        "edm2_cond",
        lambda content: content["ema"].meta.update(class_name="EDMprecond"),
        "'EDMprecond' is no preconditioning that is known here; did it mean EDMPrecond",
    ),
    "an unknown network": (
        "ddpmpp_cond",
        lambda content: content["ema"]["model"].meta.update(class_name="DiT"),
        "'DiT' is no network of EDMPrecond that is known here; known are SongUNet, DhariwalUNet",
    ),
    "no network": ("edm2_cond", in_ema(_modules={}), "Precond has no network"),
    "no snapshot": ("edm2_cond", lambda content: content.pop("ema"), "holds no network `ema`"),
    "a tensor is missing": ("edm2_cond", _pop("unet.out_conv", "weight"), "out_conv.weight is missing"),
    "a tensor too many": (
        "edm2_cond",
        _tensor("unet.out_conv", "bias", torch.zeros(3)),
        "out_conv.bias is not of this network",
    ),
    "a tensor of another shape": (
        "edm2_cond",
        _tensor("unet.out_conv", "weight", torch.zeros(3, 8, 1, 1)),
        r"out_conv.weight has shape \(3, 8, 1, 1\), expected \(3, 8, 3, 3\)",
    ),
    "no number": ("edm2_cond", _tensor("unet", "out_gain", torch.tensor(float("nan"))), "not finite"),
    "a parameter that is no tensor": (
        "edm2_cond",
        lambda content: content["ema"]["unet"].state["_parameters"].update(out_gain=1.0),
        "damaged",
    ),
    "heads that do not divide": (
        "edm2_cond",
        lambda content: content["ema"]["unet.enc.4x4_block0"].state.update(num_heads=7),
        "which 7 heads do not divide",
    ),
    "more channels than groups": ("ddpmpp_cond", in_song(model_channels=7), "make no network|expected"),
    "a block that was changed": (
        "ddpmpp_cond",
        lambda content: content["ema"]["model.enc.8x8_block0"].state.update(skip_scale=1.0),
        "enc.8x8_block0 has skip_scale 1.0, a SongUNet has 0.7071",
    ),
    "another filter": ("ncsnpp_ve", _filter, "resample_filter is not the filter of its settings"),
    "another number of channels": (
        "ddpmpp_cond",
        in_song(out_channels=6),
        "gives 6 channels for images of 3",
    ),
    "no range": ("ncsnpp_ve", in_ema(sigma_min=90), "sigma_min 90.0 and sigma_max 100.0"),
    "a range below 0": ("ncsnpp_ve", in_ema(sigma_max=-1), "sigma_max -1, not a positive number"),
    "no levels": ("adm_iddpm", lambda content: content["ema"].state["_buffers"].clear(), "no levels `u`"),
    "levels that rise": (
        "adm_iddpm",
        lambda content: content["ema"].state["_buffers"].update(u=torch.arange(5.0)),
        "no levels `u` that fall to 0",
    ),
}


@pytest.mark.parametrize("kind", CHANGED)
def test_a_changed_snapshot(kind: str, changed: Changed, tmp_path: Path) -> None:
    name, by, says = CHANGED[kind]
    refused(changed(name, by), tmp_path, says)


def test_a_storage_that_lies_about_its_size(tmp_path: Path) -> None:
    """In the stream of a storage: more numbers than it has, and a type that is none."""
    data = snapshot_bytes("edm2_cond")
    at = data.index(b"HalfStorage")
    count = data.index(b"K", at + 30)
    for spoiled, says in (
        (data.replace(b"HalfStorage", b"HalfStorbge", 1), "has a storage that names torch.HalfStorbge"),
        (data[:count] + b"K\xff" + data[count + 2 :], "cut off or damaged|beyond"),
        (data.replace(b"\xfc\x9cF\xf9", b"\xfc\x9cF\xf8", 1), "damaged"),
        (data.replace(b"little_endianq", b"little_endiamq", 1), "damaged"),
    ):
        assert spoiled != data
        refused(spoiled, tmp_path, says)


@pytest.mark.parametrize("share", [0.0002, 0.02, 0.3, 0.9, 0.999])
def test_a_snapshot_that_is_cut_off(share: float, tmp_path: Path) -> None:
    data = snapshot_bytes("edm2_cond")
    refused(data[: int(share * len(data))], tmp_path, "cut off or damaged")
