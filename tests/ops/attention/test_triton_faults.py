"""The tests of the Triton attention notice faults: each is planted in a copy of a kernel's source and is caught."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from illada_kernels.ops.attention import cases
from illada_kernels.ops.attention import triton as package
from tests.helpers.attention_oracle import draw

pytest.importorskip("triton", reason="no triton")

from tests.helpers import attention_triton as checks
from tests.helpers.triton_interpreter import KernelFault


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    checks.use_small_tiles(monkeypatch)


def plant(monkeypatch, folder: Path, file: str, old: str, new: str) -> None:
    """Until the test ends the room's Triton kernels are copies, of which `file` says `new` for `old`."""
    for name in ("tiles", "fwd", "bwd_keys", "bwd_queries", "bwd"):
        text = Path(str(importlib.import_module(f"{package.__name__}.{name}").__file__)).read_text()
        if name == file:
            assert text.count(old) >= 1, old
            text = text.replace(old, new)
        copy = folder / f"{name}.py"
        copy.write_text(text)
        spec = importlib.util.spec_from_file_location(f"{package.__name__}.{name}", copy)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        monkeypatch.setattr(package, name, module)
        spec.loader.exec_module(module)


def bar(mask: str) -> None:
    inputs = draw(1, 40, 71, 2, 1, 64, dtype=torch.float16)
    checks.meets_the_bar(inputs, cases.hostile_masks(1, 40, 71)[mask])


def overlap() -> None:
    bar("hulls_overlap")


def random() -> None:
    bar("random")


def causal() -> None:
    bar("causal")


def full() -> None:
    bar("full")


poison = checks.poisoned_keys_and_rows_never_reach_output_or_gradient
FAULTS = {
    "hulls that overlap visit a tile twice": (
        overlap,
        "tiles",
        "begin = tl.maximum(begin // PART * PART, first)",
        "begin = begin // PART * PART",
    ),
    "a whole tile that is not": (
        causal,
        "tiles",
        "full_end = all_end // KEYS * KEYS",
        "full_end = tl.cdiv(all_end, KEYS) * KEYS",
    ),
    "the second segment of parts is lost": (
        causal,
        "tiles",
        "at = tl.where(i >= 0, full_end0 + i, at)",
        "at = tl.where(i > 0, full_end0 + i, at)",
    ),
    "bounds that are not ordered": (
        checks.malformed_bounds_act_as_their_clamped_form,
        "tiles",
        "tl.maximum(tl.load(at + 2, mask=inside, other=0), hi0)",
        "tl.load(at + 2, mask=inside, other=0)",
    ),
    "v of keys that no row attends to": (
        poison,
        "fwd",
        "attended = attended_keys(keys, lo0, hi0, lo1, hi1)",
        "attended = keys < num_keys",
    ),
    "keys beyond the last": (full, "fwd", "exists = keys < num_keys", "exists = keys < num_keys + 1"),
    "no rescaling of what came before": (
        full,
        "fwd",
        "total = total * rescale + tl.sum(p, 1)",
        "total += tl.sum(p, 1)",
    ),
    "rows without keys so far": (
        random,
        "fwd",
        "tl.full([ROWS], LOWEST, tl.float32)",
        'tl.full([ROWS], float("-inf"), tl.float32)',
    ),
    "q and dout of rows without keys": (poison, "bwd_keys", "wanted = lo0 < hi0", "wanted = rows >= 0"),
    "k of keys that no row attends to": (
        poison,
        "bwd_queries",
        "wanted = attended_keys(keys, lo0, hi0, lo1, hi1)",
        "wanted = attended_keys(keys, lo0 * 0, hi1, lo1, hi1)",
    ),
    "the gradient of lse": (random, "bwd", "delta -= tl.load(dlse", "delta += tl.load(dlse"),
    "the same tile of rows again": (random, "bwd_keys", "bits &= bits - 1", "bits &= bits"),
    "a tile of rows that is not full": (causal, "bwd_keys", "other=0) >= end", "other=0) >= end - 16"),
    "rows of the next query": (
        full,
        "bwd_queries",
        "packed = (program // tiles).to(tl.int64) * packed_rows + rows",
        "packed = (program // tiles).to(tl.int64) * packed_rows + rows + 1",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch, tmp_path, fault):
    check, file, old, new = FAULTS[fault]
    plant(monkeypatch, tmp_path, file, old, new)
    with pytest.raises((AssertionError, KernelFault)):
        check()


def test_nothing_is_caught_where_nothing_is_planted(monkeypatch, tmp_path):
    plant(monkeypatch, tmp_path, "fwd", "inside", "inside")
    overlap()
