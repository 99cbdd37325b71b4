"""top_k and min_p in one pass over the head, in unmask's Triton kernels in the interpreter: against the reference, and
planted faults that these tests must see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="no triton")

import illada_kernels as ik
from illada_kernels.ops.unmask import gpu
from illada_kernels.ops.unmask.noise import gumbel
from illada_kernels.ops.unmask.triton import launch as room
from tests.helpers.triton_interpreter import KernelFault
from tests.helpers.unmask_oracle import INF
from tests.helpers.unmask_triton import draw_small_call, exact_inputs, from_hidden, plant, same, small_tiles

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of inf - inf and log 0 in unused lanes
VOCAB = 300  # two groups, of two and three tiles of 64 ids; the last tile is not full. Runs are of 16 ids
head_products = gpu.head_products


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_tiles(monkeypatch):
        monkeypatch.setattr(gpu, "head_products", lambda *_: pytest.fail("went through matmuls of whole rows"))
        yield


def factors(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns hidden and head of which the logits are the product, bit for bit, NaN and infinities among them.

    A row has three dimensions of its own: for finite logits, for inf and for -inf. NaN is the sum of both."""
    rows = logits.float().flatten(0, 1)
    up, down = (3e38 * (rows.isnan() | (rows == x)) for x in (INF, -INF))
    head = torch.stack([rows.nan_to_num(0.0, 0.0, 0.0), up, -down], 1).flatten(0, 1).T.contiguous()
    hidden = torch.block_diag(*[torch.tensor([[1.0, 3e38, 3e38]])] * rows.shape[0])
    return hidden.view(*logits.shape[:2], -1), head


def both(logits: Tensor, tokens: Tensor, positions: Tensor, rule: Any, **options: Any) -> Any:
    """The step in one pass over the head, checked against the reference."""
    inputs = (*factors(logits), tokens, positions)
    want, want_tokens = from_hidden(inputs, rule, "reference", **options)
    got, got_tokens = from_hidden(inputs, rule, "triton", **options)
    same(got, want, got_tokens, want_tokens, logits.shape[2], options.get("confidence") == "neg_entropy")
    return got


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_drawn_calls_equal_the_reference(data: Any) -> None:
    logits, tokens, positions, rule, options = draw_small_call(data.draw)
    both(logits, tokens, positions, rule, **{**options, "top_p": None})


@pytest.mark.parametrize("vocab", [1, 2, 3, 17])
def test_few_ids(vocab: int) -> None:
    logits = torch.randn(3, 2, vocab, generator=torch.Generator().manual_seed(vocab))
    options = {"mask_id": -1, "temperature": 2.0, "top_k": torch.tensor([1, 2, vocab]), "min_p": torch.rand(3) / 2}
    both(logits, torch.full((3, 2), -1), torch.arange(2).expand(3, 2), ik.TopK(2), **options)


