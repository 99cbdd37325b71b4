"""The interpreter of tests/helpers/triton_interpreter.py: right, watchful, and gone after the block."""

from types import SimpleNamespace

import pytest
import torch

from illada_kernels._dispatch import Backend

triton = pytest.importorskip("triton", reason="no triton")
tl = pytest.importorskip("triton.language")

from tests.helpers.triton_interpreter import KernelFault, interpreted  # noqa: E402

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
