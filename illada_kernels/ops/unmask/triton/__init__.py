"""unmask in Triton: which calls it takes, and the way to the kernels.

launch.py has the host's side; head.py or rows.py make partials (partials.py), select.py merges them into proposals
(proposals.py), ranks these (ranks.py) and writes; noise.py is what all call. What truncation keeps, bounds.py finds
before rows.py draws, and draw.py after head.py, where it draws too. They are imported at the first call: this module
does without Triton.
"""

from __future__ import annotations

from ...._extension import DTYPES
from ...._gpu import triton_reason
from ..problem import Outputs, Problem


def available() -> str | None:
    return triton_reason()


def supports(problem: Problem) -> str | None:
    if problem.group:
        return "ranks that share the vocab run on the reference"
    return None if problem.source.dtype in DTYPES else "float64 is for the reference"


def forward(problem: Problem) -> Outputs:
    """Returns (proposal, confidence, committed, remaining); writes into problem.tokens.

    Memory: up to 32 bytes per row and group of ids. The fused head has a scratch of 512 bytes for each row and group,
    or where top_k or min_p truncates, 4.5 bytes for each row and id; rows are rounded up to 16, 32, 64 or 128. More
    rows, and top_p, take what gpu.head_products needs."""
    from . import launch

    return launch.forward(problem)
