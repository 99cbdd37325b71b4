"""Compile .cu files as C++ against the stand-in headers and run their entry points on this machine's CPU.

    lib = compile_kernels("csrc/cuda/masked_loss_rows.cu")
    x = GlobalArray(tensor, "x")                          # a copy between guard zones; only such memory may be touched
    lib.run("illada_masked_loss_rows", x, y, rows, ctypes.c_float(1.0), None, seed=3)   # raises KernelFault
    x.tensor                                              # what the kernel left there

docs/concepts/cuda_on_cpu.md explains the rest.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import glob
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "cuda_on_cpu"
EMULATOR_FLAGS = ["-std=c++17", "-O2", "-march=x86-64-v3", "-fno-semantic-interposition", "-Wall", "-g1"]
OBJECT_FLAGS = ["-fPIC", "-ftls-model=initial-exec"]
KERNEL_FLAGS = [
    "-x",
    "c++",
    "-std=c++17",
    "-O1",
    "-g1",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-fno-strict-aliasing",
    # The compiler reports every access, and every misuse that it can see, to the emulator (memory.cpp), not to libtsan.
    "-fsanitize=thread,alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero",
]


class KernelFault(AssertionError):
    """What the emulator found wrong: which block and thread, what, and the line of the kernel."""


def cuda_headers() -> Path | None:
    """The folder with vector_types.h and cuda.h: the toolkit's, or the nvidia-cuda-runtime package's."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    if nvcc:
        places.insert(0, str(Path(nvcc).resolve().parents[1]))
    folders = [Path(p) / "include" for p in places if p]
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    for package in packages:
        folders += [Path(p) for p in sorted(glob.glob(f"{package}/nvidia/*/include"), reverse=True)]
    for folder in folders:
        if all((folder / name).exists() for name in ("vector_types.h", "cuda.h", "cuda_runtime_api.h")):
            return folder
    return None


def missing() -> str | None:
    """Why kernels cannot be emulated here, or None."""
    if platform.machine() not in ("x86_64", "AMD64") or os.name != "posix":
        return "the emulator's switch of stacks is written for x86-64 Linux"
    if "avx2" not in Path("/proc/cpuinfo").read_text():
        return "the emulator is compiled for AVX2"
    if shutil.which("g++") is None:
        return "no g++"
    if cuda_headers() is None:
        return "no CUDA headers: install the CUDA toolkit or `pip install nvidia-cuda-runtime`"
    return None


# ---- compiling -------------------------------------------------------------------------------------------------------
def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Of several test processes that want the same file one makes it; the others wait."""
    with target.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _cached(name: str, source: Path, depends: list[Path], flags: list[str]) -> Path:
    """The shared library of this source: from the cache if nothing it depends on has changed, else compiled."""
    digest = hashlib.sha256(repr(flags).encode() + Path(__file__).read_bytes())
    for path in sorted({source, *depends}):
        digest.update(path.name.encode() + path.read_bytes())
    target = CACHE / f"{name}-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(target), tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        if target.exists():
            return target
        compiled, result = Path(scratch) / f"{source.stem}.o", Path(scratch) / target.name
        _run(["g++", *flags, *OBJECT_FLAGS, "-c", str(source), "-o", str(compiled)])
        _run(["g++", "-shared", str(compiled), "-o", str(result), "-pthread"])  # no -fsanitize: see memory.cpp
        os.replace(result, target)
    return target


def _includes() -> list[str]:
    headers = cuda_headers()
    assert headers is not None
    return ["-I", str(HERE / "shim"), "-isystem", str(headers)]


def _shim_files() -> list[Path]:
    return [p for p in (HERE / "shim").rglob("*") if p.is_file()]


@functools.cache
def _emulator() -> ctypes.CDLL:
    depends = [*(HERE / "emulator").iterdir(), *_shim_files()]
    flags = [*EMULATOR_FLAGS, *_includes()]
    source = HERE / "emulator" / "emulator.cpp"
    library = ctypes.CDLL(str(_cached("emulator", source, depends, flags)), mode=ctypes.RTLD_GLOBAL)
    library.cuda_on_cpu_error.restype = ctypes.c_char_p
    library.cuda_on_cpu_steps.restype = ctypes.c_uint64
    return library


def _precompiled_headers(flags: list[str]) -> list[str]:
    """Returns the flags that include CUDA's headers precompiled. Parsing them takes a third of a small compile."""
    digest = hashlib.sha256(repr(flags).encode() + Path(__file__).read_bytes())
    for path in sorted(_shim_files()):
        digest.update(path.name.encode() + path.read_bytes())
    header = CACHE / f"headers-{digest.hexdigest()[:16]}.h"
    result = header.with_suffix(".h.gch")
    if not result.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with _locked(header), tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            if not result.exists():
                header.write_text("#include <cuda_runtime.h>\n")
                command = ["g++", *flags, *OBJECT_FLAGS, "-x", "c++-header", "-c", str(header)]
                _run([*command, "-o", f"{scratch}/{result.name}"])
                os.replace(f"{scratch}/{result.name}", result)
    return ["-include", str(header), "-Winvalid-pch"]


