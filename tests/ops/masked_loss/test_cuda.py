"""Each row operation of masked_loss in CUDA, on the CPU, every access checked, against the same in plain torch."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from illada_kernels.ops.masked_loss.cuda import CudaRows
from illada_kernels.ops.masked_loss.row_kernels import Formula, Rows
from tests.cuda_on_cpu.emulated import Emulated
from tests.cuda_on_cpu.library import KernelFault, Kernels, compile_kernels, missing, switchable, with_headers
from tests.helpers.masked_loss_oracle import TorchRows, allowed_ids, bad, live

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

ROWS, COMPACT = "csrc/cuda/masked_loss_rows.cu", "csrc/cuda/masked_loss_compact.cu"
HEADERS = ("masked_loss_vectors.cuh",)
TORCH = TorchRows()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


Planted = dict[str, Kernels]


def kernels(seed: int = 0, room: int = 128, planted: Planted | None = None) -> CudaRows:
    """room: of shared memory for `gradients`; 128 bytes keep nothing of a row. planted: in place of a source's."""
    emulated = Emulated(seed=seed)
    emulated.kernels = [(planted or {}).get(source) or compile_kernels(source) for source in (ROWS, COMPACT)]
    return CudaRows(emulated, lambda device: room)


def masked_and_more(rows: int, vocab: int, ratio: float = 0.5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    masked = torch.rand(rows, generator=g) < ratio
    targets = torch.randint(vocab, (rows,), generator=g)
    return masked, torch.where(masked, targets, -7), 1 / torch.rand(rows, generator=g).clamp_min(1e-3)


def formula(vocab: int, plain: bool) -> Formula:
    if plain:
        return Formula(vocab, None, 0.0, 0.0, 0.0, None)
    forbid = torch.tensor([i for i in (0, 5, vocab - 1) if 0 < i < vocab])
    return Formula(vocab, torch.linspace(-1, 1, vocab), 3.0, 0.1, 0.01, forbid if len(forbid) else None)


def at_offset(x: Tensor, skip: int, gap: int = 0) -> Tensor:
    """The same rows, `gap` elements apart and the first `skip` elements behind a 16-byte boundary; between them NaN."""
    room = torch.full((len(x), x.shape[1] + gap), torch.nan, dtype=x.dtype).flatten()
    room = torch.cat((torch.full((skip,), torch.nan, dtype=x.dtype), room))
    return room[skip:].view(len(x), -1)[:, : x.shape[1]].copy_(x)


# ---- which rows ------------------------------------------------------------------------------------------------------


def same_rows(mine: Rows, theirs: Rows) -> None:
    for name in ("index", "targets", "slot", "info"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name)), name
    # a weight is exact; "mean" divides by a sum in float64 and rounds once
    torch.testing.assert_close(mine.scale, theirs.scale, rtol=2**-24, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows, ratio", [(0, 0.5), (1, 1.0), (13, 0.0), (1000, 0.5), (8192, 1.0), (17000, 0.3)])
def test_compaction_is_exact(rows: int, ratio: float) -> None:
    masked, targets, weight = masked_and_more(rows, 50, ratio)
    count = int(masked.sum())
    for capacity, mean, w in ((rows, False, weight), (count, True, weight), (max(count - 1, 0), True, None)):
        args = (masked, targets, w, 50, mean, capacity)
        same_rows(kernels(seed=rows).compact(*args), TORCH.compact(*args))


def test_compaction_names_the_first_bad_target_and_reads_strided_inputs() -> None:
    masked, targets, weight = masked_and_more(600, 50)
    for place in (400, 17, 533):
        masked[place], targets[place] = True, 50 if place == 17 else -1
    strided = [
        torch.stack((x, x.logical_not() if x.dtype == torch.bool else x + 1), 1)[:, 0].view(20, 30)
        for x in (masked, targets, weight)
    ]
    mine, theirs = kernels().compact(*strided, 50, True, 600), TORCH.compact(masked, targets, weight, 50, True, 600)
    same_rows(mine, theirs)
    assert mine.info.tolist() == [int(masked.sum()), 17]


# ---- moving rows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width, skip", [(64, 0), (64, 3), (9, 1), (1, 0), (1100, 0)])
def test_gather_and_scatter_are_exact(dtype: torch.dtype, width: int, skip: int) -> None:
    masked, targets, weight = masked_and_more(9, 50)
    count, g = int(masked.sum()), torch.Generator().manual_seed(1)
    x = torch.randn(9, width, generator=g).to(dtype)
    x[~masked] = torch.nan
    for capacity, out_dtype, scaled in itertools.product((9, count, count - 1), {dtype, torch.float32}, (False, True)):
        rows = TORCH.compact(masked, targets, weight, 50, False, capacity)
        factors = torch.randn(capacity, generator=g) if scaled else None
        mine = torch.full((capacity, width), 7.0, dtype=out_dtype)
        theirs = mine.clone()
        kernels().gather(at_offset(x, skip, 2 * skip), rows, mine, factors)
        TORCH.gather(x, rows, theirs, factors)
        assert torch.equal(mine, theirs)
        dx = torch.randn(capacity, width, generator=g)
        back, right = (torch.full((9, width), 7.0, dtype=dtype) for _ in range(2))
        kernels().scatter(dx, rows, back, factors)
        TORCH.scatter(dx, rows, right, factors)
        torch.testing.assert_close(back, right, rtol=0, atol=0, equal_nan=True)
        assert back.isnan().all() if capacity < count else (back[~masked] == 0).all()


def test_gather_reads_rows_of_two_strides() -> None:
    masked, targets, weight = (x.view(3, 4) for x in masked_and_more(12, 50, 0.8))
    x = torch.randn(4, 3, 11, dtype=torch.float16).transpose(0, 1)[..., 1:10]  # (3, 4, 9)
    rows = TORCH.compact(masked, targets, weight, 50, False, 10)
    mine, theirs = torch.empty(10, 9, dtype=torch.float16), torch.empty(10, 9, dtype=torch.float16)
    kernels().gather(x, rows, mine)
    TORCH.gather(x, rows, theirs)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("what", [0, 1, 2])
def test_factors_are_exact(what: int) -> None:
    masked, targets, weight = masked_and_more(300, 50)
    weight[masked.nonzero()[:6, 0]] = torch.tensor([0.0, torch.inf, torch.nan, 1e-40, -0.3, 1e-6])
    rows = TORCH.compact(masked, targets, weight, 50, False, 280).chunk(0, 270)
    grads = torch.where(masked, torch.randn(300, generator=torch.Generator().manual_seed(what)), torch.nan)
    for grad in (grads.view(20, 15), torch.tensor(-0.3), None):
        mine, theirs = torch.full((270,), 7.0), torch.full((270,), 7.0)
        kernels().factors(rows, what, grad, mine)
        TORCH.factors(rows, what, grad, theirs)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True)


