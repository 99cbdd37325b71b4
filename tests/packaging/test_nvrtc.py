"""The row kernels without nvcc: compiled by NVRTC (no GPU needed), and launched as the extension would launch them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import illada_kernels as ik
from illada_kernels import _gpu, _nvrtc
from illada_kernels.ops.masked_loss import nvrtc as masked_loss
from illada_kernels.ops.masked_loss.cuda import CudaRows
from illada_kernels.ops.masked_loss.row_kernels import Formula
from illada_kernels.ops.unmask import nvrtc as unmask
from tests.cuda_on_cpu.emulated import Emulated
from tests.cuda_on_cpu.library import compile_kernels, missing
from tests.cuda_on_cpu.raw import KERNELS
from tests.gpu_code.cuda_code import find_tool
from tests.helpers import unmask_on_cpu

CUPY_ADDS = ("-ftz=true", "--device-as-default-execution-space")


# ---- NVRTC itself ----------------------------------------------------------------------------------------------------


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    """The library of the nvidia-cuda-nvrtc package."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("cu*/lib*/libnvrtc.so.*")):
            for builtins in path.parent.glob("libnvrtc-builtins.so*"):  # found by its name once it is loaded
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(path))
    return None


def compile_program(source: str, names: list[str], arch: str) -> tuple[str, list[str], bytes]:
    """(log, lowered names, cubin) of what _nvrtc.py gives to CuPy."""
    library = nvrtc()
    if library is None:
        pytest.skip("no NVRTC: `pip install nvidia-cuda-nvrtc`")
    options = [*_nvrtc.options(), f"-arch={arch}", *CUPY_ADDS]
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
@pytest.mark.parametrize("source, kernels", KERNELS.items())
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


class RawModule:
    """As cupy.RawModule, compiled for the CPU: arguments by their NumPy types, Python's integers as 64 bits."""

    def __init__(self, *, code: str, options: tuple[str, ...], name_expressions: tuple[str, ...]) -> None:
        assert f"-I{_nvrtc.sources() / 'cuda'}" in options and "-std=c++17" in options
        self.source = re.findall(r'#include "(.+)"', code)[0]
        self.names = name_expressions

    def get_function(self, name: str) -> RawKernel:
        assert name in self.names
        return RawKernel(self.source, f"raw_{KERNELS[self.source].index(name)}")


