"""The cuda backend's top_k, top_p, min_p and Renoise on the CPU: its kernels in the emulator against the reference, and
planted faults that these tests must see."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import illada_kernels as ik
from illada_kernels.ops.unmask import gpu
from tests.cuda_on_cpu.library import KernelFault, missing
from tests.helpers.unmask_on_cpu import (
    SOURCES,
    Backend,
    Faults,
    OnCpu,
    assert_same,
    operands,
    planted,
    unmask,
    use,
    where,
)
from tests.helpers.unmask_oracle import INF, MASK, draw_call

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


MOST_STEPS = 1 << 22  # that a block may take: the calls below pass under it without a fault, and some faults never end


@functools.cache
def kernels() -> OnCpu:
    return OnCpu(most_steps=MOST_STEPS)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Backend:
    kernels().launches.clear()
    kernels().seed = 0
    return Backend(monkeypatch, kernels())


def both(*args: Any, vocabulary: int, by_entropy: bool = False, **options: Any) -> Any:
    """The step, checked against the reference."""
    got = unmask("cuda", *args, **options)
    assert_same(got, unmask("reference", *args, **options), vocabulary, by_entropy)
    return got


# ---- against the specification ---------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_drawn_calls_equal_the_reference(on_cpu: Backend, data: Any) -> None:
    logits, tokens, positions, rule, options = draw_call(data.draw, truncated=True)
    by_entropy = options["confidence"] == "neg_entropy"
    both(logits, None, tokens, positions, rule, vocabulary=logits.shape[2], by_entropy=by_entropy, **options)


TRUNCATIONS: dict[str, dict[str, Any]] = {
    "top_k": {"top_k": torch.tensor([1, 700])},
    "top_p": {"top_p": torch.tensor([0.9, 0.2])},
    "min_p": {"min_p": 0.05},
    "all": {"top_k": 1000, "top_p": 0.8, "min_p": torch.tensor(0.01)},
}


@pytest.mark.parametrize("vocabulary", [1, 255, 4097, 20000])
@pytest.mark.parametrize("name", TRUNCATIONS)
def test_matmuls_truncate_by_whole_rows_of_logits(
    on_cpu: Backend, monkeypatch: pytest.MonkeyPatch, name: str, vocabulary: int
) -> None:
    use(on_cpu, "product", monkeypatch)  # test_cuda_lists.py has what the fused head does
    hidden, head = operands("head", (2, 3), vocabulary, dim=72 if vocabulary < 2000 else 8)
    tokens, positions = where((2, 3), 5, vocabulary)
    tokens[0, positions[0, 1]] = 0  # takes no part: its row may be anything
    hidden[0, 1] = torch.nan
    bias = (torch.arange(vocabulary) % 5 / 4).bfloat16()
    options = {"mask_id": vocabulary, "forbid": (), "head_bias": bias, "temperature": 0.9, **TRUNCATIONS[name]}
    both(hidden, head, tokens, positions, ik.TopK(2), vocabulary=vocabulary, **options)
    a_chunk = ["unmask_bounds_cuda", "unmask_rows_cuda"]
    assert on_cpu.launch.launches == a_chunk * 2 + ["unmask_select_cuda"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_any_place_of_a_row_is_found(on_cpu: Backend, dtype: torch.dtype) -> None:
    """Ranks from the first to the last, where few and where many values lie, also where they repeat; of more ids than
    a list holds."""
    draw, last = torch.Generator().manual_seed(2), 30001 if dtype == torch.float32 else 10001
    logits = (torch.randn(9, 2, last, generator=draw) * 3).to(dtype)
    logits[:, 1] = (logits[:, 1] * 2).round() / 2
    ranks = torch.tensor([1, 2, 40, 999, last // 4, last // 2, last - 1001, last - 1, last])
    options = {"mask_id": last, "temperature": 4.0, "seed": torch.arange(9), "forbid": ()}
    args = (logits, None, torch.full((9, 2), last), torch.arange(2).expand(9, 2), ik.TopK(1))
    for way in ({"top_k": ranks}, {"top_p": 1 - (1 - ranks / last) ** 2}, {"min_p": torch.logspace(-7, 0, 9)}):
        both(*args, vocabulary=last, **way, **options)


def test_nothing_is_truncated_without_noise(on_cpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    use(on_cpu, "head", monkeypatch)
    args = (*operands("head", (1, 4), 300), *where((1, 4), 4), ik.TopK(2))
    plain = unmask("cuda", *args, mask_id=MASK)
    on_cpu.launch.launches.clear()
    got = unmask("cuda", *args, mask_id=MASK, top_k=1, top_p=0.5, min_p=0.5)
    assert all(map(torch.equal, got[0], plain[0])) and torch.equal(got[1], plain[1])
    assert on_cpu.launch.launches == ["unmask_head_sm90a", "unmask_select_cuda"]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e38])
@pytest.mark.parametrize("temperature", [1e-38, 1.0, 3.4e38])
def test_extreme_logits_and_temperatures_keep_the_best(on_cpu: Backend, scale: float, temperature: float) -> None:
    logits = torch.randint(-4, 5, (1, 4, 300), generator=torch.Generator().manual_seed(8)) / 4 * scale
    for way in ({"top_k": 1}, {"top_p": 0.0}, {"top_p": 1e-45}, {"min_p": 1.0}):
        got, _ = unmask(
            "cuda", logits, None, *where((1, 4), 4), ik.TopK(1), mask_id=MASK, temperature=temperature, **way
        )
        allowed = torch.where(torch.arange(300) == MASK, -INF, logits)
        assert (allowed.gather(2, got.proposal[..., None]) == allowed.amax(2, keepdim=True)).all(), way


def test_bad_rows_propose_nothing_and_leave_the_others(on_cpu: Backend) -> None:
    logits = torch.randn(1, 6, 600, generator=torch.Generator().manual_seed(9))
    logits[0, 0, -1], logits[0, 4, 3] = torch.nan, INF
    logits[0, 2] = -INF
    tokens, positions = where((1, 6), 6)
    for rule in (ik.TopK(9), ik.Renoise(1.0)):
        options: dict[str, Any] = {"mask_id": MASK, "temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01}
        got, _ = both(logits, None, tokens, positions, rule, vocabulary=600, **options)
        assert got.proposal[0, [0, 2, 4]].tolist() == [-1] * 3


@pytest.mark.parametrize("rows, path", [((2, 5), "head"), ((2, 5), "product"), ((2, 5), "spans"), ((1, 1030), "spans")])
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_renoised_canvases_equal_the_reference(
    on_cpu: Backend, monkeypatch: pytest.MonkeyPatch, rows: tuple[int, int], path: str, temperature: float
) -> None:
    use(on_cpu, path, monkeypatch)
    vocabulary = 4500 if rows[1] < 99 else 9
    source, head = operands(path, rows, vocabulary, dim=8)
    _, positions = where(rows, rows[1] + 3)
    canvas = torch.randint(0, vocabulary, (rows[0], rows[1] + 3), generator=torch.Generator().manual_seed(4))
    frozen = canvas % 7 == 0
    ways = [{}, {"top_k": 3, "confidence": "sampled"}, {"defer": tuple(range(0, vocabulary, 2)), "order": "left"}]
    for way in ways if rows[1] < 99 else ways[2:]:
        options: dict[str, Any] = {
            "mask_id": -1,
            "temperature": temperature,
            "frozen": frozen,
            "step": 2**32 - 1,
            **way,
        }
        both(source, head, canvas, positions, ik.Renoise(40.0), vocabulary=vocabulary, **options)


@pytest.mark.parametrize("way", [{"top_k": 900}, {"top_p": 0.9}])
def test_every_schedule_and_batch_gives_the_same_bits(on_cpu: Backend, way: dict[str, Any]) -> None:
    logits = torch.randn(3, 2, 9000, generator=torch.Generator().manual_seed(5)) * 2
    positions = torch.arange(2).expand(3, 2)
    options: dict[str, Any] = {"mask_id": 9000, "temperature": 2.0, "seed": torch.arange(3), **way}
    results = []
    for seed in range(4):
        on_cpu.launch.seed = seed
        results.append(unmask("cuda", logits, None, torch.full((3, 2), 9000), positions, ik.TopK(1), **options))
    for got, after in results[1:]:
        assert all(map(torch.equal, got, results[0][0])) and torch.equal(after, results[0][1])
    options["seed"] = torch.tensor([1])
    one, _ = unmask("cuda", logits[1:2], None, torch.full((1, 2), 9000), positions[:1], ik.TopK(1), **options)
    assert torch.equal(one.proposal, results[0][0].proposal[1:2])
    assert torch.equal(one.confidence, results[0][0].confidence[1:2])


def test_the_workspace_is_a_chunk_of_rows(on_cpu: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rows: two buffers of gpu.TRUNCATED_ROWS rows of logits."""
    use(on_cpu, "product", monkeypatch)
    sizes = []
    buffers = gpu.TwoBuffers
    monkeypatch.setattr(gpu, "TwoBuffers", lambda size, *rest: sizes.append(size) or buffers(size, *rest))
    monkeypatch.setattr(gpu, "product_rows", lambda rows: 1024)
    monkeypatch.setattr(gpu, "TRUNCATED_ROWS", 4)
    both(
        *operands("head", (1, 9), 300),
        *where((1, 9), 9),
        ik.TopK(1),
        vocabulary=300,
        mask_id=MASK,
        temperature=1.0,
        top_k=3,
    )
    assert sizes == [4 * 300]


