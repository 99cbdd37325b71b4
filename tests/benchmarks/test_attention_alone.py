"""benchmarks/quality/attention_alone.py: it calls what the op calls, and prints a cell for each."""

from __future__ import annotations

import pytest
import torch

from benchmarks import measure
from benchmarks.quality import attention_alone
from illada_kernels import _extension
from illada_kernels.ops.attention import cases, cpu

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason="no extension")
SMALL = cases.Case("small", 2, 24, 40, 4, 2, 16, lambda case, device: cases.KeyRanges.causal(24, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_are_those_of_the_op(dtype, monkeypatch):
    """Argument by argument, but for addresses: then they cost what the op's cost."""
    made = []

    class Recorded:
        def __getattr__(self, name):
            return lambda *arguments: made.append((name, arguments)) or getattr(_extension.native(), name)(*arguments)

    monkeypatch.setattr(cpu, "native", Recorded)
    monkeypatch.setattr(attention_alone, "native", Recorded)
    q, k, v, dout = SMALL.inputs(dtype, "cpu")
    problem = cpu.Problem(q, k, v, SMALL.key_ranges("cpu").bounds, 0.25)
    out, lse = cpu.forward(problem)
    cpu.backward(problem, dout, None, out, lse)
    wanted, made[:] = list(made), []
    runs = attention_alone.entries(SMALL, dtype, 0)
    made.clear()
    runs["forward"]()
    runs["backward"]()
    for (name, ours), (theirs_name, theirs) in zip(made, wanted, strict=True):
        assert name == theirs_name and len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert (a is None) == (b is None) and (a == b or min(a, b) > 2**20)  # what differs is an address


def test_every_cell_is_a_time_and_a_rate(capsys, monkeypatch):
    monkeypatch.setattr(attention_alone, "SHAPES", (SMALL,))
    monkeypatch.setattr(measure, "sample", lambda job, calls, device: job() or 0.5)
    assert attention_alone.main(["--rounds", "3"]) == 0
    head, _, row = capsys.readouterr().out.splitlines()
    assert head.count("float") == 4 and row.startswith("| small | 0.5 ms, ") and row.count("0.5 ms") == 4
    pairs = 2 * sum(range(17, 41))  # the first query sees 17 keys
    rate = 4 * pairs * 4 * 16 / 0.5e-3 / 1e9
    assert f"0.5 ms, {rate:.3g} |" in row and f"0.5 ms, {2.5 * rate:.3g} |" in row


def test_what_cannot_be_measured_is_named(capsys):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for arguments, message in (
            (["--case", "zz"], "expected --case of full"),
            (["--clock", "processor"], "one thread"),
        ):
            with pytest.raises(SystemExit):
                attention_alone.main(arguments)
            assert message in capsys.readouterr().err
    finally:
        torch.set_num_threads(threads)
