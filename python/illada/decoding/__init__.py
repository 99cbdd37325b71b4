"""Decoding: `generate` continues prompts, `fill` and `fill_hole` replace masks in the middle of a text."""
