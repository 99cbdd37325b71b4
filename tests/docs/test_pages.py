"""Pages say what the code does: snippets run, links and commands lead somewhere, tables and pictures are current."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import re
import shlex
from pathlib import Path

import pytest

import illada_kernels
from illada_kernels.doctor import report
from tests.helpers import checkout

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
EMULATED = "docs/concepts/cuda_on_cpu.md"
REFERENCE = {  # pages of docs/reference and the modules whose names each lists
    "illada_kernels": ["illada_kernels"],
    "illada": ["illada"],
    "integrations": [
        f"illada_kernels.{module}"
        for module in (
            "nn",
            "layer",
            "distributed",
            "integrations",
            "integrations.trainer",
            "integrations.transformers",
        )
    ],
}


def python_blocks(name: str) -> list[str]:
    return [text for language, text in FENCED.findall((ROOT / name).read_text()) if language == "python"]


# ---- snippets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in NAMES if python_blocks(name)])
def test_python_blocks_of_a_page_run_in_order(name, tmp_path, monkeypatch):
    """README's stand alone, each with its own imports; those of other pages continue one another."""
    if name == EMULATED:
        from tests.cuda_on_cpu.library import missing

        if missing() is not None:
            pytest.skip(missing())
    else:
        monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, block in enumerate(python_blocks(name), 1):
        names = {} if name == "README.md" else names
        exec(compile(block, f"{name}, block {number}", "exec"), names)


def test_the_readme_and_every_guide_have_snippets():
    for name in ("README.md", *(n for n in NAMES if n.startswith("docs/guides/"))):
        assert python_blocks(name), name


# ---- links and commands ---------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """Ids of a page's headings, as GitHub and the site make them, and of the names that the site documents."""
    text = FENCED.sub("", path.read_text())
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors(path), f"{name}: {link} has no such heading"


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_page_names_exist(name):
    """Inline code that looks like a path from the root; <op> and the like stand for any name, {a,b} for each."""
    for code in re.findall(
        r"`((?:csrc|illada_kernels|python|tests|benchmarks|docs|examples)/[^`\s]*)`", (ROOT / name).read_text()
    ):
        pattern = re.sub(r"<\w+>", "*", code).rstrip("/")
        alternatives = re.search(r"\{(.*)\}", pattern)
        for choice in alternatives[1].split(",") if alternatives else [""]:
            path = re.sub(r"\{.*\}", choice, pattern)
            assert list(ROOT.glob(path)), f"{name}: {code}"


def readme_tree() -> list[str]:
    """The folders of README's tree, as paths from the root."""
    tree = next(block for _, block in FENCED.findall((ROOT / "README.md").read_text()) if block.startswith("csrc/"))
    top, found = "", []
    for line in tree.splitlines():
        folder = line.split()[0]
        top = top if line.startswith(" ") else folder
        found.append((top + folder if line.startswith(" ") else folder).rstrip("/"))
    return found


def test_the_readmes_tree_is_that_of_the_folders():
    listed = readme_tree()
    assert [folder for folder in listed if not list(ROOT.glob(re.sub(r"<\w+>", "*", folder)))] == []
    there = [name for name in checkout.SOURCES if not name.startswith(".")]
    for parent in ("csrc", "illada_kernels", "python/illada", "benchmarks"):
        files = (path.relative_to(ROOT / parent).parts for path in (ROOT / parent).rglob("*") if path.is_file())
        names = {parts[0] for parts in files if len(parts) > 1 and "__pycache__" not in parts}
        there += [f"{parent}/{name}" for name in names]
    assert [folder for folder in there if not any(f"{line}/".startswith(f"{folder}/") for line in listed)] == []


