"""attention as a torch operator, with its derivative, and the order in which its backends are tried."""

from collections.abc import Sequence

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


def _flops(problem: Problem, needs: Sequence[bool] | None) -> int:
    """Returns those of all pairs, as torch counts SDPA's: which are allowed lies on the device.

    Two products forward. Backward the scores and dp again, then one product for dq and dk each, one for dv.
    """
    batch, queries, keys, heads, _, dim, dim_v = problem.sizes()
    pairs = 2 * batch * heads * queries * keys
    if needs is None:
        return pairs * (dim + dim_v)
    return pairs * (dim + dim_v + dim * (needs[0] + needs[1]) + dim_v * needs[2])


OPERATOR = Operator(
    "attention",
    Problem,
    BACKENDS,
    _fake,
    outputs=2,  # out, lse
    flops=_flops,
    derivative=Derivative(of=("q", "k", "v"), upstream=2, saves=(0, 1), jvp=jvp),
    folds=("bounds",),
)
