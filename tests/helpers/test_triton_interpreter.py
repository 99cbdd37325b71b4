"""The interpreter of tests/helpers/triton_interpreter.py: right, watchful, and gone after the block."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import illada_kernels as ik
from illada_kernels._dispatch import Backend

triton = pytest.importorskip("triton", reason="no triton")
tl = pytest.importorskip("triton.language")

from triton.runtime import interpreter  # noqa: E402

from tests.helpers import triton_interpreter  # noqa: E402
from tests.helpers.triton_interpreter import Available, KernelFault, interpreted  # noqa: E402
from tests.helpers.triton_replay import replayed  # noqa: E402

TRITON = Backend("triton", ("cuda",), lambda: SimpleNamespace(available=lambda: "no GPU", supports=lambda _: None))
ROOM = SimpleNamespace(__name__="room", OPERATOR=SimpleNamespace(backends=(TRITON,)))


@triton.jit
def largest(x):
    return tl.max(x, 0)


@triton.jit
def normalised_product(a, b, out, n, SIZE: tl.constexpr, EXTRA: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    inside = (row < n + EXTRA) & (column < n)
    x = tl.load(a + row * n + column, mask=inside)
    y = tl.load(b + row * n + column, mask=inside, other=0.0)
    c = tl.dot(tl.where(inside, x, 0.0).to(b.dtype.element_ty), y)
    c /= largest(tl.abs(c).sum(1)) + tl.zeros([SIZE, SIZE], tl.float32)
    tl.store(out + row * n + column, c, mask=(row < n) & (column < n))


def product(dtype: torch.dtype, n: int, extra: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=g).to(dtype) for _ in range(2))
    out = torch.empty(n, n)
    normalised_product[(1,)](a, b, out, n, SIZE=16, EXTRA=extra)
    right = a.double() @ b.double()
    return out, (right / right.abs().sum(1).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_kernel_with_callees_is_interpreted(dtype: torch.dtype) -> None:
    with interpreted(ROOM):
        out, right = product(dtype, 13)
    torch.testing.assert_close(out.double(), right, rtol=1e-5, atol=1e-6)


def test_bfloat16_rounds_to_nearest_even() -> None:
    from tests.helpers.triton_interpreter import _to_bfloat

    x = torch.cat([torch.randn(1000), torch.tensor([torch.inf, -torch.inf, 0.0, 1 + 2**-8, 1 + 3 * 2**-8])])
    assert torch.equal(torch.from_numpy(_to_bfloat(x.numpy())).view(torch.bfloat16), x.bfloat16())


def test_an_access_outside_of_every_tensor_is_named() -> None:
    with interpreted(ROOM), pytest.raises(KernelFault, match=r"normalised_product, program .*loads outside"):
        product(torch.float32, 13, extra=1)


def test_a_masked_load_without_other_is_not_zero() -> None:
    @triton.jit
    def copy(x, out, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        tl.store(out + i, tl.load(x + i, mask=i < 2))

    x, out = torch.ones(4), torch.empty(4)
    with interpreted(ROOM):
        copy[(1,)](x, out, SIZE=4)
    assert out[:2].eq(1).all() and out[2:].isnan().all()


@triton.jit
def product_of_numbers(out, a, b):
    tl.store(out, a * b)


def test_numbers_that_leave_their_type_are_found_where_wanted() -> None:
    """Also in a block within a block."""
    out = torch.zeros(1, dtype=torch.int64)
    with interpreted(ROOM):
        product_of_numbers[(1,)](out, 2**30, 4)
        assert out == 0
        with interpreted(ROOM, overflow=True), pytest.raises(AssertionError, match="int32 overflow detected"):
            product_of_numbers[(1,)](out, 2**30, 4)


def test_a_number_has_the_type_that_triton_gives_it() -> None:
    """From 2**31 on int64, of which Triton's interpreter keeps 32 bits up to 2**32."""
    out = torch.zeros(1, dtype=torch.int64)
    with interpreted(ROOM):
        product_of_numbers[(1,)](out, 2**32 - 1, 2)
    assert out == 2**33 - 2


def test_a_square_is_not_the_pattern_of_a_product() -> None:
    @triton.jit
    def products(x, y, out):
        i = tl.arange(0, 2)[None, :, None]  # a shape that no other kernel has
        a, b = tl.load(x + i), tl.load(y + i)
        tl.store(out + i, a * a)
        tl.store(out + 2 + i, a * b)

    x, y, out = torch.tensor([2.0, 3.0]), torch.tensor([5.0, 7.0]), torch.empty(4)
    with interpreted(ROOM):
        products[(1,)](x, y, out)
    assert out.tolist() == [4, 9, 10, 21]


