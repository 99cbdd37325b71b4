"""`use`: backend="cuda" of masked_loss runs on the CPU, with the row kernels that a test gives it."""

from __future__ import annotations

from typing import Any

import pytest

from illada_kernels._dispatch import Backend
from illada_kernels.ops.masked_loss import gpu, op
from illada_kernels.ops.masked_loss.rows import RowKernels
from tests.helpers.masked_loss_gpu import Use
from tests.helpers.masked_loss_oracle import product_on_cpu


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Makes backend="cuda" run on the CPU, with these row kernels."""

    def no_reason(_: Any = None) -> None:
        return None

    def install(kernels: RowKernels) -> None:
        backends = (Backend("cuda", ("cpu",), no_reason, no_reason, opt_in="emulated"), *op.BACKENDS[1:])
        monkeypatch.setattr(op, "BACKENDS", backends)
        monkeypatch.setattr(op, "FROM_LOGITS_BACKENDS", backends)
        monkeypatch.setattr(op, "row_kernels", lambda backend: kernels)
        monkeypatch.setattr(gpu, "product", product_on_cpu)
        for name, value in (("LEAST_CHUNK", 8), ("LEAST_SLICE", 16), ("TILE", 4)):
            monkeypatch.setattr(gpu, name, value)

    return install
