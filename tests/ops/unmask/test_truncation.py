"""unmask's top_k, top_p and min_p: the kept set against a plain loop, and how the backends agree on it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import illada_kernels as ik
from illada_kernels import _extension
from illada_kernels.ops.unmask.noise import gumbel
from tests.helpers.unmask_oracle import INF, MASK, available, step, truncated_set


def column(value: int) -> Tensor:
    return torch.tensor([[value]])


def noised(logits: Tensor, temperature: float, seed: int = 0) -> Tensor:
    """l + T * g of step 0 for rows (1, K, V) at positions 0, 1, ...: what the proposal is the argmax of."""
    rows = [gumbel(column(seed), column(k), column(0), logits.shape[2]) for k in range(logits.shape[1])]
    return logits + temperature * torch.cat(rows)[None]


def proposals(backend: str, logits: Tensor, temperature: Any = 1.0, **options: Any) -> Tensor:
    tokens = [[MASK] * logits.shape[1]] * logits.shape[0]
    options = {"forbid": (), "temperature": temperature, **options}
    return step(logits, tokens, None, ik.TopK(0), backend, **options)[0].proposal


# ---- the kept set ----------------------------------------------------------------------------------------------------
SETTINGS = list(
    itertools.product((None, 1, 2, 7, 40, 99), (None, 0.0, 0.25, 0.8, 0.97, 1.0), (None, 0.0, 0.03, 0.4, 1.0))
)


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_proposals_are_the_best_of_the_kept_ids(backend: str, temperature: float) -> None:
    logits = torch.randn(1, 12, 40, generator=torch.Generator().manual_seed(3)) * 2
    logits[0, 4, 9:] = -INF
    scores, forbid = noised(logits, temperature)[0].tolist(), (1, 2)
    for top_k, top_p, min_p in SETTINGS:
        how = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "forbid": forbid}
        got = proposals(backend, logits, temperature, **how)
        for k, row in enumerate(logits[0].tolist()):
            kept = truncated_set(row, temperature, **how)
            assert got[0, k] == max(kept, key=lambda v: (scores[k][v], -v)), (how, k)


def test_equal_logits_are_kept_or_dropped_together(backend: str) -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0, 0.0, -1.0]).expand(1, 400, 7)
    drawn = lambda **options: set(proposals(backend, logits, 2.0, **options).flatten().tolist())  # noqa: E731
    assert drawn(top_k=1) == {0}
    assert drawn(top_k=2) == drawn(top_k=4) == {0, 1, 2, 3}
    assert drawn(top_k=5) == {0, 1, 2, 3, 4, 5}
    assert drawn(top_k=7) == set(range(7))
    assert drawn(top_p=0.26) == {0}  # p: .265, .161 thrice, .097 twice, .059
    assert drawn(top_p=0.27) == drawn(top_p=0.74) == {0, 1, 2, 3}
    assert drawn(top_p=0.77) == {0, 1, 2, 3, 4, 5}
    assert drawn(min_p=0.61) == {0} and drawn(min_p=0.60) == {0, 1, 2, 3}  # exp(-1/2) = .607
    assert drawn(top_p=0.1, min_p=0.0) == {0}
    for options in ({"top_k": 1}, {"top_p": 1e-30}, {"top_p": 0.0}, {"min_p": 1.0}):
        equal = proposals(backend, torch.zeros(1, 300, 9), 1.0, **options)
        assert set(equal.flatten().tolist()) == set(range(9))


def test_top_p_counts_the_mass_that_top_k_leaves(backend: str) -> None:
    """p is .5, .25, .125, .125; of the first two the first has 2/3."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log().expand(1, 200, 4)
    drawn = lambda **options: set(proposals(backend, logits, 1.0, **options).flatten().tolist())  # noqa: E731
    assert drawn(top_p=0.6) == {0, 1}
    assert drawn(top_k=2, top_p=0.6) == {0}
    assert drawn(top_k=2, top_p=0.7) == {0, 1}


