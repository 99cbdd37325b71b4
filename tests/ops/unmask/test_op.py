"""unmask as an operator: fused with the head, torch.compile, opcheck, other instruction sets, bad arguments."""

from __future__ import annotations

import functools
import itertools
import typing

import pytest
import torch
from torch.library import opcheck

import illada_kernels as ik
from benchmarks.measure import peak_memory
from illada_kernels import _extension, rules
from illada_kernels.ops.unmask import cases
from illada_kernels.ops.unmask.op import OPERATOR
from illada_kernels.ops.unmask.problem import Problem
from tests.helpers.instruction_sets import run_under_each
from tests.helpers.unmask_oracle import MASK, available, step

needs_cpu = pytest.mark.skipif(
    "cpu" not in available(), reason=f"the cpu backend is missing: {_extension.extension_reason()}"
)
BACKENDS = [pytest.param("cpu", marks=needs_cpu), "reference"]


def inputs(shape: cases.Shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # multiples of 1/8 below 2: products and sums are exact in float32, so every way of multiplying gives the same bits
    hidden = torch.randint(-8, 9, (shape.batch, shape.count, shape.dim), generator=generator).to(dtype) / 8
    weight = torch.randint(-8, 9, (shape.vocab, shape.dim), generator=generator).to(dtype) / 8
    tokens = torch.full((shape.batch, shape.count + 2), shape.mask_id)
    positions = torch.randperm(shape.count + 2, generator=generator)[: shape.count].repeat(shape.batch, 1)
    return hidden, weight, tokens, positions


# ---- fused with the head --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", cases.SMALL, ids=lambda shape: shape.name)
def test_from_hidden_is_from_logits_of_the_product(shape, dtype, backend):
    hidden, weight, tokens, positions = inputs(shape, dtype)
    bias = (torch.arange(shape.vocab) % 5 / 4).to(dtype)
    tokens[0, positions[0, 0]] = shape.mask_id + 1  # takes no part: its row may be anything
    hidden[0, 0] = float("nan")
    logits = hidden.float() @ weight.float().T + bias.float()
    options = {"mask_id": shape.mask_id, "temperature": 0.7, "seed": 11, "confidence": "margin"}
    after = tokens.clone()
    got = ik.unmask(hidden, weight, after, positions, ik.TopK(2), head_bias=bias, backend=backend, **options)
    want, want_after = step(logits, tokens, positions, ik.TopK(2), backend, **options)
    assert all(map(torch.equal, got, want)) and torch.equal(after, want_after)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", cases.TRUNCATIONS.values(), ids=cases.TRUNCATIONS)
@pytest.mark.parametrize("shape", cases.SMALL, ids=lambda shape: shape.name)
def test_truncated_from_hidden_is_from_logits_of_the_product(shape, options, backend):
    for dtype, rule in ((torch.float32, ik.TopK(2)), (torch.bfloat16, ik.Renoise(0.5))):
        hidden, weight, tokens, positions = inputs(shape, dtype)
        bias = (torch.arange(shape.vocab) % 5 / 4).to(dtype)
        hidden[0, 0] = float("nan")
        logits = hidden.float() @ weight.float().T + bias.float()
        how = {"mask_id": shape.mask_id, "temperature": 0.7, "seed": 11, "confidence": "neg_entropy", **options}
        after = tokens.clone()
        got = ik.unmask(hidden, weight, after, positions, rule, head_bias=bias, backend=backend, **how)
        want, want_after = step(logits, tokens, positions, rule, backend, **how)
        assert all(map(torch.equal, got, want)) and torch.equal(after, want_after)


@needs_cpu
def test_more_rows_than_one_product_takes(monkeypatch):
    from illada_kernels.ops.unmask import cpu

    shape = cases.Shape("", 2, 9, 9000, 4, 3)
    hidden, weight, tokens, positions = inputs(shape)
    run = functools.partial(ik.unmask, hidden, weight, mask_id=3, temperature=1.0, backend="cpu")
    whole_tokens = tokens.clone()
    whole = run(tokens=whole_tokens, positions=positions, rule=ik.TopK(3))
    cut_tokens = tokens.clone()
    cut = run(tokens=cut_tokens, positions=positions, rule=ik.TopK(3), top_p=0.8)
    monkeypatch.setattr(cpu, "ROWS_AT_ONCE", 4)
    monkeypatch.setattr(cpu, "IDS_AT_ONCE", 2048)  # one segment of the vocabulary at a time; truncated, one row
    sliced_tokens = tokens.clone()
    sliced = run(tokens=sliced_tokens, positions=positions, rule=ik.TopK(3))
    assert all(map(torch.equal, whole, sliced)) and torch.equal(sliced_tokens, whole_tokens)
    sliced = run(tokens=tokens, positions=positions, rule=ik.TopK(3), top_p=0.8)
    assert all(map(torch.equal, cut, sliced)) and torch.equal(tokens, cut_tokens)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "temperature": 1.0}], ids=["plain", "truncated"])