def included_files(text: str, folders: list[Path]) -> set[Path]:
    """The files of `folders` that `text` includes, and those that they include."""
    found: set[Path] = set()
    queue = [text]
    while queue:
        for name in re.findall(r'^\s*#\s*include\s*["<](.+?)[">]', queue.pop(), re.M):
            path = next((f / name for f in folders if (f / name).is_file()), None)
            if path is not None and path.resolve() not in found:
                found.add(path.resolve())
                queue.append(path.read_text())
    return found


@functools.cache  # because to find out that nothing has changed takes 3 ms
def compile_kernels(source: str | Path, defines: tuple[str, ...] = (), text: str | None = None) -> Kernels:
    """`source`: a .cu file, relative to the repository or absolute. `text`: compile this in its place (a copy with a
    fault planted, say), with the same includes."""
    from tests.cuda_on_cpu.raw import with_raw_entries  # imports torch

    path = ROOT / source
    text = with_raw_entries(path) if text is None else text  # compiled once for both ways to launch
    _emulator()  # loaded first: the kernels' library finds its symbols there
    folders = [path.parent, ROOT / "csrc/cuda", ROOT / "csrc/include"]
    depends = [*_shim_files(), *included_files(text if text is not None else path.read_text(), folders)]
    flags = [*KERNEL_FLAGS, *_includes()]
    flags += [*_precompiled_headers(flags), *(f"-I{folder}" for folder in folders[1:]), *(f"-D{d}" for d in defines)]
    if text is None:
        return Kernels(_cached(path.stem, path, depends, flags), path.name)
    CACHE.mkdir(parents=True, exist_ok=True)
    copy = CACHE / f"{path.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cu"
    copy.write_text(f'#line 1 "{path}"\n{text}')
    return Kernels(_cached(path.stem, copy, depends, [*flags, "-I", str(path.parent)]), path.name)


def with_headers(source: str | Path, headers: Iterable[str]) -> str:
    """The text of `source` with these headers of csrc/cuda in place of their #include, so that faults reach them."""
    text = (ROOT / source).read_text()
    for name in headers:
        inside = (ROOT / "csrc/cuda" / name).read_text().replace("#pragma once\n", "")
        include = f'#include "{name}"\n'
        text = text.replace(include, inside, 1).replace(include, "")  # once, as the #pragma had it
    return text


def plant(source: str | Path, old: str, new: str) -> str:
    """The text of `source` with the one occurrence of `old` replaced: a copy with a fault."""
    text = (ROOT / source).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{source} holds {text.count(old)} times: {old}")
    return text.replace(old, new)


SWITCH = """
static int planted_fault = 0;
extern "C" void plant_fault(int number) { planted_fault = number; }
__attribute__((noinline, no_sanitize_thread)) static bool planted(int number) { return planted_fault == number; }
"""


def skipped(*statements: str) -> tuple[str, str]:
    """A fault of `switchable`: leaves out the statements, each a whole line, that follow one another."""
    lines = (re.sub(r"^ *", r"\g<0>if (!FAULT) ", statement) for statement in statements)
    return "\n".join((*statements, "")), "\n".join((*lines, ""))


