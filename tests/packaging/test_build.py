"""_build.py: what it finds, what it refuses, and what it writes down, on small sources and a compiler made of shell."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from shutil import which
from types import SimpleNamespace

import pytest

from illada_kernels import _build, _toolchain

VARIABLES = ("ILLADA_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "MAX_JOBS")
CLEAN = """\
ptxas info    : Compiling entry function 'rows' for 'sm_80'
ptxas info    : Function properties for rows
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 384 bytes cmem[0]
ptxas info    : (C7519) Potential Performance Loss: wgmma.mma_async instructions are not pipelined optimally
"""
SPILL = """\
ptxas info    : Compiling entry function 'attend' for 'sm_90a'
ptxas info    : Function properties for attend
    16 bytes stack frame, 0 bytes spill stores, 24 bytes spill loads
"""
SERIAL = (
    "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
    "insufficient register resources for the function 'attend'\n"
)


def test_a_clean_ptxas_log_with_the_informative_c7519_passes():
    assert _build.check_ptxas(CLEAN) == []


def test_a_spill_is_charged_to_the_kernel_and_architecture_it_stands_under():
    (problem,) = _build.check_ptxas(CLEAN + SPILL + CLEAN)
    assert problem.startswith("attend (sm_90a): ") and "24 bytes spill loads" in problem


@pytest.mark.parametrize("code", ["C7510", "C7511", "C7512", "C7515"])
def test_serialised_wgmma_is_a_problem(code):
    assert _build.check_ptxas(CLEAN + SERIAL.replace("C7510", code)) == [SERIAL.replace("C7510", code).strip()]


@pytest.mark.parametrize(
    ("archs", "expected"),
    [
        ("80;90a", ["arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a", "arch=compute_80,code=compute_80"]),
        ("89 8.6+PTX", ["arch=compute_89,code=sm_89", "arch=compute_86,code=sm_86", "arch=compute_86,code=compute_86"]),
        ("100f", ["arch=compute_100f,code=sm_100f", "arch=compute_100,code=compute_100"]),
    ],
)
def test_each_architecture_gets_machine_code_and_the_lowest_gets_ptx(archs, expected):
    assert _build.gencode_flags(archs) == [f"-gencode {flag}" for flag in expected]


@pytest.mark.parametrize("archs", ["", ";", "hoper", "80;sm_90", "+PTX", "8.0 9.0b", "all", "80;native"])
def test_architectures_that_are_none_are_refused_by_name(archs):
    with pytest.raises(_build.BuildError, match="ILLADA_CUDA_ARCHS"):
        _build.gencode_flags(archs)


@pytest.fixture
def no_archs(monkeypatch):
    for name in ("ILLADA_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "expected", "left_out"),
    [
        ("", "80;90a", None),
        (" ", "80;90a", None),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", "80;86;90;100;120", "75"),
        ("7.5 8.0+PTX", "80", "75"),
        ("6.0;7.0;8.0", "80", "60, 70"),
        ("9.0a", "90a", None),
        ("10.0 12.0+PTX", "100;120", None),
        ("Ampere", "80;86", None),
        ("Turing;Hopper+PTX", "90", "75"),
        ("blackwell", "100;103;120;121", None),
        ("8.0,\t8.0 ; 9.0", "80;90", None),
        ("8.0 15.0", "80", "150"),
    ],
)
def test_what_torch_would_compile_for_is_read_and_what_is_too_old_or_unknown_left_out_with_a_word(
    text, expected, left_out, monkeypatch, no_archs
):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    notes: list[str] = []
    known = {"75", "80", "86", "90", "100", "103", "120", "121"}
    assert _build.cuda_archs(notes, known) == expected
    assert [note.split(" left out")[0] for note in notes] == ([f"TORCH_CUDA_ARCH_LIST: {left_out}"] if left_out else [])
    monkeypatch.setenv("ILLADA_CUDA_ARCHS", "90a")
    assert _build.cuda_archs([], known) == "90a"


@pytest.mark.parametrize("text", ["7.5", "Volta", "15.0", "junk 8.0", "8.0 / 9.0"])
def test_a_list_of_torch_without_a_usable_architecture_names_itself_and_the_remedy(text, monkeypatch, no_archs):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", text)
    with pytest.raises(_build.BuildError, match=r"TORCH_CUDA_ARCH_LIST=.*set ILLADA_CUDA_ARCHS") as caught:
        _build.cuda_archs(None, {"75", "80"})
    assert "\n" not in str(caught.value)


# ---- what is missing ------------------------------------------------------------------------------------------------


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """No program on PATH, no variable that points at one."""
    for name in ("CXX", "NVCC", "CUDA_HOME", "ILLADA_CUDA", "ILLADA_REQUIRE_EXT", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(_toolchain, "CUDA", str(tmp_path / "no cuda"))
    return tmp_path / "bin"


def test_no_compiler_is_named_with_a_remedy(bare):
    with pytest.raises(_build.BuildError, match=r"no C\+\+ compiler found .*apt install"):
        _build.find_compiler()


def test_cxx_may_hold_arguments_and_comes_first(bare, monkeypatch):
    for name in ("ccache", "g++"):
        script(bare / name, "exit 0")
    monkeypatch.setenv("CXX", "ccache clang++ -stdlib=libc++")
    assert _build.find_compiler() == "ccache clang++ -stdlib=libc++"
    monkeypatch.setenv("CXX", "absent")
    assert _build.find_compiler() == "g++"


def test_missing_ninja_and_python_headers_are_named_with_a_remedy(bare, monkeypatch, tmp_path):
    monkeypatch.setattr(_toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(_toolchain.sysconfig, "get_path", lambda name: str(bare))
    with pytest.raises(_build.BuildError, match="pip install ninja"):
        _build.find_ninja()
    monkeypatch.setattr(_toolchain.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(_build.BuildError, match=r"Python\.h not found .*python3-dev"):
        _build.find_include()


def test_nvcc_is_left_out_for_the_reason_given(bare, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA", "0")
    assert _build.find_nvcc() == (None, "ILLADA_CUDA=0")
    monkeypatch.delenv("ILLADA_CUDA")
    monkeypatch.setenv("NVCC", str(script(bare / "my-nvcc", "exit 0")))
    assert _build.find_nvcc() == (str(bare / "my-nvcc"), "found")


def test_a_compiler_that_cannot_compile_is_passed_over_with_a_word(bare, monkeypatch):
    script(bare / "g++", "echo 'cc1plus: fatal error: not installed' >&2; exit 1")
    with pytest.raises(_build.BuildError, match=r"g\+\+ cannot compile .*not installed.*apt install"):
        _build.find_compiler()
    script(bare / "clang++", "exit 0")
    notes: list[str] = []
    monkeypatch.setenv("CXX", "absent -O1")
    assert _build.find_compiler(notes) == "clang++"
    assert len(notes) == 2 and "'absent -O1', which is not there" in notes[0] and "clang++ is used" in notes[1]


@pytest.mark.parametrize("content", ["#!/bin/sh\nexit 3\n", "#!/none/such\n", "\x7fELF"])
def test_a_ninja_or_an_nvcc_that_cannot_run_is_passed_over_with_a_word(content, bare, monkeypatch):
    monkeypatch.setattr(_toolchain.importlib.util, "find_spec", lambda name: None)
    scripts = bare.parent / "scripts"
    scripts.mkdir()
    monkeypatch.setattr(_toolchain.sysconfig, "get_path", lambda name: str(scripts))
    for path in (scripts / "ninja", scripts / "nvcc"):
        script(path, "").write_text(content)
    with pytest.raises(_build.BuildError, match=r"scripts/ninja cannot run .*pip install --force-reinstall ninja"):
        _build.find_ninja()
    monkeypatch.setenv("NVCC", str(scripts / "nvcc"))
    nvcc, reason = _build.find_nvcc()
    assert nvcc is None and "scripts/nvcc cannot run" in reason and "\n" not in reason
    notes: list[str] = []
    for name in ("ninja", "nvcc"):
        script(bare / name, "exit 0")
    assert _build.find_ninja(notes) == str(bare / "ninja")
    assert _build.find_nvcc(notes) == (str(bare / "nvcc"), "found")
    assert [note.endswith(f"bin/{name} is used") for note, name in zip(notes, ("ninja", "nvcc"))] == [True, True]


def test_a_program_whose_folder_has_a_space_is_one_program(bare, monkeypatch):
    (bare / "a b").mkdir()
    monkeypatch.setenv("CXX", str(script(bare / "a b" / "c++", "exit 0")))
    monkeypatch.setenv("NVCC", str(script(bare / "a b" / "nvcc", "exit 0")))
    assert _build.find_compiler() == f"'{bare}/a b/c++'" and _build.find_nvcc()[0] == f"'{bare}/a b/nvcc'"
    monkeypatch.setenv("CXX", '"')  # no program, and no shell word
    with pytest.raises(_build.BuildError, match="CXX names '\"'"):
        _build.find_compiler()


@pytest.mark.parametrize("release, right", [("11.8", False), ("12.0", True), ("13.0", True)])
def test_an_nvcc_without_sm_90a_is_too_old(release, right, bare):
    nvcc = str(script(bare / "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.89'"))
    if right:
        return _build.check_nvcc(nvcc)
    with pytest.raises(_build.BuildError, match=r"CUDA 11, .*install CUDA 12"):
        _build.check_nvcc(nvcc)


def test_flags_that_change_numbers_are_left_out_with_a_word(monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-g -Ofast -ffast-math -I'/a b' -ffp-contract=off -fno-signed-zeros -O1 -mavx")
    notes: list[str] = []
    assert _build.extra_flags("CXXFLAGS", notes) == "-g '-I/a b' -O1 -mavx"
    assert len(notes) == 1 and "-Ofast -ffast-math -ffp-contract=off -fno-signed-zeros left out" in notes[0]
    monkeypatch.setenv("LDFLAGS", "'")
    with pytest.raises(_build.BuildError, match="LDFLAGS cannot be split"):
        _build.extra_flags("LDFLAGS")


@pytest.mark.parametrize("name", ["ILLADA_CUDA", "ILLADA_REQUIRE_EXT"])
def test_a_switch_is_0_or_1(name, project, monkeypatch):
    monkeypatch.setenv(name, "yes")
    with pytest.raises(SystemExit, match=f"{name}: expected 0 or 1, got 'yes'"):
        run(project)


# ---- whole builds ---------------------------------------------------------------------------------------------------


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A source tree of two functions, in a folder whose name a shell and ninja would both stumble over."""
    for name in ("CXX", "NVCC", "ILLADA_CUDA", "ILLADA_REQUIRE_EXT", *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    root = tmp_path / "a $b: c"
    for folder in ("cpu", "cuda", "include"):
        (root / "csrc" / folder).mkdir(parents=True)
    exported = 'extern "C" __attribute__((visibility("default")))'
    (root / "csrc" / "bindings.cpp").write_text(f"{exported} int answer() {{ return 42; }}\n")
    (root / "csrc" / "cpu" / "op.cpp").write_text(
        "#define JOIN(a, b) a##b\n#define NAME(a, b) JOIN(a, b)\nvoid NAME(op_, ILLADA_ISA)() {}\n"
    )
    (root / "csrc" / "cuda" / "rows.cu").write_text("void rows() {}\n")
    return root


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """An nvcc that compiles C++, and reports what the file `log` beside it says."""
    folder = tmp_path / "cuda"
    folder.mkdir()
    (folder / "log").write_text(CLEAN)
    os.system(f"ar rcs {folder}/libcudart_static.a")
    body = f"""
case "$1" in
  --dryrun) echo '#$ LIBRARIES=  "-L{folder}"' >&2; exit 0;;
  --version) echo 'Cuda compilation tools, release 99.9'; exit 0;;
esac
cat {folder}/log
while [ $# -gt 0 ]; do case "$1" in -c) in="$2";; -o) out="$2";; -MF) deps="$2";; esac; shift; done
: > "$deps"
exec g++ -fPIC -x c++ -c "$in" -o "$out"
"""
    monkeypatch.setenv("NVCC", str(script(folder / "nvcc", body)))
    return folder


def run(project: Path) -> tuple[dict[str, object], Path]:
    package = project / "package"
    info = _build.build(project, package, project / "work")
    assert json.loads((package / "_build_info.json").read_text()) == info
    return info, package / f"_C{_build.SUFFIX}"


def test_a_build_in_a_folder_with_spaces_and_dollars_and_a_second_one_that_does_nothing(project, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA", "0")
    of_one_python = project / "package" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    of_one_python.parent.mkdir()
    of_one_python.write_text("")  # by an older version; Python would import it first
    info, binary = run(project)
    assert of_one_python.exists() is not _build.STABLE
    assert info["extension"] is True and info["cuda"] is False and info["cuda_reason"] == "ILLADA_CUDA=0"
    assert ctypes.CDLL(str(binary)).answer() == 42
    before = binary.stat().st_mtime_ns
    again, _ = run(project)
    assert binary.stat().st_mtime_ns == before and again["sources"] == info["sources"]
    (project / "csrc" / "include" / "new.h").write_text("int x;\n")
    assert run(project)[0]["sources"] != info["sources"]


def test_cuda_sources_are_compiled_by_nvcc_and_recorded(project, nvcc, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA_ARCHS", "90a")
    info, _ = run(project)
    assert (info["cuda"], info["cuda_archs"]) == (True, "90a") and "99.9" in str(info["cuda_reason"])
    assert "-gencode arch=compute_90a,code=sm_90a" in (project / "work" / "build.ninja").read_text()


def test_a_register_spill_is_a_warning_in_the_record(project, nvcc, monkeypatch, capsys):
    (nvcc / "log").write_text(SPILL)
    monkeypatch.setenv("ILLADA_CUDA", "1")
    info, binary = run(project)
    assert info["extension"] is True and info["cuda"] is True and binary.exists()
    (line,) = info["notes"]
    assert "attend (sm_90a)" in line and "spill" in line and line in capsys.readouterr().err


def test_an_nvcc_that_fails_leaves_the_cpu_kernels_unless_cuda_is_demanded(project, nvcc, monkeypatch):
    script(nvcc / "nvcc", "case $1 in --version) echo release 99.9; exit;; esac\necho 'x.cu: error: no' >&2; exit 1")
    info, binary = run(project)
    assert info["extension"] is True and binary.exists()
    assert info["cuda"] is False
    assert info["cuda_reason"] == "built without CUDA because: compilation failed: x.cu: error: no"
    monkeypatch.setenv("ILLADA_CUDA", "1")
    with pytest.raises(SystemExit, match=r"ILLADA_CUDA=1, but there is no CUDA: .*x\.cu: error: no; ILLADA_CUDA=0"):
        run(project)
    assert not binary.exists() and "ILLADA_CUDA=1" in (project / "package" / "_build_info.json").read_text()


def test_cuda_that_is_demanded_and_not_there_is_an_error(project, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA", "1")
    monkeypatch.setattr(_toolchain.shutil, "which", lambda name: None if "nvcc" in name else which(name))
    with pytest.raises(SystemExit, match="ILLADA_CUDA=1, but there is no CUDA: nvcc not found"):
        run(project)


def test_what_torch_would_compile_for_is_recorded_without_what_is_too_old(project, nvcc, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 10.0 12.0+PTX")
    (project / "csrc" / "cuda" / "fast_sm90a.cu").write_text("void fast() {}\n")
    info, _ = run(project)
    assert info["cuda_archs"] == "100;120" and "75 left out" in info["notes"][0]
    lines = (project / "work" / "build.ninja").read_text().splitlines()
    flags = {line.split()[1]: after for line, after in itertools.pairwise(lines) if ".cu.o:" in line}
    assert flags["fast_sm90a.cu.o:"] == "  flags = -gencode arch=compute_90a,code=sm_90a"
    wanted = ("compute_100,code=sm_100", "compute_120,code=sm_120", "compute_100,code=compute_100")
    assert flags["rows.cu.o:"] == "  flags = " + " ".join(f"-gencode arch={each}" for each in wanted)


def test_the_users_flags_come_before_ours(project, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA", "0")
    monkeypatch.setenv("CPPFLAGS", "-DA=1")
    monkeypatch.setenv("CXXFLAGS", "-DB='\"$x\"' -O0 -ffast-math")
    monkeypatch.setenv("LDFLAGS", "-Wl,-z,now")
    (project / "csrc" / "bindings.cpp").write_text(
        'static_assert(A == 1 && sizeof(B) == 3, "");\n#if !__OPTIMIZE__ || __FAST_MATH__\n#error\n#endif\n'
        'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
    )
    info, _ = run(project)
    assert info["extension"] is True, info
    assert len(info["notes"]) == 1 and "-ffast-math left out" in info["notes"][0]
    assert "$in -Wl,-z,now" in (project / "work" / "build.ninja").read_text()


@pytest.mark.parametrize("jobs", ["0", "-2", "all"])
def test_a_number_of_jobs_that_is_none_is_named(jobs, project, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA", "0")
    monkeypatch.setenv("MAX_JOBS", jobs)
    assert run(project)[0]["reason"] == f"MAX_JOBS: expected a positive number, got {jobs!r}"


def test_files_that_cannot_be_written_are_named_in_one_line(project, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA", "0")
    (project / "file").write_text("")  # root may write anywhere, but not below a file
    info = _build.build(project, project / "package", project / "file" / "work")
    assert info["extension"] is False and "file/work: Not a directory" in str(info["reason"])
    with pytest.raises(SystemExit, match="file/package: Not a directory"):
        _build.build(project, project / "file" / "package", project / "work")


def test_a_build_folder_that_cannot_execute_does_not_lose_the_extension(project, monkeypatch):
    """The extension is tried where it is put; where nothing can be executed there either, a note says so."""
    monkeypatch.setenv("ILLADA_CUDA", "0")
    real, mounted = os.statvfs, set()

    def statvfs(path):
        flags = os.ST_NOEXEC if Path(path).name in mounted else 0
        return SimpleNamespace(f_flag=real(path).f_flag & ~os.ST_NOEXEC | flags)

    def tried(command, **rest):
        if command[0] == sys.executable and Path(command[-1]).parent.name in mounted:
            return 1, "failed to map segment from shared object: Operation not permitted"
        return _toolchain.run(command, **rest)

    monkeypatch.setattr(os, "statvfs", statvfs)
    monkeypatch.setattr(_build, "run", tried)
    for folders, notes in (({"work"}, 0), ({"work", "package"}, 1)):
        mounted.update(folders)
        info, binary = run(project)
        assert info["extension"] is True and binary.exists() and len(info["notes"]) == notes
    assert "mounted noexec" in info["notes"][0]


BUILD = """
import pathlib, sys
from illada_kernels import _build
root = pathlib.Path(sys.argv[1])
print(_build.build(root, root / "package", root / "work")["reason"])
"""


def start(project: Path, **env: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "ILLADA_CUDA": "0", **env}
    command = [sys.executable, "-c", BUILD, str(project)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)


def test_a_killed_build_leaves_nothing_that_the_next_one_takes_for_whole(project, tmp_path):
    body = """
case "$*" in *-MF*) ;; *) exec g++ "$@";; esac
for o; do :; done
echo half > "$o"
echo > "$STARTED"
while [ ! -e "$KILLED" ]; do sleep 0.05; done"""
    slow = script(tmp_path / "slow", body)
    (project / "package").mkdir()
    half = [project / "package" / name for name in ("_build_info.json", f"_C{Path(_build.SUFFIX).stem}.new")]
    for path in half:
        path.write_text('{"extension": tr')
    killed = start(project, CXX=str(slow), STARTED=str(tmp_path / "started"), KILLED=str(tmp_path / "killed"))
    while not (tmp_path / "started").exists():
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    (tmp_path / "killed").write_text("")
    assert [path for path in (project / "work").glob("*.o") if path.read_text() == "half\n"]
    again = start(project)
    assert again.communicate()[0].splitlines()[-1] == "built" and not half[1].exists()
    assert ctypes.CDLL(str(project / "package" / f"_C{_build.SUFFIX}")).answer() == 42
    assert json.loads(half[0].read_text())["extension"] is True


def test_two_builds_at_once_both_succeed(project):
    both = [start(project), start(project)]
    assert [build.communicate()[0].splitlines()[-1] for build in both] == ["built", "built"]
    assert ctypes.CDLL(str(project / "package" / f"_C{_build.SUFFIX}")).answer() == 42


def test_setup_says_which_setuptools_is_needed(tmp_path, root):
    """Without build isolation pip takes what is there; pyproject.toml would fail with a page about its licence."""
    folder = tmp_path / "setuptools" / "command"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text('__version__ = "65.5.1"\nExtension = setup = None\n')
    (folder / "__init__.py").write_text("")
    (folder / "build_ext.py").write_text("class build_ext: pass\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    expected = "setuptools 77 or newer is needed, this is 65.5.1: pip install 'setuptools>=77'"
    assert done.returncode == 1 and done.stderr.strip() == expected


def test_a_compile_error_is_reported_and_an_older_binary_does_not_survive_it(project, monkeypatch, capsys):
    monkeypatch.setenv("ILLADA_CUDA", "0")
    _, binary = run(project)
    (project / "csrc" / "cpu" / "op.cpp").write_text("void op( {}\n")
    info, _ = run(project)
    assert info["extension"] is False and "op.cpp" in str(info["reason"]) and not binary.exists()
    assert "without its compiled extension" in capsys.readouterr().err
    monkeypatch.setenv("ILLADA_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match=r"op\.cpp"):
        _build.build(project, project / "package", project / "work")


def test_an_extension_that_cannot_be_loaded_is_no_extension(project, monkeypatch):
    monkeypatch.setenv("ILLADA_CUDA", "0")
    (project / "csrc" / "bindings.cpp").write_text("void absent();\nvoid caller() { absent(); }\n")
    info, binary = run(project)
    assert info["extension"] is False and "absent" in str(info["reason"]) and not binary.exists()


def test_without_a_compiler_the_build_succeeds_and_says_what_to_install(project, bare):
    info, binary = run(project)
    assert info["extension"] is False and "apt install g++" in str(info["reason"]) and not binary.exists()


def test_other_processors_than_x86_get_the_scalar_code_only(project, monkeypatch):
    monkeypatch.setattr(_build.platform, "machine", lambda: "aarch64")
    (project / "work").mkdir()
    _build.write_ninja(project, project / "work", project / "work" / "x.so", None, [])
    text = (project / "work" / "build.ninja").read_text()
    assert "op.scalar.o" in text and "avx" not in text


def test_a_demanded_extension_makes_a_missing_compiler_an_error(project, bare, monkeypatch):
    monkeypatch.setenv("ILLADA_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler"):
        _build.build(project, project / "package", project / "work")
