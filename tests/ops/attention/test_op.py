"""attention as an operator: bad arguments, backends insisted on, autocast, torch.compile, opcheck, fake and meta
tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from illada_kernels import KeyRanges, attention
from illada_kernels.ops.attention import op
from illada_kernels.ops.attention.problem import Problem
from tests.helpers.attention_oracle import NAMES, draw, run
from tests.helpers.instruction_sets import run_under_each

backends = pytest.mark.parametrize("backend", NAMES)
MASK = KeyRanges.block_diffusion(6, 2)  # 12 rows, 12 keys


def inputs(dtype=torch.float32, requires_grad=False):
    q, k, v, dout, dlse = draw(2, 12, 12, 4, 2, 8, 6, dtype=dtype)
    return *(x.requires_grad_(requires_grad) for x in (q, k, v)), dout, dlse


# ---- bad arguments ---------------------------------------------------------------------------------------------------

q, k, v, *_ = inputs()
BAD = {
    "q a list": (lambda: attention([1.0], k, v), TypeError, "q: expected a tensor of .*, got list"),
    "k of integers": (
        lambda: attention(q, k.int(), v),
        TypeError,
        "k: expected torch.float32 or .* got torch.int32; convert",
    ),
    "v of another dtype": (lambda: attention(q, k, v.double()), TypeError, "v: expected torch.float32 like q, .*64"),
    "k of another dtype": (lambda: attention(q, k.half(), v.half()), TypeError, "k: expected torch.float32 like q"),
    "q of 3 dimensions": (lambda: attention(q[0], k, v), ValueError, r"q: expected shape \(batch, sequence, heads, h"),
    "k of 5 dimensions": (lambda: attention(q, k[None], v), ValueError, r"k: expected shape \(batch, .* got \(1, 2"),
    "k on another device": (lambda: attention(q, k.to("meta"), v), ValueError, "k: expected device cpu .* got meta"),
    "v on another device": (lambda: attention(q, k, v.to("meta")), ValueError, "v: expected device cpu .* got meta"),
    "q strided": (lambda: attention(q.mT.contiguous().mT, k, v), ValueError, "q: expected a contiguous last"),
    "v strided": (lambda: attention(q, k, v.mT.contiguous().mT), ValueError, "v: expected a contiguous last"),
    "no heads": (lambda: attention(q[:, :, :0], k, v), ValueError, "q: expected at least one head"),
    "no key heads": (lambda: attention(q, k[:, :, :0], v[:, :, :0]), ValueError, "k: expected at least one h"),
    "no channels": (lambda: attention(q[..., :0], k[..., :0], v), ValueError, "q: expected .* one channel"),
    "batch of k": (lambda: attention(q, k[:1], v[:1]), ValueError, r"k: expected shape \(2, Sk, Hkv, 8\) to match q"),
    "head_dim of k": (
        lambda: attention(q, k[..., :7], v),
        ValueError,
        r"k: expected shape \(2, Sk, Hkv, 8\) to match q",
    ),
    "length of v": (lambda: attention(q, k, v[:, :11]), ValueError, r"v: expected shape \(2, 12, 2, Dv\) to match k"),
    "heads of v": (lambda: attention(q, k, v[:, :, :1]), ValueError, r"v: expected shape \(2, 12, 2, Dv\) to match k"),
    "heads not a multiple": (lambda: attention(q[:, :, :3], k, v), ValueError, "q: expected a multiple of .* got 3"),
    "a boolean mask": (lambda: attention(q, k, v, MASK.dense()), TypeError, "key_ranges: .*from_dense"),
    "ranges over other keys": (
        lambda: attention(q, k, v, KeyRanges.full(11)),
        ValueError,
        "key_ranges: .*num_keys = 12",
    ),
    "ranges of other rows": (lambda: attention(q, k, v, MASK[:, :5]), ValueError, r"key_ranges: .*\(2 or 1, 12 or"),
    "ranges of another batch": (
        lambda: attention(q, k, v, KeyRanges.padding(torch.tensor([1, 2, 3]), 12)),
        ValueError,
        r"key_ranges: expected shape \(2 or 1, 12 or 1, 4\)",
    ),
    "ranges on another device": (
        lambda: attention(q, k, v, MASK.to("meta")),
        ValueError,
        "key_ranges: expected device",
    ),
    "scale infinite": (lambda: attention(q, k, v, scale=float("inf")), ValueError, "scale: expected a finite"),
    "scale a tensor": (lambda: attention(q, k, v, scale=torch.tensor(1.0)), TypeError, "scale: expected a number"),
    "unknown backend": (lambda: attention(q, k, v, backend="cudnn"), ValueError, "backend: expected one of"),
}


def module_of(backend):
    return next(b for b in op.BACKENDS if b.name == backend).module()


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_is_named_before_anything_runs(name, monkeypatch):
    call, error, message = BAD[name]
    for backend in NAMES:
        monkeypatch.setattr(module_of(backend), "forward", lambda problem: pytest.fail("a kernel ran"))
    with pytest.raises(error, match=message):
        call()


# ---- which backend ---------------------------------------------------------------------------------------------------


def count_calls(monkeypatch):
    """Names of the backends whose forward ran, in order."""
    ran = []
    for name in NAMES:
        module = module_of(name)

        def recorded(problem, name=name, forward=module.forward):
            ran.append(name)
            return forward(problem)

        monkeypatch.setattr(module, "forward", recorded)
    return ran


def test_first_capable_backend_runs_and_float64_goes_to_the_reference(monkeypatch):
    ran = count_calls(monkeypatch)
    attention(q, k, v)
    attention(q.double(), k.double(), v.double())
    assert ran == [NAMES[0], "reference"]


@pytest.mark.skipif("cpu" not in NAMES, reason="the extension is not built")
@pytest.mark.parametrize("how", ["argument", "environment"])
def test_backend_insisted_on_never_falls_back(monkeypatch, how):
    ran = count_calls(monkeypatch)
    if how == "environment":
        monkeypatch.setenv("ILLADA_BACKEND", "cpu")
    with pytest.raises(RuntimeError, match=r"(?s)'cpu' cannot run this attention .*float64.*reference: can run it"):
        attention(q.double(), k.double(), v.double(), backend="cpu" if how == "argument" else None)
    assert ran == []


def test_environment_chooses_the_backend_of_forward_and_backward(monkeypatch):
    ran = count_calls(monkeypatch)
    monkeypatch.setenv("ILLADA_BACKEND", "reference")
    leaf = q.clone().requires_grad_()
    reference = module_of("reference")
    backward = reference.backward
    monkeypatch.setattr(
        reference, "backward", lambda *args, **needs: ran.append("backward") or backward(*args, **needs)
    )
    attention(leaf, k, v).sum().backward()
    assert ran == ["reference", "backward"]


SUBPROCESS = """
import torch
from tests.helpers.attention_oracle import assert_close, draw, run
from illada_kernels.ops.attention import cases
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    for name in ("full", "hulls_overlap", "every_third_row_empty"):
        inputs = draw(2, 77, 150, 4, 2, 40, 24, dtype=dtype)
        ranges = cases.hostile_masks(2, 77, 150)[name]
        assert_close(run("cpu", *inputs, ranges), *inputs, ranges)
