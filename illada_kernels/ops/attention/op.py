"""attention as a torch operator, with its derivative, and the order in which its backends are tried."""

import torch
from torch import Tensor

from ..._dispatch import backends
from ..._torch_ops import Derivative, Operator
from .jvp import jvp
from .problem import Problem

BACKENDS = backends(__package__)


def _fake(problem: Problem) -> tuple[Tensor, Tensor]:
    q, v = problem.q, problem.v
    batch, queries, heads, _ = q.shape
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(batch, queries, heads, v.shape[3]), q.new_empty(batch, heads, queries, dtype=lse_dtype)


OPERATOR = Operator(
    "attention",
    Problem,
    BACKENDS,
    _fake,
    outputs=2,  # out, lse
    derivative=Derivative(of=("q", "k", "v"), upstream=2, saves=(0, 1), jvp=jvp),
    folds=("bounds",),
)
