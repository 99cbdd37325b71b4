"""KeyRanges: an attention mask in which every query sees at most two contiguous ranges of keys.

`bounds` is int32 of shape (B or 1, Sq or 1, 4), rows `lo0, hi0, lo1, hi1`, on the device of the tensors it masks. Query
row i may attend to key j iff lo0 <= j < hi0 or lo1 <= j < hi1. Normal form: 0 <= lo0 <= hi0 <= lo1 <= hi1 <= num_keys;
a range may be empty.

`from_padding`, `from_dense` and `a & b` synchronise with the host once, to raise if the answer does not fit. Nothing
else does, so everything else can be captured in a CUDA graph and traced by torch.compile.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Device = torch.device | str | None
_LIMIT = 2**31


class KeyRanges:
    """At most two key ranges per query row: `KeyRanges(bounds, num_keys)`, or one of the constructors below.

    bounds: int32 (B or 1, Sq or 1, 4); a dimension of 1 is broadcast. Values are not read here: kernels clamp them with
    `clamp_bounds`, so malformed ones never address a key out of range. Raises TypeError or ValueError on a wrong type,
    dtype or shape.
    """

    def __init__(self, bounds: Tensor, num_keys: int) -> None:
        if not isinstance(bounds, Tensor):
            raise TypeError(f"bounds: expected an int32 tensor (B or 1, Sq or 1, 4), got {type(bounds).__name__}")
        if bounds.dtype != torch.int32:
            raise TypeError(f"bounds: expected int32, got {bounds.dtype}; use bounds.to(torch.int32)")
        if bounds.dim() != 3 or bounds.shape[2] != 4:
            raise ValueError(f"bounds: expected shape (B or 1, Sq or 1, 4), got {tuple(bounds.shape)}")
        if bounds.stride(2) != 1:
            raise ValueError(
                f"bounds: expected a contiguous last dimension, got strides {bounds.stride()}; use .contiguous()"
            )
        _check_size("num_keys", num_keys)
        self.bounds = bounds
        self.num_keys = num_keys

    # ---- constructors ------------------------------------------------------------------------------------------------

    @staticmethod
    def full(num_keys: int, *, device: Device = None) -> KeyRanges:
        """Every query sees every key: (1, 1, 4)."""
        _check_size("num_keys", num_keys)
        return _pack(num_keys, torch.zeros(1, 1, dtype=torch.int32, device=device), num_keys)

    @staticmethod
    def padding(lengths: Tensor, num_keys: int, side: Literal["left", "right"] = "right") -> KeyRanges:
        """Sequence b sees its `lengths[b]` real keys: (B, 1, 4). lengths: int (B,); `side`: where the padding lies."""
        _check_integers("lengths", lengths, 1)
        _check_size("num_keys", num_keys)
        if side not in ("left", "right"):
            raise ValueError(f'side: expected "left" or "right" (where the padding lies), got {side!r}')
        real = lengths.clamp(0, num_keys)[:, None]  # (B, 1)
        return _pack(num_keys, num_keys - real, num_keys) if side == "left" else _pack(num_keys, 0 * real, real)

    @staticmethod
    def packed(cu_seqlens: Tensor, num_tokens: int) -> KeyRanges:
        """Documents end to end in one row of tokens, each sees itself: (1, num_tokens, 4).

        cu_seqlens: int (N + 1,), ascending; document n is cu_seqlens[n] .. cu_seqlens[n + 1]. Tokens outside every
        document see nothing.
        """
        _check_integers("cu_seqlens", cu_seqlens, 1)
        _check_size("num_tokens", num_tokens)
        start, end = _documents(cu_seqlens, num_tokens)
        return _pack(num_tokens, start, end)

    @staticmethod
    def causal(s: int, *, device: Device = None) -> KeyRanges:
        """Row i sees keys 0 .. i: (1, s, 4)."""
        row = _rows(s, device)
        return _pack(s, 0 * row, row + 1)

    @staticmethod
    def window(s: int, left: int | None, right: int | None, *, device: Device = None) -> KeyRanges:
        """Row i sees keys i - left .. i + right, both included: (1, s, 4). None: no limit on that side."""
        for name, value in (("left", left), ("right", right)):
            if value is not None:
                _check_size(name, value)
        row = _rows(s, device)
        low = 0 * row if left is None else (row - left).clamp(min=0)
        high = 0 * row + s if right is None else s - (s - 1 - row - right).clamp(min=0)  # row + right may overflow
        return _pack(s, low, high)

    @staticmethod
    def block_causal(s: int, block: int | Tensor, *, device: Device = None) -> KeyRanges:
        """A row sees its own block and all earlier ones: (1, s, 4), or (B, s, 4) for boundaries per sequence.

        block: a length (the last block may be shorter), or int boundaries (N,) or (B, N), ascending: positions at which
        a new block begins. 0 and s are implied and may be given too, so cu_seqlens serve as boundaries. The device is
        that of the boundaries.
        """
        if isinstance(block, Tensor):
            _check_integers("block", block, 1, 2)
            if device is not None and torch.device(device) != block.device:
                raise ValueError(f"device: the boundaries are on {block.device}, got {device}; leave it out")
            row = _rows(s, block.device)
            starts = block if block.dim() == 2 else block[None]  # (B or 1, N)
            row = row.to(block.dtype).expand(starts.shape[0], -1).contiguous()
            following = torch.searchsorted(starts.contiguous(), row, right=True)  # starts at or before the row
            edges = torch.nn.functional.pad(starts, (0, 1), value=s)  # (B or 1, N + 1)
            return _pack(s, 0 * row, edges.gather(1, following).clamp(0, s))
        _check_block(block)
        row = _rows(s, device)
        start = row // block * block
        return _pack(s, 0 * row, start + (s - start).clamp(max=block))

    @staticmethod
    def block_diffusion(
        length: int, block: int, cu_seqlens: Tensor | None = None, *, device: Device = None
    ) -> KeyRanges:
        """Training on [noisy ; clean], 2 * length tokens (BD3-LM, arXiv 2503.09573): (1, 2 * length, 4).

        A noisy row sees its own noisy block and all earlier clean blocks of its document; a clean row all clean blocks
        of its document up to its own. Blocks restart at each document of cu_seqlens (int (N + 1,), offsets within one
        copy); a document's last may be shorter.
        """
        _check_size("length", length)
        _check_size("2 * length", 2 * length)
        _check_block(block)
        if cu_seqlens is None:
            row = _rows(length, device)
            start, end = 0 * row, 0 * row + length
        else:
            _check_integers("cu_seqlens", cu_seqlens, 1)
            if device is not None and torch.device(device) != cu_seqlens.device:
                raise ValueError(f"device: cu_seqlens is on {cu_seqlens.device}, got {device}; leave it out")
            row = _rows(length, cu_seqlens.device)
            start, end = _documents(cu_seqlens, length)
        block_start = start + (row - start) // block * block
        block_end = block_start + (end - block_start).clamp(max=block)
        noisy = _pack(2 * length, block_start, block_end, length + start, length + block_start)
        clean = _pack(2 * length, length + start, length + block_end)
        return KeyRanges(torch.cat([noisy.bounds, clean.bounds], dim=1), 2 * length)

    @staticmethod
    def cached(lengths: Tensor, s_new: int, num_keys: int) -> KeyRanges:
        """A block of s_new queries against a cache of num_keys slots: row b sees the first lengths[b]; (B, 1, 4).

        lengths: int (B,), counting the new keys, which lie at lengths - s_new .. lengths: new rows see one another too.
        """
        _check_integers("lengths", lengths, 1)
        _check_size("num_keys", num_keys)
        _check_size("s_new", s_new)
        if s_new > num_keys:
            raise ValueError(f"s_new: expected at most num_keys = {num_keys}, got {s_new}; use a larger cache")
        used = lengths.clamp(0, num_keys)[:, None]
        return _pack(num_keys, 0 * used, used)

    @staticmethod
    def from_padding(mask: Tensor) -> KeyRanges:
        """From a key mask: bool (B, Sk), True where the key is real, one run per row: (B, 1, 4). Synchronises once.

        Raises ValueError naming the first batch entry whose keys are not one run.
        """
        _check_mask("mask", mask, 2)
        bounds, runs = _runs(mask[:, None])
        bad = _first(runs > 1, runs)
        if bad is not None:
            raise ValueError(
                f"mask: expected one run of True per row, batch entry {bad[0]} has {bad[2]}; use from_dense"
            )
        return KeyRanges(bounds, mask.shape[1])

    @staticmethod
    def from_dense(mask: Tensor) -> KeyRanges:
        """From a full mask: bool (B, Sq, Sk) or (B, 1 or H, Sq, Sk), True where a row may attend: (B, Sq, 4).

        Raises ValueError naming the first batch entry and row with more than two runs, or whose heads differ.
        Synchronises once. Memory: a few int32 tensors of the size of one head's mask.
        """
        _check_mask("mask", mask, 3, 4)
        if mask.dim() == 4 and mask.shape[1] == 0:
            raise ValueError(f"mask: expected at least one head, got shape {tuple(mask.shape)}")
        one = mask if mask.dim() == 3 else mask[:, 0]
        bounds, runs = _runs(one)
        if mask.dim() == 4 and mask.shape[1] > 1:
            runs = torch.where((mask != mask[:, :1]).any(3).any(1), -1, runs)
        bad = _first((runs > 2) | (runs < 0), runs)
        if bad is not None:
            batch, row, count = bad
            what = "heads that differ" if count < 0 else f"{count} runs of allowed keys"
            raise ValueError(
                "mask: expected at most two runs of allowed keys, the same for all heads; "
                f"batch entry {batch}, row {row} has {what}; reorder the keys, or use another attention"
            )
        return KeyRanges(bounds, mask.shape[-1])

    # ---- use ---------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self.bounds.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> KeyRanges:
        return KeyRanges(self.bounds.to(device, non_blocking=non_blocking), self.num_keys)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> KeyRanges:
        """`ranges[b0:b1, s0:s1]`: a view of some batch entries and query rows. A broadcast dimension stays as it is."""
        slices = index if isinstance(index, tuple) else (index,)
        if len(slices) > 2 or not all(isinstance(s, slice) for s in slices):
            raise TypeError(f"index: expected slices [batch, query rows], got {index!r}; write i:i + 1 for one row")
        bounds = self.bounds
        if bounds.shape[0] != 1:
            bounds = bounds[slices[0]]
        if len(slices) == 2 and bounds.shape[1] != 1:
            bounds = bounds[:, slices[1]]
        return KeyRanges(bounds, self.num_keys)

    def __and__(self, other: KeyRanges) -> KeyRanges:
        """The keys that both allow, broadcast over batch and rows. Synchronises once.

        Raises ValueError naming the first batch entry and row that would need three ranges.
        """
        if not isinstance(other, KeyRanges):
            return NotImplemented
        if self.num_keys != other.num_keys or self.device != other.device:
            raise ValueError(f"&: expected the same num_keys and device, got {self!r} and {other!r}")
        if any(1 != a != b != 1 for a, b in zip(self.bounds.shape[:2], other.bounds.shape[:2])):
            raise ValueError(f"&: expected batch and rows that are equal or 1, got {self!r} and {other!r}")
        bounds, parts = _intersect(_canonical(self.bounds, self.num_keys), _canonical(other.bounds, self.num_keys))
        bad = _first(parts == 3, parts)
        if bad is not None:
            raise ValueError(f"&: batch entry {bad[0]}, row {bad[1]} would need three key ranges; KeyRanges holds two")
        return KeyRanges(bounds, self.num_keys)

    def dense(self) -> Tensor:
        """The mask as bool (B or 1, Sq or 1, num_keys), True where attention is allowed. Memory: one byte per entry."""
        lo0, hi0, lo1, hi1 = clamp_bounds(self.bounds, self.num_keys).unsqueeze(-2).unbind(-1)  # each (B, Sq, 1)
        key = torch.arange(self.num_keys, device=self.device, dtype=torch.int32)
        return ((lo0 <= key) & (key < hi0)) | ((lo1 <= key) & (key < hi1))

    def density(self) -> Tensor:
        """The allowed fraction of all (row, key) pairs: a 0-d float32 tensor on the device; 0 if there are no pairs."""
        lo0, hi0, lo1, hi1 = clamp_bounds(self.bounds, self.num_keys).unbind(-1)
        pairs = self.bounds.shape[0] * self.bounds.shape[1] * self.num_keys
        return ((hi0 - lo0) + (hi1 - lo1)).sum().to(torch.float64).div(max(pairs, 1)).to(torch.float32)

    def __repr__(self) -> str:
        batch, rows, _ = self.bounds.shape
        return f"KeyRanges(batch={batch}, rows={rows}, num_keys={self.num_keys}, device={self.device})"


def clamp_bounds(bounds: Tensor, num_keys: int) -> Tensor:
    """Bounds in normal form, as every backend reads them: each at least the one before it and at most num_keys."""
    return bounds.clamp(0, num_keys).cummax(-1).values


# ---- host checks -----------------------------------------------------------------------------------------------------


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}; use int(...) on the host")
    if value < 0 or value >= _LIMIT:
        raise ValueError(f"{name}: expected 0 <= {name} < 2**31, got {value}")


def _check_block(block: int) -> None:
    _check_size("block", block)
    if block < 1:
        raise ValueError(f"block: expected a length of at least 1, got {block}")


def _check_integers(name: str, value: Tensor, *dims: int) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name}: expected an int32 or int64 tensor, got {type(value).__name__}; use torch.tensor(..., device=...)"
        )
    if value.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, got {value.dtype}")
    if value.dim() not in dims:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dims))} dimensions, got shape {tuple(value.shape)}")


def _check_mask(name: str, mask: Tensor, *dims: int) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a bool tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{name}: expected bool, True where a key may be attended, got {mask.dtype}; "
            "use mask.bool() for zeros and ones, bias == 0 for a bias"
        )
    if mask.dim() not in dims:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dims))} dimensions, got shape {tuple(mask.shape)}")


# ---- arithmetic on the device ----------------------------------------------------------------------------------------


def _rows(s: int, device: Device) -> Tensor:
    _check_size("s", s)
    return torch.arange(s, dtype=torch.int32, device=device)[None]  # (1, s)


def _pack(
    num_keys: int, lo0: Tensor, hi0: Tensor | int, lo1: Tensor | None = None, hi1: Tensor | None = None
) -> KeyRanges:
    """Bounds from (B or 1, Sq or 1) parts. Without a second range it is empty, at the end of the first."""
    end = hi0 if isinstance(hi0, Tensor) else torch.full_like(lo0, hi0)
    parts = torch.broadcast_tensors(lo0, end, end if lo1 is None else lo1, end if hi1 is None else hi1)
    return KeyRanges(torch.stack(parts, dim=-1).to(torch.int32), num_keys)


def _documents(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Start and end of each token's document, (1, num_tokens) each; both are the token itself where it has none."""
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens: expected N + 1 offsets, got none; a batch without documents is [0]")
    token = torch.arange(num_tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    after = torch.searchsorted(cu_seqlens.contiguous(), token, right=True)  # offsets at or before the token
    last = cu_seqlens.shape[0] - 1
    inside = (after > 0) & (after <= last)
    start = torch.where(inside, cu_seqlens[(after - 1).clamp(0, last)], token)
    end = torch.where(inside, cu_seqlens[after.clamp(0, last)].clamp(max=num_tokens), token)
    return start[None], end[None]


def _runs(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of bool (B, S, Sk): bounds of the first and the last run of True, int32 (B, S, 4), and how many runs, (B, S)."""
    num_keys = mask.shape[2]
    if num_keys == 0:
        zeros = torch.zeros(*mask.shape[:2], 4, dtype=torch.int32, device=mask.device)
        return zeros, zeros[..., 0]
    edge = torch.nn.functional.pad(mask, (1, 1))  # False on both sides
    starts = mask & ~edge[..., :-2]
    ends = mask & ~edge[..., 2:]
    key = torch.arange(num_keys, dtype=torch.int32, device=mask.device)
    runs = starts.sum(-1, dtype=torch.int32)
    lo0 = torch.where(starts, key, num_keys).amin(-1)
    hi0 = torch.where(ends, key + 1, num_keys).amin(-1)
    hi1 = torch.where(ends, key + 1, 0).amax(-1)
    lo1 = torch.where(runs > 1, torch.where(starts, key, 0).amax(-1), hi1)
    bounds = torch.stack([lo0, hi0, lo1, hi1], dim=-1)
    return torch.where(runs[..., None] > 0, bounds, 0).to(torch.int32), runs


def _first(bad: Tensor, values: Tensor) -> tuple[int, int, int] | None:
    """(batch, row, value) at the first True of bad (B, S), or None. The only place where a KeyRanges synchronises."""
    if bad.numel() == 0:
        return None
    at = bad.flatten().to(torch.int32).argmax()
    found, index, value = torch.stack([bad.any().to(torch.int64), at, values.flatten()[at].to(torch.int64)]).tolist()
    return (index // bad.shape[1], index % bad.shape[1], value) if found else None


def _canonical(bounds: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Two ranges (..., 2) that do not touch; if only one has keys it is the first."""
    lo0, hi0, lo1, hi1 = clamp_bounds(bounds, num_keys).unbind(-1)
    empty = lo0 == hi0
    join = empty | (hi0 == lo1)
    first = torch.stack([torch.where(empty, lo1, lo0), torch.where(join, hi1, hi0)], dim=-1)
    return first, torch.stack([torch.where(join, hi1, lo1), hi1], dim=-1)


def _intersect(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Bounds of the intersection of two canonical pairs of ranges, and how many ranges it has; 3 do not fit.

    Of a0 & b1 and a1 & b0 at most one has keys (ranges are ordered), and parts never touch (canonical ranges do not).
    """

    def meet(x: Tensor, y: Tensor) -> Tensor:
        low = torch.maximum(x[..., 0], y[..., 0])
        return torch.stack([low, torch.maximum(low, torch.minimum(x[..., 1], y[..., 1]))], dim=-1)

    def else_next(this: Tensor, following: Tensor) -> Tensor:
        return torch.where(this[..., :1] < this[..., 1:], this, following)

    first, middle, last = meet(a[0], b[0]), else_next(meet(a[0], b[1]), meet(a[1], b[0])), meet(a[1], b[1])
    parts = sum((r[..., 0] < r[..., 1]).to(torch.int32) for r in (first, middle, last))
    assert isinstance(parts, Tensor)
    low = else_next(else_next(first, middle), last)
    low = torch.where((parts > 0)[..., None], low, 0)
    high = torch.where((parts > 1)[..., None], else_next(last, middle), low[..., 1:])
    return torch.cat([low, high], dim=-1), parts
