"""Partials from hidden states: the head's product, reduced where it is computed."""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import triton
import triton.language as tl

from .noise import INF, row_state
from .partials import UNSPECIALIZED, added, changed, fold, load_partial, store_partial

RUN = tl.constexpr(8)  # id pairs of a run, of which the draw kernel knows the largest logit before it reads any


@triton.jit
def tile_logits(
    pair,
    x_rows,
    active,
    head,
    head_v,
    head_bias,
    dim,
    vocab,
    bias_ids,
    bias_values,
    biases,
    forbidden,
    forbids,
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    """Returns (P, N) logits of ids 2 * pair, and of 2 * pair + 1: two products of one layout."""
    d = tl.arange(0, BLOCK_D)
    even_rows = head + (2 * pair).to(tl.int64)[:, None] * head_v + d[None, :]  # (P, D)
    even_there, odd_there = 2 * pair < vocab, 2 * pair + 1 < vocab
    even = tl.zeros([PAIRS, BLOCK_N], tl.float32)
    odd = tl.zeros([PAIRS, BLOCK_N], tl.float32)
    for start in range(0, dim, BLOCK_D):
        if EVEN_D:
            x = tl.load(x_rows + start, mask=active[None, :], other=0.0)
            w0 = tl.load(even_rows + start, mask=even_there[:, None], other=0.0)
            w1 = tl.load(even_rows + head_v + start, mask=odd_there[:, None], other=0.0)
        else:
            within = start + d < dim
            x = tl.load(x_rows + start, mask=active[None, :] & within[:, None], other=0.0)
            w0 = tl.load(even_rows + start, mask=even_there[:, None] & within[None, :], other=0.0)
            w1 = tl.load(even_rows + head_v + start, mask=odd_there[:, None] & within[None, :], other=0.0)
        x = x.to(w0.dtype)
        even = tl.dot(w0, x, even, input_precision="ieee")
        odd = tl.dot(w1, x, odd, input_precision="ieee")
    if head_bias is not None:
        even += tl.load(head_bias + 2 * pair, mask=even_there, other=0.0).to(tl.float32)[:, None]
        odd += tl.load(head_bias + 2 * pair + 1, mask=odd_there, other=0.0).to(tl.float32)[:, None]
    even = changed(even, added(2 * pair, vocab, bias_ids, bias_values, biases, forbidden, forbids)[:, None])
    odd = changed(odd, added(2 * pair + 1, vocab, bias_ids, bias_values, biases, forbidden, forbids)[:, None])
    return even, odd


@triton.jit
def run_maxima(even, odd):
    """Returns (P / RUN, C), the largest logit of each run of a tile, from logits (P, C); NaN and inf do not count."""
    even, odd = tl.where(even < INF, even, -INF), tl.where(odd < INF, odd, -INF)
    runs = tl.reshape(tl.maximum(even, odd), [even.shape[0] // RUN, RUN, even.shape[1]])
    return tl.max(runs, 1)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def head_kernel(
    hidden,
    hidden_b,
    hidden_k,
    head,
    head_v,
    head_bias,
    dim,
    scratch,
    tops,
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
    PAIRS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    NOISE: tl.constexpr,
    NEEDS: tl.constexpr,
    REVISES: tl.constexpr,
):
    """l = hidden . head_v + head_bias_v for up to BLOCK_N rows, reduced to a partial per row.
    One program owns the tiles of 2 * PAIRS ids of its group; tiles and groups depend on V alone. It reads their rows of
    the head once (2 * PAIRS * D elements a tile), and every hidden row, out of the second level cache, once a tile.
    Products accumulate in float32 over D in steps of BLOCK_D, for each row alike: BLOCK_N only says how many columns
    one instruction has. A tile's logits then pass, CHUNK rows at a time, through a scratch of the program's own that
    stays in the cache, so that registers do not grow with the rows. Even and odd ids are two products, so that an id
    pair's noise is drawn once. Rows that take no part are not read; NaN in one row stays there. Ties to the lowest id.
    Where tops (rows, runs) is given, the call truncates: each tile has a scratch of its own, tops takes the largest
    logit of each run, and rows with noise get no best score here, because the draw kernel finds it in the scratch.
    """
    group = tl.program_id(0)
    row = tl.arange(0, BLOCK_N)
    active, b, k, _unused = row_state(
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
    x_rows = hidden + (b * hidden_b + k * hidden_k)[None, :] + tl.arange(0, BLOCK_D)[:, None]  # (D, N)
    tiles = tl.cdiv(vocab, 2 * PAIRS)
    first_tile = group * tiles // groups
    for tile in range(first_tile, (group + 1) * tiles // groups):
        pair = tile * PAIRS + tl.arange(0, PAIRS)
        slot = group if tops is None else tile
        own = (
            scratch + tl.cast(slot, tl.int64) * (2 * PAIRS * BLOCK_N) + tl.arange(0, PAIRS)[:, None] * BLOCK_N
        )  # (P, 1)
        even, odd = tile_logits(
            pair,
            x_rows,
            active,
            head,
            head_v,
            head_bias,
            dim,
            vocab,
            bias_ids,
            bias_values,
            biases,
            forbidden,
            forbids,
            PAIRS,
            BLOCK_N,
            BLOCK_D,
            EVEN_D,
        )
        tl.store(own + row[None, :], even)
        tl.store(own + PAIRS * BLOCK_N + row[None, :], odd)
        tl.debug_barrier()
        for first in range(0, rows, CHUNK):
            some = first + tl.arange(0, CHUNK)
            there, _some_b, _some_k, state = row_state(
                some,
                some < rows,
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
            some_even, some_odd = tl.load(own + some[None, :]), tl.load(own + PAIRS * BLOCK_N + some[None, :])
            top, second, total, surprise, score, logit, held_logit, best = load_partial(
                partials, best_ids, groups, rows, group, some, there & (tile > first_tile)
            )
            top, second, total, surprise, score, logit, held_logit, best = fold(
                some_even,
                some_odd,
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
                None,
                NOISE,
                NEEDS,
            )
            if tops is not None:
                _held, _key0, _key1, _position, _step, t, _scale = state
                score = tl.where(t > 0, -INF, score)
                run = tile * (PAIRS // RUN) + tl.arange(0, PAIRS // RUN)
                of_rows = tops + some.to(tl.int64)[None, :] * (tiles * (PAIRS // RUN))
                tl.store(of_rows + run[:, None], run_maxima(some_even, some_odd), mask=there[None, :])
            tl.debug_barrier()  # all threads have read the partial
            store_partial(
                partials,
                best_ids,
                groups,
                rows,
                group,
                some,
                there,
                top,
                second,
                total,
                surprise,
                score,
                logit,
                held_logit,
                best,
            )
        tl.debug_barrier()  # all threads have read the scratch
