"""KeyRanges: an attention mask in which every query sees at most two contiguous ranges of keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ._bounds import canonical, documents, intersect, pack, refuse, runs, savable
from ._bounds import clamp_bounds as clamp_bounds
from ._checks import FLOATS, expect_choice, expect_contiguous, expect_integer, expect_shape, expect_tensor, holds, known

Device = torch.device | str | None
_MOST = 2**31 - 1


class KeyRanges:
    """A mask of at most two key ranges per query row, the same for all heads.

    Query row i may attend to key j iff lo0 <= j < hi0 or lo1 <= j < hi1. Normal form is 0 <= lo0 <= hi0 <= lo1 <= hi1
    <= num_keys; a range may be empty. The constructors below give normal form.

    Parameters
    ----------
    bounds : Tensor, int32, (B or 1, Sq or 1, 4)
        Rows `lo0, hi0, lo1, hi1`, on the device of the tensors to mask. A dimension of 1 is broadcast. Values are not
        read here: kernels clamp them, so that malformed ones never address a key out of range.
    num_keys : int

    Raises
    ------
    TypeError, ValueError
        If a type, dtype, shape or stride is wrong.

    Notes
    -----
    Only `from_padding`, `from_dense` and `&` synchronise with the host, once, to raise if the answer does not fit;
    inside torch.compile and torch.export their graph asserts it instead. Everything works with symbolic sizes. A
    KeyRanges is a pytree, an input and output of compiled and exported programs, and can be pickled. Ranges made under
    torch.inference_mode may be used in training.

    Examples
    --------
    >>> import torch
    >>> from illada_kernels import KeyRanges
    >>> ranges = KeyRanges(torch.tensor([[[0, 1, 3, 4], [1, 3, 3, 3]]], dtype=torch.int32), num_keys=4)
    >>> ranges
    KeyRanges(batch=1, rows=2, num_keys=4, device=cpu)
    >>> ranges.dense().int()
    tensor([[[1, 0, 0, 1],
             [0, 1, 1, 0]]], dtype=torch.int32)
    """

    def __init__(self, bounds: Tensor, num_keys: int) -> None:
        expect_tensor("bounds", bounds, torch.int32)
        expect_shape("bounds", bounds, "B or 1", "Sq or 1", 4)
        expect_contiguous("bounds", bounds)
        self.bounds = savable(bounds)
        self.num_keys = _size("num_keys", num_keys)

    # ---- constructors ------------------------------------------------------------------------------------------------

    @staticmethod
    def full(num_keys: int, *, device: Device = None) -> KeyRanges:
        """Every row sees every key: bounds (1, 1, 4). LLaDA's and iLLaDA's pre-training.

        Examples
        --------
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.full(3).dense().int()
        tensor([[[1, 1, 1]]], dtype=torch.int32)
        """
        num_keys = _size("num_keys", num_keys)
        return KeyRanges(pack(torch.zeros(1, 1, dtype=torch.int32, device=device), num_keys), num_keys)

    @staticmethod
    def padding(lengths: Tensor, num_keys: int, side: Literal["left", "right"] = "right") -> KeyRanges:
        """Sequence b sees its `lengths[b]` real keys: bounds (B, 1, 4).

        Parameters
        ----------
        lengths : Tensor, int32 or int64, (B,)
            Clamped to 0 .. num_keys.
        num_keys : int
        side : "left" or "right"
            Where the padding lies.

        Examples
        --------
        >>> import torch
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.padding(torch.tensor([1, 3]), 4, side="left").dense().int()
        tensor([[[0, 0, 0, 1]],
        <BLANKLINE>
                [[0, 1, 1, 1]]], dtype=torch.int32)
        """
        _expect_integers("lengths", lengths, 1)
        num_keys = _size("num_keys", num_keys)
        if side not in ("left", "right"):
            raise ValueError(f'side: expected "left" or "right" (where the padding lies), got {side!r}')
        real = lengths.clamp(0, num_keys)[:, None]  # (B, 1)
        return KeyRanges(pack(num_keys - real, num_keys) if side == "left" else pack(0 * real, real), num_keys)

    @staticmethod
    def packed(cu_seqlens: Tensor, num_tokens: int) -> KeyRanges:
        """Each document of one row of tokens sees itself: bounds (1, num_tokens, 4).

        Parameters
        ----------
        cu_seqlens : Tensor, int32 or int64, (N + 1,)
            Ascending; document n holds the tokens cu_seqlens[n] .. cu_seqlens[n + 1] - 1. Tokens outside all documents
            see nothing.
        num_tokens : int

        Examples
        --------
        >>> import torch
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.packed(torch.tensor([0, 1, 3]), 4).dense()[0].int()
        tensor([[1, 0, 0, 0],
                [0, 1, 1, 0],
                [0, 1, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
        """
        _expect_integers("cu_seqlens", cu_seqlens, 1)
        rows = _rows("num_tokens", num_tokens, cu_seqlens.device)
        return KeyRanges(pack(*documents(cu_seqlens, rows, num_tokens)), num_tokens)

    @staticmethod
    def causal(s: int, num_keys: int | None = None, *, device: Device = None) -> KeyRanges:
        """Row i sees keys 0 .. i + num_keys - s: bounds (1, s, 4). The last row sees all keys.

        Parameters
        ----------
        s : int
            Query rows.
        num_keys : int, optional
            s by default. With a cache: cached keys and new ones. Of more rows than keys the first see nothing.

        Notes
        -----
        The alignment of torch.nn.attention.bias.causal_lower_right and of FlashAttention from 2.1 on.

        Examples
        --------
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.causal(2, 4).dense()[0].int()
        tensor([[1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
        """
        return KeyRanges.window(s, None, 0, num_keys, device=device)

    @staticmethod
    def window(
        s: int, left: int | None, right: int | None, num_keys: int | None = None, *, device: Device = None
    ) -> KeyRanges:
        """Row i sees keys p - left .. p + right, p = i + num_keys - s: bounds (1, s, 4). Local attention.

        Parameters
        ----------
        s : int
            Query rows.
        left, right : int or None
            Keys before and after the row's own. None: no limit on that side.
        num_keys : int, optional
            s by default. With a cache: cached keys and new ones.

        Examples
        --------
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.window(3, 1, 0).dense()[0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
        """
        for name, value in (("left", left), ("right", right)):
            if value is not None:
                expect_integer(name, value, 0, _MOST)
        row = _rows("s", s, device)
        num_keys = s if num_keys is None else _size("num_keys", num_keys)
        position = row + (num_keys - s)
        low = 0 * row if left is None else (position.clamp(min=0) - left).clamp(min=0)
        beyond = s - 1 - row  # keys after the row's own; position + right could overflow
        high = 0 * row + num_keys if right is None else (num_keys - (beyond - right).clamp(min=0)).clamp(min=0)
        return KeyRanges(pack(low, torch.maximum(low, high)), num_keys)

    @staticmethod
    def block_causal(s: int, block: int | Tensor, *, device: Device = None) -> KeyRanges:
        """A row sees its own block and all earlier ones: bounds (1 or B, s, 4). SDAR, LLaDA2, dialogue turns.

        Parameters
        ----------
        s : int
            Rows and keys.
        block : int or Tensor, int32 or int64, (N,) or (B, N)
            The length of a block (the last may be shorter), or ascending boundaries: positions at which a block begins.
            0 and s are implied and may be given too, so that cu_seqlens serve as boundaries.
        device : optional
            That of the boundaries, if there are any.

        Examples
        --------
        >>> import torch
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.block_causal(3, 2).dense()[0].int()
        tensor([[1, 1, 0],
                [1, 1, 0],
                [1, 1, 1]], dtype=torch.int32)
        >>> KeyRanges.block_causal(3, torch.tensor([1])).dense()[0].int()
        tensor([[1, 0, 0],
                [1, 1, 1],
                [1, 1, 1]], dtype=torch.int32)
        """
        if isinstance(block, Tensor):
            _expect_integers("block", block, 1, 2)
            row = _rows("s", s, _device_of("block", block, device))
            starts = block if block.dim() == 2 else block[None]  # (B or 1, N)
            row = row.to(block.dtype).expand(starts.shape[0], -1).contiguous()
            following = torch.searchsorted(starts.contiguous(), row, right=True)  # starts at or before the row
            edges = torch.cat([starts, starts.new_full((starts.shape[0], 1), s)], 1)  # (B or 1, N + 1)
            return KeyRanges(pack(0 * row, edges.gather(1, following).clamp(0, s)), s)
        row = _rows("s", s, device)
        return KeyRanges(pack(0 * row, _block(row, 0, s, block)[1]), s)

    @staticmethod
    def block_diffusion(
        length: int,
        block: int,
        cu_seqlens: Tensor | None = None,
        *,
        causal: Literal["clean", "both"] | None = None,
        device: Device = None,
    ) -> KeyRanges:
        """Training on [noisy ; clean], 2 * length tokens: bounds (1, 2 * length, 4).

        A noisy row sees its own noisy block and all earlier clean blocks of its document. A clean row sees all clean
        blocks of its document up to its own.

        Parameters
        ----------
        length : int
            Tokens of one copy.
        block : int
            Length of a block. Blocks restart at each document; a document's last may be shorter.
        cu_seqlens : Tensor, int32 or int64, (N + 1,), optional
            Documents, as offsets within one copy.
        causal : "clean" or "both", optional
            "clean": a clean row sees the clean tokens up to itself, so that one pass trains an autoregressive loss too.
            "both": a noisy row besides sees only the tokens of its noisy block up to itself.

        Notes
        -----
        Sources: BD3-LM (arXiv 2503.09573), SDAR; causal="clean" Nemotron-Labs-Diffusion (arXiv 2607.05722) and
        DiffusionGemma's canvas blocks; causal="both" I-DLM (arXiv 2604.11035).

        Examples
        --------
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.block_diffusion(3, 2).dense()[0].int()
        tensor([[1, 1, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [0, 0, 1, 1, 1, 0],
                [0, 0, 0, 1, 1, 0],
                [0, 0, 0, 1, 1, 0],
                [0, 0, 0, 1, 1, 1]], dtype=torch.int32)
        >>> KeyRanges.block_diffusion(3, 2, causal="both").dense()[0].int()
        tensor([[1, 0, 0, 0, 0, 0],
                [1, 1, 0, 0, 0, 0],
                [0, 0, 1, 1, 1, 0],
                [0, 0, 0, 1, 0, 0],
                [0, 0, 0, 1, 1, 0],
                [0, 0, 0, 1, 1, 1]], dtype=torch.int32)
        """
        expect_choice("causal", causal, (None, "clean", "both"))
        length = _size("length", length, most=_MOST // 2)
        if cu_seqlens is None:
            row = _rows("length", length, device)
            start, end = 0 * row, 0 * row + length
        else:
            _expect_integers("cu_seqlens", cu_seqlens, 1)
            row = _rows("length", length, _device_of("cu_seqlens", cu_seqlens, device))
            start, end = documents(cu_seqlens, row, length)
        block_start, block_end = _block(row, start, end, block)
        so_far = torch.minimum(row + 1, block_end)  # nothing for a token outside all documents
        noisy = pack(block_start, so_far if causal == "both" else block_end, length + start, length + block_start)
        clean = pack(length + start, length + (block_end if causal is None else so_far))
        return KeyRanges(torch.cat([noisy, clean], dim=1), 2 * length)

    @staticmethod
    def anchor_blocks(anchors: Tensor, length: int, block: int, cu_seqlens: Tensor | None = None) -> KeyRanges:
        """Training a block drafter on keys [context ; blocks]: bounds (1 or B, N * block, 4). DFlash.

        The rows are those of the blocks alone. Each sees the context before its block's anchor and its own block.

        Parameters
        ----------
        anchors : Tensor, int32 or int64, (N,) or (B, N)
            Position in the context at which each block begins. A negative one is no block: its rows see nothing.
        length : int
            Tokens of the context. There are length + N * block keys.
        block : int
            Length of every block.
        cu_seqlens : Tensor, int32 or int64, (M + 1,), optional
            Documents of the context; a block sees only that of its anchor.

        Notes
        -----
        Source: DFlash (arXiv 2602.06036).

        Examples
        --------
        >>> import torch
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.anchor_blocks(torch.tensor([1, 3]), length=4, block=2).dense()[0].int()
        tensor([[1, 0, 0, 0, 1, 1, 0, 0],
                [1, 0, 0, 0, 1, 1, 0, 0],
                [1, 1, 1, 0, 0, 0, 1, 1],
                [1, 1, 1, 0, 0, 0, 1, 1]], dtype=torch.int32)
        """
        _expect_integers("anchors", anchors, 1, 2)
        length, block = _size("length", length), _size("block", block, least=1)
        anchors = anchors if anchors.dim() == 2 else anchors[None]  # (B or 1, N)
        rows = anchors.shape[1] * block
        num_keys = _size("length + N * block", length + rows)
        at = anchors[:, :, None].expand(-1, -1, block).reshape(anchors.shape[0], rows)
        before = at.clamp(0, length)
        start = 0 * before
        if cu_seqlens is not None:
            _expect_integers("cu_seqlens", cu_seqlens, 1)
            _device_of("cu_seqlens", cu_seqlens, anchors.device)
            start = documents(cu_seqlens, before, length)[0]
        own = length + _rows("N * block", rows, anchors.device) // block * block  # (1, rows)
        bounds = pack(start, before, own, own + block)
        return KeyRanges(torch.where((at >= 0)[..., None], bounds, 0), num_keys)

    @staticmethod
    def cached(
        lengths: Tensor, s_new: int, num_keys: int, *, block: int | None = None, left: int | None = None
    ) -> KeyRanges:
        """s_new new rows a sequence against a cache of num_keys slots: bounds (B, 1 or s_new, 4).

        Row i of sequence b stands at slot p = lengths[b] - s_new + i. It sees the slots before lengths[b], among them
        all new ones.

        Parameters
        ----------
        lengths : Tensor, int32 or int64, (B,)
            Slots in use, counting the new keys. Clamped to 0 .. num_keys.
        s_new : int
            New rows; their keys lie in the last s_new slots in use.
        num_keys : int
            Slots of the cache.
        block : int, optional
            The new rows are blocks of this length, counted from the first. A row sees new keys only up to the end of
            its block. 1 is causal, as verifying drafted tokens needs; more decodes several blocks at once.
        left : int, optional
            A row sees no slot before p - left: sliding-window layers.

        Examples
        --------
        >>> import torch
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.cached(torch.tensor([3]), 2, 4).dense()[0].int()
        tensor([[1, 1, 1, 0]], dtype=torch.int32)
        >>> KeyRanges.cached(torch.tensor([3]), 2, 4, block=1, left=1).dense()[0].int()
        tensor([[1, 1, 0, 0],
                [0, 1, 1, 0]], dtype=torch.int32)
        """
        _expect_integers("lengths", lengths, 1)
        num_keys, s_new = _size("num_keys", num_keys), _size("s_new", s_new)
        if not holds(s_new <= num_keys):
            raise ValueError(f"s_new: expected at most num_keys = {num_keys}, got {s_new}; use a larger cache")
        used = lengths.clamp(0, num_keys)[:, None]  # (B, 1)
        row = _rows("s_new", s_new, lengths.device)
        low, high = 0 * used, used
        if block is not None:
            high = (used - s_new + _block(row, 0, s_new, block)[1]).clamp(min=0)
        if left is not None:
            expect_integer("left", left, 0, _MOST)
            low = ((used - s_new + row).clamp(min=0) - left).clamp(min=0)
        return KeyRanges(pack(low, high), num_keys)

    @staticmethod
    def from_padding(mask: Tensor) -> KeyRanges:
        """Reads a key mask with one run of True per row: bounds (B, 1, 4). Synchronises once.

        Parameters
        ----------
        mask : Tensor, bool, (B, Sk)
            True where the key is real.

        Raises
        ------
        ValueError
            Names the first batch entry whose keys are not one run.

        Examples
        --------
        >>> import torch
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.from_padding(torch.tensor([[True, True, False]])).bounds
        tensor([[[0, 2, 2, 2]]], dtype=torch.int32)
        """
        _expect_mask(mask)
        expect_shape("mask", mask, "B", "Sk")
        bounds, count = runs(mask[:, None])
        expected = "mask: expected one run of True per row"
        refuse(count > 1, count, expected, lambda batch, _, n: f"batch entry {batch} has {n}; use from_dense")
        return KeyRanges(bounds, mask.shape[1])

    @staticmethod
    def from_dense(mask: Tensor) -> KeyRanges:
        """Reads a full mask, two runs of True per row at most: bounds (B, Sq, 4). Synchronises once.

        Parameters
        ----------
        mask : Tensor, bool or floating-point, (B, Sq, Sk) or (B, 1 or H, Sq, Sk)
            True where a row may attend. Floating-point masks are added to scores: 0 where a row may attend, at most
            finfo(dtype).min / 2 elsewhere.

        Raises
        ------
        ValueError
            Names the first batch entry and row with more than two runs, whose heads differ, or with other biases.

        Notes
        -----
        Memory: a few int32 tensors of the size of one head's mask.

        Examples
        --------
        >>> import torch
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.from_dense(torch.tensor([[[True, False, True], [True, True, False]]])).bounds
        tensor([[[0, 1, 2, 3],
                 [0, 2, 2, 2]]], dtype=torch.int32)
        """
        expect_tensor("mask", mask, torch.bool, *FLOATS, advice="use mask != 0, True where a row may attend")
        additive = mask.dtype != torch.bool
        if additive:
            biased = ~((mask == 0) | (mask <= torch.finfo(mask.dtype).min / 2))  # NaN too
            mask = mask == 0
        if mask.dim() != 4:
            expect_shape("mask", mask, "B", "Sq", "Sk", advice="or give (B, 1 or H, Sq, Sk)")
        elif not holds(mask.shape[1] >= 1):
            raise ValueError(f"mask: expected at least one head, got shape {tuple(mask.shape)}; give (B, Sq, Sk)")
        bounds, count = runs(mask if mask.dim() == 3 else mask[:, 0])
        if mask.dim() == 4 and not known(mask.shape[1] == 1):
            count = torch.where((mask != mask[:, :1]).any(3).any(1), -1, count)
        if additive:
            count = torch.where(biased.any(-1) if mask.dim() == 3 else biased.any(3).any(1), -2, count)

        def came(batch: int, row: int, count: int) -> str:
            if count == -2:
                what = "biases that are neither 0 nor at most finfo(dtype).min / 2"
                return f"batch entry {batch}, row {row} has {what}; a bias is not a mask: use another attention"
            what = "heads that differ" if count < 0 else f"{count} runs of allowed keys"
            return f"batch entry {batch}, row {row} has {what}; reorder the keys, or use another attention"

        expected = "mask: expected at most two runs of allowed keys, the same for all heads"
        refuse((count > 2) | (count < 0), count, expected, came)
        return KeyRanges(bounds, mask.shape[-1])

    # ---- use ---------------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device of the bounds."""
        return self.bounds.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> KeyRanges:
        """The same ranges on another device."""
        return KeyRanges(self.bounds.to(device, non_blocking=non_blocking), self.num_keys)

    def pin_memory(self) -> KeyRanges:
        """The same ranges in pinned memory; torch's DataLoader calls this with pin_memory=True."""
        return KeyRanges(self.bounds.pin_memory(), self.num_keys)

    def __getitem__(self, index: slice | tuple[slice, ...]) -> KeyRanges:
        """Views some batch entries and query rows: `ranges[b0:b1, s0:s1]`. A broadcast dimension stays as it is.

        Examples
        --------
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.causal(8)[:, 6:]
        KeyRanges(batch=1, rows=2, num_keys=8, device=cpu)
        """
        slices = index if isinstance(index, tuple) else (index,)
        if len(slices) > 2 or not all(isinstance(s, slice) for s in slices):
            raise TypeError(f"index: expected slices [batch, query rows], got {index!r}; write i:i + 1 for one row")
        bounds = self.bounds
        if not known(bounds.shape[0] == 1):
            bounds = bounds[slices[0]]
        if len(slices) == 2 and not known(bounds.shape[1] == 1):
            bounds = bounds[:, slices[1]]
        return KeyRanges(bounds, self.num_keys)

    def __and__(self, other: KeyRanges) -> KeyRanges:
        """The keys that both allow, broadcast over batch and rows. Synchronises once.

        Raises
        ------
        ValueError
            Names the first batch entry and row that would need three ranges.

        Examples
        --------
        >>> import torch
        >>> from illada_kernels import KeyRanges
        >>> (KeyRanges.causal(3) & KeyRanges.padding(torch.tensor([2]), 3, "left")).dense()[0].int()
        tensor([[0, 0, 0],
                [0, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
        """
        if not isinstance(other, KeyRanges):
            return NotImplemented
        if self.device != other.device or not holds(self.num_keys == other.num_keys):
            raise ValueError(f"&: expected the same num_keys and device, got {self!r} and {other!r}")
        for a, b in zip(self.bounds.shape[:2], other.bounds.shape[:2]):
            if not (known(a == 1) or known(b == 1) or holds(a == b)):
                raise ValueError(f"&: expected batch and rows that are equal or 1, got {self!r} and {other!r}")
        bounds, parts = intersect(canonical(self.bounds, self.num_keys), canonical(other.bounds, self.num_keys))
        expected = "&: expected at most two key ranges a row"
        refuse(parts == 3, parts, expected, lambda batch, row, _: f"batch entry {batch}, row {row} would need three")
        return KeyRanges(bounds, self.num_keys)

    def dense(self) -> Tensor:
        """The mask as bool (B or 1, Sq or 1, num_keys), True where attention is allowed; one byte an entry."""
        lo0, hi0, lo1, hi1 = clamp_bounds(self.bounds, self.num_keys).unsqueeze(-2).unbind(-1)  # each (B, Sq, 1)
        key = torch.arange(self.num_keys, device=self.device, dtype=torch.int32)
        return ((lo0 <= key) & (key < hi0)) | ((lo1 <= key) & (key < hi1))

    def density(self) -> Tensor:
        """The allowed fraction of all (row, key) pairs: a 0-d float32 tensor on the device; 0 if there are no pairs.

        Examples
        --------
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.causal(4).density()
        tensor(0.6250)
        """
        lo0, hi0, lo1, hi1 = clamp_bounds(self.bounds, self.num_keys).unbind(-1)
        pairs = self.bounds.shape[0] * self.bounds.shape[1] * self.num_keys
        allowed = ((hi0 - lo0) + (hi1 - lo1)).sum().to(torch.float64)
        return allowed.div(torch.sym_max(pairs, 1)).to(torch.float32)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.bounds, self.num_keys = savable(state["bounds"]), state["num_keys"]

    def __repr__(self) -> str:
        if not isinstance(self.bounds, Tensor):  # a pytree of something else
            return f"KeyRanges(bounds={self.bounds!r}, num_keys={self.num_keys!r})"
        batch, rows, _ = self.bounds.shape
        return f"KeyRanges(batch={batch}, rows={rows}, num_keys={self.num_keys}, device={self.device})"


# ---- arguments -------------------------------------------------------------------------------------------------------


def _size(name: str, value: int, least: int = 0, most: int = _MOST) -> int:
    """A checked size as Python's int, or symbolic."""
    if torch.compiler.is_compiling() and type(value).__module__ == "numpy":
        value = int(value)  # Dynamo takes a NumPy scalar for an array
    expect_integer(name, value, least, most)
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def _expect_integers(name: str, value: Tensor, *dims: int) -> None:
    expect_tensor(name, value, torch.int32, torch.int64)
    if value.dim() not in dims:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dims))} dimensions, got shape {tuple(value.shape)}")


def _expect_mask(mask: Tensor) -> None:
    expect_tensor("mask", mask, torch.bool, advice="use mask.bool() for zeros and ones, bias == 0 for a bias")


def _device_of(name: str, tensor: Tensor, device: Device) -> torch.device:
    if device is not None and torch.device(device) != tensor.device:
        raise ValueError(f"device: expected {tensor.device}, where {name} is, got {device}; leave it out")
    return tensor.device


def _rows(name: str, count: int, device: Device) -> Tensor:
    return torch.arange(_size(name, count), dtype=torch.int32, device=device)[None]  # (1, count)


def _block(row: Tensor, start: Tensor | int, end: Tensor | int, block: int) -> tuple[Tensor, Tensor]:
    """Start and end of each row's block; blocks count from `start`, the last is cut at `end`."""
    block = _size("block", block, least=1)
    first = start + (row - start) // block * block
    return first, first + (end - first).clamp(max=block)  # first + block could overflow


# ---- pytree ----------------------------------------------------------------------------------------------------------


def _flatten(ranges: KeyRanges) -> tuple[list[Any], None]:
    return [ranges.bounds, ranges.num_keys], None


def _flatten_with_keys(ranges: KeyRanges) -> tuple[list[tuple[Any, Any]], None]:
    key = torch.utils._pytree.GetAttrKey
    return [(key("bounds"), ranges.bounds), (key("num_keys"), ranges.num_keys)], None


def _unflatten(values: Iterable[Any], _: None) -> KeyRanges:
    ranges = object.__new__(KeyRanges)  # leaves may be anything: no checks
    bounds, ranges.num_keys = values
    ranges.bounds = savable(bounds)
    return ranges


torch.utils._pytree.register_pytree_node(
    KeyRanges,
    _flatten,
    _unflatten,
    serialized_type_name=f"{__package__}.KeyRanges",
    flatten_with_keys_fn=_flatten_with_keys,
)
torch.serialization.add_safe_globals([KeyRanges])  # for torch.load(..., weights_only=True)
