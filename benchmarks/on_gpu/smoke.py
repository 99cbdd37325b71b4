"""Runs every CUDA kernel once on inputs of several tiles, ten seconds an item; later measurements leave out what fails.

    python -m benchmarks.on_gpu.smoke --journal FILE

An item's name is what it shows: "attention forward 128: full". A case that needs what failed (`needs`) is measured
without that backend, so that no time goes to a kernel that hangs, and no wrong one is compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import illada_kernels as ik
from illada_kernels import KeyRanges
from illada_kernels.ops.attention import cases as attention_cases

from ..journal import AGAIN, Journal
from ..measure import WRONG, Case, ContextLost, reason_of
from .variants import variant_of

LIMIT = 10.0
DIMS, ROWS = (64, 96, 128, 256), (16, 32, 64, 128)
Item = tuple[str, Callable[[], None]]


def near(name: str, ours: Tensor, exact: Tensor) -> None:
    error = float((ours.float() - exact).detach().norm() / exact.detach().norm().clamp_min(1e-30))
    if not error <= WRONG:  # also true for NaN
        raise AssertionError(f"{name}: relative error {error:.3g}")


def randn(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# ---- attention ------------------------------------------------------------------------------------------------------
def masks(device: str, queries: int, keys: int) -> dict[str, KeyRanges | None]:
    return {
        "full": None,
        "random": attention_cases.hostile_masks(2, queries, keys, device)["random"],
        "padding": KeyRanges.padding(torch.tensor([keys - 77, 200], device=device), keys),
    }


def attention(direction: str, dim: int, mask: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """Runs forward alone; backward after it, by the deterministic kernels; fused likewise. Keys in the padding hold
    NaN."""
    queries, keys = 300, 450
    q, dout = (randn(2, queries, 4, dim, seed=s, dtype=dtype, device=device) for s in (1, 2))
    k, v = (randn(2, keys, 2, dim, seed=s, dtype=dtype, device=device) for s in (3, 4))
    ranges = masks(device, queries, keys)[mask]
    leaves = [x.detach().clone().float().requires_grad_() for x in (q, k, v)]
    exact, _ = attention_cases.plain(*leaves, ranges, dim**-0.5)
    if mask == "padding" and ranges is not None:
        unseen = ~ranges.dense().any(1)
        k[unseen], v[unseen] = torch.nan, torch.nan
    ours = [x.detach().requires_grad_() for x in (q, k, v)]
    out = ik.attention(*ours, ranges, deterministic=direction != "fused", backend=backend)
    if direction == "forward":
        return near("out", out, exact)
    wanted = torch.autograd.grad(exact, leaves, dout.float())
    for name, mine, right in zip(("dq", "dk", "dv"), torch.autograd.grad(out, ours, dout), wanted):
        near(name, mine, right)


# ---- unmask ---------------------------------------------------------------------------------------------------------
def proposals(rows: int, from_logits: bool, backend: str, device: str, dtype: torch.dtype) -> None:
    """Operands are small integers: logits are exact, and proposals must agree with argmax, the lowest id first."""
    vocab, dim = 9000, 256
    g = torch.Generator().manual_seed(rows)
    hidden = torch.randint(-1, 2, (1, rows, dim), generator=g).to(device, dtype)
    head = torch.randint(-1, 2, (vocab, dim), generator=g).to(device, dtype)
    logits = hidden.float() @ head.float().T
    tokens, positions = torch.full((1, rows), vocab - 1, device=device), torch.arange(rows, device=device)[None]
    options: dict[str, Any] = {"mask_id": vocab - 1, "backend": backend}
    if from_logits:
        got = ik.unmask_from_logits(logits.to(dtype), tokens, positions, ik.TopK(rows), **options)
    else:
        got = ik.unmask(hidden, head, tokens, positions, ik.TopK(rows), **options)
    exact = logits[..., : vocab - 1].to(dtype if from_logits else torch.float32)
    best = (exact == exact.amax(-1, keepdim=True)).int().argmax(-1)
    if not torch.equal(got.proposal, best) or not torch.equal(tokens, best):
        raise AssertionError("proposals or committed tokens differ from argmax")


def truncated(option: str, from_logits: bool, backend: str, device: str, dtype: torch.dtype) -> None:
    """Truncates: each option keeps the largest logits alone, so that with noise too the best id is proposed; and
    Renoise, which accepts the first row alone and redraws the others."""
    rows, vocab, dim = 70, 9000, 256
    g = torch.Generator().manual_seed(rows)
    hidden = torch.randint(-1, 2, (1, rows, dim), generator=g).to(device, dtype)
    head = torch.randint(-1, 2, (vocab, dim), generator=g).to(device, dtype)
    logits = hidden.float() @ head.float().T
    tokens, positions = torch.full((1, rows), vocab, device=device), torch.arange(rows, device=device)[None]
    options: dict[str, Any] = {"mask_id": vocab, "forbid": (), "temperature": 30.0, "backend": backend}
    options |= {"top_k": {"top_k": 1}, "top_p": {"top_p": 1e-9}, "min_p": {"min_p": 1.0}}.get(option, {})
    rule = ik.Renoise(0.0) if option == "renoise" else ik.TopK(rows)
    operands = (logits,) if from_logits else (hidden, head)
    function: Any = ik.unmask_from_logits if from_logits else ik.unmask
    got = function(*operands, tokens, positions, rule, **options)
    if bool((logits.gather(-1, got.proposal[..., None])[..., 0] != logits.amax(-1)).any()):
        raise AssertionError("a proposal is not the best id")
    if int(got.remaining) != (rows - 1 if option == "renoise" else 0) or bool((tokens >= vocab).any()):
        raise AssertionError("other rows were written than those that should be")


def commit(backend: str, device: str) -> None:
    """Commits among many candidates of few ids: the four most confident of each sequence are written."""
    batch, count = 4, 1024
    logits = torch.randn(batch, count, 8, generator=torch.Generator().manual_seed(0)).to(device)
    tokens, positions = (
        torch.full((batch, count), 7, device=device),
        torch.arange(count, device=device).repeat(batch, 1),
    )
    got = ik.unmask_from_logits(logits, tokens, positions, ik.TopK(4), mask_id=7, backend=backend)
    confidence = logits[..., :7].softmax(-1).amax(-1)
    best = confidence.topk(4, -1).indices.sort(-1).values
    if not torch.equal(got.committed.nonzero()[:, 1].view(batch, 4), best) or bool((got.remaining != count - 4).any()):
        raise AssertionError("other candidates than the four most confident were committed")


# ---- masked_loss ----------------------------------------------------------------------------------------------------
def loss(mode: str, backend: str, device: str, dtype: torch.dtype) -> None:
    """Modes by their budgets: all logits at once, chunks of rows, least memory; and without gradients."""
    rows, dim, vocab = 700, 256, 9000
    budgets = {"chunks": 2 * rows * vocab // 3 + 8 * vocab * dim, "minimum": 2 * rows * vocab // 10}
    hidden = randn(rows, dim, seed=1, dtype=dtype, device=device)
    head = randn(vocab, dim, seed=2, dtype=dtype, device=device)
    head = head * dim**-0.5
    targets = torch.arange(rows, device=device) * 11 % vocab
    masked = torch.arange(rows, device=device) % 2 == 0
    hidden[~masked] = torch.nan
    leaves = [hidden[masked].float().requires_grad_(), head.clone().float().requires_grad_()]
    exact = F.cross_entropy(leaves[0] @ leaves[1].T, targets[masked], reduction="sum")
    ours = [x.detach().requires_grad_(mode != "no_grad") for x in (hidden, head)]
    got = ik.masked_loss(*ours, targets, masked, memory_budget=budgets.get(mode), backend=backend)
    near("loss", got, exact)
    if mode == "no_grad":
        return
    d_hidden, d_head = torch.autograd.grad(exact, leaves)
    mine = torch.autograd.grad(got, ours)
    near("d hidden", mine[0][masked], d_hidden)
    near("d head", mine[1], d_head)
    if bool(mine[0][~masked].any()):
        raise AssertionError("d hidden: an unmasked row has a gradient")


# ---- all ------------------------------------------------------------------------------------------------------------
def items(backend: str = "cuda", device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Iterator[Item]:
    """Yields the forward first, since the others need it."""
    for direction in ("forward", "backward", "fused"):
        for dim in DIMS if direction != "fused" else DIMS[:3]:
            for mask in ("full", "random", "padding"):
                yield (
                    f"attention {direction} {dim}: {mask}",
                    partial(attention, direction, dim, mask, backend, device, dtype),
                )
    for rows in ROWS:
        yield f"unmask head {rows}: argmax", partial(proposals, rows, False, backend, device, dtype)
    yield "unmask spans: argmax", partial(proposals, 300, False, backend, device, dtype)
    yield "unmask logits: argmax", partial(proposals, 70, True, backend, device, dtype)
    for option in ("top_k", "top_p", "min_p", "renoise"):
        for source in ("hidden", "logits"):
            kernel = "renoise" if option == "renoise" else "draw" if source == "hidden" else "bounds"
            run = partial(truncated, option, source == "logits", backend, device, dtype)
            yield f"unmask {kernel}: {option} {source}", run
    yield "unmask commit: top 4", partial(commit, backend, device)
    for mode in ("gradients", "chunks", "minimum", "no_grad"):
        yield f"masked_loss {mode}: values", partial(loss, mode, backend, device, dtype)


def needs(case: Case, contender: str) -> list[str]:
    """Returns what smoke must have shown for a backend of ours to be measured in a case; nothing of others than CUDA's,
    nor of variants, which may be right where the extension's kernel is wrong."""
    backend, facts = contender.split()[0], case.facts
    if backend != "cuda" or variant_of(contender):
        return []
    if case.op.startswith("attention"):
        kernels = ["forward", "fused" if " " in contender else "backward"]
        kernels = kernels[:1] if facts["direction"] == "forward" else kernels
        return [f"attention {kernel} {facts['head_dim']}" for kernel in kernels]
    if case.op == "unmask":
        if facts["kind"] == "selection":
            return ["unmask logits", "unmask commit"]
        fitting = [rows for rows in ROWS if facts["rows"] <= rows]
        if facts["kind"] in ("truncated", "renoise"):
            truncated = "unmask draw" if fitting else "unmask bounds"
            return [truncated if facts["kind"] == "truncated" else "unmask renoise", "unmask commit"]
        return [f"unmask head {fitting[0]}" if fitting else "unmask spans", "unmask commit"]
    if case.op == "masked_loss":
        modes = ["no_grad"] if facts["products"] == 1 else ["gradients", *(["minimum"] if facts["minimum"] else [])]
        return [f"masked_loss {mode}" for mode in modes]
    return []


