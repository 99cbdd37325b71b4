"""log_likelihood against exact sums over all masks, orders and continuations of models small enough to list them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from illada import Model, ModelConfig, log_likelihood
from illada.errors import PromptError
from illada.likelihood import METHODS, is_greedy
from torch import Tensor

from illada_kernels import KeyRanges, masked_loss

MASK = 6
KINDS = {
    "full": {},
    "shifted": {"shifted_logits": True},
    "blocks": {"causal_block": 2},
    "shifted blocks": {"causal_block": 2, "shifted_logits": True},
    "causal": {"causal_block": 1, "shifted_logits": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def tiny(kind: str, **changes) -> Model:
    sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "ffn_dim": 24, "vocab_size": 7}
    ids = {"mask_id": MASK, "eos_id": -1, "pad_id": -1}
    torch.manual_seed(3)
    config = ModelConfig.preset(
        "demo", **{**sizes, **ids, "init_std": 0.6, "max_seq_len": 32, **KINDS[kind], **changes}
    )
    return Model(config).double().eval()


def log_p(model: Model, shown: list[int], block: tuple[int, int], forbid: bool = True) -> Tensor:
    """(block, V) log-probabilities of a block's tokens as decoding sees it: nothing behind the block is there."""
    start, stop = block
    length, c = stop, model.config
    tokens = torch.tensor([shown[:length]])
    size = c.causal_block or length
    ranges = KeyRanges.block_causal(length, size)
    with torch.no_grad():
        hidden = model(tokens, ranges, shift=False)[0]
        if c.shifted_logits:
            hidden = torch.cat([hidden[:1], hidden[:-1]])
        logits = hidden[start:] @ model.head_weight.T
    if forbid:
        logits[:, MASK] = -torch.inf
    return logits.log_softmax(-1)


