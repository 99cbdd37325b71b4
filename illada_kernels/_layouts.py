"""The constructors of KeyRanges by layout: the masks that training and decoding need, without synchronisation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ._bounds import documents, pack
from ._checks import expect_choice, expect_integer, expect_tensor, holds

if TYPE_CHECKING:
    from typing_extensions import Self

Device = torch.device | str | None
_MOST = 2**31 - 1


class Layouts:
    """Has the constructors of masks, which KeyRanges inherits."""

    if TYPE_CHECKING:

        def __init__(self, bounds: Tensor, num_keys: int) -> None: ...

    @classmethod
    def full(cls, num_keys: int, *, device: Device = None) -> Self:
        """Lets every row see every key: bounds (1, 1, 4). LLaDA's and iLLaDA's pre-training.

        Examples
        --------
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.full(3).dense().int()
        tensor([[[1, 1, 1]]], dtype=torch.int32)
        """
        num_keys = expect_size("num_keys", num_keys)
        return cls(pack(torch.zeros(1, 1, dtype=torch.int32, device=device), num_keys), num_keys)

    @classmethod
    def padding(cls, lengths: Tensor, num_keys: int, side: Literal["left", "right"] = "right") -> Self:
        """Lets sequence b see its `lengths[b]` real keys: bounds (B, 1, 4).

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
        num_keys = expect_size("num_keys", num_keys)
        if side not in ("left", "right"):
            raise ValueError(f'side: expected "left" or "right" (where the padding lies), got {side!r}')
        real = lengths.clamp(0, num_keys)[:, None]  # (B, 1)
        return cls(pack(num_keys - real, num_keys) if side == "left" else pack(0 * real, real), num_keys)

    @classmethod
    def packed(cls, cu_seqlens: Tensor, num_tokens: int) -> Self:
        """Lets each document of one row of tokens see itself: bounds (1, num_tokens, 4).

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
        return cls(pack(*documents(cu_seqlens, rows, num_tokens)), num_tokens)

    @classmethod
    def causal(cls, s: int, num_keys: int | None = None, *, device: Device = None) -> Self:
        """Lets row i see keys 0 .. i + num_keys - s: bounds (1, s, 4). The last row sees all keys.

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
        return cls.window(s, None, 0, num_keys, device=device)

    @classmethod
    def window(
        cls, s: int, left: int | None, right: int | None, num_keys: int | None = None, *, device: Device = None
    ) -> Self:
        """Lets row i see keys p - left .. p + right, p = i + num_keys - s: bounds (1, s, 4). Local attention.

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
        num_keys = s if num_keys is None else expect_size("num_keys", num_keys)
        position = row + (num_keys - s)
        low = 0 * row if left is None else (position.clamp(min=0) - left).clamp(min=0)
        beyond = s - 1 - row  # keys after the row's own; position + right could overflow
        high = 0 * row + num_keys if right is None else (num_keys - (beyond - right).clamp(min=0)).clamp(min=0)
        return cls(pack(low, torch.maximum(low, high)), num_keys)

    @classmethod
    def block_causal(cls, s: int, block: int | Tensor, *, device: Device = None) -> Self:
        """Lets a row see its own block and all earlier ones: bounds (1 or B, s, 4). SDAR, LLaDA2, dialogue turns.

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
            return cls(pack(0 * row, edges.gather(1, following).clamp(0, s)), s)
        row = _rows("s", s, device)
        return cls(pack(0 * row, _block(row, 0, s, block)[1]), s)

    @classmethod
    def block_diffusion(
        cls,
        length: int,
        block: int,
        cu_seqlens: Tensor | None = None,
        *,
        causal: Literal["clean", "both"] | None = None,
        device: Device = None,
    ) -> Self:
        """Masks [noisy ; clean] for training, 2 * length tokens: bounds (1, 2 * length, 4).

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
        length = expect_size("length", length, most=_MOST // 2)
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
        return cls(torch.cat([noisy, clean], dim=1), 2 * length)

    @classmethod
    def anchor_blocks(cls, anchors: Tensor, length: int, block: int, cu_seqlens: Tensor | None = None) -> Self:
        """Masks keys [context ; blocks] for training a block drafter: bounds (1 or B, N * block, 4). DFlash.

        The rows are those of the blocks alone. Each sees the context before its block's anchor and its own block.

        Parameters
        ----------
        anchors : Tensor, int32 or int64, (N,) or (B, N)
            Position in the context at which each block begins. A negative one is not a block: its rows see nothing.
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
        length, block = expect_size("length", length), expect_size("block", block, least=1)
        anchors = anchors if anchors.dim() == 2 else anchors[None]  # (B or 1, N)
        rows = anchors.shape[1] * block
        num_keys = expect_size("length + N * block", length + rows)
        at = anchors[:, :, None].expand(-1, -1, block).reshape(anchors.shape[0], rows)
        before = at.clamp(0, length)
        start = 0 * before
        if cu_seqlens is not None:
            _expect_integers("cu_seqlens", cu_seqlens, 1)
            _device_of("cu_seqlens", cu_seqlens, anchors.device)
            start = documents(cu_seqlens, before, length)[0]
        own = length + _rows("N * block", rows, anchors.device) // block * block  # (1, rows)
        bounds = pack(start, before, own, own + block)
        return cls(torch.where((at >= 0)[..., None], bounds, 0), num_keys)

    @classmethod
    def cached(
        cls, lengths: Tensor, s_new: int, num_keys: int, *, block: int | None = None, left: int | None = None
    ) -> Self:
        """Lets s_new new rows a sequence see a cache of num_keys slots: bounds (B, 1 or s_new, 4).

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
        num_keys, s_new = expect_size("num_keys", num_keys), expect_size("s_new", s_new)
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
        return cls(pack(low, high), num_keys)


def expect_size(name: str, value: int, least: int = 0, most: int = _MOST) -> int:
    """Returns a checked size as Python's int, or symbolic."""
    if torch.compiler.is_compiling() and type(value).__module__ == "numpy":
        value = int(value)  # Dynamo takes a NumPy scalar for an array
    expect_integer(name, value, least, most)
    return value if isinstance(value, (int, torch.SymInt)) else int(value)


def _expect_integers(name: str, value: Tensor, *dims: int) -> None:
    expect_tensor(name, value, torch.int32, torch.int64)
    if value.dim() not in dims:
        raise ValueError(f"{name}: expected {' or '.join(map(str, dims))} dimensions, got shape {tuple(value.shape)}")


def _device_of(name: str, tensor: Tensor, device: Device) -> torch.device:
    if device is not None and torch.device(device) != tensor.device:
        raise ValueError(f"device: expected {tensor.device}, where {name} is, got {device}; leave it out")
    return tensor.device


def _rows(name: str, count: int, device: Device) -> Tensor:
    return torch.arange(expect_size(name, count), dtype=torch.int32, device=device)[None]  # (1, count)


def _block(row: Tensor, start: Tensor | int, end: Tensor | int, block: int) -> tuple[Tensor, Tensor]:
    """Returns start and end of each row's block; blocks count from `start`, the last is cut at `end`."""
    block = expect_size("block", block, least=1)
    first = start + (row - start) // block * block
    return first, first + (end - first).clamp(max=block)  # first + block could overflow
