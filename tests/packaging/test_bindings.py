"""The extension's entry points: what comes in their arguments' place is named, and what they return is their code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from illada_kernels import _extension

pytestmark = pytest.mark.skipif(_extension.extension_reason() is not None, reason="no extension")
GATE_UP, OUT = torch.ones(3, 8), torch.zeros(3, 4)
RIGHT = (0, GATE_UP.data_ptr(), 3, 4, OUT.data_ptr(), 1)  # dtype, gate_up, rows, width, out, threads


def test_a_call_returns_the_code_and_writes():
    OUT.zero_()
    numbers = (np.int64(0), GATE_UP.data_ptr(), True + 2, np.int32(4), OUT.data_ptr(), 1)  # whatever is an integer
    for arguments in (RIGHT, numbers):
        assert _extension.native().layer_swiglu_cpu(*arguments) == 0
        assert torch.allclose(OUT, torch.nn.functional.silu(torch.ones(3, 4)))
    assert _extension.native().layer_swiglu_cpu(77, *RIGHT[1:]) == 1  # no dtype


@pytest.mark.parametrize(
    "place, wrong, said",
    [
        (0, 2**31, "expected an int of 32 bits as argument 1, got 2147483648"),
        (0, 0.5, "expected an int of 32 bits as argument 1, got 0.5"),
        (1, None, "expected an int of 64 bits as argument 2, got None"),
        (2, "3", "expected an int of 64 bits as argument 3, got '3'"),
        (3, -(2**63) - 1, "expected an int of 64 bits as argument 4, got -9223372036854775809"),
        (5, -(2**31) - 1, "expected an int of 32 bits as argument 6, got -2147483649"),
    ],
)
def test_what_an_argument_cannot_be_is_named(place, wrong, said):
    before = OUT.clone()
    arguments = [*RIGHT[:place], wrong, *RIGHT[place + 1 :]]
    with pytest.raises(TypeError, match=f"^layer_swiglu_cpu: {said.replace('.', '[.]')}$"):
        _extension.native().layer_swiglu_cpu(*arguments)
    assert torch.equal(OUT, before)


def test_a_real_number_is_a_float_or_an_int():
    x, weight, out = torch.ones(2, 8), torch.ones(8), torch.zeros(2, 8)
    call = (0, x.data_ptr(), 0, weight.data_ptr(), 2, 8)
    for eps in (1.0, 1, np.float32(1)):
        assert _extension.native().layer_rms_norm_cpu(*call, eps, 0, 0, out.data_ptr(), 1) == 0
        assert torch.allclose(out, torch.full((2, 8), 0.5**0.5))
    for wrong in ("1", None, 10**400):
        with pytest.raises(TypeError, match="layer_rms_norm_cpu: expected a float as argument 7, got "):
            _extension.native().layer_rms_norm_cpu(*call, wrong, 0, 0, out.data_ptr(), 1)


def test_too_few_and_too_many_arguments_are_counted():
    for arguments in ((), RIGHT[:-1], (*RIGHT, 1)):
        with pytest.raises(TypeError, match=f"layer_swiglu_cpu: expected 6 arguments, got {len(arguments)}"):
            _extension.native().layer_swiglu_cpu(*arguments)
    with pytest.raises(TypeError, match="takes no keyword arguments"):
        _extension.native().layer_swiglu_cpu(*RIGHT[:-1], threads=1)


def test_the_module_is_found_by_its_name_and_says_what_it_is():
    module = _extension.native()
    assert module.__name__ == "illada_kernels._C" and module.cpu_isa in ("scalar", "avx2", "avx512", "avx512_bf16")
    assert type(module.with_cuda) is bool and Path(module.__file__).name.startswith("_C")
    assert module.unmask_row_bytes > 0 and module.unmask_plan_cpu.__module__ == module.__name__
