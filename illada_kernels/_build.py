"""Compiles csrc/ into `illada_kernels._C`: writes build.ninja for g++ (or $CXX) and, where found, nvcc, and runs ninja.

Standard library only; ninja runs the commands. Torch is not needed and not looked at.

    python -m illada_kernels._build        build in place, for a checkout

Environment: CXX, CPPFLAGS, CXXFLAGS, LDFLAGS, NVCC, CUDA_HOME, MAX_JOBS; ILLADA_CUDA=0 leaves CUDA out, and with
ILLADA_CUDA=1 the build fails without it; ILLADA_CUDA_ARCHS or TORCH_CUDA_ARCH_LIST ("80;90a", the default; PTX of the
lowest is added); with ILLADA_REQUIRE_EXT=1 the build fails without an extension, which otherwise is a warning.
What was built, and why not what was not, goes to _build_info.json beside the extension; `doctor` prints it.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

from ._toolchain import (
    BuildError,
    check_nvcc,
    cuda_archs,
    cuda_library_dirs,
    extra_flags,
    find_compiler,
    find_include,
    find_ninja,
    find_nvcc,
    first_error,
    gencode_flags,
    known_archs,
    note,
    run,
    switch,
    version_line,
)

AVX512_FLAGS = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512"
ISA_FLAGS = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": AVX512_FLAGS,
    "avx512_bf16": f"{AVX512_FLAGS} -mavx512bf16",
}
BF16_SOURCES = ("attention_bwd", "attention_fwd", "head")  # the others are for avx512_bf16 what they are for avx512
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    " -Wall -Wno-psabi -Wno-attributes"
)
# One extension serves every Python from 3.10 on, but those without a global lock, which have no stable interface.
STABLE = not sysconfig.get_config_var("Py_GIL_DISABLED")
SUFFIX = ".abi3.so" if STABLE else sysconfig.get_config_var("EXT_SUFFIX")
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v --expt-relaxed-constexpr -lineinfo"


def check_ptxas(log: str) -> list[str]:
    """Returns what in ptxas' report makes a kernel slow: serialised wgmma (C7510, C7511, C7512, C7515) and register
    spills."""
    problems = [line.strip() for line in log.splitlines() if re.search(r"\bC75(10|11|12|15)\b", line)]
    kernel = "?"
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '([^']+)' for '([^']+)'", line):
            kernel = f"{found[1]} ({found[2]})"
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line)
        if spilled and (spilled[1], spilled[2]) != ("0", "0"):
            problems.append(f"{kernel}: {line.strip()}")
    return problems


def escape(path: Path | str) -> str:
    """Returns a path as ninja's own syntax wants it; what reaches the shell through $in and $out, ninja quotes
    itself."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def shell(path: Path | str) -> str:
    """Returns a path inside a ninja command: quoted for the shell, dollars doubled for ninja."""
    return shlex.quote(str(path)).replace("$", "$$")


