"""How the tests of unmask's Triton kernels call them in the interpreter, and plant faults."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="no triton")

import illada_kernels as ik
from illada_kernels.ops.unmask import gpu, op
from illada_kernels.ops.unmask.triton import launch as room
from illada_kernels.testing import unmask_confidence_tolerance
from tests.helpers.triton_interpreter import interpreted
from tests.helpers.unmask_oracle import draw_call

# The kernels' files, in the order in which they import each other.
FILES = ("noise", "partials", "bounds", "head", "draw", "rows", "ranks", "proposals", "select")


@contextmanager
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the interpreter, with so few ids a tile and a slice that a small vocabulary has several of each."""
    monkeypatch.setattr(gpu, "SLICE", 256)
    monkeypatch.setattr(room, "ROW_PAIRS", 64)
    monkeypatch.setattr(room, "BOUND_IDS", 128)
    monkeypatch.setattr(room, "GROUPS", 2)
    monkeypatch.setattr(room, "PAIRS", 32)
    with interpreted(op):
        yield


def same(got, want, tokens, want_tokens, vocabulary: int, by_entropy: bool = False) -> None:
    for name in ("proposal", "committed", "remaining"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(tokens, want_tokens)
    rtol, atol = unmask_confidence_tolerance("neg_entropy" if by_entropy else "probability", vocabulary)
    torch.testing.assert_close(got.confidence, want.confidence, rtol=rtol, atol=atol)


def exact_inputs(batch: int, count: int, vocabulary: int, dim: int, dtype=torch.float32, seed: int = 0):
    """Multiples of 1/8 below 2: products and sums are exact in float32, so logits are the same bits everywhere."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-8, 9, (batch, count, dim), generator=generator).to(dtype) / 8
    weight = torch.randint(-8, 9, (vocabulary, dim), generator=generator).to(dtype) / 8
    tokens = torch.full((batch, count + 2), vocabulary - 1)
    positions = torch.stack([torch.randperm(count + 2, generator=generator)[:count] for _ in range(batch)])
    return hidden, weight, tokens, positions


def from_hidden(inputs, rule, backend: str, **options):
    hidden, weight, tokens, positions = inputs
    tokens = tokens.clone()
    options = {"mask_id": weight.shape[0] - 1, "temperature": 0.7, "seed": 11, **options}
    return ik.unmask(hidden, weight, tokens, positions, rule, backend=backend, **options), tokens


def draw_small_call(draw):
    """draw_call's truncating call, of at most 3 candidates and 260 ids: more than a slice of small_tiles."""
    logits, tokens, positions, rule, options = draw_call(draw, truncated=True)
    forbid, mask_id = options["forbid"], options["mask_id"]
    options["forbid"] = (mask_id % 260,) if forbid is None else tuple(i for i in forbid if i < 260)
    options["defer"] = tuple(i for i in options["defer"] if i < 260)
    if options["logit_bias"] is not None and isinstance(options["logit_bias"][0], list):
        options["logit_bias"] = ([0, 0], [1.5, -0.25])
    if options["noise_positions"] is not None:
        options["noise_positions"] = options["noise_positions"][:, :3]
    if isinstance(options["revise"], ik.Remask) and options["revise"].scores is not None:
        options["revise"] = ik.Remask(options["revise"].n, options["revise"].scores[:, :3].contiguous())
    return logits[:, :3, :260], tokens, positions[:, :3], rule, options


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, file: str, old: str, new: str) -> None:
    """Replaces the one occurrence of `old` in a file of the kernels, and what imports from it, until the test ends."""
    package = room.__name__.rpartition(".")[0]
    for name in FILES[FILES.index(file) :]:
        source = Path(str(importlib.import_module(f"{package}.{name}").__file__)).read_text()
        if name == file:
            assert source.count(old) == 1, f"{name}.py holds {old!r} {source.count(old)} times"
            source = source.replace(old, new)
        path = folder / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(f"{package}.{name}", path)
        assert spec is not None and spec.loader is not None
        planted = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"{package}.{name}", planted)
        spec.loader.exec_module(planted)
        if hasattr(planted, f"{name}_kernel"):
            monkeypatch.setattr(room, f"{name}_kernel", getattr(planted, f"{name}_kernel"))
