"""Shared by the tests of unmask."""

from __future__ import annotations

import pytest

from illada_kernels import _extension
from tests.helpers.unmask_oracle import available


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param not in available():
        pytest.skip(f"{request.param}: {_extension.extension_reason()}")
    return str(request.param)
