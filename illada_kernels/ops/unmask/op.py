# No `from __future__ import annotations` here: torch.library reads the operator's schema from real type hints.
"""The torch operator of unmask, the one record that all backends take, and the order of the backends."""

import dataclasses
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ... import _dispatch
from ..._gpu import UNRUN, triton_reason
from ..._torch_ops import TorchOp

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
# A tensor may hold an infinite one: beyond this its reciprocal is no normal float32, and times -inf it would be NaN.
HIGHEST_CONFIDENCE_TEMPERATURE = 2.0**126


@dataclasses.dataclass(frozen=True)
class Step:
    """One call, validated. A parameter is its tensor, or where that is None its number. Field order is the
    operator's."""

    source: Tensor  # (B, K, D) hidden rows, or (B, K, V) logits where head_weight is None
    head_weight: Tensor | None  # (V, D)
    head_bias: Tensor | None  # (V,)
    tokens: Tensor  # (B, L) int64, written in place
    positions: Tensor  # (B, K) int64
    mask_id: int
    confidence: str
    rule: int  # a kind of rules.py
    rule_number: float
    rule_tensor: Tensor | None
    temperature: float
    temperature_tensor: Tensor | None
    confidence_temperature: float
    confidence_temperature_tensor: Tensor | None
    seed: int
    seed_tensor: Tensor | None
    step: int
    step_tensor: Tensor | None
    forbid: Sequence[int]
    bias_ids: Tensor | None
    bias_values: Tensor | None
    revise: int  # a kind of rules.py
    revise_number: float
    revise_tensor: Tensor | None
    revise_scores: Tensor | None
    frozen: Tensor | None  # (B, L) bool
    noise_positions: Tensor | None  # (B, K) int64

    @property
    def vocabulary(self) -> int:
        return self.source.shape[2] if self.head_weight is None else self.head_weight.shape[0]

    def per_sequence(self, tensor: Tensor | None, number: float, dtype: torch.dtype) -> Tensor:
        """The parameter as a (1, 1) or (B, 1) tensor; the same roundings as the kernels'."""
        if tensor is not None:
            return tensor.to(dtype).reshape(-1, 1)
        exact = number if dtype.is_floating_point else int(number)
        return torch.full((1, 1), exact, dtype=dtype, device=self.tokens.device)

    def seeds(self) -> Tensor:
        """(B, 1) int64: a single seed s means s + b for sequence b."""
        if self.seed_tensor is not None and self.seed_tensor.ndim == 1:
            return self.seed_tensor.to(torch.int64).reshape(-1, 1)
        first = self.per_sequence(self.seed_tensor, 0, torch.int64) if self.seed_tensor is not None else self.seed
        return torch.arange(self.tokens.shape[0], device=self.tokens.device).reshape(-1, 1) + first

    def nothing(self) -> Outputs:
        """The outputs of a call in which no candidate takes part."""
        shape, device = self.positions.shape, self.positions.device
        return (
            torch.full(shape, -1, dtype=torch.int64, device=device),
            torch.full(shape, -torch.inf, dtype=torch.float32, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
            torch.zeros(shape[:1], dtype=torch.int32, device=device),
        )


# ---- backends ----------------------------------------------------------------------------------------------------
def _cpu_available() -> str | None:
    module, reason = _dispatch.extension()
    if module is not None and not hasattr(module, "unmask_rows_cpu"):
        return _dispatch.STALE
    return reason


def _cpu_supports(step: Step) -> str | None:
    if step.source.dtype == torch.float64:
        return "float64 is for the reference"
    return None


def _module(backend: str) -> ModuleType:
    return importlib.import_module(f".{backend}", __package__)


def _lazy(backend: str) -> _dispatch.Backend:
    """A GPU backend, whose module is imported when it is first asked."""
    available, supports = lambda: _module(backend).available(), lambda step: _module(backend).supports(step)
    return _dispatch.Backend(backend, ("cuda",), available, supports, opt_in=UNRUN)


BACKENDS = (
    _lazy("cuda"),
    _dispatch.Backend("triton", ("cuda",), triton_reason, lambda step: _module("triton").supports(step), opt_in=UNRUN),
    _dispatch.Backend("cpu", ("cpu",), _cpu_available, _cpu_supports),
    _dispatch.Backend("reference", None, lambda: None, lambda step: None),
)


def _run(step: Step, backend: str) -> Outputs:
    op = "unmask" if step.head_weight is not None else "unmask_from_logits"  # the selftest lets each in by itself
    chosen = _dispatch.choose(op, BACKENDS, step.tokens.device.type, step, backend or None)
    outputs: Outputs = _module("native" if chosen == "cpu" else chosen).unmask(step)
    return outputs


# ---- the operator: Step's fields, then the backend's name ("" for the default) -----------------------------------
def _forward(
    source: Tensor,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    tokens: Tensor,
    positions: Tensor,
    mask_id: int,
    confidence: str,
    rule: int,
    rule_number: float,
    rule_tensor: Tensor | None,
    temperature: float,
    temperature_tensor: Tensor | None,
    confidence_temperature: float,
    confidence_temperature_tensor: Tensor | None,
    seed: int,
    seed_tensor: Tensor | None,
    step: int,
    step_tensor: Tensor | None,
    forbid: Sequence[int],
    bias_ids: Tensor | None,
    bias_values: Tensor | None,
    revise: int,
    revise_number: float,
    revise_tensor: Tensor | None,
    revise_scores: Tensor | None,
    frozen: Tensor | None,
    noise_positions: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = dict(locals())
    del arguments["backend"]
    return _run(Step(**arguments), backend)


def _fake(
    source: Tensor, head_weight: Tensor | None, head_bias: Tensor | None, tokens: Tensor, positions: Tensor, *_: object
) -> Outputs:
    shape = positions.shape
    return (
        positions.new_empty(shape),
        positions.new_empty(shape, dtype=torch.float32),
        positions.new_empty(shape, dtype=torch.bool),
        positions.new_empty(shape[:1], dtype=torch.int32),
    )


UNMASK = TorchOp("unmask", _forward, _fake, mutates=("tokens",))
