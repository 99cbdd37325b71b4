"""masked_loss and masked_loss_from_logits as one torch operator, with its derivative, and the order in which its
backends are tried."""

from torch import Tensor

from ..._dispatch import backends
from ..._torch_ops import Derivative, Operator
from .jvp import jvp
from .problem import Problem

BACKENDS = backends(__package__)


def _fake(problem: Problem) -> tuple[Tensor, ...]:
    return problem.empty_loss(), *OPERATOR.choose(problem).module().kept(problem)


OPERATOR = Operator(
    "masked_loss",
    Problem,
    BACKENDS,
    _fake,
    outputs=4,  # the loss, and what the backend keeps for its backward
    derivative=Derivative(of=("hidden", "head_weight", "head_bias"), upstream=1, saves=(1, 2, 3), jvp=jvp),
)
