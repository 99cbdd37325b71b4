"""Freed memory stays in a process that asks for it: blocks allocated again have no page faults. In processes of their
own, because glibc's settings last."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from illada import cli, heap

GLIBC = sys.platform.startswith("linux") and "CS_GNU_LIBC_VERSION" in os.confstr_names
OWN = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", heap.SWITCH)

FAULTS = """
import ctypes, resource, sys
from illada import heap

reason = heap.keep_freed({largest}) if {kept} else "not asked for"
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def allocate(blocks=4, size={size} << 20):
    held = [libc.malloc(size) for _ in range(blocks)]
    for at in held:
        ctypes.memset(at, 1, size)
    for at in held:
        libc.free(at)

allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    allocate()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 20, "torch" in sys.modules, reason, sep="|")
"""


def faults(size: int, kept: bool, largest: int = 1 << 30, **variables: str) -> tuple[float, str]:
    """Page faults for each block of `size` MiB that is allocated again, and what keep_freed said."""
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
    program = FAULTS.format(size=size, kept=kept, largest=largest)
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    number, has_torch, reason = done.stdout.strip().split("|")
    assert has_torch == "False"
    return float(number), reason


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
class TestGlibc:
    @pytest.mark.parametrize("largest", [heap.GLIBC_MOST, 1 << 30])
    def test_a_block_of_8_mib_is_mapped_again_unless_it_is_kept(self, largest):
        pages = (8 << 20) // os.sysconf("SC_PAGESIZE")
        assert faults(8, kept=False)[0] > pages / 2
        assert faults(8, True, largest) == (pytest.approx(0, abs=8), "None")

    @pytest.mark.parametrize(
        "variables",
        [{heap.SWITCH: "0"}, {"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}],
    )
    def test_the_environment_comes_first(self, variables):
        found, reason = faults(8, True, **variables)
        assert found > 1000 and next(iter(variables)) in reason

    def test_a_library_that_takes_32_mib_at_most_gets_that(self, monkeypatch):
        asked = library(monkeypatch, takes=32 << 20)
        assert heap.keep_freed() is None
        assert asked == [(-3, 1 << 30), (-3, 32 << 20), (-1, -1)]

    def test_a_library_that_takes_nothing_is_left_as_it_is(self, monkeypatch):
        asked = library(monkeypatch, takes=0)
        assert "refused a threshold" in heap.keep_freed()
        assert (-1, -1) not in asked


def library(monkeypatch, takes: int) -> list[tuple[int, int]]:
    """Stands in for glibc: notes calls of mallopt, which takes thresholds up to `takes`."""
    asked: list[tuple[int, int]] = []

    class Library:
        def gnu_get_libc_version(self) -> None: ...

        def mallopt(self, parameter: int, value: int) -> int:
            asked.append((parameter, value))
            return int(value <= takes)

    for name in OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: Library())
    return asked


def test_another_c_library_is_left_as_it_is(monkeypatch):
    for name in OWN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert heap.keep_freed() == "the C library is not glibc"


@pytest.mark.parametrize("value", ["2", "yes", " "])
def test_the_switch_takes_0_and_1(value, monkeypatch, capsys):
    monkeypatch.setenv(heap.SWITCH, value)
    assert cli.main(["bench", "--device", "cpu"]) == 2
    assert f"ILLADA_KEEP_MEMORY: expected 0 or 1, got {value!r}" in capsys.readouterr().err


@pytest.mark.parametrize("device, calls", [("cpu", 1), ("meta", 0)])
def test_commands_keep_memory_on_a_cpu(device, calls, monkeypatch):
    asked = []
    monkeypatch.setattr(heap, "keep_freed", lambda: asked.append(1))
    monkeypatch.setattr("illada.devices.usable", lambda device: device)
    monkeypatch.setattr("illada.bench.table", lambda device: "")
    assert cli.main(["bench", "--device", device]) == 0
    assert len(asked) == calls
