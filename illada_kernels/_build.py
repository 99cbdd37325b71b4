"""Compiles csrc/ into `illada_kernels._C`: writes build.ninja for g++ (or $CXX) and, where found, nvcc, and runs ninja.

Standard library only; pybind11 supplies headers and ninja runs the commands. Torch is not needed and not looked at.

    python -m illada_kernels._build        build in place, for a checkout

Environment: CXX, NVCC, ILLADA_CUDA=0 (leave CUDA out) or 1 (its failure is an error), ILLADA_CUDA_ARCHS or
TORCH_CUDA_ARCH_LIST ("80;90a", the default, plus PTX of the lowest), ILLADA_REQUIRE_EXT=1 (a failed build is an error),
MAX_JOBS. What was built, and why not what was not, goes to _build_info.json beside the extension; `doctor` prints it.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

ISA_FLAGS = {
    "scalar": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512",
}
CXX_FLAGS = (
    "-std=c++17 -O3 -fPIC -fopenmp -fvisibility=hidden -ffp-contract=fast -fno-math-errno -fno-trapping-math"
    " -Wall -Wno-psabi -Wno-attributes"
)
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v --expt-relaxed-constexpr -lineinfo"


class BuildError(RuntimeError):
    """The build cannot be done; the message says what is missing and how to get it."""


def find_compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if shutil.which(shlex.split(name)[0]):
            return name
    raise BuildError("no C++ compiler found (looked for $CXX, g++, clang++, c++): install one, e.g. `apt install g++`")


def find_ninja() -> str:
    if spec := importlib.util.find_spec("ninja"):
        binary = Path(str(spec.origin)).parent / "data" / "bin" / "ninja"
        if binary.exists():
            return str(binary)
    if path := shutil.which("ninja"):
        return path
    raise BuildError("ninja not found: `pip install ninja`")


def find_includes() -> list[str]:
    python = sysconfig.get_paths()["include"]
    if not (Path(python) / "Python.h").exists():
        raise BuildError(f"Python.h not found in {python}: install Python's headers, e.g. `apt install python3-dev`")
    spec = importlib.util.find_spec("pybind11")
    if spec is None or spec.origin is None:
        raise BuildError("pybind11 not found: `pip install pybind11`")
    return [python, str(Path(spec.origin).parent / "include")]


def find_nvcc() -> tuple[str | None, str]:
    """(path or None, reason)."""
    if os.environ.get("ILLADA_CUDA") == "0":
        return None, "ILLADA_CUDA=0"
    candidates = [os.environ.get("NVCC"), shutil.which("nvcc")]
    homes = filter(None, (os.environ.get("CUDA_HOME"), "/usr/local/cuda"))
    candidates += [str(Path(home) / "bin" / "nvcc") for home in homes]
    for path in filter(None, candidates):
        if shutil.which(path):
            return path, "found"
    return None, "nvcc not found (looked at $NVCC, PATH, $CUDA_HOME, /usr/local/cuda)"


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Where nvcc itself would look for libcudart_static.a."""
    dry = subprocess.run([nvcc, "--dryrun", "-shared", "x.o", "-o", "x.so"], capture_output=True, text=True)
    lines = [line for line in (dry.stdout + dry.stderr).splitlines() if "LIBRARIES=" in line]
    return [flag.strip('"')[2:] for line in lines for flag in shlex.split(line.split("LIBRARIES=", 1)[1])]


def gencode_flags(archs: str) -> list[str]:
    """'80;90a' -> one SASS target each, and PTX of the lowest, so that newer GPUs can translate it at load."""
    names = [a.replace(".", "") for a in re.split(r"[;, ]+", archs.replace("+PTX", "")) if a]
    bad = [a for a in names if not re.fullmatch(r"\d{2,3}[af]?", a)]
    if not names or bad:
        raise BuildError(f"architectures must look like '80;90a', got {archs!r}: set ILLADA_CUDA_ARCHS")
    lowest = min(names, key=lambda a: int(a.rstrip("af"))).rstrip("af")
    sass = [f"-gencode arch=compute_{a},code=sm_{a}" for a in names]
    return [*sass, f"-gencode arch=compute_{lowest},code=compute_{lowest}"]


def cuda_archs() -> str:
    return os.environ.get("ILLADA_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST") or "80;90a"


