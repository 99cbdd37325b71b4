"""unmask: one parallel decoding step, which proposes, ranks, commits and revises tokens. api.py is the door."""

from .api import Unmasked as Unmasked
from .api import unmask as unmask
from .api import unmask_from_logits as unmask_from_logits
from .op import BACKENDS as BACKENDS