@pytest.mark.parametrize("way", [{"top_k": 40}, {"min_p": 0.2}])
def test_the_draw_is_that_from_whole_rows(way: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = exact_inputs(2, 1, VOCAB, 16)
    options = {"confidence": "random", "temperature": torch.tensor([0.9, 3.0]), **way}
    got, after = from_hidden(inputs, ik.TopK(1), "triton", **options)
    monkeypatch.setattr(gpu, "head_products", head_products)
    monkeypatch.setattr(gpu, "FUSED_ROWS", 0)
    want, want_after = from_hidden(inputs, ik.TopK(1), "triton", **options)
    assert all(map(torch.equal, got, want)) and torch.equal(after, want_after)


def test_neither_the_batch_nor_block_shapes_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(4)
    hidden, head = torch.randn(2, 2, 24, generator=draw), torch.randn(VOCAB, 24, generator=draw) / 3
    seed, k, positions = torch.arange(2), torch.tensor([0, 40]), torch.tensor([[4, 0], [1, 2]])
    options: dict[str, Any] = {"mask_id": -1, "confidence": "sampled", "temperature": 2.0, "min_p": 1e-3}
    tokens = torch.full((2, 5), -1)
    want, _ = from_hidden((hidden, head, tokens, positions), ik.TopK(1), "triton", seed=seed, top_k=k, **options)
    monkeypatch.setattr(room, "BOUND_IDS", 32)
    shapes = room.head_options
    monkeypatch.setattr(room, "head_options", lambda *of: {**shapes(*of), "BLOCK_N": 32, "CHUNK": 2})
    inputs = (hidden[1:, [1, 0]], head, tokens[1:], positions[1:, [1, 0]])
    got, _ = from_hidden(inputs, ik.TopK(1), "triton", seed=seed[1:], top_k=k[1:], **options)
    assert torch.equal(got.proposal, want.proposal[1:, [1, 0]])
    assert torch.equal(got.confidence, want.confidence[1:, [1, 0]])


def test_memory_and_launches_follow_from_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without data: on the meta device whatever reads some, raises."""
    problems, launches = [], []
    monkeypatch.setattr(room, "forward", lambda problem: problems.append(problem) or problem.nothing())
    inputs = exact_inputs(2, 3, VOCAB, 16)
    options = {"temperature": torch.rand(2), "top_k": torch.tensor([1, 5]), "min_p": torch.tensor(0.5), "forbid": ()}
    from_hidden(inputs, ik.TopK(2), "triton", **options)
    monkeypatch.undo()

    class Launch:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda *args, **_: launches.append((self.name, grid, args))

    for name in ("head", "draw", "select"):
        monkeypatch.setattr(room, f"{name}_kernel", Launch(name))
    monkeypatch.setattr(room, "PAIRS", 32)
    meta = [x.to("meta") if isinstance(x, Tensor) else x for x in problems[0]]
    room.forward(type(problems[0])(*meta))
    assert [launch[:2] for launch in launches] == [("head", (5,)), ("draw", (6,)), ("select", (2,))]
    logits, stride, tops, listed, runs = launches[1][2][:5]
    assert logits.shape == (5, 2, 32, 16) and stride == 16 and runs == 20
    assert tops.shape == listed.shape == (6, 20) and tops.dtype == torch.float32 and listed.dtype == torch.int32


# ---- planted faults --------------------------------------------------------------------------------------------------
def make(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks one of CALLS: two sequences of one candidate each."""
    options = {"temperature": torch.tensor([1.5, 0.7]), "forbid": (), "seed": 3, **CALLS[call]}
    monkeypatch.setattr(room, "BOUND_IDS", options.pop("at_once", 128))
    positions = torch.tensor([[4], [1]])
    logits = torch.randn(2, 1, VOCAB, generator=torch.Generator().manual_seed(1)) * 2
    noise = gumbel(torch.tensor([[3], [4]]), positions, torch.zeros_like(positions), VOCAB)[:, None]  # (2, 1, VOCAB)
    logits = LOGITS.get(call, lambda logits, noise: logits)(logits, noise)
    both(logits, torch.full((2, 5), -1), positions, ik.TopK(1), mask_id=-1, **options)


def lowest_is_noisiest(logits: Tensor, noise: Tensor) -> Tensor:
    """One id has the least logit and the best score of all ids: with k = V - 1 it is the one that is dropped."""
    return torch.rand_like(noise).scatter(2, noise.argmax(2, keepdim=True), -0.1) / 10


def two_unlikely(logits: Tensor, noise: Tensor) -> Tensor:
    """Of two ids the one in the other group has the larger logit, and that is more than either score."""
    first, last = (noise[..., :128] + 0.5).abs().argmin(2, keepdim=True), noise[..., 128:].argmin(2, keepdim=True) + 128
    return torch.zeros_like(noise).scatter(2, first, 0.25).scatter(2, last, 0.5)


def bad(logits: Tensor, noise: Tensor) -> Tensor:
    logits[0, 0, :16] = -30.0  # NaN in a run that nothing is drawn from
    logits[0, 0, 3], logits[1, 0, 130] = torch.nan, INF
    return logits


LOGITS = {
    "flat": lambda logits, noise: torch.full_like(noise, 0.25),
    "falling as the noise rises": lambda logits, noise: (
        logits / 100 - 0.9 * torch.tensor([1.5, 0.7])[:, None, None] * noise
    ),
    "the first tile is far below": lambda logits, noise: logits - 50.0 * (torch.arange(VOCAB) < 64),
    "the first tile is far above": lambda logits, noise: logits + 50.0 * (torch.arange(VOCAB) < 64),
    "all but one": lowest_is_noisiest,
    "the largest is the least likely": two_unlikely,
    "ties": lambda logits, noise: logits.round(),
    "bad rows": bad,
}
CALLS: dict[str, dict[str, Any]] = {
    "flat": {"top_k": 7},
    "falling as the noise rises": {"top_k": torch.tensor([60, 0]), "min_p": 0.01},
    "the first tile is far below": {"top_k": torch.tensor([3, 250]), "confidence": "margin"},
    "the first tile is far above": {"top_k": torch.tensor([70, 3]), "confidence": "sampled"},
    "one": {"top_k": 1, "temperature": 9.0},
    "all but one": {"top_k": VOCAB - 1},
    "more than there are": {"top_k": 20, "min_p": 1.0, "temperature": 9.0, "forbid": tuple(range(5, VOCAB))},
    "min_p": {"min_p": torch.tensor([0.3, 1e-3]), "temperature": torch.tensor([9.0, 0.5]), "confidence": "neg_entropy"},
    "off": {"top_k": torch.tensor([0, VOCAB]), "min_p": torch.tensor(torch.nan), "at_once": 16},
    "no noise in a row": {"top_k": 30, "temperature": torch.tensor([9.0, 0.0])},
    "the largest is the least likely": {"top_k": 2, "temperature": 9.0},
    "ties": {"top_k": 40, "temperature": 1e-30, "at_once": 64},
    "bad rows": {"top_k": 5, "min_p": 0.01},
}
FAULTS = {  # the file that holds the fault, old, new, by the call that sees it
    "flat": {"runs at the bound are left out": ("draw", "key_of(top) >= floor", "key_of(top) > floor")},
    "falling as the noise rises": {"even logits twice": ("draw", "(2 * RUN) + RUN + within", "(2 * RUN) + within")},
    "the first tile is far below": {
        "runs of the first tile": ("head", "run = tile * (PAIRS // RUN)", "run = first_tile * (PAIRS // RUN)")
    },
    "the first tile is far above": {
        "one scratch for all tiles": ("head", "slot = group if tops is None else tile", "slot = group"),
        "the logit is not given on": ("draw", "LOGIT * field + row, logit)", "LOGIT * field + row, logit - 1)"),
    },
    "one": {"all of a run is kept": ("draw", "logit_of(found), bound)", "bound, bound)")},
    "all but one": {"near V is off": ("draw", "wanted < vocab, wanted", "wanted < vocab - 1, wanted")},
    "more than there are": {
        "no min_p beside top_k": ("draw", "tl.where(found > NOTHING, logit_of(found), bound)", "logit_of(found)")
    },
    "min_p": {
        "runs with the largest logit alone": (
            "draw",
            "floor = tl.maximum(key_of(bound)",
            "floor = tl.maximum(key_of(top)",
        ),
        "min_p without the temperature": ("bounds", "top + t * below", "top + below"),
        "one row for all": ("draw", "kept = (logits + tl.program_id(0)", "kept = (logits + 0 * tl.program_id(0)"),
    },
    "off": {
        "the last block of runs alone": ("draw", "count += tl.sum(reached, 0)", "count = tl.sum(reached, 0)"),
        "a run is of one tile": ("draw", "plane = 2 * (pair // pairs)", "plane = 2 * 0 * (pair // pairs)"),
        "0 is a count": ("draw", "if wanted > 0:\n                found", "if wanted >= 0:\n                found"),
    },
    "no noise in a row": {
        "no best without noise": ("head", "tl.where(t > 0, -INF, score)", "tl.where(t >= 0, -INF, score)"),
    },
    "the largest is the least likely": {
        "the largest logit is a score": ("head", "tl.where(t > 0, -INF, score)", "score"),
    },
    "ties": {"ties to the highest id": ("partials", "better = tile_score > score", "better = tile_score >= score")},
    "bad rows": {"a bad row draws": ("draw", "== BAD, BAD, best", "== BAD, best, best")},
}


@pytest.mark.parametrize("call, name", [(call, name) for call, faults in FAULTS.items() for name in faults])
def test_planted_faults_are_seen(call: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plant(monkeypatch, tmp_path, *FAULTS[call][name])
    torch.use_deterministic_algorithms(True, warn_only=True)  # memory that was never written then holds NaN, not luck
    try:
        with pytest.raises((AssertionError, KernelFault)):
            make(call, monkeypatch)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_of_planted_faults_pass_without_them(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make(call, monkeypatch)
