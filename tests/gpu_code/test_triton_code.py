"""Every Triton kernel configuration compiles ahead of time for sm_80, sm_90 and sm_100, within shared memory."""

import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="no triton")
tl = pytest.importorskip("triton.language")

from tests.gpu_code import triton_code  # noqa: E402
from tests.gpu_code.triton_code import Configuration, Row  # noqa: E402


@triton.jit
def double_product(a, b, c, n, SIZE: tl.constexpr):
    """c = 2 a b for one tile: enough for shared memory and tensor cores to appear."""
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    inside = (row < n) & (column < n)
    x = tl.load(a + row * n + column, mask=inside, other=0.0)
    y = tl.load(b + row * n + column, mask=inside, other=0.0)
    tl.store(c + row * n + column, 2 * tl.dot(x, y), mask=inside)


def tiny(size: int = 64) -> Configuration:
    signature = {"a": "*bf16", "b": "*bf16", "c": "*fp32", "n": "i32", "SIZE": "constexpr"}
    return Configuration(f"double_product {size}", double_product, signature, {"SIZE": size}, {"num_warps": 4})


def test_a_kernel_compiles_for_three_architectures_without_a_gpu() -> None:
    rows, changes = triton_code.measure([], [tiny()])
    assert [row.arch for row in rows] == [80, 90, 100] and len(changes) == 3
    for row in rows:
        assert 16 <= row.registers <= 255 and row.stack == 0 and row.instructions > 100
        assert 0 < row.shared <= 2 * 64 * 64 * 4  # both tiles, as float32 at most
    assert not triton_code.too_large(rows)


def test_arguments_divisible_by_16_give_wide_loads() -> None:
    @triton.jit
    def copy(a, b, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        tl.store(b + i, tl.load(a + i))

    instructions = []
    for kind in ("*bf16", "*bf16:16"):
        signature = {"a": kind, "b": kind, "SIZE": "constexpr"}
        configuration = Configuration("copy", copy, signature, {"SIZE": 1024}, {"num_warps": 1})
        instructions.append(triton_code.compile_configuration(configuration, 80).instructions)
    assert instructions[1] <= instructions[0] - 2 * (32 - 4)  # of a lane: 8 elements in a load or a store, not one


def test_a_configuration_in_the_table_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [Row(tiny().name, arch, tiny().hash(arch), 30, 100, 0, 200) for arch in (80, 90, 100)]
    monkeypatch.setattr(triton_code, "compile_configuration", lambda *_: pytest.fail("compiled again"))
    assert triton_code.measure(known, [tiny()]) == (known, [])


def test_the_hash_follows_source_arguments_and_architecture() -> None:
    hashes = {tiny().hash(80), tiny().hash(90), tiny(32).hash(80)}
    other = Configuration(tiny().name, double_product, tiny().signature, {"SIZE": 64}, {"num_warps": 8})
    assert len(hashes | {other.hash(80)}) == 4


def test_too_much_shared_memory_is_named() -> None:
    rows = [Row("attention.fwd", 80, "", 1, 166913, 0, 1), Row("attention.fwd", 90, "", 1, 232448, 0, 1)]
    assert triton_code.too_large(rows) == ["attention.fwd sm_80: 166913 bytes of shared memory, at most 166912 fit"]


@pytest.fixture(scope="module")
def layer_ptx() -> dict[str, list[str]]:
    """Instructions of the kernels of a layer's rows in bfloat16, for sm_90."""
    if triton_code.read_table()[0] != triton_code.version():
        pytest.skip("another version of Triton may order them in another way")
    wanted = ("layer.norm of a sum, 4096 bf16", "layer.rope to cache bf16")
    found = {c.name: c for c in triton_code.configurations() if c.name in wanted}
    return {name: triton_code.compiled(c, 90).asm["ptx"].splitlines() for name, c in found.items()}


def places(lines: list[str], word: str) -> list[int]:
    return [i for i, line in enumerate(lines) if word in line]


def test_norms_of_small_rows_are_not_flushed_to_zero(layer_ptx: dict[str, list[str]]) -> None:
    """Their mean of squares is subnormal: without it they would be divided by 0."""
    lines = layer_ptx["layer.norm of a sum, 4096 bf16"]
    assert places(lines, "sqrt.rn.f32") and not places(lines, ".ftz")


def test_no_load_of_a_layers_rows_waits_for_another(layer_ptx: dict[str, list[str]]) -> None:
    """x, delta and weight are in flight together, and so are heads of k and v with what tells their slot."""
    norm = layer_ptx["layer.norm of a sum, 4096 bf16"]
    assert len(places(norm, "ld.global.v4")) == 6 and places(norm, "ld.global")[-1] < places(norm, "bar.sync")[0]
    lines = layer_ptx["layer.rope to cache bf16"]
    order = [found[0] for line in lines if (found := re.search(r"(ld|st)\.global\.(v2|b64|b8)", line))]
    halves = ["ld.global.v2"] * 2, ["st.global.v2"] * 2
    kept = [*halves[0], "ld.global.b64", "ld.global.b8", *halves[1]]  # start and keep
    assert order == [*halves[0], *halves[1], *kept, *kept]


def test_table_is_up_to_date_and_every_configuration_fits() -> None:
    """In a process of its own: a hash takes in what other tests have put in a kernel's place."""
    version, _ = triton_code.read_table()
    if version != triton_code.version():
        pytest.skip(f"the table was written with triton {version}, here is {triton_code.version()}")
    command = [sys.executable, "-m", "tests.gpu_code.triton_code"]
    said = subprocess.run(command, cwd=triton_code.ROOT, capture_output=True, text=True)
    wanted = "run `python -m tests.gpu_code.triton_code --write` and commit"
    assert said.stdout.strip() == "as in the table", f"{wanted}:\n{said.stdout}{said.stderr}"
