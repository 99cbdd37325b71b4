"""top_k, top_p and min_p in the fused head of the cuda backend, on the CPU: its blocks list logits, a second kernel
draws among them. Against the reference and the path through matmuls, and planted faults that these tests must see."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import illada_kernels as ik
from illada_kernels.ops.unmask import cuda, gpu
from illada_kernels.ops.unmask.noise import gumbel
from tests.cuda_on_cpu.library import KernelFault, missing
from tests.helpers.unmask_on_cpu import SOURCES, Backend, Faults, OnCpu, assert_same, operands, planted, unmask, where
from tests.helpers.unmask_oracle import INF, MASK, draw_call

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
LAUNCHES = ["unmask_head_sm90a", "unmask_draw_sm90a", "unmask_select_cuda"]
MOST_STEPS = 1 << 22  # of a block: the calls below pass under it without a fault, and some faults never end


class Listing(OnCpu):
    """Fills the lists with `junk` before each head, because they are not initialised. `listed`: how many logits each
    (row, block) listed last, as the last half tile of the block says."""

    junk: float = torch.nan

    def __call__(self, function: str, device: torch.device, record: cuda.Call, *arguments: Any) -> None:
        lists = {t.data_ptr(): t for t in record.tensors}.get(record.lists)
        if lists is not None and function == "unmask_head_sm90a":
            lists.fill_(self.junk)
        super().__call__(function, device, record, *arguments)
        if lists is not None and function == "unmask_head_sm90a":
            tiles, parts = -(-record.vocab // cuda.TILE), record.parts
            words = lists[:, : tiles * cuda.TILE_WORDS].view(torch.int32).unflatten(1, (tiles, cuda.TILE_WORDS))
            last = [tile for tile in range(tiles) if tile + parts >= tiles]
            self.listed = words[:, sorted(last, key=lambda tile: tile % parts), cuda.TILE + 8 + 6]


@functools.cache
def kernels() -> Listing:
    return Listing(most_steps=MOST_STEPS)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Backend:
    kernels().launches.clear()
    kernels().seed, kernels().junk = 0, torch.nan
    return Backend(monkeypatch, kernels())


def both(source: Tensor, head: Tensor, *args: Any, by_entropy: bool = False, **options: Any) -> Any:
    """The step, checked against the reference."""
    got = unmask("cuda", source, head, *args, **options)
    assert_same(got, unmask("reference", source, head, *args, **options), head.shape[0], by_entropy)
    return got


def as_hidden(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden, head) in bf16 with exactly these logits, rounded to bf16. Rows that are not finite become NaN."""
    rows = logits.shape[0] * logits.shape[1]
    flat = logits.flatten(0, 1).bfloat16()
    bad = ~flat.isfinite().all(1)
    width = -(-rows // 8) * 8
    head = torch.zeros(flat.shape[1], width, dtype=torch.bfloat16)
    head[:, :rows] = torch.where(bad[:, None], 0.0, flat).T
    hidden = torch.eye(rows, width).bfloat16()
    hidden[bad] = torch.nan
    return hidden.view(*logits.shape[:2], width), head


# ---- against the specification ---------------------------------------------------------------------------------------
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_drawn_calls_equal_the_reference(on_cpu: Backend, data: Any) -> None:
    logits, tokens, positions, rule, options = draw_call(data.draw, truncated=True)
    on_cpu.processors = data.draw(st.sampled_from([1, 2, 5]))
    both(*as_hidden(logits), tokens, positions, rule, by_entropy=options["confidence"] == "neg_entropy", **options)


WAYS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": torch.tensor([1, 700])},
    "most ids": {"top_k": torch.tensor([4095, 4096])},
    "top_p": {"top_p": torch.tensor([0.9, 0.2])},
    "min_p": {"min_p": torch.tensor([0.99, 1e-30])},
    "top_k, min_p": {"top_k": 50, "min_p": torch.tensor([0.2, 0.001])},
    "all": {"top_k": 1000, "top_p": 0.8, "min_p": torch.tensor(0.01)},
}


