"""Named shapes of attention, what each costs, hostile masks, and plain PyTorch: read by tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...key_ranges import KeyRanges


@dataclass(frozen=True)
class Case:
    """One shape and mask. `mask(case, device)` builds the key ranges, or None for full attention."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    mask: Callable[[Case, str], KeyRanges | None] = lambda case, device: None

    def key_ranges(self, device: str) -> KeyRanges | None:
        return self.mask(self, device)

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns random q, k, v and the gradient of out."""
        shapes = [
            (self.queries, self.heads),
            (self.keys, self.kv_heads),
            (self.keys, self.kv_heads),
            (self.queries, self.heads),
        ]
        generator = torch.Generator(device).manual_seed(seed)
        draw = (torch.randn(self.batch, s, h, self.head_dim, generator=generator, device=device) for s, h in shapes)
        q, k, v, dout = (x.to(dtype) for x in draw)
        return q, k, v, dout

    def pairs(self) -> float:
        """Returns how many (batch entry, row, key) triples are allowed."""
        ranges = self.key_ranges("cpu")
        return self.batch * self.queries * self.keys * (1.0 if ranges is None else ranges.density().item())


def flops(case: Case, direction: str = "forward") -> float:
    """Returns what the mathematics needs: two products of head_dim per allowed pair and head forward, five backward."""
    return {"forward": 4, "backward": 10}[direction] * case.pairs() * case.heads * case.head_dim


def bytes(case: Case, dtype: torch.dtype, direction: str = "forward") -> float:
    """Returns what must move: every tensor once. Forward q k v out lse; backward those, dout, and dq dk dv."""
    rows = case.batch * case.queries * case.heads
    columns = case.batch * case.keys * case.kv_heads
    queries, keys = {"forward": (2, 2), "backward": (4, 4)}[direction]  # tensors the size of q, and of k
    return (queries * rows + keys * columns) * case.head_dim * dtype.itemsize + 4 * rows


# ---- shapes ----------------------------------------------------------------------------------------------------------


def _block_diffusion(case: Case, device: str) -> KeyRanges:
    return KeyRanges.block_diffusion(case.keys // 2, 32, device=device)


def _causal(case: Case, device: str) -> KeyRanges:
    return KeyRanges.causal(case.keys, device=device)


def _block_causal(case: Case, device: str) -> KeyRanges:
    return KeyRanges.block_causal(case.keys, 32, device=device)


def _window(case: Case, device: str) -> KeyRanges:
    return KeyRanges.window(case.keys, 256, 256, device=device)


def _ragged(case: Case) -> Tensor:
    """Lengths from half of the keys to all of them, evenly spread over the batch."""
    return torch.linspace(case.keys // 2, case.keys, case.batch).to(torch.int32)


def _padding(case: Case, device: str) -> KeyRanges:
    return KeyRanges.padding(_ragged(case), case.keys, side="left").to(device)


def _cached(case: Case, device: str) -> KeyRanges:
    return KeyRanges.cached(_ragged(case), case.queries, case.keys).to(device)


def _packed(case: Case, device: str) -> KeyRanges:
    """Documents of 1/16, 3/16, 5/16 and 7/16 of the tokens."""
    ends = [0, 1, 4, 9, 16]
    return KeyRanges.packed(torch.tensor([end * case.keys // 16 for end in ends]), case.keys).to(device)


# Heads 32:8 with head_dim 128 are those of iLLaDA-8B; 8:2 is the same group on a CPU's scale.
CPU_CASES = (
    Case("full_1k", 1, 1024, 1024, 8, 2, 128),
    Case("full_1k_d64", 1, 1024, 1024, 8, 8, 64),
    Case("padding_4x512", 4, 512, 512, 8, 2, 128, _padding),
    Case("packed_2k", 1, 2048, 2048, 8, 2, 128, _packed),
    Case("causal_1k", 1, 1024, 1024, 8, 2, 128, _causal),
    Case("window_2k", 1, 2048, 2048, 8, 2, 128, _window),
    Case("block_diffusion_1k_b32", 1, 2048, 2048, 8, 2, 128, _block_diffusion),
    Case("cached_4x32_in_2k", 4, 32, 2048, 32, 8, 128, _cached),
)
GPU_CASES = (
    *(Case(f"full_{s // 1024}k", 16384 // s, s, s, 32, 8, 128) for s in (1024, 2048, 4096, 8192, 16384)),
    *(Case(f"full_8k_d{d}", 2, 8192, 8192, 4096 // d, 4096 // d, d) for d in (64, 96, 128, 256)),
    Case("padding_8x2k", 8, 2048, 2048, 32, 8, 128, _padding),
    Case("packed_8k", 2, 8192, 8192, 32, 8, 128, _packed),
    Case("causal_8k", 2, 8192, 8192, 32, 8, 128, _causal),
    Case("window_8k", 2, 8192, 8192, 32, 8, 128, _window),
    Case("block_causal_8k_b32", 2, 8192, 8192, 32, 8, 128, _block_causal),
    *(Case(f"block_diffusion_{n}k_b32", 8 // n, 2048 * n, 2048 * n, 32, 8, 128, _block_diffusion) for n in (2, 4, 8)),
    *(Case(f"cached_{b}x32_in_8k", b, 32, 8192, 32, 8, 128, _cached) for b in (1, 8, 32)),
    Case("cached_8x32_in_8k_mha", 8, 32, 8192, 32, 32, 128, _cached),
)


# ---- masks that break kernels ----------------------------------------------------------------------------------------


def hostile_masks(batch: int, queries: int, keys: int, device: str = "cpu") -> dict[str, KeyRanges | None]:
    """Masks by name: rows without keys, empty ranges beside full ones, ranges of rows that overlap, one key at a time.

    Every constructor of KeyRanges is tested against its definition elsewhere; these are for the kernels.
    """
    row = torch.arange(queries, dtype=torch.int64)
    third, half = keys // 3, keys // 2

    def ranges(lo0: Tensor, hi0: Tensor, lo1: Tensor, hi1: Tensor) -> KeyRanges:
        bounds = torch.stack(torch.broadcast_tensors(lo0, hi0, lo1, hi1), -1).clamp(0, keys).cummax(-1).values
        return KeyRanges(bounds.reshape(-1, queries, 4).to(torch.int32), keys).to(device)

    zero, end = torch.zeros_like(row), torch.full_like(row, keys)
    generator = torch.Generator().manual_seed(batch * 7919 + queries * 104729 + keys)
    random = torch.randint(0, keys + 1, (batch, queries, 4), generator=generator).sort(-1).values
    lengths = torch.randint(0, keys + 1, (batch,), generator=generator)
    return {
        "full": None,
        "full_ranges": KeyRanges.full(keys, device=device),
        "nothing": ranges(zero, zero, zero, zero),
        "nothing_at_the_end": ranges(end, end, end, end),
        "diagonal": ranges(row, row + 1, row + 1, row + 1),
        "causal": ranges(zero, row + 1, row + 1, row + 1),
        "first_and_last_key": ranges(zero, zero + 1, end - 1, end),
        "second_range_only": ranges(zero, zero, zero + half, end),
        "empty_range_far_away": ranges(zero, zero + 1, end, end),
        "every_third_row_empty": ranges(
            zero, torch.where(row % 3 == 0, 0, third), end * (row % 3 == 0), end * (row % 3 == 0)
        ),
        "hulls_overlap": ranges(zero, third + row % max(third, 1), third + row % max(third, 1) + 1, zero + 2 * third),
        "antidiagonal": ranges((keys - 1 - row).clamp(min=0), keys - row, end, end),
        "lengths": KeyRanges.padding(lengths, keys, side="right").to(device),
        "left_padding": KeyRanges.padding(lengths, keys, side="left").to(device),
        "random": KeyRanges(random.to(torch.int32), keys).to(device),
    }


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor, key_ranges: KeyRanges | None, scale: float) -> tuple[Tensor, Tensor]:
    """Returns out and lse by PyTorch's own softmax, in the inputs' dtype throughout; autograd gives gradients.

    In float64 (float32 for 16-bit inputs) this is the exact side of the bar, in the inputs' dtype the yardstick.
    """
    group = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if key_ranges is None:
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), scores.logsumexp(-1)
    allowed = key_ranges.dense()[:, None]  # (B or 1, 1, Sq or 1, Sk)
    lowest = scores.masked_fill(~allowed, torch.finfo(q.dtype).min)  # finite: no NaN in the gradient of an empty row
    p = lowest.softmax(-1).masked_fill(~allowed, 0)
    lse = lowest.logsumexp(-1) if k.shape[1] else scores.sum(-1)
    return torch.einsum("bhqk,bkhd->bqhd", p, v), lse.masked_fill(~allowed.any(-1), -torch.inf)


SIZES = (1, 7, 63, 64, 65, 127, 129, 1023)
