"""The CUDA row kernels of masked_loss_from_logits, and the Python around them, run on the CPU by tests/cuda_on_cpu."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from illada_kernels.ops.masked_loss import cases, native, reference
from illada_kernels.ops.masked_loss.native import Options
from tests.cuda_on_cpu.emulated import Emulated
from tests.cuda_on_cpu.library import GlobalArray, KernelFault, missing, plant

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
SOURCE = "csrc/cuda/masked_loss_rows.cu"
ALL = Options("sum", 3.0, 0.1, 0.01, (1, 4, 30), None)
PLAIN = Options("sum", None, 0.0, 0.0, (), None)


class Rows(Emulated):
    """The row kernels; `in_place` makes the backward write over the logits."""

    def __init__(self, text: str | None = None, seed: int = 0, in_place: bool = False) -> None:
        super().__init__(SOURCE, text=text, seed=seed)
        self.in_place = in_place

    def adjust(self, function: str, passed: list[Any]) -> None:
        if self.in_place and function.endswith("bwd"):
            passed[2] = passed[0]

    def __call__(self, function: str, device: torch.device, *arguments: Any) -> None:
        super().__call__(function, device, *arguments)
        if self.in_place and function.endswith("bwd"):
            arguments[2].copy_(self.last[0].tensor.view(arguments[2].shape))


def inputs(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(rows, vocab, generator=g)).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=g)
    for bad in ALL.forbid:
        targets[targets == bad] = 0
    masked = torch.arange(rows) % 3 != 1
    logits[~masked], targets[~masked] = torch.nan, -5
    return logits, targets, masked, 1 / torch.rand(rows, generator=g).clamp_min(1e-3)


def both(
    monkeypatch: pytest.MonkeyPatch, emulated: Rows, args: tuple[Tensor, ...], options: Options, upstream: Tensor
) -> tuple[Tensor, Tensor]:
    monkeypatch.setattr(native, "launch", emulated)
    loss, kept = native.cuda_rows_forward(*args, options)
    return loss, native.cuda_rows_backward(upstream, *args, kept, options)


def assert_right(got: tuple[Tensor, Tensor], args: tuple[Tensor, ...], options: Options, upstream: Tensor) -> None:
    """Under the bar of cases.py; the reference in float32 stands for PyTorch in the same dtype."""
    logits, targets, masked, w = args
    results = []
    for x, weight in ((logits.double(), w.double()), (logits, w)):
        leaf = x.detach().requires_grad_()
        loss = reference.masked_loss_from_logits(leaf, targets, masked, weight, **options._asdict())
        results.append((loss.detach(), torch.autograd.grad((loss * upstream).sum(), leaf)[0]))
    # p and 1 are rounded to float32 before they are subtracted; and 2^x is good to 2 ulp here, to 1 in torch
    cancellation = float(torch.finfo(torch.float32).eps * (w * upstream)[masked].abs().max())
    for mine, right, peer in zip(got, *results):
        assert (mine.double() - right).abs().max() <= 2 * cases.bar(peer, right) + cancellation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [37, 64, 2051, 4096])
def test_rows_agree_with_the_reference(dtype: torch.dtype, vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs(5, vocab, dtype)
    for options, seed in ((PLAIN, 1), (ALL, 2), (ALL._replace(reduction="mean"), 3)):
        upstream = torch.tensor(-0.7)
        assert_right(both(monkeypatch, Rows(seed=seed), args, options, upstream), args, options, upstream)
    options, upstream = ALL._replace(reduction="none", max_masked=5), torch.randn(5)
    upstream[1] = torch.nan  # of an unmasked row
    got = both(monkeypatch, Rows(), args, options, upstream)
    assert_right(got, args, options, upstream.nan_to_num())
    assert (got[1][~args[2]] == 0).all()


class FromRoom(Rows):
    """Passes logits as a view into a larger tensor; a copy of the view alone would be contiguous and aligned."""

    def __init__(self, room: Tensor, offset: int) -> None:
        super().__init__()
        self.room, self.offset = room, offset

    def __call__(self, function: str, device: torch.device, *arguments: Any) -> None:
        whole = GlobalArray(self.room, "room")
        view = ctypes.c_void_p(whole.pointer + self.offset * self.room.element_size())
        super().__call__(function, device, view, *arguments[1:])


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 40])
def test_tiny_vocabularies_and_rows_at_any_alignment(vocab: int, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = PLAIN._replace(label_smoothing=0.1)
    logits, targets, masked, w = inputs(4, vocab, torch.bfloat16)
    targets = torch.where(masked, targets.clamp(0, vocab - 1), targets)
    room = torch.zeros(4, vocab + 5, dtype=torch.bfloat16)
    view = room[:, offset : offset + vocab].copy_(logits)
    got = both(monkeypatch, FromRoom(room, offset), (view, targets, masked, w), options, torch.tensor(1.0))
    assert_right(got, (logits, targets, masked, w), options, torch.tensor(1.0))


def test_backward_in_place_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs(4, 519, torch.float16)
    apart = both(monkeypatch, Rows(), args, ALL, torch.tensor(1.0))[1]
    assert torch.equal(both(monkeypatch, Rows(in_place=True), args, ALL, torch.tensor(1.0))[1], apart)


def test_bad_targets_and_too_many_rows_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets, masked, w = inputs(5, 41, torch.float32)
    targets[2] = 41
    options = PLAIN._replace(reduction="none", max_masked=5)
    losses, d = both(monkeypatch, Rows(), (logits, targets, masked, w), options, torch.ones(5))
    assert losses.isnan().tolist() == [False, False, True, False, False]
    assert d[2].isnan().all() and d[[0, 1, 3, 4]].isfinite().all()
    assert both(monkeypatch, Rows(), (logits, targets, masked, w), PLAIN, torch.tensor(1.0))[0].isnan()
    few = options._replace(max_masked=2)
    for got in both(monkeypatch, Rows(), (logits, targets, masked, w), few, torch.ones(5)):
        assert got.isnan().all()


def test_extreme_and_infinite_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, targets, masked, w = inputs(6, 300, torch.float32)
    logits = (torch.rand(6, 300) * 2e4 - 1e4).index_put(
        (torch.tensor([0]), torch.tensor([5])), torch.tensor(-torch.inf)
    )
    targets = torch.arange(6)
    args = (logits, targets, masked, w)
    assert_right(both(monkeypatch, Rows(), args, PLAIN, torch.tensor(1.0)), args, PLAIN, torch.tensor(1.0))
    logits[2, 7] = torch.nan
    losses, d = both(monkeypatch, Rows(), args, PLAIN._replace(reduction="none"), torch.ones(6))
    assert losses.isnan().nonzero().tolist() == [[2]] and d[[0, 1, 3, 4, 5]].isfinite().all()


FAULTS = {
    "reads past the row": ("(vocab - head) / VECTOR,", "(vocab - head + VECTOR - 1) / VECTOR,", KernelFault),
    "no barrier between reductions": ("fmaxf(high, z[k])", "high", AssertionError),
    "no rescaling of the sum": ("s.sum *= exp_of(s.high - high);", "", AssertionError),
    "vectors where the rows are not aligned alike": ("out_row)) % 16 == 0)", "out_row)) % 2 == 0)", KernelFault),
    "a 32-bit offset": ("out + r * out_stride", "out + int(r) * int(out_stride << 30)", KernelFault),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, error = FAULTS[name]
    args = inputs(5, 4099, torch.bfloat16)
    emulated = Rows(plant(SOURCE, old, new))
    with pytest.raises(error):
        got = both(monkeypatch, emulated, args, PLAIN, torch.tensor(1.0))
        room = torch.zeros(5, 4101, dtype=torch.bfloat16)  # an output whose rows are aligned otherwise than the logits'
        logits, targets, masked, w = args
        factors = torch.where(masked, w, 0)
        stats = torch.stack((logits.float().amax(1), torch.ones(5)), 1)
        emulated("masked_loss_rows_bwd", logits.device, logits, 4099, room, 4101, 1, 5, 4099, masked, targets, stats,
                 factors, None, 0.0, 0.0, 0.0, None, 0)  # fmt: skip
        assert_right(got, args, PLAIN, torch.tensor(1.0))
