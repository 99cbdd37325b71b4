"""_build.py: what it finds, what it refuses, and what it writes down, on small sources and a compiler made of shell."""

from __future__ import annotations

import json
import os
import stat
import sysconfig
from pathlib import Path

import pytest

from illada_kernels import _build

CLEAN = """\
ptxas info    : Compiling entry function 'rows' for 'sm_80'
ptxas info    : Function properties for rows
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 384 bytes cmem[0]
ptxas info    : (C7519) Potential Performance Loss: wgmma.mma_async instructions are not pipelined optimally
"""
SPILL = """\
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    16 bytes stack frame, 0 bytes spill stores, 24 bytes spill loads
"""
SERIAL = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the function 'attend'\n"
)


def test_a_clean_ptxas_log_with_the_informative_c7519_passes():
    assert _build.check_ptxas(CLEAN) == []


def test_a_spill_is_charged_to_the_kernel_and_architecture_it_stands_under():
    (problem,) = _build.check_ptxas(CLEAN + SPILL + CLEAN)
    assert problem.startswith("attend (sm_90a): ") and "24 bytes spill loads" in problem


@pytest.mark.parametrize("code", ["C7510", "C7511", "C7512", "C7515"])
def test_serialised_wgmma_is_a_problem(code):
    assert _build.check_ptxas(CLEAN + SERIAL.replace("C7510", code)) == [SERIAL.replace("C7510", code).strip()]


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("80;90a", ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"]),
        ("89 8.6+PTX", ["arch=compute_89,code=sm_89", "arch=compute_86,code=sm_86", "arch=compute_86,code=compute_86"]),
        ("100f", ["arch=compute_100f,code=sm_100f", "arch=compute_100,code=compute_100"]),
    ],
)
def test_each_architecture_gets_machine_code_and_the_lowest_gets_ptx(archs, expected):
    assert _build.gencode_flags(archs) == [f"-gencode {flag}" for flag in expected]


@pytest.mark.parametrize("archs", ["", ";", "hopper", "80;sm_90"])
def test_architectures_that_are_none_are_refused_by_name(archs):
    with pytest.raises(_build.BuildError, match="ILLADA_CUDA_ARCHS"):
        _build.gencode_flags(archs)