def test_the_doctor_says_what_the_readme_explains():
    table = (ROOT / "README.md").read_text().partition("| doctor says | do |\n|---|---|\n")[2].partition("\n\n")[0]
    messages = re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)
    source = "".join(path.read_text() for path in (ROOT / "illada_kernels").rglob("*.py"))
    assert len(messages) >= 5 and [message for message in messages if message not in source] == []


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every line of a block without a language or of inline code that starts make, python -m or
    illada; comments and placeholders such as <op> or ... end one."""
    found = []
    for name in NAMES:
        text = (ROOT / name).read_text()
        lines = [line for language, block in FENCED.findall(text) if not language for line in block.splitlines()]
        lines += re.findall(r"^ {4}(\S.*)$", text, flags=re.MULTILINE)
        lines += re.findall(r"`([^`\n]+)`", FENCED.sub("", text))
        for line in lines:
            if re.match(r"(make|python -m|illada) [\w.]", line):
                found.append((name, re.split(r"  #|<|\.\.\.", line)[0].strip()))
    return [(name, shlex.split(line)) for name, line in sorted(set(found))]


def test_commands_that_pages_name_exist():
    from illada.cli import parser

    found = commands()
    assert {words[0] for _, words in found} == {"make", "python", "illada"}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for name, words in found:
        said = f"{name}: {' '.join(words)}"
        if words[0] == "make":
            assert words[1] in targets, said
        elif words[0] == "illada":
            required = {"train": ["--out"], "generate": ["--model", "--prompt"], "eval": ["--model"]}
            wanted = {**required, "record": ["--model", "--prompts", "--out"]}.get(words[1], [])
            wanted = [w for w in wanted if w != "--prompt" or "--prompts" not in words]
            if words[-1] == "--tasks":  # named without its value
                words = [*words, "x"]
            given = words[1:] + [w for option in wanted if option not in words for w in (option, "x")]
            if "--help" not in words:
                parser().parse_args(given)
        else:
            spec = importlib.util.find_spec(words[2])
            assert spec is not None, said
            origin = Path(spec.origin or "")
            sources = [*origin.parent.glob("*.py")] if origin.name == "__init__.py" else [origin]
            source = "".join(path.read_text() for path in sources)
            options = [w.partition("=")[0] for w in words[3:] if w.startswith("--")]
            assert words[2] == "pytest" or not [o for o in options if f'"{o}"' not in source], said


def test_the_first_page_of_the_site_leads_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text()
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    wanted = [str(page) for page in pages if page.parts[0] in ("guides", "concepts", "reference")]
    assert len(wanted) > 10 and [page for page in wanted if f"]({page}" not in index] == []


# ---- tables and pictures --------------------------------------------------------------------------------------------


def test_tables_of_results_are_those_of_the_committed_rows():
    from benchmarks.report import readme

    for page in readme.PAGES:
        assert readme.updated(page.read_text()) == page.read_text(), "run: python -m benchmarks.report.readme"
    shown = [line for line in readme.table(only=readme.HEADLINES).splitlines() if line.startswith("| ")]
    assert 6 <= len(shown) - 1 <= 12 and all(line in (ROOT / "README.md").read_text() for line in shown)
    pages = "".join(page.read_text() for page in readme.PAGES[1:])
    assert all(line in pages for line in readme.table().splitlines() if line.startswith("| "))


def test_headlines_are_cases_that_exist():
    from benchmarks import run
    from benchmarks.report import readme

    known = {(op, case.name, case.dtype) for op in run.FILES for case in run.collect(op, "cuda")}
    known |= {(row["op"], row["case"], row["dtype"]) for row in readme.rows_of(run.RESULTS / "cpu-xeon-2c")}
    assert readme.HEADLINES <= known


def test_pictures_of_masks_are_what_key_ranges_says():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    drawn = {path.name: path.read_text() for path in figures.FOLDER.glob("*.svg")}
    assert drawn == figures.figures(), "run: python docs/figures.py"
    page = (ROOT / "docs" / "concepts" / "key_ranges.md").read_text()
    assert set(re.findall(r"figures/(\w+\.svg)", page)) == set(drawn)


@pytest.mark.parametrize("name, modules", REFERENCE.items())
def test_the_reference_lists_every_public_name(name, modules):
    page = (ROOT / "docs" / "reference" / f"{name}.md").read_text()
    public = {f"{module}.{name}" for module in modules for name in importlib.import_module(module).__all__}
    assert set(re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE)) == public


def read_of_environment(tree: ast.AST) -> set[str]:
    """Names that a module looks up in os.environ or a copy of it, sets there, or hands on: by each form in use."""
    strings = {n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    found = {n.value for n in strings if re.fullmatch(r"ILLADA_[A-Z_]+", n.value)}
    for node in ast.walk(tree):
        parts: list[ast.AST] = []
        if isinstance(node, ast.Subscript) and "environ" in ast.unparse(node.value):
            parts = [node.slice]
        elif isinstance(node, ast.Call) and re.search(r"environ(ment)?\.\w+$|getenv$", ast.unparse(node.func)):
            parts = list(node.args[:1])
        elif isinstance(node, ast.Compare) and "environ" in ast.unparse(node.comparators[0]):
            parts = [node.left]
        found |= {part.value for part in parts if part in strings and re.fullmatch("[A-Z][A-Z_]+", part.value)}
    return found


def test_the_page_of_environment_variables_lists_what_the_code_reads():
    text = (ROOT / "docs" / "reference" / "environment.md").read_text()
    listed = set(re.findall(r"`([A-Z][A-Z_]+)`", text))
    read: set[str] = set()
    for folder in ("illada_kernels", "python", "benchmarks", "csrc", "release", "tests/gpu", "tests/cuda_on_cpu"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix == ".py":
                read |= read_of_environment(ast.parse(path.read_text(encoding="utf-8")))
            elif path.suffix in (".cpp", ".h"):
                read |= set(re.findall(r'getenv\("([A-Z_]+)"', path.read_text()))
    assert {name for name in listed if name.startswith("ILLADA_")} == {n for n in read if n.startswith("ILLADA_")}
    assert len(read) > 8 and read - {"PYTHONPATH", "PATH"} <= listed  # those are Python's and the system's own
    # of other libraries, and glibc's, which are read by how they begin
    others = {"OMP_NUM_THREADS", "CUPY_CACHE_DIR", "TRITON_CACHE_DIR"}
    others |= {"MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"}
    source = "".join(p.read_text() for folder in ("illada_kernels", "python") for p in (ROOT / folder).rglob("*.py"))
    assert [name for name in listed - others - read if f'"{name}"' not in source] == []


def test_the_page_of_gpu_kernels_lists_every_gpu_backend_and_whether_it_is_proven():
    text = (ROOT / "docs" / "reference" / "gpu_kernels.md").read_text()
    rows = [
        [cell.strip(" `") for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")
    ]
    said = {(op, backend): state == "not yet run on a GPU" for op, backend, *_, state in rows}
    known = {
        (op, row["backend"]): row["opt_in"] is not None
        for op, backends in report()["ops"].items()
        for row in backends
        if row["backend"] in ("cuda", "triton") and "opt_in" in row
    }
    assert said == known


# ---- the version ----------------------------------------------------------------------------------------------------


def test_the_version_stands_in_the_package_and_the_citation_agrees():
    assert "version =" not in (ROOT / "pyproject.toml").read_text().partition("[project.optional")[0]
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.+)$", citation, flags=re.MULTILINE)[1] == illada_kernels.__version__
    changes = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert changes[:2] == ["Unreleased", illada_kernels.__version__]


def test_changes_to_come_are_entries_of_one_line_under_headings():
    unreleased = (ROOT / "CHANGELOG.md").read_text().partition("## Unreleased\n")[2].partition("\n## ")[0]
    lines = [line for line in unreleased.splitlines() if line]
    entries = [line for line in lines if re.fullmatch(r"- .{1,240}\.", line)]
    assert [line for line in lines if line not in entries and not line.startswith("### ")] == []
    assert lines[0].startswith("### ") and len(entries) == len(set(entries))


# ---- docstrings -----------------------------------------------------------------------------------------------------


def modules_with_examples() -> list[str]:
    folders = (ROOT / "illada_kernels", ROOT / "python" / "illada")
    paths = [p for folder in folders for p in sorted(folder.rglob("*.py")) if ">>> " in p.read_text()]
    names = [p.relative_to(ROOT).with_suffix("").parts for p in paths]
    return [".".join(n for n in name if n not in ("python", "__init__")) for name in names]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_docstrings_run(name):
    runner = doctest.DocTestRunner(verbose=False)
    said: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name, globs={}):
        runner.run(test, out=said.append)
    assert runner.tries > 0 and runner.failures == 0, "".join(said)


PUBLIC = [
    (module, name)
    for modules in REFERENCE.values()
    for module in modules
    for name in importlib.import_module(module).__all__
]


def test_docstrings_begin_with_a_verb():
    """Of functions, in -s; Triton kernels may begin with their formula, published samplers with their name."""
    wrong = []
    for folder in ("illada_kernels", "python/illada", "benchmarks", "release"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                    function = isinstance(node, ast.FunctionDef)
                    jit = any("jit" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", ()))
                    excused = path.name == "samplers.py" or jit
                    verb = re.match(r"[A-Z][a-z]+s\b", text) or (function and excused)
                    noun = re.match(r"(As|By|How|Of|What|Whether|Which|This|Less|Its)\b", text)
                    wrong += [f"{path}: {text[:40]}"] if noun or (function and not verb) else []
    assert wrong == []


def documented(text: str) -> set[str]:
    """Names under Parameters or Attributes of a docstring."""
    sections = re.findall(r"^(?:Parameters|Attributes)\n-+\n(.*?)(?=^\w+\n-{3,}$|\Z)", text, flags=re.M | re.S)
    heads = [line.split(" : ")[0] for section in sections for line in section.splitlines() if re.match(r"\S", line)]
    return {name.strip("* ") for head in heads for name in head.split(",")}


@pytest.mark.parametrize("module, name", PUBLIC)
def test_public_names_have_an_example_and_say_what_each_parameter_is(module, name):
    """Options that are another function's are said to be as there; *args and **kwargs are left to Notes."""
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value) and issubclass(value, Exception):
        return
    text = inspect.getdoc(value) or ""
    assert "\nExamples\n---" in text
    if not re.search(r"\b([Aa]s in|those of) `", text):
        parameters = inspect.signature(value).parameters.values()
        named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        assert named - documented(text) == set()