def test_each_sequence_has_its_own_settings(backend: str) -> None:
    """Tensors (B,) give what numbers give, and the values that truncate nothing are those the docstring names."""
    logits = torch.randn(6, 30, 50, generator=torch.Generator().manual_seed(5))
    seeds, nothing = torch.zeros(6, dtype=torch.int64), proposals(backend, logits, seed=torch.zeros(6).long())
    values = {
        "top_k": (torch.tensor([1, 3, 49, 0, -5, 2**62]), (1, 3, 49)),
        "top_p": (torch.tensor([0.0, 0.4, 0.99, 1.0, 1.5, float("nan")]), (0.0, 0.4, 0.99)),
        "min_p": (torch.tensor([1.0, 0.4, 0.01, 0.0, -1.0, float("nan")]), (1.0, 0.4, 0.01)),
    }
    for name, (tensor, numbers) in values.items():
        got = proposals(backend, logits, seed=seeds, **{name: tensor})
        for b, number in enumerate(numbers):
            one = proposals(backend, logits[b : b + 1], seed=0, **{name: number})
            assert torch.equal(got[b], one[0])
        assert torch.equal(got[3:], nothing[3:]) and not torch.equal(got[1], nothing[1])
    least = proposals(backend, logits[:1], top_p=torch.tensor(-1.0))
    assert torch.equal(least, logits[:1].argmax(2))


def test_kept_ids_keep_their_noise(backend: str) -> None:
    """Where the draw without truncation is kept, it is the draw with truncation too."""
    logits = torch.randn(1, 60, 50, generator=torch.Generator().manual_seed(6)) * 2
    plain = proposals(backend, logits)
    for options in ({"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}):
        got = proposals(backend, logits, **options)
        for k, row in enumerate(logits[0]):
            if int(plain[0, k]) in truncated_set(row, 1.0, **options):
                assert got[0, k] == plain[0, k]
        assert (got == plain).sum() > 20


# ---- where nothing may change ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("confidence", ["probability", "margin", "neg_entropy", "random", "sampled"])
def test_confidence_is_that_of_the_untruncated_distribution(backend: str, confidence: str) -> None:
    logits = torch.randn(1, 20, 50, generator=torch.Generator().manual_seed(7)) * 2
    how = {"confidence": confidence, "forbid": (), "confidence_temperature": 0.7}
    for options in ({"top_k": 4}, {"top_p": 0.5}, {"min_p": 0.2}):
        got, _ = step(logits, [[MASK] * 20], None, ik.TopK(3), backend, temperature=0.9, **how, **options)
        p = (logits.double() / 0.7).softmax(2)
        chosen = p.gather(2, got.proposal[..., None])[..., 0]
        gap = (logits.gather(2, got.proposal[..., None])[..., 0] - logits.amax(2)).double()
        first, second = p.topk(2, 2).values.unbind(2)
        want = {
            "probability": chosen,
            "margin": first - second,
            "neg_entropy": torch.special.xlogy(p, p).sum(2),
            "random": got.confidence,
            "sampled": torch.minimum(first, (gap / 0.9).exp()),
        }[confidence]
        torch.testing.assert_close(got.confidence.double(), want.double(), rtol=1e-5, atol=1e-6)


def test_without_temperature_nothing_changes(backend: str) -> None:
    logits = torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(8)).round()
    tokens = torch.full((2, 9), MASK).where(torch.arange(9) % 3 > 0, 4)
    for temperature in (0.0, torch.zeros(2), torch.tensor(float("nan"))):
        plain, after = step(logits, tokens, None, ik.TopK(2), backend, temperature=temperature, revise=ik.Edit(0.1))
        for options in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 2, "top_p": 0.5, "min_p": 0.5}):
            options |= {"temperature": temperature, "revise": ik.Edit(0.1)}
            got, got_after = step(logits, tokens, None, ik.TopK(2), backend, **options)
            assert all(map(torch.equal, got, plain)) and torch.equal(got_after, after)


def test_edits_are_never_truncated_but_masks_beside_them_are(backend: str) -> None:
    logits = torch.tensor([0.0, 0.1, 0.2, 3.0]).expand(1, 2, 4)
    options = {"revise": ik.Edit(0.5), "temperature": 50.0, "top_k": 1, "forbid": ()}
    _, after = step(logits, [[0, MASK]], None, ik.TopK(1), backend, **options)
    assert after.tolist() == [[3, 3]]


def test_bad_rows_and_lone_ids(backend: str) -> None:
    logits = torch.randn(1, 5, 50)
    logits[0, 0, 3], logits[0, 1, 3] = float("nan"), INF
    logits[0, 2] = -INF
    logits[0, 3] = -INF
    logits[0, 3, 11] = -1e30
    for options in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 9, "top_p": 1e-20, "min_p": 1.0}):
        got = proposals(backend, logits, **options)
        assert got[0, :4].tolist() == [-1, -1, -1, 11] and got[0, 4] >= 0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e20, 3e38])
