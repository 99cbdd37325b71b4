"""Draws every mask of docs/concepts/key_ranges.md from KeyRanges.dense() into docs/figures: python docs/figures.py

A test draws them again and compares, so the pictures are what the constructors do.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from illada_kernels import KeyRanges

FOLDER = Path(__file__).parent / "figures"
CELL, MARGIN = 14, 22
STYLE = "text{font:11px sans-serif;fill:#808080}path{stroke:#80808080}.first{fill:#3f6fd8}.second{fill:#d8803f}"


def masks() -> dict[str, KeyRanges]:
    documents = torch.tensor([0, 5, 8, 16])
    return {
        "full": KeyRanges.full(16),
        "padding_right": KeyRanges.padding(torch.tensor([11]), 16),
        "padding_left": KeyRanges.padding(torch.tensor([11]), 16, side="left"),
        "packed": KeyRanges.packed(documents, 16),
        "causal": KeyRanges.causal(16),
        "window": KeyRanges.window(16, 3, 2),
        "block_causal": KeyRanges.block_causal(16, 4),
        "block_causal_boundaries": KeyRanges.block_causal(16, documents),
        "block_diffusion": KeyRanges.block_diffusion(8, 2),
        "block_diffusion_documents": KeyRanges.block_diffusion(8, 2, torch.tensor([0, 5, 8])),
        "block_diffusion_clean": KeyRanges.block_diffusion(8, 2, causal="clean"),
        "block_diffusion_both": KeyRanges.block_diffusion(8, 2, causal="both"),
        "anchor_blocks": KeyRanges.anchor_blocks(torch.tensor([2, 5, 6]), 7, 3),
        "causal_cache": KeyRanges.causal(4, 16),
        "cached": KeyRanges.cached(torch.tensor([12]), 4, 16),
        "cached_blocks": KeyRanges.cached(torch.tensor([12]), 4, 16, block=2),
        "cached_window": KeyRanges.cached(torch.tensor([12]), 4, 16, block=1, left=5),
        "intersection": KeyRanges.window(16, 5, 5) & KeyRanges.packed(documents, 16),
    }


def svg(ranges: KeyRanges, rows: int, order: str = "") -> str:
    """Queries run down, keys to the right; what batch entry 0 may attend is coloured, blue the first run of a row.

    `order` says what lies on both axes, beside their names.
    """
    mask = ranges.dense()[0].expand(rows, -1)  # (rows, num_keys)
    num_keys = mask.shape[1]
    right, bottom = MARGIN + CELL * num_keys, MARGIN + CELL * rows
    bars = []
    for i in range(rows):
        for kind, (start, end) in zip(("first", "second"), runs(mask[i])):
            x, y = MARGIN + CELL * start, MARGIN + CELL * i
            bars.append(f'<rect class="{kind}" x="{x}" y="{y}" width="{CELL * (end - start)}" height="{CELL}"/>')
    columns = "".join(f"M{MARGIN + CELL * j} {MARGIN}V{bottom}" for j in range(num_keys + 1))
    lines = "".join(f"M{MARGIN} {MARGIN + CELL * i}H{right}" for i in range(rows + 1))
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{right + 1}" height="{bottom + 1}">',
            f"<style>{STYLE}</style>",
            f'<text x="{MARGIN}" y="{MARGIN - 8}">keys{order}</text>',
            f'<text text-anchor="end" transform="translate({MARGIN - 8},{MARGIN}) rotate(-90)">queries{order}</text>',
            *bars,
            f'<path d="{columns}{lines}"/>',
            "</svg>\n",
        ]
    )


def runs(row: Tensor) -> list[tuple[int, int]]:
    """Start and end of each run of True."""
    padded = [False, *row.tolist(), False]
    edges = [i for i in range(len(row) + 1) if padded[i] != padded[i + 1]]
    return list(zip(edges[::2], edges[1::2]))


def figures() -> dict[str, str]:
    """File name -> text. A mask that is the same for all queries is drawn with as many as keys; cached with 4."""

    def rows(name: str, ranges: KeyRanges) -> int:
        return 4 if name == "cached" else max(ranges.bounds.shape[1], ranges.num_keys)

    def order(name: str) -> str:
        return ": noisy, then clean" if name.startswith("block_diffusion") else ""

    return {f"{name}.svg": svg(ranges, rows(name, ranges), order(name)) for name, ranges in masks().items()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, text in figures().items():
        (FOLDER / name).write_text(text)
