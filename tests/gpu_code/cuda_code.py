"""What nvcc makes of every CUDA kernel: registers, spills, instructions. Needs nvcc, no GPU.

    python -m tests.gpu_code.cuda_code            # compare with the committed table
    python -m tests.gpu_code.cuda_code --write    # renew the table: cuda_table.csv

The table holds one row per kernel and architecture, so that a change of a kernel's cost shows in review.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from illada_kernels import _build
from tests.cuda_on_cpu.library import included_files
from tests.gpu_code.sass_loads import loads_ahead

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / "build" / "gpu_code"
TABLE = Path(__file__).with_name("cuda_table.csv")
# The library's kernels, and the two that show how Hopper kernels are written.
FOLDERS = ("csrc/cuda", "tests/cuda_on_cpu/kernels")
SOURCES = sorted(
    str(path.relative_to(ROOT))
    for folder in FOLDERS
    for path in (ROOT / folder).glob("*.cu")
    if path.stem not in ("probes_sm90a", "basics")
)
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Icsrc/cuda", "-Icsrc/include"]
# What a word in the source must become in the SASS of sm_90a.
MEANT = {
    "wgmma<": "HGMMA",
    "tma_load(": "UTMALDG",
    "tma_prefetch_tile(": "UTMAPF",
    "copy_async(": "LDGSTS",
    "tma_store(": "UTMASTG",
    "tma_reduce_add(": "UTMAREDG",
    "bulk_load(": "UBLKCP",
    "bulk_reduce_add(": "UBLKRED",
    "stmatrix": "STSM",
}
SERIALISED = ("C7510", "C7511", "C7512", "C7515")  # ptxas: wgmma waits for each product


@dataclass(frozen=True)
class Kernel:
    source: str
    arch: str
    kernel: str
    registers: int
    static_shared: int
    stack: int
    spilled_bytes: int
    instructions: int
    hgmma: int
    bulk_copies: int
    load_distance: int  # sass_loads.loads_ahead: instructions from a 16-byte global load to its first use,
    loads_in_flight: int  # and such loads pending there


@dataclass(frozen=True)
class Compiled:
    kernels: list[Kernel]
    warnings: list[str]
    sass: str  # of all kernels; empty without a disassembler


def find_tool(name: str) -> str | None:
    """A CUDA binary tool: beside nvcc, on the path, or in the Triton package."""
    nvcc = shutil.which("nvcc")
    places = [str(Path(nvcc).resolve().parent), "/usr/local/cuda/bin"] if nvcc else []
    triton = importlib.util.find_spec("triton")
    if triton and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def architectures(source: str) -> list[str]:
    return ["90a"] if source.endswith("_sm90a.cu") else ["80", "90a"]


@functools.cache
def nvcc_version() -> str:
    out = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", out)
    return found[1] if found else "unknown"


# ---- compiling -------------------------------------------------------------------------------------------------------
def _digest(source: str, arch: str) -> str:
    path = ROOT / source
    text = path.read_text()
    depends = sorted(included_files(text, [path.parent, ROOT / "csrc/cuda", ROOT / "csrc/include"]))
    parts = [source, arch, nvcc_version(), repr(FLAGS), text, *(p.read_text() for p in depends)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _nvcc(source: str, arch: str, output: list[str]) -> str:
    command = ["nvcc", *FLAGS, *output, source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def _built(source: str) -> tuple[Path, str] | None:
    """The object file that `make build` left and what ptxas said of it, if csrc/ and nvcc are still the same: the
    largest kernels take half a minute each."""
    name = f"{Path(source).stem}.cu.o"
    info_file = ROOT / "illada_kernels/_build_info.json"
    file, log = ROOT / "build" / name, ROOT / "build" / f"{name}.log"
    if not source.startswith("csrc/cuda/") or not all(f.exists() for f in (info_file, file, log)):
        return None
    info = json.loads(info_file.read_text())
    same = info.get("sources") == _build.fingerprint(ROOT / "csrc") and nvcc_version() in str(info.get("cuda_reason"))
    return (file, log.read_text()) if same and info.get("cuda_archs") == "80;90a" else None


def _from_build(source: str, arch: str, target: Path) -> str | None:
    """Takes the cubin of this architecture out of what was built; ptxas' report, or None if nothing was."""
    built, tool = _built(source), find_tool("cuobjdump")
    if built is None or tool is None:
        return None
    file, log = built
    subprocess.run([tool, "-xelf", "all", str(file)], cwd=target.parent, capture_output=True, check=True)
    number = arch.rstrip("a")  # older cuobjdumps call sm_90a so
    (found,) = [p for p in target.parent.glob("*.cubin") if p.name.split(".")[-2] in (f"sm_{arch}", f"sm_{number}")]
    found.rename(target)
    parts = re.split(r"(?=^ptxas info    : Compiling entry function)", log, flags=re.M)
    return "".join(part for part in parts if "Compiling entry" not in part or f"for 'sm_{arch}'" in part)


def compile_ptx(source: str) -> None:
    """As forward compatible PTX, which later GPUs compile for themselves. Raises where nvcc does."""
    tool = find_tool("cuobjdump")
    if (built := _built(source)) and tool:
        listed = subprocess.run([tool, "-lptx", str(built[0])], capture_output=True, text=True, check=True).stdout
        if "sm_80.ptx" not in listed:
            raise RuntimeError(f"{source} was built without PTX:\n{listed}")
        return
    with tempfile.TemporaryDirectory() as folder:
        _nvcc(source, "80", ["-ptx", "-gencode=arch=compute_80,code=compute_80", "-o", f"{folder}/out.ptx"])


@functools.cache
def _reader() -> str:
    """A hash of what reads a cubin."""
    files = (Path(__file__), Path(str(find_tool("nvdisasm"))), Path(str(loads_ahead.__code__.co_filename)))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files if f.exists())).hexdigest()[:16]