class RawKernel:
    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self, source: str, function: str) -> None:
        self.source, self.function = source, function

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], arguments: tuple[Any, ...], *, shared_mem: int
    ) -> None:
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        values = [np.int64(a) if type(a) is int else a for a in arguments]
        held = [np.ascontiguousarray(v).reshape(1) for v in values]
        pointers = (ctypes.c_void_p * len(held))(*(h.ctypes.data for h in held))
        sizes = (ctypes.c_int64 * len(held))(*(h.itemsize for h in held))
        shape = (ctypes.c_int64 * 5)(*(*grid, 1, 1)[:3], *block, shared_mem)
        code = compile_kernels(f"csrc/cuda/{self.source}").run(self.function, pointers, sizes, len(held), shape)
        assert code == 0, "the parameters' number or sizes differ" if code == -1 else f"error {code}"


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
    monkeypatch.setattr(torch.cuda, "device", functools.partial(enter, "torch"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 4711, raising=False)
    monkeypatch.setattr(_gpu, "extension", lambda: (SimpleNamespace(with_cuda=False), None))
    _nvrtc.kernel.cache_clear()
    yield entered
    _nvrtc.kernel.cache_clear()


class ByNvrtc:
    """In place of the kernels of an `Emulated`: a call goes the way without nvcc."""

    def holds(self, name: str) -> bool:
        return True

    def run(self, name: str, *passed: Any, **_: Any) -> int:
        plain = [getattr(a, "pointer", getattr(a, "value", a)) for a in passed[:-1]]
        _gpu.launch(name.removeprefix("illada_"), torch.device("cuda:1"), *plain)
        return 0


ROOM = 50 << 10  # bytes of shared memory that `gradients` keeps rows in: more than a kernel has without asking


@pytest.fixture
def two_ways(cupy: list[Any]) -> tuple[CudaRows, CudaRows]:
    """The row kernels of masked_loss by their C++ entry points, and as Python launches them without nvcc."""
    by_nvrtc, sources = Emulated(), [f"csrc/cuda/{source}" for source in masked_loss.KERNELS]
    by_nvrtc.kernels = [ByNvrtc()]
    return CudaRows(Emulated(*sources), lambda device: ROOM), CudaRows(by_nvrtc, lambda device: ROOM)


def bits(arguments: Iterable[Any]) -> list[torch.Tensor]:
    return [a.contiguous().reshape(-1).view(torch.uint8) for a in arguments if isinstance(a, torch.Tensor)]


def same(method: str, two_ways: tuple[CudaRows, CudaRows], *arguments: Any, **keywords: Any) -> None:
    """Both ways write the same bits, and they write: tensors among the arguments are copied for each."""
    written = []
    for kernels in two_ways:
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        getattr(kernels, method)(*copies, **keywords)
        written.append(bits(copies))
    assert all(torch.equal(a, b) for a, b in zip(*written)), method
    assert not all(torch.equal(a, b) for a, b in zip(written[0], bits(arguments))), f"{method} wrote nothing"


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_kernels_are_launched_as_the_extension_does(
    dtype: torch.dtype, two_ways: tuple[CudaRows, CudaRows], cupy: list[Any]
) -> None:
    count, vocab, g = 5, 300, torch.Generator().manual_seed(0)
    masked, targets = torch.tensor([1, 0, 1, 1, 0]).bool(), torch.tensor([5, -3, 299, 7, 0])
    weight = torch.rand(count, generator=g)
    cpp, python = (k.compact(masked, targets, weight, vocab, True, 4) for k in two_ways)
    for name in ("index", "targets", "scale", "slot", "info"):
        assert torch.equal(getattr(cpp, name), getattr(python, name)), name
    x, factors = torch.randn(count, 37, generator=g).to(dtype), torch.rand(4, generator=g)
    for to in {dtype, torch.float32}:
        same("gather", two_ways, x, cpp, torch.full((4, 37), -7.0).to(to), factors)
    same("scatter", two_ways, torch.randn(4, 37, generator=g), cpp, torch.full((count, 37), -7.0).to(dtype), factors)
    for what, grad in ((0, torch.rand(count, generator=g)), (1, None), (2, torch.tensor(2.0))):
        same("factors", two_ways, cpp, what, grad, torch.full((4,), -7.0))
    formula = Formula(vocab, torch.randn(vocab, generator=g), 3.0, 0.1, 0.01, torch.tensor([2, 250]))
    logits = torch.randn(count, vocab + 3, generator=g).to(dtype)[:, :vocab]
    state = torch.tensor([3.0, 40.0, 1.0, 5.0]).repeat(4, 1)
    same("stats", two_ways, logits[:4, 64:200].contiguous(), 64, cpp, state, formula)
    out, part = torch.full((4, 136), -7.0).to(dtype), logits[:4, 64:200].contiguous()
    same("dlogits", two_ways, part, out, 64, cpp, state, cpp.scale, formula)
    out = torch.full((count, vocab), -7.0).to(dtype)
    same("dlogits", two_ways, logits, out, 0, cpp, state, cpp.scale, formula, by_slot=True)
    same("gradients", two_ways, logits[:4].contiguous(), cpp, state, cpp.scale, formula)
    same("losses", two_ways, state, cpp, formula, torch.full((count,), -7.0))
    same("losses", two_ways, state, cpp, formula, torch.tensor(-7.0))
    many = two_ways[0].compact(torch.rand(300, generator=g) < 0.9, torch.zeros(300).long(), None, vocab, False, 300)
    same("factors", two_ways, many, 0, None, torch.full((300,), -7.0))
    same("losses", two_ways, torch.rand(300, 4, generator=g) + 1, many, formula, torch.full((300,), -7.0))
    assert ("stream", 4711, 1) in cupy and ("device", 1) in cupy


def test_a_block_gets_the_shared_memory_that_it_asks_for(two_ways: tuple[CudaRows, CudaRows]) -> None:
    vocab = 4 * 3700
    rows = two_ways[0].compact(torch.tensor([True]), torch.tensor([5]), None, vocab, False, 1)
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(0))
    same("gradients", two_ways, logits, rows, torch.zeros(1, 4), rows.scale, Formula(vocab, None, 0.0, 0.0, 0.0, None))


