"""Operators and KeyRanges are registered with torch by `import illada_kernels`, whichever of the two comes first."""

from __future__ import annotations

import pytest
import torch

from illada_kernels import KeyRanges, attention, masked_loss


class Program(torch.nn.Module):
    def forward(self, x, ranges):
        out = attention(x, x, x, ranges).flatten(2)
        rows = torch.ones(out.shape[:2], dtype=torch.bool)
        return masked_loss(out, torch.ones(5, out.shape[2]), torch.zeros(out.shape[:2], dtype=torch.int64), rows)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "program.pt2"
    program = torch.export.export(Program(), (torch.randn(1, 6, 2, 8), KeyRanges.causal(6)))
    torch.export.save(program, path)
    return path


NOTHING_LEFT = """
assert not [f for f in sys.meta_path if type(f).__module__.startswith("illada")]
assert "exec_module" not in vars(torch.__loader__)
"""
REGISTERED = """
import sys, torch
print(*sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("illada_kernels::")))
print(*(kind for kind in torch.utils._pytree.SUPPORTED_NODES if kind.__name__ == "KeyRanges"))
"""
OPERATORS = ("attention", "attention_bwd", "masked_loss", "masked_loss_bwd", "unmask")
FIRST = [
    "import illada_kernels",
    "import torch, illada_kernels",
    "import importlib.util, illada_kernels; assert importlib.util.find_spec('torch')",  # a probe, as others do
    "from illada_kernels import TopK",
    "import illada_kernels.rules; from illada_kernels import Edit",  # a module of ours is what imports torch
]


@pytest.mark.parametrize("first", FIRST)
def test_operators_and_key_ranges_are_registered_and_an_exported_program_loads(first, saved, python):
    """A program needs no more than what is registered, so two of them stand for all."""
    load = "torch.export.load(sys.argv[1])" if first in (FIRST[0], FIRST[3]) else ""
    done = python("-W", "error::UserWarning", "-c", f"{first}{REGISTERED}{load}{NOTHING_LEFT}", str(saved))
    assert done.returncode == 0, done.stderr
    operators, kinds = done.stdout.splitlines()
    assert operators.split() == [f"illada_kernels::{name}" for name in OPERATORS]
    assert kinds == str(KeyRanges)


def stub(folder, text):
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(text)
    return folder


def test_a_torch_that_registration_cannot_use_is_imported_all_the_same_with_a_word(python, tmp_path):
    site = stub(tmp_path, "__version__ = '1.0'")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import illada_kernels, torch; print(torch.__version__)"
    done = python("-c", code, str(site))
    assert (done.returncode, done.stdout.strip()) == (0, "1.0"), done.stderr
    assert "illada_kernels.ops.attention is not registered with torch: ImportError" in done.stderr


def test_a_torch_that_fails_to_import_can_be_imported_again(python, tmp_path):
    site = stub(tmp_path, "import os; os.environ['READY']; Tensor = None")
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
import illada_kernels
for attempt in range(2):
    try: import torch
    except KeyError: print("failed")
    os.environ["READY"] = "1"
print(torch.Tensor)
"""
    done = python("-c", code, str(site))
    assert done.stdout.split() == ["failed", "None"], done.stderr
