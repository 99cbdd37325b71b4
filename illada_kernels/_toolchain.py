"""Finds what a build needs: a C++ compiler, ninja, headers, nvcc, and the GPU architectures to compile for.

Standard library only. What is there but cannot be used is passed over, and `notes` gets a line that says why; what is
missing raises BuildError with one line that says how to get it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path

CUDA = "/usr/local/cuda"
DEFAULT_ARCHS = "80;90a"
SET_ARCHS = f"set ILLADA_CUDA_ARCHS={DEFAULT_ARCHS!r}"
OLDEST_ARCH = 80
OLDEST_CUDA = 12
ARCH_LISTS = ("ILLADA_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST")
# what torch's names stand for, as in TORCH_CUDA_ARCH_LIST="Ampere;Hopper"
ARCH_NAMES = {
    **dict.fromkeys(("kepler+tesla", "kepler", "maxwell+tegra", "maxwell", "pascal"), "60"),
    **dict.fromkeys(("volta+tegra", "volta", "turing"), "75"),
    "ampere+tegra": "87",
    "ampere": "80 86",
    "ada": "89",
    "hopper": "90",
    "blackwell+tegra": "110",
    "blackwell": "100 103 120 121",
}
# flags that would change numbers: NaN and inf, the order of sums, subnormals
NUMBERS = re.compile(
    r"-Ofast|-ffast-math|-ffinite-math-only|-funsafe-math-optimizations|-fassociative-math|-freciprocal-math"
    r"|-fno-signed-zeros|-frounding-math|-fno-rounding-math|-fcx-.*|-ffp-.*|-mdaz-ftz"
)
TRIAL = "#include <cmath>\n#include <omp.h>\nint main() { return omp_get_max_threads() < 0; }\n"


class BuildError(RuntimeError):
    """The build cannot be done; the message is one line that says what is missing and how to get it."""


def switch(name: str) -> str | None:
    """Returns "0", "1" or None of an environment variable that takes no other value."""
    value = os.environ.get(name) or None
    if value not in (None, "0", "1"):
        raise BuildError(f"{name}: expected 0 or 1, got {value!r}")
    return value


def run(command: list[str], pass_fds: tuple[int, ...] = ()) -> tuple[int, str]:
    """Returns (exit status, stdout and stderr as text), in English. A program that cannot be started has status 127."""
    out, env = subprocess.PIPE, {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, pass_fds=pass_fds, env=env)
    except OSError as error:
        return 127, f"{command[0]}: {error.strerror}"
    return done.returncode, done.stdout.decode(errors="replace")


def first_error(log: str, status: int) -> str:
    """Returns the line of a log that says what went wrong: the first with "error" or "fatal" in it, else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip() and not line.startswith("FAILED: ")]
    named = [line for line in lines if re.search(r"\berror\b|\bfatal\b|undefined reference|cannot find", line, re.I)]
    return (named or lines[-1:] or [f"exit status {status}"])[0][:300]


def as_command(value: str) -> str | None:
    """Returns a program, or one with arguments ("ccache g++"), as a shell command; None if it is not there."""
    if shutil.which(value):
        return shlex.quote(value)
    try:
        words = shlex.split(value)
    except ValueError:  # an open quote
        return None
    return shlex.join(words) if words and shutil.which(words[0]) else None


def version_line(command: str) -> str:
    status, text = run([*shlex.split(command), "--version"])
    lines = text.strip().splitlines()
    if status:
        return f"{command} --version fails: {first_error(text, status)}"
    return ([line for line in lines if "release" in line] or lines or ["unknown"])[0]


# ---- C++ -------------------------------------------------------------------------------------------------------------


def extra_flags(variable: str, notes: list[str] | None = None) -> str:
    """Returns the flags in $CPPFLAGS, $CXXFLAGS or $LDFLAGS, for a shell, without those that would change numbers."""
    try:
        words = shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"{variable} cannot be split into flags ({error}): correct its quotes") from error
    if left_out := [word for word in words if NUMBERS.fullmatch(word)]:
        note(notes, f"{variable}: {' '.join(left_out)} left out, because results would change (NaN, order of sums)")
    return shlex.join(word for word in words if word not in left_out)


