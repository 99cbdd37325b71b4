"""patch reaches torch's attention by whatever way code leads to it, and says so where it does not."""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention as attend_by_another_name

from illada_kernels.integrations import patch, unpatch

q = torch.randn(2, 3, 7, 8)


def helper(x, **options):
    return F.scaled_dot_product_attention(x, x, x, **options)


def calls_helper(x, depth=1):
    return helper(x) if depth == 0 else calls_helper(x, depth - 1)  # leads back to itself


@torch.compile(backend="eager")
def compiled(x):
    return helper(x)


@torch.compiler.disable
def kept_out_of_graphs(x):
    return helper(x)


ops = types.ModuleType("a_file_of_the_same_package")
ops.attend = helper
TABLE = {"sdpa": helper, "eager": torch.softmax}
with_options = functools.partial(F.scaled_dot_product_attention, scale=0.5)


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class AnAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.fn = F.scaled_dot_product_attention

    def forward(self, x):
        return self.fn(x, x, x)


class AFunctionInAnAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.fn = {"sdpa": lambda x: F.scaled_dot_product_attention(x, x, x)}

    def forward(self, x):
        return self.fn["sdpa"](x)


class ImportInside(nn.Module):
    def forward(self, x):
        import torch.nn.functional as G

        return G.scaled_dot_product_attention(x, x, x)


class ImportOfTheNameInside(nn.Module):
    def forward(self, x):
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        return sdpa(x, x, x)


class Underneath(nn.Module):
    def forward(self, x):
        return torch._C._nn.scaled_dot_product_attention(x, x, x)


class AnotherName(nn.Module):
    def forward(self, x):
        return attend_by_another_name(x, x, x)


class ByGetattr(nn.Module):
    def forward(self, x):
        return getattr(F, "scaled_dot_product_attention", None)(x, x, x)


class AnAlias(nn.Module):
    def forward(self, x):
        functional = F
        return functional.scaled_dot_product_attention(x, x, x)


class AHelper(nn.Module):
    def forward(self, x):
        return calls_helper(x)


class ACompiledHelper(nn.Module):
    """As Fast-dLLM's LLaDA."""

    def forward(self, x):
        return compiled(x)


class AHelperOutsideOfGraphs(nn.Module):
    def forward(self, x):
        return kept_out_of_graphs(x)


class ACompiledForward(nn.Module):
    @torch.compile(backend="eager")
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class AHelperOfAModule(nn.Module):
    def forward(self, x):
        return ops.attend(x)


class ATable(nn.Module):
    def forward(self, x):
        return TABLE["sdpa"](x)


class APartial(nn.Module):
    def forward(self, x):
        return with_options(x, x, x)


class ADefault(nn.Module):
    def forward(self, x, attend=F.scaled_dot_product_attention):
        return attend(x, x, x)


class AStaticMethod(nn.Module):
    @staticmethod
    def attend(x):
        return F.scaled_dot_product_attention(x, x, x)

    def forward(self, x):
        return self.attend(x)


class AClassMethod(nn.Module):
    @classmethod
    def attend(cls, x):
        return F.scaled_dot_product_attention(x, x, x)

    def forward(self, x):
        return type(self).attend(x)


class OfTheClass(nn.Module):
    attend = staticmethod(F.scaled_dot_product_attention)

    def forward(self, x):
        return self.attend(x, x, x)


class AProperty(nn.Module):
    @property
    def attend(self):
        return F.scaled_dot_product_attention

    def forward(self, x):
        return self.attend(x, x, x)


class Middle(Attention):
    def forward(self, x):
        return 2 * super().forward(x)


class BySuper(Middle):
    def forward(self, x):
        return 1 + super().forward(x)


def call_old(module, x):
    return module._old_forward(x)


class WrappedInPlace(Attention):
    """As accelerate's hooks wrap a module: the forward of its class is in an attribute, another one hides it."""

    def __init__(self):
        super().__init__()
        self._old_forward = self.forward
        self.forward = functools.partial(call_old, self)


class WithoutGrad(nn.Module):
    @torch.no_grad()
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


