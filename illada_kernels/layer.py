"""Computes what a transformer layer does between its matmuls: RMSNorm, RoPE with the cache's write, SwiGLU.

A pass asks `kernels_for` once and hands the answer to each call, because between two matmuls a look at every tensor
costs more than the arithmetic: the code for it is no longer in the processor's caches.
"""

from .ops.layer import add_rms_norm as add_rms_norm
from .ops.layer import apply_rope as apply_rope
from .ops.layer import kernels_for as kernels_for
from .ops.layer import rms_norm as rms_norm
from .ops.layer import rope_to_cache as rope_to_cache
from .ops.layer import swiglu as swiglu

__all__ = ["add_rms_norm", "apply_rope", "kernels_for", "rms_norm", "rope_to_cache", "swiglu"]
