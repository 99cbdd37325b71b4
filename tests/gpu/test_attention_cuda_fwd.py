"""The CUDA forward of attention on a GPU: numerics, caches, graphs with new lengths, streams, large offsets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from illada_kernels import KeyRanges, attention
from illada_kernels._gpu import hopper_reason
from illada_kernels.ops.attention import cases
from illada_kernels.testing import attention_lse_tolerance, tolerance

reason = "no CUDA GPU" if not torch.cuda.is_available() else hopper_reason()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


def draw(batch, rows, keys, heads, kv_heads, dim, dtype=torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator("cuda").manual_seed(rows * 31 + keys)
    shapes = ((rows, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (torch.randn(batch, n, h, dim, generator=g, device="cuda").to(dtype) for n, h in shapes)
    return q, k, v


def ours(q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges | None = None) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, ranges, return_lse=True, backend="cuda")


def assert_right(got: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, ranges: KeyRanges | None = None) -> None:
    scale = q.shape[3] ** -0.5
    exact = cases.plain(q.float(), k.float(), v.float(), ranges, scale)
    same = cases.plain(q, k, v, ranges, scale)
    assert (got[0].float() - exact[0]).abs().max() <= tolerance(same[0], exact[0])
    empty = exact[1] == -torch.inf
    assert torch.equal(got[1] == -torch.inf, empty) and not got[0].transpose(1, 2)[empty].any()
    off = (torch.where(empty, 0, got[1]) - torch.where(empty, 0, exact[1])).abs().max()
    assert off <= attention_lse_tolerance(q, k, scale, exact[1])


@pytest.fixture(autouse=True)
def no_tf32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (7, 1)])
def test_masks_meet_the_bar(dim: int, dtype: torch.dtype, heads: int, kv_heads: int) -> None:
    masks: dict[str, KeyRanges | None] = {
        **cases.hostile_masks(2, 700, 900, "cuda"),
        "window": KeyRanges.window(900, 100, 150, device="cuda")[:, 100:800],
    }
    tensors = draw(2, 700, 900, heads, kv_heads, dim, dtype)
    for ranges in masks.values():
        assert_right(ours(*tensors, ranges), *tensors, ranges)


@pytest.mark.parametrize("rows", [*cases.SIZES, 4097])
def test_sizes_meet_the_bar(rows: int) -> None:
    for keys in (*cases.SIZES, 4097):
        tensors = draw(1, rows, keys, 4, 2, 128)
        assert_right(ours(*tensors), *tensors)


@pytest.mark.parametrize("heads, kv_heads", [(32, 8), (32, 32), (28, 4)])
@pytest.mark.parametrize("batch", [1, 16])
def test_caches_meet_the_bar_and_nan_beyond_their_lengths_stays_there(batch: int, heads: int, kv_heads: int) -> None:
    for rows in (1, 32, 64, 256):
        q, k, v = draw(batch, rows, 4096, heads, kv_heads, 128)
        lengths = torch.linspace(rows, 4096, batch, device="cuda").to(torch.int32)
        ranges = KeyRanges.cached(lengths, rows, 4096)
        beyond = torch.arange(4096, device="cuda") >= lengths[:, None]
        got = ours(q, *(x.masked_fill(beyond[..., None, None], torch.nan) for x in (k, v)), ranges)
        for b in range(batch):
            one = [x[b : b + 1] for x in (q, k, v)]
            assert_right((got[0][b : b + 1], got[1][b : b + 1]), *one, ranges[b : b + 1])


@pytest.mark.parametrize("rows", [32, 700])
def test_a_graph_replays_with_new_lengths(rows: int) -> None:
    q, k, v = draw(4, rows, 2048, 32, 8, 128)
    lengths = torch.full((4,), 800, dtype=torch.int32, device="cuda")

    def step() -> tuple[Tensor, Tensor]:
        return ours(q, k, v, KeyRanges.cached(lengths, rows, 2048))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for new in ([800, 900, 2048, 701], [700, 700, 701, 1000]):
        lengths.copy_(torch.tensor(new))
        graph.replay()
        assert all(map(torch.equal, captured, step()))


def test_same_bits_run_after_run_and_on_another_stream() -> None:
    ranges = KeyRanges.block_diffusion(1024, 32, device="cuda")
    tensors = draw(2, 2048, 2048, 32, 8, 128)
    first = ours(*tensors, ranges)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        others = [ours(*tensors, ranges) for _ in range(20)]
    stream.synchronize()
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.large
def test_more_than_2_to_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of GPU memory")
    keys = (1 << 31) // (128 * 64) + 1000
    q = torch.randn(1, 3, 64, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.zeros(1, keys, 64, 128, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k[:, -200:], v[:, -200:] = torch.randn(2, 1, 200, 64, 128, device="cuda", dtype=torch.bfloat16)
    end = torch.tensor([[[keys - 200, keys, keys, keys]]], dtype=torch.int32, device="cuda")
    assert_right(ours(q, k, v, KeyRanges(end, keys)), q, k[:, -200:], v[:, -200:])