def blocks_of(model: Model, context: list[int], size: int) -> list[tuple[int, int]]:
    block = model.config.causal_block
    if not block:
        return [(0, size)]
    return [(s, min(s + block, size)) for s in range(len(context) // block * block, size, block)]


def masked_sum(model: Model, tokens: list[int], block: tuple[int, int], masked, scored, **options) -> float:
    shown = [MASK if i in masked else t for i, t in enumerate(tokens)]
    found = log_p(model, shown, block, **options)
    return sum(float(found[i - block[0], tokens[i]]) for i in scored)


def exact_bound(model: Model, context: list[int], continuation: list[int], **options) -> float:
    tokens, total = context + continuation, 0.0
    for block in blocks_of(model, context, len(tokens)):
        positions = range(max(block[0], len(context)), block[1])
        for n in range(1, len(positions) + 1):
            subsets = list(itertools.combinations(positions, n))
            for masked in subsets:
                total += masked_sum(model, tokens, block, masked, masked, **options) / n / len(subsets)
    return total


def in_order(model: Model, context: list[int], continuation: list[int], confidence: bool) -> float:
    tokens, total = context + continuation, 0.0
    for block in blocks_of(model, context, len(tokens)):
        left = list(range(max(block[0], len(context)), block[1]))
        while left:
            each = {i: masked_sum(model, tokens, block, left, [i]) for i in left}
            i = max(left, key=lambda i: each[i]) if confidence else left[0]
            total += each[i]
            left.remove(i)
    return total


# one token of context is enough for every kind, five are no whole number of blocks
CONTEXTS = [[1, 2, 3, 4, 5], [0], [5, 5], [1, 2, 3]]
CONTINUATIONS = [[2, 1, 0], [4, 3, 2, 1], [1], [3, 3, 3, 0, 1]]


@every_kind
@pytest.mark.parametrize("method", ["confidence", "autoregressive"])
def test_scores_in_an_order_are_the_sums_of_single_passes(kind, method):
    model = tiny(kind)
    found = log_likelihood(model, CONTEXTS, CONTINUATIONS, method=method)
    wanted = [in_order(model, *pair, method == "confidence") for pair in zip(CONTEXTS, CONTINUATIONS)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@every_kind
def test_the_estimate_s_mean_is_the_exact_bound(kind):
    """Mean of 40 estimates against the sum over all masks, within 5 standard errors; exact where nothing is drawn."""
    model = tiny(kind)
    draws = torch.stack([log_likelihood(model, CONTEXTS, CONTINUATIONS, samples=16, seed=s) for s in range(40)])
    exact = torch.tensor([exact_bound(model, *pair) for pair in zip(CONTEXTS, CONTINUATIONS)], dtype=torch.float64)
    error = draws.std(0) / math.sqrt(len(draws))
    assert ((draws.mean(0) - exact).abs() <= 5 * error + 1e-6 * exact.abs()).all()
    # blocks of one token, and of at most two of which any is left to draw, leave noise; single tokens do not
    assert bool(error[2] < 1e-6) and bool(error[3] > 1e-6) == (kind != "causal")


@pytest.mark.parametrize("size", [2, 3, 5])
def test_numbers_of_masked_tokens_are_stratified(size):
    """With as many samples as tokens each number of masks comes once: a model that ignores its input scores exactly."""
    model = tiny("full", n_layers=1)
    with torch.no_grad():
        model.layers[0].o_proj.weight.zero_()
        model.embed.weight[:] = model.embed.weight[0]  # whatever it sees, its output is uniform over seven tokens
    found = log_likelihood(model, [[1]], [[2] * size], samples=size, seed=5)
    assert found.item() == pytest.approx(-size * math.log(6), rel=1e-6)


@every_kind
def test_left_to_right_probabilities_of_all_continuations_sum_to_one(kind):
    model = tiny(kind, vocab_size=5, mask_id=4)
    everything = [list(c) for c in itertools.product(range(4), repeat=3)]
    found = log_likelihood(model, [[1, 2, 3]] * len(everything), everything, method="autoregressive")
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_one_token_make_all_methods_the_chain_rule(method):
    model = tiny("causal")
    found = log_likelihood(model, CONTEXTS, CONTINUATIONS, method=method, samples=3)
    for value, context, continuation in zip(found.tolist(), CONTEXTS, CONTINUATIONS):
        tokens = torch.tensor([context + continuation])
        with torch.no_grad():
            logits = model(tokens, shift=False)[0] @ model.head_weight.T
        logits[:, MASK] = -torch.inf
        rows = logits.log_softmax(-1)[len(context) - 1 : -1]
        assert value == pytest.approx(rows.gather(1, tokens[0, len(context) :, None]).sum().item(), rel=1e-6)


@every_kind
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows_per_pass", [1, 17, 4096])
def test_a_value_depends_neither_on_the_others_nor_on_the_passes(kind, method, rows_per_pass):
    model = tiny(kind)
    options = {"method": method, "samples": 4, "guidance": 0.5, "rows_per_pass": rows_per_pass}
    together = log_likelihood(model, CONTEXTS, CONTINUATIONS, **options)
    turned = log_likelihood(model, CONTEXTS[::-1], CONTINUATIONS[::-1], **options).flip(0)
    alone = [
        log_likelihood(model, [a], [b], **{**options, "rows_per_pass": 64}) for a, b in zip(CONTEXTS, CONTINUATIONS)
    ]
    torch.testing.assert_close(turned, together, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat(alone), together, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["full", "shifted blocks"])
def test_guidance_moves_away_from_what_a_masked_context_gives(kind):
    model = tiny(kind)
    tokens, w = [1, 2, 3, 4], 1.5

    def rows(context):
        return log_p(model, [*context, MASK], blocks_of(model, context, 4)[-1])[-1]

    c, u = rows([1, 2, 3]), rows([MASK] * 3)
    wanted = (u + (w + 1) * (c - u)).log_softmax(-1)
    wanted[MASK] = -torch.inf
    wanted = (u + (w + 1) * (c - u))[:MASK].log_softmax(-1)[4]
    found = log_likelihood(model, [tokens[:3]], [tokens[3:]], guidance=w)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_the_mask_stays_in_the_softmax_where_the_family_s_code_leaves_it():
    model = tiny("full", forbid_mask=False)
    context, continuation = [1, 2], [3]
    found = log_likelihood(model, [context], [continuation])
    assert found.item() == pytest.approx(exact_bound(model, context, continuation, forbid=False), rel=1e-6)
    forbidden = log_likelihood(model, [context], [continuation], forbid_mask=True)
    assert found.item() < forbidden.item()
    assert log_likelihood(tiny("full"), [context], [continuation]) == forbidden


@every_kind
def test_greedy_continuations_are_those_that_generate_gives(kind):
    from illada import GenerationConfig, generate

    model = tiny(kind)
    config = GenerationConfig(max_new_tokens=4, block_length=model.config.causal_block or 4, stop_ids=())
    contexts = [[1, 2, 3], [0, 1], [5, 4, 3, 2]]
    made = generate(model, contexts, config).tokens
    assert is_greedy(model, contexts, made) == [True] * 3
    wrong = [[*row[:i], (row[i] + 1) % 6, *row[i + 1 :]] for row, i in zip(made, (0, 2, 3))]
    assert is_greedy(model, contexts, wrong) == [False] * 3
    assert is_greedy(model, [*contexts, *contexts], [*wrong, *made], rows_per_pass=3) == [False] * 3 + [True] * 3


@every_kind
def test_nothing_to_score_and_no_context(kind):
    model = tiny(kind)
    assert log_likelihood(model, [], []).tolist() == [] and is_greedy(model, [[1]], [[]]) == [True]
    assert log_likelihood(model, [[1, 2]], [[]]).tolist() == [0]
    for method in METHODS:
        everything = log_likelihood(model, [[]] * 6, [[i] for i in range(6)], method=method)
        assert everything.exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"method": "mc"}, "method: expected one of monte_carlo, confidence, autoregressive, got 'mc'"),
        ({"samples": 0}, "samples: expected an integer of at least 1, got 0"),
        ({"rows_per_pass": 2.0}, "rows_per_pass: expected an integer of at least 1, got 2.0"),
        ({"guidance": math.nan}, "guidance: expected a finite number, got nan"),
        ({"guidance": "a"}, "guidance: expected a finite number, got 'a'"),
        ({"guidance": True}, "guidance: expected a finite number, got True"),
        ({"guidance": -1.0}, r"guidance: expected a number of at least 0, got -1\.0; 0 is no guidance"),
        ({"seed": 1.5}, "seed: expected an integer, got 1.5"),
        ({"forbid_mask": "no"}, "forbid_mask: expected True, False or None, got 'no'"),
        ({"contexts": [[1], [2]]}, "continuations: expected 2, one for each context, got 1"),
        ({"contexts": [[MASK]]}, r"context 0: expected no mask_id \(6\)"),
        ({"continuations": [[7]]}, r"continuation 0: expected ids in \[0, 7\), got 7"),
        ({"continuations": [[1] * 32]}, "context 0: 1 tokens and a continuation of 32 exceed max_seq_len = 32"),
    ],
)
def test_what_cannot_be_scored_is_named(changes, message):
    with pytest.raises(PromptError, match=message):
        log_likelihood(tiny("full"), **{"contexts": [[1]], "continuations": [[2]], **changes})
    with pytest.raises(PromptError, match="model: expected a Model, got NoneType"):
        log_likelihood(None, [[1]], [[2]])


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_a_pass_does_not_wait_for_the_device(method, monkeypatch):
    """With a capacity nothing is counted on the host: reading the values is the only wait of a pass."""
    capacities = []

    def counted(hidden, head, targets, masked, **options):
        capacities.append(options["max_masked"] - targets.numel())
        return masked_loss(hidden, head, targets, masked, **options)

    monkeypatch.setattr("illada.scoring.masked_loss", counted)
    log_likelihood(tiny("full"), [[1], [2, 3]], [[2], [1, 4, 2]], method=method, samples=4, rows_per_pass=8)
    assert capacities and not any(capacities)


