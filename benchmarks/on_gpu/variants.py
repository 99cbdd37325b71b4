"""Variants of kernels that are only measured, beside the extension's own: each a library built with one more macro.

    python -m benchmarks.on_gpu.variants        build them, for Hopper, under build/variants

`running` lets calls of backend="cuda" take what a variant's library has in place of the extension.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from illada_kernels import _build, _gpu

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "variants"


@dataclass(frozen=True)
class Variant:
    """Macros are named without the ILLADA_ that they begin with."""

    macro: str
    source: str  # of csrc/cuda
    arguments: str  # the macro of api.h that holds the entry point's parameters
    cases: tuple[str, ...]  # attention forward cases in which it is measured


VARIANTS = {
    "rotation": Variant(
        "ATTENTION_FWD_ROTATION",
        "attention_fwd_bf16_sm90a.cu",
        "ATTENTION_FWD_ARGUMENTS",
        ("full_8k_kv8", "block_diffusion_4k_b32_kv8"),
    ),
    # what head_dim 96 falls back to, should MMAs of 96 columns be wrong
    "whole pieces": Variant("WHOLE_PIECES", "attention_fwd_bf16_sm90a.cu", "ATTENTION_FWD_ARGUMENTS", ("full_8k_d96",)),
}


def library(name: str) -> Path:
    return FOLDER / f"{name.replace(' ', '_')}-{_build.fingerprint(ROOT / 'csrc')}.so"


def measured(case: str) -> list[str]:
    """Returns the contenders that variants add to a case of attention's forward: those that have been built."""
    return [f"cuda {name}" for name, v in VARIANTS.items() if case in v.cases and library(name).exists()]


def command(name: str, nvcc: str, target: Path) -> list[str]:
    variant, csrc = VARIANTS[name], ROOT / "csrc"
    places = ["-I", str(csrc / "include"), "-I", str(csrc / "cuda")]
    arch = ["-gencode", "arch=compute_90a,code=sm_90a", f"-DILLADA_{variant.macro}"]
    flags = [*_build.NVCC_FLAGS.replace(",-fvisibility=hidden", "").split(), *arch, *places]
    return [nvcc, *flags, "-shared", "-o", str(target), str(csrc / "cuda" / variant.source)]


def parameters(name: str) -> list[type]:
    """Returns the ctypes of a variant's entry point, as api.h declares them."""
    text = (ROOT / "csrc" / "include" / "illada" / "api.h").read_text().replace("\\\n", " ")
    (declared,) = re.findall(rf"#define ILLADA_{name}\s+(.+)", text)
    kinds = {"int64_t": ctypes.c_int64, "float": ctypes.c_float, "int": ctypes.c_int}

    def kind(parameter: str) -> type:
        return ctypes.c_void_p if "*" in parameter else kinds[parameter.split()[0]]

    return [kind(parameter) for parameter in declared.split(",")]


class Library:
    """A variant as the extension's module: its entry points take pointers as integers."""

    with_cuda = True

    def __init__(self, name: str) -> None:
        self.library, self.parameters = ctypes.CDLL(str(library(name))), parameters(VARIANTS[name].arguments)

    def __getattr__(self, function: str) -> Callable[..., int]:
        found = getattr(self.library, f"illada_{function}")
        found.argtypes, found.restype = self.parameters, ctypes.c_int
        return found  # type: ignore[no-any-return]


@functools.cache
def loaded(name: str) -> Library:
    return Library(name)


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """Makes launches within it go to the variant's library."""
    module, right = loaded(name), _gpu.extension
    _gpu.extension = lambda: (module, None)  # type: ignore[assignment]
    try:
        yield
    finally:
        _gpu.extension = right


def variant_of(contender: str) -> str | None:
    return next((name for name in VARIANTS if contender == f"cuda {name}"), None)


def call(contender: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` as a contender runs it: within its variant, if it names one."""
    name = variant_of(contender)
    if name is None:
        return function

    def run(*arguments: Any) -> Any:
        with running(name):
            return function(*arguments)

    return run


def main() -> int:
    nvcc, reason = _build.find_nvcc([])
    if nvcc is None:
        print(reason, file=sys.stderr)
        return 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    missing = [name for name in VARIANTS if not library(name).exists()]
    fresh = {name: library(name).with_suffix(".new") for name in missing}
    compilers = {name: subprocess.Popen(command(name, nvcc, fresh[name])) for name in missing}
    failed = [name for name, compiler in compilers.items() if compiler.wait()]
    for name in missing:
        if name not in failed:
            fresh[name].replace(library(name))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