@pytest.mark.parametrize("kernels", ["layer", "layer, overflow", "attention", "unmask"])
def test_what_is_done_again_is_what_triton_does(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each operation of the kernels but atomic ones, bit for bit, after its first use."""
    CALLS[kernels](monkeypatch)
    compared: list[str] = []

    def both(member: Callable[..., Any], overflow: bool) -> Callable[..., Any]:
        ours = replayed(member, overflow)

        def call(*args: Any, **kwargs: Any) -> Any:
            result = ours(*args, **kwargs)
            if "_semantic" not in kwargs and "atomic" not in member.__name__:
                same(result, member(*args, **kwargs, _semantic=interpreter.interpreter_semantic))
                compared.append(member.__name__)
            return result

        return call

    monkeypatch.setattr(triton_interpreter, "replayed", both)
    triton_interpreter._members.cache_clear()
    try:
        CALLS[kernels](monkeypatch)
    finally:
        triton_interpreter._members.cache_clear()
    assert len(compared) > 500 and len(set(compared)) > 10


def same(ours: Any, own: Any) -> None:
    assert type(ours) is type(own)
    if isinstance(ours, tuple):
        assert len(ours) == len(own)
        for one, other in zip(ours, own):
            same(one, other)
    elif isinstance(ours, tl.tensor):
        assert vars(ours).keys() == vars(own).keys() and (ours.type, ours.dtype) == (own.type, own.dtype)
        assert ours.shape.values == own.shape.values and ours.numel.value == own.numel.value
        if own.handle is not None:
            a, b = ours.handle.data, own.handle.data
            assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
            assert ours.handle.dtype == ours.type.scalar


def of_layer(_: pytest.MonkeyPatch, overflow: bool = False) -> None:
    from illada_kernels.ops.layer import api, triton
    from tests.helpers import layer_calls

    with interpreted(api, overflow=overflow):
        for dtype in (torch.float32, torch.bfloat16):
            layer_calls.slots_hold_what_torch_writes(Available(triton), dtype, "beyond", True, 2)  # type: ignore[arg-type]
            layer_calls.norm_and_swiglu_meet_the_bar(Available(triton), dtype, 6)  # type: ignore[arg-type]


def of_attention(_: pytest.MonkeyPatch) -> None:
    from illada_kernels.ops.attention import op
    from tests.helpers.attention_oracle import draw, run

    with interpreted(op):
        run("triton", *draw(1, 9, 9, 2, 1, 64, dtype=torch.float16), ranges=ik.KeyRanges.window(9, 1, 2))


def of_unmask(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.helpers.unmask_triton import small_tiles

    with small_tiles(monkeypatch):
        logits, tokens = torch.randn(2, 3, 20), torch.full((2, 3), 19)
        options = {"mask_id": 19, "temperature": 0.7, "top_p": 0.9, "backend": "triton"}
        ik.unmask_from_logits(logits, tokens, torch.arange(3).expand(2, 3), ik.Threshold(0.5), **options)


CALLS = {
    "layer": of_layer,
    "layer, overflow": partial(of_layer, overflow=True),
    "attention": of_attention,
    "unmask": of_unmask,
}


def test_the_backend_takes_cpu_tensors_within_the_block_only() -> None:
    with interpreted(ROOM):
        assert ROOM.OPERATOR.backends[0].reason("cpu", None) is None
    assert ROOM.OPERATOR.backends[0].reason("cpu", None) is not None


def test_afterwards_kernels_still_compile() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    with interpreted(ROOM):
        product(torch.float32, 13)
    signature = {"a": "*fp16", "b": "*fp16", "out": "*fp32", "n": "i32", "SIZE": "constexpr", "EXTRA": "constexpr"}
    source = ASTSource(normalised_product, signature, {"SIZE": 16, "EXTRA": 0})
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32))
    assert "tt.dot" in compiled.asm["ttir"]
    with pytest.raises(Exception):  # noqa: B017  no driver, or tensors on the CPU
        normalised_product[(1,)](torch.empty(1), torch.empty(1), torch.empty(1), 1, SIZE=16, EXTRA=0)