def test_fused_step_needs_at_most_64_mib_beside_its_inputs(dtype, options):
    shape = cases.LLADA
    hidden = torch.randn(shape.batch, shape.count, 1024).to(dtype)
    weight = torch.zeros(1, 1, dtype=dtype).expand(shape.vocab, 1).contiguous()
    hidden = hidden[..., :1].contiguous()  # D = 1: the same buffers but for the converted slice, in no time
    tokens, positions = torch.full((8, 32), shape.mask_id), torch.arange(32).expand(8, 32)
    options = {"mask_id": shape.mask_id, **options}
    peak = peak_memory(lambda: ik.unmask(hidden, weight, tokens, positions, ik.TopK(1), **options), "cpu")
    assert 1 << 20 < peak <= 64 << 20


@needs_cpu
def test_slices_of_the_logits_are_whole_segments_within_32_mib():
    from illada_kernels.ops.unmask import cpu

    assert cpu.IDS_AT_ONCE % _extension.native().unmask_segment == 0
    assert 4 * cpu.ROWS_AT_ONCE * cpu.IDS_AT_ONCE <= 32 << 20


@needs_cpu
def test_a_row_has_the_same_bits_whatever_rows_and_threads_are_beside_it(python):
    """Confidences are functions of all logits of a row: equal bits there mean equal logits."""
    code = """
import torch, illada_kernels as ik
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for dim, vocab in ((3, 40), (100, 33), (600, 70), (2100, 9), (5, 2100)):
        row = torch.randn(dim).to(dtype)
        head, bias = torch.randn(vocab, dim).to(dtype), torch.randn(vocab).to(dtype)
        seen = set()
        for count in (1, 2, 3, 5, 8, 9, 30, 515):
            hidden = torch.randn(count, dim).to(dtype)
            places = sorted({0, count // 2, count - 1})
            hidden[places] = row
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                tokens, at = torch.full((1, count), vocab), torch.arange(count)[None]
                options = dict(mask_id=vocab, head_bias=bias, confidence="neg_entropy", confidence_temperature=9.0)
                out = ik.unmask(hidden[None], head, tokens, at, ik.TopK(0), backend="cpu", **options)
                seen |= {(out.proposal[0, i].item(), out.confidence[0, i].item()) for i in places}
        assert len(seen) == 1, (dtype, dim, vocab, seen)
"""
    run_under_each(python, code)


@needs_cpu
@pytest.mark.parametrize(("dim", "vocab"), [(0, 5), (1, 1), (17, 31), (255, 300), (257, 64), (1030, 4100)])
def test_the_cpu_s_product_with_the_head_is_as_exact_as_its_sum_allows(dim, vocab):
    """Each of the D multiply-adds rounds once, so the error is at most D ulp of the sum of magnitudes."""
    torch.manual_seed(0)
    module = _extension.native()
    for dtype, code in _extension.DTYPES.items():
        head = torch.randn(2 * vocab, dim).to(dtype)[::2]
        doubled = head.T.double()
        for rows_dtype, count in itertools.product({torch.float32, dtype}, (1, 3, 13)):
            rows, bias = torch.randn(count, dim).to(rows_dtype), torch.randn(vocab)
            out = torch.full((count, vocab), float("nan"))
            hidden = (rows.data_ptr(), _extension.DTYPES[rows_dtype], count, dim)
            where = (*hidden, head.data_ptr(), bias.data_ptr(), code, head.stride(0))
            assert module.head_cpu(*where, 0, vocab, out.data_ptr(), vocab, 2) == 0
            exact = rows.double() @ doubled + bias.double()
            allowed = (rows.double().abs() @ doubled.abs() + bias.double().abs()) * (dim + 1) * 2.0**-24
            assert ((out - exact).abs() <= allowed).all(), (dtype, rows_dtype, count)