WIDER = np.dtype([(name, "f8" if name == "z_loss" else kind) for name, (kind, _) in masked_loss.TERMS.fields.items()])


@pytest.mark.parametrize(
    "name, wrong",
    [("ROW_THREADS", 128), ("FLAT_THREADS", 128), ("SCRATCH", 0), ("ROW_SCRATCH", 0), ("TERMS", WIDER)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_launch_that_differs_is_seen(
    name: str, wrong: Any, two_ways: tuple[CudaRows, CudaRows], cupy: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked_loss, name, wrong)
    with pytest.raises(AssertionError):
        test_row_kernels_are_launched_as_the_extension_does(torch.float32, two_ways, cupy)


@pytest.mark.parametrize(
    "count, dtype, extended",
    [
        (6, torch.float32, False),
        (5, torch.bfloat16, False),
        (7, torch.float16, False),
        (1030, torch.float32, False),
        (6, torch.float32, True),
        (5, torch.bfloat16, True),
    ],
)
def test_unmask_is_launched_as_the_extension_does(
    count: int, dtype: torch.dtype, extended: bool, cupy: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    g, vocab = torch.Generator().manual_seed(0), 4500 if count < 1000 else 9
    logits = torch.randn(2, count, vocab, generator=g).to(dtype)
    tokens, positions = torch.full((2, count + 3), 3), torch.arange(count).expand(2, count)
    options = {"mask_id": 3, "temperature": 0.7, "seed": 5, "confidence": "margin", "forbid": (1,)}
    rule, launches = ik.TopK(3), ["unmask_rows_cuda", "unmask_select_cuda"]
    if extended:
        rule, launches = ik.Renoise(1.0), ["unmask_bounds_cuda", *launches]
        options |= {"top_k": 2000, "top_p": 0.9}
    results = []
    for kernels in (None, [ByNvrtc()]):
        launcher = unmask_on_cpu.OnCpu(*(f"csrc/cuda/{source}" for source in unmask.KERNELS))
        launcher.kernels = kernels or launcher.kernels
        unmask_on_cpu.Backend(monkeypatch, launcher, processors=0)
        step, after = unmask_on_cpu.unmask("cuda", logits, None, tokens, positions, rule, **options)
        assert launcher.launches == launches
        results.append(bits([*step, after]))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert ("stream", 4711, 1) in cupy


def test_an_empty_grid_launches_nothing(cupy: list[Any]) -> None:
    _gpu.launch("masked_loss_factors_cuda", torch.device("cuda:1"), 0, 0, 0, 0, 0, 1, 0, 0, 0)
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
    assert reason(with_nvrtc(lambda: (13, 0))) is None


def test_the_cuda_backend_says_what_it_lacks_and_runs_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu, "cuda_reason", lambda: "the extension was built without CUDA")
    monkeypatch.setattr(_gpu, "device_reason", lambda: None)
    monkeypatch.setattr(_nvrtc, "reason", lambda: "no CuPy")
    assert _gpu.rows_reason() == "the extension was built without CUDA; NVRTC cannot compile them either: no CuPy"
    monkeypatch.setattr(_nvrtc, "reason", lambda: None)
    assert _gpu.rows_reason() is None
    monkeypatch.setattr(_gpu, "device_reason", lambda: "no CUDA GPU that torch can use")
    assert _gpu.rows_reason() is not None