def switchable(text: str, faults: Iterable[Sequence[str]]) -> str:
    """Returns `text` with all faults, to be compiled once. A fault is old, new, and so on, where new does what old does
    unless the word FAULT in it is true. `Kernels.plant` chooses the fault of which it is true, by its place from 1 on.
    """
    for number, edits in enumerate(faults, 1):
        for old, new in zip(edits[::2], edits[1::2]):
            if text.count(old) != 1 or "FAULT" not in new:
                raise ValueError(f"{text.count(old)} times in the text: {old}; to be replaced by {new}")
            text = text.replace(old, new.replace("FAULT", f"planted({number})"))
    return f"{SWITCH}#line 1\n{text}"


# ---- running ---------------------------------------------------------------------------------------------------------
class GlobalArray:
    """A copy of `tensor` in memory that kernels may touch, with guard zones around it that they may not. It starts at a
    multiple of 128 bytes, and `offset` behind."""

    GUARD = 4096

    def __init__(self, tensor: torch.Tensor, name: str, offset: int = 0) -> None:
        import torch

        self.size = tensor.numel() * tensor.element_size()
        whole = torch.full((self.size + 2 * self.GUARD + 256,), 0xA5, dtype=torch.uint8)
        start = (
            self.GUARD + -(whole.data_ptr() + self.GUARD) % 128 + offset
        )  # cudaMalloc aligns to 256, and views to less
        self._whole = whole
        self.tensor = whole[start : start + self.size].view(tensor.dtype).view(tensor.shape)
        self.tensor.copy_(tensor)
        self.pointer = whole.data_ptr() + start
        _emulator().cuda_on_cpu_allow(ctypes.c_void_p(self.pointer), ctypes.c_size_t(self.size), name.encode())

    def __del__(self) -> None:
        _emulator().cuda_on_cpu_forbid(ctypes.c_void_p(self.pointer))


class Kernels:
    """The extern "C" functions of a compiled file."""

    def __init__(self, library: Path, name: str) -> None:
        self._library = ctypes.CDLL(str(library))
        self._name = name

    def plant(self, number: int) -> None:
        """Chooses among the faults of a `switchable` text; 0 for none."""
        self._library.plant_fault(number)

    def holds(self, function: str) -> bool:
        return hasattr(self._library, function)

    def run(
        self, function: str, *arguments: Any, seed: int = 0, host_threads: int = 1, most_steps: int = 1 << 28
    ) -> int:
        """Call it with GlobalArrays, None for a null pointer or stream, ints, or ctypes values (a Python float has no
        one C type). Raises KernelFault if the emulator found something wrong, else returns what it returned."""
        emulator = _emulator()
        emulator.cuda_on_cpu_configure(ctypes.c_uint64(seed), host_threads, ctypes.c_uint64(most_steps))
        self.steps = 0
        code = getattr(self._library, function)(*[_to_c(a) for a in arguments])
        self.steps = emulator.cuda_on_cpu_steps()
        error = emulator.cuda_on_cpu_error().decode()
        if error:
            raise KernelFault(f"{self._name}, seed {seed}: {_name_lines(error)}")
        return code


def _to_c(argument: Any) -> Any:
    if isinstance(argument, GlobalArray):
        return ctypes.c_void_p(argument.pointer)
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, int):
        return ctypes.c_int64(argument)  # the calling convention lets a narrower parameter take its low bits
    if isinstance(argument, float):
        raise TypeError("pass ctypes.c_float or ctypes.c_double: a Python float could mean either")
    return argument


def _name_lines(report: str) -> str:
    """Replaces "{pc library offset}" by the lines of the kernel that the code at this offset came from."""

    def lines(match: re.Match[str]) -> str:
        library, offset = match[1], int(match[2], 16) - 1  # the call, not the instruction after it
        command = ["addr2line", "-i", "-e", library, hex(offset)]
        out = subprocess.run(command, capture_output=True, text=True).stdout.split()
        named = [line for line in out if str(HERE / "shim") not in line and re.match(r".*:\d+$", line)]
        named = [os.path.relpath(line, ROOT) for line in named]
        return " in ".join(named[:3]) or f"{library}+{match[2]}"

    return re.sub(r"\{pc (\S+) (\w+)\}", lines, report)
