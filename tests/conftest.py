"""Shared by all tests: the checkout's path, child processes, and one source distribution and wheel per test run."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("illada_kernels", "python", "csrc", "benchmarks", "tests", "docs", ".ci")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "Makefile", "README.md", "LICENSE", "CHANGELOG.md")


@pytest.fixture(autouse=True)
def _same_draws_every_time() -> None:
    """A test that draws without a generator of its own gives what it gave before."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs this interpreter on arguments; `path` goes first on its module path, here the checkout."""

    def run(*arguments: str, path: tuple[Path, ...] = (ROOT, ROOT / "python"), cwd: Path | None = None, **env: str):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONDONTWRITEBYTECODE": "1",
            **env,
        }
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)

    return run


def alone(folder: Path) -> Path:
    """Makes `folder`, first on a child's path, the only place that `illada_kernels` is found in: the finder of an
    editable install would otherwise supply from the checkout what a copy of the package lacks."""
    strip = "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '').lower()]"
    (folder / "sitecustomize.py").write_text(f"import sys\n{strip}\n")
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


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{"sdist", "source", "wheel", "seconds"}: a source distribution, unpacked, and the wheel built from it without
    CUDA; built once however many processes run the tests."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "distributions"
    with locked(base / "distributions.lock"):
        if not (folder / "seconds").exists():
            copy_checkout(folder / "checkout")
            done = build("build_sdist", folder / "checkout", folder)
            assert done.returncode == 0, done.stderr[-3000:]
            shutil.unpack_archive(next(folder.glob("*.tar.gz")), folder / "unpacked")
            source = next((folder / "unpacked").iterdir())
            begin = time.monotonic()
            done = build("build_wheel", source, folder, ILLADA_CUDA="0", ILLADA_REQUIRE_EXT="1")
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
            (folder / "seconds").write_text(f"{time.monotonic() - begin:.1f}")
    return {
        "sdist": next(folder.glob("*.tar.gz")),
        "source": next((folder / "unpacked").iterdir()),
        "wheel": next(folder.glob("*.whl")),
        "seconds": folder / "seconds",
    }
