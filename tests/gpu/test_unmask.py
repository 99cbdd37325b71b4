"""unmask on a GPU, every GPU backend: against the reference, one path against another, graphs, launches, memory.

Operands are small integers, so that logits are exact in every order of summation and tokens must agree; where they are
random, a proposal may differ only where the bound on the rounding of two scores lets it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import illada_kernels as ik
from illada_kernels.ops.unmask import BACKENDS, cuda, gpu
from illada_kernels.testing import unmask_confidence_tolerance

GPU_BACKENDS = [b for b in BACKENDS if b.devices == ("cuda",)]
reasons = {b.name: b.available() for b in GPU_BACKENDS} if torch.cuda.is_available() else {}
NAMES = [name for name, reason in reasons.items() if reason is None]
pytestmark = pytest.mark.skipif(not NAMES, reason="no CUDA GPU" if not reasons else str(reasons))
backends = pytest.mark.parametrize("backend", NAMES or ["none"])
INF = float("inf")
PATHS = ("hidden", "many", "logits")  # fused with the head, by products, from logits


def operands(path: str, rows: tuple[int, int], vocabulary: int, dim: int, seed: int = 0) -> tuple[Tensor, ...]:
    draw = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randint(-3, 4, (*rows, dim), generator=draw, device="cuda") / 8
    head = torch.randint(-8, 9, (vocabulary, dim), generator=draw, device="cuda") / 8
    return (hidden @ head.T,) if path == "logits" else (hidden.bfloat16(), head.bfloat16())


def where(rows: tuple[int, int], length: int, mask_id: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator("cuda").manual_seed(1)
    order = torch.rand(rows[0], length, generator=draw, device="cuda").argsort(1)
    return torch.full((rows[0], length), mask_id, device="cuda"), order[:, : rows[1]].contiguous()


def step(backend: str, inputs: tuple[Tensor, ...], tokens: Tensor, *args: Any, **options: Any) -> tuple[Any, Tensor]:
    function: Any = ik.unmask_from_logits if len(inputs) == 1 else ik.unmask
    after = tokens.clone()
    return function(*inputs, after, *args, backend=backend, **options), after


def assert_same(got: Any, want: Any, vocabulary: int, by_entropy: bool) -> None:
    (got, got_tokens), (want, want_tokens) = got, want
    assert torch.equal(got.proposal, want.proposal)
    rtol, atol = unmask_confidence_tolerance("neg_entropy" if by_entropy else "probability", vocabulary)
    torch.testing.assert_close(got.confidence, want.confidence, rtol=rtol, atol=atol)
    assert torch.equal(got.committed, want.committed) and torch.equal(got.remaining, want.remaining)
    assert torch.equal(got_tokens, want_tokens)


OPTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "top k": (ik.TopK(3), {}),
    "noise, margin": (ik.TopK(3), {"temperature": 1.0, "confidence": "margin", "seed": 3}),
    "entropy": (ik.EntropyBound(4.0), {"temperature": 0.5, "confidence": "neg_entropy", "confidence_temperature": 0.5}),
    "edit, random": (ik.TopK(2), {"revise": ik.Edit(0.3), "confidence": "random"}),
    "truncated": (ik.TopK(3), {"temperature": 2.0, "top_k": 900, "top_p": 0.95, "min_p": 1e-4}),
    "top k, min p": (ik.TopK(3), {"temperature": 2.0, "top_k": 900, "min_p": 1e-4, "confidence": "sampled"}),
    "top p": (ik.TopK(3), {"temperature": 2.0, "top_p": 0.8}),
    "renoise": (ik.Renoise(9.0), {"temperature": 1.0, "seed": 2}),
    "remask, bias": (ik.Factor(2.0), {"revise": ik.Remask(2), "logit_bias": ([3, 3, 700], [1.0, 0.5, -INF])}),
}


@backends
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rows", [(1, 1), (2, 9), (3, 21), (1, 128)], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_is_the_reference_s(
    monkeypatch: pytest.MonkeyPatch, backend: str, path: str, rows: tuple[int, int], name: str
) -> None:
    if path == "many":
        monkeypatch.setattr(gpu, "FUSED_ROWS", 0)
    vocabulary = 34003  # more tiles than there are multiprocessors
    inputs = operands(path, rows, vocabulary, 264)
    tokens, positions = where(rows, rows[1] + 5, 34000)
    tokens[:, ::3] = 7
    if "revise" not in OPTIONS[name][1]:
        held = tokens.gather(1, positions) != 34000
        inputs[0][held] = torch.nan  # takes no part
    rule, options = OPTIONS[name]
    args = (inputs, tokens, positions, rule)
    got = step(backend, *args, mask_id=34000, **options)
    assert_same(got, step("reference", *args, mask_id=34000, **options), vocabulary, "entropy" in name)


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_token_differs_but_where_rounding_decides(backend: str, dtype: torch.dtype) -> None:
    """A score is off by at most (D + 2) 2^-24 sum |h w| and a few 2^-24 of its terms; counted over 128 rows."""
    from illada_kernels.ops.unmask.noise import gumbel

    draw = torch.Generator("cuda").manual_seed(3)
    hidden = torch.randn(1, 128, 1024, generator=draw, device="cuda").to(dtype)
    head = (torch.randn(50257, 1024, generator=draw, device="cuda") / 16).to(dtype)
    tokens, positions = where((1, 128), 128, 0)
    got, _ = step(backend, (hidden, head), tokens, positions, ik.TopK(1), mask_id=0, temperature=1.0, forbid=())
    exact = hidden[0].double() @ head.double().T
    zero = torch.zeros(128, 1, dtype=torch.int64, device="cuda")
    g = gumbel(zero, positions.reshape(-1, 1), zero, 50257).double()
    scores = exact + g
    size = hidden[0].double().abs() @ head.double().abs().T
    bound = 2.0**-24 * (1026 * size + 8 * (exact.abs() + g.abs()))
    best, there = scores.max(1)
    mine = got.proposal[0, :, None]
    slack = bound.gather(1, mine) + bound.gather(1, there[:, None])
    assert (best[:, None] - scores.gather(1, mine) <= slack).all()
    assert (mine[:, 0] != there).sum() <= 2


@backends
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("way", [{}, {"top_k": 50, "min_p": 1e-3}], ids=["all ids", "few ids"])
def test_a_row_does_not_depend_on_the_others(
    monkeypatch: pytest.MonkeyPatch, backend: str, path: str, way: dict[str, Any]
) -> None:
    """Also across the widths of the fused product: 16, 32, 64 and 128 rows."""
    if path == "many":
        monkeypatch.setattr(gpu, "FUSED_ROWS", 0)
    draw = torch.Generator("cuda").manual_seed(4)
    hidden = torch.randn(1, 128, 1024, generator=draw, device="cuda").bfloat16()
    head = (torch.randn(40000, 1024, generator=draw, device="cuda") / 16).bfloat16()
    rest = () if path == "logits" else (head,)
    source = (hidden.float() @ head.float().T).bfloat16() if path == "logits" else hidden
    tokens, positions = torch.zeros(1, 128, dtype=torch.int64, device="cuda"), torch.arange(128, device="cuda")[None]
    options: dict[str, Any] = {"mask_id": 0, "temperature": 1.0, "confidence": "neg_entropy", **way}
    want, _ = step(backend, (source, *rest), tokens, positions, ik.TopK(0), **options)
    for some in ([7], [21, 3, 127, 7, 0], list(range(40, 72)), list(range(64)), torch.randperm(128).tolist()):
        got, _ = step(backend, (source[:, some], *rest), tokens, positions[:, some], ik.TopK(0), **options)
        assert torch.equal(got.proposal, want.proposal[:, some])
        assert torch.equal(got.confidence, want.confidence[:, some])


@backends
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("truncated", [False, True])
def test_a_captured_step_follows_its_tensors_and_never_synchronises(
    monkeypatch: pytest.MonkeyPatch, backend: str, path: str, truncated: bool
) -> None:
    if path == "many":
        monkeypatch.setattr(gpu, "FUSED_ROWS", 0)
    inputs = operands(path, (2, 24), 9000, 128)
    start, positions = where((2, 24), 24, 8999)
    tokens, seed, at = start.clone(), torch.tensor(3, device="cuda"), torch.tensor(0, device="cuda")
    k, temperature = torch.tensor([1, 2], device="cuda"), torch.tensor(1.0, device="cuda")
    function: Any = ik.unmask_from_logits if path == "logits" else ik.unmask
    options: dict[str, Any] = {"mask_id": 8999, "backend": backend}
    if truncated:
        options |= {"top_k": torch.tensor([50, 0], device="cuda"), "min_p": torch.tensor(1e-3, device="cuda")}

    def once() -> Any:
        parameters = {"seed": seed, "step": at, "temperature": temperature}
        return function(*inputs, tokens, positions, ik.TopK(k), **parameters, **options)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            once()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    tokens.copy_(start)
    expected = start.clone()
    for turn in range(4):
        seed.fill_(10 + turn)
        at.fill_(turn)
        k.copy_(torch.tensor([turn, 3], device="cuda"))
        temperature.fill_(turn / 2)
        graph.replay()
        parameters: dict[str, Any] = {"seed": 10 + turn, "step": turn, "temperature": turn / 2}
        rule = ik.TopK(torch.tensor([turn, 3], device="cuda"))
        want = function(*inputs, expected, positions, rule, **parameters, **options)
        assert all(map(torch.equal, captured, want)) and torch.equal(tokens, expected)


@pytest.mark.parametrize(
    "path, way, launches",
    [("hidden", {}, 2), ("logits", {}, 2), ("hidden", {"top_k": 5, "min_p": 0.1}, 3), ("hidden", {"top_p": 0.5}, 3)],
)
def test_few_launches(path: str, way: dict[str, Any], launches: int) -> None:
    if reasons.get("cuda") is not None or (path == "hidden" and not cuda.is_hopper(torch.device("cuda", 0))):
        pytest.skip("needs the fused head")
    inputs = operands(path, (2, 24), 9000, 128)
    tokens, positions = where((2, 24), 24, 8999)
    args = (inputs, tokens, positions, ik.TopK(2))
    options: dict[str, Any] = {"mask_id": 8999, "temperature": 1.0, "confidence": "margin", "revise": ik.Edit(0.9)}
    options |= way
    step("cuda", *args, **options)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step("cuda", *args, **options)
        torch.cuda.synchronize()
    names = [e.name for e in profile.events() if e.device_type == torch.profiler.DeviceType.CUDA]
    ours = [name for name in names if "emcpy" not in name]  # the clone of the tokens is the test's
    assert len(ours) == launches, names


@pytest.mark.large
@backends
def test_long_sequences_and_logits_beyond_two_to_the_31(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of GPU memory")
    count, vocabulary = 17000, 126464
    logits = torch.zeros(1, count, vocabulary, dtype=torch.bfloat16, device="cuda")
    logits[0, -1, -1] = 5.0
    tokens = torch.zeros(1, count, dtype=torch.int64, device="cuda")
    tokens[0, [5, -1]] = 126336
    positions = torch.arange(count, device="cuda")[None]
    got, after = step(backend, (logits,), tokens, positions, ik.TopK(1), mask_id=126336)
    assert after[0, -1] == vocabulary - 1 and after[0, 5] == 126336 and got.remaining.item() == 1


@pytest.mark.large
@backends
def test_the_whole_of_llada_s_loop_fits_64_mib(backend: str) -> None:
    """32 sequences of 1024 candidates: full logits would be 8 GiB in bf16, with noise in float64 32 GiB four times."""
    batch, count, vocabulary, dim = 32, 1024, 126464, 256
    hidden = torch.randn(batch, count, dim, device="cuda").bfloat16()
    head = torch.randn(vocabulary, dim, device="cuda").bfloat16()
    tokens = torch.full((batch, count), 126336, device="cuda")
    positions = torch.arange(count, device="cuda").expand(batch, count)

    def once() -> Any:
        options: dict[str, Any] = {"mask_id": 126336, "temperature": 1.0, "backend": backend}
        return ik.unmask(hidden, head, tokens.clone(), positions, ik.TopK(8), **options)

    once()  # cuBLAS keeps a workspace of its own from here on
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    got = once()
    assert torch.cuda.max_memory_allocated() - before <= 64 << 20
    assert got.committed.sum() == 8 * batch
