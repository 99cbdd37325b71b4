"""Attention's CUDA kernels with one instance alone, which takes a second to compile and not ten, and with faults."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tests.cuda_on_cpu.library import Kernels, compile_kernels, switchable, with_headers

FORWARD = "csrc/cuda/attention_fwd_bf16_sm90a.cu"
FORWARD_HEADERS = ("attention_fwd_sm90a.cuh", "attention_fwd_plan_sm90a.cuh")
HEADERS = (
    "attention_bwd_keys_sm90a.cuh",
    "attention_bwd_sm90a.cuh",
    "attention_tile_sm90a.cuh",
    "attention_bwd_workspace.cuh",
    "key_ranges.cuh",
)


def forward(dim: int) -> str:
    """The forward's text with its headers, in bf16 at one head_dim."""
    return with_headers(FORWARD, FORWARD_HEADERS).replace("run_any<bf16>)", f"(run<bf16, {dim}>))")


def backward(source: str, dim: int) -> str:
    """The text of a kernel of the backward with its headers, in bf16 at one head_dim."""
    text = re.sub(rf"      case (?!{dim}:).*\n", "", with_headers(source, HEADERS))
    return re.sub(r"  if \(dtype == fp16_code\).*\n", "", text)


def with_faults(source: str, dim: int, faults: Iterable[Sequence[str]]) -> Kernels:
    """The kernel of the backward with all faults."""
    return compile_kernels(source, text=switchable(backward(source, dim), [edits[:2] for edits in faults]))
