"""`use`: backend="cuda" of masked_loss runs on the CPU, with the row kernels that a test gives it."""

from __future__ import annotations

import pytest

from illada_kernels._dispatch import Backend
from illada_kernels.ops.masked_loss import cuda, gpu, op
from illada_kernels.ops.masked_loss.row_kernels import RowKernels
from tests.helpers.masked_loss_gpu import Use
from tests.helpers.masked_loss_oracle import product_on_cpu


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes backend="cuda" run on the CPU, with these row kernels."""

    def install(kernels: RowKernels) -> None:
        here = Backend("cuda", ("cpu",), lambda: cuda, opt_in="emulated")
        monkeypatch.setattr(op.OPERATOR, "backends", (here, *op.BACKENDS[1:]))
        monkeypatch.setattr(cuda, "available", lambda: None)
        monkeypatch.setattr(cuda, "KERNELS", kernels)
        monkeypatch.setattr(gpu, "product", product_on_cpu)
        for name, value in (("LEAST_CHUNK", 8), ("LEAST_SLICE", 16), ("TILE", 4)):
            monkeypatch.setattr(gpu, name, value)

    return install