def test_autocast_casts_hidden_and_head():
    hidden, weight, tokens, positions = (t.float() if t.is_floating_point() else t for t in inputs(cases.SMALL[1]))
    weight = weight + 2.0**-12  # lost in bfloat16
    rounded, _ = step((hidden.bfloat16().float() @ weight.bfloat16().float().T), tokens, positions)
    with torch.autocast("cpu", torch.bfloat16):
        got = ik.unmask(hidden, weight, tokens.clone(), positions, ik.TopK(9), mask_id=MASK)
    torch.testing.assert_close(got.confidence, rounded.confidence, rtol=1e-6, atol=0.0)
    exact = ik.unmask(hidden, weight, tokens.clone(), positions, ik.TopK(9), mask_id=MASK)
    assert not torch.equal(got.confidence, exact.confidence)


# ---- the operator ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    hidden, weight, tokens, positions = inputs(cases.SMALL[1])
    frozen = torch.zeros_like(tokens, dtype=torch.bool)
    numbers = {"least": 2, "temperature_tensor": torch.tensor(0.5), "seed": 3, "tau": 0.5}
    numbers |= {"truncate": 7, "top_k": 9, "top_p_tensor": torch.tensor(0.9), "min_p": 0.01}
    kinds = {"confidence": rules.MARGIN, "rule": rules.TOP_K, "revise": rules.EDIT}
    given = {"source": hidden, "head_weight": weight, "tokens": tokens, "positions": positions, "frozen": frozen}
    rest = {"mask_id": MASK, "forbid": (MASK,), "defer": (3,), "confidence_temperature": 1.0, "backend": backend}
    values = {**given, **numbers, **kinds, **rest}
    absent = {int: 0, float: 0.0, str: ""}
    kinds_of = typing.get_type_hints(Problem)
    opcheck(OPERATOR.op, [values.get(name, absent.get(kinds_of[name])) for name in Problem._fields])


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_and_new_temperatures_do_not_recompile(backend):
    torch._dynamo.reset()
    hidden, weight, tokens, positions = inputs(cases.SMALL[1])

    def decode(tokens, temperature, k, tau):
        first = ik.unmask(
            hidden,
            weight,
            tokens,
            positions,
            ik.TopK(k),
            mask_id=MASK,
            temperature=temperature,
            seed=k,
            backend=backend,
        )
        options = {"revise": ik.Edit(tau), "confidence": "neg_entropy", "step": k, "backend": backend}
        second = ik.unmask(hidden, weight, tokens, positions, ik.EntropyBound(tau), mask_id=MASK, **options)
        return first.confidence, second.remaining

    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=False):
        for trial in range(3):
            numbers = (torch.tensor(0.3 * trial), torch.tensor(trial), torch.tensor(0.1 * trial))
            want_tokens, got_tokens = tokens.clone(), tokens.clone()
            want = decode(want_tokens, *numbers)
            with torch._dynamo.config.patch(error_on_recompile=trial > 0):
                got = compiled(got_tokens, *numbers)
            assert all(map(torch.equal, got, want)) and torch.equal(got_tokens, want_tokens)


def test_gradients_do_not_flow():
    hidden, weight, tokens, positions = inputs(cases.SMALL[1])
    got = ik.unmask(hidden.requires_grad_(), weight, tokens, positions, ik.TopK(1), mask_id=MASK)
    assert not got.confidence.requires_grad


def test_numbers_and_device_tensors_mean_the_same():
    logits = torch.randn(2, 5, 200)
    numbers = {"temperature": 0.5, "confidence_temperature": 0.5, "seed": 7, "step": 3}
    for options in (numbers, {name: torch.tensor(value) for name, value in numbers.items()}):
        got, after = step(logits, [[MASK] * 5] * 2, None, ik.TopK(2), **options)
        if options is numbers:
            want, want_after = got, after
        assert all(map(torch.equal, got, want)) and torch.equal(after, want_after)


