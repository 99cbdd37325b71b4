"""KeyRanges: an attention mask in which every query sees at most two contiguous ranges of keys."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ._bounds import canonical, clamped, intersect, refuse, runs, savable
from ._bounds import clamp_bounds as clamp_bounds
from ._checks import FLOATS, expect_contiguous, expect_shape, expect_tensor, holds, known
from ._layouts import Layouts, expect_size


class KeyRanges(Layouts):
    """A mask of at most two key ranges per query row, the same for all heads.

    Query row i may attend to key j iff lo0 <= j < hi0 or lo1 <= j < hi1. Normal form is 0 <= lo0 <= hi0 <= lo1 <= hi1
    <= num_keys; a range may be empty. The constructors give normal form.

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
        self.num_keys = expect_size("num_keys", num_keys)

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
        """Returns the device of the bounds."""
        return self.bounds.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> KeyRanges:
        """Returns the same ranges on another device."""
        return KeyRanges(self.bounds.to(device, non_blocking=non_blocking), self.num_keys)

    def pin_memory(self) -> KeyRanges:
        """Returns the same ranges in pinned memory; torch's DataLoader calls this with pin_memory=True."""
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
        """Returns the keys that both allow, broadcast over batch and rows. Synchronises once.

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
        """Returns the mask as bool (B or 1, Sq or 1, num_keys), True where attention is allowed; one byte an entry."""
        lo0, hi0, lo1, hi1 = self.bounds.split(1, -1)  # each (B, Sq, 1)
        key = torch.arange(self.num_keys, device=self.device, dtype=torch.int32)
        # as clamp_bounds reads them: the second range starts at the largest of lo0, hi0 and lo1
        return (lo0 <= key) & ((key < hi0) | ((lo1 <= key) & (key < hi1)))

    def density(self) -> Tensor:
        """Returns the allowed fraction of all (row, key) pairs, a 0-d float32 tensor on the device; 0 without pairs.

        Examples
        --------
        >>> from illada_kernels import KeyRanges
        >>> KeyRanges.causal(4).density()
        tensor(0.6250)
        """
        lo0, hi0, lo1, hi1 = clamped(self.bounds, self.num_keys)
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


def _expect_mask(mask: Tensor) -> None:
    expect_tensor("mask", mask, torch.bool, advice="use mask.bool() for zeros and ones, bias == 0 for a bias")


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
