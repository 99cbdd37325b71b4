"""attention: bidirectional flash attention under masks of at most two key ranges a query. api.py is the door."""

from .api import attention as attention
from .op import BACKENDS as BACKENDS
from .sdpa import scaled_dot_product_attention as scaled_dot_product_attention