def note(notes: list[str] | None, line: str) -> None:
    if notes is not None and line not in notes:
        notes.append(line)


def trial(command: str) -> str | None:
    """Returns None, or why this compiler cannot compile C++17 with OpenMP."""
    flags = f"{extra_flags('CPPFLAGS')} {extra_flags('CXXFLAGS')}"
    try:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "trial.cpp"
            source.write_text(TRIAL)
            words = shlex.split(f"{command} {flags} -std=c++17 -fPIC -fopenmp -shared")
            status, log = run([*words, str(source), "-o", f"{folder}/trial.so"])
    except OSError as error:
        return f"no folder for temporary files: {error}; set TMPDIR to one that can be written"
    return first_error(log, status) if status else None


def find_compiler(notes: list[str] | None = None) -> str:
    """Returns the first of $CXX, g++, clang++ and c++ that works, as a shell command."""
    passed_over: list[str] = []
    wanted = os.environ.get("CXX")
    for name in filter(None, (wanted, "g++", "clang++", "c++")):
        command = as_command(name)
        if command is None:
            if name == wanted:
                passed_over.append(f"CXX names {name!r}, which is not there")
        elif reason := trial(command):
            passed_over.append(f"{name} cannot compile C++17 with OpenMP ({reason})")
        else:
            for line in passed_over:
                note(notes, f"{line}: {command} is used")
            return command
    if not passed_over:
        looked = "looked for $CXX, g++, clang++, c++"
        raise BuildError(f"no C++ compiler found ({looked}): install one, e.g. `apt install g++`")
    raise BuildError(f"no C++ compiler found that works: {'; '.join(passed_over)}: mend it, or `apt install g++`")


def find_ninja(notes: list[str] | None = None) -> str:
    """Returns the path of a ninja that runs: pip's, which lies in its package or beside Python, or the one on PATH."""
    spec = importlib.util.find_spec("ninja")
    packaged = [Path(str(spec.origin)).parent / "data" / "bin" / "ninja"] if spec else []
    packaged += [Path(sysconfig.get_path("scripts")) / "ninja"]
    paths = [*(str(path) for path in packaged if path.exists()), shutil.which("ninja")]
    broken: list[str] = []
    for path in filter(None, paths):
        status, log = run([path, "--version"])
        if status == 0:
            for line in broken:
                note(notes, f"{line}: {path} is used")
            return path
        broken.append(f"{path} cannot run ({first_error(log, status)})")
    if broken:
        raise BuildError(f"{'; '.join(broken)}: `pip install --force-reinstall ninja`")
    raise BuildError("ninja not found: `pip install ninja`")


def find_include() -> str:
    """Returns the folder of Python's headers."""
    python = sysconfig.get_paths()["include"]
    if not (Path(python) / "Python.h").exists():
        raise BuildError(f"Python.h not found in {python}: install Python's headers, e.g. `apt install python3-dev`")
    return python


# ---- CUDA ------------------------------------------------------------------------------------------------------------


def find_nvcc(notes: list[str] | None = None) -> tuple[str | None, str]:
    """Returns (a shell command or None, reason)."""
    if switch("ILLADA_CUDA") == "0":
        return None, "ILLADA_CUDA=0"
    homes = filter(None, (os.environ.get("CUDA_HOME"), CUDA))
    named = os.environ.get("NVCC")
    candidates = [named, shutil.which("nvcc"), *(str(Path(home) / "bin" / "nvcc") for home in homes)]
    broken: list[str] = []
    for path in filter(None, candidates):
        command = as_command(path)
        if command is None:
            broken += [f"NVCC names {path!r}, which is not there"] if path == named else []
            continue
        status, log = run([*shlex.split(command), "--version"])
        if status == 0:
            for line in broken:
                note(notes, f"{line}: {command} is used")
            return command, "found"
        broken.append(f"{path} cannot run ({first_error(log, status)})")
    looked = f"nvcc not found (looked at $NVCC, PATH, $CUDA_HOME, {CUDA})"
    return None, "; ".join(broken) or looked


