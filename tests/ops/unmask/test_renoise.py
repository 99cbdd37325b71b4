"""unmask's Renoise: what it accepts, what it draws in place of the rest, what it reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import illada_kernels as ik
from illada_kernels.ops.unmask.noise import philox
from tests.helpers.unmask_oracle import INF, step


def redrawn(seed: int, position: int, at_step: int, vocab: int) -> int:
    at = [torch.tensor([[x]]) for x in (seed, 0, position, at_step)]
    w0, w1 = (int(w) for w in philox(*at, 3)[:2])
    return (w0 << 32 | w1) * vocab >> 64


def call(backend: str, logits: torch.Tensor, tokens: Any, rule: Any, **options: Any) -> Any:
    options = {"mask_id": -1, "forbid": (), **options}
    return step(logits, tokens, rule=rule, backend=backend, **options)


def test_accepts_what_an_entropy_bound_commits_and_redraws_the_rest(backend: str) -> None:
    logits = torch.randn(3, 9, 40, generator=torch.Generator().manual_seed(1)) * 4
    canvas = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(2))
    how = {"temperature": 0.6, "confidence_temperature": 0.6, "seed": 5, "step": 3, "confidence": "neg_entropy"}
    for gamma in (0.0, 0.4, 3.0, torch.tensor([0.0, 1.0, 99.0])):
        got, after = call(backend, logits, canvas, ik.Renoise(gamma), **how)
        want, sampled = call(backend, logits, torch.full((3, 9), -1), ik.EntropyBound(gamma), **how)
        assert torch.equal(got.committed, want.committed) and torch.equal(got.confidence, want.confidence)
        assert torch.equal(got.proposal, logits.argmax(2))
        assert torch.equal(after[got.committed], sampled[want.committed])
        for b, k in (~got.committed).nonzero().tolist():
            assert after[b, k] == redrawn(5 + b, k, 3, 40)
        assert torch.equal(got.remaining, (~got.committed).sum(1, dtype=torch.int32))
    assert (after[got.committed] != got.proposal[got.committed]).any()  # the draw, not the argmax


def test_confidence_is_that_of_the_reported_token(backend: str) -> None:
    logits = torch.randn(1, 30, 40, generator=torch.Generator().manual_seed(4))
    p = logits.double().softmax(2)
    for confidence in ("probability", "sampled"):
        got, _ = call(
            backend, logits, torch.zeros(1, 30).long(), ik.Renoise(0.5), temperature=3.0, confidence=confidence
        )
        torch.testing.assert_close(got.confidence.double(), p.amax(2), rtol=1e-5, atol=0)


def test_truncation_bounds_what_is_accepted_not_what_is_redrawn(backend: str) -> None:
    logits = torch.randn(1, 200, 40, generator=torch.Generator().manual_seed(6))
    how = {"temperature": 5.0, "top_k": 3}
    got, after = call(backend, logits, torch.zeros(1, 200).long(), ik.Renoise(300.0), **how)
    least = logits.topk(3, 2).values[..., -1]
    drawn = logits.gather(2, after[..., None])[..., 0] >= least
    assert got.committed.any() and drawn[got.committed].all() and not drawn[~got.committed].all()


def test_frozen_and_missing_candidates_and_bad_rows_stay(backend: str) -> None:
    logits = torch.zeros(1, 5, 40)
    logits[0, 3] = float("nan")
    frozen = torch.tensor([[True, False, False, False, False, False]])
    positions = torch.tensor([[0, 1, -1, 3, 6]])
    tokens = torch.full((1, 6), 77)
    options = {"mask_id": 77, "frozen": frozen, "backend": backend, "forbid": ()}
    after = tokens.clone()
    got = ik.unmask_from_logits(logits, after, positions, ik.Renoise(0.0), **options)
    assert got.proposal.tolist() == [[-1, 0, -1, -1, -1]] and got.committed.tolist() == [[0, 1, 0, 0, 0]]
    assert got.confidence[0, [0, 2, 3, 4]].eq(-INF).all()
    assert after.tolist() == [[77, 0, 77, 77, 77, 77]] and got.remaining.tolist() == [1]


def test_redrawn_tokens_are_uniform_over_the_whole_vocabulary(backend: str) -> None:
    """Forbidden ids too: a redraw is noise, not a proposal. Chi-square below its upper 1e-4 quantile for 7 degrees."""
    rows = 8000
    logits = torch.zeros(1, rows, 8)
    got, after = call(backend, logits, torch.full((1, rows), 3), ik.Renoise(0.0), forbid=(2, 3), seed=9)
    noise = after[~got.committed]
    observed = torch.bincount(noise, minlength=8).double()
    assert noise.numel() == rows - 1 and noise.max() < 8
    expected = noise.numel() / 8
    assert float(((observed - expected) ** 2 / expected).sum()) < 29.88


def test_redraws_depend_on_seed_step_and_noise_position_alone(backend: str) -> None:
    logits = torch.zeros(1, 6, 2**17 + 3)
    at = torch.tensor([[9, 2, 5, 7, 1, 3]])
    _, plain = call(
        backend, logits, torch.zeros(1, 6).long(), ik.Renoise(0.0), noise_positions=at, seed=-4, step=2**32 - 1
    )
    expected = [redrawn(-4, p, 2**32 - 1, 2**17 + 3) for p in at[0].tolist()]
    assert plain[0, 1:].tolist() == expected[1:] and plain[0, 0] == 0  # the first is accepted


def test_ranks_may_be_deferred_or_perturbed(backend: str) -> None:
    logits = torch.zeros(1, 3, 40)
    for k, lead in enumerate((9.0, 8.0, 7.0)):
        logits[0, k, k] = lead
    canvas = torch.zeros(1, 3).long()
    got, _ = call(backend, logits, canvas, ik.Renoise(0.0), defer=(0,))
    assert got.committed.tolist() == [[0, 1, 0]]
    got, _ = call(backend, logits.flip(1), canvas, ik.Renoise(0.0), order="left")
    assert got.committed.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("gamma", [float("nan"), -1.0])
def test_bad_bounds_in_a_tensor_accept_the_first_alone(backend: str, gamma: float) -> None:
    logits = torch.zeros(1, 3, 40)
    logits[0, 2, 5] = 200.0
    got, _ = call(backend, logits, torch.zeros(1, 3).long(), ik.Renoise(torch.tensor([gamma])))
    assert got.committed.tolist() == [[0, 0, 1]]


def test_one_id_and_no_id(backend: str) -> None:
    got, after = call(backend, torch.zeros(1, 2, 1), [[5, 5]], ik.Renoise(1e30), temperature=1.0)
    assert after.tolist() == [[0, 0]] and got.committed.all()
    got, after = call(backend, torch.zeros(1, 2, 0), [[5, 5]], ik.Renoise(0.0))
    assert after.tolist() == [[5, 5]] and got.remaining.tolist() == [2] and got.proposal.tolist() == [[-1, -1]]
