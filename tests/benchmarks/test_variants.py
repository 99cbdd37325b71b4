"""Variants of kernels that are only measured: built with one more macro, called in place of the extension's kernels."""

from __future__ import annotations

import contextlib
import ctypes

import pytest
import torch

from benchmarks.on_gpu import variants
from illada_kernels import _gpu


@pytest.mark.parametrize("name", variants.VARIANTS)
def test_a_variant_is_a_macro_of_its_source_and_its_cases_exist(name, tmp_path):
    from benchmarks import run

    variant = variants.VARIANTS[name]
    folder = variants.ROOT / "csrc" / "cuda"
    assert any(f"#ifdef ILLADA_{variant.macro}\n" in path.read_text() for path in folder.glob("*.cuh"))
    assert set(variant.cases) <= {case.name for case in run.collect("attention_fwd", "cuda")}
    command = variants.command(name, "nvcc", tmp_path / "x.so")
    assert f"-DILLADA_{variant.macro}" in command and (folder / variant.source).exists()
    assert "hidden" not in " ".join(command)


def test_parameters_are_those_of_the_header():
    found = variants.parameters("ATTENTION_FWD_ARGUMENTS")
    pointer, wide = ctypes.c_void_p, ctypes.c_int64
    tail = [pointer, ctypes.c_float, ctypes.c_int, ctypes.c_int, pointer, pointer, ctypes.c_int, pointer]
    assert found == [*[pointer] * 6, *[wide] * 6, *tail]


def test_only_what_has_been_built_is_measured_and_only_in_its_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(variants, "library", lambda name: tmp_path / f"{name}.so")
    assert variants.measured("full_8k_kv8") == []
    (tmp_path / "rotation.so").touch()
    assert variants.measured("full_8k_kv8") == ["cuda rotation"] and variants.measured("full_2k_kv8") == []
    assert variants.variant_of("cuda rotation") == "rotation"
    assert variants.variant_of("cuda whole pieces") == "whole pieces"
    assert variants.variant_of("cuda") is variants.variant_of("cuda deterministic=False") is None


def test_a_variant_is_measured_where_the_extensions_kernel_failed():
    """Head_dim 96 has a second way, which is worth a row exactly when the first is wrong."""
    from benchmarks import run
    from benchmarks.on_gpu import smoke

    (case,) = (case for case in run.collect("attention_fwd", "cuda") if case.name == "full_8k_d96")
    failed = {"smoke|attention forward 96: full": "relative error 0.5"}
    assert "relative error" in str(smoke.left_out(case, "cuda", failed))
    assert smoke.left_out(case, "cuda whole pieces", failed) is None


def test_every_variant_is_built_even_if_one_does_not_compile(tmp_path, monkeypatch):
    """Compilers run at once, and a variant that fails leaves no library and a failed exit status."""
    monkeypatch.setattr(variants, "FOLDER", tmp_path)
    monkeypatch.setattr(variants._build, "find_nvcc", lambda roots: ("nvcc", None))
    broken, right = "rotation", "whole pieces"

    def command(name, nvcc, target):
        return ["false"] if name == broken else ["touch", str(target)]

    monkeypatch.setattr(variants, "command", command)
    assert variants.main() == 1 and variants.library(right).exists() and not variants.library(broken).exists()
    broken = ""
    assert variants.main() == 0 and all(variants.library(name).exists() for name in variants.VARIANTS)


def test_calls_of_a_variant_go_to_its_library_and_others_to_the_extension(monkeypatch):
    went: list[str] = []

    class Library:
        with_cuda = True

        def __init__(self, name: str) -> None:
            self.name = name

        def attention_fwd_bf16_sm90a(self, *arguments: int) -> int:
            went.append(self.name)
            assert arguments == (5, 0, 77)  # a number, null, the stream
            return 0

    monkeypatch.setattr(variants, "loaded", Library)
    monkeypatch.setattr(_gpu, "extension", lambda: (Library("extension"), None))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)

    def run() -> None:
        _gpu.launch("attention_fwd_bf16_sm90a", torch.device("cuda"), 5, None)

    for contender in ("cuda", "cuda rotation", "cuda"):
        variants.call(contender, run)()
    assert went == ["extension", "rotation", "extension"]
    with pytest.raises(ZeroDivisionError):
        variants.call("cuda rotation", lambda: 1 / 0)()
    variants.call("cuda", run)()
    assert went[-1] == "extension"