# ---- what is missing ------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No program on PATH, no variable that points at one."""
    for name in ("CXX", "NVCC", "CUDA_HOME", "ILLADA_CUDA", "ILLADA_REQUIRE_EXT", "ILLADA_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def test_no_compiler_is_named_with_a_remedy(bare):
    with pytest.raises(_build.BuildError, match=r"no C\+\+ compiler found .*apt install"):
        _build.find_compiler()


def test_cxx_may_hold_arguments_and_comes_first(bare, monkeypatch):
    for name in ("ccache", "g++"):
        script(bare / name, "exit 0")
    monkeypatch.setenv("CXX", "ccache clang++ -stdlib=libc++")
    assert _build.find_compiler() == "ccache clang++ -stdlib=libc++"
    monkeypatch.setenv("CXX", "absent")
    assert _build.find_compiler() == "g++"


def test_missing_ninja_pybind11_and_python_headers_are_named_with_a_remedy(bare, monkeypatch, tmp_path):
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(_build.BuildError, match="pip install ninja"):
        _build.find_ninja()
    with pytest.raises(_build.BuildError, match="pip install pybind11"):
        _build.find_includes()
    monkeypatch.setattr(_build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(_build.BuildError, match=r"Python\.h not found .*python3-dev"):
        _build.find_includes()


def test_nvcc_is_left_out_for_the_reason_given(bare, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA", "0")
    assert _build.find_nvcc() == (None, "ILLADA_CUDA=0")
    monkeypatch.delenv("ILLADA_CUDA")
    monkeypatch.setenv("NVCC", str(script(bare / "my-nvcc", "exit 0")))
    assert _build.find_nvcc() == (str(bare / "my-nvcc"), "found")


# ---- whole builds ---------------------------------------------------------------------------------------------------


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A source tree of two functions, in a folder whose name a shell and ninja would both stumble over."""
    for name in ("CXX", "NVCC", "ILLADA_CUDA", "ILLADA_REQUIRE_EXT", "ILLADA_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "a $b: c"
    for folder in ("cpu", "cuda", "include"):
        (root / "csrc" / folder).mkdir(parents=True)
    exported = 'extern "C" __attribute__((visibility("default")))'
    (root / "csrc" / "bindings.cpp").write_text(f"{exported} int answer() {{ return 42; }}\n")
    (root / "csrc" / "cpu" / "op.cpp").write_text(
        "#define JOIN(a, b) a##b\n#define NAME(a, b) JOIN(a, b)\nvoid NAME(op_, ILLADA_ISA)() {}\n"
    )
    (root / "csrc" / "cuda" / "rows.cu").write_text("void rows() {}\n")
    return root


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """An nvcc that compiles C++, and reports what the file `log` beside it says."""
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "log").write_text(CLEAN)
    os.system(f"ar rcs {folder}/libcudart_static.a")
    body = f"""
case "$1" in
  --dryrun) echo '#$ LIBRARIES=  "-L{folder}"' >&2; exit 0;;
  --version) echo 'Cuda compilation tools, release 99.9'; exit 0;;
esac
cat {folder}/log
while [ $# -gt 0 ]; do case "$1" in -c) in="$2";; -o) out="$2";; -MF) deps="$2";; esac; shift; done
: > "$deps"
exec g++ -fPIC -x c++ -c "$in" -o "$out"
"""
    monkeypatch.setenv("NVCC", str(script(folder / "nvcc", body)))
    return folder


def run(project: Path) -> tuple[dict[str, object], Path]:
    package = project / "package"
    info = _build.build(project, package, project / "work")
    assert json.loads((package / "_build_info.json").read_text()) == info
    return info, package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def test_a_build_in_a_folder_with_spaces_and_dollars_and_a_second_one_that_does_nothing(project, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA", "0")
    info, binary = run(project)
    assert info["extension"] is True and info["cuda"] is False and info["cuda_reason"] == "ILLADA_CUDA=0"
    import ctypes

    assert ctypes.CDLL(str(binary)).answer() == 42
    before = binary.stat().st_mtime_ns
    again, _ = run(project)
    assert binary.stat().st_mtime_ns == before and again["sources"] == info["sources"]
    (project / "csrc" / "include" / "new.h").write_text("int x;\n")
    assert run(project)[0]["sources"] != info["sources"]


def test_cuda_sources_are_compiled_by_nvcc_and_recorded(project, nvcc, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA_ARCHS", "90a")
    info, _ = run(project)
    assert (info["cuda"], info["cuda_archs"]) == (True, "90a") and "99.9" in str(info["cuda_reason"])
    assert "-gencode arch=compute_90a,code=sm_90a" in (project / "work" / "build.ninja").read_text()


def test_a_register_spill_leaves_cuda_out_and_says_why_or_fails_where_cuda_is_demanded(project, nvcc, monkeypatch):
    (nvcc / "log").write_text(SPILL)
    info, binary = run(project)
    assert info["extension"] is True and info["cuda"] is False and binary.exists()
    assert "attend (sm_90a)" in str(info["cuda_reason"]) and "spill" in str(info["cuda_reason"])
    monkeypatch.setenv("ILLADA_CUDA", "1")
    info, binary = run(project)
    assert info["extension"] is False and not binary.exists() and "spill" in str(info["reason"])


def test_a_compile_error_is_reported_and_an_older_binary_does_not_survive_it(project, monkeypatch, capsys):
    monkeypatch.setenv("ILLADA_CUDA", "0")
    _, binary = run(project)
    (project / "csrc" / "cpu" / "op.cpp").write_text("void op( {}\n")
    info, _ = run(project)
    assert info["extension"] is False and "op.cpp" in str(info["reason"]) and not binary.exists()
    assert "without its compiled extension" in capsys.readouterr().err
    monkeypatch.setenv("ILLADA_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match=r"op\.cpp"):
        _build.build(project, project / "package", project / "work")


def test_an_extension_that_cannot_be_loaded_is_no_extension(project, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA", "0")
    (project / "csrc" / "bindings.cpp").write_text("void absent();\nvoid caller() { absent(); }\n")
    info, binary = run(project)
    assert info["extension"] is False and "absent" in str(info["reason"]) and not binary.exists()


def test_without_a_compiler_the_build_succeeds_and_says_what_to_install(project, bare):
    info, binary = run(project)
    assert info["extension"] is False and "apt install g++" in str(info["reason"]) and not binary.exists()


def test_other_processors_than_x86_get_the_scalar_code_only(project, monkeypatch):
    monkeypatch.setattr(_build.platform, "machine", lambda: "aarch64")
    (project / "work").mkdir()
    _build.write_ninja(project, project / "work", project / "work" / "x.so", None)
    text = (project / "work" / "build.ninja").read_text()
    assert "op.scalar.o" in text and "avx" not in text


def test_a_demanded_extension_makes_a_missing_compiler_an_error(project, bare, monkeypatch):
    monkeypatch.setenv("ILLADA_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler"):
        _build.build(project, project / "package", project / "work")
