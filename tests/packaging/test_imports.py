"""The modules of the packages, the benchmarks and the release import each other in one direction."""

import ast
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {name: ROOT / name for name in ("illada_kernels", "benchmarks", "release")}
PACKAGES["illada"] = ROOT / "python" / "illada"


def modules_of(package, folder):
    """{dotted name: (tree, whether it is a package)}"""
    found = {}
    for file in folder.rglob("*.py"):
        parts = (package, *file.relative_to(folder).with_suffix("").parts)
        is_package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if is_package else parts)] = (ast.parse(file.read_text(encoding="utf-8")), is_package)
    return found


def imports(node, in_function=False):
    """(import statement, whether it is in a function), without those that only a type checker sees."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node, in_function
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.orelse:
            yield from imports(child, in_function)
    else:
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from imports(child, inside)


def targets(node, name, is_package, known):
    """The known modules that an import statement in module `name` loads."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names if alias.name in known]
    base = name.split(".") if is_package else name.split(".")[:-1]
    base = base[: len(base) - node.level + 1] if node.level else []
    source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
    found = [f"{source}.{a.name}" if f"{source}.{a.name}" in known else source for a in node.names]
    return [module for module in found if module in known]


def graph(known, functions):
    """{module: the modules that it imports when it is loaded, or with `functions` at any time}"""
    edges = {name: Counter() for name in known}
    for name, (tree, is_package) in known.items():
        for node, in_function in imports(tree):
            if functions or not in_function:
                edges[name].update(target for target in targets(node, name, is_package, known) if target != name)
    return edges


def cycle(edges):
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return " -> ".join(error.args[1])
    return None


@pytest.fixture(scope="module")
def known():
    return {name: value for package, folder in PACKAGES.items() for name, value in modules_of(package, folder).items()}


def test_no_two_modules_need_each_other_to_load(known):
    assert cycle(graph(known, functions=False)) is None


def test_no_circle_leads_through_functions_either(known):
    assert len(known) > 150
    assert cycle(graph(known, functions=True)) is None


def test_the_kernels_never_import_the_model(known):
    edges = graph(known, functions=True)
    wrong = {
        n: t for n, t in edges.items() if n.startswith("illada_kernels") and any(x.split(".")[0] == "illada" for x in t)
    }
    assert not wrong


def test_a_circle_is_seen():
    sources = {"p": "", "p.a": "from . import b", "p.b": "def f():\n    from .a import x", "p.c": "from p import b"}
    planted = {name: (ast.parse(text), name == "p") for name, text in sources.items()}
    assert cycle(graph(planted, functions=False)) is None
    assert cycle(graph(planted, functions=True)) in ("p.a -> p.b -> p.a", "p.b -> p.a -> p.b")