SCRIPT = """
import torch, illada_kernels as ik
torch.manual_seed(0)
cuts = ({}, {"top_k": 70}, {"top_p": 0.8}, {"min_p": 0.05})
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    logits = (torch.randn(2, 6, 5001) * 2).to(dtype)
    for confidence, cut in zip(("probability", "margin", "neg_entropy", "random"), cuts):
        results = []
        for backend in ("cpu", "reference"):
            tokens = torch.full((2, 6), 36)
            positions = torch.arange(6).expand(2, 6)
            options = {"temperature": 0.8, "confidence": confidence, "backend": backend, **cut}
            got = ik.unmask_from_logits(logits, tokens, positions, ik.TopK(3), mask_id=36, **options)
            results.append((got, tokens))
        (got, got_tokens), (want, want_tokens) = results
        assert torch.equal(got.proposal, want.proposal) and torch.equal(got_tokens, want_tokens), confidence
        torch.testing.assert_close(got.confidence, want.confidence, rtol=6e-6, atol=1e-6)
"""


@needs_cpu
def test_every_instruction_set_gives_the_same_tokens(python):
    run_under_each(python, SCRIPT, OMP_NUM_THREADS="1")


# ---- what bad arguments raise ---------------------------------------------------------------------------------------
def call(**changes):
    hidden, weight, tokens, positions = inputs(cases.SMALL[1])  # B 3, K 5, V 37, D 7, L 7
    arguments = {"hidden": hidden, "head_weight": weight, "tokens": tokens, "positions": positions, "rule": ik.TopK(1)}
    return ik.unmask(**{**arguments, "mask_id": MASK, **{k: v() if callable(v) else v for k, v in changes.items()}})


