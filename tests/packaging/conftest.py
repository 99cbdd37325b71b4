"""`installed`: the package as it is installed where nothing could be compiled."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.helpers.checkout import alone


@pytest.fixture
def installed(tmp_path, root) -> Path:
    """The package without its extension, in a folder of its own."""
    junk = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(root / "illada_kernels", tmp_path / "site" / "illada_kernels", ignore=junk)
    return alone(tmp_path / "site")
