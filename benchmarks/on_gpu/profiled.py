"""Calls of the main kernels at sizes that fill the GPU, for Nsight Compute: `ncu ... -m benchmarks.on_gpu.profiled`."""

from __future__ import annotations

import sys

import torch

import illada_kernels as ik
from illada_kernels.ops.masked_loss import cases


def main() -> int:
    torch.manual_seed(0)
    like = {"device": "cuda", "dtype": torch.bfloat16}
    q, dout = (torch.randn(1, 4096, 32, 128, **like) for _ in range(2))
    k, v = (torch.randn(1, 4096, 8, 128, **like) for _ in range(2))
    for exact in (True, False):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = ik.attention(*leaves, deterministic=exact, backend="cuda")
        torch.autograd.grad(out, leaves, dout)
    head = torch.randn(126464, 4096, **like)
    tokens, positions = torch.full((2, 32), 126463, device="cuda"), torch.arange(32, device="cuda").repeat(2, 1)
    ik.unmask(torch.randn(2, 32, 4096, **like), head, tokens, positions, ik.TopK(4), mask_id=126463, backend="cuda")
    case = cases.Case("profiled", 2048, 1024, 4096, 126464)
    hidden, head, targets, masked, weight = case.inputs(torch.bfloat16, "cuda")
    leaves = [hidden.requires_grad_(), head.requires_grad_()]
    loss = ik.masked_loss(*leaves, targets, masked, weight, backend="cuda")
    torch.autograd.grad(loss, leaves)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
