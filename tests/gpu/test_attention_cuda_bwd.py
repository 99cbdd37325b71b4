"""The Hopper backward of attention on a GPU: numerics, repeatability, poison, graph capture, large offsets.

The forward is the reference's, so that a fault shows on its own side. What is asserted of every backend is in
test_attention.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from illada_kernels import KeyRanges
from illada_kernels._gpu import hopper_reason
from illada_kernels.ops.attention import cases, cuda, reference
from illada_kernels.ops.attention.problem import Problem
from tests.helpers.attention_oracle import HALF, Result, assert_close, draw

reason = "no CUDA GPU" if not torch.cuda.is_available() else hopper_reason()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


def inputs(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [x.cuda() for x in draw(*sizes, dtype=dtype)]


def gradients(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor, ranges: KeyRanges | None) -> Result:
    bounds = None if ranges is None else ranges.bounds
    problem = Problem(q, k, v, bounds, q.shape[3] ** -0.5)
    out, lse = reference.forward(problem)
    return Result(out, lse, *cuda.backward(problem, dout, dlse, out, lse))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("rows, keys", [(1, 1), (65, 129), (1023, 1023), (4096, 4096)])
def test_full_attention_meets_the_numerics_bar(rows: int, keys: int, dim: int, dtype: torch.dtype) -> None:
    args = inputs(1, rows, keys, 4, 2, dim, dtype=dtype)
    assert_close(gradients(*args, None), *args)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_hostile_masks_meet_the_numerics_bar(dim: int) -> None:
    args = inputs(2, 1023, 1100, 4, 2, dim)
    for name, ranges in cases.hostile_masks(2, 1023, 1100, "cuda").items():
        try:
            assert_close(gradients(*args, ranges), *args, ranges)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_same_bits_in_a_thousand_runs(dim: int) -> None:
    args = inputs(2, 1000, 1100, 8, 2, dim)
    ranges = cases.hostile_masks(2, 1000, 1100, "cuda")["random"]
    assert ranges is not None
    q, k, v, dout, dlse = args
    scale = dim**-0.5
    problem = Problem(q, k, v, ranges.bounds, scale)
    out, lse = reference.forward(problem)
    first = cuda.backward(problem, dout, dlse, out, lse)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        again = cuda.backward(problem, dout, dlse, out, lse)
        for a, b in zip(first, again):
            differ += (a.view(torch.int16) != b.view(torch.int16)).sum()
    assert differ.item() == 0


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_poisoned_padding_never_reaches_a_gradient(dim: int) -> None:
    q, k, v, dout, dlse = inputs(4, 300, 700, 4, 2, dim)
    ranges = KeyRanges.padding(torch.tensor([0, 1, 64, 650]), 700, "left").to("cuda")
    bounds = ranges.bounds.expand(4, 300, 4).clone()
    bounds[:, 5::7] = 0
    ranges = KeyRanges(bounds, 700)
    keys, rows = ~ranges.dense().any(1), ~ranges.dense().any(2)
    results = []
    for poison in (0.0, math.nan):
        k[keys], v[keys], q[rows], dout[rows] = poison, poison, poison, poison
        dlse.transpose(1, 2)[rows] = poison
        results.append(gradients(q, k, v, dout, dlse, ranges))
    for name in ("dq", "dk", "dv"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name


def test_a_graph_replays_on_new_data() -> None:
    q, k, v, dout, dlse = inputs(1, 500, 600, 4, 2, 128)
    problem = Problem(q, k, v, None, 0.1)
    out, lse = reference.forward(problem)
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        cuda.backward(problem, dout, dlse, out, lse)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cuda.backward(problem, dout, dlse, out, lse)
    dout.copy_(torch.randn_like(dout))
    graph.replay()
    for got, want in zip(captured, cuda.backward(problem, dout, dlse, out, lse)):
        assert torch.equal(got, want)


@pytest.mark.large
def test_offsets_beyond_2_to_31() -> None:
    """Heads so far apart that the last lies 2**32 elements from the first."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    args = inputs(1, 200, 200, 2, 2, 64)
    far = 2**32
    room = torch.empty(far + 4 * 200 * 64, dtype=torch.bfloat16, device="cuda")
    views = [room.as_strided((1, 200, 2, 64), (0, 64, far, 1), i * 200 * 64).copy_(x) for i, x in enumerate(args[:4])]
    for a, b in zip(vars(gradients(*views, args[4], None)).values(), vars(gradients(*args, None)).values()):
        assert torch.equal(a, b)
