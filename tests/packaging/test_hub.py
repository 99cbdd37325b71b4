"""What `make hub` writes is loaded by the `kernels` package, beside the installed package or without it."""

from __future__ import annotations

import ast
import importlib
import json
import sys

import pytest
import torch

import illada_kernels
from illada_kernels._extension import extension
from release import hub

KERNELS = hub.ROOT / "build" / "kernels"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return hub.write(tmp_path_factory.mktemp("hub") / "tree")


@pytest.fixture(scope="module")
def kernels():
    """The package, which no later test of this process finds."""
    if not KERNELS.is_dir():
        pytest.skip("make build/kernels installs the kernels package")
    pytest.importorskip("huggingface_hub", reason="the kernels package needs huggingface_hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.syspath_prepend(KERNELS)
        yield importlib.import_module("kernels")
    for name in [name for name in sys.modules if name.partition(".")[0] == "kernels"]:
        del sys.modules[name]


def test_the_source_tree_is_python_only_with_relative_imports(tree):
    toml = (tree / "build.toml").read_text()
    assert 'name = "illada-kernels"' in toml and "[torch-noarch]" in toml and "edition = 5" in toml
    source = tree / "torch-ext" / "illada_kernels"
    assert not list(source.rglob("*.so"))
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not [n for n in names if n.partition(".")[0] == "illada_kernels"], path


def test_every_file_of_a_built_tree_has_its_digest(tree, kernels):
    rust = importlib.import_module("kernels._rust")
    for backend in hub.BACKENDS:
        folder = tree / "build" / f"torch-{backend}"
        said = rust.Metadata.read_from_file(folder / "metadata.json").digest
        said.validate(rust.Digest.hash_variant(rust.DigestAlgorithm.SHA256, folder))
        assert json.loads((folder / "metadata.json").read_text())["backend"] == {"type": backend}


def test_it_loads_as_a_kernel_whose_results_are_ours(tree, kernels):
    kernel = kernels.get_local_kernel(tree)
    assert set(kernel.__all__) == {*illada_kernels.__all__, "layers"}
    assert kernel.attention is not illada_kernels.attention  # a copy of its own, with operators of its own
    q, backend = torch.randn(2, 7, 4, 16, requires_grad=True), "cpu" if extension()[0] else "reference"
    ours = illada_kernels.attention(q, q, q, illada_kernels.KeyRanges.causal(7), backend=backend)
    theirs = kernel.attention(q, q, q, kernel.KeyRanges.causal(7), backend=backend)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(out.square().sum(), q)[0] for out in (ours, theirs)))
    compiled = torch.compile(lambda x: kernel.attention(x, x, x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q), kernel.attention(q, q, q))


class Attention(torch.nn.Module):
    def forward(self, query, key, value, attn_mask=None):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask, enable_gqa=True)


def test_kernelize_puts_a_layer_into_a_foreign_model(tree, kernels):
    layer = kernels.use_kernel_forward_from_hub("ScaledDotProductAttention")(type("Foreign", (Attention,), {}))
    model = torch.nn.ModuleList([layer()])
    repository = kernels.LocalLayerRepository(repo_path=tree, layer_name="ScaledDotProductAttention")
    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8)
    before = model[0](q, k, k)
    with kernels.use_kernel_mapping({"ScaledDotProductAttention": {"cpu": repository}}):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu")
    assert sys.modules[model[0].forward.__func__.__module__.partition(".")[0]].__file__.startswith(str(tree))
    torch.testing.assert_close(model[0](q, k, k), before, atol=1e-6, rtol=1e-5)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(model[0](q, k, k, mask), layer()(q, k, k, mask), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", hub.layer_names())
def test_kernels_takes_every_layer(name, tree, kernels):
    layers = kernels.get_local_kernel(tree).layers
    validate = importlib.import_module("kernels.layer.layer")._validate_layer
    validate(check_cls=getattr(layers, name), cls=getattr(layers, name), repo=name)


def test_it_needs_no_installed_package(tree, kernels, python, tmp_path):
    code = """
import sys, torch
from pathlib import Path
class Refuse:
    def find_spec(self, name, *_):
        assert name.partition(".")[0] != "illada_kernels"
sys.meta_path.insert(0, Refuse())
from kernels import get_local_kernel
ops = get_local_kernel(Path(sys.argv[1]))
loss = ops.masked_loss(torch.zeros(3, 8), torch.randn(100, 8), torch.tensor([1, 2, 3]), torch.tensor([True] * 3))
print(f"{loss.item():.3f}")
"""
    done = python("-c", code, str(tree), path=(KERNELS,), cwd=tmp_path)
    assert done.stdout.strip() == "13.816", done.stderr


def test_a_folder_that_is_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(SystemExit, match="expected a new folder"):
        hub.write(tmp_path)
    assert (tmp_path / "mine").exists()
