"""Runs code under each instruction set that the C++ kernels have for this processor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from illada_kernels import _extension
from illada_kernels._build import ISA_FLAGS

# Forks for each set, because one is chosen for good when the extension is loaded, and importing torch takes a second.
RUN_EACH = """
import gc, os, sys, traceback
gc.disable()
import torch
gc.freeze()  # neither the forks nor the end look through it
gc.enable()
code, *isas = sys.argv[1:]
for isa in isas:
    if os.fork() == 0:
        os.environ["ILLADA_CPU_ISA"] = isa
        try:
            exec(code, {"__name__": "__main__"})
            from illada_kernels import _extension
            assert _extension.native().cpu_isa == isa, _extension.native().cpu_isa
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    print(isa, os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def run_under_each(python: Callable[..., Any], code: str, **env: str) -> None:
    """Raises AssertionError if the code fails under one of them."""
    names = list(ISA_FLAGS)
    here = names[: names.index(_extension.native().cpu_isa) + 1]
    done = python("-c", RUN_EACH, code, *here, **env)
    assert done.stdout.split("\n") == [*(f"{isa} 0" for isa in here), ""], done.stdout + done.stderr[-3000:]
