"""`ran`: the calls of torch's attention that patched code made of ours."""

from __future__ import annotations

import pytest

from illada_kernels.integrations import _stand_ins


@pytest.fixture
def ran(monkeypatch):
    calls = []
    ours = _stand_ins.ours
    monkeypatch.setattr(_stand_ins, "ours", lambda *a, **k: calls.append(1) or ours(*a, **k))
    return calls