def write_ninja(root: Path, work: Path, binary: Path, nvcc: str | None, notes: list[str]) -> list[Path]:
    """Writes work/build.ninja, which links `binary`; returns the logs that ptxas will leave there."""
    csrc = root / "csrc"
    python, cxx = find_include(), find_compiler(notes).replace("$", "$$")
    user, link = (
        " ".join(extra_flags(name, notes) for name in names).replace("$", "$$")
        for names in (("CPPFLAGS", "CXXFLAGS"), ("LDFLAGS",))
    )
    isas = list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["scalar"]
    include_flags = f"-isystem {shell(python)} -I{shell(csrc / 'include')}"
    lines = [
        f"builddir = {escape(work)}",
        "rule cxx",
        f"  command = {cxx} {user} {CXX_FLAGS} $flags {include_flags} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared -fopenmp -o $out $in {link} $libs",
    ]
    objects: list[str] = []

    def compile_with(rule: str, source: Path, stem: str, flags: str) -> None:
        objects.append(f"{stem}.o")
        lines.extend([f"build {stem}.o: {rule} {escape(source)}", f"  flags = {flags}"])

    libs, logs = "", []
    if nvcc:
        check_nvcc(nvcc)
        # a shell line per kernel file: the log is kept for check_ptxas, and shown if the compiler fails
        compiler = nvcc.replace("$", "$$")
        cuda_includes = f"-I{shell(csrc / 'include')} -I{shell(csrc / 'cuda')}"
        lines += [
            "rule nvcc",
            f"  command = {compiler} {NVCC_FLAGS} $flags {cuda_includes} -MD -MF $out.d -c $in -o $out"
            " > $out.log 2>&1 || (cat $out.log; exit 1)",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        archs = cuda_archs(notes, known_archs(nvcc))
        portable = " ".join(gencode_flags(archs))
        hopper = "-gencode arch=compute_90a,code=sm_90a"
        # the slowest first, which are those for several architectures
        for source in sorted((csrc / "cuda").glob("*.cu"), key=lambda path: (path.stem.endswith("_sm90a"), path)):
            compile_with("nvcc", source, f"{source.stem}.cu", hopper if source.stem.endswith("_sm90a") else portable)
            logs.append(work / f"{source.stem}.cu.o.log")
        libs = " ".join(f"-L{shell(d)}" for d in cuda_library_dirs(nvcc)) + " -lcudart_static -lpthread -ldl -lrt"
    # Named apart, so that a build with CUDA and one without share the other objects in one folder.
    stem, with_cuda = ("bindings.cuda", "-DILLADA_WITH_CUDA") if nvcc else ("bindings", "")
    compile_with("cxx", csrc / "bindings.cpp", stem, f"{with_cuda} {'-DPy_LIMITED_API=0x030A0000' if STABLE else ''}")
    for source in sorted((csrc / "cpu").glob("*.cpp")):
        for isa in isas if source.stem in BF16_SOURCES else isas[:3]:
            compile_with("cxx", source, f"{source.stem}.{isa}", f"-DILLADA_ISA={isa} {ISA_FLAGS[isa]}")
    lines += [f"build {binary.name}: link {' '.join(objects)}", f"  libs = {libs}", f"default {binary.name}", ""]
    text = "\n".join(lines)
    target = work / "build.ninja"
    if not target.exists() or target.read_text() != text:
        target.write_text(text)
    return logs


def run_ninja(work: Path, lock: int, notes: list[str]) -> None:
    """Runs ninja, which holds the lock too, so that one whose parent was killed is waited for."""
    command = [find_ninja(notes), "-C", str(work)]
    if jobs := os.environ.get("MAX_JOBS"):
        if not re.fullmatch(r"[1-9]\d*", jobs):
            raise BuildError(f"MAX_JOBS: expected a positive number, got {jobs!r}")
        command += ["-j", jobs]
    status, log = run(command, pass_fds=(lock,))
    if status:
        print(log)
        remedy = "; with little memory, set MAX_JOBS=1" if "Killed" in log else ""
        raise BuildError(f"compilation failed: {first_error(log, status)}{remedy}")


def check_loads(binary: Path, notes: list[str]) -> None:
    """Checks that the extension has all symbols: it may link and still miss one, since Python's own are missing until
    it is loaded."""
    if os.statvfs(binary.parent).f_flag & os.ST_NOEXEC:
        return note(notes, f"{binary.parent} is mounted noexec, so the extension could not be tried there")
    load = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW)"
    status, log = run([sys.executable, "-c", load, str(binary)])
    if status:
        last = (log.strip().splitlines() or [f"exit status {status}"])[-1]
        raise BuildError(f"the extension cannot be loaded: {last}")