def failures(journal: Journal) -> dict[str, str]:
    """Returns {item: why} of what smoke found wrong, hung or dead."""
    ended = {name: line["error"] for name, line in journal.ended().items() if "error" in line}
    return {name: why for name, why in (ended | journal.avoided()).items() if name.startswith("smoke|")}


def left_out(case: Case, contender: str, failed: dict[str, str]) -> str | None:
    """Returns why a contender of ours is not measured in a case, if smoke says so."""
    for needed in needs(case, contender) if failed else ():
        for item, why in failed.items():
            if item.removeprefix("smoke|").split(":")[0] == needed:
                return f"left out, since smoke failed at {item.removeprefix('smoke|')}: {why}"
    return None


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu.smoke", description=str(__doc__).splitlines()[0])
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--by", default="smoke")
    parser.add_argument("--backend", default="cuda")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    journal, status = Journal(options.journal, options.by), 0
    known = journal.ended().keys() | journal.avoided().keys()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    journal.begin("smoke|the first tensor", 30)  # the driver, and cuBLAS
    torch.ones(64, 64, device=options.device).mm(torch.ones(64, 64, device=options.device)).sum().item()
    journal.end("smoke|the first tensor")
    for name, run in items(options.backend, options.device, dtype):
        if f"smoke|{name}" in known:
            continue
        journal.begin(f"smoke|{name}", LIMIT)
        try:
            run()
            if options.device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:
            status = 1
            try:
                journal.end(f"smoke|{name}", error=reason_of(error, options.device))
            except ContextLost as lost:
                journal.end(f"smoke|{name}", error=str(lost))
                return AGAIN
        else:
            journal.end(f"smoke|{name}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
