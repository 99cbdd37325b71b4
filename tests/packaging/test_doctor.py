"""The doctor on healthy and on broken installations, the selftest, and what it lets into the default order."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import illada_kernels
from illada_kernels import _build, _dispatch, _proven, _selftest, doctor
from illada_kernels.ops import OPS
from tests.helpers.checkout import alone

BACKENDS = set(_dispatch.DEVICES)


def healed(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def text_of(found: dict, monkeypatch, capsys) -> str:
    """What the doctor prints without --json."""
    monkeypatch.setattr(doctor, "report", lambda: found)
    assert doctor.main(["doctor"]) == 0
    return capsys.readouterr().out


def test_report_names_every_op_and_backend_with_a_reason_or_a_place(python, monkeypatch, capsys):
    found = healed(python("-m", "illada_kernels", "doctor", "--json"))
    assert set(found["ops"]) == set(OPS)
    for op, rows in found["ops"].items():
        assert {row["backend"] for row in rows} == BACKENDS, op
        assert all(row["reason"] is None or row["reason"].strip() for row in rows)
        reference = next(row for row in rows if row["backend"] == "reference")
        assert reference["reason"] is None and reference["place"]["cpu"] >= 1
        places = [row["place"]["cpu"] for row in rows if row.get("place", {}).get("cpu")]
        assert places == list(range(1, len(places) + 1))  # the rows stand in the default order
    assert found["torch"]["version"] == torch.__version__
    lines = [line.split()[:2] for line in text_of(found, monkeypatch, capsys).splitlines() if line.strip()]
    for op in OPS:  # the text has a line for each, too
        assert {backend for first, backend in (line for line in lines if len(line) == 2) if first == op} == BACKENDS


def test_a_reason_that_many_share_is_said_once_below_the_table():
    def row(backend, reason=None, opt_in=None):
        return {"backend": backend, "reason": reason, "opt_in": opt_in, "place": {"cpu": 1} if not opt_in else {}}

    unrun, gone = "not yet run on a GPU", "the extension is missing"
    rows = [row("cuda", gone, unrun), row("triton", None, unrun), row("cpu", gone), row("reference")]
    lines = doctor.table({"attention": rows, "unmask": rows})
    assert [line[53:] for line in lines[1:5]] == [
        "not available [1] [2]",
        "available as backend='triton' [2]",
        "not available [1]",
        "available",
    ]
    assert [line[53:] for line in lines[5:9]] == [line[53:] for line in lines[1:5]]
    assert lines[9:] == [f"[1] {gone}", f"[2] {unrun}"]


def test_what_a_build_passed_over_is_reported():
    info = {
        "extension": True,
        "compiler": "g++",
        "cuda": False,
        "seconds": 1,
        "notes": ["CXX names 'x', which is not there"],
    }
    assert any("CXX names 'x'" in line for line in doctor.extension_lines(info, {"cpu_isa": "avx2"}))


def test_a_reader_that_leaves_early_ends_the_doctor_quietly(root):
    command = [sys.executable, "-m", "illada_kernels", "doctor"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root)
    process.stdout.close()  # as `doctor | true` does
    assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_no_gpu_kernel_is_in_a_default_order_before_it_ran_on_a_gpu():
    import importlib

    for op, room in OPS.items():
        module = importlib.import_module(f"illada_kernels.ops.{room}")
        for backend in module.BACKENDS:
            assert backend.name not in ("cuda", "triton") or "GPU" in (backend.opt_in or ""), (op, backend)


# ---- broken installations -------------------------------------------------------------------------------------------

BROKEN = {
    "absent": ("raise ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'"),
    "raises at import": ("raise RuntimeError('built for another planet')", "RuntimeError: built for another planet"),
    "exits at import": ("raise SystemExit(3)", "SystemExit: 3"),
    "aborts at import": ("import os; os.abort()", "died of SIGABRT"),
    "is something else": ("x = 1", "no version"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_report_survives_a_torch_that(how, python, tmp_path, root):
    source, reason = BROKEN[how]
    (tmp_path / "torch.py").write_text(source + "\n")
    done = python("-m", "illada_kernels", "doctor", "--json", path=(tmp_path, root))
    found = healed(done)
    assert reason in found["torch"]["error"]
    for rows in found["ops"].values():
        assert {row["backend"] for row in rows} == BACKENDS and all(row["reason"] for row in rows)
    text = python("-m", "illada_kernels", "doctor", path=(tmp_path, root))
    assert text.returncode == 0 and reason in text.stdout


@pytest.fixture
def installed(tmp_path, root) -> Path:
    """The package without its extension, in a folder of its own."""
    junk = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(root / "illada_kernels", tmp_path / "site" / "illada_kernels", ignore=junk)
    return alone(tmp_path / "site")


def states(found: dict, backend: str) -> set[bool]:
    return {row["reason"] is None for rows in found["ops"].values() for row in rows if row["backend"] == backend}


def test_report_survives_a_corrupt_extension_and_the_reference_still_runs(python, installed, monkeypatch, capsys):
    binary = installed / "illada_kernels" / f"_C{_build.SUFFIX}"
    binary.write_bytes(b"\x7fELF" + bytes(200))
    found = healed(python("-m", "illada_kernels", "doctor", "--json", path=(installed,), cwd=installed))
    assert "ImportError" in found["extension"]["error"]
    assert states(found, "cpu") == {False} and states(found, "reference") == {True}
    assert "ImportError" in text_of(found, monkeypatch, capsys)


@pytest.mark.parametrize("source", ["raise ValueError('bad table')", "import os; os.abort()"])
def test_report_survives_an_extension_that_fails_in_another_way(source, python, installed):
    (installed / "illada_kernels" / "_C.py").write_text(source + "\n")
    found = healed(python("-m", "illada_kernels", "doctor", "--json", path=(installed,), cwd=installed))
    assert "ValueError: bad table" in found["extension"]["error"] or "SIGABRT" in found["extension"]["error"]
    assert states(found, "cpu") == {False}


def test_report_survives_an_installation_that_was_never_built_and_writes_nothing_into_it(python, installed, tmp_path):
    (installed / "illada_kernels" / "_build_info.json").unlink(missing_ok=True)
    before, cache = sorted(installed.rglob("*")), tmp_path / "cache"
    run = {"path": (installed,), "cwd": installed, "XDG_CACHE_HOME": str(cache)}
    found = healed(python("-m", "illada_kernels", "doctor", "--json", **run))
    assert found["build"]["extension"] is False and "make build" in found["build"]["reason"]
    assert "No module named 'illada_kernels._C'" in found["extension"]["error"]
    assert sorted(installed.rglob("*")) == before and not cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"extension": true}'])
def test_a_damaged_build_record_counts_as_none(content, installed, monkeypatch):
    (installed / "illada_kernels" / "_build_info.json").write_text(content)
    monkeypatch.setattr(doctor, "PACKAGE", installed / "illada_kernels")
    info = doctor.build_info()
    assert info["extension"] is False and "make build" in doctor.extension_lines(info, {"error": "none"})[0]


def test_report_says_when_the_sources_have_changed_since_the_build(installed, monkeypatch):
    package = installed / "illada_kernels"
    (installed / "csrc").mkdir()
    (installed / "csrc" / "a.cpp").write_text("int x;\n")
    record = {"extension": True, "reason": "built", "compiler": "g++", "cuda": False, "seconds": 1}
    monkeypatch.setattr(doctor, "PACKAGE", package)
    for sources, stale in (("0", True), (doctor._build.fingerprint(installed / "csrc"), False)):
        (package / "_build_info.json").write_text(json.dumps({**record, "sources": sources}))
        assert doctor.build_info()["stale"] is stale
        lines = doctor.extension_lines(doctor.build_info(), {"cpu_isa": "avx2"})
        assert any("make build" in line for line in lines) is stale


# ---- selftest -------------------------------------------------------------------------------------------------------


def test_selftest_passes_for_every_backend_of_this_machine(python, tmp_path):
    one = {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = python("-m", "illada_kernels", "doctor", "--selftest", "--json", **one)
    found = json.loads(done.stdout)
    failures = [(row["op"], row["backend"], row["device"], row) for row in found["selftest"] if not row["passed"]]
    assert not failures and done.returncode == 0
    tested = {(row["op"], row["backend"], row["device"]) for row in found["selftest"]}
    available = {
        (op, row["backend"], device)
        for op, rows in found["ops"].items()
        for row in rows
        for device in row.get("devices", ())
        if row["backend"] != "reference"
    }
    assert tested == available and all(len(row["cases"]) >= 9 for row in found["selftest"])


def off(value: torch.Tensor) -> torch.Tensor:
    return value * 1.05


def swap(tokens: torch.Tensor) -> None:
    tokens[0, 0] += 1


@pytest.mark.parametrize("op", OPS)
def test_selftest_notices_a_backend_that_is_a_little_wrong(op, monkeypatch, capsys):
    if op == "layer":
        return a_selftest_notices_a_norm_that_is_a_little_wrong(monkeypatch, capsys)
    right = getattr(illada_kernels, op)

    def wrong(*arguments, **options):
        result = right(*arguments, **{**options, "backend": "reference"})
        if options["backend"] == "reference":
            return result
        if op == "attention":
            return off(result[0]), result[1]
        if op.startswith("masked_loss"):
            return off(result)
        swap(arguments[1 if op.endswith("logits") else 2])
        return result

    monkeypatch.setitem(illada_kernels.__dict__, op, wrong)
    _selftest.main(op, "cpu", "cpu")
    assert json.loads(capsys.readouterr().out)["passed"] is False


def a_selftest_notices_a_norm_that_is_a_little_wrong(monkeypatch, capsys):
    from illada_kernels.ops.layer import cpu

    for name, of in (("norm", lambda r: (r[0], off(r[1]))), ("rope", off), ("swiglu", off)):
        with monkeypatch.context() as patch:
            right = getattr(cpu, name)
            patch.setattr(cpu, name, lambda *a, right=right, of=of: of(right(*a)))
            _selftest.main("layer", "cpu", "cpu")
        failed = {
            case["case"].split()[0].strip(",") for case in json.loads(capsys.readouterr().out)["cases"] if case["error"]
        }
        assert failed == {name}


def test_a_selftest_process_that_dies_is_a_failure(monkeypatch, capsys):
    row = {"backend": "cuda", "reason": None, "opt_in": "not yet run on a GPU", "devices": ["cuda"], "place": {}}
    found = {"ops": {op: [row] if op == "unmask" else [] for op in OPS}}
    monkeypatch.setattr(doctor, "report", lambda: found)
    dead = [{"passed": True, "cases": []}], "died of SIGSEGV"
    monkeypatch.setattr(doctor, "child", lambda arguments, timeout: dead)
    assert doctor.main(["doctor", "--selftest", "--json"]) == 1
    (outcome,) = json.loads(capsys.readouterr().out)["selftest"]
    assert outcome["passed"] is False and outcome["error"] == "died of SIGSEGV"


def test_a_selftest_that_dies_hangs_or_raises_ends_no_other(monkeypatch, capfd):
    def main(op, backend, device):
        if op == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if op == "hangs":
            time.sleep(60)
        if op == "raises":
            raise RuntimeError("no kernel")
        print(json.dumps({"passed": True, "cases": [op]}))

    which = [(op, "cpu", "cpu") for op in ("passes", "dies", "hangs", "raises", "passes too")]

    def child(arguments, timeout):
        assert arguments[:3] == ["illada_kernels._selftest", "--each", "1"] and len(arguments) == 3 + 3 * len(which)
        _selftest.each(which, 1)
        return [json.loads(line) for line in capfd.readouterr().out.splitlines()], None

    monkeypatch.setattr(_selftest, "main", main)
    monkeypatch.setattr(doctor, "child", child)
    monkeypatch.setattr(doctor, "SELFTEST_SECONDS", 1)
    outcomes = doctor.selftest_in_forks(which)
    assert [(o["op"], o["passed"], o.get("error")) for o in outcomes] == [
        ("passes", True, None),
        ("dies", False, "died of SIGKILL"),
        ("hangs", False, "did not end within 1 s"),
        ("raises", False, "RuntimeError: no kernel"),
        ("passes too", True, None),
    ]
    monkeypatch.setattr(doctor, "child", lambda *_: ([], "died of SIGILL"))  # while it imports torch
    assert {(o["passed"], o["error"]) for o in doctor.selftest_in_forks(which)} == {(False, "died of SIGILL")}


# ---- what a passed selftest opens -----------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A machine with a GPU, as far as the memory of selftests can tell; `card["name"]` may change."""
    facts = {"name": "H200, driver 1", "kernel": "k1"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_proven, "machine", lambda: facts["name"])
    monkeypatch.setattr(_proven, "kernel", lambda op, backend: f"{facts['kernel']} {op} {backend}")
    _proven.proven.cache_clear()
    yield facts
    _proven.proven.cache_clear()