@contextlib.contextmanager
def locked(work: Path) -> Iterator[int]:
    """Lets one build at a time into a folder, because ninja itself does not see to that."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / ".lock", "w") as lock:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another build in {work}", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def compile_extension(root: Path, work: Path, output: Path, nvcc: str | None, notes: list[str]) -> None:
    """Builds in `work` and renames into place, so that a process which has the old extension loaded keeps it whole."""
    binary, fresh = work / output.name, output.with_suffix(".new")
    try:
        with locked(work) as lock:
            logs = write_ninja(root, work, binary, nvcc, notes)
            run_ninja(work, lock, notes)
            for problem in (line for log in logs for line in check_ptxas(log.read_text(errors="replace"))):
                note(notes, f"slow code, says ptxas: {problem}")
            try:
                shutil.copyfile(binary, fresh)
                check_loads(fresh, notes)
                if not (output.exists() and filecmp.cmp(fresh, output, shallow=False)):
                    fresh.replace(output)
                for other in set(output.parent.glob("_C.*.so")) - {output}:
                    other.unlink()  # of one Python, which would import it instead
            finally:
                fresh.unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f"{error.filename}: {error.strerror}: build where files can be written") from error


def fingerprint(folder: Path) -> str:
    """Returns a short hash of every source file under `folder`: tells whether a binary was built from what is there
    now."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def try_to_build(root: Path, work: Path, output: Path, notes: list[str]) -> dict[str, object]:
    """Builds with CUDA, else without, unless CUDA is demanded. Raises BuildError if there is no extension."""
    nvcc, reason = find_nvcc(notes)
    archs = None
    if nvcc:
        try:
            compile_extension(root, work, output, nvcc, notes)
            archs = cuda_archs(None, known_archs(nvcc))
        except BuildError as error:
            nvcc, reason = None, f"built without CUDA because: {error}"
    if nvcc is None:
        if switch("ILLADA_CUDA") == "1":
            raise BuildError(f"ILLADA_CUDA=1, but there is no CUDA: {reason}; ILLADA_CUDA=0 leaves it out")
        compile_extension(root, work, output, None, notes)
    info = {"extension": True, "reason": "built", "compiler": version_line(find_compiler())}
    info |= {"cuda": nvcc is not None, "cuda_reason": version_line(nvcc) if nvcc else reason}
    return info | ({"cuda_archs": archs} if archs else {})


def build(root: Path, package_dir: Path, work: Path) -> dict[str, object]:
    """Builds _C into package_dir; returns what is written to _build_info.json. Without a compiler it succeeds without
    _C, and says why. Raises SystemExit if what ILLADA_CUDA=1 or ILLADA_REQUIRE_EXT=1 demands is not there."""
    start = time.monotonic()
    root, package_dir, work = root.resolve(), package_dir.resolve(), work.resolve()
    output, record = package_dir / f"_C{SUFFIX}", package_dir / "_build_info.json"
    info: dict[str, object] = {"python": platform.python_version(), "machine": platform.machine()}
    notes: list[str] = []
    demanded = True  # unless both switches are valid and neither is 1
    try:
        package_dir.mkdir(parents=True, exist_ok=True)
        try:
            demanded = "1" in (switch("ILLADA_CUDA"), switch("ILLADA_REQUIRE_EXT"))
            info |= try_to_build(root, work, output, notes)
        except BuildError as error:
            output.unlink(missing_ok=True)  # an old binary must not pass for this build's
            info |= {"extension": False, "reason": str(error), "cuda": False, "cuda_reason": "no extension"}
        info |= {"notes": notes, "sources": fingerprint(root / "csrc"), "seconds": round(time.monotonic() - start, 1)}
        fresh = record.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(info, indent=1) + "\n")
        fresh.replace(record)
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}: build where files can be written") from error
    for line in notes:
        print(f"warning: {line}", file=sys.stderr)
    if not info["extension"]:
        message = f"illada_kernels was built without its compiled extension: {info['reason']}"
        if demanded:
            raise SystemExit(message)
        print(f"warning: {message}", file=sys.stderr)
    return info


if __name__ == "__main__":
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / "csrc").is_dir():
        raise SystemExit("run this from a checkout: csrc/ is not beside the package")
    result = build(checkout, checkout / "illada_kernels", checkout / "build")
    print(json.dumps(result))
    sys.exit(0 if result["extension"] else 1)
