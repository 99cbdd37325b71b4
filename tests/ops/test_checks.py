"""The validators: each message names the argument, what was expected, what came and what to do; and symbolic values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from illada_kernels import _checks as checks

X = torch.zeros(2, 3, 4)
BAD = {
    "a float": (lambda: checks.expect_integer("k", 2.0, 0, 9), TypeError, r"k: expected an int, got float; use int\("),
    "a bool": (lambda: checks.expect_integer("k", True, 0, 9), TypeError, "k: expected an int, got bool"),
    "a tensor": (
        lambda: checks.expect_integer("k", torch.tensor(1), 0, 9),
        TypeError,
        "k: expected an int, got a torch.int64 tensor",
    ),
    "below": (lambda: checks.expect_integer("k", -1, 0, 9), ValueError, "k: expected an int from 0 to 9, got -1"),
    "above": (lambda: checks.expect_integer("k", np.int32(10), 0, 9), ValueError, "from 0 to 9, got 10"),
    "below without limit": (lambda: checks.expect_integer("k", -1, 0, 2**62), ValueError, "an int of at least 0, got"),
    "tensor of floats": (
        lambda: checks.expect_integer("k", X, 0, 9, tensor=True),
        TypeError,
        r"k: expected an integer tensor, got torch.float32; convert it with .to\(torch.int64\)",
    ),
    "tensor of bools": (lambda: checks.expect_integer("k", X > 0, 0, 9, tensor=True), TypeError, "an integer tensor"),
    "tensor of 3 dimensions": (
        lambda: checks.expect_integer("k", X.int(), 0, 9, tensor=True),
        ValueError,
        r"k: expected a tensor of shape \(\) or \(B,\), got shape \(2, 3, 4\)",
    ),
    "NaN": (lambda: checks.expect_number("t", math.nan), ValueError, "t: expected a finite number, got nan"),
    "infinite": (lambda: checks.expect_number("t", np.float32("inf"), 0), ValueError, "number of at least 0, got inf"),
    "number below": (lambda: checks.expect_number("t", -0.1, 0, 1), ValueError, "of at least 0 and of at most 1, got"),
    "number a string": (lambda: checks.expect_number("t", "1"), TypeError, "t: expected a number, got str; use float"),
    "number a bool": (lambda: checks.expect_number("t", True), TypeError, "t: expected a number, got bool"),
    "number a complex": (lambda: checks.expect_number("t", 1j), TypeError, "t: expected a number, got complex"),
    "number a tensor of ints": (
        lambda: checks.expect_number("t", torch.tensor(1), tensor=True),
        TypeError,
        "t: expected a floating-point tensor, got torch.int64",
    ),
    "choice": (lambda: checks.expect_choice("mode", "c", ("a", "b")), ValueError, "expected one of 'a', 'b', got 'c'"),
    "choice of another type": (lambda: checks.expect_choice("mode", X, ("a", "b")), ValueError, "expected one of 'a'"),
    "no tensor": (lambda: checks.expect_tensor("x", [1], torch.bool), TypeError, "a tensor of torch.bool, got list"),
    "dtype": (
        lambda: checks.expect_tensor("x", X, torch.int32, torch.int64),
        TypeError,
        r"x: expected torch.int32 or torch.int64, got torch.float32; convert it with .to\(torch.int32\)",
    ),
    "dtype with advice": (
        lambda: checks.expect_tensor("x", X, torch.bool, advice="use x > 0"),
        TypeError,
        "; use x > 0",
    ),
    "dimensions": (
        lambda: checks.expect_shape("x", X, "B", "S"),
        ValueError,
        r"x: expected shape \(B, S\), got \(2, 3, 4\)",
    ),
    "size": (lambda: checks.expect_shape("x", X, "B", 3, 5), ValueError, r"\(B, 3, 5\), got \(2, 3, 4\)"),
    "size of a vector": (
        lambda: checks.expect_shape("x", X[0, 0], 3),
        ValueError,
        r"expected shape \(3,\), got \(4,\)",
    ),
    "size with words": (
        lambda: checks.expect_shape("x", X, 1, "S", 4, like="to match q (1, 3, 4)", advice="repeat it"),
        ValueError,
        r"expected shape \(1, S, 4\) to match q \(1, 3, 4\), got \(2, 3, 4\); repeat it",
    ),
    "alternatives": (lambda: checks.expect_shape("x", X, (5, 1), 3, 4), ValueError, r"\(5 or 1, 3, 4\), got \(2, 3,"),
    "leading": (lambda: checks.expect_shape("x", X, ..., 5), ValueError, r"expected shape \(..., 5\), got"),
    "leading of a scalar": (lambda: checks.expect_shape("x", X.sum(), ..., "D"), ValueError, r"\(..., D\), got \(\)"),
    "device": (
        lambda: checks.expect_device("x", X.to("meta"), X.device, "q"),
        ValueError,
        r'x: expected device cpu like q, got meta; move it with .to\("cpu"\)',
    ),
    "strides": (
        lambda: checks.expect_contiguous("x", X.mT),
        ValueError,
        r"x: expected a contiguous last dimension, got strides \(12, 1, 4\); use .contiguous\(\)",
    ),
    "parameter of another batch": (
        lambda: checks.expect_per_sequence("k", torch.zeros(3), 2, X.device),
        ValueError,
        r"k: expected shape \(2,\), got \(3,\)",
    ),
    "parameter elsewhere": (
        lambda: checks.expect_per_sequence("k", torch.zeros((), device="meta"), 2, X.device),
        ValueError,
        "k: expected device cpu, got meta",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_message_says_what_was_expected_and_what_came(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_right_arguments_pass():
    for integer in (3, np.int32(3), np.uint8(3)):
        checks.expect_integer("k", integer, 0, 9)
    for number in (0.5, 1, np.float32(0.5), np.float64(0.5), np.int64(1)):
        checks.expect_number("t", number, 0, 1)
    checks.expect_integer("k", torch.tensor([1, 2]), 0, 1, tensor=True)
    checks.expect_number("t", torch.tensor(7.0), 0, 1, tensor=True)
    checks.expect_choice("mode", "b", ("a", "b"))
    checks.expect_tensor("x", X, torch.float32)
    checks.expect_shape("x", X, (1, 2), "S", 4)
    checks.expect_shape("x", X, ..., 3, 4)
    checks.expect_contiguous("x", X[..., :1].mT[..., :1])
    checks.expect_device("x", X, X.device)
    checks.expect_per_sequence("k", 7, 2, X.device)
    checks.expect_per_sequence("k", torch.zeros(2), 2, X.device)


def test_autocast_casts_floats_but_float64_and_leaves_the_rest():
    given = (X, X.double(), X.int(), None, "text")
    assert all(a is b for a, b in zip(checks.cast_for_autocast(X.device, *given), given))
    with torch.autocast("cpu", torch.bfloat16):
        cast = checks.cast_for_autocast(X.device, *given)
        assert all(a is b for a, b in zip(checks.cast_for_autocast(torch.device("meta"), *given), given))
    assert cast[0].dtype == torch.bfloat16 and all(a is b for a, b in zip(cast[1:], given[1:]))


# ---- symbolic values -------------------------------------------------------------------------------------------------


def validate(x, k, t):
    """Every validator on sizes and numbers that a trace makes symbolic."""
    rows, width = x.shape
    checks.expect_integer("rows", rows, 0, 2**31 - 1)
    checks.expect_integer("k", k, 0, 9)
    checks.expect_number("scale", width**-0.5)
    checks.expect_number("t", t, 0, 1)
    checks.expect_shape("x", x, (rows, 1), width)
    checks.expect_contiguous("x", x)
    return x * t + k


def counting(graphs):
    def backend(module, _):
        graphs.append(module)
        return module.forward

    return backend


@pytest.mark.parametrize("dynamic", [None, True])
def test_values_that_vary_need_a_bounded_number_of_graphs(dynamic):
    torch._dynamo.reset()
    graphs: list[object] = []
    compiled = torch.compile(validate, fullgraph=True, dynamic=dynamic, backend=counting(graphs))
    for i in range(3, 9):
        x = torch.ones(i, i + 3)
        assert torch.equal(compiled(x, i, i / 10), x * (i / 10) + i)
    assert len(graphs) <= 2


def test_bad_traced_numbers_still_raise():
    torch._dynamo.reset()
    compiled = torch.compile(validate, fullgraph=True, backend="eager")
    for k, t in ((2, 0.25), (3, 0.5), (4, 0.75)):
        compiled(X[0], k, t)
    for k, t, message in (
        (-1, 0.5, "k: expected an int from 0"),
        (3, 1.5, "t: expected a fin"),
        (3, math.nan, "got nan"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(X[0], k, t)


def test_export_does_not_narrow_the_sizes_it_serves():
    class Module(torch.nn.Module):
        def forward(self, x):
            return validate(x, 2, 0.5)

    for strict in (True, False):
        shapes = {"x": {0: torch.export.Dim("rows"), 1: torch.export.Dim("width")}}
        program = torch.export.export(Module(), (torch.ones(3, 5),), dynamic_shapes=shapes, strict=strict)
        assert torch.equal(program.module()(torch.ones(7, 2)), torch.full((7, 2), 2.5))


def test_real_symbolic_integers_pass_and_sizes_that_differ_are_named():
    def differ(x, y):
        validate(x, x.shape[0] - 1, 0.5)
        checks.expect_shape("y", y, *x.shape)
        return x + y

    traced = make_fx(differ, tracing_mode="symbolic")(X[0], X[0])
    assert torch.equal(traced(X[1], X[1]), X[1])
    with pytest.raises(ValueError, match="y: expected shape"):
        make_fx(differ, tracing_mode="symbolic")(X[0], X[:, 0])


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_a_size_that_only_data_decide_is_asserted_at_run_time():
    torch._dynamo.reset()

    def rows(count):
        size = count.item()
        checks.expect_integer("count", size, 0, 2**31 - 1)
        checks.expect_shape("x", torch.ones(size), 3)
        return torch.ones(size)

    compiled = torch.compile(rows, fullgraph=True, backend="eager")
    assert compiled(torch.tensor(3)).shape == (3,)
    with pytest.raises(RuntimeError):
        compiled(torch.tensor(4))
