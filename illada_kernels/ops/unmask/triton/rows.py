"""Partials from logits."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .noise import row_state
from .partials import UNSPECIALIZED, added, changed, empty_partial, fold, store_partial


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "first_id", "first_row"))
def rows_kernel(
    logits,
    logits_b,
    logits_k,
    first_row,
    first_id,
    ids,
    head_bias,
    vocab,
    rows,
    count,
    tokens,
    token_b,
    length,
    positions,
    position_b,
    position_k,
    frozen,
    frozen_b,
    frozen_l,
    mask_id: tl.int64,
    noise_positions,
    noise_b,
    noise_k,
    temperature,
    temperature_number,
    temperature_b,
    confidence_temperature,
    confidence_number,
    confidence_b,
    seed,
    seed_number: tl.int64,
    seed_b,
    step,
    step_number: tl.int64,
    step_b,
    bias_ids,
    bias_values,
    biases,
    forbidden,
    forbids,
    partials,
    best_ids,
    groups,
    bounds,
    SPAN: tl.constexpr,
    PAIRS: tl.constexpr,
    NOISE: tl.constexpr,
    NEEDS: tl.constexpr,
    REVISES: tl.constexpr,
    DENSE: tl.constexpr,
):
    """Reduces logits to the same partials: of ids [first_id, first_id + ids) of rows from first_row on.
    logits: (B, K, V) as given, or DENSE: (rows from first_row on, ids) of a product, head_bias still to be added.
    One program owns SPAN ids of one row and reads them once, in blocks of 2 * PAIRS; it ends at once where the row
    takes no part. Noise is drawn for the logits that reach the row's bound. Ties to the lowest id."""
    spans = tl.cdiv(ids, SPAN)
    local, span = tl.program_id(0) // spans, tl.program_id(0) % spans
    row = first_row + local + tl.arange(0, 1)
    active, b, k, state = row_state(
        row,
        row < rows,
        count,
        tokens,
        token_b,
        length,
        positions,
        position_b,
        position_k,
        frozen,
        frozen_b,
        frozen_l,
        mask_id,
        noise_positions,
        noise_b,
        noise_k,
        temperature,
        temperature_number,
        temperature_b,
        confidence_temperature,
        confidence_number,
        confidence_b,
        seed,
        seed_number,
        seed_b,
        step,
        step_number,
        step_b,
        REVISES,
        NEEDS,
    )
    if tl.max(active.to(tl.int32), 0) > 0:
        if DENSE:
            source = logits + local.to(tl.int64) * logits_k
        else:
            source = logits + tl.sum(b * logits_b + k * logits_k, 0)
        top, second, total, surprise, score, logit, held_logit, best = empty_partial(1)
        bound = None
        if bounds is not None:
            bound = tl.load(bounds + row)
        side = tl.arange(0, 2)[None, :]
        for start in range(span * SPAN, tl.minimum(ids, (span + 1) * SPAN), 2 * PAIRS):
            at = start + 2 * tl.arange(0, PAIRS)
            both = at[:, None] + side  # (P, 2): ids within the slice
            x = tl.load(source + both, mask=both < ids, other=0.0).to(tl.float32)
            if head_bias is not None:
                x += tl.load(head_bias + first_id + both, mask=both < ids, other=0.0).to(tl.float32)
            even, odd = tl.split(x)
            pair = (first_id + at) // 2
            even = changed(even, added(2 * pair, vocab, bias_ids, bias_values, biases, forbidden, forbids))
            odd = changed(odd, added(2 * pair + 1, vocab, bias_ids, bias_values, biases, forbidden, forbids))
            top, second, total, surprise, score, logit, held_logit, best = fold(
                even[:, None],
                odd[:, None],
                pair,
                state,
                top,
                second,
                total,
                surprise,
                score,
                logit,
                held_logit,
                best,
                bound,
                NOISE,
                NEEDS,
            )
        store_partial(
            partials,
            best_ids,
            groups,
            rows,
            first_id // SPAN + span,
            row,
            active,
            top,
            second,
            total,
            surprise,
            score,
            logit,
            held_logit,
            best,
        )