# ---- planted faults --------------------------------------------------------------------------------------------------
SELECT, ROWS, _, BOUNDS, _ = SOURCES
REDRAWN = "row.noise_position, row.step, "
FAULTS: dict[str, Faults] = {  # by the call that sees them
    "one id and half of them": {
        "the end stays where it was": (BOUNDS, "high = at.from[i], above", "high = FAULT ? high : at.from[i], above"),
        "the start stays where it was": (
            BOUNDS,
            "low = at.from[i], reached",
            "low = FAULT ? low : at.from[i], reached",
        ),
        "a list that is too short": (
            BOUNDS,
            "between / lightest <= kList * 15 / 16",
            "between / lightest <= (FAULT ? kList * 99 : kList * 15 / 16)",
        ),
        "the list holds what lies above too": (
            BOUNDS,
            "|| key_of(l) >= at.end) return;",
            "|| (!FAULT && key_of(l) >= at.end)) return;",
        ),
        "no barrier before sums are read": (
            BOUNDS,
            "  }\n  __syncthreads();\n}\n\n// Continues",
            "  }\n  if (!FAULT) __syncthreads();\n}\n\n// Continues",
        ),
    },
    "min_p": {
        "min_p without the temperature": (BOUNDS, "__fmul_rn(t, fminf(", "__fmul_rn(FAULT ? 1.0f : t, fminf("),
        "ids that no warp reads": (BOUNDS, "start += kThreads * kIds", "start += (1 + FAULT) * kThreads * kIds"),
        "another row's bound": (ROWS, "c.bounds[r]", "c.bounds[FAULT ? 0 : r]"),
        "what is dropped is drawn": (ROWS, "kept[j] = l[j] >= bound ?", "kept[j] = FAULT || l[j] >= bound ?"),
    },
    "top_k": {
        "the first key that too little reaches": (BOUNDS, "return at.from[0];", "return FAULT ? at.end : at.from[0];"),
        "steps round down": (
            BOUNDS,
            "(high - low + kWays - 1) / kWays",
            "(high - low + (FAULT ? 0 : kWays - 1)) / kWays",
        ),
        "the bound itself is dropped": (ROWS, "l[j] >= bound ?", "(FAULT ? l[j] > bound : l[j] >= bound) ?"),
    },
    "top_p": {
        "a part of the sum is lost": (BOUNDS, "(middle << 21)", "(FAULT ? 0 : middle << 21)"),
        "what lies beyond the list is forgotten": (BOUNDS, "sum + at.beyond", "sum + (FAULT ? 0 : at.beyond)"),
        "top_p under the confidence's temperature": (
            BOUNDS,
            "goal.row.scale = fminf(1.0f / t, kLargest)",
            "goal.row.scale = FAULT ? row.scale : fminf(1.0f / t, kLargest)",
        ),
    },
    "all of them": {
        "top_p counts what top_k dropped": (
            BOUNDS,
            "key_of(fmaxf(bound, -kLargest))",
            "key_of(FAULT ? -kLargest : fmaxf(bound, -kLargest))",
        ),
        "min_p lowers a bound": (
            BOUNDS,
            "return fmaxf(bound, __fadd_rn(",
            "return fmaxf(FAULT ? -infinity() : bound, __fadd_rn(",
        ),
    },
    "all are accepted": {
        "the last warp is not summed": (BOUNDS, "lane < kBoundWarps ?", "lane < kBoundWarps - FAULT ?"),
        "no barrier before the list is read": (
            BOUNDS,
            "of the caller\n  });\n  __syncthreads();",
            "of the caller\n  });\n  if (!FAULT) __syncthreads();",
        ),
        "the best token of an earlier part": (
            ROWS,
            "b.top > a.top ? b.held_logit",
            "!FAULT && b.top > a.top ? b.held_logit",
        ),
        "the best token of an earlier tile": (
            ROWS,
            "ILLADA_NEEDS_TOP_ID && top > s.top)",
            "ILLADA_NEEDS_TOP_ID && (FAULT ? top < s.top : top > s.top))",
        ),
        "held tokens take no part": (
            ROWS,
            "|| (EXTENDED && c.rule == ILLADA_RENOISE)",
            "|| (!FAULT && EXTENDED && c.rule == ILLADA_RENOISE)",
        ),
        "the best token of the last part": (
            SELECT,
            "Best{t, t, __float_as_int",
            "Best{FAULT ? 0.0f : t, t, __float_as_int",
        ),
        "the token drawn is reported": (
            SELECT,
            "shown.proposal = result.top_id;",
            "if (!FAULT) shown.proposal = result.top_id;",
        ),
        "the confidence of the token drawn": (
            SELECT,
            "result.top_id = largest.id, best.logit = top;",
            "result.top_id = largest.id, best.logit = FAULT ? best.logit : top;",
        ),
        "accepted tokens are redrawn": (
            SELECT,
            "if (proposal[k] < 0 || committed[k]) continue;",
            "if (proposal[k] < 0 || (!FAULT && committed[k])) continue;",
        ),
    },
    "all but one are accepted": {
        "redraws with the ranks' noise": (SELECT, f"{REDRAWN}3)", f"{REDRAWN}FAULT ? 2 : 3)"),
        "masks are counted": (SELECT, "(RENOISE ? !committed[k] :", "(!FAULT && RENOISE ? !committed[k] :"),
    },
}
ALL_FAULTS = {name: fault for faults in FAULTS.values() for name, fault in faults.items()}

