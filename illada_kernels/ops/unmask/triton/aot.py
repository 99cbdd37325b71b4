"""Lists what tests/gpu_code compiles ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .... import rules
from .. import gpu
from ..problem import BY_MIN_P, BY_TOP_K, NEEDS_ENTROPY, NEEDS_HELD, NEEDS_SECOND, NEEDS_TOP_ID
from .bounds import bounds_kernel
from .draw import draw_kernel
from .head import head_kernel
from .launch import BOUND_IDS, BOUNDS_OPTIONS, PAIRS, ROW_PAIRS, ROWS_OPTIONS, head_options, one, select_options
from .rows import rows_kernel
from .select import select_kernel


def aot_configurations() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Yields what a model with a bf16 head, and callers with logits, would launch, with numbers for parameters."""
    absent = dict.fromkeys(
        "head_bias frozen noise_positions temperature confidence_temperature seed step bias_ids bias_values rule "
        "revision scores least rank_temperature defer bounds tops top_k top_p min_p".split()
    )
    types = {
        "hidden": "*bf16:16",
        "hidden_b": "i32:16",
        "hidden_k": "i32:16",
        "head": "*bf16:16",
        "head_v": "i32:16",
        "dim": "i32:16",
        "logits_b": "i32:16",
        "logits_k": "i32:16",
        "tokens": "*i64:16",
        "positions": "*i64:16",
        "mask_id": "i64",
        "temperature_number": "fp32",
        "confidence_number": "fp32",
        "seed_number": "i64",
        "step_number": "i64",
        "forbidden": "*i64:16",
        "partials": "*fp32:16",
        "best_ids": "*i32:16",
        "proposals": "*i64:16",
        "confidences": "*fp32:16",
        "commits": "*u8:16",
        "remaining": "*i32:16",
        "revise_number": "fp32",
        "rule_number": "fp32",
        "rank_number": "fp32",
        "top_p_number": "fp32",
        "min_p_number": "fp32",
        "position_k": "constexpr",
        "ids": "i32:16",
    }

    def configuration(name: str, kernel: Any, options: dict[str, Any], **changes: str) -> Any:
        constants = {key: options[key] for key in options if key.isupper()}
        constants |= {key: None for key in kernel.arg_names if key in absent and key not in changes} | {"position_k": 1}
        kinds = {key: "constexpr" if key in constants else types.get(key, "i32") for key in kernel.arg_names}
        rest = {key: options[key] for key in options if key.islower()} | {"enable_fp_fusion": False}
        return name, kernel, kinds | changes, constants, rest

    options: dict[str, Any]
    entropy, everything = NEEDS_ENTROPY, NEEDS_ENTROPY | NEEDS_SECOND | NEEDS_HELD
    sampled = {"NOISE": True, "NEEDS": entropy, "REVISES": False}
    greedy = {"NOISE": False, "NEEDS": 0, "REVISES": False}
    whole = {"NOISE": True, "NEEDS": everything, "REVISES": True}
    kept = {**sampled, "NOISE": False}
    for rows, dtype, name, needs in (
        (16, torch.bfloat16, "sampled", sampled),
        (64, torch.bfloat16, "sampled", sampled),
        (64, torch.bfloat16, "greedy", greedy),
        (128, torch.bfloat16, "all", whole),
        (64, torch.float32, "sampled", sampled),
        (16, torch.bfloat16, "truncated", kept),
        (64, torch.bfloat16, "truncated", kept),
        (128, torch.bfloat16, "all, truncated", {**whole, "NOISE": False}),
        (64, torch.float32, "truncated", kept),
    ):
        kind = "bf16" if dtype == torch.bfloat16 else "fp32"
        options = {"PAIRS": PAIRS, "EVEN_D": True, **head_options(rows, dtype), **needs}
        changes = {"hidden": f"*{kind}:16", "head": f"*{kind}:16"}
        changes["scratch"] = "*fp32:16"
        if "truncated" in name:
            changes["tops"] = "*fp32:16"
        yield configuration(f"head {kind} {rows} rows, {name}", head_kernel, options, **changes)
    for kind, dense, name, needs in (("fp32", True, "all", whole), ("bf16", False, "greedy", greedy)):
        options = {"SPAN": gpu.SLICE, "PAIRS": ROW_PAIRS, "DENSE": dense, **ROWS_OPTIONS, **needs}
        yield configuration(f"rows {kind}, {name}", rows_kernel, options, logits=f"*{kind}:16")
    drawn = {"NOISE": True, "NEEDS": entropy | NEEDS_TOP_ID, "REVISES": False}
    options = {"SPAN": gpu.SLICE, "PAIRS": ROW_PAIRS, "DENSE": True, **ROWS_OPTIONS, **drawn}
    yield configuration("rows fp32, truncated, renoised", rows_kernel, options, logits="*fp32:16", bounds="*fp32:16")
    for kind, dense, truncate in (("fp32", True, 7), ("bf16", False, 1)):
        options = {"TRUNCATE": truncate, "ONE": one(155136), "BLOCK": BOUND_IDS, "DENSE": dense, **BOUNDS_OPTIONS}
        options |= {"NEEDS": entropy, "REVISES": False}
        changes = {"logits": f"*{kind}:16", "bounds": "*fp32:16"}
        yield configuration(f"bounds {kind}, {truncate}", bounds_kernel, options, **changes)
    for truncate in (BY_TOP_K, BY_MIN_P, BY_TOP_K | BY_MIN_P):
        options = {"TRUNCATE": truncate, "PAIRS": PAIRS, "BLOCK": BOUND_IDS, **BOUNDS_OPTIONS}
        options |= {"NEEDS": entropy, "REVISES": False}
        changes = {"logits": "*fp32:16", "stride": "i32:16", "tops": "*fp32:16", "listed": "*i32:16"}
        yield configuration(f"draw, {truncate}", draw_kernel, options, **changes)
    for count, name, reranked in (
        (64, "64 candidates", False),
        (1024, "1024 candidates", False),
        (9999, "any number", False),
        (64, "64 candidates, reranked", True),
        (1024, "1024 candidates, reranked", True),
    ):
        chosen = {"RULE": rules.ENTROPY_BOUND, "CONFIDENCE": rules.MARGIN, "REVISE": rules.REMASK, "NEEDS": everything}
        chosen |= {"ORDER": rules.BY_CONFIDENCE, "RERANKED": reranked}
        options = {**select_options(count), **chosen, "ONE": one(155136)}
        yield configuration(f"select {name}, all", select_kernel, options, scratch="*i64:16", revise_number="i32")
    renoise = {"RULE": rules.ENTROPY_BOUND, "CONFIDENCE": rules.NEG_ENTROPY, "REVISE": rules.NO_REVISION}
    renoise |= {"ORDER": rules.BY_CONFIDENCE, "RERANKED": False, "NEEDS": entropy | NEEDS_TOP_ID}
    options = {**select_options(256), **renoise, "ONE": one(155136)}
    yield configuration("select 256 candidates, renoised", select_kernel, options, scratch="*i64:16")
