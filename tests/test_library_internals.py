"""What is used of DeepSpeed and torch though they do not promise it: a version that has it no longer fails here by name."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

# One rank at every stage, each of which keeps its float32 masters elsewhere: what is found of them must be the weights, and
# a gradient that is not finite must be skipped where the loss is scaled. In other precisions one rank is always of stage 0.
OF_EACH_STAGE = """
import sys
import torch
from tiny import TINY
from dsno_cluster.config import load_config
from dsno_cluster.training.beginning import new_student
from dsno_cluster.training.deepspeed_internals import fragments_of, loss_scaler_state, optimizer_steps, set_optimizer_steps
from dsno_cluster.training.deepspeed_internals import whole_shape
from dsno_cluster.training.engine import make_engine
from dsno_cluster.training.fragments import MASTER, MOMENTS
from dsno_cluster.training.ranks import join_ranks
from dsno_cluster.torch_internals import check_rank_0_answers

for stage in range(4):
    print(f"stage {stage}", file=sys.stderr, flush=True)  # so that a failure names it
    half = "bfloat16" if stage == 0 else "float16"
    config = load_config("configs/digits.yaml", [*TINY, f"training.precision={half}", f"training.zero_stage={stage}"])
    ranks = join_ranks(config)
    student = new_student(config)
    truth = {name: p.detach().clone() for name, p in student.named_parameters()}
    engine = make_engine(student, config, ranks)
    assert engine.zero_optimization_stage() == stage
    found = fragments_of(engine)
    assert found.keys() == truth.keys()
    for name, fragment in found.items():
        assert (fragment.start, fragment.count) == (0, truth[name].numel()), name
        assert fragment.tensors.keys() == {MASTER, *MOMENTS}, name
        master = fragment.tensors[MASTER]
        assert master.dtype == torch.float32, name
        assert torch.equal(master, truth[name].flatten()), name
        assert not any(fragment.tensors[moment].any() for moment in MOMENTS), name
    assert [tuple(whole_shape(p)) for p in engine.module.parameters()] == [tuple(t.shape) for t in truth.values()]
    set_optimizer_steps(engine, 7)
    assert optimizer_steps(engine) == 7
    batch = torch.randn(16, 1, 8, 8), torch.arange(16) % 10, [0, 1, 2, 3]
    engine.backward(engine(*batch).float().square().mean())
    engine.step()
    assert optimizer_steps(engine) == 8
    assert any(fragment.tensors["exp_avg"].any() for fragment in fragments_of(engine).values())
    moved = {name: fragment.tensors[MASTER].clone() for name, fragment in fragments_of(engine).items()}
    scales = []
    while stage and len(scales) < 3:
        engine.backward(engine(*batch).float().square().mean() * (float("inf") if scales else 1e38))
        engine.step()
        assert optimizer_steps(engine) == 8, "an infinite gradient was not skipped"
        assert all(torch.equal(f.tensors[MASTER], moved[name]) for name, f in fragments_of(engine).items())
        scales.append(loss_scaler_state(engine)["cur_scale"])
    assert scales == [2.0**16, 2.0**15, 2.0**14][: len(scales)], scales  # of the first one only its hysteresis falls
    check_rank_0_answers()
"""


def test_masters_and_moments_are_where_deepspeed_keeps_them() -> None:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, 'tests')\n{OF_EACH_STAGE}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"see training/deepspeed_internals.py: {done.stderr[-2000:]}"


def test_the_loss_scaler_has_the_fields_that_are_saved() -> None:
    from dsno_cluster.training.deepspeed_internals import SCALER_FIELDS, import_deepspeed

    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(
        init_scale=2.0**16,
        scale_window=1000,
        min_scale=1.0,
        delayed_shift=2,
        consecutive_hysteresis=False,
    )
    missing = [name for name in SCALER_FIELDS if not hasattr(scaler, name)]
    assert not missing, f"see training/deepspeed_internals.py: no {missing}"


def test_process_groups_are_where_torch_keeps_them() -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from dsno_cluster.torch_internals import abort_groups, set_timeouts

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    another = dist.new_group([0])
    set_timeouts(timedelta(seconds=77))
    device = torch.device("cpu")
    for group in (dist.group.WORLD, another):
        assert group._get_backend(device).options._timeout == timedelta(seconds=77)
    abort_groups()
    assert not dist.is_initialized()


def test_torch_moves_many_tensors_at_once() -> None:
    import torch

    from dsno_cluster.torch_internals import lerp_all

    tensors, ends = [torch.zeros(3), torch.ones(2, 2)], [torch.ones(3), torch.full((2, 2), 5.0)]
    lerp_all(tensors, ends, 0.25)
    assert tensors[0].tolist() == [0.25] * 3 and tensors[1].tolist() == [[2.0] * 2] * 2


def test_attention_dispatches_to_a_kernel_whose_result_is_kept() -> None:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from dsno_cluster.torch_internals import ATTENTION_KERNELS

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ops.append(op)
            return op(*args, **kwargs or {})

    ops: list[Any] = []
    query = torch.randn(2, 4, 16, 8, requires_grad=True)
    with Seen():
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
    assert set(ops) & set(ATTENTION_KERNELS), f"see torch_internals.py: attention is now {ops}"