WAYS = [kind for kind in list(globals().values()) if isinstance(kind, type) and issubclass(kind, nn.Module)]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
def test_a_layer_runs_on_ours_by_whatever_way_it_comes_to_attention(kind, ran):
    model = nn.Sequential(kind(), kind())
    before = [dict(vars(module)) for module in model.modules()]
    right = model(q)
    replaced = patch(model)
    assert replaced and all(name.startswith(("0.", "1.")) for name in replaced)
    torch.testing.assert_close(model(q), right)
    assert len(ran) == 2
    assert isinstance(model[0], kind) and type(model[0]) is type(model[1])  # one class, so that both compile as one
    torch.testing.assert_close(copy.deepcopy(model)(q), right)
    assert len(ran) == 4
    unpatch(model)
    assert [dict(vars(module)) for module in model.modules()] == before and type(model[0]) is kind
    torch.testing.assert_close(model(q), right, rtol=0, atol=0)
    assert len(ran) == 4
    helper(q), attend_by_another_name(q, q, q), kind()(q)  # nothing outside of the model has changed
    assert len(ran) == 4


COMPILED = [AFunctionInAnAttribute, ImportInside, Underneath, AHelper, AClassMethod, AProperty, BySuper]


@pytest.mark.parametrize("kind", COMPILED, ids=lambda kind: kind.__name__)
def test_a_patched_layer_runs_on_ours_when_compiled(kind, ran):
    model = nn.Sequential(kind())
    right = model(q)
    patch(model)
    torch._dynamo.reset()
    whole = "Import" not in kind.__name__  # an import inside a function breaks the graph, so that it stays ours
    torch.testing.assert_close(torch.compile(model, fullgraph=whole, backend="eager")(q), right)
    assert ran


def test_what_has_run_and_what_is_only_a_name_is_not_claimed():
    class Claims(Attention):
        def __init__(self):
            super().__init__()
            self.shape = F.scaled_dot_product_attention(q, q, q).shape

        def scaled_dot_product_attention(self, x):  # one of its own
            return F.softmax(x, -1)

        def other(self, x):
            return F.relu(self.scaled_dot_product_attention(x))

    assert patch(nn.Sequential(Claims())) == ["0.forward"]


