"""What masked_loss costs on a GPU: memory, products and reads by the host, by gpu.py with tensors that have no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from illada_kernels._matmul import float32_sums
from illada_kernels.ops.masked_loss import cases, gpu
from illada_kernels.ops.masked_loss.problem import Problem
from illada_kernels.ops.masked_loss.row_kernels import rows_of


class Info:
    """rows.info: on the host only by tolist, which counts; on the device as any tensor."""

    def __init__(self, count: int) -> None:
        self.count, self.reads = count, 0

    def tolist(self) -> list[int]:
        self.reads += 1
        return [self.count, -1]

    def __getitem__(self, at: int) -> Tensor:
        return torch.empty((), dtype=torch.int32, device="meta")


class NoKernels:
    """Row operations that do nothing."""

    def __init__(self, count: int) -> None:
        self.info = Info(count)

    def compact(self, masked: Tensor, *args: Any) -> Any:
        return replace(rows_of(args[-1], masked.numel(), args[-1], masked.device), info=self.info)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: None


class Costs(TorchDispatchMode):
    """Bytes that tensors made within it take at most, and operations of its products. Tensors on "meta" raise where a
    value is asked for."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.alive = self.most = 0
        self.flops = 0.0
        self.known = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                self.most = max(self.most, self.alive)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return result

    def freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size

    def product(self, a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
        assert out.shape == (a.shape[0], b.shape[1]) and a.shape[1] == b.shape[0]
        self.flops += 2.0 * a.shape[0] * a.shape[1] * b.shape[1]


Run = Callable[..., tuple[float, float, int]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """(bytes beside inputs and gradients at most, products over the masked rows, reads by the host) of a training step
    in bfloat16, or of a loss alone."""

    def step(
        case: cases.Case,
        budget: int | None,
        needs: tuple[bool, bool, bool] = (True, True, False),
        max_masked: int | None = None,
        reduction: str = "sum",
    ) -> tuple[float, float, int]:
        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        hidden, head = empty(8, case.rows // 8, case.dim), empty(case.vocab, case.dim)
        beside = [empty(8, case.rows // 8, dtype=d) for d in (torch.int64, torch.bool, torch.float32)]
        grad = empty(*(beside[0].shape if reduction == "none" else ()), dtype=torch.float32)
        options = {"reduction": reduction, "forbid": (3,), "max_masked": max_masked}
        problem = Problem(hidden, head, *beside, memory_budget=budget, needs=needs, **options)
        gpu.formula(problem)  # what is uploaded once
        kernels: Any = NoKernels(case.masked)
        with Costs(hidden, head, *beside, grad) as costs:
            monkeypatch.setattr(gpu, "product", costs.product)
            loss, *kept = gpu.forward(kernels, problem, trim=True)
            grads = list(gpu.backward(kernels, problem, grad, tuple(kept), needs)) if any(needs) else []
        size = sum(g.numel() * g.element_size() for g in (*filter(torch.is_tensor, grads), loss))
        computed = case.masked if max_masked is None else max_masked
        return costs.most - size, costs.flops / (2.0 * computed * case.dim * case.vocab), kernels.info.reads

    return step


@pytest.mark.parametrize("case", cases.GPU_CASES, ids=lambda c: c.name)
def test_least_memory_is_a_tenth_of_the_logits_of_all_rows(case: cases.Case, run: Run) -> None:
    tenth = 2 * case.rows * case.vocab // 10  # in bfloat16
    for reduction in ("sum", "none"):
        most, products, _ = run(case, tenth, reduction=reduction)
        assert most <= tenth and products == pytest.approx(4 if case.masked > 1000 else 3, abs=1)
    most, products, _ = run(case, tenth, (False, False, False))
    assert most <= tenth and products == 1


@pytest.mark.parametrize("case", cases.GPU_CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("budget", [None, 8 << 30, 3 << 30, 1 << 30, 1 << 28])
def test_memory_stays_within_the_budget(case: cases.Case, budget: int | None, run: Run) -> None:
    given = budget or 8 * case.vocab * case.dim
    for max_masked in (None, case.masked, case.rows):
        most, products, _ = run(case, budget, max_masked=max_masked)
        assert most <= given and products <= 4
    if budget is None:
        assert products == 3  # of all rows, too, in one chunk


def test_every_mode_does_its_products_and_frozen_parts_none(run: Run) -> None:
    case = cases.Case("", 16384, 8192, 1024, 50304)
    chunks = 4 * 50304 * 1024 + 16384 * (gpu.ROW_BYTES + 4 * 1024) + 1024 * 2 * (50304 + 1024)
    for budget, whole in ((4 << 30, 3), (chunks, 3), (1 << 27, 4)):
        for needs, saved in (((True, True, False), 0), ((True, False, False), 1), ((False, True, False), 1)):
            if budget == chunks and not all(needs[:2]):
                continue  # without one of the gradients more fits
            assert run(case, budget, needs)[1] == pytest.approx(whole - saved)
        assert run(case, budget, (False, False, False))[1] == 1


@pytest.mark.parametrize("budget", [None, 1 << 28])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_host_reads_once_and_with_a_capacity_never(budget: int | None, reduction: str, run: Run) -> None:
    """Any other read of a value raises: the tensors are on "meta"."""
    case = cases.Case("", 4096, 2000, 512, 32000)
    for needs in ((True, True, False), (False, False, False)):
        assert run(case, budget, needs, reduction=reduction)[2] == 1
        assert run(case, budget, needs, max_masked=3000, reduction=reduction)[2] == 0


def test_from_logits_reads_once_and_with_a_capacity_never() -> None:
    logits, (targets, masked) = (
        torch.empty(8, 50, device="meta"),
        (torch.empty(8, dtype=d, device="meta") for d in (torch.int64, torch.bool)),
    )
    for max_masked, reads in ((None, 1), (5, 0)):
        kernels: Any = NoKernels(4)
        problem = Problem(logits, None, targets, masked, None, None, "mean", 3.0, 0.1, 0.01, (1,), max_masked)
        loss, *kept = gpu.forward(kernels, problem)
        gpu.backward(kernels, problem, loss, tuple(kept), (True, False, False))
        assert kernels.info.reads == reads


def test_a_value_read_by_the_host_would_be_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_scatter", lambda head, dx, *rest: float(dx.sum()))
    with pytest.raises((RuntimeError, NotImplementedError)):
        run(cases.Case("", 64, 32, 16, 50), None, max_masked=40)


@pytest.mark.parametrize("given", [True, False, (True, True), (False, True), (False, False)], ids=str)
def test_products_are_summed_in_float32_and_settings_come_back(given: Any) -> None:
    flags = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    pairs = hasattr(flags, names[0] + "_split_k")
    if isinstance(given, tuple) and not pairs:
        pytest.skip("this torch has no setting of split k")

    def settings() -> list[tuple[bool, bool]]:
        return [(getattr(flags, name), getattr(flags, name + "_split_k", True)) for name in names]

    reduced, split_k = given if isinstance(given, tuple) else (given, True)
    before = settings()
    try:
        for name in names:
            setattr(flags, name, given)
        with float32_sums(), float32_sums():
            assert settings() == [(False, split_k)] * 2
        assert settings() == [(reduced, split_k)] * 2
    finally:
        for name, pair in zip(names, before):
            setattr(flags, name, pair if pairs else pair[0])
