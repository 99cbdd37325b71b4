"""The row kernels without nvcc: compiled by NVRTC (no GPU needed), and launched as the extension would launch them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from illada_kernels import _gpu, _nvrtc
from illada_kernels.ops.masked_loss import nvrtc as masked_loss
from tests.cuda_on_cpu.library import ROOT, GlobalArray, Kernels, compile_kernels, missing
from tests.gpu_code.cuda_code import find_tool

ROOMS = (masked_loss,)
SOURCES = [(source, kernels) for room in ROOMS for source, kernels in room.KERNELS.items()]
CUPY_ADDS = ("-ftz=true", "--device-as-default-execution-space")


# ---- NVRTC itself ----------------------------------------------------------------------------------------------------


@functools.cache
def nvrtc() -> tuple[ctypes.CDLL, int] | None:
    """(the library, its major version): of the nvidia-cuda-nvrtc package."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("cu*/lib*/libnvrtc.so.*")):
            for builtins in path.parent.glob("libnvrtc-builtins.so*"):  # found by its name once it is loaded
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            library, major, minor = ctypes.CDLL(str(path)), ctypes.c_int(), ctypes.c_int()
            library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
            return library, major.value
    return None


def compile_program(source: str, names: list[str], arch: str) -> tuple[str, list[str], bytes]:
    """(log, lowered names, cubin) of what _nvrtc.py gives to CuPy."""
    found = nvrtc()
    if found is None:
        pytest.skip("no NVRTC: `pip install nvidia-cuda-nvrtc`")
    library, major = found
    include = _nvrtc.headers(major)
    if include is None:
        pytest.skip("no CUDA headers: `pip install nvidia-cuda-runtime`")
    options = [*_nvrtc.options(include), f"-arch={arch}", *CUPY_ADDS]
    program = ctypes.c_void_p()
    create = library.nvrtcCreateProgram
    assert create(ctypes.byref(program), _nvrtc.program(source).encode(), b"rows.cu", 0, None, None) == 0
    for name in names:
        assert library.nvrtcAddNameExpression(program, name.encode()) == 0
    code = library.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options))
    )
    log = read(library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog, program).rstrip(b"\0").decode().strip()
    assert code == 0, log
    lowered = []
    for name in names:
        text = ctypes.c_char_p()
        assert library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(text)) == 0
        lowered.append((text.value or b"").decode())
    cubin = read(library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN, program)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return log, lowered, cubin