@functools.cache
def compile_source(source: str, arch: str) -> Compiled:
    """Compiles for one architecture and reads what ptxas reports and the disassembler shows, both cached by content."""
    stem = CACHE / f"{Path(source).stem}-{arch}-{_digest(source, arch)}"
    cubin, log = stem.with_suffix(".cubin"), stem.with_suffix(".log")
    if not (cubin.exists() and log.exists()):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            target = Path(folder) / "out.cubin"
            text = _from_build(source, arch, target)
            if text is None:
                gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
                text = _nvcc(source, arch, ["-cubin", gencode, "-Xptxas", "-v", "-o", str(target)])
            (Path(folder) / "log").write_text(text)
            os.replace(target, cubin)
            os.replace(Path(folder) / "log", log)
    read = stem.with_name(f"{stem.name}-{_reader()}.json")
    if not read.exists():
        disassembler = find_tool("nvdisasm")
        sass = ""
        if disassembler:
            command = [disassembler, "-c", "-ndf", str(cubin)]  # without an analysis that adds nothing to the text
            sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        made = Compiled(_read_kernels(source, arch, log.read_text(), sass), _warnings(log.read_text()), sass)
        fresh = read.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(asdict(made)))
        fresh.replace(read)
    saved = json.loads(read.read_text())
    return Compiled([Kernel(**k) for k in saved["kernels"]], saved["warnings"], saved["sass"])


def _warnings(log: str) -> list[str]:
    return [line for line in log.splitlines() if re.search(r"warning|\(C75\d\d\)", line)]


def _demangle(name: str) -> str:
    done = subprocess.run(["c++filt", name], capture_output=True, text=True)
    text = done.stdout.strip() or name
    text = re.sub(r"\(anonymous namespace\)::|illada::|^void ", "", text)
    return re.sub(r"\((?!.*>).*$", "", text)  # without the parameters


def _read_kernels(source: str, arch: str, log: str, sass: str) -> list[Kernel]:
    bodies = {m[1]: m[2] for m in re.finditer(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", sass, re.M | re.S)}
    found = []
    for name, text in re.findall(r"Compiling entry function '(\S+)' for '\S+'\n(.*?)(?=Compiling entry|\Z)", log, re.S):
        number = {
            key: int(m[1]) if (m := re.search(pattern, text)) else 0
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "static_shared": r"(\d+) bytes smem",
                "stack": r"(\d+) bytes stack",
                "stores": r"(\d+) bytes spill stores",
                "loads": r"(\d+) bytes spill loads",
            }.items()
        }

        def count(pattern: str, body: str = bodies.get(name, "")) -> int:
            return len(re.findall(pattern, body, re.M))

        found.append(
            Kernel(
                source,
                arch,
                _demangle(name),
                number["registers"],
                number["static_shared"],
                number["stack"],
                number["stores"] + number["loads"],
                count(r"^\s+/\*[0-9a-f]{4,}\*/"),
                count(r"\bHGMMA\b"),
                count(r"\b(?:UTMALDG|UTMASTG|UTMAREDG|UBLKCP|UBLKRED)\b"),
                *loads_ahead(bodies.get(name, "")),
            )
        )
    return sorted(found, key=lambda k: k.kernel)


def missing_instructions(source: str, sass: str) -> list[str]:
    """The words of MEANT that the source, or a header of kernels that it includes, holds and whose instruction the SASS
    lacks."""
    text = (ROOT / source).read_text()
    headers = included_files(text, [(ROOT / source).parent])
    text += "".join(path.read_text() for path in headers if path.name.endswith("_sm90a.cuh"))
    return [
        f"{word} -> {instruction}"
        for word, instruction in MEANT.items()
        if word in text and not re.search(rf"\b{instruction}\b", sass)
    ]


# ---- the table -------------------------------------------------------------------------------------------------------
def measure() -> list[Kernel]:
    return [k for source in SOURCES for arch in architectures(source) for k in compile_source(source, arch).kernels]


def read_table() -> tuple[str, list[Kernel]]:
    """The nvcc version it was written with, and its rows."""
    lines = TABLE.read_text().splitlines()
    rows = csv.DictReader(lines[1:])
    types = {f.name: int if f.type == "int" else str for f in fields(Kernel)}
    read = [Kernel(**{name: kind(row.get(name) or 0) for name, kind in types.items()}) for row in rows]
    return lines[0].removeprefix("# nvcc "), read


def write_table(kernels: list[Kernel]) -> None:
    with TABLE.open("w", newline="") as file:
        file.write(f"# nvcc {nvcc_version()}\n")
        writer = csv.DictWriter(file, [f.name for f in fields(Kernel)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(k) for k in kernels)


def differences(old: list[Kernel], new: list[Kernel]) -> list[str]:
    def by_name(kernels: list[Kernel]) -> dict[tuple[str, str, str], Kernel]:
        return {(k.source, k.arch, k.kernel): k for k in kernels}

    before, after = by_name(old), by_name(new)
    lines = [f"gone: {key}" for key in before.keys() - after.keys()]
    lines += [f"new: {key}" for key in after.keys() - before.keys()]
    for key in before.keys() & after.keys():
        for name, value in asdict(before[key]).items():
            if getattr(after[key], name) != value:
                lines.append(f"{' '.join(key)}: {name} {value} -> {getattr(after[key], name)}")
    return sorted(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="renew the committed table")
    arguments = parser.parse_args()
    kernels = measure()
    print("\n".join(differences(read_table()[1] if TABLE.exists() else [], kernels)) or "as in the table")
    if arguments.write:
        write_table(kernels)


if __name__ == "__main__":
    main()
