"""`doctor --selftest` for one op, backend and device: small hostile inputs, checked against the reference backend.

Real numbers are compared with the reference in float64 on the same values, by the tolerances of testing.py. Tokens must
be equal: logits are small integers, exact in every dtype, so that ties are many and the rule for them is tested too.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import _proven
from ._probe import attempt
from .ops import OPS
from .testing import (
    assert_close,
    attention_lse_tolerance,
    attention_sums,
    masked_loss_rounding,
    unmask_confidence_tolerance,
)

Case = tuple[str, Callable[[], None]]


def same(name: str, ours: Tensor, ref: Tensor) -> None:
    if not torch.equal(ours, ref):
        where = (ours != ref).nonzero()[0].tolist() if ours.shape == ref.shape else "shape"
        raise AssertionError(f"{name}: differs from the reference first at {where}")


def randn(*shape: int, seed: int, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


# ---- attention ------------------------------------------------------------------------------------------------------


def attention_case(ranges: Any, dim: int, dtype: torch.dtype, backend: str, device: str) -> None:
    """Checks grouped heads, strided inputs, NaN in every key that no row may see, gradients through out and lse,
    twice."""
    from . import attention
    from .ops.attention import cases

    allowed = ranges.dense()  # (B or 1, Sq or 1, Sk)
    batch, rows, keys = 2, ranges.bounds.shape[1] if ranges.bounds.shape[1] > 1 else 37, ranges.num_keys
    q = randn(batch, 4, rows, dim, seed=1, device=device).to(dtype).transpose(1, 2)
    k, v = (randn(batch, keys, 3, dim, seed=s, device=device).to(dtype)[:, :, :2] for s in (2, 3))
    dout = randn(batch, rows, 4, dim, seed=4, device=device).to(dtype)
    dlse = randn(batch, 4, rows, seed=5, device=device)
    seen = allowed.any(1)[..., None, None]  # (B or 1, Sk, 1, 1)
    (k0, v0), poisoned = [torch.where(seen, x, 0) for x in (k, v)], [torch.where(seen, x, torch.nan) for x in (k, v)]

    def run(function: Callable[..., tuple[Tensor, Tensor]], to: torch.dtype, *inputs: Tensor) -> list[Tensor]:
        leaves = [x.detach().to(to).requires_grad_() for x in inputs]
        out, lse = function(*leaves)
        weights = dout.to(out.dtype), torch.where(lse.isinf(), 0, dlse).to(lse.dtype)
        grads = torch.autograd.grad((out, lse), leaves, weights)
        return [out.detach(), torch.where(lse.isinf(), 0, lse).detach(), *grads]

    def op(name: str, deterministic: bool = True) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda q, k, v: attention(q, k, v, ranges, deterministic=deterministic, return_lse=True, backend=name)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return cases.plain(q, k, v, ranges, scale)

    scale = dim**-0.5
    got, simple = run(op(backend), dtype, q, *poisoned), run(plain, dtype, q, k0, v0)
    exact = run(op("reference"), torch.float64, q, k0, v0)
    extra = attention_sums(q.double(), k0.double(), v0.double(), dout.double(), ranges, scale, dtype)
    lse_limit = attention_lse_tolerance(q, k0, scale, exact[1])
    for mode, results in (
        ("", got),
        (", deterministic=False", run(op(backend, deterministic=False), dtype, q, *poisoned)),
    ):
        for name, mine, plainly, ref in zip(("out", "lse", "dq", "dk", "dv"), results, simple, exact):
            if name == "lse":
                assert_close(mine, ref, ref, lse_limit, name + mode)  # plain torch keeps it in `dtype`
            else:
                assert_close(mine, plainly, ref, extra[name], name + mode)
    for name, first, second in zip(("out", "lse", "dq", "dk", "dv"), got, run(op(backend), dtype, q, *poisoned)):
        same(f"{name}, second run", second, first)


def attention(backend: str, device: str) -> Iterator[Case]:
    from . import KeyRanges

    lengths = torch.tensor([0, 61], device=device)
    masks = {
        "left padding, one sequence empty": KeyRanges.padding(lengths, 77, side="left"),
        "block diffusion": KeyRanges.block_diffusion(40, 16, device=device),
        "causal": KeyRanges.causal(131, device=device),
    }
    for dtype in halves(device):
        for dim in (64, 128):
            for name, ranges in masks.items():
                yield f"{name}, head_dim {dim}, {dtype}", partial(attention_case, ranges, dim, dtype, backend, device)


def halves(device: str) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.bfloat16)


# ---- masked_loss ----------------------------------------------------------------------------------------------------


def loss_inputs(device: str, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """Targets out of range wherever they must not be read, weights up to 1000."""
    draw = torch.Generator().manual_seed(6)
    masked = torch.rand(3, 47, generator=draw) < fraction
    targets = torch.where(masked, torch.randint(0, 1003, (3, 47), generator=draw), -100)
    weight = 1000 ** torch.rand(3, 47, generator=draw)
    return targets.to(device), masked.to(device), weight.to(device)


LOSS_OPTIONS: dict[str, dict[str, Any]] = {
    "sum": {},
    "mean, every term": {"reduction": "mean", "softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.01},
    "no reduction, a capacity": {"reduction": "none", "max_masked": 140},
    "least memory": {"memory_budget": 1, "label_smoothing": 0.1},
}


def loss_case(
    fraction: float, options: dict[str, Any], from_logits: bool, dtype: torch.dtype, backend: str, device: str
) -> None:
    from . import masked_loss, masked_loss_from_logits
    from .ops.masked_loss import cases

    targets, masked, weight = loss_inputs(device, fraction)
    hidden, head = randn(3, 47, 64, seed=7, device=device), randn(1003, 64, seed=8, device=device) / 4
    bias = randn(1003, seed=9, device=device).to(dtype)
    poison = torch.where(masked[..., None], 0, torch.nan)  # hidden rows or logits that must not be read
    leaves = [hidden @ head.T + poison] if from_logits else [hidden + poison, head, bias]
    leaves = [x.to(dtype) for x in leaves]
    upstream = torch.where(masked, randn(3, 47, seed=10, device=device), 0)
    options = {name: value for name, value in options.items() if not (from_logits and name == "memory_budget")}

    def run(to: torch.dtype, function: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [x.to(to).requires_grad_() for x in leaves]
        loss = function(*inputs)
        return [loss.detach(), *torch.autograd.grad((loss * (upstream if loss.dim() else -1.7)).sum(), inputs)]

    def op(name: str) -> Callable[..., Tensor]:
        keywords = {"forbid": (3,), "backend": name, **options}
        if from_logits:
            return lambda x: masked_loss_from_logits(x, targets, masked, weight, **keywords)
        return lambda h, w, b: masked_loss(h, w, targets, masked, weight, head_bias=b, **keywords)

    def plain(*x: Tensor) -> Tensor:
        terms = {name: value for name, value in options.items() if name not in ("max_masked", "memory_budget")}
        if from_logits:
            return cases.plain_from_logits(x[0][masked], targets, masked, weight, forbid=(3,), **terms)
        return cases.plain(x[0], x[1], targets, masked, weight, x[2], forbid=(3,), **terms)

    targets[targets == 3] = 4
    names = ("loss", "dlogits") if from_logits else ("loss", "dhidden", "dhead", "dbias")
    scale = torch.where(masked, weight, 0) * (upstream if options.get("reduction") == "none" else 1.7)
    kept = dtype if device == "cuda" and not from_logits else torch.float32
    got, exact = run(dtype, op(backend)), run(torch.float64, op("reference"))
    extra = masked_loss_rounding(exact[0], scale, float((hidden @ head.T).detach().abs().max()), hidden, head, kept)
    for name, mine, simple, ref in zip(names, got, run(dtype, plain), exact):
        assert_close(mine, simple, ref, extra[name], name)
    for name, first, second in zip(names, got, run(dtype, op(backend))):
        same(f"{name}, second run", second, first)


def masked_loss(backend: str, device: str, from_logits: bool = False) -> Iterator[Case]:
    for dtype in (*halves(device), torch.float32)[:3]:
        for fraction in (0.0, 0.15, 1.0):
            for name, options in LOSS_OPTIONS.items() if fraction == 0.15 else (("sum", {}),):
                run = partial(loss_case, fraction, options, from_logits, dtype, backend, device)
                yield f"{fraction:.0%} masked, {name}, {dtype}", run


# ---- unmask ---------------------------------------------------------------------------------------------------------


def unmask_case(
    rule: Any,
    options: dict[str, Any],
    from_logits: bool,
    dtype: torch.dtype,
    backend: str,
    device: str,
    count: int = 21,
) -> None:
    from . import unmask, unmask_from_logits

    draw = torch.Generator().manual_seed(9)
    batch, dim, vocab, length, mask_id = 3, 16, 517, count + 19, 516
    hidden = torch.randint(-2, 3, (batch, count, dim), generator=draw)
    head = torch.randint(-2, 3, (vocab, dim), generator=draw)
    positions = torch.stack([torch.randperm(length, generator=draw)[:count] for _ in range(batch)])
    positions[:, ::7] = -1  # no candidate there
    tokens = torch.where(torch.rand(batch, length, generator=draw) < 0.7, mask_id, 5)
    rows = hidden.to(dtype)
    if from_logits:
        rows = (hidden @ head.T).to(dtype)
    rows[1, 2] = torch.nan  # never commits

    def run(name: str) -> list[Tensor]:
        written, there = tokens.to(device, copy=True), positions.to(device)
        keywords = dict(options, mask_id=mask_id, backend=name)
        if from_logits:
            result = unmask_from_logits(rows.to(device), written, there, rule, **keywords)
        else:
            result = unmask(rows.to(device), head.to(device, dtype), written, there, rule, **keywords)
        return [written, result.proposal, result.committed, result.remaining, result.confidence]

    got, ref = run(backend), run("reference")
    for name, mine, theirs in zip(("tokens", "proposal", "committed", "remaining"), got, ref):
        same(name, mine, theirs)
    finite = ref[4].isfinite()
    same("confidence, infinite entries", got[4][~finite], ref[4][~finite])
    rtol, atol = unmask_confidence_tolerance(options.get("confidence", "probability"), vocab)
    if not bool(((got[4] - ref[4])[finite].abs() <= rtol * ref[4][finite].abs() + atol).all()):
        raise AssertionError("confidence: differs by more than the rounding of its sum")
    same("tokens, second run", run(backend)[0], got[0])


def unmask(backend: str, device: str, from_logits: bool = False) -> Iterator[Case]:
    from . import EntropyBound, Factor, Renoise, Threshold, TopK

    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "top 3": (TopK(3), {}),
        "top 3, margin, Gumbel noise": (TopK(3), {"confidence": "margin", "temperature": 1.0, "seed": 3, "step": 2}),
        "threshold": (Threshold(0.5), {}),
        "factor": (Factor(1.0), {"confidence_temperature": 0.5}),
        "entropy bound": (EntropyBound(0.3), {}),
        "at least 2, sampled confidence": (Threshold(0.5, 2), {"confidence": "sampled", "temperature": 1.0, "seed": 4}),
        "top 3, perturbed ranks, deferred ids": (TopK(3), {"rank_temperature": 0.5, "defer": tuple(range(0, 516, 3))}),
        "from the left": (Threshold(0.3), {"order": "left"}),
        "truncated draws": (TopK(3), {"temperature": 4.0, "seed": 5, "top_k": 40, "top_p": 0.9, "min_p": 0.01}),
        "draws in one pass": (TopK(3), {"temperature": 4.0, "seed": 7, "top_k": 40, "min_p": 0.01}),
        "renoised": (Renoise(0.3), {"temperature": 1.0, "seed": 6}),
    }
    for dtype in halves(device):
        for name, (rule, options) in cases.items():
            yield f"{name}, {dtype}", partial(unmask_case, rule, options, from_logits, dtype, backend, device)
        many = partial(unmask_case, TopK(3), {}, from_logits, dtype, backend, device, count=60)
        yield f"top 3, 180 rows, {dtype}", many


# ---- layer ----------------------------------------------------------------------------------------------------------


def norm_case(dim: int, in_fp32: bool, dtype: torch.dtype, backend: str, device: str) -> None:
    """Checks the rounded sum, and norms of rows that lie apart, one of NaN among them."""
    from .layer import add_rms_norm, kernels_for, rms_norm

    x, delta = (randn(7, 3, dim, seed=s, device=device).to(dtype).transpose(0, 1) for s in (1, 2))
    weight = randn(dim, seed=3, device=device).to(dtype)
    x[1, 2] = torch.nan
    kernels = kernels_for(x, weight, backend=backend)

    def run() -> list[Tensor]:
        return [y.nan_to_num(7.0) for y in add_rms_norm(x, delta, weight, 1e-6, in_fp32, kernels=kernels)]

    total, out = run()
    summed = x + delta
    same("sum", total, summed.nan_to_num(7.0))
    plain, exact = (
        rms_norm(summed.to(to), weight.to(to), 1e-6, in_fp32).nan_to_num(7.0) for to in (dtype, torch.float64)
    )
    assert_close(out, plain, exact, 4 * torch.finfo(torch.float32).eps, "norm")
    same("norm, second run", run()[1], out)


def rope_case(dim: int, per_sequence: bool, dtype: torch.dtype, backend: str, device: str) -> None:
    """Checks windows clamped at both ends of caches that lie in larger ones. No tensor lies as another does."""
    from .layer import kernels_for, rope_to_cache

    batch, length, slots = 4, 5, 9
    q, k, v = randn(batch, length, 17, dim, seed=1, device=device).to(dtype).split((11, 3, 3), 2)
    k, v = k.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([v, v], -1)[..., :dim]
    angle = randn(batch, length, 1, dim // 2, seed=2, device=device)
    cos, sin = angle.cos(), angle.sin()
    start = torch.tensor([2, -3, 7, -9], device=device) if per_sequence else 3
    keep = torch.arange(batch * length, device=device).view(batch, length) % 3 != 1 if per_sequence else None
    kernels = kernels_for(q, cos, backend=backend)

    def run(to: torch.dtype, kernels: Any) -> list[Tensor]:
        held = [torch.full((batch, slots + 2, 3, dim + more), 3.0, dtype=to, device=device) for more in (16, 32)]
        keys, values = (x[:, 1:-1, :, :dim] for x in held)
        turn = (cos, sin) if kernels else (cos.to(to), sin.to(to))
        out = rope_to_cache(q.to(to), k.to(to), v.to(to), *turn, keys, values, start, keep, kernels=kernels)
        return [out, *held]

    got, exact = run(dtype, kernels), run(torch.float64, None)
    for name, mine, ref in zip(("q", "keys", "values"), got, exact):
        assert_close(mine, ref.to(dtype), ref, 8 * torch.finfo(torch.float32).eps, name)
    same("values", got[2], exact[2].to(dtype))


def swiglu_case(width: int, dtype: torch.dtype, backend: str, device: str) -> None:
    from .layer import kernels_for, swiglu

    x = 4 * randn(5, 4 * width, seed=1, device=device).to(dtype)[:, : 2 * width]
    x[0, :4] = torch.tensor([-104.0, 88.0, -1e4, 1e4], device=device)[: 2 * width]
    out = swiglu(x, kernels=kernels_for(x, backend=backend))
    assert_close(out, swiglu(x), swiglu(x.double()), 8 * torch.finfo(torch.float32).eps, "swiglu")


def layer(backend: str, device: str) -> Iterator[Case]:
    for dtype in (*halves(device), torch.float32)[:3]:
        for dim in (1, 96, 4096, 9001):
            for in_fp32 in (False, True):
                yield f"norm of {dim}, {in_fp32}, {dtype}", partial(norm_case, dim, in_fp32, dtype, backend, device)
        for dim in (2, 96, 128):
            for each in (False, True):
                run = partial(rope_case, dim, each, dtype, backend, device)
                yield f"rope, head_dim {dim}, {'a start each' if each else 'one start'}, {dtype}", run
        for width in (2, 1025, 14336):
            yield f"swiglu of {width}, {dtype}", partial(swiglu_case, width, dtype, backend, device)


def cases(op: str, backend: str, device: str) -> Iterator[Case]:
    """Returns the cases of `op`: those of the function above with its room's name."""
    room = OPS[op]
    return globals()[room](backend, device, **({"from_logits": True} if op != room else {}))


