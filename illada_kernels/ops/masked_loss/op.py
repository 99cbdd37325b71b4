"""masked_loss and masked_loss_from_logits as one torch operator, with its derivative, and the order in which its
backends are tried."""

from collections.abc import Sequence

from torch import Tensor

from ..._dispatch import backends
from ..._torch_ops import Derivative, Operator
from .jvp import jvp
from .problem import Problem

BACKENDS = backends(__package__)


def _fake(problem: Problem) -> tuple[Tensor, ...]:
    return problem.empty_loss(), *OPERATOR.choose(problem).module().kept(problem)


def _flops(problem: Problem, needs: Sequence[bool] | None) -> int:
    """Returns those of as many rows as may be masked, because how many are lies on the device: a product forward, and
    one for each gradient of hidden and head_weight. Nothing that a memory mode computes again."""
    if problem.head_weight is None:
        return 0
    product = 2 * problem.capacity * problem.head_weight.numel()
    return product if needs is None else product * (needs[0] + needs[1])


OPERATOR = Operator(
    "masked_loss",
    Problem,
    BACKENDS,
    _fake,
    outputs=4,  # the loss, and what the backend keeps for its backward
    flops=_flops,
    derivative=Derivative(of=("hidden", "head_weight", "head_bias"), upstream=1, saves=(1, 2, 3), jvp=jvp),
)
