"""The row kernels of masked_loss_from_logits on the CPU, every access checked, against a reference in float64."""

import ctypes

import pytest
import torch

from tests.cuda_on_cpu.library import ROOT, GlobalArray, KernelFault, Kernels, compile_kernels, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SOURCE = "csrc/cuda/masked_loss_rows.cu"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def run(kernels: Kernels, dtype: torch.dtype, vocab: int, skip: int, seed: int) -> None:
    """Three rows of a matrix whose rows start `skip` elements in (so, unaligned), forward and backward in place."""
    random = torch.Generator().manual_seed(seed)
    whole = torch.randn(3, vocab + skip, generator=random).mul(3).to(dtype)
    targets, masked = torch.randint(0, vocab, (3,), generator=random), torch.tensor([1, 0, 1], dtype=torch.uint8)
    logits, losses = GlobalArray(whole, "logits"), GlobalArray(torch.full((3,), 7.0), "losses")
    stats, scales = GlobalArray(torch.full((3, 2), 7.0), "stats"), GlobalArray(torch.tensor([0.5, 2.0, -1.5]), "scales")
    where = ctypes.c_void_p(logits.pointer + skip * whole.element_size())
    rest = (GlobalArray(masked, "masked"), GlobalArray(targets, "targets"))
    zero, stride, code = ctypes.c_float(0), vocab + skip, DTYPES[dtype]
    z = whole[:, skip:].double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(z, targets, reduction="none") * masked
    (expected.float() * scales.tensor).sum().backward()
    options = (None, zero, zero, zero, None, 0)  # bias, softcap, label_smoothing, z_loss, forbid
    forward = (where, code, 3, vocab, stride, *rest, *options, losses, stats, None)
    assert kernels.run("illada_masked_loss_rows_fwd", *forward, seed=seed) == 0
    # Sums of at most 4096 terms in 256 partial sums: about 16 + 8 roundings of 2^-24, and log-sum-exp below 16.
    assert torch.allclose(losses.tensor.double(), expected, rtol=0, atol=40 * 2.0**-24 * 16)
    backward = (where, stride, where, stride, code, 3, vocab, *rest, stats, scales, *options, None)
    assert kernels.run("illada_masked_loss_rows_bwd", *backward, seed=seed) == 0
    # exp(z - max) / sum: |z - max| below 25 costs 25 * 1.5 roundings of the exponent, the exponential 2, the sum 24;
    # then the target's 1 is taken off (one rounding of a number below 1, times |scale| below 2) and the result rounded.
    rounding = torch.finfo(dtype).eps / 2
    bound = z.grad.abs() * (rounding + 100 * 2.0**-24) + torch.finfo(dtype).smallest_normal
    assert ((logits.tensor[:, skip:].double() - z.grad).abs() <= bound + 2 * 2.0**-24).all()
    assert torch.equal(logits.tensor[:, :skip], whole[:, :skip])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab, skip", [(1003, 0), (17, 3), (4096, 0), (2500, 1)])
def test_rows_agree_and_touch_nothing_beyond_themselves(dtype: torch.dtype, vocab: int, skip: int) -> None:
    kernels = compile_kernels(SOURCE)
    for seed in range(2):
        run(kernels, dtype, vocab, skip, seed)


def test_a_column_too_many_is_reported() -> None:
    options = "const Options o{vocab, bias, softcap, label_smoothing, z_loss, forbid, n_forbid};"
    text = (ROOT / SOURCE).read_text()
    assert text.count(options) == 2  # forward and backward
    kernels = compile_kernels(SOURCE, text=text.replace(options, options.replace("vocab,", "vocab + 1,", 1)))
    with pytest.raises(KernelFault, match=r"(?s)nearest: logits, .* past the end of it.*masked_loss_rows.cu:\d+"):
        run(kernels, torch.float32, 4096, 0, 0)
