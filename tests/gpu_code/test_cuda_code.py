"""Every CUDA kernel compiles for every architecture: no spills, no serialised products, the instructions meant."""

import re
import shutil

import pytest

from tests.gpu_code import cuda_code, sass_loads

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
CASES = [(s, a) for s in cuda_code.SOURCES for a in cuda_code.architectures(s)]
needs_disassembler = pytest.mark.skipif(
    cuda_code.find_tool("nvdisasm") is None, reason="no nvdisasm: it comes with the CUDA toolkit and with triton"
)


@pytest.mark.parametrize("source, arch", CASES)
def test_kernels_fit_registers_and_serialise_nothing(source: str, arch: str) -> None:
    compiled = cuda_code.compile_source(source, arch)
    assert compiled.kernels, "no kernel in this file"
    assert not [w for w in compiled.warnings if any(code in w for code in cuda_code.SERIALISED)]
    assert not [w for w in compiled.warnings if "warning" in w]
    for kernel in compiled.kernels:
        assert kernel.spilled_bytes == 0 and kernel.stack == 0, kernel
        assert kernel.registers <= 255 and kernel.static_shared == 0, kernel  # shared memory is dynamic, see device.cuh


@pytest.mark.parametrize("source", [s for s in cuda_code.SOURCES if "80" in cuda_code.architectures(s)])
def test_kernels_compile_to_forward_compatible_ptx(source: str) -> None:
    cuda_code.compile_ptx(source)


@needs_disassembler
@pytest.mark.parametrize("source", [s for s in cuda_code.SOURCES if s.endswith("_sm90a.cu")])
def test_hopper_kernels_hold_the_instructions_meant(source: str) -> None:
    assert not cuda_code.missing_instructions(source, cuda_code.compile_source(source, "90a").sass)


def test_a_spill_and_a_lost_instruction_would_be_seen() -> None:
    log = """ptxas info    : Compiling entry function '_Z1kv' for 'sm_90a'
ptxas info    : Function properties for _Z1kv
    16 bytes stack frame, 20 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."""
    (kernel,) = cuda_code._read_kernels("a.cu", "90a", log, ".text._Z1kv:\n        /*0000*/  HGMMA.64x8x16 ;\n")
    assert (kernel.spilled_bytes, kernel.stack, kernel.static_shared) == (44, 16, 1024)
    assert (kernel.hgmma, kernel.instructions) == (1, 1)
    assert any("C7510" in w for w in cuda_code._warnings(log))
    lost = cuda_code.missing_instructions("tests/cuda_on_cpu/kernels/gemm_sm90a.cu", "HGMMA UTMASTG")
    assert lost == ["tma_load( -> UTMALDG"]


@needs_disassembler
@pytest.mark.parametrize("arch", ["80", "90a"])
def test_row_kernels_load_ahead(arch: str) -> None:
    """A use three instructions behind its load would be no prefetch: a body takes at least 40."""
    kernels = {k.kernel: k for k in cuda_code.compile_source("csrc/cuda/masked_loss_rows.cu", arch).kernels}
    assert len(kernels) == 18
    for name, kernel in kernels.items():
        plain = "true" in name
        assert kernel.loads_in_flight >= (4 if plain else 2), kernel
        assert kernel.load_distance >= (80 if plain else 40), kernel
    assert kernels["loss::rows_gradients<bf16, true>"].loads_in_flight >= 4


@needs_disassembler
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_one_global_load_stands_before_the_first_bulk_copy_of_the_forward(dtype: str) -> None:
    """That of the bounds, as copies to shared memory which no register waits for; nothing else is loaded."""
    sass = cuda_code.compile_source(f"csrc/cuda/attention_fwd_{dtype}_sm90a.cu", "90a").sass
    bodies = [body for body in re.split(r"^\.text\.", sass, flags=re.M) if re.match(r"\S*13attention_fwdI", body)]
    assert len(bodies) == 4
    for body in bodies:
        assert re.search(r"\bLDGSTS\.E", body) and not re.search(r"\bLDG\.E", body)


LOOP = """.L_x_1:
        /*0000*/                   {load} ;
        /*0010*/                   STG.E.128 desc[UR4][R12.64], R8 ;
        /*0020*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0030*/                   {move} ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   FADD R3, R4, R5 ;
        /*0060*/                   EXIT ;
"""


@pytest.mark.parametrize(
    "load, move, expected",
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", "MOV R8, R5", (3, 1)),  # the move waits for the load
        ("LDG.E.128 R8, desc[UR4][R2.64]", "MOV R1, R0", (1, 1)),
        ("LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x10]", (3, 2)),  # used in the next turn
        ("LDG.E.128 R16, desc[UR4][R2.64]", "MOV R16, R0", (0, 0)),  # overwritten, not used
        ("MOV R0, R1", "MOV R1, R0", (0, 0)),
    ],
)
def test_distances_are_read_from_sass(load: str, move: str, expected: tuple[int, int]) -> None:
    assert sass_loads.loads_ahead(LOOP.format(load=load, move=move)) == expected


def test_pending_loads_are_counted_on_the_way_to_the_use() -> None:
    loads = "".join(f"        /*0000*/  @P0 LDG.E.128 R{r}, desc[UR4][R2.64] ;\n" for r in (4, 8, 12, 16))
    use = "        /*0000*/  FADD R0, R7, R0 ;\n        /*0000*/  EXIT ;\n"
    assert sass_loads.loads_ahead(loads + use) == (4, 4)


@needs_disassembler
def test_table_is_up_to_date() -> None:
    version, table = cuda_code.read_table()
    if version != cuda_code.nvcc_version():
        pytest.skip(f"the table was written with nvcc {version}, here is {cuda_code.nvcc_version()}")
    changed = cuda_code.differences(table, cuda_code.measure())
    assert not changed, "run `python -m tests.gpu_code.cuda_code --write` and commit:\n" + "\n".join(changed)