CALLS: dict[str, tuple[int, Any, dict[str, Any]]] = {  # the seed of the schedule, the rule, options
    "one id and half of them": (0, ik.TopK(1), {"top_k": torch.tensor([1, 9000])}),
    "top_k": (1, ik.TopK(1), {"top_k": torch.tensor([30, 300])}),
    "top_p": (2, ik.TopK(1), {"top_p": torch.tensor([0.5, 0.97])}),
    "all of them": (3, ik.TopK(1), {"top_k": 200, "top_p": 0.7, "min_p": 1e-6}),
    "min_p": (4, ik.TopK(1), {"min_p": torch.tensor([0.3, 0.01])}),
    "all are accepted": (0, ik.Renoise(9.0), {"top_k": 400, "rank_temperature": 1.0}),
    "all but one are accepted": (1, ik.Renoise(2.0), {"top_k": 400, "rank_temperature": 1.0}),
}


def make(call: str, launch: OnCpu) -> None:
    """Checks one of CALLS, which between them need all of what truncates and renoises."""
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 17001, generator=draw) * 3
    logits[:, 2] = (logits[:, 2] / 3).round()
    logits[0, 0, 16500:] += 4
    canvas = torch.randint(0, 17001, (2, 5), generator=draw)
    launch.seed, rule, way = CALLS[call]
    tokens, positions = torch.full((2, 5), -1), torch.tensor([[4, 0, 2], [1, 2, 3]])
    options: dict[str, Any] = {"mask_id": -1, "temperature": torch.tensor([3.0, 1.5]), "confidence_temperature": 0.5}
    tokens = canvas if isinstance(rule, ik.Renoise) else tokens
    both(logits, None, tokens, positions, rule, vocabulary=17001, **options, **way)


@pytest.mark.parametrize("call", CALLS)
def test_the_calls_that_find_faults_pass_without_one(call: str, on_cpu: Backend) -> None:
    make(call, on_cpu.launch)


@pytest.mark.parametrize("call", CALLS)
def test_kernels_with_no_fault_chosen_pass_too(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = OnCpu(most_steps=MOST_STEPS)
    for kernel in (SELECT, ROWS, BOUNDS):
        place = SOURCES.index(kernel)
        launch.kernels[place] = planted(ALL_FAULTS, kernel, None, extended=True).kernels[place]
    Backend(monkeypatch, launch)
    make(call, launch)


@pytest.mark.parametrize("call, name", [(call, name) for call, faults in FAULTS.items() for name in faults])
def test_planted_faults_are_seen(call: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = planted(ALL_FAULTS, ALL_FAULTS[name][0], name, extended=True, most_steps=MOST_STEPS)
    Backend(monkeypatch, launch)
    with pytest.raises((KernelFault, AssertionError)):
        make(call, launch)
