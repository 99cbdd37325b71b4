"""The cuda backend of unmask on the CPU: its kernels in the emulator against the reference and a plain loop.

"spans" starts from logits, "head" is the fused kernel with two blocks, "product" what runs without Hopper or with many
rows. Logits are multiples of 1/8 wherever tokens must agree exactly: then all paths see the same ones.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import illada_kernels as ik
from illada_kernels import _selftest
from illada_kernels.ops.unmask import gpu
from illada_kernels.testing import HALF_ULP
from tests.cuda_on_cpu.library import KernelFault, missing
from tests.helpers.unmask_on_cpu import (
    SOURCES,
    Backend,
    Faults,
    OnCpu,
    assert_same,
    operands,
    planted,
    unmask,
    use,
    where,
)
from tests.helpers.unmask_oracle import INF, MASK, RULES, draw_call, plain, rows_with_top

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
PATHS = ("spans", "head", "product")


@functools.cache
def kernels() -> OnCpu:
    return OnCpu()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Backend:
    kernels().launches.clear()
    kernels().seed = 0
    return Backend(monkeypatch, kernels())


# ---- against the specification ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("confidence", ["probability", "margin", "neg_entropy"])
def test_a_step_is_what_a_plain_loop_does(on_cpu: Backend, rule: Any, confidence: str) -> None:
    if isinstance(rule, ik.Threshold) and confidence == "neg_entropy":
        rule = ik.Threshold(-1.302)
    torch.manual_seed(0)
    for trial in range(2):
        logits = torch.randint(-1, 3, (2, 6, 7)).float() * 0.75  # few values: ties of ids and of candidates
        logits[0, 0, 3] = float("nan") if trial else -INF
        tokens = torch.randint(0, 7, (2, 8)).where(torch.rand(2, 8) < 0.3, MASK)
        positions = torch.stack([torch.randperm(10)[:6] - 1 for _ in range(2)])
        frozen = torch.rand(2, 8) < 0.2
        revise, forbid = (None, ()) if trial else (ik.Edit(0.34), (2, 4))
        options = {"confidence": confidence, "revise": revise, "frozen": frozen, "forbid": forbid, "mask_id": MASK}
        order, defer = ("left", (3, 5)) if trial else ("confidence", ())
        got, after = unmask("cuda", logits, None, tokens, positions, rule, order=order, defer=defer, **options)
        how = (rule, confidence, revise, frozen, forbid, order, defer)
        proposal, committed, expected = plain(logits, tokens, positions, *how)
        assert torch.equal(got.proposal, proposal) and torch.equal(got.committed, committed)
        assert torch.equal(after, expected)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_drawn_calls_equal_the_reference(on_cpu: Backend, data: Any) -> None:
    logits, tokens, positions, rule, options = draw_call(data.draw)
    got = unmask("cuda", logits, None, tokens, positions, rule, **options)
    want = unmask("reference", logits, None, tokens, positions, rule, **options)
    assert_same(got, want, logits.shape[2], options["confidence"] == "neg_entropy")


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "noise, entropy": {"temperature": 1.0, "seed": 5, "step": 2, "confidence": "neg_entropy"},
    "noise, margin, bias": {
        "temperature": torch.tensor([0.5, 30.0]),
        "confidence": "margin",
        "confidence_temperature": 0.5,
        "logit_bias": (torch.tensor([3, -1, 3, 10**6, 130]), torch.tensor([0.5, 9.0, 0.25, 9.0, -INF])),
    },
    "edit": {"revise": ik.Edit(0.02), "forbid": ()},
    "remask": {"revise": ik.Remask(1), "temperature": 0.7},
}


@pytest.mark.parametrize("vocabulary", [1, 255, 2047, 2049, 4097])
@pytest.mark.parametrize("path", ["head", "product"])
@pytest.mark.parametrize("name", OPTIONS)
def test_fused_steps_equal_the_reference(
    on_cpu: Backend, monkeypatch: pytest.MonkeyPatch, path: str, vocabulary: int, name: str
) -> None:
    use(on_cpu, path, monkeypatch)
    rows = (2, 3)
    hidden, head = operands(path, rows, vocabulary, dim=72 if vocabulary < 2000 else 8)
    tokens, positions = where(rows, 5, vocabulary - 1)
    tokens[0, positions[0, 1]] = tokens[1, positions[1, 0]] = 0  # hold a token
    if not name.endswith(("edit", "remask")) and vocabulary > 1:
        hidden[0, 1] = torch.nan  # takes no part: its row may be anything
    options = {"mask_id": vocabulary - 1, "head_bias": (torch.arange(vocabulary) % 5 / 4).bfloat16(), **OPTIONS[name]}
    rule = ik.EntropyBound(9.0) if "entropy" in name else ik.TopK(2)
    got = unmask("cuda", hidden, head, tokens, positions, rule, **options)
    assert_same(
        got, unmask("reference", hidden, head, tokens, positions, rule, **options), vocabulary, "entropy" in name
    )
    slices = -(-vocabulary // gpu.SLICE) * 2
    assert on_cpu.launch.launches == (["unmask_head_sm90a"] if path == "head" else ["unmask_rows_cuda"] * slices) + [
        "unmask_select_cuda"
    ]


def test_head_in_fp16_with_strides_between_rows_and_many_candidates(on_cpu: Backend) -> None:
    for rows in ((1, 20), (3, 13), (1, 128)):  # each width of the product
        hidden, head = (x.half() for x in operands("head", rows, 300))
        wide = torch.full((rows[0], rows[1] + 3, 80), torch.nan, dtype=torch.float16)
        wide[:, 2:-1, :72] = hidden
        tall = torch.full((300, 88), torch.nan, dtype=torch.float16)
        tall[:, :72] = head
        tokens, positions = where(rows, rows[1] + 2)
        args = (tokens, positions, ik.Threshold(0.05))
        options: dict[str, Any] = {"mask_id": MASK, "temperature": 0.6, "seed": 1}
        got = unmask("cuda", wide[:, 2:-1, :72], tall[:, :72], *args, **options)
        assert on_cpu.launch.launches[-2:] == ["unmask_head_sm90a", "unmask_select_cuda"]
        assert_same(got, unmask("reference", hidden, head, *args, **options), 300)


@pytest.mark.parametrize("path", PATHS)
def test_no_token_differs_but_where_rounding_decides(
    on_cpu: Backend, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """Random real inputs. A score is off by at most the rounding of a sum of D products, (D + 2) 2^-24 sum |h w|, and
    of l + T g, a few 2^-24 of its terms; a proposal may differ from that of float64 logits by twice that."""
    use(on_cpu, path, monkeypatch)
    draw = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(2, 8, 64, generator=draw).bfloat16(), torch.randn(600, 64, generator=draw).bfloat16()
    exact = hidden.double() @ head.double().T
    source = (exact.float(), None) if path == "spans" else (hidden, head)
    tokens, positions = where((2, 8), 8)
    options: dict[str, Any] = {"mask_id": MASK, "temperature": 2.0, "forbid": ()}
    got, _ = unmask("cuda", *source, tokens, positions, ik.TopK(1), **options)
    from illada_kernels.ops.unmask.noise import gumbel

    seeds = torch.arange(2).repeat_interleave(8)[:, None]
    g = gumbel(seeds, positions.reshape(-1, 1), torch.zeros_like(seeds), 600).double().view(2, 8, 600)
    scores = exact + 2.0 * g
    bound = 66 * 2.0**-24 * (hidden.double().abs() @ head.double().abs().T) + 8 * 2.0**-24 * (exact.abs() + 2 * g.abs())
    best, there = scores.max(2)
    mine = scores.gather(2, got.proposal[..., None])[..., 0]
    slack = bound.gather(2, got.proposal[..., None])[..., 0] + bound.gather(2, there[..., None])[..., 0]
    assert (best - mine <= slack).all()
    assert (got.proposal != there).sum() <= 1


@pytest.mark.parametrize("path", ["spans", "head"])
@pytest.mark.parametrize("confidence", ["probability", "margin", "neg_entropy"])
def test_confidence_is_as_accurate_as_torch_in_float32(on_cpu: Backend, path: str, confidence: str) -> None:
    """Against float64 logits (exact in either): no further off than twice what float32 PyTorch is, plus the rounding of
    the result."""
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randint(-8, 9, (2, 5, 64), generator=draw) / 8
    head = torch.randint(-8, 9, (9000, 64), generator=draw) / 8
    logits, source = hidden @ head.T, (hidden.bfloat16(), head.bfloat16())
    args = (*where((2, 5), 5), ik.TopK(1))
    options: dict[str, Any] = {"mask_id": MASK, "confidence": confidence}
    exact = unmask("reference", logits.double(), None, *args, **options)[0].confidence
    got = unmask("cuda", *(source if path == "head" else (logits, None)), *args, **options)[0].confidence
    logits[..., MASK] = -INF
    p = logits.softmax(-1)
    top, entropy = p.topk(2, -1).values, torch.special.xlogy(p, p).sum(-1)
    in_torch = {"probability": top[..., 0], "margin": top[..., 0] - top[..., 1], "neg_entropy": entropy}[confidence]
    bar = 2 * (in_torch - exact).abs().max() + 2 * HALF_ULP * exact.abs().max()
    assert (got - exact).abs().max() <= bar


# ---- ties, bad rows, ends -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PATHS)
def test_ties_go_to_the_lowest_id_and_the_lowest_position(
    on_cpu: Backend, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    use(on_cpu, path, monkeypatch)
    hidden, head = torch.zeros(1, 5, 8).bfloat16(), torch.ones(700, 8).bfloat16()
    hidden[0, 3] = -0.0
    source = (torch.tensor([0.0, -0.0]).repeat(350).repeat(1, 5, 1), None) if path == "spans" else (hidden, head)
    positions = torch.tensor([[7, 2, 9, 4, 0]])
    for low in (0, 1, 13, 257):
        options: dict[str, Any] = {"mask_id": 699, "forbid": tuple(range(low))}
        got, after = unmask("cuda", *source, torch.full((1, 10), 699), positions, ik.TopK(3), **options)
        assert got.proposal.tolist() == [[low] * 5]
        assert got.committed.tolist() == [[False, True, False, True, True]] and got.remaining.tolist() == [2]
        assert after.eq(low).nonzero()[:, 1].tolist() == [0, 2, 4]


@pytest.mark.parametrize("path", PATHS)
def test_bad_rows_propose_nothing_and_leave_the_others(
    on_cpu: Backend, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    use(on_cpu, path, monkeypatch)
    source, head = operands(path, (1, 6), 600)
    tokens, positions = where((1, 6), 6)
    for temperature in (0.0, 1.0):
        args = (head, tokens, positions, ik.TopK(9))
        options: dict[str, Any] = {"mask_id": MASK, "temperature": temperature, "confidence": "margin"}
        clean, _ = unmask("cuda", source, *args, **options)
        poisoned = source.clone()
        poisoned[0, 0, -1], poisoned[0, 4, 3] = torch.nan, INF
        got, after = unmask("cuda", poisoned, *args, **options)
        assert got.proposal[0, [0, 4]].tolist() == [-1, -1] and got.confidence[0, [0, 4]].tolist() == [-INF] * 2
        assert torch.equal(got.confidence[0, [1, 2, 3, 5]], clean.confidence[0, [1, 2, 3, 5]])
        assert (after == MASK).sum() == 2 and got.remaining.tolist() == [2]
    everything: dict[str, Any] = {"mask_id": MASK, "forbid": tuple(range(600))}
    got, _ = unmask("cuda", source, *args, **everything)
    assert got.proposal.eq(-1).all() and not got.committed.any()


def test_infinite_logits_that_are_forbidden_do_no_harm_and_certain_rows_have_no_entropy(on_cpu: Backend) -> None:
    logits = torch.full((1, 3, 5000), -200.0)
    logits[0, :, 4500], logits[0, 1, [3, 4999]] = 0.0, torch.tensor([INF, torch.nan])
    tokens, positions = where((1, 3), 3)
    options: dict[str, Any] = {"mask_id": MASK, "confidence": "neg_entropy", "forbid": (3, 4999)}
    got, _ = unmask("cuda", logits, None, tokens, positions, ik.EntropyBound(0.0, inclusive=True), **options)
    assert got.confidence.eq(0.0).all() and got.committed.all() and got.proposal.eq(4500).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e38])
@pytest.mark.parametrize("t, tc", [(1e-38, 3.4e38), (3.4e38, 1e-38)])
def test_numbers_up_to_the_largest_float_agree_with_the_reference(
    on_cpu: Backend, scale: float, t: float, tc: float
) -> None:
    logits = torch.randint(-4, 5, (2, 4, 300), generator=torch.Generator().manual_seed(8)) / 4 * scale
    options: dict[str, Any] = {"temperature": t, "confidence_temperature": tc, "rank_temperature": t, "mask_id": MASK}
    for confidence in ("sampled", "neg_entropy"):
        rule = ik.Threshold(0.0 if confidence == "sampled" else -1.0)
        got, want = (
            unmask(b, logits, None, *where((2, 4), 4), rule, confidence=confidence, **options)
            for b in ("cuda", "reference")
        )
        assert_same(got, want, 300, confidence == "neg_entropy")


def test_odd_strides_of_everything(on_cpu: Backend) -> None:
    torch.manual_seed(3)
    wide = torch.randn(3, 10, 2, 103)
    logits, positions = wide[:, ::2, 1, 10:61], torch.arange(10).expand(3, 10)[:, ::2]
    frozen, scores = (torch.rand(10, 3) < 0.3).T, torch.rand(5, 3).T
    tokens = torch.where(torch.rand(3, 20) < 0.6, MASK, 2)[:, :10]
    noise_positions = torch.arange(30).view(10, 3).T[:, ::2]
    for revise in (None, ik.Edit(0.1), ik.Remask(2, scores)):
        options: dict[str, Any] = {"mask_id": MASK, "temperature": 1.0, "frozen": frozen, "revise": revise}
        args = (None, tokens, positions, ik.TopK(2))
        got = unmask("cuda", logits, *args, noise_positions=noise_positions, **options)
        assert_same(got, unmask("reference", logits, *args, noise_positions=noise_positions, **options), 51)


@pytest.mark.parametrize("count", [1, 1023, 1500])
def test_more_candidates_than_fit_shared_memory(on_cpu: Backend, count: int) -> None:
    """Few hold a mask, so that the emulator has little to do; ranks and ties are those of all."""
    draw = torch.Generator().manual_seed(count)
    some = torch.randperm(count, generator=draw)[:70]
    best = torch.rand(1, count, 5, generator=draw).argsort(2) <= torch.randint(0, 5, (1, count, 1), generator=draw)
    logits = torch.where(best, 1.0, -INF)  # 1 to 5 ids equally likely: ties, and sums without rounding
    tokens, positions = torch.zeros(1, count, dtype=torch.int64), torch.randperm(count, generator=draw)[None]
    tokens[0, some] = MASK
    options: dict[str, Any]
    for rule in (ik.TopK(31), ik.EntropyBound(20.0), ik.Factor(2.0)):
        args = (logits, None, tokens, positions, rule)
        assert_same(unmask("cuda", *args, mask_id=MASK), unmask("reference", *args, mask_id=MASK), 5)
        options = {"mask_id": MASK, "order": "left", "defer": (1, 3)}
        assert_same(unmask("cuda", *args, **options), unmask("reference", *args, **options), 5)
    scores = torch.randint(0, 9, (1, count), generator=draw).float()
    options = {"mask_id": MASK, "revise": ik.Remask(count // 2, scores)}
    assert_same(unmask("cuda", *args, **options), unmask("reference", *args, **options), 5)


@pytest.mark.parametrize("batch, count, length, vocabulary", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
def test_empty_dimensions(on_cpu: Backend, batch: int, count: int, length: int, vocabulary: int) -> None:
    tokens, positions = torch.full((batch, length), MASK), torch.zeros(batch, count, dtype=torch.int64)
    for source in ((torch.zeros(batch, count, vocabulary), None), (torch.zeros(batch, count, 0), torch.zeros(5, 0))):
        got, after = unmask("cuda", *source, tokens, positions, ik.TopK(0), mask_id=MASK)
        assert got.proposal.shape == (batch, count) and not got.committed.any() and torch.equal(after, tokens)


# ---- noise, parameters ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PATHS)
def test_noise_is_the_known_answer(on_cpu: Backend, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Seed 3, step 2, position 5: Gumbel 1.20224 for id 10, 0.04600 for id 11, so 11 wins from 1.15624 on."""
    use(on_cpu, path, monkeypatch)
    for lead, winner in ((1.155, 10), (1.1575, 11)):
        bias = ([11], [lead])
        source = (
            (torch.zeros(1, 1, 12), None)
            if path == "spans"
            else (torch.zeros(1, 1, 8).bfloat16(), torch.zeros(12, 8).bfloat16())
        )
        options: dict[str, Any] = {
            "mask_id": MASK,
            "temperature": 1.0,
            "seed": 3,
            "step": 2,
            "forbid": tuple(range(10)),
        }
        args = (torch.full((1, 6), MASK), torch.tensor([[5]]), ik.TopK(1))
        got, _ = unmask("cuda", *source, *args, logit_bias=bias, **options)
        assert got.proposal.item() == winner


