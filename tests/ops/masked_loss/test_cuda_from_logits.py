"""masked_loss_from_logits as a GPU runs it, with the CUDA kernels, on the CPU by tests/cuda_on_cpu."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from illada_kernels.ops.masked_loss.cuda import CudaRows
from illada_kernels.testing import assert_close, masked_loss_rounding
from tests.cuda_on_cpu.emulated import Emulated
from tests.cuda_on_cpu.library import missing
from tests.helpers import masked_loss_reference as reference
from tests.helpers.masked_loss_gpu import from_logits
from tests.helpers.masked_loss_reference import Options

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
ALL = Options("sum", 3.0, 0.1, 0.01, (1, 4, 30), None)
PLAIN = Options("sum", None, 0.0, 0.0, (), None)


def inputs(rows: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(vocab)
    logits = (4 * torch.randn(rows, vocab, generator=g)).to(dtype)
    targets = torch.randint(vocab, (rows,), generator=g)
    for bad in ALL.forbid:
        targets[targets == bad] = 0
    masked = torch.arange(rows) % 3 != 1
    logits[~masked], targets[~masked] = torch.nan, -5
    return logits, targets, masked, 1 / torch.rand(rows, generator=g).clamp_min(1e-3)


def both(args: tuple[Tensor, ...], options: Options, upstream: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(loss, gradient of the logits)."""
    kernels = CudaRows(Emulated("csrc/cuda/masked_loss_rows.cu", "csrc/cuda/masked_loss_compact.cu", seed=seed))
    return from_logits(kernels, args, options, upstream)


def assert_right(got: tuple[Tensor, Tensor], args: tuple[Tensor, ...], options: Options, upstream: Tensor) -> None:
    """Under the numerics bar; the reference in float32 stands for PyTorch in the same dtype."""
    logits, targets, masked, w = args
    results = []
    for x, weight in ((logits.double(), w.double()), (logits, w)):
        leaf = x.detach().requires_grad_()
        loss = reference.masked_loss_from_logits(leaf, targets, masked, weight, **options._asdict())
        results.append((loss.detach(), torch.autograd.grad((loss * upstream).sum(), leaf)[0]))
    scale = (w * upstream)[masked] / (w[masked].sum() if options.reduction == "mean" else 1)
    extra = masked_loss_rounding(results[0][0], scale, options.softcap or float(logits.nan_to_num().abs().max()))
    for name, mine, right, peer in zip(("loss", "dlogits"), got, *results):
        assert_close(mine, peer, right, extra[name], name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [37, 64, 2051, 4096])
def test_rows_agree_with_the_reference(dtype: torch.dtype, vocab: int) -> None:
    args = inputs(5, vocab, dtype)
    for options, seed in ((PLAIN, 1), (ALL, 2), (ALL._replace(reduction="mean"), 3)):
        upstream = torch.tensor(-0.7)
        assert_right(both(args, options, upstream, seed), args, options, upstream)
    options, upstream = ALL._replace(reduction="none", max_masked=5), torch.randn(5)
    upstream[1] = torch.nan  # of an unmasked row
    got = both(args, options, upstream)
    assert_right(got, args, options, upstream.nan_to_num())
    assert (got[1][~args[2]] == 0).all()


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("vocab", [1, 2, 7, 8, 9, 40])
def test_tiny_vocabularies_and_rows_at_any_alignment(vocab: int, offset: int) -> None:
    options = PLAIN._replace(label_smoothing=0.1)
    logits, targets, masked, w = inputs(4, vocab, torch.bfloat16)
    targets = torch.where(masked, targets.clamp(0, vocab - 1), targets)
    room = torch.full((4, vocab + 5), torch.nan, dtype=torch.bfloat16)
    view = room[:, offset : offset + vocab].copy_(logits)
    got = both((view, targets, masked, w), options, torch.tensor(1.0))
    assert_right(got, (logits, targets, masked, w), options, torch.tensor(1.0))


def test_rows_of_two_strides_and_rows_that_no_two_strides_reach() -> None:
    logits, targets, masked, w = inputs(12, 60, torch.float32)
    apart = torch.full((3, 2, 4, 61), torch.nan)[:, :, ::2, :60]  # (3, 2, 2, V)
    for shape, view in (
        ((3, 4), torch.empty(4, 3, 60).transpose(0, 1)),
        ((3, 2, 2), apart),
        ((3, 2, 2), torch.empty(2, 2, 3, 60).permute(2, 1, 0, 3)),
    ):
        view.copy_(logits.view(*shape, 60))
        beside = [x.view(shape) for x in (targets, masked, w)]
        loss, d = both((view, *beside), PLAIN, torch.tensor(1.0))
        assert_right((loss, d.reshape(12, 60)), (logits, targets, masked, w), PLAIN, torch.tensor(1.0))


def test_bad_targets_and_too_many_rows_are_nan() -> None:
    logits, targets, masked, w = inputs(5, 41, torch.float32)
    targets[2] = 41
    args, options = (logits, targets, masked, w), PLAIN._replace(reduction="none", max_masked=5)
    losses, d = both(args, options, torch.ones(5))
    assert losses.isnan().tolist() == [False, False, True, False, False]
    assert d[2].isnan().all() and d[[0, 1, 3, 4]].isfinite().all()
    assert both(args, PLAIN._replace(max_masked=5), torch.tensor(1.0))[0].isnan()
    with pytest.raises(ValueError, match=r"targets: expected ids in \[0, 41\) at masked rows, got 41 at row 2 of 5"):
        both(args, PLAIN, torch.tensor(1.0))
    for capacity in (0, 2):
        for got in both(args, options._replace(max_masked=capacity), torch.ones(5)):
            assert got.isnan().all()


def test_extreme_and_infinite_logits() -> None:
    logits, targets, masked, w = inputs(6, 300, torch.float32)
    logits = (torch.rand(6, 300) * 2e4 - 1e4).index_put(
        (torch.tensor([0]), torch.tensor([5])), torch.tensor(-torch.inf)
    )
    targets = torch.arange(6)
    args = (logits, targets, masked, w)
    assert_right(both(args, PLAIN, torch.tensor(1.0)), args, PLAIN, torch.tensor(1.0))
    logits[2, 7] = torch.nan
    losses, d = both(args, PLAIN._replace(reduction="none"), torch.ones(6))
    assert losses.isnan().nonzero().tolist() == [[2]] and d[[0, 1, 3, 4, 5]].isfinite().all()
