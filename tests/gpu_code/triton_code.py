"""What Triton makes of every kernel configuration for sm_80, sm_90 and sm_100. Needs triton, no GPU.

    python -m tests.gpu_code.triton_code            # compile what changed, compare with the committed table
    python -m tests.gpu_code.triton_code --write    # renew the table: triton_table.csv

A file of illada_kernels/ops/<op>/triton/ takes part by defining `aot_configurations()`, which yields tuples
(name, kernel, signature, constexprs, options): signature maps every argument to its type ("*bf16", "i32",
"constexpr"; "*bf16:16" and "i32:16" are divisible by 16, as most pointers and strides are at run time: without it no
load is wider than an element), constexprs the constant ones to their values, options holds num_warps and num_stages,
and archs (some of 80, 90, 100) where not all use it. A configuration takes 2-5 s, so one whose hash is in the table is
not compiled again.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tests.gpu_code.cuda_code import find_tool

ROOT = Path(__file__).resolve().parents[2]
TABLE = Path(__file__).with_name("triton_table.csv")
# Shared memory that a block may have, in bytes: A100 (163 KiB), H100 and B200 (227 KiB).
SHARED_LIMIT = {80: 166912, 90: 232448, 100: 232448}


@dataclass(frozen=True)
class Row:
    configuration: str
    arch: int
    hash: str
    registers: int
    shared: int
    stack: int
    instructions: int


@dataclass(frozen=True)
class Configuration:
    name: str
    kernel: Any  # a triton.JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]

    def hash(self, arch: int) -> str:
        """Changes with the kernel's source and that of what it calls, the arguments and the options."""
        parts = (
            self.kernel.cache_key,
            sorted(self.signature.items()),
            sorted(self.constexprs.items(), key=str),
            sorted(self.options.items()),
            arch,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def configurations() -> Iterator[Configuration]:
    """Those of every op room."""
    rooms = ROOT / "illada_kernels" / "ops"
    for path in sorted([*rooms.glob("*/triton*.py"), *rooms.glob("*/triton/[!_]*.py")]):
        room, *rest = path.relative_to(rooms).with_suffix("").parts
        module = importlib.import_module(".".join(("illada_kernels.ops", room, *rest)))
        for name, *configuration in getattr(module, "aot_configurations", tuple)():
            yield Configuration(f"{room}.{name}", *configuration)


def compiled(configuration: Configuration, arch: int) -> Any:
    """Returns Triton's CompiledKernel."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, signature = configuration.kernel, configuration.signature
    aligned = [name for name, kind in signature.items() if kind.endswith(":16")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    types = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    source = ASTSource(kernel, types, configuration.constexprs, attributes)
    options = {name: value for name, value in configuration.options.items() if name != "archs"}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_configuration(configuration: Configuration, arch: int) -> Row:
    kernel = compiled(configuration, arch)
    registers, stack, instructions = _read_cubin(kernel.asm["cubin"])
    shared = kernel.metadata.shared
    return Row(configuration.name, arch, configuration.hash(arch), registers, shared, stack, instructions)


def _read_cubin(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack (spills, mostly) and instructions."""
    tools = [find_tool(name) for name in ("cuobjdump", "nvdisasm")]
    if None in tools:
        raise RuntimeError("cuobjdump and nvdisasm should be part of the Triton package")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in zip(tools, ("-res-usage", "-c"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if not found:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers:\n{usage}")
    return int(found[1]), int(found[2]), len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", sass, re.M))


# ---- the table -------------------------------------------------------------------------------------------------------
def version() -> str:
    import triton

    return str(triton.__version__)


def read_table() -> tuple[str, list[Row]]:
    """The version of Triton it was written with, and its rows."""
    lines = TABLE.read_text().splitlines()
    types = {f.name: int if f.type == "int" else str for f in fields(Row)}
    rows = [Row(**{k: types[k](v) for k, v in row.items()}) for row in csv.DictReader(lines[1:])]
    return lines[0].removeprefix("# triton "), rows


def write_table(rows: Iterable[Row]) -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# triton {version()}\n")
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def measure(table: Iterable[Row], wanted: Iterable[Configuration]) -> tuple[list[Row], list[str]]:
    """The rows of all configurations, compiling only those whose hash the table lacks; and what differs from it."""
    known = {(row.configuration, row.arch): row for row in table}
    rows, changes = [], []
    for configuration in wanted:
        for arch in configuration.options.get("archs", SHARED_LIMIT):
            old = known.pop((configuration.name, arch), None)
            if old and old.hash == configuration.hash(arch):
                rows.append(old)
                continue
            rows.append(compile_configuration(configuration, arch))
            changes.append(f"{'changed' if old else 'new'}: {rows[-1]}")
    return rows, changes + [f"gone: {row.configuration} sm_{row.arch}" for row in known.values()]


def too_large(rows: Iterable[Row]) -> list[str]:
    return [
        f"{r.configuration} sm_{r.arch}: {r.shared} bytes of shared memory, at most {SHARED_LIMIT[r.arch]} fit"
        for r in rows
        if r.shared > SHARED_LIMIT[r.arch]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="renew the committed table")
    arguments = parser.parse_args()
    written_with, table = read_table() if TABLE.exists() else ("", [])
    rows, changes = measure(table if written_with == version() else [], configurations())
    print("\n".join([*changes, *too_large(rows)]) or "as in the table")
    if arguments.write:
        write_table(rows)


if __name__ == "__main__":
    main()
