"""The Triton row kernels of masked_loss in the interpreter: against the row operations in plain torch, and the formula
in float64."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="no triton")
tl = pytest.importorskip("triton.language")

from illada_kernels import masked_loss  # noqa: E402
from illada_kernels.ops.masked_loss import op, reference  # noqa: E402
from illada_kernels.ops.masked_loss import triton as backend  # noqa: E402
from illada_kernels.ops.masked_loss.problem import Problem  # noqa: E402
from illada_kernels.ops.masked_loss.row_kernels import Formula, Rows  # noqa: E402
from illada_kernels.ops.masked_loss.triton import compact  # noqa: E402
from illada_kernels.ops.masked_loss.triton import row_kernels as room  # noqa: E402
from illada_kernels.ops.masked_loss.triton import rows as rows_file  # noqa: E402
from illada_kernels.ops.masked_loss.triton.row_kernels import TritonRows  # noqa: E402
from illada_kernels.testing import assert_close, masked_loss_rounding  # noqa: E402
from tests.helpers import masked_loss_calls as calls  # noqa: E402
from tests.helpers import masked_loss_gpu as through_the_op  # noqa: E402
from tests.helpers import masked_loss_reference as specification  # noqa: E402
from tests.helpers.masked_loss_gpu import from_logits  # noqa: E402
from tests.helpers.masked_loss_oracle import TorchRows  # noqa: E402
from tests.helpers.masked_loss_reference import Options  # noqa: E402
from tests.helpers.triton_interpreter import KernelFault, interpreted  # noqa: E402

HALVES = (torch.float32, torch.float16, torch.bfloat16)
PLAIN = Options("sum", None, 0.0, 0.0, (), None)
ALL = Options("sum", 3.0, 0.1, 0.01, (1, 4, 5, 30), None)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small tiles, so that small shapes have several."""
    small = {"compact": 16, "copy": 32, "factors": 16}
    monkeypatch.setattr(room, "TILES", {name: (small.get(name, 128), warps) for name, (_, warps) in room.TILES.items()})
    with interpreted(op):
        yield


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_rows(count: int, vocab: int, seed: int = 0, share: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """masked, targets and weight."""
    g = random(seed)
    masked = torch.rand(count, generator=g) < share
    targets = torch.where(masked, torch.randint(vocab, (count,), generator=g), -5)
    return masked, targets, 1 / torch.rand(count, generator=g).clamp_min(1e-3)


# ---- compaction and copies: exact ------------------------------------------------------------------------------------


def same_rows(ours: Rows, theirs: Rows) -> None:
    for name in ("index", "targets", "slot", "info"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    # the sum of weights is float64 here; torch's quotient rounds it to float32 before dividing
    torch.testing.assert_close(ours.scale, theirs.scale, rtol=2**-22, atol=0, equal_nan=True)


@pytest.mark.parametrize("count, capacity", [(0, 0), (1, 1), (5, 0), (37, 37), (37, 3), (290, 200)])
def test_compaction_is_in_order_whatever_the_number_of_tiles(count: int, capacity: int) -> None:
    for mean, weighted, share in ((True, True, 0.6), (False, True, 1.0), (True, False, 0.0), (False, False, 0.6)):
        masked, targets, weight = some_rows(count, 50, share=share)
        weight[~masked] = torch.nan
        weight = weight if weighted else None
        theirs = TorchRows().compact(masked, targets, weight, 50, mean, capacity)
        same_rows(TritonRows().compact(masked, targets, weight, 50, mean, capacity), theirs)


def test_the_first_bad_target_at_a_masked_row_is_found() -> None:
    masked, targets, weight = some_rows(90, 50)
    for bad in (-1, 50, 2**40):
        wrong = targets.clone()
        wrong[masked.nonzero()[[-1, 20], 0]] = bad
        rows = TritonRows().compact(masked, wrong, weight, 50, False, 90)
        assert rows.info.tolist() == [int(masked.sum()), int(masked.nonzero()[20])]


def test_strided_and_many_dimensional_inputs_are_compacted() -> None:
    masked, targets, weight = (x.view(8, 10).t() for x in some_rows(80, 50))
    theirs = TorchRows().compact(masked, targets, weight, 50, True, 80)
    same_rows(TritonRows().compact(masked, targets, weight, 50, True, 80), theirs)


def agree(method: str, *arguments: Any) -> Tensor:
    """The last argument of a row operation is what it writes."""
    ours, theirs = arguments[-1].clone(), arguments[-1].clone()
    getattr(TritonRows(), method)(*arguments[:-1], ours)
    getattr(TorchRows(), method)(*arguments[:-1], theirs)
    assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    return ours


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_gather_takes_live_rows_only_at_any_strides(dtype: torch.dtype) -> None:
    masked, targets, weight = some_rows(24, 50, seed=1)
    rows = TorchRows().compact(masked, targets, weight, 50, False, 24)
    poisoned = torch.where(masked[:, None], torch.randn(24, 37, generator=random(2)), torch.nan).to(dtype)
    apart = torch.full((2, 4, 3, 40), torch.nan, dtype=dtype)[..., :37].transpose(0, 1)  # which no two strides reach
    swapped = torch.empty(6, 4, 37, dtype=dtype).transpose(0, 1)
    factors = torch.randn(24, generator=random(3))
    for x, f, to, part in (
        (poisoned, None, dtype, rows),
        (poisoned.view(4, 6, 37), factors, torch.float32, rows),
        (apart.copy_(poisoned.view(4, 2, 3, 37)), None, dtype, rows.chunk(10, 24)),
        (swapped.copy_(poisoned.view(4, 6, 37)), factors[10:], dtype, rows.chunk(10, 24)),
    ):
        ours, theirs = (torch.full((len(part.index), 37), -7.0, dtype=to) for _ in range(2))
        TritonRows().gather(x, part, ours, f)
        TorchRows().gather(x, part, theirs, f)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("capacity", [24, 14, 3])
def test_scatter_writes_every_row(dtype: torch.dtype, capacity: int) -> None:
    masked, targets, weight = some_rows(24, 50, seed=1)
    rows = TorchRows().compact(masked, targets, weight, 50, False, capacity)
    dx, factors = torch.randn(capacity, 37, generator=random(2)), torch.randn(capacity, generator=random(3))
    for f in (None, factors):
        ours, theirs = (torch.full((24, 37), -7.0, dtype=dtype) for _ in range(2))
        TritonRows().scatter(dx, rows, ours, f)
        TorchRows().scatter(dx, rows, theirs, f)
        assert torch.equal(ours.nan_to_num(-9), theirs.nan_to_num(-9))
    held = int(masked.sum())
    ours = torch.full((24, 37), -7.0)
    TritonRows().scatter(dx[:held], rows, ours)
    assert torch.equal(ours.isnan(), torch.full_like(ours, capacity < held, dtype=torch.bool))


def test_factors_are_exact_powers_and_scales() -> None:
    masked, targets, _ = some_rows(40, 50, seed=1)
    weight = torch.exp2(torch.linspace(-30, 10, 40)) * torch.tensor([1.0, -1.37]).repeat(20)
    weight[masked.nonzero()[:3, 0]] = torch.tensor([0.0, torch.inf, torch.nan])
    rows = TorchRows().compact(masked, targets, weight, 50, False, 40)
    upstream = torch.where(masked, torch.randn(40, generator=random(3)), torch.nan)
    grads = (None, torch.tensor(-1.7), upstream)
    for what, g, part in itertools.product((0, 1, 2), grads, (rows, rows.chunk(5, 40))):
        agree("factors", part, what, g, torch.full((len(part.index),), -7.0))


# ---- rows against the formula in float64 -----------------------------------------------------------------------------


def inputs(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = (4 * torch.randn(rows, vocab, generator=random(vocab))).to(dtype)
    masked, targets, weight = some_rows(rows, vocab, seed=vocab)
    masked[0], masked[1] = True, False
    targets = torch.where(masked, targets.clamp_min(0), -5)
    for bad in ALL.forbid:
        targets[targets == bad] = 0
    logits[~masked] = torch.nan
    return logits, targets, masked, weight


def both(args: tuple[Tensor, ...], options: Options, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """masked_loss_from_logits and its gradient."""
    return from_logits(TritonRows(), args, options, upstream)


def assert_right(got: tuple[Tensor, Tensor], args: tuple[Tensor, ...], options: Options, upstream: Tensor) -> None:
    """Under the numerics bar; the reference in float32 stands for PyTorch in the same dtype."""
    logits, targets, masked, w = args
    results = []
    for x, weight in ((logits.double(), w.double()), (logits, w)):
        leaf = x.detach().requires_grad_()
        loss = specification.masked_loss_from_logits(leaf, targets, masked, weight, **options._asdict())
        results.append((loss.detach(), torch.autograd.grad((loss * upstream).sum(), leaf)[0]))
    scale = (w * upstream)[masked] / (w[masked].sum() if options.reduction == "mean" else 1)
    extra = masked_loss_rounding(results[0][0], scale, options.softcap or float(logits.nan_to_num().abs().max()))
    for name, mine, right, peer in zip(("loss", "dlogits"), got, *results):
        assert_close(mine, peer, right, extra[name], name)


@pytest.mark.parametrize(
    "dtype, vocab",
    [(torch.float32, 2), (torch.float32, 257), (torch.float32, 2051), (torch.float16, 257), (torch.bfloat16, 257)],
    ids=str,
)
def test_rows_agree_with_the_reference(dtype: torch.dtype, vocab: int) -> None:
    args = inputs(5, vocab, dtype)
    options = ALL._replace(forbid=tuple(i for i in ALL.forbid if i < vocab and vocab > 2))
    for o in (PLAIN, options._replace(reduction="mean", max_masked=5)):
        assert_right(both(args, o, torch.tensor(-0.7)), args, o, torch.tensor(-0.7))
    o, upstream = options._replace(reduction="none", max_masked=5), torch.randn(5, generator=random(1))
    upstream[~args[2]] = torch.nan
    got = both(args, o, upstream)
    assert_right(got, args, o, upstream.nan_to_num())
    assert (got[1][~args[2]] == 0).all()
    again = both(args, o, upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, again))


def test_rows_at_any_alignment_and_strides() -> None:
    options = PLAIN._replace(label_smoothing=0.1)
    logits, targets, masked, w = inputs(12, 60, torch.bfloat16)
    views = [torch.full((12, 70), torch.nan, dtype=torch.bfloat16)[:, offset:][:, :60] for offset in (1, 3)]
    views += [torch.empty(4, 3, 60, dtype=torch.bfloat16).transpose(0, 1)]
    views += [torch.empty(2, 2, 3, 60, dtype=torch.bfloat16).permute(2, 1, 0, 3)]  # which no two strides reach
    for view in views:
        view.copy_(logits.view(view.shape))
        beside = [x.view(view.shape[:-1]) for x in (targets, masked, w)]
        loss, d = both((view, *beside), options, torch.tensor(1.0))
        assert_right((loss, d.reshape(12, 60)), (logits, targets, masked, w), options, torch.tensor(1.0))


def formula_of(options: Options, vocab: int, bias: Tensor | None) -> Formula:
    forbid = torch.tensor(options.forbid) if options.forbid else None
    return Formula(vocab, bias, options.softcap or 0.0, options.label_smoothing, options.z_loss, forbid)


@pytest.mark.parametrize("options", [PLAIN, ALL], ids=["plain", "all"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_slices_and_whole_rows_in_place_agree(dtype: torch.dtype, options: Options) -> None:
    vocab, count = 700, 5
    logits, targets, masked, weight = inputs(count, vocab, dtype)
    logits = torch.where(masked[:, None], logits, 0).to(dtype)[masked.nonzero()[:, 0]]
    bias = torch.randn(vocab, generator=random(3)) if options is ALL else None
    formula, kernels = formula_of(options, vocab, bias), TritonRows()
    rows = kernels.compact(masked, targets, weight, vocab, False, count).chunk(0, len(logits))
    right, peer = (formula_in(dtype, logits, rows, options, bias) for dtype in (torch.float64, torch.float32))
    extra = masked_loss_rounding(right[0], rows.scale, options.softcap or float(logits.nan_to_num().abs().max()))

    state = torch.full((len(logits), 4), -7.0)
    for first in range(0, vocab, 300):
        kernels.stats(logits[:, first : first + 300], first, rows, state, formula)
    whole, in_place = torch.full_like(state, -7.0), logits.clone()
    kernels.gradients(in_place, rows, whole, rows.scale, formula)
    sliced = torch.empty_like(logits)
    for first in range(0, vocab, 300):
        part = logits[:, first : first + 300].clone()
        kernels.dlogits(part, part, first, rows, state, rows.scale, formula)
        sliced[:, first : first + 300] = part
    for s, d in ((state, sliced), (whole, in_place)):
        losses = torch.empty(count)
        kernels.losses(s, rows, formula, losses)
        total = torch.empty(())
        kernels.losses(s, rows, formula, total)
        assert (total.double() - losses.double().sum()).abs() <= torch.finfo(torch.float32).eps * losses.abs().sum()
        assert_close(losses[masked], peer[0], right[0], extra["loss"], "loss")
        assert_close(d, peer[1].to(dtype), right[1], extra["dlogits"], "dlogits")


def formula_in(
    dtype: torch.dtype, logits: Tensor, rows: Rows, options: Options, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(scaled losses, scaled gradients) of the reference."""
    x = logits.to(dtype) if bias is None else logits.to(dtype) + bias.to(dtype)
    live = torch.ones(len(x), dtype=torch.bool)
    terms = (Problem(x, None, rows.targets, live, None, None, *options), torch.arange(len(x)), live)
    scale = rows.scale.to(dtype)
    return scale * reference.row_losses(x, *terms), scale[:, None] * reference.row_gradients(x, *terms)


def test_fillers_are_left_alone_by_stats_and_zero_in_gradients() -> None:
    masked, targets, weight = some_rows(10, 40)
    rows = TorchRows().compact(masked, targets, weight, 40, False, 10)
    live = int(masked.sum())
    logits = torch.full((10, 40), torch.nan)
    logits[:live] = torch.randn(live, 40, generator=random(1))
    state, formula = torch.full((10, 4), -7.0), formula_of(PLAIN, 40, None)
    d = logits.clone()
    TritonRows().gradients(d, rows, state, rows.scale, formula)
    assert (state[live:] == -7).all() and (d[live:] == 0).all() and d.isfinite().all()
    out = torch.full((10, 40), -7.0)
    TritonRows().dlogits(logits, out, 0, rows, state, rows.scale, formula)
    assert torch.equal(out, d)


def test_bad_targets_and_too_many_rows_are_nan() -> None:
    logits, targets, masked, w = inputs(5, 41, torch.float32)
    masked[2], targets[2] = True, 41
    logits[2] = 1.0
    args, options = (logits, targets, masked, w), PLAIN._replace(reduction="none", max_masked=5)
    losses, d = both(args, options, torch.ones(5))
    assert losses.isnan().tolist() == [False, False, True, False, False]
    assert d[2].isnan().all() and d[[0, 1, 3, 4]].isfinite().all()
    assert both(args, PLAIN._replace(max_masked=5), torch.tensor(1.0))[0].isnan()
    with pytest.raises(ValueError, match=r"targets: expected ids in \[0, 41\) at masked rows, got 41 at row 2 of 5"):
        both(args, PLAIN, torch.tensor(1.0))
    for capacity in (0, 1):
        for got in both(args, options._replace(max_masked=capacity), torch.ones(5)):
            assert got.isnan().all()


def test_extreme_and_infinite_logits() -> None:
    _, _, masked, w = inputs(6, 300, torch.float32)
    masked[:] = True
    logits = torch.rand(6, 300, generator=random(5)) * 2e4 - 1e4
    logits[0, 5] = -torch.inf
    logits[1] = torch.tensor([3.0, -3.0]).repeat(150) * 1e30
    args = (logits, torch.arange(6), masked, w)
    assert_right(both(args, PLAIN, torch.tensor(1.0)), args, PLAIN, torch.tensor(1.0))
    logits[2, 7], logits[3, 290], logits[4] = torch.nan, torch.inf, -torch.inf
    none = PLAIN._replace(reduction="none")
    losses, d = both(args, none, torch.ones(6))
    assert losses.isnan().tolist() == [False, False, True, True, True, False]
    assert d[[2, 3, 4]].isnan().any(1).all() and d[[0, 1, 5]].isfinite().all()


def test_a_forbidden_target_has_infinite_loss_and_the_gradient_of_the_other_terms() -> None:
    logits, targets, masked, w = inputs(3, 300, torch.float32)
    masked[:], targets[:] = True, 4
    logits = torch.randn(3, 300, generator=random(5))
    options = PLAIN._replace(forbid=tuple(range(0, 290, 2)), reduction="none")
    losses, d = both((logits, targets, masked, w), options, torch.ones(3))
    assert (losses == torch.inf).all() and (d[:, 0:290:2] == 0).all() and d.isfinite().all()
    z = torch.where(torch.arange(300) % 2 + (torch.arange(300) >= 290) > 0, logits.double(), -torch.inf)
    torch.testing.assert_close(d.double(), w[:, None] * z.softmax(1), rtol=1e-5, atol=1e-9)


# ---- the op ----------------------------------------------------------------------------------------------------------


def test_the_op_finds_these_kernels() -> None:
    (triton,) = [b for b in op.BACKENDS if b.name == "triton"]
    assert triton.devices == ("cuda",) and triton.opt_in and triton.module() is backend
    assert backend.kernels() is room.KERNELS
    ones = torch.ones(2, 3)
    for dtype, reason in ((torch.float64, "float64 runs on the reference only"), (torch.float16, None)):
        assert backend.supports(Problem(ones.to(dtype), None, ones[:, 0].long(), ones[:, 0] > 0)) == reason


@pytest.mark.parametrize("mode", through_the_op.MODES)
def test_the_op_agrees_with_float64_in_every_mode(mode: str, use: through_the_op.Use) -> None:
    use(TritonRows())
    rows, width, vocab, eps = 20, 9, 57, torch.finfo(torch.float32).eps
    hidden, weight, targets, masked, w = calls.inputs(rows, width, vocab, 0.7, torch.float32)
    hidden, bias, options = hidden.bfloat16(), torch.randn(vocab, generator=random(3)), calls.ALL
    targets[(targets == 1) | (targets == 4)] = 7
    budget = through_the_op.budget_for(mode, hidden, weight, rows)
    assert through_the_op.mode_of((hidden, weight, targets, masked, w), budget) == mode
    keywords = {"reduction": "mean", "memory_budget": budget, "max_masked": None if mode == "slices" else rows}

    def ours(h: Tensor, c: Tensor, b: Tensor) -> Tensor:
        return masked_loss(h, c, targets, masked, w, head_bias=b, backend="cuda", **options, **keywords)

    def exact(h: Tensor, c: Tensor, b: Tensor) -> Tensor:
        return specification.masked_loss(h, c, targets, masked, w.double(), head_bias=b, reduction="mean", **options)

    leaves, upstream = (hidden, weight, bias), torch.tensor(-1.7)
    right = calls.gradients(exact, tuple(x.double() for x in leaves), upstream.double())
    for mine, want in zip(calls.gradients(ours, leaves, upstream), right):
        rounding = torch.finfo(mine.dtype).eps / 2 if mine.dtype != torch.float32 else 0
        assert (mine.double() - want).abs().max() <= (8 * vocab**0.5 * eps + rounding) * want.abs().max()


def test_too_many_rows_make_the_op_nan(use: through_the_op.Use) -> None:
    use(TritonRows())
    through_the_op.check_semantics("overflow", None)


# ---- tanh ------------------------------------------------------------------------------------------------------------


@triton.jit
def tanh_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, rows_file.tanh(tl.load(x + i)))


def test_tanh_is_good_to_three_ulp_everywhere() -> None:
    size = 1 << 17
    x = torch.exp2(torch.linspace(-40, 8, size // 2 - 8))  # of every binade as many
    x = torch.cat([x, torch.tensor([0.0, torch.inf, torch.nan, 1e-42, 0.625, 0.62499994, 0.6250001, 88.8])])
    x = torch.cat([x, -x])
    out = torch.empty_like(x)
    tanh_kernel[(1,)](x, out, SIZE=size)
    right = x.double().tanh()
    ulp = torch.maximum(torch.exp2(torch.frexp(right)[1].double() - 24), torch.tensor(2.0**-149).double())
    assert ((out.double() - right).abs() <= 3 * ulp).logical_or(x.isnan()).all()
    assert out[x.isnan()].isnan().all() and (out.abs() <= 1).logical_or(x.isnan()).all()


# ---- faults ----------------------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[Any, str, str, type[Exception]]] = {
    "no rescaling of the sum": (rows_file, "sums * e + 1.0", "sums + 1.0", AssertionError),
    "reads past the row": (rows_file, "keep = column < width\n", "keep = column <= width\n", KernelFault),
    "writes past the row": (rows_file, "inside = column < width", "inside = column <= width", KernelFault),
    "a tile's last id is never forbidden": (rows_file, "forbidden < stop:", "forbidden < stop - 1:", AssertionError),
    "a slice forgets those before": (rows_file, "later = first > 0", "later = first < 0", AssertionError),
    "the target's place in a slice": (rows_file, "row + (target - first)", "row + target", AssertionError),
    "a tile counts itself": (compact, "other < tile,", "other <= tile,", AssertionError),
    "no capacity": (compact, "keep = is_masked & (place < capacity)", "keep = is_masked", KernelFault),
    "fillers are read": (compact, "mask=inside & live,", "mask=inside,", AssertionError),
    "beyond those held": (compact, "(place >= 0) & (place < held)\n    x", "(place >= 0)\n    x", KernelFault),
}


def planted(module: Any, old: str, new: str, folder: Path) -> Any:
    """A copy of the module with a fault."""
    text = inspect.getsource(module)
    assert text.count(old) == 1, f"{module.__name__} holds {text.count(old)} times: {old}"
    text = text.replace(old, new).replace("from .rows import", f"from {rows_file.__name__} import")
    path = folder / "planted.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(f"planted_{abs(hash(text))}", path)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = copy
    spec.loader.exec_module(copy)
    return copy


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, old, new, error = FAULTS[name]
    place = "rows_kernels" if module is rows_file else "compact"
    monkeypatch.setattr(room, place, planted(module, old, new, tmp_path))
    with pytest.raises(error):
        if module is rows_file:
            args, options = inputs(3, 300, torch.float32), ALL._replace(forbid=(1, 4, 127, 255))
            args[1][args[1] == 127] = 0
            assert_right(both(args, options, torch.tensor(-0.7)), args, options, torch.tensor(-0.7))
            test_slices_and_whole_rows_in_place_agree(torch.float32, ALL)
        else:
            test_compaction_is_in_order_whatever_the_number_of_tiles(37, 3)
            test_gather_takes_live_rows_only_at_any_strides(torch.float32)
            test_scatter_writes_every_row(torch.float32, 3)
