"""patch leaves what code reads of its own class, and of globals that its file writes, as it was, or refuses."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from illada_kernels.integrations import patch, unpatch

q = torch.randn(2, 3, 7, 8)


class Attention(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)


# ---- code that asks for its class ------------------------------------------------------------------------------------


class Counts(Attention):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        self.__class__.last = x.shape
        return super().forward(x)


class Counted(nn.Module):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        self.count()
        return F.scaled_dot_product_attention(x, x, x) if type(self) is Counted else x

    def count(self):
        self.__class__.calls += 1


class ReadsItsClass(nn.Module):
    def attend(self, x):
        return F.scaled_dot_product_attention(x, x, x)

    def forward(self, x):
        return type(self).attend(self, x)


class OtherMethodOfSuper(Attention):
    def forward(self, x):
        return self.attend(x)

    def attend(self, x):
        return super().forward(x)


class BaseWithHelper(nn.Module):
    def attend(self, x):
        return F.scaled_dot_product_attention(x, x, x)


class ReachesHelperBySuper(BaseWithHelper):
    def forward(self, x):
        return super().attend(x)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_code_that_compares_or_writes_to_its_class_does_what_it_did(ran):
    model = nn.Sequential(Counted(), Counted())
    Counted.calls = 0
    right = model(q)
    assert Counted.calls == 4
    patch(model)
    torch.testing.assert_close(model(q), right)
    assert len(ran) == 2 and Counted.calls == 8 and type(model[0]) is Counted and "calls" not in vars(model[0])
    assert type(copy.deepcopy(model)[1]) is Counted
    unpatch(model)
    assert "forward" not in vars(model[0])


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("kind", [ReadsItsClass, OtherMethodOfSuper, ReachesHelperBySuper])
def test_what_is_read_of_a_class_is_ours_too(kind, ran):
    model = nn.Sequential(kind())
    right = model(q)
    patch(model)
    torch.testing.assert_close(model(q), right)
    assert ran
    unpatch(model)
    assert type(model[0]) is kind


class SaysTypes(nn.Module):
    """As Dream's model: the type of an argument is asked, and types are written into messages."""

    @property
    def attend(self):
        return F.scaled_dot_product_attention

    def forward(self, x, mask=None, *, cache=None):
        if type(mask) is str or type(cache) is dict:
            raise TypeError(f"{type(self)} and {self.__class__!r} take no {type(x.shape)}")
        return self.attend(x, x, x)


def test_types_of_arguments_and_in_messages_are_not_the_module_s_class(ran):
    model = nn.Sequential(SaysTypes())
    right = model(q)
    patch(model)
    torch.testing.assert_close(model(q), right)
    assert ran
    unpatch(model)
    assert type(model[0]) is SaysTypes


class ComparesAnother(SaysTypes):
    def forward(self, x):
        return super().forward(x) if all(type(module) is ComparesAnother for module in self.modules()) else x


class ComparesAName(SaysTypes):
    def forward(self, x):
        me = self
        return super().forward(x) if type(me) is ComparesAName else x


@pytest.mark.parametrize("kind", [ComparesAnother, ComparesAName])
def test_types_of_what_may_be_the_module_are_its_class(kind):
    model = nn.Sequential(kind())
    with pytest.raises(ValueError, match=rf"{kind.__name__}\.forward compares or writes to the module's own class"):
        patch(model)


def test_where_only_a_subclass_would_do_code_that_uses_its_class_is_refused():
    model = nn.Sequential(Attention(), Counts())
    with pytest.raises(ValueError, match=r"Counts\.forward compares or writes to the module's own class"):
        patch(model)
    assert [type(module) for module in model] == [Attention, Counts] and "forward" not in vars(model[0])


def test_a_copy_and_a_replica_run_with_their_own_weights(ran):
    class Weighted(Attention):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * F.scaled_dot_product_attention(x, x, x)

    model = nn.Sequential(Weighted())
    right = model(q)
    patch(model)
    for other in (copy.deepcopy(model[0]), model[0]._replicate_for_data_parallel()):
        other.scale = nn.Parameter(torch.full((), 2.0)) if "scale" in other._parameters else torch.full((), 2.0)
        torch.testing.assert_close(other(q), 2 * right)
    torch.testing.assert_close(model(q), right)
    assert len(ran) == 3


def test_a_method_that_was_wrapped_after_patch_is_not_thrown_away():
    model = nn.Sequential(Attention())
    patch(model)
    ours = model[0].forward
    model[0].forward = functools.partial(ours)
    with pytest.raises(ValueError, match=r"expected 0\.forward to be what patch made of it"):
        unpatch(model)
    model[0].forward = ours
    unpatch(model)
    assert type(model[0]) is Attention and "forward" not in vars(model[0])


# ---- globals that are written ----------------------------------------------------------------------------------------

MASK = None


class ReadsAGlobal(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, attn_mask=MASK)


class WritesIt(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = ReadsAGlobal()

    def forward(self, x, mask):
        global MASK
        MASK = mask
        return self.inner(x)


class InAnAttribute(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Attention()
        self.last = nn.Identity()
        self.last.attend = lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=MASK)

    def forward(self, x):
        return self.last.attend(self.first(x))


@pytest.mark.parametrize("kind", [WritesIt, InAnAttribute])
def test_a_global_that_the_file_writes_is_refused_and_nothing_is_changed(kind):
    """A copy has globals of its own, so it would go on with the mask that stood there when it was made."""
    model = kind()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="uses the global MASK, which functions of its file write"):
        patch(model)
    assert [type(module) for module in model.modules()] == classes
    assert all("_illada_patch" not in vars(module) for module in model.modules())