def check_nvcc(nvcc: str) -> None:
    found = re.search(r"release (\d+)\.", version_line(nvcc))
    if found and int(found[1]) < OLDEST_CUDA:
        raise BuildError(f"{nvcc} is of CUDA {found[1]}, which has no sm_90a: install CUDA {OLDEST_CUDA} or newer")


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Returns where nvcc itself would look for libcudart_static.a."""
    _, log = run([*shlex.split(nvcc), "--dryrun", "-shared", "x.o", "-o", "x.so"])
    lines = [line for line in log.splitlines() if "LIBRARIES=" in line]
    return [flag.strip('"')[2:] for line in lines for flag in shlex.split(line.split("LIBRARIES=", 1)[1])]


def known_archs(nvcc: str) -> set[str]:
    """Returns the numbers that nvcc can compile for ("80", "90"); empty if it does not say."""
    status, log = run([*shlex.split(nvcc), "--list-gpu-code"])
    return set(re.findall(r"\bsm_(\d+)", log)) if status == 0 else set()


def split_archs(text: str, variable: str = "ILLADA_CUDA_ARCHS") -> list[str]:
    """Splits '8.0;9.0a+PTX Hopper' into ['80', '90a', '90']. Raises BuildError at what is not an architecture."""
    archs: list[str] = []
    for word in filter(None, re.split(r"[;,\s]+", text)):
        name = re.sub(r"\+ptx$", "", word.lower())
        found = ARCH_NAMES.get(name, name.replace(".", "")).split()
        if not found or not all(re.fullmatch(r"\d{2,3}[af]?", arch) for arch in found):
            raise BuildError(f"{variable}={text!r}: {word!r} is not an architecture: {SET_ARCHS}")
        archs += [arch for arch in found if arch not in archs]
    if not archs:
        raise BuildError(f"{variable}={text!r} names no architecture: {SET_ARCHS}")
    return archs


def number(arch: str) -> int:
    return int(arch.rstrip("af"))


def cuda_archs(notes: list[str] | None = None, known: set[str] | None = None) -> str:
    """Returns what to compile for: $ILLADA_CUDA_ARCHS, else $TORCH_CUDA_ARCH_LIST, else the default, as '80;90a'.
    Leaves out what is older than 8.0, which the kernels need, and what nvcc does not know (`known`, if given)."""
    variable = next((name for name in ARCH_LISTS if os.environ.get(name, "").strip()), None)
    if variable is None:
        return DEFAULT_ARCHS
    text = os.environ[variable]
    archs = split_archs(text, variable)
    old = [arch for arch in archs if number(arch) < OLDEST_ARCH]
    unknown = [arch for arch in archs if known and arch not in old and str(number(arch)) not in known]
    kept = [arch for arch in archs if arch not in (*old, *unknown)]
    if old:
        note(notes, f"{variable}: {', '.join(old)} left out, because the kernels need 8.0 or newer")
    if unknown:
        note(notes, f"{variable}: {', '.join(unknown)} left out, because this nvcc does not know them")
    if not kept:
        raise BuildError(f"{variable}={text!r} names nothing of 8.0 or newer that nvcc knows: {SET_ARCHS}")
    return ";".join(kept)


def gencode_flags(archs: str) -> list[str]:
    """Returns for '80;90a' a SASS target each, and PTX of the lowest, because newer GPUs translate it at load."""
    names = split_archs(archs)
    lowest = min(map(number, names))
    sass = [f"-gencode arch=compute_{a},code=sm_{a}" for a in names]
    return [*sass, f"-gencode arch=compute_{lowest},code=compute_{lowest}"]
