"""unmask: the backends against a plain loop and each other, ties, bad rows, revision, what may not be touched."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import illada_kernels as ik
from illada_kernels.ops.unmask.noise import gumbel_of, philox
from illada_kernels.testing import HALF_ULP, unmask_confidence_tolerance
from tests.helpers.unmask_oracle import INF, MASK, RULES, available, draw_call, plain, rows_with_top, step


# ---- the specification against a plain loop -------------------------------------------------------------------------
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("confidence", ["probability", "margin", "neg_entropy", "sampled"])
def test_a_step_is_what_a_plain_loop_does(backend, rule, confidence):
    if isinstance(rule, ik.Threshold) and confidence == "neg_entropy":
        rule = ik.Threshold(-1.302)
    torch.manual_seed(0)
    for trial in range(6):
        logits = torch.randint(-1, 3, (2, 6, 7)).float() * 0.75  # few values: ties of ids and of candidates
        logits[0, 0, 3] = float("nan") if trial % 2 else -INF
        tokens = torch.randint(0, 7, (2, 8)).where(torch.rand(2, 8) < 0.3, MASK)
        positions = torch.stack([torch.randperm(10)[:6] - 1 for _ in range(2)])
        frozen = torch.rand(2, 8) < 0.2
        revise = ik.Edit(0.34) if trial % 3 == 0 else None
        forbid = (2, 4) if trial % 4 == 0 else ()
        options = {"confidence": confidence, "revise": revise, "frozen": frozen, "forbid": forbid}
        order, defer = ("confidence", "left")[trial % 2], (3, 5) if trial > 2 else ()
        got, after = step(logits, tokens, positions, rule, backend, order=order, defer=defer, **options)
        how = (rule, confidence, revise, frozen, forbid, order, defer)
        proposal, committed, expected = plain(logits, tokens, positions, *how)
        torch.testing.assert_close(got.proposal, proposal)
        torch.testing.assert_close(got.committed, committed)
        torch.testing.assert_close(after, expected)


# ---- the CPU kernel against the specification -----------------------------------------------------------------------
@pytest.mark.skipif("cpu" not in available(), reason="the compiled extension is missing")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_cpu_equals_reference(data):
    logits, tokens, positions, rule, options = draw_call(data.draw)
    vocabulary = logits.shape[2]
    want, want_tokens = step(logits, tokens, positions, rule, "reference", **options)
    got, got_tokens = step(logits, tokens, positions, rule, "cpu", **options)
    assert torch.equal(got.proposal, want.proposal)
    rtol, atol = unmask_confidence_tolerance(options["confidence"], vocabulary)
    torch.testing.assert_close(got.confidence, want.confidence, rtol=rtol, atol=atol)
    assert torch.equal(got.committed, want.committed)
    assert torch.equal(got.remaining, want.remaining)
    assert torch.equal(got_tokens, want_tokens)


@pytest.mark.skipif("cpu" not in available(), reason="the compiled extension is missing")
@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_cpu_equals_reference_with_truncation_and_renoise(data):
    logits, tokens, positions, rule, options = draw_call(data.draw, truncated=True)
    want, want_tokens = step(logits, tokens, positions, rule, "reference", **options)
    got, got_tokens = step(logits, tokens, positions, rule, "cpu", **options)
    assert torch.equal(got.proposal, want.proposal)
    rtol, atol = unmask_confidence_tolerance(options["confidence"], logits.shape[2])
    torch.testing.assert_close(got.confidence, want.confidence, rtol=rtol, atol=atol)
    assert torch.equal(got.committed, want.committed)
    assert torch.equal(got.remaining, want.remaining)
    assert torch.equal(got_tokens, want_tokens)


@pytest.mark.parametrize("confidence", ["probability", "margin", "neg_entropy"])
def test_confidence_is_as_accurate_as_torch_in_float32(confidence):
    """Against float64: no further off than twice what float32 PyTorch is, plus the rounding of the result."""
    if "cpu" not in available():
        pytest.skip("the compiled extension is missing")
    torch.manual_seed(1)
    logits = torch.randn(2, 8, 20000) * 4
    tokens = torch.full((2, 8), MASK)
    exact, _ = step(logits.double(), tokens, backend="reference", confidence=confidence)
    got, _ = step(logits, tokens, backend="cpu", confidence=confidence)
    allowed = logits.clone()
    allowed[..., MASK] = -INF
    p = allowed.softmax(-1)
    top = p.topk(2, -1).values
    entropy = torch.special.xlogy(p, p).sum(-1)
    in_torch = {"probability": top[..., 0], "margin": top[..., 0] - top[..., 1], "neg_entropy": entropy}[confidence]
    scale = exact.confidence.abs().max()
    bar = 2 * (in_torch - exact.confidence).abs().max() + 2 * HALF_ULP * scale
    assert (got.confidence - exact.confidence).abs().max() <= bar


# ---- ties, ranks, rules ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("vocabulary", [37, 2048, 5000])
def test_equal_logits_propose_the_lowest_id_that_is_allowed(backend, vocabulary):
    logits = torch.zeros(1, 1, vocabulary)
    for low in (0, 1, 13, 36):
        got, _ = step(logits, [[MASK]], backend=backend, forbid=tuple(range(low)))
        assert got.proposal.item() == low
    logits[..., [30, vocabulary - 1]] = 1.0
    assert step(logits, [[MASK]], backend=backend)[0].proposal.item() == 30


def test_equal_confidences_rank_by_position_not_by_order_of_candidates(backend):
    logits = torch.zeros(1, 5, 50)
    positions = torch.tensor([[7, 2, 9, 4, 0]])
    got, after = step(logits, [[MASK] * 10], positions, ik.TopK(3), backend)
    assert got.committed.tolist() == [[False, True, False, True, True]]
    assert after.eq(0).nonzero()[:, 1].tolist() == [0, 2, 4]
    assert got.remaining.tolist() == [2]


def test_k_per_sequence_and_k_beyond_the_masks_left(backend):
    logits = rows_with_top([0.5, 0.9, 0.7]).expand(4, 3, 9)
    got, _ = step(logits, [[MASK] * 3] * 4, None, ik.TopK(torch.tensor([0, 1, 2, 50])), backend)
    assert got.committed.tolist() == [[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 1]]
    assert got.remaining.tolist() == [3, 2, 1, 0]


def test_threshold_is_inclusive_and_always_commits_the_best(backend):
    # two ids at equal logits: each exactly one half
    logits = torch.full((1, 3, 9), -INF)
    logits[0, 0, :2] = logits[0, 1, :2] = 1.0
    logits[0, 2, :4] = 1.0
    got, _ = step(logits, [[MASK] * 3], None, ik.Threshold(0.5), backend)
    assert got.confidence.tolist() == [[0.5, 0.5, 0.25]] and got.committed.tolist() == [[1, 1, 0]]
    got, _ = step(logits, [[MASK] * 3], None, ik.Threshold(math.nextafter(0.5, 1) + 1e-7), backend)
    assert got.committed.tolist() == [[1, 0, 0]]


def test_factor_commits_the_longest_prefix_above_the_rising_bar(backend):
    # bars for f = 1: 1/2, 2/3, 3/4, 4/5
    logits = rows_with_top([0.95, 0.70, 0.74, 0.81])
    got, _ = step(logits, [[MASK] * 4], None, ik.Factor(1.0), backend)  # ranked .95 .81 .74: the third fails at 3/4
    assert got.committed.tolist() == [[1, 0, 0, 1]]
    got, _ = step(rows_with_top([0.1, 0.2]), [[MASK] * 2], None, ik.Factor(0.0), backend)
    assert got.committed.tolist() == [[0, 1]]


@pytest.mark.parametrize("inclusive, committed", [(False, [1, 1, 1, 0]), (True, [1, 1, 0, 0])])
def test_entropy_bound_adds_entropies_whatever_the_confidence(backend, inclusive, committed):
    logits = torch.full((1, 4, 16), -INF)
    for k, n in enumerate((1, 2, 4, 8)):  # entropies 0, log 2, log 4, log 8
        logits[0, k, :n] = 3.0
    for confidence in ("probability", "random"):
        rule = ik.EntropyBound(2 * math.log(2), inclusive)
        got, _ = step(logits, [[MASK] * 4], None, rule, backend, confidence=confidence)
        assert got.committed.tolist() == [committed]


# ---- ranks in other orders -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("at_least, committed", [(0, [0, 1, 0, 0]), (2, [0, 1, 1, 0]), (9, [1, 1, 1, 1])])
def test_a_threshold_commits_at_least_so_many(backend, at_least, committed):
    logits = rows_with_top([0.3, 0.9, 0.7, 0.2])
    got, _ = step(logits, [[MASK] * 4], None, ik.Threshold(0.8, at_least), backend)
    assert got.committed.tolist() == [committed]
    per_sequence = torch.tensor([0, at_least, -3])
    got, _ = step(logits.expand(3, 4, 9), [[MASK] * 4] * 3, None, ik.Threshold(0.95, per_sequence), backend)
    assert got.committed.sum(1).tolist() == [0, min(at_least, 4), 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_deferred_proposals_commit_only_where_all_others_do(backend, temperature):
    logits = rows_with_top([0.999, 0.9999, 0.99, 0.98])  # proposals 1, 2, 3, 4, also with noise
    options = {"defer": (2, 1), "temperature": temperature, "seed": 3}
    for k, committed in ((1, [0, 0, 1, 0]), (2, [0, 0, 1, 1]), (3, [0, 1, 1, 1]), (4, [1, 1, 1, 1])):
        got, _ = step(logits, [[MASK] * 4], None, ik.TopK(k), backend, **options)
        assert got.proposal.tolist() == [[1, 2, 3, 4]] and got.committed.tolist() == [committed]
    for tau, committed in ((0.985, [0, 0, 1, 0]), (0.5, [1, 1, 1, 1]), (0.9995, [0, 0, 1, 0])):
        got, _ = step(logits, [[MASK] * 4], None, ik.Threshold(tau), backend, **options)
        assert got.committed.tolist() == [committed]
    got, _ = step(logits[:, :2], [[MASK] * 2], None, ik.TopK(1), backend, **options)  # no others left
    assert got.committed.tolist() == [[0, 1]]


def test_order_left_commits_from_the_lowest_position(backend):
    logits = rows_with_top([0.3, 0.9, 0.7, 0.2])
    positions = torch.tensor([[4, 1, 3, 0]])  # from the left .2, .9, .7, .3
    for rule, committed in (
        (ik.TopK(2), [0, 1, 0, 1]),
        (ik.Threshold(0.5), [0, 1, 1, 1]),
        (ik.Threshold(0.8), [0, 1, 0, 1]),
        (ik.Threshold(0.1), [1, 1, 1, 1]),
    ):
        got, _ = step(logits, [[MASK] * 5], positions, rule, backend, order="left", rank_temperature=5.0)
        assert got.committed.tolist() == [committed]


def test_perturbed_ranks_draw_without_replacement(backend):
    """The first two of three are drawn from softmax(c / T): 3000 draws, each pair within 5 standard deviations."""
    draws, t = 3000, 0.3
    c = torch.tensor([0.5, 0.9, 0.7]).double()
    logits = rows_with_top(c.tolist()).expand(draws, 3, 9)
    got, _ = step(logits, [[MASK] * 3] * draws, None, ik.TopK(2), backend, rank_temperature=t, seed=5)
    weights = (c / t).exp()
    for left in range(3):  # the one that is not committed
        first, second = [i for i in range(3) if i != left]
        p = sum(
            weights[i] / weights.sum() * weights[j] / (weights.sum() - weights[i])
            for i, j in ((first, second), (second, first))
        )
        count = (~got.committed[:, left]).sum()
        assert abs(count - draws * p) < 5 * (draws * p * (1 - p)) ** 0.5
    assert got.confidence[0].tolist() == pytest.approx(c.tolist())  # the confidence itself is not perturbed


def test_noise_of_ranks_is_the_known_answer(backend):
    """Philox counter (0, position 5, step 2, 2) under seed 3: its Gumbel value decides between two candidates."""
    at = torch.tensor([[3]])
    g = [gumbel_of(philox(at, torch.zeros_like(at), torch.tensor([[p]]), at - 1, 2)[:2]).item() for p in (5, 6)]
    margin = 0.1 * (g[0] - g[1])
    for lead, winner in ((-margin - 1e-3, 1), (-margin + 1e-3, 0)):
        logits = rows_with_top([0.5 + lead, 0.5])
        options = {"seed": 3, "step": 2, "rank_temperature": 0.1}
        got, _ = step(logits, [[MASK] * 7], torch.tensor([[5, 6]]), ik.TopK(1), backend, **options)
        assert got.committed[0].int().argmax() == winner


def test_sampled_confidence_is_the_likeness_to_the_best_token(backend):
    logits = torch.randn(1, 40, 60, generator=torch.Generator().manual_seed(2)) * 3
    for t in (0.0, 0.5, 2.0):
        options = {"confidence": "sampled", "temperature": t, "forbid": (), "confidence_temperature": 0.7}
        got, _ = step(logits, [[MASK] * 40], None, ik.TopK(1), backend, **options)
        gap = logits.gather(2, got.proposal[..., None])[..., 0] - logits.amax(2)
        likeness = (gap / t).exp() if t else torch.ones_like(gap)
        want = torch.minimum((logits / 0.7).softmax(2).amax(2), likeness)
        torch.testing.assert_close(got.confidence, want, rtol=1e-5, atol=0)
    assert (gap < 0).any() and (got.confidence == got.confidence.clamp(max=1)).all()


@pytest.mark.skipif("cpu" not in available(), reason="the compiled extension is missing")
def test_numbers_up_to_the_largest_float_agree_with_the_reference():
    """Differences of logits overflow, products with 1 / Tc and T * g too: all backends clamp alike."""
    for scale in (1e-30, 1.0, 3e38):
        logits = torch.randint(-4, 5, (2, 4, 300), generator=torch.Generator().manual_seed(8)) / 4 * scale
        for t in (1e-38, 1.0, 3.4e38):
            for tc in (1e-38, 3.4e38):
                for confidence in ("sampled", "neg_entropy"):
                    options = {"confidence": confidence, "temperature": t, "confidence_temperature": tc}
                    options["rank_temperature"] = t
                    args = (logits, [[MASK] * 4] * 2, None, ik.Threshold(0.0 if confidence == "sampled" else -1.0))
                    (got, tokens), (want, want_tokens) = (step(*args, b, **options) for b in ("cpu", "reference"))
                    assert torch.equal(got.proposal, want.proposal) and torch.equal(tokens, want_tokens)
                    torch.testing.assert_close(got.confidence, want.confidence, rtol=1e-5, atol=1e-6)


# ---- bad rows and odd calls -----------------------------------------------------------------------------------------
def test_bad_rows_propose_nothing_and_are_never_written(backend):
    logits = torch.randn(1, 6, 50)
    logits[0, 0, 49], logits[0, 1, 7] = float("nan"), INF
    logits[0, 2] = -INF
    logits[0, 3, 1:] = -INF  # one id left
    for temperature in (0.0, 1.0):
        got, after = step(logits, [[MASK] * 6], backend=backend, temperature=temperature)
        assert got.proposal[0, :3].tolist() == [-1] * 3 and got.confidence[0, :3].tolist() == [-INF] * 3
        assert got.proposal[0, 3] == 0 and got.confidence[0, 3] == 1.0
        assert after[0, :4].tolist() == [MASK, MASK, MASK, 0] and got.remaining.tolist() == [3]
    got, _ = step(logits, [[MASK] * 6], backend=backend, forbid=tuple(range(50)))
    assert got.proposal.tolist() == [[-1] * 6] and not got.committed.any()


def test_a_forbidden_id_with_a_nan_logit_does_no_harm(backend):
    logits = torch.randn(1, 1, 50)
    logits[..., 3] = float("nan")
    got, _ = step(logits, [[MASK]], backend=backend, forbid=(3,))
    assert got.committed.all() and got.confidence.isfinite().all()


def test_positions_out_of_range_are_no_candidates_and_guard_zones_stay(backend):
    storage = torch.full((4, 12), 777)
    tokens = storage[1:3, 3:9]
    tokens.fill_(MASK)
    positions = torch.tensor([[-1, 6, 2**62, 5], [0, -(2**63), 7, 2**31]])
    got = ik.unmask_from_logits(torch.zeros(2, 4, 50), tokens, positions, ik.TopK(9), mask_id=MASK, backend=backend)
    assert got.proposal.tolist() == [[-1, -1, -1, 0], [0, -1, -1, -1]] and got.remaining.tolist() == [0, 0]
    tokens.fill_(777)
    assert storage.eq(777).all()


def test_duplicate_positions_stay_in_range(backend):
    logits = rows_with_top([0.9, 0.8, 0.7])
    got, after = step(logits, [[5, MASK, 5]], torch.tensor([[1, 1, 1]]), ik.TopK(3), backend)
    assert after[0, 0] == 5 and after[0, 2] == 5 and after[0, 1] in (1, 2, 3)
    assert got.committed.all()


@pytest.mark.parametrize("batch, count, length, vocabulary", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_dimensions(backend, batch, count, length, vocabulary):
    tokens = torch.full((batch, length), MASK)
    positions = torch.zeros(batch, count, dtype=torch.int64)
    got, after = step(torch.zeros(batch, count, vocabulary), tokens, positions, ik.TopK(1), backend)
    assert got.proposal.shape == (batch, count) and not got.committed.any() and got.proposal.eq(-1).all()
    assert torch.equal(after, tokens)


def test_nothing_masked_leaves_tokens_and_reports_none_left(backend):
    got, after = step(torch.randn(2, 3, 50), torch.zeros(2, 5, dtype=torch.int64), backend=backend)
    assert got.remaining.tolist() == [0, 0] and not got.committed.any() and after.eq(0).all()
    assert got.confidence.eq(-INF).all()


def test_frozen_positions_never_change_and_do_not_count(backend):
    frozen = torch.tensor([[True, False, True, False]])
    logits = rows_with_top([0.9, 0.2, 0.9, 0.3])
    for revise in (None, ik.Edit(0.0), ik.Remask(9)):
        options = {"frozen": frozen, "revise": revise}
        got, after = step(logits, [[MASK, MASK, 3, 4]], None, ik.TopK(4), backend, **options)
        assert after[0, 0] == MASK and after[0, 2] == 3 and after[0, 1] == 2
        assert got.remaining.tolist() == [int(isinstance(revise, ik.Remask))]


# ---- revision -------------------------------------------------------------------------------------------------------
def test_edit_replaces_a_held_token_that_the_model_now_doubts(backend):
    logits = rows_with_top([0.9, 0.6, 0.9, 0.9])  # best tokens 1, 2, 3, 4
    options = {"revise": ik.Edit(0.8), "temperature": 3.0}  # noise is for masked candidates only
    got, after = step(logits, [[5, 5, 3, MASK]], None, ik.TopK(0), backend, **options)
    assert after.tolist() == [[1, 5, 3, MASK]]
    assert got.proposal[0, :3].tolist() == [1, 2, 3] and got.committed.tolist() == [[1, 0, 0, 0]]


def test_remask_returns_the_least_likely_held_tokens(backend):
    logits = rows_with_top([0.9, 0.6, 0.3, 0.5])
    got, after = step(logits, [[1, 2, 3, MASK]], None, ik.TopK(1), backend, revise=ik.Remask(2))
    assert after.tolist() == [[1, MASK, MASK, 4]] and got.remaining.tolist() == [2]
    torch.testing.assert_close(got.confidence[0, :3], torch.tensor([0.9, 0.6, 0.3]), rtol=1e-6, atol=0.0)
    _, after = step(logits, [[1, 99, 3, MASK]], None, ik.TopK(0), backend, revise=ik.Remask(1))
    assert after.tolist() == [[1, MASK, 3, MASK]]  # a token outside the vocabulary has probability 0


def test_remask_by_scores_ranks_the_scores_and_skips_nan(backend):
    scores = torch.tensor([[0.5, 0.5, float("nan"), 0.1, 0.9]])
    logits = torch.full((1, 5, 50), float("nan"))  # not looked at where a token is held
    tokens, positions = [[5, 6, 7, MASK, 9]], torch.tensor([[1, 0, 2, 3, 4]])
    got, after = step(logits, tokens, positions, ik.TopK(1), backend, revise=ik.Remask(1, scores))
    assert after.tolist() == [[MASK, 6, 7, MASK, 9]] and got.remaining.tolist() == [2]


# ---- layout and independence ----------------------------------------------------------------------------------------
def test_strided_inputs_give_what_contiguous_ones_do(backend):
    torch.manual_seed(3)
    wide = torch.randn(3, 10, 2, 100)
    logits, positions = wide[:, ::2, 1, 10:60], torch.arange(10).expand(3, 10)[:, ::2]
    frozen = (torch.rand(10, 3) < 0.3).T
    tokens = torch.full((3, 20), MASK)[:, :10]
    for options in ({"temperature": 1.0}, {"revise": ik.Edit(0.1)}):
        got, after = step(logits, tokens, positions, ik.TopK(2), backend, frozen=frozen, **options)
        plain_arguments = (logits.contiguous(), tokens.contiguous(), positions.contiguous(), ik.TopK(2), backend)
        want, want_after = step(*plain_arguments, frozen=frozen.contiguous(), **options)
        assert all(map(torch.equal, got, want)) and torch.equal(after, want_after)


def test_rows_beyond_two_to_the_31_elements():
    if "cpu" not in available():
        pytest.skip("the compiled extension is missing")
    far = 2**31 + 5
    storage = torch.empty(far + 50, dtype=torch.bfloat16)  # pages never touched are never there
    logits = storage.as_strided((1, 2, 50), (0, far, 1))
    logits[0, 0], logits[0, 1] = 0.0, 0.0
    logits[0, 0, 11], logits[0, 1, 12] = 1.0, 1.0
    assert step(logits, [[MASK] * 2], backend="cpu")[0].proposal.tolist() == [[11, 12]]


def test_results_do_not_depend_on_batch_order_of_candidates_or_threads(backend):
    torch.manual_seed(4)
    vocabulary = 5000 if backend == "cpu" else 600
    logits = torch.randn(3, 7, vocabulary) * 2
    tokens = torch.full((3, 9), MASK)
    seeds = torch.tensor([5, 2**40, 7])
    options = {"temperature": 1.0, "confidence": "neg_entropy"}
    want, want_after = step(logits, tokens, None, ik.TopK(3), backend, seed=seeds, **options)
    order = torch.randperm(7)
    got, after = step(logits[:, order], tokens, order.expand(3, 7), ik.TopK(3), backend, seed=seeds, **options)
    assert torch.equal(after, want_after) and torch.equal(got.confidence, want.confidence[:, order])
    threads = torch.get_num_threads()
    for b in range(3):
        torch.set_num_threads(1 + b)
        try:
            one = step(logits[b : b + 1], tokens[b : b + 1], None, ik.TopK(3), backend, seed=int(seeds[b]), **options)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(one[1][0], want_after[b]) and torch.equal(one[0].confidence[0], want.confidence[b])


def test_left_padding_does_not_shift_the_noise(backend):
    logits = torch.randn(1, 4, 300)
    plain_run, _ = step(logits, [[MASK] * 4], backend=backend, temperature=1.0)
    at = torch.arange(4)[None]
    options = {"temperature": 1.0, "noise_positions": at}
    padded, after = step(logits, [[0, 0] + [MASK] * 4], at + 2, backend=backend, **options)
    assert torch.equal(plain_run.proposal, padded.proposal) and torch.equal(after[:, 2:], padded.proposal)


def test_inputs_other_than_tokens_are_not_written(backend):
    logits, positions = torch.randn(2, 3, 50), torch.arange(3).expand(2, 3).clone()
    scores, bias = torch.rand(2, 3), (torch.tensor([1, 60]), torch.tensor([2.0, 3.0]))
    before = [t.clone() for t in (logits, positions, scores, *bias)]
    step(logits, [[MASK, 1, 2]] * 2, positions, ik.TopK(1), backend, revise=ik.Remask(1, scores), logit_bias=bias)
    assert all(map(torch.equal, before, (logits, positions, scores, *bias)))


@pytest.mark.parametrize("vocabulary", [300, 5000, 32000])
def test_certain_rows_tie_whatever_the_vocabulary_and_the_temperature(backend, vocabulary):
    """10 to 12 above all others at Tc = 0.1: e^-100 is no normal float32, and a segment of its own maximum adds nothing
    either. One step less and the entropy is that of float64."""
    logits = torch.zeros(1, 4, vocabulary)
    logits[0, :, 5] = torch.tensor([10.0, 11.0, 12.0, 8.0])
    options = {"forbid": (), "confidence": "neg_entropy", "confidence_temperature": 0.1, "backend": backend}
    got, _ = step(logits, [[MASK] * 4], None, ik.EntropyBound(0.0, inclusive=True), **options)
    assert got.confidence[0, :3].tolist() == [0.0] * 3 and got.committed.tolist() == [[1, 1, 1, 0]]
    e = (vocabulary - 1) * math.exp(-80)
    assert got.confidence[0, 3].item() == pytest.approx(-80 * e, rel=1e-5)


def test_rows_that_are_certain_have_no_entropy_at_all(backend):
    logits = torch.full((1, 3, 40), -200.0)
    logits[0, :, 5] = 0.0
    options = {"confidence": "neg_entropy", "backend": backend}
    got, _ = step(logits, [[MASK] * 3], None, ik.EntropyBound(0.0, inclusive=True), **options)
    assert got.confidence.eq(0.0).all() and got.committed.all()
