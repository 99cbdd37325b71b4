"""The Triton kernels of illada_kernels.layer in the interpreter: against torch's operations, with faults planted."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="no triton")

from illada.decoding.cache import Cache

from illada_kernels import KeyRanges, _proven, layer
from illada_kernels.ops.layer import api, cpu
from illada_kernels.ops.layer import triton as package
from illada_kernels.ops.layer.triton import launch, rows
from tests.helpers import layer_calls as checks
from tests.helpers.layer_calls import DTYPES, angles, everything, heads, inputs
from tests.helpers.models import model_of
from tests.helpers.triton_interpreter import Available, KernelFault, interpreted

dtypes = pytest.mark.parametrize("dtype", DTYPES)
K: ModuleType = Available(package)  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tiles, so that small shapes have several: two rows of 32 together, and rows beyond 64 in pieces."""
    for name, size in {"TILE": 64, "BLOCK": 64, "HEADS": 2}.items():
        monkeypatch.setattr(launch, name, size)
    with interpreted(api):
        yield


@dtypes
@pytest.mark.parametrize("dim", [1, 2, 15, 32, 33, 64, 65, 130, 200])
def test_norm_and_swiglu_meet_the_numerics_bar(dtype, dim):
    checks.norm_and_swiglu_meet_the_bar(K, dtype, dim)


@dtypes
@pytest.mark.parametrize("dim", [2, 6, 34, 128])
@pytest.mark.parametrize("shared", [True, False])
def test_rope_meets_the_numerics_bar(dtype, dim, shared):
    checks.rope_meets_the_bar(K, dtype, dim, shared)


@dtypes
@pytest.mark.parametrize("start", checks.STARTS)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("many", [2, 6])
def test_slots_of_the_cache_hold_what_torch_writes_and_nothing_else_is_touched(dtype, start, kept, many):
    checks.slots_hold_what_torch_writes(K, dtype, start, kept, many)


def the_same_slots():
    """Out of order, clamped at both ends, and shared: of these the last token is there."""
    if cpu.available() is not None:
        pytest.skip("no extension")
    q, k, v = heads(6, 4, 2, 2, 8, torch.float32)
    turn = angles(6, 4, 8)
    start = torch.tensor([3, -2, -9, 0, 1, 50])
    for keep in (None, torch.rand(6, 4) < 0.5):
        stores = torch.full((2, 2, 6, 5, 2, 8), 7.0)
        for kernels, store in zip((K, cpu), stores):
            layer.rope_to_cache(q, k, v, *turn, *store, start, keep, kernels=kernels)
        torch.testing.assert_close(*stores, rtol=1e-6, atol=1e-6)
        assert (stores != 7).any()


def test_the_cpu_and_triton_write_the_same_slots():
    the_same_slots()


@dtypes
def test_equal_rows_get_equal_bits_whatever_lies_beside_them(dtype):
    checks.equal_rows_get_equal_bits(K, dtype, 10, 70)


@dtypes
def test_extreme_numbers_give_what_torch_gives_and_stay_in_their_row(dtype):
    checks.extreme_numbers_give_what_torch_gives(K, dtype)


def test_strided_inputs_and_transposed_heads_are_read_where_they_lie():
    checks.strided_inputs_are_read_where_they_lie(K)
    checks.each_tensor_has_strides_of_its_own(K)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("dim", [33, 100])
def test_halves_are_rounded_once(dtype, dim):
    checks.halves_are_rounded_once(K, dtype, dim)


def test_offsets_beyond_2_to_31(tmp_path):
    with interpreted(api, overflow=True):
        checks.offsets_beyond_2_to_31(K, str(tmp_path / "sparse"))


def test_a_row_may_have_more_pieces_than_a_grid_has_places_off_its_first_axis(monkeypatch):
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *a, **options: None

    monkeypatch.setattr(launch, "TILE", 1)
    monkeypatch.setattr(launch.rows, "swiglu_kernel", Kernel())
    layer.swiglu(torch.ones(3, 2 * 70_000), kernels=K)
    assert grids == [(3 * 70_000,)]


def test_no_index_leaves_its_type():
    with interpreted(api, overflow=True):
        checks.norm_and_swiglu_meet_the_bar(K, torch.float32, 70)
        checks.slots_hold_what_torch_writes(K, torch.float32, "beyond", True)


