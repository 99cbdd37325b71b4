"""Objectives: each corrupts clean tokens x (B, S) and returns an `Example`, with a weight for every scored token.

The loss is the same for all, loss = sum over masked i of weight_i * CE(hidden_i @ head.T, x_i). The denominator is in
the weights and counts the whole batch, otherwise gradients would depend on how masks fall and on how a batch is split
(`Example.split`). Random numbers come from the given CPU generator, so a batch is the same on every device.

sequence.py      every token sees every other: LLaDA, MDLM, Dream, iLLaDA's packed windows, fine-tuning
blocks.py        block diffusion on [noisy ; clean]: BD3-LM, SDAR, LLaDA2.0; orders that leave holes to the end
joint.py         two losses in one pass (Nemotron-Labs-Diffusion, I-DLM), block drafters (DFlash)
edits.py         noise that is not a mask: Seed Diffusion's edits, LLaDA2.1's replaced tokens, a uniform canvas
trajectories.py  states of a sampler, recorded: Seed Diffusion's constrained order, distillation towards fewer passes
"""

from .blocks import block_diffusion, hole_order, previous_rows
from .edits import edit, seed_diffusion, token_to_token, uniform_canvas
from .example import Example
from .joint import anchor_blocks, joint
from .noise import cart_weight, mask_count, mask_independently, stratified
from .sequence import WEIGHTINGS, full_sequence, packed, sft, split_windows
from .trajectories import SCORED, block_trajectory, trajectory

__all__ = [
    "SCORED",
    "WEIGHTINGS",
    "Example",
    "anchor_blocks",
    "block_diffusion",
    "block_trajectory",
    "cart_weight",
    "edit",
    "full_sequence",
    "hole_order",
    "joint",
    "mask_count",
    "mask_independently",
    "packed",
    "previous_rows",
    "seed_diffusion",
    "sft",
    "split_windows",
    "stratified",
    "token_to_token",
    "trajectory",
    "uniform_canvas",
]
