"""layer: RMSNorm with the residual, RoPE with the cache's write, and SwiGLU. api.py is the door."""

from .api import BACKENDS as BACKENDS
from .api import add_rms_norm as add_rms_norm
from .api import apply_rope as apply_rope
from .api import kernels_for as kernels_for
from .api import rms_norm as rms_norm
from .api import rope_to_cache as rope_to_cache
from .api import swiglu as swiglu