# ---- rows of logits --------------------------------------------------------------------------------------------------


def exact(x: Tensor, rows: Rows, scale: Tensor, f: Formula) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In float64, of compacted logits: state, losses, gradients, and what the float32 terms of a gradient add up to."""
    z, slope = x.double(), torch.ones(x.shape, dtype=torch.float64)
    if f.bias is not None:
        z = z + f.bias
    if f.softcap:
        t = torch.tanh(z / f.softcap)
        z, slope = f.softcap * t, 1 - t**2
    allowed, e = allowed_ids(f), f.label_smoothing
    total = torch.where(allowed, z, 0).sum(1) if e else torch.zeros(len(z))
    z = torch.where(allowed, z, -torch.inf)
    high, lse, target = z.amax(1), z.logsumexp(1), rows.targets.clamp(0, f.vocab - 1)[:, None]
    at_target = torch.where(bad(rows, f.vocab), -torch.inf, z.gather(1, target)[:, 0])
    state = torch.stack((high, torch.exp(lse - high), at_target, total), 1)
    losses = lse - (1 - e) * at_target - e * total / int(allowed.sum()) + f.z_loss * lse**2
    hit = torch.zeros_like(z).scatter_(1, target, 1 - e)
    p, uniform = torch.exp(z - lse[:, None]) * (1 + 2 * f.z_loss * lse[:, None]), e / int(allowed.sum())
    d = torch.where(allowed, scale.double()[:, None] * (p - uniform - hit) * slope, 0)
    d[bad(rows, f.vocab)] = torch.nan
    drop = torch.where(p == 0, 0, high[:, None] - z)  # exp(-drop) is off by 2 roundings of drop, and 0 if subnormal
    off = p.abs() * (1 + 2 * drop / 64) + torch.finfo(torch.float32).smallest_normal / (64 * 2.0**-24)
    return state, losses, torch.where(live(rows)[:, None], d, 0), scale.abs()[:, None] * (off + uniform + hit)


def check(mine: Tensor, right: Tensor, terms: Tensor | float) -> None:
    """A sum of up to 30011 float32 terms in 256 or 512 lanes of 8, from slices, takes about 50 roundings; the
    exponential is good to 2 ulp, the rest of it is in `terms`. So 64 of the sum of terms."""
    assert torch.equal(mine.isnan(), right.isnan())
    rounding = 0.0 if mine.dtype == torch.float32 else torch.finfo(mine.dtype).eps / 2
    most = right.abs() * rounding + terms * 64 * 2.0**-24 + torch.finfo(mine.dtype).smallest_normal * 2.0**-7
    wrong = (mine.double() - right).abs() > most
    finite = right.isfinite()
    assert not wrong[finite].any() and torch.equal(mine[~finite].double().nan_to_num(), right[~finite].nan_to_num())


def rows_of_logits(vocab: int, dtype: torch.dtype, scale: float = 3.0) -> tuple[Tensor, Rows]:
    """Four rows: live with a bad target, live, live, filler."""
    masked, targets, weight = (
        torch.ones(4, dtype=torch.bool),
        torch.arange(4) * vocab // 4,
        torch.tensor([3.0, 700, 1, 1]),
    )
    targets[0], masked[3] = vocab, False
    g = torch.Generator().manual_seed(vocab)
    return (scale * torch.randn(4, vocab, generator=g)).to(dtype), TORCH.compact(
        masked, targets, weight, vocab, False, 4
    )


def run_and_check(k: CudaRows, x: Tensor, rows: Rows, f: Formula, skip: int = 0, step: int = 0) -> None:
    """All that reads logits: whole rows, and slices of `step` ids; rows `skip` elements behind a boundary."""
    n, vocab = x.shape
    clean = torch.where(live(rows)[:, None], x, 0)
    poisoned = torch.where(live(rows)[:, None], x, torch.nan)
    state, losses, d, terms = exact(clean, rows, rows.scale, f)
    size = 1 + state.abs()
    inplace, mine = at_offset(poisoned, skip, skip), torch.full((n, 4), torch.nan)
    k.gradients(inplace, rows, mine, rows.scale, f)
    on = live(rows)
    check(mine[on], state[on], size[on]), check(inplace, d, terms)
    assert mine[~on].isnan().all()
    slices = torch.full((n, 4), 7.0)
    for first in range(0, vocab, step or vocab):
        k.stats(at_offset(poisoned[:, first : first + (step or vocab)], skip), first, rows, slices, f)
    check(slices[on], state[on], size[on])
    for first in range(0, vocab, step or vocab):
        part = at_offset(poisoned[:, first : first + (step or vocab)], skip)
        out = torch.full(part.shape, 7.0, dtype=x.dtype) if skip else part
        k.dlogits(part, out, first, rows, mine, rows.scale, f)
        check(out, d[:, first : first + part.shape[1]], terms[:, first : first + part.shape[1]])
    size = rows.scale * (20 + (state[:, 0].abs() + state[:, 2].abs()).nan_to_num(0, 0))
    per_row, total = torch.full((len(rows.slot),), 7.0), torch.full((), 7.0)
    k.losses(mine, rows, f, per_row)
    check(per_row, torch.where(on, torch.where(bad(rows, vocab), torch.nan, losses) * rows.scale, 0), size)
    good = on & ~bad(rows, vocab)  # of those alone: a NaN would hide what else is added
    some = replace(rows, targets=rows.targets.clamp(max=vocab - 1), scale=torch.where(good, rows.scale, 0))
    finite = torch.where((good | ~on)[:, None], mine, 1)
    k.losses(finite, some, f, total)
    check(total, torch.where(good, losses * rows.scale, 0).sum(), size.sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plain", [True, False], ids=["plain", "all"])
@pytest.mark.parametrize(
    "vocab, skip, step, room",
    [(4099, 0, 1024, 3000), (2000, 3, 700, 128), (257, 1, 64, 1 << 16), (2, 0, 1, 256), (1, 0, 1, 128)],
)
def test_rows_meet_their_bounds(dtype: torch.dtype, plain: bool, vocab: int, skip: int, step: int, room: int) -> None:
    x, rows = rows_of_logits(vocab, dtype)
    run_and_check(kernels(seed=vocab, room=room), x, rows, formula(vocab, plain), skip, step)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_longer_than_the_loads_in_flight_meet_their_bounds(dtype: torch.dtype) -> None:
    x, rows = rows_of_logits(30011, dtype)
    run_and_check(kernels(seed=1, room=3000), x, rows, formula(30011, True), 0, 15000)


def test_rows_of_large_infinite_and_missing_numbers() -> None:
    x, rows = rows_of_logits(300, torch.float32, 0)
    x += torch.rand(4, 300, generator=torch.Generator().manual_seed(0)) * 2e4 - 1e4
    x[1, 5:40] = -torch.inf
    f, k = formula(300, True), kernels(room=1024)
    run_and_check(k, x, rows, f)
    x[1, 7], x[2, 299] = torch.nan, torch.inf
    state = torch.empty(4, 4)
    k.gradients(x, rows, state, rows.scale, f)
    assert state[1, 1].isnan() and state[2, 1].isnan() and x[1:3].isnan().any(1).all() and (x[3] == 0).all()


def test_overflow_and_nan_scales_fill_rows_with_nan_and_forbidden_ids_too() -> None:
    x, rows = rows_of_logits(70, torch.bfloat16)
    f, scale = formula(70, False), torch.tensor([1.0, torch.nan, 2.0, torch.nan])
    state = torch.empty(4, 4)
    kernels().gradients(x, rows, state, scale, f)
    assert x[:2].isnan().all() and x[2].isfinite().all() and (x[2, f.forbid] == 0).all() and (x[3] == 0).all()
    few = TORCH.compact(torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.int64), None, 70, False, 2)
    assert few.scale.isnan().all()
    for out in (torch.zeros(()), torch.zeros(4)):
        kernels().losses(torch.ones(2, 4), few, f, out)
        assert out.isnan().all()
    out = torch.zeros(4, 70)
    kernels().dlogits(torch.ones(4, 70), out, 0, few, torch.ones(2, 4), few.scale, f, by_slot=True)
    assert out.isnan().all()


# ---- faults ----------------------------------------------------------------------------------------------------------

FAULTS = {
    "an element behind the row": (ROWS, "if (tail < width) load", "if (FAULT ? tail <= width : tail < width) load"),
    "no rescaling of the sum": (ROWS, "s.sum *= exp_of(s.high - high);", "if (!FAULT) s.sum *= exp_of(s.high - high);"),
    "sums of a block not brought to its max": (
        ROWS,
        "s.sum * exp_of(s.high - high)",
        "s.sum * (FAULT ? 1.0f : exp_of(s.high - high))",
    ),
    "slices not brought to one max": (
        ROWS,
        "s[1] * exp_of(before - shift)",
        "s[1] * (FAULT ? 1.0f : exp_of(before - shift))",
    ),
    "forbidden ids counted": (
        ROWS,
        "set_forbidden(o, id, -infinity(), x);",
        "if (!FAULT) set_forbidden(o, id, -infinity(), x);",
    ),
    "forbidden ids differentiated": (
        ROWS,
        "set_forbidden(o, id, 0.0f, x);\n}",
        "if (!FAULT) set_forbidden(o, id, 0.0f, x);\n}",
    ),
    "the target's column of the slice": (ROWS, "differentiate(o, first + at", "differentiate(o, first * !FAULT + at"),
    "vectors where rows are not aligned alike": (ROWS, "out_row)) % 16 == 0)", "out_row)) % (FAULT ? 2 : 16) == 0)"),
    "another thread's part of the kept row": (
        ROWS,
        "widen<T>(kept_vectors[i], x);",
        "widen<T>(kept_vectors[FAULT ? i ^ 1 : i], x);",
    ),
    "room for one vector too few": (
        ROWS,
        "size_t(kScratch + 16 * kept)",
        "size_t(kScratch + 16 * kept - (FAULT ? 16 : 0))",
    ),
    "fillers read": (ROWS, "if (start + r >= live)", "if (FAULT ? start + r > live : start + r >= live)"),
    "a slot of another turn": (ROWS, "i + AHEAD * THREADS", "i + (AHEAD + FAULT) * THREADS"),
    "the rest of a kept row forgotten": (ROWS, "(row, vocab, kept, ", "(row, vocab, FAULT ? vocab : kept, "),
    "a plain kernel for a head with a bias": (ROWS, "!o.bias && ", "(FAULT || !o.bias) && "),
    "32-bit offsets": (
        ROWS,
        "T* row = logits + r * stride;",
        "T* row = logits + (FAULT ? (int(r) << 30) * 8 : r * stride);",
    ),
    "losses of fillers": (
        COMPACT,
        "info[0] < held ? info[0] : held",
        "FAULT ? held : info[0] < held ? info[0] : held",
    ),
    "a race in the scan": (
        COMPACT,
        "  __syncthreads();\n  *all = total;",
        "  if (!FAULT) __syncthreads();\n  *all = total;",
    ),
    "a tile of the compaction forgotten": (COMPACT, "count += all;", "count = FAULT ? all : count + all;"),
    "factors rounded first": (
        COMPACT,
        "value * factor : 0.0f",
        "value * (FAULT ? to_float(from_float<Out>(factor)) : factor) : 0.0f",
    ),
    "one upstream gradient for all rows": (
        COMPACT,
        "grad[grad_per_row ? index[i] : 0]",
        "grad[grad_per_row && !FAULT ? index[i] : 0]",
    ),
}
# Kernels of one dtype compile in half the time.
OTHER_DTYPES = ("    case ILLADA_F32: return with_type(float{});\n", "    case ILLADA_F16: return with_type(fp16{});\n")


@functools.cache
def with_faults(source: str) -> Kernels:
    text = switchable(with_headers(source, HEADERS), [fault for file, *fault in FAULTS.values() if file == source])
    for case in OTHER_DTYPES if source == ROWS else ():
        assert case in text
        text = text.replace(case, "")
    return compile_kernels(source, text=text)


def plant(source: str, number: int) -> Planted:
    """The kernels of `source` with that fault, 0 for none."""
    with_faults(source).plant(number)
    return {source: with_faults(source)}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name: str) -> None:
    source = FAULTS[name][0]
    together = [other for other, (file, *_) in FAULTS.items() if file == source]
    with pytest.raises((KernelFault, AssertionError)):
        (rows_agree if source == ROWS else moves_agree)(plant(source, together.index(name) + 1))


TERMS = {
    "bias": {"bias": torch.linspace(-1, 1, 2000)},
    "cap": {"softcap": 3.0},
    "smoothing": {"label_smoothing": 0.1},
    "forbidden": {"forbid": torch.tensor([0, 5, 1999])},
    "z loss": {"z_loss": 0.01},
}


@pytest.mark.parametrize("term", TERMS)
def test_every_term_alone_is_in_the_formula(term: str) -> None:
    """A kernel without terms runs where there are none of the first four."""
    x, rows = rows_of_logits(2000, torch.bfloat16)
    run_and_check(kernels(), x, rows, formula(2000, True)._replace(**TERMS[term]), 0, 700)


def rows_agree(planted: Planted) -> None:
    x, rows = rows_of_logits(2000, torch.bfloat16)
    run_and_check(kernels(room=600, planted=planted), x, rows, formula(2000, False), 3, 700)
    run_and_check(kernels(room=600, planted=planted), x, rows, formula(2000, True))
    run_and_check(kernels(room=600, planted=planted), x, rows, formula(2000, True)._replace(**TERMS["bias"]))
    x, rows = rows_of_logits(30011, torch.bfloat16)  # more than the loads in flight
    run_and_check(kernels(room=600, planted=planted), x, rows, formula(30011, True), 0, 15000)


def moves_agree(planted: Planted) -> None:
    masked, targets, weight = masked_and_more(8200, 50)
    args = (masked, targets, weight, 50, True, 8200)
    for seed in range(3):
        same_rows(kernels(seed=seed, planted=planted).compact(*args), TORCH.compact(*args))
    x, rows = rows_of_logits(60, torch.bfloat16)
    run_and_check(kernels(planted=planted), x, rows, formula(60, True))
    rows = TORCH.compact(*(a[:20] for a in (masked, targets, weight)), 50, False, 20)
    results = []
    for k in (kernels(planted=planted), TORCH):
        g = torch.Generator().manual_seed(0)
        moved, back, out = torch.empty(20, 16, dtype=torch.float16), torch.empty(20, 16), torch.empty(20)
        k.gather(torch.randn(20, 16, generator=g).half(), rows, moved, torch.randn(20, generator=g))
        k.scatter(torch.randn(20, 16, generator=g), rows, back)
        k.factors(rows, 0, torch.arange(20.0) + 1, out)
        results.append((moved, back, out))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*results))


def test_kernels_without_a_fault_pass_what_finds_them() -> None:
    rows_agree({})
    moves_agree({})
    rows_agree(plant(ROWS, 0))
    moves_agree(plant(COMPACT, 0))