def test_tiles_of_every_length_of_row_are_powers_of_two_that_hold_it(monkeypatch):
    monkeypatch.undo()
    for width in (1, 3, 128, 1000, 1024, 4096, 5000, 8192, 8193, 28672):
        o = launch.norm_options(width)
        assert o["WHOLE"] == (width <= o["BLOCK"]) and 1 <= o["ROWS"] * o["BLOCK"] <= 8192
        assert 2 <= o["ROWS"] * o["BLOCK"] // (32 * o["num_warps"]) <= 16


# ---- who gets them ---------------------------------------------------------------------------------------------------


def test_every_function_goes_through_the_kernels_that_a_pass_is_given(monkeypatch):
    args, ran = inputs(), []
    for name in ("norm", "swiglu", "rope"):
        right = getattr(launch, name)
        monkeypatch.setattr(launch, name, lambda *a, right=right, name=name: ran.append(name) or right(*a))
    ours, expected = everything(*args, backend="triton"), everything(*args, backend="reference")
    assert sorted(ran) == ["norm", "norm", "rope", "rope", "swiglu"]
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=4e-7, atol=4e-7)


@pytest.mark.parametrize("preset", ["SDAR-8B", "Qwen2.5-7B"])
def test_a_model_s_cached_pass_goes_through_the_kernels(preset, monkeypatch):
    """SDAR norms its heads and rounds once; Qwen has grouped heads and biases."""
    model = model_of(preset, dtype=torch.float32)
    tokens, ranges = torch.randint(6, 40, (2, 4)), KeyRanges.full(9)
    start, keep = torch.tensor([5, 1]), torch.tensor([[True] * 4, [True, False, True, True]])

    def run(backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        monkeypatch.setattr("illada.model.kernels_for", partial(layer.kernels_for, backend=backend))
        cache = Cache(model.config, 2, 9)
        with torch.no_grad():
            hidden = model(tokens, ranges, start[:, None] + torch.arange(4), cache.at(start, keep=keep))
        return hidden, cache.keys, cache.values

    launched, right = [], launch.norm
    monkeypatch.setattr(launch, "norm", lambda *a: launched.append(1) or right(*a))
    for ours, theirs in zip(run("triton"), run("reference")):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert len(launched) == 1 + model.config.n_layers * (4 if model.config.qk_norm else 2)


def test_a_gpu_gets_torch_until_its_selftest_has_passed(monkeypatch):
    """Tensors stay on the CPU; the choice sees a GPU's."""

    class OnGpu:
        dtype, is_cpu, requires_grad = torch.float32, False, False
        device = torch.device("cuda", 0)

    monkeypatch.setattr(api, "_torch_alone", lambda tensors: None)
    monkeypatch.setattr(api, "BACKENDS", tuple(b if b.name != "triton" else _on_gpu(b) for b in api.BACKENDS))
    assert layer.kernels_for(OnGpu()) is None
    assert layer.kernels_for(OnGpu(), backend="triton").module is package
    monkeypatch.setattr(_proven, "proven", lambda op, backend: (op, backend) == ("layer", "triton"))
    assert layer.kernels_for(OnGpu()).module is package
    for name in ("reference", "cuda", "cpu"):
        monkeypatch.setenv("ILLADA_BACKEND", name)
        assert layer.kernels_for(OnGpu()) is None
    monkeypatch.setenv("ILLADA_BACKEND", "triton")
    monkeypatch.setattr(_proven, "proven", lambda op, backend: False)
    assert layer.kernels_for(OnGpu()).module is package


def _on_gpu(backend):
    import dataclasses

    return dataclasses.replace(backend, devices=("cuda",))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: torch.ones(2, requires_grad=True), "a gradient is wanted"),
        (lambda: torch.ones(2, dtype=torch.float64), "no kernels for torch.float64"),
        (lambda: torch.ones(2, device="meta"), "runs on cpu, the tensors are on meta"),
    ],
)
def test_what_kernels_cannot_take_is_named_where_they_are_insisted_on(make, message):
    assert layer.kernels_for(make()) is None
    with pytest.raises(RuntimeError, match=message):
        layer.kernels_for(make(), backend="triton")


def test_a_backend_that_there_is_not_is_named():
    with pytest.raises(RuntimeError, match="layer has no 'cuda' backend yet"):
        layer.kernels_for(torch.ones(2), backend="cuda")
    with pytest.raises(ValueError, match=r"expected one of .*reference for layer, got 'tritn'"):
        layer.kernels_for(torch.ones(2), backend="tritn")


# ---- planted faults --------------------------------------------------------------------------------------------------


def bar() -> None:
    for dim in (15, 33, 130):
        checks.norm_and_swiglu_meet_the_bar(K, torch.float16, dim)


