"""unmask as a torch operator, and the order in which its backends are tried."""

from ..._dispatch import backends
from ..._torch_ops import Operator
from .problem import Problem

BACKENDS = backends(__package__)

OPERATOR = Operator("unmask", Problem, BACKENDS, Problem.new_outputs, outputs=4, mutates=("tokens",))