def test_numbers_and_tensors_of_any_type_mean_the_same(on_cpu: Backend) -> None:
    logits = torch.randn(2, 5, 200, generator=torch.Generator().manual_seed(2))
    tokens, positions = where((2, 5), 5)
    tokens[:, 0] = 3
    args = (logits, None, tokens, positions)
    numbers = {"temperature": 0.5, "confidence_temperature": 0.7, "seed": 2**40 + 7, "step": 3}
    want = unmask("cuda", *args, ik.Factor(1.3), mask_id=MASK, revise=ik.Remask(1), **numbers)
    for floats in (torch.float64, torch.float16):
        options: dict[str, Any] = {k: torch.tensor(v) for k, v in numbers.items()}
        options["temperature"], options["step"] = (
            torch.tensor([0.5, 0.5], dtype=floats),
            torch.tensor(3, dtype=torch.int32),
        )
        options["seed"] = torch.tensor([2**40 + 7, 2**40 + 8])  # as a number s means s + b
        rule, revise = (
            ik.Factor(torch.tensor(1.3, dtype=torch.float64)),
            ik.Remask(torch.tensor([1, 1], dtype=torch.uint8)),
        )
        got = unmask("cuda", *args, rule, mask_id=MASK, revise=revise, **options)
        assert all(map(torch.equal, got[0], want[0])) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("rule", [ik.Threshold, ik.Factor, ik.EntropyBound])
