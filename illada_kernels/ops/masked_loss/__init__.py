"""masked_loss: cross-entropy on masked tokens only, fused with the LM head. api.py is the door."""

from .api import masked_loss as masked_loss
from .api import masked_loss_from_logits as masked_loss_from_logits
from .op import BACKENDS as BACKENDS
