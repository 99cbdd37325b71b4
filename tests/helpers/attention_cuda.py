"""CUDA kernels of attention's backward with faults in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from tests.cuda_on_cpu.library import Kernels, compile_kernels, switchable, with_headers

HEADERS = (
    "attention_bwd_keys_sm90a.cuh",
    "attention_bwd_sm90a.cuh",
    "attention_tile_sm90a.cuh",
    "attention_bwd_workspace.cuh",
    "key_ranges.cuh",
)


def with_faults(source: str, dim: int, faults: Iterable[Sequence[str]]) -> Kernels:
    """The kernel with its headers and all faults, for one dtype and head_dim: a second to compile, not ten."""
    text = re.sub(rf"      case (?!{dim}:).*\n", "", with_headers(source, HEADERS))
    text = re.sub(r"  if \(dtype == fp16_code\).*\n", "", text)
    return compile_kernels(source, text=switchable(text, [edits[:2] for edits in faults]))
