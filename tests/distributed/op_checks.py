"""What every rank checks of illada_kernels.distributed; test_ops.py runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from illada_kernels import (
    Edit,
    EntropyBound,
    Factor,
    KeyRanges,
    Remask,
    Renoise,
    Threshold,
    TopK,
    attention,
    distributed,
    masked_loss,
    unmask,
)
from illada_kernels._dispatch import Backend
from illada_kernels._extension import extension_reason
from illada_kernels.ops.masked_loss import cuda, gpu, op
from illada_kernels.ops.masked_loss.row_kernels import RowKernels
from tests.helpers.masked_loss_calls import ALL, inputs
from tests.helpers.masked_loss_oracle import TorchRows, product_on_cpu
from tests.helpers.ranks import worlds

EPS = torch.finfo(torch.float32).eps
CPU = ["reference"] + ["cpu"] * (extension_reason() is None)


def piece(vocab: int, rank: int, world: int) -> slice:
    """Unequal pieces that begin at odd ids."""
    edges = [0, *(vocab * r // world + r % 2 for r in range(1, world)), vocab]
    return slice(edges[rank], edges[rank + 1])


def raised(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


# ---- masked_loss -----------------------------------------------------------------------------------------------------


def both(
    vocab: int, dtype: torch.dtype, backend: str, bias: bool, upstream: Tensor | None = None, **options: Any
) -> list[tuple[Tensor, Tensor]]:
    """Returns (here, alone) of the loss and the gradients of hidden, head and bias, the last two of this rank's ids."""
    hidden, head, targets, masked, weight = inputs(40, 16, vocab, dtype=dtype)
    targets[targets == 4] = 5
    head_bias = torch.randn(vocab, generator=torch.Generator().manual_seed(1)).to(dtype) if bias else None
    ids = piece(vocab, dist.get_rank(), dist.get_world_size())

    def step(call: Any, *tensors: Tensor | None) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors if x is not None]
        loss = call(*leaves)
        loss.backward(torch.ones_like(loss) if upstream is None else upstream)
        return [loss.detach(), *(x.grad for x in leaves)]

    def alone(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return masked_loss(h, w, targets, masked, weight, head_bias=b, backend=backend, **options)

    def here(h: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        split = {"vocab_start": ids.start, "vocab_size": vocab, "local_bias": b, "backend": backend}
        return distributed.masked_loss(h, w, targets, masked, weight, **split, **options)

    whole = step(alone, hidden, head, head_bias)
    parts = step(here, hidden, head[ids], None if head_bias is None else head_bias[ids])
    return list(zip(parts, [*whole[:2], *(x[ids] for x in whole[2:])]))


def close(pairs: list[tuple[Tensor, Tensor]], ulp: float = 0.0) -> None:
    """Equal up to sums in another order: of float32 logits and exponentials, of at most 300 terms here. `ulp`: of the
    results' dtype, where it is a lower one."""
    for name, (mine, right) in zip(("loss", "dhidden", "dhead", "dbias"), pairs):
        bound = (40 * EPS + ulp) * float(right.abs().max())
        assert (mine - right).abs().max() <= bound, (name, float((mine - right).abs().max()), bound)


def check_loss_and_gradients_are_those_of_one_process() -> None:
    for backend in CPU:
        for options in ({}, ALL, {"reduction": "mean", "label_smoothing": 0.2}, {"z_loss": 0.1, "memory_budget": 1}):
            close(both(300, torch.float32, backend, bias=True, **options))
        close(both(11, torch.float32, backend, bias=False, forbid=(4,), memory_budget=1))
        close(both(300, torch.bfloat16, backend, bias=False), ulp=2.0**-8)


def check_each_row_takes_its_upstream_gradient() -> None:
    upstream = torch.randn(40)
    for backend in CPU:
        for budget in (None, 1):
            close(both(300, torch.float32, backend, True, upstream, reduction="none", memory_budget=budget))


def check_the_loss_has_the_same_bits_on_every_rank() -> None:
    for backend in CPU:
        loss = both(300, torch.float32, backend, bias=True)[0][0]
        every = [torch.empty_like(loss) for _ in range(dist.get_world_size())]
        dist.all_gather(every, loss)
        assert all(torch.equal(x, loss) for x in every)


def check_loss_without_gradients_and_without_masked_rows() -> None:
    hidden, head, targets, masked, weight = inputs(40, 16, 300, dtype=torch.float32)
    ids = piece(300, dist.get_rank(), dist.get_world_size())
    split = {"vocab_start": ids.start, "vocab_size": 300}
    for backend in CPU:
        for some in (masked, torch.zeros_like(masked)):
            mine = distributed.masked_loss(hidden, head[ids], targets, some, weight, **split, backend=backend)
            right = masked_loss(hidden, head, targets, some, weight, backend=backend)
            assert (mine - right).abs() <= 20 * EPS * right


def check_a_group_of_some_ranks_shares_the_vocab() -> None:
    """Each pair by itself; a group of one rank has the whole head."""
    world, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group([r, r + 1]) for r in range(0, world, 2)]
    hidden, head, targets, masked, weight = inputs(40, 16, 300, dtype=torch.float32, seed=rank // 2)
    ids = piece(300, rank % 2, 2)
    mine = distributed.masked_loss(
        hidden, head[ids], targets, masked, weight, vocab_start=ids.start, vocab_size=300, group=groups[rank // 2]
    )
    right = masked_loss(hidden, head, targets, masked, weight)
    assert (mine - right).abs() <= 20 * EPS * right


def check_bad_input_is_an_error_on_every_rank() -> None:
    hidden, head, targets, masked, weight = inputs(40, 16, 300, dtype=torch.float32)
    ids = piece(300, dist.get_rank(), dist.get_world_size())
    masked[:] = True

    def call(t: Tensor = targets, **changed: Any) -> Any:
        split = {"vocab_start": ids.start, "vocab_size": 300, **changed}
        return lambda: distributed.masked_loss(hidden, head[ids], t, masked, weight, **split)

    for backend in CPU:
        assert "follow each other from id 0 to vocab_size = 301" in raised(call(vocab_size=301, backend=backend))
        beyond = raised(call(t=targets.clone().index_fill_(0, torch.tensor([3]), 300), backend=backend))
        assert "expected ids in [0, 300) at masked rows, got 300 at row 3" in beyond
    assert "vocab_start: expected an int from 0 to 299, got -1" in raised(call(vocab_start=-1))
    assert "forbid: expected ids in [0, 300), got 300" in raised(call(forbid=(300,)))
    assert "local_head: expected 1 to 2 rows" in raised(call(vocab_start=298))
    assert "group: expected a ProcessGroup that this rank is in" in raised(call(group="world"))


@contextlib.contextmanager
def on_gpu(kernels: RowKernels) -> Iterator[None]:
    """Inside it backend="cuda" runs on the CPU with these row kernels, in small chunks and slices."""
    patch = pytest.MonkeyPatch()
    here = Backend("cuda", ("cpu",), lambda: cuda, opt_in="emulated")
    patch.setattr(op.OPERATOR, "backends", (here, *op.BACKENDS[1:]))
    patch.setattr(cuda, "available", lambda: None)
    patch.setattr(cuda, "KERNELS", kernels)
    patch.setattr(gpu, "product", product_on_cpu)
    for name, value in (("LEAST_CHUNK", 8), ("LEAST_SLICE", 16), ("TILE", 4)):
        patch.setattr(gpu, name, value)
    try:
        yield
    finally:
        patch.undo()


@worlds(2)
def check_the_modes_of_a_gpu() -> None:
    """One chunk, slices and no gradients, with row kernels in plain torch: what they do with ids from any on is tested
    where kernels are."""
    with on_gpu(TorchRows()):
        for options in (ALL, {"reduction": "mean"}, {"memory_budget": 1, "max_masked": 40, **ALL}):
            close(both(60, torch.float32, "cuda", bias=True, **options))
        hidden, head, targets, masked, weight = inputs(40, 16, 60, dtype=torch.float32)
        ids = piece(60, dist.get_rank(), 2)
        split = {"vocab_start": ids.start, "vocab_size": 60, "backend": "cuda"}
        mine = distributed.masked_loss(hidden, head[ids], targets, masked, weight, **split)
        right = masked_loss(hidden, head, targets, masked, weight, backend="cuda")
        assert (mine - right).abs() <= 20 * EPS * right
        assert distributed.masked_loss(hidden, head[ids], targets, masked, weight, max_masked=1, **split).isnan()


# ---- attention ------------------------------------------------------------------------------------------------------


def attention_inputs(dtype: torch.dtype, length: int = 24) -> list[Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = ((2, length, 4, 8), (2, length, 2, 8), (2, length, 2, 8), (2, length, 4, 8))
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def masks(length: int) -> dict[str, KeyRanges | None]:
    return {
        "none": None,
        "full": KeyRanges.full(length),
        "padding": KeyRanges.padding(torch.tensor([length - 7, 5]), length),
        "blocks": KeyRanges.block_causal(length, 4),
        "two ranges": KeyRanges.block_diffusion(length // 2, 4),
        "rows without keys": KeyRanges(torch.zeros(1, length, 4, dtype=torch.int32), length),
    }


def rows_of(ranges: KeyRanges, rows: slice) -> KeyRanges:
    return KeyRanges(ranges.bounds[:, rows] if ranges.bounds.shape[1] > 1 else ranges.bounds, ranges.num_keys)


def ring_against_one(dtype: torch.dtype, ranges: KeyRanges | None, backend: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (here, alone) of this rank's rows of out, dq, dk and dv."""
    *inputs, dout = attention_inputs(dtype)
    share = inputs[0].shape[1] // dist.get_world_size()
    rows = slice(share * dist.get_rank(), share * (dist.get_rank() + 1))
    alone = [x.clone().requires_grad_() for x in inputs]
    right = attention(*alone, ranges, backend=backend)
    right.backward(dout)
    here = [x[:, rows].clone().requires_grad_() for x in inputs]
    mine = distributed.attention(*here, None if ranges is None else rows_of(ranges, rows), backend=backend)
    mine.backward(dout[:, rows])
    yield mine.detach(), right.detach()[:, rows]
    for x, y in zip(here, alone):
        assert x.grad is not None and y.grad is not None
        yield x.grad, y.grad[:, rows]


def check_attention_in_a_ring_is_that_of_one_process() -> None:
    for backend in CPU:
        for name, ranges in masks(24).items():
            for mine, right in ring_against_one(torch.float32, ranges, backend):
                assert (mine - right).abs().max() <= 20 * EPS * max(1.0, float(right.abs().max())), (backend, name)
    # each rank's part is rounded once more
    for mine, right in ring_against_one(torch.bfloat16, masks(24)["blocks"], "reference"):
        assert (mine - right).abs().max() <= 4 * 2.0**-8 * max(1.0, float(right.abs().max()))


def check_poisoned_padding_reaches_no_rank() -> None:
    q, k, v, _ = attention_inputs(torch.float32)
    k[1, 5:], v[1, 5:] = torch.nan, torch.inf
    share = 24 // dist.get_world_size()
    rows = slice(share * dist.get_rank(), share * (dist.get_rank() + 1))
    leaves = [x[:, rows].clone().requires_grad_() for x in (q, k, v)]
    out = distributed.attention(*leaves, KeyRanges.padding(torch.tensor([24, 5]), 24))
    out.sum().backward()
    assert out.isfinite().all() and all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


def check_attention_names_ranges_of_one_rank() -> None:
    q, k, v, _ = attention_inputs(torch.float32, 6)
    said = raised(lambda: distributed.attention(q, k, v, KeyRanges.full(6)))
    assert f"num_keys = {6 * dist.get_world_size()}, the keys of all ranks together, got 6" in said


# ---- unmask ---------------------------------------------------------------------------------------------------------

CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"rule": TopK(2)},
    "noise": {"rule": TopK(3), "temperature": 0.7, "seed": 5, "step": 2, "confidence": "margin"},
    "entropy": {"rule": EntropyBound(2.0), "confidence_temperature": 1.3, "temperature": 1.0},
    "threshold": {"rule": Threshold(0.2), "confidence": "sampled", "temperature": 0.5, "defer": (3,)},
    "neg_entropy": {"rule": Factor(1.0), "confidence": "neg_entropy", "rank_temperature": 0.3},
    "edit": {"rule": TopK(1), "revise": Edit(0.1), "temperature": 0.4},
    "remask": {"rule": TopK(1), "revise": Remask(2), "logit_bias": ([0, 7], [1.5, -2.0]), "forbid": (9, 2)},
    "renoise": {"rule": Renoise(0.5), "temperature": 0.8},
    "top_k": {"rule": TopK(3), "temperature": 2.0, "top_k": 3},
    "top_p": {"rule": TopK(3), "temperature": 1.5, "top_p": 0.6, "seed": 1, "forbid": (9, 2)},
    "min_p": {"rule": Threshold(0.1), "temperature": 1.0, "min_p": 0.2, "logit_bias": ([0, 7], [1.5, -2.0])},
    "all three": {
        "rule": TopK(2),
        "temperature": torch.tensor([1.0, 0.0]),
        "top_k": torch.tensor([5, 2]),
        "top_p": torch.tensor([0.9, 0.1]),
        "min_p": 0.05,
    },
    "nothing truncated": {"rule": TopK(2), "temperature": 1.0, "top_k": torch.tensor([0, 9999]), "top_p": 1.0},
    "renoise top_p": {"rule": Renoise(0.5), "temperature": 0.8, "top_p": 0.5},
    "edit top_k": {"rule": TopK(1), "revise": Edit(0.1), "temperature": 0.7, "top_k": 2},
}


def unmask_both(vocab: int, backend: str, call: dict[str, Any], dtype: torch.dtype = torch.float32) -> list[Any]:
    """Returns ((results, tokens) here, alone)."""
    g = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(2, 6, 16, generator=g).to(dtype)
    head, bias = torch.randn(vocab, 16, generator=g).to(dtype), torch.randn(vocab, generator=g).to(dtype)
    hidden[1, 3] = torch.nan
    tokens = torch.randint(vocab, (2, 9), generator=g)
    positions = torch.stack([torch.randperm(9, generator=g)[:6] for _ in range(2)])
    tokens.scatter_(1, positions[:, :4], vocab)  # masks
    ids = piece(vocab, dist.get_rank(), dist.get_world_size())
    options = {"mask_id": vocab, "forbid": (), **call, "backend": backend}
    rule, found = options.pop("rule"), []
    for over in (True, False):
        written = tokens.clone()
        if over:
            split = {"vocab_start": ids.start, "vocab_size": vocab, "local_bias": bias[ids]}
            results = distributed.unmask(hidden, head[ids], written, positions, rule, **split, **options)
        else:
            results = unmask(hidden, head, written, positions, rule, head_bias=bias, **options)
        found.append((results, written))
    return found


def check_tokens_are_those_of_one_process() -> None:
    for backend in CPU:
        for vocab in (11, 300, 5000):
            for name, call in CALLS.items():
                (mine, written), (right, expected) = unmask_both(vocab, backend, call)
                said = (backend, vocab, name)
                assert torch.equal(written, expected), said
                assert torch.equal(mine.proposal, right.proposal) and torch.equal(mine.committed, right.committed), said
                assert torch.equal(mine.remaining, right.remaining), said
                finite = right.confidence > -torch.inf
                assert torch.equal(finite, mine.confidence > -torch.inf), said
                error = (mine.confidence - right.confidence)[finite].abs()
                assert (error <= 16 * EPS * right.confidence[finite].abs().clamp(min=1)).all(), (said, error)


def check_tokens_of_half_precision_and_pieces_of_whole_segments_have_the_same_bits() -> None:
    """A segment is 2048 ids: then the parts of every sum are the same."""
    if "cpu" not in CPU:
        return
    world = dist.get_world_size()
    start = 2048 * dist.get_rank()
    vocab = 2048 * world - 100
    g = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(1, 40, 32, generator=g).bfloat16(), torch.randn(vocab, 32, generator=g).bfloat16()
    results = []
    for over in (True, False):
        tokens, positions = torch.full((1, 40), vocab), torch.arange(40)[None]
        common: dict[str, Any] = {"mask_id": vocab, "forbid": (), "temperature": 1.0, "backend": "cpu"}
        split = {"vocab_start": start, "vocab_size": vocab}
        if over:
            found = distributed.unmask(
                hidden, head[start : start + 2048], tokens, positions, TopK(20), **split, **common
            )
        else:
            found = unmask(hidden, head, tokens, positions, TopK(20), **common)
        results.append((tokens, *found))
    assert all(torch.equal(x, y) for x, y in zip(*results))
