"""A room per op: what the operations are, and in which folder each lives. Importing this does not import torch."""

# public function, or module of functions that share their kernels -> its room
OPS = {
    "attention": "attention",
    "masked_loss": "masked_loss",
    "masked_loss_from_logits": "masked_loss",
    "unmask": "unmask",
    "unmask_from_logits": "unmask",
    "layer": "layer",
}
