"""unmask's Triton kernels in the interpreter: against the reference and a plain loop, bit for bit the same whatever
must not matter, and planted faults that these tests must see."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="no triton")
tl = pytest.importorskip("triton.language")

import illada_kernels as ik  # noqa: E402
from illada_kernels.ops.unmask import gpu, reference  # noqa: E402
from illada_kernels.ops.unmask.triton import launch as room  # noqa: E402
from illada_kernels.ops.unmask.triton import noise as kernel_noise  # noqa: E402
from illada_kernels.testing import HALF_ULP  # noqa: E402
from tests.helpers.triton_interpreter import KernelFault  # noqa: E402
from tests.helpers.unmask_oracle import INF, MASK, RULES, plain, step  # noqa: E402
from tests.helpers.unmask_triton import exact_inputs, from_hidden, plant, same, small_tiles  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of inf - inf and log 0 in unused lanes


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_tiles(monkeypatch):
        yield


# ---- noise -----------------------------------------------------------------------------------------------------------
@triton.jit
def draw(words, noise, key0, key1, position, at_step, PAIRS: tl.constexpr):
    pair = tl.arange(0, PAIRS)[:, None]
    lane = tl.zeros([1, 1], tl.int64)
    key0, key1, position = (lane + key0).to(tl.uint32), (lane + key1).to(tl.uint32), (lane + position).to(tl.uint32)
    zero = tl.zeros([1, 1], tl.uint32)
    w0, w1, w2, w3 = kernel_noise.philox(key0, key1, pair.to(tl.uint32), position, (lane + at_step).to(tl.uint32), zero)
    tl.store(words + 4 * pair, w0.to(tl.int64))
    tl.store(words + 4 * pair + 1, w1.to(tl.int64))
    tl.store(words + 4 * pair + 2, w2.to(tl.int64))
    tl.store(words + 4 * pair + 3, w3.to(tl.int64))
    tl.store(noise + 2 * pair, kernel_noise.gumbel(w0, w1))
    tl.store(noise + 2 * pair + 1, kernel_noise.gumbel(w2, w3))


@triton.jit
def gumbel_of(words, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    high, low = tl.load(words + 2 * i).to(tl.uint32), tl.load(words + 2 * i + 1).to(tl.uint32)
    tl.store(out + 2 * i, kernel_noise.unit(high, low))
    tl.store(out + 2 * i + 1, kernel_noise.gumbel(high, low))


def drawn(seed: int, position: int, at_step: int, pairs: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    words, noise = torch.zeros(pairs, 4, dtype=torch.int64), torch.zeros(2 * pairs)
    draw[(1,)](words, noise, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, position, at_step, PAIRS=pairs)
    return words, noise


def test_known_answer() -> None:
    words, noise = drawn(3, 5, 2)
    assert [f"{w:08x}" for w in words[5].tolist()] == ["4272ecf0", "4f9e222a", "9d7de5ac", "382013f0"]
    assert noise[10:12].tolist() == pytest.approx([1.20224, 0.04600], abs=5e-6)


@pytest.mark.parametrize(
    "seed, position, at_step", [(-9, 0, 0), (2**63 - 1, 2**31 - 1, 2**32 - 1), (2**40 + 7, 300, 1)]
)
def test_words_and_noise_are_the_references(seed: int, position: int, at_step: int) -> None:
    words, noise = drawn(seed, position, at_step, 256)
    column = lambda x: torch.tensor([[x]])  # noqa: E731
    want = reference.philox(column(seed), torch.arange(256), column(position), column(at_step), 0)
    assert torch.equal(words, torch.cat(want).T)
    exact = reference.gumbel(column(seed), column(position), column(at_step), 512)[0]
    # the inner logarithm is off by 8 EPS here and 2 in the reference, the outer one by an ulp, 2 EPS, each
    assert ((noise - exact).abs() <= HALF_ULP * (8 + 2 + 4 * exact.abs())).all()


def test_units_round_once_and_the_ends_are_finite_or_minus_infinity() -> None:
    hard = [
        0,
        1,
        2**24 + 1,
        2**25 - 1,
        2**40 + 2**16,
        2**40 + 2**16 + 1,
        2**63 - 1,
        2**63 + 2**39,
        2**63 + 2**39 + 1,
        2**64 - 2**40 + 1,
        2**64 - 2**39,
        2**64 - 2**39 - 1,
        2**64 - 1,
        2**38,
        2**39,
        2**62 + 5,
    ]
    words = torch.tensor([[u >> 32, u & 0xFFFFFFFF] for u in hard])
    out = torch.zeros(len(hard), 2)
    gumbel_of[(1,)](words, out, SIZE=len(hard))
    assert out[:, 0].tolist() == list(map(rounded, hard))
    g = out[:, 1].double()
    u = out[:, 0].double().clamp(min=2.0**-64)
    exact = -torch.log(-torch.log1p(-u))
    assert torch.equal(g[u == 1], torch.full_like(g[u == 1], -INF)) and (u == 1).sum() == 2
    rest = u < 1
    assert ((g - exact)[rest].abs() <= HALF_ULP * (8 + 2 * exact[rest].abs())).all()


def rounded(u: int) -> float:
    """u * 2**-64 as the nearest float32, ties to even, in integers."""
    shift = max(0, u.bit_length() - 24)
    high, low = u >> shift, u & ((1 << shift) - 1)
    half = 1 << shift >> 1
    if shift and (low > half or (low == half and high & 1)):
        high += 1
    return high * 2.0 ** (shift - 64)


# ---- steps -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule, trial", zip(RULES, itertools.cycle(range(4))), ids=repr)
def test_a_step_is_what_a_plain_loop_does(rule, trial: int) -> None:
    generator = torch.Generator().manual_seed(trial)
    confidence = ["probability", "margin", "neg_entropy", "sampled"][trial]
    order, defer = [("confidence", ()), ("left", ()), ("confidence", (3, 5)), ("left", (3, 5))][trial]
    if isinstance(rule, ik.Threshold) and confidence == "neg_entropy":
        rule = ik.Threshold(-1.302)
    logits = torch.randint(-1, 3, (2, 6, 7), generator=generator).float() * 0.75  # few values: ties of both kinds
    logits[0, 0, 3] = float("nan") if trial % 2 else -INF
    held = torch.randint(0, 7, (2, 8), generator=generator)
    tokens = held.where(torch.rand(2, 8, generator=generator) < 0.3, MASK)
    positions = torch.stack([torch.randperm(10, generator=generator)[:6] - 1 for _ in range(2)])
    frozen = torch.rand(2, 8, generator=generator) < 0.2
    revise = ik.Edit(0.34) if trial == 0 else None
    forbid = (2, 4) if trial == 1 else ()
    options = {"confidence": confidence, "revise": revise, "frozen": frozen, "forbid": forbid}
    got, after = step(logits, tokens, positions, rule, "triton", order=order, defer=defer, **options)
    how = (rule, confidence, revise, frozen, forbid, order, defer)
    proposal, committed, expected = plain(logits, tokens, positions, *how)
    assert torch.equal(got.proposal, proposal)
    assert torch.equal(got.committed, committed)
    assert torch.equal(after, expected)


def random_call(seed: int):
    """Logits, tokens, positions, rule, options, like those that the CPU kernel is tested with, but small."""
    pick = random.Random(seed).choice
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator)  # noqa: E731
    batch, count, vocabulary = pick([1, 2]), pick([1, 3, 5]), pick([1, 2, 37, 64, 127, 129, 300, 385])
    length = count + pick([0, 3])
    logits = torch.randn(batch, count, vocabulary, generator=generator) * pick([1.0, 5.0, 1e20, 1e38])
    if pick([True, False]):
        logits = torch.randint(0, 3, logits.shape, generator=generator).float()
    logits = logits.to(pick([torch.float32, torch.bfloat16, torch.float16]))
    bad = pick([None, None, float("nan"), -INF, INF])
    if bad is not None:
        logits[0, 0, slice(None) if bad == -INF else slice(-1, None)] = bad
    mask = pick([0, vocabulary - 1, vocabulary + 3])
    held = (rand(batch, length) * (vocabulary + 2)).long() - 1
    tokens = held.where(rand(batch, length) < pick([0.0, 0.5]), mask)
    positions = torch.stack([torch.randperm(length, generator=generator)[:count] for _ in range(batch)])
    positions = positions.where(rand(batch, count) > pick([0.0, 0.3]), pick([-1, length, 2**40]))
    confidence = pick(["probability", "margin", "neg_entropy", "random", "sampled"])
    sign = -3 if confidence == "neg_entropy" else 1
    rule = pick(
        [
            ik.TopK(pick([0, 1, 2, 2**62])),
            ik.TopK((rand(batch) * 5).int() - 1),
            ik.Threshold(sign * rand(batch)),
            ik.Threshold(sign * rand(batch), at_least=pick([0, 3, (rand(batch) * 5).long() - 1])),
            ik.Factor(pick([0.0, 0.7, 3.0])),
            ik.EntropyBound(rand(()) * 9, inclusive=pick([True, False])),
        ]
    )
    scores = (rand(batch, count) * 3).round().where(rand(batch, count) < 0.8, float("nan"))
    bias = ((rand(4) * (vocabulary + 4)).long() - 2, torch.randn(4, generator=generator))
    options = {
        "mask_id": mask,
        "confidence": confidence,
        "order": pick(["confidence", "confidence", "left"]),
        "rank_temperature": pick([0.0, 0.0, 0.5, rand(batch) - 0.3]),
        "defer": pick([(), tuple(range(0, vocabulary, 3))]),
        "temperature": pick([0.0, 0.3, 5.0, rand(()).double(), rand(batch).bfloat16(), 3e38]),
        "confidence_temperature": pick([1.0, 0.5, rand(batch) + 0.1, torch.tensor(INF)]),
        "seed": pick([0, -9, 2**63 - 5, torch.tensor(9), (rand(batch) * 2**60).long()]),
        "step": pick([0, 2**32 - 1, torch.arange(batch)]),
        "forbid": pick([(), tuple({0, vocabulary - 1}), tuple(range(0, vocabulary, 7))]),
        "logit_bias": pick([None, bias, ([0, 0], [1.5, -0.25]), ([vocabulary - 1], [-INF])]),
        "revise": pick([None, ik.Edit(rand(batch)), ik.Remask(2), ik.Remask((rand(batch) * 4).long(), scores)]),
        "frozen": pick([None, rand(batch, length) < 0.3]),
        "noise_positions": pick([None, (rand(batch, count) * 2**31).long()]),
    }
    return logits, tokens, positions, rule, options


@pytest.mark.parametrize("seed", range(16))
def test_steps_from_logits_are_the_references(seed: int) -> None:
    logits, tokens, positions, rule, options = random_call(seed)
    want, want_tokens = step(logits, tokens, positions, rule, "reference", **options)
    got, got_tokens = step(logits, tokens, positions, rule, "triton", **options)
    same(got, want, got_tokens, want_tokens, logits.shape[2], options["confidence"] == "neg_entropy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary, dim", [(1, 3), (131, 64), (300, 70)])
def test_the_fused_head_is_the_references(dtype, vocabulary: int, dim: int) -> None:
    inputs = exact_inputs(2, 3, vocabulary, dim, dtype)
    inputs[2][0, inputs[3][0, 0]] = vocabulary  # takes no part: its row may be anything
    inputs[0][0, 0] = float("nan")
    bias = (torch.arange(vocabulary) % 5 / 4).to(dtype)
    options = {"head_bias": bias, "logit_bias": ([0, vocabulary - 1, 0], [0.5, 3.0, 0.25]), "confidence": "margin"}
    want, want_tokens = from_hidden(inputs, ik.TopK(2), "reference", **options)
    got, got_tokens = from_hidden(inputs, ik.TopK(2), "triton", **options)
    same(got, want, got_tokens, want_tokens, vocabulary)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_float32_head_serves_hidden_rows_of_16_bits(dtype) -> None:
    hidden, weight, tokens, positions = exact_inputs(1, 3, 150, 24, dtype)
    inputs = (hidden, weight.float() + 2.0**-10, tokens, positions)
    options = {"confidence": "neg_entropy"}
    want, want_tokens = from_hidden(inputs, ik.EntropyBound(3.0), "reference", **options)
    got, got_tokens = from_hidden(inputs, ik.EntropyBound(3.0), "triton", **options)
    same(got, want, got_tokens, want_tokens, 150, by_entropy=True)


def test_many_rows_go_through_products_by_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "FUSED_ROWS", 4)
    monkeypatch.setattr(gpu, "product_ids", lambda rows: 256)
    monkeypatch.setattr(gpu, "product_rows", lambda rows: 4)  # the second product is filled up
    inputs = exact_inputs(2, 3, 300, 16)
    inputs[0][1, 1, 3] = float("nan")
    options = {"head_bias": torch.arange(300) % 3 / 4, "revise": ik.Edit(0.1)}
    want, want_tokens = from_hidden(inputs, ik.TopK(2), "reference", **options)
    got, got_tokens = from_hidden(inputs, ik.TopK(2), "triton", **options)
    same(got, want, got_tokens, want_tokens, 300)
    assert got.proposal[1, 1] == -1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e38])
@pytest.mark.parametrize("t, tc", [(1e-38, 3.4e38), (3.4e38, 1e-38)])
def test_numbers_up_to_the_largest_float_agree_with_the_reference(scale: float, t: float, tc: float) -> None:
    logits = torch.randint(-4, 5, (1, 4, 300), generator=torch.Generator().manual_seed(8)) / 4 * scale
    options = {"temperature": t, "confidence_temperature": tc, "rank_temperature": t}
    for confidence in ("sampled", "neg_entropy"):
        rule = ik.Threshold(0.0 if confidence == "sampled" else -1.0)
        args = (logits, [[MASK] * 4], None, rule)
        (got, tokens), (want, want_tokens) = (
            step(*args, b, confidence=confidence, **options) for b in ("triton", "reference")
        )
        same(got, want, tokens, want_tokens, 300, confidence == "neg_entropy")


def test_strided_inputs_and_guard_zones() -> None:
    torch.manual_seed(3)
    wide = torch.randn(3, 6, 2, 100)
    logits, positions = wide[:, ::2, 1, 10:60], torch.arange(6).expand(3, 6)[:, ::2]
    storage = torch.full((5, 12), 777)
    tokens = storage[1:4, 3:9]
    tokens.fill_(MASK)
    frozen, scores = (torch.rand(6, 3) < 0.2).T, torch.rand(3, 6)[:, ::2]
    options = {"frozen": frozen, "revise": ik.Remask(1, scores), "confidence": "margin", "noise_positions": positions}
    tokens[:, 0] = 7
    want, want_tokens = step(logits, tokens, positions, ik.TopK(1), "reference", temperature=1.0, **options)
    got = ik.unmask_from_logits(
        logits, tokens, positions, ik.TopK(1), mask_id=MASK, temperature=1.0, backend="triton", **options
    )
    same(got, want, tokens, want_tokens, 50)
    tokens.fill_(777)
    assert storage.eq(777).all()


@pytest.mark.parametrize("batch, count, length, vocabulary", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_dimensions(batch: int, count: int, length: int, vocabulary: int) -> None:
    tokens = torch.full((batch, length), MASK)
    positions = torch.arange(count).expand(batch, count)
    got, after = step(torch.zeros(batch, count, vocabulary), tokens, positions, ik.TopK(1), "triton")
    assert got.proposal.shape == (batch, count) and not got.committed.any() and got.proposal.eq(-1).all()
    assert torch.equal(after, tokens) and got.remaining.tolist() == [min(count, length)] * batch


def test_bad_rows_propose_nothing_and_harm_no_other() -> None:
    logits = torch.randn(1, 7, 300, generator=torch.Generator().manual_seed(0))
    logits[0, 0, 299], logits[0, 1, 7], logits[0, 2] = float("nan"), INF, -INF
    logits[0, 3, 1:] = -INF  # one id left
    logits[0, 4, 3] = float("nan")  # forbidden below
    logits[0, 5, :64] = float("nan")  # all of a tile
    for temperature in (0.0, 1.0):
        got, after = step(logits, [[MASK] * 7], None, ik.TopK(9), "triton", temperature=temperature, forbid=(3,))
        assert got.proposal[0, [0, 1, 2, 5]].tolist() == [-1] * 4
        assert got.confidence[0, [0, 1, 2, 5]].tolist() == [-INF] * 4
        assert got.proposal[0, 3] == 0 and got.confidence[0, 3] == 1.0
        assert after[0].ne(MASK).tolist() == [0, 0, 0, 1, 1, 0, 1] and got.remaining.tolist() == [4]


def test_rows_that_are_certain_have_no_entropy_at_all() -> None:
    logits = torch.full((1, 3, 300), -200.0)
    logits[0, 0, 5] = logits[0, 1, 299] = 0.0
    logits[0, 2, 70], logits[0, 2, :64] = 0.0, -88.0  # another tile's maximum is too far below to count
    options = {"confidence": "neg_entropy", "backend": "triton"}
    got, _ = step(logits, [[MASK] * 3], None, ik.EntropyBound(0.0, inclusive=True), **options)
    assert got.confidence.eq(0.0).all() and got.committed.all()


def test_ties_go_to_the_lowest_id_and_the_lowest_position() -> None:
    logits = torch.zeros(1, 5, 300)
    positions = torch.tensor([[7, 2, 9, 4, 0]])
    for low in (0, 131):
        options = {"forbid": tuple(range(low)), "mask_id": 299}
        got, _after = step(logits, [[299] * 10], positions, ik.TopK(3), "triton", **options)
        assert got.proposal.eq(low).all() and got.remaining.tolist() == [2]
        assert got.committed.tolist() == [[False, True, False, True, True]]
    logits[..., [130, 200, 299]] = 1.0
    got, _ = step(logits, [[MASK] * 10], positions, ik.TopK(3), "triton", confidence="margin")
    assert got.proposal.eq(130).all() and got.confidence.eq(0.0).all()


def test_more_than_two_to_the_31_elements() -> None:
    far = 2**31 + 5
    storage = torch.empty(far + 50, dtype=torch.float16)  # pages never touched are never there
    logits = storage.as_strided((1, 2, 50), (0, far, 1))
    logits[0, 0], logits[0, 1] = 0.0, 0.0
    logits[0, 0, 11], logits[0, 1, 12] = 1.0, 1.0
    assert step(logits, [[MASK] * 2], backend="triton")[0].proposal.tolist() == [[11, 12]]
    weight = storage.as_strided((2, 16), (far, 1))
    weight[0], weight[1] = -1.0, 1.0
    hidden = torch.ones(1, 1, 16, dtype=torch.float16)
    where = (torch.full((1, 1), 5), torch.zeros(1, 1, dtype=torch.int64))
    got = ik.unmask(hidden, weight, *where, ik.TopK(1), mask_id=5, forbid=(), backend="triton")
    assert got.proposal.item() == 1


# ---- what must not matter, bit for bit -------------------------------------------------------------------------------
@pytest.mark.parametrize("fused", [True, False])
def test_batch_order_of_candidates_and_block_shapes_do_not_change_a_bit(fused: bool, monkeypatch) -> None:
    hidden, weight, *_ = exact_inputs(4, 5, 200, 16)  # the interpreter's own products depend on their shape
    rows = 20 if fused else 10
    hidden = hidden[: rows // 5]
    logits = hidden @ weight.T
    tokens, positions = torch.full((4, 9), MASK), torch.arange(5).expand(4, 5)
    seeds = torch.tensor([5, 2**40, 7, -1])

    def run(rows: slice, order: torch.Tensor):
        after, at = tokens[rows].clone(), positions[rows][:, order]
        options = {"mask_id": MASK, "temperature": 1.0, "confidence": "neg_entropy", "seed": seeds[rows]}
        if fused:
            got = ik.unmask(hidden[rows][:, order], weight, after, at, ik.TopK(3), backend="triton", **options)
        else:
            source = logits[rows][:, order]
            got = ik.unmask_from_logits(source, after, at, ik.TopK(3), backend="triton", **options)
        return got.confidence, got.proposal, after

    everything, all_rows = torch.arange(5), slice(rows // 5)
    confidence, proposal, after = run(all_rows, everything)  # fused: 20 rows, BLOCK_N is 32
    order = torch.tensor([3, 0, 2, 1, 4])
    other = run(all_rows, order)
    assert torch.equal(other[0], confidence[:, order]) and torch.equal(other[2], after)
    one = run(slice(1, 2), everything)  # 5 rows: BLOCK_N is 16
    assert torch.equal(one[0], confidence[1:2]) and torch.equal(one[2], after[1:2])
    monkeypatch.setattr(room, "select_options", lambda count: {"BLOCK": 4, "BLOCK_G": 1, "ONE_BLOCK": False})
    again = run(all_rows, everything)
    assert all(map(torch.equal, again, (confidence, proposal, after)))


@pytest.mark.parametrize("rule", [ik.TopK(2), ik.Threshold(0.1, 2), ik.Factor(8.0), ik.EntropyBound(20.0, True)])
def test_ranks_in_any_order_do_not_depend_on_block_shapes(rule, monkeypatch) -> None:
    """One block with lanes to spare, and three of which the last is not full. Rules end in the first or the second."""
    logits = torch.randn(2, 11, 50, generator=torch.Generator().manual_seed(6))
    tokens, positions = torch.full((2, 15), MASK), torch.arange(11).flip(0).expand(2, 11) + 2
    options = {"rank_temperature": 2.0, "defer": tuple(range(0, 50, 2)), "temperature": 0.3, "confidence": "sampled"}
    for changes in ({}, {"order": "left"}):
        want, want_tokens = step(logits, tokens, positions, rule, "reference", **(options | changes))
        got, got_tokens = step(logits, tokens, positions, rule, "triton", **(options | changes))
        same(got, want, got_tokens, want_tokens, 50)
        with monkeypatch.context() as patch:
            patch.setattr(room, "select_options", lambda count: {"BLOCK": 4, "BLOCK_G": 1, "ONE_BLOCK": False})
            again, again_tokens = step(logits, tokens, positions, rule, "triton", **(options | changes))
        assert all(map(torch.equal, again, got)) and torch.equal(again_tokens, got_tokens)


def test_numbers_and_device_tensors_mean_the_same() -> None:
    logits = torch.randn(2, 3, 90, generator=torch.Generator().manual_seed(0))
    numbers = {"temperature": 0.5, "confidence_temperature": 0.7, "seed": 7, "step": 3}
    tensors = {name: torch.tensor(value) for name, value in numbers.items()}
    per_sequence = {name: value.expand(2).contiguous() for name, value in tensors.items()}
    per_sequence["seed"] = torch.tensor([7, 8])  # one seed s means s + b
    want, want_after = step(logits, [[MASK] * 3] * 2, None, ik.TopK(1), "triton", **numbers)
    for options, k in ((tensors, torch.tensor(1)), (per_sequence, torch.tensor([1, 1], dtype=torch.int16))):
        got, after = step(logits, [[MASK] * 3] * 2, None, ik.TopK(k), "triton", **options)
        assert all(map(torch.equal, got, want)) and torch.equal(after, want_after)


# ---- planted faults --------------------------------------------------------------------------------------------------
def one_step(**options):
    """A call that many faults show in: odd sizes, both tiles and groups, held tokens, a NaN row, ties."""
    logits = torch.randint(0, 5, (2, 5, 300), generator=torch.Generator().manual_seed(1)).float()
    logits[:, :, 20] = 7.0  # the first tile's alone
    logits[0, 0, 10], logits[0, 0, 200] = float("nan"), 9.0
    logits[0, 1, 20] = 4.0  # a tie of many ids
    logits[1] = logits[1, :1]  # a tie of all rows
    tokens, positions = torch.full((2, 7), 299), torch.tensor([[0, 2, 4, 5, 1], [6, 2, 3, 0, 4]])
    tokens[0, 1], tokens[1, 3] = 5, 250

    def check() -> None:
        rule = options.get("rule", ik.TopK(2))
        rest = {key: value for key, value in options.items() if key != "rule"} | {"mask_id": 299}
        want, want_tokens = step(logits, tokens, positions, rule, "reference", **rest)
        got, got_tokens = step(logits, tokens, positions, rule, "triton", **rest)
        same(got, want, got_tokens, want_tokens, 300, rest.get("confidence") == "neg_entropy")

    return check


def certain_step():
    """A row is certain though another group of ids has a maximum and a sum of its own."""
    logits = torch.zeros(1, 2, 300)
    logits[0, 0, 5], logits[0, 1, 270] = 10.0, 11.0

    def check() -> None:
        options = {"confidence": "neg_entropy", "confidence_temperature": 0.1}
        got, _ = step(logits, [[MASK] * 2], None, ik.EntropyBound(0.0, inclusive=True), "triton", **options)
        assert got.confidence.eq(0.0).all() and got.committed.all()

    return check


def one_fused_step():
    inputs = exact_inputs(2, 5, 301, 70)
    inputs[0][0, 0] = float("nan")
    inputs[2][0, inputs[3][0, 0]] = 7

    def check() -> None:
        want, want_tokens = from_hidden(inputs, ik.TopK(2), "reference")
        got, got_tokens = from_hidden(inputs, ik.TopK(2), "triton")
        same(got, want, got_tokens, want_tokens, 301)

    return check


FAULTS: list[tuple[str, str, str, Callable[[], None]]] = [
    ("partials", "barred = ids >= vocab", "barred = ids > vocab", one_fused_step()),
    ("head", "mask=active[None, :] & within[:, None]", "mask=within[:, None]", one_fused_step()),
    ("head", "(group + 1) * tiles // groups)", "(group + 1) * (tiles // groups))", one_fused_step()),
    ("head", "there & (tile > first_tile)", "there", one_fused_step()),
    ("rows", "x = tl.load(source + both, mask=both < ids,", "x = tl.load(source + both, mask=both < 302,", one_step()),
    ("partials", "better = tile_score > score", "better = tile_score >= score", one_step()),
    ("partials", "best == BAD, BAD, tl.where(better, tile_best, best)", "better, tile_best, best", one_step()),
    ("partials", "tl.minimum(top, tile_top))", "top)", one_step(confidence="margin")),
    (
        "partials",
        "noised(even, temperature[None, :], w0, w1)",
        "noised(even, temperature[None, :], w1, w0)",
        one_step(temperature=1.0),
    ),
    ("noise", "tl.where(masked & (t > 0)", "tl.where((t > 0)", one_step(temperature=9.0, revise=ik.Edit(0.0))),
    (
        "proposals",
        "candidate if REVISE == EDIT or REVISE == REMASK else masked",
        "masked",
        one_step(revise=ik.Remask(1)),
    ),
    ("ranks", "(rising << 31) | position", "(rising << 31)", one_step()),
    (
        "ranks",
        "RULE == INCLUSIVE else places < bound",
        "RULE != TOP_K else places < bound",
        one_step(rule=ik.EntropyBound(7.0)),
    ),
    ("ranks", "(rank < least) | passing(", "(rank <= least) | passing(", one_step()),
    ("proposals", "0.0, tl.exp(z)).to", "0.0, 1.0 + 0 * z).to", one_step(confidence_temperature=0.5)),
    ("proposals", "surprise - z * group_total", "surprise", one_step(confidence="neg_entropy")),
    ("proposals", "z < LEAST, 0.0, tl.exp(z)).to", "z < -200.0, 0.0, tl.exp(z)).to", certain_step()),
    ("proposals", "tl.where(deferred | (places == LAST)", "tl.where((places == LAST)", one_step(defer=(20, 250))),
    ("proposals", "if ORDER == FROM_LEFT:", "if ORDER == 2:", one_step(order="left")),
    (
        "proposals",
        "philox(key0, key1, zero, position, at_step, zero + 2)",
        "philox(key0, key1, zero, position, at_step, zero + 1)",
        one_step(rank_temperature=5.0),
    ),
    (
        "ranks",
        "fails = (rank >= least)",
        "fails = (rank >= 1)",
        one_step(rule=ik.Threshold(0.9, at_least=3), order="left"),
    ),
    ("ranks", "(rank < least) | passing(", "(rank < 1) | passing(", one_step(rule=ik.Threshold(0.9, at_least=3))),
    (
        "proposals",
        "tl.where(noisy, tl.minimum(largest, ",
        "tl.where(noisy, tl.minimum(1.0, ",
        one_step(confidence="sampled", temperature=1.0),
    ),
    (
        "ranks",
        "<= places[:, None] if RULE == INCLUSIVE",
        "<= places[:, None] if RULE == TOP_K",
        one_step(rule=ik.EntropyBound(8.0, inclusive=True), order="left"),
    ),
]


@pytest.mark.parametrize("number", range(len(FAULTS)), ids=lambda i: f"{i} {FAULTS[i][2][:30]}")
def test_planted_faults_are_seen(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    *fault, check = FAULTS[number]
    plant(monkeypatch, tmp_path, *fault)
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that was never written then holds NaN, not luck
    try:
        with pytest.raises((AssertionError, KernelFault)):
            check()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("check", [one_step(temperature=9.0, revise=ik.Edit(0.0)), one_fused_step(), certain_step()])
def test_the_calls_of_planted_faults_pass_without_them(check: Callable[[], None]) -> None:
    check()


# ---- what the compiler makes of it, without a GPU --------------------------------------------------------------------
def test_product_and_sum_round_apart_and_64_bits_round_to_nearest() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"words": "*i64", "out": "*fp32", "SIZE": "constexpr"}
    source = ASTSource(noised_of, signature, {"SIZE": 128})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]
    assert "cvt.rn.f32.u64" in ptx
    assert "lg2.approx" not in ptx  # its error near 1 is absolute: what wins would be wrong
    final = re.findall(r"(?:mul|add|fma)\.[a-z.]*f32", ptx)[-2:]
    assert final == ["mul.rn.f32", "add.rn.f32"], final


@triton.jit
def noised_of(words, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    high, low = tl.load(words + 2 * i).to(tl.uint32), tl.load(words + 2 * i + 1).to(tl.uint32)
    tl.store(out + i, kernel_noise.noised(tl.load(out + i), tl.load(out + SIZE + i), high, low))


@pytest.mark.parametrize("path", ["hidden", "logits"])
def test_launches_compile_with_the_arguments_that_they_are_called_with(path: str, monkeypatch) -> None:
    """The interpreter takes what the compiler does not: a variable that changes its type in a loop, say."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    target = GPUTarget("cuda", 90, 32)
    backend, compiled = make_backend(target), []

    def run(self, *args, grid, warmup, **options):
        bind = create_function_from_signature(self.signature, self.params, backend)
        parsed, *rest = self._pack_args(backend, options, *bind(*args, **options))
        ptx = triton.compile(ASTSource(self, *rest), target=target, options=parsed.__dict__).asm["ptx"]
        compiled.append((self.fn.__name__, "wgmma" in ptx, "cp.async" in ptx))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(room, "PAIRS", 64)  # as on a GPU
    hidden, weight, tokens, positions = exact_inputs(2, 3, 300, 64, torch.bfloat16)
    options = {
        "temperature": torch.rand(2),
        "seed": torch.arange(2),
        "step": torch.tensor(3),
        "mask_id": 299,
        "frozen": tokens == 0,
        "logit_bias": ([1], [2.0]),
        "noise_positions": positions,
        "backend": "triton",
    }
    if path == "hidden":
        options |= {"confidence": "random", "revise": ik.Remask(torch.tensor(1)), "head_bias": weight[:, 0]}
        ik.unmask(hidden, weight, tokens, positions, ik.Threshold(torch.tensor(0.5)), **options)
        assert compiled == [("head_kernel", True, True), ("select_kernel", False, False)]
        options |= {"top_k": torch.tensor([3, 2]), "min_p": torch.rand(2)}
        ik.unmask(hidden, weight, tokens, positions, ik.Threshold(torch.tensor(0.5)), **options)
        assert [name for name, *_ in compiled[2:]] == ["head_kernel", "draw_kernel", "select_kernel"]
    else:
        options |= {"confidence": "margin", "revise": ik.Edit(torch.rand(2))}
        ik.unmask_from_logits(hidden @ weight.T, tokens, positions, ik.EntropyBound(torch.rand(2)), **options)
        assert [name for name, *_ in compiled] == ["rows_kernel", "select_kernel"]
        options |= {"confidence": "sampled", "defer": (1, 2), "rank_temperature": torch.rand(2), "revise": None}
        for rule in (ik.TopK(1), ik.Threshold(0.5, 2), ik.Factor(1.0), ik.EntropyBound(0.5, inclusive=True)):
            ik.unmask_from_logits(hidden @ weight.T, tokens, positions, rule, order="left", **options)
        assert len(compiled) == 10
        truncation = {"top_k": torch.tensor([3, 2]), "top_p": torch.tensor(0.5), "min_p": torch.rand(2)}
        for ways in (truncation, {"top_k": 2**40, "top_p": 0.5, "min_p": 0.1}):
            ik.unmask_from_logits(hidden @ weight.T, tokens, positions, ik.Renoise(torch.rand(2)), **ways, **options)
        assert [name for name, *_ in compiled[10:]] == ["bounds_kernel", "rows_kernel", "select_kernel"] * 2
