"""illada_kernels.layer: csrc/cpu/layer.cpp against torch's operations, and who gets which."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from illada_kernels import _extension, layer
from illada_kernels.ops.layer import api, cpu
from tests.helpers import layer_calls as checks
from tests.helpers.instruction_sets import run_under_each
from tests.helpers.layer_calls import DTYPES, angles, everything, heads, inputs

compiled = pytest.mark.skipif(cpu.available() is not None, reason="no extension")
dtypes = pytest.mark.parametrize("dtype", DTYPES)
SIZES = [1, 2, 15, 16, 17, 33, 64, 130, 1024]


K = None if cpu.available() else cpu
rms_norm, swiglu, apply_rope = (partial(f, kernels=K) for f in (layer.rms_norm, layer.swiglu, layer.apply_rope))


@compiled
@dtypes
@pytest.mark.parametrize("dim", SIZES)
def test_norm_and_swiglu_meet_the_numerics_bar(dtype, dim):
    checks.norm_and_swiglu_meet_the_bar(K, dtype, dim)


@compiled
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_halves_are_rounded_once(dtype):
    checks.halves_are_rounded_once(K, dtype, 33)


@compiled
@dtypes
@pytest.mark.parametrize("dim", [2, 6, 30, 32, 34, 64, 128])
@pytest.mark.parametrize("shared", [True, False])
def test_rope_meets_the_numerics_bar(dtype, dim, shared):
    checks.rope_meets_the_bar(K, dtype, dim, shared)


@compiled
@dtypes
@pytest.mark.parametrize("start", checks.STARTS)
@pytest.mark.parametrize("kept", [False, True])
def test_slots_of_the_cache_hold_what_torch_writes_and_nothing_else_is_touched(dtype, start, kept):
    checks.slots_hold_what_torch_writes(K, dtype, start, kept)


@compiled
@dtypes
def test_equal_rows_get_equal_bits_whatever_the_batch_and_threads(dtype):
    checks.equal_rows_get_equal_bits(K, dtype, 300, 520)
    x, weight = torch.randn(300, 520).to(dtype), torch.randn(520).to(dtype)
    q, k, _ = heads(150, 2, 8, 2, 64, dtype)
    cos, sin = angles(150, 2, 64)
    norm, product, rotated = rms_norm(x, weight, 1e-5), swiglu(x), apply_rope(q, k, cos, sin)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(rms_norm(x, weight, 1e-5), norm) and torch.equal(swiglu(x), product)
        assert torch.equal(apply_rope(q, k, cos, sin)[0], rotated[0])
    finally:
        torch.set_num_threads(threads)


@compiled
@dtypes
def test_extreme_numbers_give_what_torch_gives_and_stay_in_their_row(dtype):
    checks.extreme_numbers_give_what_torch_gives(K, dtype)


@compiled
def test_strided_inputs_and_transposed_heads_are_read_where_they_lie():
    checks.strided_inputs_are_read_where_they_lie(K)
    checks.each_tensor_has_strides_of_its_own(K)


@compiled
def test_offsets_beyond_2_to_31(tmp_path):
    checks.offsets_beyond_2_to_31(K, str(tmp_path / "sparse"))


SUBPROCESS = """
from tests.ops.layer import test_cpu as t
for dtype in t.DTYPES:
    for dim in (1, 17, 130):
        t.test_norm_and_swiglu_meet_the_numerics_bar(dtype, dim)
        t.test_rope_meets_the_numerics_bar(dtype, 2 * dim, False)
    t.test_extreme_numbers_give_what_torch_gives_and_stay_in_their_row(dtype)
    t.test_slots_of_the_cache_hold_what_torch_writes_and_nothing_else_is_touched(dtype, "beyond", True)
"""


@compiled
def test_every_instruction_set_meets_the_numerics_bar(python):
    run_under_each(python, SUBPROCESS)


# ---- who gets which --------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The entry points of the extension that ran."""
    ran = []

    class Counted:
        def __getattr__(self, name):
            return lambda *a: ran.append(name) or getattr(_extension.native(), name)(*a)

    monkeypatch.setattr(cpu, "native", Counted)
    return ran


