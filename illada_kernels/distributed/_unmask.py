"""unmask over ranks that share the vocab."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from .._checks import FLOATS, cast_for_autocast, expect_layout
from ..ops.unmask import Unmasked
from ..ops.unmask.checks import LogitBias, Options, check_head, checked
from ..ops.unmask.op import OPERATOR
from ..rules import Edit, Remask, Rule
from ._group import check_piece, group_name


def unmask(
    hidden: Tensor,
    local_head: Tensor,
    tokens: Tensor,
    positions: Tensor,
    rule: Rule,
    *,
    mask_id: int,
    vocab_start: int,
    vocab_size: int,
    group: dist.ProcessGroup | None = None,
    confidence: str = "probability",
    order: str = "confidence",
    rank_temperature: float | Tensor = 0.0,
    temperature: float | Tensor = 0.0,
    confidence_temperature: float | Tensor = 1.0,
    seed: int | Tensor = 0,
    step: int | Tensor = 0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    forbid: Sequence[int] | None = None,
    defer: Sequence[int] = (),
    logit_bias: LogitBias | None = None,
    revise: Edit | Remask | None = None,
    frozen: Tensor | None = None,
    noise_positions: Tensor | None = None,
    local_bias: Tensor | None = None,
    backend: str | None = None,
) -> Unmasked:
    """Runs `illada_kernels.unmask` with an LM head whose rows lie on the ranks of a process group.

    Parameters
    ----------
    hidden
        (B, K, D), the same on every rank, as are tokens, positions, the rule and every option.
    local_head
        (n, D), this rank's rows of the head: those of the ids vocab_start .. vocab_start + n, at least one.
    tokens
        (B, L) int64, written in place on every rank.
    vocab_start, vocab_size
        Where this rank's ids begin, and how many all ranks have. The pieces follow each other in order of ranks.
    group
        The ranks that share the head. None: all.
    local_bias
        (n,), this rank's part of the head's bias.
    positions, rule, mask_id and the other options
        As in `illada_kernels.unmask`. Ids are those of the whole vocab.

    Returns
    -------
    Unmasked
        (proposal, confidence, committed, remaining), with the same bits on every rank.

    Raises
    ------
    TypeError, ValueError, RuntimeError
        As `illada_kernels.unmask`; for a call before torch.distributed is initialised; on a CPU for pieces that leave
        out or repeat an id, which on a GPU commit nothing.

    Notes
    -----
    Noise depends on the global token id, so that ranks draw what one process draws. On "cpu" a logit has the same bits
    wherever it is computed, and so have proposals; confidences are sums over the vocab, of the same parts where pieces
    begin at multiples of 2048, else equal up to float32's rounding. "reference" is equal up to the rounding of its
    matmul. On a GPU "reference" runs, in plain PyTorch.
    Two all-gathers: 48 bytes a row and 2048 ids ("cpu"), or 80 bytes a row ("reference"). top_k and top_p add one for
    each 4 bits of a logit, 256 bytes a row: a search for the least logit that is kept. Logits never cross ranks.

    Examples
    --------
    >>> import torch
    >>> import torch.distributed as dist
    >>> from illada_kernels import TopK, distributed
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # torchrun's need no arguments
    >>> local_head = torch.eye(5)  # of one rank all
    >>> hidden = torch.tensor([[[0.0, 3, 0, 0, 0], [0, 0, 9, 0, 0]]])
    >>> tokens, positions = torch.tensor([[0, 4, 4]]), torch.tensor([[1, 2]])
    >>> vocab = {"vocab_start": 0, "vocab_size": 5}
    >>> distributed.unmask(hidden, local_head, tokens, positions, TopK(1), mask_id=4, **vocab).proposal
    tensor([[1, 2]])
    >>> tokens
    tensor([[0, 4, 2]])
    >>> dist.destroy_process_group()
    """
    expect_layout("hidden", hidden, FLOATS, "B", "K", "D", contiguous=True)
    hidden, local_head, local_bias = cast_for_autocast(hidden.device, hidden, local_head, local_bias)
    check_head(hidden, local_head, local_bias, "local_head", "local_bias")
    check_piece(local_head.shape[0], vocab_start, vocab_size)
    options = Options(
        mask_id,
        confidence,
        order,
        rank_temperature,
        temperature,
        confidence_temperature,
        seed,
        step,
        top_k,
        top_p,
        min_p,
        forbid,
        defer,
        logit_bias,
        revise,
        frozen,
        noise_positions,
    )
    source = "hidden", hidden, local_head, local_bias, vocab_size
    call = checked(*source, tokens, positions, rule, options, backend, group_name(group), vocab_start)
    return Unmasked(*OPERATOR(call))
