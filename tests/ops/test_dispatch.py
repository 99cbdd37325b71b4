"""Choosing a backend, and the two ways into an operator."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from illada_kernels import _dispatch, _extension
from illada_kernels._dispatch import Backend, Resolved, reasons
from illada_kernels._torch_ops import Derivative, Operator, is_plain, is_watched


def backend(name, devices=None, available=None, unsupported=None, opt_in=None):
    supports = unsupported or (lambda problem: None)
    module = SimpleNamespace(available=lambda: available, supports=supports)
    return Backend(name, devices, lambda: module, opt_in)


def choose(*args):
    return _dispatch.choose(*args).name


FAST = backend("fast", devices=("cuda",))
MISSING = backend("missing", available="its library is not installed")
PICKY = backend("picky", unsupported=lambda problem: None if problem == "easy" else f"cannot do {problem}")
REFERENCE = backend("reference")
ALL = (FAST, MISSING, PICKY, REFERENCE)


@pytest.mark.parametrize(
    "device, request_, expected",
    [("cuda", "hard", "fast"), ("cpu", "easy", "picky"), ("cpu", "hard", "reference")],
)
def test_first_backend_that_can_run_the_call_is_chosen(device, request_, expected):
    assert choose("op", ALL, device, request_) == expected


@pytest.mark.parametrize("name", ["fast", "missing", "picky"])
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_insisting_never_falls_back_and_lists_every_reason(monkeypatch, name, how):
    if how == "environment":
        monkeypatch.setenv("ILLADA_BACKEND", name)
    with pytest.raises(RuntimeError) as raised:
        choose("op", ALL, "cpu", "hard", name if how == "argument" else "")
    lines = str(raised.value).splitlines()
    assert name in lines[0] and "op" in lines[0]
    assert lines[1:] == [
        "  fast: runs on cuda, the tensors are on cpu",
        "  missing: its library is not installed",
        "  picky: cannot do hard",
        "  reference: can run it",
    ]


def test_insisting_on_a_backend_that_can_run_skips_better_ones(monkeypatch):
    assert choose("op", ALL, "cuda", "easy", "picky") == "picky"
    monkeypatch.setenv("ILLADA_BACKEND", "reference")
    assert choose("op", ALL, "cuda", "easy") == "reference"
    assert choose("op", ALL, "cuda", "easy", "picky") == "picky"  # the argument wins over the environment


def test_unknown_backend_is_a_value_error_that_names_the_known_ones():
    with pytest.raises(
        ValueError, match="backend: expected one of fast, missing, picky, reference for op, got 'magic'"
    ):
        choose("op", ALL, "cpu", "easy", "magic")


def test_no_backend_at_all_lists_every_reason():
    with pytest.raises(RuntimeError, match=r"(?s)no backend of op .*fast: runs on cuda.*missing: its library"):
        choose("op", ALL[:2], "cpu", "easy")


def test_a_backend_outside_the_default_order_runs_only_when_named():
    unproven = backend("unproven", opt_in="no committed result shows it faster")
    order = (unproven, REFERENCE)
    assert choose("op", order, "cpu", "easy") == "reference"
    assert choose("op", order, "cpu", "easy", "unproven") == "unproven"
    assert "unproven: no committed result" in reasons("op", order, "cpu", "easy")


def test_exceptions_inside_a_backend_propagate():
    def broken(request):
        raise ZeroDivisionError("a defect, not a reason")

    with pytest.raises(ZeroDivisionError):
        choose("op", (backend("broken", unsupported=broken), REFERENCE), "cpu", "easy")


def test_landing_on_the_reference_on_a_gpu_is_logged_once(monkeypatch, logged):
    monkeypatch.setattr(_dispatch, "_logged", set())
    for _ in range(3):
        choose("op", (MISSING, REFERENCE), "cuda", "hard")
        choose("other", (MISSING, REFERENCE), "cuda", "hard")
        choose("op", (MISSING, REFERENCE), "cpu", "hard")
    assert sorted(record.args[0] for record in logged if record.levelno == logging.WARNING) == ["op", "other"]


def test_native_return_codes_become_errors():
    _extension.check("op", 0)
    with pytest.raises(RuntimeError, match="op: dtype not supported"):
        _extension.check("op", 1)


def test_importing_the_package_imports_neither_torch_nor_the_extension():
    root = Path(__file__).parents[2]
    script = "import sys, illada_kernels; print([n for n in sys.modules if n == 'torch' or n.endswith('._C')])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_a_room_has_the_backends_of_which_it_has_a_file_or_folder(tmp_path, monkeypatch):
    room = tmp_path / "some_room"
    for folder in (room, room / "triton", room / "cuda" / "__pycache__"):  # of cuda only what a checkout leaves behind
        folder.mkdir(parents=True)
    for file in ("__init__.py", "reference.py", "cpu.py", "magic.py", "triton/__init__.py"):
        (room / file).write_text("raise ImportError" if file != "__init__.py" else "")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [b.name for b in _dispatch.backends("some_room")] == ["triton", "cpu", "reference"]


# ---- operators -------------------------------------------------------------------------------------------------------


class Doubled(NamedTuple):
    x: torch.Tensor
    backend: str = ""


@pytest.fixture(scope="module")
def doubled():
    module = SimpleNamespace(
        available=lambda: None,
        supports=lambda problem: None,
        forward=lambda problem: 2 * problem.x,
        backward=lambda problem, grad, needs: (2 * grad,),
    )
    return Operator(
        "test_doubled",
        Doubled,
        (Backend("only", None, lambda: module),),
        lambda problem: torch.empty_like(problem.x),
        outputs=1,
        flops=lambda problem, needs: problem.x.numel() * (1 if needs is None else 10),
        derivative=Derivative(("x",), 1, (), lambda problem, saved, tangents: (2 * tangents[0],)),
    )


def test_a_resolved_backend_is_not_asked_again(doubled, monkeypatch):
    monkeypatch.setenv("ILLADA_BACKEND", "elsewhere")
    assert doubled.choose(Doubled(torch.ones(3), Resolved("only"))).name == "only"


def test_plain_calls_skip_the_dispatcher_and_watched_ones_do_not(doubled, monkeypatch):
    through = []
    original = doubled.op
    monkeypatch.setattr(doubled, "op", lambda *args: through.append(1) or original(*args))
    x = torch.ones(3)
    assert doubled(Doubled(x)).tolist() == [2, 2, 2] and not through
    with torch.utils._python_dispatch.TorchDispatchMode():
        assert is_watched()
    with torch.overrides.TorchFunctionMode():
        assert is_watched()
    with torch.profiler.profile() as profile:
        doubled(Doubled(x))
    assert len(through) == 1 and any("test_doubled" in event.key for event in profile.key_averages())
    assert not is_watched()
    with torch.inference_mode(), torch.autocast("cpu"), torch.no_grad():
        assert not is_watched() and is_plain((torch.ones(1), x))


def test_tensor_subclasses_go_through_the_dispatcher():
    class Named(torch.Tensor):
        pass

    assert is_plain((torch.ones(1), torch.nn.Parameter(torch.ones(1)), None, 3))
    assert not is_plain((torch.ones(1).as_subclass(Named),))


@pytest.mark.parametrize(
    "make",
    [
        torch._neg_view,
        lambda x: torch._efficientzerotensor((3,)),
        lambda x: x.to_sparse(),
        lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
        lambda x: torch._to_functional_tensor(x),
        lambda x: x.to("meta"),
        lambda x: x.to(torch.complex64).conj(),
    ],
)
def test_tensors_that_are_more_than_memory_are_not_plain(make):
    assert not is_plain((make(torch.ones(3)),))


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_modes_and_transforms_around_the_import_leave_no_trace():
    """What is plain is learned once; a fake tensor must not be taken for one because it was there at the import."""
    script = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
mode = FakeTensorMode()
with mode, torch.inference_mode():
    from illada_kernels import attention
    x = torch.ones(1, 2, 1, 8)
    assert attention(x, x, x).shape == (1, 2, 1, 8)
from illada_kernels._torch_ops import is_plain, is_watched
assert not is_plain((x,)) and is_plain((torch.ones(1),)) and not is_watched()
with mode:
    assert is_watched()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("watched", [False, True])
def test_a_freed_storage_is_an_error(doubled, watched):
    freed = torch.ones(3)
    freed.untyped_storage().resize_(0)
    mode = Watching() if watched else contextlib.nullcontext()
    with mode, pytest.raises(RuntimeError, match="lost its storage"):
        doubled(Doubled(freed))


def test_transforms_and_forward_mode_find_the_derivative(doubled):
    def f(x):
        return doubled(Doubled(x))

    x, t = torch.arange(6.0).view(2, 3), torch.randn(2, 3)
    assert torch.equal(torch.func.jvp(f, (x,), (t,))[1], 2 * t)
    assert torch.equal(torch.vmap(f)(x), 2 * x)
    assert torch.equal(torch.vmap(torch.func.grad(lambda x: f(x).sum()))(x), torch.full_like(x, 2))
    assert torch.equal(torch.func.jacrev(f)(x[0]), 2 * torch.eye(3))
    assert torch.equal(torch.func.jacfwd(f)(x[0]), 2 * torch.eye(3))
    leaf = x.clone().requires_grad_()
    (batched,) = torch.autograd.grad(f(leaf), leaf, torch.ones(4, 2, 3), is_grads_batched=True)
    assert torch.equal(batched, torch.full((4, 2, 3), 2.0))
    with pytest.raises(RuntimeError, match="test_doubled: is differentiable once"):
        torch.func.grad(torch.func.grad(lambda x: f(x * x).sum()))(torch.tensor(1.0))


def test_gradients_are_the_same_either_way_and_stop_at_the_first(doubled):
    x = torch.ones(3, requires_grad=True)
    (direct,) = torch.autograd.grad(doubled(Doubled(x)).sum(), x)
    (dispatched,) = torch.autograd.grad(doubled.op(x, "").sum(), x)
    assert direct.tolist() == dispatched.tolist() == [2, 2, 2]
    (gradient,) = torch.autograd.grad(doubled(Doubled(x)), x, torch.ones(3, requires_grad=True), create_graph=True)
    with pytest.raises(RuntimeError, match="test_doubled_bwd"):
        gradient.sum().backward()


def test_an_unknown_backend_in_the_environment_is_blamed_on_the_environment(monkeypatch):
    monkeypatch.setenv("ILLADA_BACKEND", "magic")
    with pytest.raises(ValueError, match=r"ILLADA_BACKEND: expected one of .* got 'magic'"):
        choose("op", ALL, "cpu", "easy")


@pytest.mark.parametrize("from_logits", [False, True])
def test_a_backward_is_run_by_what_ran_its_forward_whatever_the_environment_says_by_then(monkeypatch, from_logits):
    import torch

    from illada_kernels import masked_loss, masked_loss_from_logits

    x, head = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8)
    targets, masked = torch.arange(6), torch.tensor([True, False, True, True, False, True])

    def loss() -> torch.Tensor:
        if from_logits:
            return masked_loss_from_logits(x, targets, masked)
        return masked_loss(x, head, targets, masked)

    monkeypatch.setenv("ILLADA_BACKEND", "reference")
    (right,) = torch.autograd.grad(loss(), x)
    made_by_reference = loss()
    monkeypatch.delenv("ILLADA_BACKEND")
    (got,) = torch.autograd.grad(made_by_reference, x)
    assert torch.equal(got, right)


def test_the_flop_counter_knows_the_operators(doubled):
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.ones(3, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        doubled(Doubled(x)).sum().backward()
    assert counter.get_total_flops() == 33