@compiled
def test_what_wants_a_gradient_or_is_traced_gets_torch(calls, monkeypatch):
    args = inputs()
    monkeypatch.setenv("ILLADA_BACKEND", "reference")
    expected = everything(*args)
    assert calls == []
    monkeypatch.delenv("ILLADA_BACKEND")
    ours = everything(*args)
    assert len(calls) == OPS
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=4e-7, atol=4e-7)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert all(torch.equal(a, b) for a, b in zip(everything(*args), ours))
    assert len(calls) == 2 * OPS
    del calls[:]

    wanted = [x.clone().requires_grad_() for x in args[:4]]
    sum(out.sum() for out in everything(*wanted, *args[4:])[:7]).backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in wanted) and calls == []
    with torch.no_grad():
        everything(*wanted, *args[4:])
    assert len(calls) == OPS
    del calls[:]

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")(*args)
    program = torch.export.export(Everything(), args).module()(*args)
    mapped = torch.vmap(lambda x: layer.swiglu(x, kernels=layer.kernels_for(x)))(args[0])
    tangent = torch.func.jvp(lambda x: layer.swiglu(x, kernels=layer.kernels_for(x)), args[:1], args[:1])[1]
    doubled = everything(*(x.double() for x in args))
    assert calls == [] and tangent.abs().max() > 0
    for found in (compiled, program, doubled):
        for a, b in zip(found, expected):
            torch.testing.assert_close(a.float(), b, rtol=4e-7, atol=4e-7)
    torch.testing.assert_close(mapped, layer.swiglu(args[0]), rtol=4e-7, atol=4e-7)


OPS = 5  # of `everything`


class Everything(torch.nn.Module):
    def forward(self, *args):
        return everything(*args)


@pytest.mark.parametrize("start", [1, torch.tensor([2, 0])])
@pytest.mark.parametrize("kept", [False, True])
def test_writing_to_the_cache_compiles_whole(start, kept):
    q, k, v = heads(2, 3, 4, 2, 6, torch.float32)
    turn, keep = angles(1, 3, 6), torch.tensor([[True, False, True], [False, False, True]]) if kept else None

    def write(store):
        return layer.rope_to_cache(q, k, v, *turn, *store, start, keep)

    eager, traced = torch.zeros(2, 2, 2, 5, 2, 6)
    out = torch.compile(write, fullgraph=True, backend="aot_eager")(traced)
    torch.testing.assert_close(out, write(eager))
    torch.testing.assert_close(traced, eager)


