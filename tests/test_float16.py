"""Training in float16: the layers in autocast, the rest in float32, and a scaled loss on which all ranks agree."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import STUDENT, checkpoints, ends, link_data, metrics, start_ranks, train, weights

# On one of two ranks the gradient is infinite: neither may move, and both must scale the loss down.
ONE_OVERFLOWS = """
import sys
import torch
from dsno_cluster.config import load_config
from dsno_cluster.training.beginning import new_student
from dsno_cluster.training.deepspeed_internals import fragments_of, loss_scaler_state
from dsno_cluster.training.engine import make_engine
from dsno_cluster.training.ranks import join_ranks

config = load_config("configs/digits.yaml", [*sys.argv[2:], "training.precision=float16"])
ranks = join_ranks(config)
torch.manual_seed(0)
engine = make_engine(new_student(config).accelerate(precision="float16"), config, ranks)
before = {name: f.tensors["master"].clone() for name, f in fragments_of(engine).items()}
noise, labels = torch.randn(8, 1, 8, 8), torch.arange(8)
for step in range(2):
    loss = engine(noise, labels, [0, 1, 2, 3]).square().mean()
    engine.backward(loss * (float("inf") if ranks.rank == 1 else 1.0))
    engine.step()
assert loss_scaler_state(engine)["cur_scale"] == 2.0**15
assert all(torch.equal(f.tensors["master"], before[name]) for name, f in fragments_of(engine).items())
engine.backward(engine(noise, labels, [0, 1, 2, 3]).square().mean())
engine.step()
assert any(not torch.equal(f.tensors["master"], before[name]) for name, f in fragments_of(engine).items())
"""


@pytest.mark.parametrize("stage", ["2", *(pytest.param(x, marks=pytest.mark.slow) for x in ("0", "1", "3"))])
def test_ranks_skip_a_step_together(stage: str, tmp_path: Path) -> None:
    statuses, errors = ends(start_ranks(tmp_path, 2, f"training.zero_stage={stage}", script=ONE_OVERFLOWS))
    assert statuses == [0, 0], errors


@pytest.mark.slow
def test_it_trains_like_float32(tiny_data: Path, tmp_path: Path) -> None:
    train(tiny_data, tmp_path / "half", "training.precision=float16")
    train(tiny_data, tmp_path / "full", "training.precision=float32")
    half, full = (np.array([line["loss"] for line in metrics(tmp_path / name)]) for name in ("half", "full"))
    assert half == pytest.approx(full, rel=0.01) and not np.array_equal(half, full)
    assert all(tensor.dtype == torch.float32 for tensor in weights(tmp_path / "half").values())


@pytest.mark.slow
def test_a_checkpoint_of_deepspeeds_float16_continues(tiny_data: Path, tmp_path: Path) -> None:
    """Its masters are float32 and its scale has the same fields; that of stage 0 lacked one of them."""
    out = link_data(tiny_data, tmp_path / "out")
    train(tiny_data, out, "training.precision=float16", "training.steps=2")
    state_file = out / STUDENT / f"resume/step-{checkpoints(out)[-1]:09d}/state.json"
    state = json.loads(state_file.read_text())
    state |= {
        "zero_stage": 0,
        "loss_scaler": {"cur_scale": 512.0, "cur_iter": 2.0, "last_overflow_iter": -1.0},
    }
    state_file.write_text(json.dumps(state))
    done = train(tiny_data, out, "training.precision=float16")
    assert "steps 2 to 4" in done.stderr
    assert [line["loss_scale"] for line in metrics(out)] == [2.0**16, 2.0**16, 512.0, 512.0]
    assert all(math.isfinite(line["loss"]) for line in metrics(out))


def test_a_scale_that_cannot_fall_further_ends_the_training() -> None:
    from dsno_cluster.errors import WorkError
    from dsno_cluster.training.deepspeed_internals import scale_losses, set_loss_scaler_state

    class Engine:
        class optimizer:
            loss_scaler = None

    scale_losses(Engine)
    set_loss_scaler_state(Engine, {"cur_scale": 1.0, "cur_hysteresis": 1})
    with pytest.raises(WorkError, match="gradients are not finite even if"):
        Engine.optimizer.loss_scaler.update_scale(True)