def chosen(device: str) -> str:
    module = SimpleNamespace(available=lambda: None, supports=lambda problem: None)
    order = (
        _dispatch.Backend("cuda", ("cuda",), lambda: module, opt_in="not yet run on a GPU"),
        _dispatch.Backend("reference", None, lambda: module),
    )
    return _dispatch.choose("attention", order, device, None).name


def test_a_kernel_enters_the_default_order_when_its_selftest_has_passed_on_this_gpu(card):
    assert chosen("cuda") == "reference"
    path = _proven.remember("attention", "cuda", passed=True)
    assert path.is_relative_to(Path(_proven.cache_file()).parent) and chosen("cuda") == "cuda"
    assert not _proven.proven("attention", "triton") and not _proven.proven("unmask", "cuda")


@pytest.mark.parametrize("change", [{"name": "H200, driver 2"}, {"kernel": "k2"}])
def test_another_driver_or_kernel_source_asks_for_a_new_selftest(card, change):
    _proven.remember("attention", "cuda", passed=True)
    card.update(change)
    _proven.proven.cache_clear()
    assert chosen("cuda") == "reference"


def test_selftests_side_by_side_lose_no_outcome(card):
    from concurrent.futures import ThreadPoolExecutor

    names = [(op, backend) for op in OPS for backend in ("cuda", "triton")]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: _proven.remember(*name, passed=True), names))
    assert all(_proven.proven(*name) for name in names)


