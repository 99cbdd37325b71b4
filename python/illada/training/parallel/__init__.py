"""Training over several ranks: FSDP2, tensor parallel by DTensor, context parallel by ring attention.

    rank = (data index * context + context index) * tensor + tensor index

Weights are sharded over the data * context ranks (FSDP2), and each of those has one part of every matmul's heads, of
its ffn columns and of the vocab on each tensor rank. Sequences of a batch go to the data indices, the rows of a
sequence to the context indices. q, k and v, and gate and up, have weights of their own here, so that a shard of each
is a tensor of its own: then a checkpoint means the same on any number of ranks.
"""