def test_numbers_of_numpy_mean_the_same():
    model, pair = tiny("full"), ([[1]], [[2, 3]])
    plain = log_likelihood(model, *pair, samples=3, seed=4, guidance=0.5)
    assert torch.equal(plain, log_likelihood(model, *pair, samples=3, seed=np.int64(4), guidance=np.float32(0.5)))


# ---- models without a mask token, and with clean rows that predict --------------------------------------------------


def from_left(model: Model, context: list[int], continuation: list[int]) -> float:
    """log p of a continuation by the rows before its tokens, under a causal mask."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        hidden = model(tokens, KeyRanges.causal(tokens.shape[1]), shift=False)[0]
        logits = hidden @ model.head_weight.T
    if model.config.forbid_mask and model.config.mask_id >= 0:
        logits[:, model.config.mask_id] = -torch.inf
    rows = logits.log_softmax(-1)[len(context) - 1 : -1]
    return rows.gather(1, tokens[0, len(context) :, None]).sum().item()


@pytest.mark.parametrize("method", METHODS)
def test_an_autoregressive_model_needs_no_mask_token(method):
    model = tiny("causal", mask_id=-1)
    contexts, continuations = [*CONTEXTS, [6]], [*CONTINUATIONS, [6, 0, 6]]
    found = log_likelihood(model, contexts, continuations, method=method, samples=2)
    wanted = [from_left(model, *pair) for pair in zip(contexts, continuations)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        best = int((model(torch.tensor([[1, 2]]), shift=False)[0, -1] @ model.head_weight.T).argmax())
    assert is_greedy(model, [[1, 2], [1, 2]], [[best], [(best + 1) % 7]], method=method) == [True, False]
    with pytest.raises(PromptError, match="context 1: expected a token at least"):
        log_likelihood(model, [[1], []], [[2], [3]], method=method)
    with pytest.raises(PromptError, match="guidance needs a mask token"):
        log_likelihood(model, [[1]], [[2]], method=method, guidance=0.5)


def test_the_last_token_of_an_autoregressive_model_needs_no_position():
    model = tiny("causal", mask_id=-1)
    context, continuation = [1, 2, 3] * 10, [4, 5, 0]  # 33 tokens, of which 32 are read
    found = log_likelihood(model, [context], [continuation])
    assert found.item() == pytest.approx(from_left(model, context, continuation), rel=1e-6)
    with pytest.raises(PromptError, match="exceed max_seq_len = 32"):
        log_likelihood(model, [[1, *context]], [continuation])
    with pytest.raises(PromptError, match="exceed max_seq_len = 32"):
        log_likelihood(tiny("causal"), [[]], [[1] * 33])


@pytest.mark.parametrize("kind", ["full", "shifted", "blocks", "shifted blocks"])
@pytest.mark.parametrize("method", METHODS)
def test_what_needs_a_mask_token_says_what_to_pass(kind, method):
    with pytest.raises(PromptError, match=rf"{method} needs a mask token, .* load\(folder, mask_id=\.\.\.\)"):
        log_likelihood(tiny(kind, mask_id=-1), [[1]], [[2]], method=method)
    with pytest.raises(PromptError, match="greedy decoding needs a mask token"):
        is_greedy(tiny(kind, mask_id=-1), [[1]], [[2]])


@pytest.mark.parametrize("changes", [{"causal_block": 1}, {"causal_block": 0}, {"causal_block": 4}])
def test_clean_rows_that_were_trained_to_predict_are_read_from_left_to_right(changes):
    """The joint objectives: a mask's row predicts itself, a clean row the token behind it."""
    model = tiny("full", next_token=True, **changes)
    found = log_likelihood(model, CONTEXTS, CONTINUATIONS, method="autoregressive")
    wanted = [from_left(model, *pair) for pair in zip(CONTEXTS, CONTINUATIONS)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    noisy = tiny("full", **changes)
    assert not torch.allclose(found, log_likelihood(noisy, CONTEXTS, CONTINUATIONS, method="autoregressive"))
    for method in ("monte_carlo", "confidence"):  # these read masks, as of any other model
        pairs = (CONTEXTS, CONTINUATIONS)
        assert torch.equal(log_likelihood(model, *pairs, method=method), log_likelihood(noisy, *pairs, method=method))
    with torch.no_grad():
        causal = model(torch.tensor([[1, 2]]), KeyRanges.causal(2), shift=False)[0, -1]
    best = int((causal @ model.head_weight.T)[:MASK].argmax())
    assert is_greedy(model, [[1, 2]], [[best]], method="autoregressive") == [True]
