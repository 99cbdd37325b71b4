"""top_k, top_p and min_p on whole rows of logits, and Renoise, in unmask's Triton kernels in the interpreter: against
the reference, and planted faults that these tests must see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="no triton")

import illada_kernels as ik
from illada_kernels.ops.unmask import gpu
from illada_kernels.ops.unmask.triton import launch as room
from tests.helpers.triton_interpreter import KernelFault
from tests.helpers.unmask_oracle import INF, MASK, step
from tests.helpers.unmask_triton import draw_small_call, exact_inputs, from_hidden, plant, same, small_tiles

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of inf - inf and log 0 in unused lanes


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_tiles(monkeypatch):
        monkeypatch.setattr(room, "BOUND_IDS", 512)
        yield


def both(logits: torch.Tensor, tokens: Any, positions: Any, rule: Any, by_entropy: bool = False, **options: Any) -> Any:
    """The step, checked against the reference."""
    want, want_tokens = step(logits, tokens, positions, rule, "reference", **options)
    got, got_tokens = step(logits, tokens, positions, rule, "triton", **options)
    same(got, want, got_tokens, want_tokens, logits.shape[2], by_entropy)
    return got


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_drawn_calls_equal_the_reference(data: Any) -> None:
    logits, tokens, positions, rule, options = draw_small_call(data.draw)
    both(logits, tokens, positions, rule, options["confidence"] == "neg_entropy", **options)


TRUNCATIONS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": torch.tensor([1, 70])},
    "top_p": {"top_p": torch.tensor([0.9, 0.2])},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 100, "top_p": 0.8, "min_p": torch.tensor(0.01)},
}


@pytest.mark.parametrize("name", TRUNCATIONS)
def test_hidden_rows_are_truncated_by_whole_rows_of_logits(name: str, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "FUSED_ROWS", 0)
    monkeypatch.setattr(gpu, "TRUNCATED_ROWS", 4)
    inputs = exact_inputs(2, 3, 700, 16)
    inputs[2][0, inputs[3][0, 0]] = 7  # takes no part: its row may be anything
    inputs[0][0, 0] = float("nan")
    bias = torch.arange(700) % 5 / 4
    options = {"head_bias": bias, "temperature": torch.tensor([0.9, 2.0]), **TRUNCATIONS[name]}
    want, want_tokens = from_hidden(inputs, ik.TopK(2), "reference", **options)
    got, got_tokens = from_hidden(inputs, ik.TopK(2), "triton", **options)
    same(got, want, got_tokens, want_tokens, 700)


def test_any_place_of_a_row_is_found(monkeypatch) -> None:
    monkeypatch.setattr(gpu, "SLICE", 2048)  # of the kernel that draws: bounds are found in tiles of 512 ids
    monkeypatch.setattr(room, "ROW_PAIRS", 512)
    draw = torch.Generator().manual_seed(2)
    logits = torch.randn(8, 2, 3001, generator=draw) * 3
    logits[:, 1] = (logits[:, 1] * 2).round() / 2
    ranks = torch.tensor([1, 2, 40, 999, 1500, 2900, 3000, 3001])
    options = {"mask_id": 3001, "temperature": 4.0, "seed": torch.arange(8), "forbid": ()}
    args = (logits, torch.full((8, 2), 3001), None, ik.TopK(1))
    for way in ({"top_k": ranks}, {"top_p": 1 - (1 - ranks / 3001) ** 2}, {"min_p": torch.logspace(-7, 0, 8)}):
        both(*args, **way, **options)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e38])
@pytest.mark.parametrize("temperature", [1e-38, 3.4e38])
def test_extreme_logits_and_temperatures_keep_the_best(scale: float, temperature: float) -> None:
    logits = torch.randint(-4, 5, (1, 2, 300), generator=torch.Generator().manual_seed(8)) / 4 * scale
    allowed = torch.where(torch.arange(300) == MASK, -INF, logits)
    for way in ({"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-45}, {"min_p": 1.0}):
        got, _ = step(logits, [[MASK] * 2], None, ik.TopK(1), "triton", temperature=temperature, **way)
        assert (allowed.gather(2, got.proposal[..., None]) == allowed.amax(2, keepdim=True)).all(), way


def test_bad_rows_propose_nothing_and_leave_the_others() -> None:
    logits = torch.randn(1, 6, 300, generator=torch.Generator().manual_seed(9))
    logits[0, 0, -1], logits[0, 4, 3] = float("nan"), INF
    logits[0, 2] = -INF
    for rule in (ik.TopK(9), ik.Renoise(1.0)):
        got = both(logits, [[MASK] * 6], None, rule, temperature=1.0, top_k=5, top_p=0.9, min_p=0.01)
        assert got.proposal[0, [0, 2, 4]].tolist() == [-1] * 3


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("path", ["head", "product", "logits"])
def test_renoised_canvases_equal_the_reference(path: str, temperature: float, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "FUSED_ROWS", 128 if path == "head" else 0)
    hidden, weight, _, positions = exact_inputs(2, 5, 300, 16)
    canvas = torch.randint(0, 300, (2, 7), generator=torch.Generator().manual_seed(4))
    frozen = canvas % 7 == 0
    for way in ({}, {"confidence": "sampled", "top_k": 3}, {"defer": tuple(range(0, 300, 2)), "order": "left"}):
        options: dict[str, Any] = {
            "temperature": temperature,
            "frozen": frozen,
            "step": 2**32 - 1,
            "mask_id": -1,
            **way,
        }
        if path == "logits":
            both(hidden @ weight.T, canvas, positions, ik.Renoise(40.0), **options)
            continue
        inputs = (hidden, weight, canvas, positions)
        want, want_tokens = from_hidden(inputs, ik.Renoise(40.0), "reference", **options)
        got, got_tokens = from_hidden(inputs, ik.Renoise(40.0), "triton", **options)
        same(got, want, got_tokens, want_tokens, 300)


@pytest.mark.parametrize("way", [{"top_k": 40}, {"top_p": 0.9}])
def test_block_shapes_and_batches_do_not_change_a_bit(way: dict[str, Any], monkeypatch) -> None:
    logits = torch.randn(2, 4, 300, generator=torch.Generator().manual_seed(5)) * 2
    options = {"temperature": 2.0, "seed": torch.arange(2), "confidence": "neg_entropy", **way}
    want, _ = step(logits, [[MASK] * 4] * 2, None, ik.Renoise(9.0), "triton", **options)
    monkeypatch.setattr(room, "BOUND_IDS", 64)
    monkeypatch.setattr(room, "select_options", lambda count: {"BLOCK": 2, "BLOCK_G": 1, "ONE_BLOCK": False})
    got, _ = step(logits, [[MASK] * 4] * 2, None, ik.Renoise(9.0), "triton", **options)
    assert all(map(torch.equal, got, want))
    options["seed"] = torch.tensor([1])
    one, _ = step(logits[1:2], [[MASK] * 4], None, ik.Renoise(9.0), "triton", **options)
    assert all(torch.equal(a, b[1:2]) for a, b in zip(one, want))


# ---- planted faults --------------------------------------------------------------------------------------------------
def make(call: str) -> None:
    """Checks one of CALLS, which between them need all of what truncates and renoises."""
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 2, 601, generator=draw) * 3
    logits[0, 1] = (logits[0, 1] / 3).round()
    canvas = torch.randint(0, 601, (2, 5), generator=draw)
    rule, way = CALLS[call]
    tokens = canvas if isinstance(rule, ik.Renoise) else torch.full((2, 5), -1)
    options: dict[str, Any] = {"temperature": torch.tensor([3.0, 1.5]), "confidence_temperature": 0.5, "mask_id": -1}
    forbid = tuple(logits[0].argmax(-1).tolist()) if call == "one id and half of them" else None
    both(logits, tokens, torch.tensor([[4, 0], [1, 2]]), rule, forbid=forbid, **options, **way)


CALLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one id and half of them": (ik.TopK(1), {"top_k": torch.tensor([1, 300])}),
    "top_k": (ik.TopK(1), {"top_k": 1}),
    "top_p": (ik.TopK(1), {"top_p": torch.tensor([0.5, 0.97])}),
    "all of them": (ik.TopK(1), {"top_k": 60, "top_p": 0.7, "min_p": 1e-6}),
    "min_p": (ik.TopK(1), {"min_p": torch.tensor([0.3, 0.01])}),
    "all are redrawn": (ik.Renoise(0.0), {"top_k": 40, "rank_temperature": 1.0}),
}
FAULTS = {  # the file that holds the fault, old, new, by the call that sees it
    "one id and half of them": {
        "forbidden ids count": ("bounds", "tl.where(barred, -INF, change)", "tl.where(ids >= vocab, -INF, change)"),
    },
    "top_k": {
        "the first key that too little reaches": ("bounds", "    return low\n", "    return low + 1\n"),
        "the bound itself is dropped": ("partials", "tl.where(odd >= bound", "tl.where(odd > bound"),
    },
    "top_p": {
        "top_p under the confidence's temperature": ("bounds", "FLOAT32_MAX)\n", "FLOAT32_MAX) * 2\n"),
    },
    "all of them": {
        "top_p counts what top_k dropped": ("bounds", "least = tl.maximum(least, found)", "least = least + 0 * found"),
        "min_p lowers a bound": ("bounds", "tl.maximum(bound, min_p_bound(", "tl.maximum(-INF, min_p_bound("),
    },
    "min_p": {
        "the last block is not read": (
            "bounds",
            "top = largest(whole, vocab, ",
            "vocab = vocab // 2\n        top = largest(whole, vocab, ",
        ),
        "min_p without the temperature": ("bounds", "top + t * below", "top + below"),
        "one bound for all rows": ("rows", "tl.load(bounds + row)", "tl.load(bounds + 0 * row)"),
        "even ids are not dropped": ("partials", "tl.where(even >= bound[None, :], score0, -INF)", "score0"),
    },
    "all are redrawn": {
        "the best token of an earlier tile": (
            "partials",
            "tl.where(tile_top > top, top_id, held",
            "tl.where(tile_top < top, top_id, held",
        ),
        "the best token of any group": ("proposals", "here & (tops == block_top[None, :]), top_ids", "here, top_ids"),
        "held tokens take no part": ("noise", "masked = candidate if NEEDS_TOP_ID & NEEDS else ", "masked = "),
        "the confidence of the token drawn": ("proposals", "        logit = top\n", "        logit = logit\n"),
        "the token drawn is reported": ("proposals", "tl.where(takes_part, top_id.to(tl.int64), -1)", "proposal"),
        "redraws with the ranks' noise": ("proposals", "at_step, zero + 3)", "at_step, zero + 2)"),
        "accepted tokens are redrawn": (
            "select",
            "tl.where(committed | (proposal < 0), held",
            "tl.where((proposal < 0), held",
        ),
        "masks are counted": (
            "select",
            "candidate & (~committed if NEEDS_TOP_ID & NEEDS else token == mask_id)",
            "candidate & (token == mask_id)",
        ),
    },
}


@pytest.mark.parametrize("call, name", [(call, name) for call, faults in FAULTS.items() for name in faults])
def test_planted_faults_are_seen(call: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, tmp_path, *FAULTS[call][name])
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that was never written then holds NaN, not luck
    try:
        with pytest.raises((AssertionError, KernelFault)):
            make(call)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_of_planted_faults_pass_without_them(call: str) -> None:
    make(call)