def read(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    assert size_of(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert get(program, buffer) == 0
    return buffer.raw


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("source, kernels", SOURCES)
def test_every_kernel_compiles_without_nvcc_and_spills_nothing(
    source: str, kernels: list[str], arch: str, tmp_path: Path
) -> None:
    log, lowered, cubin = compile_program(source, kernels, arch)
    assert log == ""
    tool = find_tool("cuobjdump")
    if tool is None:
        pytest.skip("no cuobjdump: it comes with the CUDA toolkit and with triton")
    (tmp_path / "cubin").write_bytes(cubin)
    usage = subprocess.run([tool, "-res-usage", str(tmp_path / "cubin")], capture_output=True, text=True).stdout
    found = dict(re.findall(r"Function (\S+):\s+(REG:\d+ STACK:\d+ SHARED:\d+ LOCAL:\d+)", usage))
    assert len(set(lowered)) == len(kernels) and set(found) == set(lowered)
    assert all(re.fullmatch(r"REG:\d+ STACK:0 SHARED:\d+ LOCAL:0", text) for text in found.values()), found


def test_a_kernel_that_is_not_there_fails_with_the_compilers_words() -> None:
    with pytest.raises(AssertionError, match="rows_sideways"):
        compile_program("masked_loss_rows.cu", ["rows_sideways<float>"], "sm_80")


def test_cupys_cache_sees_a_change_of_an_included_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def program() -> str:
        _nvrtc.fingerprint.cache_clear()
        return _nvrtc.program("masked_loss_rows.cu")

    before = program()
    for folder in _nvrtc.FOLDERS:
        subprocess.run(["cp", "-r", str(_nvrtc.sources() / folder), str(tmp_path)], check=True)
    monkeypatch.setattr(_nvrtc, "sources", lambda: tmp_path)
    assert program() == before
    (tmp_path / "cuda" / "device.cuh").write_text("")
    assert program() != before
    monkeypatch.undo()
    assert program() == before


# ---- launching, with CuPy played by the emulator ---------------------------------------------------------------------

RAW = """
#include <type_traits>
#include <utility>
namespace {
template <class... P, size_t... I>
int raw(void (*kernel)(P...), void** values, const int64_t* sizes, int64_t count, dim3 grid, dim3 block, size_t smem,
        std::index_sequence<I...>) {
  if (count != int64_t(sizeof...(P)) || ((sizes[I] != int64_t(sizeof(P))) || ...)) return -1;
  return illada::launch({grid, block, smem, nullptr}, kernel, *static_cast<std::decay_t<P>*>(values[I])...);
}
template <class... P> std::index_sequence_for<P...> indices(void (*)(P...)) { return {}; }
}  // namespace
#define RAW(number, ...)                                                                                        \\
  extern "C" int raw_##number(void** values, const int64_t* sizes, int64_t count, const int64_t* shape) {       \\
    return raw(__VA_ARGS__, values, sizes, count, dim3(shape[0], shape[1], shape[2]), dim3(shape[3]), shape[4], \\
               indices(__VA_ARGS__));                                                                           \\
  }
"""


@functools.cache
def raw_kernels(source: str) -> Kernels:
    """The kernels of a file, each behind a function that takes arguments as cuLaunchKernel does, with their sizes."""
    names = dict(SOURCES)[source]
    entries = "\n".join(f"RAW({number}, {name})" for number, name in enumerate(names))
    text = (ROOT / "csrc/cuda" / source).read_text()
    return compile_kernels(f"csrc/cuda/{source}", text=f"{text}{RAW}{entries}\n")


class RawModule:
    """As cupy.RawModule: arguments by their NumPy types, Python's integers as 64 bits; compiled for the CPU."""

    def __init__(self, *, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]) -> None:
        assert f"-I{_nvrtc.sources() / 'cuda'}" in options and "-std=c++17" in options
        self.source = re.findall(r'#include "(.+)"', code)[0]
        self.names = name_expressions

    def get_function(self, name: str) -> Any:
        assert name in self.names
        function = f"raw_{dict(SOURCES)[self.source].index(name)}"

        def call(grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], *, shared_mem: int) -> None:
            import numpy as np

            values = [np.int64(a) if type(a) is int else a for a in arguments]
            held = [np.ascontiguousarray(v).reshape(1) for v in values]
            pointers = (ctypes.c_void_p * len(held))(*(h.ctypes.data for h in held))
            sizes = (ctypes.c_int64 * len(held))(*(h.itemsize for h in held))
            shape = (ctypes.c_int64 * 5)(*(*grid, 1, 1)[:3], *block, shared_mem)
            code = raw_kernels(self.source).run(function, pointers, sizes, len(held), shape)
            assert code == 0, "the parameters' number or sizes differ" if code == -1 else f"error {code}"

        return call


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A CuPy of the emulator; what comes back are the streams and devices entered."""
    if missing() is not None:
        pytest.skip(str(missing()))
    entered: list[Any] = []

    @contextlib.contextmanager
    def enter(*what: Any) -> Any:
        entered.append(what)
        yield

    cuda = SimpleNamespace(
        nvrtc=SimpleNamespace(getVersion=lambda: (13, 0)),
        ExternalStream=functools.partial(enter, "stream"),
        Device=functools.partial(enter, "device"),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=RawModule, cuda=cuda))
    monkeypatch.setattr(_nvrtc, "headers", lambda major: Path("include"))
    monkeypatch.setattr(torch.cuda, "device", functools.partial(enter, "torch"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 4711, raising=False)
    monkeypatch.setattr(_gpu, "extension", lambda: (SimpleNamespace(with_cuda=False), None))
    _nvrtc.kernel.cache_clear()
    yield entered
    _nvrtc.kernel.cache_clear()


def both_ways(function: str, source: str, arguments: list[Any], outputs: list[int]) -> None:
    """The outputs of the C++ entry point and of what Python launches in its place have the same bits."""
    results = []
    for by_nvrtc in (False, True):
        named = enumerate(arguments)
        passed = [GlobalArray(a, f"argument {i}") if isinstance(a, torch.Tensor) else a for i, a in named]
        if by_nvrtc:
            plain = [a.pointer if isinstance(a, GlobalArray) else a for a in passed]
            _gpu.launch(function, torch.device("cuda:1"), *plain)
        else:
            plain = [ctypes.c_float(a) if isinstance(a, float) else a for a in passed]
            assert compile_kernels(f"csrc/cuda/{source}").run(f"illada_{function}", *plain, None) == 0
        results.append([passed[i].tensor.view(torch.uint8) for i in outputs])
    for cpp, python, i in zip(*results, outputs):
        assert torch.equal(cpp, python), f"argument {i} of {function}"
        assert not torch.equal(cpp, arguments[i].view(torch.uint8)), f"argument {i} of {function} was not written"


@pytest.mark.parametrize("code, dtype", enumerate([torch.float32, torch.bfloat16, torch.float16]))
def test_rows_are_launched_as_the_extension_does(code: int, dtype: torch.dtype, cupy: list[Any]) -> None:
    rows, vocab = 3, 300
    g = torch.Generator().manual_seed(code)
    logits = torch.randn(rows, vocab + 3, generator=g).to(dtype)
    targets = torch.tensor([5, 299, 7])
    masked = torch.tensor([1, 0, 1], dtype=torch.uint8)
    options = [torch.randn(vocab, generator=g), 3.0, 0.1, 0.01, torch.tensor([2, 250]), 2]
    losses, stats = torch.full((rows,), -7.0), torch.full((rows, 2), -7.0)
    forward = [logits, code, rows, vocab, vocab + 3, masked, targets, *options, losses, stats]
    both_ways("masked_loss_rows_fwd", "masked_loss_rows.cu", forward, [13, 14])
    assert ("stream", 4711, 1) in cupy and ("device", 1) in cupy
    stats, scales = torch.tensor([[3.0, 40.0]]).repeat(rows, 1), torch.tensor([0.5, 1.0, -2.0])
    out = torch.full((rows, vocab), -7.0).to(dtype)
    backward = [logits, vocab + 3, out, vocab, code, rows, vocab, masked, targets, stats, scales, *options]
    both_ways("masked_loss_rows_bwd", "masked_loss_rows.cu", backward, [2])


def test_an_empty_grid_launches_nothing(cupy: list[Any]) -> None:
    _gpu.launch("masked_loss_rows_fwd", torch.device("cuda:1"), 0, 0, 0, 9, 9, 0, 0, 0, 0.0, 0.0, 0.0, 0, 0, 0, 0)
    assert cupy == []


# ---- what is missing -------------------------------------------------------------------------------------------------


@pytest.fixture
def reason(monkeypatch: pytest.MonkeyPatch) -> Any:
    """reason() with the CuPy given: a module, or the error of importing it."""

    def why(cupy: Any) -> str | None:
        real = importlib.import_module

        def import_module(name: str) -> Any:
            if name != "cupy":
                return real(name)
            if isinstance(cupy, Exception):
                raise cupy
            return cupy

        monkeypatch.setattr(_nvrtc.importlib, "import_module", import_module)
        _nvrtc.reason.cache_clear()
        return _nvrtc.reason()

    yield why
    _nvrtc.reason.cache_clear()


def with_nvrtc(get_version: Any) -> Any:
    return SimpleNamespace(cuda=SimpleNamespace(nvrtc=SimpleNamespace(getVersion=get_version)))


def test_each_missing_part_is_named_with_a_remedy(reason: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library() -> None:
        raise RuntimeError("libnvrtc.so.12: cannot open")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "pip install 'illada-kernels[cupy12]'" in reason(ModuleNotFoundError("No module named 'cupy'"))
    assert re.search(r"no NVRTC .*libnvrtc.so.12.*`pip install nvidia-cuda-nvrtc-cu12`", reason(with_nvrtc(no_library)))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "[cupy13]" in reason(ModuleNotFoundError("No module named 'cupy'"))
    monkeypatch.setattr(_nvrtc, "headers", lambda major: None)
    assert "`pip install nvidia-cuda-runtime==13.*`" in reason(with_nvrtc(lambda: (13, 0)))
    monkeypatch.setattr(_nvrtc, "headers", lambda major: Path("include"))
    assert reason(with_nvrtc(lambda: (13, 0))) is None


def test_headers_are_those_of_nvrtcs_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, version in (("cuda_runtime", 12060), ("cu13", 13000), ("toolkit", 12080)):
        (tmp_path / name / "include").mkdir(parents=True)
        (tmp_path / name / "include" / "cuda_bf16.h").write_text("")
        (tmp_path / name / "include" / "cuda_runtime_api.h").write_text(f"#define CUDART_VERSION  {version}\n")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(_nvrtc.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert _nvrtc.headers(12) == tmp_path / "cuda_runtime" / "include"
    assert _nvrtc.headers(13) == tmp_path / "cu13" / "include"
    assert _nvrtc.headers(11) is None
    monkeypatch.setattr(_nvrtc.importlib.util, "find_spec", lambda name: None)
    assert _nvrtc.headers(12) == tmp_path / "toolkit" / "include"


def test_the_cuda_backend_says_what_it_lacks_and_runs_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "cuda_reason", lambda: "the extension was built without CUDA")
    monkeypatch.setattr(_gpu, "device_reason", lambda: None)
    monkeypatch.setattr(_nvrtc, "reason", lambda: "no CuPy")
    assert _gpu.rows_reason() == "the extension was built without CUDA; NVRTC cannot compile them either: no CuPy"
    monkeypatch.setattr(_nvrtc, "reason", lambda: None)
    assert _gpu.rows_reason() is None
    monkeypatch.setattr(_gpu, "device_reason", lambda: "no CUDA GPU that torch can use")
    assert _gpu.rows_reason() is not None
