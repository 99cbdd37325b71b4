"""Writes the floors and predictions of the GPU cases into docs/measurements/first_gpu_run.md, between its markers:

    python -m benchmarks.report.predictions

A floor is the larger of flops over the matmul rate and bytes over the copy rate, both as such a card has shown
them, not as its datasheet says. Predictions were made before anything ran, from the reasons given on that page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import run
from ..floor import floor_ms as least_ms

PAGE = Path(__file__).parents[2] / "docs" / "measurements" / "first_gpu_run.md"
BEGIN, END = "<!-- floors: written by python -m benchmarks.report.predictions -->", "<!-- /floors -->"
RATES = {"gemm": 780e12, "copy": 4.3e12}  # H200: an 8192-cubed bfloat16 product of random matrices, a large copy
Range = tuple[float, float]

# Attention: TFLOP/s of attended pairs at 8192 tokens, by head_dim; what shorter sequences and masks leave of that.
FORWARD: dict[str, dict[int, Range]] = {
    "cuda": {64: (430, 520), 96: (560, 640), 128: (620, 690), 256: (560, 640)},
    "triton": {128: (440, 530)},
}
BACKWARD: dict[str, dict[int, Range]] = {"cuda": {128: (440, 470)}, "triton": {128: (280, 400)}}
LEFT_AT_LENGTH = {1024: 0.85, 2048: 0.93, 4096: 0.97}
LEFT_UNDER_MASK = {"block_diffusion": 0.9, "packed": 0.83}
CACHED_MS = (
    0.005,
    0.007,
)  # launches, a block's start and end, combining: beside the floor at 0.87-0.95 of the copy rate
CACHED_SHARE = (0.87, 0.95)
# Others: the time over the floor.
LOSS = {"three products": (1.04, 1.08), "one product": (1.04, 1.1), "minimum": (1.38, 1.5)}
UNMASK: dict[str, Range] = {"entropy": (1.08, 1.2), "step 0": (1.05, 1.15), "step 1": (1.1, 1.3), "loop": (1.1, 1.25)}
ONE_WAVE: Range = (1.12, 1.35)  # 129 to 512 rows: a product is one wave of tiles, and the next waits for its end


def floor_ms(facts: dict[str, Any]) -> float:
    return least_ms(facts["flops"], facts["bytes"], RATES)


def bound(facts: dict[str, Any]) -> str:
    return "matmul" if facts["flops"] / RATES["gemm"] > facts["bytes"] / RATES["copy"] else "memory"


def digits(ms: float) -> str:
    return f"{ms:.3g}"


def between(values: Iterable[float]) -> str:
    low, high = sorted(values)
    return f"{digits(low)}-{digits(high)}"


def attention_prediction(facts: dict[str, Any], backend: str) -> str:
    if facts["kind"] == "cached":
        if backend != "cuda":
            return ""
        shares = CACHED_SHARE if bound(facts) == "memory" else [1e12 * r / RATES["gemm"] for r in FORWARD["cuda"][128]]
        return between(floor_ms(facts) / share + ms for share, ms in zip(reversed(shares), CACHED_MS))
    rates = {"forward": FORWARD, "backward": BACKWARD}[facts["direction"]][backend].get(facts["head_dim"])
    if rates is None:
        return ""
    left = LEFT_UNDER_MASK.get(facts["kind"], LEFT_AT_LENGTH.get(facts["length"], 1.0))
    return between(facts["flops"] * 1e-9 / (rate * left) for rate in rates)


def attention(named: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| attention | bound by | forward, ms | cuda | triton | backward alone, ms | cuda | triton |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    found: dict[tuple[str, ...], list[str]] = {}
    for name, facts in named.items():
        if facts["direction"] != "forward":
            continue
        cells = [name, bound(facts), digits(floor_ms(facts))]
        cells += [attention_prediction(facts, backend) for backend in ("cuda", "triton")]
        back = named.get(f"{name} backward")
        cells += [digits(floor_ms(back))] if back else [""]
        cells += [attention_prediction(back, backend) if back else "" for backend in ("cuda", "triton")]
        found.setdefault((name.split("_kv")[0], *cells[1:]), []).append(name)
    for (_, *cells), names in found.items():  # often the same with 8 and with 32 key heads
        lines.append(f"| {', '.join([names[0], *(name.split('_')[-1] for name in names[1:])])} | {' | '.join(cells)} |")
    return lines


def loss(named: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| masked_loss | matmuls | floor, ms | cuda, triton |", "|---|---:|---:|---:|"]
    for name, facts in named.items():
        kind = "minimum" if facts["minimum"] else "three products" if facts["products"] == 3 else "one product"
        guess = between(floor_ms(facts) * times for times in LOSS[kind])
        lines.append(
            f"| {name} | {4 if facts['minimum'] else facts['products']} | {digits(floor_ms(facts))} | {guess} |"
        )
    return lines


def unmask(named: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["| unmask | bound by | floor, ms | cuda |", "|---|---|---:|---:|"]
    for name, facts in named.items():
        if facts["kind"] == "selection":
            lines.append(f"| {name} | memory, then latency | {digits(floor_ms(facts))} | 0.008-0.012 |")
            continue
        kind = f"step {facts['temperature']:g}" if facts["kind"] == "step" else facts["kind"]
        over = ONE_WAVE if 128 < facts["rows"] <= 512 else UNMASK[kind]
        guess = between(floor_ms(facts) * times for times in over)
        lines.append(f"| {name} | {bound(facts)} | {digits(floor_ms(facts))} | {guess} |")
    return lines


def table() -> str:
    def named(*ops: str) -> dict[str, dict[str, Any]]:
        return {case.name: case.facts for op in ops for case in run.collect(op, "cuda")}

    parts = attention(named("attention_fwd", "attention_bwd")), loss(named("masked_loss")), unmask(named("unmask"))
    return "\n\n".join("\n".join(part) for part in parts)


def updated(text: str) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
    sys.exit(0)
