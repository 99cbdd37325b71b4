"""Corruption and objectives: what is masked, what it weighs, and that the bounds are the bounds they claim to be."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from illada.config import ModelConfig
from illada.errors import PromptError
from illada.model import Model
from illada.tokenizer import ByteTokenizer
from illada.training import objectives
from illada.training.data import Document
from illada.training.evaluate import bound
from illada.training.objectives import Example
from torch import Tensor

from illada_kernels import KeyRanges

MASK = 256


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(block: int, seed: int = 0, **changes) -> Model:
    config = ModelConfig.preset(
        "demo",
        dim=32,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=16,
        ffn_dim=48,
        vocab_size=259,
        mask_id=256,
        eos_id=257,
        pad_id=258,
        causal_block=block,
        init_std=0.3,
        **changes,
    )
    torch.manual_seed(seed)
    return Model(config).eval()


def log_probability(model: Model, shown: Tensor, ranges: KeyRanges | None, row: int, target: int) -> float:
    """Of `target` at `row` when the model is shown `shown` (S,); the mask itself is never predicted."""
    with torch.no_grad():
        logits = model(shown[None], ranges)[0, row] @ model.head_weight.T
    logits[MASK] = -torch.inf
    return float(logits.double().log_softmax(-1)[target])


# ---- corruption ----------------------------------------------------------------------------------------------------


def test_stratified_levels_lie_one_in_each_slice_in_random_order():
    levels = objectives.stratified(50, generator())
    assert sorted((levels * 50).long().tolist()) == list(range(50))
    assert levels.tolist() != sorted(levels.tolist())
    assert (objectives.stratified(9, generator(), 0.3, 0.8) - 0.55).abs().max() <= 0.25


def test_mask_count_masks_exactly_that_many_and_every_subset_alike():
    counts = torch.arange(5).repeat_interleave(6000)
    masked = objectives.mask_count(counts, 4, generator())
    assert (masked.sum(1) == counts).all()
    twos = masked[counts == 2].long() @ torch.tensor([1, 2, 4, 8])
    share = torch.bincount(twos, minlength=16)[[3, 5, 6, 9, 10, 12]] / 6000
    # six subsets at 1/6: standard deviation sqrt(1/6 * 5/6 / 6000) = 0.0048
    assert (share - 1 / 6).abs().max() < 5 * 0.0048


def test_llada_weights_are_one_over_p_and_the_denominator_counts_all_positions():
    tokens = torch.randint(256, (8, 64))
    made = objectives.full_sequence(tokens, MASK, generator(), eps=1e-3)
    p = 1 / (made.weight * tokens.numel())  # (B, S)
    assert (p == p[:, :1]).all() and p.min() >= 1e-3 * (1 - 1e-5) and p.max() <= 1 + 1e-5
    assert ((p[:, 0].clamp(max=1 - 1e-6) - 1e-3) / (1 - 1e-3) * 8).floor().sort().values.tolist() == list(range(8))
    assert (made.tokens == torch.where(made.masked, MASK, tokens)).all()
    assert (made.targets == tokens).all() and made.key_ranges is None


def test_full_sequence_weighs_every_position_once_in_expectation():
    """E[sum of weights of masked tokens] is 1; over 400 batches the mean has a standard deviation below 0.02."""
    for weighting in ("llada", "mdlm"):
        totals = []
        for seed in range(400):
            made = objectives.full_sequence(torch.zeros(8, 32).long(), MASK, generator(seed), weighting=weighting)
            totals.append(float(made.weight[made.masked].sum()))
        error = np.std(totals) / 20
        assert error < 0.02 and abs(np.mean(totals) - 1) < 4 * error + 0.5 / 32  # p is clamped at 1/32 in "mdlm"


def test_complementary_masks_cover_every_token_once():
    tokens = torch.randint(256, (4, 32))
    made = objectives.full_sequence(tokens, MASK, generator(), complementary=True)
    assert (made.masked[:4] ^ made.masked[4:]).all()
    assert (made.targets == torch.cat([tokens, tokens])).all()
    p = 1 / (made.weight[:, 0] * 2 * tokens.numel())
    torch.testing.assert_close(p[:4] + p[4:], torch.ones(4), rtol=1e-5, atol=2e-3)  # 1 - p is kept above eps


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match="weighting: expected one of llada, mdlm, cart, got 'none'"):
        objectives.full_sequence(torch.zeros(1, 4).long(), MASK, generator(), weighting="none")


def test_cart_weights_are_the_written_out_sum():
    masked = torch.tensor([[True, False, True, True, False, True]])
    found = objectives.cart_weight(masked, p=0.3)
    for i in range(6):
        sum_ = sum(0.5 * 0.3 * 0.7 ** (abs(i - j) - 1) for j in range(6) if j != i and not masked[0, j])
        assert float(found[0, i]) == pytest.approx(sum_, rel=1e-5)


def test_sft_keeps_the_prompt_and_divides_by_the_answer():
    tokens, lengths = torch.randint(256, (6, 20)), torch.tensor([1, 5, 19, 0, 7, 10])
    made = objectives.sft(tokens, lengths, MASK, generator(3))
    prompt = torch.arange(20) < lengths[:, None]
    assert not made.masked[prompt].any() and (made.tokens[prompt] == tokens[prompt]).all()
    p = 1 / (made.weight * (20 - lengths)[:, None] * 6)
    assert (p > 0).all() and (p <= 1 + 1e-5).all()
    with pytest.raises(ValueError, match="prompt_lengths: expected at most 19"):
        objectives.sft(tokens, torch.full((6,), 20), MASK, generator())


# ---- block diffusion -----------------------------------------------------------------------------------------------


def test_block_counts_are_stratified_and_weigh_block_over_count():
    tokens = torch.randint(256, (4, 32))
    made = objectives.block_diffusion(tokens, MASK, generator(), block=4)
    counts = made.masked.view(-1, 4).sum(1)
    assert torch.bincount(counts).tolist() == [0, 8, 8, 8, 8]
    torch.testing.assert_close(made.weight * tokens.numel(), (4 / counts).repeat_interleave(4).view(4, 32))
    assert (made.tokens[:, 32:] == tokens).all()
    assert (made.positions == torch.arange(32).repeat(2)).all()
    with pytest.raises(ValueError, match="divisor of the sequence length 30"):
        objectives.block_diffusion(tokens[:, :30], MASK, generator(), block=4)


def test_hole_orders_are_permutations_with_one_middle_piece_last():
    orders = objectives.hole_order(200, 12, 0.5, generator())
    plain = (orders == torch.arange(12)).all(1)
    assert 60 < int(plain.sum()) < 150  # 100 expected, some holes are empty or at the end anyway
    for order in orders[~plain].tolist():
        jumps = [i for i in range(1, 12) if order[i] != order[i - 1] + 1]
        assert sorted(order) == list(range(12)) and len(jumps) == 2 and order[0] == 0
        assert order[jumps[1]] == order[jumps[0] - 1] + 1  # the hole begins where the text before it ended


@pytest.mark.parametrize("shifted", [False, True])
def test_blocks_of_one_give_the_exact_autoregressive_likelihood(shifted):
    model, tokens = tiny(block=1, shifted_logits=shifted), torch.randint(256, (2, 8), generator=generator())
    with torch.no_grad():
        loss = float(objectives.block_diffusion(tokens, MASK, generator(), block=1).loss(model))
    exact = 0.0
    for row in tokens:
        for i in range(8):
            shown = torch.cat([row[:i], torch.tensor([MASK])])
            exact -= log_probability(model, shown, KeyRanges.causal(i + 1), i, int(row[i])) / 16
    assert loss == pytest.approx(exact, rel=1e-5)  # float32 sums of 32 terms


@pytest.mark.parametrize("shifted", [False, True])
def test_an_order_shows_each_block_what_came_before_it_at_its_own_place(shifted):
    model, tokens = tiny(block=2, shifted_logits=shifted), torch.randint(256, (1, 8), generator=generator(1))
    order = torch.tensor([[0, 1, 6, 7, 2, 3, 4, 5]])
    made = objectives.block_diffusion(tokens, MASK, generator(2), block=2, order=order)
    losses = made.loss(model, reduction="none")[0].detach() * 8
    text = tokens[0, order[0]]
    for i in torch.nonzero(made.masked[0]).flatten().tolist():
        end = i // 2 * 2 + 2
        shown = torch.cat([text[: end - 2], made.tokens[0, end - 2 : end]])
        with torch.no_grad():
            hidden = model(shown[None], KeyRanges.block_causal(end, 2), order[:, :end])[0, i]
            logits = hidden @ model.head_weight.T
        logits[MASK] = -torch.inf
        weight = 2 / int(made.masked[0, end - 2 : end].sum())
        assert float(losses[i]) == pytest.approx(-weight * float(logits.log_softmax(-1)[text[i]]), rel=1e-4)


def test_a_block_never_sees_its_own_clean_tokens_or_what_comes_later():
    model, tokens = tiny(block=4), torch.randint(256, (1, 16), generator=generator())
    made = objectives.block_diffusion(tokens, MASK, generator(), block=4)
    with torch.no_grad():
        before = model(made.tokens, made.key_ranges, made.positions)[0, 4:8]
        made.tokens[0, 16 + 4 :] = 7  # the clean copy of block 1 and of all later blocks
        made.tokens[0, 8:16] = 9  # later noisy blocks
        assert torch.equal(model(made.tokens, made.key_ranges, made.positions)[0, 4:8], before)


# ---- the bound -----------------------------------------------------------------------------------------------------


def any_order_nats(model: Model, clean: Tensor, block: list[int], counted: tuple[int, ...] = ()) -> float:
    """The bound of one block, exactly: mean over n of b/n times the mean over subsets of n masks of their
    cross-entropies, of those that are `counted` (all by default)."""
    total, b = 0.0, len(block)
    causal = model.config.causal_block
    for n in range(1, b + 1):
        subsets = list(itertools.combinations(block, n))
        for subset in subsets:
            end = block[-1] + 1 if causal else len(clean)
            shown = clean[:end].clone()
            shown[list(subset)] = MASK
            ranges = KeyRanges.block_causal(end, causal) if causal else None
            of = set(subset) & set(counted or block)
            total -= sum(log_probability(model, shown, ranges, i, int(clean[i])) for i in of) / n / len(subsets)
    return total


@pytest.mark.parametrize("block, shifted", [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True)])
def test_the_bound_estimates_the_exact_any_order_bound(block, shifted):
    """Eight ids: two windows of 4, or, with blocks, four windows of 4 of which the first half is context only."""
    model, tokenizer, document = (
        tiny(block, seed=3, shifted_logits=shifted),
        ByteTokenizer(),
        [Document("a", b"abcdefg")],
    )
    ids = torch.tensor([*b"abcdefg", tokenizer.eos_id])
    if block:
        padded = torch.cat([torch.full((2,), tokenizer.eos_id), ids])
        blocks = [[2], [3]] if block == 1 else [[2, 3]]
        exact = sum(any_order_nats(model, padded[s : s + 4], b) for s in range(0, 8, 2) for b in blocks)
    else:
        exact = sum(any_order_nats(model, window, [0, 1, 2, 3]) for window in ids.view(2, 4))
    bits = exact / math.log(2) / 7
    if block == 1:  # no randomness: the likelihood itself
        found = bound(model, document, tokenizer, length=4)
        assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)
        assert (found.tokens, found.bytes) == (8, 7) and "blocks of 1" in found.what
        return
    singles = [bound(model, document, tokenizer, length=4, seed=seed).bits_per_byte for seed in range(100)]
    error = np.std(singles) / 10
    assert 0 < error < 0.2 * bits and abs(np.mean(singles) - bits) < 4 * error
    assert abs(bound(model, document, tokenizer, length=4, draws=100).bits_per_byte - bits) < 5 * error


@pytest.mark.parametrize("block", [0, 2])
def test_ids_before_a_document_are_given_and_count_nothing(block):
    """Ids 9 "ab" end 9 "c" end: one window of 7, or, with blocks of 2, four windows of 4."""
    model, tokenizer = tiny(block, seed=3), ByteTokenizer()
    end = tokenizer.eos_id
    ids, documents = [9, *b"ab", end, 9, *b"c", end], [Document("1", b"ab"), Document("2", b"c")]
    if block:
        padded = torch.tensor([end, end, *ids, 9])  # the filler is no BOS
        parts = [(0, [3]), (2, [2, 3]), (4, [3])]
        exact = sum(any_order_nats(model, padded[s : s + 4], b) for s, b in parts)
        exact += any_order_nats(model, padded[6:], [2, 3], counted=(2,))
    else:
        exact = any_order_nats(model, torch.tensor(ids), [1, 2, 3, 5, 6])
    length = 4 if block else 7
    found = [bound(model, documents, tokenizer, length=length, seed=s, bos=[9]) for s in range(100)]
    bits, error = (f([one.bits_per_byte for one in found]) for f in (np.mean, np.std))
    assert 0 < error < 2 * bits and abs(bits - exact / math.log(2) / 3) < 0.4 * error
    assert {(one.tokens, one.bytes) for one in found} == {(5, 3)}


@pytest.mark.parametrize("block", [0, 2])
def test_ids_before_a_document_are_never_masked(block):
    model, documents, shown = tiny(block, seed=3), [Document("1", b"ab"), Document("2", b"c")], []
    model.register_forward_pre_hook(lambda _, inputs: shown.append(inputs[0]))
    bound(model, documents, ByteTokenizer(), length=4 if block else 7, draws=50, bos=[9])
    rows = torch.cat(shown)
    if block:  # [2 noisy ; 4 clean] tokens of four windows: 9 a, b end, 9 c, end 9, of which the last 9 is a filler
        given, other = rows[rows[:, 4] == 9][:, 0], rows[rows[:, 4] != 9][:, 1]
    else:
        given, other = rows[:, [0, 4]], rows[:, [1, 2, 3, 5, 6]]
    assert len(given) >= 50 and (given == 9).all() and (other == MASK).any() and (other != MASK).any()


@pytest.mark.parametrize(
    "bos, said",
    [
        ([259], r"bos: expected .*259"),
        ([-1], "bos: expected .*-1"),
        (["x"], "bos: expected .*'x'"),
        ([1.5], r"bos: expected .*1\.5"),
        (9, "bos: expected token ids, got int"),
    ],
)
def test_ids_that_the_model_does_not_have_are_named_before_the_first_pass(bos, said):
    with pytest.raises(PromptError, match=said):
        bound(tiny(0), [Document("1", b"ab")], ByteTokenizer(), length=4, bos=bos)


@pytest.mark.parametrize("shifted", [False, True])
def test_the_bound_of_a_causal_mode_is_what_self_speculation_reads(shifted):
    """Row i, which sees the clean tokens up to i, gives token i + 1, in a model with unshifted noisy rows too."""
    model, tokenizer = tiny(1, seed=3, shifted_logits=shifted), ByteTokenizer()
    padded = torch.tensor([tokenizer.eos_id] * 2 + [*b"abcdefg", tokenizer.eos_id])
    nats = 0.0
    for start in range(0, 8, 2):
        window = padded[start : start + 4]
        with torch.no_grad():
            logits = model(window[None], KeyRanges.causal(4), shift=False)[0] @ model.head_weight.T
        logits[:, MASK] = -torch.inf
        nats -= float(logits.double().log_softmax(-1)[[1, 2], window[2:]].sum())
    documents = [Document("a", b"abcdefg")]
    found = bound(model, documents, tokenizer, length=4, next_token=True)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 7, rel=1e-5)
    assert found.what == "next tokens of the causal mode" and found.tokens == 8
    if shifted:  # where noisy rows are those before them, a block of one is the same
        assert found.bits_per_byte == pytest.approx(
            bound(model, documents, tokenizer, length=4).bits_per_byte, rel=1e-5
        )
    with pytest.raises(ValueError, match="next_token: expected a model with a causal mode, this one sees everything"):
        bound(tiny(0), documents, tokenizer, length=4, next_token=True)


def test_the_last_window_counts_only_what_belongs_to_the_text():
    """A model of equal logits says log2(258) a token, whatever is masked: the bound is tokens * log2(258) / bytes
    exactly, if every token counts once. The weights of a block of 2 with one of two masked average to that only over
    masks, so blocks of 1."""
    model = tiny(block=1)
    with torch.no_grad():
        model.embed.weight.zero_()
    found = bound(model, [Document("a", b"abcdefghi"), Document("b", b"xy")], ByteTokenizer(), length=8)
    assert found.bits_per_byte == pytest.approx(13 * math.log2(258) / 11, rel=1e-6)


def test_only_a_model_that_says_so_forbids_the_mask_in_its_loss():
    """LLaDA's, iLLaDA's, Dream's and SDAR's losses are plain; MDLM's and BD3-LM's mask has logit -inf."""
    tokens = torch.randint(256, (4, 8), generator=generator())
    for forbid, preset in ((True, "demo"), (False, "iLLaDA-8B")):
        assert ModelConfig.preset(preset).forbid_mask is forbid
        model = tiny(block=0, forbid_mask=forbid)
        made = objectives.full_sequence(tokens, MASK, generator(1))
        with torch.no_grad():
            logits = model(made.tokens) @ model.head_weight.T
            if forbid:
                logits[..., MASK] = -torch.inf
            wanted = -(logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0] * made.weight)[made.masked].sum()
            assert float(made.loss(model)) == pytest.approx(float(wanted), rel=1e-5)
    documents = [Document("a", b"abcdefgh")]  # what decoding draws from has no mask, whatever the loss was
    bounds = [bound(tiny(0, forbid_mask=f), documents, ByteTokenizer(), length=4) for f in (True, False)]
    assert bounds[0] == bounds[1]


def test_the_loss_of_an_example_skips_rows_behind_the_scored_ones():
    model, tokens = tiny(block=2), torch.randint(256, (2, 4))
    made = objectives.block_diffusion(tokens, MASK, generator(), block=2)
    assert made.loss(model, "none").shape == (2, 4)
    moved = made.to("cpu")
    assert isinstance(moved, Example) and torch.equal(moved.tokens, made.tokens)
