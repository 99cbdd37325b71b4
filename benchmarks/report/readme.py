"""Writes the tables of committed results between their markers, headlines in README.md, all rows in docs/measurements:

python -m benchmarks.report.readme
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..run import FILES, RESULTS
from .plot import rows_of

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "measurements").glob("*.md"))]
MARKED = re.compile(r"(<!-- measured: ([a-z_ ]+) -->\n)(?:.*?\n)??(<!-- /measured -->)", flags=re.DOTALL)

# (op, case, dtype) that the README shows, at most a dozen a device: each op's usual case and one that is hard for us.
HEADLINES = {
    ("attention_fwd", "full(2048)", "float32"),
    ("attention_fwd", "block_diffusion(1024, 32)", "float32"),
    ("attention_fwd", "packed(32 of 128)", "bfloat16"),
    ("attention_bwd", "full(2048)", "float32"),
    ("attention_bwd", "block_diffusion(1024, 32)", "float32"),
    ("masked_loss", "half_of_1k_v32k", "float32"),
    ("masked_loss", "few_of_1k_v32k", "float32"),
    ("unmask", "logits_llada_8x32_t1", "float32"),
    ("unmask", "hidden_llada_8x32_t0", "float32"),
    ("generate", "tiny iLLaDA, 4 x (96 + 32), block 16, cache none", "float32"),
    ("generate", "tiny iLLaDA, 4 x (96 + 32), block 16, cache dual", "float32"),
    ("train", "block 4, batch 2 x 512, demo shape, 3 layers of 128", "float32"),
    ("attention_fwd", "full_16k_kv8", "bfloat16"),
    ("attention_fwd", "block_diffusion_4k_b32_kv8", "bfloat16"),
    ("attention_fwd", "cached_16k_q32_b16_kv8", "bfloat16"),
    ("attention_bwd", "full_8k_kv8 backward", "bfloat16"),
    ("attention_bwd", "block_diffusion_4k_b32_kv8 backward", "bfloat16"),
    ("masked_loss", "half_v126k", "bfloat16"),
    ("masked_loss", "half_v126k_minimum", "bfloat16"),
    ("unmask", "entropy_1x32_v126k_t1", "bfloat16"),
    ("unmask", "hidden_8x32_v126k_t0", "bfloat16"),
    ("unmask", "hidden_64x32_v126k_t1", "bfloat16"),
    ("generate", "iLLaDA-8B, 1 x (512 + 64), block 32, cache dual", "bfloat16"),
    ("train", "block 32, batch 2 x 4096, iLLaDA-8B shape, 8 layers of 2048", "bfloat16"),
}


def table(
    results: Path = RESULTS, ops: Collection[str] = FILES, only: Collection[tuple[str, str, str]] | None = None
) -> str:
    """Returns one table a device. `only`: these (op, case, dtype) of the GPUs and the first processor; else the rows
    that their suite does not mark as minor."""
    parts = []
    folders = sorted(path for path in results.iterdir() if path.is_dir())
    if only is not None:
        folders = [path for path in folders if not path.name.startswith("cpu-")] + [
            path for path in folders if path.name.startswith("cpu-")
        ][:1]
    for folder in folders:
        every = [row for row in rows_of(folder, absent=True) if row["op"] in ops]
        rows = [row for row in every if row.get("facts", {}).get("headline", True)]
        if only is not None:
            rows = [row for row in every if (row["op"], row["case"], row["dtype"]) in only]
        if not rows:
            continue
        parts += [
            f"{rows[0]['device']}, torch {rows[0]['versions']['torch']} (`benchmarks/results/{folder.name}/`)",
            "",
            "| op | case | dtype | ours, ms | fastest peer, ms | times faster | share of floor | memory, MiB |",
            "|---|---|---|---:|---:|---:|---:|---:|",
            *map(table_row, rows),
            "",
        ]
        if only is None and len(rows) < len(every):
            parts += [f"{len(every) - len(rows)} more cases are in `benchmarks/results/{folder.name}/`.", ""]
    return "\n".join(parts).strip()


def table_row(row: dict[str, Any]) -> str:
    peer, ratio = "none", ""
    if row["best_peer"]:
        peer = f"{row['best_peer']} {digits(row['peers'][row['best_peer']])}"
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
    head = f"| {row['op']} | {row['case']} | {row['dtype']} |"
    if row["backend"] is None:
        return f"{head} absent | {peer} | | | |"
    named = f" ({row['backend']})" if "facts" in row else ""  # on a GPU there are several
    return (
        f"{head} {digits(row['ms']['p50'])}{named} | {peer} | {ratio} "
        f"| {row['floor_ratio']:.2f} | {row['peak_memory'] / 2**20:.1f} |"
    )


def digits(value: float) -> str:
    """Returns three significant digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def updated(text: str, results: Path = RESULTS) -> str:
    """Replaces what stands between `<!-- measured: OPS or headlines -->` and `<!-- /measured -->`."""

    def fill(match: re.Match[str]) -> str:
        begin, names, end = match.groups()
        chosen = table(results, only=HEADLINES) if names == "headlines" else table(results, names.split())
        return f"{begin}{chosen}\n{end}"

    return MARKED.sub(fill, text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(updated(page.read_text()))
