"""The noise of unmask: known answers, float32 against exact arithmetic, proposals that follow softmax(l / T)."""

from __future__ import annotations

import math

import pytest
import torch

import illada_kernels as ik
from illada_kernels import _extension
from illada_kernels.ops.unmask.noise import gumbel, philox, philox_unit
from illada_kernels.testing import HALF_ULP as EPS
from tests.helpers.unmask_oracle import INF, available, step

needs_cpu = pytest.mark.skipif("cpu" not in available(), reason="the compiled extension is missing")
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "reference"]
# Upper 1e-4 quantile of chi-square by degrees of freedom: a correct sampler fails one seed in 10,000; seeds are fixed.
CHI_SQUARE = {7: 29.88, 15: 44.26}
CALLS = [(3, 5, 2), (-1, 0, 0), (2**63 - 1, 2**31 - 1, 2**32 - 1), (2**40 + 17, 126463, 1000)]  # seed, position, step


def column(value: int) -> torch.Tensor:
    return torch.tensor([[value]])


def native_noise(seed: int, position: int, at_step: int, ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    words, noise = torch.zeros(ids // 2, 4, dtype=torch.int32), torch.zeros(ids)
    _extension.check(
        "noise", _extension.native().unmask_noise_cpu(seed, position, at_step, ids, words.data_ptr(), noise.data_ptr())
    )
    return words.long() & 0xFFFFFFFF, noise


# ---- known answers --------------------------------------------------------------------------------------------------
def test_philox_gives_the_published_words():
    # Random123's kat_vectors: philox4x32 10, counter and key all zeros, then all ones
    ones = column(0xFFFFFFFF)
    zero_words = philox(column(0), column(0), column(0), column(0), 0)
    assert [int(w) for w in zero_words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    one_words = philox(column(-1), ones, ones, ones, 0xFFFFFFFF)
    assert [int(w) for w in one_words] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_known_words_and_noise_of_the_reference():
    words = philox(column(3), column(5), column(5), column(2), 0)
    assert [int(w) for w in words] == [0x4272ECF0, 0x4F9E222A, 0x9D7DE5AC, 0x382013F0]
    noise = gumbel(column(3), column(5), column(2), 12)[0, 10:]
    torch.testing.assert_close(noise, torch.tensor([1.20224, 0.04600]), rtol=0.0, atol=6e-6)


@needs_cpu
@pytest.mark.parametrize("seed, position, at_step", CALLS)
def test_the_vectorised_words_are_the_references(seed, position, at_step):
    words, noise = native_noise(seed, position, at_step, 4096)
    want = philox(column(seed), torch.arange(2048)[None], column(position), column(at_step), 0)
    for i in range(4):
        assert torch.equal(words[:, i], want[i][0])
    # about an ulp each in log1p and log, on either side; log turns a relative error into an absolute one
    reference = gumbel(column(seed), column(position), column(at_step), 4096)[0]
    assert ((noise - reference).abs() <= 4 * EPS * (2 + reference.abs())).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_uses_that_noise(backend):
    logits = torch.full((1, 1, 12), -INF)
    difference = 1.2022445 - 0.0460046  # of the known Gumbel values of ids 10 and 11
    options = {"backend": backend, "mask_id": 12, "seed": 3, "step": 2, "temperature": 1.0}
    for nudge, winner in ((-1e-4, 10), (1e-4, 11)):
        logits[0, 0, 10], logits[0, 0, 11] = 0.0, difference + nudge
        got, _ = step(logits, [[0] * 5 + [12]], torch.tensor([[5]]), ik.TopK(1), **options)
        assert got.proposal.item() == winner
        twice = {**options, "temperature": torch.tensor(2.0), "noise_positions": torch.tensor([[5]])}
        got, _ = step(2 * logits, [[12]], torch.tensor([[0]]), **twice)
        assert got.proposal.item() == winner


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_confidence_is_the_documented_word(backend):
    words = philox(column(3), column(0), column(5), column(2), 1)
    options = {"backend": backend, "mask_id": 36, "seed": 3, "step": 2, "confidence": "random"}
    got, _ = step(torch.zeros(1, 1, 40), [[0] * 5 + [36]], torch.tensor([[5]]), **options)
    assert got.confidence.item() == philox_unit(words[:2]).item()
    assert abs(got.confidence.item() - int(words[0]) / 2**32) < 2**-24


# ---- float32 --------------------------------------------------------------------------------------------------------
def test_sixty_four_bits_round_once():
    generator = torch.Generator().manual_seed(0)
    high = torch.randint(0, 2**32, (64, 1), generator=generator) >> torch.arange(0, 64) % 33
    low = torch.randint(0, 2**32, (64, 64), generator=generator)
    ties = torch.tensor(
        [[0x80000080, 0], [0x80000080, 1], [0x80000180, 0], [0xFFFFFFFF, 0xFFFFFFFF], [0, 0], [0, 1], [0, 3 << 24]]
    )
    high, low = torch.cat([high.flatten(), ties[:, 0]]), torch.cat([low.flatten(), ties[:, 1]])
    unit = philox_unit((high, low)).tolist()
    for h, l, got in zip(high.tolist(), low.tolist(), unit):
        u = h << 32 | l
        shift = max(u.bit_length() - 24, 0)
        kept, rest = u >> shift, u & (1 << shift) - 1
        kept += shift > 0 and (2 * rest > 1 << shift or (2 * rest == 1 << shift and kept % 2 == 1))
        assert got == math.ldexp(kept << shift, -64)


@needs_cpu
def test_gumbel_follows_float64_where_it_can_win():
    """dG = dE / E for E = -log(1 - u), dE = du / (1 - u): the rounding of u, plus 2 ulp in each logarithm."""
    for seed, position, at_step in CALLS:
        words, noise = native_noise(seed, position, at_step, 1 << 20)
        pairs = words.reshape(-1, 2).double()
        u = pairs[:, 0] * 2.0**-32 + pairs[:, 1] * 2.0**-64
        e = -torch.log1p(-u)
        exact = -e.log()
        bound = 2 * EPS * (2 + exact.abs()) + EPS * u / (1 - u) / e * 1.01
        wins = u < 1 - 2.0**-12
        assert ((noise.double() - exact).abs() <= bound)[wins].all()
        assert exact.max() > 12  # the tail was there


def test_the_winning_tail_reaches_64_bits():
    """24-bit uniforms stop at 16.6; here u = 2**-64 gives 44.36, and neighbouring small u stay apart."""
    small = torch.tensor([[0, 0], [0, 1], [0, 2], [0, 2**20], [0, 2**31], [1, 0], [2**7, 0]])
    u = philox_unit((small[:, 0], small[:, 1])).clamp(min=2.0**-64)
    got = -torch.log(-torch.log1p(-u))
    want = torch.tensor([64, 64, 63, 44, 33, 32, 25]) * math.log(2)
    torch.testing.assert_close(got, want, rtol=4 * EPS, atol=0.0)


# ---- distribution ---------------------------------------------------------------------------------------------------
def counts(proposals: torch.Tensor, bins: int) -> torch.Tensor:
    return torch.bincount(proposals.flatten(), minlength=bins).double()


def chi_square(observed: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities.double() * observed.sum()
    assert expected.min() >= 5  # the approximation's usual condition
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "temperature, varied",
    [(0.3, "position"), (0.7, "position"), (1.0, "position"), (2.5, "position"), (1.0, "step"), (1.0, "seed")],
)
def test_proposals_follow_the_softmax(temperature, varied, backend):
    rows, ids = (200_000 if backend == "cpu" else 6000), 8
    row = torch.tensor([0.0, 0.3, -0.2, 0.5, 0.1, -0.4, 0.2, 0.4])
    options = {"temperature": temperature, "mask_id": ids, "backend": backend, "seed": 1}
    if varied == "position":
        logits, tokens = row.expand(1, rows, ids), torch.full((1, rows), ids)
    else:
        logits, tokens = row.expand(rows, 1, ids), torch.full((rows, 1), ids)
        options["seed"] = torch.arange(rows) if varied == "seed" else torch.full((rows,), 12)
        options["step"] = torch.arange(rows) if varied == "step" else 0
    got, _ = step(logits, tokens, None, ik.TopK(1), **options)
    assert chi_square(counts(got.proposal, ids), (row.double() / temperature).softmax(0)) < CHI_SQUARE[ids - 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_forbidden_ids_are_never_drawn_and_the_rest_share(backend):
    options = {"temperature": 1.0, "mask_id": 16, "backend": backend, "forbid": tuple(range(8))}
    bias = ([8, 9], [math.log(3.0), math.log(2.0)])
    got, _ = step(torch.zeros(1, 6000, 16), torch.full((1, 6000), 16), logit_bias=bias, **options)
    assert got.proposal.min() >= 8
    weights = torch.tensor([3.0, 2, 1, 1, 1, 1, 1, 1])
    assert chi_square(counts(got.proposal - 8, 8), weights / weights.sum()) < CHI_SQUARE[7]


@needs_cpu
def test_the_tail_of_a_real_vocabulary_wins_as_often_as_it_should():
    """One id holds 9 tenths, 126463 share the rest: how often they win, and that they win evenly."""
    vocabulary, rows = 126464, 3000
    row = torch.zeros(vocabulary)
    row[777] = math.log(9 * (vocabulary - 1))
    logits, tokens = row.expand(1, rows, vocabulary), torch.full((1, rows), vocabulary)
    got, _ = step(logits, tokens, None, ik.TopK(1), "cpu", vocabulary, temperature=1.0, seed=5)
    tail = got.proposal[got.proposal != 777]
    assert abs(len(tail) - 0.1 * rows) < 4 * math.sqrt(rows * 0.1 * 0.9)
    assert chi_square(counts(tail * 16 // vocabulary, 16), torch.full((16,), 1 / 16)) < CHI_SQUARE[15]


@needs_cpu
def test_ids_that_24_bits_could_never_draw_are_drawn():
    """A top id 18 above 126463 others: they win once in 520 draws, nearly always by Gumbel values above 16.6."""
    vocabulary, rows = 126464, 6000
    row = torch.zeros(vocabulary)
    row[0] = 18.0
    share = (vocabulary - 1) / (vocabulary - 1 + math.exp(18))
    logits, tokens = row.expand(1, rows, vocabulary), torch.full((1, rows), vocabulary)
    got, _ = step(logits, tokens, None, ik.TopK(1), "cpu", vocabulary, temperature=1.0, seed=9)
    wins = int((got.proposal != 0).sum())
    assert abs(wins - rows * share) < 3 * math.sqrt(rows * share)  # Poisson: 11.5 expected, so none at all would fail
    assert 3 * math.sqrt(rows * share) < rows * share
