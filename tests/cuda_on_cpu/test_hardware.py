"""The emulator against a GPU: the same random programs (probes.py) on both, bit for bit.

    python -m pytest tests/cuda_on_cpu/test_hardware.py -s

needs one Hopper GPU, nvcc and a torch with CUDA. The programs multiply and add small integers, so that every result is
exact and no order of summation shows. On the GPU each program also has to give what the documents say.
"""

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda_on_cpu import probes
from tests.cuda_on_cpu.library import CACHE, ROOT, GlobalArray, compile_kernels, included_files, missing

SOURCE = "tests/cuda_on_cpu/kernels/probes_sm90a.cu"


def no_hardware() -> str | None:
    if missing() is not None:
        return missing()
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    if torch.cuda.get_device_capability() != (9, 0):
        return f"no Hopper GPU: {torch.cuda.get_device_name()}"
    return None if shutil.which("nvcc") else "no nvcc"


def compile_for_gpu() -> ctypes.CDLL:
    path = ROOT / SOURCE
    depends = sorted(included_files(path.read_text(), [path.parent, ROOT / "csrc/cuda"]))
    digest = hashlib.sha256("".join(p.read_text() for p in [path, *depends]).encode()).hexdigest()[:16]
    target = CACHE / f"probes-gpu-{digest}.so"
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                "nvcc",
                "-std=c++17",
                "-O3",
                "-gencode=arch=compute_90a,code=sm_90a",
                "-Icsrc/cuda",
                "-shared",
                "-Xcompiler",
                "-fPIC",
                SOURCE,
                "-o",
                str(target),
            ],
            cwd=ROOT,
            check=True,
        )
    return ctypes.CDLL(str(target))


def run_on_gpu(library: ctypes.CDLL, program: probes.Program) -> dict[int, torch.Tensor]:
    tensors = {i: a.cuda() for i, a in enumerate(program.arguments) if isinstance(a, torch.Tensor)}

    def to_c(i: int, argument: Any) -> Any:
        if i in tensors or argument is None:
            return ctypes.c_void_p(tensors[i].data_ptr() if i in tensors else None)
        return ctypes.c_int64(argument)

    code = getattr(library, program.function)(*[to_c(i, a) for i, a in enumerate(program.arguments)])
    torch.cuda.synchronize()
    assert code == 0, f"{program.name}: CUDA error {code}"
    return {i: tensors[i].cpu() for i in program.expected}


def run_on_cpu(program: probes.Program, seed: int) -> dict[int, torch.Tensor]:
    arguments = [
        GlobalArray(a, f"argument {i}") if isinstance(a, torch.Tensor) else a for i, a in enumerate(program.arguments)
    ]
    assert compile_kernels(SOURCE).run(program.function, *arguments, seed=seed) == 0
    return {i: arguments[i].tensor for i in program.expected}


@pytest.mark.skipif(no_hardware() is not None, reason=str(no_hardware()))
def test_emulator_and_gpu_agree_bit_for_bit() -> None:
    library = compile_for_gpu()
    programs = [*probes.copy_programs(), *probes.matrix_and_cluster_programs(), *probes.wgmma_programs()]
    different = []
    for seed, program in enumerate(programs):
        gpu, cpu = run_on_gpu(library, program), run_on_cpu(program, seed)
        for i, expected in program.expected.items():
            if not torch.equal(gpu[i], cpu[i]):
                different.append(f"{program.name}: emulator and GPU differ")
            if not torch.equal(gpu[i].view(expected.dtype), expected):
                different.append(f"{program.name}: the GPU differs from the documents")
    print(f"{len(programs)} programs on {torch.cuda.get_device_name()}, {len(different)} differences")
    assert not different, "\n".join(different)


def test_the_programs_to_compare_are_many_and_exact() -> None:
    """What would run on a GPU, checked without one: integers small enough that float32 sums are exact in any order."""
    programs = [*probes.copy_programs(), *probes.matrix_and_cluster_programs(), *probes.wgmma_programs()]
    assert len(programs) > 200 and len({p.name for p in programs}) == len(programs)
    for program in programs:
        for expected in program.expected.values():
            values = expected.double()
            assert torch.equal(values, values.round()) and values.abs().max() < 2**24, program.name
    assert Path(ROOT / SOURCE).exists()
