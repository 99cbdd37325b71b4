"""What threads may not change: bits under torch.set_flush_denormal, and that a call ends, in a child of fork too."""

from __future__ import annotations

from typing import Any

import pytest

from illada_kernels import _extension
from tests.helpers.instruction_sets import run_under_each

pytestmark = pytest.mark.skipif(_extension.extension_reason() is not None, reason="the compiled extension is missing")

CALLS = """
import os, signal, sys, time
import torch
from illada_kernels import TopK, attention, masked_loss_from_logits, unmask_from_logits

g = torch.Generator().manual_seed(0)
q, k, dout = (torch.randn(1, rows, 4, 16, generator=g) for rows in (100, 256, 100))
v = torch.randn(1, 256, 4, 16, generator=g) * 1e-39  # subnormal, and so are out and dq
logits = torch.rand(3, 40, 250, generator=g) * 100  # some probabilities are subnormal
targets, masked = torch.randint(250, (3, 40), generator=g), torch.rand(3, 40, generator=g) < 0.7
weight = torch.full((3, 40), 1e-36)  # the loss is not subnormal, most of its gradient is
positions = torch.arange(40).expand(3, 40)

def attended():
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attention(*leaves, return_lse=True, backend="cpu")
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, dout)]

def lost(function, *inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = function(*leaves, targets, masked, weight, backend="cpu")
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]

def unmasked(function, *inputs):
    tokens = torch.full((3, 40), 249)
    options = {"mask_id": 249, "temperature": 1e4, "seed": 3, "backend": "cpu"}
    return [tokens, *function(*inputs, tokens, positions, TopK(5), **options)]

kernels = {
    "attention": attended,
    "masked_loss_from_logits": lambda: lost(masked_loss_from_logits, logits),
    "unmask_from_logits": lambda: unmasked(unmask_from_logits, logits),
}
"""

FLUSH = """
def bits(results):
    return [x.view(torch.int32) if x.dtype == torch.float32 else x for x in results]

def subnormals(results):
    return sum(int(((x != 0) & (x.abs() < 2.0**-126)).sum()) for x in results if x.dtype == torch.float32)

if {early}:  # OpenMP's threads then inherit it
    torch.set_flush_denormal(True)
    torch.set_num_threads(4)
    for call in kernels.values(): call()
    torch.set_flush_denormal(False)
torch.set_num_threads(1)
for name, call in kernels.items():
    right = call()
    assert subnormals(right) > 5, name
    for threads in (1, 2, 4) * 3:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(threads != 2)
        results = call()
        flushed = torch.tensor([1e-39]) * 1 == 0
        torch.set_flush_denormal(False)
        assert bool(flushed) == (threads != 2)  # what the caller had is his again
        assert all(map(torch.equal, bits(results), bits(right))), (name, threads)
"""

# smaller than what torch's own operations would use threads for, and so hang in the child
FORK = """
torch.set_num_threads(2)
right = {name: call() for name, call in kernels.items()}
for threads in (2, 1):
    if (child := os.fork()) == 0:
        os.setsid()
        torch.set_num_threads(threads)
        grandchild = os.fork()
        same = all(all(map(torch.equal, call(), right[name])) for name, call in kernels.items())
        if grandchild: same = same and os.waitpid(grandchild, 0)[1] == 0
        os._exit(0 if same else 1)
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            sys.exit("the child hangs")
        time.sleep(0.01)
    assert ended[1] == 0, ended
assert all(all(map(torch.equal, call(), right[name])) for name, call in kernels.items())
print("ended")
"""


def run(python: Any, script: str, **env: str) -> str:
    done = python("-c", CALLS + script, **env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_flush_denormal_changes_no_bit_where_threads_begin_flushing(python):
    assert run(python, FLUSH.format(early=True) + 'print("same")') == "same"


def test_every_instruction_set_keeps_subnormals(python):
    run_under_each(python, CALLS + FLUSH.format(early=False))


def test_a_child_of_fork_computes_the_same_after_its_parent_used_threads(python):
    assert run(python, FORK) == "ended"