def test_a_failed_selftest_takes_an_earlier_pass_back(card):
    _proven.remember("attention", "cuda", passed=True)
    _proven.remember("attention", "cuda", passed=False)
    assert chosen("cuda") == "reference"


def test_a_committed_result_lets_a_kernel_in_on_gpus_of_its_capability_until_a_selftest_fails(
    card, monkeypatch, tmp_path
):
    installed = tmp_path / "illada_kernels"
    installed.mkdir()
    (installed / "_committed.json").write_text('{"9.0": ["attention/cuda"]}')
    monkeypatch.setattr(_proven, "__file__", str(installed / "_proven.py"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert chosen("cuda") == "cuda" and not _proven.proven("unmask", "cuda")
    _proven.remember("attention", "cuda", passed=False)
    assert chosen("cuda") == "reference"
    card["kernel"] = "k2"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    _proven.proven.cache_clear()
    assert chosen("cuda") == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    _proven.proven.cache_clear()
    assert chosen("cuda") == "cuda"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"H200, driver 1": 3}'])
def test_a_damaged_memory_is_no_memory(card, content):
    path = _proven.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert chosen("cuda") == "reference"
    _proven.remember("attention", "cuda", passed=True)
    assert chosen("cuda") == "cuda"


def test_the_fingerprint_of_a_kernel_follows_torch_and_the_build_record(installed, monkeypatch):
    monkeypatch.setattr(_proven, "__file__", str(installed / "illada_kernels" / "_proven.py"))
    record = installed / "illada_kernels" / "_build_info.json"
    seen = set()
    for sources in ("1", "2"):
        record.write_text(json.dumps({"sources": sources, "cuda_archs": "90a"}))
        seen.add(_proven.kernel.__wrapped__("masked_loss_from_logits", "cuda"))
    monkeypatch.setattr(torch, "__version__", "9.9")
    seen.add(_proven.kernel.__wrapped__("masked_loss_from_logits", "cuda"))
    assert len(seen) == 3


def test_where_the_system_does_not_tell_the_driver_it_is_asked_itself(monkeypatch, tmp_path):
    def read_text(self):
        raise FileNotFoundError(self)

    def version(at):
        at._obj.value = 13000
        return 0

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(
        _proven.ctypes, "CDLL", lambda name: type(name, (), {"cuDriverGetVersion": staticmethod(version)})
    )
    assert _proven.driver() == "CUDA 13000"
    monkeypatch.setattr(_proven.ctypes, "CDLL", lambda name: type(name, (), {"cuDriverGetVersion": lambda at: 999}))
    with pytest.raises(RuntimeError, match="cuDriverGetVersion failed: error 999"):
        _proven.driver()
