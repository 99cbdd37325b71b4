"""The checkout as a clone would hold it, and its build backend as pip would call it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = ("illada_kernels", "python", "csrc", "benchmarks", "tests", "docs", "examples", "release", ".ci", ".github")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "Makefile", "mkdocs.yml", "LICENSE", "CITATION.cff")
FILES += ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")


def alone(folder: Path) -> Path:
    """Makes `folder`, first on a child's path, the only place that `illada_kernels` is found in: the finder of an
    editable install would otherwise supply from the checkout what a copy of the package lacks."""
    strip = "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '').lower()]"
    start = (ROOT / "tests" / "helpers" / "children" / "sitecustomize.py").read_text()  # of the two the first counts
    (folder / "sitecustomize.py").write_text(f"{start}\nimport sys\n{strip}\n")
    return folder


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def copy_checkout(target: Path) -> None:
    """What a clone would hold, without what was built in place."""
    target.mkdir(parents=True)
    junk = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json", "*.egg-info", ".*_cache", "results")
    for name in SOURCES:
        shutil.copytree(ROOT / name, target / name, ignore=junk)
    for name in FILES:
        shutil.copy(ROOT / name, target / name)


def build(command: str, source: Path, output: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """One hook of the build backend (build_sdist, build_wheel), as pip without build isolation would call it."""
    output.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.{command}({str(output)!r}))"
    environment = {**os.environ, **env}
    return subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, env=environment)