def check_ptxas(log: str) -> list[str]:
    """What in ptxas' report forbids shipping: serialised wgmma (C7510, C7511, C7512, C7515) and register spills."""
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
    """A path as ninja's own syntax wants it; what reaches the shell through $in and $out, ninja quotes itself."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def shell(path: Path | str) -> str:
    """A path inside a ninja command: quoted for the shell, dollars doubled for ninja."""
    return shlex.quote(str(path)).replace("$", "$$")


def write_ninja(root: Path, work: Path, binary: Path, nvcc: str | None) -> list[Path]:
    """Writes work/build.ninja, which links `binary`; returns the logs that ptxas will leave there."""
    csrc = root / "csrc"
    cxx, includes = find_compiler(), find_includes()
    isas = list(ISA_FLAGS) if platform.machine() in ("x86_64", "AMD64") else ["scalar"]
    include_flags = " ".join(f"-isystem {shell(p)}" for p in includes) + f" -I{shell(csrc / 'include')}"
    lines = [
        f"builddir = {escape(work)}",
        "rule cxx",
        f"  command = {cxx} {CXX_FLAGS} $flags {include_flags} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared -fopenmp -o $out $in $libs",
    ]
    objects: list[str] = []

    def compile_with(rule: str, source: Path, stem: str, flags: str) -> None:
        objects.append(f"{stem}.o")
        lines.extend([f"build {stem}.o: {rule} {escape(source)}", f"  flags = {flags}"])

    # Named apart, so that a build with CUDA and one without share the other objects in one folder.
    compile_with("cxx", csrc / "bindings.cpp", *(("bindings.cuda", "-DILLADA_WITH_CUDA") if nvcc else ("bindings", "")))
    for source in sorted((csrc / "cpu").glob("*.cpp")):
        for isa in isas:
            compile_with("cxx", source, f"{source.stem}.{isa}", f"-DILLADA_ISA={isa} {ISA_FLAGS[isa]}")
    libs, logs = "", []
    if nvcc:
        # a shell line per kernel file: the log is kept for check_ptxas, and shown if the compiler fails
        lines += [
            "rule nvcc",
            f"  command = {shell(nvcc)} {NVCC_FLAGS} $flags -I{shell(csrc / 'include')} -I{shell(csrc / 'cuda')}"
            " -MD -MF $out.d -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
        archs = " ".join(gencode_flags(cuda_archs()))
        hopper = "-gencode arch=compute_90a,code=sm_90a"
        for source in sorted((csrc / "cuda").glob("*.cu")):
            compile_with("nvcc", source, f"{source.stem}.cu", hopper if source.stem.endswith("_sm90a") else archs)
            logs.append(work / f"{source.stem}.cu.o.log")
        libs = " ".join(f"-L{shell(d)}" for d in cuda_library_dirs(nvcc)) + " -lcudart_static -lpthread -ldl -lrt"
    lines += [f"build {binary.name}: link {' '.join(objects)}", f"  libs = {libs}", f"default {binary.name}", ""]
    text = "\n".join(lines)
    target = work / "build.ninja"
    if not target.exists() or target.read_text() != text:
        target.write_text(text)
    return logs


def run_ninja(work: Path) -> None:
    command = [find_ninja(), "-C", str(work)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    result = subprocess.run(command, capture_output=True, text=True)
    print(result.stdout[-4000:])
    if result.returncode:
        raise BuildError(f"compilation failed:\n{(result.stdout + result.stderr)[-4000:]}")


def check_loads(binary: Path) -> None:
    """An extension may link and still miss a symbol, since Python's own are missing until it is loaded."""
    load = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW)"
    result = subprocess.run([sys.executable, "-c", load, str(binary)], capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]
        raise BuildError(f"the extension cannot be loaded: {last}")


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """One build at a time in a folder; ninja itself does not see to that."""
    work.mkdir(parents=True, exist_ok=True)
    with open(work / ".lock", "w") as lock:
        if sys.platform != "win32":
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_extension(root: Path, work: Path, output: Path, nvcc: str | None) -> None:
    """Builds in `work` and renames into place, so that a process which has the old extension loaded keeps it whole."""
    binary = work / output.name
    with locked(work):
        logs = write_ninja(root, work, binary, nvcc)
        run_ninja(work)
        problems = [problem for log in logs for problem in check_ptxas(log.read_text())]
        if problems:
            raise BuildError("ptxas reports slow code:\n" + "\n".join(problems))
        check_loads(binary)
        if not (output.exists() and filecmp.cmp(binary, output, shallow=False)):
            fresh = output.with_suffix(".new")
            shutil.copyfile(binary, fresh)
            fresh.replace(output)


def fingerprint(folder: Path) -> str:
    """A short hash of every source file under `folder`: tells whether a binary was built from what is there now."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def version_line(command: str) -> str:
    result = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True)
    lines = result.stdout.strip().splitlines()
    release = [line for line in lines if "release" in line]
    return (release or lines or ["unknown"])[0]


def build(root: Path, package_dir: Path, work: Path) -> dict[str, object]:
    """Builds _C into package_dir; returns what is written to _build_info.json. Without a compiler it succeeds without
    _C, and says why."""
    start = time.monotonic()
    root, package_dir, work = root.resolve(), package_dir.resolve(), work.resolve()
    package_dir.mkdir(parents=True, exist_ok=True)
    output = package_dir / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    nvcc, cuda_reason = find_nvcc()
    info: dict[str, object] = {"python": platform.python_version(), "machine": platform.machine()}
    try:
        try:
            compile_extension(root, work, output, nvcc)
        except BuildError as error:
            if nvcc is None or os.environ.get("ILLADA_CUDA") == "1":
                raise
            nvcc, cuda_reason = None, f"built without CUDA because: {error}"
            compile_extension(root, work, output, None)
        info |= {"extension": True, "reason": "built", "compiler": version_line(find_compiler())}
    except BuildError as error:
        output.unlink(missing_ok=True)  # an old binary must not pass for this build's
        info |= {"extension": False, "reason": str(error)}
        nvcc, cuda_reason = None, "no extension"
    info |= {"cuda": nvcc is not None, "cuda_reason": version_line(shlex.quote(nvcc)) if nvcc else cuda_reason}
    if nvcc:
        info["cuda_archs"] = cuda_archs()
    info["sources"] = fingerprint(root / "csrc")
    info["seconds"] = round(time.monotonic() - start, 1)
    (package_dir / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
    if not info["extension"]:
        message = f"illada_kernels was built without its compiled extension: {info['reason']}"
        if os.environ.get("ILLADA_REQUIRE_EXT") == "1":
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
