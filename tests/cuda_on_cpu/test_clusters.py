"""Faults that only clusters invite, planted in the multicast probe."""

import re

import pytest

from tests.cuda_on_cpu import probes
from tests.cuda_on_cpu.library import GlobalArray, KernelFault, compile_kernels, missing, plant

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SOURCE = "tests/cuda_on_cpu/kernels/probes_sm90a.cu"
BOTH_ARRIVE = "for (uint32_t block = 0; block < 2; ++block) mbar_arrive_cluster(empty, block);"
FAULTS = {
    "no barrier of the cluster after the initialisation": (
        "  cluster_sync();\n  float sum",
        "  __syncthreads();\n  float sum",
        "is not initialised",
    ),
    "arrives only at its own block": (BOTH_ARRIVE, "mbar_arrive(empty);", "deadlock"),
    "arrives at a block that does not exist": (
        BOTH_ARRIVE,
        BOTH_ARRIVE.replace("block < 2", "block < 3"),
        "names block 2 of a cluster of 2",
    ),
    "reuses a stage that the other block still reads": (
        "mbar_init(empty, 2 * 64)",
        "mbar_init(empty, 64)",
        "(still being written by a bulk copy|more than 64 arrivals|the target of another one)",
    ),
    "leaves while the other still writes": (
        "  cluster_sync();  // no block leaves",
        "  // no block leaves",
        "has exited|while a bulk load to it was under way",
    ),
    "multicast to a block that does not exist": (
        "&map, full, 3, 0,",
        "&map, full, 7, 0,",
        "multicast to block 2 of a cluster of 2",
    ),
    "expects only its own box": (
        "mbar_arrive_expect_tx(full, 2048)",
        "mbar_arrive_expect_tx(full, 1024)",
        "(still being written|deadlock|never written|under way)",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_caught(name: str) -> None:
    old, new, said = FAULTS[name]
    text = plant(SOURCE, old, new)
    start, end = text.index("// ---- wgmma ---"), text.index("// ---- clusters ---")
    # Without the other probes it compiles faster; the lines keep their numbers.
    text = text[:start] + "\n" * text[start:end].count("\n") + text[end:]
    kernels, reports = compile_kernels(SOURCE, text=text), []
    for seed in range(20):
        program = probes.multicast_program(2, 6)
        arguments = [GlobalArray(a, "array") if hasattr(a, "shape") else a for a in program.arguments]
        try:
            kernels.run(program.function, *arguments, seed=seed)
        except KernelFault as fault:
            reports.append(str(fault))
    print(f"{name}: {len(reports)} reports of 20;", reports[0] if reports else "")
    assert any(re.search(said, report) for report in reports), reports[:1]