"""


@pytest.mark.skipif("cpu" not in NAMES, reason="the extension is not built")
def test_every_instruction_set_meets_the_numerics_bar(python):
    run_under_each(python, SUBPROCESS)


# ---- gradients -------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_any_subset_of_gradients_can_be_wanted(backend, wanted):
    whole = run(backend, *inputs(), MASK)
    *tensors, dout, dlse = inputs()
    for i in wanted:
        tensors[i].requires_grad_()
    out, lse = attention(*tensors, MASK, return_lse=True, backend=backend)
    torch.autograd.backward((out, lse), (dout, dlse))
    for i, (x, name) in enumerate(zip(tensors, ("dq", "dk", "dv"))):
        assert (x.grad is None) == (i not in wanted)
        assert x.grad is None or torch.equal(x.grad, getattr(whole, name))


@backends
def test_out_and_lse_can_each_be_left_out_of_the_loss(backend):
    *tensors, dout, dlse = inputs(requires_grad=True)
    out, lse = attention(*tensors, MASK, return_lse=True, backend=backend)
    both = torch.autograd.grad((out, lse), tensors, (dout, dlse), retain_graph=True)
    only_out = torch.autograd.grad(out, tensors, dout, retain_graph=True)
    only_lse = torch.autograd.grad(lse, tensors, dlse)
    for a, b, c in zip(both, only_out, only_lse):
        torch.testing.assert_close(a, b + c, rtol=1e-5, atol=1e-6)


@backends
def test_nothing_is_saved_without_grad(backend):
    *tensors, _, _ = inputs(requires_grad=True)
    with torch.no_grad():
        out = attention(*tensors, MASK, backend=backend)
    assert not out.requires_grad and out.grad_fn is None


@backends
def test_double_backward_raises(backend):
    *tensors, dout, _ = inputs(requires_grad=True)
    out = attention(*tensors, MASK, backend=backend)
    (dq,) = torch.autograd.grad(out, tensors[0], dout, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_bwd"):
        dq.sum().backward()


# ---- autocast --------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_inputs_and_returns_gradients_in_their_dtype(backend, dtype):
    *tensors, dout, _ = inputs(requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        out = attention(tensors[0], tensors[1].to(torch.bfloat16), tensors[2], MASK, backend=backend)  # mixed dtypes
        assert out.dtype == dtype
        grads = torch.autograd.grad(out, tensors, dout.to(dtype))  # also under autocast
    once = (tensors[0].detach(), tensors[1].detach().to(torch.bfloat16), tensors[2].detach())
    cast = [x.to(dtype).requires_grad_() for x in once]
    explicit = attention(*cast, MASK, backend=backend)
    assert torch.equal(out, explicit)
    for grad, right in zip(grads, torch.autograd.grad(explicit, cast, dout.to(dtype))):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, right.float(), rtol=2**-8 if dtype == torch.float16 else 0, atol=0)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q.double(), k.double(), v.double(), MASK)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, attention(q.double(), k.double(), v.double(), MASK), rtol=0, atol=0)


# ---- tracing ---------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("masked", [False, True])
def test_operators_pass_opcheck(backend, masked):
    *tensors, dout, dlse = inputs(requires_grad=True)
    bounds = MASK.bounds if masked else None
    arguments = (*tensors, bounds, 0.3, True, backend)
    torch.library.opcheck(op.OPERATOR.op, arguments)
    tensors = [x.detach() for x in tensors]
    out, lse = op.OPERATOR(Problem(*tensors, *arguments[3:]))
    for lse_gradient in (None, dlse):
        torch.library.opcheck(op.OPERATOR.bwd.op, (dout, lse_gradient, out, lse, *tensors, *arguments[3:], [True] * 3))


@backends
def test_compiles_into_one_graph_with_gradients_and_new_lengths(backend):
    def loss(q, k, v, ranges):
        out, lse = attention(q * 2, k, v, ranges, return_lse=True, backend=backend)
        return (out.float() ** 2).sum() + lse.sum() + attention(q, k, v, KeyRanges.causal(q.shape[1])).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for length in (6, 9, 10):
        tensors = [x.requires_grad_() for x in draw(2, 2 * length, 2 * length, 4, 2, 8)[:3]]
        ranges = KeyRanges.block_diffusion(length, 2)
        ours = torch.autograd.grad(compiled(*tensors, ranges), tensors)
        eager = torch.autograd.grad(loss(*tensors, ranges), tensors)
        for a, b in zip(ours, eager):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # aot_eager may add gradients in another order


@backends
def test_compiles_under_autocast(backend):
    def forward(q, k, v):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return attention(q, k, v, MASK, backend=backend)

    torch._dynamo.reset()
    assert torch.equal(torch.compile(forward, fullgraph=True, backend="aot_eager")(q, k, v), forward(q, k, v))


@backends
def test_dispatcher_and_direct_call_give_the_same_bits(backend):
    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    direct = run(backend, *inputs(), MASK)
    with Watching():
        watched = run(backend, *inputs(), MASK)
    assert any("illada_kernels.attention_bwd" in name for name in seen)
    for name, x in watched.tensors().items():
        assert torch.equal(x, getattr(direct, name)), name


def test_fake_and_meta_tensors_get_shapes():
    expected = run("reference", *inputs(torch.bfloat16), MASK)
    shapes = {name: (x.shape, x.dtype, x.stride()) for name, x in expected.tensors().items()}
    meta = [x.to("meta") for x in inputs(torch.bfloat16)]
    ours = run(None, *meta, MASK.to("meta"))
    assert {name: (x.shape, x.dtype, x.stride()) for name, x in ours.tensors().items()} == shapes
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(x) for x in inputs(torch.bfloat16)]
        ours = run(None, *fake, KeyRanges(mode.from_tensor(MASK.bounds), 12))
        assert {name: (x.shape, x.dtype, x.stride()) for name, x in ours.tensors().items()} == shapes


def test_flops_are_those_of_all_pairs_as_torch_counts_sdpa():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, 12, 4, 8, requires_grad=True)
    with FlopCounterMode(display=False) as ours:
        attention(x, x, x).sum().backward()
    with FlopCounterMode(display=False) as theirs, sdpa_kernel(SDPBackend.MATH):
        y = x.transpose(1, 2)
        sdpa(y, y, y).sum().backward()
    forward, backward = 2 * 2 * 2 * 4 * 12 * 12 * 8, 5 * 2 * 2 * 4 * 12 * 12 * 8
    assert ours.get_total_flops() == forward + backward
    assert theirs.get_total_flops() == forward + 4 * 2 * 2 * 4 * 12 * 12 * 8  # keeps the scores


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_that_vary_compile_into_no_more_graphs_than_with_sdpa(dynamic):
    """A scale per layer or from the head_dim: torch makes a graph for each float. Lengths: two graphs."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    def graphs(function, calls):
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter)
        for call in calls:
            torch.testing.assert_close(compiled(*call), function(*call))
        return counter.frame_count

    x = torch.randn(1, 6, 2, 8)
    scales = [(x, s) for s in (0.3, 0.15, 0.1)]
    ours = graphs(lambda q, s: attention(q, q, q, scale=s), scales)
    assert ours <= graphs(lambda q, s: sdpa(q, q, q, scale=s), scales)
    widths = [(torch.randn(1, 6, 2, d),) for d in (8, 12, 16)]
    ours = graphs(lambda q: attention(q, q, q, scale=q.shape[-1] ** -0.5), widths)
    assert ours <= graphs(lambda q: sdpa(q, q, q, scale=q.shape[-1] ** -0.5), widths)
    lengths = [(torch.randn(1, n, 2, 8),) for n in (5, 6, 7, 9)]
    assert graphs(lambda q: attention(q, q, q, KeyRanges.causal(q.shape[1])), lengths) <= 2


@pytest.mark.parametrize("strict", [False, True])
def test_exports_with_a_symbolic_length(strict):
    class Attend(torch.nn.Module):
        def forward(self, q):
            return attention(q, q, q, KeyRanges.causal(q.shape[1]), scale=q.shape[-1] ** -0.5)

    dynamic = ({1: torch.export.Dim.AUTO},)
    program = torch.export.export(Attend(), (torch.randn(1, 6, 2, 8),), dynamic_shapes=dynamic, strict=strict)
    x = torch.randn(1, 9, 2, 8)
    torch.testing.assert_close(program.module()(x), Attend()(x))