def test_extreme_logits_and_temperatures_keep_at_least_the_best(backend: str, scale: float) -> None:
    logits = torch.randint(-4, 5, (1, 6, 50), generator=torch.Generator().manual_seed(9)) / 4 * scale
    best = logits == logits.amax(2, keepdim=True)
    for t in (1e-45, 1e-38, 1.0, 3.4e38):
        for options in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"top_p": 1e-45}):
            got = proposals(backend, logits, t, **options)
            assert best.gather(2, got[..., None]).all(), (t, options)


# ---- real vocabularies -----------------------------------------------------------------------------------------------
ROWS = {
    "normal": lambda g: torch.randn(1, 2, 30_000, generator=g) * 2,
    "uniform": lambda g: torch.zeros(1, 2, 30_000),
    "zeros of both signs": lambda g: torch.tensor([-0.0, 0.0, -1.0]).repeat(10_000).expand(1, 2, -1),
    "few values": lambda g: torch.randint(0, 4, (1, 2, 30_000), generator=g).float(),
    "one above all": lambda g: torch.randn(1, 2, 30_000, generator=g).index_fill(2, torch.tensor(11), 30.0),
    "mostly forbidden": lambda g: torch.randn(1, 2, 30_000, generator=g).where(
        torch.rand(30_000, generator=g) < 0.01, -INF
    ),
    "many scales": lambda g: torch.randn(1, 2, 30_000, generator=g).sign() * torch.logspace(-40, 30, 30_000),
    "sorted": lambda g: torch.linspace(-9, 9, 30_000).expand(1, 2, -1),
}


@pytest.mark.skipif("cpu" not in available(), reason=str(_extension.extension_reason()))
@pytest.mark.parametrize("name", ROWS)
def test_long_rows_of_every_shape_equal_the_reference(name: str) -> None:
    logits = ROWS[name](torch.Generator().manual_seed(3))
    for temperature in (0.6, 1.0, 1e4):
        for options in ({"top_k": 1}, {"top_k": 300}, {"top_k": 15_000}, {"top_k": 29_999}):
            got, want = (proposals(b, logits, temperature, **options) for b in ("cpu", "reference"))
            assert torch.equal(got, want), (temperature, options)
        for options in ({"top_p": 1e-4}, {"top_p": 0.9}, {"top_p": 0.99999}, {"top_k": 9000, "top_p": 0.5}):
            got, want = (proposals(b, logits, temperature, **options) for b in ("cpu", "reference"))
            assert torch.equal(got, want), (temperature, options)


def test_the_bound_does_not_depend_on_threads_batch_or_dtype_of_equal_values(backend: str) -> None:
    logits = (torch.randn(3, 4, 6000, generator=torch.Generator().manual_seed(4)) * 8).round() / 8
    options = {"top_p": 0.85, "top_k": 2500, "seed": torch.tensor([3, 4, 5])}
    want = proposals(backend, logits, **options)
    assert torch.equal(
        proposals(backend, logits.bfloat16(), **options), proposals(backend, logits.bfloat16().float(), **options)
    )
    threads = torch.get_num_threads()
    for b in range(3):
        torch.set_num_threads(1 + b)
        try:
            one = proposals(backend, logits[b : b + 1], **{**options, "seed": 3 + b})
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(one[0], want[b])


# ---- distribution ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options, kept",
    [({"top_k": 5}, 5), ({"top_p": 0.6}, 4), ({"min_p": 0.35}, 6), ({"top_k": 6, "top_p": 0.9, "min_p": 0.45}, 5)],
)
def test_draws_follow_the_truncated_softmax(backend: str, options: dict[str, Any], kept: int) -> None:
    """Chi-square below its upper 1e-4 quantile."""
    row, rows, t = torch.tensor([0.0, 0.35, -0.2, 0.5, 0.1, -0.4, 0.2, -0.6]), 6000, 0.7
    allowed = sorted(truncated_set(row, t, **options))
    assert len(allowed) == kept
    got = proposals(backend, row.expand(1, rows, 8), t, seed=4, **options)
    observed = torch.bincount(got.flatten(), minlength=8).double()
    expected = (row[allowed].double() / t).softmax(0) * rows
    assert observed.sum() == observed[allowed].sum() == rows and expected.min() >= 5
    quantile = {3: 21.11, 4: 23.51, 5: 25.74}[kept - 1]
    assert float(((observed[allowed] - expected) ** 2 / expected).sum()) < quantile