WRONG = [
    ("hidden", TypeError, {"hidden": torch.zeros(3, 5, 7, dtype=torch.int32)}),
    ("hidden", ValueError, {"hidden": torch.zeros(5, 7)}),
    ("hidden", ValueError, {"hidden": torch.zeros(3, 7, 5).mT}),
    ("head_weight", ValueError, {"head_weight": torch.zeros(37, 8)}),
    ("head_weight", TypeError, {"head_weight": torch.zeros(37, 7, dtype=torch.float16)}),
    ("head_weight", ValueError, {"head_weight": torch.zeros(7, 37).T}),
    ("head_weight", ValueError, {"head_weight": torch.zeros(37, 7, device="meta")}),
    ("head_bias", ValueError, {"head_bias": torch.zeros(36)}),
    ("tokens", TypeError, {"tokens": torch.zeros(3, 7, dtype=torch.int32)}),
    ("tokens", ValueError, {"tokens": torch.zeros(2, 7, dtype=torch.int64)}),
    ("tokens", ValueError, {"tokens": torch.zeros(7, 3, dtype=torch.int64).T}),
    ("tokens", ValueError, {"tokens": torch.zeros(1, 7, dtype=torch.int64).expand(3, 7)}),
    ("positions", TypeError, {"positions": torch.zeros(3, 5)}),
    ("positions", ValueError, {"positions": torch.zeros(3, 4, dtype=torch.int64)}),
    ("frozen", TypeError, {"frozen": torch.zeros(3, 7)}),
    ("frozen", ValueError, {"frozen": torch.zeros(3, 5, dtype=torch.bool)}),
    ("noise_positions", ValueError, {"noise_positions": torch.zeros(3, 4, dtype=torch.int64)}),
    ("confidence", ValueError, {"confidence": "probabilities"}),
    ("temperature", ValueError, {"temperature": -0.1}),
    ("temperature", ValueError, {"temperature": float("nan")}),
    ("temperature", TypeError, {"temperature": torch.tensor(1)}),
    ("temperature", ValueError, {"temperature": torch.zeros(2)}),
    ("confidence_temperature", ValueError, {"confidence_temperature": float("inf")}),
    ("seed", ValueError, {"seed": 2**63}),
    ("seed", TypeError, {"seed": 1.5}),
    ("seed", ValueError, {"seed": torch.zeros(4, dtype=torch.int64)}),
    ("step", ValueError, {"step": -1}),
    ("mask_id", TypeError, {"mask_id": None}),
    ("forbid", ValueError, {"forbid": (37,)}),
    ("forbid", TypeError, {"forbid": torch.tensor([1])}),
    ("logit_bias", ValueError, {"logit_bias": ([37], [1.0])}),
    ("logit_bias", ValueError, {"logit_bias": (torch.arange(2), torch.zeros(3))}),
    ("logit_bias", TypeError, {"logit_bias": (torch.zeros(2), torch.zeros(2))}),
    ("logit_bias", TypeError, {"logit_bias": 3}),
    ("rule", TypeError, {"rule": 5}),
    ("revise", TypeError, {"revise": 0.9}),
    ("TopK.k", ValueError, {"rule": lambda: ik.TopK(-1)}),
    ("TopK.k", TypeError, {"rule": lambda: ik.TopK(2.0)}),
    ("TopK.k", TypeError, {"rule": lambda: ik.TopK(True)}),
    ("TopK", ValueError, {"rule": ik.TopK(torch.zeros(2, dtype=torch.int64))}),
    ("Threshold.tau", ValueError, {"rule": ik.Threshold(1.01)}),
    ("Threshold.tau", ValueError, {"rule": ik.Threshold(-0.5), "confidence": "margin"}),
    ("Threshold.tau", ValueError, {"rule": ik.Threshold(0.5), "confidence": "neg_entropy"}),
    ("Threshold.tau", ValueError, {"rule": lambda: ik.Threshold(float("nan"))}),
    ("Threshold.at_least", ValueError, {"rule": lambda: ik.Threshold(0.5, -1)}),
    ("Threshold.at_least", TypeError, {"rule": lambda: ik.Threshold(0.5, 1.5)}),
    ("Threshold.at_least", ValueError, {"rule": ik.Threshold(0.5, torch.zeros(2, dtype=torch.int64))}),
    ("order", ValueError, {"order": "right"}),
    ("rank_temperature", ValueError, {"rank_temperature": -0.1}),
    ("rank_temperature", ValueError, {"rank_temperature": 1e39}),
    ("rank_temperature", ValueError, {"rank_temperature": torch.zeros(2)}),
    ("defer", ValueError, {"defer": (37,)}),
    ("defer", TypeError, {"defer": torch.tensor([1])}),
    ("temperature", ValueError, {"temperature": 1e39}),
    ("Factor.f", ValueError, {"rule": lambda: ik.Factor(-1.0)}),
    ("EntropyBound.gamma", ValueError, {"rule": lambda: ik.EntropyBound(-1.0)}),
    ("Edit.tau", ValueError, {"revise": lambda: ik.Edit(1.5)}),
    ("Remask.n", ValueError, {"revise": lambda: ik.Remask(-1)}),
    ("Remask.scores", ValueError, {"revise": ik.Remask(1, torch.zeros(3, 4))}),
    ("Remask.scores", TypeError, {"revise": ik.Remask(1, torch.zeros(3, 5, dtype=torch.float64))}),
    ("top_k", ValueError, {"top_k": 0}),
    ("top_k", TypeError, {"top_k": 2.0}),
    ("top_k", TypeError, {"top_k": True}),
    ("top_k", TypeError, {"top_k": torch.tensor(2.0)}),
    ("top_k", ValueError, {"top_k": torch.ones(2, dtype=torch.int64)}),
    ("top_p", ValueError, {"top_p": 1.01}),
    ("top_p", ValueError, {"top_p": -0.1}),
    ("top_p", ValueError, {"top_p": float("nan")}),
    ("top_p", TypeError, {"top_p": "0.9"}),
    ("top_p", TypeError, {"top_p": torch.tensor(1)}),
    ("top_p", ValueError, {"top_p": torch.zeros(2)}),
    ("min_p", ValueError, {"min_p": 1.01}),
    ("min_p", ValueError, {"min_p": -0.1}),
    ("min_p", TypeError, {"min_p": torch.tensor(1)}),
    ("min_p", ValueError, {"min_p": torch.zeros(3, 1)}),
    ("Renoise.gamma", ValueError, {"rule": lambda: ik.Renoise(-1.0)}),
    ("Renoise.gamma", TypeError, {"rule": lambda: ik.Renoise("0.1")}),
    ("revise", ValueError, {"rule": ik.Renoise(0.1), "revise": ik.Edit(0.5)}),
    ("revise", ValueError, {"rule": ik.Renoise(0.1), "revise": ik.Remask(1)}),
    ("backend", ValueError, {"backend": "fastest"}),
]


@pytest.mark.parametrize("name, error, changes", WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_arguments_raise_and_name_themselves(name, error, changes):
    with pytest.raises(error, match=f"^{name}.*: expected .*got "):
        call(**changes)


def test_float64_needs_the_reference():
    with pytest.raises(RuntimeError, match="float64 is for the reference"):
        call(hidden=torch.zeros(3, 5, 7).double(), head_weight=torch.zeros(37, 7).double(), backend="cpu")
    assert call(hidden=torch.zeros(3, 5, 7).double(), head_weight=torch.zeros(37, 7).double()).committed.any()
