"""Every objective's mean is the sum over all corruptions of a small model, and no weight depends on micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from illada.training import objectives
from illada.training.objectives import Example
from torch import Tensor

from tests.helpers.enumerated import (
    DRAWS,
    LEVELS,
    MASK,
    TEXT,
    VOCAB,
    above,
    anchors_mean,
    blocks_bound,
    canvases_mean,
    ce,
    check,
    edits_mean,
    generator,
    hide,
    next_token_mean,
    repeated,
    subsets,
    tensors,
    tiny,
    whole_bound,
)

# ---- every token sees every other ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("case", ["llada", "mdlm", "complementary"])
def test_full_sequence_estimates_the_bound(case, shifted):
    model, text = tiny(shifted), TEXT[:4].tolist()
    levels = LEVELS.clamp(min=1 / 4) if case == "mdlm" else above(1e-3)
    exact = whole_bound(model, text, levels) / 4
    weighting = "mdlm" if case == "mdlm" else "llada"
    made = objectives.full_sequence(
        repeated(4), MASK, generator(), weighting=weighting, complementary=case == "complementary"
    )
    check(made, model, exact)


@pytest.mark.parametrize("shifted", [False, True])
def test_cart_estimates_dream_s_weighted_sum(shifted):
    model, text, total = tiny(shifted), TEXT[:4].tolist(), 0.0
    levels = above(1e-3)
    for mask in subsets(4):
        chance = (levels ** sum(mask) * (1 - levels) ** (4 - sum(mask))).mean()
        losses = ce(model, hide(text, list(mask)), text)
        for i in (i for i in range(4) if mask[i]):
            weight = sum(0.5 * 0.3 * 0.7 ** (abs(i - j) - 1) for j in range(4) if not mask[j])
            total += float(chance * weight * losses[i]) / 4
    check(objectives.full_sequence(repeated(4), MASK, generator(), weighting="cart"), model, total)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_cart_weights_by_chunks_are_the_written_out_sum(length):
    masked = torch.rand(3, length, generator=generator()) < 0.5
    distance = (torch.arange(length)[:, None] - torch.arange(length)).abs().double()
    kernel = (0.5 * 0.3 * 0.7 ** (distance - 1)).masked_fill(distance == 0, 0)
    torch.testing.assert_close(
        objectives.cart_weight(masked).double(), (~masked).double() @ kernel, rtol=1e-5, atol=1e-7
    )


def test_sft_estimates_the_bound_of_the_answer():
    model, text = tiny(), TEXT[:5].tolist()
    exact = whole_bound(model, text, above(1e-3), prompt=2) / 3
    check(objectives.sft(repeated(5), torch.full((DRAWS,), 2), MASK, generator()), model, exact)


def test_packed_windows_estimate_the_bound_of_their_pieces():
    """A window is whole with probability 0.7, else cut at 1, 2 or 3 alike; the denominator is all tokens."""
    model, text, levels = tiny(), TEXT[:4].tolist(), above(0.05)
    pieces = sum(whole_bound(model, part, levels) for cut in (1, 2, 3) for part in (text[:cut], text[cut:])) / 3
    exact = (0.7 * whole_bound(model, text, levels) + 0.3 * pieces) / 4
    documents = objectives.split_windows(DRAWS, 4, 0.3, generator(5))
    check(objectives.packed(repeated(4), MASK, generator(), documents=documents, eps=0.05), model, exact)


@pytest.mark.parametrize("per", ["tokens", "documents"])
@pytest.mark.parametrize("shifted", [False, True])
def test_packed_documents_see_themselves_and_padding_weighs_nothing(per, shifted):
    """One row: two tokens; a prompt of one and two tokens to learn; padding."""
    model, levels = tiny(shifted), above(1e-3)
    documents, learn = torch.tensor([7, 7, 1, 1, 1, -1]), torch.tensor([1, 1, 0, 1, 1, 1]).bool()
    first = whole_bound(model, TEXT[:2].tolist(), levels)
    second = whole_bound(model, TEXT[2:5].tolist(), levels, prompt=1)
    exact = (first + second) / 4 if per == "tokens" else (first / 2 + second / 2) / 2
    made = objectives.packed(
        repeated(6), MASK, generator(), documents=documents.expand(DRAWS, 6), learn=learn.expand(DRAWS, 6), per=per
    )
    assert not made.masked[:, [2, 5]].any()
    check(made, model, exact)


def test_one_batch_in_a_hundred_is_short_and_divided_by_what_is_left():
    lengths = []
    for seed in range(3000):
        made = objectives.full_sequence(torch.zeros(2, 10).long(), MASK, generator(seed), short_fraction=0.2)
        lengths.append(made.tokens.shape[1])
        p = 1 / (made.weight * made.tokens.numel())
        assert 0 < p.min() and p.max() <= 1 + 1e-6
    short = torch.bincount(torch.tensor(lengths), minlength=11)[1:]
    # 600 short batches, of which a tenth have all 10 columns: standard deviation of 540 is 21, of each length 7.7
    assert abs(int(short[:9].sum()) - 540) < 4 * 21 and (short[:9] - 60).abs().max() < 4 * 7.7


# ---- block diffusion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("noise", ["count", "block", "document", "clipped", "complementary", "all"])
def test_block_diffusion_estimates_its_integral(noise, shifted):
    model, text = tiny(shifted), TEXT[:4].tolist()
    levels = {"count": LEVELS, "clipped": 0.3 + 0.5 * LEVELS, "all": torch.ones_like(LEVELS)}.get(noise, above(1e-3))
    exact = blocks_bound(model, text, 2, levels, 1 / levels) / 4
    settings = {
        "clipped": {"noise": "block", "clip": (0.3, 0.8)},
        "complementary": {"noise": "block", "complementary": True},
    }.get(noise, {"noise": noise})
    check(objectives.block_diffusion(repeated(4), MASK, generator(), block=2, **settings), model, exact)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("noise", ["count", "document"])
def test_packed_block_diffusion_restarts_blocks_and_keeps_prompts(noise, shifted):
    """A document of 3 (blocks of 2 and 1), one of 2 whose first token is prompt, padding."""
    model, levels = tiny(shifted), LEVELS if noise == "count" else above(1e-3)
    documents, learn = torch.tensor([0, 0, 0, 1, 1, -1]), torch.tensor([1, 1, 1, 0, 1, 1]).bool()
    exact = blocks_bound(model, TEXT[:3].tolist(), 2, levels, 1 / levels)
    exact += blocks_bound(model, TEXT[3:5].tolist(), 2, levels, 1 / levels, prompt=1)
    packing = {"documents": documents.expand(DRAWS, 6), "learn": learn.expand(DRAWS, 6)}
    made = objectives.block_diffusion(repeated(6), MASK, generator(), block=2, noise=noise, **packing)
    assert not made.masked[:, [3, 5]].any()
    check(made, model, exact / 4)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("causal, diffusion, autoregressive", [("clean", 0.3, 1.0), ("both", 1.0, 0.2)])
def test_joint_is_the_weighted_sum_of_both_means(causal, diffusion, autoregressive, shifted):
    model, text, levels = tiny(shifted), TEXT[:4].tolist(), above(1e-3)
    exact = diffusion * blocks_bound(model, text, 2, levels, 1 / levels, causal) / 4
    exact += autoregressive * next_token_mean(model, text)
    settings = {"causal": causal, "diffusion": diffusion, "autoregressive": autoregressive}
    made = objectives.joint(repeated(4), MASK, generator(), block=2, **settings)
    check(made, model, exact)
    cut = objectives.joint(
        repeated(4), MASK, generator(), block=2, documents=torch.tensor([0, 0, 1, 1]).expand(DRAWS, 4), **settings
    )
    assert cut.masked[0, 4:].tolist() == [True, False, True, False]  # no document's end predicts the next one's start


@pytest.mark.parametrize("shifted", [False, True])
def test_anchor_blocks_are_the_mean_over_anchors(shifted):
    """Anchors at 0 .. 3 of six tokens, three tokens a block; weights 1 and exp(-1/2), which sum to 1 in each block."""
    model = tiny(shifted)
    exact = anchors_mean(model, TEXT.tolist())
    made = objectives.anchor_blocks(repeated(6), MASK, generator(), block=3, count=2, gamma=2.0)
    assert float(made.weight[made.masked].double().sum()) == pytest.approx(1, abs=1e-4)
    check(made, model, exact)


def test_anchor_blocks_stay_in_a_document_and_miss_where_nothing_fits():
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, -1]])
    made = objectives.anchor_blocks(TEXT.repeat(2, 1), MASK, generator(), block=3, count=4, documents=documents)
    masked = made.masked.view(2, 4, 3)
    assert masked[0].sum() == 4 and not masked[1].any()
    at = made.positions[0, 6:].view(4, 3)[masked[0].any(1)]
    assert at.tolist() == [[0, 1, 2], [0, 1, 2]]
    seen = made.key_ranges.dense()[0, 6:, :6][made.masked[0]]
    assert not seen[:, :3].any() or not seen[:, 3:].any()


# ---- other noise -----------------------------------------------------------------------------------------------------


def test_edits_are_the_mean_over_all_single_edits():
    """Three tokens, most = 2/3: none with probability 1/2, else one of 1/3 insert, delete, substitute."""
    model = tiny()
    exact = edits_mean(model, TEXT[:3].tolist())
    check(objectives.edit(repeated(3), MASK, VOCAB, generator(), most=2 / 3), model, exact)


def test_seed_diffusion_adds_edits_in_the_last_fifth():
    before = objectives.seed_diffusion(repeated(4), MASK, VOCAB, generator(), done=0.79)
    plain = objectives.full_sequence(repeated(4), MASK, generator())
    assert all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(plain)))
    after = objectives.seed_diffusion(repeated(4), MASK, VOCAB, generator(), done=0.8, most=0.5)
    assert torch.equal(after.tokens[:DRAWS], plain.tokens) and torch.equal(after.weight[:DRAWS], plain.weight)
    assert after.masked[DRAWS:].all() and float(after.weight[DRAWS:].double().sum()) == pytest.approx(1, abs=1e-4)
    assert 0.4 < float((after.tokens[DRAWS:] == repeated(4)).all(1).float().mean()) < 0.7  # none with probability 1/2


@pytest.mark.parametrize("shifted", [False, True])
def test_token_to_token_is_the_mean_over_masks_and_replacements(shifted):
    """Three tokens, the first a prompt: each of the others is masked, replaced by any of five ids, or kept."""
    model, text, exact, levels = tiny(shifted), TEXT[:3].tolist(), 0.0, above(1e-3)
    ids = [i for i in range(VOCAB) if i != MASK]
    for states in itertools.product([None, MASK, *ids], repeat=2):
        shown = [text[0], *(x if state is None else state for x, state in zip(text[1:], states))]
        losses = ce(model, shown, text)[1:]
        masks = sum(state == MASK for state in states)
        replaced = sum(state is not None and state != MASK for state in states)
        chance = levels**masks * (1 - levels) ** (2 - masks)
        chance = chance * (0.3 / len(ids)) ** replaced * 0.7 ** (2 - masks - replaced)
        for loss, state in zip(losses, states):
            if state is not None:
                exact += float((chance * (1 / levels if state == MASK else 0.5)).mean() * loss) / 2
    learn = (torch.arange(3) > 0).expand(DRAWS, 3)
    made = objectives.sft(repeated(3), torch.ones(DRAWS).long(), MASK, generator())
    made = objectives.token_to_token(made, MASK, VOCAB, generator(1), rate=0.3, weight=0.5, learn=learn)
    check(made, model, exact)


@pytest.mark.parametrize("causal", ["clean", None])
def test_a_uniform_canvas_is_the_mean_over_all_canvases(causal):
    model = tiny()
    exact = canvases_mean(model, TEXT[:4].tolist(), causal)
    made = objectives.uniform_canvas(repeated(4), MASK, VOCAB, generator(), block=2, causal=causal)
    assert (made.tokens != MASK).all() and made.masked.all()
    check(made, model, exact)


# ---- micro-batches ---------------------------------------------------------------------------------------------------


def batch(batch_size: int = 6, length: int = 8) -> Tensor:
    tokens = torch.randint(0, VOCAB - 1, (batch_size, length), generator=generator(9))
    return tokens + (tokens >= MASK).long()


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0, 0, 0]]).repeat(3, 1)
LEARN = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]]).bool().repeat(3, 1)
PACKED = {"documents": DOCUMENTS, "learn": LEARN}
MAKERS: dict[str, Callable[[], Example]] = {
    "full": lambda: objectives.full_sequence(batch(), MASK, generator(), complementary=True),
    "cart": lambda: objectives.full_sequence(batch(), MASK, generator(), weighting="cart"),
    "sft": lambda: objectives.sft(batch(), torch.arange(6), MASK, generator()),
    "packed": lambda: objectives.packed(batch(), MASK, generator(), **PACKED, per="documents"),
    "block": lambda: objectives.block_diffusion(batch(), MASK, generator(), block=4),
    "packed blocks": lambda: objectives.block_diffusion(
        batch(), MASK, generator(), block=2, noise="document", complementary=True, **PACKED
    ),
    "joint": lambda: objectives.joint(batch(), MASK, generator(), block=2, **PACKED),
    "anchors": lambda: objectives.anchor_blocks(batch(), MASK, generator(), block=2, count=3, documents=DOCUMENTS),
    "seed": lambda: objectives.seed_diffusion(batch(), MASK, VOCAB, generator(), done=1.0),
    "tokens": lambda: objectives.token_to_token(
        objectives.block_diffusion(batch(), MASK, generator(), block=2), MASK, VOCAB, generator()
    ),
    "canvas": lambda: objectives.uniform_canvas(batch(), MASK, VOCAB, generator(), block=4, **PACKED),
}


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_losses_and_gradients_of_micro_batches_sum_to_the_batch_s(name, shifted):
    """Float32 sums in another order: at most 1e-5 of the largest gradient of a parameter."""
    made, model = MAKERS[name](), tiny(shifted)
    loss = made.loss(model)
    loss.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters()}
    for parts in (2, 5):
        model.zero_grad()
        total = 0.0
        for part in made.split(parts):
            loss_of_part = part.loss(model)
            loss_of_part.backward()
            total += float(loss_of_part.detach())
        assert total == pytest.approx(float(loss.detach()), rel=1e-5)
        for n, p in model.named_parameters():
            assert (p.grad - wanted[n]).abs().max() <= 1e-5 * wanted[n].abs().max() + 1e-8, n


def test_rows_packed_differently_see_what_each_sees_alone():
    starts = [[3, 5], [], [1], [3, 5], [6], []]  # rows that repeat, in no order
    documents = torch.tensor([[sum(start <= column for start in row) for column in range(8)] for row in starts])
    made = objectives.block_diffusion(batch(), MASK, generator(), block=2, documents=documents)
    for row in range(6):
        alone = objectives.block_diffusion(batch()[:1], MASK, generator(), block=2, documents=documents[row, None])
        assert torch.equal(made.key_ranges.bounds[row], alone.key_ranges.bounds[0]), row
        assert torch.equal(made.positions[row], alone.positions[0]), row


@pytest.mark.parametrize("name", MAKERS)
def test_torch_s_default_device_and_dtype_change_no_batch(name):
    wanted = tensors(MAKERS[name]())
    torch.set_default_dtype(torch.float64)
    try:
        found = tensors(MAKERS[name]())
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda t: objectives.block_diffusion(t, MASK, generator(), block=2, noise="x"), "noise: expected one of"),
        (lambda t: objectives.block_diffusion(t, MASK, generator(), block=2, clip=(0.5, 0.2)), "clip: expected 0 <="),
        (
            lambda t: objectives.block_diffusion(t, MASK, generator(), block=2, complementary=True),
            'complementary: expected noise "block" or "document", got \'count\'',
        ),
        (lambda t: objectives.packed(t, MASK, generator(), learn=t < 0), "learn: expected at least one token"),
        (lambda t: objectives.packed(t, MASK, generator(), documents=t[:, :3]), r"documents: expected \(6, 8\) like"),
        (lambda t: objectives.packed(t, MASK, generator(), documents=torch.arange(-1, 7).expand(6, 8)), "padding"),
        (lambda t: objectives.packed(t, MASK, generator(), per="rows"), "per: expected one of tokens, documents"),
        (lambda t: objectives.anchor_blocks(t, MASK, generator(), block=9, count=1), "block: expected a document with"),
        (lambda t: objectives.joint(t, MASK, generator(), block=2, causal="x"), 'causal: expected "clean" or "both"'),
        (lambda t: objectives.edit(t, MASK, VOCAB, generator(), most=2.0), "most: expected a number from 0 to 1"),
        (lambda t: objectives.full_sequence(t, MASK, generator(), short_fraction=-1), "short_fraction: expected"),
        (lambda t: objectives.full_sequence(t, MASK, generator()).split(7), "parts: expected 1 to 6"),
    ],
)
def test_what_cannot_be_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(batch())
