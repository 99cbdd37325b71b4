"""The exponential of attention's C++ kernels: each instruction set keeps what csrc/cpu/tile_gemm.h promises of it."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable

import numpy as np
import pytest

from illada_kernels import _build, _extension
from tests.helpers.checkout import ROOT

SOURCE = """
#include <cstdio>
#include <cstdlib>
#include "tile_gemm.h"
int main(int, char** arguments) {  // c, short; x on stdin
  const float c = std::atof(arguments[1]);
  float x[16];
  while (std::fread(x, sizeof x, 1, stdin) == 1) {
    for (int i = 0; i < 16; i += kWidth) {
      vf one[1] = {load(x + i)};
      if (*arguments[2] == '1') exp2_scaled<true>(one, c, -127.0f / c);
      else exp2_scaled<false>(one, c, -127.0f / c);
      store(x + i, one[0]);
    }
    std::fwrite(x, sizeof x, 1, stdout);
  }
}
"""
LEVELS = list(_build.ISA_FLAGS)
C = float(np.float32(0.125 * 1.44269504))
Exp2 = Callable[[np.ndarray, float, bool], np.ndarray]


@pytest.fixture(scope="module", params=LEVELS)
def exp2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exp2:
    """2^(c * x), by a program that traps where an integer overflows, because compilers differ in what comes of it."""
    module, _ = _extension.extension()
    if module is None or LEVELS.index(request.param) > LEVELS.index(module.cpu_isa):
        pytest.skip(f"{request.param}: not on this processor, or no extension")
    folder = tmp_path_factory.mktemp("exp2")
    source, program = folder / "exp2.cpp", folder / "exp2"
    source.write_text(SOURCE)
    checks = "-fsanitize=signed-integer-overflow,shift -fsanitize-undefined-trap-on-error"
    flags = f"{_build.CXX_FLAGS} {_build.ISA_FLAGS[request.param]} {checks}"
    command = shlex.split(f"{_build.find_compiler()} {flags}")
    subprocess.run([*command, "-I", str(ROOT / "csrc/cpu"), str(source), "-o", str(program)], check=True)

    def call(x: np.ndarray, c: float, short: bool) -> np.ndarray:
        given = np.pad(x, (0, -len(x) % 16)).tobytes()
        ran = subprocess.run([program, repr(c), str(int(short))], input=given, stdout=subprocess.PIPE, check=True)
        return np.frombuffer(ran.stdout, np.float32)[: len(x)]

    return call


@pytest.mark.parametrize("short, rounding", [(False, 2e-7), (True, 6e-7)])
def test_powers_are_as_near_as_promised(exp2: Exp2, short: bool, rounding: float) -> None:
    x = np.linspace(-125.9 / C, 0.4, 400_003, dtype=np.float32)
    error = np.abs(exp2(x, C, short) / np.exp2(x.astype(np.float64) * C) - 1)
    over = error - (rounding + 2.0**-24 * np.abs(x * C))
    assert over.max() <= 0, (x[over.argmax()], error[over.argmax()])


@pytest.mark.parametrize("short", [False, True])
def test_powers_end_where_float32_does(exp2: Exp2, short: bool) -> None:
    found = exp2(np.array([0.0, -0.0, -127.0, -128.5, -1e30, -np.inf, np.nan], np.float32), 1.0, short)
    assert found[:6].tolist() == [1, 1, 0, 0, 0, 0] and np.isnan(found[6])
    tiny = exp2(np.linspace(-127.0, -126.0, 1001, dtype=np.float32)[:-1], 1.0, short)
    assert (tiny >= 0).all() and (tiny < 2.0**-126).all()