@pytest.mark.parametrize("vocabulary, blocks", [(1, 2), (255, 9), (4097, 3)])
@pytest.mark.parametrize("way", WAYS)
def test_one_pass_over_the_head_truncates(on_cpu: Backend, way: str, vocabulary: int, blocks: int) -> None:
    on_cpu.processors = blocks
    hidden, head = operands("head", (2, 3), vocabulary, dim=72 if vocabulary < 2000 else 8)
    tokens, positions = where((2, 3), 5, vocabulary)
    tokens[0, positions[0, 1]] = 0  # takes no part: its row may be anything
    hidden[0, 1] = torch.nan
    bias = (torch.arange(vocabulary) % 5 / 4).bfloat16()
    options: dict[str, Any] = {"mask_id": vocabulary, "head_bias": bias, "temperature": 0.9, **WAYS[way]}
    both(hidden, head, tokens, positions, ik.TopK(2), forbid=(), **options)
    assert on_cpu.launch.launches == LAUNCHES


def test_matmuls_draw_the_same(on_cpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that are no round numbers, each the one product that is not 0: equal in every order of summation."""
    logits = torch.randn(2, 3, 1300, generator=torch.Generator().manual_seed(6)) * 3
    args = (*as_hidden(logits), *where((2, 3), 5), ik.TopK(2))
    monkeypatch.setattr(gpu, "product_rows", lambda rows: 4)
    for way in WAYS.values():
        results = []
        for on_cpu.processors in (2, 0):
            results.append(unmask("cuda", *args, mask_id=MASK, temperature=1.5, **way))
        assert torch.equal(results[0][0].proposal, results[1][0].proposal), way
        assert torch.equal(results[0][1], results[1][1]), way


# ---- rows of every shape --------------------------------------------------------------------------------------------
def shaped(kind: str, vocabulary: int) -> Tensor:
    """(4, V) logits, for temperature 1 and seed 0 at positions 0 .. 3."""
    draw = torch.Generator().manual_seed(7)
    logits = torch.randn(4, vocabulary, generator=draw) * 2
    if kind == "flat":
        return torch.full_like(logits, 0.5)
    if kind == "few values":
        return logits.round()
    if kind == "against the noise":  # what falls as its noise rises: nearly every id has a good score
        zeros = torch.zeros(4, 1, dtype=torch.int64)
        return -0.9 * gumbel(zeros, torch.arange(4)[:, None], zeros, vocabulary)
    first = torch.arange(vocabulary) < 256  # the first tile of the first of two blocks
    if kind == "begins high":
        return torch.where(first, logits + 40, logits)
    if kind == "begins low":
        return torch.where(first, logits - 40, logits)
    if kind == "rises":
        return logits + torch.arange(vocabulary) / 32
    return torch.where(torch.rand(vocabulary, generator=draw) < 0.995, -200.0, logits)  # few are probable


KINDS = ("flat", "few values", "against the noise", "begins high", "begins low", "rises", "few")


@pytest.mark.parametrize("kind", KINDS)
def test_any_distribution_is_drawn_from_exactly(on_cpu: Backend, kind: str) -> None:
    vocabulary = 2310
    args = (*as_hidden(shaped(kind, vocabulary)[None]), *where((1, 4), 4, vocabulary), ik.TopK(4))
    options: dict[str, Any] = {"mask_id": vocabulary, "temperature": 1.0, "forbid": ()}
    for way in ({"top_k": 1}, {"top_k": 60}, {"top_k": 2309}, {"min_p": 0.999}, {"min_p": 1e-9}, {"top_p": 0.7}):
        both(*args, **way, **options)
    everything = tuple(range(256)) + tuple(range(300, vocabulary))  # fewer are left than top_k asks for
    both(*args, **{**options, "forbid": everything, "top_k": 60})


def test_lists_hold_little_more_than_what_may_be_drawn(on_cpu: Backend) -> None:
    """Of n ids in any order k (1 + log(n / k)) reach the k-th largest of those before them, on average. The floor
    follows it by 32 thresholds, but rises before 128 ids are listed."""
    hidden, head = as_hidden(torch.randn(1, 4, 10240, generator=torch.Generator().manual_seed(3)))
    args = (hidden, head, *where((1, 4), 4), ik.TopK(1))
    followed = 40 * (1 + math.log(5120 / 40))
    for way, most in (({"top_k": 40}, followed), ({"min_p": 0.3}, 128.0), ({"top_k": 5, "min_p": 0.3}, 40.0)):
        both(*args, mask_id=MASK, temperature=1.0, **way)
        assert on_cpu.launch.listed.shape == (4, 2) and on_cpu.launch.listed.float().mean() < most, way
    both(*args, mask_id=MASK, temperature=1.0, top_p=0.5)
    assert on_cpu.launch.listed.sum(1).tolist() == [10239] * 4  # the mask is forbidden


def test_sequences_that_keep_all_ids_are_drawn_as_without_truncation(on_cpu: Backend) -> None:
    args = (*operands("head", (6, 2), 700), *where((6, 2), 4), ik.EntropyBound(9.0))
    options: dict[str, Any] = {"mask_id": MASK, "temperature": torch.tensor([1.0, 1.0, 2.0, 0.0, 1.0, torch.nan])}
    off = {
        "top_k": torch.tensor([0, -3, 700, 5, 10**9, 5]),
        "top_p": torch.tensor([1.0, torch.nan, 2.0, 0.1, 1.0, 0.1]),
        "min_p": torch.tensor([0.0, torch.nan, -1.0, 0.5, 0.0, 0.5]),
    }
    got, want = both(*args, **off, **options), unmask("cuda", *args, **options)
    assert all(map(torch.equal, got[0], want[0])) and torch.equal(got[1], want[1])


def test_bad_rows_propose_nothing_and_leave_the_others(on_cpu: Backend) -> None:
    hidden, head = operands("head", (1, 6), 600)
    args = (head, *where((1, 6), 6), ik.TopK(9))
    options: dict[str, Any] = {"mask_id": MASK, "temperature": 1.0, "top_k": 5, "min_p": 0.01}
    clean, _ = unmask("cuda", hidden, *args, **options)
    hidden[0, 0, -1], hidden[0, 4, 3] = torch.nan, INF
    got, _ = both(hidden, *args, **options)
    assert got.proposal[0, [0, 4]].tolist() == [-1, -1]
    assert torch.equal(got.proposal[0, [1, 2, 3, 5]], clean.proposal[0, [1, 2, 3, 5]])
    nothing, _ = both(hidden, *args, **options, forbid=tuple(range(600)))
    assert nothing.proposal.eq(-1).all()


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e38])
@pytest.mark.parametrize("temperature", [1e-38, 1.0, 3.4e38])
def test_extreme_logits_and_temperatures_keep_the_best(on_cpu: Backend, scale: float, temperature: float) -> None:
    logits = torch.randint(-4, 5, (1, 4, 300), generator=torch.Generator().manual_seed(8)) / 4 * scale
    for way in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        args = (*as_hidden(logits), *where((1, 4), 4), ik.TopK(1))
        got, _ = unmask("cuda", *args, mask_id=MASK, temperature=temperature, **way)
        allowed = torch.where(torch.arange(300) == MASK, -INF, logits.bfloat16().float())
        assert (allowed.gather(2, got.proposal[..., None]) == allowed.amax(2, keepdim=True)).all(), way


# ---- the same whatever else is in the call ---------------------------------------------------------------------------
@pytest.mark.parametrize("way", [{"top_k": 30}, {"min_p": 0.05}])
def test_a_row_does_not_depend_on_the_others(on_cpu: Backend, way: dict[str, Any]) -> None:
    """Also across the widths of the product, 16 and 64, what the lists held before, and every schedule."""
    draw = torch.Generator().manual_seed(4)
    hidden, head = torch.randn(1, 40, 72, generator=draw).bfloat16(), torch.randn(700, 72, generator=draw).bfloat16()
    tokens, positions = torch.full((1, 40), MASK), torch.arange(40)[None]
    options: dict[str, Any] = {"mask_id": MASK, "temperature": 1.0, "confidence": "neg_entropy", **way}
    want, _ = unmask("cuda", hidden, head, tokens, positions, ik.TopK(0), **options)
    on_cpu.launch.junk = 1e30
    for on_cpu.launch.seed, some in enumerate(([7], [21, 3, 39, 7, 0], torch.randperm(40, generator=draw).tolist())):
        got, _ = unmask("cuda", hidden[:, some], head, tokens, positions[:, some], ik.TopK(0), **options)
        assert torch.equal(got.proposal, want.proposal[:, some])
        assert torch.equal(got.confidence, want.confidence[:, some])


@pytest.mark.parametrize("vocabulary", [300, 700])
def test_pairs_of_blocks_list_their_own_tiles(on_cpu: Backend, vocabulary: int) -> None:
    """From 65 rows on, every third of them drawn; with three tiles the second block multiplies one beyond the vocab."""
    hidden, head = operands("head", (2, 33), vocabulary)
    tokens, positions = where((2, 33), 33)
    tokens[torch.arange(33).expand(2, 33) % 3 > 0] = 0
    for way in ({"top_k": torch.tensor([20, 150])}, {"min_p": 0.01}):
        both(hidden, head, tokens, positions, ik.TopK(5), mask_id=MASK, temperature=2.0, **way)


def test_the_workspace_follows_from_shapes_alone(on_cpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """No logits of whole rows beside it: 4.25 bytes a row and id, 1088 a row and 256 a row and block."""
    monkeypatch.setattr(gpu, "TwoBuffers", None)
    sizes = []
    described = cuda.describe
    monkeypatch.setattr(
        cuda,
        "describe",
        lambda p, partials, bounds, lists: sizes.append(lists.shape) or described(p, partials, bounds, lists),
    )
    for way in ({"top_k": 3}, {"top_k": torch.tensor(0)}, {"min_p": 0.5}, {"top_p": 0.9}):
        unmask(
            "cuda", *operands("head", (1, 9), 1000), *where((1, 9), 9), ik.TopK(1), mask_id=MASK, temperature=1.0, **way
        )
    assert {tuple(size) for size in sizes} == {(9, (4 + 1) * 272 + 2 * 64)}


# ---- planted faults --------------------------------------------------------------------------------------------------
HEAD, DRAW = SOURCES[2], SOURCES[4]
FAULTS: dict[str, Faults] = {  # by the call that sees them
    "top_k": {
        "a floor that too little reaches": (
            HEAD,
            "t.reached >= at.wanted ?",
            "t.reached >= at.wanted / (FAULT ? 4 : 1) ?",
        ),
        "a new threshold that keeps its count": (
            HEAD,
            "t = Threshold{mine, 0};",
            "t = Threshold{mine, FAULT ? t.reached : 0};",
        ),
        "ids that do not reach a threshold are counted": (HEAD, "int(x.y >= t.at)", "int(FAULT || x.y >= t.at)"),
        "counts begin with what lies in memory": (HEAD, "at.count ? *own", "FAULT || at.count ? *own"),
        "no floor at all": (HEAD, "listing.floor = at.floor;", "if (!FAULT) listing.floor = at.floor;"),
        "a list that begins anew": (HEAD, "places.after = at.count;", "places.after = FAULT ? 0 : at.count;"),
        "logits without their biases": (HEAD, "if (c.truncate)  // for the lists", "if (!FAULT && c.truncate)"),
        "another row's lists": (HEAD, "begin_listing(c, r, row)", "begin_listing(c, FAULT ? 0 : r, row)"),
        "places counted for each id alone": (
            HEAD,
            "((1u << lane) - 1))) = l[j];",
            "((1u << lane) - 1 - FAULT))) = l[j];",
        ),
        "a list ends with its first tile": (
            DRAW,
            "- tile / parts * kTile;",
            "- (FAULT ? 4 : 1) * (tile / parts * kTile);",
        ),
        "what was never listed is searched": (DRAW, "j * 32 + lane < left ?", "FAULT || j * 32 + lane < left ?"),
        "the first part's count for all": (DRAW, "left = counts[part]", "left = counts[FAULT ? 0 : part]"),
        "the bound itself is dropped": (
            DRAW,
            "    l[j] = l[j] >= bound",
            "    l[j] = (FAULT ? l[j] > bound : l[j] >= bound)",
        ),
        "noise of another id": (DRAW, "half * 128, row", "half * 128 + 256 * FAULT, row"),
        "a row that keeps all is drawn again": (
            DRAW,
            "if (by.keeps_all()) return;",
            "if (!FAULT && by.keeps_all()) return;",
        ),
    },
    "min_p": {
        "no barrier before lists are made": (
            HEAD,
            "= running;\n        __syncwarp();",
            "= running;\n        if (!FAULT) __syncwarp();",
        ),
        "a floor above what min_p keeps": (
            HEAD,
            "__fadd_rn(top, at.drop)",
            "__fadd_rn(top, (FAULT ? 0.5f : 1.0f) * at.drop)",
        ),
        "a part of the lists is not drawn from": (DRAW, "from < 2 * tiles;", "from < 2 * tiles - 16 * FAULT;"),
        "halves exchanged": (DRAW, "* 2 + half % 2;", "* 2 + (half + FAULT) % 2;"),
        "lanes exchanged": (DRAW, "places.of[j] >> lane & 1", "places.of[j] >> (FAULT ? 31 - lane : lane) & 1"),
        "no barrier before the warps' merge": (
            DRAW,
            "= best;\n  __syncthreads();",
            "= best;\n  if (!FAULT) __syncthreads();",
        ),
        "ties go to any id": (
            DRAW,
            "other.best_score == best.best_score && before",
            "other.best_score == best.best_score && (FAULT || before)",
        ),
        "the first warp's best": (DRAW, "w < kWarps; ++w", "w < (FAULT ? 1 : kWarps); ++w"),
        "the best of a part as it was met": (
            HEAD,
            "if (s.listings[r].count >= 0)  // no best yet",
            "if (!FAULT && s.listings[r].count >= 0)",
        ),
    },
    "top_p": {
        "the last tile is not searched": (DRAW, "tile < tiles; tile += kWarps", "tile < tiles - FAULT; tile += kWarps"),
        "min_p leaves nothing for top_p to weigh": (
            HEAD,
            "by.top_p < 1.0f ? -infinity()",
            "!FAULT && by.top_p < 1.0f ? -infinity()",
        ),
    },
}
ALL_FAULTS = {name: fault for faults in FAULTS.values() for name, fault in faults.items()}


CALLS: dict[str, tuple[int, int, float, dict[str, Any]]] = {
    # blocks, rows of a sequence, most that a block lists of a row on average, options
    "top_k": (2, 4, 240.0, {"top_k": torch.tensor([60, 5])}),
    "min_p": (2, 3, 300.0, {"min_p": 0.4}),  # a row for a warp
    "top_p": (1, 4, INF, {"top_p": 0.15, "min_p": 0.2}),
}


def make(call: str, backend: Backend, launch: Listing) -> None:
    """Checks one of the calls, which between them need all of what lists and draws."""
    backend.processors, count, most, way = CALLS[call]
    vocabulary, draw = 2500, torch.Generator().manual_seed(1)
    logits = torch.randn(2, count, vocabulary, generator=draw) * 2
    logits[:, 0, 131] = 9.0  # the first tile shows what min_p would keep
    logits[:, 1::2] += torch.arange(vocabulary) / 20  # the largest come last
    logits[:, 2] = logits[:, 2].round()  # ties
    args = (*as_hidden(logits), *where((2, count), 8, vocabulary), ik.TopK(1))
    options: dict[str, Any] = {"mask_id": vocabulary, "temperature": torch.tensor([6.0, 3.0]), "seed": 5}
    options["head_bias"] = torch.randn(vocabulary, generator=draw).round() / 2
    options["forbid"] = tuple(range(130))  # all of the first half tile
    for launch.seed, launch.junk in enumerate((torch.nan, 30.0)):
        both(*args, **options, **way)
        assert launch.listed.float().mean() < most
    if call == "top_k":
        both(*args, **options, top_k=torch.tensor([0, 5]))
    if call == "min_p":  # noise too small for any score: the lowest id of all warps
        both(*as_hidden(torch.ones_like(logits)), *args[2:], mask_id=vocabulary, temperature=1e-30, **way)
        # more parts than blocks that draw, and scores below the largest logit, which one of the last parts met
        backend.processors, two = 10, torch.zeros(2, 8, vocabulary)
        two[..., 2400], two[..., 2450] = 8.0, 7.0
        options = {"mask_id": vocabulary, "temperature": 99.0, "seed": 17, "top_k": 2}  # three such rows
        both(*as_hidden(two), *where((2, 8), 8, vocabulary), ik.TopK(1), **options)


@pytest.mark.parametrize("call", FAULTS)
def test_the_calls_that_find_faults_pass_without_one(call: str, on_cpu: Backend) -> None:
    make(call, on_cpu, kernels())


@pytest.mark.parametrize("call, kernel, name", [(c, f[name][0], name) for c, f in FAULTS.items() for name in f])
def test_planted_faults_are_seen(call: str, kernel: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = planted(ALL_FAULTS, kernel, name, of=Listing, most_steps=MOST_STEPS)
    with pytest.raises((KernelFault, AssertionError)):
        make(call, Backend(monkeypatch, launch), launch)