class AnObject:
    def attend(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class BehindAnObject(nn.Module):
    """What patch does not follow: a method of something that is not a module."""

    def __init__(self):
        super().__init__()
        self.inner = AnObject()

    def forward(self, x):
        return self.inner.attend(x)


def test_torchs_attention_that_runs_all_the_same_is_named_with_its_line():
    model = nn.Sequential(Attention(), BehindAnObject())
    assert patch(model) == ["0.forward"]
    with pytest.warns(RuntimeWarning, match=r"torch's scaled_dot_product_attention ran at .*test_patch_finds\.py:\d+"):
        model(q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(q)  # said once


def test_a_part_that_is_called_by_itself_is_watched_too():
    class Both(Attention):
        def forward(self, x):
            return super().forward(x) + BehindAnObject()(x)

    model = nn.Sequential(Both())
    patch(model)
    with pytest.warns(RuntimeWarning, match=r"first forward of 0 torch's scaled_dot_product_attention ran"):
        model[0](q)
    unpatch(model)
    assert not model[0]._forward_hooks and not model._forward_pre_hooks


def test_torchs_multihead_attention_is_not_claimed_and_is_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.ours, self.theirs = Attention(), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.theirs(*[self.ours(x)[0]] * 3)[0]

    model = Model()
    assert patch(model) == ["ours.forward"]
    with pytest.warns(RuntimeWarning, match="torch's multi_head_attention_forward ran"):
        model(q)
    with pytest.raises(ValueError, match="found no attention in MultiheadAttention"):
        patch(nn.MultiheadAttention(8, 2))


def test_a_forward_in_which_nothing_of_ours_ran_says_so():
    class Switched(Attention):
        def forward(self, x, flash=False):
            return super().forward(x) if flash else (x @ x.mT).softmax(-1) @ x

    model = nn.Sequential(Switched())
    patch(model)
    with pytest.warns(RuntimeWarning, match="none of our attention ran"):
        model(q)


def test_compiled_functions_within_a_model_are_not_graphs_of_the_watched_forward():
    graphs = []
    options = {"fullgraph": True, "backend": lambda module, _: graphs.append(module) or module.forward}

    @torch.compile(**options)
    def rotate(x):
        return x.roll(1, -1)

    @torch.compile(**options)
    def attend(x):
        return F.scaled_dot_product_attention(x, x, x)

    class Layer(torch.nn.Module):
        def forward(self, x):
            return attend(rotate(x)) if self.training else attend(x)

    torch._dynamo.reset()
    model, x = Layer().eval(), torch.randn(1, 2, 5, 8)
    right = F.scaled_dot_product_attention(x, x, x)
    assert patch(model) == ["forward"]
    for _ in range(3):
        torch.testing.assert_close(model(x), right)
    assert len(graphs) == 1
    patch(model.train())
    torch.testing.assert_close(model(x), right.roll(1, -1))


def test_the_watch_ends_where_a_forward_raises_and_goes_on_with_the_next():
    model = nn.Sequential(Attention(), BehindAnObject())
    patch(model)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="query: expected"):
        warnings.simplefilter("error")
        model(q[0, 0])
    assert torch._C._len_torch_function_stack() == 0
    with pytest.warns(RuntimeWarning, match="torch's scaled_dot_product_attention ran"):
        model(q)
    unpatch(model)


def test_a_compiled_model_is_patched_inside(ran):
    inner = nn.Sequential(Attention())
    model = torch.compile(inner, backend="eager")
    right = model(q)  # compiled before
    assert patch(model) == ["0.forward"]
    torch.testing.assert_close(model(q), right)
    assert ran
    unpatch(model)
    ran.clear()
    torch.testing.assert_close(model(q), right)
    assert not ran and type(inner[0]) is Attention


class BreaksTheGraph(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return helper(x)


@pytest.mark.parametrize("kind", [AHelper, BreaksTheGraph, ACompiledHelper])
def test_graphs_of_before_patch_do_not_run_after_it(kind, monkeypatch):
    calls = []

    def backend(graph, inputs):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setitem(globals(), "compiled", torch.compile(helper, backend=backend))
    model = nn.Sequential(kind(), kind())
    if kind is not ACompiledHelper:
        model.compile(backend=backend)
    right = model(q)
    assert not any("illada_kernels.attention" in call for call in calls)
    patch(model)
    for _ in range(2):  # the first one is watched, as eager
        torch.testing.assert_close(model(q), right)
    assert any("illada_kernels.attention" in call for call in calls)
    unpatch(model)
    calls.clear()
    torch.testing.assert_close(model(q), right)
    assert not any("illada_kernels.attention" in call for call in calls)


@pytest.mark.parametrize("first", ["inner", "outer"])
@pytest.mark.parametrize("undo", ["inner", "outer"])
def test_patches_within_patches_leave_nothing_behind(first, undo, ran):
    outer = nn.Sequential(nn.Sequential(Attention()), Attention())
    before = [dict(vars(module)) for module in outer.modules()]
    inner = outer[0]
    for model in (inner, outer) if first == "inner" else (outer, inner):
        patch(model)
    for model in (inner, outer) if undo == "inner" else (outer, inner):
        unpatch(model)
    assert [dict(vars(module)) for module in outer.modules()] == before
    outer(q)
    assert not ran


def test_patching_again_takes_the_new_options():
    class WithLoss(Attention):
        def forward(self, x):
            return F.cross_entropy(super().forward(x)[:, 0, 0], torch.tensor([1, 2]))

    model = nn.Sequential(WithLoss())
    patch(model, loss=False)
    assert patch(model) == ["0.forward"]
    unpatch(model)
    assert type(model[0]) is WithLoss


def test_a_class_that_changed_after_patch_is_not_overwritten():
    model = nn.Sequential(Attention())
    patch(model)
    ours = type(model[0])
    model[0].__class__ = type("FSDPAttention", (ours,), {})
    with pytest.raises(ValueError, match="expected the class that patch gave 0, got FSDPAttention"):
        unpatch(model)
    model[0].__class__ = ours
    unpatch(model)
    assert type(model[0]) is Attention


def test_a_class_that_refuses_subclasses_leaves_the_model_as_it_was():
    class Final(Attention):
        def __init_subclass__(cls, **options):
            raise TypeError("Final has no subclasses")

        def forward(self, x):
            return super().forward(x)

    model = nn.Sequential(Attention(), Final())
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(TypeError, match="Final has no subclasses"):
        patch(model)
    assert [dict(vars(module)) for module in model.modules()] == before and type(model[0]) is Attention


def test_a_patched_model_does_not_pickle_and_says_why():
    model = nn.Sequential(Attention())
    patch(model)
    with pytest.raises((pickle.PicklingError, AttributeError), match="unpatch the model before pickling it"):
        pickle.dumps(model)
    unpatch(model)
    assert isinstance(pickle.loads(pickle.dumps(model))[0], Attention)
