"""The ops over the ranks of a torch.distributed process group.

masked_loss, unmask    the ranks share the vocab: each holds consecutive rows of the LM head
attention              the ranks share the sequence: each holds its part of the queries and of the keys

Small statistics, and keys and values, cross ranks; logits never do. All ranks make the same calls in the same order.
"""

from ._loss import masked_loss as masked_loss
from ._ring import attention as attention
from ._unmask import unmask as unmask

__all__ = ["attention", "masked_loss", "unmask"]
