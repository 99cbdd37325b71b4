"""`illada bench`: a table of each op against what one would write in PyTorch, on this machine, in a few seconds.

One shape an op. `benchmarks/` measures many shapes against more peers and names the limits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import illada_kernels
from illada_kernels import KeyRanges, TopK

Contender = Callable[[], object]


def table(device: str = "cpu", seconds: float = 1.0) -> str:
    """Returns the table after about 8 * `seconds` of measuring. Times are medians of alternating calls."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    rows = [f"{'op':34}{'ours':>10}{'PyTorch':>10}{'times':>8}   PyTorch is"]
    for name, fallback, ours, theirs in (*_attention(device, dtype), _loss(device, dtype), _unmask(device, dtype)):
        a, b = _alternate(ours, theirs, device, seconds)
        rows.append(f"{name:34}{a * 1e3:>7.2f} ms{b * 1e3:>7.2f} ms{b / a:>7.1f}x   {fallback}")
    return "\n".join(rows)


def _alternate(ours: Contender, theirs: Contender, device: str, seconds: float) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + 2 * seconds
    while len(times[0]) < 4 or time.perf_counter() < end:
        for fn, kept in zip((ours, theirs), times):
            start = time.perf_counter()
            fn()
            if device == "cuda":
                torch.cuda.synchronize()
            kept.append(time.perf_counter() - start)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])  # the first call warms up


def _attention(device: str, dtype: torch.dtype) -> list[tuple[str, str, Contender, Contender]]:
    """Times attention as block-diffusion training has it: [noisy ; clean] of 512 tokens, blocks of 8."""
    length, heads, dim = 512, 4, 64
    qkv = [torch.randn(2, 2 * length, heads, dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(2, 2 * length, heads, dim, device=device, dtype=dtype)
    ranges = KeyRanges.block_diffusion(length, 8, device=device)
    dense = ranges.dense()[:, None]

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=dense).transpose(1, 2)

    def forward(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
        return torch.no_grad()(lambda: attend(*qkv))

    def both(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Contender:
        return lambda: torch.autograd.grad(attend(*qkv), qkv, upstream)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return illada_kernels.attention(q, k, v, ranges)

    what = "SDPA with a dense mask"
    return [
        ("attention, forward", what, forward(ours), forward(sdpa)),
        ("attention, forward and backward", what, both(ours), both(sdpa)),
    ]


def _loss(device: str, dtype: torch.dtype) -> tuple[str, str, Contender, Contender]:
    rows, dim, vocab = 1024, 256, 16384
    hidden = torch.randn(rows, dim, device=device, dtype=dtype, requires_grad=True)
    head = (torch.randn(vocab, dim, device=device, dtype=dtype) * dim**-0.5).requires_grad_()
    targets = torch.randint(vocab, (rows,), device=device)
    masked = torch.rand(rows, device=device) < 0.5
    ignored = torch.where(masked, targets, -100)

    def ours() -> object:
        return torch.autograd.grad(illada_kernels.masked_loss(hidden, head, targets, masked), (hidden, head))

    def theirs() -> object:
        loss = F.cross_entropy((hidden @ head.T).float(), ignored, reduction="sum")
        return torch.autograd.grad(loss, (hidden, head))

    return "masked_loss, forward and backward", "F.cross_entropy over all rows", ours, theirs


def _unmask(device: str, dtype: torch.dtype) -> tuple[str, str, Contender, Contender]:
    """Times a step of LLaDA's sampler at temperature 1 with half the block masked."""
    batch, block, dim, vocab, mask_id = 8, 32, 256, 16384, 0
    hidden = torch.randn(batch, block, dim, device=device, dtype=dtype)
    head = torch.randn(vocab, dim, device=device, dtype=dtype) * dim**-0.5
    start = torch.randint(1, vocab, (batch, block), device=device)
    start[:, ::2] = mask_id
    positions = torch.arange(block, device=device).expand(batch, block).contiguous()

    def ours() -> object:
        tokens = start.clone()
        return illada_kernels.unmask(hidden, head, tokens, positions, TopK(1), mask_id=mask_id, temperature=1.0)

    def theirs() -> object:
        tokens = start.clone()
        logits = (hidden @ head.T).double()
        logits[..., mask_id] = -torch.inf
        proposal = (logits - (-torch.rand_like(logits).log()).log()).argmax(-1)
        confidence = logits.softmax(-1).gather(-1, proposal[..., None])[..., 0]
        confidence = torch.where(tokens == mask_id, confidence, -torch.inf)
        best = confidence.argmax(-1, keepdim=True)
        return tokens.scatter_(1, best, proposal.gather(1, best))

    return "unmask, one sampling step", "LLaDA's sampler, logits of all rows", ours, theirs
