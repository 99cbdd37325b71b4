"""Drafts of masks: a model with a causal mode verifies its own draft, a block drafter (DFlash) keeps it as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import illada_kernels
from illada_kernels import KeyRanges, TopK

from ..errors import PromptError
from ..model import Model
from .cache import Cache
from .config import GenerationConfig
from .generation import Generation, ask, until_stop
from .loop import Step, check_filled
from .replay import LateFlag
from .settings import NO_LOOP, refuse


def check(config: GenerationConfig) -> None:
    """Raises PromptError for settings that a greedy draft has no use for."""
    refuse(config, (*NO_LOOP, "steps_per_block"))
    for name in ("temperature", "guidance", "rank_temperature"):
        if getattr(config, name) != 0:
            raise PromptError(f"{name}: expected 0 with sampler {config.sampler!r}, which is greedy")
    if config.sampler_options:
        raise PromptError(f"sampler_options: expected none for {config.sampler}; block_length is the draft's length")


def speculate(
    model: Model,
    rows: list[list[int]],
    config: GenerationConfig,
    stop_ids: tuple[int, ...],
    callback: Callable[[Step], object] | None,
    verify: bool = True,
) -> Generation:
    """Returns what greedy decoding by the causal mode gives, in fewer passes where drafts are right.

    After Nemotron-Labs-Diffusion (arXiv 2607.05722). With n tokens known, a pass over [token n - 1, K masks], which see
    each other and all that is known, drafts K tokens. A causal pass over [token n - 1, draft] gives the token after
    each; the draft's longest prefix that agrees is accepted, and one token more. Keys of known tokens are causal.
    Without `verify` all K are accepted, and the causal pass only writes their keys: what a block drafter says by itself
    (DFlash, arXiv 2602.06036), trained with blocks of K + 1.
    """
    for b, row in enumerate(rows):
        if not row:
            raise PromptError(f"prompt {b}: expected a token at least, for a draft continues the last one")
    if not rows:
        return Generation([], [], [], [], 0)
    c, device, k = model.config, model.device, min(config.block_length or 8, config.max_new_tokens)
    longest = max(map(len, rows))
    columns = longest + config.max_new_tokens + k + 1
    table = [row + [c.mask_id] * (columns - len(row)) for row in rows]
    tokens = torch.tensor(table, dtype=torch.int64, device=device)
    begin = torch.tensor([len(row) for row in rows], dtype=torch.int64, device=device)
    end, known = begin + config.max_new_tokens, begin.clone()
    stops = torch.tensor(stop_ids, dtype=torch.int64, device=device)
    done, rounds, flag = torch.zeros_like(begin, dtype=torch.bool), torch.zeros_like(begin), LateFlag(device)
    ended = [False] * len(rows)  # by stop_when
    cache = Cache(c, len(rows), columns, device=device, dtype=model.dtype)
    model(tokens[:, :longest], up_to(torch.arange(1, longest + 1, device=device)[None], columns), None, cache.at(0))
    span, passes = torch.arange(k + 1, device=device), 1
    bias = config.logit_bias
    if bias is not None:
        ids, values = bias
        bias = (torch.tensor(ids, device=device), torch.tensor(values, dtype=torch.float32, device=device))
    options: dict[str, Any] = {"mask_id": c.mask_id, "forbid": config.forbid, "logit_bias": bias}
    for index in range(config.max_new_tokens):
        at = known[:, None] - 1 + span  # (B, K + 1) columns of the last known token and the draft
        window, fresh = cache.at(known - 1), torch.full_like(at, c.mask_id)
        draft = fresh.scatter(1, span[:1].expand(len(rows), 1), tokens.gather(1, at[:, :1]))
        sees_all = (known[:, None] + k).expand(-1, k + 1)
        hidden = model(draft, up_to(sees_all, columns), at, window)
        places = span[1:].expand(len(rows), k)
        out = illada_kernels.unmask(hidden[:, 1:], model.head_weight, draft, places, TopK(k), **options)
        hidden = model(draft, up_to(at + 1, columns), at, window, shift=False)
        if verify:
            places = span.expand(len(rows), k + 1)
            out = illada_kernels.unmask(hidden, model.head_weight, fresh, places, TopK(k + 1), **options)
            agree = (fresh[:, :k] == draft[:, 1:]).cumprod(1).sum(1)  # tokens of the draft that are accepted
        else:
            fresh, agree = draft.roll(-1, 1), torch.full_like(known, k - 1)
        taken = (span <= agree[:, None]) & (at + 1 < end[:, None]) & ~done[:, None]
        # Beyond what is taken a later round writes; nothing of it is seen before.
        tokens.scatter_(1, at + 1, torch.where(taken, fresh, c.mask_id))
        rounds += ~done
        known = known + taken.sum(1)
        done = done | (torch.isin(fresh, stops) & taken).any(1)
        if config.stop_when is not None:
            held = ask(config.stop_when, (~done).tolist(), tokens, begin.tolist(), known)
            ended = [a or b for a, b in zip(ended, held)]
            done = done | torch.tensor(held, device=device)
        done = done | (known >= end)
        passes += 2
        flag.write(done.all())
        if callback is not None:
            where = (tokens, [0] * len(rows), index, 0, torch.where(taken, at + 1, -1))
            confidence = torch.nn.functional.pad(out.confidence, (0, k + 1 - out.confidence.shape[1]))
            callback(Step(*where, taken, confidence, passes))
        if flag.read():
            break
    new = [row[a:b] for row, a, b in zip(tokens.tolist(), begin.tolist(), known.tolist())]
    texts, stopped = until_stop(new, stop_ids, ended)
    check_filled(texts, c)
    return Generation(texts, stopped, (2 * rounds).tolist(), (known - begin).tolist(), passes)


def up_to(high: Tensor, num_keys: int) -> KeyRanges:
    """Returns ranges in which a row sees the keys before `high` (B or 1, S)."""
    low = torch.zeros_like(high)
    return KeyRanges(torch.stack([low, high, high, high], dim=-1).to(torch.int32), num_keys)