def strided() -> None:
    checks.strided_inputs_are_read_where_they_lie(K)


def own_strides() -> None:
    checks.each_tensor_has_strides_of_its_own(K)


def once() -> None:
    checks.halves_are_rounded_once(K, torch.float16, 100)


def turned() -> None:
    checks.rope_meets_the_bar(K, torch.float32, 6, False)


def slots() -> None:
    for start in checks.STARTS:
        for kept in (False, True):
            checks.slots_hold_what_torch_writes(K, torch.float32, start, kept, 5)


FAULTS: dict[str, tuple[Callable[[], None], str, str]] = {
    "rounding twice": (once, "if not IN_FP32:", "if True:"),
    "keys to slots of values": (own_strides, "slot * keys_slot", "slot * values_slot"),
    "heads of keys as those of values": (own_strides, "to, keys_head", "to, values_head"),
    "heads of values as those of keys": (own_strides, "to, values_head", "to, keys_head"),
    "what is not kept": (slots, "kv_heads, pair, half, slot >= 0", "kv_heads, pair, half, slot >= -1"),
    "k as q lies": (own_strides, "b * k_batch + token * k_token", "b * q_batch + token * q_token"),
    "heads of k as those of q": (own_strides, "load_heads(x, k_head", "load_heads(x, q_head"),
    "v as k lies": (own_strides, "b * v_batch + token * v_token", "b * k_batch + token * k_token"),
    "heads of v as those of k": (own_strides, "load_heads(x, v_head", "load_heads(x, k_head"),
    "a token before one that is beyond": (the_same_slots, "raw >= slots - 1", "raw > slots - 1"),
    "tokens before the first slot": (the_same_slots, "(raw < 0) | ", ""),
    "the sum is not rounded": (bar, ".to(v.dtype)\n", "\n"),
    "no rounding before the weight": (bar, "if not IN_FP32:", "if False:"),
    "columns beyond the row": (bar, "keep = exists & (column < width)", "keep = exists & (column <= width)"),
    "a mean over the tile": (bar, "tl.sum(v * v, 1)[:, None] / width", "tl.sum(v * v, 1)[:, None] / BLOCK"),
    "the last piece alone": (bar, "squares += v * v", "squares = v * v"),
    "rows beyond the last": (bar, "exists = row < rows", "exists = row <= rows"),
    "rows of one stride": (strided, "(r // inner).to(tl.int64) * outer_stride + ", ""),
    "the other sign": (turned, "a * cos - b * sin", "a * cos + b * sin"),
    "angles of the first sequence": (turned, "b * angle_batch + token * half", "token * half"),
    "heads beyond the last": (slots, "(head < heads) & (pair < half)", "(head <= heads) & (pair < half)"),
    "tokens that share a slot": (slots, "(overwritten == 0)", "(overwritten < 2)"),
    "slots are not clamped": (slots, "tl.minimum(tl.maximum(raw, 0), slots - 1)", "raw"),
    "keep of another token": (slots, "keep + b * length + token", "keep + b * length + length - 1 - token"),
    "all are kept": (slots, "written & (tl.load(keep", "written | (tl.load(keep"),
    "values are turned": (
        slots,
        "store_heads(v0, v1, to",
        "store_heads(*rotated(v0, v1, c, s), to",
    ),
    "keys to the values' strides": (slots, "b * keys_batch + slot * keys_slot", "b * keys_batch + slot * keys_head"),
    "gate and up are exchanged": (bar, "product = gate / (1.0 + tl.exp2(gate * -LOG2E)) * up", "product = up"),
}


BACKWARDS = "tl.program_id(0)", "(tl.num_programs(0) - 1 - tl.program_id(0))"  # what races shows, too


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, *changes: tuple[str, str]) -> None:
    """Until the test ends the kernels are a copy of rows.py that says `new` for `old`, for each change."""
    text = Path(str(rows.__file__)).read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    copy = folder / "rows.py"
    copy.write_text(text)
    spec = importlib.util.spec_from_file_location(rows.__name__, copy)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, rows.__name__, module)
    monkeypatch.setattr(launch, "rows", module)
    spec.loader.exec_module(module)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch, tmp_path, fault):
    check, old, new = FAULTS[fault]
    plant(monkeypatch, tmp_path, BACKWARDS, (old, new))
    with pytest.raises((AssertionError, KernelFault)):
        check()


def test_the_order_of_programs_changes_nothing(monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, BACKWARDS)
    for check in (bar, strided, own_strides, turned, slots, the_same_slots):
        check()