def main(op: str, backend: str, device: str) -> None:
    outcomes = [{"case": name, "error": attempt(run)[1]} for name, run in cases(op, backend, device)]
    passed = all(outcome["error"] is None for outcome in outcomes)
    result: dict[str, Any] = {"passed": passed, "cases": outcomes}
    if device == "cuda" and backend != "reference":
        torch.cuda.synchronize()  # a kernel that faulted must not be remembered as good
        path = _proven.remember(op, backend, passed)
        result["remembered"] = str(path) if passed else None
    print(json.dumps(result))


def each(which: list[tuple[str, ...]], seconds: int) -> None:
    """Runs main for each in a fork, which is killed after `seconds`; {"ended": exit code} follows what it prints."""
    for one in which:
        child = os.fork()
        if child == 0:
            signal.alarm(seconds)
            code = 1
            try:
                error = attempt(partial(main, *one))[1]
                if error is not None:
                    print(json.dumps({"passed": False, "cases": [], "error": error}))
                sys.stdout.flush()
                code = int(error is not None)
            finally:
                os._exit(code)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}), flush=True)


if __name__ == "__main__":
    gc.freeze()  # otherwise the end looks through all of torch
    if sys.argv[1] == "--each":
        each(list(zip(*(iter(sys.argv[3:]),) * 3)), int(sys.argv[2]))
    else:
        main(*sys.argv[1:])
