"""State dicts that are malformed or hostile, and options that are missing or wrong: each is one line."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_models import STATE_DICTS, weights_of
from teacher_models import one_thread as one_thread  # fixture
from torch import Tensor

from dsno_cluster import load_teacher
from dsno_cluster.errors import UserError
from dsno_cluster.teachers import teacher_info

WRONG_OPTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no heads": (
        "adm",
        {"num_head_channels": None},
        "num_heads or num_head_channels.*one of: 1, 2, 4, 8, 16, 32",
    ),
    "both heads": ("adm", {"num_heads": 4}, "both are given"),
    "odd heads": ("adm", {"num_head_channels": 5}, "num_head_channels 5 is not one of: 1, 2, 4"),
    "text": ("adm", {"num_head_channels": "8"}, "num_head_channels 8 is not one of|num_head_channels '8'"),
    "no order": ("adm", {"new_attention_order": None}, "new_attention_order; .* one of: true, false"),
    "order": ("adm", {"new_attention_order": 1}, "new_attention_order 1 is not one of: true, false"),
    "no betas": ("adm", {"beta_schedule": None}, "beta_schedule; .* one of: linear, cosine"),
    "betas": ("adm", {"beta_schedule": "quadratic"}, "beta_schedule quadratic is not one of: linear, cosine"),
    "family": ("adm", {"family": "adm"}, "family adm is not one of: openai-adm, openai-edm"),
    "variance": ("adm", {"family": "openai-edm"}, "learned variance, so it is openai-adm"),
    "steps": ("adm", {"diffusion_steps": 4000}, "rescale_timesteps; .* one of: true, false"),
    "no steps": ("adm", {"diffusion_steps": 0}, "diffusion_steps 0 is not a whole number"),
    "few steps": ("adm", {"diffusion_steps": 10}, "diffusion_steps 10.* 21 or more"),
    "x0": ("adm", {"predict_xstart": "no"}, "predict_xstart no is not one of"),
    "size": ("adm", {"image_size": 15}, "image_size 15 is not a multiple of 2"),
    "respacing": (
        "adm",
        {"timestep_respacing": "ddim25"},
        "timestep_respacing ddim25 is not one of: ddim, even",
    ),
    "schedule": ("adm", {"schedule": "ddim"}, "schedule 'ddim' is not one of: native, continuous"),
    "unknown": (
        "adm",
        {"attention": "new"},
        "unknown teacher option attention; this kind takes family, num_heads",
    ),
    "no family": ("dit", {"family": None}, "does not say family; .* one of: dit, sit"),
    "other family": ("dit", {"family": "openai-adm"}, "family openai-adm is not one of: dit, sit"),
    "no heads here": ("dit", {"num_heads": None}, "num_heads or num_head_channels.*: 1, 2, 3, 4, 6, 8"),
    "odd heads here": ("dit", {"num_heads": 7}, "num_heads 7 is not one of: 1, 2, 3, 4, 6"),
    "not for it": (
        "dit",
        {"beta_schedule": "linear"},
        "unknown teacher option beta_schedule; this kind takes family",
    ),
    "nor for it": ("sit", {"timestep_respacing": "even"}, "unknown teacher option timestep_respacing"),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_wrong_options_are_one_line(case: str) -> None:
    name, changes, said = WRONG_OPTIONS[case]
    options = {k: v for k, v in (STATE_DICTS[name] | changes).items() if v is not None}
    with pytest.raises(UserError, match=said) as raised:
        teacher_info(str(weights_of(name)), options=options)
    assert "\n" not in str(raised.value) and str(weights_of(name)) in str(raised.value)


class _RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("this must not run",)


def _without(*names: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: {n: x for n, x in tensors.items() if not n.startswith(names)}


def _with(**more: Any) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors | {name.replace("__", "."): value for name, value in more.items()}


BAD: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str]] = {
    "list": ("dit", lambda tensors: list(tensors.values()), "holds list, not tensors by name"),
    "tensor": ("dit", lambda tensors: tensors["pos_embed"], "holds Tensor, not tensors by name"),
    "nothing": ("dit", lambda tensors: {}, "its state dict holds nothing"),
    "numbers": ("dit", _with(step=3), "its state dict holds step, which are no tensors"),
    "nested": ("adm", lambda tensors: {"state_dict": tensors}, "its state dict holds state_dict, which are no"),
    "code": ("adm", _with(step=_RunsCode()), "could run code|more than tensors"),
    "code in an ema": ("dit", lambda tensors: {"ema": _RunsCode()}, "could run code|more than tensors"),
    "another network": ("adm", lambda _: {"fc.weight": torch.zeros(2, 2)}, "not known here .*fc.weight"),
    "classifier": ("adm", _without("output_blocks"), "is a classifier"),
    "upsampler": ("adm", _with(input_blocks__0__0__weight=torch.zeros(32, 6, 3, 3)), "is an upsampler"),
    "channels": ("adm", _with(out__2__weight=torch.zeros(4, 32, 3, 3)), "3 channels in and 4 out"),
    "missing": ("adm", _without("middle_block.0.in_layers.2.bias"), "middle_block.0.in_layers.2.bias is missing"),
    "no output": ("adm", _without("out.2"), "out.2.weight is missing"),
    "no time": ("adm", _without("time_embed.2"), "time_embed.2.weight is missing"),
    "gap": ("adm", _without("input_blocks.2."), "input_blocks.2 is missing"),
    "fewer blocks": ("adm", _without("output_blocks.3."), "not arranged as in these U-Nets"),
    "more": ("adm", _with(extra=torch.zeros(1)), "extra is not of this network"),
    "misshapen": ("adm", _with(label_emb__weight=torch.zeros(6, 5)), r"label_emb.weight has shape \(6, 5\), expected"),
    "flat": ("adm", _with(label_emb__weight=torch.zeros(6)), "label_emb.weight has shape .6,., where 2 axes"),
    "none of it": ("adm", _with(label_emb__weight=torch.zeros(0, 128)), "label_emb.weight has shape .0, 128."),
    "width": ("adm", _with(input_blocks__3__0__in_layers__2__weight=torch.zeros(40, 32, 3, 3)), "40 channels"),
    "first": ("adm", _with(input_blocks__0__0__weight=torch.zeros(64, 3, 3, 3)), "its first convolution has 64"),
    "not finite": ("adm", _with(out__2__bias=torch.full((6,), math.nan)), "out.2.bias holds numbers that are not"),
    "huge number": ("adm", _with(output_blocks__99999999__x=torch.zeros(1)), "output_blocks.4 is missing"),
    "tokens": ("dit", _with(pos_embed=torch.zeros(1, 15, 48)), "15 tokens of 2x2 do not make a square"),
    "no table": ("dit", _without("pos_embed"), "pos_embed is missing"),
    "one label": ("dit", _with(y_embedder__embedding_table__weight=torch.zeros(1, 48)), "has 1 row"),
    "outputs": ("dit", _with(final_layer__linear__weight=torch.zeros(20, 48)), "each token gives 20 numbers"),
    "a block less": ("dit", _without("blocks.0.attn"), "blocks.0.attn.qkv.weight is missing"),
    "a block more": ("dit", _with(blocks__7__x=torch.zeros(1)), "blocks.2 is missing"),
    "repeated": ("dit", lambda tensors: {n: torch.zeros(()).expand(x.shape) for n, x in tensors.items()}, "claim .* bytes in a"),
    "norms of queries": ("sit", _with(blocks__0__attn__q_norm__weight=torch.ones(12)), "q_norm.weight is not of this"),
    "not finite here": ("sit", _with(pos_embed=torch.full((1, 16, 48), math.inf)), "pos_embed holds numbers"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    name, change, said = BAD[case]
    torch.save(change(torch.load(weights_of(name), weights_only=True)), tmp_path / "bad.pt")
    with pytest.raises(UserError, match=said) as raised:
        load_teacher(str(tmp_path / "bad.pt"), options=STATE_DICTS[name])
    assert "\n" not in str(raised.value) and "bad.pt" in str(raised.value)
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("old", [False, True])
def test_files_that_were_cut_off(tmp_path: Path, old: bool) -> None:
    torch.save(
        torch.load(weights_of("dit"), weights_only=True),
        tmp_path / "whole.pt",
        _use_new_zipfile_serialization=not old,
    )
    whole = (tmp_path / "whole.pt").read_bytes()
    for part in (40, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.pt").write_bytes(whole[:part])
        with pytest.raises(UserError, match=r"cut.pt: is (cut off|damaged)") as raised:
            load_teacher(str(tmp_path / "cut.pt"), options=STATE_DICTS["dit"])
        assert "\n" not in str(raised.value)


def test_a_damaged_end(tmp_path: Path) -> None:
    """It says that the zip spans several disks, about which zipfile has an error of its own."""
    data = bytearray(weights_of("dit").read_bytes())
    data[data.rindex(b"PK\x06\x07") + 16] = 2
    (tmp_path / "bad.pt").write_bytes(data)
    with pytest.raises(UserError, match=r"bad\.pt: is cut off"):
        load_teacher(str(tmp_path / "bad.pt"), options=STATE_DICTS["dit"])


def test_code_in_an_older_file_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    magic = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
    (tmp_path / "old.pt").write_bytes(b"\x80\x02\x8a\x0a" + magic + b"." + pickle.dumps(_RunsCode(), 2))
    with pytest.raises(UserError, match=r"old\.pt: ") as raised:
        load_teacher(str(tmp_path / "old.pt"))
    assert "\n" not in str(raised.value) and "must not run" not in capsys.readouterr().out
