"""unmask as a torch operator, and the order in which its backends are tried."""

from collections.abc import Sequence

from ..._dispatch import backends
from ..._torch_ops import Operator
from .problem import Problem

BACKENDS = backends(__package__)


def _flops(problem: Problem, needs: Sequence[bool] | None) -> int:
    """Returns those of the product of all candidate rows with the head."""
    batch, count, dim = problem.source.shape
    return 0 if problem.head_weight is None else 2 * batch * count * dim * problem.vocab


OPERATOR = Operator("unmask", Problem, BACKENDS, Problem.new_outputs, outputs=4, flops=_flops, mutates=("tokens",))
