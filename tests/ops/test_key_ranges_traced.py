"""KeyRanges in traces: every constructor and use under torch.compile and torch.export, with sizes that vary, in a
bounded number of graphs; as a pytree, in pickles, workers and saved programs; made under inference mode."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from illada_kernels import KeyRanges, attention

# Each takes x (B, S, 7), from whose shape all sizes come, and int offsets (B,) below S.
USES = {
    "constructor": lambda x, n: KeyRanges(x[..., :1].int().expand(-1, -1, 4).contiguous(), x.shape[1]),
    "full": lambda x, n: KeyRanges.full(x.shape[1]),
    "padding left": lambda x, n: KeyRanges.padding(n, x.shape[1], "left"),
    "padding right": lambda x, n: KeyRanges.padding(n, x.shape[1]),
    "packed": lambda x, n: KeyRanges.packed(n, x.shape[1]),
    "causal": lambda x, n: KeyRanges.causal(x.shape[1]),
    "causal of a cache": lambda x, n: KeyRanges.causal(x.shape[1] - 2, x.shape[1]),
    "window": lambda x, n: KeyRanges.window(x.shape[1], x.shape[1] - 3, 1),
    "window of a cache": lambda x, n: KeyRanges.window(x.shape[1] - 2, None, x.shape[0], x.shape[1]),
    "block causal": lambda x, n: KeyRanges.block_causal(x.shape[1], x.shape[0]),
    "block causal boundaries": lambda x, n: KeyRanges.block_causal(x.shape[1], n),
    "block causal boundaries per sequence": lambda x, n: KeyRanges.block_causal(x.shape[1], n[:, None]),
    "block diffusion": lambda x, n: KeyRanges.block_diffusion(x.shape[1], x.shape[0]),
    "block diffusion packed": lambda x, n: KeyRanges.block_diffusion(x.shape[1], 2, n, causal="clean"),
    "block diffusion causal": lambda x, n: KeyRanges.block_diffusion(x.shape[1], x.shape[0] - 1, causal="both"),
    "anchor blocks": lambda x, n: KeyRanges.anchor_blocks(n, x.shape[1], x.shape[0]),
    "anchor blocks packed": lambda x, n: KeyRanges.anchor_blocks(n[:, None], x.shape[1], 2, n),
    "cached": lambda x, n: KeyRanges.cached(n, x.shape[1] - 2, x.shape[1]),
    "cached blocks": lambda x, n: KeyRanges.cached(n, x.shape[1] - 2, x.shape[1], block=x.shape[0], left=x.shape[1]),
    "from padding": lambda x, n: KeyRanges.from_padding(torch.arange(x.shape[1]) < n[:, None]),
    "from dense": lambda x, n: KeyRanges.from_dense(KeyRanges.padding(n, x.shape[1]).dense().expand(-1, 4, -1)),
    "from dense of heads": lambda x, n: KeyRanges.from_dense(KeyRanges.padding(n, x.shape[1]).dense()[:, None]),
    "and": lambda x, n: KeyRanges.causal(x.shape[1]) & KeyRanges.padding(n, x.shape[1], "left"),
    "slice": lambda x, n: KeyRanges.block_causal(x.shape[1], n[:, None])[1 : x.shape[0], x.shape[1] - 3 :],
    "slice of a broadcast": lambda x, n: KeyRanges.full(x.shape[1])[1 : x.shape[0], : x.shape[1] - 1],
    "to": lambda x, n: KeyRanges.causal(x.shape[1]).to(x.device, non_blocking=True),
}


def given(batch, length):
    return torch.zeros(batch, length, 7), torch.arange(1, batch + 1) * (length // (batch + 1))


SIZES = [(3, 13), (4, 17), (5, 16), (6, 23)]


# dense() and density() see bounds and num_keys alone: one batch or each its own, one row or all, a part of the keys.
READ = ("full", "padding left", "causal of a cache", "window", "cached", "from dense", "slice", "slice of a broadcast")


class Use(torch.nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.uses = [(USES[name], name in READ or len(names) == 1) for name in names]

    def forward(self, x, n):
        made = [(use(x, n), read) for use, read in self.uses]
        read = [ranges for ranges, read in made if read]
        return [*(m.bounds for m, _ in made), *(r.dense() for r in read), *(r.density() for r in read)]


def same(got, expected):
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def counting(graphs, first=None):
    """A backend that runs graphs as they are, the first by another backend."""

    def backend(module, inputs):
        graphs.append(module)
        return first(module, inputs) if first and len(graphs) == 1 else module.forward

    return backend


@pytest.mark.slow
def test_sizes_that_vary_need_two_graphs_and_the_first_is_lowered_ahead_of_time():
    """Of all uses together: a use that needed one for each size would make the others need it too."""
    torch._dynamo.reset()
    graphs, module = [], Use(*USES)
    compiled = torch.compile(module, fullgraph=True, backend=counting(graphs, lookup_backend("aot_eager")))
    for size in SIZES:
        assert same(compiled(*given(*size)), module(*given(*size)))
    assert len(graphs) == 2


def by_hint(mark):
    def hint(x, n):
        for tensor, dim in ((x, 0), (x, 1), (n, 0)):
            mark(tensor, dim)

    return hint


# A hint says which sizes vary; what each use makes of sizes that vary is shown above.
SOME = ("causal of a cache", "block diffusion packed", "cached blocks", "from dense", "and", "slice")
HINTS = {
    "dynamic": (True, lambda x, n: None),
    "marked": (None, by_hint(torch._dynamo.mark_dynamic)),  # refused where a use takes a size for a constant
    "perhaps marked": (None, by_hint(torch._dynamo.maybe_mark_dynamic)),
}


@pytest.mark.parametrize("how", HINTS)
def test_dynamic_sizes_need_one_graph(how):
    torch._dynamo.reset()
    dynamic, hint = HINTS[how]
    graphs, module = [], Use(*SOME)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counting(graphs))
    for size in SIZES:
        x, n = given(*size)
        hint(x, n)
        assert same(compiled(x, n), module(x, n))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("strict, names", [(False, list(USES)), (True, ["block diffusion", "cached"])])
def test_all_uses_export_with_dynamic_sizes(strict, names):
    """Strict export is what the graphs above are, and the lowering that the other one shows."""
    module, shapes = Use(*names), ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    program = torch.export.export(module, given(*SIZES[0]), dynamic_shapes=shapes, strict=strict).module()
    for size in SIZES:
        assert same(program(*given(*size)), module(*given(*size)))


@torch._dynamo.config.patch(capture_scalar_outputs=True)
@pytest.mark.parametrize("name", ["full", "causal", "window", "block causal", "block diffusion", "cached"])
def test_lengths_that_only_data_decide_trace_too(name):
    torch._dynamo.reset()

    def build(length):
        size = length.item()
        torch._check(size >= 4)  # so that "cached" has room
        return Use(name)(torch.zeros(3, 1, 3).expand(3, size, 3), torch.tensor([1, 2, 3]))

    compiled = torch.compile(build, fullgraph=True, backend="eager")
    for length in (torch.tensor(9), torch.tensor(12)):
        assert same(compiled(length), build(length))


def test_what_does_not_fit_still_raises_where_nothing_can_be_read():
    hole = torch.tensor([[True, False, True]])
    three = torch.tensor([[True, False, True, False, True]])
    a, b = torch.tensor([[[0, 6, 8, 10]]], dtype=torch.int32), torch.tensor([[[0, 2, 4, 10]]], dtype=torch.int32)
    cases = (
        (lambda: KeyRanges.from_padding(hole).bounds, "one run of True per row"),
        (lambda: KeyRanges.from_dense(three[None]).bounds, "at most two runs"),
        (lambda: (KeyRanges(a, 10) & KeyRanges(b, 10)).bounds, "at most two key ranges a row"),
    )
    for call, message in cases:
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match=message):
            torch.compile(call, fullgraph=True, backend="aot_eager")()


def test_bad_sizes_are_named_inside_a_trace():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, k: KeyRanges.block_causal(x.shape[1], k).bounds, fullgraph=True, backend="eager")
    x = torch.zeros(1, 9)
    for block in (2, 3, 4):
        assert torch.equal(compiled(x, block), KeyRanges.block_causal(9, block).bounds)
    with pytest.raises(Exception, match="block: expected an int from 1 to 2147483647"):
        compiled(x, 0)


def test_numpy_numbers_are_sizes():
    for integer in (np.int32, np.int64, np.uint8):
        ranges = KeyRanges.block_diffusion(integer(4), integer(2))
        assert torch.equal(ranges.bounds, KeyRanges.block_diffusion(4, 2).bounds) and type(ranges.num_keys) is int
        assert torch.equal(
            KeyRanges.window(4, integer(1), None, integer(6)).bounds, KeyRanges.window(4, 1, None, 6).bounds
        )


@pytest.mark.parametrize("integer", [np.int32, np.int64])
def test_numpy_numbers_are_sizes_in_a_trace_too(integer):
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(lambda n: KeyRanges.window(n, 1, 2).dense(), fullgraph=True, backend=counting(graphs))
    for n in (4, 5, 6):
        assert torch.equal(compiled(integer(n)), KeyRanges.window(n, 1, 2).dense())
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["from padding", "from dense", "and"])
def test_what_reads_masks_traces_with_proxies_and_fake_tensors(name):
    x, n = given(3, 13)
    traced = make_fx(lambda x, n: USES[name](x, n).bounds, tracing_mode="symbolic")(x, n)
    for size in SIZES:
        assert torch.equal(traced(*given(*size)), USES[name](*given(*size)).bounds)


# ---- arguments and results of programs -------------------------------------------------------------------------------


class Attend(torch.nn.Module):
    def forward(self, x, ranges):
        return attention(x, x, x, ranges), ranges[:, 1:]


def attended(length):
    return torch.randn(1, length, 2, 8), KeyRanges.causal(length)


@pytest.mark.parametrize("strict", [True, False])
def test_exported_program_takes_and_returns_ranges_and_can_be_saved(strict):
    shapes = ({1: Dim.DYNAMIC}, [{1: Dim.DYNAMIC}, Dim.DYNAMIC])
    program = torch.export.export(Attend(), attended(6), dynamic_shapes=shapes, strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for runs in (program.module(), torch.export.load(file).module()):
        for length in (6, 9):
            x, ranges = attended(length)
            out, rest = runs(x, ranges)
            torch.testing.assert_close(out, attention(x, x, x, ranges))
            assert isinstance(rest, KeyRanges) and rest.num_keys == length
            assert torch.equal(rest.bounds, ranges[:, 1:].bounds)


def test_compiled_function_takes_and_returns_ranges_in_at_most_two_graphs():
    torch._dynamo.reset()
    graphs = []
    compiled = torch.compile(Attend(), fullgraph=True, backend=counting(graphs))
    for length in (6, 9, 12, 15):
        x, ranges = attended(length)
        out, rest = compiled(x, ranges)
        torch.testing.assert_close(out, attention(x, x, x, ranges))
        assert isinstance(rest, KeyRanges) and torch.equal(rest.bounds, ranges[:, 1:].bounds)
    assert len(graphs) <= 2


def test_tree_functions_see_bounds_and_num_keys():
    ranges = KeyRanges.causal(3)
    paths = [_pytree.keystr(path) for path, _ in _pytree.tree_leaves_with_path({"r": ranges})]
    assert paths == ["['r'].bounds", "['r'].num_keys"]
    kinds = _pytree.tree_map(lambda leaf: type(leaf).__name__, [ranges])[0]
    assert (kinds.bounds, kinds.num_keys) == ("Tensor", "int") and "Tensor" in repr(kinds)
    text = _pytree.treespec_dumps(_pytree.tree_structure(ranges))
    assert _pytree.tree_unflatten(["a", "b"], _pytree.treespec_loads(text)).bounds == "a"


def test_copies_and_pickles_are_equal_and_their_own():
    ranges = KeyRanges.window(7, 1, 2)
    file = io.BytesIO()
    torch.save(ranges, file)
    file.seek(0)
    copies = (
        copy.copy(ranges),
        copy.deepcopy(ranges),
        pickle.loads(pickle.dumps(ranges)),
        torch.load(file, weights_only=True),
    )
    for other in copies:
        assert isinstance(other, KeyRanges) and other.num_keys == 7 and torch.equal(other.bounds, ranges.bounds)
    for other in copies[1:]:
        assert other.bounds.data_ptr() != ranges.bounds.data_ptr()


class Documents(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        return KeyRanges.causal(index + 2)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_of_a_data_loader_hand_ranges_over(context):
    loader = torch.utils.data.DataLoader(Documents(), batch_size=None, num_workers=1, multiprocessing_context=context)
    for index, ranges in enumerate(loader):
        assert torch.equal(ranges.dense(), KeyRanges.causal(index + 2).dense())


# ---- inference mode --------------------------------------------------------------------------------------------------


def test_ranges_made_under_inference_mode_train_later():
    x = torch.randn(3, 13, 2, 8, requires_grad=True)
    for name, use in USES.items():
        with torch.inference_mode():
            ranges, moved = use(*given(3, 13)), copy.deepcopy(use(*given(3, 13)))
            part, mapped = ranges[:, :1], _pytree.tree_map(copy.copy, ranges)
            loaded = pickle.loads(pickle.dumps(ranges))
        for made in (ranges, moved, part, mapped, loaded):
            assert not made.bounds.is_inference(), name
    with torch.inference_mode():
        ranges = KeyRanges.causal(13)
    attention(x, x, x, ranges).sum().backward()
    expected = x.grad.clone()
    x.grad = None
    attention(x, x, x, KeyRanges.causal(13)).sum().backward()
    assert torch.equal(x.grad, expected)
