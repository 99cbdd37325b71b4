"""What is shipped: source distribution, wheel, installs without a compiler, and what the repo names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import illada_kernels
from illada_kernels import _nvrtc
from tests.helpers.checkout import alone, build, copy_checkout


def test_importing_the_package_imports_neither_torch_nor_the_extension(python):
    code = "import sys, illada_kernels.ops; print(sorted({'torch', 'numpy', 'illada_kernels._C'} & set(sys.modules)))"
    assert python("-c", code).stdout.strip() == "[]"


def test_every_public_name_is_there_and_no_other():
    for name in illada_kernels.__all__:
        assert getattr(illada_kernels, name).__name__ == name
    assert set(illada_kernels.__all__) <= set(dir(illada_kernels))
    with pytest.raises(AttributeError, match="no attribute 'attentoin'"):
        _ = illada_kernels.attentoin


# ---- distributions --------------------------------------------------------------------------------------------------


def test_source_distribution_holds_everything_that_a_build_and_the_tests_need(distributions, root):
    with tarfile.open(distributions["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = [p for folder in ("csrc", "illada_kernels", "python/illada") for p in (root / folder).rglob("*")]
    wanted = {str(p.relative_to(root)) for p in sources if p.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".typed")}
    assert wanted <= names
    assert {"LICENSE", "README.md", "Makefile", "tests/conftest.py", "benchmarks/measure.py", ".ci/run"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]


def test_wheel_holds_both_packages_the_extension_and_nothing_else(distributions, root):
    with zipfile.ZipFile(distributions["wheel"]) as archive:
        names = set(archive.namelist())
    packages = {"illada_kernels": root / "illada_kernels", "illada": root / "python" / "illada"}
    wanted = {f"{name}/{p.relative_to(folder)}" for name, folder in packages.items() for p in folder.rglob("*.py")}
    assert wanted <= names
    extra = {name for name in names - wanted if ".dist-info/" not in name}
    compiled = {name for name in extra if name.startswith("illada_kernels/_C.")}
    assert len(compiled) == 1
    folders = [root / "csrc" / name for name in ("cuda", "include/illada", "nvrtc")]  # for NVRTC
    sources = {p for folder in folders for p in folder.iterdir() if not p.name.endswith("_sm90a.cu")}
    shipped = {f"illada_kernels/_csrc/{p.relative_to(root / 'csrc')}" for p in sources}
    others = {"illada_kernels/py.typed", "illada/py.typed", "illada/replay.html"}
    others |= {f"illada_kernels/{name}.json" for name in ("_build_info", "_committed")}
    assert extra - compiled == shipped | others


def unpack(wheel: Path, target: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return alone(target)


def test_the_installed_wheel_computes_with_its_own_extension(distributions, python, tmp_path):
    site = unpack(distributions["wheel"], tmp_path / "site")
    code = """
import torch, illada_kernels
from illada_kernels import attention, masked_loss
assert illada_kernels.__file__.startswith({site!r}), illada_kernels.__file__
q = torch.randn(1, 9, 2, 16)
torch.testing.assert_close(attention(q, q, q, backend="cpu"), attention(q, q, q, backend="reference"))
arguments = torch.randn(7, 16), torch.randn(50, 16), torch.arange(7), torch.arange(7) < 4
torch.testing.assert_close(masked_loss(*arguments, backend="cpu"), masked_loss(*arguments, backend="reference"))
from illada_kernels import _nvrtc
print("same", _nvrtc.fingerprint())
"""
    done = python("-c", code.format(site=str(site)), path=(site,), cwd=tmp_path)
    assert done.stdout.split() == ["same", _nvrtc.fingerprint()], done.stderr


@pytest.fixture
def no_compiler(tmp_path, monkeypatch) -> dict[str, str]:
    monkeypatch.delenv("ILLADA_CUDA", raising=False)
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin"), "CXX": "", "NVCC": "", "ILLADA_REQUIRE_EXT": "0"}


def test_without_a_compiler_it_installs_and_the_doctor_says_what_is_missing(python, tmp_path, no_compiler):
    copy_checkout(tmp_path / "checkout")
    done = build("build_wheel", tmp_path / "checkout", tmp_path / "dist", **no_compiler)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no C++ compiler found" in done.stderr
    site = unpack(next((tmp_path / "dist").glob("*.whl")), tmp_path / "site")
    told = python("-m", "illada_kernels", "doctor", path=(site,), cwd=tmp_path, **no_compiler)
    assert told.returncode == 0 and "no C++ compiler found" in told.stdout
    lines = {tuple(line.split()[:2]): line for line in told.stdout.splitlines() if len(line.split()) > 2}
    assert lines["attention", "reference"].endswith(" available") and "not available" in lines["attention", "cpu"]
    demanded = build("build_wheel", tmp_path / "checkout", tmp_path / "no", **no_compiler | {"ILLADA_REQUIRE_EXT": "1"})
    assert demanded.returncode != 0 and "no C++ compiler found" in demanded.stderr


def test_an_editable_install_builds_in_place_and_needs_no_compiler_either(tmp_path, no_compiler):
    copy_checkout(tmp_path / "checkout")
    done = build("build_editable", tmp_path / "checkout", tmp_path / "dist", **no_compiler)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "no C++ compiler" in (tmp_path / "checkout" / "illada_kernels" / "_build_info.json").read_text()


# ---- the repo -------------------------------------------------------------------------------------------------------


def tracked(root: Path) -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [root / name for name in done.stdout.split("\0") if name and (root / name).is_file()]


def test_no_tracked_file_names_a_machine_path_or_a_registry_host(root):
    # written so that this file does not match itself
    paths, hosts = r"/(?:[w]ork|[r]oot|[h]ome/\w+|[U]sers)/", r"p[y]pi\.org|p[y]thonhosted|d[o]wnload\.pytorch"
    bad = re.compile(f"{paths}|{hosts}")
    found = []
    for path in tracked(root):
        text = path.read_bytes().decode("utf-8", errors="replace")
        found += [f"{path.relative_to(root)}: {match[0]}" for match in bad.finditer(text)]
    assert not found


def test_setup_leaves_cuda_out_where_there_is_no_gpu_and_pins_torch(root, tmp_path):
    def dry(nvidia_smi: str) -> str:
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\n{nvidia_smi}\n")
        smi.chmod(0o755)
        inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "TORCH", "PYTHON")}
        environment = inherited | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        command = ["make", "--dry-run", "--always-make", "demo", f"PYTHON={sys.executable}"]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    without, with_gpu = dry("exit 9"), dry("exit 0")
    assert "ILLADA_CUDA=${ILLADA_CUDA-0}" in without and "ILLADA_CUDA=${ILLADA_CUDA-}" in with_gpu
    assert 'pip install --quiet --no-compile "torch==2.13.0"' in without
    assert without.index("illada_kernels doctor") < without.index("illada demo")
