"""Shared by all tests: the checkout's path, child processes, and one source distribution and wheel per test run."""

from __future__ import annotations

import gc
import logging
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

gc.disable()  # until all is imported: what modules hold stays, and looking through it again and again takes a while
pytest.register_assert_rewrite("tests.helpers")

from illada_kernels._toolchain import find_compiler  # noqa: E402
from tests.helpers import compiled_before  # noqa: E402
from tests.helpers.checkout import ROOT, build, copy_checkout, locked  # noqa: E402
from tests.helpers.seeds import spare_seeds  # noqa: E402

# inherited by workers and by all that a test starts without a PYTHONPATH of its own
STARTS = [str(ROOT / "tests" / "helpers" / "children"), *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.pathsep.join(STARTS).split(os.pathsep)))
os.environ.setdefault("TORCH_DYNAMO_RUN_GC_AFTER_COMPILE", "0")  # after each graph: 10 ms, and 80 after a large one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, together: none of them is what the last process is waited for, and none of their fixtures
    (a trained model, a wheel) is made by two processes."""
    items.sort(key=lambda item: not (item.get_closest_marker("slow") or "distributions" in item.fixturenames))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000)  # of 700 objects Dynamo's traces keep most: a tenth of their time went into looking
    gc.enable()
    if "torch" in sys.modules:
        spare_seeds()
    if guards := sys.modules.get("torch._dynamo.guards"):
        # it times the guards of every graph for its log, with caches emptied before: 20 ms
        guards.profile_guard_manager = lambda *_: 0.0  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _same_draws_every_time() -> None:
    """A test that draws without a generator of its own gives what it gave before."""
    if torch := sys.modules.get("torch"):
        # without a GPU manual_seed keeps a seed and a stack trace for each kind of GPU that may yet come: 0.7 ms
        (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(0)


@pytest.fixture
def logged() -> Iterator[list[logging.LogRecord]]:
    """What illada_kernels logs. In place of pytest's caplog, whose plugin is off: for each test it takes the records of
    every logger of torch, for which torch then writes down each graph (a tenth of a trace)."""
    records: list[logging.LogRecord] = []
    handler, logger = logging.Handler(), logging.getLogger("illada_kernels")
    handler.emit = records.append  # type: ignore[method-assign]
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For sizes that are not worth a second thread: on a busy machine waiting for it costs 30 ms an operation."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs this interpreter on arguments; `path` goes first on its module path, here the checkout."""
    checkout = (ROOT, ROOT / "python")

    def run(*arguments: str, path: tuple[Path, ...] = checkout, cwd: Path | None = None, **env: str):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]),
            **({} if path == checkout else {"PYTHONDONTWRITEBYTECODE": "1"}),  # modules that a test writes may change
            **env,
        }
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=300)

    return run


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{"sdist", "source", "wheel", "seconds"}: a source distribution, unpacked, and the wheel built from it without
    CUDA, of the objects that the checkout's build made of the same sources by the same commands; built once however
    many processes run the tests."""
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
            compiler = f"{shlex.join([sys.executable, compiled_before.__file__])} {find_compiler()}"
            done = build("build_wheel", source, folder, ILLADA_CUDA="0", ILLADA_REQUIRE_EXT="1", CXX=compiler)
            assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
            (folder / "seconds").write_text(f"{time.monotonic() - begin:.1f}")
    return {
        "sdist": next(folder.glob("*.tar.gz")),
        "source": next((folder / "unpacked").iterdir()),
        "wheel": next(folder.glob("*.whl")),
        "seconds": folder / "seconds",
    }
