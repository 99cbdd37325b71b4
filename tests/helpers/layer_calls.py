"""Inputs of illada_kernels.layer, and what holds for any kernels of it."""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from illada_kernels import layer
from illada_kernels.testing import assert_close, one_precision_up

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def heads(batch: int, length: int, many: int, few: int, dim: int, dtype: torch.dtype, device: str = "cpu"):
    """q, k and v as views of one product, as a layer has them."""
    qkv = torch.randn(batch, length, many + 2 * few, dim).to(device, dtype)
    return qkv.split((many, few, few), dim=2)


def angles(batch: int, length: int, dim: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    angle = (6 * torch.rand(batch, length, 1, dim // 2)).to(device)
    return angle.cos(), angle.sin()


def meets_the_bar(kernels: ModuleType, function, *tensors: Tensor, name: str = "result", **options) -> None:
    exact = function(*(x.to(one_precision_up(x.dtype)) for x in tensors), **options)
    plain, ours = function(*tensors, **options), function(*tensors, **options, kernels=kernels)
    assert_close(ours, plain, exact, 4 * torch.finfo(torch.float32).eps, name)


def normed_sum(x: Tensor, delta: Tensor, weight: Tensor, kernels=None) -> Tensor:
    """The sum is rounded before it is normed, and the norm before its weight."""
    total, out = layer.add_rms_norm(x, delta, weight, 1e-5, kernels=kernels)
    assert torch.equal(total, x + delta) and torch.equal(out, layer.rms_norm(total, weight, 1e-5, kernels=kernels))
    assert torch.equal(out, weight * layer.rms_norm(total, torch.ones_like(weight), 1e-5, kernels=kernels))
    return out


def norm_and_swiglu_meet_the_bar(kernels: ModuleType, dtype: torch.dtype, dim: int, device: str = "cpu") -> None:
    for shape in ((dim,), (3, dim), (2, 1, 5, dim), (0, dim)):
        x, weight = 3 * torch.randn(shape).to(device, dtype), torch.randn(dim).to(device, dtype)
        for in_fp32 in (False, True):
            meets_the_bar(kernels, layer.rms_norm, x, weight, eps=1e-5, in_fp32=in_fp32, name=f"norm {shape}")
        meets_the_bar(kernels, normed_sum, x, x.flip(0), weight, name=f"norm of a sum {shape}")
        meets_the_bar(kernels, layer.swiglu, torch.cat([x, 2 * x.flip(-1)], -1), name=f"swiglu {shape}")


def halves_are_rounded_once(kernels: ModuleType, dtype: torch.dtype, dim: int, device: str = "cpu") -> None:
    """Checks that results are the exact ones rounded: half a unit off, and 1% for float32. Rounding twice is off by
    up to a whole one."""
    x, weight = torch.randn(9, 2 * dim).to(device, dtype), torch.randn(2 * dim).to(device, dtype)
    for function, tensors in ((layer.swiglu, (x,)), (partial(layer.rms_norm, eps=1e-5, in_fp32=True), (x, weight))):
        exact = function(*(t.double() for t in tensors))
        off = (function(*tensors, kernels=kernels).double() - exact).abs()
        assert (off <= 0.505 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).smallest_normal).all()


def rotated_alone(x: Tensor, cos: Tensor, sin: Tensor, kernels=None) -> Tensor:
    return layer.apply_rope(x, x, cos, sin, kernels=kernels)[0]


def rope_meets_the_bar(
    kernels: ModuleType, dtype: torch.dtype, dim: int, shared: bool, sizes=((1, 1), (3, 5), (2, 0)), device="cpu"
) -> None:
    for batch, length in sizes:
        q, k, _ = heads(batch, length, 4, 2, dim, dtype, device)
        cos, sin = angles(1 if shared else batch, length, dim, device)
        for x in (q, k):  # the dtype of cos is that of torch's products
            meets_the_bar(kernels, rotated_alone, x, cos.to(dtype), sin.to(dtype))


STARTS = (0, 2, "each", "beyond")


def slots_hold_what_torch_writes(
    kernels: ModuleType, dtype: torch.dtype, start, kept: bool, many: int = 4, device: str = "cpu"
) -> None:
    """And nothing else is touched: sequences 1 and 2 of 4, slots 0 .. 7 of 9 are the cache."""
    q, k, v = heads(2, 3, many, 2, 6, dtype, device)
    cos, sin = angles(2, 3, 6, device)
    if isinstance(start, str):  # sequence 1 lies beyond: of its tokens the last one is in the last slot
        start = torch.tensor([4, 1] if start == "each" else [0, 9], device=device)
    keep = torch.tensor([[True, False, True], [False, False, True]], device=device) if kept else None
    whole = torch.full((2, 2, 4, 9, 2, 6), 7.0, dtype=dtype, device=device)

    def write(store: Tensor, kernels: ModuleType | None) -> Tensor:
        return layer.rope_to_cache(q, k, v, cos, sin, *store[:, 1, 1:3, :8], start, keep, kernels=kernels)

    ours, theirs = whole.clone(), whole.clone()
    out, expected = write(ours, kernels), write(theirs, None)
    written = (theirs[:, 1] != 7).any(-1)
    assert torch.equal((ours[:, 1] != 7).any(-1), written) and written.sum() == 2 * 2 * (
        3 if kept else 4 if isinstance(start, torch.Tensor) and start[1] == 9 else 6
    )
    assert torch.equal(ours[:, 0], whole[:, 0])
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out, expected, rtol=2 * eps, atol=4 * eps)
    torch.testing.assert_close(ours[0], theirs[0], rtol=2 * eps, atol=4 * eps)
    assert torch.equal(ours[1], theirs[1])  # values are copied


def equal_rows_get_equal_bits(kernels: ModuleType, dtype: torch.dtype, rows: int, dim: int, device="cpu") -> None:
    """Whatever rows lie beside them."""
    x, weight = torch.randn(rows, dim).to(device, dtype), torch.randn(dim).to(device, dtype)
    q, k, _ = heads(rows // 2, 2, 8, 2, 64, dtype, device)
    turn = angles(rows // 2, 2, 64, device)
    norm, product = layer.rms_norm(x, weight, 1e-5, kernels=kernels), layer.swiglu(x, kernels=kernels)
    rotated = layer.apply_rope(q, k, *turn, kernels=kernels)
    for i in (0, rows // 3, rows // 2 - 1):
        assert torch.equal(layer.rms_norm(x[i], weight, 1e-5, kernels=kernels), norm[i])
        assert torch.equal(layer.swiglu(x[i], kernels=kernels), product[i])
        alone = layer.apply_rope(*(t[i : i + 1] for t in (q, k, *turn)), kernels=kernels)
        assert all(torch.equal(a[0], b[i]) for a, b in zip(alone, rotated))


def extreme_numbers_give_what_torch_gives(kernels: ModuleType, dtype: torch.dtype, device: str = "cpu") -> None:
    far = torch.finfo(dtype).max
    gate = torch.tensor([0.0, -0.0, 1e-30, 88.0, -88.0, -104.0, 1e4, -1e4, far, -far, torch.inf, -torch.inf, torch.nan])
    x = torch.cat([gate, torch.ones(13)]).to(device, dtype)
    # exp(88.8) is float32's largest: below -88.8 a gate is 0 instead of at most 88.8 exp(-88.8) = 3e-37
    ours, eps = layer.swiglu(x, kernels=kernels), torch.finfo(dtype).eps
    torch.testing.assert_close(ours, layer.swiglu(x), rtol=4 * eps, atol=1e-36, equal_nan=True)
    rows, weight = torch.ones(3, 20).to(device, dtype), torch.ones(20).to(device, dtype)
    rows[1, 3] = torch.nan
    out = layer.rms_norm(rows, weight, 0.0, kernels=kernels)
    assert out[1].isnan().all() and torch.equal(out[::2], rows[::2])  # a NaN stays in its row
    assert torch.equal(layer.rms_norm(0 * rows[:1], weight, 1e-5, kernels=kernels), 0 * rows[:1])
    if dtype != torch.float16:  # squares that float32 holds as subnormals
        small = torch.linspace(-3e-20, 3e-20, 20).to(device, dtype)
        normed, plain = layer.rms_norm(small, weight, 0.0, kernels=kernels), layer.rms_norm(small, weight, 0.0)
        torch.testing.assert_close(normed, plain, rtol=2 * eps + 1e-5, atol=0)


def strided_inputs_are_read_where_they_lie(kernels: ModuleType, device: str = "cpu") -> None:
    x, ones = torch.randn(40, 6).T.to(device), torch.ones(80, device=device)
    normed = layer.rms_norm(x, ones[::2], 1e-5, kernels=kernels)
    assert torch.equal(normed, layer.rms_norm(x.contiguous(), ones[:40], 1e-5, kernels=kernels))
    assert torch.equal(layer.swiglu(x, kernels=kernels), layer.swiglu(x.contiguous(), kernels=kernels))
    q, k, _ = heads(2, 4, 3, 3, 8, torch.float32, device)
    q_norm = layer.add_rms_norm(q, k[:, :, :1].expand_as(q), ones[:8], 1e-5, kernels=kernels)  # rows of three strides
    for a, b in zip(q_norm, layer.add_rms_norm(q.clone(), k[:, :, :1] + 0 * q, ones[:8], 1e-5, kernels=kernels)):
        assert torch.equal(a, b)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    turn = angles(1, 4, 8, device)
    for a, b in zip(layer.apply_rope(*turned, *turn, kernels=kernels), layer.apply_rope(q, k, *turn, kernels=kernels)):
        assert torch.equal(a, b)


def apart(x: Tensor, by: int, dims: tuple[int, ...] = (0, 1, 2, 3)) -> tuple[Tensor, Tensor]:
    """Returns a tensor of sevens, and x in a part of it with strides of its own: `by` more in every dimension, which
    lie in this order."""
    whole = torch.full([x.shape[d] + by for d in dims], 7.0, dtype=x.dtype, device=x.device)
    part = whole.permute(*(dims.index(d) for d in range(4)))[tuple(slice(size) for size in x.shape)]
    return whole, part.copy_(x)


def each_tensor_has_strides_of_its_own(kernels: ModuleType, device: str = "cpu") -> None:
    q, k, v = (t.clone() for t in heads(3, 4, 5, 3, 8, torch.float32, device))
    turn, start = angles(3, 4, 8, device), torch.tensor([0, 2, 1], device=device)
    keys, values = torch.zeros(2, 3, 6, 3, 8, device=device)
    for order in ((0, 1, 2, 3), (2, 1, 0, 3), (1, 0, 2, 3)):
        parts = [apart(t, by, order if by % 2 else (0, 2, 1, 3)) for by, t in enumerate((q, k, v, keys, values), 1)]
        wanted = [t.clone() for t in (keys, values)]
        out = layer.rope_to_cache(q, k, v, *turn, *wanted, start, kernels=kernels)
        q_, k_, v_, *written = (part for _, part in parts)
        assert torch.equal(layer.rope_to_cache(q_, k_, v_, *turn, *written, start, kernels=kernels), out)
        for (whole, part), want in zip(parts[3:], wanted):
            assert torch.equal(part, want) and (whole == 7).sum() == whole.numel() - part.numel()
        both = layer.apply_rope(q, k, *turn, kernels=kernels)
        for a, b in zip(layer.apply_rope(q_, k_, *turn, kernels=kernels), both):
            assert torch.equal(a, b)


def offsets_beyond_2_to_31(kernels: ModuleType, file: str) -> None:
    """Rows, tokens and heads that lie 2**30 elements apart in a sparse file."""
    far, tokens, few = 2**30, 3, 3
    store = torch.from_file(file, shared=True, size=5 * far, dtype=torch.float16)
    x = store.as_strided((tokens, 16), (far, 1)).copy_(torch.randn(tokens, 16))
    weight = torch.randn(16).half()
    assert torch.equal(
        layer.rms_norm(x, weight, 1e-5, kernels=kernels), layer.rms_norm(x.clone(), weight, 1e-5, kernels=kernels)
    )
    assert torch.equal(layer.swiglu(x, kernels=kernels), layer.swiglu(x.clone(), kernels=kernels))
    for token, head in ((far, 8), (8, far)):
        q, k, v, keys, values = (
            store.as_strided((1, tokens, few, 8), (1, token, head, 1), 256 * i).copy_(torch.randn(1, tokens, few, 8))
            for i in range(5)
        )
        near = [t.clone() for t in (q, k, v, keys, values)]
        turn = angles(1, tokens, 8)
        out = layer.rope_to_cache(q, k, v, *turn, keys, values, 0, kernels=kernels)
        assert torch.equal(layer.rope_to_cache(*near[:3], *turn, *near[3:], 0, kernels=kernels), out)
        assert torch.equal(keys, near[3]) and torch.equal(values, near[4])


def everything(x, weight, q, k, cos, sin, backend=None):
    """Every function once, with what `kernels_for` says."""
    kernels = layer.kernels_for(x, weight, q, k, backend=backend)
    keys, values = torch.zeros(2, 2, 5, 2, 6, dtype=q.dtype, device=q.device)
    rotated = layer.rope_to_cache(q, k, k, cos, sin, keys, values, 1, kernels=kernels)
    norms = layer.rms_norm(x, weight, 1e-5, kernels=kernels), *layer.add_rms_norm(x, x, weight, 1e-5, kernels=kernels)
    both = layer.apply_rope(q, k, cos, sin, kernels=kernels)
    return *norms, layer.swiglu(x, kernels=kernels), *both, rotated, keys, values


def inputs(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, ...]:
    """Of `everything`."""
    q, k, _ = heads(2, 3, 4, 2, 6, dtype, device)
    x, weight = torch.randn(2, 3, 20).to(device, dtype), torch.rand(20).to(device, dtype)
    return x, weight, q, k, *angles(1, 3, 6, device)
