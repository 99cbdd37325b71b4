"""Writes the floors and predictions of the GPU cases into docs/measurements/first_gpu_run.md, between its markers:

    python -m benchmarks.report.predictions

A floor is the larger of flops over the matmul rate and bytes over the copy rate, both as such a card has shown
them, not as its datasheet says. Predictions were made before anything ran, from the reasons given on that page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import run
from ..floor import floor_ms as least_ms

PAGE = Path(__file__).parents[2] / "docs" / "measurements" / "first_gpu_run.md"
BEGIN, END = "<!-- floors: written by python -m benchmarks.report.predictions -->", "<!-- /floors -->"
RATES = {"gemm": 780e12, "copy": 4.3e12}  # H200: an 8192-cubed bfloat16 product of random matrices, a large copy
OPS = ("attention_fwd", "attention_bwd", "masked_loss", "unmask")
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
UNMASK: dict[str, Range] = {
    "entropy": (1.08, 1.2),
    "step 0": (1.05, 1.15),
    "step 1": (1.1, 1.3),
    "loop": (1.1, 1.25),
    "truncated": (1.4, 1.9),
    "truncated, fused": (1.2, 1.6),
}
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


def loss_prediction(facts: dict[str, Any]) -> str:
    kind = "minimum" if facts["minimum"] else "three products" if facts["products"] == 3 else "one product"
    return between(floor_ms(facts) * times for times in LOSS[kind])


def unmask_prediction(facts: dict[str, Any]) -> str:
    if facts["kind"] == "selection":
        return "0.008-0.012"
    kind = f"step {facts['temperature']:g}" if facts["kind"] == "step" else facts["kind"]
    kind = "truncated, fused" if kind == "truncated" and facts["rows"] <= 128 else kind
    over = ONE_WAVE if 128 < facts["rows"] <= 512 else UNMASK[kind]
    return between(floor_ms(facts) * times for times in over)


def prediction(op: str, facts: dict[str, Any], backend: str) -> str:
    """Returns the milliseconds that were predicted for a case and backend of ours, "" if none were."""
    if op.startswith("attention"):
        return attention_prediction(facts, backend) if facts["direction"] != "forward+backward" else ""
    if op == "masked_loss":
        return loss_prediction(facts)
    return unmask_prediction(facts) if backend == "cuda" else ""


def ranges() -> dict[tuple[str, str, str], str]:
    """Returns {(op, case, backend): predicted} of all that were predicted."""
    cases = [case for op in OPS for case in run.collect(op, "cuda")]
    found = {(c.op, c.name, b): prediction(c.op, c.facts, b) for c in cases for b in ("cuda", "triton")}
    return {key: guess for key, guess in found.items() if guess}


# ---- outcomes beside them -------------------------------------------------------------------------------------------
Outcomes = dict[tuple[str, str, str], float]


def outcomes(results: Path) -> Outcomes:
    """Returns {(op, case, backend): ms} of the committed rows of GPUs."""
    found: Outcomes = {}
    for path in sorted(path for op in OPS for path in results.glob(f"*/{op}.json")):
        for row in json.loads(path.read_text()) if not path.parent.name.startswith("cpu") else []:
            if row["backend"] is not None:
                found[row["op"], row["case"], row["backend"]] = row["ms"]["p50"]
    return found


def beside(guess: str, op: str, case: str, backend: str, measured: Outcomes) -> str:
    """Returns, for example, '3.19-3.55, was 3.4'."""
    ms = measured.get((op, case, backend))
    return guess if ms is None else f"{guess}, was {digits(ms)}".removeprefix(", ")


def attention(named: dict[str, dict[str, Any]], measured: Outcomes) -> list[str]:
    lines = [
        "| attention | bound by | forward, ms | cuda | triton | backward alone, ms | cuda | triton |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    found: dict[tuple[str, ...], list[str]] = {}
    for name, facts in named.items():
        if facts["direction"] != "forward":
            continue
        cells = [name, bound(facts), digits(floor_ms(facts))]
        for backend in ("cuda", "triton"):
            cells.append(beside(attention_prediction(facts, backend), "attention_fwd", name, backend, measured))
        back_name = f"{name} backward"
        back = named.get(back_name)
        cells += [digits(floor_ms(back))] if back else [""]
        for backend in ("cuda", "triton"):
            guess = attention_prediction(back, backend) if back else ""
            cells.append(beside(guess, "attention_bwd", back_name, backend, measured))
        found.setdefault((name.split("_kv")[0], *cells[1:]), []).append(name)
    for (_, *cells), names in found.items():  # often the same with 8 and with 32 key heads
        lines.append(f"| {', '.join([names[0], *(name.split('_')[-1] for name in names[1:])])} | {' | '.join(cells)} |")
    return lines


def loss(named: dict[str, dict[str, Any]], measured: Outcomes) -> list[str]:
    lines = ["| masked_loss | matmuls | floor, ms | cuda, triton |", "|---|---:|---:|---:|"]
    for name, facts in named.items():
        products = 4 if facts["minimum"] else facts["products"]
        guess = loss_prediction(facts)
        for backend in ("cuda", "triton"):
            guess += beside("", "masked_loss", name, backend, measured).replace("was", f"; {backend} was")
        lines.append(f"| {name} | {products} | {digits(floor_ms(facts))} | {guess} |")
    return lines


def unmask(named: dict[str, dict[str, Any]], measured: Outcomes) -> list[str]:
    lines = ["| unmask | bound by | floor, ms | cuda |", "|---|---|---:|---:|"]
    for name, facts in named.items():
        limit = "memory, then latency" if facts["kind"] == "selection" else bound(facts)
        guess = beside(unmask_prediction(facts), "unmask", name, "cuda", measured)
        lines.append(f"| {name} | {limit} | {digits(floor_ms(facts))} | {guess} |")
    return lines


def table(results: Path = run.RESULTS) -> str:
    def named(*ops: str) -> dict[str, dict[str, Any]]:
        return {case.name: case.facts for op in ops for case in run.collect(op, "cuda")}

    measured = outcomes(results)
    parts = (
        attention(named("attention_fwd", "attention_bwd"), measured),
        loss(named("masked_loss"), measured),
        unmask(named("unmask"), measured),
    )
    return "\n\n".join("\n".join(part) for part in parts)


def updated(text: str, results: Path = run.RESULTS) -> str:
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
    sys.exit(0)