def test_nan_parameters_commit_the_first_alone(on_cpu: Backend, rule: Any) -> None:
    args = (rows_with_top([0.5, 0.9, 0.7]), None, *where((1, 3), 3), rule(torch.tensor(torch.nan)))
    for t in (torch.nan, -1.0, INF):
        options: dict[str, Any] = {
            "mask_id": MASK,
            "temperature": torch.tensor(t),
            "confidence_temperature": torch.tensor(t),
        }
        got = unmask("cuda", *args, **options)
        assert got[0].committed.sum() == 1
        assert_same(got, unmask("reference", *args, **options), 9)


# ---- the same bits whatever else is in the call ---------------------------------------------------------------------
@pytest.mark.parametrize("path", PATHS)
def test_a_row_does_not_depend_on_the_others(on_cpu: Backend, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    use(on_cpu, path, monkeypatch)
    draw = torch.Generator().manual_seed(4)
    hidden, head = torch.randn(1, 40, 72, generator=draw).bfloat16(), torch.randn(1500, 72, generator=draw).bfloat16()
    source, head = ((hidden.float() @ head.float().T).bfloat16(), None) if path == "spans" else (hidden, head)
    tokens, positions = torch.full((1, 40), MASK), torch.arange(40)[None]
    options: dict[str, Any] = {"mask_id": MASK, "temperature": 1.0, "confidence": "neg_entropy"}
    want, _ = unmask("cuda", source, head, tokens, positions, ik.TopK(0), **options)
    for some in ([7], [21, 3, 39, 7, 0], torch.randperm(40, generator=draw).tolist()):
        got, _ = unmask("cuda", source[:, some], head, tokens, positions[:, some], ik.TopK(0), **options)
        assert torch.equal(got.proposal, want.proposal[:, some])
        assert torch.equal(got.confidence, want.confidence[:, some])
    per_sequence = torch.zeros(4, dtype=torch.int64)
    batched = source.expand(4, -1, -1)[:, [1, 5]]
    got, _ = unmask(
        "cuda",
        batched,
        head,
        tokens.expand(4, 40),
        positions.expand(4, 40)[:, [1, 5]],
        ik.TopK(0),
        seed=per_sequence,
        **options,
    )
    assert torch.equal(got.confidence, want.confidence[:, [1, 5]].expand(4, 2))


@pytest.mark.parametrize("path", ["spans", "head"])
def test_every_schedule_gives_the_same_bits(on_cpu: Backend, path: str) -> None:
    source, head = operands(path, (2, 9), 1100, dim=136)
    args = (source, head, *where((2, 9), 12), ik.EntropyBound(5.0))
    results = []
    for seed in range(8):
        on_cpu.launch.seed = seed
        results.append(unmask("cuda", *args, mask_id=MASK, temperature=0.8, confidence="neg_entropy"))
    for got, after in results[1:]:
        assert all(map(torch.equal, got, results[0][0])) and torch.equal(after, results[0][1])


# ---- what is not launched, and planted faults -----------------------------------------------------------------------
def test_what_the_fused_head_cannot_take_goes_through_products(
    on_cpu: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, head = operands("head", (1, 2), 40)
    args = (*where((1, 2), 2), ik.TopK(1))
    odd = torch.zeros(1, 2, 73).bfloat16()
    odd[..., 1:] = hidden
    for x, w in ((hidden.float(), head.float()), (hidden, head.float()), (odd[..., 1:], head)):
        got = unmask("cuda", x, w, *args, mask_id=MASK)
        assert on_cpu.launch.launches == ["unmask_rows_cuda", "unmask_select_cuda"]
        assert_same(got, unmask("reference", x, w, *args, mask_id=MASK), 40)
        on_cpu.launch.launches.clear()
    monkeypatch.setattr(gpu, "FUSED_ROWS", 1)
    unmask("cuda", hidden, head, *args, mask_id=MASK)
    assert on_cpu.launch.launches == ["unmask_rows_cuda", "unmask_select_cuda"]


@pytest.mark.parametrize("from_logits", [False, True])
def test_the_selftest_passes(on_cpu: Backend, from_logits: bool) -> None:
    """Each case in one dtype from hidden rows and in the other from logits, of fewer rows: as many as a product of 32
    takes, or more than the head takes. On a GPU doctor --selftest runs all."""
    cases = [run for _, run in _selftest.unmask("cuda", "cpu", from_logits)]
    runs = [functools.partial(run, count=43 if "count" in run.keywords else 9) for run in cases]
    half = len(runs) // 2
    for number in range(half):
        runs[number + half * ((number + from_logits) % 2)]()


def test_the_backend_is_not_in_the_default_order_and_insists_on_a_gpu() -> None:
    backends = {b.name: b for b in ik.ops.unmask.BACKENDS}
    assert backends["cuda"].opt_in
    with pytest.raises(RuntimeError, match="cuda: runs on cuda, the tensors are on cpu"):
        unmask("cuda", torch.zeros(1, 1, 5), None, *where((1, 1), 1), ik.TopK(1), mask_id=MASK)


SELECT, ROWS, HEAD, *_ = SOURCES


def unless(kernel: str, statement: str) -> tuple[str, str, str]:
    """The fault that leaves it out."""
    return kernel, statement, f"if (!FAULT) {statement}"


FAULTS: Faults = {
    "operands read before they have come": unless(HEAD, "mbar_wait(&s.full[stage], phase);"),
    "a stage overwritten while it is read": unless(HEAD, "mbar_wait(&s.empty[stage], phase ^ 1);"),
    "a stage freed early": (
        HEAD,
        "if (step > 0) release(s, (turn - 1)",
        "if (FAULT || step > 0) release(s, (turn - !FAULT)",
    ),
    "accumulators read before the last product": unless(HEAD, "wgmma_wait<0>();"),
    "logits read before all are there": unless(HEAD, "mbar_wait(&s.ready[buffer], phase);"),
    "logits handed on too early": (
        HEAD,
        "mbar_init(&s.ready[i], kMultiplying);",
        "mbar_init(&s.ready[i], FAULT ? 128 : kMultiplying);",
    ),
    "logits overwritten while they are read": unless(HEAD, "mbar_wait(&s.met[buffer], phase ^ 1);"),
    "halves of a tile exchanged": (
        HEAD,
        "smem_desc(head + kAtOnce * kDepth)",
        "smem_desc(head + (FAULT ? 64 : kAtOnce) * kDepth)",
    ),
    "rows of another warp": (HEAD, "i / 2 % 2 * 8, row", "(FAULT ? i : i / 2) % 2 * 8, row"),
    "ids beyond the vocabulary": (
        HEAD,
        "id_of(first, j) < c.vocab ? 0.0f : -infinity();",
        "FAULT || id_of(first, j) < c.vocab ? 0.0f : -infinity();",
    ),
    "no rescaling of the sum": (HEAD, "s.sum = fmaf(kept, s.sum,", "s.sum = fmaf(FAULT ? 1.0f : kept, s.sum,"),
    "no rescaling of the entropy": (
        HEAD,
        "fmaf(drop, s.sum, s.sum_ez)",
        "(FAULT ? s.sum_ez : fmaf(drop, s.sum, s.sum_ez))",
    ),
    "the second maximum forgets earlier ids": unless(HEAD, "s.second = fmaxf(s.second, fminf(s.top, top));"),
    "a repeated bias counted once": (ROWS, " bias[j] + value : bias[j]", " (FAULT ? 0.0f : bias[j]) + value : bias[j]"),
    "noise of the neighbour": (ROWS, "odd ? w.w2 : w.w0, odd ? w.w3", "bool(odd) != FAULT ? w.w2 : w.w0, odd ? w.w3"),
    "a bound on the wrong side": (ROWS, "__clz(int(high)) + 1", "__clz(int(high)) + (FAULT ? -1 : 1)"),
    "a first bound on the wrong side": (ROWS, "kLog2e, 32.0f)", "kLog2e, FAULT ? 30.0f : 32.0f)"),
    "the second maximum forgets lanes": (
        ROWS,
        "s.second = fmaxf(s.second, warp_second(top, second));",
        "s.second = fmaxf(s.second, FAULT ? second : warp_second(top, second));",
    ),
    "a span read beyond its end": (ROWS, "at + 4 <= left)", "at + (FAULT ? 1 : 4) <= left)"),
    "vectors where rows are not aligned": (ROWS, "if (aligned && at", "if ((FAULT || aligned) && at"),
    "ties go to later ids": (
        ROWS,
        "b.best_score > a.best_score",
        "(FAULT ? b.best_score >= a.best_score : b.best_score > a.best_score)",
    ),
    "no barrier before the warps' merge": (ROWS, "= s;\n  __syncthreads();", "= s;\n  if (!FAULT) __syncthreads();"),
    "positions do not break ties": (SELECT, "<< 31 | uint64_t(position)", "<< 31 | uint64_t(FAULT ? 0 : position)"),
    "a sort without its last round": (SELECT, "size <= n; size *= 2", "size <= n - FAULT; size *= 2"),
    "no barrier in the sort": (
        SELECT,
        "      }\n      __syncthreads();",
        "      }\n      if (!FAULT) __syncthreads();",
    ),
    "entropies of the thread's own": unless(SELECT, "entropies = sum_before(entropies, scratch);"),
    "ranks from 0": (SELECT, "float(r + 2)", "float(r + 2 - FAULT)"),
    "ids too far below to count are counted": (
        ROWS,
        ">= ILLADA_UNMASK_LEAST_SHIFTED)) return",
        ">= (FAULT ? -87.33f : ILLADA_UNMASK_LEAST_SHIFTED))) return",
    ),
    "deferred ids rank like others": (SELECT, "uint64_t(deferred) << 63 | ", "uint64_t(deferred && !FAULT) << 63 | "),
    "ranks by confidence in every order": unless(SELECT, "if (c.order == ILLADA_FROM_LEFT) score = 0.0f;"),
    "ranks perturbed by other noise": (
        SELECT,
        "row.noise_position, row.step, 2)",
        "row.noise_position, row.step, FAULT ? 0 : 2)",
    ),
    "one rank is always committed, not more": (
        SELECT,
        "if (!pass && r >= least)",
        "if (!pass && (FAULT ? r > 0 : r >= least))",
    ),
    "a sampled confidence above the largest": (
        SELECT,
        "return fminf(float(1.0 / sum), likeness);",
        "return FAULT ? likeness : fminf(float(1.0 / sum), likeness);",
    ),
    "parts that are not weighed": (
        SELECT,
        "sum = fma(double(kept), part, sum);",
        "sum = FAULT ? sum + part : fma(double(kept), part, sum);",
    ),
}


PAIRS = [((4, 20), 700, 2), ((1, 65), 513, 2), ((2, 64), 1500, 4), ((1, 97), 700, 3)]  # rows, vocabulary, blocks


def pairs_agree(backend: Backend, launch: OnCpu, seeds: int) -> None:
    """From 65 rows on two blocks load for each other, also where one has a tile less or there is no second."""
    for rows, vocabulary, backend.processors in PAIRS:
        args = (*operands("head", rows, vocabulary, dim=264), *where(rows, rows[1]), ik.TopK(3))
        want = unmask("reference", *args, mask_id=MASK)
        for launch.seed in range(seeds):
            assert_same(unmask("cuda", *args, mask_id=MASK), want, vocabulary)


def test_pairs_of_blocks_load_for_each_other(on_cpu: Backend) -> None:
    pairs_agree(on_cpu, on_cpu.launch, 2)


PAIR_FAULTS: Faults = {
    "a stage given up in one block alone": (
        HEAD,
        "if (z.blocks == 2) mbar_arrive_cluster",
        "if (!FAULT && z.blocks == 2) mbar_arrive_cluster",
    ),
    "a stage filled once one block gave it up": (
        HEAD,
        "kMultiplying / 128 * blocks",
        "kMultiplying / 128 * (FAULT ? 1 : blocks)",
    ),
    "hidden loaded by both": (
        HEAD,
        "else if (turn % 2 == int(cluster_rank()))",
        "else if (FAULT || turn % 2 == int(cluster_rank()))",
    ),
    "a block that leaves while the other loads": (
        HEAD,
        "if (z.blocks > 1) cluster_sync();  // the other",
        "if (!FAULT && z.blocks > 1) cluster_sync();  // the other",
    ),
    "a tile that one block lacks": (HEAD, "tile - rank < z.tiles", "tile - (FAULT ? 0 : rank) < z.tiles"),
}


def test_pairs_with_no_fault_chosen_agree_too(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = planted(PAIR_FAULTS, HEAD, None, width=128)
    pairs_agree(Backend(monkeypatch, launch), launch, 1)


@pytest.mark.parametrize("name", PAIR_FAULTS)
def test_faults_planted_into_pairs_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = planted(PAIR_FAULTS, HEAD, name, width=128)
    with pytest.raises((KernelFault, AssertionError)):
        pairs_agree(Backend(monkeypatch, launch), launch, 6)


def needs_everything(backend: Backend, launch: OnCpu, path: str) -> None:
    """A few calls which between them need all of a kernel."""
    for seed in range(3):
        launch.seed = seed
        hidden, head = operands("head", (2, 5), 700, dim=520, seed=seed)
        tokens, positions = where((2, 5), 9, 699)
        tokens[0, positions[0, 1]] = 5
        same = hidden.float() @ head.float().T
        logits = torch.cat([same - i / 2 for i in range(7)] + [same], 2)[..., :4901].contiguous()[
            ..., 2:
        ]  # not aligned
        source = (hidden, head) if path == "head" else (logits, None)
        rule: Any
        for confidence, rule in (
            ("margin", ik.TopK(3)),
            ("neg_entropy", ik.EntropyBound(8.0)),
            ("margin", ik.Factor(3.4)),
        ):
            options: dict[str, Any] = {"mask_id": 699, "confidence": confidence, "confidence_temperature": 4.0}
            options["temperature"] = torch.tensor([0.0, 1.0 + seed])
            options["logit_bias"] = (torch.tensor([3, 300, 3]), torch.tensor([2.0, 1.5, 2.25]))
            got = unmask("cuda", *source, tokens, positions, rule, **options)
            want = unmask("reference", *source, tokens, positions, rule, **options)
            assert_same(got, want, logits.shape[2], confidence == "neg_entropy")
        options |= {"confidence": "sampled", "defer": tuple(range(0, 699, 2)), "rank_temperature": 0.5}
        for order in ("confidence", "left"):
            args = (*source, tokens, positions, ik.Threshold(0.9, at_least=2))
            got, want = (unmask(b, *args, order=order, **options) for b in ("cuda", "reference"))
            assert_same(got, want, logits.shape[2])
    if path == "spans":  # certain, though other spans and warps have maxima and sums of their own
        certain = torch.zeros(1, 3, 4901)
        certain[0, 0, 5], certain[0, 1, 600], certain[0, 2, 4500] = 8.731, 10.0, 10.0  # 8.73 would not be certain
        options = {"mask_id": MASK, "confidence": "neg_entropy", "confidence_temperature": 0.1}
        got, _ = unmask("cuda", certain, None, *where((1, 3), 3), ik.EntropyBound(0.0, inclusive=True), **options)
        assert got.confidence.eq(0.0).all() and got.committed.all()
    if path == "head":  # one block, little to multiply: products run ahead of those that meet the logits
        backend.processors = 1
        args = (*operands("head", (1, 16), 1500, dim=8), *where((1, 16), 16, 0), ik.TopK(3))
        want = unmask("reference", *args, mask_id=0, temperature=2.0)
        for launch.seed in range(6):
            assert_same(unmask("cuda", *args, mask_id=0, temperature=2.0), want, 1500)
    flat = (torch.zeros(1, 5, 703), None) if path == "spans" else (torch.zeros(1, 5, 8).bfloat16(), head[:, :8])
    args = (torch.full((1, 9), 699), torch.tensor([[8, 3, 5, 1, 0]]), ik.TopK(2))
    assert_same(unmask("cuda", *flat, *args, mask_id=699), unmask("reference", *flat, *args, mask_id=699), 703)


@pytest.mark.parametrize("path", ["spans", "head"])
def test_the_calls_that_find_faults_pass_without_one(on_cpu: Backend, path: str) -> None:
    needs_everything(on_cpu, on_cpu.launch, path)


@pytest.mark.parametrize("kernel", [SELECT, ROWS, HEAD])
def test_kernels_with_no_fault_chosen_pass_too(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = planted(FAULTS, kernel, None)
    needs_everything(Backend(monkeypatch, launch), launch, "head" if kernel == HEAD else "spans")


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FAULTS[name][0]
    launch = planted(FAULTS, kernel, name)
    backend = Backend(monkeypatch, launch)
    with pytest.raises((KernelFault, AssertionError)):
        needs_everything(backend, launch, "head" if kernel == HEAD else "spans")
