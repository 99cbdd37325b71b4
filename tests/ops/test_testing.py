"""The tolerances: what they let through and what they do not."""

from __future__ import annotations

import doctest

import pytest
import torch

from illada_kernels import testing
from illada_kernels.testing import assert_close, tolerance


def test_examples_run():
    failed, tried = doctest.testmod(testing)
    assert failed == 0 and tried >= 6


def test_the_tolerance_is_twice_torchs_error_and_one_rounding_of_the_largest_value():
    exact = torch.tensor([1.0, -4.0], dtype=torch.float64)
    plain = torch.tensor([1.0, -3.75], dtype=torch.bfloat16)
    assert tolerance(plain, exact) == pytest.approx(2 * 0.25 + 4 * 2**-8, rel=1e-12)
    assert tolerance(plain[:0], exact[:0]) == 0


@pytest.mark.parametrize(
    "off, extra, right", [(0.9, 0, True), (1.1, 0, False), (1.1, 0.1, True), (torch.nan, 9, False)]
)
def test_an_element_beyond_the_tolerance_or_nan_is_an_error_that_says_how_far(off, extra, right):
    exact, plain = torch.ones(3, dtype=torch.float64), torch.tensor([1.0, 1.5, 1.0])
    ours = torch.tensor([1.0, 1.0, 1.0 + off])  # twice 0.5, and a rounding, are allowed
    if right:
        return assert_close(ours, plain, exact, extra)
    with pytest.raises(AssertionError, match="out: off by .*, at most 1 was expected" if off == 1.1 else "out: off by"):
        assert_close(ours, plain, exact, extra, name="out")


def test_shapes_that_differ_are_an_error_and_empty_results_are_close():
    x = torch.ones(3)
    with pytest.raises(AssertionError, match=r"expected shape \(3,\), got \(1,\)"):
        assert_close(x[:1], x, x)
    assert_close(x[:0], x[:0], x[:0])
