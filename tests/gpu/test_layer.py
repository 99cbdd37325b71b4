"""The GPU kernels of illada_kernels.layer on one: numerics, strides, streams, graph capture, no synchronisation."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from illada_kernels import layer
from illada_kernels.ops.layer import BACKENDS
from tests.helpers import layer_calls as checks
from tests.helpers.layer_calls import DTYPES, angles, everything, heads, inputs

REASONS = {b.name: b.available() for b in BACKENDS if b.devices == ("cuda",)}
KERNELS = [
    pytest.param(
        b.module(), id=b.name, marks=pytest.mark.skipif(REASONS[b.name] is not None, reason=str(REASONS[b.name]))
    )
    for b in BACKENDS
    if b.name in REASONS
]
pytestmark = pytest.mark.parametrize("kernels", KERNELS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@dtypes
@pytest.mark.parametrize("dim", [1, 15, 130, 4096, 9001, 28672])
def test_norm_and_swiglu_meet_the_numerics_bar(kernels: ModuleType, dtype: torch.dtype, dim: int) -> None:
    checks.norm_and_swiglu_meet_the_bar(kernels, dtype, dim, "cuda")


@dtypes
@pytest.mark.parametrize("dim", [2, 34, 128, 256])
@pytest.mark.parametrize("shared", [True, False])
def test_rope_meets_the_numerics_bar(kernels: ModuleType, dtype: torch.dtype, dim: int, shared: bool) -> None:
    checks.rope_meets_the_bar(kernels, dtype, dim, shared, ((1, 1), (3, 77), (2, 0)), "cuda")


@dtypes
@pytest.mark.parametrize("start", [start for start in checks.STARTS if start != "beyond"])
@pytest.mark.parametrize("kept", [False, True])
def test_slots_hold_what_torch_writes(kernels: ModuleType, dtype: torch.dtype, start: int | str, kept: bool) -> None:
    checks.slots_hold_what_torch_writes(kernels, dtype, start, kept, 9, "cuda")


def test_of_tokens_that_share_a_slot_the_last_one_is_there(kernels: ModuleType) -> None:
    q, k, v = heads(3, 64, 2, 2, 8, torch.float32, "cuda")
    store = torch.full((2, 3, 5, 2, 8), 7.0, device="cuda")
    start = torch.tensor([50, -90, 1], device="cuda")
    layer.rope_to_cache(q, k, v, *angles(3, 64, 8, "cuda"), *store, start, kernels=kernels)
    values = store[1]
    assert torch.equal(values[0, 4], v[0, -1]) and torch.equal(values[1, 0], v[1, -1])
    assert torch.equal(values[2, 1:4], v[2, :3]) and torch.equal(values[2, 4], v[2, -1])
    assert values[0, :4].eq(7).all() and values[1, 1:].eq(7).all() and values[2, 0].eq(7).all()


@dtypes
def test_equal_rows_get_equal_bits_whatever_lies_beside_them(kernels: ModuleType, dtype: torch.dtype) -> None:
    checks.equal_rows_get_equal_bits(kernels, dtype, 300, 520, "cuda")


@dtypes
def test_extreme_numbers_and_strides(kernels: ModuleType, dtype: torch.dtype) -> None:
    checks.extreme_numbers_give_what_torch_gives(kernels, dtype, "cuda")
    checks.strided_inputs_are_read_where_they_lie(kernels, "cuda")
    checks.each_tensor_has_strides_of_its_own(kernels, "cuda")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("dim", [33, 2048, 14336])
def test_halves_are_rounded_once(kernels: ModuleType, dtype: torch.dtype, dim: int) -> None:
    checks.halves_are_rounded_once(kernels, dtype, dim, "cuda")


def test_a_graph_replays_on_new_data_and_starts(kernels: ModuleType) -> None:
    args, backend = inputs(torch.bfloat16, "cuda"), kernels.__name__.rpartition(".")[2]
    start, store = torch.tensor([0, 2], device="cuda"), torch.zeros(2, 2, 5, 2, 6, dtype=torch.bfloat16, device="cuda")

    def step() -> list[Tensor]:
        _, _, q, k, cos, sin = args
        return [
            *everything(*args, backend=backend),
            layer.rope_to_cache(q, k, k, cos, sin, *store, start, kernels=kernels),
        ]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        step()
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in args:
        x.copy_(torch.randn_like(x))
    start.copy_(torch.tensor([2, 1], device="cuda"))
    store.zero_()
    graph.replay()
    replayed = store.clone()
    store.zero_()
    for got, want in zip(captured, step()):
        assert torch.equal(got, want)
    assert torch.equal(store, replayed)


def test_the_host_waits_for_nothing(kernels: ModuleType) -> None:
    args, backend = inputs(torch.bfloat16, "cuda"), kernels.__name__.rpartition(".")[2]
    everything(*args, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(*args, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.large
def test_more_than_2_to_31_elements(kernels: ModuleType) -> None:
    if torch.cuda.mem_get_info()[0] < 30 << 30:
        pytest.skip("needs 30 GiB of GPU memory")
    x = torch.zeros(2**18 + 3, 2**14, dtype=torch.bfloat16, device="cuda")
    x[-1] = 2.0
    out = layer.rms_norm(x, torch.ones(2**14, dtype=x.dtype, device="cuda"), 0.0, kernels=kernels)
    assert out[-1].eq(1).all()
    del out
    assert layer.swiglu(x, kernels=kernels)[-1].ne(0).all()