@compiled
def test_kernels_leave_alone_what_they_cannot_take():
    """Whoever hands kernels on to tensors of another kind gets torch's result, gradients included."""
    x, weight, q, k, cos, sin = inputs()
    torch.testing.assert_close(rms_norm(x.double(), weight.double(), 1e-5), layer.rms_norm(x.double(), weight, 1e-5))
    assert rms_norm(x.bfloat16(), weight, 1e-5).dtype == torch.float32
    leaf = weight.clone().requires_grad_()
    rms_norm(x, leaf, 1e-5).sum().backward()
    assert leaf.grad is not None
    assert apply_rope(q.to("meta"), k.to("meta"), cos.to("meta"), sin.to("meta"))[0].is_meta
    once = torch.compile(swiglu, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(once(x), layer.swiglu(x))
    odd = torch.randn(2, 3, 4, 12)[..., ::2]  # heads that do not lie in one piece
    for a, b in zip(apply_rope(odd, odd, cos, sin), layer.apply_rope(odd, odd, cos, sin)):
        assert torch.equal(a, b)


@compiled
def test_kernels_handed_into_forward_mode_keep_the_tangent(calls):
    x, weight, q, k, cos, sin = inputs()
    keys, values = torch.zeros(2, 2, 5, 2, 6)

    def rows(x, weight, q, k, kernels):
        normed = layer.rms_norm(x, weight, 1e-5, kernels=kernels)
        both = layer.add_rms_norm(x, normed, weight, 1e-5, kernels=kernels)
        turned = layer.apply_rope(q, k, cos, sin, kernels=kernels)
        written = layer.rope_to_cache(q, k, k, cos, sin, keys, values, 0, kernels=kernels)
        return normed, *both, layer.swiglu(x, kernels=kernels), *turned, written

    with forward_ad.dual_level():
        dual = [forward_ad.make_dual(t, torch.randn_like(t)) for t in (x, weight, q, k)]
        for ours, plain in zip(rows(*dual, K), rows(*dual, None)):
            assert torch.equal(forward_ad.unpack_dual(ours).tangent, forward_ad.unpack_dual(plain).tangent)
        assert forward_ad.unpack_dual(keys).tangent is None  # as documented
    assert calls == []


@compiled
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_kernels_handed_into_a_transform_trace_or_mode_leave_the_call_to_torch(calls):
    """Tensors of torch.func.functionalize have no memory, and a trace would keep the first result."""
    x, *_ = inputs()
    for transform in (torch.func.functionalize, torch.vmap, torch.func.grad):
        got = transform(lambda x: swiglu(x).sum())(x)
        assert torch.equal(got, transform(lambda x: layer.swiglu(x).sum())(x))
    traced = torch.jit.trace(lambda x: swiglu(x), x, check_trace=False)
    assert torch.equal(traced(2 * x), layer.swiglu(2 * x))
    graph = make_fx(swiglu)(x)
    assert torch.equal(graph(2 * x), layer.swiglu(2 * x))
    assert calls == []


@compiled
def test_inference_tensors_and_parameters_are_plain(calls):
    with torch.inference_mode():
        x, weight, *rest = inputs()
        everything(x, torch.nn.Parameter(weight, requires_grad=False), *rest)
    assert len(calls) == OPS


def test_autograd_notices_that_the_cache_was_written():
    _, _, q, k, cos, sin = inputs()
    keys, values = torch.ones(2, 2, 5, 2, 6)
    leaf = torch.ones(2, 5, 2, 6, requires_grad=True)
    product = (leaf * keys).sum()
    layer.rope_to_cache(q, k, k, cos, sin, keys, values, 0, kernels=K)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"start": 3}, r"within 5 slots, got 3 \.\. 6"),
        ({"start": -1}, r"within 5 slots, got -1 \.\. 2"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, r"start: expected an int or int64 \(2,\)"),
        ({"start": torch.zeros(2)}, "start: .*float32"),
        ({"start": 1.0}, r"start: expected an int or int64 \(2,\), got float"),
        ({"start": None}, r"start: expected an int or int64 \(2,\), got NoneType"),
        ({"keep": [[True] * 3] * 2}, r"keep: expected a bool Tensor \(2, 3\), got list"),
        ({"keep": torch.ones(2, 3)}, r"keep: expected bool \(2, 3\), got torch.float32"),
        ({"keep": torch.ones(2, 1, dtype=torch.bool)}, r"keep: .*\(2, 1\)"),
        ({"v": torch.zeros(2, 3, 1, 6)}, r"expected .*kv_heads, D\), got .*\(2, 3, 1, 6\)"),
        ({"keys": torch.zeros(2, 5, 4, 6)}, r"\(2, 5, 4, 6\)"),
        ({"values": torch.zeros(1, 5, 2, 6)}, r"\(1, 5, 2, 6\)"),
        ({"q": torch.zeros(2, 4, 4, 6)}, r"\(2, 4, 4, 6\)"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(change, message):
    q, k, v = heads(2, 3, 4, 2, 6, torch.float32)
    cos, sin = angles(1, 3, 6)
    given = {"keys": torch.zeros(2, 5, 2, 6), "values": torch.zeros(2, 5, 2, 6), "start": 0, "q": q, "k": k, "v": v}
    error = TypeError if message.endswith(("got float", "got NoneType", "got list")) else ValueError
    with pytest.raises(error, match=message):
        layer.rope_to_cache(cos=cos, sin=sin, **{**given, **change}, kernels=K)
    assert not given["keys"].any() and not given["values"].any()


def test_angles_and_weights_that_do_not_fit_are_torchs_errors():
    q, k, _ = heads(2, 3, 4, 2, 6, torch.float32)
    for cos in (torch.ones(1, 4, 1, 3), torch.ones(1, 3, 1, 4), torch.ones(5, 3, 1, 3)):
        with pytest.raises(RuntimeError, match="must match"):
            apply_rope(q, k, cos, cos)
    with pytest.raises(RuntimeError, match="must match"):
        rms_norm(torch.ones(2, 8), torch.ones(7), 1e-5)


def test_rows_without_elements_and_tensors_without_rows_get_what_torch_gives():
    assert rms_norm(torch.ones(3, 0), torch.ones(5)[:0], 1e-5).shape == (3, 0)  # a view of memory that is there
    assert swiglu(torch.ones(3, 0)).shape == (3, 0) and swiglu(torch.ones(0, 6)).shape == (0, 3)
    with pytest.raises(RuntimeError, match="at least 1-dimensional"):
        rms_norm(torch.tensor(1.0), torch.tensor(1.0), 1e-5)
    with pytest.raises(RuntimeError, match="at least a 1-dimensional"):
        swiglu(torch.tensor(1.0))


@compiled
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_cache_whose_elements_share_memory_never_reaches_a_kernel(which, dim):
    q, k, v = heads(2, 3, 4, 2, 6, torch.float32)
    caches = dict.fromkeys(("keys", "values"), torch.zeros(2, 3, 2, 6))
    caches[which] = caches[which].narrow(dim, 0, 1).expand(2, 3, 2, 6)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        layer.rope_to_cache(q, k, v, *angles(1, 3, 6), **caches, start=0, kernels=K)


def test_angles_on_another_device_never_reach_a_kernel(monkeypatch):
    """Tensors on two GPUs, as far as the functions look at them."""

    class Fake:
        dtype, requires_grad = torch.float32, False

        def __init__(self, index, *shape):
            self.device, self.shape = torch.device("cuda", index), shape

        def stride(self):
            return (2, 2, 2, 1)

        def is_inference(self):
            return True

    class Kernels:
        DEVICE = "cuda"

        def rope(self, *arguments):
            return "kernel"

    monkeypatch.setattr(api, "_TYPES", (Fake,))
    monkeypatch.setattr(api.reference, "rotated", lambda *_: "torch")
    monkeypatch.setattr(api.reference, "write_to_cache", lambda *_: None)
    x, here, there = Fake(0, 1, 1, 1, 2), Fake(0, 1, 1, 1, 1), Fake(1, 1, 1, 1, 1)
    for cos, sin, wanted in (
        (here, here, "kernel"),
        (there, there, "torch"),
        (here, there, "torch"),
        (there, here, "torch"),
    ):
        assert layer.rope_to_cache(x, x, x, cos, sin, x, x, 0, kernels=Kernels()) == wanted
    assert layer.apply_rope(x, x, there, there, kernels=Kernels()) == ("torch", "torch")


@compiled
def test_keys_of_another_shape_than_queries_never_reach_a_kernel():
    """The kernel goes by the queries' batch, length and width: it would read and write beyond these keys."""
    q, cos = torch.randn(2, 5, 4, 8), torch.randn(1, 5, 1, 4)
    for shape in ((1, 5, 2, 8), (2, 1, 2, 8)):
        k = torch.randn(shape)
        wanted = layer.apply_rope(q, k, cos, cos)
        for a, b in zip(apply_rope(q, k, cos, cos), wanted):
            torch.testing.assert_close(a, b)
    for shape in ((2, 4, 2, 8), (2, 5, 2, 6)):
        with pytest.raises(RuntimeError, match="must match"):
            apply_rope(q, torch.randn(shape), cos, cos)
